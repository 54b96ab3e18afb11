"""The Airflow task that waits for a job: how it is named, who may name it, and what its end sends on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from producers.contract import SET_TASK_STATE, Asked, PollRequest, TaskInstance
from producers.errors import InvalidRequest, NotAllowed
from producers.scopes import Scope
from producers.stores.envelope import item_of, task_state_message

TASK: dict[str, Any] = {
    "dag_id": "etl",
    "dag_run_id": "scheduled__2026-11-20T00:00:00+00:00",
    "task_id": "g.train",
}
JOB: dict[str, Any] = {"service": "train", "path": "/jobs/1"}


def job(**task: Any) -> PollRequest:
    return PollRequest(**JOB, task_instance={**TASK, **task})


def test_it_travels_as_it_was_given():
    request = job(map_index=2, try_number=3, connection="Old")

    message = json.loads(json.dumps(request.to_message()))

    assert message["task_instance"] == {**TASK, "map_index": 2, "try_number": 3, "connection": "old"}
    assert PollRequest.from_message(message) == request


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dag_id": "a/b"}, "dag_id: is no DAG id"),
        ({"dag_run_id": "~"}, "dag_run_id: cannot be part of a URL"),
        ({"dag_run_id": ".."}, "dag_run_id: cannot be part of a URL"),
        ({"dag_run_id": ""}, "dag_run_id: "),
        ({"task_id": "../x"}, "task_id: is no task id"),
        ({"task_id": ".."}, "task_id: is no task id"),
        ({"map_index": -2}, "map_index: "),
        ({"map_index": True}, "map_index: "),
        ({"map_index": "1"}, "map_index: "),
        ({"try_number": 0}, "try_number: "),
        ({"connection": "a b"}, "connection: is no connection id"),
        ({"run_id": "x"}, "run_id: is no argument"),
    ],
)
def test_what_is_wrong_with_it_is_told_by_name(wrong, words):
    with pytest.raises(InvalidRequest, match="task_instance: ") as caught:
        job(**wrong)
    assert words in str(caught.value)


def test_a_sender_may_end_tasks_of_its_own_dags_alone():
    scope = Scope(dags=("etl",), services=("train",))

    scope.check(job())
    with pytest.raises(NotAllowed, match=r"task_instance\.dag_id: 'payroll'"):
        scope.check(job(dag_id="payroll"))
    with pytest.raises(NotAllowed, match=r"task_instance\.connection: 'other'"):
        scope.check(job(connection="other"))


def test_its_message_goes_with_the_end_beside_those_for_hooks():
    request = PollRequest(**JOB, task_instance=TASK, on_end=["billing"])

    item = item_of(request, task_id="id-1", asked=Asked(1.0, "me"))

    fields = item.more.split("\0")
    queues_and_messages = fields[fields.index("at_end") + 1].split("\n")
    assert queues_and_messages[::2] == ["jobs", "jobs"]
    tasks = [json.loads(raw)["headers"]["task"] for raw in queues_and_messages[1::2]]
    assert tasks == ["tasks.send_webhook", SET_TASK_STATE]


def test_the_same_end_sends_the_same_message_on():
    task = TaskInstance(**TASK, try_number=1)

    first, second = (task_state_message(task, "id-1", "me") for _ in range(2))

    assert first == second
    headers = json.loads(first[1])["headers"]
    assert headers["id"] == "id-1.task"
    assert headers["ignore_result"] is True


def test_flower_shows_which_task_waits():
    assert "task_instance='task g.train[2] of run scheduled__" in job(map_index=2).shown("id-1")
