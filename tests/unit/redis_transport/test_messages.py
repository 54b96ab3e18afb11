"""What the reader lets through, and what it says of the rest."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.worker.request import Request
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.serialization import loads as pool_loads

from tasks.redis_transport import messages
from tasks.redis_transport.channel import Message
from tasks.redis_transport.messages import Readable, Unreadable

JSON = ("application/json",)
DELETED = object()


def stock(protocol: int = 2, *, encode: bool = True, **options: Any) -> dict[str, Any]:
    """Return the envelope that a stock Celery producer would write to Redis."""
    app = Celery("producer", broker="memory://", set_as_current=False)
    app.conf.task_protocol = protocol
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        if not encode:
            channel.body_encoding = None
        written: list[dict[str, Any]] = []
        channel._put = lambda _queue, message, **_: written.append(message)
        with app.amqp.Producer(channel) as producer:
            app.send_task("t.add", options.pop("args", (1, 2)), {"x": "é"}, producer=producer, **options)
    app.close()
    return written[0]


def read(envelope: Any, timezone: Any = UTC) -> Readable:
    raw = envelope if isinstance(envelope, bytes) else json.dumps(envelope).encode()
    return messages.read(raw, "q", accept=JSON, timezone=timezone)


def change(envelope: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy with one field changed or (DELETED) without it; `body.2.chain` is in the body."""
    found: dict[str, Any] = json.loads(json.dumps(envelope))
    names: list[Any] = [int(part) if part.isdecimal() else part for part in path.split(".")]
    inside = names[0] == "body" and len(names) > 1
    at: Any = found
    if inside:
        text = found["body"]
        if found["properties"].pop("body_encoding", None):
            text = base64.b64decode(text).decode()
        at, names = json.loads(text), names[1:]
    top = at
    for name in names[:-1]:
        at = at[name]
    if value is DELETED:
        del at[names[-1]]
    else:
        at[names[-1]] = value
    if inside:
        found["body"] = json.dumps(top)
    return found


V2 = stock(task_id="id-2")
V1 = stock(protocol=1, task_id="id-1")
SIGNATURE = {"task": "t.add", "args": [1], "kwargs": {}, "options": {}}


# -- what is valid


@pytest.mark.parametrize("encode", [True, False], ids=["base64", "text"])
@pytest.mark.parametrize("protocol", [2, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"retries": 3},
        {"countdown": 60},
        {"expires": 60},
        {"priority": 5},
        {"time_limit": 10, "soft_time_limit": 5},
        {"link": Celery().signature("t.link"), "link_error": Celery().signature("t.error")},
        {"group_id": "g", "group_index": 3, "chord": Celery().signature("t.body")},
        {"root_id": "r", "parent_id": "p", "shadow": "s", "reply_to": "here"},
        {"headers": {"mine": {"a": [1]}}},
        {"args": ({"a": datetime(2026, 1, 1, tzinfo=UTC)}, b"\xff\0")},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_what_a_stock_producer_writes_is_read(protocol, encode, options):
    envelope = stock(protocol, encode=encode, task_id="the-id", **options)

    found = read(envelope)

    assert found.task_id == "the-id"
    assert found.retries == options.get("retries", 0)
    assert (found.eta is None) == ("countdown" not in options)
    assert (found.expires is None) == ("expires" not in options)
    for name in "countdown", "expires":
        if name in options:
            instant = found.eta if name == "countdown" else found.expires
            assert 50 < (instant or 0) - datetime.now(UTC).timestamp() < 70


def test_stamps_are_read():
    headers = V2["headers"] | {"stamped_headers": ["mine"], "stamps": {"mine": ["x"]}, "mine": ["x"]}
    assert read(V2 | {"headers": headers}).task_id == "id-2"


def test_the_smallest_message_of_another_language_is_read():
    smallest = {
        "body": "[[3,4],{},null]",
        "content-type": "application/json",
        "headers": {"task": "t.add", "id": "ID"},
    }
    found = read(smallest)
    assert (found.task_id, found.retries, found.decoded) == ("ID", 0, [[3, 4], {}, None])
    assert found.envelope["properties"]["delivery_info"] == {"exchange": "", "routing_key": "q"}


@pytest.mark.parametrize(
    ("eta", "zone", "instant"),
    [
        ("2026-06-01T12:00:00+00:00", "UTC", datetime(2026, 6, 1, 12, tzinfo=UTC)),
        ("2026-06-01T12:00:00Z", "Europe/Berlin", datetime(2026, 6, 1, 12, tzinfo=UTC)),
        ("2026-06-01T12:00:00.5+02:00", "UTC", datetime(2026, 6, 1, 10, 0, 0, 500000, tzinfo=UTC)),
        ("2026-06-01T12:00:00", "UTC", datetime(2026, 6, 1, 12, tzinfo=UTC)),
        ("2026-06-01T12:00:00", "Europe/Berlin", datetime(2026, 6, 1, 10, tzinfo=UTC)),
        ("2026-01-01T12:00:00", "Europe/Berlin", datetime(2026, 1, 1, 11, tzinfo=UTC)),
        ("0001-01-01T00:00:00+00:00", "UTC", datetime(1, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59", "Pacific/Kiritimati", datetime(9999, 12, 31, 9, 59, 59, tzinfo=UTC)),
    ],
)
@pytest.mark.parametrize("protocol", [2, 1])
def test_an_eta_is_read_in_its_zone_or_the_applications(protocol, eta, zone, instant):
    envelope = change(V2, "headers.eta", eta) if protocol == 2 else change(V1, "body.eta", eta)
    assert read(envelope, ZoneInfo(zone)).eta == instant.timestamp()


@pytest.mark.parametrize("protocol", [2, 1])
@pytest.mark.parametrize("encode", [True, False], ids=["base64", "text"])
def test_without_its_eta_a_message_is_otherwise_the_same(protocol, encode):
    envelope = stock(protocol, encode=encode, task_id="i", countdown=60, args=(datetime(2026, 1, 1),))
    found = read(envelope)
    messages.strip_eta(found)
    again = read(messages.encoded(found))
    assert again.eta is None
    assert again.headers["parked_eta"] is not None
    assert (again.task_id, again.retries) == ("i", 0)
    was, now = read(envelope).decoded, again.decoded
    if protocol == 1:
        was["eta"] = None
    assert now == was


def test_what_is_due_beyond_all_clocks_waits_and_is_no_error():
    assert read(change(V2, "headers.eta", "9999-12-31T23:59:59-14:00")).eta > 2.5e11


def test_a_revoked_one_is_still_read():
    raw = messages.revoked(json.dumps(V2).encode())
    assert read(raw).headers["parked_revoked"] is True
    # Of protocol 1 too, whose envelope may have had no headers at all.
    found = read(change(V1, "headers", None))
    messages.strip_eta(found)
    assert read(messages.revoked(messages.encoded(found))).headers["parked_revoked"] is True


# -- what is not

HUGE = "9" * 5000
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0",
        b"\xff\xfe\xfd",
        b"{",
        b"nonsense",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b"NaN",
        b"{}",
        HUGE.encode(),
        DEEP.encode(),
        b'{"headers":' + DEEP.encode() + b"}",
        json.dumps(V2).encode()[:-1],
        json.dumps(V2).encode() + b"\0",
        b"\x80\x04\x95" + b"pickle",
    ],
    ids=repr if sys.flags.verbose else lambda raw: repr(raw[:12]),
)
def test_bytes_that_are_no_message_are_unreadable(raw):
    with pytest.raises(Unreadable, match=r"JSON|content-type"):
        read(raw)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("headers", [], "headers"),
        ("headers", "x", "headers"),
        ("headers", {}, "headers.task"),
        ("properties", 5, "properties"),
        ("properties.delivery_info", "x", "delivery_info"),
        ("properties.delivery_info.exchange", 1, "exchange"),
        ("properties.delivery_info.routing_key", {}, "routing_key"),
        ("properties.correlation_id", 1, "correlation_id"),
        ("properties.reply_to", [], "reply_to"),
        ("properties.body_encoding", 1, "body_encoding"),
        ("properties.body_encoding", "rot13", "body_encoding"),
        ("properties.priority", "high", "priority"),
        ("properties.priority", float("inf"), "priority"),
        ("content-type", DELETED, "content-type"),
        ("content-type", None, "content-type"),
        ("content-type", 5, "content-type"),
        ("content-type", "application/x-python-serialize", "content-type"),
        ("content-type", "application/x-yaml", "content-type"),
        ("content-encoding", 5, "content-encoding"),
        ("content-encoding", "utf-16", "content-encoding"),
        ("content-encoding", "zlib", "content-encoding"),
        ("body", DELETED, "body"),
        ("body", None, "body"),
        ("body", [[], {}, {}], "body"),
        ("body", "", "body"),
        ("body", "not base64!", "body"),
        ("body", base64.b64encode(b"\xff").decode(), "body"),
        ("body", base64.b64encode("[[],{},{}]".encode("utf-16")).decode(), "body"),
        ("body", base64.b64encode(b"\xef\xbb\xbf[[],{},{}]").decode(), "body"),
        ("body", base64.b64encode(DEEP.encode()).decode(), "body"),
        ("body", base64.b64encode(f"[[{HUGE}],{{}},{{}}]".encode()).decode(), "body"),
        ("headers.compression", "zlib", "compress"),
        ("headers.task", None, "headers.task"),
        ("headers.task", "", "headers.task"),
        ("headers.task", 5, "headers.task"),
        ("headers.task", "\ud800", "headers.task"),
        ("headers.id", DELETED, "headers.id"),
        ("headers.id", None, "headers.id"),
        ("headers.id", "", "headers.id"),
        ("headers.id", 5, "headers.id"),
        ("headers.id", ["x"], "headers.id"),
        ("headers.id", "\udfff", "headers.id"),
        ("headers.id", "x" * 2000, "headers.id"),
        ("headers.retries", "1", "retries"),
        ("headers.retries", 1.5, "retries"),
        ("headers.retries", True, "retries"),
        ("headers.retries", [], "retries"),
        ("headers.eta", 5, "eta"),
        ("headers.eta", "tomorrow", "eta"),
        ("headers.eta", "2026-13-01T00:00:00", "eta"),
        ("headers.eta", {}, "eta"),
        ("headers.expires", 5, "expires"),
        ("headers.expires", "never", "expires"),
        ("headers.lang", 1, "lang"),
        ("headers.shadow", {}, "shadow"),
        ("headers.group", [], "group"),
        ("headers.group_index", "x", "group_index"),
        ("headers.root_id", 5, "root_id"),
        ("headers.parent_id", 5, "parent_id"),
        ("headers.argsrepr", 5, "argsrepr"),
        ("headers.kwargsrepr", {}, "kwargsrepr"),
        ("headers.origin", 5, "origin"),
        ("headers.ignore_result", "x", "ignore_result"),
        ("headers.timelimit", 5, "timelimit"),
        ("headers.timelimit", [1], "timelimit"),
        ("headers.timelimit", ["a", "b"], "timelimit"),
        ("headers.timelimit", [True, None], "timelimit"),
        ("headers.stamped_headers", 5, "stamped_headers"),
        ("headers.stamped_headers", ["absent"], "stamped_headers"),
        ("headers.stamped_headers", [[]], "stamped_headers"),
        ("headers.stamps", [], "stamps"),
        ("headers.headers", [], "headers"),
        ("headers.replaced_task_nesting", "x", "replaced_task_nesting"),
        ("body.0", 5, "arguments"),
        ("body.0", None, "arguments"),
        ("body.1", [], "keyword arguments"),
        ("body.2", 5, "third element"),
        ("body.2", [], "third element"),
        ("body.2", {"callback": []}, "third element"),
        ("body.2", DELETED, "three"),
        ("body.2.callbacks", 5, "callbacks"),
        ("body.2.callbacks", [5], "callbacks"),
        ("body.2.errbacks", {"a": 1}, "errbacks"),
        ("body.2.chain", [{"args": []}], "chain"),
        ("body.2.chain", [SIGNATURE | {"args": 5}], "chain"),
        ("body.2.chord", 5, "chord"),
        ("body.2.chord", {"task": 5}, "chord"),
        ("body.1", {"x": {"__type__": "datetime", "__value__": "soon"}}, "body"),
        ("body.1", {"x": {"__type__": "no such", "__value__": 1}}, "body"),
        ("body.1", {"x": {"__type__": [], "__value__": 1}}, "body"),
    ],
)
def test_a_wrong_field_is_named(path, value, said):
    with pytest.raises(Unreadable, match=said):
        read(change(V2, path, value))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("body.task", DELETED, "task"),
        ("body.task", 5, "task"),
        ("body.id", DELETED, "id"),
        ("body.id", 5, "id"),
        ("body.id", "x" * 2000, "id"),
        ("body.args", 5, "args"),
        ("body.args", None, "args"),
        ("body.kwargs", [], "kwargs"),
        ("body.retries", "x", "retries"),
        ("body.eta", 5, "eta"),
        ("body.expires", "x", "expires"),
        ("body.timelimit", 5, "timelimit"),
        ("body.callbacks", 5, "callbacks"),
        ("body.errbacks", [5], "errbacks"),
        ("body.chord", [], "chord"),
        ("body.group", 5, "group"),
        ("body.taskset", 5, "taskset"),
        ("headers", {"id": "another"}, "headers.id"),
        ("headers", {"retries": "x"}, "headers.retries"),
        ("headers", {"eta": "2030-01-01T00:00:00"}, "headers.eta"),
    ],
)
def test_a_wrong_field_of_protocol_1_is_named(path, value, said):
    with pytest.raises(Unreadable, match=said):
        read(change(V1, path, value))


def test_the_reason_quotes_no_values():
    """A reason is logged, and lies in the quarantine's list; the message may hold secrets."""
    for path in "headers.eta", "headers.retries", "body.0", "properties.correlation_id", "body":
        with pytest.raises(Unreadable) as caught:
            read(change(V2, path, {"s3cret": "s3cret"}))
        assert "s3cret" not in str(caught.value)
    with pytest.raises(Unreadable) as caught:
        read(b'{"body": "s3cret')
    assert "s3cret" not in str(caught.value)


# -- whatever the bytes


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", "9999-12-31T23:59:59", "0001-01-01", "base64", "a\0b", 10**400, -(10**400)])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
paths = st.sampled_from(
    [
        *V2,
        *(
            f"headers.{name}"
            for name in (*V2["headers"], "compression", "stamped_headers", "stamps", "chord")
        ),
        *(f"properties.{name}" for name in (*V2["properties"], "priority", "expiration", "type")),
        *(f"properties.delivery_info.{name}" for name in ("exchange", "routing_key", "redelivered")),
        *(f"body.{name}" for name in ("0", "1", "2", "2.callbacks", "2.chain", "2.chord", "2.errbacks")),
    ]
)
paths_1 = st.sampled_from([*(f"body.{name}" for name in json.loads(base64.b64decode(V1["body"]))), "headers"])


def mutated(base: dict[str, Any], where: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    def apply(changes: list[tuple[str, Any]]) -> bytes:
        found = base
        for path, value in changes:
            try:
                found = change(found, path, value)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                continue  # an earlier change has removed what it lies in
        return json.dumps(found).encode()

    return st.lists(st.tuples(where, values | st.just(DELETED)), min_size=1, max_size=3).map(apply)


def spoilt(base: bytes) -> st.SearchStrategy[bytes]:
    """Bytes changed, cut out or put in."""
    where = st.integers(0, len(base))
    edits = st.lists(st.tuples(where, st.integers(0, 5), st.binary(max_size=4)), min_size=1, max_size=4)

    def apply(found: list[tuple[int, int, bytes]]) -> bytes:
        raw = base
        for at, cut, put in found:
            raw = raw[:at] + put + raw[at + cut :]
        return raw

    return edits.map(apply)


def never_anything_else(raw: bytes) -> None:
    try:
        found = messages.read(raw, "q", accept=JSON, timezone=ZoneInfo("Europe/Berlin"))
    except Unreadable as exc:
        str(exc).encode()  # it is written to Redis and to the log
        return
    # What is readable can also be parked, and does not fail in Celery or in its pool.
    assert isinstance(found.task_id, str)
    assert isinstance(found.retries, int)
    assert found.eta is None or isinstance(found.eta, float)
    if found.eta is not None:
        messages.strip_eta(found)
        parked = messages.encoded(found)
        found = messages.read(parked, "q", accept=JSON, timezone=UTC)
        assert found.eta is None
        messages.read(messages.revoked(parked), "q", accept=JSON, timezone=UTC)
    begun(found)


class Codecs:
    from kombu.transport.virtual import Channel as _Channel

    codecs = _Channel.codecs
    decode_body = _Channel.decode_body


APP = Celery("reader", broker="memory://", set_as_current=False)


@APP.task(name="t.add")
def add(*args: Any, **kwargs: Any) -> None: ...


def begun(found: Readable) -> None:
    """Do with a message what Celery's worker and its pool do before they call the task."""
    envelope: dict[str, Any] = found.envelope
    envelope["properties"]["delivery_tag"] = 1
    message = Message(envelope | {"decoded": found.decoded}, channel=Codecs())
    if "task" in found.headers:
        Request(message, app=APP, task=add)
        args, kwargs, embed = pool_loads(message.body, message.content_type, message.content_encoding, JSON)
        assert isinstance(args, list)
        assert isinstance(kwargs, dict)
        assert embed is None or isinstance(embed, dict)
    else:
        assert isinstance(message.decode(), dict)


@pytest.mark.parametrize(
    "strategy",
    [
        st.binary(max_size=200),
        values.map(json.dumps).map(str.encode),
        mutated(V2, paths),
        mutated(V1, paths_1),
        spoilt(json.dumps(V2).encode()),
        spoilt(json.dumps(stock(encode=False)).encode()),
    ],
    ids=["bytes", "json", "fields-2", "fields-1", "spoilt", "spoilt-text"],
)
def test_any_message_is_readable_or_unreadable_and_nothing_else(strategy: Any) -> None:
    check: Callable[[], None] = settings(max_examples=300, deadline=None)(
        given(strategy)(never_anything_else)
    )
    check()


@pytest.mark.parametrize("depth", [*range(100, 1000, 60), *range(900, 1000, 5)])
@pytest.mark.parametrize("where", ["headers.deep", "body.0"])
def test_whatever_depth_is_read_can_be_written_again(where, depth):
    """Reading and writing recurse; one that can only be read would end the worker that parks it."""
    text = "[" * depth + "]" * depth
    nested = '{"d":0}'.replace("0", text)
    envelope = change(change(V2, "headers.eta", "2999-01-01T00:00:00"), "headers.deep", 0)
    raw = json.dumps(envelope)
    if where == "headers.deep":
        raw = raw.replace('"deep": 0', '"deep": ' + nested)
    else:
        body = base64.b64encode(f"[[{text}],{{}},{{}}]".encode()).decode()
        raw = raw.replace(envelope["body"], body)
    try:
        found = read(raw.encode())
    except Unreadable:
        return
    messages.strip_eta(found)
    messages.encoded(found)


@pytest.mark.parametrize("protocol", [2, 1])
def test_one_that_expires_before_it_is_due_is_expired_when_it_comes_back(protocol):
    found = read(stock(protocol, countdown=600, expires=60, task_id="i"))
    messages.expire(found)
    messages.strip_eta(found)
    again = read(messages.encoded(found))
    assert (again.eta, again.expires) == (None, 0.0)


def test_what_lies_in_redis_for_long_is_smaller_and_the_same_to_celery():
    body = [[], {"a": "ü"}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    headers = {
        "task": "t",
        "id": "i1",
        "eta": None,
        "group": None,
        "stamps": {},
        "timelimit": [None, None],
        "retries": 0,
        "ignore_result": False,
        "kwargsrepr": "a=<1>",
        "parked_eta": None,
    }
    properties = {
        "body_encoding": "base64",
        "kwargsrepr": "a=<1>",
        "correlation_id": "i1",
        "delivery_info": {"exchange": "", "routing_key": "q"},
        "priority": 0,
    }
    envelope = {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": headers,
        "properties": properties,
    }
    raw = json.dumps(envelope).encode()

    small = messages.compact(messages.Readable(json.loads(raw), None, "i1", 0, None, None))

    assert len(small) < 0.8 * len(raw)
    before, after = (
        messages.read(each, "q", accept=("application/json",), timezone=UTC) for each in (raw, small)
    )
    assert after.decoded == before.decoded == body
    gone = before.headers.keys() - after.headers.keys()
    assert gone == {"group", "stamps", "timelimit", "parked_eta"}  # all of them said nothing
    assert all(after.headers[name] == before.headers[name] for name in after.headers)
    assert after.headers["ignore_result"] is False
    assert after.envelope["properties"]["correlation_id"] == "i1"
