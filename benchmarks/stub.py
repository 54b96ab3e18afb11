"""An Airflow 3 that takes 20 ms for everything and next to no CPU: raw HTTP on asyncio, in its own process.

It is a service of jobs too: a POST of /jobs makes one (one for each Idempotency-Key at /keyed/jobs), a GET of
/jobs/ID says that it runs. /stub/looks tells how long it was between two GETs of the same job, since asked
last; /stub/jobs which references jobs were made for.

It speaks the few endpoints that a trigger needs, keeps no runs, and answers every POST of one as made. A GET
of /stub?N says how many POSTs of runs have come, and when the Nth and the last. `tests.fake_airflow` knows
the faults of a real one, and is too slow to measure against.
"""

from __future__ import annotations

import asyncio
import json
import re
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

    def looks(self, *, keep: bool = False) -> dict[str, Any]:
        """Return what came since this was asked last (without `keep`): `jobs` that were looked at, `looks`,
        `gaps` in seconds between two looks at the same job, `at_once`: how often two of them overlapped."""
        how = "keep" if keep else "looks"
        with urllib.request.urlopen(f"{self.url}/stub/{how}", timeout=60) as answer:  # noqa: S310 - our own
            found: dict[str, Any] = json.load(answer)
            return found

    def jobs(self) -> dict[str, int]:
        """Return for how many jobs each reference was used."""
        with urllib.request.urlopen(f"{self.url}/stub/jobs", timeout=60) as answer:  # noqa: S310 - our own
            found: dict[str, int] = json.load(answer)
            return found

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
    looked_at: ClassVar[dict[bytes, float]] = {}
    gaps: ClassVar[list[float]] = []
    seen: ClassVar[set[bytes]] = set()
    looks: ClassVar[int] = 0
    at_once: ClassVar[int] = 0
    by_key: ClassVar[dict[str, str]] = {}
    references: ClassVar[dict[str, int]] = {}

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
        elif method == b"GET" and path.startswith(b"/jobs/"):
            answer = self._look(path, latency_s)
        elif method == b"POST" and path.endswith(b"/jobs"):
            status, answer = b"201 Created", {"id": self._job(head, body, keyed=path.startswith(b"/keyed"))}
        elif path in (b"/stub/looks", b"/stub/keep"):
            latency_s, answer = 0.0, self._looks(keep=path.endswith(b"keep"))
        elif path == b"/stub/jobs":
            latency_s, answer = 0.0, _Connection.references
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

    def _look(self, path: bytes, latency_s: float) -> Any:
        now, last = time.monotonic(), _Connection.looked_at.get(path)
        if last is not None:
            _Connection.gaps.append(now - last)
            _Connection.at_once += now - last < latency_s
        _Connection.looked_at[path] = now
        _Connection.seen.add(path)
        _Connection.looks += 1
        return {"id": path[6:].decode(), "state": "running", "progress": None}

    def _looks(self, *, keep: bool) -> Any:
        gaps = [] if keep else [round(gap, 4) for gap in _Connection.gaps]
        answer = {
            "jobs": len(_Connection.seen),
            "looks": _Connection.looks,
            "at_once": _Connection.at_once,
            "gaps": gaps,
        }
        if not keep:
            _Connection.gaps, _Connection.seen = [], set()
            _Connection.looks = _Connection.at_once = 0
        return answer

    def _job(self, head: bytes, body: bytes, *, keyed: bool) -> str:
        """Make a job. `keyed`: the same idempotency key is the same job."""
        found = re.search(rb"(?i)\r\nidempotency-key: *([^\r]+)", head)
        key = found[1].decode() if found else ""
        if keyed and key in _Connection.by_key:
            return _Connection.by_key[key]
        reference = str(json.loads(body or b"{}").get("reference", key))
        _Connection.references[reference] = _Connection.references.get(reference, 0) + 1
        _Connection.by_key[key] = f"job-{sum(_Connection.references.values())}"
        return _Connection.by_key[key]

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
