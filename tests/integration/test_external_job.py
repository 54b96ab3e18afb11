"""poll_external_job with a real worker and Redis: one job per request, whatever is lost, and its end told."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord, group
from redis import Redis

from local.valkey import Valkey
from producers import (
    ExternalJobFailed,
    ExternalJobGone,
    ExternalJobOverdue,
    ExternalJobUnreadable,
    Handle,
    InvalidRequest,
    JobOutcome,
    PollRequest,
    RequestCancelled,
    SubmitRejected,
    SubmitUnknown,
)
from producers.client import RelayClient
from producers.contract import MAX_RESULT_BYTES, reference_for
from producers.errors import ServiceNotConfigured
from producers.settings import ProducerSettings
from producers.stores.waits import Waits
from tests.fake_airflow import FakeAirflow
from tests.fake_service import FakeService, Fault
from tests.integration.test_trigger import until
from tests.worker import Worker

SUBMIT = {"path": "/jobs", "body": {"ref": "{reference}"}}
FIND = {"path": "/jobs?ref={reference}", "job_id": "jobs[0].id"}
SUBMITTED: dict[str, Any] = {
    "path": "/jobs/{job_id}",
    "submit": SUBMIT,
    "interval_s": 0.2,
    "max_interval_s": 1,
}


@pytest.fixture(scope="module")
def parts(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Valkey, FakeService, FakeAirflow, Worker]]:
    folder = tmp_path_factory.mktemp("jobs")
    with Valkey() as valkey, FakeService() as service, FakeAirflow() as airflow:
        env = {
            "DAGRELAY_SERVICE_TRAIN": service.variable,
            "DAGRELAY_SERVICE_SLOW": json.dumps({"url": f"{service.url}/api", "token": service.token}),
            "DAGRELAY_RETRY_CAP_S": "0.3",
            "DAGRELAY_FIND_FOR_S": "1.5",
        }
        with Worker(valkey.url, folder, connections={"default": airflow.conn_uri}, **env) as worker:
            yield valkey, service, airflow, worker


@pytest.fixture
def service(parts) -> FakeService:
    """The job service, as good as new."""
    parts[1].forget()
    parts[2].forget()
    return parts[1]


@pytest.fixture
def airflow(parts, service) -> FakeAirflow:
    return parts[2]


@pytest.fixture
def waits(parts) -> Iterator[Waits]:
    with Redis.from_url(parts[0].url) as client:
        yield Waits(client)


@pytest.fixture
def relay(parts, service) -> Iterator[RelayClient]:
    client = RelayClient(ProducerSettings(redis_url=parts[0].url, client_name="tests@here"))
    yield client
    client.redis.close()


Start = Callable[..., Handle[JobOutcome]]


@pytest.fixture
def start(relay) -> Start:
    """Enqueue a poll of the service `train`, by default of a job that is to be submitted."""

    def enqueue(options: dict[str, Any] | None = None, **more: Any) -> Handle[JobOutcome]:
        return relay.enqueue(PollRequest(**{"service": "train", **SUBMITTED, **more}), **(options or {}))

    return enqueue


def parked(handle: Handle[Any]) -> bool:
    found = handle.record()
    return found is not None and found.state == "waiting" and found.waits_for is not None


def faults(*found: Fault) -> Callable[[int, Any], Fault]:
    """The first POSTs meet these, all others are answered."""
    return lambda number, body: found[number - 1] if number <= len(found) else "answer"


# From the submission to the result


def test_a_job_is_submitted_once_followed_and_its_result_comes_back(start, service):
    handle = start(result="out", progress="percent")
    until(lambda: service.looks["job-1"] >= 2)
    service.jobs["job-1"]["percent"] = 50
    until(lambda: handle.record().progress == "50")
    service.end("job-1", "Succeeded", out={"rows": 3})

    assert handle.get(timeout=60) == JobOutcome("train", "job-1", "Succeeded", {"rows": 3})
    assert [key for key, _ in service.posts] == [reference_for(handle.id)]
    record = handle.record()
    assert (record.state, record.seen, record.job_id) == ("done", "Succeeded", "job-1")
    assert record.service == "train"
    assert record.submitting_at <= record.submitted_at <= record.ended_at
    assert JobOutcome.from_message(record.outcome) == handle.get()  # and is kept for longer


def test_a_long_result_is_not_on_record(start, service):
    handle = start(result="out")
    until(lambda: service.looks["job-1"])
    service.end("job-1", out="x" * 5000)

    assert handle.get(timeout=60).result == "x" * 5000
    assert handle.record().outcome is None


def test_a_job_that_runs_already_is_followed_by_its_id(start, service):
    service.jobs["a/b"] = {"state": "running"}
    handle = start(submit=None, job_id="a/b")
    until(lambda: service.looks["a/b"])
    service.end("a/b")

    assert handle.get(timeout=60) == JobOutcome("train", "a/b", "succeeded")
    assert not service.posts


def test_a_wake_that_comes_before_the_task_waits_is_read(start, service, waits):
    service.hang_s = 1.0
    service.fault = faults("hang")
    handle = start(wake_keys=["train/1"], interval_s=60.0, max_interval_s=60, result="out")
    assert service.posted.wait(5)

    waits.wake_by_key("train/1", {"state": "done", "out": 7}, by="a webhook")

    assert handle.get(timeout=60) == JobOutcome("train", "job-1", "done", 7)
    assert not service.looks


def test_a_wake_without_words_looks_at_once_and_one_that_is_no_end_waits_on(start, service, waits):
    handle = start(wake_keys=["train/2"], interval_s=60.0, max_interval_s=60)
    until(lambda: parked(handle))

    waits.wake_by_key("train/2", {"state": "half way"})
    until(lambda: handle.record().seen == "half way" and parked(handle))
    assert not service.looks
    waits.wake_by_key("train/2", {"something": "else"})
    until(lambda: service.looks["job-1"] == 1)
    until(lambda: handle.record().seen == "running" and waits.get(handle.id) is not None)
    service.end("job-1")
    waits.wake([handle.id])

    assert handle.get(timeout=60).state == "succeeded"
    assert service.looks["job-1"] == 2


def test_the_body_of_the_submission_may_be_the_result_of_the_task_before(parts, service, relay):
    """As a chain's worker sends it: by position."""
    stock = Celery("else", broker=parts[0].url, set_as_current=False)

    sent = stock.send_task(
        "tasks.poll_external_job",
        ({"n": 5},),
        {"service": "train", "path": "/jobs/{job_id}", "submit": {"path": "/jobs"}, "interval_s": 0.2},
        queue="jobs",
    )
    until(lambda: service.jobs)
    service.end("job-1")

    assert relay.handle(sent.id).get(timeout=60).job_id == "job-1"
    assert service.posts[0] == (reference_for(sent.id), {"n": 5})


# Answers that are lost


@pytest.mark.parametrize("fault", ["drop", "lose", "500", "nonsense"])
def test_a_lost_answer_is_asked_for_again_with_the_same_key_and_there_is_one_job(start, service, fault):
    service.fault = faults(fault, fault)
    handle = start()
    until(lambda: parked(handle))
    service.end("job-1")

    assert handle.get(timeout=60).job_id == "job-1"
    assert len(service.posts) == 3
    assert {key for key, _ in service.posts} == {reference_for(handle.id)}
    assert len(service.jobs) == 1


@pytest.mark.parametrize("fault", ["drop", "500", "nonsense"])
def test_where_no_key_is_honoured_the_job_is_found_by_our_reference(start, service, fault):
    service.honours_keys, service.found_after = False, 1
    service.fault = faults(fault)
    handle = start(submit_once=True, find=FIND)
    until(lambda: parked(handle))
    service.end("job-1")

    assert handle.get(timeout=60).job_id == "job-1"
    assert len(service.posts) == len(service.jobs) == 1
    assert service.finds == 2


def test_where_it_cannot_be_found_nothing_is_sent_again(start, service):
    service.honours_keys = False
    service.fault = faults("drop")
    handle = start(submit_once=True)

    with pytest.raises(SubmitUnknown, match=reference_for(handle.id)):
        handle.get(timeout=60)
    assert len(service.posts) == 1


def test_what_certainly_did_not_arrive_is_sent_again_also_where_no_key_is_honoured(start, service):
    service.honours_keys = False
    service.fault = faults("429")
    service.stop()
    handle = start(submit_once=True)
    until(lambda: handle.record().attempts >= 2)
    service.start()
    until(lambda: parked(handle), timeout_s=60)
    service.end("job-1")

    assert handle.get(timeout=60).job_id == "job-1"
    assert len(service.posts) == 2  # the 429, and the one that made it
    assert len(service.jobs) == 1


def test_a_refusal_is_the_end_with_the_services_words_and_no_secret(start, service):
    service.fault = faults("422")
    handle = start()

    with pytest.raises(SubmitRejected, match="no such train") as caught:
        handle.get(timeout=60)
    assert caught.value.status == 422
    assert service.token not in str(caught.value)


def test_a_refusal_after_a_lost_answer_is_no_proof_that_there_is_no_job(start, service):
    service.fault = faults("drop", "422")
    handle = start()

    with pytest.raises(SubmitUnknown, match="422"):
        handle.get(timeout=60)


def test_an_answer_without_an_id_ends_after_as_many_errors_as_are_allowed(start, service):
    handle = start(submit={**SUBMIT, "job_id": "job.number"}, max_errors=1)

    with pytest.raises(ExternalJobUnreadable, match="job_id: is missing, in an answer of 201") as caught:
        handle.get(timeout=60)
    assert caught.value.field == "job_id"
    assert len(service.posts) == 2
    assert len(service.jobs) == 1


# Ends


def test_a_job_that_fails_fails_the_request_in_the_services_words(start, service):
    service.first_state = "FAILED"
    handle = start(reason="error.text")
    until(lambda: service.jobs)
    service.jobs["job-1"]["error"] = {"text": "no track left"}

    with pytest.raises(ExternalJobFailed, match="no track left") as caught:
        handle.get(timeout=60)
    assert (caught.value.job_id, caught.value.state) == ("job-1", "FAILED")


def test_a_job_that_is_gone_is_an_end_of_its_own(start, service):
    handle = start()
    until(lambda: handle.record().seen == "running")
    del service.jobs["job-1"]

    with pytest.raises(ExternalJobGone):
        handle.get(timeout=60)


def test_errors_in_a_row_are_borne_up_to_a_number_and_429_does_not_count(start, service):
    service.answer = lambda job_id: (
        (429, {}, b"") if service.looks[job_id] < 6 else (200, {}, f"what? {service.token}".encode())
    )
    handle = start(max_errors=2, interval_s=0.05, max_interval_s=0.1)

    with pytest.raises(ExternalJobUnreadable, match="3 looks in a row failed: is not JSON: what") as caught:
        handle.get(timeout=60)
    assert service.token not in str(caught.value)
    assert service.looks["job-1"] == 8


def test_a_result_that_is_too_large_is_told_as_such(start, service):
    handle = start(result="out")
    until(lambda: service.jobs)
    service.end("job-1", out="x" * MAX_RESULT_BYTES)

    with pytest.raises(ExternalJobUnreadable, match="over the limit") as caught:
        handle.get(timeout=60)
    assert caught.value.field == "result"


def test_the_deadline_looks_once_more_and_then_tells_the_service(start, service):
    handle = start(
        interval_s=60.0,
        max_interval_s=60,
        timeout_s=1.0,
        on_cancel={"method": "DELETE", "path": "/jobs/{job_id}"},
    )

    with pytest.raises(ExternalJobOverdue, match="last state: 'running'"):
        handle.get(timeout=60)
    assert service.looks["job-1"] == 1
    until(lambda: service.cancels == ["job-1"])


def test_a_job_that_ended_just_before_the_deadline_is_done(start, service):
    handle = start(interval_s=60.0, max_interval_s=60, timeout_s=1.0)
    until(lambda: parked(handle))
    service.end("job-1")

    assert handle.get(timeout=60).state == "succeeded"


def test_a_cancel_ends_the_request_and_tells_the_service_until_it_listens(start, service, waits):
    service.cancel_status = 503
    handle = start(on_cancel={"method": "DELETE", "path": "/jobs/{job_id}"})
    until(lambda: parked(handle))

    waits.cancel(handle.id, by="a test")

    with pytest.raises(RequestCancelled):
        handle.get(timeout=60)
    until(lambda: len(service.cancels) >= 2)
    service.cancel_status = 200
    until(lambda: service.jobs["job-1"]["state"] == "cancelled")


# What follows


def test_a_success_triggers_one_dag_run_with_the_outcome_in_its_conf(start, relay, service, airflow):
    handle = start(result="out", then={"dag_id": "report", "conf": {"day": "x"}})
    until(lambda: service.jobs)
    service.end("job-1", out=[1, 2])
    outcome = handle.get(timeout=60)

    run = relay.handle(outcome.then).get(timeout=60)

    about = {"service": "train", "job_id": "job-1", "state": "succeeded", "result": [1, 2]}
    assert airflow.runs["report", run.dag_run_id]["conf"] == {"day": "x", "job": about}
    assert len(airflow.runs) == 1
    assert relay.record(outcome.then).by == "tests@here"


def test_a_conf_that_the_outcome_makes_too_large_goes_by_reference(start, relay, service, airflow):
    handle = start(result="out", then={"dag_id": "report", "conf": {"more": "y" * 1000}})
    until(lambda: service.jobs)
    service.end("job-1", out="x" * (MAX_RESULT_BYTES - 500))

    run = relay.handle(handle.get(timeout=60).then).get(timeout=60)

    reference = airflow.runs["report", run.dag_run_id]["conf"]
    assert len(json.dumps(reference)) < 200
    found = relay.resolve_conf(reference)
    assert (found["more"], len(found["job"]["result"])) == ("y" * 1000, MAX_RESULT_BYTES - 500)


def test_a_conf_that_the_outcome_makes_too_large_by_value_is_told_as_such(start, service, airflow):
    then = {"dag_id": "report", "conf": {"more": "y" * 1000}, "conf_by": "value"}
    handle = start(result="out", then=then)
    until(lambda: service.jobs)
    service.end("job-1", out="x" * (MAX_RESULT_BYTES - 500))

    with pytest.raises(ExternalJobUnreadable, match="over the limit") as caught:
        handle.get(timeout=60)
    assert caught.value.field == "then"
    assert not airflow.runs


def test_links_and_chords_go_on_when_the_jobs_have_ended(parts, service, relay):
    """The host's canvas, sent to our queues: what follows is Celery's own."""
    stock = Celery("else", broker=parts[0].url, backend=parts[0].url, set_as_current=False)
    poll = stock.signature(
        "tasks.poll_external_job",
        kwargs={"service": "train", **SUBMITTED},
        queue="jobs",
        immutable=True,
    )
    callback = stock.signature("else.collect", queue="else")
    chord(group(poll.clone(), poll.clone()), callback, app=stock).apply_async()
    stock.backend.result_consumer.subscribed_to.clear()  # nobody waits here, and it would outlive Redis
    until(lambda: len(service.jobs) == 2)
    service.end("job-1")
    service.end("job-2")

    with Redis.from_url(parts[0].url) as client:
        until(lambda: client.llen("else") == 1)
        (raw,) = client.lrange("else", 0, -1)
    [outcomes], _, _ = json.loads(base64.b64decode(json.loads(raw)["body"]))
    assert sorted(one["job_id"] for one in outcomes) == ["job-1", "job-2"]


# Bad input that only a worker can know


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"service": "other"}, ServiceNotConfigured, "set DAGRELAY_SERVICE_OTHER there"),
        ({"service": "slow"}, InvalidRequest, "interval_s: is 0.2, below the 1 s"),
        ({"path": None, "url": "http://evil/jobs/1"}, ServiceNotConfigured, "not within it"),
        ({"path": "/../admin/{job_id}"}, ServiceNotConfigured, "may lead out of it"),
        ({"submit": {"path": "/../jobs"}}, ServiceNotConfigured, "may lead out of it"),
    ],
)
def test_what_a_service_does_not_allow_ends_the_request_before_anything_is_asked(
    start, service, more, error, words
):
    handle = start(**more)

    with pytest.raises(error, match=words):
        handle.get(timeout=60)
    assert not service.requests


def test_nothing_of_a_job_is_shown_but_its_name(start, parts, service):
    handle = start(submit={"path": "/jobs", "body": {"ref": "c4n4ry-s3cret"}})
    until(lambda: service.jobs)
    service.end("job-1")
    handle.get(timeout=60)

    log = parts[3].text()
    assert "job_id=job-1" in log
    assert "c4n4ry-s3cret" not in log
    assert service.token not in log


# Workers that die


def test_a_worker_killed_while_it_submits_leaves_one_job_for_each_request(tmp_path: Path):
    """Killed after the service has made the job and before its id is known, with keys honoured and not."""
    with Valkey() as valkey, FakeService() as honouring, FakeService() as plain:
        plain.honours_keys = False
        honouring.fault = plain.fault = faults("hang")
        relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here"))
        env = {"DAGRELAY_VISIBILITY_TIMEOUT_S": "3", "DAGRELAY_RETRY_CAP_S": "0.3"}
        env |= {"DAGRELAY_SERVICE_TRAIN": honouring.variable, "DAGRELAY_SERVICE_PLAIN": plain.variable}
        with Worker(valkey.url, tmp_path, name="killed", **env) as killed:
            once = {"submit_once": True, "find": FIND}
            handles = [
                relay.enqueue(PollRequest(service="train", **SUBMITTED)),
                relay.enqueue(PollRequest(service="plain", **SUBMITTED, **once)),
            ]
            assert honouring.posted.wait(10)
            assert plain.posted.wait(10)
            killed.kill()
        with Worker(valkey.url, tmp_path, name="next", **env):
            until(lambda: all(parked(handle) for handle in handles))
            for server in (honouring, plain):
                server.end("job-1")

            assert [handle.get(timeout=60).job_id for handle in handles] == ["job-1", "job-1"]
        assert (len(honouring.jobs), len(plain.jobs)) == (1, 1)
        assert (len(honouring.posts), len(plain.posts)) == (2, 1)
        relay.redis.close()


# Ends that nobody can be sure of


def test_a_job_that_does_not_appear_in_time_is_unknown_and_never_submitted_again(start, service):
    service.honours_keys = False
    service.fault = faults("lose")
    handle = start(submit_once=True, find=FIND)

    with pytest.raises(SubmitUnknown, match="no such job was found"):
        handle.get(timeout=60)
    assert len(service.posts) == 1
    assert service.finds >= 2


def test_a_cancel_after_a_lost_answer_finds_the_job_and_says_that_it_may_exist(start, service, waits):
    service.fault = lambda number, body: "drop"
    handle = start(find=FIND, on_cancel={"method": "DELETE", "path": "/jobs/{job_id}"})
    until(lambda: handle.record().attempts)

    waits.cancel(handle.id, by="a test")

    with pytest.raises(SubmitUnknown, match="after an answer was lost"):
        handle.get(timeout=60)
    assert handle.state == "cancelled"
    until(lambda: service.cancels == ["job-1"])


def test_a_message_that_comes_again_after_the_end_tells_the_same_end(parts, start, service):
    handle = start(result="out")
    until(lambda: service.jobs)
    service.end("job-1", out=7)
    outcome = handle.get(timeout=60)
    stock = Celery("else", broker=parts[0].url, set_as_current=False)

    again = stock.signature(
        "tasks.poll_external_job",
        kwargs={"service": "train", **SUBMITTED, "result": "out"},
        queue="jobs",
        task_id=handle.id,
        link=stock.signature("else.told", queue="told"),
    )
    again.apply_async(retries=1)

    with Redis.from_url(parts[0].url) as client:
        until(lambda: client.llen("told") == 1)
        (raw,) = client.lrange("told", 0, -1)
    [told], _, _ = json.loads(base64.b64decode(json.loads(raw)["body"]))
    assert JobOutcome.from_message(told) == outcome
    assert len(service.posts) == 1


def test_a_frozen_service_takes_a_quarter_of_the_threads_and_no_more(valkey, tmp_path):
    """Its submissions wait in Redis; those to others, and looks, have threads."""
    with FakeService() as frozen, FakeService() as well:
        frozen.fault = lambda number, body: "hang"
        frozen.hang_s = 1.9
        env = {"DAGRELAY_SERVICE_FROZEN": frozen.variable, "DAGRELAY_SERVICE_WELL": well.variable}
        relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here"))

        def job(service: str) -> PollRequest:
            return PollRequest(
                service=service, path="/jobs/{job_id}", submit={"path": "/jobs", "body": {}}, interval_s=0.1
            )

        with Worker(valkey.url, tmp_path, options=("-c", "8"), **env):
            stuck = relay.enqueue_many([job("frozen")] * 8)
            until(lambda: len(frozen.posts) >= 2)
            handle = relay.enqueue(job("well"))
            until(lambda: well.jobs)
            well.end("job-1")
            assert handle.get(timeout=60).state == "succeeded"
            assert len(frozen.posts) <= 6  # two at a time
            until(lambda: all(each.record().job_id for each in stuck), timeout_s=60)
        assert len(frozen.jobs) == 8
