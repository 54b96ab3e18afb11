"""A look at the runs of dead letters: each is told, and an Airflow that does not answer is not asked on."""

from __future__ import annotations

from typing import Any

from producers.errors import AirflowUnavailable, ConnectionNotConfigured, RequestRejected
from tasks.desk import look_at

THERE = {"state": "success", "url": "http://h/dags/d"}


def asking(answers: dict[str, Any]) -> tuple[Any, list[str]]:
    """What an Airflow answers by run id, and which runs it was asked for."""
    asked: list[str] = []

    def ask(connection: str, dag_id: str, run_id: str) -> Any:
        asked.append(run_id)
        if isinstance(answers[run_id], Exception):
            raise answers[run_id]
        return answers[run_id]

    return ask, asked


def test_each_run_is_told_to_be_there_or_not():
    ask, _ = asking({"r1": THERE, "r2": None})

    assert look_at([("a", "default", "d", "r1"), ("b", "default", "d", "r2")], ask) == {"a": THERE, "b": None}


def test_an_airflow_that_does_not_answer_is_asked_once_and_others_go_on():
    ask, asked = asking({"r1": AirflowUnavailable("timed out"), "r2": THERE, "r3": THERE})
    runs = [("a", "eu", "d", "r1"), ("b", "eu", "d", "r2"), ("c", "us", "d", "r3")]

    found = look_at(runs, ask)

    assert asked == ["r1", "r3"]
    assert found["c"] == THERE
    assert found["a"] == found["b"] == {"unknown": "Airflow unavailable: timed out"}


def test_a_connection_that_is_not_configured_is_told():
    ask, _ = asking({"r": ConnectionNotConfigured("eu")})

    assert "AIRFLOW_CONN_EU" in look_at([("a", "eu", "d", "r")], ask)["a"]["unknown"]


def test_a_refusal_is_about_one_run_alone():
    ask, _ = asking({"r1": RequestRejected(403, "no"), "r2": THERE})

    found = look_at([("a", "eu", "d", "r1"), ("b", "eu", "d", "r2")], ask)

    assert found["b"] == THERE
    assert "(403): no" in found["a"]["unknown"]


def test_after_its_time_nothing_more_is_asked_for():
    ask, asked = asking({})

    assert look_at([("a", "eu", "d", "r")], ask, budget_s=-1)["a"]["unknown"].startswith("not asked for")
    assert not asked
