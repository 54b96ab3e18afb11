"""What the Redis transport costs a worker and its Redis, beside kombu's: one small app on both, in turn.

CPU per task: a backlog appears in one step (RENAME) before a worker of 64 threads with late acknowledgement,
and the process's CPU clock is read before and after. Commands count as clients send them, those inside a
script apart. Where a figure is of idle workers, both sides are measured at the same time.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import redis

from local.valkey import Valkey
from tests.plain_worker import PlainWorker, Side, cpu_s, left, message
from tests.worker import Worker

from ._report import Bound, quantile, report, say
from .stub import Stub

ROUNDS = 3
SIDES: tuple[Side, ...] = ("ours", "stock")
PREFIXES: dict[Side, str] = {"ours": "", "stock": "stock_"}
NOOPS, POSTS, WARM_UP = 20_000, 4_000, 500
IDLE_S = 30
FIRSTS, FIRST_PAUSE_S, LONG_FIRSTS, LONG_PAUSE_S = 40, 0.3, 4, 7.0
WORKERS, QUEUES, SPREAD = 20, ("one", "two", "three"), 300
SPREAD_EVERY_S, CALM_S = 0.02, 10


class Meter:
    """Reads what a Redis has done, and leaves out what it was asked here."""

    def __init__(self, url: str) -> None:
        self.client = redis.Redis.from_url(url)
        self.asked = 0

    def cpu_s(self) -> float:
        info = self._info("cpu")
        return float(info["used_cpu_user"] + info["used_cpu_sys"])

    def commands(self) -> int:
        """Commands that it has run, those inside scripts included, those asked here not."""
        stats = self._info("commandstats")
        return sum(int(each["calls"]) for each in stats.values()) - self.asked + 1

    def aof_bytes(self) -> int:
        return int(self._info("persistence")["aof_current_size"])

    def _info(self, section: str) -> dict[str, Any]:
        self.asked += 1
        found: dict[str, Any] = self.client.info(section)
        return found

    def wait_until_done(self) -> None:
        """Wait until no message is anywhere."""
        while True:
            self.asked += 4
            count = self.client.llen("celery") + self.client.hlen("plain:unacked")
            for pattern in ("plain:held:*", "plain:hand:*"):
                found = self.client.keys(pattern)
                count += len(found)
            if not count:
                return
            time.sleep(0.05)


def main() -> int:
    """Measure and report."""
    figures: dict[str, Any] = {}
    for name, measure in {
        "tasks": per_task,
        "idle": idle_cpu,
        "first": first_after_idle,
        "many": many_idle_workers,
    }.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        figures |= measure()
        say(str(figures))
    bounds = [
        Bound("ratio_cpu_noop", at_most=0.4),
        Bound("ratio_cpu_post", at_most=0.65),
        Bound("ratio_commands", at_most=1),
        Bound("ratio_redis_cpu", at_most=1),
        Bound("idle_cpu_percent", at_most=0.5),
        Bound("first_p50_ms", at_most=5),
        Bound("idle20_commands", at_most=4),
        Bound("idle20_aof_ratio", at_most=3),
    ]
    if sys.argv[1:]:  # a part, for a look: nothing is written
        print(figures)
        return 0
    return report("transport", figures, bounds)


def per_task() -> dict[str, Any]:
    """CPU, commands and Redis' CPU for each task: one that does nothing, and one that posts."""
    found: dict[str, dict[Side, list[float]]] = {}

    def note(name: str, side: Side, value: float) -> None:
        found.setdefault(name, {}).setdefault(side, []).append(value)

    with tempfile.TemporaryDirectory() as folder, Valkey() as valkey, Stub() as stub:
        for number in range(ROUNDS):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                say(f"round {number + 1} of {ROUNDS}: {side}")
                meter = Meter(valkey.url)
                meter.client.flushall()
                with PlainWorker(side, valkey.url, Path(folder), PLAIN_POST_URL=stub.runs_url) as worker:
                    for task, count in (("noop", NOOPS), ("post", POSTS)):
                        run(meter, worker, task, WARM_UP)
                        cost = run(meter, worker, task, count)
                        for name, value in cost.items():
                            note(f"{task}_{name}", side, value)
                meter.client.close()

    median = {
        (name, side): statistics.median(values)
        for name, sides in found.items()
        for side, values in sides.items()
    }

    def ratio(name: str) -> float:
        return round(statistics.median(map(over, found[name]["ours"], found[name]["stock"])), 3)

    return {
        "ratio_cpu_noop": ratio("noop_cpu_ms"),
        "ratio_cpu_post": ratio("post_cpu_ms"),
        "ratio_commands": ratio("noop_commands"),
        "ratio_redis_cpu": ratio("noop_redis_cpu_ms"),
        "ratio_redis_cpu_post": ratio("post_redis_cpu_ms"),
        **{
            f"{prefix}{task}_{what}": round(median[f"{task}_{what}", side], 4)
            for task in ("noop", "post")
            for what in ("cpu_ms", "per_s", "commands", "redis_cpu_ms")
            for side, prefix in PREFIXES.items()
        },
    }


def over(ours: float, stock: float) -> float:
    return ours / stock


def run(meter: Meter, worker: PlainWorker, task: str, count: int) -> dict[str, float]:
    """Have one worker run a backlog; return what each task of it has cost."""
    messages = [message(task, (number,)) for number in range(count)]
    push_staged(meter, messages)
    time.sleep(0.3)
    commands, redis_cpu = meter.commands(), meter.cpu_s()
    began, cpu = time.monotonic(), cpu_s(worker.pid)
    meter.asked += 1
    meter.client.rename("staged", "celery")
    meter.wait_until_done()
    took, cpu = time.monotonic() - began, cpu_s(worker.pid) - cpu
    return {
        "cpu_ms": cpu / count * 1000,
        "per_s": count / took,
        "redis_cpu_ms": (meter.cpu_s() - redis_cpu) / count * 1000,
        "commands": (meter.commands() - commands) / count,
    }


def push_staged(meter: Meter, messages: list[bytes]) -> None:
    for start in range(0, len(messages), 1000):
        meter.client.lpush("staged", *messages[start : start + 1000])


def idle_cpu() -> dict[str, Any]:
    """What an idle worker uses: our real app with its three queues, and a stock one with three."""
    found: dict[str, list[float]] = {"ours": [], "stock": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        Valkey() as valkey,
        Valkey() as other,
        Stub() as stub,
        Worker(valkey.url, Path(folder), connections={"default": stub.conn_uri()}) as ours,
        PlainWorker(
            "stock", other.url, Path(folder), options=("-P", "threads", "-c", "16", "-Q", "a,b,c")
        ) as stock,
    ):
        time.sleep(3)
        for number in range(ROUNDS):
            say(f"idle, {number + 1} of {ROUNDS}")
            before = cpu_s(ours.pid), cpu_s(stock.pid)
            began = time.monotonic()
            time.sleep(IDLE_S)
            took = time.monotonic() - began
            found["ours"].append((cpu_s(ours.pid) - before[0]) / took * 100)
            found["stock"].append((cpu_s(stock.pid) - before[1]) / took * 100)
    return {
        "idle_cpu_percent": round(statistics.median(found["ours"]), 3),
        "stock_idle_cpu_percent": round(statistics.median(found["stock"]), 3),
    }


def first_after_idle() -> dict[str, Any]:
    """From the LPUSH until the task begins, on a worker that waits, for a moment or for a while."""
    found: dict[Side, list[float]] = {"ours": [], "stock": []}
    after_long: dict[Side, list[float]] = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        clients: dict[Side, redis.Redis] = {}
        for side in SIDES:
            valkey = stack.enter_context(Valkey())
            stack.enter_context(PlainWorker(side, valkey.url, Path(folder)))
            clients[side] = redis.Redis.from_url(valkey.url)
        say("the first message after idle")
        for kept, times, pause_s in (
            ({"ours": [], "stock": []}, 5, FIRST_PAUSE_S),
            (found, FIRSTS, FIRST_PAUSE_S),
            (after_long, LONG_FIRSTS, LONG_PAUSE_S),
        ):
            for _ in range(times):
                time.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
                for side, client in clients.items():
                    ready = message("begun")
                    began = time.time()
                    client.lpush("celery", ready)
                    answer = client.brpop(["begun"], timeout=10)
                    kept[side].append((float(answer[1]) - began) * 1000)  # type: ignore[index]
    return {
        "first_p50_ms": round(quantile(found["ours"], 0.5), 2),
        "first_p95_ms": round(quantile(found["ours"], 0.95), 2),
        "first_after_7_s_ms": round(statistics.median(after_long["ours"]), 2),
        "stock_first_p50_ms": round(quantile(found["stock"], 0.5), 2),
        "stock_first_p95_ms": round(quantile(found["stock"], 0.95), 2),
        "stock_first_after_7_s_ms": round(statistics.median(after_long["stock"]), 2),
    }


class Count:
    """Counts by MONITOR what clients send and what scripts run, from a connection of its own."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)

    def during(self, act: Callable[[], None]) -> tuple[int, int]:
        """Do something; return how many commands workers have sent meanwhile, and scripts have run."""
        sent = inner = 0
        with self._client.monitor() as monitor:  # type: ignore[no-untyped-call]
            act()
            self._client.echo("the end")
            for seen in monitor.listen():
                command = str(seen["command"])
                if command.startswith("ECHO the end"):
                    break
                if seen["client_type"] == "lua":
                    inner += 1
                elif not command.startswith(
                    ("LPUSH celery", *(f"LPUSH {queue}" for queue in QUEUES), "INFO")
                ):
                    sent += 1
        return sent, inner


def many_idle_workers() -> dict[str, Any]:
    """What one message costs Redis when twenty workers on three queues wait for it."""
    figures: dict[str, Any] = {}
    for side in SIDES:
        say(f"{WORKERS} idle workers: {side}")
        prefix = "" if side == "ours" else "stock_"
        with tempfile.TemporaryDirectory() as folder, Valkey() as valkey, ExitStack() as stack:
            client = redis.Redis.from_url(valkey.url)
            workers = [
                PlainWorker(
                    side,
                    valkey.url,
                    Path(folder),
                    name=f"w{number}",
                    options=("-P", "threads", "-c", "4", "-Q", ",".join(QUEUES)),
                    conf={"broker_transport_options": {"visibility_timeout": 30}},
                )
                for number in range(WORKERS)
            ]
            for worker in workers:
                worker.launch()
                stack.callback(worker.kill)
            for worker in workers:
                worker.wait_ready()
            time.sleep(3)
            meter, count = Meter(valkey.url), Count(valkey.url)

            aof = meter.aof_bytes()
            calm, calm_inner = count.during(lambda: time.sleep(CALM_S))
            calm_aof = meter.aof_bytes() - aof

            messages = [message("noop", queue=QUEUES[number % 3]) for number in range(SPREAD)]

            def send(client: redis.Redis = client, messages: list[bytes] = messages) -> None:
                for number, each in enumerate(messages):
                    client.lpush(QUEUES[number % 3], each)
                    time.sleep(SPREAD_EVERY_S)
                time.sleep(1)

            aof, began = meter.aof_bytes(), time.monotonic()
            sent, inner = count.during(send)
            took = time.monotonic() - began
            aof = meter.aof_bytes() - aof
            # Once more, without MONITOR.
            redis_cpu = meter.cpu_s()
            time.sleep(CALM_S)
            calm_cpu = meter.cpu_s() - redis_cpu
            redis_cpu, began = meter.cpu_s(), time.monotonic()
            send()
            redis_cpu = meter.cpu_s() - redis_cpu - calm_cpu / CALM_S * (time.monotonic() - began)
            if sum(left(client, queue) for queue in QUEUES):
                raise RuntimeError("not every message was run")
            size = statistics.mean(map(len, messages))
            figures |= {
                f"{prefix}idle20_commands": round((sent - calm / CALM_S * took) / SPREAD, 2),
                f"{prefix}idle20_commands_in_scripts": round(
                    (inner - calm_inner / CALM_S * took) / SPREAD, 2
                ),
                f"{prefix}idle20_aof_ratio": round((aof - calm_aof / CALM_S * took) / SPREAD / size, 2),
                f"{prefix}idle20_redis_cpu_ms": round(redis_cpu / SPREAD * 1000, 3),
                f"{prefix}idle20_redis_cpu_percent_at_rest": round(calm_cpu / CALM_S * 100, 3),
                f"{prefix}idle20_commands_per_s_at_rest": round(calm / CALM_S, 1),
                f"{prefix}idle20_aof_bytes_per_s_at_rest": round(calm_aof / CALM_S, 1),
            }
    return figures


if __name__ == "__main__":
    sys.exit(main())
