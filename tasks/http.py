"""The only place from which HTTP requests leave.

One `HttpSender` for each configured connection. It sends exactly once: no retries and no redirects, because
whether to send again is a decision that needs to know what was sent. What it can tell its caller, and what
the plain libraries do not, is whether a request that got no answer may have *reached* the server.

Times: `connect_timeout_s` for the connection (TLS and a proxy's CONNECT among it), then `read_timeout_s` for
all the rest, from the first byte sent to the last byte read. The usual read timeout counts from one packet to
the next, so that a server that drips holds a worker for ever.
"""

from __future__ import annotations

import http.client
import io
import json
import logging
import os
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from . import tracing

if TYPE_CHECKING:
    from tasks.airflow.connections import AirflowConnection

log = logging.getLogger("dagrelay.http")

CONNECT_TIMEOUT_S: Final = 3.05
"""Just over 3 s, the time after which TCP sends its first packet again."""

READ_TIMEOUT_S: Final = 10.0

MAX_ANSWER_BYTES: Final = 32_000_000
"""A list of 25 runs with 1 MB of conf each is 25 MB; more is no answer of Airflow's to a question of ours."""

MAX_RETRY_AFTER_S: Final = 86_400.0

MAX_IDLE_S: Final = 4.0
"""Kept-alive connections unused for longer are opened anew: many servers close theirs after 5 s, and a
request that meets the closing is one of which nobody knows whether it was done."""

SLACK_S: Final = 0.05
"""How much later than its deadline an exchange may be given up."""

PLAIN_HEADERS: Final = {
    "User-Agent": "dagrelay",
    "Accept": "application/json",
    # Compressing costs the API server more than the network gains.
    "Accept-Encoding": "identity",
    "Connection": "keep-alive",
}

_PATH = re.compile(r"/[!-~]*\Z")


def is_path(text: str) -> bool:
    """Tell whether a text can be a request's path: what begins with "/" and is printable ASCII."""
    return _PATH.match(text) is not None


def requests_ca_bundle() -> str:
    """Return the CA certificates that requests trusts where nothing else is said."""
    return str(requests.utils.DEFAULT_CA_BUNDLE_PATH)


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request. `path` begins with "/" and lies within the connection's base URL; it may have a query.

    `timeout_s` replaces the connection's `read_timeout_s`. Headers and body are not in its repr: they hold
    credentials and confs.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | None = field(default=None, repr=False)
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """One complete answer, whatever its status. The names of the headers are lower-case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)

    def json(self) -> Any:
        """Return the decoded body, or None if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    def text(self, limit: int) -> str:
        """Return up to `limit` characters of the body, with what is not UTF-8 replaced."""
        return self.body[: 4 * limit].decode("utf-8", "replace")[:limit]


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds the server asks us to wait, or None if it does not say.

    Reads the delta-seconds form, up to one day; an HTTP-date counts as absent. Keys are lower case.
    Raises nothing: an odd header must not hide the error it came with.
    Source: RFC 9110, section 10.2.3.
    """
    value = headers.get("retry-after", "").strip()
    return min(float(value), MAX_RETRY_AFTER_S) if value.isascii() and value.isdecimal() else None


class NoAnswer(Exception):
    """There is no answer that could be read. `reason` says why, without credentials and bodies.

    `reached` is False only if not one byte of the request was sent: then the server cannot have done it.
    `timed_out`: the time was over; the server may be at it still.
    """

    def __init__(self, reason: str, reached: bool, timed_out: bool = False) -> None:
        super().__init__(reason, reached, timed_out)
        self.reason, self.reached, self.timed_out = reason, reached, timed_out

    def __str__(self) -> str:
        return self.reason


class HttpSender:
    """Sends requests to one server, over up to `pool_size` connections that are kept alive.

    Never more than `pool_size` requests of this process are in flight; further threads wait. Safe to use from
    threads and after a fork. Proxies and, where `verify` is True, the CA certificates are taken from the
    environment (`HTTPS_PROXY`, `NO_PROXY`, `REQUESTS_CA_BUNDLE`), credentials never (no .netrc). `verify` is
    False, True, or the path of a file with the CA certificates to trust.
    """

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
        verify: bool | str = True,
        pool_size: int = 8,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self.verify = verify
        self.pool_size = pool_size
        parts = urlsplit(self.base_url)
        self._server = parts.netloc.rpartition("@")[2]
        self._lock = threading.Lock()
        self._channel: _Channel | None = None
        if verify is False and parts.scheme == "https":
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # said once, here, instead
            log.warning("TLS certificates are not verified server=%s", self._server)
        reset_after_fork(self)

    @classmethod
    def for_connection(cls, connection: AirflowConnection) -> HttpSender:
        """Return the sender for one Airflow connection."""
        return cls(
            connection.base_url,
            connect_timeout_s=connection.connect_timeout_s,
            read_timeout_s=connection.read_timeout_s,
            verify=connection.ca_file if connection.verify and connection.ca_file else connection.verify,
            pool_size=connection.ceiling,
        )

    def send(self, request: HttpRequest) -> HttpResponse:
        """Send once and return the answer, whatever its status. Raises NoAnswer.

        A redirect is an answer like any other. ValueError if the path is none: that is a mistake in our code.
        """
        if not is_path(request.path):
            raise ValueError(f"not a path: {request.path!r}")
        read_timeout_s = request.timeout_s if request.timeout_s is not None else self.read_timeout_s
        _exchange.begin(self.connect_timeout_s, read_timeout_s)
        try:
            channel = self._current_channel()
            answer = channel.pool.urlopen(
                request.method,
                channel.prefix + request.path,
                body=request.body,
                headers={**PLAIN_HEADERS, **tracing.outgoing(), **request.headers},
                retries=channel.retries,
                timeout=urllib3.Timeout(connect=self.connect_timeout_s, read=read_timeout_s),
                redirect=False,
                assert_same_host=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                body = _read(answer)
            except BaseException:
                answer.close()
                raise
            answer.release_conn()
            headers = {name.lower(): value for name, value in answer.headers.items()}
            return HttpResponse(answer.status, headers, body)
        except (
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            http.client.HTTPException,
            OSError,
            ValueError,  # a header that cannot be sent: http.client's own check
        ) as exc:
            # Without the cause: its text and arguments hold the URL, a header, even the proxy's password.
            reason = f"{self._server}: {self._reason(exc, read_timeout_s)}"
            timed_out = any(
                isinstance(cause, TimeoutError | urllib3.exceptions.TimeoutError) for cause in _chain(exc)
            )
            raise NoAnswer(reason, _exchange.sent, timed_out) from None

    def close(self) -> None:
        """Close the connections that are not in use. The sender can be used again."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.adapter.close()

    def after_fork(self) -> None:
        """Forget the parent's connections: two processes on one socket would read each other's answers."""
        self._lock = threading.Lock()
        self._channel = None

    def _current_channel(self) -> _Channel:
        channel = self._channel
        if channel is None:
            with self._lock:
                channel = self._channel
                if channel is None:
                    channel = self._channel = self._new_channel()
        return channel

    def _new_channel(self) -> _Channel:
        """Find the way to the server as requests finds it, once: it does so for each request.

        That was two thirds of what a request costs. It also reads the environment for each, and would take
        credentials from .netrc instead of ours.
        """
        adapter = _Adapter(pool_connections=1, pool_maxsize=self.pool_size, pool_block=True, max_retries=0)
        with requests.Session() as session:
            found = session.merge_environment_settings(self.base_url, {}, True, self.verify, None)
        anything = requests.Request("GET", self.base_url + "/").prepare()
        proxies, verify = found["proxies"], found["verify"]
        pool = adapter.get_connection_with_tls_context(anything, verify, proxies=proxies)
        adapter.cert_verify(pool, anything.url, verify, None)  # type: ignore[no-untyped-call]
        # The path only, but for a proxy that is to fetch a plain http:// address: there it is the whole URL.
        prefix = adapter.request_url(anything, proxies).removesuffix("/")
        return _Channel(adapter, pool, prefix, adapter.max_retries)

    def _reason(self, exc: BaseException, read_timeout_s: float) -> str:
        for cause in _chain(exc):
            match cause:
                case _TooLarge():
                    return f"the answer is larger than {MAX_ANSWER_BYTES // 1_000_000} MB"
                case ssl.SSLCertVerificationError():
                    return f"TLS: {cause.verify_message or 'the certificate is not accepted'}"
                case ssl.SSLError():
                    return f"TLS failed: {cause.reason or type(cause).__name__}"
                case socket.gaierror():
                    return "the host's name cannot be resolved"
                case ConnectionRefusedError():
                    return "connection refused"
                case TimeoutError() | urllib3.exceptions.TimeoutError():
                    if _exchange.sent:
                        return f"no complete answer within {read_timeout_s:g} s"
                    return f"no connection within {self.connect_timeout_s:g} s"
                case http.client.RemoteDisconnected():
                    return "the connection was closed without an answer"
                case ConnectionError():
                    return "the connection was reset"
                case http.client.IncompleteRead() | urllib3.exceptions.IncompleteRead():
                    return "the answer was cut short"
                case urllib3.exceptions.DecodeError():
                    return "the answer cannot be decoded"
                case http.client.HTTPException():
                    return "the answer is not HTTP"
                case OSError() if type(cause) is OSError and cause.strerror:
                    return cause.strerror
        causes = [type(cause).__name__ for cause in _chain(exc)]
        return "the proxy let nothing through" if "ProxyError" in causes else causes[-1]


def _chain(exc: BaseException) -> Iterator[BaseException]:
    """Yield the causes of an exception, innermost first: requests and urllib3 wrap them in several ways."""
    found: list[BaseException] = []
    todo: list[BaseException | None] = [exc]
    while todo:
        one = todo.pop(0)
        if one is None or any(one is known for known in found):
            continue
        found.append(one)
        inner = [getattr(one, "reason", None), *one.args, one.__cause__, one.__context__]
        todo += [cause for cause in inner if isinstance(cause, BaseException)]
    return reversed(found)


@dataclass(frozen=True, slots=True)
class _Channel:
    """The way to the server: a pool of connections, and what stands before a path."""

    adapter: HTTPAdapter
    pool: Any
    prefix: str
    retries: urllib3.Retry


class _TooLarge(urllib3.exceptions.HTTPError):
    pass


def _read(raw: urllib3.BaseHTTPResponse) -> bytes:
    """Read the whole body, up to the limit; the size counts after decompression."""
    parts, size = [], 0
    while part := raw.read(65_536, decode_content=True):
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise _TooLarge
        parts.append(part)
    return b"".join(parts)


class _Exchange(threading.local):
    """What one thread is just sending: whether a byte has left, and until when it may take."""

    sent = False
    deadline = 0.0
    connect_timeout_s = CONNECT_TIMEOUT_S
    read_timeout_s = READ_TIMEOUT_S

    def begin(self, connect_timeout_s: float, read_timeout_s: float) -> None:
        self.sent = False
        self.connect_timeout_s, self.read_timeout_s = connect_timeout_s, read_timeout_s

    def left_s(self) -> float:
        """How long is left. Raises TimeoutError if nothing is: a socket's timeout of 0 means not to wait."""
        return _left_s(self.deadline)


_exchange = _Exchange()


def _left_s(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _limit(sock: socket.socket, left_s: float) -> None:
    """Have a socket wait for `left_s` at most, or for SLACK_S more where that is how it stands already.

    Setting it costs a system call, for which the thread lets go of the interpreter, and has to get it
    back from all the others.
    """
    set_s = sock.gettimeout()
    if set_s is None or not left_s <= set_s < left_s + SLACK_S:
        sock.settimeout(left_s)


class _Receiving(io.RawIOBase):
    """A socket's reading end that stops at one deadline, however many packets come before it."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        _limit(self._sock, _left_s(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        super().close()
        self._raw.close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_Receiving(sock, _exchange.deadline))


class _Watched(HTTPConnection):
    """Notes when the first byte of a request leaves, and keeps to the deadline of the exchange."""

    response_class = _Answer
    _connecting = False
    _used_at = 0.0
    _pieces: list[bytes] | None = None

    @property
    def is_connected(self) -> bool:
        return super().is_connected and time.monotonic() - self._used_at < MAX_IDLE_S

    def connect(self) -> None:
        self._connecting = True
        _exchange.deadline = time.monotonic() + _exchange.connect_timeout_s
        try:
            super().connect()
        finally:
            self._connecting = False
        self._used_at = time.monotonic()

    def request(self, *args: Any, **kwargs: Any) -> None:
        """Send a request in one piece, head and body: one packet, and one wait of this thread, fewer."""
        pieces: list[bytes] = []
        self._pieces = pieces
        try:
            super().request(*args, **kwargs)
        finally:
            self._pieces = None
        self.send(b"".join(pieces))

    def send(self, data: Any) -> None:
        if self._pieces is not None and not self._connecting and isinstance(data, bytes):
            self._pieces.append(data)
            return
        if self.sock is None:
            self.connect()
        if not self._connecting and not _exchange.sent:
            _exchange.sent = True
            _exchange.deadline = time.monotonic() + _exchange.read_timeout_s
        _limit(self.sock, _exchange.left_s())
        super().send(data)

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]  # as urllib3 has it
        response = super().getresponse()
        self._used_at = time.monotonic()
        return response


class _WatchedTls(_Watched, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Watched


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _WatchedTls


class _Adapter(HTTPAdapter):
    """Makes connections that are watched, with and without a proxy."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
        return manager


class _ForkAware(Protocol):
    def after_fork(self) -> None: ...


_fork_aware: weakref.WeakSet[_ForkAware] = weakref.WeakSet()


def reset_after_fork(thing: _ForkAware) -> None:
    """Have `thing.after_fork()` called in every child of a fork, for as long as the thing lives.

    A lock that another thread held at the fork stays locked in the child for ever.
    """
    _fork_aware.add(thing)


def _after_fork_in_child() -> None:
    for thing in list(_fork_aware):
        thing.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
