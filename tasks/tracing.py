"""The caller's trace in a worker: a span for each attempt, and its id in the log and in HTTP requests.

A message carries W3C trace context in its headers, `traceparent` and `tracestate`, as Celery's own
instrumentation for OpenTelemetry does; so what others publish is accepted as well. OpenTelemetry is optional,
and used where somebody has loaded it: without a provider of spans, which has to be set up
(`opentelemetry-instrument celery -A tasks worker`), there is nobody to tell, and the caller's context goes on
as it came.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from celery import states

from producers.stores.envelope import Trace, trace_of

_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def current() -> Trace | None:
    """Return the trace of the message that this thread works on, as its caller gave it."""
    return _current.get()


def headers_of(request: Any) -> dict[str, str]:
    """Return a running request's trace as headers for the message that goes on with it."""
    found = trace_of(request.headers or {}) if request is not None else None
    return found.headers() if found is not None else {}


def trace_id() -> str:
    """Return the id of the trace that this thread works on, 32 hex digits, or ""."""
    found = _current.get()
    if found is not None:
        return found.trace_id
    span = _span()
    return f"{span.trace_id:032x}" if span is not None else ""


def outgoing() -> dict[str, str]:
    """Return the headers of an HTTP request that belongs to what this thread works on."""
    span = _span()
    if span is not None:
        headers = {"traceparent": f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"}
        if state := span.trace_state.to_header():
            headers["tracestate"] = state
        return headers
    found = _current.get()
    return found.headers() if found is not None else {}


def _span() -> Any:
    """Return the context of the current span, if there is one."""
    otel: Any = sys.modules.get("opentelemetry.trace")
    context = otel.get_current_span().get_span_context() if otel is not None else None
    return context if context is not None and context.is_valid else None


def traced(task: Any, tracer: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Celery's tracer of a task: while it works on a message, the trace of that is the current one."""

    def trace(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        caller = trace_of(request) if isinstance(request, Mapping) else None
        otel: Any = sys.modules.get("opentelemetry.trace")
        if caller is None and otel is None:
            return tracer(uuid, args, kwargs, request)
        before = _current.set(caller)
        try:
            if otel is None or not task.recorded:  # looks, once a second, are nobody's
                return tracer(uuid, args, kwargs, request)
            with _begun(otel, task, caller, uuid, kwargs, request) as span:
                answer = tracer(uuid, args, kwargs, request)
                if span.is_recording():
                    _tell_end(otel, span, answer)
                return answer
        finally:
            _current.reset(before)

    return trace


def _begun(otel: Any, task: Any, caller: Trace | None, task_id: str, kwargs: Any, request: Any) -> Any:
    """Start the span of one attempt, as a child of the caller's; a context manager.

    Source: semantic conventions for messaging spans, 1.27.
    """
    from opentelemetry.context import Context

    context = Context()
    if caller is not None:
        parent = otel.SpanContext(
            int(caller.trace_id, 16),
            int(caller.traceparent[36:52], 16),
            is_remote=True,
            trace_flags=otel.TraceFlags(int(caller.traceparent[53:], 16)),
            trace_state=otel.TraceState.from_header([caller.tracestate] if caller.tracestate else []),
        )
        context = otel.set_span_in_context(otel.NonRecordingSpan(parent), context)
    delivery = (request or {}).get("delivery_info") or {}
    attributes = {
        "messaging.system": "redis",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": str(delivery.get("routing_key") or ""),
        "messaging.message.id": task_id,
        "dagrelay.attempt": int((request or {}).get("retries") or 0) + 1,
    }
    if isinstance(kwargs, Mapping):
        if isinstance(kwargs.get("dag_id"), str):
            attributes["dagrelay.connection"] = "default"
        for name in ("dag_id", "connection", "service", "fan_out_id"):
            if isinstance(kwargs.get(name), str):
                attributes[f"dagrelay.{name}"] = kwargs[name][:250]
    return otel.get_tracer("dagrelay").start_as_current_span(
        f"dagrelay {task.name.removeprefix('tasks.')}",
        context=context,
        kind=otel.SpanKind.CONSUMER,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    )


def _tell_end(otel: Any, span: Any, answer: Any) -> None:
    """Tell a span how the attempt ended: by class alone, for the words may quote a value."""
    info = getattr(answer, "info", None)
    state = getattr(info, "state", None) or states.SUCCESS
    span.set_attribute("dagrelay.state", state)
    if state == states.FAILURE:
        error = type(info.retval).__name__ if info is not None else "Exception"
        span.set_attribute("error.type", error)
        span.set_status(otel.Status(otel.StatusCode.ERROR, error))
