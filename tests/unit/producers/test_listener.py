"""What the queue doors make of messages, without a broker: every message is read or refused, never fatal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from producers.errors import ConfigurationError, InvalidRequest, NotAllowed
from producers.queues import sources
from producers.queues.listener import said_by
from producers.queues.message import MAX_MESSAGE_BYTES, Incoming, Order, read
from producers.queues.redis_stream import RedisStreams
from producers.queues.replies import answer, answer_of
from producers.queues.source import Undeliverable
from producers.scopes import Scope
from producers.stores.records import Record

EXAMPLES = int(os.environ.get("DAGRELAY_FUZZ", "2000"))

TEXTS = st.text(max_size=30)
NAMES = st.sampled_from(
    [
        "dag_id",
        "conf",
        "key",
        "note",
        "connection",
        "priority",
        "wait",
        "window",
        "service",
        "submit",
        "path",
        "state",
        "result",
        "job_id",
        "then",
        "id",
        "eta",
        "countdown",
        "expires",
        "reply_to",
        "correlation_id",
        "traceparent",
        "tracestate",
        "logical_date",
        "run_after",
        "on_end",
        "specversion",
        "source",
        "type",
        "data",
        "data_base64",
        "datacontenttype",
        "subject",
        "time",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.binary(max_size=9).map(repr),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | TEXTS, inner, max_size=6),
    max_leaves=12,
)
LIKE_ONE = st.fixed_dictionaries(
    {},
    optional={
        "dag_id": st.just("sales") | TEXTS,
        "service": st.just("render") | TEXTS,
        "specversion": st.sampled_from(["1.0", "0.3", 1]),
        "id": st.just("1") | TEXTS,
        "source": st.just("/s") | TEXTS,
        "type": st.sampled_from(["dagrelay.trigger", "dagrelay.job", "other"]),
        "data": st.dictionaries(NAMES, JSON, max_size=3) | JSON,
        "conf": st.dictionaries(TEXTS, JSON, max_size=3) | JSON,
        "eta": st.datetimes().map(str) | TEXTS,
        "countdown": st.floats() | st.integers(),
        "priority": st.integers(),
        "reply_to": TEXTS,
    },
)
BODIES = (
    st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | LIKE_ONE.map(lambda value: json.dumps(value).encode())
    | st.tuples(LIKE_ONE, st.integers(0, 60), st.binary(max_size=3)).map(
        lambda one: (text := json.dumps(one[0]).encode())[: one[1]] + one[2] + text[one[1] + 1 :]
    )
)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            "ce-specversion",
            "ce-id",
            "ce-source",
            "ce-type",
            "ce_specversion",
            "ce_id",
            "ce_source",
            "ce_type",
            "ce-time",
            "ce-%",
            "cloudevents:specversion",
            "cloudevents:id",
            "traceparent",
            "tracestate",
        ]
    )
    | TEXTS,
    st.sampled_from(["1.0", "1", "/s", "dagrelay.trigger", "%", "%ff", "a\0b", "\ud800"]) | TEXTS,
    max_size=6,
)
CONTENT_TYPES = (
    st.sampled_from(
        [
            "application/json",
            "application/cloudevents+json",
            "application/cloudevents",
            "application/cloudevents+avro",
            "application/cloudevents-batch+json",
            "text/plain",
            "APPLICATION/JSON;charset=x",
        ]
    )
    | TEXTS
)
MAYBE = st.none() | TEXTS


def outcome(of: Callable[[Incoming], Any], message: Incoming) -> Any:
    """What a parser returns, or the text of its refusal."""
    try:
        return of(message)
    except InvalidRequest as exc:
        return str(exc)


@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    body=BODIES,
    id=MAYBE,
    content_type=CONTENT_TYPES,
    headers=HEADERS,
    reply_to=MAYBE,
    correlation_id=MAYBE,
)
def test_any_message_is_read_or_refused_and_a_repeat_of_it_likewise(**given: Any):
    message = Incoming(**given)

    found = outcome(lambda one: read(one, door="redis:d"), message)
    assert isinstance(found, Order) or (found and found.isprintable())
    assert found == outcome(lambda one: read(one, door="redis:d"), message)

    found = outcome(said_by, message)
    assert isinstance(found, tuple) or found


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (Incoming(b'{"a": 1}', correlation_id="c"), ("c", {"a": 1})),
        (Incoming(b"[1]", headers={"correlation_id": "c"}), ("c", [1])),
        (Incoming(b'{"correlation_id": "c"}'), ("c", {"correlation_id": "c"})),
        (
            Incoming(b'{"correlation_id": "inside"}', correlation_id="around"),
            ("around", {"correlation_id": "inside"}),
        ),
    ],
)
def test_an_answer_carries_its_correlation_id_around_it_or_in_it(message, found):
    assert said_by(message) == found


@pytest.mark.parametrize(
    "message",
    [
        Incoming(b"{}"),
        Incoming(b"x", correlation_id="c"),
        Incoming(b"1", correlation_id="a\nb"),
        Incoming(b'{"correlation_id": 7}'),
        Incoming(b" " * (MAX_MESSAGE_BYTES + 1), correlation_id="c"),
    ],
)
def test_an_answer_that_cannot_be_handed_on_is_refused(message):
    with pytest.raises(InvalidRequest):
        said_by(message)


RUN = {"dag_id": "sales", "dag_run_id": "r", "state": "success"}


@pytest.mark.parametrize(
    ("record", "result", "expected"),
    [
        (
            Record("t", "waiting", seen="queued", progress="half"),
            None,
            {"seen": "queued", "progress": "half"},
        ),
        (Record("t", "done", run=RUN), None, {"run": RUN}),
        (
            Record("t", "done", run=RUN),
            {"status": "SUCCESS", "result": {**RUN, "result": 7}},
            {"run": {**RUN, "result": 7}},
        ),
        (
            Record("t", "done", service="render"),
            {
                "status": "SUCCESS",
                "result": {"service": "render", "state": "ok", "result": [1], "then": "t2"},
            },
            {"service": "render", "job_state": "ok", "result": [1], "then": "t2"},
        ),
        (
            Record("t", "failed", error="DagNotFound", reason="no"),
            {"status": "FAILURE", "result": {}},
            {"error": "DagNotFound", "reason": "no"},
        ),
        (
            Record("t", "cancelled", cancel_by="me"),
            None,
            {"error": "RequestCancelled", "reason": "asked by me"},
        ),
        (None, None, {"state": "unknown"}),
    ],
)
def test_what_is_told_of_a_request(record, result, expected):
    what = "ended" if record is None or record.ended else "progress"
    told = json.loads(answer_of(what, "t", record, result, correlation_id="c", at=1_800_000_000.5))

    around = {"id": "t", "what": what, "correlation_id": "c", "at": "2027-01-15T08:00:00.500+00:00"}
    state = {} if record is None else {"state": record.state}
    assert told == {**around, **state, **expected}


def test_an_answer_says_only_what_is_known():
    told = json.loads(answer("accepted", id="t", correlation_id=None, at=0, dag_id="sales", dag_run_id=None))

    assert told == {
        "id": "t",
        "what": "accepted",
        "state": "accepted",
        "correlation_id": None,
        "at": "1970-01-01T00:00:00.000+00:00",
        "dag_id": "sales",
    }


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "none of the forms"),
        ("dag-triggers", "none of the forms"),
        ("http://:geheim@h/", "none of the forms"),
        ("redis://:geheim@h:6379/0", "names no stream"),
        ("redis://:geheim@h:6379/0?stream=", "names no stream"),
        ("redis://:geheim@h:6379/0?stream=s&grupp=x", r"unknown options \['grupp'\]"),
        ("redis://:geheim@h:6379/0?stream=s&decode_responses=1", "unknown options"),
        ("redis://:geheim@h:6379/0?stream=s&claim_after_s=nan", "claim_after_s"),
        ("redis://:geheim@h:6379/0?stream=s&delete=perhaps", "delete is yes or no"),
        ("redis://:geheim@h:6379/0?stream=s&stream=t", "twice"),
        ("redis://:geheim@h:x/0?stream=s", "no Redis URL"),
        ("redis://:geheim@[h/0?stream=s", "no Redis URL"),
        ("redis://:geheim@h:6379/0?stream=s&ssl_whatever=1", "cannot be used"),
        ("rediss://:geheim@h:6379/0?stream=s&ssl_cert_reqs=sometimes", "cannot be used"),
    ],
)
def test_a_wrong_url_is_told_without_what_may_be_secret(url, why):
    with pytest.raises(ConfigurationError, match=why) as caught:
        sources.source_for(url)
    assert "geheim" not in str(caught.value)


def test_a_source_is_named_without_a_secret_and_apart_from_all_others():
    names = {
        sources.source_for(url).name
        for url in (
            "redis://u:geheim@h:6379/0?stream=s&group=g",
            "redis://h:6379?stream=s&claim_after_s=5",
            "redis://h:6379/1?stream=s",
            "redis://other:6379/0?stream=s",
            "redis://h:6379/0?stream=t",
            "unix:///tmp/redis.sock?stream=s",
            "redis://10.0.0.1:6379/0?stream=s&name=orders",
        )
    }
    assert names == {
        "redis:h:6379/0:s",
        "redis:h:6379/1:s",
        "redis:other:6379/0:s",
        "redis:h:6379/0:t",
        "redis:/tmp/redis.sock/0:s",
        "redis:orders",
    }


@pytest.mark.parametrize("scheme", ["amqp", "sqs", "kafka"])
def test_a_missing_package_is_named_with_the_way_to_get_it(scheme, monkeypatch):
    module, _ = sources._OTHERS[scheme]
    monkeypatch.delitem(sys.modules, f"producers.queues.{module}", raising=False)
    monkeypatch.setattr(
        sources,
        "import_module",
        lambda *_: (_ for _ in ()).throw(ModuleNotFoundError(name="confluent_kafka.x")),
    )
    with pytest.raises(ConfigurationError, match=r"needs the package 'confluent_kafka'.*dagrelay\[queues\]"):
        sources.source_for(f"{scheme}://h/x?queue=q")


def test_what_only_publishes_needs_no_stream_and_still_writes_into_nothing_of_ours():
    source = RedisStreams.from_url("redis://127.0.0.1:1/0", receives=False)
    for to in ("triggers", "jobs\x06\x163", "dagrelay:due", "celery-task-meta-1", ""):
        with pytest.raises(Undeliverable):
            source.publish(to, b"{}", correlation_id=None, headers={})


def test_jobs_have_to_be_allowed():
    order = read(
        Incoming(b'{"service": "render", "job_id": "1", "path": "/j/{job_id}", "state": "state"}'), door="d"
    )
    with pytest.raises(NotAllowed):
        Scope().check(order.request)
