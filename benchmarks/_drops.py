"""A proxy in a process of its own that loses every tenth answer to a trigger, after Airflow made the run.

The connection is closed instead, as when a load balancer is restarted or a cable is pulled: the caller sees a
reset, and cannot know. Each connection of a client is one to Airflow; nothing else is changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import ClassVar
from urllib.parse import urlsplit

from local.process import ROOT, Process, clean_env

EVERY = 10
LARGEST_HEAD = 1 << 16


class Drops:
    """The proxy on a free loopback port; `with Drops(airflow.url) as proxy:`."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "proxy.log"
        self._process: Process | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def conn_uri(self, username: str, password: str) -> str:
        """Return the value of AIRFLOW_CONN_…"""
        return f"http://{username}:{password}@127.0.0.1:{self._port}"

    def counts(self) -> tuple[int, int]:
        """Return how many runs were made through it so far, and how many of those answers were lost."""
        with urllib.request.urlopen(f"{self.url}/drops", timeout=10) as answer:  # noqa: S310 - our own
            made, lost = json.load(answer)
            return int(made), int(lost)

    def __enter__(self) -> Drops:
        argv = [sys.executable, "-m", "benchmarks._drops", self._target]
        self._process = Process(argv, log=self._log, env=clean_env(), cwd=ROOT, name="proxy")
        self._process.wait_until(lambda: "\n" in self._log.read_text(), timeout_s=20, what="listening")
        self._port = int(self._log.read_text().split()[0])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.stop()
        self._folder.cleanup()


class _Between:
    """One client's connection and its own to Airflow."""

    made: ClassVar[int] = 0
    lost: ClassVar[int] = 0
    host: ClassVar[str] = ""
    port: ClassVar[int] = 0

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def serve(self) -> None:
        """Pass on requests and answers until one of the sides has gone, or an answer is lost."""
        behind: asyncio.StreamWriter | None = None
        try:
            answers, behind = await asyncio.open_connection(self.host, self.port, limit=LARGEST_HEAD)
            while request := await _message(self._reader):
                if request.startswith(b"GET /drops "):
                    await self._tell()
                    continue
                behind.write(request)
                answer = await _message(answers)
                if not answer or (_makes_run(request, answer) and self._loses()):
                    break
                self._writer.write(answer)
                await self._writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for writer in (self._writer, behind):
                if writer is not None:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()

    def _loses(self) -> bool:
        _Between.made += 1
        lose = _Between.made % EVERY == 0
        _Between.lost += lose
        return lose

    async def _tell(self) -> None:
        body = json.dumps([self.made, self.lost]).encode()
        self._writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await self._writer.drain()


def _makes_run(request: bytes, answer: bytes) -> bool:
    head = request.split(b"\r\n", 1)[0]
    return head.startswith(b"POST ") and b"/dagRuns " in head and answer.split(b" ", 2)[1] == b"200"


async def _message(reader: asyncio.StreamReader) -> bytes:
    """Return one whole request or answer; empty when the other side has gone in between."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as exc:
        if exc.partial:
            raise
        return b""
    fields = head.lower()
    if b"\r\ntransfer-encoding: chunked" in fields:
        return head + await _chunks(reader)
    at = fields.find(b"\r\ncontent-length:")
    length = int(fields[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
    return head + (await reader.readexactly(length) if length else b"")


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """Return a body in chunks as it came, to its end: RFC 9112, section 7.1, without trailers."""
    body = b""
    while True:
        line = await reader.readline()
        rest = await reader.readexactly(int(line.split(b";")[0], 16) + 2)
        body += line + rest
        if rest == b"\r\n":
            return body


async def _serve(target: str) -> None:
    parts = urlsplit(target)
    _Between.host, _Between.port = parts.hostname or "", parts.port or 80
    server = await asyncio.start_server(
        lambda reader, writer: _Between(reader, writer).serve(),
        "127.0.0.1",
        0,
        backlog=1024,
        limit=LARGEST_HEAD,
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
