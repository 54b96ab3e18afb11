"""What a request has to pass before its run is handed over, and what it is told in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from producers.contract import TriggerRequest
from producers.errors import RunConflict
from producers.stores.gates import DagFacts, facts_key, line_key, waits_for, waits_for_now
from tasks.airflow.answers import DagView
from tasks.airflow.connections import read_connections
from tasks.gates import Gate, facts_of, gate_of
from tasks.trigger import there_already
from tests.unit.tasks.test_trigger import FakeAirflow, view

PLAIN = read_connections({"AIRFLOW_CONN_DEFAULT": "http://h"})[0]["default"]
WINDOWED = read_connections({"AIRFLOW_CONN_DEFAULT": "http://h/?window=3"})[0]["default"]


@pytest.mark.parametrize(
    ("asked", "connection", "window"),
    [
        ({"if_paused": "hold"}, PLAIN, None),
        ({"window": 2}, PLAIN, 2),
        ({"window": "max_active_runs"}, WINDOWED, "max_active_runs"),
        ({"window": 1, "if_paused": "fail"}, WINDOWED, 1),
        ({}, WINDOWED, 3),
        ({"window": None}, WINDOWED, 3),
    ],
)
def test_a_gate_is_for_requests_that_ask_for_one_by_themselves_or_by_their_connection(
    asked, connection, window
):
    gate = gate_of(TriggerRequest("d", **asked), connection)

    assert gate == Gate("default", "d", asked.get("if_paused", "trigger"), window)


def test_all_others_go_straight_on():
    assert gate_of(TriggerRequest("d"), PLAIN) is None
    assert gate_of(TriggerRequest("d", if_paused="trigger"), PLAIN) is None


@pytest.mark.parametrize(
    ("if_paused", "window", "paused", "limit", "words"),
    [
        ("hold", None, True, None, "DAG d is paused"),
        ("hold", 2, True, 16, "DAG d is paused"),
        ("hold", 2, False, 16, "a free place among the 2 runs of DAG d"),
        ("trigger", 1, True, None, "a free place among the 1 run of DAG d"),
        ("trigger", "max_active_runs", False, 16, "a free place among the 16 runs of DAG d"),
        ("unpause", "max_active_runs", False, None, "its turn at DAG d"),
        ("fail", None, False, None, "its turn at DAG d"),
    ],
)
def test_what_keeps_a_request_back_is_told_from_its_line_as_it_was_when_it_was_parked(
    if_paused, window, paused, limit, words
):
    line = line_key("default", "d", if_paused, window)
    places = window if isinstance(window, int) else limit if window else None

    assert waits_for("d", if_paused, window, paused=paused, places=places) == words
    stored = (b"1" if paused else b"0", str(limit).encode() if limit else b"")
    assert waits_for_now(line, *stored) == words
    assert facts_key(line) == "dagrelay:gate-facts:default:d"


def test_nothing_known_of_a_gate_is_nothing_wrong():
    assert waits_for_now(line_key("default", "d", "hold", 2), None, None) == (
        "a free place among the 2 runs of DAG d"
    )


def test_both_questions_make_the_facts():
    class Airflow:
        def get_dag(self, dag_id):
            return DagView(dag_id, True, 4)

        def count_unfinished_runs(self, dag_id):
            return 7

    assert facts_of(Airflow(), "d") == DagFacts(paused=True, limit=4, active=7)


def test_the_run_of_a_request_that_is_held_back_is_its_outcome_if_there_is_one():
    airflow, request = FakeAirflow(), TriggerRequest("daily_sales", {"day": 1}, key="k1")
    assert there_already(request, task_id="t1", airflow=airflow) is None

    airflow.runs["relay__k1"] = view("relay__k1", conf={"day": 1})
    found = there_already(request, task_id="t1", airflow=airflow)
    airflow.runs["relay__k1"] = view("relay__k1", conf={"day": 2})

    assert (found.dag_run_id, found.created) == ("relay__k1", False)
    with pytest.raises(RunConflict):
        there_already(request, task_id="t1", airflow=airflow)


def test_a_run_that_is_to_be_cleared_needs_a_place_as_a_new_one_does():
    airflow, request = FakeAirflow(), TriggerRequest("daily_sales", key="k1", if_exists="clear")
    airflow.runs["relay__k1"] = ended = view("relay__k1", conf={}, state="success")
    assert there_already(request, task_id="t1", airflow=airflow) is None
    assert not airflow.cleared

    airflow.runs["relay__k1"] = replace(ended, state="running")
    assert there_already(request, task_id="t1", airflow=airflow) is not None
