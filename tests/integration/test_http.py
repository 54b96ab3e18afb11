"""The sender against servers that misbehave in every way that decides whether a request may have been done.

The servers are sockets on loopback: no Valkey, no worker.
"""

import contextlib
import gzip
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tests.import_tasks  # noqa: F401
from tasks import http, http_many
from tasks.airflow.connections import AirflowConnection
from tasks.http import HttpRequest, HttpResponse, HttpSender, NoAnswer
from tasks.http_many import ManySender, in_loop

TLS = Path(__file__).parent / "tls"
GET = HttpRequest("GET", "/x")
POST = HttpRequest("POST", "/dagRuns", {"Content-Type": "application/json"}, b'{"conf": "canary"}')
PROXIES = (
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "NETRC",
)


def ok(body: bytes = b"{}", more: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


class Connection:
    """One connection, as the server sees it: reads requests, writes whatever it likes."""

    def __init__(self, sock: socket.socket, number: int, seen: list[bytes]) -> None:
        self.sock, self.number, self._seen = sock, number, seen
        self._file = sock.makefile("rb")

    def read(self) -> bytes:
        """The next request with its body, or b"" at the end."""
        lines = []
        while (line := self._file.readline()) not in (b"\r\n", b""):
            lines.append(line)
        if not lines:
            return b""
        head = b"".join(lines)
        length = next((int(x.split(b":")[1]) for x in lines if x.lower().startswith(b"content-length:")), 0)
        request = head + b"\r\n" + self._file.read(length)
        self._seen.append(request)
        return request

    def write(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def answer_all(self, *answers: bytes) -> None:
        """Answer each request with the next answer, the last one for ever."""
        for count in range(1_000_000):
            if not self.read():
                return
            self.write(answers[min(count, len(answers) - 1)])


class Server:
    """Listens on loopback and gives each connection to `serve`, in a thread of its own."""

    def __init__(
        self, serve: Callable[[Connection], None], tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._serve, self._tls = serve, tls
        self._listening = socket.create_server((host, 0), backlog=64)
        self.port = self._listening.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{host}:{self.port}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(sock)
            threading.Thread(target=self._one, args=(sock, self.connections), daemon=True).start()

    def _one(self, sock: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
            connection = Connection(sock, number, self.requests)
            self._serve(connection)
            connection._file.close()
            sock.close()

    def close(self) -> None:
        for sock in (self._listening, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    servers: list[Server] = []

    def start(serve: Callable[[Connection], None], *more: Any) -> Server:
        servers.append(Server(serve, *more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class Waiting:
    """A ManySender that is waited for, so that both senders are held to the same promises."""

    def __init__(self, url: str, *, pool_size: int = 8, **options: Any) -> None:
        self._many = ManySender(url, in_flight=pool_size, **options)

    def send(self, request: HttpRequest) -> HttpResponse:
        return in_loop(self._many.send(request)).result(30)

    def close(self) -> None:
        self._many.close()


@pytest.fixture(autouse=True, params=["one", "many"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test is for both senders."""
    monkeypatch.setattr(sys.modules[__name__], "kind", {"one": HttpSender, "many": Waiting}[request.param])
    return str(request.param)


kind: Any = HttpSender


def sender(server: Server | str, **more: object) -> Any:
    url = server if isinstance(server, str) else server.url
    return kind(url, **{"connect_timeout_s": 1.0, "read_timeout_s": 1.0, **more})


def no_answer(server: Server | str, request: HttpRequest = POST, **more: object) -> NoAnswer:
    with pytest.raises(NoAnswer) as raised:
        sender(server, **more).send(request)
    assert "canary" not in str(raised.value)
    return raised.value


# What arrives


def test_a_request_arrives_as_it_was_made(serving):
    server = serving(lambda c: c.answer_all(ok(b'{"a": "\xc3\xbc"}', "X-Odd: Yes\r\n")))
    request = HttpRequest("POST", "/p%20q?x=1%2B1", {"Authorization": "Bearer t"}, "{ü}".encode())

    response = sender(server.url + "/base/").send(request)

    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /base/p%20q?x=1%2B1 HTTP/1.1"
    assert {"Authorization: Bearer t", "Accept: application/json", "User-Agent: dagrelay"} <= set(lines)
    assert "Accept-Encoding: identity" in lines
    assert not [line for line in lines if line.lower().startswith(("referer", "cookie"))]
    assert body == "{ü}".encode()
    assert (response.status, response.headers["x-odd"], response.json()) == (200, "Yes", {"a": "ü"})


def test_what_is_no_json_is_none():
    assert HttpResponse(200, {}, b"<html>").json() is None
    assert HttpResponse(200, {}, b"\xff\xfe\xfd").json() is None
    assert HttpResponse(200, {}, b"[" * 100_000).json() is None
    assert HttpResponse(200, {}, "ab\u00fc\u00fcc".encode()).text(4) == "abüü"


def test_any_status_is_an_answer_and_a_redirect_is_not_followed(serving):
    server = serving(
        lambda c: c.answer_all(
            b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
        )
    )
    send = sender(server).send

    assert [send(GET).status, send(GET).status] == [302, 500]
    assert len(server.requests) == 2


def test_connections_are_kept_alive(serving):
    server = serving(lambda c: c.answer_all(ok()))
    send = sender(server).send

    for _ in range(5):
        assert send(POST).status == 200
    assert server.connections == 1


def test_a_connection_that_lay_idle_is_not_used_again(serving, monkeypatch):
    monkeypatch.setattr(http, "MAX_IDLE_S", 0.05)
    server = serving(lambda c: c.answer_all(ok()))
    send = sender(server).send

    send(GET)
    time.sleep(0.1)
    send(GET)
    assert server.connections == 2


def test_a_connection_that_was_closed_meanwhile_is_opened_anew(serving):
    def serve(connection):
        connection.read()
        connection.write(ok())

    server = serving(serve)
    send = sender(server).send

    for _ in range(3):
        assert send(POST).status == 200
        time.sleep(0.05)
    assert server.connections == 3


def test_never_more_in_flight_than_the_pool_holds(serving):
    lock, now, most = threading.Lock(), [0], [0]

    def serve(connection):
        while connection.read():
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.03)
            with lock:
                now[0] -= 1
            connection.write(ok())

    server = serving(serve)
    send = sender(server, pool_size=3, read_timeout_s=5.0).send
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: send(POST).status, range(36)))

    assert answers == [200] * 36
    assert most == [3]
    assert server.connections == 3


def test_a_place_in_the_pool_comes_back_after_every_failure(serving, monkeypatch):
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 10)

    def serve(connection):
        while request := connection.read():
            if b"/large" in request:
                connection.write(ok(b"x" * 100))
            elif b"/x" in request:
                connection.write(ok())
            else:
                break
        if b"/hang" in request:
            time.sleep(1)
        elif b"/reset" in request:
            connection.reset()
        elif b"/short" in request:
            connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nx")

    server = serving(serve)
    one = sender(server, pool_size=1, read_timeout_s=0.3)
    for path in ("/hang", "/reset", "/large", "/short", "/hang"):
        with pytest.raises(NoAnswer):
            one.send(HttpRequest("GET", path))
        assert one.send(GET).status == 200


def test_cookies_are_not_kept(serving):
    server = serving(lambda c: c.answer_all(ok(more="Set-Cookie: _token=x; Path=/\r\n")))
    send = sender(server).send

    send(GET)
    send(GET)
    assert b"ookie" not in server.requests[1]


def test_netrc_does_not_replace_our_credentials(serving, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(
        "machine 127.0.0.1 login other password other\ndefault login o password o\n"
    )
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = serving(lambda c: c.answer_all(ok()))
    send = sender(server).send

    send(HttpRequest("GET", "/", {"Authorization": "Bearer t"}))
    send(GET)
    assert b"Authorization: Bearer t\r\n" in server.requests[0]
    assert b"Authorization" not in server.requests[1]


@pytest.mark.parametrize("path", ["x", "", "//a b", "/a\r\nX: y", "/ü", "http://h/"])
def test_what_is_no_path_is_a_mistake_of_ours(path):
    with pytest.raises(ValueError, match="not a path"):
        sender("http://127.0.0.1:1").send(HttpRequest("GET", path))


def test_a_path_cannot_lead_to_another_host(serving):
    server = serving(lambda c: c.answer_all(ok()))

    assert sender(server).send(HttpRequest("GET", "//127.0.0.1:1/x")).status == 200


# What certainly did not arrive


def test_refused(serving):
    server = serving(lambda c: None)
    server.close()

    error = no_answer(server)
    assert not error.reached
    assert error.reason == f"127.0.0.1:{server.port}: connection refused"


def test_no_such_host():
    error = no_answer("http://no-such-host.invalid")
    assert not error.reached
    assert "name cannot be resolved" in error.reason


def test_no_connection_in_time():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port = listening.getsockname()[1]
        held = [socket.socket() for _ in range(3)]  # fill the backlog: further connections are not answered
        for sock in held:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", port))
        began = time.monotonic()
        error = no_answer(f"http://127.0.0.1:{port}", connect_timeout_s=0.3)
        for sock in held:
            sock.close()
    assert not error.reached
    assert "no connection within 0.3 s" in error.reason
    assert time.monotonic() - began < 10


def test_a_header_that_cannot_be_sent(serving):
    server = serving(lambda c: c.answer_all(ok()))

    error = no_answer(server, HttpRequest("GET", "/", {"Authorization": "Bearer canary\r\nX: y"}))
    assert not error.reached
    assert server.connections == 0


# What may have arrived


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("silence", "no complete answer within 1 s"),
        ("reset", "reset"),
        ("close", "closed without an answer"),
        ("half a head", "no complete answer"),
        ("short", "cut short"),
        ("short chunks", "cut short"),
        ("garbage", "not HTTP"),
        ("bad chunk", "answer"),
        ("bad gzip", "cannot be decoded"),
        ("endless head", "answer"),
    ],
)
def test_no_answer_that_can_be_read(serving, what, told):
    answers = {
        "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
        "short": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        "short chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n5\r\nab",
        "garbage": b"\x16\x03\x01 what?\r\n\r\n",
        "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabcde\r\n",
        "bad gzip": ok(b"not gzip", "Content-Encoding: gzip\r\n"),
        "endless head": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000,
    }

    def serve(connection):
        connection.read()
        if what in answers:
            connection.write(answers[what])
        if what in ("silence", "half a head"):
            time.sleep(3)
        if what == "reset":
            connection.reset()

    error = no_answer(serving(serve))
    assert error.reached
    assert told in error.reason


def test_a_connection_that_closes_as_we_send_may_have_done_it(serving):
    def serve(connection):
        connection.read()
        connection.write(ok())
        connection.read()  # the second request is read, and perhaps done

    server = serving(serve)
    one = sender(server)
    assert one.send(POST).status == 200
    with pytest.raises(NoAnswer) as raised:
        one.send(POST)
    assert raised.value.reached
    assert len(server.requests) == 2  # it was not sent again behind our back
    assert server.connections == 1


@pytest.mark.parametrize("where", ["head", "body", "chunks"])
def test_a_server_that_drips_does_not_hold_us(serving, where):
    heads = {
        "head": b"HTTP/1.1 200 OK\r\nX: ",
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
        "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    }

    def serve(connection):
        connection.read()
        connection.write(heads[where])
        for _ in range(100):
            connection.write(b"1\r\nx\r\n" if where == "chunks" else b"x")
            time.sleep(0.1)

    began = time.monotonic()
    error = no_answer(serving(serve), read_timeout_s=0.5)
    assert error.reached
    assert "no complete answer within 0.5 s" in error.reason
    assert time.monotonic() - began < 8  # and not the 10 s for which it sends


def test_a_slow_but_complete_answer_is_taken(serving):
    def serve(connection):
        connection.read()
        for part in (b"HTTP/1.1 200 OK\r\n", b"Content-Length: 4\r\n\r\n", b"nu", b"ll"):
            connection.write(part)
            time.sleep(0.1)

    assert sender(serving(serve)).send(GET).body == b"null"


def test_a_request_may_have_its_own_time(serving):
    def serve(connection):
        connection.read()
        time.sleep(0.5)
        connection.write(ok())

    server = serving(serve)
    assert not isinstance(sender(server).send(HttpRequest("GET", "/", timeout_s=2)), NoAnswer)
    assert "within 0.1 s" in no_answer(server, HttpRequest("GET", "/", timeout_s=0.1)).reason


def test_a_server_that_does_not_read_does_not_hold_us(serving):
    began = time.monotonic()
    error = no_answer(
        serving(lambda c: time.sleep(30)),
        HttpRequest("POST", "/", {}, b"x" * 30_000_000),
        read_timeout_s=0.5,
    )
    assert error.reached
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("kind", ["plain", "chunks", "gzip"])
def test_an_answer_without_end_is_not_read_to_its_end(serving, monkeypatch, kind):
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 1_000_000)
    bomb = gzip.compress(b"\0" * 50_000_000)

    def serve(connection):
        connection.read()
        if kind == "gzip":
            connection.write(ok(bomb, "Content-Encoding: gzip\r\n"))
        elif kind == "plain":
            connection.write(ok(b"x" * 5_000_000))
        else:
            connection.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                connection.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")

    error = no_answer(serving(serve), read_timeout_s=10.0)
    assert error.reached
    assert "larger than 1 MB" in error.reason


def test_an_answer_within_the_limit_is_read_whole(serving):
    body = json.dumps(["x" * 1000] * 8000).encode()
    server = serving(lambda c: c.answer_all(ok(body), ok(gzip.compress(body), "Content-Encoding: gzip\r\n")))
    send = sender(server, read_timeout_s=10.0).send

    assert send(GET).body == body
    assert send(GET).body == body


# TLS


@pytest.fixture
def tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    return context


def test_a_certificate_of_a_ca_of_ones_own_is_accepted(serving, tls):
    server = serving(lambda c: c.answer_all(ok()), tls)
    connection = AirflowConnection("x", server.url, ca_file=str(TLS / "cert.pem"), max_in_flight=2)
    one = HttpSender.for_connection(connection)

    assert one.send(POST).status == one.send(POST).status == 200
    assert server.connections == 1
    assert one.pool_size == 2


def test_a_certificate_that_nobody_vouches_for_gets_nothing(serving, tls):
    server = serving(lambda c: c.answer_all(ok()), tls)

    with pytest.raises(NoAnswer) as raised:
        HttpSender.for_connection(AirflowConnection("x", server.url)).send(POST)
    error = raised.value
    assert not error.reached
    assert "TLS: self-signed certificate" in error.reason
    assert server.requests == []


def test_a_certificate_for_another_name_gets_nothing(serving, tls):
    server = serving(lambda c: c.answer_all(ok()), tls, "127.0.0.2")  # the certificate is for 127.0.0.1

    error = no_answer(server, verify=str(TLS / "cert.pem"))
    assert not error.reached
    assert "TLS: IP address mismatch" in error.reason
    assert server.requests == []


def test_verification_can_be_switched_off_whatever_the_environment_says(serving, tls, monkeypatch, caplog):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(TLS / "none.pem"))
    server = serving(lambda c: c.answer_all(ok()), tls)
    connection = AirflowConnection("x", server.url, verify=False)

    assert HttpSender.for_connection(connection).send(POST).status == 200
    assert "TLS certificates are not verified" in caplog.text


def test_a_ca_of_the_environment_is_trusted(serving, tls, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(TLS / "cert.pem"))
    server = serving(lambda c: c.answer_all(ok()), tls)

    assert sender(server).send(POST).status == 200


def test_a_server_without_tls_gets_nothing(serving):
    server = serving(lambda c: (c.write(b"220 mail.example.org ESMTP\r\n"), c.read()))

    error = no_answer(server.url.replace("http:", "https:"))
    assert not error.reached
    assert "TLS failed" in error.reason


def test_tls_answers_are_bounded_in_time_too(serving, tls):
    def serve(connection):
        connection.read()
        connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        for _ in range(100):
            connection.write(b"x")
            time.sleep(0.1)

    began = time.monotonic()
    error = no_answer(serving(serve, tls), verify=str(TLS / "cert.pem"), read_timeout_s=0.5)
    assert error.reached
    assert time.monotonic() - began < 8  # and not the 10 s for which it sends


# Proxies


def test_a_proxy_of_the_environment_is_used(serving, monkeypatch):
    proxy = serving(lambda c: c.answer_all(ok(b'"by proxy"')))
    monkeypatch.setenv("HTTP_PROXY", f"http://us:er@127.0.0.1:{proxy.port}")
    monkeypatch.setenv("http_proxy", f"http://us:er@127.0.0.1:{proxy.port}")

    assert sender("http://airflow.invalid:8080").send(POST).json() == "by proxy"
    assert proxy.requests[0].startswith(b"POST http://airflow.invalid:8080/dagRuns HTTP/1.1\r\n")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = serving(lambda c: c.answer_all(ok(b'"direct"')))
    assert sender(server).send(POST).json() == "direct"


def test_a_proxy_that_is_not_there_or_refuses_gets_nothing_through(serving, monkeypatch):
    refusing = serving(lambda c: c.answer_all(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"))
    silent = serving(lambda c: (c.read(), time.sleep(30)))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://us:canary@127.0.0.1:{refusing.port}")
    error = no_answer("https://airflow.invalid")
    assert not error.reached
    assert refusing.requests[0].startswith(b"CONNECT airflow.invalid:443 HTTP/1")

    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://us:canary@127.0.0.1:{silent.port}")
    began = time.monotonic()
    error = no_answer("https://airflow.invalid")
    assert not error.reached
    assert time.monotonic() - began < 15

    refusing.close()
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://us:canary@127.0.0.1:{refusing.port}")
    assert not no_answer("https://airflow.invalid").reached


def test_tls_through_a_proxy(serving, tls, monkeypatch):
    server = serving(lambda c: c.answer_all(ok(b'"inside"')), tls)

    def relay(connection):
        connection.read()
        with socket.create_connection(("127.0.0.1", server.port)) as onward:
            connection.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

            def copy(source, target):
                with contextlib.suppress(OSError):
                    while data := source.recv(65_536):
                        target.sendall(data)

            threading.Thread(target=copy, args=(onward, connection.sock), daemon=True).start()
            copy(connection.sock, onward)

    proxy = serving(relay)
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    one = sender(server, verify=str(TLS / "cert.pem"))

    assert [one.send(POST).json() for _ in range(2)] == ["inside", "inside"]
    assert proxy.connections == server.connections == 1


# Forks


def test_a_child_has_connections_of_its_own(serving):
    server = serving(lambda c: c.answer_all(*(ok(json.dumps([c.number, n]).encode()) for n in range(50))))
    one = sender(server)
    assert one.send(GET).json() == [1, 0]

    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            status = 0 if [one.send(GET).json() for _ in range(3)] == [[2, 0], [2, 1], [2, 2]] else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [one.send(GET).json() for _ in range(2)] == [[1, 1], [1, 2]]


def test_a_fork_while_another_thread_makes_the_session(serving, how):
    server = serving(lambda c: c.answer_all(ok()))
    one = sender(server)
    with one._lock if how == "one" else http_many._loop._lock:  # as if a thread were just in there
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                status = 0 if one.send(GET).status == 200 else 2
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_closed_sender_can_be_used_again(serving):
    server = serving(lambda c: c.answer_all(ok()))
    one = sender(server)

    one.send(GET)
    one.close()
    assert one.send(GET).status == 200
    assert server.connections == 2


def test_nothing_secret_is_in_a_repr():
    request = HttpRequest("POST", "/x", {"Authorization": "Bearer canary"}, b"canary")

    assert "canary" not in repr(request)
    assert "canary" not in repr(HttpResponse(200, {"set-cookie": "canary"}, b"canary"))
