"""Looks at runs that are waited for: what is asked of Airflow, and what each look saw."""

import json
import time
from datetime import UTC, datetime, timedelta

import pytest

from producers.errors import AirflowUnavailable, CredentialsRefused, RequestRejected
from producers.stores.waits import Claimed
from tasks.airflow import run_looks
from tasks.airflow.answers import RunList, RunView
from tasks.airflow.connections import AirflowConnection
from tasks.airflow.run_looks import (
    DAG_RUN_LOOK_S,
    FEW_RUNS_LOOK_S,
    ONE_RUN_LOOK_S,
    SINGLY,
    look_at_runs,
    next_look_in_s,
)

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
NOW = NOON.timestamp() + 0.7


class FakeAirflow:
    """Runs by DAG and id with their state and time; `refuses` is raised by a list, `silent` by everything."""

    def __init__(self, name):
        self.connection = AirflowConnection(name, "http://h")
        self.runs = {}
        self.lists = []
        self.gets = []
        self.refuses = self.silent = None

    def add(self, run_id, state, at=NOON):
        self.runs["d", run_id] = (state, at)

    def list_dag_runs(self, dag_ids, since, until, *, unfinished, limit):
        self.lists.append({"dag_ids": dag_ids, "unfinished": unfinished, "limit": limit})
        if self.silent or self.refuses:
            raise self.silent or self.refuses
        found = {
            key: state
            for key, (state, at) in self.runs.items()
            if key[0] in dag_ids
            and since <= at <= until
            and not (unfinished and state in ("success", "failed"))
        }
        kept = dict(list(found.items())[-limit:])
        return RunList(kept, whole=len(kept) == len(found))

    def get_dag_run(self, dag_id, run_id):
        self.gets.append(run_id)
        if self.silent:
            raise self.silent
        if (dag_id, run_id) not in self.runs:
            return None
        state = self.runs[dag_id, run_id][0]
        return RunView(dag_id, run_id, state, None, None, None, None, None, None, None, "v2")


@pytest.fixture
def airflow(request):
    return FakeAirflow(request.node.name)  # what is learned of an Airflow is kept by its name


def claimed(*run_ids, seen="running", errors=None, at=NOON, field="run_after"):
    looks = []
    for run_id in run_ids:
        run = {"dag_id": "d", "dag_run_id": run_id, field: at.isoformat() if at else None}
        looks.append(Claimed(f"task-{run_id}", 0.0, 3, b"", (json.dumps(run), seen, errors)))
    return looks


def test_one_list_call_looks_at_all_and_the_ends_wake(airflow):
    for run_id, state in (("a", "running"), ("b", "success"), ("c", "failed"), ("d", "queued")):
        airflow.add(run_id, state)

    seen = look_at_runs(airflow, claimed("a", "b", "c", "d"), NOW)

    assert len(airflow.lists) == 1
    assert not airflow.gets
    assert [(one.task_id, one.epoch, one.verb) for one in seen] == [
        ("task-a", 3, "again"),
        ("task-b", 3, "wake"),
        ("task-c", 3, "wake"),
        ("task-d", 3, "changed"),
    ]
    ends = [json.loads(seen[n].first) for n in (1, 2)]
    assert [one["state"] for one in ends] == ["success", "failed"]
    assert all(abs(time.time() - one["at"]) < 5 for one in ends)
    assert seen[3].first == "queued"


@pytest.mark.parametrize(
    ("runs", "every_s"), [(1, ONE_RUN_LOOK_S), (3, FEW_RUNS_LOOK_S), (101, DAG_RUN_LOOK_S)]
)
def test_all_runs_of_an_airflow_are_due_together_and_the_less_often_the_more_there_are(
    airflow, runs, every_s
):
    run_ids = [f"r{number}" for number in range(runs)]
    for run_id in run_ids:
        airflow.add(run_id, "running")

    seen = look_at_runs(airflow, claimed(*run_ids), NOW)

    for one in seen:
        due = (NOW + one.next_in_s) % every_s
        assert min(due, every_s - due) < 0.1
        assert one.next_in_s <= every_s * 1.2
    assert 0.25 < next_look_in_s(NOON.timestamp() + 1.999, every_s=2.0) <= 2.25  # not twice at once
    assert next_look_in_s(NOON.timestamp(), 7.0, 2.0) == 8.0


def test_a_run_that_is_nowhere_is_gone(airflow):
    for run_id in "abc":
        airflow.add(run_id, "running")

    seen = look_at_runs(airflow, claimed("a", "b", "c", "deleted"), NOW)

    assert airflow.gets == ["deleted"]
    assert (seen[3].verb, json.loads(seen[3].first)["state"]) == ("wake", "gone")


@pytest.mark.parametrize("field", ["run_after", "logical_date"])
def test_a_run_of_long_ago_or_of_the_future_is_not_missed(airflow, field):
    times = [NOON - timedelta(days=20_000), NOON, NOON + timedelta(days=9000)]
    looks = []
    for n, at in enumerate(times):
        airflow.add(f"r{n}", "success", at)
        looks += claimed(f"r{n}", at=at, field=field)

    assert [one.verb for one in look_at_runs(airflow, looks, NOW)] == ["wake"] * 3
    assert not airflow.gets


def test_a_run_without_a_time_is_asked_for_by_itself(airflow):
    for run_id in "abcd":
        airflow.add(run_id, "success")

    seen = look_at_runs(airflow, [*claimed("a", "b", "c"), *claimed("d", at=None)], NOW)

    assert [one.verb for one in seen] == ["wake"] * 4
    assert airflow.gets == ["d"]


def test_for_one_run_no_list_is_asked(airflow):
    airflow.add("a", "success")

    assert look_at_runs(airflow, claimed("a"), NOW)[0].verb == "wake"
    assert (airflow.lists, airflow.gets) == ([], ["a"])


def test_among_too_many_runs_of_others_every_end_is_seen_in_time(airflow):
    waited = [f"w{n}" for n in range(60)]
    for run_id in waited:
        airflow.add(run_id, "running")
    for n in range(3000):
        airflow.add(f"other{n}", "success")
    looks = claimed(*waited)
    look_at_runs(airflow, looks, NOW)  # the list is full of others: some are asked for one by one
    assert len(airflow.gets) == SINGLY

    airflow.gets.clear()
    airflow.add("w7", "success")
    seen = look_at_runs(airflow, looks, NOW)

    assert airflow.lists[-1]["unfinished"]
    assert [one.task_id for one in seen if one.verb == "wake"] == ["task-w7"]
    assert airflow.gets == ["w7"]


def test_more_than_can_be_asked_for_singly_have_their_turn(airflow):
    airflow.refuses = RequestRejected(403, "no list for you")
    waited = [f"w{n}" for n in range(SINGLY + 30)]
    for run_id in waited:
        airflow.add(run_id, "success")

    first = look_at_runs(airflow, claimed(*waited), NOW)
    left = [one.task_id.removeprefix("task-") for one in first if one.verb == "again"]
    second = look_at_runs(airflow, claimed(*left), NOW)

    assert len(left) == 30
    assert {one.verb for one in second} == {"wake"}


@pytest.mark.parametrize(
    "trouble", [AirflowUnavailable("it answered 503", 17.0, True), CredentialsRefused("x", "401")]
)
def test_no_answer_ends_no_waiting_and_is_asked_for_later_and_later(airflow, trouble):
    airflow.silent = trouble
    for errors, at_least_s in ((None, 2), ("3", 16), ("2000", 30)):
        seen = look_at_runs(airflow, claimed("a", "b", "c", errors=errors), NOW)
        assert {one.verb for one in seen} == {"error"}
        assert {one.first for one in seen} == {str(int(errors or 0) + 1)}
        if isinstance(trouble, AirflowUnavailable):
            at_least_s = max(at_least_s, 17)
        assert all(at_least_s <= one.next_in_s <= at_least_s + 2.1 for one in seen)
    assert not airflow.gets


def test_the_first_answer_after_errors_forgets_them(airflow):
    for run_id in "abc":
        airflow.add(run_id, "running")

    seen = look_at_runs(airflow, claimed("a", "b", "c", errors="4"), NOW)

    assert {(one.verb, one.first, one.shown) for one in seen} == {("changed", "running", False)}


def test_a_list_that_gets_no_answer_is_asked_for_shorter_and_grows_again(airflow):
    waited = [f"w{n}" for n in range(30)]
    for run_id in waited:
        airflow.add(run_id, "running")
    airflow.silent = AirflowUnavailable("the answer is larger than 32 MB")
    for _ in range(7):
        look_at_runs(airflow, claimed(*waited), NOW)
    airflow.silent = None
    for _ in range(5):
        look_at_runs(airflow, claimed(*waited), NOW)

    limits = [one["limit"] for one in airflow.lists]
    assert limits == [1000, 500, 250, 125, 62, 31, 25, 25, 100, 400, 1000, 1000]
    assert not airflow.lists[-1]["unfinished"]
    assert min(limits) == run_looks.MIN_LIST
