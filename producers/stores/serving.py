"""Which request serves which Airflow task instance, so that one that is tried again starts nothing twice.

============================== ===========================================================================
key                            what
============================== ===========================================================================
``dagrelay:serves:<task>``     hash: `request`, the id of the request that serves it; `generation`, which
                               changes when somebody clears the task instance, and not when it is retried;
                               `before`, `cleared`, `made`, `left`: see `Served`; `forgotten`, the id of a
                               request whose outcome was not good enough; `doubted`, the last of which it
                               was not known, as another followed it, whether it has made its run
============================== ===========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from redis import Redis

from ..contract import MAX_WAIT_S
from .records import KEEP_S, Script, record_key

SERVED_FOR_S: Final = int(MAX_WAIT_S) + KEEP_S
"""How long it is known by which request a task instance is served: for as long as one may be waited for."""

# KEYS: the hash of the task instance. ARGV: the id of a new request, the generation, seconds to keep it.
# Returns the id of the request that serves it from now on, how, one that is left and still goes on, the one
# before, whether a clear lies between the two ('1'), and the run that one of them has made.
TAKE: Final = Script("""
local known = redis.call('HMGET', KEYS[1],
  'request', 'generation', 'forgotten', 'before', 'cleared', 'made', 'left', 'doubted')
for part = 4, 8 do known[part] = known[part] or '' end
if not known[1] then
  redis.call('HSET', KEYS[1], 'request', ARGV[1], 'generation', ARGV[2])
  redis.call('EXPIRE', KEYS[1], ARGV[3])
  return {ARGV[1], 'first', '', '', '', ''}
end
local record = redis.call('HMGET', 'dagrelay:record:' .. known[1], 'state', 'cancel_by', 'run', 'unsure')
local state = record[1]
local stopped = redis.call('HGET', 'dagrelay:fan-out:' .. known[1], 'stopped')
local cancelled = record[2] or (stopped and string.find(stopped, 'asked by ', 1, true) == 1)
local over = state == 'failed' or state == 'cancelled' or (cancelled and state ~= 'done')
  or known[3] == known[1]
if known[2] == ARGV[2] and not over then
  redis.call('EXPIRE', KEYS[1], ARGV[3])
  local how = state and 'attached' or known[4] ~= '' and 'again' or 'first'
  return {known[1], how, state and '' or known[7], known[4], known[5], known[6]}
end
local cleared = known[2] ~= ARGV[2] and '1' or ''
local left, before = '', known[1]
if state then
  if not over and state ~= 'done' then left = known[1] end
else  -- its try was cut short before it handed over, and maybe before it cancelled what was left
  left = known[7]
  if cleared == '' then cleared = known[5] end
  if known[4] ~= '' then before = known[4] end
end
local function look_for_made(run)
  run = run and cjson.decode(run)
  if type(run) == 'table' and (run.created == true or run.cleared == true) then known[6] = run.dag_run_id end
end
if known[8] ~= '' then look_for_made(redis.call('HGET', 'dagrelay:record:' .. known[8], 'run')) end
look_for_made(record[3])
if state and not record[3] and (record[4] or state == 'accepted' or state == 'waiting') then
  known[8] = known[1]
end
redis.call('HSET', KEYS[1], 'request', ARGV[1], 'generation', ARGV[2], 'before', before,
  'cleared', cleared, 'made', known[6], 'left', left, 'doubted', known[8])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return {ARGV[1], 'again', left, before, cleared, known[6]}
""")

# Only where it is still that request's: a cleared task instance may be served by another already.
FORGET: Final = Script("""
if redis.call('HGET', KEYS[1], 'request') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'forgotten', ARGV[1])
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
    """The request of a cleared generation that still goes on, and is to be cancelled; told until the one that
    follows is accepted."""
    before: str | None = None
    """The request before this one, of those that were accepted."""
    cleared: bool = False
    """Whether somebody cleared the task instance between those two: then all of it is to be done anew."""
    made: str | None = None
    """The id of the run that one before has made, or cleared: that run is this task instance's own."""


def serving_key(task: str) -> str:
    """Return the Redis key for a task instance, by the name that its operator gives it."""
    return f"dagrelay:serves:{task}"


def take(client: Redis, task: str, new_id: str, generation: str) -> Served:
    """Return by which request a task instance is served; `new_id` where there is none that goes on.

    A request that was taken and never accepted, because its process was killed in between, is returned as
    it was. Raises what redis-py raises.
    """
    answer = TAKE.run(client, (serving_key(task),), (new_id, generation, SERVED_FOR_S))
    request_id, how, left, before, cleared, made = (
        one.decode() if isinstance(one, bytes) else str(one) for one in answer
    )
    return Served(request_id, how, left or None, before or None, cleared == "1", made or None)  # type: ignore[arg-type]


def serves(client: Redis, task: str) -> str | None:
    """Return the id of the request that serves a task instance, or None. Raises what redis-py raises."""
    found = client.hget(serving_key(task), "request")
    return found.decode() if isinstance(found, bytes) else found


def forget(client: Redis, task: str, request_id: str) -> None:
    """Have the next try begin anew, though this request has ended well. Raises what redis-py raises."""
    FORGET.run(client, (serving_key(task),), (request_id,))


# Of a fan-out, whose next try repeats only a part of it

AT_ONCE: Final = 1000
"""So many records are read in one step."""


@dataclass(frozen=True, slots=True)
class RunBefore:
    """What became of one run in the tries before."""

    done: bool
    """It ended well, and nobody has cleared the task since."""
    made: bool
    """One of them has made it, or cleared it: it is the task instance's own."""

    def handed_on(self, *, cleared: bool) -> dict[str, str]:
        """Return what the record of the request that follows is to say: it may never come to its run."""
        words = [word for word, so in (("done", self.done and not cleared), ("made", self.made)) if so]
        return {"run_before": " ".join(words)} if words else {}


RunName = tuple[str, str, str]
"""The connection, the DAG and the run id."""


def runs_before(client: Redis, ids: Sequence[str]) -> dict[RunName, RunBefore]:
    """Return what became of the run of each of these requests, as far as it is on record.

    That of one which was stopped before it came to its run is what the try before it knew. Raises what
    redis-py raises.
    """
    found: dict[RunName, RunBefore] = {}
    for start in range(0, len(ids), AT_ONCE):
        with client.pipeline(transaction=False) as pipe:
            for one in ids[start : start + AT_ONCE]:
                pipe.hmget(record_key(one), _OF_A_RUN)
            for several in pipe.execute():
                connection, dag_id, run_id, ended, run, told = (_text(one) for one in several)
                if dag_id and run_id:
                    name = (connection, dag_id, run_id)
                    facts: Mapping[str, object] = json.loads(run) if run else {}
                    made = bool(facts.get("created") or facts.get("cleared")) or "made" in told
                    other = found.get(name)
                    found[name] = RunBefore(
                        ended == "done" or (not run and "done" in told),
                        made or (other is not None and other.made),
                    )
    return found


_OF_A_RUN: Final = ["connection", "dag_id", "dag_run_id", "state", "run", "run_before"]


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""
