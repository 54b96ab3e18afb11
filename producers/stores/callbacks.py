"""Callbacks: a signed URL for each job, at which its service says how the job is.

======================================= ================================================================
key                                     what
======================================= ================================================================
``dagrelay:callback:<hash of a token>`` hash, until the job's deadline: `task` (the task id), `until`,
                                        `rules` (how what is said is read, as JSON), `asks` (1: the service
                                        can be asked too), `heartbeat_s`, `max_interval_s`, and `look_by`:
                                        when it is looked at, however often it calls back
======================================= ================================================================

Of the record: `heard_at`, when the service last said something, and `called_back`, when it told the end.

**A token** is the task id, the deadline in seconds since 1970, and their HMAC; made anew from those, so it
is the same on every attempt. Only its hash lies in Redis: who reads Redis cannot end a job by it. It is
there before anything is submitted.

**A callback** is one script. The end goes to the task's mailbox and sends it on, so that one that comes
before the task waits is read as it begins to. Everything else wakes nobody: it is noted in the record, and
moves the time at which the job would have been silent for too long.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, cast

from ..settings import read_value
from .notices import NOTICES
from .parking import PARKING
from .records import Script, record_key

if TYPE_CHECKING:
    from redis import Redis

SECRET: Final = "DAGRELAY_CALLBACK_SECRET"  # noqa: S105 - a name
OLD_SECRETS: Final = "DAGRELAY_CALLBACK_SECRET_OLD"
PATH: Final = "/v1/callbacks/"

SHORTEST_SECRET: Final = 32
CLOCK_SLACK_S: Final = 60.0
"""How far a gateway's clock may be off before it refuses a token itself; Redis' clock has the last word."""

_DOMAIN: Final = b"dagrelay callback v1\0"  # the same secret may sign something else, somewhere
_TOKEN: Final = re.compile(r"([A-Za-z0-9_-]{1,1200})\.([0-9]{1,12})\.([A-Za-z0-9_-]{43})\Z")

_RULES: Final = ("state", "success", "failure", "result", "progress", "reason")
"""The fields of a request by which what its service says is read."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """What tokens are signed with: the first makes new ones, all are accepted."""

    keys: tuple[bytes, ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        return bool(self.keys)

    def token(self, task_id: str, until: float) -> str:
        """Return the token of a task for a URL; `until`, its deadline, is in seconds since 1970."""
        name, at = _encoded(task_id.encode()), math.ceil(until)
        return f"{name}.{at}.{_signature(self.keys[0], name, str(at))}"

    def task_of(self, token: str, now: float) -> str | None:
        """Return the task id in a token that one of these secrets has signed, and is not over; or None."""
        found = _TOKEN.match(token)
        if found is None:
            return None
        name, at, given = found.groups()
        # All are compared, and each in the same time: how long it takes tells nothing.
        right = [hmac.compare_digest(_signature(key, name, at), given) for key in self.keys]
        if not any(right) or now > int(at) + CLOCK_SLACK_S:
            return None
        try:
            return base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()
        except (binascii.Error, ValueError):
            return None


def read_secrets(environ: Mapping[str, str], mistakes: list[str]) -> Secrets:
    """Return the secrets of callbacks from the environment, and note every mistake by its variable's name.

    `DAGRELAY_CALLBACK_SECRET` (or `…_FILE`), and while it is being replaced `DAGRELAY_CALLBACK_SECRET_OLD`
    with those before it, with spaces or commas between them. Workers and gateways need the same.
    """
    secret = (read_value(environ, SECRET, mistakes) or "").strip()
    old = re.split(r"[\s,]+", (read_value(environ, OLD_SECRETS, mistakes) or "").strip())
    for variable, text in ((SECRET, secret), *((OLD_SECRETS, text) for text in old)):
        if text and len(text) < SHORTEST_SECRET:
            mistakes.append(
                f"{variable} has fewer than {SHORTEST_SECRET} characters: openssl rand -hex 32 makes one"
            )
    if not secret:
        if any(old):
            mistakes.append(f"{OLD_SECRETS} is set without {SECRET}")
        return Secrets()
    return Secrets(tuple(text.encode() for text in (secret, *old) if text))


def _signature(key: bytes, name: str, at: str) -> str:
    return _encoded(hmac.digest(key, _DOMAIN + f"{name}.{at}".encode(), "sha256"))


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def callback_key(token: str) -> str:
    """Return the key at which a token is known: it holds no token."""
    return f"dagrelay:callback:{hashlib.sha256(token.encode()).hexdigest()}"


class Expected(NamedTuple):
    """What is known of a callback before its body is read."""

    rules: Mapping[str, Any]
    """For `answers.rules_of`."""
    asks: bool
    """Whether the service can be asked how the job is."""


What = Literal["alive", "progress", "look", "end"]
Became = Literal[What, "unknown", "ended"]

# What a service said. KEYS: the callback's key. ARGV: what, observation, state and progress ('' for
# unchanged). Returns what became of it: the same word, or `unknown` (no such token, or it is over), or
# `ended`: the job had ended before, by a callback or otherwise, and nothing was done. It begins with a
# deletion, so that it goes on where Redis is full: an end makes room. Of a job that may be silent for so
# long the next look is put off, or the time at which its task comes back; but looked at it is, at the
# longest interval, whatever it says itself.
TAKE: Final = Script(
    NOTICES
    + PARKING
    + """
local about = redis.call('HMGET', KEYS[1], 'task', 'until', 'heartbeat_s', 'max_interval_s', 'look_by')
if not about[1] or now > tonumber(about[2]) then return 'unknown' end
local id, what = about[1], ARGV[1]
local record = 'dagrelay:record:' .. id
local known = redis.call('HMGET', record, 'state', 'called_back', 'seen', 'progress', 'look', 'waits_for',
  'next_at', 'tell')
if not known[1] or ended(known[1]) or known[2] then return 'ended' end
redis.call('HDEL', KEYS[1], '')
redis.call('HSET', record, 'heard_at', now_text)
local value = redis.call('HGET', 'dagrelay:parked', id)
local looks = known[5] and known[5] ~= '' and 'dagrelay:looks:' .. known[5]
if what == 'end' then
  redis.call('HSET', record, 'called_back', now_text)
  see(id, ARGV[2])
  if value then
    send_on(id, value)
    if looks then redis.call('ZREM', looks, id) end
  end
  note(id, 'called back: is ' .. ARGV[3])
  return what
end
if what == 'progress' then
  local state = ARGV[3] ~= '' and ARGV[3] or known[3] or ''
  redis.call('HSET', record, 'seen', state, 'progress', ARGV[4])
  redis.call('HDEL', record, 'errors', 'reason')
  if state ~= (known[3] or '') then note(id, 'called back: is ' .. state) end
  if known[8] and (state ~= (known[3] or '') or ARGV[4] ~= (known[4] or '')) then
    tell(known[8], id, 'progress')
  end
end
local due = value and known[6] and not known[7]  -- it waits for the job, and for no retry
local look_at = due and looks and redis.call('ZSCORE', looks, id)
if what == 'look' then
  if look_at then redis.call('ZADD', looks, now_text, id) else see(id, 'null') end
elseif due and about[3] ~= '' then
  local silent = now + tonumber(about[3])
  if look_at then
    local by = tonumber(about[5] or 0)
    if by <= now then
      by = now + tonumber(about[4])
      redis.call('HSET', KEYS[1], 'look_by', string.format('%.6f', by))
    end
    redis.call('ZADD', looks, string.format('%.6f', math.min(silent, by)), id)
  elseif not looks then
    redis.call('ZADD', 'dagrelay:due', 'XX', string.format('%.6f', math.min(silent, tonumber(about[2]))), id)
  end
end
return what
"""
)


class Callbacks:
    """The callbacks that one Redis expects. Every method raises what redis-py raises."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    def expect(self, token: str, task_id: str, until: float, message: Mapping[str, Any]) -> None:
        """Have a token known from now on; `message` is the request's, `until` as in the token.

        Done again with every attempt, it changes nothing that a callback has left there.
        """
        rules = {name: message[name] for name in _RULES if name in message}
        fields: dict[Any, Any] = {
            "task": task_id,
            "until": f"{until:.6f}",
            "rules": json.dumps(rules),
            "asks": "1" if message.get("path") or message.get("url") else "",
            "heartbeat_s": message.get("heartbeat_s") or "",
            "max_interval_s": max(message.get("max_interval_s") or 60.0, message.get("interval_s") or 5.0),
        }
        key = callback_key(token)
        with self._client.pipeline(transaction=True) as pipe:
            pipe.hset(key, mapping=fields)
            pipe.expireat(key, math.ceil(until) + 1)
            pipe.execute()

    def expected(self, token: str) -> Expected | None:
        """Return how what comes with a token is read, None for a token that is not known."""
        rules, asks = self._client.hmget(callback_key(token), "rules", "asks")
        return None if rules is None else Expected(json.loads(rules), bool(asks))

    def take(
        self, token: str, what: What, observation: Any = None, state: str = "", progress: str = ""
    ) -> Became:
        """Have what was said noted, and the task sent on with the end; return what became of it."""
        args = (what, json.dumps(observation), state, progress)
        answer = TAKE.run(self._client, (callback_key(token),), args)
        return cast(Became, answer.decode() if isinstance(answer, bytes) else answer)


__all__ = [
    "OLD_SECRETS",
    "PATH",
    "SECRET",
    "Became",
    "Callbacks",
    "Expected",
    "Secrets",
    "callback_key",
    "read_secrets",
    "record_key",
]
