"""The life of each accepted request: one Redis hash, from acceptance to 14 days after the end.

Key ``dagrelay:record:<task id>``. Fields, all text; instants are seconds since 1970 by Redis' clock:

=============== ============ ====================================================================
field           written by   meaning
=============== ============ ====================================================================
state           both         accepted, waiting (for its next attempt), done, failed, cancelled
task            caller       the Celery task's name
dag_id …        caller       dag_id, dag_run_id, key, connection, by: what was asked, never the conf
accepted_at     caller       when it was accepted
due_at          caller       from when on it counts (accepted_at plus the caller's countdown)
attempts        worker       attempts that asked Airflow and are over, the last one included
retried         worker       the number of the newest retry that is in Redis; older copies are stale
next_at         worker       when the next attempt is due
unsure          worker       1 once an answer was lost: a run may exist
waits_for       worker       what it waits for, where that is more than its time (see `waits`)
waiting_since   worker       since when, for the first time
look            worker       the group of looks that follow it; empty for none
seen            worker       the last state that a look saw, with progress
errors          worker       how many looks in a row have failed, the last for `reason`
job_id          worker       the id of the external job; reference is our name for it
submitting_at   worker       when its submission was first tried
submitted_at    worker       when its id was known
cancel_by       both         who asked to cancel it
stopping        worker       until when its run may yet be set to failed, after its end; else there is none
missing_since   worker       since when Airflow says that the DAG is missing or broken
held_s          worker       seconds spent waiting for a held connection
held_at         worker       in line: for how long its connection had been held by then (see `lines`)
line            worker       the line in which it waits; plain: who drains that line may take it
reason          worker       why it waits, or why it ended so
error           worker       the class in `errors` that ended it, with error_args as JSON
run             worker       the run that it ended in, as JSON
outcome         worker       how a job ended, as JSON, where that is not long
ended_at        worker       when it ended
corrected_at    worker       when an unknown outcome was found to be a run after all
fan_out         caller       the fan-out that it is part of (its own id: it is the fan-out)
part            caller       its chunk and its place in it; outside (worker): it has a message of its own
run_before      caller       what became of its run in the tries before, as an operator knows: see `serving`
replay_of       caller       the request of which it is a replay: see `dead`
tell, at_end    caller       who hears of it, and what its end sends on: see `notices`
fingerprint     caller       what was asked with an id of the sender's own, as a hash
conf_ref        both         the stored conf that it holds: see `claim_check`
=============== ============ ====================================================================

A record is written in the same script as the message it accounts for (`ACCEPT`) and as the Celery
result it explains (`STORE`): at every moment there is a record for a message, and a reason for an end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from ..errors import ConfGone
from .claim_check import HOLDING, RELEASE, Packed, upload
from .letters import LETTERS, Keeping
from .notices import NOTICES
from .script import Script as Script
from .states import ENDED as ENDED
from .states import RESULT_PREFIX as RESULT_PREFIX
from .states import State as State

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

KEEP_S: Final = 14 * 86_400
"""How long a record is kept after the end."""

CONF_KEEP_S: Final = 30 * 86_400
"""How long a stored conf is kept after the last request with it has ended; the workers' settings may say."""

MOST_ATTEMPTS_TOLD: Final = 30
MAX_TOLD: Final = 200
"""Of an attempt's reason, in characters: in an outage there is a history for everything that waits."""


# KEYS: per item its record and its queue. ARGV: per item the message, the delay in seconds, and six fields
# of the record, with NUL between them (one argument costs a client less than six), then names and values of
# further ones. A request without a DAG has none of its fields. An id that is on record
# already is not queued again, so that a call whose answer was lost may be repeated (by us, within the call;
# by the caller, with its own task_id). The push goes first: where it fails (a key of another type), no record
# says that something was accepted. Returns a text with 1 for each that is new, 0 for each other, and 2 for
# each whose stored conf is not there: that one is not accepted.
ACCEPT: Final = Script(
    HOLDING
    + """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local now_text = string.format('%.6f', now)
local new, messages, told, taken, confs = {}, {}, {}, {}, {}
for i = 1, #KEYS, 2 do
  local is_new = not taken[KEYS[i]] and redis.call('EXISTS', KEYS[i]) == 0
  local conf = is_new and conf_of(ARGV[(3 * i + 3) / 2])
  if conf and redis.call('EXISTS', 'dagrelay:conf:' .. conf) == 0 then
    told[#told + 1] = '2'
  else
    told[#told + 1] = is_new and '1' or '0'
    if is_new then
      taken[KEYS[i]] = true
      confs[i] = conf
      local queue = KEYS[i + 1]
      local list = messages[queue] or {}
      messages[queue] = list
      list[#list + 1] = ARGV[(3 * i - 1) / 2]
      new[#new + 1] = i
    end
  end
end
for queue, list in pairs(messages) do redis.call('LPUSH', queue, unpack(list)) end
for _, i in ipairs(new) do
  local a = (3 * i - 1) / 2
  local due = tonumber(ARGV[a + 1]) == 0 and now_text or string.format('%.6f', now + ARGV[a + 1])
  local about = {}
  for text in string.gmatch(ARGV[a + 2] .. '\\0', '(%Z*)%z') do about[#about + 1] = text end
  redis.call('HSET', KEYS[i], 'state', 'accepted', 'accepted_at', now_text, 'due_at', due,
    'task', about[1], 'by', about[6])
  if about[2] ~= '' then
    redis.call('HSET', KEYS[i], 'dag_id', about[2], 'dag_run_id', about[3], 'key', about[4],
      'connection', about[5])
  end
  if #about > 6 then redis.call('HSET', KEYS[i], unpack(about, 7)) end
  if confs[i] then hold(confs[i], string.sub(KEYS[i], 17)) end
end
return table.concat(told)
"""
)

# KEYS: the record. ARGV: unsure (0/1), missing (0/1), held_s to add, reason, the reason as one short line.
# Returns attempts, seconds since it was due without those held, seconds missing, unsure. Of attempts in a row
# that failed for one reason the history keeps the first and the last: an outage of a day has thousands.
ATTEMPT_FAILED: Final = Script(
    """
local record = KEYS[1]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local known = redis.call('HMGET', record, 'state', 'attempts', 'due_at', 'unsure')
if known[1] == 'done' or known[1] == 'failed' or known[1] == 'cancelled' then  -- by another copy: it stands
  local age = now - tonumber(known[3] or now)
  return {tonumber(known[2] or 0), string.format('%.3f', age), '0', known[4] or '0'}
end
redis.call('HSETNX', record, 'state', 'accepted')
redis.call('HSETNX', record, 'accepted_at', string.format('%.6f', now))
redis.call('HSETNX', record, 'due_at', string.format('%.6f', now))
redis.call('HSET', record, 'reason', ARGV[4])
local attempts = redis.call('HINCRBY', record, 'attempts', 1)
local held = tonumber(redis.call('HGET', record, 'held_s') or 0)
local age = now - tonumber(redis.call('HGET', record, 'due_at')) - held
if tonumber(ARGV[3]) > 0 then
  redis.call('HSET', record, 'held_s', string.format('%.3f', held + ARGV[3]))
end
local history = 'dagrelay:history:' .. string.sub(record, 17)
local line = string.format('%.3f attempt %d failed: %s', now, attempts, ARGV[5])
local last = redis.call('LRANGE', history, -2, -1)
local function reason_of(told) return told and string.match(told, '^%S+ attempt %d+ failed: (.*)$') end
local before, newest = reason_of(last[1]), reason_of(last[2])
if newest and ((newest == ARGV[5] and before == ARGV[5]) or redis.call('LLEN', history) >= """
    + str(MOST_ATTEMPTS_TOLD)
    + """) then
  redis.call('LSET', history, -1, line)
else
  redis.call('RPUSH', history, line)
end
redis.call('EXPIRE', history, """
    + str(KEEP_S)
    + """)
if ARGV[1] == '1' then redis.call('HSET', record, 'unsure', '1') end
local missing = 0
if ARGV[2] == '1' then
  redis.call('HSETNX', record, 'missing_since', string.format('%.6f', now))
  missing = now - tonumber(redis.call('HGET', record, 'missing_since'))
else
  redis.call('HDEL', record, 'missing_since')
end
return {attempts, string.format('%.3f', age), string.format('%.3f', missing),
  redis.call('HGET', record, 'unsure') or '0'}
"""
)

# What the end of one request means for the fan-out that it is part of (see `fan_outs`): its outcome is kept
# and counted, once. One that has a message of its own is waited for by its chunk's task, which is sent on
# with the last of them, or finds a line in its mailbox when it comes to park. `outside`: the record of such a
# one, whose field goes as it is counted off, so that this is done once.
PART_ENDED: Final = (
    NOTICES
    + RELEASE
    + """
local function part_ended(fan_out, part, state, outcome, outside, corrected)
  local key = 'dagrelay:fan-out:' .. fan_out
  local about = redis.call('HMGET', key, 'total', 'over', 'on_error')
  if not about[1] or about[2] then return end
  local chunk, place = string.match(part, '^(%d+) (%d+)$')
  if redis.call('HSETNX', key .. ':outcomes', place, outcome) == 1 then
    redis.call('HINCRBY', key, 'ended', 1)
    if state ~= 'done' then redis.call('HINCRBY', key, state, 1) end
    if state == 'failed' and about[3] == 'stop' then
      redis.call('HSETNX', key, 'stopped', 'stopped: an earlier request failed')
    end
  elseif corrected then  -- the state that it had
    redis.call('HSET', key .. ':outcomes', place, outcome)
    redis.call('HINCRBY', key, corrected, -1)
    return
  end
  if outside and redis.call('HDEL', outside, 'outside') == 1
    and redis.call('HINCRBY', key, 'outside:' .. chunk, -1) == 0 then
    local id = fan_out .. '.' .. chunk
    local value = redis.call('HGET', 'dagrelay:parked', id)
    if value then
      local a = string.find(value, '\\0', 1, true)
      local b = string.find(value, '\\0', a + 1, true)
      local c = string.find(value, '\\0', b + 1, true)
      redis.call('LPUSH', string.sub(value, b + 1, c - 1), string.sub(value, c + 1))
      redis.call('HDEL', 'dagrelay:parked', id)
      redis.call('ZREM', 'dagrelay:due', id)
    else
      redis.call('RPUSH', 'dagrelay:seen:' .. id, 'null')
      redis.call('EXPIRE', 'dagrelay:seen:' .. id, """
    + str(KEEP_S)
    + """)
    end
  end
end
local function outcome_of(record, id, state)
  local found = redis.call('HMGET', record, 'dag_id', 'dag_run_id', 'run', 'error', 'reason', 'cancel_by')
  local text = '{"id":' .. cjson.encode(id) .. ',"dag_id":' .. cjson.encode(found[1] or '')
    .. ',"dag_run_id":' .. cjson.encode(found[2] or '') .. ',"state":"' .. state .. '"'
  if state == 'done' then
    return text .. ',"run":' .. (found[3] or 'null') .. ',"error":null,"reason":null}'
  end
  local kind, reason = found[4] or 'TaskFailed', found[5] or ''
  if state == 'cancelled' then
    if kind ~= 'RequestCancelled' and kind ~= 'OutcomeUnknown' then
      kind, reason = 'RequestCancelled', found[6] and 'asked by ' .. found[6] or 'revoked'
    end
    reason = string.gsub(reason, '^cancelled: ', '')
  end
  return text .. ',"run":null,"error":' .. cjson.encode(kind) .. ',"reason":' .. cjson.encode(reason) .. '}'
end
"""
)

# KEYS: the result and the record. ARGV: the result as Celery keeps it, its seconds to live, the state of
# the record, seconds in which the next attempt is due, seconds to keep the record, correct (0/1), seconds to
# keep a stored conf that nobody else holds, then pairs of fields. An end stands: whatever comes later (a copy
# of the message, a redelivery) only renews a result that is gone. `correct` replaces an end that was
# OutcomeUnknown, and no other. The retry of an older copy changes nothing. With the end goes all that is kept
# for a task that waits: see `waits`. Returns 0 if it changed nothing, 1 for what goes on, and for an end the
# fields of `Ended`, NUL between them.
_STORE: Final = """
local result, record = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local state = redis.call('HGET', record, 'state')
local ended = state == 'done' or state == 'failed' or state == 'cancelled'
if ended and not (ARGV[6] == '1' and redis.call('HGET', record, 'error') == 'OutcomeUnknown') then
  if ARGV[3] == state and redis.call('EXISTS', result) == 0 then
    redis.call('SET', result, ARGV[1], 'EX', ARGV[2])
    redis.call('PUBLISH', result, ARGV[1])
  end
  return 0
end
if ARGV[3] == 'waiting' then
  local newest = tonumber(redis.call('HGET', record, 'retried') or 0)
  for i = first, #ARGV, 2 do
    if ARGV[i] == 'retried' and tonumber(ARGV[i + 1]) <= newest then return 0 end
  end
end
redis.call('SET', result, ARGV[1], 'EX', ARGV[2])
redis.call('HSET', record, 'state', ARGV[3], unpack(ARGV, first))
if ARGV[3] == 'waiting' then
  redis.call('HSET', record, 'next_at', string.format('%.6f', now + ARGV[4]))
else
  if ARGV[3] ~= 'cancelled' and ARGV[6] == '0' then redis.call('HINCRBY', record, 'attempts', 1) end
  redis.call('HSET', record, ARGV[6] == '1' and 'corrected_at' or 'ended_at', string.format('%.6f', now))
  if ARGV[6] == '1' then redis.call('HDEL', record, 'error', 'error_args') end
  redis.call('HDEL', record, 'next_at')
  redis.call('EXPIRE', record, ARGV[5])
  local waited = redis.call('HMGET', record, 'waits_for', 'look', 'cancel_by', 'fan_out', 'part', 'outside',
    'wake_keys', 'line', 'conf_ref')
  local id = string.sub(record, 17)
  if waited[9] then release(waited[9], id, ARGV[7]) end
  if waited[8] then redis.call('ZREM', waited[8], id) end
  redis.call('DEL', 'dagrelay:seen:' .. id)
  redis.call('ZREM', 'dagrelay:cancelled', id)
  if waited[1] then  -- an older copy of the message may be what ends it
    redis.call('HDEL', 'dagrelay:parked', id)
    redis.call('ZREM', 'dagrelay:due', id)
  end
  if waited[2] and waited[2] ~= '' then redis.call('ZREM', 'dagrelay:looks:' .. waited[2], id) end
  if waited[7] then
    for key in string.gmatch(waited[7] .. '\\0', '(%Z*)%z') do
      redis.call('ZREM', 'dagrelay:wake:' .. key, id)
    end
  end
  if waited[4] and waited[5] then
    part_ended(waited[4], waited[5], ARGV[3], outcome_of(record, id, ARGV[3]), waited[6] and record,
      ARGV[6] == '1' and state)
  elseif waited[4] then
    local key = 'dagrelay:fan-out:' .. id
    for _, conf in ipairs(redis.call('SMEMBERS', key .. ':confs')) do release(conf, id, ARGV[7]) end
    redis.call('DEL', key .. ':requests', key .. ':outcomes', key .. ':confs')
    redis.call('HSET', key, 'over', '1')
    redis.call('EXPIRE', key, ARGV[5])
  end
  local kept = redis.call('HGET', record, 'run_kept')
  if kept then
    redis.call('HSET', record, 'run', kept)
    redis.call('HDEL', record, 'run_kept')
  end
  tell_end(record, id, ARGV[6] == '1' and 'corrected' or 'ended')
"""
_TELL: Final = """
end
redis.call('PUBLISH', result, ARGV[1])
if ARGV[3] == 'waiting' then return 1 end
local told = redis.call('HMGET', record, 'task', 'dag_id', 'dag_run_id', 'connection', 'key', 'service',
  'job_id', 'attempts', 'accepted_at')
for i = 1, 8 do told[i] = told[i] and string.gsub(told[i], '%z', ' ') or '' end
told[9] = told[9] and string.format('%.3f', now - told[9]) or ''
told[10] = dropped
return table.concat(told, '\\0')
"""

STORE: Final = Script(PART_ENDED + "local first, dropped = 8, 0" + _STORE + _TELL)

# The same where the desk for failures is concerned. ARGV: before the pairs, how many texts the dead letter
# has that is written with the end (0 for none), and those: see `letters.bury`. What somebody asked to cancel
# gets none. A correction takes the letter off the desk.
STORE_DEAD: Final = Script(
    PART_ENDED
    + LETTERS
    + "local letter, dropped = tonumber(ARGV[8]), 0\nlocal first = 9 + letter"
    + _STORE
    + """
  if ARGV[6] == '1' then
    unbury(id)
  elseif letter > 0 and (ARGV[3] == 'failed' or not waited[3]) then
    local more = {unpack(ARGV, 11, first - 1)}
    dropped = bury(record, id, now, tonumber(ARGV[9]), tonumber(ARGV[10]), more)
  end
"""
    + _TELL
)


class Ended(NamedTuple):
    """One request that has just ended, as its record has it; what is not known is ""."""

    task: str
    dag_id: str
    dag_run_id: str
    connection: str
    key: str
    service: str
    job_id: str
    attempts: str
    """How many there were, the last one included."""
    age_s: str
    """Seconds since it was accepted, by Redis' clock."""
    letters_dropped: str = "0"
    """How many dead letters that nobody had replayed went for this one's: there were too many."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one request. Instants are seconds since 1970; what is not known yet is None."""

    task_id: str
    state: State = "accepted"
    task: str | None = None
    dag_id: str | None = None
    dag_run_id: str | None = None
    key: str | None = None
    connection: str | None = None
    by: str | None = None
    accepted_at: float | None = None
    due_at: float | None = None
    attempts: int = 0
    retried: int = 0
    next_at: float | None = None
    unsure: bool = False
    held_s: float = 0.0
    reason: str | None = None
    error: str | None = None
    error_args: list[Any] | None = None
    run: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    ended_at: float | None = None
    corrected_at: float | None = None
    waits_for: str | None = None
    waiting_since: float | None = None
    seen: str | None = None
    progress: str | None = None
    errors: int = 0
    job_id: str | None = None
    reference: str | None = None
    submitting_at: float | None = None
    submitted_at: float | None = None
    cancel_by: str | None = None
    service: str | None = None
    fan_out: str | None = None
    replay_of: str | None = None
    conf_ref: str | None = None

    @property
    def ended(self) -> bool:
        """Whether it has come to its one end."""
        return self.state in ENDED

    def to_json(self) -> dict[str, Any]:
        """Return what is known, as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value not in (None, "")}


class Accepted(NamedTuple):
    """One request as it goes to Redis: its message, ready, and what its record says of it."""

    task_id: str
    queue: str
    message: bytes
    delay_s: float
    task: str
    dag_id: str
    dag_run_id: str
    key: str
    connection: str
    by: str
    more: str = ""
    """Further fields of the record: each a NUL and its name, a NUL and its value."""
    conf: Packed | None = None
    """What is to be uploaded before it is accepted."""

    def args(self) -> tuple[Any, ...]:
        """Return what ACCEPT takes of it, beside its two keys."""
        return (self.message, self.delay_s, "\0".join(self[4:10]) + self.more)  # none of them may hold a NUL

    @property
    def reference(self) -> str:
        """The stored conf that it is to hold; empty where it needs none."""
        return self.conf.reference if self.conf is not None else ""


@dataclass(frozen=True, slots=True)
class Attempts:
    """What is on record of the attempts so far. Seconds by Redis' clock."""

    count: int
    age_s: float
    missing_s: float
    unsure: bool


def record_key(task_id: str) -> str:
    """Return the Redis key of a request's record."""
    return f"dagrelay:record:{task_id}"


class Records:
    """The records in one Redis. Every method is one round trip and raises what redis-py raises."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    def accept(self, item: Accepted) -> bool:
        """Queue one request and begin its record; tell whether its id is new. Raises ConfGone."""
        upload(self._client, item.conf)
        answer = ACCEPT.run(self._client, (record_key(item.task_id), item.queue), item.args())
        if answer == b"2":
            raise ConfGone(item.reference)
        return bool(answer == b"1")

    def accept_many(self, items: Sequence[Accepted], chunk: int = 200) -> list[bool | ConfGone]:
        """Queue many requests and begin their records; tell of each whether its id is new.

        One whose conf is not there is not accepted, and the error comes in its place. When the connection
        breaks, some chunks may be in and others not: to send all again does no harm.
        """
        pipe = self.batch(items, chunk)
        told = [digit for answer in pipe.execute()[1:] for digit in answer]
        return [
            ConfGone(item.reference) if digit == ord("2") else digit == ord("1")
            for item, digit in zip(items, told, strict=True)
        ]

    def batch(self, items: Iterable[Accepted], chunk: int = 200, chunk_bytes: int = 1 << 20) -> Pipeline:
        """Return a pipeline that queues many requests and begins their records; confs alone are sent yet.

        Every chunk is all or nothing, and small enough that Redis, which does nothing else meanwhile, is
        soon through. When the connection breaks, some chunks may be in and others not.
        """
        pipe = self._client.pipeline(transaction=False)
        keys: list[str] = []
        args: list[Any] = []
        size = 0
        for item in items:
            if len(pipe) == 0:
                pipe.execute_command("SCRIPT", "LOAD", ACCEPT.lua)
            upload(self._client, item.conf)
            keys += (record_key(item.task_id), item.queue)
            args += item.args()
            size += len(item.message)
            if len(keys) == 2 * chunk or size >= chunk_bytes:
                ACCEPT.queue(pipe, keys, args)
                keys, args, size = [], [], 0
        if keys:
            ACCEPT.queue(pipe, keys, args)
        return pipe

    def attempt_failed(
        self, task_id: str, reason: str, *, unsure: bool = False, missing: bool = False, held_s: float = 0.0
    ) -> Attempts:
        """Count one attempt that did not end the request, and return what is known of all of them."""
        count, age, missing_s, was_unsure = ATTEMPT_FAILED.run(
            self._client,
            (record_key(task_id),),
            (int(unsure), int(missing), held_s, reason, " ".join(reason.split())[:MAX_TOLD]),
        )
        return Attempts(int(count), float(age), float(missing_s), _text(was_unsure) == "1")

    def get(self, task_id: str) -> Record | None:
        """Return a request's record, or None when there is none."""
        raw = self._client.hgetall(record_key(task_id))
        if not raw:
            return None
        found = {_text(name): _text(value) for name, value in raw.items()}
        return Record(
            task_id=task_id,
            state=cast(State, found.get("state", "accepted")),
            task=found.get("task"),
            dag_id=found.get("dag_id"),
            dag_run_id=found.get("dag_run_id"),
            key=found.get("key") or None,
            connection=found.get("connection"),
            by=found.get("by"),
            reason=found.get("reason"),
            error=found.get("error"),
            accepted_at=_number(found.get("accepted_at")),
            due_at=_number(found.get("due_at")),
            next_at=_number(found.get("next_at")),
            ended_at=_number(found.get("ended_at")),
            corrected_at=_number(found.get("corrected_at")),
            attempts=int(found.get("attempts", 0)),
            retried=int(found.get("retried", 0)),
            unsure=found.get("unsure") == "1",
            held_s=float(found.get("held_s", 0)),
            error_args=json.loads(found["error_args"]) if found.get("error_args") else None,
            run=json.loads(found["run"]) if found.get("run") else None,
            outcome=json.loads(found["outcome"]) if found.get("outcome") else None,
            waits_for=found.get("waits_for"),
            waiting_since=_number(found.get("waiting_since")),
            seen=found.get("seen"),
            progress=found.get("progress"),
            errors=int(found.get("errors") or 0),
            job_id=found.get("job_id"),
            reference=found.get("reference"),
            submitting_at=_number(found.get("submitting_at")),
            submitted_at=_number(found.get("submitted_at")),
            cancel_by=found.get("cancel_by"),
            service=found.get("service"),
            fan_out=found.get("fan_out"),
            replay_of=found.get("replay_of"),
            conf_ref=found.get("conf_ref"),
        )


def _number(text: str | None) -> float | None:
    return float(text) if text else None


def store(
    client: Redis,
    task_id: str,
    *,
    result: bytes | str,
    result_ttl_s: int,
    state: State,
    found: dict[str, str],
    next_in_s: float = 0.0,
    correct: bool = False,
    letter: Mapping[str, str | bytes] | None = None,
    keeping: Keeping = Keeping(),  # noqa: B008 - a tuple
    conf_keep_s: int = CONF_KEEP_S,
) -> Ended | bool:
    """Write a Celery result and the record that explains it, in one step; return False if nothing was new.

    With an end, what the record says of the request. `found` holds the record's fields to set; `correct`
    replaces an end that was OutcomeUnknown. `letter` has the fields of the dead letter that goes with the
    end, beside those of the record. `conf_keep_s`: how long a stored conf is kept that nobody else holds.
    """
    pairs = [text for pair in found.items() for text in pair]
    script, buried = STORE, []
    if letter is not None or correct:
        script, buried = STORE_DEAD, buried_with(letter, keeping)
        buried.insert(0, len(buried))
    answer = script.run(
        client,
        (RESULT_PREFIX + task_id, record_key(task_id)),
        (
            *(result, result_ttl_s, state, next_in_s, KEEP_S, int(correct), conf_keep_s, *buried),
            *("task_id", task_id, *pairs),
        ),
    )
    if isinstance(answer, bytes):
        return Ended(*answer.decode(errors="replace").split("\0"))
    return bool(answer)


def buried_with(letter: Mapping[str, str | bytes] | None, keeping: Keeping) -> list[Any]:
    """Return what STORE takes of a dead letter."""
    if letter is None:
        return []
    return [keeping.keep_s, keeping.most, *(text for pair in letter.items() for text in pair)]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
