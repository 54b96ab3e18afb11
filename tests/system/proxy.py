"""Stands between the worker and Airflow, and does what networks and proxies do: answers get lost.

    with Proxy(airflow.url) as proxy:
        proxy.rule = lambda call: "drop" if call.makes_run else "pass"

What Airflow was asked and how it answered is in `calls`.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal[
    "pass",  # asked, and the answer given
    "drop",  # asked, answered, and the connection closed instead of the answer
    "502 after",  # asked, answered, and a proxy's page instead of the answer
    "late",  # asked, answered, and the answer given after `late_s`
    "502",  # not asked, and a proxy's page
    "503",  # not asked, and a proxy's page that asks to come back after a second
    "504",  # not asked, and a proxy's page
    "429",  # not asked, and a proxy's page that asks to come back after a second
    "close",  # not asked, and the connection closed
    "reset",  # not asked, and the connection reset
    "held back",  # asked after `late_s`
]

ASKS: tuple[Fault, ...] = ("pass", "drop", "502 after", "late", "held back")
PAGES: dict[Fault, int] = {"502": 502, "502 after": 502, "503": 503, "504": 504, "429": 429}
COME_BACK: dict[int, dict[str, str]] = {503: {"Retry-After": "1"}, 429: {"Retry-After": "1"}}
PAGE = b"<html><head><title>%d</title></head><body>nginx</body></html>"


@dataclass
class Call:
    """One request of a worker; `status` is Airflow's answer, None if it was not asked."""

    number: int
    method: str
    path: str
    authorization: str | None
    body: bytes
    at: float
    status: int | None = None
    fault: Fault = "pass"

    @property
    def makes_run(self) -> bool:
        return self.method == "POST" and self.path.endswith("/dagRuns")

    @property
    def clears(self) -> bool:
        return self.method == "POST" and self.path.endswith("/clear")

    @property
    def logs_in(self) -> bool:
        return self.method == "POST" and self.path == "/auth/token"


class Proxy:
    """An HTTP proxy for one Airflow on a free loopback port; `rule` decides about each call."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.rule: Callable[[Call], Fault] = lambda call: "pass"
        self.calls: list[Call] = []
        self.late_s = 30.0
        self.over = threading.Event()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 128})(
            ("127.0.0.1", 0), handler
        )
        self._server.daemon_threads = True

    def conn_uri(self, username: str, password: str) -> str:
        return f"http://{username}:{password}@127.0.0.1:{self._server.server_address[1]}"

    def made(self) -> list[Call]:
        """The calls that asked for a run."""
        return [call for call in list(self.calls) if call.makes_run]

    def take(self, method: str, path: str, authorization: str | None, body: bytes) -> Call:
        with self._lock:
            call = Call(len(self.calls) + 1, method, path, authorization, body, time.time())
            self.calls.append(call)
            call.fault = self.rule(call)
            return call

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    proxy: Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # the worker has gone
            self.close_connection = True

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        call = self.proxy.take(
            self.command, self.path.partition("?")[0], self.headers.get("Authorization"), body
        )
        answer = None
        if call.fault == "held back":
            self.proxy.over.wait(self.proxy.late_s)
        if call.fault in ASKS:
            try:
                answer = self._ask(body)
            except (OSError, http.client.HTTPException):
                call.fault = "close"  # Airflow is away: so is its proxy
            else:
                call.status = answer[0]
        if call.fault == "late":
            self.proxy.over.wait(self.proxy.late_s)
        if call.fault in PAGES:
            status = PAGES[call.fault]
            headers = {"Content-Type": "text/html"} | COME_BACK.get(status, {})
            self._reply(status, headers, PAGE % status)
        elif answer is None or call.fault == "drop":
            self.close_connection = True
            if call.fault == "reset":  # with SO_LINGER 0, close() sends RST instead of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._reply(*answer)

    do_GET = do_POST = do_PATCH = do_DELETE = _do

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        target = self.proxy.target
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            kept = ("content-type", "retry-after", "content-encoding", "location")
            answered = {name: value for name, value in response.getheaders() if name.lower() in kept}
            return response.status, answered, response.read()
        finally:
            connection.close()

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
