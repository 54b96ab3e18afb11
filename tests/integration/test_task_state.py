"""task_instance: the Airflow task that waits for a job is told its end, once, and no other task is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from local.valkey import Valkey
from producers import Handle, JobOutcome, PollRequest
from producers.client import RelayClient
from producers.contract import SET_TASK_STATE, TaskInstance
from producers.settings import ProducerSettings
from producers.stores.dead import Letter
from producers.stores.envelope import task_state_message
from producers.stores.letters import dead_key
from producers.stores.records import record_key
from tests.fake_airflow import FakeAirflow
from tests.fake_service import FakeService
from tests.integration.gateway import GatewayProcess
from tests.integration.test_trigger import until
from tests.worker import Worker

pytestmark = pytest.mark.integration

SECRET = "5" * 20 + "-the-secret-of-callbacks"
CANARY = "c4n4ry-of-the-body"
QUICK = {"DAGRELAY_RETRY_CAP_S": "0.3", "DAGRELAY_HOLD_PROBE_S": "1"}
TASK = {"dag_id": "etl", "dag_run_id": "scheduled__2026-11-20T00:00:00+00:00", "task_id": "group.train"}
WHO = (TASK["dag_id"], TASK["dag_run_id"], TASK["task_id"])

Start = Callable[..., Handle[JobOutcome]]


def environment(service: FakeService, **more: str) -> dict[str, str]:
    return {"DAGRELAY_SERVICE_TRAIN": service.variable, **QUICK, **more}


@pytest.fixture(scope="module")
def parts(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Valkey, FakeService, FakeAirflow, Worker]]:
    folder = tmp_path_factory.mktemp("task-state")
    with Valkey() as valkey, FakeService() as service, FakeAirflow() as airflow:
        connections = {"default": f"{airflow.conn_uri}/?read_timeout_s=2&timed_out_slot_s=1&max_in_flight=2"}
        with Worker(valkey.url, folder, connections=connections, **environment(service)) as worker:
            yield valkey, service, airflow, worker


@pytest.fixture
def service(parts) -> FakeService:
    parts[1].forget()
    return parts[1]


@pytest.fixture
def airflow(parts) -> FakeAirflow:
    parts[2].forget()
    return parts[2]


@pytest.fixture
def relay(parts, service, airflow) -> Iterator[RelayClient]:
    client = RelayClient(ProducerSettings(redis_url=parts[0].url, client_name="tests@here"))
    yield client
    client.redis.close()


@pytest.fixture
def start(relay) -> Start:
    """Hand over a job for which a task of `TASK` waits; any of its fields may be given otherwise."""

    def enqueue(task_id: str | None = None, *, job: dict[str, Any] | None = None, **task: Any) -> Any:
        fields = {
            "service": "train",
            "path": "/jobs/{job_id}",
            "submit": {"path": "/jobs", "body": {"a": CANARY}},
            "interval_s": 0.1,
            "reason": "why",
            "task_instance": {**TASK, **task},
            **(job or {}),
        }
        return relay.enqueue(PollRequest(**fields), task_id=task_id)

    return enqueue


def end(service: FakeService, handle: Handle[Any], state: str = "succeeded", **more: Any) -> None:
    """End the job of a request, and wait until its end is on record."""
    until(lambda: handle.record().job_id)
    service.end(handle.record().job_id, state, **more)
    until(lambda: handle.record().ended)


def said(handle: Handle[Any]) -> str:
    """What the history says of the task, once it says something."""

    def lines() -> list[str]:
        return [words for _, words in handle.history() if words.startswith("task ")]

    until(lines, timeout_s=60)
    return lines()[-1]


def letter_of(relay: RelayClient, handle: Handle[Any]) -> Letter:
    until(lambda: relay.dead.get(f"{handle.id}.task"), timeout_s=60)
    found = relay.dead.get(f"{handle.id}.task")
    assert found is not None
    return found


# Which state


def test_a_task_is_set_to_success_when_its_job_is_done(start, service, airflow, parts):
    task = airflow.make_task(*WHO)
    handle = start(try_number=1)
    end(service, handle)

    assert said(handle) == f"task group.train of run {WHO[1]} of DAG etl is set to success"
    assert task["state"] == "success"
    ((who, body),) = airflow.patches
    assert who == (*WHO, -1)
    assert set(body) == {"new_state", "note"}  # nothing up- or downstream, no other run
    assert body["note"] == f"dagrelay task={handle.id} service=train job=job-1 ended=done"
    assert CANARY not in parts[3].text()


def test_a_task_fails_with_its_job_and_its_note_says_why(start, service, airflow):
    task = airflow.make_task(*WHO, note="mine")
    handle = start()
    end(service, handle, "failed", why=f"no rails, token={service.token}")

    assert said(handle).endswith("is set to failed")
    assert task["state"] == "failed"
    assert "ended=failed\n" in task["note"]
    assert "no rails" in task["note"]
    assert task["note"].endswith("\n\nmine")
    assert service.token not in task["note"]


def test_a_task_fails_when_its_job_is_cancelled(start, airflow):
    task = airflow.make_task(*WHO)
    handle = start()
    until(lambda: handle.record().waits_for)
    handle.cancel()

    assert said(handle).endswith("is set to failed")
    assert task["state"] == "failed"


def test_a_task_fails_when_its_job_is_refused(start, service, airflow):
    task = airflow.make_task(*WHO)
    service.fault = lambda number, body: "422"
    handle = start()

    assert said(handle).endswith("is set to failed")
    assert "no such train" in task["note"]


@pytest.mark.parametrize("state", ["deferred", "queued", "scheduled", "up_for_reschedule", "up_for_retry"])
def test_a_task_is_set_however_it_waits(start, service, airflow, state):
    task = airflow.make_task(*WHO, state=state)
    handle = start(try_number=1)
    end(service, handle)

    assert said(handle).endswith("is set to success")
    assert task["state"] == "success"


def test_the_task_of_another_airflow_is_set_there(start, service, airflow, relay):
    airflow.make_task(*WHO)
    handle = start(connection="nowhere")
    end(service, handle)

    letter = letter_of(relay, handle)
    assert letter.error == "TaskStateNotSet"
    assert "AIRFLOW_CONN_NOWHERE" in (letter.reason or "")
    assert not airflow.patches


# Mapped tasks


def test_one_instance_of_a_mapped_task_is_set_and_no_other(start, service, airflow):
    airflow.mapped.add((WHO[0], WHO[2]))
    tasks = [airflow.make_task(*WHO, index) for index in range(3)]
    handle = start(map_index=1, try_number=1)
    end(service, handle)

    assert "task group.train[1] of run" in said(handle)
    assert [task["state"] for task in tasks] == ["running", "success", "running"]


@pytest.mark.parametrize("expanded", [True, False])
def test_a_mapped_task_is_not_set_as_a_whole(start, service, airflow, relay, expanded):
    airflow.mapped.add((WHO[0], WHO[2]))
    if expanded:
        airflow.make_task(*WHO, 0)
    else:
        airflow.make_task(*WHO, state=None, try_number=0, start_date=None)
    handle = start()
    end(service, handle)

    assert "say by map_index which" in (letter_of(relay, handle).reason or "")
    assert "was not set to success" in said(handle)
    assert not airflow.patches


# Late and repeated outcomes


@pytest.mark.parametrize(
    ("now", "given", "why"),
    [
        ({"state": "success"}, {}, "it is success already"),
        ({"state": "skipped"}, {}, "it is skipped already"),
        ({"state": "removed"}, {"try_number": 1}, "it is removed already"),
        ({"try_number": 2}, {"try_number": 1}, "it is at try 2, and try 1 waited for the job"),
        ({"state": None}, {"try_number": 1}, "it was cleared, and is to run again"),
        ({"state": "restarting"}, {}, "it was cleared, and is to run again"),
        (
            {"try_number": 2, "start_date": (datetime.now(UTC) + timedelta(hours=1)).isoformat()},
            {},
            "it began after the request was accepted",
        ),
    ],
)
def test_a_late_outcome_does_no_harm(start, service, airflow, now, given, why):
    before = dict(airflow.make_task(*WHO, **now))
    handle = start(**given)
    end(service, handle)

    assert said(handle).endswith(f"is left alone: {why}")
    assert airflow.tasks[*WHO, -1] == before
    assert not airflow.patches


def test_a_try_that_is_queued_is_left_alone_once_it_shows_itself_to_be_new(start, service, airflow, parts):
    """Without a try's number: its start is still that of the try before."""
    task = airflow.make_task(*WHO, state="queued", try_number=2)
    handle = start()
    end(service, handle)
    until(lambda: f"task state waits task_id={handle.id}" in parts[3].text())
    assert not airflow.patches

    task |= {"state": "running", "start_date": (datetime.now(UTC) + timedelta(seconds=5)).isoformat()}

    assert said(handle).endswith("it began after the request was accepted")
    assert task["state"] == "running"


def test_the_same_outcome_again_changes_nothing(start, service, airflow, relay):
    task = airflow.make_task(*WHO)
    handle = start(try_number=1)
    end(service, handle)
    said(handle)
    task |= {"state": "running", "try_number": 2}  # somebody has cleared it meanwhile
    queue, raw = task_state_message(TaskInstance(**TASK, try_number=1), handle.id, "tests")
    for _ in range(3):
        relay.redis.lpush(queue, raw)

    until(lambda: sum("is left alone" in words for _, words in handle.history()) == 3)
    assert len(airflow.patches) == 1
    assert task["state"] == "running"


def test_a_replay_counts_from_the_request_that_it_replays(start, service, airflow, relay):
    airflow.make_task(*WHO, state="success")
    service.fault = lambda number, body: "422"
    handle = start()
    assert said(handle).endswith("it is success already")
    until(lambda: relay.dead.get(handle.id))
    began = datetime.now(UTC) + timedelta(seconds=3)  # beyond what clocks may be apart
    airflow.make_task(*WHO, try_number=2, start_date=began.isoformat())
    until(lambda: datetime.now(UTC) > began)
    replayed = relay.dead.replay(handle.id)

    assert said(replayed).endswith("it began after the request was accepted")
    assert not airflow.patches


# What fails on the way


def test_an_airflow_that_is_away_is_waited_for(start, service, airflow, parts):
    task = airflow.make_task(*WHO)
    airflow.silent = True
    handle = start(try_number=1)
    end(service, handle)
    until(lambda: f"task state waits task_id={handle.id}" in parts[3].text())
    airflow.silent = False

    assert said(handle).endswith("is set to success")
    assert task["state"] == "success"


@pytest.mark.parametrize("fault", ["drop", "503"])
def test_a_change_whose_answer_is_lost_is_done_once(start, service, airflow, fault):
    task = airflow.make_task(*WHO)
    faults = iter([fault])
    airflow.on_patch = lambda: next(faults, "answer")
    handle = start(try_number=1)
    end(service, handle)

    assert said(handle)
    assert task["state"] == "success"
    assert len(airflow.patches) == 1


def test_refused_credentials_hold_it_and_mended_ones_let_it_go_on(start, service, airflow, parts, relay):
    task = airflow.make_task(*WHO)
    airflow.refuse_credentials = airflow.refuse_token = True
    handle = start(try_number=1)
    end(service, handle)
    until(lambda: f"task state waits task_id={handle.id}" in parts[3].text())
    relay.redis.expire(record_key(handle.id), 60)  # as after so many days of a hold
    until(lambda: relay.redis.ttl(record_key(handle.id)) > 3600)
    airflow.refuse_credentials = airflow.refuse_token = False

    assert said(handle).endswith("is set to success")
    assert task["state"] == "success"


def test_a_task_that_is_not_there_is_a_dead_letter_whose_replay_tries_again(start, service, airflow, relay):
    handle = start()
    end(service, handle)
    letter = letter_of(relay, handle)

    assert (letter.task, letter.error) == (SET_TASK_STATE, "TaskStateNotSet")
    assert "there is no such task instance" in (letter.reason or "")
    assert handle.get(timeout=1).state == "succeeded"  # the request itself is well

    # A replay reads from the record how the request ended: it outlives the letter.
    assert relay.redis.ttl(record_key(handle.id)) > relay.redis.ttl(dead_key(letter.id)) + 86_400
    task = airflow.make_task(*WHO)
    relay.dead.replay(letter.id)
    until(lambda: task["state"] == "success")


def test_a_role_that_may_not_is_told(start, service, airflow, relay):
    airflow.make_task(*WHO)
    airflow.on_patch = lambda: "403"
    handle = start()
    end(service, handle)

    assert "(403)" in (letter_of(relay, handle).reason or "")


def test_what_cannot_be_told_for_too_long_is_given_up(valkey, airflow, service, start_worker, tmp_path):
    start_worker(**environment(service, DAGRELAY_TASK_STATE_FOR_S="1"))
    relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here"))
    airflow.stop()
    handle = relay.enqueue(
        PollRequest(service="train", submit={"path": "/jobs"}, path="/jobs/{job_id}", task_instance=TASK)
    )
    end(service, handle)

    assert "of trying are over" in (letter_of(relay, handle).reason or "")
    airflow.start()
    relay.redis.close()


def test_the_death_of_a_worker_in_the_midst_of_it_delays_it_and_no_more(
    valkey, airflow, service, start_worker
):
    environ = environment(service, DAGRELAY_VISIBILITY_TIMEOUT_S="3")
    worker = start_worker(**environ)
    relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here"))
    task = airflow.make_task(*WHO)
    asked: list[float] = []

    def freeze() -> Any:
        asked.append(time.monotonic())
        if len(asked) == 1:
            time.sleep(4)
            return "503"
        return "answer"

    airflow.on_patch = freeze
    handle = relay.enqueue(
        PollRequest(
            service="train",
            submit={"path": "/jobs"},
            path="/jobs/{job_id}",
            interval_s=0.1,
            task_instance=TASK,
        )
    )
    end(service, handle)
    until(lambda: asked)
    worker.kill()
    start_worker(name="w2", **environ)

    until(lambda: task["state"] == "success", timeout_s=60)
    assert len(airflow.patches) == 1
    relay.redis.close()


# Who asks


def test_many_ends_at_once_stay_within_the_slots(start, service, airflow):
    for index in range(24):
        airflow.make_task(*WHO, index)
    airflow.delay_s = 0.02
    handles = [start(map_index=index, try_number=1) for index in range(24)]
    until(lambda: len(service.jobs) == 24, timeout_s=60)
    for handle in handles:
        until(lambda handle=handle: handle.record().job_id)
        service.end(handle.record().job_id)

    until(lambda: all(task["state"] == "success" for task in airflow.tasks.values()), timeout_s=60)
    assert len(airflow.patches) == 24
    assert airflow.most_in_flight <= 2


def test_who_comes_past_our_door_is_heard_too(valkey, parts, airflow, service):
    task = airflow.make_task(*WHO)
    host = Celery("host", broker=parts[0].url, backend=parts[0].url, set_as_current=False)
    kwargs = {"service": "train", "path": "/jobs/1", "job_id": "1", "interval_s": 0.1, "task_instance": TASK}
    host.send_task("tasks.poll_external_job", kwargs=kwargs, queue="jobs")  # there is no such job

    until(lambda: task["state"] == "failed")


def test_a_callback_of_the_service_ends_the_task(valkey, service, airflow, start_worker, tmp_path):
    """Signed, for this job alone; once."""
    task = airflow.make_task(*WHO)
    with GatewayProcess(valkey.url, tmp_path, DAGRELAY_CALLBACK_SECRET=SECRET) as gateway:
        start_worker(
            **environment(
                service,
                DAGRELAY_CALLBACK_URL=f"http://127.0.0.1:{gateway.port}",
                DAGRELAY_CALLBACK_SECRET=SECRET,
            )
        )
        body = {
            "service": "train",
            "submit": {"path": "/jobs", "body": {"callback": "{callback_url}"}},
            "task_instance": {**TASK, "try_number": 1},
        }
        accepted = gateway.ask("POST", "/v1/jobs", body)
        assert accepted.status == 202, accepted
        until(lambda: service.posts)
        path = str(service.posts[0][1]["callback"]).removeprefix(f"http://127.0.0.1:{gateway.port}")
        forged = gateway.ask("POST", path[:-1] + ("A" if path[-1] != "A" else "B"), {}, token=None)

        assert forged.status in (401, 404)
        assert gateway.ask("POST", path, {"state": "done"}, token=None).status == 202
        assert gateway.ask("POST", path, {"state": "failed"}, token=None).status == 409

        until(lambda: task["state"] == "success", timeout_s=60)
        until(lambda: "is set to success" in str(gateway.ask("GET", accepted.body["status_url"]).body))
        assert len(airflow.patches) == 1


def test_a_key_may_end_tasks_of_its_own_dags_alone(valkey: Valkey, tmp_path):
    with GatewayProcess(valkey.url, tmp_path) as gateway:
        token = gateway.key("etl", dags=["etl"], services=["train"])
        body = {"service": "train", "path": "/jobs/1", "task_instance": TASK}
        until(lambda: gateway.ask("POST", "/v1/jobs", body, token=token).status == 202)
        for field, value in (("dag_id", "payroll"), ("connection", "other")):
            other = {**body, "task_instance": {**TASK, field: value}}
            answer = gateway.ask("POST", "/v1/jobs", other, token=token)
            assert answer.status == 403, answer
            assert f"task_instance.{field}" in answer.body["detail"]
    with Redis.from_url(valkey.url) as redis:
        assert redis.llen("jobs") == 1
