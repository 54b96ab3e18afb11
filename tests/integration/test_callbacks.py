"""Callbacks of a service, with a real gateway, worker and Redis: the first end counts, whenever it comes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from redis import Redis

from local.valkey import Valkey
from producers import (
    ExternalJobFailed,
    ExternalJobOverdue,
    ExternalJobSilent,
    Handle,
    JobOutcome,
    PollRequest,
)
from producers.client import RelayClient
from producers.errors import ServiceNotConfigured, SubmitUnknown
from producers.settings import ProducerSettings
from producers.stores.callbacks import PATH, Secrets, callback_key
from producers.stores.notices import replies_key, tell_field
from tests.fake_service import FakeService
from tests.integration.gateway import Answer, GatewayProcess
from tests.integration.test_trigger import until
from tests.worker import Worker

pytestmark = pytest.mark.integration

SECRET = "5" * 20 + "-the-secret-of-callbacks"
SUBMIT = {"path": "/jobs", "body": {"callback": "{callback_url}", "ref": "{reference}"}}


@dataclass(frozen=True)
class Scene:
    valkey: Valkey
    service: FakeService
    gateway: GatewayProcess
    worker: Worker

    def path(self, job: int = 1) -> str:
        """Where the service calls back, of the job that it was asked for as the n-th."""
        until(lambda: len(self.service.posts) >= job)
        url = str(self.service.posts[job - 1][1]["callback"])
        address = f"http://127.0.0.1:{self.gateway.port}"
        assert url.startswith(f"{address}{PATH}")
        return url.removeprefix(address)

    def call(self, body: Any = b"", job: int = 1) -> Answer:
        return self.gateway.ask("POST", self.path(job), body, token=None)


def environment(service: FakeService, port: int) -> dict[str, str]:
    return {
        "DAGRELAY_SERVICE_TRAIN": service.variable,
        "DAGRELAY_RETRY_CAP_S": "0.3",
        "DAGRELAY_CALLBACK_URL": f"http://127.0.0.1:{port}/",
        "DAGRELAY_CALLBACK_SECRET": SECRET,
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("callbacks")
    with (
        Valkey() as valkey,
        FakeService() as service,
        GatewayProcess(valkey.url, folder, DAGRELAY_CALLBACK_SECRET=SECRET) as gateway,
        Worker(valkey.url, folder, **environment(service, gateway.port)) as worker,
    ):
        yield Scene(valkey, service, gateway, worker)


@pytest.fixture
def scene(parts) -> Scene:
    parts.service.forget()
    return parts


@pytest.fixture
def redis(scene) -> Iterator[Redis]:
    with Redis.from_url(scene.valkey.url, decode_responses=True) as client:
        yield client


@pytest.fixture
def relay(scene) -> Iterator[RelayClient]:
    client = RelayClient(ProducerSettings(redis_url=scene.valkey.url, client_name="tests@here"))
    yield client
    client.redis.close()


Start = Callable[..., Handle[JobOutcome]]


@pytest.fixture
def start(relay) -> Start:
    """Enqueue a job whose service is told where to call back, and is not asked."""

    def enqueue(options: dict[str, Any] | None = None, **more: Any) -> Handle[JobOutcome]:
        fields = {"service": "train", "submit": SUBMIT, "result": "out", "timeout_s": 60, **more}
        return relay.enqueue(PollRequest(**fields), **(options or {}))

    return enqueue


def parked(handle: Handle[Any]) -> bool:
    found = handle.record()
    return found is not None and found.state == "waiting" and found.waits_for is not None


# What a service may say


def test_progress_is_noted_without_a_worker_and_the_end_ends_it(scene, start):
    handle = start(progress="percent")
    until(lambda: parked(handle))
    waits = handle.record().retried

    assert scene.call({"state": "running", "percent": 50}).body == {"taken": "progress"}
    assert (handle.record().seen, handle.record().progress) == ("running", "50")
    assert scene.call({"percent": 60}).body == {"taken": "progress"}  # as before
    assert (handle.record().seen, handle.record().progress) == ("running", "60")
    assert scene.call(b"").body == {"taken": "alive"}
    assert scene.call({}).body == {"taken": "alive"}
    assert handle.record().retried == waits  # nobody was woken
    answer = scene.call({"state": "succeeded", "out": {"rows": 3}})

    assert (answer.status, answer.body) == (202, {"taken": "end"})
    assert handle.get(timeout=60) == JobOutcome("train", "job-1", "succeeded", {"rows": 3})
    assert not scene.service.looks


def test_a_second_end_changes_nothing(scene, start):
    handle = start()
    until(lambda: parked(handle))
    assert scene.call({"state": "done", "out": 1}).status == 202

    second = scene.call({"state": "failed"})

    assert (second.status, second.body["title"]) == (409, "Conflict")
    assert second.headers["content-type"] == "application/problem+json"
    assert "ended already" in second.body["detail"]
    assert handle.get(timeout=60).result == 1
    assert scene.call({"state": "failed"}).status == 409
    assert scene.call({"state": "running"}).status == 409
    assert handle.get().result == 1


def test_of_many_ends_at_once_one_counts(scene, start, tmp_path):
    """Also where they come by two gateways."""
    handle = start()
    until(lambda: parked(handle))
    path = scene.path()
    with GatewayProcess(scene.valkey.url, tmp_path, DAGRELAY_CALLBACK_SECRET=SECRET) as other:

        def end(number: int) -> Answer:
            gateway = (scene.gateway, other)[number % 2]
            return gateway.ask("POST", path, {"state": "done", "out": number}, token=None)

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(end, range(24)))

    first = [number for number, answer in enumerate(answers) if answer.status == 202]
    assert sorted(answer.status for answer in answers) == [202] + [409] * 23
    assert handle.get(timeout=60).result == first[0]


def test_an_end_that_comes_before_the_task_waits_is_read(scene, start):
    scene.service.hang_s = 1.5
    scene.service.fault = lambda number, body: "hang"
    handle = start()
    assert scene.service.posted.wait(10)

    assert scene.call({"state": "done", "out": 7}).status == 202

    assert handle.get(timeout=60) == JobOutcome("train", "job-1", "done", 7)


def test_a_failure_is_told_in_the_services_words_and_no_secret(scene, start):
    handle = start(reason="why")
    until(lambda: parked(handle))
    told = f"no rails at http://127.0.0.1{scene.path()}, token={scene.service.token}"

    scene.call({"state": "failed", "why": told})

    with pytest.raises(ExternalJobFailed, match="no rails at") as failed:
        handle.get(timeout=60)
    assert scene.path().removeprefix(PATH) not in str(failed.value)
    assert scene.service.token not in str(failed.value)


def test_a_word_that_says_nothing_has_the_job_looked_at_where_it_can_be(scene, start):
    handle = start(path="/jobs/{job_id}", interval_s=60, max_interval_s=60)
    until(lambda: parked(handle))
    scene.service.end("job-1", out=5)

    assert scene.call({"event": "job.updated"}).body == {"taken": "look"}

    assert handle.get(timeout=60).result == 5
    assert scene.service.looks["job-1"] == 1


def test_and_where_it_cannot_the_answer_says_what_was_looked_for(scene, start):
    handle = start()
    until(lambda: parked(handle))

    for body in ({"event": "job.updated"}, [1, 2], b"{", b'{"a": NaN}', {"state": {"a": 1}}):
        answer = scene.call(body)
        assert (answer.status, answer.headers["content-type"]) == (422, "application/problem+json"), body

    assert "state is missing" in scene.call({"event": 1}).body["detail"]
    assert parked(handle)
    assert scene.call({"state": "done"}).status == 202
    handle.get(timeout=60)


def test_a_result_that_is_too_large_is_refused(scene, start):
    handle = start()
    until(lambda: parked(handle))

    assert scene.call({"state": "done", "out": "x" * 1_100_000}).status == 422

    assert scene.call({"state": "done", "out": "x"}).status == 202
    assert handle.get(timeout=60).result == "x"


def test_who_asked_hears_of_progress(scene, relay, redis):
    request = PollRequest(service="train", submit=SUBMIT, timeout_s=60)
    item = relay.item(request, more={"tell": tell_field("test", "replies", "c-1")})
    relay.records.accept(item)
    handle: Handle[Any] = relay.handle(item.task_id)
    until(lambda: parked(handle))
    before = redis.xlen(replies_key("test"))  # that it was submitted

    scene.call({"state": "running"})
    scene.call({"state": "running"})  # nothing new
    scene.call({"state": "done"})

    handle.get(timeout=60)
    told = [fields for _, fields in redis.xrange(replies_key("test"))][before:]
    assert [one["what"] for one in told] == ["progress", "ended"]
    assert {(one["id"], one["to"], one["correlation_id"]) for one in told} == {
        (item.task_id, "replies", "c-1")
    }


# Who may say it


def test_what_was_never_signed_what_is_over_and_what_nobody_waits_for_are_answered_alike(scene, start, redis):
    handle = start(timeout_s=30)
    until(lambda: parked(handle))
    right = scene.path()
    ours = Secrets((SECRET.encode(),))
    name, at, signature = right.removeprefix(PATH).split(".")
    wrong = {
        "its signature": f"{PATH}{name}.{at}.{signature[:-1]}{'A' if signature[-1] != 'A' else 'E'}",
        "a later deadline": f"{PATH}{name}.{int(at) + 1}.{signature}",
        "another's secret": PATH + Secrets((b"x" * 40,)).token(handle.id, time.time() + 60),
        "no task of ours": PATH + ours.token("nobody", time.time() + 60),
        "another deadline": PATH + ours.token(handle.id, time.time() + 600),
        "over": PATH + ours.token(handle.id, time.time() - 3600),
        "no token": f"{PATH}x",
        "too long": PATH + "x" * 5000,
    }

    answers = {
        what: scene.gateway.ask("POST", path, {"state": "done"}, token=None) for what, path in wrong.items()
    }

    assert {(answer.status, answer.raw) for answer in answers.values()} == {(404, answers["over"].raw)}, (
        answers
    )
    assert handle.id.encode() not in answers["over"].raw
    assert parked(handle)
    redis.hset(callback_key(right.removeprefix(PATH)), "until", time.time() - 1)
    over = scene.call({"state": "done"})
    assert (over.status, over.raw) == (404, answers["over"].raw)


def test_no_token_lies_in_redis_or_in_a_log(scene, start, redis):
    handle = start(path="/jobs/{job_id}", interval_s=0.2, max_interval_s=0.2)
    until(lambda: scene.service.looks["job-1"])
    signature = scene.path().rpartition(".")[2]
    scene.call({"state": "running"})

    kept = []
    for key in redis.scan_iter("*"):
        dump = getattr(redis, {"hash": "hgetall", "string": "get"}.get(redis.type(key), "type"))(key)
        kept.append(f"{key} {dump}")
    scene.call({"state": "done"})
    handle.get(timeout=60)

    assert any(handle.id in one for one in kept)
    assert not [one for one in kept if signature in one]
    assert signature not in scene.worker.text()
    until(lambda: "/v1/callbacks/{token}" in scene.gateway.text())
    assert signature not in scene.gateway.text()


def test_what_an_outsider_says_is_never_taken_for_what_a_look_saw(scene, start, relay):
    """Workers leave ends in a form of their own; nobody else can."""
    forged = {"end": "done", "state": "forged", "result": "forged"}
    handle = start(wake_keys=["train/x"], state="status")
    until(lambda: parked(handle))

    assert scene.call(forged).status == 422
    assert relay.wake("train/x", forged) == 1
    assert relay.wake("train/x", {"said": forged}) == 1
    until(lambda: handle.record().reason is not None and parked(handle))

    assert relay.wake("train/x", {"status": "done", "out": 3}) == 1
    assert handle.get(timeout=60) == JobOutcome("train", "job-1", "done", 3)


def test_a_worker_without_an_address_of_its_own_says_so(scene, tmp_path):
    with Valkey() as valkey, Worker(valkey.url, tmp_path, DAGRELAY_SERVICE_TRAIN=scene.service.variable):
        relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here"))
        handle = relay.enqueue(PollRequest(service="train", submit=SUBMIT))

        with pytest.raises(ServiceNotConfigured, match="DAGRELAY_CALLBACK_URL and DAGRELAY_CALLBACK_SECRET"):
            handle.get(timeout=60)
        relay.redis.close()
    assert not scene.service.posts


# Silence


def test_a_job_that_is_silent_ends_where_nobody_can_be_asked(scene, start):
    handle = start(heartbeat_s=1.2, on_cancel={"method": "DELETE", "path": "/jobs/{job_id}"})
    until(lambda: parked(handle))
    for _ in range(8):
        time.sleep(0.25)
        assert scene.call(b"").status == 202
    assert parked(handle)  # twice as long as it may be silent

    with pytest.raises(ExternalJobSilent, match="nothing was heard of job 'job-1'") as silent:
        handle.get(timeout=60)
    assert isinstance(silent.value, ExternalJobOverdue)
    until(lambda: scene.service.cancels == ["job-1"])
    assert scene.call({"state": "done"}).status == 409


def test_a_job_that_is_silent_is_looked_at_where_it_can_be(scene, start):
    handle = start(path="/jobs/{job_id}", interval_s=30, max_interval_s=30, heartbeat_s=1.5)
    until(lambda: parked(handle))
    for _ in range(8):
        time.sleep(0.25)
        assert scene.call({"state": "running"}).status == 202
    assert not scene.service.looks  # it was heard of

    # A look that found it counts: the next comes when it has been silent for as long again.
    until(lambda: scene.service.looks["job-1"] >= 2, timeout_s=60)
    scene.service.end("job-1", out=4)
    assert handle.get(timeout=60).result == 4


# What goes wrong on the way


def test_a_submission_whose_answer_is_lost_is_not_repeated_once_the_end_was_told(scene, start):
    """Nor is it an unknown one where the service honours no keys: the callback tells."""
    scene.service.honours_keys = False
    scene.service.fault = lambda number, body: "drop"
    handle = start(submit_once=True)
    until(lambda: parked(handle))

    assert handle.record().unsure
    assert scene.call({"state": "done", "out": 2}).status == 202

    assert handle.get(timeout=60) == JobOutcome("train", None, "done", 2)
    assert len(scene.service.posts) == 1


def test_and_where_nobody_calls_it_is_an_unknown_one(scene, start):
    scene.service.fault = lambda number, body: "drop"
    handle = start(submit_once=True, heartbeat_s=1)

    with pytest.raises(SubmitUnknown, match="it was not heard of since"):
        handle.get(timeout=60)
    assert len(scene.service.posts) == 1


def test_an_answer_without_an_id_is_enough_where_none_is_needed(scene, start):
    scene.service.fault = lambda number, body: "nonsense"
    handle = start()
    until(lambda: parked(handle))

    scene.call({"state": "done", "out": 1})

    assert handle.get(timeout=60) == JobOutcome("train", None, "done", 1)
    assert len(scene.service.posts) == 1


def test_a_worker_that_is_killed_between_the_submission_and_the_wait_leaves_one_job(scene, tmp_path):
    with Valkey() as valkey:
        env = environment(scene.service, scene.gateway.port)
        scene.service.hang_s = 30.0
        scene.service.fault = lambda number, body: "hang"
        relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here"))
        with GatewayProcess(valkey.url, tmp_path, DAGRELAY_CALLBACK_SECRET=SECRET) as gateway:
            with Worker(valkey.url, tmp_path, name="killed", **env) as worker:
                handle = relay.enqueue(
                    PollRequest(service="train", submit=SUBMIT, submit_once=True, result="out", timeout_s=60)
                )
                assert scene.service.posted.wait(10)
                worker.kill()
            path = scene.path()
            assert gateway.ask("POST", path, {"state": "done", "out": 9}, token=None).status == 202
            gateway.kill()
            gateway.start()
            assert gateway.ask("POST", path, {"state": "done", "out": 8}, token=None).status == 409
            with Worker(valkey.url, tmp_path, name="next", **env):
                assert handle.get(timeout=60) == JobOutcome("train", None, "done", 9)
        relay.redis.close()
    assert len(scene.service.posts) == 1


def test_a_callback_that_redis_did_not_take_may_come_again(scene, tmp_path):
    with Valkey(tmp_path / "valkey") as valkey:
        env = environment(scene.service, scene.gateway.port)
        relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here"))
        with (
            GatewayProcess(valkey.url, tmp_path, DAGRELAY_CALLBACK_SECRET=SECRET) as gateway,
            Worker(valkey.url, tmp_path, **env),
        ):
            handle = relay.enqueue(PollRequest(service="train", submit=SUBMIT, result="out", timeout_s=90))
            until(lambda: parked(handle), timeout_s=60)
            path = scene.path()
            valkey.stop()

            away = gateway.ask("POST", path, {"state": "done", "out": 6}, token=None)

            assert (away.status, away.headers["retry-after"]) == (503, "1")
            assert away.headers["content-type"] == "application/problem+json"
            valkey.start()

            def taken() -> bool:
                return gateway.ask("POST", path, {"state": "done", "out": 6}, token=None).status == 202

            until(taken, timeout_s=60)
            until(handle.ready, timeout_s=60)
            assert handle.get(timeout=60).result == 6
        relay.redis.close()


def test_many_jobs_call_back_while_they_are_still_being_started(scene, start):
    """Each is ended by a thread as soon as it was submitted: before, while and after its task parks."""
    handles = [start(heartbeat_s=20) for _ in range(40)]
    ended: list[int] = []

    def serve() -> None:
        for job in range(1, 41):
            path = scene.path(job)
            assert scene.gateway.ask("POST", path, {"state": "running"}, token=None).status in (202, 409)
            if scene.gateway.ask("POST", path, {"state": "done", "out": path}, token=None).status == 202:
                ended.append(job)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(60)

    assert len(ended) == 40
    told = {json.dumps(handle.get(timeout=60).result) for handle in handles}
    assert len(told) == 40
