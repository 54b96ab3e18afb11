"""Whether a job is submitted again, refused, or given up: each answer to a submission has one consequence."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from producers.contract import Call, Find, PollRequest, reference_for
from producers.errors import (
    ExternalJobUnreadable,
    InvalidRequest,
    ServiceNotConfigured,
    ServiceUnavailable,
    SubmitRejected,
    SubmitUnknown,
)
from producers.stores.records import Record
from tasks import external_job
from tasks.external_job import Job, check, look_up, meaning, send_submission, tell, with_body
from tasks.http import HttpRequest, HttpResponse, NoAnswer
from tasks.services import Service

CANARY = "c4n4ry-s3cret"
TRAIN = Service("train", "https://host/api", token=CANARY)
REQUEST = PollRequest(
    service="train",
    path="/jobs/{job_id}",
    submit={"path": "/jobs", "body": {"ref": "{reference}"}},
    max_errors=3,
)


class Sender:
    """The place where bytes leave: gives the answers that it was told, and keeps what was sent."""

    def __init__(self) -> None:
        self.answers: list[HttpResponse | NoAnswer] = []
        self.sent: list[HttpRequest] = []

    def send(self, request: HttpRequest) -> HttpResponse:
        self.sent.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, NoAnswer):
            raise answer
        return answer


@pytest.fixture
def sender(monkeypatch: pytest.MonkeyPatch) -> Sender:
    found = Sender()
    monkeypatch.setattr(external_job, "service_sender", lambda service: found)
    return found


def answer(status: int, value: Any = None, **headers: str) -> HttpResponse:
    return HttpResponse(status, headers, b"" if value is None else json.dumps(value).encode())


def job(attempts: int = 0, **more: Any) -> Job:
    request = PollRequest(**{**{name: getattr(REQUEST, name) for name in REQUEST.model_fields_set}, **more})
    return Job(SimpleNamespace(), request, request.to_message(), TRAIN, Record("t1", attempts=attempts), None)


def submit(sender: Sender, response: HttpResponse | NoAnswer, *, unsure: bool = False, **more: Any) -> str:
    sender.answers = [response]
    held = job(**more)
    assert held.request.submit is not None
    return send_submission(held, held.request.submit, unsure=unsure)


def test_a_submission_says_where_to_call_back(sender):
    told = {"body": {"to": "{callback_url}", "ref": "{reference}"}, "headers": {"X-To": "{callback_url}"}}
    held = replace(
        job(path=None, submit={"path": "/jobs", "query": {"to": "{callback_url}"}, **told}),
        callback_url="https://relay/v1/callbacks/t0k3n",
    )
    sender.answers = [answer(202)]
    assert held.request.submit is not None

    assert send_submission(held, held.request.submit, unsure=False) is None  # no id, and none is needed

    (sent,) = sender.sent
    assert json.loads(sent.body or b"") == {"to": held.callback_url, "ref": reference_for("t1")}
    assert sent.headers["X-To"] == held.callback_url
    assert sent.path == "/jobs?to=https%3A%2F%2Frelay%2Fv1%2Fcallbacks%2Ft0k3n"


def test_a_callbacks_token_that_a_service_repeats_is_masked(sender):
    with pytest.raises(SubmitRejected, match="cannot reach https://relay/v1/callbacks/") as refused:
        submit(sender, answer(422, {"e": "cannot reach https://relay/v1/callbacks/dDE.17.s1gn-_aTure today"}))
    assert "s1gn" not in str(refused.value)
    assert "today" in str(refused.value)


def test_a_submission_carries_the_key_that_is_the_same_on_every_attempt(sender):
    for _ in range(2):
        assert submit(sender, answer(201, {"id": 17})) == "17"

    assert {one.headers["Idempotency-Key"] for one in sender.sent} == {reference_for("t1")}
    assert {one.body for one in sender.sent} == {json.dumps({"ref": reference_for("t1")}).encode()}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 422, 301, 307, 308])
def test_a_definite_refusal_is_the_end(sender, status):
    with pytest.raises(SubmitRejected) as caught:
        submit(sender, answer(status, {"error": f"no, {CANARY}"}))

    assert caught.value.status == status
    assert caught.value.words
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 404, 422, 307])
def test_a_refusal_after_an_answer_was_lost_leaves_it_unknown(sender, status):
    with pytest.raises(SubmitUnknown, match=reference_for("t1")):
        submit(sender, answer(status), unsure=True)


def test_a_conflict_with_our_own_earlier_attempt_is_asked_again(sender):
    with pytest.raises(ServiceUnavailable):
        submit(sender, answer(409), unsure=True)


@pytest.mark.parametrize(
    ("response", "unsure"),
    [
        (answer(429), False),
        (answer(500), True),
        (answer(502), True),
        (answer(503), True),
        (answer(408), True),
        (answer(425), True),
        (answer(302), True),
        (answer(303), True),
        (NoAnswer("no connection", False), False),
        (NoAnswer("reset", True), True),
        (answer(200), True),
        (answer(200, {"job": 1}), True),
        (answer(200, {"id": None}), True),
        (answer(200, {"id": [1]}), True),
        (answer(200, {"id": ".."}), True),
    ],
)
def test_whether_a_submission_may_have_been_taken_is_known_for_every_other_answer(sender, response, unsure):
    with pytest.raises(ServiceUnavailable) as caught:
        submit(sender, response)

    assert caught.value.unsure is unsure


def test_what_the_service_asks_for_is_known_to_the_next_attempt(sender):
    with pytest.raises(ServiceUnavailable) as caught:
        submit(sender, answer(429, **{"retry-after": "7"}))

    assert caught.value.retry_after_s == 7


def test_an_id_that_cannot_be_read_is_asked_for_no_more_often_than_errors_are_borne(sender):
    with pytest.raises(ServiceUnavailable, match="job_id: is missing"):
        submit(sender, answer(201, {}), attempts=2)
    with pytest.raises(ExternalJobUnreadable, match="job_id: is missing, in an answer of 201"):
        submit(sender, answer(201, {}), attempts=3)


def test_one_that_is_not_to_be_submitted_twice_is_looked_for_even_then(sender):
    with pytest.raises(ServiceUnavailable, match="job_id: is missing"):
        submit(sender, answer(201, {}), attempts=3, submit_once=True)


# To find it


FIND = Find(path="/jobs?ref={reference}", job_id="jobs[0].id")


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (answer(200, {"jobs": [{"id": "j"}]}), "j"),
        (answer(200, {"jobs": []}), None),
        (answer(404), None),
        (answer(410), None),
    ],
)
def test_a_job_is_there_or_it_is_not(sender, response, found):
    sender.answers = [response]

    assert look_up(TRAIN, FIND, "t1") == found
    assert sender.sent[0].path == f"/jobs?ref={reference_for('t1')}"


@pytest.mark.parametrize("response", [answer(500), answer(401), answer(200), NoAnswer("reset", True)])
def test_a_lookup_without_an_answer_proves_nothing(sender, response):
    sender.answers = [response]

    with pytest.raises(ServiceUnavailable):
        look_up(TRAIN, FIND, "t1")


# To tell the service


CANCEL = Call(method="DELETE", path="/jobs/{job_id}")


def test_a_cancel_finds_the_job_whose_id_is_not_known(sender):
    sender.answers = [answer(200, {"jobs": [{"id": "j"}]}), answer(204)]

    assert tell(TRAIN, CANCEL, FIND, "t1", None) == "it answered 204"
    assert [one.method for one in sender.sent] == ["GET", "DELETE"]
    assert sender.sent[1].path == "/jobs/j"


@pytest.mark.parametrize("response", [answer(429), answer(500), NoAnswer("reset", True)])
def test_a_cancel_that_was_not_taken_is_tried_again(sender, response):
    sender.answers = [response]

    with pytest.raises(ServiceUnavailable):
        tell(TRAIN, CANCEL, None, "t1", "j")


def test_a_cancel_of_a_job_without_an_id_says_that_it_cannot_be(sender):
    with pytest.raises(InvalidRequest, match="no job id is known"):
        tell(TRAIN, CANCEL, None, "t1", None)


# What only a worker can check


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        (
            {"interval_s": 0.5},
            InvalidRequest,
            "interval_s: is 0.5, below the 1 s that service 'train' allows",
        ),
        ({"path": None, "url": "https://evil/api/jobs/1"}, ServiceNotConfigured, "not within it"),
        ({"path": "/a/../../b"}, ServiceNotConfigured, "may lead out of it"),
        ({"on_cancel": {"path": "/../b"}}, ServiceNotConfigured, "may lead out of it"),
    ],
)
def test_a_request_that_the_service_does_not_allow_is_refused_by_name(more, kind, words):
    with pytest.raises(kind) as caught:
        check(job(**more).request, TRAIN)

    assert words in str(caught.value)


def test_the_result_of_the_task_before_is_the_body_of_the_submission():
    sent = {"service": "train", "submit": {"path": "/jobs"}}

    assert with_body(({"n": 1},), sent)["submit"] == {"path": "/jobs", "body": {"n": 1}}
    assert with_body((None,), sent) == sent
    assert with_body((), sent) == sent


@pytest.mark.parametrize(
    ("before", "sent"),
    [(({},), {}), (({},), {"submit": {"path": "/", "body": 1}}), ((1, 2), {"submit": {"path": "/"}})],
)
def test_what_comes_by_position_and_fits_nowhere_is_refused(before, sent):
    with pytest.raises(InvalidRequest):
        with_body(before, sent)


# What observations mean


@pytest.mark.parametrize(
    ("observation", "kind"),
    [
        ({"end": "done", "state": "ok", "result": 1}, "done"),
        ({"end": "gone", "state": "404"}, "gone"),
        ({"state": "succeeded"}, "done"),
        ({"state": "failed"}, "failed"),
        ({"state": "half way"}, "running"),
        ("hello", "nonsense"),
    ],
)
def test_an_observation_is_an_end_of_ours_or_an_answer_of_the_services(observation, kind):
    found = meaning(job(), observation)

    assert found is not None
    assert found.kind == kind


def test_no_observation_says_to_look():
    assert meaning(job(), None) is None
