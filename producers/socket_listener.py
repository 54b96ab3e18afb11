"""The TCP door: one JSON line in, one line out, in the order of the lines. Also on a Unix socket.

====================== ==================================================================================
line                   answer
====================== ==================================================================================
``{"dag_id": …}``      a trigger, a job or a structured CloudEvent, as `queues.message` reads it:
                       ``OK <task id>`` once it is in Redis; ``ERR <reason>``: mend it;
                       ``RETRY <seconds> <reason>``: it was not taken, send it again with its `id` or `key`
``AUTH <token>``       the first line, where the door has keys (`keys`): ``OK <name of the key>``, or
                       ``ERR <reason>`` and the end. The token is no field of a message: those get logged
an empty line          none: it shows that the sender is there
====================== ==================================================================================

Lines may be sent without waiting for answers (pipelined). A line that begins otherwise is answered ERR and
ends the connection: so no web page can have a browser post to this door, the lines before its body do that.
So does a line that is too long or takes too long; one that is only wrong does not. Whoever does not read the
answers is not read from. What has no answer when a connection breaks may or may not have been taken: send it
again with the same `id` or `key`, and it is one run. A sender may close its half when it has sent all, and
then read the answers; over TLS, which knows no such half, it keeps the connection open until it has them.

`SocketDoor` runs as a process (``dagrelay socket``) and in a thread of somebody else's (`start`, `stop`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import logging
import math
import os
import re
import resource
import socket
import ssl
import stat
import struct
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from .client import RelayClient
from .door import Batches, Door
from .errors import BrokerUnavailable, ConfigurationError, InvalidRequest
from .keys import Key, Keys
from .queues.message import MAX_MESSAGE_BYTES, Incoming, Routes, read
from .scopes import EVERYTHING, Scope
from .stores.records import Accepted

log = logging.getLogger(__name__)

PORT: Final = 7700
DOOR: Final = "tcp"

MAX_AUTH_BYTES: Final = 1024
"""Of a line by somebody who is not known yet."""
LINES_AT_ONCE: Final = 100
"""Of one connection, between two looks at the others: about 10 ms of work."""
BYTES_AT_ONCE: Final = 1 << 20
READ_AHEAD_BYTES: Final = 256 * 1024
"""Beyond the line at hand; then a connection is not read from before there is room."""
ANSWERS_UNREAD_BYTES: Final = 16 * 1024
"""Beyond it a sender that does not read its answers is not read from."""
LINGER_S: Final = 2.0
"""After the last answer: closing with bytes unread would reset the connection, and may lose that answer."""
LINGER_BYTES: Final = 8 * 1024 * 1024
"""Of what comes then, and is thrown away."""
TICK_S: Final = 0.5
RETRY_S: Final = 1
RETRY_FULL_S: Final = 5
MAX_REASON: Final = 500
SPARE_FILES: Final = 64
"""For Redis, logs, and connections that are being refused."""

NOT_KNOWN: Final = "not authenticated: the first line is AUTH <token>, with a token that this door knows"
NOT_TAKEN: Final = "the request was not taken: send it again, with the same id or key"


_BLANK: Final = re.compile(rb"\s*")


class LineTooLong(Exception):
    """A line is over the limit, whether its end has come or not."""


class LineReader:
    """Cuts what comes in into lines. Pure."""

    __slots__ = ("_buffer", "_searched")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take what came in."""
        self._buffer += data

    def next(self, limit: int) -> bytes | None:
        """Return the next line that is whole and not empty, without its end; None where none is.

        Raises LineTooLong.
        """
        if self._searched == 0 and (blank := _BLANK.match(self._buffer).end()):  # type: ignore[union-attr]
            del self._buffer[:blank]
        end = self._buffer.find(b"\n", self._searched)
        if (end if end >= 0 else len(self._buffer)) > limit:
            raise LineTooLong
        if end < 0:
            self._searched = len(self._buffer)  # each byte is looked at once, however small the pieces
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        if not self._buffer:
            self._buffer = bytearray()  # an emptied one keeps its memory
        return line.rstrip()

    def rest(self) -> bytes:
        """Return the last line, which has no end because the sender sends no more; empty afterwards."""
        line, self._buffer, self._searched = bytes(self._buffer), bytearray(), 0
        return line.strip()


@dataclass(frozen=True)
class Limits:
    """What one sender, and all of them, may take. Times are in seconds."""

    connections: int = 10_000
    per_address: int = 1_000
    """Connections from one address; of IPv6 from one /64. A Unix socket has no addresses."""
    line_bytes: int = MAX_MESSAGE_BYTES
    held_bytes: int = 128 * 1024 * 1024
    """Of all connections together: what was read and is not answered yet."""
    auth_s: float = 10.0
    """From the connection to its AUTH line, and for TLS before that."""
    line_s: float = 30.0
    """From the first byte of a line to its end."""
    unread_s: float = 60.0
    """For which answers may lie unread."""
    idle_s: float = 86_400.0
    """Without any line. A peer that is gone is noticed earlier, by TCP keep-alive."""


class SocketDoor:
    """Listens at a TCP address, or at a Unix socket with `path`.

    Without `keys` only a Unix socket is let in, whose permissions (`mode`) say who may use it, and a loopback
    address with `insecure`; `scope` then says what may be asked for. Raises ConfigurationError.
    """

    def __init__(
        self,
        relay: RelayClient,
        *,
        host: str = "127.0.0.1",
        port: int = PORT,
        path: str | Path | None = None,
        mode: int = 0o600,
        keys: Keys | None = None,
        insecure: bool = False,
        tls: ssl.SSLContext | None = None,
        limits: Limits | None = None,
        scope: Scope = EVERYTHING,
        routes: Routes | None = None,
    ) -> None:
        self.relay, self.keys, self.routes, self.tls = relay, keys, routes, tls
        self.limits = limits if limits is not None else Limits()
        self.door = Door(relay, DOOR, scope)
        self._host, self._port, self._mode = host, port, mode
        self._path = Path(path) if path is not None else None
        mistakes = list(_mistakes(self._host, self._path, mode, keys is not None, insecure, tls is not None))
        if mistakes:
            raise ConfigurationError(*mistakes)
        self.batches: Batches
        self.stopping = False
        self.held_bytes = 0
        self._open: set[_Connection] = set()
        self._from: Counter[str] = Counter()
        self._allowances: dict[str, _Allowance] = {}
        self._most = self.limits.connections
        self._redis_away = False
        self._server: asyncio.Server | None = None
        self._inode: int | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    # As a task of an event loop

    async def open(self) -> None:
        """Listen. Raises ConfigurationError when the address cannot be had."""
        self.batches = Batches(self.door)
        self.stopping = False
        possible = files_for(self.limits.connections + SPARE_FILES) - SPARE_FILES
        if possible < self.limits.connections:
            log.warning(
                "fewer connections than asked for: open files are limited (ulimit -Hn) asked=%d possible=%d",
                self.limits.connections,
                possible,
            )
        self._most = min(self.limits.connections, possible)
        loop = asyncio.get_running_loop()
        try:
            if self._path is not None:
                listening = unix_socket(self._path, self._mode)
                self._inode = self._path.stat().st_ino
                self._server = await loop.create_unix_server(
                    lambda: _Connection(self, loop), sock=listening, backlog=1024
                )
            else:
                self._server = await loop.create_server(
                    lambda: _Connection(self, loop), self._host, self._port, backlog=1024
                )
        except OSError as exc:
            raise ConfigurationError(f"cannot listen at {self.place}: {exc.strerror or exc}") from None
        self._sweeper = asyncio.create_task(self._sweep())
        log.info(
            "listening at=%s tls=%s keys=%s connections=%d",
            self.place,
            "yes" if self.tls else "no",
            len(self.keys) if self.keys is not None else "none",
            self._most,
        )

    async def close(self, grace_s: float = 10.0) -> None:
        """Let nobody in any more, answer every line that is here, and end."""
        self.stopping = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._open):
            connection.finish()
        deadline = time.monotonic() + grace_s
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        log.info("ended unanswered=%d", sum(one.busy for one in self._open))
        for connection in list(self._open):
            connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        if self._path is not None:
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == self._inode:  # else another has taken it over
                    self._path.unlink()

    async def serve(self, stop: asyncio.Event, grace_s: float = 10.0) -> None:
        """Listen until `stop` is set. Raises ConfigurationError when the address cannot be had."""
        await self.open()
        try:
            await stop.wait()
        finally:
            await self.close(grace_s)

    @property
    def place(self) -> str:
        """Where it listens, as a person reads it."""
        if self._path is not None:
            return str(self._path)
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self.port}"

    @property
    def port(self) -> int:
        """The TCP port; with port 0 known once it listens."""
        if self._server is not None and self._path is None and self._server.sockets:
            return int(self._server.sockets[0].getsockname()[1])
        return self._port

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._open)

    # In a thread of its own

    def start(self) -> SocketDoor:
        """Listen, in a thread of its own. Raises ConfigurationError when the address cannot be had."""
        listens: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._in_thread(listens)), name="dagrelay-socket", daemon=True
        )
        self._thread.start()
        listens.result()
        return self

    def stop(self) -> None:
        """Answer every line that is here, and end; does nothing where it was not started."""
        thread, self._thread = self._thread, None
        if thread is not None and self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()

    async def _in_thread(self, listens: concurrent.futures.Future[None]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            await self.open()
        except BaseException as exc:  # noqa: BLE001 - it is raised by start
            listens.set_exception(exc)
            return
        listens.set_result(None)
        try:
            await self._stop.wait()
        finally:
            await self.close()

    def __enter__(self) -> SocketDoor:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # For its connections

    def let_in(self, connection: _Connection) -> str:
        """Count a new connection; return why it may not stay, or ""."""
        self._open.add(connection)
        self._from[connection.address] += 1
        if len(self._open) > self._most:
            return "too many connections"
        if connection.address and self._from[connection.address] > self.limits.per_address:
            return "too many connections from this address"
        return ""

    def let_go(self, connection: _Connection) -> None:
        """Count a connection no more."""
        if connection in self._open:
            self._open.discard(connection)
            self._from[connection.address] -= 1
            if self._from[connection.address] <= 0:
                del self._from[connection.address]

    def key_of(self, token: str) -> Key | None:
        """Return the key with this token, as the file has it now."""
        return self.keys.find(token) if self.keys is not None else None

    def wait_s(self, key: Key) -> float:
        """Count one request of a key; return in how many seconds it may ask, 0 for now."""
        if key.rate_per_s is None:
            return 0.0
        allowance = self._allowances.get(key.id)
        if allowance is None or allowance.key != key:
            allowance = self._allowances[key.id] = _Allowance(key, key.burst, time.monotonic())
        return allowance.take(time.monotonic())

    def order(self, line: bytes, key: Key | None, by: str) -> Accepted:
        """Return what a line asks for, as it goes to Redis. Raises InvalidRequest."""
        # A sender's names are its own: another's cannot take them beforehand.
        names = f"{DOOR}:{key.id}" if key is not None else DOOR
        order = read(Incoming(line), door=names, routes=self.routes)
        if order.envelope.reply_to is not None:
            raise InvalidRequest(
                "reply_to: this door publishes nowhere: name a hook in on_end, or ask for the id's status"
            )
        return self.door.prepare(order, by=by, scope=key.scope if key is not None else None)

    def redis_is(self, away: bool, why: str = "") -> None:
        """Tell the log, once, that Redis is away or there again."""
        if away != self._redis_away:
            self._redis_away = away
            if away:
                log.warning("redis away, all is answered RETRY reason=%s", why)
            else:
                log.info("redis there again")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            for connection in [one for one in self._open if one.deadline <= now]:
                connection.overdue()


class _Connection(asyncio.Protocol):
    """One sender. Without a task of its own while it is idle: then it costs about 3 KB."""

    __slots__ = (
        "_answering",
        "_connected_at",
        "_door",
        "_eof",
        "_held",
        "_key",
        "_lines",
        "_loop",
        "_paused",
        "_room",
        "_since",
        "_state",
        "_thrown_away",
        "_token",
        "_transport",
        "_work",
        "address",
        "by",
        "deadline",
        "peer",
    )

    _transport: asyncio.Transport

    def __init__(self, door: SocketDoor, loop: asyncio.AbstractEventLoop) -> None:
        self._door, self._loop = door, loop
        self._lines = LineReader()
        self._state = "new"  # then: open, ending (nothing is read any more), gone
        self._key: Key | None = None
        self._token = ""
        self._work: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._held = self._thrown_away = 0
        self._eof = self._paused = self._answering = False
        self._since = self._connected_at = time.monotonic()
        self.deadline = math.inf
        self.address = self.peer = self.by = ""

    @property
    def busy(self) -> bool:
        """Whether there is a line in it that has no answer."""
        return self._answering

    # What the event loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._name_peer()
        refused = self._door.let_in(self)
        if refused or self._door.stopping:
            if self._door.tls is None:
                self._transport.write(_line(f"RETRY {RETRY_FULL_S} {refused or 'the door closes'}"))
            self._state = "ending"
            self._transport.close()
            return
        self._transport.set_write_buffer_limits(high=ANSWERS_UNREAD_BYTES)
        if self._door.tls is None:
            self._begin()
            return
        self._transport.pause_reading()
        self.deadline = time.monotonic() + self._door.limits.auth_s
        self._work = self._loop.create_task(self._begin_tls(self._door.tls))

    def data_received(self, data: bytes) -> None:
        if self._state not in ("new", "open"):  # over TLS a line may come before `start_tls` returns
            self._thrown_away += len(data)
            if self._thrown_away > LINGER_BYTES:
                self.abort()
            return
        if not self._lines:
            self._since = time.monotonic()
        self._lines.feed(data)
        self._hold(len(data))
        if self._door.held_bytes > self._door.limits.held_bytes:
            self._end(f"RETRY {RETRY_S} this door holds as much as it may: send it again in a moment")
            return
        self._go_on()

    def eof_received(self) -> bool:
        self._eof = True
        if self._state == "ending":
            return False
        self._go_on()
        return self._door.tls is None  # what is here is answered; TLS knows no half-closed connection

    def pause_writing(self) -> None:
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = "gone"
        self.deadline = math.inf
        self._hold(-self._held)
        self._lines = LineReader()
        self.resume_writing()
        self._door.let_go(self)

    # What the door tells

    def overdue(self) -> None:
        """End it: its deadline has passed."""
        if self._state in ("new", "ending"):
            self.abort()
        elif self._room is not None:
            log.warning("answers unread, cut off peer=%s", self.peer)
            self.abort()
        elif not self._known():
            self._end(f"ERR {NOT_KNOWN}")
        elif self._lines:
            log.warning("line unfinished, cut off peer=%s bytes=%d", self.peer, len(self._lines))
            self._end(f"ERR line: its end did not come within {self._door.limits.line_s:g} s")
        else:
            self._end(None)

    def finish(self) -> None:
        """Read no more, answer what is here, end."""
        if self._state == "new":
            self.abort()
        elif self._state == "open":
            self._transport.pause_reading()
            self._go_on()

    def abort(self) -> None:
        """End it at once."""
        self._transport.abort()

    # Its own

    def _name_peer(self) -> None:
        peer = self._transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            host = str(peer[0]).partition("%")[0]
            self.peer, self.by = f"{host}:{peer[1]}", f"{host}@socket"
            self.address = host
            if ":" in host:
                self.address = str(ipaddress.ip_network((host, 64), strict=False))
            keep_alive(self._transport.get_extra_info("socket"))
            return
        self.peer, self.by = "unix", "unix@socket"
        if hasattr(socket, "SO_PEERCRED"):  # on Linux
            found = self._transport.get_extra_info("socket").getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
            )
            pid, uid, _ = struct.unpack("3i", found)
            self.peer, self.by = f"unix:{pid}", f"uid-{uid}@socket"

    async def _begin_tls(self, context: ssl.SSLContext) -> None:
        try:
            self._transport = await self._loop.start_tls(  # type: ignore[assignment]
                self._transport,
                self,
                context,
                server_side=True,
                ssl_handshake_timeout=self._door.limits.auth_s,
            )
        except (OSError, ssl.SSLError) as exc:
            log.info("no TLS peer=%s reason=%s", self.peer, type(exc).__name__)
            self._state = "gone"
            self._door.let_go(self)
            return
        self._work = None
        if self._state == "gone":  # in the meantime
            return
        self._transport.set_write_buffer_limits(high=ANSWERS_UNREAD_BYTES)
        self._begin()

    def _begin(self) -> None:
        self._state = "open"
        self._since = self._connected_at = time.monotonic()
        self._set_deadline()
        self._go_on()

    def _known(self) -> bool:
        return self._door.keys is None or self._key is not None

    def _hold(self, more: int) -> None:
        self._held += more
        self._door.held_bytes += more

    def _go_on(self) -> None:
        """Begin to answer the lines that are here, if that is not under way."""
        if self._state == "open" and self._work is None:
            self._work = self._loop.create_task(self._answer_all())
        elif self._work is not None and len(self._lines) > READ_AHEAD_BYTES:
            self._pause()

    def _pause(self) -> None:
        if not self._paused and not self._eof and self._state == "open":
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and self._state == "open" and not self._door.stopping:
            self._paused = False
            self._transport.resume_reading()

    def _set_deadline(self) -> None:
        limits, now = self._door.limits, time.monotonic()
        if self._room is not None:
            self.deadline = now + limits.unread_s
        elif self._answering:
            self.deadline = math.inf
        elif not self._known():
            self.deadline = self._connected_at + limits.auth_s
        elif self._lines:
            self.deadline = self._since + limits.line_s
        else:
            self.deadline = now + limits.idle_s

    async def _answer_all(self) -> None:
        try:
            while self._state == "open":
                lines, last = self._take()
                self._answering = bool(lines)
                if not lines and last is None:
                    break
                self.deadline = math.inf
                answers, refused = await self._answers(lines)
                last = refused or last
                if self._state != "open":
                    return
                if answers:
                    self._transport.write(b"".join(map(_line, answers)))
                if last is not None:
                    self._end(last)
                    return
                self._hold(len(self._lines) - self._held)
                if self._room is not None:
                    self._pause()
                    self._set_deadline()
                    await self._room
                self._since = time.monotonic()
        except Exception:
            log.exception("should not have happened peer=%s", self.peer)
            self._end(f"RETRY {RETRY_FULL_S} this should not have happened: the door's log says what did")
            return
        finally:
            self._answering = False
            self._work = None
        if self._state != "open":
            return
        self._hold(len(self._lines) - self._held)
        if self._door.stopping:
            self._end(f"RETRY {RETRY_S} the door closes: send it again" if self._lines else None)
        elif self._eof:
            self._state = "ending"
            self._transport.close()
        else:
            self._resume()
            self._set_deadline()

    def _take(self) -> tuple[list[bytes], str | None]:
        """Return the next lines, and what to end with after them."""
        lines: list[bytes] = []
        size = 0
        try:
            while len(lines) < LINES_AT_ONCE and size < BYTES_AT_ONCE:
                known = self._known() or lines
                line = self._lines.next(self._door.limits.line_bytes if known else MAX_AUTH_BYTES)
                if line is None:
                    break
                lines.append(line)
                size += len(line)
        except LineTooLong:
            if not (self._known() or lines):
                return lines, f"ERR {NOT_KNOWN}"
            log.warning("line too long, cut off peer=%s", self.peer)
            return lines, (
                f"ERR line: is over the limit of {self._door.limits.line_bytes} bytes: "
                "store the data elsewhere and send a reference to it"
            )
        if not lines and self._eof and (line := self._lines.rest()):
            lines.append(line)
        return lines, None

    async def _answers(self, lines: Sequence[bytes]) -> tuple[list[str], str | None]:
        """Return an answer for each line, in order, and what to end with after them."""
        answers: list[str] = []
        items: list[tuple[int, Accepted]] = []
        last: str | None = None
        if self._token and self._door.keys is not None:
            self._key = self._door.key_of(self._token)  # it may have been taken away
        for line in lines:
            if line.startswith(b"AUTH ") or line == b"AUTH":
                if not self._authenticate(line[4:].strip()):
                    last = f"ERR {NOT_KNOWN}"
                    break
                answers.append(f"OK {self._key.id if self._key is not None else self.by}")
                continue
            if not self._known():
                last = f"ERR {NOT_KNOWN}"
                break
            if not line.startswith(b"{"):
                last = "ERR line: is no JSON object and no AUTH: send one object on one line"
                break
            answer = self._prepare(line)
            if isinstance(answer, str):
                answers.append(answer)
            else:
                items.append((len(answers), answer))
                answers.append("")
        if items:
            await self._accept(items, answers)
        else:
            await asyncio.sleep(0)  # whoever sends only what is wrong keeps nobody else waiting
        if last is not None:
            log.info("refused and ended peer=%s reason=%s", self.peer, textwrap.shorten(last, 80))
        return answers, last

    def _authenticate(self, token: bytes) -> bool:
        if self._door.keys is None:
            return True
        self._token = token.decode(errors="replace")
        self._key = self._door.key_of(self._token)
        if self._key is not None:
            self.by = f"{self._key.id}@socket"
        return self._key is not None

    def _prepare(self, line: bytes) -> Accepted | str:
        try:
            if self._key is not None and (wait_s := self._door.wait_s(self._key)):
                rate = f"{self._key.rate_per_s:g} requests a second"
                return f"RETRY {math.ceil(wait_s)} more than the {rate} of your key"
            return self._door.order(line, self._key, self.by)
        except InvalidRequest as exc:
            return f"ERR {_shown(str(exc))}"
        except Exception:  # one line's fault is not the others'
            log.exception("should not have happened peer=%s", self.peer)
            return f"RETRY {RETRY_FULL_S} this should not have happened: the door's log says what did"

    async def _accept(self, items: Sequence[tuple[int, Accepted]], answers: list[str]) -> None:
        """Have the orders in Redis, and put their answers into place."""
        accept = self._door.batches.accept
        ended = await asyncio.gather(*(accept(item) for _, item in items), return_exceptions=True)
        new = 0
        for (place, item), one in zip(items, ended, strict=True):
            if isinstance(one, BrokerUnavailable):
                self._door.redis_is(True, one.reason)
                answers[place] = f"RETRY {RETRY_S} {NOT_TAKEN}"
            elif isinstance(one, InvalidRequest):  # its conf refers to what is gone
                answers[place] = f"ERR {_shown(str(one))}"
            elif isinstance(one, BaseException):
                log.error("should not have happened peer=%s", self.peer, exc_info=one)
                answers[place] = f"RETRY {RETRY_FULL_S} {NOT_TAKEN}"
            else:
                self._door.redis_is(False)
                answers[place] = f"OK {item.task_id}"
                new += one.new
        log.info(
            "taken by=%s peer=%s lines=%d new=%d first=%s",
            self.by,
            self.peer,
            len(items),
            new,
            items[0][1].task_id,
        )

    def _end(self, last: str | None) -> None:
        """Say a last line; then let the sender read it, and close."""
        if self._state != "open":
            return
        self._state = "ending"
        self._lines = LineReader()
        self._hold(-self._held)
        if last is not None:
            self._transport.write(_line(last))
        self.deadline = time.monotonic() + LINGER_S
        if self._eof or last is None:
            self._transport.close()
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        with contextlib.suppress(RuntimeError):
            self._transport.resume_reading()  # and thrown away


class _Allowance:
    """How many requests a key has left: `burst` at once, then `rate_per_s`."""

    __slots__ = ("_at", "_left", "key")

    def __init__(self, key: Key, left: float, at: float) -> None:
        self.key, self._left, self._at = key, left, at

    def take(self, now: float) -> float:
        """Take one; return 0, or in how many seconds there will be one."""
        rate = self.key.rate_per_s or 1.0
        self._left = min(self.key.burst, self._left + (now - self._at) * rate)
        self._at = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) / rate


def _mistakes(host: str, path: Path | None, mode: int, keys: bool, insecure: bool, tls: bool) -> list[str]:
    """Return what is wrong with these settings."""
    if path is not None:
        found = []
        if len(os.fsencode(path)) > 90:
            found.append("--path: is longer than the 90 bytes that a Unix socket's may have")
        if tls:
            found.append("--certfile: a Unix socket needs no TLS: leave it out")
        if mode & 0o002 and not keys and not insecure:
            found.append("--mode: lets everybody in: give --keys, or a mode such as 660")
        return found
    if keys:
        return []
    if not insecure:
        return ["--keys: give the file of those who may ask (see `dagrelay keys new`), or --path"]
    if not is_loopback(host):
        return ["--insecure: lets everybody in, so it goes with a loopback address alone: give --keys"]
    return []


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unix_socket(path: Path, mode: int) -> socket.socket:
    """Return a socket that is bound to a path; nobody but those whom the mode lets in ever sees it there.

    One that nobody listens at any more is replaced. Raises OSError where somebody does, or it is a file.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(0, "it exists, and is no socket")
        with socket.socket(socket.AF_UNIX) as other, contextlib.suppress(ConnectionRefusedError):
            other.settimeout(1)
            other.connect(str(path))
            raise FileExistsError(0, "somebody listens there already")
    made = socket.socket(socket.AF_UNIX)
    beside = f"{path}.{os.getpid()}"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)  # noqa: PTH108 - of an earlier process with our id
        made.bind(beside)
        os.chmod(beside, mode)  # noqa: PTH101
        os.rename(beside, path)  # noqa: PTH104
    except OSError:
        made.close()
        raise
    return made


def keep_alive(connection: Any) -> None:
    """Have the system notice within two minutes that a peer is gone."""
    with contextlib.suppress(OSError, AttributeError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def files_for(wanted: int) -> int:
    """Raise this process's limit of open files as far as it may go; return what it then is, or `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
        soft = possible
    return soft


def _shown(reason: str) -> str:
    """Return a reason on one line, of a length that a sender can log."""
    text = "".join(character if character.isprintable() else " " for character in reason)
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 1]}…"


def _line(text: str) -> bytes:
    return text.encode("utf-8", "replace") + b"\n"
