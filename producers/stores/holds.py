"""Connections that are held: nobody asks that Airflow anything, and what is meant for it waits.

Key ``dagrelay:hold:<connection>:<fingerprint>``, a hash: reason, since, until (seconds since 1970 by
Redis' clock). The fingerprint is that of the credentials which were refused, so that a hold does not bind a
worker that was started again with better ones. When `until` has passed, one request is let through to
find out; the others wait on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .records import Script

if TYPE_CHECKING:
    from redis import Redis

PROBE_EVERY_S: Final = 30.0
"""How often one request may find out whether a held connection works again, unless the worker's settings say
otherwise."""

FORGET_S: Final = 86_400
"""A hold that nobody renews is about credentials that nobody uses any more."""

_SET = Script("""
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
redis.call('HSETNX', KEYS[1], 'since', string.format('%.3f', now))
redis.call('HSET', KEYS[1], 'reason', ARGV[1], 'until', string.format('%.3f', now + ARGV[2]))
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
""")

# Returns the seconds left, '0' for no hold, '-1' for: go, and tell whether it works.
_ASK = Script("""
local ends = redis.call('HGET', KEYS[1], 'until')
if not ends then return '0' end
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
if now < tonumber(ends) then return string.format('%.3f', ends - now) end
redis.call('HSET', KEYS[1], 'until', string.format('%.3f', now + ARGV[1]))
return '-1'
""")


class Holds:
    """The holds in one Redis. Every method is one round trip and raises what redis-py raises."""

    def __init__(self, client: Redis, probe_every_s: float = PROBE_EVERY_S) -> None:
        self._client = client
        self._probe_every_s = probe_every_s

    def hold(self, connection: str, fingerprint: str, reason: str) -> None:
        """Hold a connection until it is time to find out."""
        _SET.run(self._client, (_key(connection, fingerprint),), (reason, self._probe_every_s, FORGET_S))

    def ask(self, connection: str, fingerprint: str) -> float:
        """Return how many seconds to wait: 0 for no hold, and -1 when this caller is the one to find out."""
        left = _ASK.run(self._client, (_key(connection, fingerprint),), (self._probe_every_s,))
        return float(left)

    def held(self, connection: str, fingerprint: str) -> bool:
        """Tell whether a connection is held, without being the one to find out if it works again."""
        return bool(self._client.exists(_key(connection, fingerprint)))

    def release(self, connection: str, fingerprint: str) -> None:
        """End a hold; nothing happens where there is none."""
        self._client.delete(_key(connection, fingerprint))

    def reasons(self) -> dict[str, str]:
        """Return why each held connection is held."""
        found = {}
        for key in self._client.scan_iter(match="dagrelay:hold:*"):
            name = (key.decode() if isinstance(key, bytes) else str(key)).split(":")[2]
            reason = self._client.hget(key, "reason")
            found[name] = reason.decode() if isinstance(reason, bytes) else str(reason or "")
        return found


def _key(connection: str, fingerprint: str) -> str:
    return f"dagrelay:hold:{connection}:{fingerprint}"
