"""A worker goes on with its caller's trace; with OpenTelemetry an attempt is a span of it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from celery import states
from celery.app.trace import TraceInfo, trace_ok_t
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from producers.contract import Asked, TriggerRequest
from producers.errors import DagNotFound
from producers.stores.envelope import Trace
from tasks import tracing
from tasks.trigger import names, note_for

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "kanarienvogel-7f3a"
REQUEST = {
    "id": "t-1",
    "retries": 2,
    "delivery_info": {"routing_key": "triggers"},
    "traceparent": PARENT,
    "tracestate": "rojo=1",
}
KWARGS = {"dag_id": "sales", "connection": "eu", "conf": {"password": SECRET}}
TASK = SimpleNamespace(name="tasks.trigger_dag", recorded=True)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """OpenTelemetry, set up as somebody sets it up in a worker."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


@pytest.fixture
def without_otel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")


def run(answer: Any = None, request: Any = REQUEST, task: Any = TASK) -> list[dict[str, str]]:
    """Have a message worked on; return what HTTP requests would say, and the log."""
    seen: list[dict[str, str]] = []

    def tracer(uuid: str, args: Any, kwargs: Any, request: Any) -> Any:
        seen.extend((tracing.outgoing(), {"trace_id": tracing.trace_id()}))
        return answer or trace_ok_t({}, None, 0.0, None)

    tracing.traced(task, tracer)("t-1", (), KWARGS, request)
    assert tracing.current() is None
    assert tracing.trace_id() == ""
    return seen


def test_without_opentelemetry_the_callers_context_goes_on_as_it_came(without_otel):
    assert run() == [
        {"traceparent": PARENT, "tracestate": "rojo=1"},
        {"trace_id": "0af7651916cd43dd8448eb211c80319c"},
    ]


@pytest.mark.parametrize("request_", [None, {}, {"traceparent": "00-x"}, {"traceparent": None}])
def test_without_a_trace_there_is_none(without_otel, request_):
    assert run(request=request_) == [{}, {"trace_id": ""}]


def test_an_attempt_is_a_span_of_the_callers_trace(spans):
    outgoing, logged = run()

    (span,) = spans.get_finished_spans()
    assert (span.name, span.kind) == ("dagrelay trigger_dag", trace.SpanKind.CONSUMER)
    assert span.parent is not None
    assert (span.parent.span_id, span.parent.is_remote) == (0xB7AD6B7169203331, True)
    assert dict(span.attributes or {}) == {
        "messaging.system": "redis",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "triggers",
        "messaging.message.id": "t-1",
        "dagrelay.attempt": 3,
        "dagrelay.dag_id": "sales",
        "dagrelay.connection": "eu",
        "dagrelay.state": "SUCCESS",
    }
    own = span.get_span_context()
    assert own is not None
    assert outgoing == {
        "traceparent": f"00-0af7651916cd43dd8448eb211c80319c-{own.span_id:016x}-01",
        "tracestate": "rojo=1",
    }
    assert logged["trace_id"] == "0af7651916cd43dd8448eb211c80319c"


def test_without_a_caller_an_attempt_is_a_trace_of_its_own(spans):
    outgoing, _ = run(request={"id": "t-1"})

    (span,) = spans.get_finished_spans()
    own = span.get_span_context()
    assert span.parent is None
    assert own is not None
    assert outgoing["traceparent"].startswith(f"00-{own.trace_id:032x}-{own.span_id:016x}-")


def test_a_failure_is_told_by_its_class(spans):
    failure = DagNotFound("sales", SECRET)
    run(trace_ok_t(None, TraceInfo(states.FAILURE, failure), 0.0, None))

    (span,) = spans.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "DagNotFound"
    assert SECRET not in span.to_json()


@pytest.mark.parametrize("state", [states.RETRY, states.IGNORED, states.REJECTED])
def test_what_goes_on_is_no_error(spans, state):
    run(trace_ok_t(None, TraceInfo(state, ValueError(SECRET)), 0.0, None))

    (span,) = spans.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.UNSET
    assert (span.attributes or {})["dagrelay.state"] == state
    assert SECRET not in span.to_json()


def test_what_escapes_the_tracer_ends_the_span_without_its_words(spans):
    def tracer(*_: Any) -> Any:
        raise ValueError(SECRET)

    with pytest.raises(ValueError, match=SECRET):
        tracing.traced(TASK, tracer)("t-1", (), KWARGS, REQUEST)

    (span,) = spans.get_finished_spans()
    assert SECRET not in span.to_json()
    assert tracing.current() is None


def test_a_workers_own_affair_is_no_span(spans):
    run(task=SimpleNamespace(name="tasks.look", recorded=False))

    assert spans.get_finished_spans() == ()


def test_a_span_of_somebody_elses_is_taken_where_the_message_has_none(spans):
    context = trace.SpanContext(5, 6, is_remote=False, trace_flags=trace.TraceFlags(0))
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert tracing.trace_id() == f"{5:032x}"
        assert tracing.outgoing() == {"traceparent": f"00-{5:032x}-{6:016x}-00"}


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        (None, {}),
        ({"redelivered": True}, {}),
        ({"traceparent": PARENT, "parked_wait": {}}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": "a=1"}, Trace(PARENT, "a=1").headers()),
    ],
)
def test_a_message_that_goes_on_keeps_its_trace_and_no_other_header(headers, found):
    assert tracing.headers_of(SimpleNamespace(headers=headers)) == found


def test_a_note_names_the_trace_whole_whatever_else_is_in_it():
    request = TriggerRequest("d", key="k" * 200, note="by hand " * 80)
    note = note_for(request, "t" * 60, Asked(at=0.0, by="b" * 100), Trace(PARENT, "rojo=1"))

    ours, _, theirs = note.partition("\n\n")
    assert ours.endswith(f" traceparent={PARENT}")
    assert len(ours) == 300
    assert theirs == request.note
    assert names(note, "t" * 60)
    assert "rojo" not in note
