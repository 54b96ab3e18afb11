"""A receiver of webhooks that is only an HTTP server, with the faults of a real one, on demand. For tests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Answer = tuple[int, dict[str, str]]


@dataclass(frozen=True)
class Got:
    """One delivery. Header names are in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


class WebhookReceiver:
    """A server on a free loopback port; `with WebhookReceiver() as receiver:`.

    `answer(number, got)` is asked for each delivery, numbered from 1: its status and headers. It may block.
    """

    def __init__(self) -> None:
        self.got: list[Got] = []
        self.answer: Callable[[int, Got], Answer] = lambda number, got: (204, {})
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def of(self, task_id: str) -> list[Got]:
        """Return what was told of a request."""
        with self._lock:
            return [one for one in self.got if one.event["data"]["id"] == task_id]

    def _take(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        got = Got(path, headers, body, time.time())
        with self._lock:
            self.got.append(got)
            number = len(self.got)
        return self.answer(number, got)

    def __enter__(self) -> WebhookReceiver:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status, more = receiver._take(self.path, headers, body)
                try:
                    self.send_response(status)
                    for name, value in more.items():
                        self.send_header(name, value)
                    if status not in (204, 304):
                        self.send_header("content-length", "0")
                    self.end_headers()
                except OSError:
                    self.close_connection = True  # the sender has gone

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
