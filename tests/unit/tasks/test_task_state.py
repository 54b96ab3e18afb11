"""What the end of a job means for the Airflow task that waited for it: set, left alone, or not yet known."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from producers.airflow.task_instances import task_instance_of
from producers.contract import TaskInstance
from producers.errors import RequestRejected
from producers.stores.records import Record
from tasks.airflow.answers import TaskView
from tasks.task_state import (
    CLOCKS_S,
    ENDED,
    LONGEST_PAUSE_S,
    MAX_NOTE,
    NotYetKnown,
    note_for,
    pause_s,
    settle,
    why_left_alone,
)

ACCEPTED_AT = 1_800_000_000.0
TASK = TaskInstance(dag_id="etl", dag_run_id="r1", task_id="train")
FIRST = TaskInstance(dag_id="etl", dag_run_id="r1", task_id="train", try_number=1)
DONE = Record("id-1", state="done", service="train", job_id="job-1", accepted_at=ACCEPTED_AT)
FAILED = replace(DONE, state="failed", error="ExternalJobFailed", reason="no rails")


def view(state: str | None = "running", try_number: int = 1, began_s: float | None = -5.0) -> TaskView:
    """A task that began so many seconds after the request was accepted."""
    began = None if began_s is None else datetime.fromtimestamp(ACCEPTED_AT + began_s, UTC)
    return TaskView(state, try_number, began, None)


class Airflow:
    """One task instance."""

    def __init__(self, found: TaskView | None, mapped: bool = False) -> None:
        self.found, self.mapped = found, mapped
        self.set_to: list[str] = []

    def is_mapped(self, dag_id: str, run_id: str, task_id: str) -> bool:
        return self.mapped

    def get_task_instance(self, task: TaskInstance) -> TaskView | None:
        return self.found

    def set_task_state(self, task: TaskInstance, state: str, note: str) -> None:
        self.set_to.append(state)


def settled(found: Record, airflow: Airflow, task: TaskInstance = FIRST) -> str:
    return settle(found, task, airflow, accepted_at=ACCEPTED_AT)


@pytest.mark.parametrize(
    ("state", "wanted"), [("done", "success"), ("failed", "failed"), ("cancelled", "failed")]
)
def test_each_end_of_a_request_has_its_state(state: Any, wanted):
    airflow = Airflow(view())

    assert settled(replace(DONE, state=state), airflow) == f"{FIRST} is set to {wanted}"
    assert airflow.set_to == [wanted]


@pytest.mark.parametrize("state", ENDED)
@pytest.mark.parametrize("task", [TASK, FIRST])
def test_what_has_ended_is_never_set(state, task):
    airflow = Airflow(view(state))

    assert settled(DONE, airflow, task).endswith(f"is left alone: it is {state} already")
    assert not airflow.set_to


@pytest.mark.parametrize("state", ["running", "deferred", "queued", "scheduled", "up_for_reschedule"])
@pytest.mark.parametrize("wanted", ["success", "failed"])
def test_the_try_that_waited_is_set_whatever_it_does(state, wanted):
    assert why_left_alone(view(state, 3), replace_try(3), wanted, ACCEPTED_AT) == ""


def replace_try(number: int) -> TaskInstance:
    return TaskInstance(dag_id="etl", dag_run_id="r1", task_id="train", try_number=number)


@pytest.mark.parametrize("state", ["running", "deferred", "queued", "scheduled"])
@pytest.mark.parametrize("now", [1, 3])
def test_another_try_is_left_alone(state, now):
    assert f"at try {now}, and try 2" in why_left_alone(
        view(state, now), replace_try(2), "success", ACCEPTED_AT
    )


@pytest.mark.parametrize("task", [TASK, FIRST])
def test_a_cleared_task_still_has_the_number_of_its_last_try_and_is_left_alone(task):
    """Airflow counts on when it schedules the next."""
    assert "cleared" in why_left_alone(view(None, 1), task, "success", ACCEPTED_AT)
    assert "cleared" in why_left_alone(view("restarting", 1), task, "success", ACCEPTED_AT)


def test_a_task_that_was_never_scheduled_is_set():
    airflow = Airflow(view(None, 0, None))

    assert settled(DONE, airflow, TASK).endswith("is set to success")


def test_a_try_that_failed_by_itself_keeps_its_retries_where_the_job_failed_too():
    assert "to be tried again" in why_left_alone(view("up_for_retry"), FIRST, "failed", ACCEPTED_AT)
    assert why_left_alone(view("up_for_retry"), FIRST, "success", ACCEPTED_AT) == ""


@pytest.mark.parametrize(
    ("began_s", "alone"), [(-60, False), (CLOCKS_S - 0.1, False), (CLOCKS_S + 0.1, True), (3600, True)]
)
def test_without_a_try_what_began_afterwards_is_left_alone(began_s, alone):
    why = why_left_alone(view("running", 2, began_s), TASK, "success", ACCEPTED_AT)

    assert why == ("it began after the request was accepted" if alone else "")


@pytest.mark.parametrize("state", ["running", "up_for_reschedule", "queued", "deferred"])
def test_without_a_try_the_first_one_is_set_whenever_it_began(state):
    """Airflow has a task that reschedules itself begin anew at each poke."""
    assert why_left_alone(view(state, 1, 3600), TASK, "success", ACCEPTED_AT) == ""


@pytest.mark.parametrize("state", ["scheduled", "queued"])
def test_without_a_try_it_is_waited_until_a_later_one_shows_itself(state):
    """After it was deferred the date is its own, before a new try it is that of the last."""
    assert why_left_alone(view(state, 1), TASK, "success", ACCEPTED_AT) == ""
    with pytest.raises(NotYetKnown):
        why_left_alone(view(state, 2), TASK, "success", ACCEPTED_AT)


@pytest.mark.parametrize("found", [None, view(None, 0, None)])
def test_a_mapped_task_without_an_index_is_refused(found):
    airflow = Airflow(found, mapped=True)

    with pytest.raises(RequestRejected, match="say by map_index which"):
        settled(DONE, airflow, TASK)
    assert not airflow.set_to


def test_a_task_that_is_not_there_is_refused():
    with pytest.raises(RequestRejected, match="no such task instance"):
        settled(DONE, Airflow(None), TASK)


def test_the_note_says_who_how_and_why_and_keeps_what_was_there():
    note = note_for(FAILED, "by hand")

    assert note == "dagrelay task=id-1 service=train job=job-1 ended=failed\nno rails\n\nby hand"
    assert note_for(FAILED, note) == note  # an attempt whose answer was lost


def test_the_note_has_no_words_of_errors_that_are_not_ours():
    assert "canary" not in note_for(replace(FAILED, error="ValueError", reason="canary"), None)
    assert "canary" not in note_for(replace(FAILED, error="TaskFailed", reason="canary"), None)


def test_the_note_fits_into_airflow():
    assert len(note_for(replace(FAILED, reason="x" * 5000, job_id="j" * 500), "y" * 1000)) <= MAX_NOTE


def test_pauses_grow_with_the_outage():
    assert max(pause_s(0, 0.0) for _ in range(50)) <= 0.5
    assert max(pause_s(30, 60.0) for _ in range(50)) <= 20
    assert min(pause_s(30, 80_000.0) for _ in range(50)) >= 150
    assert max(pause_s(30, 80_000.0) for _ in range(50)) <= LONGEST_PAUSE_S


@pytest.mark.parametrize("index", [-1, 2])
def test_the_running_task_is_taken_from_its_context(index):
    ti = SimpleNamespace(dag_id="etl", run_id="r1", task_id="train", map_index=index, try_number=2)

    task = task_instance_of({"ti": ti}, "old")

    assert (task.dag_id, task.dag_run_id, task.task_id) == ("etl", "r1", "train")
    assert (task.map_index, task.try_number, task.connection) == (index, 2, "old")
