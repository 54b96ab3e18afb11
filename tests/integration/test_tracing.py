"""The caller's trace reaches Airflow and the run's note, whatever a message goes through on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from producers import PollRequest, fan_out
from producers.contract import TriggerRequest
from tests.fake_service import FakeService
from tests.integration.test_trigger import RUN, SALES, until
from tests.worker import Worker

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


def parent(number: int) -> str:
    return f"00-{TRACE_ID}-{number:016x}-01"


def note_of(airflow: Any, dag_id: str, run_id: str) -> str:
    first, _, _ = airflow.runs[dag_id, run_id]["note"].partition("\n\n")
    return str(first)


def outcome_of(worker: Worker, task_id: str) -> str:
    """The line that is logged after the result can be read."""

    def lines() -> list[str]:
        return [line for line in worker.text().splitlines() if task_id in line and " outcome=" in line]

    until(lambda: bool(lines()))
    (line,) = lines()
    return line


@pytest.fixture
def traced(relay, airflow) -> Iterator[Callable[[str], None]]:
    """Tell whether the one run of a test was asked for in its caller's trace."""

    def check(run_id: str = RUN[1]) -> None:
        assert airflow.traces[RUN[0], run_id] == PARENT
        assert note_of(airflow, RUN[0], run_id).endswith(f" traceparent={PARENT}")

    return check


def test_a_trace_is_in_the_request_to_airflow_in_the_note_and_in_the_log(relay, airflow, worker, traced):
    handle = relay.enqueue(SALES, traceparent=PARENT)

    assert handle.get(timeout=60).created
    traced()
    assert outcome_of(worker, handle.id).endswith(f" trace_id={TRACE_ID}")


def test_without_a_trace_there_is_none(relay, airflow, worker):
    assert relay.enqueue(SALES).get(timeout=60).created

    assert airflow.traces[RUN] is None
    assert "traceparent" not in note_of(airflow, *RUN)


@pytest.mark.parametrize("faults", [["503"], ["drop"], ["html", "reset"]])
def test_a_trace_outlives_retries(relay, airflow, worker, traced, faults):
    airflow.fault = lambda number, *_: faults[number - 1] if number <= len(faults) else "answer"
    handle = relay.enqueue(SALES, traceparent=PARENT)

    assert handle.get(timeout=60).created
    traced()


def test_a_trace_outlives_a_countdown(relay, airflow, worker, traced):
    handle = relay.enqueue(SALES, traceparent=PARENT, countdown=1)

    assert handle.get(timeout=60).created
    traced()


def test_a_trace_outlives_the_wait_for_a_run(relay, airflow, worker, traced):
    handle = relay.enqueue(
        TriggerRequest("daily_sales", key="k1", wait=True, wait_timeout_s=60), traceparent=PARENT
    )
    until(lambda: RUN in airflow.runs and (handle.record().waits_for or "").startswith("run "))
    (parked,) = [value for value in relay.redis.hvals("dagrelay:parked") if handle.id.encode() in value]
    assert PARENT.encode() in parked

    airflow.runs[RUN]["state"] = "success"
    relay.waits.wake([handle.id], by="test")
    assert handle.get(timeout=60).state == "success"
    traced()
    assert outcome_of(worker, handle.id).endswith(f" trace_id={TRACE_ID}")


def test_a_trace_outlives_the_line_for_a_slot(relay, airflow, start_worker, traced):
    start_worker(connections={"default": f"{airflow.conn_uri}/?max_in_flight=1"})
    airflow.delay_s = 0.3
    others = [relay.enqueue(TriggerRequest("daily_sales", key=f"other{n}")) for n in range(3)]
    handle = relay.enqueue(SALES, traceparent=PARENT)
    until(lambda: handle.record().state == "waiting")

    assert all(one.get(timeout=60).created for one in [*others, handle])
    traced()


def test_each_request_of_a_fan_out_keeps_its_own(relay, airflow, worker, monkeypatch):
    """Posted by the chunk, or having left it: both are in the trace of the call."""
    airflow.fault = lambda number, dag_id, run_id: "503" if run_id == "relay__f2" and number < 6 else "answer"
    number = iter(range(1, 100))
    monkeypatch.setattr("producers.tracing.of_caller", lambda: trace_with(next(number)))

    fan = fan_out([{"dag_id": "daily_sales", "key": f"f{n}"} for n in range(1, 5)], relay=relay)
    outcomes = fan.get(timeout=60)

    assert {one.state for one in outcomes} == {"done"}
    told = [outcome_of(worker, handle.id) for handle in fan.handles]
    assert all(line.endswith(f" trace_id={TRACE_ID}") for line in told)
    assert [f" key=f{n} outcome=started" in line for n, line in enumerate(told, 1)] == [True] * 4
    for n in range(1, 5):
        assert airflow.traces["daily_sales", f"relay__f{n}"] == parent(n)
        assert note_of(airflow, "daily_sales", f"relay__f{n}").endswith(f" traceparent={parent(n)}")


def trace_with(number: int) -> Any:
    from producers.stores.envelope import Trace

    return Trace(parent(number))


def test_the_headers_of_a_stock_celery_client_count_as_well(airflow, worker, valkey, relay, traced):
    """As its own instrumentation for OpenTelemetry writes them."""
    stock = Celery("else", broker=valkey.url, backend=valkey.url, set_as_current=False)
    sent = stock.send_task(
        "tasks.trigger_dag",
        kwargs={"dag_id": "daily_sales", "key": "k1"},
        queue="triggers",
        headers={"traceparent": PARENT, "tracestate": "rojo=1"},
    )

    assert relay.handle(sent.id).get(timeout=60).created
    traced()


@pytest.mark.parametrize("wrong", [PARENT.upper(), "00-\n-x", 7, ["x"], {"a": 1}, "", None])
def test_a_wrong_trace_of_somebody_else_is_as_none(airflow, worker, valkey, relay, wrong):
    stock = Celery("else", broker=valkey.url, backend=valkey.url, set_as_current=False)
    sent = stock.send_task(
        "tasks.trigger_dag",
        kwargs={"dag_id": "daily_sales", "key": "k1"},
        queue="triggers",
        headers={"traceparent": wrong},
    )

    assert relay.handle(sent.id).get(timeout=60).created
    assert airflow.traces[RUN] is None
    assert "traceparent" not in note_of(airflow, *RUN)


def test_the_run_that_follows_a_job_is_in_its_trace(relay, airflow, start_worker):
    with FakeService() as service:
        start_worker(DAGRELAY_SERVICE_TRAIN=service.variable)
        submit: Any = {"path": "/jobs", "body": {}}
        request = PollRequest(
            service="train",
            path="/jobs/{job_id}",
            submit=submit,
            interval_s=0.2,
            max_interval_s=1,
            then={"dag_id": "after"},
        )
        handle = relay.enqueue(request, traceparent=PARENT)
        until(lambda: service.jobs)
        assert service.requests[0][2]["traceparent"] == PARENT
        service.end("job-1")

        then = relay.handle(handle.get(timeout=60).then).get(timeout=60)

    assert airflow.traces["after", then.dag_run_id] == PARENT
    assert f" traceparent={PARENT}" in note_of(airflow, "after", then.dag_run_id)


SITECUSTOMIZE = """
import json, os
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, ConsoleSpanExporter

file = open(os.environ["SPANS"], "a", buffering=1)
provider = TracerProvider()
exporter = ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\\n")
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
"""


def test_a_worker_with_opentelemetry_tells_it_each_attempt(relay, airflow, start_worker, tmp_path):
    """As `opentelemetry-instrument` sets it up: before the worker's own code is imported."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    spans = tmp_path / "spans.jsonl"
    start_worker(PYTHONPATH=str(tmp_path), SPANS=str(spans))
    airflow.fault = lambda number, *_: "503" if number == 1 else "answer"

    handle = relay.enqueue(
        TriggerRequest("daily_sales", {"password": "kanarienvogel"}, key="k1"), traceparent=PARENT
    )
    assert handle.get(timeout=60).created

    def ours() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in spans.read_text().splitlines() if line.startswith("{")]
        return [one for one in found if one["name"] == "dagrelay trigger_dag"]

    until(lambda: len(ours()) == 2)
    first, second = ours()
    assert [one["attributes"]["dagrelay.state"] for one in (first, second)] == ["RETRY", "SUCCESS"]
    for number, one in enumerate((first, second), 1):
        assert one["kind"] == "SpanKind.CONSUMER"
        assert one["context"]["trace_id"] == f"0x{TRACE_ID}"
        assert one["parent_id"] == "0xb7ad6b7169203331"
        assert one["attributes"]["dagrelay.dag_id"] == "daily_sales"
        assert one["attributes"]["dagrelay.connection"] == "default"
        assert one["attributes"]["dagrelay.attempt"] == number
        assert one["attributes"]["messaging.message.id"] == handle.id
    # Airflow is asked by the attempt, and the note names the caller.
    assert airflow.traces[RUN] == f"00-{TRACE_ID}-{second['context']['span_id'][2:]}-01"
    assert note_of(airflow, *RUN).endswith(f" traceparent={PARENT}")
    assert "kanarienvogel" not in spans.read_text()
