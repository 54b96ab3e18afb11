"""Confs from a producer to the run, with real workers: large ones by reference, all of them sealed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from cryptography.fernet import Fernet
from redis import Redis

from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import (
    POLL_EXTERNAL_JOB,
    TRIGGER_DAG,
    PollRequest,
    TriggerRequest,
    is_sealed,
    reference_in,
)
from producers.errors import ConfGone, ConfKeyMissing, DagNotFound, RunConflict
from producers.fan_out import fan_out
from producers.settings import ProducerSettings
from producers.stores.claim_check import PROVISIONAL_S, ConfKeys, upload
from tests.fake_airflow import FakeAirflow
from tests.fake_service import FakeService
from tests.integration.conftest import Shared
from tests.integration.test_trigger import until
from tests.worker import Worker

CANARY = "c4n4ry-s3cret"
OLD, NEW, OTHER = (Fernet.generate_key().decode() for _ in range(3))
QUICK = {"DAGRELAY_MISSING_GRACE_S": "0.2", "DAGRELAY_RETRY_CAP_S": "0.5"}


@pytest.fixture(scope="module")
def service() -> Iterator[FakeService]:
    with FakeService() as found:
        yield found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, service: FakeService) -> Iterator[Shared]:
    """A worker that has the new key, and the one before it."""
    folder = tmp_path_factory.mktemp("confs")
    with Valkey() as valkey, FakeAirflow() as airflow:
        env = {**QUICK, "DAGRELAY_CONF_KEY": f"{NEW},{OLD}", "DAGRELAY_SERVICE_TRAIN": service.variable}
        with Worker(valkey.url, folder, connections={"default": airflow.conn_uri}, **env) as worker:
            yield Shared(valkey, airflow, worker)


def client(valkey: Valkey, key: str = "", **more: Any) -> RelayClient:
    return RelayClient(
        ProducerSettings(redis_url=valkey.url, client_name="t@h", timeout_s=5, conf_key=key, **more)
    )


@pytest.fixture
def plain(worker: Worker, valkey: Valkey) -> Iterator[RelayClient]:
    """A producer without a key."""
    found = client(valkey)
    yield found
    found.redis.close()


@pytest.fixture
def sealing(worker: Worker, valkey: Valkey) -> Iterator[RelayClient]:
    """A producer with the new key."""
    found = client(valkey, NEW)
    yield found
    found.redis.close()


def everything(url: str) -> bytes:
    """All that lies in a Redis, names and values."""
    found: list[Any] = []
    with Redis.from_url(url) as redis:
        for name in redis.scan_iter(count=1000):
            kind = redis.type(name)
            read = {
                b"string": redis.get,
                b"hash": redis.hgetall,
                b"list": lambda one: redis.lrange(one, 0, -1),
                b"set": redis.smembers,
                b"zset": lambda one: redis.zrange(one, 0, -1),
                b"stream": lambda one: redis.xrange(one),
                b"none": lambda one: None,  # it went meanwhile
            }[kind]
            found += [name, read(name)]
    return repr(found).encode()


def held(relay: RelayClient) -> list[bytes]:
    return list(relay.redis.keys("dagrelay:conf:*:held"))


def foreign(valkey: Valkey, task_id: str, **fields: Any) -> None:
    """Send a message as a stock Celery client does, past our door."""
    stock = Celery("else", broker=valkey.url, set_as_current=False)
    stock.send_task(TRIGGER_DAG, kwargs=fields, queue="triggers", task_id=task_id)


# By reference


@pytest.mark.parametrize("key", ["", NEW], ids=["plain", "sealed"])
def test_a_conf_of_10_mb_arrives_whole_and_its_run_is_small(key, worker, valkey, airflow):
    relay = client(valkey, key)
    draw = random.Random(7)  # noqa: S311
    conf = {"rows": [{"id": n, "name": f"{draw.random()}" * 3} for n in range(150_000)]}
    size = len(json.dumps(conf, separators=(",", ":")))
    assert size > 10_000_000

    run = relay.enqueue(TriggerRequest("d", conf)).get(timeout=60)

    there = airflow.runs["d", run.dag_run_id]["conf"]
    assert there["bytes"] == size
    assert len(json.dumps(there)) < 200
    child = relay.enqueue(TriggerRequest("child", there)).get(timeout=60)
    assert airflow.runs["child", child.dag_run_id]["conf"] == there
    assert relay.resolve_conf(there) == conf
    until(lambda: not held(relay))
    relay.redis.close()


def test_small_and_large_the_same_key_is_the_same_run(plain, airflow):
    """By value before the limit was lowered, by reference afterwards: it is the same conf all the same."""
    conf = {"b": "x" * 50_000, "a": [1, 2.5, None]}
    first = plain.enqueue(TriggerRequest("d", conf, key="k", conf_by="value")).get(timeout=60)
    second = plain.enqueue(TriggerRequest("d", {"a": [1, 2.5, None], "b": "x" * 50_000}, key="k"))
    assert not second.get(timeout=60).created
    assert airflow.runs["d", first.dag_run_id]["conf"] == conf

    plain.enqueue(TriggerRequest("d", conf, key="l")).get(timeout=60)
    assert not plain.enqueue(TriggerRequest("d", conf, key="l", conf_by="value")).get(timeout=60).created
    with pytest.raises(RunConflict, match="values differ under: b"):
        plain.enqueue(TriggerRequest("d", {**conf, "b": "y" * 50_000}, key="l")).get(timeout=60)
    with pytest.raises(RunConflict, match="keys differ in: b"):
        plain.enqueue(TriggerRequest("d", {"a": 1}, key="l")).get(timeout=60)


def test_the_same_conf_by_another_key_is_the_same_run_while_it_can_be_read(plain, valkey, airflow):
    conf = {"a": "x" * 50_000}
    before = client(valkey, OLD)
    run = before.enqueue(TriggerRequest("d", conf, key="r")).get(timeout=60)
    after = client(valkey, f"{NEW},{OLD}")
    assert not after.enqueue(TriggerRequest("d", conf, key="r")).get(timeout=60).created
    assert not plain.enqueue(TriggerRequest("d", conf, key="r")).get(timeout=60).created

    there = airflow.runs["d", run.dag_run_id]["conf"]
    plain.redis.delete(f"dagrelay:conf:{there['dagrelay_conf']}")  # it has expired: by its reference alone
    assert not after.enqueue(TriggerRequest("d", conf, key="r")).get(timeout=60).created
    with pytest.raises(RunConflict, match="cannot be compared"):
        after.enqueue(TriggerRequest("d", {"a": "y"}, key="r")).get(timeout=60)
    for relay in (before, after):
        relay.redis.close()


def test_a_reference_that_cannot_be_compared_here_waits_for_a_worker_with_its_key(
    valkey, airflow, start_worker
):
    conf = {"a": "x" * 50_000}
    relay, before = client(valkey, NEW), client(valkey, OLD)
    without = start_worker(name="without", DAGRELAY_CONF_KEY=OLD, **QUICK)
    assert before.enqueue(TriggerRequest("d", conf, key="k")).get(timeout=60).created
    again = relay.enqueue(TriggerRequest("d", conf, key="k"))
    until(lambda: again.state in ("waiting", "failed"))
    assert "DAGRELAY_CONF_KEY" in again.record().reason
    assert again.record().error is None
    without.stop()

    start_worker(name="with-it", DAGRELAY_CONF_KEY=f"{NEW},{OLD}", **QUICK)
    relay.waits.wake([again.id])
    assert not again.get(timeout=60).created
    for one in (relay, before):
        one.redis.close()


def test_a_message_past_our_door_is_held_or_ends_clearly(plain, valkey, airflow):
    conf = {"a": "x" * 50_000}
    first = plain.enqueue(TriggerRequest("d", conf, wait=True, key="w"))
    until(lambda: ("d", "relay__w") in airflow.runs)
    reference = airflow.runs["d", "relay__w"]["conf"]
    gone = {"dagrelay_conf": f"sha256:{'0' * 64}", "bytes": 9}
    for name, given in (("foreign", reference), ("gone", gone)):
        foreign(valkey, name, dag_id="e", conf=given)

    until(lambda: ("e", "relay__foreign") in airflow.runs)
    assert airflow.runs["e", "relay__foreign"]["conf"] == reference
    with pytest.raises(ConfGone):
        plain.handle("gone").get(timeout=60)
    assert ("e", "relay__gone") not in airflow.runs
    airflow.runs["d", "relay__w"]["state"] = "success"
    assert first.get(timeout=60).state == "success"
    until(lambda: not held(plain))
    assert plain.resolve_conf(reference) == conf


def test_past_our_door_a_conf_is_held_and_one_that_is_gone_told_however_many_wait_in_line(
    valkey, airflow, start_worker
):
    relay = client(valkey)
    conf = {"a": "x" * 50_000}
    packed = relay.confs.packed(conf, "reference")
    upload(relay.redis, packed)
    gone = {"dagrelay_conf": f"sha256:{'0' * 64}", "bytes": 9}
    for number in range(30):  # before a worker is there: they are claimed at once, and put into the line
        foreign(valkey, f"kept-{number}", dag_id="d", conf=packed.conf)
        foreign(valkey, f"gone-{number}", dag_id="d", conf=gone)
    airflow.delay_s = 0.05
    start_worker(connections={"default": f"{airflow.conn_uri}/?max_in_flight=2"}, **QUICK)

    for number in range(30):
        relay.handle(f"kept-{number}").get(timeout=60)
        with pytest.raises(ConfGone):
            relay.handle(f"gone-{number}").get(timeout=60)
    assert len(airflow.runs) == 30
    until(lambda: not held(relay))
    assert relay.redis.ttl(f"dagrelay:conf:{packed.reference}") > PROVISIONAL_S  # from their end on
    relay.redis.close()


def test_past_our_door_a_conf_goes_by_reference_where_that_is_asked_for(sealing, valkey, airflow):
    foreign(valkey, "chained", dag_id="e", conf={"a": 1}, conf_by="reference")
    until(lambda: ("e", "relay__chained") in airflow.runs)
    assert sealing.resolve_conf(airflow.runs["e", "relay__chained"]["conf"]) == {"a": 1}
    until(lambda: not held(sealing))


def test_a_fan_out_of_large_confs_lets_go_of_all_when_it_has_ended(plain, airflow):
    airflow.missing = {"nowhere"}
    confs = [{"n": n, "a": "x" * 40_000} for n in range(5)]
    requests = [TriggerRequest("d" if n else "nowhere", conf) for n, conf in enumerate(confs)]
    fan = fan_out(requests, relay=plain)
    outcomes = fan.get(timeout=60)
    assert [one.state for one in outcomes] == ["failed", "done", "done", "done", "done"]
    there = [airflow.runs["d", one.dag_run_id]["conf"] for one in outcomes[1:]]
    assert [plain.resolve_conf(one) for one in there] == confs[1:]
    until(lambda: not held(plain))
    assert plain.redis.ttl(f"dagrelay:conf:{there[0]['dagrelay_conf']}") > 0


# Sealed


def test_a_small_conf_reaches_airflow_in_plain_and_lies_in_redis_sealed(sealing, valkey, airflow):
    conf = {"pin": CANARY}
    airflow.missing = {"nowhere"}
    failed = sealing.enqueue(TriggerRequest("nowhere", conf))
    with pytest.raises(DagNotFound):
        failed.get(timeout=60)
    later = sealing.enqueue(TriggerRequest("d", conf), countdown=600)
    until(lambda: later.state == "waiting" or sealing.redis.hexists("dagrelay:parked", later.id))
    waits = sealing.enqueue(TriggerRequest("d", conf, key="s", wait=True))
    until(lambda: ("d", "relay__s") in airflow.runs)
    sealing.enqueue(TriggerRequest("d", {"a": CANARY * 5000})).get(timeout=60)
    fan = fan_out([TriggerRequest("d", conf), TriggerRequest("nowhere", conf)], relay=sealing)
    assert [one.state for one in fan.get(timeout=60)] == ["done", "failed"]
    assert airflow.runs["d", "relay__s"]["conf"] == conf
    assert airflow.runs["d", fan.handles[0].dag_run_id]["conf"] == conf

    there = everything(valkey.url)
    assert b"dagrelay_sealed" in there  # else this looked at nothing
    assert CANARY.encode() not in there

    (letter,) = [one for one in sealing.dead.list() if one.id == failed.id]
    kept = sealing.dead.get(letter.id)
    assert is_sealed(kept.request["kwargs"]["conf"])
    airflow.missing = set()
    run = sealing.dead.replay(letter.id).get(timeout=60)
    assert airflow.runs["nowhere", run.dag_run_id]["conf"] == conf
    airflow.runs["d", "relay__s"]["state"] = "success"
    waits.get(timeout=60)
    later.cancel()


def test_a_producer_without_the_key_replays_what_is_sealed(sealing, plain, airflow):
    airflow.missing = {"nowhere"}
    failed = sealing.enqueue(TriggerRequest("nowhere", {"pin": CANARY}))
    with pytest.raises(DagNotFound):
        failed.get(timeout=60)
    airflow.missing = set()
    run = plain.dead.replay(failed.id).get(timeout=60)
    assert airflow.runs["nowhere", run.dag_run_id]["conf"] == {"pin": CANARY}


def test_a_conf_sealed_by_the_key_before_the_last_rotation_is_opened(worker, valkey, airflow):
    relay = client(valkey, OLD)
    run = relay.enqueue(TriggerRequest("d", {"pin": CANARY})).get(timeout=60)
    assert airflow.runs["d", run.dag_run_id]["conf"] == {"pin": CANARY}
    relay.redis.close()


@pytest.mark.parametrize("size", [10, 50_000])
def test_the_trigger_that_follows_a_job_gets_its_conf_and_nothing_of_it_lies_in_plain(
    size, sealing, service, valkey, airflow
):
    service.forget()
    conf = {"pin": CANARY, "more": "x" * size}
    submit = {"path": "/jobs", "body": {"ref": "{reference}"}}
    request = PollRequest(
        service="train",
        path="/jobs/{job_id}",
        submit=submit,
        interval_s=0.2,
        then={"dag_id": "report", "conf": conf},
    )
    handle = sealing.enqueue(request)
    until(lambda: service.jobs)
    until(lambda: handle.record().waits_for)
    assert CANARY.encode() not in everything(valkey.url)
    service.end("job-1")
    run = sealing.handle(handle.get(timeout=60).then).get(timeout=60)
    there = airflow.runs["report", run.dag_run_id]["conf"]
    assert (reference_in(there) is not None) == (size > 32_768)
    found = sealing.resolve_conf(there)
    assert found == {**conf, "job": found["job"]}
    assert CANARY.encode() not in everything(valkey.url)
    until(lambda: not held(sealing))


def test_the_conf_of_a_trigger_that_follows_a_job_past_our_door_is_held_until_its_end(
    sealing, service, valkey, airflow
):
    service.forget()
    conf = {"a": "x" * 60_000}
    sealing.enqueue(TriggerRequest("d", conf, key="past")).get(timeout=60)
    reference = airflow.runs["d", "relay__past"]["conf"]
    stock = Celery("else", broker=valkey.url, set_as_current=False)
    job = {"service": "train", "path": "/jobs/{job_id}", "submit": {"path": "/jobs"}, "interval_s": 0.2}
    fields = {**job, "then": {"dag_id": "report", "conf": reference}}
    stock.send_task(POLL_EXTERNAL_JOB, kwargs=fields, queue="jobs", task_id="past")

    until(lambda: service.jobs)
    assert sealing.redis.ttl(f"dagrelay:conf:{reference['dagrelay_conf']}") == -1
    service.end("job-1")
    run = sealing.handle(sealing.handle("past").get(timeout=60).then).get(timeout=60)
    assert sealing.resolve_conf(airflow.runs["report", run.dag_run_id]["conf"])["a"] == conf["a"]
    until(lambda: not held(sealing))


@pytest.mark.parametrize("key", ["", OTHER], ids=["no key", "another key"])
def test_without_its_key_a_worker_leaves_a_request_waiting_until_one_comes_that_has_it(
    key, valkey, airflow, start_worker, tmp_path: Path
):
    relay = client(valkey, NEW)
    env = {**QUICK, "DAGRELAY_CONF_KEY": key} if key else QUICK
    without = start_worker(name="without", **env)
    conf = {"pin": CANARY}
    handles = [relay.enqueue(TriggerRequest("d", conf, give_up_after_s=1.0)) for _ in range(2)]
    job = relay.enqueue(PollRequest(service="s", path="/j", then={"dag_id": "d", "conf": conf}))
    fan = fan_out([TriggerRequest("d", conf)], relay=relay)
    for handle in (*handles, job, fan.handles[0]):
        until(lambda handle=handle: handle.state == "waiting")
        assert handle.record().error is None
        assert "DAGRELAY_CONF_KEY" in handle.record().reason
    large = relay.enqueue(TriggerRequest("d", {"a": "x" * 50_000})).get(timeout=60)  # it need not be opened
    with pytest.raises(ConfKeyMissing):
        client(valkey, key).resolve_conf(airflow.runs["d", large.dag_run_id]["conf"])
    assert without.text().count("requests wait for a worker with their key") == 1
    assert CANARY not in without.text()
    assert len(airflow.runs) == 1
    job.cancel()
    without.stop()

    with_it = start_worker(name="with-it", DAGRELAY_CONF_KEY=f"{OTHER},{NEW}", **QUICK)
    for handle in (*handles, fan.handles[0]):
        relay.waits.wake([handle.id])
        run = handle.get(timeout=60)
        assert airflow.runs["d", run.dag_run_id]["conf"] == conf
    assert fan.get(timeout=60)[0].state == "done"
    assert CANARY not in with_it.text()
    assert ConfKeys(NEW).names[0] not in without.text()
    relay.redis.close()
