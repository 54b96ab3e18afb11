"""Requests per second of one gateway process, beside a bare FastAPI route that does one LPUSH.

Both under uvicorn with the same parts, before the same Valkey, in turn; one is idle while the other works. A
process of its own sends, over connections that it keeps, each request as soon as the last is answered.
The gateway checks a key, reads and checks the request, writes its record and its message, and logs a line.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from local.process import ROOT, Process, clean_env, free_port
from local.valkey import Valkey
from producers.keys import new_key

from ._report import interleaved, quantile, say

ROUNDS = 7
SECONDS = 2.0
CONNECTIONS = 32
HALF_ROUNDS, HALF_SECONDS = 5, 4.0
CONF = {"day": "2026-11-20", "region": "north", "rows": 1200, "paths": ["a/b", "c/d"], "full": True}
BODY = json.dumps({"conf": CONF}).encode()


class _Sender(asyncio.Protocol):
    """One connection: sends a request, waits for its answer, and so on; or one whenever it is told to."""

    def __init__(self, request: bytes, on_answer: Any) -> None:
        self._request, self._on_answer = request, on_answer
        self._buffer = b""
        self._began = 0.0
        self.busy = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self, began: float) -> None:
        self._began, self.busy = began, True
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) < length:
            return
        if not head.startswith(b"HTTP/1.1 202"):
            raise SystemExit(f"not accepted: {self._buffer[:300]!r}")
        self._buffer, self.busy = b"", False
        self._on_answer(self, time.perf_counter() - self._began)


def request_bytes(port: int, token: str) -> bytes:
    """Return the one request that is sent again and again."""
    return (
        b"POST /v1/dags/daily_sales/runs HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s" % (port, token.encode(), len(BODY), BODY)
    )


async def send_on(port: int, token: str, seconds: float, per_s: float | None) -> list[float]:
    """Send for some seconds, as fast as it is answered or at a rate; return how long each answer took.

    At a rate the time counts from when a request was to be sent, also if no connection was free then.
    """
    took: list[float] = []
    loop = asyncio.get_running_loop()
    until = time.perf_counter() + seconds
    waiting: list[float] = []
    idle: list[_Sender] = []

    def on_answer(sender: _Sender, took_s: float) -> None:
        took.append(took_s)
        if per_s is None:
            if (now := time.perf_counter()) < until:
                sender.send(now)
        elif waiting:
            sender.send(waiting.pop(0))
        else:
            idle.append(sender)

    senders: list[_Sender] = []
    request = request_bytes(port, token)
    for _ in range(CONNECTIONS):
        _, sender = await loop.create_connection(partial(_Sender, request, on_answer), "127.0.0.1", port)
        senders.append(sender)
    if per_s is None:
        for sender in senders:
            sender.send(time.perf_counter())
    else:
        idle += senders
        due = time.perf_counter()
        while due < until:
            while due <= time.perf_counter():
                if idle:
                    idle.pop().send(due)
                else:
                    waiting.append(due)
                due += 1 / per_s
            await asyncio.sleep(max(0.0, min(due - time.perf_counter(), 0.001)))
    while time.perf_counter() < until or any(sender.busy for sender in senders):
        await asyncio.sleep(0.005)
    for sender in senders:
        sender._transport.close()
    return took


def send(port: int, token: str, seconds: float, per_s: float | None = None) -> list[float]:
    """Do as `send_on` does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._doors_http", str(port), str(seconds), str(per_s or 0)],
        cwd=ROOT,
        input=token.encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-2000:])
    found: list[float] = json.loads(done.stdout)
    return found


def _answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def measure() -> dict[str, Any]:
    """Return the figures of this door."""
    with tempfile.TemporaryDirectory() as name, Valkey() as valkey:
        folder = Path(name)
        token = new_key(folder / "keys.toml", "bench")
        ports = {"gateway": free_port(), "bare": free_port()}
        env = clean_env(
            PYTHONPATH=str(ROOT),
            REDIS_URL=valkey.url,
            DAGRELAY_REDIS_URL=valkey.url,
            DAGRELAY_GATEWAY_KEYS_FILE=str(folder / "keys.toml"),
            DAGRELAY_GATEWAY_PORT=str(ports["gateway"]),
        )
        commands = {
            "gateway": [sys.executable, "-m", "producers.cli", "gateway"],
            "bare": [sys.executable, "-m", "benchmarks._bare_http", str(ports["bare"])],
        }
        servers = {
            name: Process(argv, log=folder / f"{name}.log", env=env, cwd=ROOT, name=name)
            for name, argv in commands.items()
        }
        try:
            for name, server in servers.items():
                server.wait_until(partial(_answers, ports[name], "/livez"), timeout_s=30, what="answering")
            say(f"http: {ROUNDS} rounds of {SECONDS:g} s each, over {CONNECTIONS} connections")

            def per_second(port: int) -> float:
                return len(send(port, token, SECONDS)) / SECONDS

            ways = {name: partial(per_second, port) for name, port in ports.items()}
            interleaved(1, ways)
            found = interleaved(ROUNDS, ways)
            rate = {name: statistics.median(values) for name, values in found.items()}
            half = rate["gateway"] / 2
            say(f"http: latency at {half:.0f}/s")

            def latency(port: int) -> float:
                took = send(port, token, HALF_SECONDS, half)
                p50.append(quantile(took, 0.5))
                return quantile(took, 0.99)

            # In rounds, of which the middle one counts: one stall of the machine is a hundredth of a round.
            p50: list[float] = []
            p99 = interleaved(HALF_ROUNDS, {name: partial(latency, port) for name, port in ports.items()})
        finally:
            for server in servers.values():
                server.stop()
    ratios = [ours / theirs for ours, theirs in zip(found["gateway"], found["bare"], strict=True)]
    return {
        "ratio_http_vs_bare": round(statistics.median(ratios), 2),
        "http_per_s": round(rate["gateway"]),
        "bare_per_s": round(rate["bare"]),
        "http_p50_ms_at_half": round(statistics.median(p50[::2]) * 1e3, 1),
        "http_p99_ms_at_half": round(statistics.median(p99["gateway"]) * 1e3, 1),
        # At the same rate: how much of it is the machine's.
        "bare_p99_ms_at_that": round(statistics.median(p99["bare"]) * 1e3, 1),
    }


if __name__ == "__main__":
    _port, _seconds, _per_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    uvloop.install()
    print(json.dumps(asyncio.run(send_on(_port, sys.stdin.read(), _seconds, _per_s or None))))
