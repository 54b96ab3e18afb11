"""How many triggers a worker gets through: `trigger_dag` with all of our machinery, beside the naive task.

Both have 64 threads in one process, an Airflow that takes 20 ms (`benchmarks.stub`), and a backlog that lay
in Redis before the worker was started; the stub counts the rate, from one POST in the midst of it to the
last. Ours checks each message, asks whether the connection is held, keeps record and result, sends events and
logs each outcome; the naive one is `requests.post` in a stock Celery task as it comes: no results, no events,
early acknowledgement, logging at WARNING.

`make bench NAME=dispatch ARGS=--others` also has dramatiq (64 threads, kept-alive connections) and taskiq (64
tasks on asyncio, aiohttp; a stream, which acknowledges, and a list, which loses what a killed worker has) do
the same POST on the same Redis, in an environment that it makes with pip: the network is needed for it.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from local.process import ROOT, STATE, Process, clean_env
from local.valkey import Valkey
from producers import TriggerRequest, configure, trigger_dag
from tests.plain_worker import PlainWorker, cpu_s, left, message, push
from tests.worker import Worker

from ._report import Bound, report, say
from .stub import Stub

ROUNDS = 3
THREADS = 64
TASKS, WARM_UP = 5_000, 500
CONF = {"day": "2026-11-20", "region": "north", "rows": 1200, "full": True}
OTHERS = {"dramatiq": "dramatiq", "taskiq": "taskiq", "taskiq_list": "taskiq"}
PACKAGES = ("dramatiq[redis]", "taskiq", "taskiq-redis", "requests", "aiohttp")

Way = Callable[[Valkey, Stub, Path], "contextlib.AbstractContextManager[int]"]
"""Puts the backlog into Redis, then starts the worker; yields its pid. At the end it checks the outcome."""


@contextlib.contextmanager
def ours(valkey: Valkey, stub: Stub, folder: Path) -> Iterator[int]:
    """`celery -A tasks worker`, and requests accepted by the producers' library."""
    configure(redis_url=valkey.url)
    client = redis.Redis.from_url(valkey.url)
    began = time.time_ns()
    trigger_dag.delay_many(
        TriggerRequest("daily_sales", conf=CONF, key=f"{began}-{number}") for number in range(TASKS + WARM_UP)
    )
    with Worker(
        valkey.url,
        folder,
        connections={"default": stub.conn_uri(max_in_flight=THREADS)},
        DAGRELAY_WORKER_CONCURRENCY=str(THREADS),
    ) as worker:
        yield worker.pid
    done = sum(client.hget(key, "state") == b"done" for key in client.scan_iter("dagrelay:record:*", 5000))
    if done != TASKS + WARM_UP:
        raise RuntimeError(f"{done} of {TASKS + WARM_UP} requests are on record as done")


@contextlib.contextmanager
def naive(valkey: Valkey, stub: Stub, folder: Path) -> Iterator[int]:
    """`requests.post` in a stock Celery task."""
    client = redis.Redis.from_url(valkey.url)
    push(client, "celery", (message("naive", (number,)) for number in range(TASKS + WARM_UP)))
    with PlainWorker(
        "stock",
        valkey.url,
        folder,
        options=("-P", "threads", "-c", str(THREADS)),
        conf={"task_acks_late": False},
        PLAIN_POST_URL=stub.runs_url,
    ) as worker:
        yield worker.pid
    if left(client):
        raise RuntimeError("messages are left")


def other(name: str) -> Way:
    """Another framework, in the environment made for it."""

    @contextlib.contextmanager
    def running(valkey: Valkey, stub: Stub, folder: Path) -> Iterator[int]:
        env = clean_env(URL=valkey.url, POST_URL=stub.runs_url, TASKIQ_BROKER=name)
        module = f"benchmarks.others.{OTHERS[name]}_app"
        bin_folder = STATE / "bench-others" / "bin"
        subprocess.run(
            [bin_folder / "python", "-m", module, str(TASKS + WARM_UP)], cwd=ROOT, env=env, check=True
        )
        argv: list[str | Path]
        if name == "dramatiq":
            argv = [bin_folder / "dramatiq", module, "--processes", "1", "--threads", str(THREADS)]
        else:
            argv = [bin_folder / "taskiq", "worker", f"{module}:broker", "--workers", "1"]
            argv += ["--max-async-tasks", str(THREADS), "--log-level", "WARNING"]
        process = Process(argv, log=folder / f"{name}.log", cwd=ROOT, env=env, name=name)
        try:
            yield process.pid
        finally:
            process.stop()

    return running


def make_others() -> None:
    """Make the environment for the other frameworks, once."""
    folder = STATE / "bench-others"
    if (folder / "made").exists():
        return
    say(f"installing {', '.join(PACKAGES)}")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", *PACKAGES], check=True)
    (folder / "made").touch()


@dataclass
class Found:
    """What was measured of one way, round by round."""

    per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


def measure(way: Way, found: Found) -> None:
    """Have one worker do the backlog; note tasks per second, and its CPU for each."""
    with tempfile.TemporaryDirectory() as folder, Valkey() as valkey, Stub() as stub:
        with way(valkey, stub, Path(folder)) as pid:
            first = stub.wait_for(WARM_UP)
            cpu = tree_cpu_s(pid)
            stub.wait_for(TASKS + WARM_UP)
            cpu = tree_cpu_s(pid) - cpu
            count, began, ended = stub.posts(WARM_UP)
            time.sleep(0.5)
        if count != TASKS + WARM_UP:
            raise RuntimeError(f"{count} POSTs came for {TASKS + WARM_UP} tasks")
        found.per_s.append(TASKS / (ended - began))
        found.cpu_ms.append(cpu / (count - first) * 1000)


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and everything below it: the other frameworks have a parent process."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            below.setdefault(parent, []).append(int(stat.parent.name))
    total, todo = 0.0, [pid]
    while todo:
        one = todo.pop()
        with contextlib.suppress(OSError):
            total += cpu_s(one)
        todo += below.get(one, [])
    return total


def main() -> int:
    """Measure and report."""
    ways: dict[str, Way] = {"ours": ours, "naive": naive}
    if "--others" in sys.argv[1:]:
        make_others()
        ways |= {name: other(name) for name in OTHERS}
    found = {name: Found() for name in ways}
    for number in range(ROUNDS):
        for name, way in ways.items():
            measure(way, found[name])
            say(f"round {number + 1} of {ROUNDS}: {name} {found[name].per_s[-1]:.0f}/s")

    def ratio(name: str) -> float:
        pairs = zip(found["ours"].per_s, found[name].per_s, strict=True)
        return round(statistics.median(mine / theirs for mine, theirs in pairs), 2)

    figures: dict[str, Any] = {f"ratio_vs_{name}": ratio(name) for name in ways if name != "ours"}
    for name in ways:
        prefix = "" if name == "ours" else f"{name}_"
        figures[f"{prefix}per_s"] = round(statistics.median(found[name].per_s))
        figures[f"{prefix}cpu_ms"] = round(statistics.median(found[name].cpu_ms), 3)
    return report("dispatch", figures, [Bound("ratio_vs_naive", at_least=1.2)])


if __name__ == "__main__":
    sys.exit(main())
