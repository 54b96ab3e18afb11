"""The caller's trace, found where OpenTelemetry has one or the caller gives it.

OpenTelemetry is optional and never imported from here: who has a current span has loaded it. Only the trace
context goes with a message, and no baggage, which may hold anything.
"""

from __future__ import annotations

import sys
from typing import Any

from .errors import InvalidRequest
from .stores.envelope import Trace, trace_of


def of_caller() -> Trace | None:
    """Return the context of the caller's current span, if there is one."""
    otel: Any = sys.modules.get("opentelemetry.trace")
    if otel is None:
        return None
    context = otel.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    return trace_of({"traceparent": parent, "tracestate": context.trace_state.to_header()})


def of_call(traceparent: str | None, tracestate: str | None) -> Trace | None:
    """Return the trace that a call names, else that of its caller. Raises InvalidRequest for a wrong one."""
    if traceparent is None and tracestate is None:
        return of_caller()
    found = trace_of({"traceparent": traceparent, "tracestate": tracestate})
    if found is None:
        raise InvalidRequest("traceparent: give a W3C trace context, 00-<32 hex>-<16 hex>-<2 hex>")
    if tracestate and not found.tracestate:
        raise InvalidRequest("tracestate: give up to 512 characters of printable ASCII")
    return found
