"""A PollRequest says at the call what is wrong with it, and travels as it was given."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producers.contract import (
    MAX_RESULT_BYTES,
    PollRequest,
    interval_after,
    json_schema,
    reference_for,
    shown_poll,
)
from producers.errors import InvalidRequest

CANARY = "canary-7d1f"
GOOD: dict[str, Any] = {"service": "train", "path": "/jobs/{job_id}", "job_id": "17"}
SUBMIT = {"path": "/jobs", "body": {"ref": "{reference}"}}
SUBMITTED: dict[str, Any] = {"service": "train", "path": "/jobs/{job_id}", "submit": SUBMIT}

QUEUE: dict[str, Any] = {"via": "queue", "message": {"a": 1}, "path": None, "job_id": None}

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("no service", {"service": None}, "service: "),
    ("a service that is an address", {"service": "http://evil"}, "service: is no connection id"),
    ("neither path nor url", {"path": None}, "path: give the job's path, or its url"),
    ("both path and url", {"url": "http://h/x"}, "path: give the job's path, or its url"),
    ("a path of another host", {"path": f"//{CANARY}/jobs"}, "path: is no path within the service"),
    ("a path without a slash", {"path": CANARY}, "path: is no path within the service"),
    ("a path with a space", {"path": f"/{CANARY} x"}, "path: is no path within the service"),
    ("a path with a fragment", {"path": f"/jobs#{CANARY}"}, "path: is no path within the service"),
    ("a url with a fragment", {"path": None, "url": f"http://h/x#{CANARY}"}, "url: has a '#'"),
    ("an unknown placeholder", {"path": "/jobs/{id}"}, "path: has a placeholder"),
    ("a path with half a placeholder", {"path": "/jobs/{job_id"}, "path: has a placeholder"),
    ("a url with a password", {"path": None, "url": f"http://u:{CANARY}@h/x"}, "url: is no http"),
    ("a url of a file", {"path": None, "url": "file:///etc/passwd"}, "url: is no http"),
    ("an expression that does not compile", {"state": "jobs[0"}, "state: is no JMESPath expression"),
    ("a result that does not compile", {"result": "a b"}, "result: is no JMESPath expression"),
    ("a result that doubles", {"result": "|".join(["[@,@]"] * 13)}, "result: may make more than 4096 times"),
    ("a progress that doubles", {"progress": ".".join(["{a:a,b:a}"] * 13)}, "progress: may make more than"),
    ("a join that doubles", {"reason": "|".join(["join('',[@,@])"] * 10)}, "reason: may make more than"),
    ("an expression too deep", {"state": "(" * 490 + "a" + ")" * 490}, "state: is no JMESPath expression"),
    (
        "states that overlap",
        {"success": ["Done"], "failure": ["done"]},
        "success and failure: both have done",
    ),
    ("no success at all", {"success": []}, "success: "),
    ("an interval of no time", {"interval_s": 0}, "interval_s: "),
    ("an interval that is text", {"interval_s": "5"}, "interval_s: "),
    ("an interval without end", {"interval_s": math.inf}, "interval_s: "),
    ("a ceiling below the interval", {"interval_s": 30, "max_interval_s": 10}, "max_interval_s: is below"),
    ("a shrinking interval", {"growth": 0.5}, "growth: "),
    ("a method that changes something", {"method": "DELETE"}, "method: "),
    ("credentials in a header", {"headers": {"Authorization": CANARY}}, "headers: 'Authorization' belongs"),
    ("a key in a header", {"headers": {"X-Api-Key": CANARY}}, "headers: 'X-Api-Key' belongs"),
    ("a host in a header", {"headers": {"Host": CANARY}}, "headers: 'Host' belongs"),
    ("a header with a line end", {"headers": {"X-A": f"{CANARY}\r\nX-B: 1"}}, "headers: 'X-A' is no header"),
    ("a token in the query", {"query": {"access_token": CANARY}}, "query: 'access_token' looks like"),
    ("a token in the path's query", {"path": f"/jobs?api_key={CANARY}"}, "path: 'api_key' looks like"),
    (
        "a token in the url's query",
        {"path": None, "url": f"http://h/x?a=1&token={CANARY}"},
        "url: 'token' looks like",
    ),
    ("a body that is no JSON", {"body": {"a": object()}}, "body.a is of type object"),
    ("find without submit", {"find": {"path": "/jobs?ref={reference}"}}, "find: needs submit"),
    ("submit_once without submit", {"submit_once": True}, "submit_once: needs submit"),
    ("a then that is none", {"then": {"dag_id": "a/b"}}, "then: dag_id: is no DAG id"),
    (
        "a then with our key",
        {"then": {"dag_id": "d", "conf": {"job": 1}}},
        "then: its conf has the key 'job'",
    ),
    ("a heartbeat that nobody gives", {"heartbeat_s": 5}, "heartbeat_s: needs {callback_url} in submit"),
    ("a callback in the look", {"body": {"a": "{callback_url}"}}, "body: has {callback_url}, which only"),
    ("a callback in the path", {"path": "/x?to={callback_url}"}, "path: has a placeholder"),
    ("a message over HTTP", {"message": {"a": 1}}, "message: needs via='queue'"),
    ("a message as on_cancel", {"on_cancel": {"message": 1}}, "on_cancel: holds a message, which needs"),
    ("another way", {"via": "pigeon"}, "via: "),
    ("a queue without a message", {**QUEUE, "message": None}, "message: is missing"),
    ("a queue with a path", {**QUEUE, "path": "/x"}, "path: is for via='http'"),
    ("a queue with a submit", {**QUEUE, "submit": SUBMIT}, "submit: is for via='http'"),
    ("a queue with a rhythm", {**QUEUE, "interval_s": 2.0}, "interval_s: is for via='http'"),
    ("a queue with a job id", {**QUEUE, "job_id": "j"}, "job_id: is for via='http'"),
    ("a message with a job id", {**QUEUE, "message": ["{job_id}"]}, "message: has {job_id}"),
    ("a queue told by a request", {**QUEUE, "on_cancel": {"path": "/x"}}, "on_cancel: is a request"),
    ("a cancel with a job id", {**QUEUE, "on_cancel": {"message": "{job_id}"}}, "on_cancel: has {job_id}"),
    ("a message that is no JSON", {**QUEUE, "message": {"a": object()}}, "of type object"),
    ("an on_cancel to another host", {"on_cancel": {"path": "//h/x"}}, "on_cancel: path: is no path"),
    ("an unknown argument", {"conf": {CANARY: CANARY}}, "conf: is no argument"),
    ("the key of somebody's answer", {"wake_keys": ["answer:a:b"]}, "begins with 'answer:'"),
    ("too many wake keys", {"wake_keys": [str(n) for n in range(21)]}, "wake_keys: "),
]


@pytest.mark.parametrize(("what", "fields", "words"), WRONG, ids=[what for what, _, _ in WRONG])
def test_what_is_wrong_is_told_by_its_name_and_without_its_value(what, fields, words):
    given = {name: value for name, value in {**GOOD, **fields}.items() if value is not None}
    with pytest.raises(InvalidRequest) as raised:
        PollRequest(**given)
    assert words in str(raised.value)
    assert CANARY not in str(raised.value)


SUBMITTED_WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("a job id beside submit", {"job_id": "17"}, "job_id: a job that is submitted has none yet"),
    ("an id in the submission", {"submit": {"path": "/jobs/{job_id}"}}, "submit: has {job_id}"),
    ("a lookup by the id", {"find": {"path": "/jobs/{job_id}"}}, "find: has {job_id}"),
    ("a lookup by nothing", {"find": {"path": "/jobs"}}, "find: has no {reference}"),
    (
        "a lookup by what was not sent",
        {"submit": {"path": "/jobs"}, "find": {"path": "/jobs?ref={reference}"}},
        "submit: has no {reference}",
    ),
]


@pytest.mark.parametrize(
    ("what", "fields", "words"), SUBMITTED_WRONG, ids=[one[0] for one in SUBMITTED_WRONG]
)
def test_a_submission_that_contradicts_itself_is_told(what, fields, words):
    with pytest.raises(InvalidRequest, match=words.replace("{", r"\{").replace("}", r"\}")):
        PollRequest(**{**SUBMITTED, **fields})


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("path", {"path": "/jobs/{job_id}"}),
        ("url", {"url": "http://h/jobs/{job_id}"}),
        ("query", {"path": "/jobs", "query": {"id": "{job_id}"}}),
        ("body", {"path": "/jobs", "method": "POST", "body": {"ids": ["{job_id}"]}}),
    ],
)
def test_what_asks_by_the_id_needs_one(name, fields):
    with pytest.raises(InvalidRequest, match=f"{name}: has {{job_id}}, and there is neither a job_id nor a"):
        PollRequest(service="train", **fields)
    assert PollRequest(service="train", job_id="17", **fields)
    assert PollRequest(service="train", submit=SUBMIT, **fields)


def test_it_comes_out_of_its_message_as_it_went_in():
    request = PollRequest(
        **{**SUBMITTED, "find": {"path": "/jobs?ref={reference}", "job_id": "jobs[0].id"}},
        on_cancel={"method": "DELETE", "path": "/jobs/{job_id}"},
        then={"dag_id": "load", "conf": {"a": 1}},
        success=["OK"],
        interval_s=10,
        wake_keys=["k"],
        headers={"Accept-Language": "de"},
    )
    sent = json.loads(json.dumps(request.to_message()))
    assert PollRequest.from_message({**sent, "asked": {"at": 1}, "so_far": {}}).to_message() == sent
    assert sent["submit"] == SUBMIT
    assert "failure" not in sent


def test_what_is_shown_has_no_body_no_header_and_no_query():
    request = PollRequest(
        service="train",
        path=f"/jobs/17?q={CANARY}",
        body={"a": CANARY},
        method="POST",
        headers={"X-A": CANARY},
        query={"q": CANARY},
        then={"dag_id": "load", "conf": {"a": CANARY}},
    )
    for text in (request.shown("t"), repr(request), shown_poll(request.to_message())):
        assert "train" in text
        assert CANARY not in text.replace(f"path='/jobs/17?q={CANARY}'", "")
    assert CANARY not in request.shown("t")
    assert CANARY not in shown_poll({"service": {"a": CANARY}, "confg": CANARY, "submit": {"body": CANARY}})


def test_our_reference_is_the_same_on_every_attempt_and_another_for_another_task():
    assert PollRequest(**GOOD).reference_for("t1") == reference_for("t1") == reference_for("t1")
    assert reference_for("t1") != reference_for("t2")


@given(st.floats(0.1, 100), st.floats(1, 3), st.floats(0.1, 1000), st.integers(0, 30))
def test_pauses_grow_by_the_factor_up_to_the_ceiling(interval_s, growth, ceiling_s, looks):
    """What is computed from the time waited is what multiplying each pause would give."""
    request = PollRequest(
        **GOOD, interval_s=interval_s, growth=growth, max_interval_s=max(interval_s, ceiling_s)
    )
    waited_s, pause_s = 0.0, interval_s
    for _ in range(looks):
        if pause_s >= request.max_interval_s:
            break
        assert interval_after(waited_s, request) == pytest.approx(pause_s, rel=1e-6)
        waited_s += pause_s
        pause_s *= growth
    if growth > 1.001:
        assert interval_after(1e12, request) == request.max_interval_s


def test_the_schema_says_bounds_in_its_own_words():
    told = json.dumps(json_schema())
    assert not re.search(r'"(gt|ge|lt|le)":', told)
    properties = json_schema()["tasks"]["tasks.poll_external_job"]["properties"]
    assert properties["growth"]["minimum"] == 1
    assert properties["interval_s"]["exclusiveMinimum"] == 0


def test_publishers_in_other_languages_get_its_schema():
    properties = json_schema()["tasks"]["tasks.poll_external_job"]["properties"]
    assert {"service", "path", "submit", "state", "success", "interval_s"} <= properties.keys()
    assert MAX_RESULT_BYTES == 1_000_000
