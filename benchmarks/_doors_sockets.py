"""The TCP door: what idle connections cost, how many lines a second it takes, what it cuts off."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from local.process import ROOT, Process, clean_env, free_port
from local.valkey import Valkey
from producers.client import RelayClient
from producers.settings import ProducerSettings
from producers.socket_listener import files_for

from ._report import say

IDLE = 5000
SENDERS = 50
LINES = 20_000
ROUNDS = 3
CUT_OFF_AFTER_S = 2


def measure() -> dict[str, Any]:
    """Return the figures."""
    files_for(IDLE + 200)
    with tempfile.TemporaryDirectory() as folder, Valkey() as valkey:
        port = free_port()
        log = Path(folder) / "door.log"
        options = ("--insecure", "--port", str(port), "--per-address", str(IDLE + 100))
        door = Process(
            [
                *(sys.executable, "-m", "producers.cli", "socket", *options),
                *("--line-timeout", str(CUT_OFF_AFTER_S)),
            ],
            log=log,
            env=clean_env(PYTHONPATH=str(ROOT), DAGRELAY_REDIS_URL=valkey.url),
            name="door",
        )
        try:
            door.wait_until(lambda: "listening" in log.read_text(), timeout_s=30, what="listening")
            relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="benchmark"))
            before = _rss_mb(door.pid)
            figures = asyncio.run(_idle(port, door.pid))
            say(f"without connections {before:.0f} MB, with them {figures['idle_rss_mb']} MB")
            figures["idle_rss_mb_without"] = round(before, 1)
            figures |= asyncio.run(_rate(port))
            figures["socket_lost"] = figures["socket_answered"] - relay.redis.llen("triggers")
            figures |= {"slow_cut_off_s": _slow(port), "oversized_cut_off_bytes": _oversized(port)}
            relay.redis.close()
        finally:
            door.stop()
    return figures


async def _idle(port: int, pid: int) -> dict[str, Any]:
    """Hold connections that have each had one answer; then say nothing for a while."""
    open_ones = []
    began = time.monotonic()
    for start in range(0, IDLE, 200):
        some = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(200)))
        for number, (_, writer) in enumerate(some):
            writer.write(b'{"dag_id": "idle", "id": "%d"}\n' % (start + number))
        for reader, _ in some:
            if not (await reader.readline()).startswith(b"OK "):
                raise RuntimeError("a connection was not let in")
        open_ones += some
    opened_s = time.monotonic() - began
    cpu = _cpu_s(pid)
    await asyncio.sleep(10)
    figures = {
        "idle_connections": len(open_ones) - sum(reader.at_eof() for reader, _ in open_ones),
        "idle_rss_mb": round(_rss_mb(pid), 1),
        "idle_cpu_percent": round((_cpu_s(pid) - cpu) * 10, 2),
        "idle_opened_per_s": round(IDLE / opened_s),
    }
    for _, writer in open_ones:
        writer.close()
    return figures


async def _rate(port: int) -> dict[str, Any]:
    """Lines a second: of senders that wait for each answer, and of one that sends all at once."""

    async def waits_for_each() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(LINES // SENDERS):
            writer.write(b'{"dag_id": "sales", "conf": {"day": "2026-11-20", "rows": 1200}}\n')
            if not (await reader.readline()).startswith(b"OK "):
                raise RuntimeError("a line was not taken")
        writer.close()

    async def sends_all() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b'{"dag_id": "sales", "conf": {"day": "2026-11-20", "rows": 1200}}\n' * LINES)
        for _ in range(LINES):
            if not (await reader.readline()).startswith(b"OK "):
                raise RuntimeError("a line was not taken")
        writer.close()

    found: dict[str, list[float]] = {"waiting": [], "pipelined": []}
    for _ in range(ROUNDS):
        began = time.monotonic()
        await asyncio.gather(*(waits_for_each() for _ in range(SENDERS)))
        found["waiting"].append(LINES / (time.monotonic() - began))
        began = time.monotonic()
        await sends_all()
        found["pipelined"].append(LINES / (time.monotonic() - began))
    say(f"lines a second: {found}")
    return {
        "socket_per_s": round(statistics.median(found["waiting"])),
        "socket_pipelined_per_s": round(statistics.median(found["pipelined"])),
        "socket_answered": IDLE + 2 * ROUNDS * LINES,
    }


def _slow(port: int) -> float:
    """Seconds until a sender that never ends its line is cut off."""
    with socket.create_connection(("127.0.0.1", port)) as slow:
        began = time.monotonic()
        slow.settimeout(0.05)
        while True:
            with contextlib.suppress(TimeoutError):
                if slow.recv(100).startswith(b"ERR line"):
                    return round(time.monotonic() - began, 2)
                raise RuntimeError("it was let go without a word")
            slow.sendall(b"{")


def _oversized(port: int) -> int:
    """Bytes of an endless line that can be sent before it is cut off, those in the system's buffers too."""
    with socket.create_connection(("127.0.0.1", port)) as greedy:
        sent = 0
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while sent < 1 << 30:
                sent += greedy.send(b"{" * (1 << 16))
        return sent


def _rss_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
