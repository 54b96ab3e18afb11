"""A task of a real Airflow that waits for a job is told how it ended: that one, that try, and no other."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fake_service import FakeService
from tests.system.stack import AirflowUnderTest, Stack, until

CLOCKS_S = 2.0
"""Within this time of its request a task's beginning is taken for the try that made it."""


@pytest.fixture
def service(stack: Stack) -> Iterator[FakeService]:
    """A service of jobs, and a worker that knows it."""
    with FakeService() as server:
        stack.start_worker(DAGRELAY_SERVICE_TRAIN=server.variable)
        yield server


class Run:
    """One run of the DAG `waiting`, whose deferring tasks wait."""

    def __init__(self, airflow: AirflowUnderTest, run_id: str) -> None:
        self.airflow, self.way = airflow, f"/dags/waiting/dagRuns/{run_id}"
        self.run_id = run_id
        body = {"dag_run_id": run_id} | ({"logical_date": None} if airflow.version == "3" else {})
        status, answer = airflow.api("POST", "/dags/waiting/dagRuns", body)
        assert status == 200, answer
        until(lambda: self.states() == ["deferred"] * 4, "waiting in all four tasks")

    def task(self, task_id: str, index: int = -1) -> dict[str, Any]:
        """A task instance as Airflow shows it; nothing before it is there."""
        way = f"{self.way}/taskInstances/{task_id}" + (f"/{index}" if index >= 0 else "")
        status, task = self.airflow.api("GET", way)
        return dict(task) if status == 200 else {}

    def states(self) -> list[str | None]:
        """Of the task that is alone, and of the three of the mapped one."""
        each = [self.task("each", index) for index in range(3)]
        return [task.get("state") for task in (self.task("alone"), *each)]

    def me(self, task_id: str, index: int = -1) -> dict[str, Any]:
        """Who a task says it is."""
        way = f"{self.way}/taskInstances/{task_id}/xcomEntries/me"
        status, xcom = self.airflow.api("GET", way, params={"map_index": index})
        assert status == 200, xcom
        value = xcom["value"]
        return dict(value if self.airflow.version == "3" else eval(value, {}))  # noqa: S307 - its repr

    def close(self) -> None:
        """End what still waits."""
        self.airflow.api("PATCH", self.way, {"state": "failed"})


def hand_over(stack: Stack, service: FakeService, task: dict[str, Any]) -> tuple[str, str]:
    """Start a job for which a task waits; return the ids of the request and of the job."""
    job = {
        "service": "train",
        "path": "/jobs/{job_id}",
        "submit": {"path": "/jobs"},
        "interval_s": 0.2,
        "reason": "why",
        "task_instance": task,
    }
    done = stack.dagrelay("job", json.dumps(job))
    assert done.returncode == 0, done.stderr
    task_id = done.stdout.strip()
    until(lambda: stack.record(task_id).get("job_id"), "started")
    return task_id, stack.record(task_id)["job_id"]


def said(stack: Stack, task_id: str) -> str:
    """What the history of a request says of its task."""

    def lines() -> list[str]:
        return [
            entry["what"] for entry in stack.status(task_id)["history"] if "of DAG waiting" in entry["what"]
        ]

    return until(lines, "told to the task")[-1]


def test_exactly_the_task_that_waited_is_set(stack, airflow, service):
    run = Run(airflow, "told")
    until(lambda: run.task("sleeps").get("state") == "running", "running")
    sleeps = {"dag_id": "waiting", "dag_run_id": "told", "task_id": "sleeps"}
    alone, first = hand_over(stack, service, run.me("alone"))
    one_of_three, second = hand_over(stack, service, run.me("each", 1))
    all_of_them, third = hand_over(stack, service, {**sleeps, "task_id": "each"})
    asleep, fourth = hand_over(stack, service, sleeps)

    service.end(first)
    service.end(second, "failed", why="no rails")
    service.end(third)
    service.end(fourth)

    assert said(stack, alone) == "task alone of run told of DAG waiting is set to success"
    assert said(stack, one_of_three) == "task each[1] of run told of DAG waiting is set to failed"
    assert "say by map_index which of its instances waits" in said(stack, all_of_them)
    assert said(stack, asleep).endswith("is set to success")
    assert run.states() == ["success", "deferred", "failed", "deferred"]
    assert run.task("sleeps")["state"] == "success"
    assert run.task("alone")["note"] == f"dagrelay task={alone} service=train job={first} ended=done"
    assert "no rails" in run.task("each", 1)["note"]
    until(lambda: run.task("after").get("state") == "success", "gone on")
    run.close()


def test_a_late_outcome_does_not_touch_the_next_try(stack, airflow, service):
    run = Run(airflow, "late")
    me = run.me("alone")
    assert me["try_number"] == 1
    known, first = hand_over(stack, service, me)
    unknown, second = hand_over(stack, service, {k: v for k, v in me.items() if k != "try_number"})
    time.sleep(CLOCKS_S + 1)  # what begins within it may be the try that asked, by clocks that differ
    body = {"dry_run": False, "task_ids": ["alone"], "dag_run_id": "late", "only_failed": False}
    status, answer = airflow.api("POST", "/dags/waiting/clearTaskInstances", body)
    assert status == 200, answer
    until(
        lambda: (run.task("alone").get("state"), run.task("alone").get("try_number")) == ("deferred", 2),
        "waiting again",
    )

    service.end(first)
    service.end(second, "failed")

    assert said(stack, known).endswith("is left alone: it is at try 2, and try 1 waited for the job")
    assert said(stack, unknown).endswith("is left alone: it began after the request was accepted")
    assert run.states()[0] == "deferred"
    run.close()
