"""What every request passes: who asks, how fast, how much they send; and one line of log when it is answered.

Pure ASGI. The log has the route and never the path, the query, a header or a body: any of them may hold a
secret, a callback's token for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import DagrelayError
from ..keys import ANYBODY, Key
from .access import AccessLog
from .base import RETRY_AFTER_S, Gateway, Problem, answer_to
from .limits import Limits
from .settings import is_loopback

log = logging.getLogger(__name__)

OPEN: Final = frozenset({"/livez", "/readyz", "/openapi.json", "/docs"})
"""What answers anybody, and tells nothing of what there is."""

PROVE_THEMSELVES: Final = ("/v1/callbacks/", "/v1/webhooks/")
"""Whose senders hold no key: what they send is signed, and their routes look at that."""

FAN_OUT: Final = "/v1/fan-out"

UNAUTHENTICATED: Final = "give a key: `Authorization: Bearer <token>`"
SPARE_BODIES_BYTES: Final = 128 * 1024 * 1024
"""Of all bodies that a process holds at once, beside those of two fan-outs."""

UNPROVEN_BODIES: Final = 32
"""So many of the largest size are held of those without a key: a signature is of the whole body."""

LINGER_BYTES: Final = 16 * 1024 * 1024
LINGER_S: Final = 5.0
"""A refusal waits for so much of a body, and for so long, before it closes the connection."""

BUSY: Final = "too many requests at once: the request was not taken, send it again"


class Front:
    """The outermost part of the application."""

    def __init__(self, app: ASGIApp, gateway: Gateway, access: AccessLog) -> None:
        self._app, self._gateway, self._settings = app, gateway, gateway.settings
        self._access = access
        self._limits = Limits(1 / gateway.settings.workers)
        self._in_flight = self._unproven = 0
        settings = gateway.settings
        self._room = _Room(SPARE_BODIES_BYTES + 2 * max(settings.max_fan_out_bytes, settings.max_body_bytes))
        self._unproven_room = _Room(UNPROVEN_BODIES * settings.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        unproven = scope["path"].startswith(PROVE_THEMSELVES)
        room = self._unproven_room if unproven else self._room
        body = _Body(receive, room, self._settings.body_timeout_s)
        answer = _Answer(send, scope, body)
        self._in_flight += 1
        self._unproven += unproven
        try:
            self._admit(scope, answer, unproven)
            body.most = self._most_bytes(scope)
            await self._app(scope, body, answer)
        except Problem as problem:
            await answer.refuse(problem, scope, receive)
        except DagrelayError as exc:
            await answer.refuse(answer_to(exc), scope, receive)
        except ClientDisconnect:
            pass  # there is nobody to answer
        except Exception as exc:  # noqa: BLE001 - it is answered, and told by where it was raised
            # Without its own words: they may hold a value of what was sent.
            where = "".join(traceback.format_tb(exc.__traceback__))
            log.error("a request failed error=%s\n%s", type(exc).__name__, where)
            await answer.refuse(
                Problem(500, "this should not have happened: the gateway's log says what did"), scope, receive
            )
        finally:
            self._in_flight -= 1
            self._unproven -= unproven
            body.let_go()
            self._tell(scope, answer.status, time.perf_counter() - began)
        await answer.finish()  # it takes no place any more: who may not ask keeps nobody out by being slow

    def _tell(self, scope: Scope, status: int, took_s: float) -> None:
        state = scope.get("state", {})
        method, key = scope["method"], state.get("key")
        self._access.add(
            f"method={method if method.isalpha() else '-'} route={getattr(scope.get('route'), 'path', '-')} "
            f"status={status} key={key.id if key is not None else '-'} task={state.get('task', '-')} "
            f"ms={took_s * 1e3:.1f}"
        )

    def _admit(self, scope: Scope, answer: _Answer, unproven: bool) -> None:
        """Find out who asks. Raises Problem."""
        path = scope["path"]
        if path in OPEN:
            return
        if self._in_flight > self._settings.max_in_flight + self._settings.max_streams:
            raise _busy()
        if unproven:
            # Half of the places: whoever holds no key cannot keep those out who do.
            if self._unproven > max(1, self._settings.max_in_flight // 2):
                raise _busy()
            return
        key = self._key(scope)
        scope.setdefault("state", {})["key"] = key
        verdict = self._limits.ask(key)
        if verdict is not None:
            answer.headers = verdict.headers
            if not verdict.allowed:
                raise Problem(
                    429,
                    f"too many requests with this key: ask again in {verdict.retry_after_s} s",
                    headers={"Retry-After": str(verdict.retry_after_s)},
                )

    def _key(self, scope: Scope) -> Key:
        keys = self._gateway.keys
        if keys is None:
            _refuse_browsers(scope)
            return ANYBODY
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) == 1:
            scheme, _, token = given[0].partition(b" ")
            if scheme.lower() == b"bearer":
                key = keys.find(token.strip().decode("latin-1"))
                if key is not None:
                    return key
        raise Problem(401, UNAUTHENTICATED, headers={"WWW-Authenticate": "Bearer"})

    def _most_bytes(self, scope: Scope) -> int:
        """Return how long the body may be. Raises Problem where it says itself that it is longer."""
        fan_out = scope["path"] == FAN_OUT
        most = self._settings.max_fan_out_bytes if fan_out else self._settings.max_body_bytes
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > most:
                raise _too_large(most)
        return most


def _too_large(most: int) -> Problem:
    return Problem(
        413,
        f"body: is over the limit of {most} bytes: store the data elsewhere and send a reference to it",
        headers={"Connection": "close"},
    )


def _busy() -> Problem:
    return Problem(503, BUSY, headers={"Retry-After": str(RETRY_AFTER_S), "Connection": "close"})


def _refuse_browsers(scope: Scope) -> None:
    """Raise Problem for what a page in this machine's browser may have sent, where no key is asked for."""
    for name, value in scope["headers"]:
        if name == b"origin" or (name == b"sec-fetch-site" and value not in (b"none", b"same-origin")):
            raise Problem(403, "without keys no page of a browser may ask: start the gateway with keys")
        if name == b"host" and not is_loopback(_host_in(value)):
            raise Problem(403, "host: without keys the gateway is 127.0.0.1, ::1 or localhost")


def _host_in(header: bytes) -> str:
    try:
        return urlsplit(f"//{header.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""


class _Room:
    """How many bytes of bodies there is still room for."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


class _Body:
    """A body as it comes in, held to its size and its time, and all of them to the room for them."""

    __slots__ = ("_deadline", "_held", "_receive", "_room", "_timeout_s", "_whole", "most")

    def __init__(self, receive: Receive, room: _Room, timeout_s: float) -> None:
        self._receive, self._room, self._timeout_s = receive, room, timeout_s
        self.most = 0
        """How long it may be."""
        self._held = 0
        self._deadline: float | None = None
        self._whole = False

    async def throw_away(self, most: int, within_s: float) -> None:
        """Take what still comes of it, and keep nothing: up to so many bytes, and for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not self._whole and most > 0:
                    message = await self._receive()
                    most -= len(message.get("body", b""))
                    self._whole = not message.get("more_body", False)

    async def __call__(self) -> Message:
        if self._whole:  # what comes now is that the sender has gone
            return await self._receive()
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise Problem(
                408,
                f"body: was not there whole after {self._timeout_s:g} s: send it faster",
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._held += size
            self._room.left -= size
            if self._held > self.most:
                raise _too_large(self.most)
            if self._room.left < 0:
                raise _busy()
            self._whole = not message.get("more_body", False)
        return message

    def let_go(self) -> None:
        """Give back the room that it took."""
        self._room.left += self._held
        self._held = 0


class _Answer:
    """The way to the sender; knows what has gone out."""

    __slots__ = ("_asked", "_body", "_lingers", "_send", "headers", "status")

    def __init__(self, send: Send, scope: Scope, body: _Body) -> None:
        self._send, self._asked, self._body, self.status = send, scope["headers"], body, 0
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        self._lingers = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.headers:
                message["headers"] = [*message.get("headers", ()), *self.headers]
            if self.status >= 400 and self.status != 408:  # that sender has had all the time there is
                self._lingers = any(
                    name.lower() == b"connection" and value.lower() == b"close"
                    for name, value in (*message.get("headers", ()), *self._asked)
                )
        elif self._lingers and not message.get("more_body", False):
            message = {**message, "more_body": True}  # its end comes with `finish`
        await self._send(message)

    async def finish(self) -> None:
        """End a refusal that went out while its body was still coming.

        Whoever is still sending reads it only afterwards, and a connection closed under them takes it away:
        RFC 9112, section 9.6.
        """
        if self._lingers:
            await self._body.throw_away(LINGER_BYTES, LINGER_S)
            await self._send({"type": "http.response.body", "body": b""})

    async def refuse(self, problem: Problem, scope: Scope, receive: Receive) -> None:
        if not self.status:
            await problem.response()(scope, receive, self)
