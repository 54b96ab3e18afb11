"""What a dead letter's replay would send, and how it is changed before: no Redis needed."""

from __future__ import annotations

from typing import Any

import pytest

from producers.cli_dead import changed_fields
from producers.desk import anew, checked, fields_of, goes_back, run_of, why_not
from producers.errors import InvalidRequest, NotReplayable
from producers.stores.dead import Filter, Letter

TRIGGER, POLL = "tasks.trigger_dag", "tasks.poll_external_job"


def letter(kwargs: dict[str, Any], *args: Any, task: str = TRIGGER, **known: Any) -> Letter:
    request = {"task": task, "args": [*args], "kwargs": {"v": 1, "asked": {"at": 1}, **kwargs}}
    return Letter("old", 1.0, task=task, **{"request_bytes": 1, "request": request, **known})


@pytest.mark.parametrize(
    ("given", "args", "sent"),
    [
        ({"dag_id": "d"}, (), {"dag_id": "d", "dag_run_id": "relay__old"}),
        ({"dag_id": "d", "key": "k"}, (), {"dag_id": "d", "key": "k"}),
        ({"dag_id": "d", "dag_run_id": "mine"}, (), {"dag_id": "d", "dag_run_id": "mine"}),
        ({"key": "k"}, ("d", {"a": 1}), {"dag_id": "d", "conf": {"a": 1}, "key": "k"}),
        ({"dag_id": "d", "key": "k"}, ({"a": 1},), {"dag_id": "d", "conf": {"a": 1}, "key": "k"}),
        ({"dag_id": "d", "key": "k"}, (None,), {"dag_id": "d", "key": "k"}),
        ({"dag_id": "d", "key": "k", "so_far": {"run": {}}}, (), {"dag_id": "d", "key": "k"}),
    ],
)
def test_a_trigger_keeps_its_key_or_its_run_id(given, args, sent):
    found = fields_of(letter(given, *args))

    assert found == sent
    assert checked(letter(given), found).run_id_for("new") == (
        sent.get("dag_run_id") or f"relay__{sent['key']}"
    )


def test_the_run_id_on_record_counts_for_a_replay_of_a_replay():
    assert fields_of(letter({"dag_id": "d"}, dag_run_id="relay__first"))["dag_run_id"] == "relay__first"


def test_an_id_that_is_no_run_id_is_pinned_as_the_worker_made_it():
    long = Letter("x" * 300, 1.0, task=TRIGGER, request_bytes=1, request=letter({"dag_id": "d"}).request)

    assert fields_of(long)["dag_run_id"].startswith("relay__")
    assert checked(long, fields_of(long)).run_id_for("new") == fields_of(long)["dag_run_id"]


def test_what_came_by_position_must_not_contradict_the_fields():
    with pytest.raises(InvalidRequest, match="dag_id: given by position and by name"):
        fields_of(letter({"dag_id": "d"}, "other"))
    with pytest.raises(InvalidRequest, match="conf: given by position"):
        fields_of(letter({"dag_id": "d", "conf": {}}, {"a": 1}))
    with pytest.raises(InvalidRequest, match="submit: the result of the task before"):
        fields_of(letter({"service": "s", "path": "/a"}, {"a": 1}, task=POLL))


def test_the_result_of_the_task_before_a_poll_is_its_body():
    poll = letter({"service": "s", "path": "/a", "submit": {"path": "/jobs"}}, {"n": 5}, task=POLL)

    assert fields_of(poll)["submit"] == {"path": "/jobs", "body": {"n": 5}}
    assert run_of(poll) is None


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"request": None, "request_bytes": 0}, "its message was lost"),
        ({"fan_out": "old"}, "letters of their own, with --fan-out old"),
        ({"task": "tasks.settle_outcome", "request": None, "request_bytes": 0}, "nothing that was asked for"),
        ({"request": None, "request_bytes": 0, "raw_bytes": 9}, "no worker could read its message"),
    ],
)
def test_what_cannot_be_sent_again_says_why(known, words):
    one = letter({"dag_id": "d"}, **{"task": TRIGGER, **known})

    assert words in why_not(one)
    with pytest.raises(NotReplayable, match=words):
        fields_of(one)


def test_a_request_of_a_newer_release_is_left_to_that():
    with pytest.raises(NotReplayable, match="v2"):
        fields_of(letter({"dag_id": "d", "v": 2}))


def test_a_message_that_no_request_ended_with_goes_back_as_it_was():
    one = Letter("x", 1.0, raw_bytes=9, unrecorded=True)

    assert goes_back(one)
    assert why_not(one) == ""


@pytest.mark.parametrize(
    ("given", "choice", "sent"),
    [
        ({}, None, "reuse"),
        ({"if_exists": "fail"}, None, "fail"),
        ({"if_exists": "fail"}, "reuse", "reuse"),
        ({"if_exists": "skip"}, "reuse", "skip"),
        ({"if_exists": "skip"}, "clear", "clear"),
    ],
)
def test_the_choice_for_a_run_that_exists(given, choice, sent):
    one = letter({"dag_id": "d", **given})

    assert checked(one, fields_of(one), choice).if_exists == sent


def test_where_a_changed_request_looks_for_its_run():
    one = letter({"dag_id": "d", "connection": "eu"}, connection="eu", dag_id="d", dag_run_id="relay__old")

    assert run_of(one) == ("eu", "d", "relay__old")
    changed = checked(one, {**fields_of(one), "dag_id": "e", "connection": "us"})
    assert run_of(one, changed) == ("us", "e", "relay__old")
    assert run_of(one, checked(one, {"dag_id": "d"})) is None  # a run of its own


def test_what_follows_in_a_chain_is_sent_with_new_ids_and_without_the_chord():
    options = {"task_id": "t", "queue": "q", "chord": {"task": "c"}, "group_id": "g", "root_id": "r"}
    body = {"task": "b", "options": {"task_id": "b1"}, "kwargs": {}}
    follows = {"task": "a", "options": options, "kwargs": {"body": body}, "subtask_type": "chord"}

    made = anew(follows)

    assert made["options"] == {"queue": "q"}
    assert made["kwargs"]["body"]["options"] == {}
    assert follows["options"] is options
    assert body["options"]
    assert anew({"task": "a", "kwargs": {"body": body}})["kwargs"]["body"] is body  # a plain argument


@pytest.mark.parametrize(
    ("changes", "removed", "fields"),
    [
        (("conf.a=2",), (), {"conf": {"a": 2, "list": [1, {"b": 2}]}}),
        (('conf.a="2"',), (), {"conf": {"a": "2", "list": [1, {"b": 2}]}}),
        (("conf.a=text",), (), {"conf": {"a": "text", "list": [1, {"b": 2}]}}),
        (("conf.list.1.b=3", "conf.list.0=0"), (), {"conf": {"a": 1, "list": [0, {"b": 3}]}}),
        (("conf.new.deep=null",), (), {"conf": {"a": 1, "list": [1, {"b": 2}], "new": {"deep": None}}}),
        ((), ("conf.list.0", "conf.a"), {"conf": {"list": [{"b": 2}]}}),
        (("note=a=b",), ("conf",), {"note": "a=b"}),
    ],
)
def test_changes_reach_into_the_conf(changes, removed, fields):
    one = letter({"dag_id": "d", "conf": {"a": 1, "list": [1, {"b": 2}]}})

    assert changed_fields(one, changes, removed) == {"dag_id": "d", "dag_run_id": "relay__old", **fields}
    assert fields_of(one)["conf"] == {"a": 1, "list": [1, {"b": 2}]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("conf.list.9=1", "conf.list.9: is not there"),
        ("conf.list.x=1", "conf.list.x: is not there"),
        ("conf.a.b=1", "conf.a: is no object, so it has no 'b'"),
        ("=1", "--set: is no FIELD=VALUE"),
        ("conf", "--set: is no FIELD=VALUE"),
    ],
)
def test_a_change_that_is_nowhere_is_told_by_its_path(change, words):
    with pytest.raises(InvalidRequest, match=words):
        changed_fields(letter({"dag_id": "d", "conf": {"a": 1, "list": []}}), [change], [])


def test_what_contradicts_itself_can_be_mended():
    one = letter({"dag_id": "d", "conf": {"a": 1}, "key": "k"}, {"b": 2})

    assert changed_fields(one, ["conf.a=3"], []) == {"dag_id": "d", "conf": {"a": 3}, "key": "k"}


def test_the_words_of_an_error_that_is_not_ours_are_not_listed():
    ours = Letter("a", 1.0, error="GaveUp", reason="gave up", error_args=[1, "x"])
    foreign = Letter("b", 1.0, error="KeyError", reason="KeyError: 'c4n4ry'", error_args=["c4n4ry"])

    assert ours.to_json()["reason"] == "gave up"
    assert "c4n4ry" not in str(foreign.to_json())
    assert "KeyError" in foreign.told
    assert Letter("c", 1.0, error="Expired", reason="it expired").told == "it expired"


def test_a_letter_without_a_key_begins_with_none():
    assert not Filter(key_prefix="k").takes(letter({"dag_id": "d"}))
    assert Filter(key_prefix="k").takes(letter({"dag_id": "d"}, key="k1"))
