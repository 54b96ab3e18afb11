"""The caller's trace goes with a request: where OpenTelemetry has one, or the caller gives it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, trace
from opentelemetry.context import attach, detach

from producers.contract import TriggerRequest
from producers.errors import InvalidRequest
from producers.stores.envelope import Trace, trace_of

SALES = TriggerRequest("daily_sales", {"day": "2026-11-20"})
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def headers(item: Any) -> dict[str, Any]:
    return json.loads(item.message)["headers"]


def current_span(state: str = "") -> Any:
    context = trace.SpanContext(
        0x0AF7651916CD43DD8448EB211C80319C,
        0xB7AD6B7169203331,
        is_remote=False,
        trace_flags=trace.TraceFlags(1),
        trace_state=trace.TraceState.from_header([state] if state else []),
    )
    return trace.use_span(trace.NonRecordingSpan(context))


def test_the_callers_current_span_goes_with_the_message(nobody):
    with current_span("rojo=00f067aa0ba902b7"):
        sent = headers(nobody.item(SALES, task_id="t1"))

    assert (sent["traceparent"], sent["tracestate"]) == (PARENT, "rojo=00f067aa0ba902b7")


def test_without_a_span_the_message_is_the_one_that_it_was(nobody):
    assert not {"traceparent", "tracestate"} & headers(nobody.item(SALES)).keys()


def test_baggage_stays_with_the_caller(nobody):
    token = attach(baggage.set_baggage("customer", "kanarienvogel"))
    try:
        with current_span():
            item = nobody.item(SALES)
    finally:
        detach(token)

    assert headers(item)["traceparent"] == PARENT
    assert b"kanarienvogel" not in item.message


def test_a_trace_that_the_caller_gives_goes_before_that_of_the_span(nobody):
    given = PARENT.replace("b7ad", "ffff")
    with current_span():
        sent = headers(nobody.item(SALES, traceparent=given, tracestate="a=1"))

    assert (sent["traceparent"], sent["tracestate"]) == (given, "a=1")


WRONG = [
    "",
    "00",
    PARENT.upper(),
    f"{PARENT} ",
    f"{PARENT}\n",
    f"{PARENT}-00",
    PARENT.replace("00-", "ff-"),
    f"00-{'0' * 32}-b7ad6b7169203331-01",
    f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
    PARENT.replace("a", "ä"),
    PARENT.replace("0", "٠"),
    None,
    7,
    [PARENT],
]


@pytest.mark.parametrize("wrong", [one for one in WRONG if one is not None])
def test_a_wrong_trace_is_refused_at_the_caller(nobody, wrong):
    with pytest.raises(InvalidRequest, match="traceparent: "):
        nobody.item(SALES, traceparent=wrong)


@pytest.mark.parametrize("wrong", ["a=1\n", "ä=1", "x" * 513])
def test_a_wrong_state_is_refused_at_the_caller(nobody, wrong):
    with pytest.raises(InvalidRequest, match="tracestate: "):
        nobody.item(SALES, traceparent=PARENT, tracestate=wrong)


def test_a_state_without_a_trace_is_refused(nobody):
    with pytest.raises(InvalidRequest, match="traceparent: "):
        nobody.item(SALES, tracestate="a=1")


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_trace_in_a_message_is_none(wrong):
    assert trace_of({"traceparent": wrong}) is None


@pytest.mark.parametrize("wrong", ["a\0b", "", "x" * 513, 7, None])
def test_a_wrong_state_in_a_message_is_left_out(wrong):
    assert trace_of({"traceparent": PARENT, "tracestate": wrong}) == Trace(PARENT)


def test_a_later_version_of_the_header_is_understood():
    assert trace_of({"traceparent": PARENT.replace("00-", "01-")}) is not None


@given(st.dictionaries(st.sampled_from(["traceparent", "tracestate"]), st.text() | st.integers() | st.none()))
def test_nothing_that_is_in_headers_breaks_the_reading(odd):
    found = trace_of(odd)
    assert found is None or len(found.traceparent) == 55


def test_where_opentelemetry_is_not_installed_a_trace_can_be_given_all_the_same():
    code = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"  # as if it were not there
        "from producers.client import RelayClient\n"
        "from producers.contract import TriggerRequest\n"
        "from producers.settings import ProducerSettings\n"
        "client = RelayClient(ProducerSettings(redis_url='redis://127.0.0.1:1/0', client_name='x'))\n"
        "item = client.item(TriggerRequest('sales'), traceparent=sys.argv[1])\n"
        "assert sys.argv[1].encode() in item.message\n"
        "assert b'traceparent' not in client.item(TriggerRequest('sales')).message\n"
        "print(*[name for name in sys.modules if name.startswith('opentelemetry.')])\n"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code, PARENT], cwd=root, capture_output=True, check=True)
    assert done.stdout.strip() == b""
