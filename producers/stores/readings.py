"""How everything stands at one moment, read cheaply: for a worker's metrics and for `dagrelay health`.

One script reads the queues, what waits, who lives and what has been put aside, and one call for each Airflow
how things stand with it. Nothing is written, and nothing is scanned: what it costs does not grow with what
waits (but for dead letters, of which the newest are read).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import ResponseError

from ..contract import QUEUE_JOBS, QUEUE_LOOKS, QUEUE_TRIGGERS
from .gates import Gates
from .lines import Lines, LineState
from .parking import CALL_S, TASK_LINE
from .records import Script

if TYPE_CHECKING:
    from redis import Redis

QUEUES: Final = (QUEUE_TRIGGERS, QUEUE_JOBS, QUEUE_LOOKS)

LOOK_GROUPS: Final = "dagrelay:look-groups"
"""Set: the groups of looks that workers know, `service:<id>` and `airflow:<id>`."""

TAIL: Final = 16
"""Of so many messages at a queue's end it is asked since when they lie there, until one says so for sure."""

DEAD_READ: Final = 1000
"""Of so many dead letters, the newest, it is read what they died of."""

OLDER: Final = "older"
"""What the others count as."""

# KEYS: none. ARGV: the queues. Returns JSON. The age of a queue's oldest message is that of the one at its
# end, which goes next. A message does not say since when it lies there; its record does: since it, or its
# next attempt, was due, or it was called from a line. What was woken says it by its history only, as a guess:
# a deadline leaves no line there. The id is the first one outside the body, whose quotes are escaped.
READ: Final = Script(
    """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local function past(instant) return math.max(0, now - (tonumber(instant) or now)) end
local function lies_for(message)
  local head = string.find(message, '"headers"', 1, true) or 1  -- a pattern is slow on a large body
  local id = string.match(message, '"id": ?"([^"\\\\]+)"', head)
  if not id then return end
  local retries = tonumber(string.match(message, '"retries": ?(%d+)', head) or 0)
  local known = redis.call('HMGET', 'dagrelay:record:' .. id, 'due_at', 'next_at', 'line')
  if not known[1] then  -- a part of a fan-out
    local whole = retries == 0 and string.match(id, '^(.+)%.%w+$')
    local due = whole and redis.call('HGET', 'dagrelay:record:' .. whole, 'due_at')
    if due then return past(due), true end
    return
  end
  if retries == 0 then return past(known[1]), true end
  if known[2] then return past(known[2]), true end
  if known[3] and string.sub(known[3], 1, """
    + str(len(TASK_LINE))
    + """) == '"""
    + TASK_LINE
    + """' then
    local called = redis.call('ZSCORE', 'dagrelay:called:' .. string.sub(known[3], """
    + str(len(TASK_LINE) + 1)
    + """), id)
    if called then return past(called - """
    + str(CALL_S)
    + """), true end
  end
  local last = redis.call('LINDEX', 'dagrelay:history:' .. id, -1)
  local at = last and tonumber(string.match(last, '^%S+'))
  if at then return past(math.max(at, tonumber(known[1]) or at)), false end
end
local function oldest_in(key, count)
  local guess
  for i = 1, math.min(count, """
    + str(TAIL)
    + """) do
    local age, sure = lies_for(redis.call('LINDEX', key, -i))
    if sure then return age end
    if age and age > (guess or -1) then guess = age end
  end
  return guess
end
local queues = {}
for i, queue in ipairs(ARGV) do
  local count, oldest = 0, nil
  for _, key in ipairs({queue, queue .. '\\6\\0223', queue .. '\\6\\0226', queue .. '\\6\\0229'}) do
    local there = redis.call('LLEN', key)
    if there > 0 then
      count = count + there
      local age = oldest_in(key, there)
      if age and age > (oldest or -1) then oldest = age end
    end
  end
  queues[i] = {count, oldest}
end
local late = 0
-- A score of 0 says: at once.
local first = redis.call('ZRANGE', 'dagrelay:due', 1, '+inf', 'BYSCORE', 'LIMIT', 0, 1, 'WITHSCORES')[2]
if first then late = past(first) end
local looks = {}
for i, group in ipairs(redis.call('SMEMBERS', '"""
    + LOOK_GROUPS
    + """')) do
  local key = 'dagrelay:looks:' .. group
  local next_ = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2]
  looks[i] = {group, redis.call('ZCARD', key), next_ and past(next_) or 0}
end
local held, alive, gone = 0, 0, 0
local leases = redis.call('ZRANGE', 'dagrelay:leases', 0, -1, 'WITHSCORES')
for i = 1, #leases, 2 do
  held = held + redis.call('HLEN', 'dagrelay:held:' .. leases[i])
  if tonumber(leases[i + 1]) <= now then
    gone = math.max(gone, past(leases[i + 1]))
  elseif string.find(leases[i], ':', 1, true) then  -- host:pid:…, and not who drains a line for one of those
    alive = alive + 1
  end
end
local dead, newest = redis.call('ZCARD', 'dagrelay:dead'), {}
if dead > 0 then
  for _, id in ipairs(redis.call('ZREVRANGE', 'dagrelay:dead', 0, """
    + str(DEAD_READ - 1)
    + """)) do
    local error_ = redis.call('HGET', 'dagrelay:dead:' .. id, 'error') or ''
    newest[error_] = (newest[error_] or 0) + 1
  end
end
return cjson.encode({now = now, queues = queues, parked = redis.call('ZCARD', 'dagrelay:due'), late = late,
  looks = looks, held = held, alive = alive, gone = gone, dead = dead, newest = newest,
  dropped = tonumber(redis.call('GET', 'dagrelay:dead-dropped') or 0),
  quarantine = redis.call('HLEN', 'dagrelay:quarantine')})
"""
)


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue: its messages of all priorities, and since when the oldest is due, as far as it tells."""

    messages: int
    oldest_s: float | None


@dataclass(frozen=True, slots=True)
class Looks:
    """One group of looks: how many tasks are followed by it, and how late the first of them is."""

    followed: int
    late_s: float


@dataclass(frozen=True, slots=True)
class Readings:
    """How everything stands. Seconds and instants are by Redis' clock."""

    at: float
    workers: int
    """Processes whose lease runs."""
    gone_s: float
    """How long the lease of a dead worker has been over whose messages nobody has taken back; 0 for none."""
    held: int
    """Messages that workers have claimed and not acknowledged."""
    queues: Mapping[str, Queue]
    parked: int
    late_s: float
    """How long the first of what is parked has been due."""
    gated: int
    """Tasks that wait at the gates of DAGs."""
    looks: Mapping[str, Looks]
    lines: Mapping[str, LineState]
    dead: int
    """Dead letters that nobody has replayed."""
    dead_by_error: Mapping[str, int]
    """What the newest of them died of; those that were not read are `OLDER`."""
    dead_dropped: int
    """Those that have gone unseen, because there were too many."""
    quarantined: int
    used_bytes: int
    """What Redis uses; 0 where it does not tell."""
    most_bytes: int
    """What it may use; 0 where it has no limit, or does not tell."""

    @property
    def waiting(self) -> dict[str, int]:
        """Return how many tasks wait in Redis, by what for.

        `slot`: their turn at an Airflow. `gate`: a DAG is paused, or its window is full. `run`, `job`: the
        end of a DAG run or of an outside job, which is looked at. `time`: all else, a retry or a countdown, a
        wake, the parts of a fan-out.
        """
        found = {
            "slot": sum(line.waiting for line in self.lines.values()),
            "gate": self.gated,
            "run": sum(one.followed for group, one in self.looks.items() if group.startswith("airflow:")),
            "job": sum(one.followed for group, one in self.looks.items() if group.startswith("service:")),
        }
        return {**found, "time": max(0, self.parked - sum(found.values()))}


def read(client: Redis) -> Readings:
    """Return how everything stands. Raises what redis-py raises."""
    found = json.loads(READ.run(client, (), QUEUES))
    lines = Lines(client)
    memory: Any = {}
    with suppress(ResponseError):  # a managed Redis may not let us ask
        memory = client.info("memory")
    newest = {str(error): int(count) for error, count in dict(found["newest"]).items()}
    if older := found["dead"] - sum(newest.values()):
        newest[OLDER] = older
    return Readings(
        at=found["now"],
        workers=found["alive"],
        gone_s=float(found["gone"]),
        held=found["held"],
        queues={
            name: Queue(one[0], float(one[1]) if len(one) > 1 else None)
            for name, one in zip(QUEUES, found["queues"], strict=True)
        },
        parked=found["parked"],
        late_s=float(found["late"]),
        gated=Gates(client).waiting(),
        looks={group: Looks(count, float(late)) for group, count, late in found["looks"]},
        lines={name: lines.state(name) for name in lines.names()},
        dead=found["dead"],
        dead_by_error=newest,
        dead_dropped=found["dropped"],
        quarantined=found["quarantine"],
        used_bytes=int(memory.get("used_memory", 0)),
        most_bytes=int(memory.get("maxmemory", 0)),
    )


__all__ = ["LOOK_GROUPS", "OLDER", "QUEUES", "Looks", "Queue", "Readings", "read"]
