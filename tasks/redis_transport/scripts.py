"""The Lua: each script is one step of the protocol, and all of it happens or nothing does.

Every clock here is Redis' own. Where Redis is full (`maxmemory` with noeviction), it refuses a script at the
first write that may need memory, unless the script has written before: so a script changes nothing or all.
Those which only move what is there already begin with a deletion, and go on working; what brings something
new in is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, Protocol

from redis.exceptions import NoScriptError


class Client(Protocol):
    """What a script needs: redis-py's client has it, and so has `hand.Line`."""

    def execute_command(self, *args: Any) -> Any: ...


class Script:
    """A Lua script, sent by its hash, and whole only where Redis does not have it yet."""

    def __init__(self, lua: str) -> None:
        self.lua = lua
        self.sha = hashlib.sha1(lua.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, client: Client, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run it in one round trip. Raises what redis-py raises."""
        try:
            return client.execute_command("EVALSHA", self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return client.execute_command("EVAL", self.lua, len(keys), *keys, *args)


_NOW = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
"""

# Acknowledge, empty the hands, claim up to n.
# KEYS: leases, held, returned, tags, hands, gone, then the queue lists in the order in which they are served,
# then the hand of each. ARGV: owner, seconds of the lease, n, lists in a group of equal priority, whether the
# lists of a group share n (0/1), number of hands to empty, the acknowledgements (number of tags, tags, number
# of SHA-1s, SHA-1s), the numbers of those hands.
# Returns a flat list: tag, number of the list, times returned ('' for never), message, and so on.
CLAIM: Final = Script(
    _NOW
    + """
local leases, held, returned, tags, base = KEYS[1], KEYS[2], KEYS[3], KEYS[4], 6
local owner, ttl, wanted, group = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local fair, hands = ARGV[5] == '1', tonumber(ARGV[6])
local lists = (#KEYS - base) / 2
local at = 7
for _, key in ipairs({held, returned}) do
  local count = tonumber(ARGV[at])
  for first = at + 1, at + count, 1000 do  -- Lua unpacks some 8,000 at the most
    redis.call('HDEL', key, unpack(ARGV, first, math.min(first + 999, at + count)))
  end
  at = at + count + 1
end
local until_ = redis.call('ZSCORE', leases, owner)
if not until_ or tonumber(until_) <= now then  -- it had run out, and all was restored or is about to be
  redis.call('ZREM', KEYS[6], owner)  -- see RENEW
  redis.call('ZADD', leases, string.format('%.6f', now + ttl), owner)
  for list = 1, lists do redis.call('SADD', KEYS[5], KEYS[base + list]) end
end
redis.call('HDEL', held, '')  -- nothing: see RENEW
local answer, found = {}, {}
local function claim(list, message)
  found[#found + 1] = {list, message}
  wanted = wanted - 1
end
for i = at, at + hands - 1 do
  local list = tonumber(ARGV[i])
  local hand = KEYS[base + lists + list]
  while wanted > 0 do
    local message = redis.call('RPOP', hand)
    if not message then break end
    claim(list, message)
  end
  while wanted <= 0 and redis.call('LMOVE', hand, KEYS[base + list], 'RIGHT', 'RIGHT') do end
end
-- A first pass gives each list of a group its share, a second one what the others left to those that had
-- all of their share, and so may have more.
for first = 1, lists, group do
  local share = fair and math.ceil(wanted / group) or wanted
  local more = {}
  for pass = 1, 2 do
    for list = first, math.min(first + group - 1, lists) do
      if wanted > 0 and (pass == 1 or more[list]) then
        -- pcall: a key of another type there is no reason to lose what was popped from the others; the move
        -- that blocks on it will say so.
        local count = pass == 1 and math.min(share, wanted) or wanted
        local messages = redis.pcall('RPOP', KEYS[base + list], count)
        if messages and not messages.err then
          more[list] = #messages == count
          for _, message in ipairs(messages) do claim(list, message) end
        end
      end
    end
  end
end
if #found == 0 then return answer end
local tag = redis.call('INCRBY', tags, #found) - #found
local seen = redis.call('HLEN', returned) > 0
local pairs_ = {}
for i, item in ipairs(found) do
  local list, message = item[1], item[2]
  answer[#answer + 1] = tag + i
  answer[#answer + 1] = list
  answer[#answer + 1] = seen and redis.call('HGET', returned, redis.sha1hex(message)) or ''
  answer[#answer + 1] = message
  pairs_[#pairs_ + 1] = tag + i
  pairs_[#pairs_ + 1] = KEYS[base + list] .. '\\0' .. message
  if #pairs_ >= 1000 then redis.call('HSET', held, unpack(pairs_)) pairs_ = {} end
end
if #pairs_ > 0 then redis.call('HSET', held, unpack(pairs_)) end
return answer
"""
)

# KEYS: held, returned. ARGV: number of tags, tags, SHA-1s of messages that had come back before.
ACKNOWLEDGE: Final = Script("""
local count = tonumber(ARGV[1])
for first = 2, #ARGV, 1000 do
  local last = math.min(first + 999, #ARGV)
  local cut = math.max(first - 1, math.min(last, 1 + count))
  if first <= cut then redis.call('HDEL', KEYS[1], unpack(ARGV, first, cut)) end
  if cut < last then redis.call('HDEL', KEYS[2], unpack(ARGV, cut + 1, last)) end
end
return 1
""")

# KEYS: leases, held, gone, hands. ARGV: owner, seconds of the lease, the queue lists that it moves from.
# Returns whether the lease was still running, and how many messages the owner holds. If it was not, the owner
# has been taken for dead: it is so no more. What is known of its hands is written each time.
RENEW: Final = Script(
    _NOW
    + """
local had = redis.call('ZSCORE', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], '')  -- nothing: a deletion, so that a full Redis does not end leases
redis.call('ZADD', KEYS[1], string.format('%.6f', now + ARGV[2]), ARGV[1])
if not had then
  redis.call('ZREM', KEYS[3], ARGV[1])
end
for i = 3, #ARGV do redis.call('SADD', KEYS[4], ARGV[i]) end
return {had and 1 or 0, redis.call('HLEN', KEYS[2])}
"""
)

# Put back to the front of its queue what a hand has of it. KEYS: held, hand, the queue list.
EMPTY: Final = Script("""
redis.call('HDEL', KEYS[1], '')  -- nothing: see RENEW
while redis.call('LMOVE', KEYS[2], KEYS[3], 'RIGHT', 'RIGHT') do end
return 1
""")

# Put messages back to the front of their queues. KEYS: held, returned. ARGV: `counted`, `begun` (it is noted
# that they came back, and not counted) or `unseen`, then tags. Returns how many there were.
GIVE_BACK: Final = Script("""
local back = 0
redis.call('HDEL', KEYS[1], '')  -- nothing: see RENEW
for i = 2, #ARGV do
  local value = redis.call('HGET', KEYS[1], ARGV[i])
  if value then
    local cut = string.find(value, '\\0', 1, true)
    local message = string.sub(value, cut + 1)
    redis.call('RPUSH', string.sub(value, 1, cut - 1), message)
    redis.call('HDEL', KEYS[1], ARGV[i])
    if ARGV[1] ~= 'unseen' then
      redis.call('HINCRBY', KEYS[2], redis.sha1hex(message), ARGV[1] == 'counted' and 1 or 0)
      redis.call('EXPIRE', KEYS[2], 86400)  -- of those which somebody else has acknowledged
    end
    back = back + 1
  end
end
return back
""")

# Put back all that an owner holds: when it stops (ARGV[4] = 'stop'), or when its lease has run out.
# KEYS: leases, gone, returned. ARGV: held_prefix, hands_prefix, hand_prefix, 'stop' or 'dead', owner (stop),
# seconds after which a dead owner's hands are looked at again, messages at the most.
# Returns owner, messages put back, 1 if there are more; or nothing.
RESTORE: Final = Script(
    _NOW
    + """
local leases, gone, returned = KEYS[1], KEYS[2], KEYS[3]
local owner, again = ARGV[5], false
if ARGV[4] == 'dead' then
  owner = redis.call('ZRANGE', leases, '-inf', now, 'BYSCORE', 'LIMIT', 0, 1)[1]
  if not owner then
    owner = redis.call('ZRANGE', gone, '-inf', now, 'BYSCORE', 'LIMIT', 0, 1)[1]
    again = true
  end
  if not owner then return {} end
end
local held, hands, most, back = ARGV[1] .. owner, ARGV[2] .. owner, tonumber(ARGV[7]), 0
redis.call('HDEL', held, '')  -- nothing: see RENEW
for _, queue in ipairs(redis.call('SMEMBERS', hands)) do
  while redis.call('LMOVE', ARGV[3] .. owner .. ':' .. queue, queue, 'RIGHT', 'RIGHT') do back = back + 1 end
end
local more = 0
local page = redis.call('HRANDFIELD', held, most, 'WITHVALUES')
for i = 1, #page, 2 do
  local value = page[i + 1]
  local cut = string.find(value, '\\0', 1, true)
  local message = string.sub(value, cut + 1)
  redis.call('RPUSH', string.sub(value, 1, cut - 1), message)
  redis.call('HDEL', held, page[i])
  if ARGV[4] == 'dead' then
    redis.call('HINCRBY', returned, redis.sha1hex(message), 1)
    redis.call('EXPIRE', returned, 86400)
  end
  back = back + 1
end
if redis.call('EXISTS', held) == 1 then
  more = 1
elseif again then
  redis.call('ZREM', gone, owner)
  redis.call('DEL', hands)
else
  redis.call('ZREM', leases, owner)
  redis.call('ZADD', gone, string.format('%.6f', now + ARGV[6]), owner)
end
return {owner, back, more}
"""
)

# KEYS: parked, due, held, cancelled. ARGV: task id, due (seconds since 1970), retries, queue list, message
# without its eta, tag ('' when it is published, and not claimed). Returns parked, due (claimed, and runnable
# now), queued (published, and runnable now), stale (a newer copy of the task waits already; this one is
# dropped), gone (claimed, but not held any more: the lease had run out, and the message is somebody else's),
# or cancelled (somebody asked to cancel the task; nothing was done).
PARK: Final = Script(
    _NOW
    + """
local parked, id, due, retries, tag = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[6]
if tag ~= '' and redis.call('HEXISTS', KEYS[3], tag) == 0 then return 'gone' end
local there = redis.call('HGET', parked, id)
if there and tonumber(string.sub(there, 1, string.find(there, '\\0', 1, true) - 1)) > retries then
  if tag ~= '' then redis.call('HDEL', KEYS[3], tag) end
  return 'stale'
end
if redis.call('ZSCORE', KEYS[4], id) then return 'cancelled' end
if due <= now then
  if tag == '' then redis.call('LPUSH', ARGV[4], ARGV[5]) end
  if there then  -- an older copy, which this one replaces
    redis.call('HDEL', parked, id)
    redis.call('ZREM', KEYS[2], id)
  end
  return tag ~= '' and 'due' or 'queued'
end
if tag ~= '' then redis.call('HDEL', KEYS[3], tag) end
redis.call('HSET', parked, id,
  ARGV[3] .. '\\0' .. string.format('%.3f', now) .. '\\0' .. ARGV[4] .. '\\0' .. ARGV[5])
redis.call('ZADD', KEYS[2], ARGV[2], id)
return 'parked'
"""
)

# KEYS: parked, due, leases, cancels. ARGV: how many at the most. Returns how many came back to their queues,
# in how many seconds the next is due ('' for none), how many workers there are, and how often a cancel was
# asked for.
MOVE: Final = Script(
    _NOW
    + """
local ids = redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[1])
redis.call('HDEL', KEYS[1], '')  -- nothing: see RENEW
for _, id in ipairs(ids) do
  local value = redis.call('HGET', KEYS[1], id)
  if value then
    local a = string.find(value, '\\0', 1, true)
    local b = string.find(value, '\\0', a + 1, true)
    local c = string.find(value, '\\0', b + 1, true)
    redis.call('LPUSH', string.sub(value, b + 1, c - 1), string.sub(value, c + 1))
    redis.call('HDEL', KEYS[1], id)
  end
  redis.call('ZREM', KEYS[2], id)
end
local next_ = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
return {#ids, next_[2] and string.format('%.3f', next_[2] - now) or '', redis.call('ZCARD', KEYS[3]),
  redis.call('GET', KEYS[4]) or '0'}
"""
)

# Is a message that came back older than what is parked? KEYS: parked, held. ARGV: task id, retries, tag.
# Returns 1, and drops it, if a copy with more retries waits.
STALE: Final = Script("""
local there = redis.call('HGET', KEYS[1], ARGV[1])
if there and tonumber(string.sub(there, 1, string.find(there, '\\0', 1, true) - 1)) > tonumber(ARGV[2]) then
  redis.call('HDEL', KEYS[2], ARGV[3])
  return 1
end
return 0
""")

# Replace a parked message and send it on at once. KEYS: parked, due. ARGV: task id, the value that was read,
# the new one. Returns 0 if it has changed meanwhile.
AMEND: Final = Script("""
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], '')  -- nothing: see RENEW
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[2], 0, ARGV[1])
return 1
""")

# KEYS: held, quarantine, tags, returned. ARGV: tag ('' for what nobody has claimed), SHA-1, JSON with the
# message, where it lay and why. Returns 0 if it is not held any more.
QUARANTINE: Final = Script("""
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 and ARGV[1] ~= '' then return 0 end
redis.call('HSET', KEYS[2], redis.call('INCR', KEYS[3]), ARGV[3])
redis.call('HDEL', KEYS[4], ARGV[2])
return 1
""")

# KEYS: quarantine, the queue list. ARGV: number, the value that was read, the message. Returns 0 if it is
# gone.
REPLAY: Final = Script("""
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], '')  -- nothing: see RENEW
redis.call('LPUSH', KEYS[2], ARGV[3])
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
""")
