"""What a caller may ask for, and what is refused at the call: by name, and without the value."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producers.contract import (
    GIVE_UP_AFTER_S,
    MAX_CONF_BYTES,
    MAX_CONF_DEPTH,
    MAX_REFERENCED_BYTES,
    VERSION,
    Asked,
    DagRun,
    PollRequest,
    TriggerRequest,
    conf_summary,
    is_run_id,
    json_schema,
    shown_message,
)
from producers.errors import InvalidRequest

CANARY = "c4n4ry-s3cret"
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Colour(StrEnum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class OldStyle(str, Enum):  # noqa: UP042 - its str() is "OldStyle.…", and its JSON the value
    PLAIN = "plain"
    NUL = "a\x00b"
    SURROGATE = "\ud800"


class Loud(str):
    __slots__ = ()

    def __str__(self) -> str:
        return CANARY


def nested(depth: int) -> Any:
    value: Any = "bottom"
    for _ in range(depth):
        value = {"in": value}
    return value


def circle() -> dict[str, Any]:
    value: dict[str, Any] = {"password": CANARY}
    value["again"] = value
    return value


# What is wrong, and which words of the answer say so. Wherever a value can carry the canary, it does.
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no dag_id", {}, "dag_id: is missing"),
    ("dag_id empty", {"dag_id": ""}, "dag_id: "),
    ("dag_id None by name", {"dag_id": None}, "dag_id: "),
    ("dag_id number", {"dag_id": 5}, "dag_id: "),
    ("dag_id with a space", {"dag_id": f"a {CANARY}"}, "dag_id: is no DAG id"),
    ("dag_id with a slash", {"dag_id": f"../{CANARY}"}, "dag_id: is no DAG id"),
    ("dag_id with a line end", {"dag_id": f"{CANARY}\n"}, "dag_id: is no DAG id"),
    ("dag_id that is a step of a path", {"dag_id": ".."}, "dag_id: is no DAG id"),
    ("dag_run_id that is a step of a path", {"dag_run_id": "."}, "dag_run_id: would be refused"),
    ("wait_timeout_s without wait", {"wait_timeout_s": 5}, "wait_timeout_s: needs wait=True"),
    ("result_from without wait", {"result_from": "t"}, "result_from: needs wait=True"),
    ("stop_run without wait", {"stop_run": True}, "stop_run: needs wait=True"),
    ("wait_timeout_s of no time", {"wait": True, "wait_timeout_s": 0}, "wait_timeout_s: "),
    ("window of none", {"window": 0}, "window: is neither a whole number of 1 or more nor the word"),
    ("window below none", {"window": -3}, "window: is neither"),
    ("window true", {"window": True}, "window: is neither"),
    ("window half", {"window": 1.5}, "window: is neither"),
    ("window as text", {"window": "2"}, "window: is neither"),
    ("window by another word", {"window": CANARY}, "window: is neither"),
    ("if_paused by another word", {"if_paused": CANARY}, "if_paused: "),
    ("dag_id too long", {"dag_id": CANARY * 30}, "dag_id: "),
    ("conf a list", {"conf": [CANARY]}, "conf: is of type list: a conf is an object"),
    ("conf text", {"conf": CANARY}, "conf: is of type str"),
    ("conf number", {"conf": 7}, "conf: is of type int"),
    ("conf false", {"conf": False}, "conf: is of type bool"),
    ("conf NaN", {"conf": {"a": math.nan, "b": CANARY}}, "conf.a is nan, which is not JSON"),
    ("conf infinity", {"conf": {"a": [1, -math.inf, CANARY]}}, "conf.a[1] is -inf"),
    ("conf bytes", {"conf": {"a": CANARY.encode()}}, "conf.a is of type bytes"),
    ("conf set", {"conf": {"a": {CANARY}}}, "conf.a is of type set"),
    (
        "conf datetime",
        {"conf": {"a": NOON}},
        "conf.a is of type datetime, which is not JSON: send .iso",
    ),
    ("conf date", {"conf": {"a": date(2026, 1, 1)}}, "conf.a is of type date"),
    (
        "conf Decimal",
        {"conf": {"a": Decimal("1.5")}},
        "conf.a is of type Decimal",
    ),
    ("conf object", {"conf": {"a": object()}}, "conf.a is of type object"),
    ("conf with a number as key", {"conf": {1: CANARY}}, "which is no string: JSON keys are strings"),
    ("conf with None as key", {"conf": {"a": {None: CANARY}}}, "conf.a has the key None"),
    ("conf with 65 bits", {"conf": {"a": 1 << 63, "b": CANARY}}, "conf.a is an integer beyond 64 bits"),
    ("conf below 64 bits", {"conf": {"a": -(1 << 63) - 1}}, "conf.a is an integer beyond 64 bits"),
    ("conf with NUL", {"conf": {"a": [f"{CANARY}\x00"]}}, "conf.a[0] holds a NUL character"),
    ("conf with NUL in a key", {"conf": {"a\x00": CANARY}}, "a key of conf holds a NUL"),
    ("conf with a lone surrogate", {"conf": {"a": f"{CANARY}\ud800"}}, "conf.a holds a lone surrogate"),
    ("conf with one in a key", {"conf": {"\udfff": CANARY}}, "a key of conf holds a lone surrogate"),
    ("conf with NUL in an enum", {"conf": {"a": OldStyle.NUL}}, "conf.a holds a NUL"),
    (
        "conf with a surrogate in an enum",
        {"conf": {"a": OldStyle.SURROGATE}},
        "conf.a holds a lone surrogate",
    ),
    ("conf too deep", {"conf": nested(MAX_CONF_DEPTH + 1)}, "is nested deeper than 64 levels"),
    ("conf in a circle", {"conf": circle()}, "is nested deeper than 64 levels"),
    (
        "conf too large",
        {"conf": {"a": CANARY * (MAX_CONF_BYTES // 10)}, "conf_by": "value"},
        "over the limit of 1000000",
    ),
    (
        "conf too large in UTF-8",
        {"conf": {"a": "ü" * (MAX_CONF_BYTES // 2)}, "conf_by": "value"},
        "over the limit of 1000000",
    ),
    ("conf_by unknown", {"conf_by": CANARY}, "conf_by: "),
    (
        "a reference with more",
        {"conf": {"dagrelay_conf": CANARY, "a": 1}},
        "conf: has the key 'dagrelay_conf'",
    ),
    (
        "a sealed conf with more",
        {"conf": {"dagrelay_sealed": CANARY, "a": 1}},
        "has the key 'dagrelay_sealed'",
    ),
    (
        "a sealed conf that nobody's key could open",
        {"conf": {"dagrelay_sealed": f"{CANARY}{'A' * 200}"}},
        "has the key 'dagrelay_sealed'",
    ),
    ("key empty", {"key": ""}, "key: "),
    ("key number", {"key": 5}, "key: "),
    ("key bytes", {"key": CANARY.encode()}, "key: "),
    ("key too long", {"key": CANARY * 50}, "key: "),
    ("key with NUL", {"key": f"{CANARY}\x00"}, "key: holds a NUL"),
    ("key with a lone surrogate", {"key": f"{CANARY}\ud800"}, "key: holds a lone surrogate"),
    ("run id empty", {"dag_run_id": ""}, "dag_run_id: "),
    ("run id number", {"dag_run_id": 1}, "dag_run_id: "),
    ("run id with a space", {"dag_run_id": f"{CANARY} x"}, "dag_run_id: would be refused by Airflow"),
    ("run id with a slash", {"dag_run_id": f"{CANARY}/x"}, "dag_run_id: would be refused"),
    ("run id with an umlaut", {"dag_run_id": f"{CANARY}ü"}, "dag_run_id: would be refused"),
    ("run id with a line end", {"dag_run_id": f"{CANARY}\n"}, "dag_run_id: would be refused"),
    ("run id too long", {"dag_run_id": "x" * 251}, "dag_run_id: would be refused"),
    ("run id with ..", {"dag_run_id": "a..b"}, "dag_run_id: would be refused"),
    ("run id ~", {"dag_run_id": "~"}, "dag_run_id: would be refused"),
    ("run id scheduled__", {"dag_run_id": f"scheduled__{CANARY}"}, "not beginning with scheduled__"),
    ("run id backfill__", {"dag_run_id": f"backfill__{CANARY}"}, "not beginning with scheduled__"),
    ("run id asset_triggered__", {"dag_run_id": f"asset_triggered__{CANARY}"}, "not beginning with"),
    ("run id dataset_triggered__", {"dag_run_id": f"dataset_triggered__{CANARY}"}, "not beginning with"),
    ("logical date naive", {"logical_date": datetime(2026, 1, 1)}, "logical_date: "),
    ("logical date naive text", {"logical_date": "2026-01-01T00:00:00"}, "logical_date: "),
    ("logical date no date", {"logical_date": CANARY}, "logical_date: is no ISO 8601 date and time"),
    ("logical date number", {"logical_date": 1763640000}, "logical_date: "),
    ("logical date a date", {"logical_date": date(2026, 1, 1)}, "logical_date: "),
    ("run_after naive", {"run_after": datetime(2026, 1, 1)}, "run_after: "),
    ("run_after no date", {"run_after": CANARY}, "run_after: is no ISO 8601"),
    ("note number", {"note": 3}, "note: "),
    ("note too long", {"note": CANARY * 60}, "note: "),
    ("note with NUL", {"note": f"{CANARY}\x00"}, "note: holds a NUL"),
    ("connection empty", {"connection": ""}, "connection: "),
    ("connection None", {"connection": None}, "connection: "),
    ("connection a URL", {"connection": f"http://u:{CANARY}@h"}, "connection: is no connection id"),
    ("connection with a line end", {"connection": f"{CANARY}\n"}, "connection: is no connection id"),
    ("connection too long", {"connection": "c" * 101}, "connection: "),
    ("if_exists unknown", {"if_exists": CANARY}, "if_exists: "),
    ("if_exists bool", {"if_exists": True}, "if_exists: "),
    ("give up zero", {"give_up_after_s": 0}, "give_up_after_s: "),
    ("give up negative", {"give_up_after_s": -1.0}, "give_up_after_s: "),
    ("give up NaN", {"give_up_after_s": math.nan}, "give_up_after_s: "),
    ("give up infinite", {"give_up_after_s": math.inf}, "give_up_after_s: "),
    ("give up beyond a float", {"give_up_after_s": 10**400}, "give_up_after_s: is too large"),
    ("give up text", {"give_up_after_s": CANARY}, "give_up_after_s: "),
    ("give up bool", {"give_up_after_s": True}, "give_up_after_s: "),
    ("unknown argument", {"config": {"password": CANARY}}, "config: is no argument of this request"),
    ("misspelt argument", {"dagid": CANARY}, "dagid: is no argument of this request"),
    ("a version of its own", {"v": 2, "conf": {"token": CANARY}}, "v: is no argument"),
]


@pytest.mark.parametrize(("fields", "words"), [(f, w) for _, f, w in BAD], ids=[name for name, _, _ in BAD])
def test_a_wrong_argument_is_told_by_its_name_and_never_with_its_value(fields, words):
    complete = fields if "dag_id" in fields or words.startswith("dag_id") else {"dag_id": "d", **fields}

    with pytest.raises(InvalidRequest) as caught:
        TriggerRequest(**complete)

    assert words in str(caught.value)
    everything_said = f"{caught.value!s} {caught.value!r} {caught.value.args} {caught.value.__cause__}"
    assert CANARY not in everything_said
    assert len(str(caught.value)) < 500


def test_every_wrong_argument_is_told_at_once():
    with pytest.raises(InvalidRequest) as caught:
        TriggerRequest("no good", conf={"a": b""}, key="", speed=9)

    for name in ("dag_id", "conf.a", "key", "speed"):
        assert name in str(caught.value)


@pytest.mark.parametrize("twice", [{"dag_id": "e"}, {"conf": {"b": 2}}])
def test_an_argument_given_by_position_and_by_name_is_refused_as_python_does(twice):
    with pytest.raises(TypeError, match="multiple values"):
        TriggerRequest("d", {"a": 1}, **twice)


def test_a_message_may_hold_any_name_and_is_then_invalid_not_a_crash():
    with pytest.raises(InvalidRequest, match="self: is no argument"):
        TriggerRequest.from_message({"dag_id": "d", "self": 1, "fields": 2})


def test_what_is_allowed_at_the_limits():
    request = TriggerRequest(
        "d" * 250,
        {
            "deep": nested(MAX_CONF_DEPTH - 1),
            "low": -(1 << 63),
            "high": (1 << 63) - 1,
            "tuple": (1, [2, (3,)]),
            "text": "ü 😀 \n \x7f",
            "nothing": None,
            "enums": [Colour.RED, Level.HIGH, OldStyle.PLAIN],
            "ordered": OrderedDict(b=1, a=2),
        },
        key="k" * 512,
        dag_run_id="r" * 250,
        note="n" * 700,
        give_up_after_s=1,
    )

    sent = json.loads(json.dumps(request.to_message()))

    assert sent["conf"]["enums"] == ["red", 3, "plain"]
    assert sent["conf"]["tuple"] == [1, [2, [3]]]
    assert sent["conf"]["ordered"] == {"b": 1, "a": 2}
    assert TriggerRequest.from_message(sent).to_message() == {**sent, "v": VERSION}


def test_a_refusal_is_one_short_line_whatever_the_keys_are():
    """It is logged: a line break in a key would forge another line."""
    for key in ("x\nforged", "y" * 100_000):
        with pytest.raises(InvalidRequest, match="beyond 64 bits") as refused:
            TriggerRequest("sales", {key: 2**70})
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 300


def test_a_conf_of_exactly_the_limit_is_taken_and_one_byte_more_is_not():
    frame = len(json.dumps({"a": ""}, separators=(",", ":")))

    fits, over = {"a": "x" * (MAX_CONF_BYTES - frame)}, {"a": "x" * (MAX_CONF_BYTES - frame + 1)}
    then = {"service": "render", "path": "/jobs/1"}

    assert TriggerRequest("d", fits, conf_by="value")
    assert TriggerRequest.from_message({"dag_id": "d", "conf": fits})
    assert TriggerRequest("d", over)  # it goes by reference
    with pytest.raises(InvalidRequest, match="is 1000001 bytes as JSON"):
        TriggerRequest("d", over, conf_by="value")
    with pytest.raises(InvalidRequest, match="is 1000001 bytes as JSON"):
        TriggerRequest.from_message({"dag_id": "d", "conf": over})
    assert PollRequest(**then, then={"dag_id": "d", "conf": over})
    with pytest.raises(InvalidRequest, match="then: conf: is 1000001 bytes as JSON"):
        PollRequest.from_message({**then, "then": {"dag_id": "d", "conf": over}})


def test_a_conf_over_the_limit_of_references_is_refused():
    with pytest.raises(InvalidRequest, match="over the limit of 64000000"):
        TriggerRequest("d", {"a": "x" * MAX_REFERENCED_BYTES})


def test_text_of_a_subclass_travels_as_its_value_whatever_its_str_says():
    sent = json.dumps(TriggerRequest("d", {"a": Loud("plain")}, key=Loud("k")).to_message())

    assert json.loads(sent)["conf"] == {"a": "plain"}
    assert CANARY not in sent


def test_a_message_holds_what_was_given_and_not_the_defaults():
    assert TriggerRequest("d").to_message() == {"v": 1, "dag_id": "d"}
    assert TriggerRequest("d", connection="DEFAULT", if_exists="reuse").to_message() == {
        "v": 1,
        "dag_id": "d",
    }
    assert TriggerRequest("d", give_up_after_s=GIVE_UP_AFTER_S).to_message() == {"v": 1, "dag_id": "d"}


def test_a_connection_is_one_name_whatever_its_case():
    assert TriggerRequest("d", connection="Prod_EU").connection == "prod_eu"


def test_an_instant_may_be_given_as_text_and_keeps_its_zone():
    request = TriggerRequest("d", logical_date="2026-11-20T01:00:00+05:30", run_after="2026-11-20T12:00:00Z")

    assert request.logical_date == datetime(2026, 11, 19, 19, 30, tzinfo=UTC)
    assert request.to_message()["logical_date"] == "2026-11-20T01:00:00+05:30"
    assert request.run_after == NOON


def test_what_travels_beside_a_request_is_no_part_of_it():
    message = {"v": 1, "dag_id": "d", "asked": {"at": 5, "by": "x"}, "so_far": {"attempts": 3}}

    assert TriggerRequest.from_message(message) == TriggerRequest("d")


# Run ids


def test_the_same_key_is_the_same_run_whoever_asks():
    first = TriggerRequest("d", key="2026-11-20").run_id_for("task-1")

    assert first == TriggerRequest("d", {"other": 1}, key="2026-11-20").run_id_for("task-2")
    assert first == "relay__2026-11-20"


def test_without_a_key_each_request_is_its_own_run():
    assert TriggerRequest("d").run_id_for("task-1") == "relay__task-1"


def test_a_run_id_given_goes_before_the_key():
    assert TriggerRequest("d", key="k", dag_run_id="mine").run_id_for("t") == "mine"


def test_a_key_that_airflow_could_not_hold_becomes_a_uuid5_that_never_changes():
    # Written out: another id for the same key would be a second run.
    known = {
        "invoice 4711/ä": "relay__ff12a4e8-823b-5aac-9657-a7cdabb6bd6e",
        "a..b": "relay__12ce257b-ec76-5f3d-8a6e-5b62d65fa0d4",
        "k" * 300: "relay__d678649f-b4c5-55bd-a2c1-c69e695563a4",
    }

    assert {key: TriggerRequest("d", key=key).run_id_for("t") for key in known} == known
    assert all(map(is_run_id, known.values()))


KEYS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), min_size=1, max_size=512)


@given(KEYS, KEYS)
def test_every_key_makes_a_run_id_that_airflow_takes_and_different_keys_different_ones(one, other):
    first = TriggerRequest("d", key=one).run_id_for("t")

    assert is_run_id(first)
    assert (first == TriggerRequest("d", key=other).run_id_for("t")) == (one == other)


@given(st.text(min_size=1, max_size=200))
def test_every_task_id_makes_a_run_id_that_airflow_takes(task_id):
    assert is_run_id(TriggerRequest("d").run_id_for(task_id.encode(errors="replace").decode()))


# Round trips

TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=20)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
ZONES = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
INSTANTS = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=ZONES)
REQUESTS = st.fixed_dictionaries(
    {"dag_id": st.from_regex(r"[A-Za-z0-9_.-]{1,40}", fullmatch=True).filter(lambda text: text.strip("."))},
    optional={
        "conf": st.none() | st.dictionaries(TEXTS, JSON_VALUES, max_size=5),
        "key": KEYS,
        "dag_run_id": st.from_regex(r"[A-Za-z0-9_:+-]{1,40}", fullmatch=True).filter(is_run_id),
        "logical_date": INSTANTS,
        "run_after": st.none() | INSTANTS,
        "note": TEXTS,
        "connection": st.from_regex(r"[A-Za-z0-9_]{1,20}", fullmatch=True),
        "if_exists": st.sampled_from(["reuse", "fail", "clear", "skip"]),
        "if_paused": st.sampled_from(["trigger", "hold", "fail", "unpause"]),
        "window": st.none() | st.integers(1) | st.just("max_active_runs"),
        "give_up_after_s": st.floats(0.001, 1e9) | st.integers(1, 10**9),
    },
)


@given(REQUESTS)
def test_a_request_comes_out_of_its_message_as_it_went_in(fields):
    request = TriggerRequest(**fields)

    again = TriggerRequest.from_message(json.loads(json.dumps(request.to_message(), allow_nan=False)))

    assert again == request.model_copy()
    assert again.to_message() == request.to_message()
    assert again.run_id_for("t") == request.run_id_for("t")


ANYTHING = st.recursive(
    JSON_VALUES
    | st.floats()
    | st.binary(max_size=5)
    | st.text(max_size=5)
    | st.integers()
    | st.builds(object)
    | st.datetimes(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(ANYTHING)
def test_a_conf_is_either_refused_or_json_that_comes_back_equal(conf):
    try:
        message = TriggerRequest("d", conf=conf).to_message()
    except InvalidRequest:
        return
    sent = json.dumps(message, allow_nan=False)

    sent.encode()
    assert TriggerRequest.from_message(json.loads(sent)).to_message() == json.loads(sent)


@given(st.dictionaries(st.sampled_from([*TriggerRequest.model_fields, "x"]), ANYTHING, max_size=5))
def test_any_message_is_either_a_request_or_invalid_and_can_always_be_shown(message):
    assert isinstance(shown_message(message), str)
    try:
        request = TriggerRequest.from_message(message)
    except InvalidRequest:
        return
    assert isinstance(request.shown("t"), str)


# What Flower and logs show


def test_of_a_conf_only_its_keys_and_size_are_shown():
    conf = {"day": "2026-11-20", "password": CANARY, **{f"k{number}": CANARY for number in range(10)}}
    request = TriggerRequest("daily", conf, key="k1", note=CANARY, connection="prod")

    for shown in (request.shown("t"), shown_message(request.to_message()), conf_summary(conf)):
        assert CANARY not in shown
        assert "password" in shown
        assert "bytes" in shown
    assert "dag_id='daily', run_id='relay__k1'" in request.shown("t")
    assert "key='k1'" in request.shown("t")


def test_of_an_unknown_field_nothing_but_its_type_is_shown():
    shown = shown_message({"dag_id": "d", "config": {"password": CANARY}, "conf": [CANARY], "note": CANARY})

    assert CANARY not in shown
    assert "config=<dict>" in shown


# The other things that travel


def test_a_run_comes_out_of_its_result_as_it_went_in_also_from_a_newer_worker():
    run = DagRun("d", "r", "queued", created=False, url="https://airflow/…")
    sent = json.loads(json.dumps({**run.to_message(), "of_a_newer_release": 1}))

    assert DagRun.from_message(sent) == run


@given(st.floats(1, 4e9), TEXTS, st.none() | st.floats(1, 4e9))
def test_who_asked_and_when_comes_out_as_it_went_in(at, by, due):
    asked = Asked(at, by, due)

    assert Asked.from_message(json.loads(json.dumps(asked.to_message())), otherwise_at=0.0) == asked


@given(ANYTHING)
def test_an_odd_provenance_never_fails_a_request(odd):
    for message in (odd, {"at": odd, "by": odd, "due": odd}):
        asked = Asked.from_message(message, otherwise_at=7.0)
        assert isinstance(asked.at, float)
        assert isinstance(asked.by, str)


def test_the_json_schema_names_every_field_of_a_request():
    schema = json_schema()["tasks"]["tasks.trigger_dag"]

    assert set(schema["properties"]) == set(TriggerRequest.model_fields)
    assert schema["required"] == ["dag_id"]
    assert schema["additionalProperties"] is False
    json.dumps(json_schema())
