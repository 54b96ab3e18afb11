"""Stands between the worker and Airflow, and does what networks and proxies do: answers get lost.

    with Proxy(airflow.url) as proxy:
        proxy.rule = lambda call: "drop" if call.makes_run else "pass"

What Airflow was asked and how it answered is in `calls`.
"""

from __future__ import annotations

import http.client
import socket
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
    "502",  # not asked, and a proxy's page
    "close",  # not asked, and the connection closed
]

PAGE = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"


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
        if call.fault in ("pass", "drop", "502 after"):
            try:
                answer = self._ask(body)
            except (OSError, http.client.HTTPException):
                call.fault = "close"  # Airflow is away: so is its proxy
            else:
                call.status = answer[0]
        if (answer is None and call.fault != "502") or call.fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif call.fault in ("502", "502 after"):
            self._reply(502, {"Content-Type": "text/html"}, PAGE)
        elif answer is not None:
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
