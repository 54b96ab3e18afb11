"""Run by Airflow's Python, with our wheel: says as JSON who ends tasks, and what a clear cancels."""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace
from typing import Any

try:
    from airflow.sdk import DAG
    from airflow.sdk.execution_time.xcom import XCom
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.models.xcom import XCom

from producers.airflow import triggers
from producers.airflow.base import _told_to_airflow
from producers.airflow.compat import AirflowException, AirflowFailException
from producers.airflow.hook import DagrelayHook
from producers.airflow.operators import (
    ExternalJobOperator,
    RelayFanOutOperator,
    RelayTriggerDagRunOperator,
)
from producers.airflow.sensors import ExternalJobSensor
from producers.errors import InvalidRequest, ResultExpired
from producers.stores import serving
from producers.stores.records import Record
from producers.stores.standing import Standing


class WithPostExecute(RelayTriggerDagRunOperator):
    def post_execute(self, context: Any, result: Any = None) -> None:
        """Do what there is to do afterwards."""


class WithItsOwnEnd(ExternalJobOperator):
    def execute_complete(self, context: Any, event: Any) -> Any:
        """Return something else."""
        return 1


class WithItsOwnBeginning(RelayTriggerDagRunOperator):
    def execute(self, context: Any) -> Any:
        """Do what there is to do before."""
        return super().execute(context)


JOB = {"service": "train", "path": "/jobs/{job_id}", "job_id": "1"}
RUN = {"trigger_dag_id": "child"}
RAN = {"dag_id": "child", "dag_run_id": "r", "state": "success", "created": True}
TASKS: dict[str, tuple[type, dict[str, Any]]] = {
    "plain": (RelayTriggerDagRunOperator, RUN),
    "its own beginning": (WithItsOwnBeginning, RUN),
    "post_execute=": (RelayTriggerDagRunOperator, RUN | {"post_execute": print}),
    "post_execute()": (WithPostExecute, RUN),
    "multiple_outputs": (ExternalJobOperator, JOB | {"multiple_outputs": True}),
    "execute_complete()": (WithItsOwnEnd, JOB),
    "do_xcom_push": (ExternalJobOperator, JOB | {"do_xcom_push": False}),
}


def in_triggerer() -> list[str]:
    """Return which tasks may end in the triggerer."""
    with DAG("said", schedule=None, catchup=False):
        made = {
            name: operator(task_id=f"t{n}", **given)
            for n, (name, (operator, given)) in enumerate(TASKS.items())
        }
    return [name for name, task in made.items() if task._may_end_in_triggerer()]


class Ended:
    """A waiter whose request has ended well, and how that stands."""

    stops = False

    def changes(self, request_id: str) -> Any:
        return self

    async def __anext__(self) -> Standing:
        return Standing("done", "", "", "", "", "", "")

    def close(self) -> None:
        return None

    async def outcome(self, request_id: str) -> Any:
        return {"dag_id": "child", "dag_run_id": "r"}


ASKED: list[Any] = []


async def event(*, refused: bool) -> list[Any]:
    """Return the event of a trigger whose XComs are taken or refused by their store, those it wrote, and
    whether it has waited until a worker can take it."""
    written, waited = [], []

    async def sleep(delay_s: float) -> None:
        waited.append(round(delay_s))

    def store(**given: Any) -> None:
        if refused:
            raise OSError("the store is away")
        written.append([given["key"], given["task_id"], given["map_index"]])

    XCom.set = store
    triggers._states_3 = lambda *about: ASKED.append(about) or ["deferred"]
    triggers.waiter_for = lambda _: Ended()
    triggers.asyncio = SimpleNamespace(**{**vars(asyncio), "sleep": sleep})
    trigger = triggers.RelayTrigger("r", end_from_trigger=True)
    trigger.task_instance = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=3)
    (found,) = [one async for one in trigger.run()]
    return [type(found).__name__, getattr(found, "xcoms", None) or {}, written, waited]


def cancelled(*, cancel_on_kill: bool) -> list[str]:
    """Return what a task cancels that was cleared."""
    found: list[str] = []
    serving.take = lambda *_: serving.Served("new", "attached", "old")
    client = SimpleNamespace(redis=None, handle=lambda one: SimpleNamespace(cancel=lambda: found.append(one)))
    with DAG("cleared", schedule=None, catchup=False):
        task = ExternalJobOperator(task_id="t", cancel_on_kill=cancel_on_kill, **JOB)
    ti = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, max_tries=0)
    task._request_for({"ti": ti}, SimpleNamespace(airflow_name=""), client)
    return found


def taken_late(kind: type, given: dict[str, Any], **record: Any) -> Any:
    """Return the outcome of a request that ended so long ago that only its record is kept, or its error."""

    def get(**_: Any) -> None:
        raise ResultExpired("r", "done", "")

    client = SimpleNamespace(
        handle=lambda _: SimpleNamespace(get=get), record=lambda _: Record("r", **record), redis=None
    )
    serving.forget = lambda *_: None
    with DAG("late", schedule=None, catchup=False):
        task = kind(task_id="t", **given)
    ti = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, xcom_push=lambda key, value: None)
    try:
        with _told_to_airflow(task):
            return task._end({"ti": ti}, SimpleNamespace(airflow_name=""), client, "r")
    except AirflowException as exc:
        return f"{type(exc).__name__}: {exc}"


def at_the_deadline(**record: Any) -> list[Any]:
    """Return what becomes of a task whose time to wait is over, and what it cancels."""
    found: list[str] = []
    client = SimpleNamespace(record=lambda _: Record("r", **record), redis=None)
    with DAG("deadline", schedule=None, catchup=False):
        task = ExternalJobOperator(task_id="t", **JOB)
    task._reach = lambda: (SimpleNamespace(airflow_name="", flower_url=None), client)
    task._served_by = lambda *_: "r"
    task.outcome = lambda *_: "its outcome"
    task.on_kill = lambda: found.append("cancelled")
    ti = SimpleNamespace(start_date=None)
    try:
        return [task.resume_execution("__fail__", {"error": "Trigger timeout"}, {"ti": ti}), found]
    except Exception as exc:  # noqa: BLE001 - each Airflow has its own
        return [type(exc).__name__, found]


WAITED = RUN | {"wait_for_completion": True}
LATE = {
    "run": (RelayTriggerDagRunOperator, WAITED, {"state": "done", "run": RAN}),
    "failed run that may": (
        RelayTriggerDagRunOperator,
        WAITED | {"allowed_states": ["failed"], "failed_states": []},
        {
            "state": "failed",
            "error": "DagRunFailed",
            "error_args": ["child", "r", None],
            "run": RAN | {"state": "failed"},
        },
    ),
    "job": (
        ExternalJobOperator,
        JOB,
        {"state": "done", "outcome": {"service": "train", "job_id": "1", "state": "done", "result": 7}},
    ),
    "long result": (ExternalJobOperator, JOB, {"state": "done"}),
    "cancelled": (
        ExternalJobOperator,
        JOB,
        {"state": "cancelled", "error": "TaskRevokedError", "error_args": ["asked by ops"]},
    ),
    "unknown": (
        ExternalJobOperator,
        JOB,
        {"state": "failed", "error": "SubmitUnknown", "error_args": ["train", "ref", "a timeout"]},
    ),
    "failed": (
        ExternalJobOperator,
        JOB,
        {
            "state": "failed",
            "error": "ExternalJobFailed",
            "error_args": ["train", "1", "failed", "out of memory"],
        },
    ),
}


def mapped() -> list[bool]:
    """Return which mapped tasks end for good where an argument turns out wrong as they are made to run."""
    with DAG("mapped", schedule=None, catchup=False):
        made = [
            (ExternalJobOperator.partial(task_id="job", service="train"), {"path": "/{job_id}"}),
            (ExternalJobSensor.partial(task_id="sensor", path="/x"), {"request_id": "r"}),
            (RelayTriggerDagRunOperator.partial(task_id="run", **RUN), {"conf": "[1]"}),
            (RelayTriggerDagRunOperator.partial(task_id="state", **RUN), {"allowed_states": ["running"]}),
            (RelayFanOutOperator.partial(task_id="fan", **RUN), {"confs": "no JSON"}),
        ]
        tasks = [
            (partial.expand(**{name: [one] for name, one in given.items()}), given) for partial, given in made
        ]
    found = []
    for task, given in tasks:
        try:
            task.unmap(given)
        except InvalidRequest as exc:
            found.append(isinstance(exc, AirflowFailException))
    return found


said = {
    "taken_late": {name: taken_late(kind, given, **record) for name, (kind, given, record) in LATE.items()},
    "mapped": mapped(),
    "at_the_deadline": [at_the_deadline(state=state) for state in ("done", "waiting")],
    "in_triggerer": in_triggerer(),
    "taken": asyncio.run(event(refused=False)),
    "refused": asyncio.run(event(refused=True)),
    "asked": ASKED,
    "flower_url": DagrelayHook().target.flower_url,
    "cancelled": [cancelled(cancel_on_kill=one) for one in (True, False)],
}
sys.stdout.write(json.dumps(said) + "\n")
