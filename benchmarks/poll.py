"""What following outside jobs costs: 20,000 of them looked at every 10 s, and 100,000 every 60 s.

One worker process of our real app, and a service that answers in 20 ms. Lateness is told by the service: how
much longer than the interval it is from one answer to the next question about the same job. Stock Celery
follows as many jobs as most would write it, `self.retry(countdown=10)`; what it does not manage it is late
with, so its figures are those of the looks that it did.

One job is started as a user starts it; the others are parked as its worker parked it, by the same script,
because to run 100,000 first attempts would take minutes and measure something else.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import redis

from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import PollRequest
from producers.settings import ProducerSettings
from producers.stores.records import record_key
from producers.stores.waits import CANCELLED, DUE, PARKED, WAIT, looks_key, seen_key
from tests.plain_worker import PlainWorker, cpu_s, memory_mb, message, push
from tests.worker import Worker

from ._report import Bound, quantile, report, say
from .stub import LATENCY_S, Stub

GROUP = "service:bench"


def main() -> int:
    """Measure and report."""
    with tempfile.TemporaryDirectory() as folder:
        figures = ours(Path(folder), jobs=20_000, every_s=10, watch_s=40)
        say(str(figures))
        figures |= {
            f"{name}_100k": value
            for name, value in ours(Path(folder), jobs=100_000, every_s=60, watch_s=65).items()
        }
        say(str(figures))
        figures |= stock(Path(folder), jobs=20_000, every_s=10, watch_s=30)
        figures |= killed(Path(folder), jobs=4_000, every_s=10)
    figures["ratio_cpu"] = round(figures["stock_cpu_ms_per_look"] / figures["cpu_ms_per_look"], 1)
    bounds = [
        Bound("late_p99_s", at_most=0.5),
        Bound("cpu_ms_per_look", at_most=0.15),
        Bound("memory_mb", at_most=150),
        Bound("ratio_cpu", at_least=15),
        Bound("late_p99_s_100k", at_most=0.5),
        Bound("cpu_ms_per_look_100k", at_most=0.15),
        Bound("memory_mb_100k", at_most=150),
        Bound("redis_bytes_per_job_100k", at_most=2048),
        Bound("all_again_after_kill_s", at_most=30),
        Bound("at_once_after_kill", at_most=0),
        Bound("lost_after_kill", at_most=0),
    ]
    return report("poll", figures, bounds)


def worker(valkey: Valkey, stub: Stub, folder: Path, name: str = "w1") -> Worker:
    return Worker(
        valkey.url,
        folder,
        name=name,
        options=("-c", "8"),
        DAGRELAY_SERVICE_BENCH=json.dumps({"url": stub.url, "max_in_flight": 100}),
        DAGRELAY_VISIBILITY_TIMEOUT_S="30",
    )


def start_jobs(valkey: Valkey, jobs: int, every_s: float) -> float:
    """Have so many jobs wait for their looks, spread over the interval; return Redis' bytes for each."""
    client: Any = redis.Redis.from_url(valkey.url)
    relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="benchmark"))
    request = PollRequest(
        service="bench",
        path="/jobs/{job_id}",
        job_id="job-0000001",
        interval_s=every_s,
        growth=1,
        jitter=0,
        max_interval_s=every_s,
        progress="progress",
    )
    first = relay.enqueue(request)
    while not (value := client.hget(PARKED, first.id)):
        time.sleep(0.01)
    record = client.hgetall(record_key(first.id))
    epoch, _, queue_key, raw = value.split(b"\0", 3)
    until = client.zscore(DUE, first.id)
    before = client.info("memory")["used_memory"]
    pipe = client.pipeline(transaction=False)
    client.script_load(WAIT.lua)
    for number in range(2, jobs + 1):
        task_id, job = str(uuid.uuid4()), f"job-{number:07}"
        mine = raw.replace(first.id.encode(), task_id.encode()).replace(b"job-0000001", job.encode())
        fields = {
            name: text.replace(first.id.encode(), task_id.encode()).replace(b"job-0000001", job.encode())
            for name, text in record.items()
            if name != b"retried"  # this wait itself, which begins with the park
        }
        pipe.hset(record_key(task_id), mapping=fields)
        WAIT.queue(
            pipe,
            (PARKED, DUE, record_key(task_id), seen_key(task_id), CANCELLED, looks_key(GROUP)),
            (
                task_id,
                until,
                epoch,
                queue_key,
                mine,
                0,
                every_s * (number % 997) / 997,
                fields[b"waits_for"],
                GROUP,
            ),
        )
        if number % 500 == 0:
            pipe.execute()
    pipe.execute()
    if client.zcard(looks_key(GROUP)) != jobs:
        raise RuntimeError("not all jobs wait to be looked at")
    return float((client.info("memory")["used_memory"] - before) / (jobs - 1))


def ours(folder: Path, *, jobs: int, every_s: float, watch_s: float) -> dict[str, Any]:
    """Follow jobs for a while after all of them have been looked at twice."""
    with Valkey() as valkey, Stub() as stub, worker(valkey, stub, folder) as running:
        start_jobs(valkey, jobs, every_s)
        client = redis.Redis.from_url(valkey.url)
        time.sleep(every_s + 5)  # each has been looked at once
        used = client.info("memory")["used_memory"]
        empty = client.memory_stats()["startup.allocated"]
        stub.looks()
        cpu, began = cpu_s(running.pid), time.monotonic()
        redis_cpu = client.info("cpu")["used_cpu_user"] + client.info("cpu")["used_cpu_sys"]
        time.sleep(watch_s)
        cpu, took_s = cpu_s(running.pid) - cpu, time.monotonic() - began
        redis_cpu = client.info("cpu")["used_cpu_user"] + client.info("cpu")["used_cpu_sys"] - redis_cpu
        found = stub.looks()
        late = [gap - every_s - LATENCY_S for gap in found["gaps"]]
        return {
            "jobs": jobs,
            "looks_per_s": round(found["looks"] / took_s, 1),
            "jobs_looked_at": found["jobs"],
            "late_p50_s": round(quantile(late, 0.5), 3),
            "late_p99_s": round(quantile(late, 0.99), 3),
            "cpu_ms_per_look": round(1000 * cpu / found["looks"], 3),
            "redis_cpu_ms_per_look": round(1000 * redis_cpu / found["looks"], 3),
            "memory_mb": round(memory_mb(running.pid), 1),
            "redis_bytes_per_job": round((used - empty) / jobs),
            "at_once": found["at_once"],
        }


def stock(folder: Path, *, jobs: int, every_s: float, watch_s: float) -> dict[str, Any]:
    """Let stock Celery follow as many, by retries with a countdown."""
    with Valkey() as valkey, Stub() as stub:
        client = redis.Redis.from_url(valkey.url)
        push(client, "celery", (message("follow", [f"job-{n:07}", every_s]) for n in range(jobs)))
        conf = {"task_acks_late": False}
        with PlainWorker(
            "stock",
            valkey.url,
            folder,
            conf=conf,
            PLAIN_JOBS_URL=f"{stub.url}/jobs",
            PLAIN_POST_URL=stub.runs_url,
        ) as running:
            time.sleep(every_s + 5)
            stub.looks()
            cpu, began = cpu_s(running.pid), time.monotonic()
            time.sleep(watch_s)
            cpu, took_s = cpu_s(running.pid) - cpu, time.monotonic() - began
            found = stub.looks()
            late = [gap - every_s - LATENCY_S for gap in found["gaps"]] or [float("inf")]
            figures = {
                "stock_looks_per_s": round(found["looks"] / took_s, 1),
                "stock_late_p99_s": round(quantile(late, 0.99), 1) if found["gaps"] else None,
                "stock_cpu_ms_per_look": round(1000 * cpu / found["looks"], 3),
                "stock_memory_mb": round(memory_mb(running.pid), 1),
            }
            running.kill()  # it would put back thousands of tasks, one by one
            return figures


def killed(folder: Path, *, jobs: int, every_s: float) -> dict[str, Any]:
    """Kill the only worker and start it again 1 s later; wait until every job was looked at again."""
    with Valkey() as valkey, Stub() as stub:
        with worker(valkey, stub, folder, "k1") as running:
            start_jobs(valkey, jobs, every_s)
            time.sleep(1.5 * every_s)
            stub.looks()
            running.kill()
            began = time.monotonic()
        time.sleep(1)
        stub.looks()
        with worker(valkey, stub, folder, "k2"):
            found = stub.looks(keep=True)
            while found["jobs"] < jobs and time.monotonic() - began < 90:
                time.sleep(0.25)
                found = stub.looks(keep=True)
            took_s = time.monotonic() - began
            client = redis.Redis.from_url(valkey.url)
            waiting = client.zcard(looks_key(GROUP))
        return {
            "all_again_after_kill_s": round(took_s, 1),
            "at_once_after_kill": found["at_once"],
            "lost_after_kill": jobs - int(waiting),
        }


if __name__ == "__main__":
    sys.exit(main())
