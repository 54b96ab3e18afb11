"""Redis Streams as a source of messages. Its Redis may be another than Dagrelay's; Redis 7 or Valkey.

URL: ``redis://[user:password@]host:port/db?stream=dag-triggers`` (``rediss://`` with TLS; ``unix://``).
Options beside `stream`, and redis-py's own ``ssl_…``:

=============== =============================================================================================
group           the consumer group, shared by all listeners. Default ``dagrelay``
claim_after_s   how long another listener has a message before it is taken for dead. Default 60
delete          ``yes`` takes an accepted entry off the stream. Default ``no``: the stream's owner trims it
dead            the stream of what was refused. Default ``<stream>.dead``
name            the same for all listeners of the stream; host, port, database and stream if left out. Give
                it where listeners reach one Redis under several names: ids are unique within it
=============== =============================================================================================

An entry's field `data` holds the body. `id`, `content_type`, `reply_to` and `correlation_id` are the
message's own, all others its headers (``ce-type``, …). Without an `id` it is the entry's: unique in its
stream. A publisher needs nothing but ``XADD dag-triggers * data '{"dag_id": …}'``.

Whoever trims the stream (MAXLEN) before its entries are accepted loses them: this is not noticed here.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, RedisError, ResponseError
from redis.retry import Retry

from ..contract import QUEUE_JOBS, QUEUE_LOOKS, QUEUE_TRIGGERS
from ..errors import ConfigurationError
from ..settings import redis_url_problem
from ..stores.records import Script
from .message import Incoming
from .source import Received, SourceUnavailable, Undeliverable

OPTIONS: Final = ("stream", "group", "claim_after_s", "delete", "dead", "name")
MOST_ANSWERS: Final = 100_000
"""Kept in a stream of answers: a sender that reads no more does not fill its Redis."""

CONNECT_S: Final = 5.0
MAX_WAIT_S: Final = 5.0
"""Of one read; the socket waits twice as long, so that an answer is never missed."""

FORGET_AFTER_CLAIMS: Final = 10
"""A consumer that has done nothing for so many times `claim_after_s`, and holds nothing, is removed."""

_OWN_KEYS: Final = ("dagrelay:", "celery", "_kombu", "unacked")
_OWN_QUEUES: Final = (QUEUE_TRIGGERS, QUEUE_JOBS, QUEUE_LOOKS)

# KEYS: the stream. ARGV: group, consumer. What it holds would go with it: then it stays.
LEAVE: Final = Script("""
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
""")


def consumer_name() -> str:
    """Return a name for one consumer of a group, which no other has."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


def begin_group(client: Redis, stream: str, group: str) -> None:
    """Make a group that reads a stream from its beginning, where there is none; the stream too."""
    try:
        client.xgroup_create(stream, group, id="0", mkstream=True)
    except ResponseError as exc:
        if not str(exc).startswith("BUSYGROUP"):
            raise


def forget_consumers(client: Redis, stream: str, group: str, *, idle_s: float) -> None:
    """Remove the consumers that have done nothing for so long and hold nothing."""
    for one in client.xinfo_consumers(stream, group):
        if one["idle"] > idle_s * 1000 and not one["pending"]:
            LEAVE.run(client, (stream,), (group, one["name"]))


def entries(answer: Any) -> list[tuple[bytes, dict[bytes, bytes] | None]]:
    """Return the entries of one stream in an answer to XREADGROUP; without fields, it was deleted."""
    found = answer.items() if isinstance(answer, dict) else answer or ()
    return [(one[0], one[1] or None) for _, rows in found for one in rows]


class RedisStreams:
    """One stream, read as a consumer of a group: a `Source`. Belongs to one thread."""

    def __init__(
        self,
        client: Redis,
        name: str,
        stream: str,
        *,
        group: str = "dagrelay",
        claim_after_s: float = 60.0,
        delete: bool = False,
        dead: str = "",
        most_published: int | None = MOST_ANSWERS,
    ) -> None:
        self.name, self._most_published = name, most_published
        self._client, self._stream, self._group = client, stream, group
        self._claim_after_s, self._delete, self._dead = claim_after_s, delete, dead or f"{stream}.dead"
        self._consumer = consumer_name()
        self._begun = False
        self._claim_at = self._tidy_at = 0.0

    @classmethod
    def from_url(cls, url: str, *, receives: bool = True, keep_all: bool = False) -> RedisStreams:
        """Return it, not connected yet. Who only publishes needs no stream; `keep_all`: it trims nothing.

        Raises ConfigurationError with every mistake, which shows no part of the URL that may be secret.
        """
        mistakes: list[str] = []
        address, _, query = url.partition("?")
        pairs = parse_qsl(query, keep_blank_values=True)
        told = {name: value for name, value in pairs if name in OPTIONS}
        others = [(name, value) for name, value in pairs if name not in OPTIONS]
        unknown = sorted({name for name, _ in others if not name.startswith("ssl_") and name != "db"})
        if unknown:
            mistakes.append(f"the source's URL has unknown options {unknown}: there are {', '.join(OPTIONS)}")
        address += "?" + urlencode(others)
        if problem := redis_url_problem(address):
            mistakes.append(f"the source's URL {problem}")
        if receives and not told.get("stream"):
            mistakes.append("the source's URL names no stream: append ?stream=dag-triggers")
        claim_after_s = _seconds(told.get("claim_after_s", "60"))
        if claim_after_s is None:
            mistakes.append("the source's URL: claim_after_s is a number of seconds, 0.1 to 86400")
        if told.get("delete", "no") not in ("yes", "no"):
            mistakes.append("the source's URL: delete is yes or no")
        if len(told) + len(others) != len(pairs):
            mistakes.append("the source's URL gives an option twice")
        if mistakes:
            raise ConfigurationError(*mistakes)
        try:
            pool = ConnectionPool.from_url(
                address,
                socket_connect_timeout=CONNECT_S,
                socket_timeout=2 * MAX_WAIT_S,
                retry=Retry(NoBackoff(), 0),
                client_name="dagrelay-listener",
            )
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError, RedisError) as exc:
            why = type(exc).__name__
            raise ConfigurationError(f"the source's URL has an option that cannot be used ({why})") from None
        where = pool.connection_kwargs
        address = where.get("path") or f"{where.get('host', 'localhost')}:{where.get('port', 6379)}"
        stream = told.get("stream", "")
        name = told.get("name") or f"{address}/{where.get('db', 0)}:{stream}"
        return cls(
            Redis(connection_pool=pool),
            f"redis:{name}",
            stream,
            group=told.get("group") or "dagrelay",
            claim_after_s=claim_after_s or 0.0,
            delete=told.get("delete") == "yes",
            dead=told.get("dead", ""),
            most_published=None if keep_all else MOST_ANSWERS,
        )

    def receive(self, most: int, wait_s: float) -> Sequence[Received]:
        """Return messages: first what dead listeners have left, then new ones."""
        with self._told():
            if not self._begun:
                begin_group(self._client, self._stream, self._group)
                self._begun = True
            try:
                return self._claimed(most) or self._new(most, wait_s)
            except ResponseError as exc:
                if not str(exc).startswith("NOGROUP"):
                    raise
                self._begun = False  # somebody has deleted the stream
                return ()

    def _new(self, most: int, wait_s: float) -> list[Received]:
        block_ms = max(1, int(min(wait_s, MAX_WAIT_S) * 1000)) if wait_s > 0 else None
        answer = self._client.xreadgroup(
            self._group, self._consumer, {self._stream: ">"}, count=most, block=block_ms
        )
        return [_received(entry, fields, 1) for entry, fields in entries(answer) if fields is not None]

    def _claimed(self, most: int) -> list[Received]:
        """Take over what was delivered so long ago that its listener must be dead."""
        now = time.monotonic()
        if now < self._claim_at:
            return []
        idle_ms = int(self._claim_after_s * 1000)
        rows: Any = self._client.xpending_range(
            self._stream, self._group, min="-", max="+", count=most, idle=idle_ms
        )
        if not rows:
            self._claim_at = now + self._claim_after_s / 4
            self._tidy(now)
            return []
        times = {row["message_id"]: row["times_delivered"] + 1 for row in rows}
        claimed: Any = self._client.xclaim(self._stream, self._group, self._consumer, idle_ms, list(times))
        # What was deleted since it was delivered is not among them, and pending no more.
        return [
            _received(entry, fields, times[entry])
            for entry, fields in claimed
            if entry is not None and fields
        ]

    def _tidy(self, now: float) -> None:
        if now >= self._tidy_at:
            idle_s = FORGET_AFTER_CLAIMS * self._claim_after_s
            forget_consumers(self._client, self._stream, self._group, idle_s=idle_s)
            self._tidy_at = now + self._claim_after_s

    def done(self, received: Sequence[Received]) -> None:
        """Acknowledge entries, and delete them where that is wished."""
        if not received:
            return
        ids = [one.handle[0] for one in received]
        with self._told():
            if not self._delete:
                self._client.xack(self._stream, self._group, *ids)
                return
            with self._client.pipeline(transaction=False) as pipe:
                pipe.xdel(self._stream, *ids)  # first: what is pending without an entry is found
                pipe.xack(self._stream, self._group, *ids)
                pipe.execute()

    def refuse(self, received: Received, reason: str) -> None:
        """Put an entry into the dead stream, with `dead_reason`, `dead_from` (its id), `dead_deliveries`.

        First that, then the acknowledgement: a transaction would acknowledge also where the dead stream
        cannot be written. Killed between the two, the entry is there twice.
        """
        entry, fields = received.handle
        if b"data" not in fields:
            reason += " (the entry has no field `data`, which holds the body)"
        told: dict[Any, Any] = {
            "dead_reason": reason,
            "dead_from": entry,
            "dead_deliveries": received.deliveries,
        }
        with self._told():
            self._client.xadd(self._dead, {**fields, **told})
        self.done([received])

    def give_back(self, received: Sequence[Received]) -> None:
        """Leave entries to whoever asks next, and this delivery uncounted."""
        with self._told(), self._client.pipeline(transaction=False) as pipe:
            for times in {one.deliveries for one in received}:
                pipe.xclaim(
                    self._stream,
                    self._group,
                    self._consumer,
                    0,
                    [one.handle[0] for one in received if one.deliveries == times],
                    idle=int(self._claim_after_s * 1000) + 1,
                    retrycount=times - 1,
                    justid=True,
                )
            pipe.execute()
            self._claim_at = 0.0

    def publish(
        self, to: str, body: bytes, *, correlation_id: str | None, headers: Mapping[str, str]
    ) -> None:
        """Append to the stream `to`. Of answers it keeps about the last 100,000.

        Raises Undeliverable for a key of Dagrelay or Celery, this stream itself, and what is no stream.
        """
        self._check_place(to)
        fields: dict[Any, Any] = {"data": body, "content_type": "application/json", **headers}
        if correlation_id is not None:
            fields["correlation_id"] = correlation_id
        with self._told():
            try:
                self._client.xadd(to, fields, maxlen=self._most_published, approximate=True)
            except NoPermissionError:
                raise Undeliverable("this user may not write to the stream") from None
            except ResponseError as exc:
                if str(exc).startswith("WRONGTYPE"):
                    raise Undeliverable("there is something else than a stream") from None
                if str(exc).startswith("The stream has exhausted"):  # its last entry has the highest id
                    raise Undeliverable("the stream takes no more entries") from None
                raise

    def _check_place(self, to: str) -> None:
        ours = to.startswith(_OWN_KEYS) or to.partition("\x06")[0] in _OWN_QUEUES
        if not to or ours or (self._stream and to in (self._stream, self._dead)):
            raise Undeliverable("it is no place for answers")

    def close(self) -> None:
        """Leave the group, where nothing of ours is pending, and disconnect."""
        with suppress(RedisError, OSError):
            if self._begun:
                LEAVE.run(self._client, (self._stream,), (self._group, self._consumer))
        with suppress(RedisError, OSError):
            self._client.close()
            self._client.connection_pool.disconnect()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError) as exc:  # their texts have the address, and no password
            raise SourceUnavailable(f"{type(exc).__name__}: {exc}") from exc


def _received(entry: bytes, fields: dict[bytes, bytes], deliveries: int) -> Received:
    text = {
        name.decode(errors="replace").lower(): value.decode(errors="replace")
        for name, value in fields.items()
        if name != b"data"
    }
    message = Incoming(
        fields.get(b"data", b""),
        id=text.pop("id", None) or entry.decode(),
        content_type=text.pop("content_type", ""),
        reply_to=text.pop("reply_to", None),
        correlation_id=text.pop("correlation_id", None),
        headers=text,
    )
    return Received(message, (entry, fields), deliveries)


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.1 <= value <= 86_400 else None
