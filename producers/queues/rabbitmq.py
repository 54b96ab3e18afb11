"""RabbitMQ: messages from a queue, answers to queues.

    amqp://user:password@host:5672/vhost?queue=dag-triggers

`amqps://` is TLS, the broker's certificate checked. No vhost is the vhost `/`. Options:

================ =====================================================================================
``queue``        where messages lie. It is made if it is not there: durable, a quorum queue
``dead``         where refused ones go; `<queue>.dead` if left out, made if it is not there
``prefetch``     how many are in our hands at most; as many as the listener takes at once if left out
``type``         `quorum` or `classic`: of the queues that we make. Only a quorum queue counts deliveries
``heartbeat_s``  60 if left out
``ca``           a file with the certificates to trust, in place of the system's
``name``         what is the same for all listeners of the queue; host, vhost and queue if left out.
                 Give it where listeners reach one cluster under several names
================ =====================================================================================

**Who names a message.** Its property `message_id`. Without that, and without an `id` or a `key` in its body,
a message that comes a second time (its acknowledgement was lost) is a second run: AMQP names nothing itself.
A binary CloudEvent has its attributes in headers that begin with `cloudEvents:` or `ce_`.

Answers go to the queue that `reply_to` names, through the default exchange; they are confirmed by the broker,
and one that no queue takes is `Undeliverable`. They, and refused messages, have a connection of their own: a
broker short of memory or disk stops reading from those that publish, and acknowledgements would lie behind.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from amqp import Message
from amqp.exceptions import (
    AMQPError,
    ChannelError,
    FrameSyntaxError,
    InternalError,
    MessageNacked,
    NotFound,
)
from amqp.method_framing import frame_handler
from amqp.serialization import dumps
from kombu import Connection

from ..errors import ConfigurationError
from .keeping import Keeper
from .message import Incoming
from .source import PlaceFull, Received, SourceUnavailable, Undeliverable
from .urls import parsed

FORM: Final = "amqp://user:password@host:5672/vhost?queue=dag-triggers"

CONNECT_S: Final = 5.0
ANSWER_S: Final = 10.0
"""For each answer of the broker. One that hangs is as good as one that is away."""

# py-amqp gives up after 1 s, which a broker under load lets pass: it stops reading from who sends too fast.
_PATIENT: Final = (
    {socket.TCP_USER_TIMEOUT: int(ANSWER_S * 1000)} if hasattr(socket, "TCP_USER_TIMEOUT") else {}
)

REASON: Final = "x-dagrelay-reason"
_UNREADABLE: Final = "x-dagrelay-unreadable"

MOST_HEADERS_BYTES: Final = 100_000
"""Of a refused message with the reason: all properties have to fit into one frame, which has 128 KB."""

# py-amqp raises AttributeError, KeyError too when a connection goes while it is used.
_LOST: Final = (AMQPError, OSError, AttributeError, KeyError, struct.error)
_NOT_DECODED: Final = (
    ValueError,
    OverflowError,
    FrameSyntaxError,
    struct.error,
    IndexError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class _Handle:
    """Delivery tags begin anew with each connection: one of an earlier connection names another message."""

    connection: int
    tag: int
    raw: Any


class RabbitSource:
    """One queue. See `source.Source`."""

    def __init__(
        self,
        *,
        host: str,
        queue: str,
        port: int | None = None,
        user: str = "guest",
        password: str = "guest",  # noqa: S107 - RabbitMQ's own
        vhost: str = "/",
        dead: str | None = None,
        prefetch: int | None = None,
        quorum: bool = True,
        heartbeat_s: int = 60,
        tls: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.queue, self.dead = queue, dead or f"{queue}.dead"
        self._quorum = quorum
        self._prefetch = prefetch
        self._heartbeat_s = heartbeat_s
        port = port or (5671 if tls is not None else 5672)
        self.name = name or f"rabbitmq:{host}:{port}/{vhost.strip('/')}/{queue}"
        self._reach: dict[str, Any] = {
            "hostname": host,
            "port": port,
            "userid": user,
            "password": password,
            "virtual_host": vhost,
            "ssl": dict(tls) if tls is not None else False,
            "connect_timeout": CONNECT_S,
        }
        self._keeper = Keeper(self._keep, every_s=max(1.0, heartbeat_s / 3))
        self._connections = 0
        self._connection: Any = None
        self._channel: Any = None
        self._readable: Callable[[float], bool] = lambda wait_s: False
        self._waiting: deque[Any] = deque()  # delivered to us, not yet handed out
        self._unacked: dict[int, None] = {}  # tags in the order of delivery
        self._publishing: Any = None
        self._publisher: Any = None
        self._returned: list[str] = []

    @classmethod
    def from_url(cls, url: str) -> RabbitSource:
        """Return the source that a URL names. Raises ConfigurationError; connects to nothing."""
        options = ("queue", "dead", "prefetch", "type", "heartbeat_s", "ca", "name")
        given = parsed(url, form=FORM, options=options)
        where = f"the source's URL ({given.scheme}://…)"
        queue = given.options.get("queue", "")
        mistakes = []
        if not given.host:
            mistakes.append(f"{where}: names no host: it goes {FORM}")
        if not queue:
            mistakes.append(f"{where}: queue is missing: it goes {FORM}")
        dead = given.options.get("dead") or f"{queue}.dead"
        if max(len(queue.encode()), len(dead.encode())) > 255:
            mistakes.append(f"{where}: queue is over 255 bytes, with what names its dead queue")
        if dead == queue:
            mistakes.append(f"{where}: dead is the queue itself")
        if "ca" in given.options and given.scheme != "amqps":
            mistakes.append(f"{where}: ca is for amqps://")
        if mistakes:
            raise ConfigurationError(*mistakes)
        tls = None
        if given.scheme == "amqps":
            # Both are needed: kombu checks neither the certificate nor the name by itself.
            tls = {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": given.host}
            if "ca" in given.options:
                tls["ca_certs"] = given.options["ca"]
        prefetch = given.number("prefetch", 0, least=1, most=65_535)
        return cls(
            host=given.host,
            port=given.port,
            user=given.user if given.user is not None else "guest",
            password=given.password if given.password is not None else "guest",
            vhost=given.path or "/",
            queue=queue,
            dead=dead,
            prefetch=prefetch or None,
            quorum=given.one_of("type", ("quorum", "classic"), "quorum") == "quorum",
            heartbeat_s=given.number("heartbeat_s", 60, least=2, most=3600),
            tls=tls,
            name=given.options.get("name"),
        )

    # Taking

    def receive(self, most: int, wait_s: float) -> Sequence[Received]:
        """See `source.Source`."""
        with self._at_work():
            self._consume(most)
            self._gather(most, wait_s)
            # After reading: what the broker has sent meanwhile shows that it lives.
            self._connection.heartbeat_tick()
            taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            received = [self._received(raw) for raw in taken]
        return self._readable_of(received)

    def _readable_of(self, received: Sequence[Received]) -> Sequence[Received]:
        """Refuse what could not be decoded. Where that fails it is tried again, and holds up no other."""
        failed = None
        for one in received:
            if _UNREADABLE in one.message.headers:
                try:
                    self.refuse(one, f"properties: cannot be read ({one.message.headers[_UNREADABLE]})")
                except SourceUnavailable as exc:
                    failed = exc
                    if self._in_hand(one):
                        self._waiting.append(one.handle.raw)
        # With the connection all of them may have gone: they come again.
        readable = [one for one in received if _UNREADABLE not in one.message.headers and self._in_hand(one)]
        if failed is not None and not readable:
            raise failed
        return readable

    def _gather(self, most: int, wait_s: float) -> None:
        until = time.monotonic() + wait_s
        while len(self._waiting) < most:
            left_s = 0.0 if self._waiting else max(0.0, until - time.monotonic())
            if self._readable(left_s):
                with contextlib.suppress(TimeoutError):  # half a frame: the rest is read the next time
                    self._connection.blocking_read(ANSWER_S)
            elif self._waiting or time.monotonic() >= until:
                return

    def _consume(self, most: int) -> None:
        if self._channel is not None:
            return
        self._connection = connection = self._connected(self._heartbeat_s)
        self._connections += 1
        self._readable = _readable(connection)
        self._declare(connection, self.dead, {})
        # What RabbitMQ itself gives up (a delivery limit, from 4.0 on by default) is kept as well.
        kept = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": self.dead}
        self._declare(connection, self.queue, kept)
        channel = connection.channel()
        channel.auto_decode = False
        channel.basic_qos(0, self._prefetch or min(most, 65_535), False)
        channel.basic_consume(self.queue, callback=self._delivered)
        self._channel = channel
        self._keeper.start()

    def _declare(self, connection: Any, queue: str, arguments: dict[str, Any]) -> None:
        """Make a queue unless it is there, of whatever kind."""
        channel = connection.channel()
        try:
            channel.queue_declare(queue, passive=True)
        except NotFound:
            if self._quorum:
                arguments = {"x-queue-type": "quorum", **arguments}
            channel.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)
        channel.close()

    def _delivered(self, raw: Any) -> None:
        self._unacked[raw.delivery_tag] = None
        self._waiting.append(raw)

    def _received(self, raw: Any) -> Received:
        properties = raw.properties
        given = properties.get("application_headers") or {}
        headers = _texts(given)
        before = given.get("x-delivery-count")
        if not isinstance(before, int):  # with a classic queue it is the sender's, whatever that is
            before = int(raw.delivery_info["redelivered"])
        message = Incoming(
            body=_bytes(raw.body),
            id=properties.get("message_id") or None,
            content_type=properties.get("content_type") or "",
            headers=headers,
            reply_to=properties.get("reply_to") or None,
            correlation_id=properties.get("correlation_id") or None,
        )
        return Received(message, _Handle(self._connections, raw.delivery_tag, raw), before + 1)

    # Letting go

    def done(self, received: Sequence[Received]) -> None:
        """See `source.Source`. What came over an earlier connection comes again: nothing is to be done."""
        with self._at_work():
            tags = [one.handle.tag for one in received if self._in_hand(one)]
            for tag in tags:
                del self._unacked[tag]
            oldest_left = next(iter(self._unacked), None)
            together = max((tag for tag in tags if oldest_left is None or tag < oldest_left), default=0)
            if together:
                self._channel.basic_ack(together, multiple=True)
            for tag in tags:
                if tag > together:
                    self._channel.basic_ack(tag)

    def refuse(self, received: Received, reason: str) -> None:
        """See `source.Source`. The reason is the header `x-dagrelay-reason`."""
        with self._at_work():
            if not self._in_hand(received):
                return  # it comes again, and is refused then
            try:
                self._send(self.dead, self._dead_letter(received.handle.raw, reason))
            except Undeliverable:
                self._declare_dead()
                try:
                    self._send(self.dead, self._dead_letter(received.handle.raw, reason))
                except Undeliverable as exc:
                    raise SourceUnavailable(f"RabbitMQ: the dead queue {self.dead!r}: {exc}") from None
            self.done([received])

    def give_back(self, received: Sequence[Received]) -> None:
        """See `source.Source`."""
        with self._at_work():
            for one in received:
                if self._in_hand(one):
                    del self._unacked[one.handle.tag]
                    self._channel.basic_reject(one.handle.tag, requeue=True)

    def _in_hand(self, received: Received) -> bool:
        return received.handle.connection == self._connections and received.handle.tag in self._unacked

    def _dead_letter(self, raw: Any, reason: str) -> Any:
        """Return a copy without what would have the broker refuse it, drop it, or send it elsewhere."""
        properties = dict(raw.properties)
        headers = dict(properties.pop("application_headers", None) or {})
        headers.pop(_UNREADABLE, None)
        headers.pop("x-delivery-count", None)  # of the queue that it comes from
        for name in ("CC", "BCC"):  # RabbitMQ would deliver it to those queues once more
            if name in headers:
                headers[f"x-dagrelay-{name.lower()}"] = headers.pop(name)
        if "user_id" in properties:  # has to be the one who publishes
            headers["x-dagrelay-user-id"] = properties.pop("user_id")
        properties.pop("expiration", None)
        properties |= {"delivery_mode": 2}
        given = {REASON: reason[:1000]}
        letter = self._message(raw.body, properties, headers | given)
        try:
            fits = len(letter._serialize_properties()) <= MOST_HEADERS_BYTES
        except _NOT_DECODED:
            fits = False
        if fits:
            return letter
        kept = {name: properties[name] for name in ("message_id", "content_type") if name in properties}
        return self._message(
            raw.body, kept | {"delivery_mode": 2}, given | {"x-dagrelay-headers": "left out"}
        )

    # Sending

    def publish(
        self, to: str, body: bytes, *, correlation_id: str | None, headers: Mapping[str, str]
    ) -> None:
        """See `source.Source`. `to` is the name of a queue."""
        if not to or len(to.encode(errors="replace")) > 255:
            raise Undeliverable("a queue's name has 1 to 255 bytes")
        properties: dict[str, Any] = {"content_type": "application/json", "delivery_mode": 2}
        told = dict(headers)
        if correlation_id is not None:
            fits = len(correlation_id.encode(errors="replace")) <= 255  # a short string, as AMQP calls it
            (properties if fits else told)["correlation_id"] = correlation_id
        for name, theirs in (("id", "message_id"), ("reply_to", "reply_to")):
            if name in told:  # AMQP has a place of its own for it
                properties[theirs] = told.pop(name)
        with self._at_work():
            self._send(to, self._message(body, properties, told))

    def _message(self, body: Any, properties: dict[str, Any], headers: dict[str, Any]) -> Any:
        return Message(body, application_headers=headers, **properties)

    def _send(self, queue: str, message: Any) -> None:
        """Publish one message; return when the broker has it. Raises Undeliverable, SourceUnavailable."""
        for last_try in (False, True):
            fresh = self._publisher is None
            self._returned.clear()
            try:
                if fresh:
                    self._open_publisher()
                self._publisher.basic_publish(
                    message,
                    exchange="",
                    routing_key=queue,
                    mandatory=True,
                    timeout=ANSWER_S,
                    confirm_timeout=ANSWER_S,
                )
            except MessageNacked:
                raise PlaceFull(f"RabbitMQ did not take a message for {queue!r}: it is full") from None
            except ChannelError as exc:  # may not be written to, too large
                self._close_publisher()
                raise Undeliverable(f"RabbitMQ: {_words(exc)}") from None
            except _LOST as exc:
                self._close_publisher()
                if isinstance(exc, InternalError) and queue.startswith("amq.rabbitmq."):
                    # A forged address of a direct reply ends the connection, with every try.
                    raise Undeliverable(f"RabbitMQ: {_words(exc)}") from None
                if fresh or last_try:
                    raise SourceUnavailable(f"RabbitMQ: {_words(exc)}") from None
                # An old connection, which the broker has closed meanwhile.
            else:
                break
        if self._returned:
            raise Undeliverable(f"RabbitMQ: there is no queue {queue[:100]!r} ({self._returned[0]})")

    def _open_publisher(self) -> None:
        self._publishing = self._connected(0)  # nobody would read the broker's heartbeats
        channel = self._publishing.channel()
        channel.events["basic_return"].add(lambda exc, *_: self._returned.append(str(exc.reply_text)))
        self._publisher = channel

    def _declare_dead(self) -> None:
        try:
            self._declare(self._connection, self.dead, {})
        except ChannelError as exc:
            raise SourceUnavailable(f"RabbitMQ: the dead queue {self.dead!r}: {_words(exc)}") from None

    # The connection

    def _connected(self, heartbeat_s: int) -> Any:
        client = Connection(
            transport="pyamqp",
            heartbeat=heartbeat_s,
            transport_options={
                "confirm_publish": True,
                "read_timeout": ANSWER_S,
                "write_timeout": ANSWER_S,
                "socket_settings": _PATIENT,
                "client_properties": {"connection_name": f"dagrelay listen {self.queue}"},
                "frame_handler": _frames,
            },
            **self._reach,
        )
        return client.transport.establish_connection()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._keeper.at_work():
            try:
                yield
            except (SourceUnavailable, Undeliverable):
                raise
            except _LOST as exc:
                self._drop()
                raise SourceUnavailable(f"RabbitMQ: {_words(exc)}") from None

    def _keep(self) -> None:
        if self._channel is not None:
            self._connection.send_heartbeat()

    def _drop(self) -> None:
        """Forget the connection: all that came over it comes again."""
        connection, self._connection, self._channel = self._connection, None, None
        self._waiting.clear()
        self._unacked.clear()
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.collect()

    def _close_publisher(self) -> None:
        connection, self._publishing, self._publisher = self._publishing, None, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.collect()

    def close(self) -> None:
        """See `source.Source`."""
        self._keeper.stop()
        with self._keeper.at_work():
            for connection in (self._connection, self._publishing):
                if connection is not None:
                    with contextlib.suppress(Exception):
                        connection.close()
            self._drop()
            self._close_publisher()


def _readable(connection: Any) -> Callable[[float], bool]:
    """Return what waits so many seconds for something to read, and says whether there is."""
    sock = connection.sock
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    pending: Callable[[], int] = getattr(sock, "pending", lambda: 0)  # read by TLS, and not yet by us

    def readable(wait_s: float) -> bool:
        return pending() > 0 or bool(poll.poll(int(wait_s * 1000)))

    return readable


def _frames(connection: Any, callback: Any) -> Callable[[Any], bool]:
    """A frame handler that lives through properties which py-amqp cannot decode.

    Such as a header with a timestamp in milliseconds, or text that is no UTF-8. They would end the
    connection, and come again over the next: the queue would stand still. The message comes without
    them, marked.
    """
    handle = frame_handler(connection, callback)

    def on_frame(frame: Any) -> bool:
        try:
            return bool(handle(frame))
        except _NOT_DECODED as exc:
            kind, channel, payload = frame
            if kind != 2:  # what goes before the properties names the class and the body's size
                raise
            marked = dumps("F", ({_UNREADABLE: f"{type(exc).__name__}: {exc}"[:200]},))
            return bool(handle((kind, channel, payload[:12] + b"\x20\x00" + marked)))

    return on_frame


def _texts(headers: Mapping[Any, Any]) -> dict[str, str]:
    found = {}
    for name, value in headers.items():
        if isinstance(name, bytes):
            name = name.decode(errors="replace")
        if isinstance(value, bytes):
            text = value.decode(errors="replace")
        elif isinstance(value, bool):
            text = "true" if value else "false"
        elif isinstance(value, datetime):
            text = f"{value.isoformat()}Z"
        elif isinstance(value, dict | list):
            text = json.dumps(value, default=str)
        elif value is None:
            continue
        else:
            text = str(value)
        found[name.lower()] = text
    return found


def _bytes(body: Any) -> bytes:
    return body.encode(errors="surrogatepass") if isinstance(body, str) else bytes(body)


def _words(exc: BaseException) -> str:
    return " ".join(f"{type(exc).__name__}: {exc}".split())[:300]
