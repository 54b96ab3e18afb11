"""An Airflow 3 that takes 20 ms for everything and next to no CPU: raw HTTP on asyncio, in its own process.

It speaks the few endpoints that a trigger needs, keeps no runs, and answers every POST of one as made. A GET
of /stub?N says how many POSTs of runs have come, and when the Nth and the last. `tests.fake_airflow` knows
the faults of a real one, and is too slow to measure against.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from local.process import ROOT, Process, clean_env

LATENCY_S = 0.02
TOKEN = "a-token"


class Stub:
    """The server on a free loopback port; `with Stub() as stub:`."""

    def __init__(self, latency_s: float = LATENCY_S) -> None:
        self._latency_s = latency_s
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "stub.log"
        self._process: Process | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def runs_url(self) -> str:
        """Where a naive caller posts to."""
        return f"{self.url}/api/v2/dags/daily_sales/dagRuns"

    def conn_uri(self, **extras: object) -> str:
        """Return the value of AIRFLOW_CONN_…"""
        query = "&".join(f"{name}={value}" for name, value in {"token": TOKEN, **extras}.items())
        return f"http://127.0.0.1:{self.port}/?{query}"

    def posts(self, nth: int = 1) -> tuple[int, float, float]:
        """Return how many POSTs of runs have come, and when the nth and the last came (monotonic)."""
        with urllib.request.urlopen(f"{self.url}/stub?{nth}", timeout=10) as answer:  # noqa: S310 - our own
            count, at, last = json.load(answer)
            return int(count), float(at), float(last)

    def wait_for(self, posts: int, *, timeout_s: float = 300) -> int:
        """Wait until that many POSTs have come; return how many have."""
        deadline = time.monotonic() + timeout_s
        while (count := self.posts()[0]) < posts:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{count} of {posts} POSTs after {timeout_s:g} s")
            time.sleep(0.05)
        return count

    def __enter__(self) -> Stub:
        argv = [sys.executable, "-m", "benchmarks.stub", str(self._latency_s)]
        self._process = Process(argv, log=self._log, env=clean_env(), cwd=ROOT, name="stub")
        self._process.wait_until(lambda: "\n" in self._log.read_text(), timeout_s=20, what="listening")
        self.port = int(self._log.read_text().split()[0])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.stop()
        self._folder.cleanup()


class _Connection(asyncio.Protocol):
    latency_s = LATENCY_S
    came_at: ClassVar[list[float]] = []

    def __init__(self) -> None:
        self._seen = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._seen += data
        while True:
            end = self._seen.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._seen[:end]
            at = head.lower().find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._seen) < end + 4 + length:
                return
            body = self._seen[end + 4 : end + 4 + length]
            self._seen = self._seen[end + 4 + length :]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        method, path = head.split(b" ", 2)[:2]
        latency_s, status = _Connection.latency_s, b"200 OK"
        answer: Any
        if path.startswith(b"/stub?"):
            latency_s, came_at = 0.0, _Connection.came_at
            nth = int(path[6:])
            answer = [len(came_at), came_at[nth - 1] if len(came_at) >= nth else 0.0, (came_at or [0.0])[-1]]
        elif path == b"/api/v2/version":
            answer = {"version": "3.3.2", "git_version": None}
        elif path == b"/auth/token":
            status, answer = b"201 Created", {"access_token": TOKEN}
        elif method == b"POST" and path.endswith(b"/dagRuns"):
            _Connection.came_at.append(time.monotonic())
            given = json.loads(body)
            answer = {
                "dag_id": path.split(b"/")[-2].decode(),
                "dag_run_id": given["dag_run_id"],
                "state": "queued",
                "conf": given.get("conf") or {},
                "logical_date": given.get("logical_date"),
                "run_after": "2026-11-20T00:00:00Z",
                "queued_at": "2026-11-20T00:00:00Z",
                "start_date": None,
                "end_date": None,
                "note": given.get("note"),
                "run_type": "manual",
            }
        else:
            status, answer = b"404 Not Found", {"detail": "Not Found"}
        raw = json.dumps(answer).encode()
        reply = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
            status,
            len(raw),
            raw,
        )
        if latency_s:
            asyncio.get_running_loop().call_later(latency_s, self._write, reply)
        else:
            self._write(reply)

    def _write(self, reply: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(reply)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    _Connection.latency_s = float(sys.argv[1])
    asyncio.run(_serve())
