"""Routing rules: which run an event asks for."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producers.errors import ConfigurationError, InvalidRequest
from producers.queues.message import CLOUD_EVENT_JSON, Event, Incoming, read
from producers.routing import Rules, key_of, load_rules, read_rules

ORDER = {"type": "com.example.order.*", "dag_id": "process_order"}


def event(type="com.example.order.paid", source="/shops/7", id="e1", data=None, **attributes):
    data = {"id": 42, "total": 120, "kind": "big"} if data is None else data
    return Event(id, source, type, data, {"id": id, "source": source, "type": type, **attributes})


def rules(*tables) -> Rules:
    return read_rules({"rules": list(tables)})


def test_an_event_starts_the_dag_of_the_first_rule_that_takes_it():
    routes = rules({"type": "com.other", "dag_id": "other"}, ORDER, {"type": "*", "dag_id": "late"})
    request = routes.order(event())
    assert (request.dag_id, request.conf) == ("process_order", {"id": 42, "total": 120, "kind": "big"})
    assert request.key == "/shops/7 e1"
    assert routes.order(event(type="x")).dag_id == "late"


def test_expressions_read_attributes_and_data():
    request = rules(
        ORDER
        | {
            "conf": "{order: data.id, shop: source, subject: subject}",
            "key": "data.id",
            "connection": "eu",
            "wait": True,
            "priority": 7,
        }
    ).order(event(subject="s"))
    assert request.conf == {"order": 42, "shop": "/shops/7", "subject": "s"}
    assert (request.key, request.connection, request.wait, request.priority) == ("42", "eu", True, 7)


def test_the_dag_may_be_found_in_the_event():
    request = rules({"type": "*", "dag_id_from": "join('_', ['process', data.kind])"}).order(event())
    assert request.dag_id == "process_big"


@pytest.mark.parametrize(
    ("table", "taken"),
    [
        ({"filter": "data.total > `100`"}, True),
        ({"filter": "data.total > `200`"}, False),
        ({"filter": "data.total"}, False),  # true alone is true
        ({"source": "/shops/*"}, True),
        ({"source": "/SHOPS/*"}, False),
    ],
)
def test_filters(table, taken):
    routes = rules(ORDER | table)
    if taken:
        assert routes.order(event()).dag_id == "process_order"
    else:
        with pytest.raises(InvalidRequest, match="no routing rule"):
            routes.order(event())


@pytest.mark.parametrize(("data", "conf"), [("plain", {"data": "plain"}), ([1], {"data": [1]})])
def test_data_that_is_no_object_is_wrapped(data, conf):
    assert rules(ORDER).order(event(data=data)).conf == conf


@pytest.mark.parametrize(
    ("table", "part"),
    [
        ({"conf": "data.id"}, "conf yields no object"),
        ({"key": "data.none"}, "key yields"),
        ({"key": "data"}, "key yields"),
        ({"conf": "{a: abs(data.kind)}"}, "conf does not fit"),
        ({"filter": "starts_with(data.id, 'x')"}, "filter does not fit"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_rules_name_without_a_value(table, part):
    with pytest.raises(InvalidRequest) as caught:
        rules(ORDER | {"name": "orders"} | table).order(event(data={"id": 42, "kind": "s3cret"}))
    assert part in str(caught.value)
    assert "orders" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_two_events_never_share_a_key():
    seen = {
        key_of(event(source=source, id=id))
        for source, id in [("a b", "c"), ("a", "b c"), ("a", "c"), ("a" * 600, "c"), ("a" * 600, "d")]
    }
    assert len(seen) == 5
    assert all(len(key) <= 512 for key in seen)


def test_all_mistakes_are_told_together_by_name():
    with pytest.raises(ConfigurationError) as caught:
        rules(
            {"name": "one", "dag_id": "a"},
            {"name": "two", "type": "x", "dag_id": "a", "dag_id_from": "b"},
            {"name": "three", "type": "x", "dag_id": "a b"},
            {"name": "four", "type": "x", "dag_id": "a", "conf": "{{"},
            {"name": "five", "type": "x", "dag_id": "a", "priority": 11, "colour": 1, "dag_run_id": "x"},
            {"name": "five", "type": 1, "dag_id": "a"},
        )
    text = str(caught.value)
    for part in ("'one': type", "'two': give", "'three': dag_id", "'four': conf", "priority", "'colour'"):
        assert part in text
    for part in ("'dag_run_id'", "name is no text of its own", "type is no text"):
        assert part in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.toml", '[[rules]]\ntype = "*"\ndag_id = "a"\n'),
        ("r.json", '{"rules":[{"type":"*","dag_id":"a"}]}'),
    ],
)
def test_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert load_rules(path).order(event()).dag_id == "a"
    path.write_text("[[")
    with pytest.raises(ConfigurationError, match=r"is no (TOML|JSON)"):
        load_rules(path)
    path.unlink()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_rules(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(data=JSON, type=st.text(min_size=1), source=st.text(min_size=1), id=st.text(min_size=1))
def test_whatever_an_event_holds_it_is_a_request_or_refused(data, type, source, id):
    routes = rules(
        {"type": "a*", "dag_id_from": "data.a", "filter": "length(data) > `1`"},
        {"type": "*", "dag_id": "a", "conf": "{a: data.b || type}", "key": "data.c || id"},
    )
    with contextlib.suppress(InvalidRequest):
        routes.order(event(type=type, source=source, id=id, data=data))


def test_an_event_over_any_door_goes_by_the_rules():
    body = b'{"specversion":"1.0","id":"1","source":"/s","type":"com.example.order.x","data":{"a":1}}'
    order = read(Incoming(body, content_type=CLOUD_EVENT_JSON), door="x", routes=rules(ORDER))
    assert order.request.dag_id == "process_order"
    assert order.request.key == "/s 1"
