"""The documents of messages are true: what the schema takes a door takes, and what a door takes it takes."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from producers.contract import MAX_CONF_BYTES, PollRequest, TriggerRequest, is_run_id
from producers.errors import InvalidRequest
from producers.message_docs import asyncapi, documents, message_schema
from producers.queues.message import MAX_MESSAGE_BYTES, Envelope, Event, Incoming, read
from producers.routing import read_rules
from tests import npm
from tests.parts import need

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs/messages.md"
SCHEMA = message_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
EXAMPLES = int(os.environ.get("DAGRELAY_FUZZ", "300"))


class AnyEvent:
    def order(self, event: Event) -> TriggerRequest:
        return TriggerRequest("routed")


def taken(body: Any) -> str:
    """Return "" where a door takes it, else why not."""
    try:
        read(Incoming(json.dumps(body).encode()), door="d", routes=AnyEvent())
    except InvalidRequest as exc:
        return str(exc)
    return ""


def wrong(body: Any) -> str:
    """Return "" where the schema takes it, else why not."""
    return "; ".join(error.message[:200] for error in VALIDATOR.iter_errors(body))


def valid_against(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]})


def test_the_documents_in_the_tree_are_up_to_date():
    for name, document in documents().items():
        assert (ROOT / "docs" / name).read_text() == document, f"docs/{name}: run `make messages`"


def test_the_schema_is_one_and_its_words_are_those_of_json_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    known = set(re.findall(r"[a-z]\w*", KEYWORDS, re.I))

    def walk(schema: dict[str, Any]) -> None:
        assert not {name for name in schema if not name.startswith("$")} - known, schema
        for name in ("properties", "$defs"):
            for below in schema.get(name, {}).values():
                walk(below)
        for name in ("items", "additionalProperties", "propertyNames", "not", "if", "then", "else"):
            if isinstance(schema.get(name), dict):
                walk(schema[name])
        for name in ("anyOf", "oneOf", "allOf"):
            for below in schema.get(name, []):
                walk(below)

    walk(SCHEMA)


KEYWORDS = """type title description default properties required additionalProperties propertyNames enum const
    maxProperties minLength maxLength pattern format minimum maximum exclusiveMinimum items minItems maxItems
    anyOf allOf oneOf not if then else"""


def test_every_field_is_in_the_schema_with_its_meaning():
    for name, models in (("Trigger", (TriggerRequest, Envelope)), ("Job", (PollRequest, Envelope))):
        properties = SCHEMA["$defs"][name]["properties"]
        assert set(properties) == {field for model in models for field in model.model_fields}
        assert not [field for field, told in properties.items() if not told.get("description")]


# The schema and the doors agree

text = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["a", "a.b-c_1", "..", ".", "~", "scheduled__x", "a\n", "ü", "/", "\0", " ", "x" * 251, "x" * 600]
    ),
    st.sampled_from(
        ["2030-01-01T00:00:00Z", "2030-01-01T00:00:00+02:00", "2030-01-01", "2030-01-01T00:00:00"]
    ),
    st.sampled_from(["/jobs", "/jobs/{job_id}", "//h", "/a b", "/a#b", "/{x}", "/a?b={reference}", "/a\\b"]),
    st.sampled_from(
        ["http://h/x", "https://h:1/{job_id}", "http://u:p@h/", "http://h//x", "ftp://h/", "http://h#"]
    ),
    st.sampled_from(["reuse", "hold", "GET", "POST", "max_active_runs", "id", "state"]),
)
scalar = st.one_of(
    text,
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.floats(allow_nan=False, allow_infinity=False, min_value=-1e18, max_value=1e18),
)
value = st.recursive(
    scalar, lambda one: st.lists(one, max_size=3) | st.dictionaries(text, one, max_size=3), max_leaves=6
)
# Mostly what a field may be, so that not everything is refused for one of its fields.
likely: dict[str, list[Any]] = {
    "dag_id": ["a", "daily_sales", "a.b-c"],
    "service": ["render", "A_1"],
    "path": ["/jobs", "/jobs/x?y=1"],
    "url": ["http://h/x"],
    "conf": [{}, {"a": [1, {"b": "c"}]}],
    "wait": [True, False],
    "wait_timeout_s": [1, 86400],
    "result_from": ["t"],
    "stop_run": [True, False],
    "submit": [{"path": "/jobs"}, {"path": "/jobs", "method": "GET", "body": [1]}, {"path": "jobs"}, {}],
    "submit_once": [True, False],
    "find": [{"path": "/jobs?ref={reference}"}],
    "then": [
        {"dag_id": "a"},
        {"dag_id": "a", "countdown": 1},
        {"dag_id": "a", "wait": True, "stop_run": True},
    ],
    "on_cancel": [{"path": "/x", "method": "DELETE"}, {"message": 1}],
    "job_id": ["17"],
    "countdown": [0, 1.5],
    "eta": ["2030-01-01T00:00:00Z"],
    "id": ["m1"],
}


def objects(*models: Any) -> st.SearchStrategy[dict[str, Any]]:
    names = [field for model in models for field in model.model_fields]
    pairs = st.sampled_from([*names, "unknown"]).flatmap(
        lambda name: (
            st.tuples(st.just(name), st.one_of(*[st.sampled_from(likely[name])] * 3, value))
            if name in likely
            else st.tuples(st.just(name), value)
        )
    )
    return st.lists(pairs, max_size=4).map(dict)


triggers = objects(TriggerRequest, Envelope).map(lambda fields: {"dag_id": "a", **fields})
jobs = objects(PollRequest, Envelope).map(lambda fields: {"service": "render", "path": "/jobs", **fields})
events = st.builds(
    lambda fields, kind, data: {
        "specversion": "1.0",
        "type": kind,
        "source": "s",
        "id": "1",
        "data": data,
        **fields,
    },
    st.dictionaries(
        st.sampled_from(["subject", "time", "specversion", "id", "ext", "data_base64"]), scalar, max_size=2
    ),
    st.sampled_from(["dagrelay.trigger", "dagrelay.job", "com.example"]),
    triggers | jobs | value,
)

BEYOND_A_SCHEMA = re.compile(
    r"is no ISO 8601|is no JMESPath|nested deeper|beyond 64 bits|lone surrogate|have timezone"
    r"|lies after the year|looks like a credential|belongs to the service|has \{|has no \{|\{callback_url\}"
    r"|there is no path|both have|is below interval_s|under which the outcome goes|is missing: every event"
    r"|data_base64|data: is no JSON at|data: is not UTF-8|specversion: is not 1.0|is no http"
)
"""What only code can tell; docs/messages.md says so."""


def only_said_otherwise(body: Any) -> bool:
    """Tell whether a body holds what JSON Schema cannot tell apart, or is stricter about than we are."""
    whole = json.dumps(body)
    return bool(
        re.search(r"\d\.0\b|\de[+]?\d", whole)  # 5.0 is an integer there
        or re.search(r'"20[^"]*"', whole)  # other forms of a date
        or "\\ud" in whole
    )


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(st.one_of(triggers, jobs, events))
@example({"dag_id": "a", "wait_timeout_s": 1, "wait": None})
@example({"service": "render", "url": "http://h"})
@example({"service": "render", "via": "queue", "message": {"a": 1}})
@example({"service": "render", "via": "queue", "message": None})
@example({"service": "render", "via": "queue", "message": 1, "path": "/x"})
@example({"service": "render", "submit": {"path": "/x", "body": "{callback_url}"}})
@example({"service": "render", "path": None, "url": "http://h?x"})
@example({"dag_id": "a", "dag_run_id": "~"})
@example({"dag_id": "a", "countdown": None, "eta": "2030-01-01T00:00:00Z"})
@example({"dag_id": "a", "give_up_after_s": 0})
def test_the_schema_and_the_door_agree(body: dict[str, Any]):
    refused, invalid = taken(body), wrong(body)
    if refused and not invalid:
        assert BEYOND_A_SCHEMA.search(refused) or only_said_otherwise(body), (
            f"only the door refuses: {refused}"
        )
    if invalid and not refused:
        assert only_said_otherwise(body), f"only the schema refuses: {invalid}"


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.text(st.sampled_from("a.~_-:+\n/ü\0"), min_size=1, max_size=6)
    | st.sampled_from(["scheduled__a", "x" * 251])
)
def test_the_pattern_of_a_run_id_is_the_rule(run_id: str):
    assert valid_against("Trigger").is_valid({"dag_id": "a", "dag_run_id": run_id}) == is_run_id(run_id)


# AsyncAPI


def test_the_asyncapi_document_is_valid():
    folder = npm.installed(ROOT / "tests/asyncapi")
    need("the schema of AsyncAPI", folder is not None, npm.HOW_TO_GET_IT)
    assert folder is not None
    schemas = folder / "node_modules/@asyncapi/specs/schemas"
    official = json.loads((schemas / "3.0.0-without-$id.json").read_text())
    validator = jsonschema.Draft7Validator(official)
    document = asyncapi()
    assert [error.message[:300] for error in validator.iter_errors(document)] == []
    document["operations"]["ask_redis"]["action"] = "publish"  # AsyncAPI 2's word: it does look
    assert not validator.is_valid(document)


def test_every_reference_of_the_asyncapi_document_leads_somewhere():
    document = asyncapi()

    def references(part: Any) -> list[str]:
        below = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        own = [part["$ref"]] if isinstance(part, dict) and isinstance(part.get("$ref"), str) else []
        return own + [one for each in below for one in references(each)]

    found = set(references(document))
    assert len(found) > 30
    for reference in found:
        part: Any = document
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]


def test_the_examples_of_the_asyncapi_document_are_messages():
    for message in asyncapi()["components"]["messages"].values():
        schema = message["payload"]["$ref"].rpartition("/")[2]
        for one in message["examples"]:
            valid_against(schema).validate(one["payload"])
            assert schema in ("Answer", "Told") or not taken(one["payload"])


# The page

FENCES = re.findall(r"^```(\w+) (\w[\w-]*)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_every_example_of_the_page_is_said_to_be_something():
    plain = re.findall(r"^```(json|toml)$", PAGE.read_text(), re.M)
    assert not plain, "say what it is: ```json message, answer, told, headers, event"
    assert {kind for _, kind, _ in FENCES} == {"message", "answer", "told", "headers", "rules"}


def test_every_message_on_the_page_is_taken():
    bodies = [text for _, kind, text in FENCES if kind == "message"]
    assert len(bodies) >= 5
    for text in bodies:
        assert not wrong(json.loads(text)), text
        assert not taken(json.loads(text)), text


def test_every_answer_on_the_page_is_one():
    for _, kind, text in FENCES:
        if kind in ("answer", "told"):
            valid_against({"answer": "Answer", "told": "Told"}[kind]).validate(json.loads(text))


def test_the_rules_on_the_page_take_the_event_on_the_page():
    (text,) = [text for _, kind, text in FENCES if kind == "rules"]
    rules = read_rules(tomllib.loads(text))
    events = [json.loads(text) for _, kind, text in FENCES if kind == "message" and "specversion" in text]
    routed = [
        read(Incoming(json.dumps(event).encode()), door="d", routes=rules).request
        for event in events
        if not event["type"].startswith("dagrelay.")
    ]
    assert [(one.dag_id, one.key) for one in routed if isinstance(one, TriggerRequest)] == [
        ("process_order", "1001")
    ]
    (headers,) = [json.loads(text) for _, kind, text in FENCES if kind == "headers"]
    binary = Incoming(b'{"order": 1001, "total": 120}', content_type="application/json", headers=headers)
    assert read(binary, door="d", routes=rules).request == routed[0]


def test_the_page_tells_of_every_field():
    page = PAGE.read_text()
    named = {
        name for line in re.findall(r"^\| (`.*?) \|", page, re.M) for name in re.findall(r"`(\w+)`", line)
    }
    assert set(Envelope.model_fields) <= named
    for schema in ("Answer", "Told"):
        own = SCHEMA["$defs"][schema]["properties"]
        fields = set(own) | set(own.get("data", {}).get("properties", {}))
        assert not {field for field in fields if f"`{field}`" not in page and f'"{field}"' not in page}
    assert f"{MAX_MESSAGE_BYTES:,} bytes" in page
    assert f"{MAX_CONF_BYTES:,} bytes" in page
