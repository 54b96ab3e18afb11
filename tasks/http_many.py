"""Many requests at once: what `tasks.http` sends one by one from threads, sent over one asyncio loop.

For looks and fan-outs, where one Celery task has hundreds of requests to send: 0.1 CPU-ms each, a third of
what a thread costs. The loop runs in one thread of the process, for all tasks; it is started with the first
request, under a lock (tasks that start together after a restart would each make one, and await the others'
futures for ever), and anew in a child after a fork. What was said in `tasks.http` holds here too: sent
exactly once, no redirects, one deadline for a whole exchange, and `NoAnswer.reached` tells whether a byte may
have left.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import contextvars
import os
import re
import ssl
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from . import http
from .http import (
    CONNECT_TIMEOUT_S,
    PLAIN_HEADERS,
    READ_TIMEOUT_S,
    HttpRequest,
    HttpResponse,
    NoAnswer,
    is_path,
    requests_ca_bundle,
    reset_after_fork,
)

T = TypeVar("T")

_left_alone: list[Any] = []
"""In a child after a fork: the parent's loop and sessions. To collect them would close them, and that takes
their sockets out of the epoll instance which the child shares with its parent."""


class _Loop:
    """The process's event loop, in a thread of its own."""

    def __init__(self) -> None:
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        _left_alone.append(getattr(self, "_loop", None))
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the running loop, started where there is none."""
        loop = self._loop
        if loop is None:
            with self._lock:
                if self._loop is None:
                    made = asyncio.new_event_loop()
                    threading.Thread(target=made.run_forever, name="dagrelay-http", daemon=True).start()
                    self._loop = made
                loop = self._loop
        return loop


_loop = _Loop()
_senders: weakref.WeakSet[ManySender] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close what is open at the end of the process: aiohttp complains of sessions that nobody closed."""
    for one in tuple(_senders):
        with contextlib.suppress(Exception):
            one.close()


def in_loop(coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Run a coroutine in the process's loop; called from any other thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop.get())


class ManySender:
    """Sends requests to one server, up to `in_flight` at once; further ones wait for their turn.

    `base_url`, the times, `verify` and the proxies of the environment are those of `tasks.http.HttpSender`.
    An answer may have `max_answer_bytes`, or as many as `tasks.http` takes; that many may be in memory for
    each of those in flight.
    """

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
        verify: bool | str = True,
        in_flight: int = 64,
        max_answer_bytes: int | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.connect_timeout_s, self.read_timeout_s = connect_timeout_s, read_timeout_s
        self.in_flight = in_flight
        self._max_answer_bytes = max_answer_bytes
        parts = urlsplit(self.base_url)
        self._server = parts.netloc.rpartition("@")[2]
        self._tls = _tls(verify) if parts.scheme == "https" else False
        self._proxy = _proxy(parts.scheme, parts.hostname or "")
        self.after_fork()
        reset_after_fork(self)
        _senders.add(self)

    def after_fork(self) -> None:
        """Forget the parent's connections and its loop."""
        _left_alone.append(getattr(self, "_session", None))
        self._session: aiohttp.ClientSession | None = None
        self._slots: asyncio.Semaphore | None = None

    async def send(self, request: HttpRequest) -> HttpResponse:
        """Send once and return the answer, whatever its status; awaited in the loop. Raises NoAnswer."""
        if not is_path(request.path):
            raise ValueError(f"not a path: {request.path!r}")
        if any(_CONTROL.search(text) for text in request.headers.values()):
            raise NoAnswer(f"{self._server}: a header that cannot be sent", False)
        if self._session is None or self._slots is None:
            self._session, self._slots = self._new_session(), asyncio.Semaphore(self.in_flight)
        async with self._slots:
            return await self._exchange(self._session, request)

    def _new_session(self) -> aiohttp.ClientSession:
        connector = _Connector(
            limit=0,  # the semaphore's affair: a wait in the connector would count as connecting
            ssl=self._tls,
            keepalive_timeout=http.MAX_IDLE_S,
            ttl_dns_cache=30,
        )
        return aiohttp.ClientSession(
            connector=connector,
            headers=PLAIN_HEADERS,
            skip_auto_headers=("Content-Type",),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=True,
            trust_env=False,  # it would take credentials from .netrc
            timeout=aiohttp.ClientTimeout(total=None),
        )

    def close(self) -> None:
        """Close the connections; the sender can be used again. Not to be called in the loop."""
        session, self._session = self._session, None
        if session is not None:
            in_loop(session.close()).result(5)

    async def _exchange(self, session: aiohttp.ClientSession, request: HttpRequest) -> HttpResponse:
        most = http.MAX_ANSWER_BYTES if self._max_answer_bytes is None else self._max_answer_bytes
        read_timeout_s = request.timeout_s if request.timeout_s is not None else self.read_timeout_s
        exchange, timed_out = None, False
        try:
            async with asyncio.timeout(read_timeout_s) as timer:
                exchange = _Exchange(timer, self.connect_timeout_s, read_timeout_s)
                _current.set(exchange)
                async with session.request(
                    request.method,
                    URL(self.base_url + request.path, encoded=True),
                    data=request.body,
                    headers=request.headers,
                    allow_redirects=False,
                    proxy=self._proxy,
                ) as answer:
                    body = await _read(answer, most)
                    headers = {name.lower(): value for name, value in answer.headers.items()}
                    return HttpResponse(answer.status, headers, body)
        except _TooLarge:
            reason = f"the answer is larger than {most // 1_000_000} MB"
        except TimeoutError:
            timed_out = True
            reason = (
                f"no complete answer within {read_timeout_s:g} s"
                if exchange and exchange.sent
                else f"no connection within {self.connect_timeout_s:g} s"
            )
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            reason = _reason(exc)
        sent = exchange is not None and exchange.sent
        raise NoAnswer(f"{self._server}: {reason}", sent, timed_out) from None


_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\xff]")


class _Exchange:
    """One request on its way: whether a byte of it may have left, and until when it may take."""

    __slots__ = ("connect_timeout_s", "read_timeout_s", "sent", "timer")

    def __init__(self, timer: asyncio.Timeout, connect_timeout_s: float, read_timeout_s: float) -> None:
        self.timer, self.sent = timer, False
        self.connect_timeout_s, self.read_timeout_s = connect_timeout_s, read_timeout_s

    def may_take(self, left_s: float) -> None:
        self.timer.reschedule(asyncio.get_running_loop().time() + left_s)


_current: contextvars.ContextVar[_Exchange] = contextvars.ContextVar("_current")


class _Connector(aiohttp.TCPConnector):
    """Tells the exchange when there is a connection: what follows is sent.

    aiohttp's own tracing would tell the same, at a sixth of what a request costs.
    """

    async def connect(self, *args: Any, **kwargs: Any) -> Any:
        connection = await super().connect(*args, **kwargs)
        _current.get().sent = True
        return connection

    async def _create_connection(self, *args: Any, **kwargs: Any) -> Any:
        exchange = _current.get()
        exchange.may_take(exchange.connect_timeout_s)
        made = await super()._create_connection(*args, **kwargs)
        exchange.may_take(exchange.read_timeout_s)
        return made


class _TooLarge(Exception):
    pass


async def _read(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """Read the whole body of at most so many bytes; the size counts after decompression."""
    length = answer.content_length
    if length is not None and length <= min(65_536, most) and "Content-Encoding" not in answer.headers:
        return await answer.read()
    parts, size = [], 0
    async for part in answer.content.iter_chunked(65_536):
        size += len(part)
        if size > most:
            raise _TooLarge
        parts.append(part)
    return b"".join(parts)


def _reason(exc: BaseException) -> str:
    """Say what went wrong in the words of `tasks.http`, without URL, header or credentials."""
    match exc:
        case aiohttp.ClientConnectorCertificateError():
            inner = exc.certificate_error
            words = inner.verify_message if isinstance(inner, ssl.SSLCertVerificationError) else ""
            return f"TLS: {words or 'the certificate is not accepted'}"
        case aiohttp.ClientConnectorSSLError() | aiohttp.ClientSSLError() | ssl.SSLError():
            return "TLS failed"
        case aiohttp.ClientConnectorDNSError():
            return "the host's name cannot be resolved"
        case aiohttp.ClientProxyConnectionError() | aiohttp.ClientHttpProxyError():
            return "the proxy let nothing through"
        case aiohttp.ServerDisconnectedError():
            return "the connection was closed without an answer"
        case aiohttp.ClientPayloadError():
            coded = "content-encoding" in str(exc)
            return "the answer cannot be decoded" if coded else "the answer was cut short"
        case aiohttp.ClientOSError() | OSError():
            if isinstance(exc, ConnectionRefusedError) or exc.errno == 111:
                return "connection refused"
            return exc.strerror if exc.strerror and exc.errno not in (104, 32) else "the connection was reset"
        case aiohttp.ClientResponseError():
            return "the answer is not HTTP"
        case _:
            return type(exc).__name__


def _tls(verify: bool | str) -> ssl.SSLContext | bool:
    """Return what aiohttp takes: a context, or False for no verification."""
    if verify is False:
        return False
    return ssl.create_default_context(cafile=verify if isinstance(verify, str) else ca_of_requests())


def ca_of_requests() -> str | None:
    """Return the file of CA certificates that requests would take, so that both ways trust the same."""
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or requests_ca_bundle()


def _proxy(scheme: str, host: str) -> str | None:
    return None if proxy_bypass(host) else getproxies().get(scheme)
