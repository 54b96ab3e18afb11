"""A real Airflow by its own command, alone and where its API is away."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.system.stack import AirflowUnderTest, Stack, until

PATIENT_S = 400.0
pytestmark = pytest.mark.timeout(900)  # each call takes 2 s of CPU
CONF = {"n": 1.5, "many": [1, None, True, "1"], "text": "é [b] \u2028 'x' \"y\" $(z)"}


def by_cli(airflow: AirflowUnderTest) -> dict[str, Any]:
    """The extras that name this Airflow's command. A call may take long on a machine with much to do."""
    env = {name: value for name, value in airflow.env().items() if name.startswith("AIRFLOW")}
    command = [str(airflow.environment.python), "-m", "airflow"]
    return {"cli_command": command, "cli_env": env, "cli_timeout_s": 180}


def outcomes(stack: Stack, *requests: dict[str, Any]) -> list[Any]:
    """What became of these requests, however long the commands take."""
    return stack.outcomes(stack.hand_over(*requests), PATIENT_S)


def test_a_request_becomes_a_run_by_the_command_alone_and_is_waited_for(airflow, stack: Stack):
    extra = {"transport": "cli", **by_cli(airflow)}
    worker = stack.start_worker(json.dumps({"conn_type": "airflow", "extra": extra}))
    asked = {"dag_id": "echo", "key": "by-cli", "conf": CONF}

    at = {"logical_date": "2026-01-02T03:04:05.678901Z"}
    first, wrong, dated = outcomes(
        stack,
        asked | {"wait": True},
        {"dag_id": "strict", "key": "cli-wrong", "conf": {"day": "s3cr3t-canary"}},
        {"dag_id": "quiet", "key": "cli-dated", **at},
    )
    again, other, taken = outcomes(
        stack, asked, asked | {"conf": {"n": 2}}, {"dag_id": "quiet", "key": "cli-taken", **at}
    )
    made = first["run"]

    assert (made["created"], made["state"], made["url"]) == (True, "success", None)
    assert airflow.returned("echo", "relay__by-cli", "say")["conf"] == CONF
    assert (again["run"]["created"], again["run"]["dag_run_id"]) == (False, "relay__by-cli")
    assert other["error"] == "RunConflict"
    assert f"version={airflow.environment.release}" in worker.text()
    assert str(CONF["text"]) not in worker.text()
    # What the command refuses is told as the API tells it.
    assert wrong["error"] == "RequestRejected"
    assert "param day" in wrong["text"]
    assert "s3cr3t-canary" not in wrong["text"]
    assert dated["run"]["logical_date"] == "2026-01-02T03:04:05.678901+00:00"
    assert taken["error"] == "LogicalDateTaken"


def test_while_the_api_is_killed_requests_go_by_the_command_with_the_same_run_ids(airflow, stack: Stack):
    host = {"host": "127.0.0.1", "port": airflow.port, "login": airflow.username}
    extra = {"failover": "cli", "connect_timeout_s": 1, **by_cli(airflow)}
    given = {"conn_type": "http", **host, "password": airflow.password, "extra": extra}
    stack.start_worker(json.dumps(given))
    before = airflow.run_ids("quiet")
    asked = [{"dag_id": "quiet", "key": f"failover-{n}", "conf": {"n": n}} for n in range(3)]
    first = stack.trigger(asked[0])
    airflow.kill_api()
    try:
        during = outcomes(stack, *asked)
    finally:
        airflow.start_api()
    until(lambda: stack.redis.hget("dagrelay:airflow:default", "breaker") != "open", "back")
    after = outcomes(stack, *asked)

    assert first["run"]["created"]
    assert [one["run"]["created"] for one in during] == [False, True, True]
    assert [one["run"]["created"] for one in after] == [False, False, False]
    assert all(one["run"]["url"].startswith(airflow.url) for one in [*during, *after])
    assert airflow.run_ids("quiet") - before == {f"relay__failover-{n}" for n in range(3)}
