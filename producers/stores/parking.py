"""The Lua that scripts about waiting tasks have in common: how one is parked, sent on, told something.

`PARKING` is put before a script of `waits` or `lines`. It builds the names of a task's own keys, and of a
connection's, itself: no Cluster. Of a connection, see `lines`:

- `room` tells how many requests more may be sent to an Airflow now;
- `pump` sends the first of its line on, for as many as there is room;
- `held_so_far` tells for how long the connection has been held, all in all.
"""

from __future__ import annotations

from typing import Final

from .records import KEEP_S

PARKED: Final = "dagrelay:parked"

MAX_SEEN: Final = 1000
"""Observations kept for a task that does not come to read them. After those it reads `null`, and the newest:
only that can tell the end where nobody can be asked."""

MAX_HISTORY: Final = 100

SLOT_S: Final = 6.0
"""How long a slot is kept for a process that does not renew it: a killed worker's slots are free after it."""

CALL_S: Final = 5.0
"""How long the place of a task that was called from the line is kept, until it comes and takes its slot."""

TASK_LINE: Final = "dagrelay:line:"
"""What the key of a connection's line begins with."""

GATE_LINE: Final = "dagrelay:gate:"
"""What the key of a line at a DAG's gate begins with: `<connection>:<DAG>:<class>` follows, see `gates`."""

THREAD: Final = "\1"
"""What a member of a line begins with that is no task, but a slot's token: a thread waits for it."""

PARKING: Final = (
    """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local now_text = string.format('%.6f', now)
local function ended(state) return state == 'done' or state == 'failed' or state == 'cancelled' end
local function note(id, words)
  local key = 'dagrelay:history:' .. id
  redis.call('RPUSH', key, string.format('%.3f', now) .. ' ' .. words)
  redis.call('LTRIM', key, -"""
    + str(MAX_HISTORY)
    + """, -1)
  redis.call('EXPIRE', key, """
    + str(KEEP_S)
    + """)
end
local function epoch_of(value)
  return tonumber(string.sub(value, 1, string.find(value, '\\0', 1, true) - 1))
end
local function send_on(id, value)
  local a = string.find(value, '\\0', 1, true)
  local b = string.find(value, '\\0', a + 1, true)
  local c = string.find(value, '\\0', b + 1, true)
  -- To the front: what has waited, and is over, does not wait for all that has come since.
  redis.call('RPUSH', string.sub(value, b + 1, c - 1), string.sub(value, c + 1))
  redis.call('HDEL', 'dagrelay:parked', id)
  redis.call('ZREM', 'dagrelay:due', id)
end
local function see(id, observation)
  local key = 'dagrelay:seen:' .. id
  local most = """
    + str(MAX_SEEN)
    + """
  local count = redis.call('LLEN', key)
  if count == most then redis.call('RPUSH', key, 'null') end  -- go and look: more than these have come
  if count > most + 1 then redis.call('RPOP', key) end
  redis.call('RPUSH', key, observation)
  redis.call('EXPIRE', key, """
    + str(KEEP_S)
    + """)
end
local function room(conn)
  local known = redis.call('HMGET', 'dagrelay:airflow:' .. conn, 'limit', 'ceiling', 'breaker', 'held')
  if known[3] == 'open' or (known[4] and known[4] ~= '') then return 0 end
  local slots, called = 'dagrelay:slots:' .. conn, 'dagrelay:called:' .. conn
  redis.call('ZREMRANGEBYSCORE', slots, '-inf', now)
  redis.call('ZREMRANGEBYSCORE', called, '-inf', now)
  local ceiling = tonumber(known[2] or 1)
  local limit = math.floor(math.min(tonumber(known[1] or ceiling), ceiling) + 1e-6)
  return limit - redis.call('ZCARD', slots) - redis.call('ZCARD', called)
end
local function grant(conn, member)
  local token = string.sub(member, 2)
  redis.call('ZADD', 'dagrelay:slots:' .. conn, string.format('%.6f', now + """
    + str(SLOT_S)
    + """), token)
  redis.call('RPUSH', 'dagrelay:granted:' .. token, '1')
  redis.call('EXPIRE', 'dagrelay:granted:' .. token, 60)
end
local function call(conn, id, value)
  send_on(id, value)
  redis.call('ZADD', 'dagrelay:called:' .. conn, string.format('%.6f', now + """
    + str(CALL_S)
    + """), id)
end
local function pump(conn)
  local line = '"""
    + TASK_LINE
    + """' .. conn
  if redis.call('EXISTS', line) == 0 then return 0 end
  local free, sent = room(conn), 0
  if free <= 0 then return 0 end
  local drained = tonumber(redis.call('HGET', 'dagrelay:airflow:' .. conn, 'drained_until') or 0) > now
  while sent < free do
    local id = redis.call('ZRANGE', line, 0, 0)[1]
    if not id then break end
    if string.sub(id, 1, 1) == '\\1' then
      grant(conn, id)
      sent = sent + 1
    else
      local value = redis.call('HGET', 'dagrelay:parked', id)
      -- A plain request is taken by who drains the line: see `lines.DRAIN`.
      if value and drained and redis.call('HEXISTS', 'dagrelay:record:' .. id, 'plain') == 1 then break end
      if value then
        call(conn, id, value)
        sent = sent + 1
      end
    end
    redis.call('ZREM', line, id)
  end
  return sent
end
local function held_so_far(conn)
  local known = redis.call('HMGET', 'dagrelay:airflow:' .. conn, 'held', 'held_since', 'held_total')
  local total = tonumber(known[3] or 0)
  if known[1] and known[1] ~= '' then total = total + now - tonumber(known[2] or now) end
  return total
end
"""
)
