"""Looks: batches of them, in real workers that serve the queue `looks` alone: what they wake can be seen.

Jobs are parked here as the worker parks them, by the same script; `test_external_job` has the whole way.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError

from local.valkey import Valkey
from producers.contract import POLL_EXTERNAL_JOB, PollRequest
from producers.stores.records import record_key
from producers.stores.waits import CANCELLED, DUE, PARKED, WAIT, Waits, looks_key, seen_key
from tests.fake_service import FakeService
from tests.worker import Worker

LOOKS_ONLY = ("-Q", "looks")
RHYTHM = {"interval_s": 0.3, "growth": 1.0, "max_interval_s": 0.3, "jitter": 0.0}


class Scene:
    """A Valkey with parked jobs."""

    def __init__(self, valkey: Valkey) -> None:
        self.redis: Any = Redis.from_url(valkey.url)
        self.redis.flushdb()
        self.waits = Waits(self.redis)

    def park(self, service: FakeService | None, name: str = "one", in_s: float = 0.0, **more: Any) -> str:
        """Park a task that follows a job of the service; return its id."""
        task_id, job_id = str(uuid.uuid4()), f"job-{uuid.uuid4().hex[:8]}"
        if service is not None:
            service.jobs[job_id] = {"id": job_id, "state": "running"}
        request = PollRequest(service=name, path="/jobs/{job_id}", job_id=job_id, **{**RHYTHM, **more})
        message = json.dumps(
            {
                "headers": {"task": POLL_EXTERNAL_JOB, "id": task_id, "retries": 1, "waiting": True},
                "body": json.dumps([[], request.to_message(), {}]),
            }
        )
        group = f"service:{name}"
        WAIT.run(
            self.redis,
            (PARKED, DUE, record_key(task_id), seen_key(task_id), CANCELLED, looks_key(group)),
            (
                task_id,
                time.time() + 600,
                1,
                "jobs",
                message,
                0,
                in_s,
                "a job",
                group,
                "",
                0,
                "job_id",
                job_id,
            ),
        )
        return task_id

    def job(self, task_id: str) -> str:
        return str(self.redis.hget(record_key(task_id), "job_id").decode())

    def record(self, task_id: str) -> dict[str, str]:
        found = self.redis.hgetall(record_key(task_id))
        return {name.decode(): text.decode() for name, text in found.items()}

    def woken(self) -> list[str]:
        """The ids of the messages that lie on the queue of jobs."""
        return [json.loads(raw)["headers"]["id"] for raw in self.redis.lrange("jobs", 0, -1)]


def until(ask: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := ask()):
        assert time.monotonic() < deadline, f"not {what} after {timeout_s:g} s: {found!r}"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Valkey, FakeService, FakeService]]:
    folder = tmp_path_factory.mktemp("looks")
    with Valkey() as valkey, FakeService() as one, FakeService() as other:
        env = {"DAGRELAY_SERVICE_ONE": one.variable, "DAGRELAY_SERVICE_OTHER": other.variable}
        with Worker(valkey.url, folder, options=LOOKS_ONLY, **env):
            yield valkey, one, other


@pytest.fixture
def one(stack: tuple[Valkey, FakeService, FakeService]) -> FakeService:
    stack[1].forget()
    return stack[1]


@pytest.fixture
def other(stack: tuple[Valkey, FakeService, FakeService]) -> FakeService:
    stack[2].forget()
    return stack[2]


@pytest.fixture
def scene(stack: tuple[Valkey, FakeService, FakeService]) -> Scene:
    return Scene(stack[0])


def test_every_job_is_looked_at_in_its_rhythm_and_nothing_is_written_while_nothing_changes(scene, one):
    ids = [scene.park(one) for _ in range(100)]
    until(lambda: all("seen" in scene.record(each) for each in ids), "each looked at, and that written")
    before = {each: scene.record(each) for each in ids}
    began, counted = time.monotonic(), sum(one.looks.values())
    until(lambda: min(one.looks[scene.job(each)] for each in ids) >= 6, "each looked at six times")
    took_s = time.monotonic() - began

    looks = sum(one.looks.values()) - counted
    assert looks <= 100 * (took_s / 0.3 + 1)  # never more often than it was told
    assert {each: scene.record(each) for each in ids} == before
    assert all(record["seen"] == "running" for record in before.values())
    assert not any(scene.redis.exists(f"dagrelay:history:{each}") for each in ids)
    assert scene.woken() == []


def test_the_end_is_seen_once_and_handed_to_the_task(scene, one):
    task_id, still = scene.park(one, result="answer"), scene.park(one)
    until(lambda: one.looks[scene.job(task_id)], "looked at")
    one.end(scene.job(task_id), "succeeded", answer=[1, 2])

    until(lambda: scene.woken() == [task_id], "woken")
    assert scene.waits.observations(task_id) == [{"end": "done", "state": "succeeded", "result": [1, 2]}]
    looks = one.looks[scene.job(task_id)]
    until(lambda: one.looks[scene.job(still)] >= looks + 3, "the other looked at on and on")
    assert one.looks[scene.job(task_id)] == looks
    assert scene.woken() == [task_id]


def test_a_change_is_in_the_record_and_in_the_history(scene, one):
    task_id = scene.park(one, progress="done_percent")
    until(lambda: scene.record(task_id).get("seen") == "running", "seen running")
    one.jobs[scene.job(task_id)] |= {"state": "saving", "done_percent": 80}

    until(lambda: scene.record(task_id)["seen"] == "saving", "seen saving")
    assert scene.record(task_id)["progress"] == "80"
    assert [words for _, words in scene.waits.history(task_id)] == ["is saving"]


def test_errors_are_counted_in_a_row_and_end_it_when_they_are_too_many(scene, one):
    once, always = scene.park(one, max_errors=2), scene.park(one, max_errors=2)
    healthy = threading.Event()

    def answer(job_id: str) -> Any:
        if job_id == scene.job(always) or not healthy.is_set():
            return 500, {}, b"out of order, token=abcdefgh"
        return None

    one.answer = answer
    until(lambda: scene.record(once).get("errors") == "1", "an error counted")
    assert "500" in scene.record(once)["reason"]
    assert "abcdefgh" not in scene.record(once)["reason"]
    healthy.set()

    until(lambda: scene.woken() == [always], "given up")
    (end,) = scene.waits.observations(always)
    assert end["end"] == "unreadable"
    assert "3 looks in a row" in end["words"]
    until(lambda: scene.record(once).get("seen") == "running", "well again")
    assert "errors" not in scene.record(once)


def test_retry_after_is_honoured_and_429_is_no_error(scene, one):
    task_id = scene.park(one, max_errors=0)
    one.answer = lambda job_id: (429, {"Retry-After": "2"}, b"{}")
    until(lambda: one.looks[scene.job(task_id)] == 1, "looked at")
    began = time.monotonic()
    until(lambda: one.looks[scene.job(task_id)] == 2, "looked at again")
    assert time.monotonic() - began > 1.8
    assert scene.woken() == []


def test_a_frozen_service_holds_up_no_other(scene, one, other):
    frozen = threading.Event()
    other.answer = lambda job_id: frozen.wait(20) and None
    stuck = [scene.park(other, "other") for _ in range(200)]
    ids = [scene.park(one) for _ in range(20)]
    try:
        until(lambda: sum(other.looks.values()) >= 64, "as many in flight as its limit says")
        began = time.monotonic()
        before = {each: one.looks[scene.job(each)] for each in ids}
        until(lambda: all(one.looks[scene.job(each)] >= before[each] + 4 for each in ids), "looked at")
        assert time.monotonic() - began < 15  # and not the 20 s for which the other is frozen
    finally:
        frozen.set()
    until(lambda: all(other.looks[scene.job(each)] for each in stuck), "looked at when it thaws")


def test_what_no_look_can_be_made_of_ends_the_waiting(scene, one):
    task_id = scene.park(one)
    scene.redis.hset(record_key(task_id), "job_id", "..")
    until(lambda: scene.woken() == [task_id], "woken")
    (end,) = scene.waits.observations(task_id)
    assert (end["end"], end["field"]) == ("unreadable", "job_id")


@contextmanager
def watched(service: FakeService, takes_s: float) -> Iterator[Counter[str]]:
    """Have every look take a while; count the jobs that were looked at twice at once."""
    lock, now, twice = threading.Lock(), Counter[str](), Counter[str]()

    def answer(job_id: str) -> None:
        with lock:
            now[job_id] += 1
            if now[job_id] > 1:
                twice[job_id] += 1
        time.sleep(takes_s)
        with lock:
            now[job_id] -= 1

    service.answer = answer
    yield twice


def test_several_workers_share_the_looks_and_none_is_done_twice_at_once(tmp_path: Path):
    with Valkey() as valkey, FakeService() as service:
        scene = Scene(valkey)
        env = {"DAGRELAY_SERVICE_ONE": service.variable}
        with watched(service, 0.1) as twice:
            ids = [scene.park(service) for _ in range(60)]
            with (
                Worker(valkey.url, tmp_path, name="w1", options=LOOKS_ONLY, **env),
                Worker(
                    valkey.url,
                    tmp_path,
                    name="w2",
                    options=(*LOOKS_ONLY, "-P", "processes", "-c", "2"),
                    **env,
                ),
            ):
                until(lambda: all(service.looks[scene.job(each)] >= 5 for each in ids), "looked at")
        assert not twice


def test_what_a_killed_worker_had_begun_is_looked_at_again_by_another(tmp_path: Path):
    with Valkey() as valkey, FakeService() as service:
        scene = Scene(valkey)
        variable = json.dumps(
            {**json.loads(service.variable), "connect_timeout_s": 0.5, "read_timeout_s": 0.5}
        )
        frozen = threading.Event()
        service.answer = lambda job_id: frozen.wait(20) and None
        ids = [scene.park(service) for _ in range(30)]
        with Worker(valkey.url, tmp_path, options=LOOKS_ONLY, DAGRELAY_SERVICE_ONE=variable) as worker:
            until(lambda: sum(service.looks.values()) >= 30, "all begun")
            worker.kill()
        frozen.set()
        service.looks.clear()
        killed = time.monotonic()
        with Worker(valkey.url, tmp_path, name="w2", options=LOOKS_ONLY, DAGRELAY_SERVICE_ONE=variable):
            until(lambda: all(service.looks[scene.job(each)] for each in ids), "looked at again")
        assert time.monotonic() - killed < 6 + 20  # the lease (0.5 + 0.5 + 5 s), and a start


def test_looks_go_on_where_redis_is_full_so_that_what_has_ended_makes_room(tmp_path: Path):
    with Valkey(config={"maxmemory": "100mb"}) as valkey, FakeService() as service:
        scene = Scene(valkey)
        ids = [scene.park(service) for _ in range(20)]
        with Worker(valkey.url, tmp_path, options=LOOKS_ONLY, DAGRELAY_SERVICE_ONE=service.variable):
            until(lambda: all(service.looks[scene.job(each)] for each in ids), "looked at")
            scene.redis.config_set("maxmemory", "1mb")
            with pytest.raises(OutOfMemoryError):
                scene.redis.set("more", "x")
            service.looks.clear()
            until(lambda: all(service.looks[scene.job(each)] >= 2 for each in ids), "looked at on and on")
