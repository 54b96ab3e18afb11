"""What waiting costs: 200 000 delayed tasks parked in Redis, and a worker beside them.

Start, stop and memory are those of our real app, with and without the parked tasks, in turn. Lateness is from
the due time until the task begins, and sending on early until all of them are in their queue (`wake_10000_s`)
and until all have run (`wake_10000_ran_s`), with the 200 000 still parked. Stock Celery holds what is delayed
in the worker's memory, so it gets fewer (`stock_parked`), and has no way to send one on early.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis

from local.valkey import Valkey
from tests import transport_alone
from tests.plain_worker import NAMESPACE, PlainWorker, memory_mb, message, push
from tests.worker import Worker

from ._report import Bound, quantile, report, say
from .stub import Stub

transport_alone.make_importable()

from tasks.redis_transport import Keys, Lot  # noqa: E402
from tasks.redis_transport.scripts import PARK  # noqa: E402

ROUNDS = 3
PARKED, DUE, DUE_WITHIN_S, WOKEN = 200_000, 20_000, 10.0, 10_000
STOCK_PARKED = 20_000
DAY_S = 86_400.0


def main() -> int:
    """Measure and report."""
    with tempfile.TemporaryDirectory() as folder:
        figures = {"parked": PARKED} | start_and_stop(Path(folder))
        say(str(figures))
        figures |= due_and_woken(Path(folder))
        say(str(figures))
        figures |= stock(Path(folder))
    bounds = [
        Bound("start_s", at_most=3),
        Bound("stop_s", at_most=2),
        Bound("more_memory_mb", at_most=10),
        Bound("late_p99_s", at_most=0.5),
        Bound("wake_10000_s", at_most=2),
    ]
    return report("parked", figures, bounds)


def park(client: redis.Redis, keys: Keys, due: Iterable[tuple[str, float, bytes]], queue: str) -> None:
    """Park messages as a worker would: (task id, due, message)."""
    pipe = client.pipeline(transaction=False)
    client.script_load(PARK.lua)
    for number, (task_id, at, each) in enumerate(due, 1):
        PARK(
            pipe,
            (keys.parked, keys.due, keys.held(""), keys.cancelled),
            (task_id, f"{at:.6f}", 0, queue, each, ""),
        )
        if number % 2000 == 0:
            pipe.execute()
    pipe.execute()


def ids(count: int) -> list[str]:
    return [str(uuid.uuid4()) for _ in range(count)]


def far(task: str, queue: str) -> Iterable[tuple[str, float, bytes]]:
    """As many as are parked, due some time tomorrow."""
    now = time.time()
    for number, task_id in enumerate(ids(PARKED)):
        yield task_id, now + DAY_S + number, message(task, queue=queue, task_id=task_id)


def start_and_stop(folder: Path) -> dict[str, Any]:
    """Start and stop our app, in turn beside an empty Redis and beside one with all that is parked."""
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        stub = stack.enter_context(Stub())
        empty, full = stack.enter_context(Valkey()), stack.enter_context(Valkey())
        client = redis.Redis.from_url(full.url)
        say(f"parking {PARKED}")
        park(client, Keys(namespace="dagrelay"), far("tasks.trigger_dag", "triggers"), "triggers")
        for number in range(ROUNDS):
            for name, valkey in {"idle_": empty, "": full}.items():
                worker = Worker(
                    valkey.url, folder, connections={"default": stub.conn_uri()}, name=f"s{name}{number}"
                )
                began = time.monotonic()
                worker.start()
                started = time.monotonic() - began
                time.sleep(3)
                memory = memory_mb(worker.pid)
                began = time.monotonic()
                if worker.stop() != 0:
                    raise RuntimeError("the worker did not end well")
                stopped = time.monotonic() - began
                say(f"{name or 'parked_'}{number}: start {started:.2f} stop {stopped:.2f} {memory:.1f} MB")
                for what, value in (("start_s", started), ("stop_s", stopped), ("memory_mb", memory)):
                    found.setdefault(f"{name}{what}", []).append(value)
        if client.zcard("dagrelay:due") != PARKED:
            raise RuntimeError("not all are parked any more")
    median = {name: round(statistics.median(values), 2) for name, values in found.items()}
    more = statistics.median(a - b for a, b in zip(found["memory_mb"], found["idle_memory_mb"], strict=True))
    return median | {"more_memory_mb": round(more, 2)}


def lines(file: Path) -> list[float]:
    """What the tasks have written."""
    return [float(line) for line in file.read_text().split()]


def wait_for_lines(file: Path, count: int, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while (there := file.read_text().count("\n")) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{there} of {count} tasks have run")
        time.sleep(0.01)


def due_and_woken(folder: Path) -> dict[str, Any]:
    """How late what is due runs, and how soon what is sent on early."""
    p50, p99, worst, woken, ran = [], [], [], [], []
    with Valkey() as valkey:
        client = redis.Redis.from_url(valkey.url)
        keys = Keys(namespace=NAMESPACE)
        lot = Lot(client, keys)
        say(f"parking {PARKED}")
        park(client, keys, far("late", "celery"), "celery")
        file = folder / "late"
        for number in range(ROUNDS):
            file.write_text("")
            with PlainWorker("ours", valkey.url, folder, name=f"due{number}", PLAIN_FILE=str(file)):
                first = time.time() + 6
                step = DUE_WITHIN_S / DUE
                park(
                    client,
                    keys,
                    (
                        (
                            task_id,
                            first + each * step,
                            message("late", (first + each * step,), task_id=task_id),
                        )
                        for each, task_id in enumerate(ids(DUE))
                    ),
                    "celery",
                )
                if time.time() > first:
                    raise RuntimeError("parking took too long")
                wait_for_lines(file, DUE)
                late = lines(file)
                p50.append(quantile(late, 0.5))
                p99.append(quantile(late, 0.99))
                worst.append(max(late))

                file.write_text("")
                early = ids(WOKEN)
                park(
                    client,
                    keys,
                    (
                        (task_id, time.time() + DAY_S, message("late", (0,), task_id=task_id))
                        for task_id in early
                    ),
                    "celery",
                )
                time.sleep(0.5)
                began = time.monotonic()
                if lot.wake(early) != WOKEN:
                    raise RuntimeError("not all were parked")
                while client.zcard(keys.due) > PARKED:
                    time.sleep(0.005)
                woken.append(time.monotonic() - began)
                wait_for_lines(file, WOKEN)
                ran.append(time.monotonic() - began)
            say(f"round {number + 1}: late p99 {p99[-1]:.3f}, woken {woken[-1]:.2f}, ran {ran[-1]:.2f}")
    return {
        "late_p50_s": round(statistics.median(p50), 3),
        "late_p99_s": round(statistics.median(p99), 3),
        "late_worst_s": round(statistics.median(worst), 3),
        "wake_10000_s": round(statistics.median(woken), 2),
        "wake_10000_ran_s": round(statistics.median(ran), 2),
    }


def stock(folder: Path) -> dict[str, Any]:
    """The same of stock Celery with fewer, once."""
    say(f"stock, with {STOCK_PARKED}")
    with Valkey() as valkey:
        client = redis.Redis.from_url(valkey.url)
        file = folder / "stock-late"
        file.write_text("")
        with PlainWorker("stock", valkey.url, folder, name="idle") as worker:
            time.sleep(3)
            idle_mb = memory_mb(worker.pid)
        eta = datetime.fromtimestamp(time.time() + DAY_S, UTC).isoformat()
        push(client, "celery", (message("late", (0,), eta=eta) for _ in range(STOCK_PARKED)))
        worker = PlainWorker("stock", valkey.url, folder, name="parked")
        began = time.monotonic()
        with worker:
            ready = time.monotonic() - began
            while client.hlen(f"{NAMESPACE}:unacked") < STOCK_PARKED:
                time.sleep(0.05)
            taken = time.monotonic() - began
            time.sleep(1)
            memory = memory_mb(worker.pid)
            began = time.monotonic()
            worker.process.stop()
            stopped = time.monotonic() - began
        client.flushall()
        with PlainWorker("stock", valkey.url, folder, name="due", PLAIN_FILE=str(file)):
            first = time.time() + 40  # it takes them into its memory first
            step = DUE_WITHIN_S / DUE
            dues = [first + each * step for each in range(DUE)]
            push(
                client,
                "celery",
                (message("late", (due,), eta=datetime.fromtimestamp(due, UTC).isoformat()) for due in dues),
            )
            wait_for_lines(file, DUE, 300)
    return {
        "stock_parked": STOCK_PARKED,
        "stock_start_s": round(ready, 2),
        "stock_start_until_taken_s": round(taken, 2),
        "stock_stop_s": round(stopped, 2),
        "stock_more_memory_mb": round(memory - idle_mb, 1),
        "stock_late_p99_s": round(quantile(lines(file), 0.99), 3),
        "stock_wake_10000_s": None,
    }


if __name__ == "__main__":
    sys.exit(main())
