"""Which request serves which Airflow task instance, so that one that is tried again starts nothing twice.

============================== ===========================================================================
key                            what
============================== ===========================================================================
``dagrelay:airflow:<task>``    hash: `request`, the id of the request that serves it, and `generation`, which
                               changes when somebody clears the task instance, and not when it is retried
============================== ===========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from redis import Redis

from ..contract import MAX_WAIT_S
from .records import KEEP_S, Script

SERVED_FOR_S: Final = int(MAX_WAIT_S) + KEEP_S
"""How long it is known by which request a task instance is served: for as long as one may be waited for."""

# KEYS: the hash of the task instance. ARGV: the id of a new request, the generation, seconds to keep it.
# Returns the id of the request that serves it from now on, how, and one that is left and still goes on.
TAKE: Final = Script("""
local known = redis.call('HMGET', KEYS[1], 'request', 'generation')
local how, left = 'first', ''
if known[1] then
  local record = redis.call('HMGET', 'dagrelay:record:' .. known[1], 'state', 'cancel_by')
  local state = record[1]
  local over = state == 'failed' or state == 'cancelled' or (record[2] and state ~= 'done')
  if known[2] == ARGV[2] and not over then
    redis.call('EXPIRE', KEYS[1], ARGV[3])
    return {known[1], state and 'attached' or 'first', ''}
  end
  how = 'again'
  if state and not over and state ~= 'done' then left = known[1] end
end
redis.call('HSET', KEYS[1], 'request', ARGV[1], 'generation', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return {ARGV[1], how, left}
""")

# Only where it is still that request's: a cleared task instance may be served by another already.
FORGET: Final = Script("""
if redis.call('HGET', KEYS[1], 'request') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'request', 'generation')
end
""")


@dataclass(frozen=True, slots=True)
class Served:
    """The request by which a task instance is served."""

    request_id: str
    how: Literal["first", "attached", "again"]
    """``first``: nothing was accepted for it yet. ``attached``: an earlier try handed this request over, it
    goes on or has ended well, and that try did not come to take its outcome. ``again``: one before has ended,
    or belongs to a generation that somebody cleared."""
    left: str | None
    """The request of a cleared generation that still goes on, and is to be cancelled."""


def serving_key(task: str) -> str:
    """Return the Redis key for a task instance, by its name: see `TaskName`."""
    return f"dagrelay:airflow:{task}"


def take(client: Redis, task: str, new_id: str, generation: str) -> Served:
    """Return by which request a task instance is served; `new_id` where there is none that goes on.

    A request that was taken and never accepted, because its process was killed in between, is returned as
    it was. Raises what redis-py raises.
    """
    answer = TAKE.run(client, (serving_key(task),), (new_id, generation, SERVED_FOR_S))
    request_id, how, left = (one.decode() if isinstance(one, bytes) else str(one) for one in answer)
    return Served(request_id, how, left or None)  # type: ignore[arg-type]


def forget(client: Redis, task: str, request_id: str) -> None:
    """Have the next try begin anew. Raises what redis-py raises."""
    FORGET.run(client, (serving_key(task),), (request_id,))
