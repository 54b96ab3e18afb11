"""What becomes of one request: every row of the table in docs/design.md that needs no Redis."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producers.contract import Asked, DagRun, TriggerRequest
from producers.errors import (
    AirflowUnavailable,
    DagNotFound,
    InvalidRequest,
    LogicalDateTaken,
    RequestRejected,
    RunConflict,
    RunExists,
)
from tasks.airflow.client import DagRunExists, RunView
from tasks.airflow.connections import read_connections
from tasks.trigger import (
    BACKOFF_CAP_S,
    BeingStopped,
    _with_positional,
    backoff_s,
    difference_of,
    names,
    note_for,
    owner_in,
    start_run,
)

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
ASKED = Asked(at=NOON.timestamp(), by="billing@host-7")
SALES = TriggerRequest("daily_sales", {"day": 1}, key="k1")


class FakeAirflow:
    """Runs by id, as Airflow keeps them; `refuses` is raised by every POST that finds no run in its way."""

    def __init__(self) -> None:
        self.connection = read_connections({"AIRFLOW_CONN_DEFAULT": "http://u:p@airflow:8080"})[0]["default"]
        self.runs: dict[str, RunView] = {}
        self.refuses: Exception | None = None
        self.made: list[str] = []
        self.cleared: list[str] = []
        self.cut_after_clear = False

    def create_dag_run(self, request, run_id, note):
        if self.refuses:
            raise self.refuses  # Airflow checks the DAG and its params before it looks at the run id
        taken = request.logical_date in {run.logical_date for run in self.runs.values() if run.logical_date}
        if run_id in self.runs or taken:
            raise DagRunExists("Unique constraint violation")
        self.runs[run_id] = view(
            run_id, conf=request.conf or {}, note=note, logical_date=request.logical_date
        )
        self.made.append(run_id)
        return self.runs[run_id]

    def get_dag_run(self, dag_id, run_id):
        return self.runs.get(run_id)

    def find_run_by_logical_date(self, dag_id, logical_date):
        return next((run.run_id for run in self.runs.values() if run.logical_date == logical_date), None)

    def set_note(self, dag_id, run_id, note):
        self.runs[run_id] = replace(self.runs[run_id], note=note)

    def clear_dag_run(self, dag_id, run_id):
        self.cleared.append(run_id)
        self.runs[run_id] = replace(self.runs[run_id], state="queued", start_date=None)
        if self.cut_after_clear:
            raise AirflowUnavailable("no answer")


def view(run_id, *, state="queued", conf=None, note=None, logical_date=None, start_date=None) -> RunView:
    return RunView(
        dag_id="daily_sales",
        run_id=run_id,
        state=state,
        conf=conf,
        logical_date=logical_date,
        run_after=None,
        note=note,
        start_date=start_date,
        end_date=None,
        queued_at=None,
        api="v2",
    )


@pytest.fixture
def airflow() -> FakeAirflow:
    return FakeAirflow()


def start(request, airflow, task_id="t1"):
    return start_run(request, task_id=task_id, asked=ASKED, airflow=airflow)


def test_the_same_request_twice_starts_one_run(airflow):
    first = start(SALES, airflow)
    second = start(SALES, airflow)  # the broker delivered it again

    assert first == second
    assert first.created
    assert airflow.made == ["relay__k1"]


def test_another_request_with_the_same_key_gets_the_same_run_and_did_not_make_it(airflow):
    start(SALES, airflow, task_id="t1")

    run = start(SALES, airflow, task_id="t2")

    assert (run.dag_run_id, run.created) == ("relay__k1", False)


def test_the_run_of_a_lost_answer_is_found_although_airflow_refuses_the_request_now(airflow):
    start(SALES, airflow)
    airflow.refuses = RequestRejected(400, "Invalid input for param must")

    assert start(SALES, airflow).created


def test_a_rejection_stands_when_there_is_no_run(airflow):
    airflow.refuses = DagNotFound("daily_sales", "not found")

    with pytest.raises(DagNotFound):
        start(SALES, airflow)


def test_a_conflict_names_what_differs_and_no_value(airflow):
    start(SALES, airflow, task_id="t1")

    with pytest.raises(RunConflict) as told:
        start(TriggerRequest("daily_sales", {"day": "s3cret"}, key="k1"), airflow, task_id="t2")

    assert "values differ under: day" in str(told.value)
    assert "s3cret" not in str(told.value)


@pytest.mark.parametrize(
    ("conf", "there", "same"),
    [
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": True}, {"a": 1}, False),
        ({"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}, True),
        ({"a": (1, 2)}, {"a": [1, 2]}, True),
        (None, {}, True),
        ({}, None, True),
        ({"a": None}, {}, False),
        ({"b": 1, "a": 2}, {"a": 2, "b": 1}, True),
    ],
)
def test_confs_are_compared_as_json(conf, there, same):
    request = TriggerRequest("daily_sales", conf)

    assert (difference_of(request, view("r", conf=there)) == "") is same


def test_another_logical_date_is_a_conflict():
    request = TriggerRequest("daily_sales", logical_date=NOON)

    assert "another logical date" in difference_of(request, view("r", logical_date=None))
    assert difference_of(request, view("r", logical_date=NOON)) == ""


def test_a_taken_logical_date_names_the_run_that_has_it(airflow):
    airflow.runs["scheduled__1"] = view("scheduled__1", logical_date=NOON)

    with pytest.raises(LogicalDateTaken, match="scheduled__1"):
        start(TriggerRequest("daily_sales", key="k1", logical_date=NOON), airflow)


def test_a_run_that_is_gone_when_it_is_looked_for_is_tried_again(airflow):
    airflow.create_dag_run = lambda *_: (_ for _ in ()).throw(DagRunExists("gone"))

    with pytest.raises(AirflowUnavailable) as told:
        start(SALES, airflow)
    assert not told.value.unsure


def test_if_exists_fail_and_skip(airflow):
    airflow.runs["relay__k1"] = view("relay__k1", conf={"day": 1}, state="running")

    with pytest.raises(RunExists, match="running"):
        start(TriggerRequest("daily_sales", {"day": 1}, key="k1", if_exists="fail"), airflow)
    # skip asks no questions, not even about the conf
    assert not start(TriggerRequest("daily_sales", {"day": 2}, key="k1", if_exists="skip"), airflow).created


CLEAR = TriggerRequest("daily_sales", {"day": 1}, key="k1", if_exists="clear")


def test_a_finished_run_is_cleared_once_however_often_it_is_asked(airflow):
    airflow.runs["relay__k1"] = view("relay__k1", conf={"day": 1}, state="failed", start_date=NOON)

    first = start(CLEAR, airflow)
    second = start(CLEAR, airflow)

    assert first.cleared
    assert second.cleared
    assert airflow.cleared == ["relay__k1"]


def test_a_clear_whose_answer_was_lost_is_not_repeated_even_when_the_run_has_ended_again(airflow):
    airflow.runs["relay__k1"] = view("relay__k1", conf={"day": 1}, state="failed", start_date=NOON)
    airflow.cut_after_clear = True
    with pytest.raises(AirflowUnavailable):
        start(CLEAR, airflow)
    again = datetime(2026, 11, 20, 13, tzinfo=UTC)
    airflow.runs["relay__k1"] = replace(airflow.runs["relay__k1"], state="success", start_date=again)

    assert start(CLEAR, airflow).cleared
    assert airflow.cleared == ["relay__k1"]


@pytest.mark.parametrize(
    ("note", "owner"),
    [
        (None, None),
        ("by hand", None),
        ("dagrelay task=a at=2026-11-30T00:00:00+00:00", "a"),
        ("dagrelay clear=b was=-\ndagrelay task=a at=2026-11-30T00:00:00+00:00", "b"),
        ("dagrelay task=a at=x\n\ndagrelay task=c", "a"),  # what follows is the caller's own
    ],
)
def test_the_note_names_whose_run_it_is(note, owner):
    assert owner_in(note) == owner


@pytest.mark.parametrize(
    ("note", "stopping", "waits"),
    [
        ("dagrelay task=a at=x", "a", True),
        ("dagrelay task=a at=x", "b", False),
        ("dagrelay clear=b was=-\ndagrelay task=a at=x", "a", False),
        ("dagrelay clear=b was=-\ndagrelay task=a at=x", "b", True),
        ("dagrelay clear=t1 was=-\ndagrelay task=a at=x", "t1", False),  # our own clear
        (None, "a", False),
    ],
)
def test_who_wants_a_run_again_waits_for_the_stop_of_the_request_that_has_it_now(
    note, stopping, waits, airflow
):
    airflow.runs["relay__k1"] = view("relay__k1", conf={"day": 1}, state="running", note=note)

    def ask() -> DagRun:
        return start_run(
            CLEAR, task_id="t1", asked=ASKED, airflow=airflow, being_stopped=lambda one: one == stopping
        )

    if waits:
        with pytest.raises(BeingStopped, match=f"for request {stopping}"):
            ask()
    else:
        assert ask().state == "running"
    assert not airflow.cleared


def test_a_run_that_was_stopped_while_its_request_was_asked_about_is_cleared(airflow):
    airflow.runs["relay__k1"] = view(
        "relay__k1", conf={"day": 1}, state="running", note="dagrelay task=a at=x"
    )

    def stopped_meanwhile(owner: str) -> bool:
        airflow.runs["relay__k1"] = replace(airflow.runs["relay__k1"], state="failed")
        return False

    run = start_run(CLEAR, task_id="t1", asked=ASKED, airflow=airflow, being_stopped=stopped_meanwhile)

    assert run.cleared
    assert airflow.cleared == ["relay__k1"]


def test_a_run_that_is_still_running_is_not_cleared(airflow):
    airflow.runs["relay__k1"] = view("relay__k1", conf={"day": 1}, state="running", start_date=NOON)

    run = start(CLEAR, airflow)

    assert (run.created, run.cleared) == (False, False)
    assert airflow.cleared == []


def test_a_clear_keeps_what_the_note_said(airflow):
    note = "dagrelay task=t0 at=…\n\nfor the audit"
    airflow.runs["relay__k1"] = view("relay__k1", conf={"day": 1}, state="failed", start_date=NOON, note=note)

    start(CLEAR, airflow)

    kept = airflow.runs["relay__k1"].note
    assert kept.endswith(note)
    assert names(kept, "t0")


def test_the_note_says_who_when_and_with_which_key_in_300_characters():
    note = note_for(
        TriggerRequest("d", key="k" * 512, note="n" * 700), "t" * 36, Asked(at=NOON.timestamp(), by="b" * 100)
    )

    ours, _, theirs = note.partition("\n\n")
    assert ours.startswith(f"dagrelay task={'t' * 36} at=2026-11-20T12:00:00+00:00 by=bbb")
    assert len(ours) <= 300
    assert len(note) <= 1000
    assert theirs == "n" * 700


def test_a_users_note_cannot_claim_a_run():
    note = note_for(TriggerRequest("d", note="dagrelay task=t2"), "t1", ASKED)

    assert names(note, "t1")
    assert not names(note, "t2")


@given(st.integers(0, 10_000), st.none() | st.floats(0, 3600))
def test_a_wait_is_never_shorter_than_asked_nor_longer_than_the_cap(retries, asked):
    wait_s = backoff_s(retries, asked)

    assert wait_s >= (asked or 0)
    assert wait_s <= max(BACKOFF_CAP_S, asked or 0)


@pytest.mark.parametrize(
    ("args", "kwargs", "merged"),
    [
        (("d",), {}, {"dag_id": "d"}),
        (("d", {"a": 1}), {"key": "k"}, {"dag_id": "d", "conf": {"a": 1}, "key": "k"}),
        (({"a": 1},), {"dag_id": "d"}, {"dag_id": "d", "conf": {"a": 1}}),  # from a chain
        ((None,), {"dag_id": "d"}, {"dag_id": "d"}),  # the task before returned nothing
    ],
)
def test_what_comes_by_position(args, kwargs, merged):
    assert _with_positional(args, kwargs) == merged


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [(("d",), {"dag_id": "e"}), (({},), {"dag_id": "d", "conf": {}}), (("d", {}, 3), {})],
)
def test_what_contradicts_itself_is_told(args, kwargs):
    with pytest.raises(InvalidRequest):
        _with_positional(args, kwargs)
