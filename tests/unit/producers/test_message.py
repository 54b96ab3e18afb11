"""A message is read in one place: what it asks for, by which id, or what is wrong with it."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cloudevents.core.bindings import amqp, http, kafka, rabbitmq
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from producers.client import RelayClient
from producers.contract import MAX_CONF_BYTES, MAX_CONF_DEPTH, PollRequest, TriggerRequest
from producers.door import Door
from producers.errors import InvalidRequest
from producers.queues.message import (
    MAX_MESSAGE_BYTES,
    MAX_REASON_LENGTH,
    Event,
    Incoming,
    Order,
    event_of,
    order_of,
    read,
    task_id_for,
)

CANARY = "canary-7d1f"
TRACE = f"00-{'a' * 32}-{'b' * 16}-01"
JOB = {"service": "render", "path": "/jobs/{job_id}", "submit": {"path": "/jobs"}}


class Recorded:
    """Routes that run one DAG for every event, and remember them."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def order(self, event: Event) -> TriggerRequest:
        self.events.append(event)
        return TriggerRequest("routed", {"type": event.type})


def message(given: Any, **more: Any) -> Incoming:
    return Incoming(given if isinstance(given, bytes) else json.dumps(given).encode(), **more)


def taken(given: Any, **more: Any) -> Order:
    return read(message(given, **more), door="stream:a")


def refusal(given: Any, **more: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        taken(given, **more)
    return str(caught.value)


# What it asks for


def test_an_object_with_a_dag_id_is_a_trigger_and_one_with_a_service_is_a_job():
    assert taken({"dag_id": "sales", "conf": {"day": 1}}).request == TriggerRequest("sales", {"day": 1})
    assert taken(JOB).request == PollRequest(**JOB)


def test_what_stands_beside_the_request_is_no_part_of_it():
    order = taken(
        {
            "dag_id": "sales",
            "id": "m1",
            "countdown": 0,
            "expires": 60,
            "reply_to": "replies",
            "traceparent": TRACE,
        }
    )
    assert order.request == TriggerRequest("sales")
    assert order.envelope.reply_to == "replies"
    assert order.options() == {
        "task_id": task_id_for("stream:a", "id", "m1"),
        "countdown": 0,
        "expires": 60,
        "traceparent": TRACE,
    }


def test_it_is_due_at_an_instant():
    due = taken({"dag_id": "sales", "eta": "2030-01-01T00:00:00Z"}).options()["eta"]
    assert due == datetime(2030, 1, 1, tzinfo=UTC)


def test_null_is_as_left_out():
    order = taken({"dag_id": "sales", "conf": None, "key": None, "countdown": None, "reply_to": None})
    assert order.request == TriggerRequest("sales")
    assert order.options() == {}


def test_the_body_goes_before_what_lies_around_it():
    around = {
        "id": "outer",
        "reply_to": "outer",
        "correlation_id": "outer",
        "headers": {"traceparent": TRACE},
    }
    plain = taken({"dag_id": "a"}, **around)
    assert plain.task_id == task_id_for("stream:a", "message", "outer")
    assert (plain.envelope.reply_to, plain.envelope.correlation_id) == ("outer", "outer")
    assert plain.envelope.traceparent == TRACE

    own = TRACE.replace("a", "c")
    inner = {"id": "inner", "reply_to": "inner", "correlation_id": "inner", "traceparent": own}
    told = taken({"dag_id": "a", **inner}, **around)
    assert told.task_id == task_id_for("stream:a", "id", "inner")
    assert (told.envelope.reply_to, told.envelope.correlation_id) == ("inner", "inner")
    assert told.envelope.traceparent == own


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": "nonsense"},
        {"traceparent": "\ud800"},
        {"tracestate": "a=b"},  # without its traceparent
        {"traceparent": TRACE, "tracestate": "\x01"},
    ],
)
def test_an_odd_trace_of_a_proxy_refuses_nothing(headers: dict[str, str], nobody: RelayClient):
    order = taken({"dag_id": "a"}, headers=headers)
    Door(nobody, "test").prepare(order)
    assert order.envelope.tracestate is None


def test_a_tracestate_of_the_full_length_is_kept():
    state = "a=" + "x" * 510
    order = taken({"dag_id": "a"}, headers={"traceparent": TRACE, "tracestate": state})
    assert order.envelope.tracestate == state


# Ids


def test_the_same_message_has_the_same_id_and_another_door_another():
    once, again = taken({"dag_id": "a", "id": "m1"}), taken({"dag_id": "a", "id": "m1"})
    assert once.task_id == again.task_id
    assert taken({"dag_id": "a"}).task_id is None
    elsewhere = read(message({"dag_id": "a", "id": "m1"}), door="stream:b")
    assert elsewhere.task_id != once.task_id


def test_ids_are_told_apart_whatever_their_kind_and_their_characters():
    event = {
        "specversion": "1.0",
        "type": "dagrelay.trigger",
        "source": "m",
        "id": "1",
        "data": {"dag_id": "a"},
    }
    ids = {
        taken({"dag_id": "a", "id": "1"}).task_id,
        taken({"dag_id": "a"}, id="1").task_id,
        taken(event).task_id,
        taken({**event, "id": "11"}).task_id,
        taken({**event, "source": "m1"}).task_id,
        taken({"dag_id": "a"}, id="\ud800").task_id,
        taken({"dag_id": "a"}, id="é").task_id,
        taken({"dag_id": "a"}, id="").task_id,
    }
    assert len(ids) == 8
    assert task_id_for("a", "bc") != task_id_for("ab", "c")
    assert task_id_for("a\0b") != task_id_for("a", "b")


def test_task_ids_never_change():
    """Messages that were taken before an upgrade come again after it."""
    assert task_id_for("stream:a", "id", "m1") == "f0779af7-21af-56ce-9510-1c24e0e6eb86"


# CloudEvents, as the official SDK writes them


def written(kind: str = "dagrelay.trigger", data: Any = None, **attributes: Any) -> CloudEvent:
    given = {"type": kind, "source": "/shops/münchen", "id": "e 1", "datacontenttype": "application/json"}
    return CloudEvent(
        {**given, **attributes}, {"dag_id": "sales", "conf": {"ü": 1}} if data is None else data
    )


def text_of(headers: dict[str, Any]) -> dict[str, str]:
    return {
        name.lower(): value.decode() if isinstance(value, bytes) else str(value)
        for name, value in headers.items()
    }


def ways(event: CloudEvent) -> dict[str, Incoming]:
    """One event by every binding of the SDK, as a door hands it on."""
    form = JSONFormat()
    made: dict[str, Incoming] = {}
    for mode in ("binary", "structured"):
        over_http = getattr(http, f"to_{mode}")(event, form)
        headers = text_of(over_http.headers)
        made[f"http {mode}"] = Incoming(over_http.body, None, headers.get("content-type", ""), headers)
        over_kafka = getattr(kafka, f"to_{mode}")(event, form)
        headers = text_of(over_kafka.headers)
        made[f"kafka {mode}"] = Incoming(over_kafka.value, None, headers.get("content-type", ""), headers)
        over_rabbit = getattr(rabbitmq, f"to_{mode}")(event, form)
        headers = text_of(over_rabbit.headers)
        made[f"rabbitmq {mode}"] = Incoming(over_rabbit.body, None, over_rabbit.content_type or "", headers)
        over_amqp = getattr(amqp, f"to_{mode}")(event, form)
        made[f"amqp 1.0 {mode}"] = Incoming(
            over_amqp.application_data,
            None,
            over_amqp.properties.get("content-type", ""),
            text_of(over_amqp.application_properties),
        )
    return made


def test_an_event_of_the_sdk_asks_for_the_same_by_every_way():
    orders = {way: read(one, door="d") for way, one in ways(written()).items()}
    assert len(orders) == 8
    for way, order in orders.items():
        assert order.request == TriggerRequest("sales", {"ü": 1}), way
        assert order.task_id == task_id_for("d", "event", "/shops/münchen", "e 1"), way


def test_a_job_in_an_event():
    for way, one in ways(written("dagrelay.job", JOB)).items():
        assert read(one, door="d").request == PollRequest(**JOB), way


def test_any_other_event_goes_by_the_routes():
    routes = Recorded()
    sent = written("com.example.order", {"total": 3}, subject="o 7%", shopid="m1")
    for one in ways(sent).values():
        assert read(one, door="d", routes=routes).request.dag_id == "routed"
    for event in routes.events:
        assert (event.id, event.source, event.type) == ("e 1", "/shops/münchen", "com.example.order")
        assert event.data == {"total": 3}
        assert (event.attributes["subject"], event.attributes["shopid"]) == ("o 7%", "m1")


@pytest.mark.parametrize(
    ("data", "kind", "expected"),
    [
        ("a text", "text/plain", "a text"),
        (b"\xff\x00", "application/octet-stream", base64.b64encode(b"\xff\x00").decode()),
    ],
)
def test_data_of_an_event_that_is_no_json(data: Any, kind: str, expected: str):
    routes = Recorded()
    for one in ways(written("com.example", data, datacontenttype=kind)).values():
        read(one, door="d", routes=routes)
    assert {event.data for event in routes.events} == {expected}


def test_an_event_without_data():
    routes = Recorded()
    event = {"specversion": "1.0", "type": "t", "source": "s", "id": "1"}
    read(message(event), door="d", routes=routes)
    headers = {f"ce-{name}": value for name, value in event.items()}
    read(Incoming(b"", headers=headers), door="d", routes=routes)
    assert [one.data for one in routes.events] == [None, None]


def test_an_event_is_known_by_its_content_its_type_or_its_headers():
    event = {"specversion": "1.0", "type": "t", "source": "s", "id": "1", "data": 1}
    assert event_of(message(event)) is not None
    assert event_of(message(event, content_type="application/cloudevents+json; charset=utf-8")) is not None
    assert event_of(message({"dag_id": "a", "conf": {"specversion": "1.0"}})) is None


def test_the_envelope_of_an_event_is_in_its_data():
    event = {"specversion": "1.0", "type": "dagrelay.trigger", "source": "s", "id": "1", "traceparent": TRACE}
    order = taken({**event, "data": {"dag_id": "a", "reply_to": "replies", "id": "mine"}})
    assert order.envelope.reply_to == "replies"
    assert order.envelope.traceparent == TRACE
    assert order.task_id == task_id_for("stream:a", "id", "mine")


# What is wrong, by its text

EVENT = {"specversion": "1.0", "type": "dagrelay.trigger", "source": "s", "id": "1", "data": {"dag_id": "a"}}
STRUCTURED = {"content_type": "application/cloudevents+json"}

REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("nothing", b"", {}, "body: is no JSON at character 0: send an object such as"),
    ("bytes", b"\xff\xfe", {}, "body: is not UTF-8"),
    ("half an object", b'{"dag_id": "a"', {}, "body: is no JSON at character 14"),
    ("two objects", b"{} {}", {}, "body: is no JSON at character 3"),
    ("an array", [1], {}, "body: is JSON, and no object"),
    ("a string", "a", {}, "body: is JSON, and no object"),
    ("NaN", b'{"dag_id": "a", "conf": {"x": NaN}}', {}, "body: holds NaN, which is not JSON"),
    ("minus infinity", b'{"dag_id": "a", "conf": {"x": -Infinity}}', {}, "body: holds -Infinity"),
    ("a key twice", b'{"dag_id": "a", "dag_id": "b"}', {}, "body: names a key of one object twice"),
    ("401 digits", b'{"dag_id": "a", "conf": {"x": %s}}' % (b"9" * 401), {}, "body: holds a number of more"),
    ("100,000 brackets", b"[" * 100_000, {}, "body: is nested deeper than"),
    ("too large", b" " * (MAX_MESSAGE_BYTES + 1), {}, f"body: is {MAX_MESSAGE_BYTES + 1} bytes, over"),
    ("nothing asked for", {}, {}, "dag_id: give the DAG to run, or the service of a job"),
    ("both asked for", {"dag_id": "a", "service": "b"}, {}, "dag_id: give the DAG to run, or the service"),
    ("no DAG id", {"dag_id": None}, {}, "dag_id: "),
    ("a DAG id that is a path", {"dag_id": "../a"}, {}, "dag_id: is no DAG id"),
    ("an unknown field", {"dag_id": "a", "config": {}}, {}, "'config': no field of a trigger"),
    ("a field of a job", {"dag_id": "a", "interval_s": 1}, {}, "'interval_s': no field of a trigger"),
    ("a field of a trigger", {**JOB, "conf": {}}, {}, "'conf': no field of a job"),
    ("a conf that is text", {"dag_id": "a", "conf": "{}"}, {}, "conf: is of type str: a conf is an object"),
    ("a NUL", {"dag_id": "a", "conf": {"x": "\0"}}, {}, "conf.x holds a NUL"),
    ("a surrogate", {"dag_id": "a", "conf": {"x": "\ud800"}}, {}, "conf.x holds a lone surrogate"),
    ("65 bits", {"dag_id": "a", "conf": {"x": 2**63}}, {}, "conf.x is an integer beyond 64 bits"),
    (
        "a large conf by value",
        {"dag_id": "a", "conf": {"x": "x" * MAX_CONF_BYTES}, "conf_by": "value"},
        {},
        "conf: is 1000008 bytes",
    ),
    ("an id that is a number", {"dag_id": "a", "id": 7}, {}, "id: "),
    ("an empty id", {"dag_id": "a", "id": ""}, {}, "id: "),
    ("a negative countdown", {"dag_id": "a", "countdown": -1}, {}, "countdown: "),
    ("an eta without a zone", {"dag_id": "a", "eta": "2030-01-01T00:00:00"}, {}, "eta: "),
    ("no eta", {"dag_id": "a", "eta": "tomorrow"}, {}, "eta: is no ISO 8601"),
    (
        "an eta at the end",
        {"dag_id": "a", "eta": "9999-12-31T23:59:59-14:00"},
        {},
        "eta: lies after the year",
    ),
    (
        "two times",
        {"dag_id": "a", "countdown": 1, "eta": "2030-01-01T00:00:00Z"},
        {},
        "countdown and eta: give one of them",
    ),
    ("no priority", {"dag_id": "a", "priority": True}, {}, "priority: "),
    (
        "a credential",
        {**JOB, "headers": {"Authorization": CANARY}},
        {},
        "headers: 'Authorization' belongs to",
    ),
    ("an old event", {**EVENT, "specversion": "0.3"}, {}, "specversion: is not 1.0"),
    ("an event of no kind", {**EVENT, "type": ""}, {}, "type: is missing"),
    ("an event without an id", {**EVENT, "id": None}, {}, "id: is missing"),
    ("an attribute that is a list", {**EVENT, "subject": []}, {}, "subject: an attribute of an event is a"),
    (
        "an attribute that is none",
        {**EVENT, "subject": "\ud800"},
        {},
        "subject: is over 2000 characters, or no",
    ),
    ("a long attribute", {**EVENT, "subject": "x" * 2001}, {}, "subject: is over 2000 characters"),
    ("an event of another kind", {**EVENT, "type": "x"}, {}, "type: 'x' is neither 'dagrelay.trigger' nor"),
    ("data that are none", {**EVENT, "data": "a"}, {}, "data: is no JSON object"),
    (
        "a job in a trigger",
        {**EVENT, "data": JOB},
        {},
        "data: of an event of type 'dagrelay.trigger' has dag_id",
    ),
    ("data twice", {**EVENT, "data_base64": "e30="}, {}, "data_base64: give data or data_base64"),
    ("bad base64", {**EVENT, "data": None, "data_base64": "%"}, {}, "data_base64: is no base64"),
    ("base64 of bytes", {**EVENT, "data": None, "data_base64": "/w=="}, {}, "data: is not UTF-8"),
    ("an event that is an array", [EVENT], STRUCTURED, "body: is JSON, and no object"),
    (
        "a batch",
        [EVENT],
        {"content_type": "application/cloudevents-batch+json"},
        "content-type: a batch of events: send each",
    ),
    (
        "an XML event",
        b"<e/>",
        {"content_type": "application/cloudevents+xml"},
        "content-type: events are read as",
    ),
    (
        "a binary event whose data is none",
        b"{",
        {"headers": {"ce-specversion": "1.0", "ce-type": "t", "ce-source": "s", "ce-id": "1"}},
        "data: is no JSON at character 1",
    ),
    ("a bad reply_to", {"dag_id": "a"}, {"reply_to": "x" * 251}, "reply_to: "),
    ("a correlation id with a NUL", {"dag_id": "a"}, {"correlation_id": "\0"}, "correlation_id: holds a NUL"),
]


@pytest.mark.parametrize(
    ("body", "more", "text"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_a_refusal_says_what_is_wrong(body: Any, more: dict[str, Any], text: str):
    said = refusal(body, **more)
    assert said.startswith(text)
    assert CANARY not in said


@pytest.mark.parametrize("depth", [MAX_CONF_DEPTH, 500, 50_000])
def test_what_is_nested_too_deep_is_refused_by_every_reader(depth: int):
    deep: bytes = b'{"a":' * depth + b"1" + b"}" * depth
    assert "nested deeper than 64 levels" in refusal(b'{"dag_id": "a", "conf": %s}' % (b'{"a":%s}' % deep))


@pytest.mark.parametrize(
    "body",
    [
        {"dag_id": "a", "conf": {"line\nbreak": 2**70}},
        {"dag_id": "a", "conf": {"x" * 5000: 2**70}},
        {**EVENT, "sub\nject": []},
        {**EVENT, "\ud800": []},
        {**JOB, "submit": {"path": "/", "no\r\nfield": 1}},
        {**JOB, "submit": {"path": "/", "\ud800": 1}},
        {**JOB, "headers": {"x\ny": 1}},
        {**JOB, "state": "\n\ud800["},
        {**JOB, "then": {"dag_id": "a", "no\nfield": 1}},
        {"dag_id": "a", **{f"{n}\n": 1 for n in range(1000)}},
    ],
)
def test_a_refusal_is_one_printable_line_of_bounded_length(body: dict[str, Any]):
    """It goes into a line of TCP, a header, a log line, a dead queue: what the sender chose is in it."""
    said = refusal(body)
    assert said.isprintable()
    assert len(said) <= MAX_REASON_LENGTH
    said.encode()


def test_fields_that_are_no_message_are_read_by_the_same_rules():
    order = order_of({"dag_id": "a", "id": "m1"}, door="http")
    assert order.task_id == task_id_for("http", "id", "m1")
    with pytest.raises(InvalidRequest, match="no field of a trigger"):
        order_of({"dag_id": "a", "v": 1}, door="http")


def test_headers_that_are_no_text_are_refused_and_not_fatal():
    headers = {"ce-specversion": "1.0", "ce-type": "t%C3\ud800", "ce-source": "s", "ce-id": "1"}
    with pytest.raises(InvalidRequest):
        read(Incoming(b"1", headers=headers), door="d")


def test_whatever_is_read_can_be_put_on_record(nobody: RelayClient):
    """The outermost values of every field: nothing between the door and Redis trips over them."""
    door = Door(nobody, "test")
    for given in (
        {"dag_id": "a", "eta": "2100-12-31T23:59:59-14:00"},
        {"dag_id": "a", "eta": "0001-01-01T00:00:00+14:00"},
        {"dag_id": "a", "logical_date": "9999-12-31T23:59:59-14:00"},
        {"dag_id": "a", "window": 10**300, "give_up_after_s": 1.7e308},
        {"dag_id": "a" * 250, "key": "\n" * 512, "note": "\n" * 700, "reply_to": "\n" * 250},
        {"dag_id": "a", "expires": 1e-300, "countdown": 1e-300},
    ):
        item = door.prepare(taken(given))
        json.loads(item.message)
    with pytest.raises(InvalidRequest, match="eta: is more than a hundred years away"):
        door.prepare(taken({"dag_id": "a", "eta": "9998-12-31T23:59:59-14:00"}))
