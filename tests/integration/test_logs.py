"""What a real worker logs: one line for each outcome, each line one record, and no secret in any."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from producers import PollRequest
from producers.client import RelayClient
from producers.contract import TriggerRequest
from producers.errors import DagNotFound, RequestRejected
from tests.fake_service import FakeService
from tests.integration.test_trigger import until
from tests.worker import Worker

CANARY = "kanarienvogel-7f3a"
CONF = {"password": CANARY}
AGAIN = ("daily_sales", "relay__again")
ODD_KEY = 'a key="quoted" größe'


@pytest.fixture
def stock(valkey) -> Iterator[Celery[Any]]:
    app = Celery("else", broker=valkey.url, backend=valkey.url, set_as_current=False)
    yield app
    app.close()


def lines_of(worker: Worker, task_id: str) -> list[str]:
    return [line for line in worker.text().splitlines() if task_id in line and "dagrelay.outcome" in line]


def hand_over(relay: RelayClient, airflow: Any, stock: Celery[Any]) -> dict[str, str]:
    """Have requests end in all ways; return their ids."""
    airflow.missing = {"no_such_dag"}
    airflow.rejecting = {"strict": (422, {"detail": "params are wrong"})}
    done = relay.enqueue(TriggerRequest("daily_sales", CONF, key=ODD_KEY))
    retried = relay.enqueue(TriggerRequest("daily_sales", CONF, key="again"))
    missing = relay.enqueue(TriggerRequest("no_such_dag", CONF))
    rejected = relay.enqueue(TriggerRequest("strict", CONF))
    later = relay.enqueue(TriggerRequest("daily_sales", CONF), countdown=3600)
    submit: Any = {"path": "/jobs", "body": CONF}
    job = relay.enqueue(
        PollRequest(service="train", path="/jobs/{job_id}", submit=submit, interval_s=0.2, max_interval_s=1)
    )
    unforeseen = stock.send_task("tests.raise_value", (CANARY,), queue="triggers")
    misspelt = stock.send_task("tasks.trigger_dags", kwargs={"conf": CONF}, queue="triggers")

    assert done.get(timeout=60).created
    assert retried.get(timeout=60).created
    with pytest.raises(DagNotFound):
        missing.get(timeout=60)
    with pytest.raises(RequestRejected):
        rejected.get(timeout=60)
    later.cancel()
    until(lambda: later.state == "cancelled")
    until(lambda: job.record().job_id)
    return {
        "done": done.id,
        "retried": retried.id,
        "missing": missing.id,
        "rejected": rejected.id,
        "cancelled": later.id,
        "job": job.id,
        "unforeseen": unforeseen.id,
        "misspelt": misspelt.id,
    }


@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_in_json_every_line_is_a_record_and_every_outcome_one(pool, relay, airflow, start_worker, stock):
    airflow.fault = lambda number, *run: "503" if run == AGAIN and airflow.posts[AGAIN] == 1 else "answer"
    with FakeService() as service:
        worker = start_worker(
            options=("-P", pool, "-c", "4", "--include", "tests.integration.raising"),
            DAGRELAY_LOG_FORMAT="json",
            DAGRELAY_LOG_LEVEL="DEBUG",
            DAGRELAY_MISSING_GRACE_S="0",
            DAGRELAY_SERVICE_TRAIN=service.variable,
        )
        ids = hand_over(relay, airflow, stock)
        service.end("job-1", out=CANARY)
        relay.handle(ids["job"]).get(timeout=60)
        until(lambda: "tests.raise_value" in worker.text() and "tasks.trigger_dags" in worker.text())
    assert worker.stop() == 0

    text = worker.text()
    records = [json.loads(line) for line in text.splitlines()]
    assert len(records) > 20
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", one["time"]) for one in records)
    assert all({"level", "logger", "message"} <= one.keys() for one in records)
    outcomes = {name: [one for one in records if is_outcome(one, ids[name])] for name in ids}
    assert {name: len(found) for name, found in outcomes.items()} == dict.fromkeys(ids, 1) | {
        "unforeseen": 0,  # it is no request of ours
        "misspelt": 0,
    }
    told = {name: found[0] for name, found in outcomes.items() if found}
    run = {"dag_id": "daily_sales", "connection": "default", "outcome": "started"}
    assert (run | {"key": ODD_KEY, "attempts": 1}).items() <= told["done"].items()
    assert told["done"]["run_id"] in {run_id for _, run_id in airflow.runs}
    assert 0 <= told["done"]["age_s"] < 60
    assert (told["retried"]["key"], told["retried"]["attempts"]) == ("again", 2)
    for name, error in (("missing", "DagNotFound"), ("rejected", "RequestRejected")):
        assert {"level": "WARNING", "outcome": "failed", "error": error}.items() <= told[name].items()
    assert "params are wrong" in told["rejected"]["reason"]
    assert (told["cancelled"]["outcome"], told["cancelled"]["level"]) == ("cancelled", "INFO")
    assert {"service": "train", "job_id": "job-1", "outcome": "done"}.items() <= told["job"].items()

    (failure,) = [one for one in records if one.get("task") == "tests.raise_value"]
    assert failure["level"] == "ERROR"
    assert failure["traceback"].startswith("Traceback")
    assert failure["traceback"].endswith("\nValueError")
    (unknown,) = [one for one in records if one.get("task") == "tasks.trigger_dags"]
    assert unknown["task_id"] == ids["misspelt"]
    for secret in (CANARY, airflow.password, airflow.token, service.token):
        assert secret not in text


def is_outcome(record: dict[str, Any], task_id: str) -> bool:
    return record["logger"] == "dagrelay.outcome" and record.get("task_id") == task_id


def test_by_default_it_is_key_value_and_says_the_same(relay, airflow, start_worker, stock):
    with FakeService() as service:
        worker = start_worker(
            options=("--include", "tests.integration.raising"),
            DAGRELAY_MISSING_GRACE_S="0",
            DAGRELAY_SERVICE_TRAIN=service.variable,
        )
        ids = hand_over(relay, airflow, stock)
        service.end("job-1")
        relay.handle(ids["job"]).get(timeout=60)
        until(lambda: "tests.raise_value" in worker.text() and "tasks.trigger_dags" in worker.text())
        until(lambda: bool(lines_of(worker, ids["job"])))  # it is logged after the result can be read

    (done,) = lines_of(worker, ids["done"])
    assert " INFO dagrelay.outcome request done " in done
    assert (
        r' connection=default key="a key=\"quoted\" größe" outcome=started state=queued attempts=1 ' in done
    )
    (rejected,) = lines_of(worker, ids["rejected"])
    assert " WARNING dagrelay.outcome request failed " in rejected
    assert " outcome=failed error=RequestRejected attempts=1 " in rejected
    (job,) = lines_of(worker, ids["job"])
    assert f"task_id={ids['job']} service=train job_id=job-1 outcome=done state=succeeded attempts=" in job
    (failure,) = [line for line in worker.text().splitlines() if "task=tests.raise_value" in line]
    assert failure.endswith('\\nValueError"')  # its traceback is in the same line
    for secret in (CANARY, airflow.password, service.token):
        assert secret not in worker.text()
