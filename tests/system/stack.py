"""What a test holds of the running stack: Airflow by its API, Redis by redis-py, callers as processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from redis import Redis

from local.airflow import Airflow, set_password
from local.process import ROOT, clean_env, secret_file
from local.valkey import Valkey
from tests.accounting import one_end_each
from tests.standing import standing_still
from tests.system.proxy import Proxy
from tests.worker import Worker

DAGS = Path(__file__).with_name("dags")
CALLER = Path(__file__).with_name("callers") / "trigger.py"
CALLER_NAME = "shop@till-3"

# Waits of a worker in these tests, so that an outage of a second costs seconds.
QUICK = {"DAGRELAY_RETRY_CAP_S": "3", "DAGRELAY_MISSING_GRACE_S": "3", "DAGRELAY_HOLD_PROBE_S": "3"}

T = TypeVar("T")


def only(version: str) -> pytest.MarkDecorator:
    """For a test of what one version of Airflow alone has, or has differently."""
    return pytest.mark.parametrize("airflow", [version], indirect=True, ids=[f"airflow{version}"])


def until(ask: Callable[[], T], what: str, timeout_s: float = 60.0, every_s: float = 0.1) -> T:
    """Ask until the answer is true, and return it. Raises TimeoutError.

    What takes long is asked for less often: a question takes Airflow 10 to 20 ms of CPU.
    """
    began = time.monotonic()
    while True:
        found = ask()
        if found:
            return found
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise TimeoutError(f"not {what} after {timeout_s:g} s; last seen: {found!r}")
        time.sleep(max(every_s, min(1.0, waited_s / 10)))


class Outcome(dict[str, Any]):
    """What a caller said of one request; asked for what is not there, it shows what is."""

    def __missing__(self, name: str) -> Any:
        raise AssertionError(f"no {name!r} in {dict(self)}")


class AirflowUnderTest(Airflow):
    """A real Airflow with the DAGs of these tests in a folder of its own, and what tests ask it."""

    def __init__(self, version: Any, folder: Path, **options: Any) -> None:
        shutil.copytree(DAGS, folder / "dags", ignore=shutil.ignore_patterns("__pycache__"))
        super().__init__(version, home=folder / "home", dags=folder / "dags", **options)

    def wait_until_read(self, timeout_s: float = 60.0) -> None:
        """Wait until it has read all DAGs of the tests; those that are paused stay so."""
        for file in DAGS.glob("*.py"):
            until(lambda dag_id=file.stem: self.knows(dag_id), f"{file.stem} known to Airflow", timeout_s)

    def knows(self, dag_id: str) -> bool:
        """Whether it has the DAG, and its file is in order."""
        status, dag = self.api("GET", f"/dags/{dag_id}")
        return status == 200 and not dag.get("is_stale", False) and dag.get("is_active", True)

    def run(self, dag_id: str, run_id: str) -> dict[str, Any] | None:
        status, run = self.api("GET", f"/dags/{dag_id}/dagRuns/{run_id}")
        assert status in (200, 404), (status, run)
        return dict(run) if status == 200 else None

    def run_ids(self, dag_id: str) -> set[str]:
        """The ids of all runs of a DAG."""
        found: list[str] = []
        while True:
            _, page = self.api("GET", f"/dags/{dag_id}/dagRuns", params={"limit": 100, "offset": len(found)})
            found += [run["dag_run_id"] for run in page["dag_runs"]]
            if not page["dag_runs"] or len(found) >= page["total_entries"]:
                assert len(found) == len(set(found))
                return set(found)

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """All runs of a DAG, whole."""
        found: list[dict[str, Any]] = []
        while True:
            asked = {"dag_ids": [dag_id], "page_limit": 1000, "page_offset": len(found)}
            status, page = self.api("POST", "/dags/~/dagRuns/list", asked)
            assert status == 200, (status, page)
            found += page["dag_runs"]
            if not page["dag_runs"] or len(found) >= page["total_entries"]:
                return found

    def returned(self, dag_id: str, run_id: str, task_id: str) -> Any:
        """What a task of a run returned."""
        way = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/return_value"
        status, xcom = self.api("GET", way)
        assert status == 200, (status, xcom)
        # Airflow 2 gives the repr of what was returned.
        return xcom["value"] if self.version == "3" else eval(xcom["value"], {})  # noqa: S307

    def take_password(self, password: str) -> None:
        """Have it take another password for its user from now on."""
        if self.version == "3":  # its simple auth manager reads the file at each login
            secret_file(self.home / "passwords.json", json.dumps({self.username: password}))
        else:
            set_password(self.postgres, self.username, password, self.hash_rounds)

    @contextmanager
    def frozen_api(self) -> Iterator[None]:
        """Have the API take connections and do nothing; afterwards it goes on where it was."""
        with standing_still(*below(self.processes["api"].pid)):
            yield

    @contextmanager
    def without_database(self) -> Iterator[None]:
        """Have the API go on without its PostgreSQL; afterwards that is there again, as it was."""
        others = [name for name in self.processes if name != "api"]
        for name in others:  # they would end by themselves
            self.stop_component(name)
        self.postgres.halt()
        try:
            yield
        finally:
            self.postgres.start()
            for name in [*others, "api"]:
                self.start_component(name)
            self.wait_healthy()

    def tries(self, dag_id: str, run_id: str, task_id: str) -> int:
        """How many times a task of a run was started."""
        _, task = self.api("GET", f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}")
        return int(task["try_number"])


def below(pid: int) -> list[int]:
    """A process and all that it started, by Linux' own list."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in below(int(child)))]


class Stack:
    """One Valkey, the workers of a test and its callers, before one Airflow (or a proxy in front of it)."""

    def __init__(self, airflow: AirflowUnderTest, folder: Path) -> None:
        self.airflow, self.folder = airflow, folder
        self._parts = ExitStack()
        self.workers: list[Worker] = []
        self.valkey = self._parts.enter_context(Valkey())
        self.redis: Redis = Redis.from_url(self.valkey.url, decode_responses=True)
        self._env = clean_env(DAGRELAY_REDIS_URL=self.valkey.url, DAGRELAY_CLIENT_NAME=CALLER_NAME)

    def close(self) -> None:
        self.redis.close()
        self._parts.close()

    def proxy(self) -> Proxy:
        return self._parts.enter_context(Proxy(self.airflow.url))

    def start_worker(
        self, uri: str | None = None, name: str = "w1", old: str | None = None, **env: str
    ) -> Worker:
        """Start a worker for this Airflow, or for `uri`; it is ended with the stack.

        `old` is its second connection; `env` sets what `QUICK` sets otherwise, and more.
        """
        connections = {"default": uri or self.airflow.conn_uri} | ({"old": old} if old else {})
        worker = Worker(self.valkey.url, self.folder, connections=connections, name=name, **(QUICK | env))
        self.workers.append(self._parts.enter_context(worker))
        return worker

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Have no worker look meanwhile: their processes stand still."""
        with standing_still(*(worker.pid for worker in self.workers if worker.process.alive)):
            yield

    def publish_raw(self, task_id: str, message: dict[str, Any]) -> None:
        """Put a message on the queue past our door, as a Celery client of whatever language would."""
        headers = {"lang": "go", "task": "tasks.trigger_dag", "id": task_id, "retries": 0, "root_id": task_id}
        properties = {
            "correlation_id": task_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "triggers"},
            "priority": 0,
            "delivery_tag": task_id,
        }
        envelope = {
            "body": json.dumps([[], message, {}]),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers,
            "properties": properties,
        }
        self.redis.lpush("triggers", json.dumps(envelope))

    # Callers

    def call(self, job: dict[str, Any]) -> subprocess.Popen[str]:
        """Start a caller."""
        process = subprocess.Popen(
            [sys.executable, str(CALLER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._env | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdin
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        process.stdin = None
        return process

    def said(self, process: subprocess.Popen[str], timeout_s: float = 120.0) -> list[Outcome]:
        """Wait for a caller's end and return what it said."""
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 0, output
        return [Outcome(json.loads(line)) for line in output.splitlines()]

    def trigger(self, *requests: dict[str, Any], get_timeout_s: float | None = 60, **job: Any) -> Any:
        """Trigger from a process of its own and return the outcomes; of a single request, the outcome."""
        said = self.said(self.call({"requests": requests, "get_timeout_s": get_timeout_s, **job}))
        return said[0] if len(requests) == 1 else said

    def hand_over(self, *requests: dict[str, Any]) -> list[str]:
        """Trigger and return the ids, without waiting for outcomes."""
        said = self.trigger(*requests, get_timeout_s=None)
        return [one["id"] for one in ([said] if isinstance(said, dict) else said)]

    def outcomes(self, ids: Iterable[str], timeout_s: float = 60) -> list[Outcome]:
        """Wait for the outcomes of what was handed over."""
        return self.said(self.call({"wait_for": list(ids), "get_timeout_s": timeout_s}), timeout_s + 60)

    def dagrelay(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run the command `dagrelay`."""
        return subprocess.run(
            [sys.executable, "-m", "producers.cli", *argv],
            env=self._env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def status(self, task_id: str) -> dict[str, Any]:
        """What `dagrelay status` says of a request."""
        done = self.dagrelay("status", "-o", "json", task_id)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def account(self, ids: Iterable[str], *dag_ids: str) -> None:
        """Fail unless each of these accepted requests for these DAGs has come to exactly one end."""
        one_end_each(self.valkey.url, ids, [run for dag_id in dag_ids for run in self.airflow.runs(dag_id)])

    def record(self, task_id: str) -> dict[str, Any]:
        """The record of a request as it lies in Redis: cheaper than `status`, for polling."""
        return dict(self.redis.hgetall(f"dagrelay:record:{task_id}"))


__all__ = ["CALLER_NAME", "QUICK", "AirflowUnderTest", "Proxy", "Stack", "only", "until"]
