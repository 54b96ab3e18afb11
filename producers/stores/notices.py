"""Who hears of a request: what is told of it, and to whom, is written in the script of what happens.

============================== ===========================================================================
key                            what
============================== ===========================================================================
``dagrelay:replies:<door>``    stream: what a door is to tell its senders. Fields: `id` (the task id), `what`
                               (progress, ended, corrected), `to` and `correlation_id` as the sender named
                               them. How the request stands is read from its record when it is told
============================== ===========================================================================

Two fields of a record: `tell`, whom to tell, as JSON; `at_end`, messages for workers which the end sends on:
lines in pairs, the queue's list and the message.
"""

from __future__ import annotations

import json
from typing import Final

MOST_REPLIES: Final = 500_000
"""Of one door. A door that nobody runs any more does not fill Redis: the oldest go."""


def replies_key(door: str) -> str:
    """Return the stream of what a door is to tell its senders."""
    return f"dagrelay:replies:{door}"


def tell_field(door: str, to: str, correlation_id: str | None) -> str:
    """Return the field `tell` of a record."""
    told = {"door": door, "to": to, "correlation_id": correlation_id or ""}
    return json.dumps(told, separators=(",", ":"))


NOTICES: Final = (
    """
local function tell(tell_text, id, what)
  local ok, wish = pcall(cjson.decode, tell_text)
  if not ok then return end
  redis.call('XADD', 'dagrelay:replies:' .. wish.door, 'MAXLEN', '~', """
    + str(MOST_REPLIES)
    + """, '*', 'id', id, 'what', what,
    'to', wish.to, 'correlation_id', wish.correlation_id)
end
local function tell_end(record, id, what)
  local wishes = redis.call('HMGET', record, 'tell', 'at_end')
  if wishes[2] then
    for queue, message in string.gmatch(wishes[2] .. '\\n', '([^\\n]*)\\n([^\\n]*)\\n') do
      redis.call('LPUSH', queue, message)
    end
  end
  if wishes[1] then tell(wishes[1], id, what) end
end
"""
)
"""Lua: `tell(text, id, what)` and `tell_end(record, id, what)`."""


def at_end_field(messages: list[tuple[str, bytes]]) -> str:
    """Return the field `at_end` for messages with the lists that they go to."""
    return "\n".join(text for queue, message in messages for text in (queue, message.decode()))
