"""How a dead letter is written: the Lua for it, which the script that ends a request has in it.

`bury` puts the end of a request on the desk, and `unbury` takes it off. What a letter holds, and how it is
read, listed and replayed: see `dead`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

DEAD: Final = "dagrelay:dead"
REPLAYED: Final = "dagrelay:dead-replayed"
DROPPED: Final = "dagrelay:dead-dropped"


def dead_key(letter_id: str) -> str:
    """Return the hash of a dead letter."""
    return f"{DEAD}:{letter_id}"


class Keeping(NamedTuple):
    """For how long dead letters are kept, and how many of them."""

    keep_s: int = 14 * 86_400
    most: int = 100_000


FROM_RECORD: Final = (
    "task",
    "dag_id",
    "dag_run_id",
    "key",
    "connection",
    "service",
    "job_id",
    "reference",
    "by",
    "fan_out",
    "accepted_at",
    "due_at",
    "attempts",
    "unsure",
    "error",
    "error_args",
    "reason",
    "replay_of",
)
"""What a letter takes over from the record, which may be gone before it."""

# bury(record, id, now, seconds to keep it, how many there may be, further fields in pairs, which win) returns
# how many letters went for it that nobody had replayed. Those that have been go first.
LETTERS: Final = (
    """
local function unbury(id)
  redis.call('DEL', 'dagrelay:dead:' .. id)
  redis.call('ZREM', 'dagrelay:dead', id)
  redis.call('ZREM', 'dagrelay:dead-replayed', id)
end
local function bury(record, id, now, keep, most, more)
  local names = {"""
    + ", ".join(f"'{name}'" for name in FROM_RECORD)
    + """}
  local known = redis.call('HMGET', record, unpack(names))
  local fields = {'at', string.format('%.6f', now)}
  for i, name in ipairs(names) do
    if known[i] and known[i] ~= '' then
      fields[#fields + 1] = name
      fields[#fields + 1] = known[i]
    end
  end
  local lines = redis.call('LRANGE', 'dagrelay:history:' .. id, 0, -1)
  if #lines > 0 then
    fields[#fields + 1] = 'history'
    fields[#fields + 1] = table.concat(lines, '\\n')
  end
  for i = 1, #more do fields[#fields + 1] = more[i] end
  unbury(id)
  redis.call('HSET', 'dagrelay:dead:' .. id, unpack(fields))
  redis.call('EXPIRE', 'dagrelay:dead:' .. id, keep)
  redis.call('ZADD', 'dagrelay:dead', string.format('%.6f', now), id)
  local sets = {'dagrelay:dead-replayed', 'dagrelay:dead'}
  for _, set in ipairs(sets) do
    for _, old in ipairs(redis.call('ZRANGE', set, '-inf', now - keep, 'BYSCORE', 'LIMIT', 0, 100)) do
      unbury(old)
    end
  end
  local over, dropped = redis.call('ZCARD', sets[1]) + redis.call('ZCARD', sets[2]) - most, 0
  for _, set in ipairs(sets) do
    -- Some at a time: where the limit was lowered, each letter that comes makes way for many.
    for _ = 1, math.min(over, 100) do
      local oldest = redis.call('ZRANGE', set, 0, 0)[1]
      if not oldest then break end
      unbury(oldest)
      over = over - 1
      if set == 'dagrelay:dead' then dropped = dropped + 1 end
    end
  end
  if dropped > 0 then redis.call('INCRBY', 'dagrelay:dead-dropped', dropped) end
  return dropped
end
"""
)
