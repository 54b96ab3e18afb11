"""What is asked about a job, and how every answer is read: none breaks a look, and none leaks a secret."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producers.contract import MAX_RESULT_BYTES, Call, PollRequest, interval_after, reference_for
from producers.errors import (
    ExternalJobFailed,
    ExternalJobGone,
    ExternalJobUnreadable,
    InvalidRequest,
    ServiceNotConfigured,
)
from producers.stores.answers import Observed, read_wake, rules_of, short
from tasks.http import HttpResponse
from tasks.job_answers import End, Look, call_of, given_up, job_id_in, look_of, read_look, retry_after_s
from tasks.services import Service

CANARY = "c4n4ry-s3cret"
TRAIN = Service("train", "https://host/api", token=CANARY)


def message(**more: Any) -> dict[str, Any]:
    fields = {"service": "train", "path": "/jobs/{job_id}", "job_id": "j1", **more}
    return PollRequest(**fields).to_message()


def look(seen: str | None = "running", **more: Any) -> Look:
    return look_of(message(**more), TRAIN, "t1", job_id="j1", reference="ref", seen=seen)


def answer(value: Any, status: int = 200, **headers: str) -> HttpResponse:
    return HttpResponse(status, headers, value if isinstance(value, bytes) else json.dumps(value).encode())


# Requests


def test_a_look_is_the_services_own_request_for_the_job():
    found = look(headers={"X-Team": "a"}, query={"ref": "{reference}", "id": "{job_id}"})

    assert (found.request.method, found.request.path) == ("GET", "/jobs/j1?ref=ref&id=j1")
    assert found.request.headers == {"X-Team": "a", "Authorization": f"Bearer {CANARY}"}
    assert found.request.body is None


def test_a_job_id_is_percent_encoded_in_the_path_and_plain_in_the_body():
    sent = message(path="/jobs/{job_id}?r={reference}", method="POST", body={"ids": ["{job_id}"], "n": 1})

    found = look_of(sent, TRAIN, "t1", job_id="a/b ü", reference="ref").request

    assert found.path == "/jobs/a%2Fb%20%C3%BC?r=ref"
    assert json.loads(found.body or b"") == {"ids": ["a/b ü"], "n": 1}
    assert found.headers["Content-Type"] == "application/json"


def test_the_credentials_of_the_service_stand_above_what_a_message_says():
    keyed = Service("train", "https://host", extra_headers={"X-Team": "ours"}, query={"key": "k"})

    found = look_of(message(headers={"X-Team": "theirs"}, query={"a": "1"}), keyed, "t1", job_id="j1").request

    assert found.headers["X-Team"] == "ours"
    assert found.path == "/jobs/j1?a=1&key=k"


def test_without_a_reference_on_record_it_is_made_from_the_task_id():
    found = look_of(message(path="/jobs?ref={reference}"), TRAIN, "t1", job_id=None).request

    assert found.path == f"/jobs?ref={reference_for('t1')}"


@pytest.mark.parametrize("name", ["X-Team", "x-team", "AUTHORIZATION", "Idempotency-Key", "idempotency-key"])
def test_no_header_of_a_message_stands_beside_one_of_ours(name):
    keyed = Service("train", "https://host", token="t", extra_headers={"X-Team": "ours"})
    call = Call.model_construct(path="/jobs", method="POST", body=None, query={}, headers={name: "theirs"})

    found = call_of(keyed, call, task_id="t1", idempotency_key="ours")

    assert sorted(found.headers) == ["Authorization", "Idempotency-Key", "X-Team"]
    assert "theirs" not in found.headers.values()


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/jobs?team=a", "/jobs?team=ours"),
        ("/jobs?team=a&b=1&team&te%61m=c", "/jobs?b=1&team=ours"),
        ("/jobs?teams=a", "/jobs?teams=a&team=ours"),
        ("/jobs", "/jobs?team=ours"),
    ],
)
def test_no_query_of_a_message_stands_beside_one_of_ours(path, sent):
    keyed = Service("train", "https://host", query={"team": "ours"})

    assert look_of(message(path=path), keyed, "t1", job_id="j1").request.path == sent
    assert look_of(message(path=path, query={"team": "b"}), keyed, "t1", job_id="j1").request.path == sent


def test_a_body_has_one_content_type():
    found = look(method="POST", body={"a": 1}, headers={"content-type": "application/vnd.x+json"}).request

    assert {name for name in found.headers if name.lower() == "content-type"} == {"content-type"}


def test_an_absolute_url_is_asked_within_the_service_alone():
    inside = message(path=None, url="https://host/api/jobs/{job_id}?full=1")
    outside = message(path=None, url="https://evil/api/jobs/{job_id}")

    assert look_of(inside, TRAIN, "t1", job_id="j1").request.path == "/jobs/j1?full=1"
    with pytest.raises(ServiceNotConfigured):
        look_of(outside, TRAIN, "t1", job_id="j1")


@pytest.mark.parametrize("job_id", [".", "..", "a/../b", "../../admin", "a/."])
def test_a_job_id_never_becomes_a_step_in_the_path(job_id):
    with pytest.raises(InvalidRequest, match="cannot be part of a URL"):
        look_of(message(), TRAIN, "t1", job_id=job_id)


def test_a_path_that_leaves_the_service_is_refused():
    for path in ("/jobs/../../admin/{job_id}", "/jobs%2F../{job_id}", "/jobs/..;/{job_id}"):
        with pytest.raises(ServiceNotConfigured, match=r"'\.\.'"):
            look_of(message(path=path), TRAIN, "t1", job_id="j1")


def test_a_submission_carries_its_key_and_its_reference():
    submit = Call(path="/jobs", method="POST", body={"ref": "{reference}", "n": 1})

    found = call_of(TRAIN, submit, task_id="t1", idempotency_key="the-key")

    assert found.headers["Idempotency-Key"] == "the-key"
    assert json.loads(found.body or b"") == {"ref": reference_for("t1"), "n": 1}


@given(st.text(min_size=1, max_size=20).filter(lambda text: text not in (".", "..") and text.isprintable()))
def test_no_job_id_changes_the_rest_of_the_path(job_id):
    try:
        job_id.encode()
    except UnicodeEncodeError:
        return
    try:
        path = look_of(message(), TRAIN, "t1", job_id=job_id).request.path
    except (InvalidRequest, ServiceNotConfigured):
        assert re.search(r"(\A|[/\\])(\.|%2e){1,2}([/\\;?]|%|\Z)", job_id, re.IGNORECASE)
        return

    assert path.startswith("/jobs/")
    assert path.count("/") == 2
    assert path.isascii()
    assert "?" not in path


# Answers


@pytest.mark.parametrize(
    ("value", "kind", "state"),
    [
        ({"state": "RUNNING"}, "running", "RUNNING"),
        ({"state": " Succeeded "}, "done", "Succeeded"),
        ({"state": "CANCELLED"}, "failed", "CANCELLED"),
        ({"state": True}, "running", "true"),
        ({"state": 3}, "running", "3"),
        ({"state": 0.5}, "running", "0.5"),
        ({"state": None}, "nonsense", ""),
        ({"state": ""}, "nonsense", ""),
        ({"state": {"a": 1}}, "nonsense", ""),
        ({"state": ["done"]}, "nonsense", ""),
        ({}, "nonsense", ""),
        ([], "nonsense", ""),
        ("done", "nonsense", ""),
        (None, "nonsense", ""),
        (b"", "nonsense", ""),
        (b"<html>running</html>", "nonsense", ""),
        (b'{"state": NaN}', "nonsense", ""),
        (b'{"state": "running"', "nonsense", ""),
        (b"\xff\xfe", "nonsense", ""),
        (b"[" * 100_000, "nonsense", ""),
        (b'\xef\xbb\xbf{"state": "running"}', "running", "running"),
    ],
)
def test_a_state_is_one_plain_value_of_json(value, kind, state):
    found = read_look(look(), answer(value))

    assert (found.kind, found.state) == (kind, state)
    assert found.counts


@pytest.mark.parametrize(
    ("value", "success", "failure", "kind"),
    [
        (True, ["true"], ["false"], "done"),
        (False, ["true"], ["false"], "failed"),
        (0, ["0"], ["1", "2"], "done"),
        (2, ["0"], ["1", "2"], "failed"),
        ("ÜBER", ["über"], ["x"], "done"),
    ],
)
def test_states_are_compared_as_text_without_regard_to_case(value, success, failure, kind):
    assert read_look(look(success=success, failure=failure), answer({"state": value})).kind == kind


def test_expressions_find_state_result_progress_and_reason():
    rules = {
        "state": "jobs[0].status",
        "result": "jobs[0].out.files[*].name",
        "progress": "jobs[0].percent",
        "reason": "jobs[0].why",
    }
    job: dict[str, Any] = {
        "status": "running",
        "percent": 17,
        "out": {"files": [{"name": "a"}, {"name": "b"}]},
    }

    assert read_look(look(**rules), answer({"jobs": [job]})).progress == "17"
    job["status"] = "done"
    assert read_look(look(**rules), answer({"jobs": [job]})).result == ["a", "b"]
    job |= {"status": "failed", "why": f"no\n  track, {CANARY}"}
    assert read_look(look(**rules), answer({"jobs": [job]})).words == "no track, ***"


def test_an_expression_that_fails_on_an_answer_is_an_error_that_names_its_field():
    bad_state = read_look(look(state="length(state)"), answer({"state": 5}))
    bad_result = read_look(look(result="length(state)", success=["5"]), answer({"state": 5}))
    bad_progress = read_look(look(progress="length(n)"), answer({"state": "running", "n": 1}))
    bad_reason = read_look(look(reason="length(n)"), answer({"state": "failed", "n": 1}))

    assert (bad_state.kind, bad_state.field) == ("nonsense", "state")
    assert (bad_result.kind, bad_result.field) == ("unreadable", "result")
    # What is only shown changes nothing about the job, and says itself what is wrong with it.
    why = "the expression fails: JMESPathTypeError"
    assert (bad_progress.kind, bad_progress.progress) == ("running", why)
    assert (bad_reason.kind, bad_reason.words) == ("failed", why)


def test_nonsense_keeps_its_first_200_bytes_on_one_line_with_secrets_masked():
    page = f'<html>\n<b>"token": "abcdef"</b> {CANARY}\x00 ' + "é" * 300

    found = read_look(look(), answer(page.encode(), 200))

    kept = found.words.partition(": ")[2]
    assert found.words.startswith("is not JSON: <html> <b>")
    assert len(kept.encode()) <= 200
    assert kept.isprintable()
    assert CANARY not in found.words
    assert "abcdef" not in found.words


@pytest.mark.parametrize("at", range(150, 215, 3))
def test_a_secret_that_the_cut_goes_through_is_masked_too(at):
    found = read_look(look(), answer(("x" * at + CANARY + "y" * 100).encode()))

    assert CANARY[:4] not in found.words


@pytest.mark.parametrize(
    ("status", "headers", "counts", "asked_s", "words"),
    [
        (429, {"retry-after": "7"}, False, 7, "it answered 429"),
        (429, {}, False, None, "it answered 429"),
        (503, {"retry-after": "3"}, True, 3, "it answered 503"),
        (500, {"retry-after": "3"}, True, None, "it answered 500"),
        (401, {}, True, None, "refuses the credentials of the worker (401)"),
        (403, {}, True, None, "refuses the credentials of the worker (403)"),
        (302, {"location": "http://evil/"}, True, None, "a redirect (302), which is not followed"),
        (400, {}, True, None, "it answered 400"),
    ],
)
def test_an_answer_that_is_no_success_is_an_error_and_429_does_not_count(
    status, headers, counts, asked_s, words
):
    found = read_look(look(), answer({"state": "done"}, status, **headers))

    assert (found.kind, found.counts, found.retry_after_s) == ("unavailable", counts, asked_s)
    assert words in found.words


def test_gone_is_an_end_but_for_a_job_that_was_just_submitted_and_never_seen():
    submitted = {"job_id": None, "submit": {"path": "/jobs"}}

    assert read_look(look(), answer({}, 404)).kind == "gone"
    assert read_look(look(seen=None), answer({}, 410)).kind == "gone"
    assert read_look(look(seen=None, **submitted), answer({}, 404)).kind == "unavailable"
    assert read_look(look(seen="queued", **submitted), answer({}, 404)).kind == "gone"
    assert read_look(look(gone=[]), answer({}, 404)).kind == "unavailable"


def test_a_result_over_the_limit_is_a_failure_that_says_so():
    whole = look(result="out")
    fits = read_look(whole, answer({"state": "done", "out": "x" * (MAX_RESULT_BYTES - 2), "more": "y" * 99}))
    large = read_look(whole, answer({"state": "done", "out": "x" * MAX_RESULT_BYTES}))

    assert fits.kind == "done"
    assert (large.kind, large.field) == ("unreadable", "result")
    assert f"over the limit of {MAX_RESULT_BYTES} bytes" in large.words
    assert large.result is None


def test_state_and_progress_are_short_enough_for_a_hundred_thousand_records():
    found = read_look(look(progress="p"), answer({"state": "é" * 100, "p": "x" * 1000 + "\n"}))

    assert len(found.state.encode()) <= 64
    assert len(found.progress) == 64


@pytest.mark.parametrize("text", ["Wed, 21 Oct 2026 07:28:00 GMT", "-1", "1.5", "", "x"])
def test_an_odd_retry_after_counts_as_none(text):
    assert retry_after_s({"retry-after": text}) is None


@given(st.binary(max_size=200), st.integers(200, 599))
def test_no_answer_breaks_a_look(body, status):
    assert isinstance(read_look(look(result="a.b", progress="c", reason="d"), answer(body, status)), Observed)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
def test_whatever_a_wake_brings_is_read_without_harm(value):
    found = read_wake(rules_of(message(result="@", state="state || @")), value, TRAIN.masked)

    assert len(found.state.encode()) <= 64


# Job ids


@pytest.mark.parametrize(
    ("expression", "value", "job_id"),
    [
        ("id", {"id": "j-1"}, "j-1"),
        ("id", {"id": 17}, "17"),
        ("jobs[0].id", {"jobs": [{"id": "a"}]}, "a"),
        ("jobs[0].id", {"jobs": []}, None),
        ("id", {}, None),
    ],
)
def test_a_job_id_is_found_in_an_answer(expression, value, job_id):
    assert job_id_in(expression, answer(value)) == job_id


@pytest.mark.parametrize(
    "value", [{"id": {}}, {"id": True}, {"id": ""}, {"id": ".."}, {"id": "x" * 501}, b"<p>"]
)
def test_what_can_be_no_job_id_is_refused(value):
    with pytest.raises(ValueError):  # noqa: PT011 - its words go into an error that names the field
        job_id_in("id", answer(value))


# Observations


@pytest.mark.parametrize(
    "end",
    [
        End("done", "ok", {"a": [1]}),
        End("failed", "ko", None, "no track"),
        End("gone", "404", None, "it answered 404"),
        End("unreadable", "", None, "too large", "result"),
    ],
)
def test_an_end_survives_the_trip_through_redis(end):
    assert End.from_json(json.loads(json.dumps(end.to_json()))) == end


@pytest.mark.parametrize(
    "body",
    [
        None,
        "done",
        {"state": "done"},
        {"end": "2026-11-20", "state": "done"},
        {"end": "done"},
        {"end": "done", "state": "x", "id": 1},
    ],
)
def test_a_webhooks_body_is_not_taken_for_an_end_of_ours(body):
    assert End.from_json(body) is None


def test_each_end_is_the_error_that_its_caller_can_act_on():
    assert End("done", "ok").error("s", "j") is None
    failed = End("failed", "ko", None, "why").error("s", "j")
    assert type(failed) is ExternalJobFailed
    assert "why" in str(failed)
    assert type(End("gone", "404").error("s", "j")) is ExternalJobGone
    unreadable = End.of(given_up(Observed("nonsense", words="is missing", field="state"), 21)).error("s", "j")
    assert isinstance(unreadable, ExternalJobUnreadable)
    assert (unreadable.field, unreadable.words) == ("state", "21 looks in a row failed: is missing")


# Rhythm


def test_pauses_follow_the_contract_with_jitter_and_what_the_service_asks_for():
    request = PollRequest(service="s", path="/j", interval_s=2, growth=2, max_interval_s=20, jitter=0.25)
    rules = rules_of(request.to_message())

    for waited in (0.0, 2.0, 6.0, 100.0):
        plain = interval_after(waited, request)
        drawn = [rules.pause_s(waited) for _ in range(200)]
        assert 0.75 * plain <= min(drawn) < max(drawn) <= 1.25 * plain
    assert rules.pause_s(0.0, 60.0) == 60
    assert rules.pause_s(0.0, None, 30.0) == 30


def test_what_a_message_leaves_out_is_as_the_contract_has_it():
    request = PollRequest(service="s", path="/j")
    rules = rules_of(request.to_message())

    assert rules.success == {text.lower() for text in request.success}
    assert rules.failure == {text.lower() for text in request.failure}
    assert rules.gone == set(request.gone)
    assert (rules.interval_s, rules.growth) == (request.interval_s, request.growth)
    assert (rules.max_interval_s, rules.jitter, rules.max_errors) == (60, 0.1, 20)


def test_words_are_cut_at_whole_characters():
    assert short("é" * 150) == "é" * 100
    assert short("a\nb\tc  d") == "a b c d"
    assert short("\ud800x") == "x"


@pytest.mark.parametrize("last", ["@", "to_string(@)"])
@pytest.mark.parametrize("state", ["done", "failed", "running"])
def test_a_value_that_is_small_in_memory_and_huge_as_json_is_never_written_out(state, last):
    body = {"state": state, "x": "y" * 1000}
    huge = "|".join(["[@,@]"] * 12 + [last])  # as much as the contract lets through: 4096 times the answer

    found = read_look(look(result=huge, reason=huge, progress=huge), answer(body))

    assert len(json.dumps(End.of(found).to_json())) < 1000
    if body["state"] == "done":
        assert (found.kind, found.field) == ("unreadable", "result")
        assert ("over the limit" if last == "@" else "the expression fails") in found.words


def test_a_text_of_a_value_is_its_json():
    assert read_look(look(result="to_string(a)"), answer({"state": "done", "a": [1]})).result == "[1]"


def test_a_result_that_json_cannot_hold_ends_the_job_as_unreadable():
    found = read_look(look(result="&x"), answer({"state": "done"}))

    assert (found.kind, found.field, found.words) == ("unreadable", "result", "is nothing that JSON can hold")
