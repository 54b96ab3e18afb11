"""What waits in Redis for something other than its time: looks, wake keys, observations, cancels.

A waiting task is a parked message of the workers' transport (`dagrelay:parked`, `dagrelay:due`: its deadline)
and its record (state ``waiting``). Beside them:

============================ =============================================================================
key                          what
============================ =============================================================================
``dagrelay:looks:<group>``   sorted set: task id → when it is looked at next. One for each service and Airflow
``dagrelay:seen:<task id>``  list: observations (JSON; ``null``: go and look) which the task has not read yet
``dagrelay:wake:<key>``      sorted set: the tasks which that key wakes → until when
``dagrelay:history:<id>``    list: what happened to a request, one line each: instant, space, words
``dagrelay:cancelled``       sorted set: task id → when somebody asked to cancel it
``dagrelay:cancels``         counter of such wishes, by which workers see that there is a new one
============================ =============================================================================

**Epochs.** Each wait of a task has a number, the retries of its parked message, also kept in the record
(``retried``). What is not newer than that number cannot be parked: a call that is repeated because its
answer was lost, or an older copy of the message that came back from a worker that died. A look holds a
token, the score that its lease has in the sorted set: what it reports counts only while the task is parked
in the same epoch and the token is still there. So a late look changes nothing, and one that is done twice
counts once.

**The mailbox** is ``seen``: a wake writes there whether the task is parked or not, and WAIT sends a message
straight back to its queue while there is something that the task has not read. So a wake between the
registration of a key and the park is not lost.

Every script is one step, by Redis' clock, and builds the names of a task's own keys itself: no Cluster.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from .gates import facts_key, waits_for_now
from .notices import NOTICES
from .parking import GATE_LINE, PARKING, TASK_LINE
from .parking import MAX_SEEN as MAX_SEEN
from .parking import PARKED as PARKED
from .records import KEEP_S, Script

if TYPE_CHECKING:
    from redis import Redis

DUE: Final = "dagrelay:due"
CANCELLED: Final = "dagrelay:cancelled"
CANCELS: Final = "dagrelay:cancels"

CANCEL_DONE_S: Final = 60.0
"""How long one waits for the end of what was cancelled: longer than a worker waits for an Airflow's answer,
and not for ever, where there is no worker."""

READ_AT_ONCE: Final = 50
"""Parked messages that a listing reads in one step: each may be over a megabyte."""


def looks_key(group: str) -> str:
    """Return the sorted set of a group's looks: `service:<id>` or `airflow:<connection>`."""
    return f"dagrelay:looks:{group}"


def seen_key(task_id: str) -> str:
    """Return the list of what a task has not read yet."""
    return f"dagrelay:seen:{task_id}"


def wake_key(key: str) -> str:
    """Return the set of the tasks that `key` wakes."""
    return f"dagrelay:wake:{key}"


def history_key(task_id: str) -> str:
    """Return the list of what happened to a request."""
    return f"dagrelay:history:{task_id}"


# Park a waiting task. KEYS: parked, due, record, seen, cancelled, the group's looks. ARGV: task id, deadline
# (seconds since 1970), epoch, queue list, message, how many observations it has read, seconds until the first
# look, what it waits for, the group ('' for none), the line ('' for none: a sorted set, that of a
# connection's slots or that of a DAG's gate), the seconds that it is moved forward there, then pairs of the
# record's fields. What waits in a line reads no observations, and leaves them for when it comes back.
# Returns parked; queued (there is something to read already, or the deadline is over); stale (this epoch or a
# later one is in Redis already: a call that is repeated, or an older copy of the task, which has read what is
# not for it) or ended, and then nothing was done; cancelled, and then nothing was done either: the message is
# to be sent on with its mark. It begins with a deletion, so that it goes on where Redis is full: the message
# takes the place of one that a worker holds.
WAIT: Final = Script(
    PARKING
    + """
local parked, due, record, seen = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id, deadline, epoch, group = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[9]
local line = ARGV[10]
local conn = string.sub(line, 1, """
    + str(len(TASK_LINE))
    + """) == '"""
    + TASK_LINE
    + """' and string.sub(line, """
    + str(len(TASK_LINE) + 1)
    + """)
local known = redis.call('HMGET', record, 'state', 'retried', 'look')
if ended(known[1]) then return 'ended' end
if known[2] and tonumber(known[2]) >= epoch then return 'stale' end
local there = redis.call('HGET', parked, id)
if there and epoch_of(there) > epoch then return 'stale' end
if redis.call('ZSCORE', KEYS[5], id) then return 'cancelled' end
-- Of a full mailbox the newest may be another one than was read.
if line == '' then redis.call('LTRIM', seen, math.min(ARGV[6], """
    + str(MAX_SEEN)
    + """), -1) end
redis.call('HDEL', record, 'line', 'held_at', 'plain')
if known[3] and known[3] ~= group and known[3] ~= '' then
  redis.call('ZREM', 'dagrelay:looks:' .. known[3], id)
end
redis.call('HSET', record, 'state', 'waiting', 'retried', ARGV[3], 'waits_for', ARGV[8], 'look', group)
redis.call('HSETNX', record, 'accepted_at', now_text)
redis.call('HSETNX', record, 'due_at', now_text)
redis.call('HDEL', record, 'next_at', 'reason')
if line == '' then
  redis.call('HSETNX', record, 'waiting_since', now_text)
else
  redis.call('HSET', record, 'line', line)
  if conn then redis.call('HSET', record, 'held_at', string.format('%.3f', held_so_far(conn))) end
end
redis.call('PERSIST', record)
if #ARGV > 11 then redis.call('HSET', record, unpack(ARGV, 12)) end
if deadline <= now or (line == '' and redis.call('LLEN', seen) > 0) then
  redis.call('LPUSH', ARGV[4], ARGV[5])
  redis.call('HDEL', parked, id)
  redis.call('ZREM', due, id)
  if group ~= '' then redis.call('ZREM', KEYS[6], id) end
  return 'queued'
end
redis.call('HSET', parked, id,
  ARGV[3] .. '\\0' .. string.format('%.3f', now) .. '\\0' .. ARGV[4] .. '\\0' .. ARGV[5])
redis.call('ZADD', due, ARGV[2], id)
if group ~= '' then redis.call('ZADD', KEYS[6], string.format('%.6f', now + ARGV[7]), id) end
if line ~= '' then
  local from = tonumber(redis.call('HGET', record, 'due_at'))
  redis.call('ZADD', line, string.format('%.6f', from - ARGV[11]), id)
  if conn then pump(conn) end
  local airflow, dag, class = string.match(line, '^"""
    + GATE_LINE
    + """([^:]*):([^:]*):([^:]*)$')
  if airflow then
    redis.call('SADD', 'dagrelay:gate-lines:' .. airflow .. ':' .. dag, class)
    redis.call('ZADD', 'dagrelay:gates:' .. airflow, 'NX', now_text, dag)
  end
end
return 'parked'
"""
)

# What a task has not read yet. KEYS: record, seen. ARGV: the number of the wait from which it came back. From
# now on what an older copy of it parks is stale: it cannot take away what this one reads.
OBSERVE: Final = Script("""
local known = redis.call('HMGET', KEYS[1], 'state', 'retried')
if known[1] and tonumber(known[2] or 0) < tonumber(ARGV[1]) then
  redis.call('HSET', KEYS[1], 'retried', ARGV[1])
end
return redis.call('LRANGE', KEYS[2], 0, -1)
""")

# Register wake keys. KEYS: the record, the sets. ARGV: task id, seconds for which they are to live at least,
# the keys with NUL between them: the end of the task takes it out of those. A wake asks the record, so there
# is one from now on. Returns 0, and does nothing, if the task has ended.
REGISTER: Final = Script(
    PARKING
    + """
if ended(redis.call('HGET', KEYS[1], 'state')) then return 0 end
redis.call('HSETNX', KEYS[1], 'state', 'accepted')
redis.call('HSETNX', KEYS[1], 'accepted_at', now_text)
redis.call('HSETNX', KEYS[1], 'due_at', now_text)
redis.call('HSET', KEYS[1], 'wake_keys', ARGV[3])
for i = 2, #KEYS do
  redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now)
  redis.call('ZADD', KEYS[i], string.format('%.3f', now + ARGV[2]), ARGV[1])
  if redis.call('TTL', KEYS[i]) < tonumber(ARGV[2]) then redis.call('EXPIRE', KEYS[i], ARGV[2]) end
end
return 1
"""
)

# Wake by a key. KEYS: the key's set. ARGV: observation, by whom. Returns how many tasks were sent on, and for
# how many it waits in their mailbox.
WAKE_KEY: Final = Script(
    PARKING
    + """
local woken, mailed = 0, 0
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local state = redis.call('HGET', 'dagrelay:record:' .. id, 'state')
  if not state or ended(state) then
    redis.call('ZREM', KEYS[1], id)
  else
    see(id, ARGV[1])
    local value = redis.call('HGET', 'dagrelay:parked', id)
    if value then
      send_on(id, value)
      local group = redis.call('HGET', 'dagrelay:record:' .. id, 'look')
      if group and group ~= '' then redis.call('ZREM', 'dagrelay:looks:' .. group, id) end
      woken = woken + 1
    else
      mailed = mailed + 1
    end
    note(id, 'woken by ' .. ARGV[2])
  end
end
return {woken, mailed}
"""
)

# Wake by id. KEYS: none. ARGV: observation, by whom, ids. Returns the ids that were parked. One that runs
# just now, or is about to, finds it in its mailbox; but no mere `null` where it has not waited yet.
WAKE: Final = Script(
    PARKING
    + """
local woken = {}
for i = 3, #ARGV do
  local id = ARGV[i]
  local value = redis.call('HGET', 'dagrelay:parked', id)
  local known = redis.call('HMGET', 'dagrelay:record:' .. id, 'state', 'waits_for', 'look')
  local open = known[1] and not ended(known[1])
  if open and (known[2] or ARGV[1] ~= 'null') then see(id, ARGV[1]) end
  if value then
    send_on(id, value)
    if known[3] and known[3] ~= '' then redis.call('ZREM', 'dagrelay:looks:' .. known[3], id) end
    if open then note(id, 'woken by ' .. ARGV[2]) end
    woken[#woken + 1] = id
  end
end
return woken
"""
)

# Claim looks that are due. KEYS: the group's looks. ARGV: seconds of the lease, how many at the most, whether
# the messages are wanted (0/1), the record's fields to return. Returns the token, then for each one text with
# NUL between its parts (to read one text costs a client a tenth of reading ten): id, seconds late, the fields
# ('' for none), the parked value. A look belongs to the wait that asked for it: where a deadline ended that,
# and a retry is parked, it goes.
CLAIM_LOOKS: Final = Script(
    PARKING
    + """
local ids = redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[2], 'WITHSCORES')
local token = string.format('%.6f', now + ARGV[1])
local answer = {token}
redis.call('ZREM', KEYS[1], '')  -- nothing: a deletion first, so that looks go on where Redis is full
for i = 1, #ids, 2 do
  local id = ids[i]
  local value = redis.call('HGET', 'dagrelay:parked', id)
  local facts = redis.call('HMGET', 'dagrelay:record:' .. id, 'retried', 'next_at', unpack(ARGV, 4))
  if value and not facts[2] and facts[1] and tonumber(facts[1]) == epoch_of(value) then
    redis.call('ZADD', KEYS[1], token, id)
    local parts = {id, string.format('%.3f', now - ids[i + 1])}
    for fact = 4, #ARGV do
      parts[#parts + 1] = facts[fact - 1] and string.gsub(facts[fact - 1], '%z', ' ') or ''
    end
    parts[#parts + 1] = ARGV[3] == '1' and value or epoch_of(value) .. '\0\0\0'
    answer[#answer + 1] = table.concat(parts, '\\0')
  else
    redis.call('ZREM', KEYS[1], id)
  end
end
return answer
"""
)

# What looks saw. KEYS: the group's looks. ARGV: token, then for each look one text, NUL between its parts:
# id, epoch, verb, seconds until the next look, and two more. Verbs: `again` (nothing new); `changed` (state,
# progress); `error` (how many in a row, reason); `wake` (observation, words for the history). Who wants to
# hear of it is told of a state that is another. Returns a text with 1 for each that counted, and 0 for each
# that came too late.
REPORT: Final = Script(
    PARKING
    + NOTICES
    + """
local looks, token = KEYS[1], tonumber(ARGV[1])
local counted = {}
redis.call('ZREM', looks, '')  -- nothing: see CLAIM_LOOKS
for i = 2, #ARGV do
  local parts = {}
  for text in string.gmatch(ARGV[i] .. '\\0', '(%Z*)%z') do parts[#parts + 1] = text end
  local id, epoch, verb = parts[1], tonumber(parts[2]), parts[3]
  local score = redis.call('ZSCORE', looks, id)
  local value = score and tonumber(score) == token and redis.call('HGET', 'dagrelay:parked', id)
  if value and epoch_of(value) == epoch then
    local record = 'dagrelay:record:' .. id
    if verb == 'wake' then
      see(id, parts[5])
      send_on(id, value)
      redis.call('ZREM', looks, id)
      if parts[6] ~= '' then note(id, parts[6]) end
    else
      redis.call('ZADD', looks, string.format('%.6f', now + parts[4]), id)
      if verb == 'changed' then
        local known = redis.call('HMGET', record, 'seen', 'tell')
        redis.call('HSET', record, 'seen', parts[5], 'progress', parts[6])
        redis.call('HDEL', record, 'errors', 'reason')
        if known[1] and known[1] ~= parts[5] then note(id, 'is ' .. parts[5]) end
        if known[2] and known[1] ~= parts[5] then tell(known[2], id, 'progress') end
      elseif verb == 'error' then
        redis.call('HSET', record, 'errors', parts[5], 'reason', parts[6])
      end
    end
    counted[#counted + 1] = '1'
  else
    counted[#counted + 1] = '0'
  end
end
return table.concat(counted)
"""
)

# KEYS: sorted sets of looks. Returns for each how many are due, and in how many seconds the next one is ('').
DUE_LOOKS: Final = Script(
    PARKING
    + """
local answer = {}
for _, key in ipairs(KEYS) do
  local next_ = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  local due = 0
  if next_[2] and tonumber(next_[2]) <= now then due = redis.call('ZCOUNT', key, '-inf', now) end
  answer[#answer + 1] = due
  answer[#answer + 1] = next_[2] and string.format('%.3f', next_[2] - now) or ''
end
return answer
"""
)

# KEYS: record, cancelled, cancels, parked. ARGV: task id, by whom, seconds to keep the wish, the parked value
# that was read ('' for none), the same with the mark in its message, which is then sent on. Returns the state
# that the record has ('' for none), and nothing was done where it has ended; or `again`, and nothing was done
# either, where what is parked is not what was read.
CANCEL: Final = Script(
    PARKING
    + """
local id = ARGV[1]
local known = redis.call('HMGET', KEYS[1], 'state', 'look', 'cancel_by', 'line')
if ended(known[1]) then return known[1] end
local value = redis.call('HGET', KEYS[4], id)
if (value or '') ~= ARGV[4] then return 'again' end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[3])
redis.call('ZADD', KEYS[2], now_text, id)
redis.call('INCR', KEYS[3])
if known[1] and not known[3] then
  redis.call('HSET', KEYS[1], 'cancel_by', ARGV[2])
  note(id, 'cancel asked by ' .. ARGV[2])
end
if value then
  send_on(id, ARGV[5])
  if known[4] then redis.call('ZREM', known[4], id) end
  if known[2] and known[2] ~= '' then redis.call('ZREM', 'dagrelay:looks:' .. known[2], id) end
end
return known[1] or ''
"""
)

# KEYS: record, cancelled. ARGV: task id, for how many seconds a wish to cancel it counts. Whether its run is
# about to be set to failed, or may be: it was cancelled, or its fan-out was, and it has not come to its end.
BEING_STOPPED: Final = Script(
    PARKING
    + """
local known = redis.call('HMGET', KEYS[1], 'state', 'stopping', 'fan_out')
if known[2] and tonumber(known[2]) > now then return 1 end
if not known[1] or ended(known[1]) then return 0 end
local asked_at = redis.call('ZSCORE', KEYS[2], ARGV[1])
if asked_at and tonumber(asked_at) > now - ARGV[2] then return 1 end
local stopped = known[3] and redis.call('HGET', 'dagrelay:fan-out:' .. known[3], 'stopped')
return stopped and string.find(stopped, 'asked by ', 1, true) == 1 and 1 or 0
"""
)

# KEYS: record. ARGV: task id, words ('' for none), then pairs of fields; an empty value deletes. Nothing is
# done where the request has ended. What the history has words for is told too. Returns whether it was done.
LEARN: Final = Script(
    PARKING
    + NOTICES
    + """
if ended(redis.call('HGET', KEYS[1], 'state')) then return 0 end
redis.call('HSETNX', KEYS[1], 'state', 'accepted')
redis.call('HSETNX', KEYS[1], 'accepted_at', now_text)
redis.call('HSETNX', KEYS[1], 'due_at', now_text)
for i = 3, #ARGV, 2 do
  if ARGV[i + 1] == '' then redis.call('HDEL', KEYS[1], ARGV[i])
  else redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1] == 'now' and now_text or ARGV[i + 1]) end
end
if ARGV[2] ~= '' then
  note(ARGV[1], ARGV[2])
  local wish = redis.call('HGET', KEYS[1], 'tell')
  if wish then tell(wish, ARGV[1], 'progress') end
end
return 1
"""
)


@dataclass(frozen=True, slots=True)
class Waiting:
    """One parked task. Instants are seconds since 1970 by Redis' clock."""

    task_id: str
    task: str
    due_at: float
    """When it comes back at the latest: the time of its next attempt, or the end of its waiting."""
    since: float
    epoch: int
    waits_for: str
    """What it waits for: `retry`, or in words."""
    next_look_at: float | None = None
    """None where nothing looks."""
    seen: str | None = None
    """The last state that a look saw."""
    progress: str | None = None
    reason: str | None = None
    """Why it waits, where an attempt or a look has failed."""
    service: str | None = None
    connection: str | None = None
    dag_id: str | None = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """One look that is to be done. `message` is the parked message, `facts` the record's fields asked for."""

    task_id: str
    late_s: float
    epoch: int
    message: bytes
    facts: tuple[str | None, ...]


Verb = Literal["again", "changed", "error", "wake"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look saw: see REPORT."""

    task_id: str
    epoch: int
    verb: Verb
    next_in_s: float = 0.0
    first: str = ""
    second: str = ""
    shown: bool = True
    """Whether a change is to be shown in Flower: that of a state is, that of the progress alone is not."""


class Waits:
    """All that waits in one Redis. Every method raises what redis-py raises."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    # What callers and doors do

    def wake(self, task_ids: Iterable[str], observation: Any = None, by: str = "hand") -> list[str]:
        """Send parked tasks on early, with what was observed (None: go and look); return which were parked.

        One that runs just now, or waits in its queue, reads it all the same.
        """
        ids = list(task_ids)
        found = WAKE.run(self._client, (), (json.dumps(observation), by, *ids)) if ids else []
        return [_text(one) for one in found]

    def wake_by_key(self, key: str, observation: Any = None, by: str = "hand") -> tuple[int, int]:
        """Wake what waits for a key; return how many were sent on, and how many will read it as they park."""
        woken, mailed = WAKE_KEY.run(self._client, (wake_key(key),), (json.dumps(observation), by))
        return int(woken), int(mailed)

    def cancel(self, task_id: str, by: str = "hand") -> str:
        """Ask for a task to be cancelled; return the state it is in, "" for one that is not on record.

        One that has ended stays as it is. A parked one is sent on at once, with a mark by which the worker
        that gets it has Celery end it; what runs just now is not disturbed, and ends where it would wait.
        """
        return self.cancel_many([task_id], by)[0]

    def cancel_many(self, task_ids: Sequence[str], by: str = "hand") -> list[str]:
        """Ask for many to be cancelled, as `cancel` does for one; return their states."""
        from .records import record_key

        states = dict.fromkeys(task_ids, "again")
        left = list(states)
        while left:
            some, left = left[:READ_AT_ONCE], left[READ_AT_ONCE:]
            values: list[Any] = self._client.hmget(PARKED, some)
            with self._client.pipeline(transaction=False) as pipe:
                pipe.execute_command("SCRIPT", "LOAD", CANCEL.lua)
                for task_id, value in zip(some, values, strict=True):
                    there = amended = _bytes(value) if value is not None else b""
                    if there:
                        head, message = there.rsplit(b"\0", 1)
                        amended = head + b"\0" + marked(message)
                    keys = (record_key(task_id), CANCELLED, CANCELS, PARKED)
                    CANCEL.queue(pipe, keys, (task_id, by, KEEP_S, there, amended))
                for task_id, state in zip(some, pipe.execute()[1:], strict=True):
                    states[task_id] = _text(state)
            left += [one for one in some if states[one] == "again"]  # parked, or sent on, since it was read
        return [states[one] for one in task_ids]

    def parked(self, most: int = 100, after: int = 0) -> Iterator[Waiting]:
        """Yield parked tasks, those that come back first first."""
        due: list[Any] = self._client.zrange(DUE, after, after + most - 1, withscores=True)
        for start in range(0, len(due), READ_AT_ONCE):
            page = due[start : start + READ_AT_ONCE]
            yield from self._read([(_text(raw_id), float(due_at)) for raw_id, due_at in page])

    def size(self) -> int:
        """Return how many tasks are parked."""
        return int(self._client.zcard(DUE))

    def get(self, task_id: str) -> Waiting | None:
        """Return one parked task, or None."""
        due_at = self._client.zscore(DUE, task_id)
        return None if due_at is None else next(self._read([(task_id, float(due_at))]), None)

    def _read(self, due: Sequence[tuple[str, float]]) -> Iterator[Waiting]:
        """Yield those of these tasks that are still parked, in two round trips."""
        from .records import record_key

        facts = ("waits_for", "look", "seen", "progress", "reason", "service", "connection", "dag_id", "line")
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hmget(PARKED, [task_id for task_id, _ in due])
            for task_id, _ in due:
                pipe.hmget(record_key(task_id), facts)
            answers: list[list[Any]] = pipe.execute()
            values = answers[0]
            known = [
                dict(zip(facts, [None if one is None else _text(one) for one in row], strict=True))
                for row in answers[1:]
            ]
            for (task_id, _), fact in zip(due, known, strict=True):
                pipe.zscore(looks_key(fact["look"] or ""), task_id)
            in_lines = {fact["line"] or "" for fact in known}
            gates = [line for line in in_lines if line.startswith(GATE_LINE)]
            for line in gates:
                pipe.hmget(facts_key(line), "paused", "limit")
            look_at = pipe.execute()
        at_gates = {line: waits_for_now(line, *look_at.pop()) for line in reversed(gates)}
        for (task_id, due_at), value, fact, at in zip(due, values, known, look_at, strict=True):
            if value is None:
                continue
            epoch, since, _, message = _bytes(value).split(b"\0", 3)
            headers = json.loads(message)["headers"]
            waits = bool(fact["waits_for"]) and headers.get("waiting") is not None
            what = at_gates.get(fact["line"] or "") or fact["waits_for"] or ""
            yield Waiting(
                task_id=task_id,
                task=headers.get("task") or "",
                due_at=due_at,
                since=float(since),
                epoch=int(epoch),
                waits_for=what if waits else _otherwise(headers),
                next_look_at=float(at) if at is not None and waits else None,
                seen=fact["seen"],
                progress=fact["progress"],
                reason=fact["reason"],
                service=fact["service"],
                connection=fact["connection"],
                dag_id=fact["dag_id"],
            )

    def history(self, task_id: str) -> list[tuple[float, str]]:
        """Return what happened to a request between its acceptance and its end: instants and words."""
        found = []
        for line in self._client.lrange(history_key(task_id), 0, -1):
            at, _, words = _text(line).partition(" ")
            found.append((float(at), words))
        return found

    # What workers do

    def register(self, task_id: str, keys: Sequence[str], keep_s: float) -> None:
        """Have these keys wake the task from now on."""
        from .records import record_key

        if keys:
            sets = [wake_key(key) for key in keys]
            REGISTER.run(
                self._client, [record_key(task_id), *sets], (task_id, int(keep_s) + 60, "\0".join(keys))
            )

    def observations(self, task_id: str, epoch: int = 0) -> list[Any]:
        """Return what the task has not read yet, in the order in which it was seen.

        `epoch` is the number of its message, `self.request.retries`: from now on no older copy of the message
        can park the task, and with that take away what this one reads.
        """
        from .records import record_key

        found = OBSERVE.run(self._client, (record_key(task_id), seen_key(task_id)), (epoch,))
        return [json.loads(one) for one in found]

    def learn(self, task_id: str, words: str = "", **fields: str) -> bool:
        """Note fields of a request that has not ended ("" deletes, "now" is Redis' time), and words."""
        from .records import record_key

        pairs = [text for pair in fields.items() for text in pair]
        return bool(LEARN.run(self._client, (record_key(task_id),), (task_id, words, *pairs)))

    def being_stopped(self, task_id: str) -> bool:
        """Tell whether the run of a request is about to be stopped, or may be: its cancel is not done yet."""
        from .records import record_key

        keys = (record_key(task_id), CANCELLED)
        return bool(BEING_STOPPED.run(self._client, keys, (task_id, CANCEL_DONE_S)))

    def stop_is_over(self, task_id: str) -> None:
        """Note that the run of a request has been stopped, or will not be."""
        from .records import record_key

        self._client.hdel(record_key(task_id), "stopping")

    def claim_looks(
        self, group: str, *, lease_s: float, most: int, facts: Sequence[str], whole: bool = True
    ) -> tuple[str, list[Claimed]]:
        """Claim looks that are due; return the token and the looks, with their messages if `whole`."""
        answer = CLAIM_LOOKS.run(self._client, (looks_key(group),), (lease_s, most, int(whole), *facts))
        claimed = []
        for text in answer[1:]:
            raw_id, late, *rest, epoch, _, _, message = _bytes(text).split(b"\0", len(facts) + 5)
            found = tuple(one.decode() if one else None for one in rest)
            claimed.append(Claimed(raw_id.decode(), float(late), int(epoch), message, found))
        return _text(answer[0]), claimed

    def report(self, group: str, token: str, seen: Sequence[Seen]) -> list[bool]:
        """Say what looks saw; return for each whether it counted."""
        if not seen:
            return []
        args: list[Any] = [token]
        for one in seen:
            parts = (one.task_id, str(one.epoch), one.verb, f"{one.next_in_s:.3f}", one.first, one.second)
            args.append("\0".join(part.replace("\0", " ") for part in parts))
        return [digit == "1" for digit in _text(REPORT.run(self._client, (looks_key(group),), args))]

    def due_looks(self, groups: Sequence[str]) -> list[tuple[int, float | None]]:
        """Return for each group how many looks are due, and in how many seconds the next one is."""
        answer = DUE_LOOKS.run(self._client, [looks_key(group) for group in groups], ()) if groups else []
        return [
            (int(answer[i]), float(answer[i + 1]) if answer[i + 1] else None)
            for i in range(0, len(answer), 2)
        ]


def marked(message: bytes) -> bytes:
    """Return a parked message with the mark by which the worker that gets it lets Celery end it REVOKED."""
    envelope = json.loads(message)
    envelope["headers"]["parked_revoked"] = True
    return json.dumps(envelope).encode()


def _otherwise(headers: Any) -> str:
    """Return what a parked message waits for that waits for nothing but a time."""
    return "retry" if headers.get("retries") else "its time"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
