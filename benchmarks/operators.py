"""DAG to DAG by our operators, beside Airflow's own TriggerDagRunOperator, in one real Airflow 3.3.2.

In turns: a parent that starts a child (from the start of its task to the child's row), and one that waits
for it in the triggerer (from the child's end to the parent's success). Airflow's own is asked to look every
second, the shortest that it may. Then a conf of 10 MB, from parent to child. All instants are those of
Airflow's database.

With `--jobs`: so many tasks (500) wait for external jobs on one triggerer. What it takes beyond an idle one
in connections to Redis and in memory, and how long after a request has ended its task goes on.
Most of that is not ours: at the first question of any trigger Airflow sets up an API in its triggerer. So
`native_memory_more_mb` is what one deferred TriggerDagRunOperator takes, in an Airflow of its own, and
`memory_more_used_mb` is beyond one of our tasks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from local.airflow import Airflow
from local.valkey import Valkey
from tests.fake_service import FakeService
from tests.worker import Worker

from ._report import Bound, report, say

DAGS = Path(__file__).with_name("dags")
TURNS = 20
JOBS = 500
END_FOR_S = 60.0
COMPONENTS = ("api", "scheduler", "dag-processor", "triggerer")


@dataclass
class Parts:
    """What runs."""

    airflow: Airflow
    valkey: Valkey
    service: FakeService

    def sql(self, statement: str) -> list[list[str]]:
        """Return the rows of a query to Airflow's database."""
        text = self.airflow.postgres.sql(statement)
        return [line.split("|") for line in text.splitlines()]


@contextmanager
def running(folder: Path, jobs: int) -> Iterator[Parts]:
    """Start Airflow with our provider, Valkey, a worker and a service."""
    shutil.copytree(DAGS, folder / "dags")
    with ExitStack() as parts:
        valkey = parts.enter_context(Valkey())
        service = parts.enter_context(FakeService())
        airflow = Airflow(
            "3",
            home=folder / "home",
            dags=folder / "dags",
            components=COMPONENTS,
            provider=True,
            extra_env={
                "AIRFLOW_CONN_DAGRELAY_DEFAULT": json.dumps(
                    {"conn_type": "dagrelay", "extra": {"redis_url": valkey.url}}
                ),
                "JOBS": str(jobs),
            },
        )
        parts.enter_context(airflow)
        parts.enter_context(
            Worker(
                valkey.url,
                folder,
                connections={"default": airflow.conn_uri},
                DAGRELAY_SERVICE_BENCH=service.variable,
            )
        )
        for dag_id in ("native_wait", "relay_large", "leaf", "slow", "digest", "first_job", "jobs"):
            airflow.wait_for_dag(dag_id)
        yield Parts(airflow, valkey, service)


def start(parts: Parts, dag_id: str, run_id: str) -> None:
    """Start one run."""
    status, found = parts.airflow.api(
        "POST", f"/dags/{dag_id}/dagRuns", {"logical_date": None, "dag_run_id": run_id}
    )
    if status != 200:
        raise RuntimeError(f"Airflow answered {status} to the start of {dag_id}: {found}")


def ended(parts: Parts, dag_id: str, run_id: str, timeout_s: float = 120.0) -> None:
    """Wait for the end of a run, which must be a success."""
    deadline = time.monotonic() + timeout_s
    query = f"SELECT state FROM dag_run WHERE dag_id = '{dag_id}' AND run_id = '{run_id}'"  # noqa: S608
    while (state := parts.sql(query)[0][0]) != "success":
        if state == "failed" or time.monotonic() > deadline:
            raise RuntimeError(f"{dag_id} {run_id} is {state}")
        time.sleep(0.2)


def one(parts: Parts, parent: str, child: str, run_id: str, *, resumes: bool) -> float:
    """Run a parent; return the seconds from its start to its child, or from the child's end to its own."""
    before = parts.sql(f"SELECT coalesce(max(id), 0) FROM dag_run WHERE dag_id = '{child}'")[0][0]  # noqa: S608
    start(parts, parent, run_id)
    ended(parts, parent, run_id)
    ours, child_at = ("t.end_date", "c.end_date") if resumes else ("t.start_date", "c.queued_at")
    order = f"{ours} - {child_at}" if resumes else f"{child_at} - {ours}"
    rows = parts.sql(
        f"SELECT extract(epoch FROM {order}) FROM task_instance t, dag_run c "  # noqa: S608
        f"WHERE t.dag_id = '{parent}' AND t.run_id = '{run_id}' AND t.task_id = 'start' "
        f"AND c.dag_id = '{child}' AND c.id > {before}"
    )
    if len(rows) != 1:
        raise RuntimeError(f"{parent} {run_id} has {len(rows)} children")
    return float(rows[0][0])


def dag_to_dag(parts: Parts) -> dict[str, Any]:
    """Return the figures of starting and of waiting."""
    starts: dict[str, list[float]] = {"native": [], "relay": []}
    resumes: dict[str, list[float]] = {"native": [], "relay": []}
    for way in starts:  # the first of each is not counted: files are read into memory
        one(parts, f"{way}_start", "leaf", f"warm-{way}", resumes=False)
    for turn in range(TURNS):
        for way, took in starts.items():
            took.append(one(parts, f"{way}_start", "leaf", f"turn-{turn}", resumes=False))
    say(f"start: { ({way: round(statistics.median(took), 3) for way, took in starts.items()}) }")
    for turn in range(TURNS):
        for way, took in resumes.items():
            took.append(one(parts, f"{way}_wait", "slow", f"turn-{turn}", resumes=True))
    say(f"resume: { ({way: round(p95(took), 2) for way, took in resumes.items()}) }")
    native, relay = statistics.median(starts["native"]), statistics.median(starts["relay"])
    return {
        "turns": TURNS,
        "native_start_s": round(native, 3),
        "relay_start_s": round(relay, 3),
        "ratio_vs_trigger_operator": round(relay / native, 2),
        "native_resume_p95_s": round(p95(resumes["native"]), 2),
        "resume_median_s": round(statistics.median(resumes["relay"]), 2),
        "resume_p95_s": round(p95(resumes["relay"]), 2),
    }


def large_conf(parts: Parts) -> dict[str, Any]:
    """Return the figures of a conf of 10 MB."""
    conf = {"rows": [f"{number:06d}" + "x" * 994 for number in range(10_000)]}
    text = json.dumps(conf, sort_keys=True)
    began = time.monotonic()
    start(parts, "relay_large", "large")
    ended(parts, "relay_large", "large", 180)
    took_s = time.monotonic() - began
    run_id, row = parts.sql(
        "SELECT run_id, octet_length(row_to_json(r)::text) FROM dag_run r WHERE dag_id = 'digest'"
    )[0]
    status, found = parts.airflow.api(
        "GET", f"/dags/digest/dagRuns/{run_id}/taskInstances/digest_of/xcomEntries/return_value"
    )
    intact = status == 200 and found["value"] == hashlib.sha256(text.encode()).hexdigest()
    return {
        "conf_bytes": len(text),
        "conf_intact": int(intact),
        "run_row_bytes": int(row),
        "large_s": round(took_s, 1),
    }


def many_jobs(parts: Parts, count: int) -> dict[str, Any]:
    """Return the figures of many tasks that wait on one triggerer."""
    for number in range(count):
        parts.service.jobs[f"job-{number}"] = {"id": f"job-{number}", "state": "running"}
    triggerer = parts.airflow.processes["triggerer"].pid
    time.sleep(5)
    idle_bytes, idle_connections = memory_of(triggerer), connections_of(triggerer, parts.valkey.port)
    parts.service.jobs["first"] = {"id": "first", "state": "running"}
    start(parts, "first_job", "first")
    first = "SELECT count(*) FROM task_instance WHERE dag_id = 'first_job' AND state = 'deferred'"
    until = time.monotonic() + 60
    while parts.sql(first)[0][0] != "1":
        if time.monotonic() > until:
            raise RuntimeError("the first task does not wait")
        time.sleep(0.5)
    time.sleep(15)
    used_bytes = memory_of(triggerer)
    start(parts, "jobs", "all")
    waiting = "SELECT count(*) FROM task_instance WHERE dag_id = 'jobs' AND state = 'deferred'"
    deadline = time.monotonic() + 5 * count
    while (now := int(parts.sql(waiting)[0][0])) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{now} of {count} tasks wait")
        say(f"{now} of {count} tasks wait")
        time.sleep(10)
    time.sleep(10)
    full_bytes, full_connections = memory_of(triggerer), connections_of(triggerer, parts.valkey.port)
    numbers = list(range(count))
    random.Random(7).shuffle(numbers)  # noqa: S311
    began = time.monotonic()
    for position, number in enumerate(numbers):
        time.sleep(max(0.0, began + END_FOR_S * position / count - time.monotonic()))
        parts.service.end(f"job-{number}")
    ended(parts, "jobs", "all", 300)
    client = redis.Redis.from_url(parts.valkey.url, decode_responses=True)
    at = {
        client.hget(key, "job_id"): float(client.hget(key, "ended_at") or 0)
        for key in client.scan_iter("dagrelay:record:*", count=1000)
        if client.hget(key, "service") == "bench"
    }
    rows = parts.sql(
        "SELECT map_index, extract(epoch FROM end_date) FROM task_instance WHERE dag_id = 'jobs'"
    )
    late = [float(end) - at[f"job-{index}"] for index, end in rows]
    return {
        "jobs": count,
        "connections_more": full_connections - idle_connections,
        "memory_more_mb": round((full_bytes - idle_bytes) / 1e6, 1),
        "memory_more_used_mb": round((full_bytes - used_bytes) / 1e6, 1),
        "outcome_to_end_median_s": round(statistics.median(late), 2),
        "outcome_to_end_p95_s": round(p95(late), 2),
    }


def native_memory(parts: Parts) -> float:
    """Return what one task of Airflow's own takes in the triggerer beyond an idle one, in MB."""
    triggerer = parts.airflow.processes["triggerer"].pid
    time.sleep(5)
    idle_bytes = memory_of(triggerer)
    one(parts, "native_wait", "slow", "memory", resumes=True)
    time.sleep(15)
    return round((memory_of(triggerer) - idle_bytes) / 1e6, 1)


def p95(values: list[float]) -> float:
    """Return the 95th percentile."""
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def below(pid: int) -> list[int]:
    """Return a process and all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in below(int(child)))]


def memory_of(pid: int) -> int:
    """Return the bytes of memory that a process and its children have, what they share counted once."""
    total = 0
    for one_pid in below(pid):
        for line in Path(f"/proc/{one_pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def connections_of(pid: int, port: int) -> int:
    """Return how many connections to a port on this machine a process and its children hold."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[2].rpartition(":")[2], 16) == port and fields[3] == "01":
            inodes.add(f"socket:[{fields[9]}]")
    held = set()
    for one_pid in below(pid):
        for file in Path(f"/proc/{one_pid}/fd").iterdir():
            try:
                held.add(str(file.readlink()))
            except OSError:
                continue  # closed meanwhile
    return len(held & inodes)


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, nargs="?", const=JOBS, help="how many tasks wait for jobs")
    jobs = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as somebody else where we are root
        native = {}
        if jobs:
            with running(folder / "native", 1) as parts:
                native["native_memory_more_mb"] = native_memory(parts)
        with running(folder / "relay", jobs or 1) as parts:
            if jobs:
                return report(
                    "operators_jobs",
                    many_jobs(parts, jobs) | native,
                    [
                        Bound("connections_more", at_most=1),
                        Bound("memory_more_mb", at_most=150),
                        Bound("outcome_to_end_p95_s", at_most=2),
                    ],
                )
            return report(
                "operators",
                dag_to_dag(parts) | large_conf(parts),
                [
                    Bound("ratio_vs_trigger_operator", at_most=1.2),
                    Bound("resume_p95_s", at_most=2),
                    Bound("conf_intact", at_least=1),
                    Bound("run_row_bytes", at_most=2048),
                ],
            )


if __name__ == "__main__":
    sys.exit(main())
