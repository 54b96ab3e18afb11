"""The way to each Airflow: how many requests may be in flight, who is next, whether anybody may ask at all.

For each connection, for all workers together:

============================== ===========================================================================
key                            what
============================== ===========================================================================
``dagrelay:airflow:<conn>``    hash: how things stand (below)
``dagrelay:slots:<conn>``      sorted set: the token of a request in flight → until when its slot is kept
``dagrelay:line:<conn>``       sorted set: task id → its rank, the instant from which it counts, less what its
                               priority moves it forward. Its message is parked. What begins with a control
                               character is no task, but the token of a thread that waits
``dagrelay:called:<conn>``     sorted set: task id → until when its place is kept: it was called, and is on
                               its way through its queue
``dagrelay:granted:<token>``   list: told to the thread that waits for this slot
``dagrelay:airflows``          set: the connections that there are
============================== ===========================================================================

A task takes a slot (TAKE), asks Airflow, and gives the slot back with what came of it (GIVE). Where there is
none, it parks in the line; whoever gives a slot back calls the next. So nobody waits in a thread, nobody
polls, and a slow Airflow holds as many threads as it has slots. A newcomer never overtakes the line.

**Limit.** From 1 to the ceiling (the connection's `max_in_flight` × `api_workers`): a timeout, a 429 or a 5xx
halves it, once for all requests that were in flight with it; answers that come quickly while it is used up
raise it by one a round. A request that timed out keeps its slot: the server is still at it.

**Breaker.** `FAILURES` requests in a row without a usable answer open it: nothing is sent to that Airflow,
all waits in line. One worker at a time asks one cheap question (`tick` says who, `probed` what came of it).
With an answer it is half open: the limit begins at 1 and grows by one with each answer; at half the ceiling
it is closed. Two failures in a row while it is half open open it again.

**Holds.** An operator's (`maintenance`), or after credentials were refused (`credentials`), which then are
probed now and then, and at once by a worker that has others (their fingerprint differs).

The hash: limit, ceiling, breaker (closed, open, half-open), failures (in a row), opened_at, probe_at (when it
may be probed next), probes (without an answer, in a row), cut_at (when the limit was halved), held (empty,
maintenance, credentials), held_reason, held_by, held_since, held_total (seconds, of holds that are over),
fingerprint (of the credentials that were refused), probed_at. Instants are seconds since 1970 by Redis'
clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from .parking import CALL_S, PARKING, SLOT_S, TASK_LINE, THREAD
from .records import Script, record_key

if TYPE_CHECKING:
    from redis import Redis

FAILURES: Final = 5
"""So many requests in a row without a usable answer open the breaker."""

SLOW_S: Final = 2.0
"""An answer that takes longer is no reason to send more at once."""

FIRST_PROBE_S: Final = 0.5
MAX_PROBE_S: Final = 5.0
"""The pause before the first probe of an outage, and the longest one between two: each doubles the last."""

OTHERS_S: Final = 2.0
"""How soon a connection that is held for its credentials may be probed with others."""

PRIORITY_S: Final = 60.0
"""By how many seconds a step of priority moves a request forward in the line. So it ages: what came so much
earlier goes first all the same, and nothing starves."""

DEFAULT_PRIORITY: Final = 5

AIRFLOWS: Final = "dagrelay:airflows"

Verdict = Literal["ok", "timeout", "strained", "broken", "refused", "unused"]
"""What came of a request: an answer of Airflow's; none in time; a 429 or 5xx; a connection refused or cut;
its credentials refused; or it was not sent."""

Breaker = Literal["closed", "open", "half-open"]
Held = Literal["", "maintenance", "credentials"]


def airflow_key(connection: str) -> str:
    """Return the hash that says how things stand with a connection."""
    return f"dagrelay:airflow:{connection}"


def slots_key(connection: str) -> str:
    """Return the sorted set of a connection's requests in flight."""
    return f"dagrelay:slots:{connection}"


def line_key(connection: str) -> str:
    """Return the sorted set of what waits for a slot."""
    return TASK_LINE + connection


def called_key(connection: str) -> str:
    """Return the sorted set of what was called from the line and has not come yet."""
    return f"dagrelay:called:{connection}"


def granted_key(token: str) -> str:
    """Return the list on which a thread hears that it has its slot."""
    return f"dagrelay:granted:{token}"


def ahead_s(priority: int) -> float:
    """Return how many seconds a priority from 0 to 9 moves a request forward in its line."""
    return (priority - DEFAULT_PRIORITY) * PRIORITY_S


# Each begins with a deletion: it goes on where Redis is full, and what is done makes room.

# KEYS: record, line, called, slots, the hash, the connections. ARGV: connection, task id ('' for none,
# which has no record), ceiling, how many slots, token. Returns how many were taken (tokens `<token>.1` …),
# why there is none (slot, open, maintenance, credentials), of the record its age in seconds without those
# held and whether it is unsure, and the time.
TAKE: Final = Script(
    PARKING
    + """
local conn, id = ARGV[1], ARGV[2]
local was_called = redis.call('ZREM', KEYS[3], id) == 1
-- An older copy of a task whose worker stood still, while a newer one waits: that keeps its place.
local older = id ~= '' and redis.call('HEXISTS', 'dagrelay:parked', id) == 1
if not older then redis.call('ZREM', KEYS[2], id) end
local known = redis.call('HMGET', KEYS[5], 'ceiling', 'limit', 'held', 'breaker')
if known[1] ~= ARGV[3] or not known[2] then
  redis.call('HSET', KEYS[5], 'ceiling', ARGV[3])
  redis.call('SADD', KEYS[6], conn)
  -- One that is below the ceiling for a reason of its own stays there, and grows.
  if not known[2] or tonumber(known[2]) > tonumber(ARGV[3]) or tonumber(known[2]) == tonumber(known[1]) then
    redis.call('HSET', KEYS[5], 'limit', ARGV[3])
  end
end
local age, unsure = '0', '0'
if id ~= '' then
  local of = redis.call('HMGET', KEYS[1], 'due_at', 'held_s', 'held_at', 'unsure')
  local held = tonumber(of[2] or 0)
  if of[3] and not older then
    held = held + math.max(0, held_so_far(conn) - of[3])
    redis.call('HSET', KEYS[1], 'held_s', string.format('%.3f', held))
    redis.call('HDEL', KEYS[1], 'held_at', 'line')
  end
  if of[1] then age = string.format('%.3f', now - of[1] - held) end
  unsure = of[4] or '0'
end
if known[3] and known[3] ~= '' then return {0, known[3], age, unsure, now_text} end
if known[4] == 'open' then return {0, 'open', age, unsure, now_text} end
local free = room(conn)
if free > 0 and not was_called and redis.call('EXISTS', KEYS[2]) == 1 then  -- a newcomer: the line goes first
  pump(conn)
  free = redis.call('EXISTS', KEYS[2]) == 1 and 0 or room(conn)
end
local taken = math.min(free, tonumber(ARGV[4]))
local until_ = string.format('%.6f', now + """
    + str(SLOT_S)
    + """)
for i = 1, taken do redis.call('ZADD', KEYS[4], until_, ARGV[5] .. '.' .. i) end
return {math.max(taken, 0), taken > 0 and '' or 'slot', age, unsure, now_text}
"""
)

# In GIVE and DRAIN: `settle` notes what came of requests, each with its token ('' where its slot is kept
# for the next one), verdict and seconds, from one place of ARGV to another; it returns what has changed,
# and whether nothing may be sent any more. `take_slots` takes what there is room for.
SETTLE: Final = (
    """
local function take_slots(conn, wanted, token)
  local taken = math.max(0, math.min(room(conn), wanted))
  local until_ = string.format('%.6f', now + """
    + str(SLOT_S)
    + """)
  for i = 1, taken do redis.call('ZADD', 'dagrelay:slots:' .. conn, until_, token .. '.' .. i) end
  return taken
end
local function settle(conn, first, last)
  local slots, key = 'dagrelay:slots:' .. conn, 'dagrelay:airflow:' .. conn
  local known = redis.call('HMGET', key, 'limit', 'ceiling', 'breaker', 'failures', 'cut_at', 'held')
  local ceiling = tonumber(known[2] or 1)
  local before = tonumber(known[1] or ceiling)
  local limit, breaker, failures = before, known[3] or 'closed', tonumber(known[4] or 0)
  local had, cut = failures, tonumber(known[5] or 0)
  local was, in_flight = breaker, redis.call('ZCARD', slots)
  local held, refused = known[6] or '', false
  for i = first, last, 3 do
    local token, verdict, took = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
    if verdict == 'timeout' and token ~= '' then
      redis.call('ZADD', slots, string.format('%.6f', now + ARGV[7]), token .. ':late')
    end
    if token ~= '' then redis.call('ZREM', slots, token) end
    if verdict == 'ok' then
      failures = 0
      if breaker == 'half-open' then
        limit = math.min(ceiling, limit + 1)
        if limit >= ceiling / 2 then breaker = 'closed' end
      elseif limit < ceiling and took < """
    + str(SLOW_S)
    + """ and in_flight >= math.floor(limit) then
        limit = math.min(ceiling, limit + 1 / limit)
      end
    elseif verdict == 'refused' then
      refused = true
    elseif verdict ~= 'unused' then
      failures = failures + 1
      if verdict ~= 'broken' and now - took > cut then
        limit, cut = math.max(1, limit / 2), now
      end
      if (breaker == 'half-open' and failures >= 2) or (breaker == 'closed' and failures >= """
    + str(FAILURES)
    + """) then
        breaker = 'open'
      end
    end
  end
  if limit ~= before then redis.call('HSET', key, 'limit', string.format('%.4f', limit), 'cut_at', cut) end
  if failures ~= had then redis.call('HSET', key, 'failures', failures) end
  if breaker ~= was then
    redis.call('HSET', key, 'breaker', breaker)
    if breaker == 'open' then
      local probes = was == 'half-open' and tonumber(redis.call('HGET', key, 'probes') or 0) or 0
      redis.call('HSET', key, 'probes', probes, 'probe_at', string.format('%.6f', now + """
    + str(FIRST_PROBE_S)
    + """))
      redis.call('HSETNX', key, 'opened_at', now_text)
    else
      redis.call('HDEL', key, 'opened_at', 'probes')
    end
  end
  if refused and held == '' then
    redis.call('HSET', key, 'held', 'credentials', 'held_reason', ARGV[3], 'held_since', now_text,
      'held_by', 'a worker', 'fingerprint', ARGV[2], 'probe_at', now_text)
    held = 'credentials'
  elseif refused and held == 'credentials' then
    redis.call('HSET', key, 'fingerprint', ARGV[2], 'held_reason', ARGV[3])
  end
  local changed = breaker ~= was and breaker
    or refused and (known[6] or '') == '' and 'credentials' or ''
  return changed, held ~= '' or breaker == 'open'
end
"""
)

# What came of requests. KEYS: line, called, slots, the hash. ARGV: connection, own fingerprint, words (of
# the refusal), how many slots more are wanted, rank of the one who wants them, their token, the seconds for
# which a request that timed out keeps its slot, then for each request its token ('' where its slot is kept
# for the next request), verdict, seconds that it took. Returns how many slots were taken, how many others
# wait that have a better rank, 1 where nothing may be sent any more, and what has changed (open, closed,
# credentials; '').
GIVE: Final = Script(
    PARKING
    + SETTLE
    + """
local conn, line, slots = ARGV[1], KEYS[1], KEYS[3]
redis.call('ZREM', slots, '')
local changed, over = settle(conn, 8, #ARGV)
pump(conn)
if over then return {0, 0, 1, changed} end
local taken, wanted = 0, tonumber(ARGV[4])
if wanted > 0 then taken = take_slots(conn, wanted, ARGV[6]) end
local better = ARGV[5] ~= '' and redis.call('ZCOUNT', line, '-inf', '(' .. ARGV[5]) or 0
return {taken, better, 0, changed}
"""
)

# Go on with the plain requests of a line: who drains it takes them out of Redis' hands into its own, posts
# them, and writes their ends, many at once. KEYS: line, called, slots, the hash, what the caller holds, the
# owners' leases. ARGV: as for GIVE up to the seconds of a timed out slot (in place of a rank, how many
# requests it has left), then how many requests are wanted, the caller's name and the seconds of its lease,
# how many requests it has ended, those, then for each request sent its token, verdict and seconds. Returns
# how many slots were taken, how many are to be given back for what waits and is not plain, 1 where nothing
# may be sent, what has changed, then id and message in turn.
DRAIN: Final = Script(
    PARKING
    + SETTLE
    + """
local conn, line, slots, held = ARGV[1], KEYS[1], KEYS[3], KEYS[5]
redis.call('ZREM', slots, '')
local ended_ = tonumber(ARGV[11])
for i = 12, 11 + ended_ do redis.call('HDEL', held, ARGV[i]) end
local changed, over = settle(conn, 12 + ended_, #ARGV)
local function keep_lease()
  redis.call('ZREM', 'dagrelay:gone', ARGV[9])
  if redis.call('EXISTS', held) == 1 then
    redis.call('ZADD', KEYS[6], string.format('%.6f', now + ARGV[10]), ARGV[9])
  else
    redis.call('ZREM', KEYS[6], ARGV[9])
  end
end
if over then
  pump(conn)
  keep_lease()
  return {0, 0, 1, changed}
end
redis.call('HSET', KEYS[4], 'drained_until', string.format('%.3f', now + 1))
pump(conn)  -- what is first, and not for us
local answer = {0, 0, 0, changed}
-- What is first and not plain, and has found no slot, gets those of the caller, all but one while it has some
-- left that were before it; and nothing more is taken past it.
local wanted, stop = tonumber(ARGV[8]), 0
for _, id in ipairs(redis.call('ZRANGE', line, 0, 20)) do
  local task = string.sub(id, 1, 1) ~= '\\1'
  if task and redis.call('HEXISTS', 'dagrelay:record:' .. id, 'plain') == 1 then break end
  if not task or redis.call('HEXISTS', 'dagrelay:parked', id) == 1 then stop = stop + 1 end
end
local need = math.min(tonumber(ARGV[4]), tonumber(ARGV[5]) + redis.call('ZCARD', line))
if stop == 0 and need > 0 then answer[1] = take_slots(conn, need, ARGV[6]) end
-- Without a slot nothing is taken: in the line it keeps its place before what is new.
if answer[1] + ARGV[3] == 0 then wanted = 0 end
if wanted > 0 and stop == 0 then
  for _, id in ipairs(redis.call('ZRANGE', line, 0, wanted + 20)) do
    if wanted <= 0 then break end
    local value = string.sub(id, 1, 1) ~= '\\1' and redis.call('HGET', 'dagrelay:parked', id)
    if value and redis.call('HEXISTS', 'dagrelay:record:' .. id, 'plain') == 1 then
      local b = string.find(value, '\\0', string.find(value, '\\0', 1, true) + 1, true)
      redis.call('HSET', held, id, string.sub(value, b + 1))
      redis.call('HDEL', 'dagrelay:parked', id)
      redis.call('ZREM', 'dagrelay:due', id)
      redis.call('ZREM', line, id)
      answer[#answer + 1] = id
      answer[#answer + 1] = string.sub(value, string.find(value, '\\0', b + 1, true) + 1)
      wanted = wanted - 1
    elseif not value and string.sub(id, 1, 1) ~= '\\1' then
      redis.call('ZREM', line, id)
    end
  end
end
answer[2] = stop
keep_lease()
return answer
"""
)

# Put messages that were just claimed into the line, where there is no slot for them. KEYS: line, called,
# slots, the hash, the messages that the caller holds. ARGV: connection, whether there may be slots (1),
# what they wait for, then for each: the tag by which it is held, task id, retries, queue list, message,
# seconds that it is moved forward, seconds after which it gives up, when it expires (''). Returns the tags
# of those that are in the line now. The others have their turn, or are for somebody else to judge: ended,
# cancelled, over their time, older than what is on record.
DIVERT: Final = Script(
    PARKING
    + """
local conn, line, called, held = ARGV[1], KEYS[1], KEYS[2], KEYS[5]
redis.call('ZREM', line, '')
local known = redis.call('HMGET', KEYS[4], 'held', 'breaker')
local free = room(conn)
if free > 0 and redis.call('EXISTS', line) == 1 then
  pump(conn)
  free = redis.call('EXISTS', line) == 1 and 0 or room(conn)
end
if ARGV[2] == '1' then redis.call('HSET', KEYS[4], 'drained_until', string.format('%.3f', now + 1)) end
local so_far = string.format('%.3f', held_so_far(conn))
local gone = {}
for i = 4, #ARGV, 9 do
  local tag, id, retries = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  local record = 'dagrelay:record:' .. id
  local of = redis.call('HMGET', record, 'state', 'retried', 'due_at', 'held_s', 'held_at')
  if of[5] then  -- it has been in line before
    of[4] = string.format('%.3f', (of[4] or 0) + math.max(0, so_far - of[5]))
    redis.call('HSET', record, 'held_s', of[4])
    redis.call('HDEL', record, 'held_at')
  end
  local there = redis.call('HGET', 'dagrelay:parked', id)
  local from = tonumber(of[3] or now)
  local until_ = from + ARGV[i + 6] + tonumber(of[4] or 0)
  if ARGV[i + 7] ~= '' then until_ = math.min(until_, tonumber(ARGV[i + 7])) end
  if redis.call('ZSCORE', called, id) or ended(of[1]) or tonumber(of[2] or 0) > retries or there
    or redis.call('ZSCORE', 'dagrelay:cancelled', id) or until_ <= now then
    -- not for us
  elseif free > 0 and ARGV[2] == '0' then
    free = free - 1
  elseif redis.call('HDEL', held, tag) == 1 then
    redis.call('HSET', 'dagrelay:parked', id,
      retries .. '\0' .. string.format('%.3f', now) .. '\0' .. ARGV[i + 3] .. '\0' .. ARGV[i + 4])
    redis.call('ZADD', 'dagrelay:due', string.format('%.6f', until_), id)
    redis.call('ZADD', line, string.format('%.6f', from - ARGV[i + 5]), id)
    if not of[1] then redis.call('HSET', record, 'accepted_at', now_text) end
    redis.call('HSET', record, 'state', 'waiting', 'due_at', of[3] or now_text, 'waits_for', ARGV[3],
      'line', line, 'held_at', so_far)
    if ARGV[i + 8] == '1' then redis.call('HSET', record, 'plain', '1') end
    gone[#gone + 1] = tag
  end
end
pump(conn)
return gone
"""
)

# Put back what a worker has taken out of a line: to the front of its queue. KEYS: what it holds, called.
# ARGV: for each its id and whether Celery is to begin it next (0/1): its place in flight is kept for it.
RETURN: Final = Script(
    PARKING
    + """
redis.call('HDEL', KEYS[1], '')
for i = 1, #ARGV, 2 do
  local value = redis.call('HGET', KEYS[1], ARGV[i])
  if value then
    local cut = string.find(value, '\0', 1, true)
    redis.call('RPUSH', string.sub(value, 1, cut - 1), string.sub(value, cut + 1))
    redis.call('HDEL', KEYS[1], ARGV[i])
    if ARGV[i + 1] == '1' then
      redis.call('HDEL', 'dagrelay:record:' .. ARGV[i], 'plain')
      redis.call('ZADD', KEYS[2], string.format('%.6f', now + """
    + str(CALL_S)
    + """), ARGV[i])
    end
  end
end
return 1
"""
)

# A thread joins the line. KEYS: line, the list on which it hears. ARGV: connection, token. Before all tasks:
# there are few of them, and they hold a thread.
JOIN: Final = Script(
    PARKING
    + """
redis.call('DEL', KEYS[2])
redis.call('ZADD', KEYS[1], '-inf', '\\1' .. ARGV[2])
return pump(ARGV[1])
"""
)

# A thread leaves the line again. KEYS: line, slots, the list. ARGV: connection, token. Gives back what it was
# granted meanwhile.
LEAVE: Final = Script(
    PARKING
    + """
redis.call('ZREM', KEYS[1], '\\1' .. ARGV[2])
if redis.call('ZREM', KEYS[2], ARGV[2]) == 1 then pump(ARGV[1]) end
redis.call('DEL', KEYS[3])
return 1
"""
)

# KEYS: slots of a connection. ARGV: tokens. A slot that has run out is not revived: somebody else has it.
RENEW: Final = Script(
    """
local time = redis.call('TIME')
local until_ = string.format('%.6f', time[1] + time[2] / 1e6 + """
    + str(SLOT_S)
    + """)
redis.call('ZREM', KEYS[1], '')
local kept = 0
for _, token in ipairs(ARGV) do
  if redis.call('ZSCORE', KEYS[1], token) then
    redis.call('ZADD', KEYS[1], until_, token)
    kept = kept + 1
  end
end
return kept
"""
)

# Have what there is room for go on, and say which connections are to be probed by the caller. KEYS: none.
# ARGV: seconds that a probe may take, then pairs: connection, own fingerprint. Who has other credentials than
# those that were refused need not wait until these are probed again.
TICK: Final = Script(
    PARKING
    + """
local answer, idle = {}, {}
for i = 2, #ARGV, 2 do
  local conn, key = ARGV[i], 'dagrelay:airflow:' .. ARGV[i]
  redis.call('ZREM', 'dagrelay:slots:' .. conn, '')
  pump(conn)
  local known = redis.call('HMGET', key, 'breaker', 'held', 'probe_at', 'fingerprint', 'probed_at',
    'drained_until')
  if tonumber(known[6] or 0) < now and known[1] ~= 'open' and (known[2] or '') == '' then
    local first = redis.call('ZRANGE', """
    + f"'{TASK_LINE}'"
    + """ .. conn, 0, 0)[1]
    if first and redis.call('HEXISTS', 'dagrelay:record:' .. first, 'plain') == 1 then
      idle[#idle + 1] = conn
    end
  end
  local open, refused = known[1] == 'open', known[2] == 'credentials'
  if (open and (known[2] or '') == '') or refused then
    if now >= tonumber(known[3] or 0)
      or (refused and known[4] ~= ARGV[i + 1] and now >= tonumber(known[5] or 0) + """
    + str(OTHERS_S)
    + """) then
      redis.call('HSET', key, 'probe_at', string.format('%.6f', now + ARGV[1]), 'probed_at', now_text)
      answer[#answer + 1] = conn
    end
  end
end
return {answer, idle}
"""
)

# While a breaker is open, have the first of a line wait in that of what stands in. KEYS: the hash, the line,
# the other line. ARGV: how many may wait there. Returns how many have gone.
STAND_IN: Final = Script(
    """
redis.call('ZREM', KEYS[2], '')
local known = redis.call('HMGET', KEYS[1], 'breaker', 'held')
if known[1] ~= 'open' or (known[2] or '') ~= '' then return 0 end
local free, gone = ARGV[1] - redis.call('ZCARD', KEYS[3]), 0
if free <= 0 then return 0 end
local first = redis.call('ZRANGE', KEYS[2], '(-inf', '+inf', 'BYSCORE', 'LIMIT', 0, free, 'WITHSCORES')
for i = 1, #first, 2 do
  redis.call('ZADD', KEYS[3], first[i + 1], first[i])
  redis.call('ZREM', KEYS[2], first[i])
  local record = 'dagrelay:record:' .. first[i]
  if redis.call('HEXISTS', record, 'line') == 1 then redis.call('HSET', record, 'line', KEYS[3]) end
  gone = gone + 1
end
return gone
"""
)

# KEYS: the hash, slots. ARGV: connection, what came of it (ok, failed, refused), own fingerprint, words,
# seconds between two probes of refused credentials. Returns what the breaker is now.
PROBED: Final = Script(
    PARKING
    + """
local conn, key, verdict = ARGV[1], KEYS[1], ARGV[2]
redis.call('ZREM', KEYS[2], '')
local known = redis.call('HMGET', key, 'breaker', 'held', 'probes', 'ceiling', 'opened_at')
if known[2] == 'maintenance' then return known[1] or 'closed' end
if verdict == 'failed' then
  local probes = tonumber(known[3] or 0) + 1
  local pause = math.min("""
    + str(MAX_PROBE_S)
    + """, """
    + str(FIRST_PROBE_S)
    + """ * 2 ^ math.min(probes, 10))
  redis.call('HSET', key, 'probes', probes, 'probe_at', string.format('%.6f', now + pause))
  return known[1] or 'closed'
end
if verdict == 'refused' then
  if known[2] ~= 'credentials' then
    redis.call('HSET', key, 'held', 'credentials', 'held_since', now_text, 'held_by', 'a worker')
  end
  redis.call('HSET', key, 'held_reason', ARGV[4], 'fingerprint', ARGV[3],
    'probe_at', string.format('%.6f', now + ARGV[5]))
  if known[1] == 'open' then redis.call('HSET', key, 'breaker', 'half-open', 'limit', 1, 'failures', 0) end
  return known[1] or 'closed'
end
if known[2] == 'credentials' then
  redis.call('HSET', key, 'held_total', string.format('%.3f', held_so_far(conn)), 'held', '')
  redis.call('HDEL', key, 'held_reason', 'held_since', 'held_by', 'fingerprint')
end
if known[1] == 'open' then
  redis.call('HSET', key, 'breaker', 'half-open', 'limit', 1, 'failures', 0)
end
pump(conn)
return redis.call('HGET', key, 'breaker') or 'closed'
"""
)

# KEYS: the hash, slots, the connections. ARGV: connection, reason, by whom. An operator's hold takes the
# place of one for refused credentials.
HOLD: Final = Script(
    PARKING
    + """
redis.call('ZREM', KEYS[2], '')
local was = redis.call('HGET', KEYS[1], 'held') or ''
redis.call('SADD', KEYS[3], ARGV[1])
redis.call('HSET', KEYS[1], 'held', 'maintenance', 'held_reason', ARGV[2], 'held_by', ARGV[3])
if was == '' then redis.call('HSET', KEYS[1], 'held_since', now_text) end
return was
"""
)

# KEYS: the hash, slots. ARGV: connection. Ends any hold, and has an open breaker probed at once. Returns what
# was held ('' for nothing).
UNHOLD: Final = Script(
    PARKING
    + """
redis.call('ZREM', KEYS[2], '')
local was = redis.call('HGET', KEYS[1], 'held') or ''
if was ~= '' then
  redis.call('HSET', KEYS[1], 'held_total', string.format('%.3f', held_so_far(ARGV[1])), 'held', '')
  redis.call('HDEL', KEYS[1], 'held_reason', 'held_since', 'held_by', 'fingerprint')
end
if redis.call('HGET', KEYS[1], 'breaker') == 'open' then redis.call('HSET', KEYS[1], 'probe_at', now_text) end
pump(ARGV[1])
return was
"""
)

# KEYS: the hash, slots, line, called. ARGV: connection. Returns the hash's fields, then how many are in
# flight, called, in line, and the age of the task that is next in line ('' for none).
STATE: Final = Script(
    PARKING
    + """
local first = redis.call('ZRANGE', KEYS[3], '(-inf', '+inf', 'BYSCORE', 'LIMIT', 0, 1)[1]
local from = first and redis.call('HGET', 'dagrelay:record:' .. first, 'due_at')
return {redis.call('HGETALL', KEYS[1]), redis.call('ZCOUNT', KEYS[2], now, '+inf'),
  redis.call('ZCOUNT', KEYS[4], now, '+inf'), redis.call('ZCARD', KEYS[3]),
  from and string.format('%.3f', now - from) or ''}
"""
)


@dataclass(frozen=True, slots=True)
class LineState:
    """How things stand with one connection. Instants are seconds since 1970 by Redis' clock."""

    connection: str
    ceiling: int
    """The most requests that may be in flight, as the workers are configured."""
    limit: float
    """How many may be now; only whole ones count."""
    in_flight: int
    called: int
    """On their way from the line to a worker."""
    waiting: int
    """In the line."""
    oldest_s: float | None
    """Since when the first in line counts: the oldest, unless priorities differ."""
    breaker: Breaker
    opened_at: float | None
    held: Held
    held_reason: str
    held_by: str
    held_since: float | None
    failures: int
    """Requests in a row without a usable answer."""

    @property
    def answers(self) -> bool:
        """Whether requests may be sent."""
        return not self.held and self.breaker != "open"


class Taken(NamedTuple):
    """What came of asking for slots."""

    slots: int
    why: str
    """Why there is none: slot, open, maintenance, credentials."""
    age_s: float
    """Since when the request counts, without the time for which its connection was held."""
    unsure: bool
    now: float
    """By Redis' clock, in seconds since 1970."""


class Given(NamedTuple):
    """What a holder of slots is told when it gives some back."""

    slots: int
    better: int
    """How many wait that are to go first."""
    over: bool
    """Whether nothing may be sent any more."""
    changed: str
    """What has changed with this: open, closed, credentials, or nothing ("")."""


class Drained(NamedTuple):
    """What who drains a line is told."""

    slots: int
    stop: int
    """How many slots are to be given back, for what waits and is not plain."""
    over: bool
    changed: str
    requests: list[tuple[str, bytes]]
    """Ids and messages."""


class Lines:
    """The ways to all Airflows, in one Redis. Each method is one round trip; raises what redis-py raises."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    # What workers do

    def announce(self, connection: str, ceiling: int) -> None:
        """Say that there is a connection, and how many requests may be in flight to it."""
        with self._client.pipeline() as pipe:
            pipe.sadd(AIRFLOWS, connection)
            pipe.hsetnx(airflow_key(connection), "ceiling", str(ceiling))  # a change is TAKE's
            pipe.execute()

    def take(self, connection: str, token: str, *, ceiling: int, task_id: str = "", want: int = 1) -> Taken:
        """Take up to `want` slots, with tokens `<token>.1` and so on; a task leaves the line with that."""
        keys = (
            record_key(task_id),  # also without an id: an empty key no ACL lets pass
            line_key(connection),
            called_key(connection),
            slots_key(connection),
            airflow_key(connection),
            AIRFLOWS,
        )
        count, why, age_s, unsure, now = TAKE.run(
            self._client, keys, (connection, task_id, ceiling, want, token)
        )
        return Taken(int(count), _text(why), float(age_s), _text(unsure) == "1", float(now))

    def divert(
        self,
        client: Any,
        held_key: str,
        connection: str,
        what: str,
        messages: Sequence[tuple[int, str, int, str, bytes, float, float, float | None, bool]],
        *,
        all_of_them: bool = False,
    ) -> list[int]:
        """Put messages that a worker has just claimed into the line, where there is no slot for them.

        `all_of_them`: also where there are slots: the caller has no threads for them, and drains the line.

        `client` and `held_key` are the worker's, with which it holds them. For each: its tag there, task id,
        retries, queue list, the message, the seconds that it is moved forward, those after which it gives up,
        when it expires, and whether who drains the line may take it. Returns the tags of those in line now.
        """
        keys = (line_key(connection), called_key(connection), slots_key(connection), airflow_key(connection))
        args: list[Any] = [connection, int(all_of_them), what]
        for *first, expires, plain in messages:
            args += (*first, "" if expires is None else f"{expires:.6f}", int(plain))
        return [int(tag) for tag in DIVERT.run(client, (*keys, held_key), args)]

    def not_coming(self, connection: str, task_id: str) -> None:
        """Give up the place that is kept for a task which was called."""
        self._client.zrem(called_key(connection), task_id)

    def give(
        self,
        connection: str,
        done: Iterable[tuple[str, Verdict, float]],
        *,
        fingerprint: str,
        words: str = "",
        want: int = 0,
        rank: float | None = None,
        token: str = "",
        late_s: float = 30.0,
    ) -> Given:
        """Say what came of requests: the token of each, the verdict, the seconds it took.

        An empty token keeps the slot for the holder's next request. `want`: take so many more slots, with
        `token`, as `take` does; `rank` is that of the holder in the line. `late_s`: for how long a request
        that timed out keeps its slot.
        """
        keys = (line_key(connection), called_key(connection), slots_key(connection), airflow_key(connection))
        args: list[Any] = [
            connection,
            fingerprint,
            words,
            want,
            "" if rank is None else f"{rank:.6f}",
            token,
            late_s,
        ]
        for one, verdict, took_s in done:
            args += (one, verdict, f"{took_s:.4f}")
        taken, better, over, changed = GIVE.run(self._client, keys, args)
        return Given(int(taken), int(better), bool(int(over)), _text(changed))

    def join(self, connection: str, token: str) -> None:
        """Have a thread wait for a slot with this token, before all tasks; it hears on `granted_key`."""
        JOIN.run(self._client, (line_key(connection), granted_key(token)), (connection, token))

    def leave(self, connection: str, token: str) -> None:
        """Have a thread wait no longer; a slot that it was granted meanwhile is given back."""
        keys = (line_key(connection), slots_key(connection), granted_key(token))
        LEAVE.run(self._client, keys, (connection, token))

    def renew(self, connection: str, tokens: Sequence[str]) -> int:
        """Keep slots for `SLOT_S` more; return how many there still were."""
        return int(RENEW.run(self._client, (slots_key(connection),), tokens)) if tokens else 0

    def drain(
        self,
        connection: str,
        name: str,
        held_key: str,
        leases_key: str,
        *,
        lease_s: float,
        ended: Sequence[str],
        done: Iterable[tuple[str, Verdict, float]],
        fingerprint: str,
        slots: int,
        token: str,
        at_work: int,
        left: int,
        requests: int,
        late_s: float = 30.0,
    ) -> Drained:
        """Take plain requests of a line into a worker's own hands, and slots for them; see DRAIN.

        `name`, `held_key`, `leases_key`: as whom the worker holds them, so that others put them back when its
        lease of `lease_s` has run out. `ended`: what it need not hold any more; `done` as for `give`. It
        takes up to `slots`, and no more than it has requests for: `left` of them, and those that it is given.
        """
        keys = (
            line_key(connection),
            called_key(connection),
            slots_key(connection),
            airflow_key(connection),
            held_key,
            leases_key,
        )
        args: list[Any] = [connection, fingerprint, at_work, slots, left, token, late_s]
        args += (requests, name, lease_s)
        args += (len(ended), *ended)
        for one, verdict, took_s in done:
            args += (one, verdict, f"{took_s:.4f}")
        count, stop, over, changed, *flat = DRAIN.run(self._client, keys, args)
        found = [(_text(flat[i]), flat[i + 1]) for i in range(0, len(flat), 2)]
        return Drained(int(count), int(stop), bool(int(over)), _text(changed), found)

    def put_back(self, connection: str, held_key: str, requests: Iterable[tuple[str, bool]]) -> None:
        """Put back what `drain` has taken, to the front of its queue; those marked are begun next."""
        flat = [text for task_id, begin in requests for text in (task_id, int(begin))]
        if flat:
            RETURN.run(self._client, (held_key, called_key(connection)), flat)

    def tick(self, connections: Iterable[tuple[str, str]], *, probe_s: float) -> tuple[list[str], list[str]]:
        """Call what there is room for. Return the connections that the caller is to probe, within `probe_s`,
        and those with plain requests in their line that nobody drains.

        `connections`: each with the fingerprint of the caller's credentials.
        """
        pairs = [text for pair in connections for text in pair]
        probes, idle = TICK.run(self._client, (), (probe_s, *pairs))
        return [_text(one) for one in probes], [_text(one) for one in idle]

    def stand_in(self, connection: str, other: str, most: int) -> int:
        """While a connection's breaker is open, move what is first in its line to another's; return how many.

        Up to `most` wait there: the rest keeps its place, for when the breaker closes.
        """
        keys = (airflow_key(connection), line_key(connection), line_key(other))
        return int(STAND_IN.run(self._client, keys, (most,)))

    def probed(
        self,
        connection: str,
        verdict: Literal["ok", "failed", "refused"],
        *,
        fingerprint: str,
        words: str = "",
        again_s: float = 30.0,
    ) -> Breaker:
        """Say what came of a probe; return the breaker's state. `again_s`: until the next, if refused."""
        keys = (airflow_key(connection), slots_key(connection))
        answer = PROBED.run(self._client, keys, (connection, verdict, fingerprint, words, again_s))
        return _text(answer)  # type: ignore[return-value]

    # What operators do

    def hold(self, connection: str, reason: str, by: str = "hand") -> str:
        """Have nothing sent to an Airflow until `release`; return what hold there was ("" for none)."""
        keys = (airflow_key(connection), slots_key(connection), AIRFLOWS)
        return _text(HOLD.run(self._client, keys, (connection, reason, by)))

    def release(self, connection: str) -> str:
        """End a hold, and have an open breaker probed now; return what hold there was ("" for none)."""
        keys = (airflow_key(connection), slots_key(connection))
        return _text(UNHOLD.run(self._client, keys, (connection,)))

    def names(self) -> list[str]:
        """Return the connections that were ever used or held, in order."""
        return sorted(_text(one) for one in self._client.smembers(AIRFLOWS))

    def state(self, connection: str) -> LineState:
        """Return how things stand with a connection."""
        keys = (airflow_key(connection), slots_key(connection), line_key(connection), called_key(connection))
        flat, in_flight, called, waiting, oldest = STATE.run(self._client, keys, (connection,))
        texts = [_text(one) for one in flat]
        known = dict(zip(texts[::2], texts[1::2], strict=True))
        ceiling = int(known.get("ceiling", 0))
        return LineState(
            connection=connection,
            ceiling=ceiling,
            limit=float(known.get("limit", ceiling)),
            in_flight=int(in_flight),
            called=int(called),
            waiting=int(waiting),
            oldest_s=float(_text(oldest)) if _text(oldest) else None,
            breaker=known.get("breaker", "closed"),  # type: ignore[arg-type]
            opened_at=_number(known.get("opened_at")),
            held=known.get("held", ""),  # type: ignore[arg-type]
            held_reason=known.get("held_reason", ""),
            held_by=known.get("held_by", ""),
            held_since=_number(known.get("held_since")),
            failures=int(known.get("failures", 0)),
        )


def _number(text: str | None) -> float | None:
    return float(text) if text else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


__all__ = ["THREAD", "LineState", "Lines"]
