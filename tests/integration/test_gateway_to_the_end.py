"""From HTTP to Airflow and back: real Valkey, real worker, real gateway, and an Airflow that is none."""

from __future__ import annotations

import json

import pytest

from tests.integration.gateway import GatewayProcess
from tests.integration.test_gateway import follow, read_events, until

pytestmark = pytest.mark.integration


@pytest.fixture
def gateway(valkey, tmp_path):
    with GatewayProcess(valkey.url, tmp_path) as process:
        yield process


def test_a_run_is_followed_to_its_end(worker, airflow, gateway):
    made = gateway.run(body={"conf": {"day": 1}, "key": "http-1"})
    with follow(gateway, made.body["events_url"]) as line:
        events = [event for event in read_events(line, 50, timeout_s=60) if event]
    end = json.loads(events[-1]["data"])
    assert (events[-1]["event"], end["state"], end["run"]["dag_run_id"]) == ("end", "done", "relay__http-1")
    task = gateway.ask("GET", made.headers["location"]).body
    assert task["history"][-1]["what"].startswith("done")
    again = gateway.run(body={"conf": {"day": 1}, "key": "http-1"})  # a repeat by its key alone
    until(lambda: gateway.ask("GET", again.headers["location"]).body["state"] == "done", 60)
    assert [run_id for _, run_id in airflow.runs].count("relay__http-1") == 1


def test_a_fan_out_is_followed_to_its_end(worker, airflow, gateway):
    lines = b"".join(b'{"dag_id":"daily_sales","key":"many-%d"}\n' % number for number in range(50))
    made = gateway.ask("POST", "/v1/fan-out", lines, Content_Type="application/x-ndjson")
    until(lambda: gateway.ask("GET", made.headers["location"]).body["state"] == "done", 60)


def test_what_waits_is_cancelled(worker, airflow, gateway):
    made = gateway.run(body={"countdown": 3600})
    assert gateway.ask("DELETE", made.headers["location"]).status == 202
    until(lambda: gateway.ask("GET", made.headers["location"]).body["state"] == "cancelled", 60)
    assert gateway.ask("DELETE", made.headers["location"]).status == 202
