"""A job service that is only an HTTP server, with the faults of a real one, on demand.

POST /jobs starts a job, GET /jobs/ID tells its state, GET /jobs?ref=R finds jobs by the caller's reference,
DELETE /jobs/ID cancels one. It honours an Idempotency-Key unless told not to. For tests; it measures nothing.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Literal[
    "answer",  # the job is made and the answer given
    "drop",  # the job is made, and the connection closed without an answer
    "500",  # the job is made, and the answer is 500
    "nonsense",  # the job is made, and the answer is no JSON
    "lose",  # nothing is made, and the connection closed without an answer
    "422",  # nothing is made, and the answer says why
    "429",  # nothing is made, and the answer is 429 with Retry-After: 1
    "hang",  # the job is made, and the answer comes after `hang_s`
]

Answer = tuple[int, dict[str, str], bytes]


class FakeService:
    """A server on a free loopback port; `with FakeService() as service:`.

    `jobs` maps job ids to jobs: dicts that are what a look gets as its answer; a test changes them.
    `fault(number, body)` is asked for each POST, numbered from 1. `answer` replaces the answer to every look.
    """

    token = "s3cret-t0ken-of-the-service"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.forget()

    def forget(self) -> None:
        """Be as good as new: no jobs, no faults."""
        self.jobs: dict[str, dict[str, Any]] = {}
        self.references: dict[str, list[str]] = {}
        self.keys: dict[str, str] = {}
        self.honours_keys = True
        self.posts: list[tuple[str | None, Any]] = []
        self.looks: Counter[str] = Counter()
        self.cancels: list[str] = []
        self.cancel_status = 200
        self.found_after = 0
        self.finds = 0
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.fault: Callable[[int, Any], Fault] = lambda number, body: "answer"
        self.answer: Callable[[str], Answer | None] = lambda job_id: None
        self.hang_s = 5.0
        self.posted = threading.Event()
        self.first_state = "running"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def variable(self) -> str:
        """What a worker's DAGRELAY_SERVICE_<ID> holds for it."""
        return json.dumps(
            {"url": f"{self.url}/api", "token": self.token, "min_interval_s": 0.05, "read_timeout_s": 2}
        )

    def start(self) -> FakeService:
        """Listen; after a `stop`, on the same port again."""
        handler = type("Handler", (_Handler,), {"service": self})
        ThreadingHTTPServer.request_queue_size = 256
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Refuse connections; the jobs stay."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> FakeService:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def end(self, job_id: str, state: str = "succeeded", **more: Any) -> None:
        """End a job, as the service would."""
        with self._lock:
            self.jobs[job_id] |= {"state": state, **more}

    def submit(self, key: str | None, body: Any) -> tuple[Fault, str]:
        """Handle one POST; return the fault and the job's id."""
        with self._lock:
            self.posts.append((key, body))
            fault = self.fault(len(self.posts), body)
            if fault in ("lose", "422", "429"):
                return fault, ""
            if self.honours_keys and key in self.keys:
                return fault, self.keys[key]
            job_id = f"job-{len(self.jobs) + 1}"
            self.jobs[job_id] = {"id": job_id, "state": self.first_state, "body": body}
            if key is not None:
                self.keys[key] = job_id
            reference = body.get("ref") if isinstance(body, dict) else None
            if isinstance(reference, str):
                self.references.setdefault(reference, []).append(job_id)
            return fault, job_id


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    service: FakeService

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _say(self, status: int, value: Any, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _drop(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _taken(self) -> str | None:
        """Note the request; return its path within the API, or None where the answer was given here."""
        self.service.requests.append((self.command, self.path, dict(self.headers.items())))
        if self.headers.get("Authorization") != f"Bearer {self.service.token}":
            self._say(401, {"error": "who are you?"})
            return None
        path = urlsplit(self.path).path
        if not path.startswith("/api/jobs"):
            self._say(404, {"error": f"no {path}"})
            return None
        return unquote(path.removeprefix("/api/jobs").strip("/"))

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._taken() is None:
            return
        fault, job_id = self.service.submit(self.headers.get("Idempotency-Key"), json.loads(text or b"null"))
        self.service.posted.set()
        if fault in ("drop", "lose"):
            self._drop()
        elif fault == "422":
            self._say(422, {"error": "no such train", "token": self.service.token})
        elif fault == "429":
            self._say(429, {"error": "slowly"}, Retry_After="1")
        elif fault == "500":
            self._say(500, {"error": "oh"})
        elif fault == "nonsense":
            self._say(201, b"<html>created</html>")
        else:
            if fault == "hang":
                time.sleep(self.service.hang_s)
            self._say(201, {"id": job_id, "state": "queued"})

    def do_GET(self) -> None:
        job_id = self._taken()
        if job_id is None:
            return
        if not job_id:
            self.service.finds += 1
            reference = parse_qs(urlsplit(self.path).query).get("ref", [""])[0]
            ids = self.service.references.get(reference, [])
            self._say(
                200, {"jobs": [{"id": one} for one in ids if self.service.finds > self.service.found_after]}
            )
            return
        self.service.looks[job_id] += 1
        answer = self.service.answer(job_id)
        if answer is not None:
            status, headers, body = answer
            self._say(status, body, **headers)
        elif job_id in self.service.jobs:
            self._say(200, self.service.jobs[job_id])
        else:
            self._say(404, {"error": "no such job"})

    def do_DELETE(self) -> None:
        job_id = self._taken()
        if job_id is None:
            return
        self.service.cancels.append(job_id)
        if self.service.cancel_status < 400 and job_id in self.service.jobs:
            self.service.jobs[job_id]["state"] = "cancelled"
        self._say(self.service.cancel_status, {})
