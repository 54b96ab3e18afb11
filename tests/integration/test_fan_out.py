"""Fan-outs: many triggers, one outcome each in order, one callback, whatever fails on the way."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from celery import Celery
from celery.canvas import Signature
from redis import Redis
from redis.exceptions import ResponseError

import tests.import_tasks  # noqa: F401 - before anything of the workers
from local.process import ROOT, PartFailed, Process, clean_env
from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import Outcome, TriggerRequest
from producers.errors import BrokerUnavailable, FanOutBroken, RequestCancelled
from producers.fan_out import FanOut, fan_out
from producers.settings import ProducerSettings
from producers.stores.fan_outs import (
    FAN_OUT_END,
    TRIGGER_CHUNK,
    FanOuts,
    chunk_id,
    fan_out_key,
    group_id,
    watch_id,
)
from producers.stores.lines import Lines
from producers.stores.records import RESULT_PREFIX, record_key, store
from tasks import fan_out as worker_side
from tasks import posting
from tasks.airflow import clients
from tasks.airflow.connections import read_connections
from tasks.app import app
from tasks.http import HttpRequest, HttpResponse
from tasks.http_many import ManySender
from tasks.results import NotHandedOver
from tasks.settings import settings
from tests.fake_airflow import FakeAirflow
from tests.integration.conftest import Shared
from tests.integration.test_trigger import until
from tests.plain_worker import message
from tests.worker import CELERY, Worker

CRASH = Path(__file__).with_name("crash")
QUICK = {
    "DAGRELAY_MISSING_GRACE_S": "0.2",
    "DAGRELAY_RETRY_CAP_S": "0.5",
    "DAGRELAY_FAN_OUT_WATCH_S": "0.2",
    "DAGRELAY_VISIBILITY_TIMEOUT_S": "3",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Our worker, and a host's, which has no result backend."""
    folder = tmp_path_factory.mktemp("fan-out")
    with Valkey() as valkey, FakeAirflow() as airflow, host_worker(valkey.url, folder):
        connections = {"default": f"{airflow.conn_uri}/?read_timeout_s=1&timed_out_slot_s=1"}
        with Worker(valkey.url, folder, connections=connections, **QUICK) as worker:
            yield Shared(valkey, airflow, worker)


class host_worker:
    """The host's worker: `with host_worker(url, folder):`."""

    def __init__(self, url: str, folder: Path) -> None:
        argv = [
            CELERY,
            "-A",
            "tests.integration.callbacks",
            "worker",
            "-P",
            "threads",
            "-c",
            "2",
            "-l",
            "INFO",
        ]
        self._start = lambda: Process(
            [*argv, "--without-mingle", "--without-gossip", "-n", "host@%h"],
            log=folder / "host.log",
            env=clean_env(CALLBACKS_URL=url),
            cwd=ROOT,
            name="host",
            grace_s=20,
        )

    def __enter__(self) -> None:
        self._process = self._start()

    def __exit__(self, *_: object) -> None:
        self._process.stop()


def collect(name: str) -> Signature[Any]:
    """The host's task, as the host's service writes it down."""
    return Celery("host").signature("host.collect", args=(name,))


def collected(relay: RelayClient, name: str) -> list[Any]:
    return [json.loads(told) for told in relay.redis.lrange(f"collected:{name}", 0, -1)]


def called(relay: RelayClient, name: str) -> list[Outcome]:
    """Wait for the callback; return what it was called with."""
    told = until(lambda: collected(relay, name))
    return [Outcome.from_message(one) for one in told[0][1]]


def many(count: int, dag_id: str = "daily_sales", **given: Any) -> list[dict[str, Any]]:
    return [{"dag_id": dag_id, "conf": {"n": n}, **given} for n in range(count)]


def watched(relay: RelayClient, fan: FanOut) -> None:
    """Have the watch look now: its first look is a minute after the call."""
    relay.redis.zadd("dagrelay:due", {watch_id(fan.id): 0}, xx=True)


def test_each_request_has_its_outcome_in_order_and_the_callback_gets_them_all(relay, airflow, worker):
    fan = fan_out(many(450), then=collect("order"), relay=relay)
    outcomes = fan.get(timeout=60)

    assert [one.id for one in outcomes] == [handle.id for handle in fan.handles]
    assert [airflow.runs["daily_sales", one.dag_run_id]["conf"]["n"] for one in outcomes] == list(range(450))
    assert {one.state for one in outcomes} == {"done"}
    assert called(relay, "order") == outcomes
    assert fan.progress() == (450, 450)
    assert (fan.state, fan.record().progress) == ("done", "450 of 450: 450 done, 0 failed, 0 cancelled")


def test_a_request_of_a_fan_out_ends_as_one_by_itself_does(relay, airflow, worker):
    alone = relay.enqueue(TriggerRequest("daily_sales", {"n": 0}))
    alone.get(timeout=60)
    fan = fan_out(many(1), relay=relay)
    fan.get(timeout=60)
    (one,) = fan.handles

    assert one.get(timeout=1).dag_run_id == one.dag_run_id == f"relay__{one.id}"
    results = [json.loads(relay.redis.get(RESULT_PREFIX + which.id)) for which in (alone, one)]
    assert list(results[0]) == list(results[1])
    assert results[1]["task_id"] == one.id
    mine, theirs = one.record().to_json(), alone.record().to_json()
    assert mine.pop("fan_out") == fan.id
    assert mine.keys() == theirs.keys()
    assert (mine["state"], mine["attempts"], mine["by"]) == ("done", 1, "tests@here")
    ttls = [relay.redis.ttl(record_key(which.id)) for which in (alone, one)]
    assert abs(ttls[0] - ttls[1]) < 5
    assert f"task={one.id}" in airflow.runs["daily_sales", one.dag_run_id]["note"]


def test_no_requests_at_all_call_back_with_none(relay, airflow, worker):
    fan = fan_out([], then=collect("none"), relay=relay)

    assert fan.get(timeout=60) == []
    assert called(relay, "none") == []


def test_three_bad_ones_of_two_hundred_are_told_among_the_others(relay, airflow, worker):
    airflow.missing.add("nowhere")
    airflow.rejecting["strict"] = (400, {"detail": "a value does not fit"})
    airflow.make("daily_sales", "relay__taken", conf={"other": 1})
    requests = many(200)
    requests[7] = {"dag_id": "nowhere"}
    requests[77] = {"dag_id": "strict"}
    requests[177] = {"dag_id": "daily_sales", "key": "taken"}

    outcomes = fan_out(requests, then=collect("bad"), relay=relay).get(timeout=60)

    bad = {place: one.error for place, one in enumerate(outcomes) if one.state != "done"}
    assert bad == {7: "DagNotFound", 77: "RequestRejected", 177: "RunConflict"}
    assert "nowhere" in outcomes[7].reason
    assert outcomes[177].dag_run_id == "relay__taken"
    assert called(relay, "bad") == outcomes
    assert len(airflow.runs) == 198


@pytest.mark.parametrize("fault", ["drop", "500", "503", "reset", "html", "late"])
def test_whatever_becomes_of_an_answer_there_is_one_run_each(fault, relay, airflow, worker):
    airflow.late_s = 1.2
    airflow.fault = lambda number, dag_id, run_id: fault if number % 5 == 0 and number <= 20 else "answer"

    outcomes = fan_out(many(20), relay=relay).get(timeout=60)

    assert [one.run["created"] for one in outcomes] == [True] * 20
    assert len(airflow.runs) == 20


def test_the_same_key_twice_is_one_run_with_two_outcomes(relay, airflow, worker):
    outcomes = fan_out(many(1, key="k") + many(1, key="k"), relay=relay).get(timeout=60)

    assert [one.state for one in outcomes] == ["done", "done"]
    assert sorted(one.run["created"] for one in outcomes) == [False, True]
    assert len(airflow.runs) == 1


def test_with_wait_it_joins_on_the_ends_of_the_runs(relay, airflow, worker):
    fan = fan_out(many(3), wait=True, then=collect("ends"), relay=relay)
    until(lambda: all(handle.state == "waiting" for handle in fan.handles))
    assert fan.progress() == (0, 3)

    for (_, run_id), run in airflow.runs.items():
        run["state"] = "failed" if run_id == fan.handles[1].dag_run_id else "success"
    outcomes = fan.get(timeout=60)

    assert [one.state for one in outcomes] == ["done", "failed", "done"]
    assert [one.run and one.run["state"] for one in outcomes] == ["success", None, "success"]
    assert outcomes[1].error == "DagRunFailed"
    assert called(relay, "ends") == outcomes
    assert set(airflow.posts.values()) == {1}


def test_after_a_failure_nothing_more_is_started_if_asked_so(relay, airflow, worker):
    airflow.rejecting["strict"] = (400, {"detail": "a value does not fit"})
    requests = many(200)
    requests[3] = {"dag_id": "strict"}

    outcomes = fan_out(requests, on_error="stop", relay=relay).get(timeout=60)

    assert outcomes[3].error == "RequestRejected"
    begun = [place for place, one in enumerate(outcomes) if one.state == "done"]
    assert begun == [0, 1, 2, 4, 5, 6, 7]  # as many as may be in flight
    assert {one.error for one in outcomes[8:]} == {"RequestCancelled"}
    assert {one.reason for one in outcomes[8:]} == {"stopped: an earlier request failed"}
    assert len(airflow.runs) == 7


def test_to_stop_at_a_failure_is_no_hindrance_where_there_is_none(relay, airflow, worker):
    airflow.fault = lambda number, dag_id, run_id: "503" if number == 5 else "answer"

    outcomes = fan_out(many(30), on_error="stop", relay=relay).get(timeout=60)

    assert {one.state for one in outcomes} == {"done"}


def test_one_that_waits_is_cancelled_by_its_own_id(relay, airflow, worker):
    fan = fan_out([*many(5), {"dag_id": "slow", "wait": True}], then=collect("one"), relay=relay)
    last = fan.handles[-1]
    until(lambda: last.state == "waiting")
    assert fan.progress() == (5, 6)

    last.cancel()

    outcomes = fan.get(timeout=60)
    assert [one.state for one in outcomes] == ["done"] * 5 + ["cancelled"]
    assert (outcomes[-1].error, outcomes[-1].reason) == ("RequestCancelled", "asked by tests@here")
    with pytest.raises(RequestCancelled):
        last.get(timeout=1)
    assert called(relay, "one") == outcomes


def test_a_cancelled_fan_out_still_tells_the_callback_of_all(relay, airflow, worker):
    fan = fan_out([*many(5), *many(3, "slow", wait=True)], then=collect("all"), relay=relay)
    until(lambda: fan.progress()[0] == 5)
    until(lambda: all(handle.state == "waiting" for handle in fan.handles[5:]))

    fan.cancel()

    assert [one.state for one in fan.get(timeout=60)] == ["done"] * 5 + ["cancelled"] * 3
    assert len(called(relay, "all")) == 8
    assert fan.cancel() == "done"


def test_a_copy_of_any_of_its_messages_changes_nothing(relay, airflow, worker):
    fan = fan_out(many(3), then=collect("copies"), relay=relay)
    outcomes = fan.get(timeout=60)
    called(relay, "copies")
    copies = {
        "tasks.fan_out": {},
        TRIGGER_CHUNK: {"index": 0},
        FAN_OUT_END: {},
    }
    for task, more in copies.items():
        copy = json.loads(message(task, queue="triggers", task_id=fan.id))
        copy["body"] = json.dumps([[], {"fan_out_id": fan.id, **more}, {}])
        copy["headers"]["redelivered"] = True
        relay.redis.lpush("triggers", json.dumps(copy))
    probe = relay.enqueue(TriggerRequest("daily_sales", {"n": "after"}))
    probe.get(timeout=60)
    until(lambda: not relay.redis.llen("triggers"))

    assert len(collected(relay, "copies")) == 1
    assert fan.get(timeout=1) == outcomes
    assert set(airflow.posts.values()) == {1}


# The script that launches the chord, and the one that sends the callback, each once sent and before.
MOMENTS = [("launched", "1", 1), ("launched", "", 1), ("then_sent", "1", 1), ("then_sent", "", 1)]


def test_workers_killed_at_any_moment_end_the_same_fan_outs_once(valkey, airflow, relay, tmp_path):
    """Each kills itself after its n-th Redis command that names something; one more ends what they left."""
    count, size = 4, 21
    conf = {"filling": "x" * 100_000}  # nine of these are a chunk, where they go by value
    draw = random.SystemRandom()
    moments = [*MOMENTS, ("fan-out", draw.choice(["1", ""]), draw.randrange(2, 24))]
    options = {"connections": {"default": airflow.conn_uri}, **QUICK}
    fans = [
        fan_out(
            [
                {"dag_id": f"dag{n}", "conf": conf, "conf_by": "value", "key": f"{n}-{place}"}
                for place in range(size)
            ],
            then=collect(str(n)).set(queue=f"host{n}"),
            relay=relay,
        )
        for n in range(count)
    ]
    victims = [
        Worker(
            valkey.url,
            tmp_path,
            name=f"victim{number}",
            PYTHONPATH=str(CRASH),
            CRASH_NAMING=naming,
            CRASH_BEFORE=before,
            CRASH_AFTER=str(after),
            **options,
        )
        for number, (naming, before, after) in enumerate(moments)
    ]
    with ThreadPoolExecutor(len(victims)) as starting, suppress(PartFailed):
        list(starting.map(Worker.start, victims))  # one may be dead before it says that it is ready
    until(lambda: not any(alive(worker) for worker in victims) or all(fan.ready() for fan in fans), 30)
    assert not all(alive(worker) for worker in victims)
    for worker in victims:
        worker.kill()
    with Worker(valkey.url, tmp_path, **options):
        # Killed between the chord's claim and its body, which Celery then does not send: the watch does.
        outcomes = [fan.get(timeout=150) for fan in fans]

    for n, fan in enumerate(fans):
        queued = [json.loads(raw) for raw in relay.redis.lrange(f"host{n}", 0, -1)]
        assert [told["headers"]["id"] for told in queued] == [f"{fan.id}.then"], moments
        told = json.loads(b64decode(queued[0]["body"]))[0][0]
        assert [Outcome.from_message(one) for one in told] == outcomes[n], moments
    assert {one.state for some in outcomes for one in some} == {"done"}, moments
    assert len(airflow.runs) == count * size
    assert all(one.run["created"] for some in outcomes for one in some), moments


def alive(worker: Worker) -> bool:
    return worker.process.alive


@pytest.fixture(scope="module")
def accepted_before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FanOut]]:
    """Fan-outs to which something happened before there was any worker; then one was started."""
    folder = tmp_path_factory.mktemp("before")
    with Valkey() as valkey, FakeAirflow() as airflow:
        relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here"))
        fans = {"launcher lost": fan_out(many(4), relay=relay)}
        relay.redis.delete("triggers")  # somebody purged the queue
        for name in ("one cancelled", "all cancelled", "bookkeeping lost"):
            fans[name] = fan_out(many(4, name.replace(" ", "-")), relay=relay)
        assert {handle.state for handle in fans["one cancelled"].handles} == {"accepted"}
        fans["one cancelled"].handles[2].cancel()
        fans["all cancelled"].cancel()
        relay.redis.delete(*relay.redis.keys(f"{fan_out_key(fans['bookkeeping lost'].id)}*"))
        for fan in fans.values():
            watched(relay, fan)
        with Worker(valkey.url, folder, connections={"default": airflow.conn_uri}, **QUICK):
            yield fans
        assert len(airflow.runs) == 3


def test_what_was_cancelled_before_it_began_is_not_begun(accepted_before):
    one, every = accepted_before["one cancelled"], accepted_before["all cancelled"]

    assert [one.state for one in one.get(timeout=60)] == ["done", "done", "cancelled", "done"]
    assert {(one.state, one.reason) for one in every.get(timeout=60)} == {
        ("cancelled", "asked by tests@here")
    }


def test_a_fan_out_whose_launcher_is_lost_is_told_as_broken(accepted_before):
    fan = accepted_before["launcher lost"]
    with pytest.raises(FanOutBroken) as broken:
        fan.get(timeout=60)

    assert (broken.value.fan_out_id, broken.value.missing) == (fan.id, 4)
    assert (fan.state, fan.record().error) == ("failed", "FanOutBroken")
    until(lambda: {handle.state for handle in fan.handles} == {"failed"})


def test_a_fan_out_whose_bookkeeping_is_lost_is_told_as_broken(accepted_before):
    with pytest.raises(FanOutBroken, match="bookkeeping is gone") as broken:
        accepted_before["bookkeeping lost"].get(timeout=60)

    assert broken.value.missing == 4


def test_a_fan_out_of_which_a_part_is_lost_is_told_as_broken(relay, airflow, worker):
    airflow.fault = lambda number, dag_id, run_id: "503" if dag_id == "slow" else "answer"
    fan = fan_out([*many(2), *many(2, "slow")], then=collect("lost"), relay=relay)
    lost = fan.handles[3]
    while relay.redis.hdel("dagrelay:parked", lost.id) == 0:  # between two of its attempts
        time.sleep(0.005)
    relay.redis.zrem("dagrelay:due", lost.id)
    watched(relay, fan)

    with pytest.raises(FanOutBroken) as broken:
        fan.get(timeout=60)

    assert broken.value.missing == 2
    assert lost.id in broken.value.reason
    until(lambda: lost.state == "failed")
    airflow.fault = lambda number, dag_id, run_id: "answer"
    assert fan.handles[2].get(timeout=60).dag_id == "slow"  # what was not lost goes on
    assert collected(relay, "lost") == []


def test_a_fan_out_that_waits_for_long_is_not_taken_for_broken(relay, airflow, worker):
    fan = fan_out(many(2), wait=True, relay=relay)
    until(lambda: all(handle.state == "waiting" for handle in fan.handles))
    watched(relay, fan)

    time.sleep(0.7)  # three looks

    assert fan.state == "accepted"
    for run in airflow.runs.values():
        run["state"] = "success"
    assert [one.state for one in fan.get(timeout=60)] == ["done", "done"]


def test_where_only_the_chords_bookkeeping_is_lost_the_callback_is_called_all_the_same(
    relay, airflow, worker
):
    airflow.fault = lambda number, dag_id, run_id: "503" if dag_id == "slow" else "answer"
    fan = fan_out([*many(2), *many(1, "slow")], then=collect("late"), relay=relay)
    until(lambda: fan.handles[2].state == "waiting")
    gone = relay.redis.keys(f"celery-taskset-meta-{group_id(fan.id)}*")
    assert gone
    relay.redis.delete(*gone)
    airflow.fault = lambda number, dag_id, run_id: "answer"
    until(lambda: fan.progress() == (3, 3))
    watched(relay, fan)

    assert len(fan.get(timeout=60)) == 3
    assert len(called(relay, "late")) == 3


@pytest.mark.parametrize("way", ["cancel", "revoke"])
def test_a_chunk_that_is_revoked_cancels_its_fan_out_and_the_callback_is_told(way, relay, airflow, worker):
    requests = [*many(2, "slow", wait=True), *many(2)]
    fan = fan_out(requests, then=collect(f"chunk-{way}"), relay=relay)
    until(lambda: fan.progress()[0] == 2)
    chunk = chunk_id(fan.id, 0)
    until(lambda: relay.redis.hexists("dagrelay:parked", chunk))

    if way == "cancel":
        relay.waits.cancel(chunk, by="tests@here")
    else:
        Celery("stock", broker=relay.settings.redis_url).control.revoke(chunk)

    outcomes = fan.get(timeout=60)
    assert [one.state for one in outcomes] == ["cancelled"] * 2 + ["done"] * 2
    assert called(relay, f"chunk-{way}") == outcomes
    assert relay.handle(chunk).state == "done"


def test_a_chunk_that_is_revoked_before_it_began_begins_nothing(relay, start_worker):
    fan = fan_out(many(3), relay=relay)
    relay.waits.cancel(chunk_id(fan.id, 0), by="tests@here")
    start_worker()

    assert {(one.state, one.reason) for one in fan.get(timeout=60)} == {("cancelled", "asked by hand")}


def test_a_chunk_whose_process_is_ended_by_a_revoke_comes_back_and_cancels_its_fan_out(
    relay, airflow, start_worker
):
    airflow.late_s, airflow.fault = 2, lambda *_: "late"
    fan = fan_out(many(2), then=collect("ended").set(queue="host"), relay=relay)
    start_worker(options=("-P", "processes", "-c", "1"))
    until(lambda: len(airflow.runs) == 2)
    chunk = chunk_id(fan.id, 0)

    Celery("stock", broker=relay.settings.redis_url).control.revoke(chunk, terminate=True, signal="SIGKILL")

    assert [one.state for one in fan.get(timeout=60)] == ["cancelled"] * 2
    assert relay.redis.llen("host") == 1
    assert relay.handle(chunk).state == "done"


def test_a_chunk_that_cannot_be_read_is_put_back_and_never_fails(inside, valkey, relay):
    fan = fan_out(many(2), relay=relay)
    relay.redis.hset(f"{fan_out_key(fan.id)}:requests", "0", "[")

    with pytest.raises(NotHandedOver) as back:
        inside.trigger_chunk(fan_out_id=fan.id, index=0)

    assert back.value.by_itself


def test_a_held_connection_is_asked_nothing(relay, airflow, worker):
    airflow.refuse_token = True
    probe = relay.enqueue(TriggerRequest("daily_sales"))
    until(lambda: probe.state == "waiting")
    fan = fan_out(many(3), relay=relay)
    until(lambda: relay.waits.get(chunk_id(fan.id, 0)))

    assert not airflow.posts
    assert "held" in relay.waits.get(chunk_id(fan.id, 0)).waits_for
    airflow.refuse_token = False  # not before: whoever probes would release it
    assert Lines(relay.redis).release("default") == "credentials"
    assert {one.state for one in fan.get(timeout=60)} == {"done"}


@pytest.fixture
def inside(relay: RelayClient, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What a worker does for fan-outs, done in this process with the test's Valkey."""
    monkeypatch.setitem(app.backend.__dict__, "client", relay.redis)
    return worker_side


def test_with_a_broken_fan_out_ends_what_its_chunks_have_not_begun(inside, valkey, relay):
    fan = fan_out(many(250), relay=relay)
    store = FanOuts(relay.redis)
    outside, lost = fan.handles[3], fan.handles[4]
    store.leave(fan.id, 0, "elsewhere", [(one.id, b"{}") for one in (outside, lost)])

    inside._break(fan.id, 250, [lost.id], "a part is lost")

    assert fan.state == "failed"
    assert outside.state == "accepted"
    assert {one.record().error for one in fan.handles if one is not outside} == {"FanOutBroken"}


def test_what_a_watch_that_died_left_of_a_broken_fan_out_is_found_by_the_next(
    inside, valkey, relay, monkeypatch
):
    fan = fan_out(many(3), relay=relay)
    real, ends = app.backend.end, []

    def end_two(task_id: str, *args: Any) -> bool:
        ends.append(task_id)
        if len(ends) > 2:
            raise NotHandedOver("gone")
        return real(task_id, *args)

    monkeypatch.setattr(app.backend, "end", end_two)
    with pytest.raises(NotHandedOver):
        inside._break(fan.id, 3, [], "a part is lost")

    assert fan.state == "accepted"
    assert FanOuts(relay.redis).open_chunks(fan.id) == {0: [one.id for one in fan.handles]}


def test_a_request_whose_record_has_expired_since_its_end_is_not_begun_again(valkey, relay):
    fan = fan_out(many(3), relay=relay)
    gone = fan.handles[1]
    store(relay.redis, gone.id, result="{}", result_ttl_s=60, state="done", found={"run": "{}"})
    relay.redis.delete(record_key(gone.id))

    begun = FanOuts(relay.redis).begin(fan.id, 0)

    assert [letter for _, _, letter in begun.items] == ["f", "e", "f"]
    assert not relay.redis.exists(record_key(gone.id))


def test_one_that_ends_a_second_time_is_not_waited_for_any_more(valkey, relay):
    fan = fan_out(many(2), relay=relay)
    first, second = (handle.id for handle in fan.handles)
    fan_outs = FanOuts(relay.redis)
    end = {"result": "{}", "result_ttl_s": 60, "state": "done", "found": {"run": "{}"}}
    store(relay.redis, first, **end)
    relay.redis.hdel(record_key(first), "state")  # as after weeks, when it was begun again
    fan_outs.leave(fan.id, 0, "elsewhere", [(first, b"{}"), (second, b"{}")])
    assert fan_outs.close(fan.id, 0, all_begun=True) == 2

    store(relay.redis, first, **end)
    store(relay.redis, first, **end)

    assert fan_outs.close(fan.id, 0, all_begun=True) == 1
    store(relay.redis, second, **end)
    assert fan_outs.close(fan.id, 0, all_begun=True) == 0
    assert fan_outs.get(fan.id).ended == 2


def test_what_could_not_be_pushed_is_not_marked_as_sent(valkey, relay):
    fan = fan_out(many(1), relay=relay)
    relay.redis.set("theirs", "no list")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        FanOuts(relay.redis).send_once(fan.id, "then_sent", [("theirs", b"{}")])
    relay.redis.delete("theirs")

    sent = [FanOuts(relay.redis).send_once(fan.id, "then_sent", [("theirs", b"{}")]) for _ in range(2)]

    assert sent == [True, False]
    assert relay.redis.llen("theirs") == 1


def test_what_left_its_chunk_as_its_fan_out_was_cancelled_is_cancelled_all_the_same(inside, valkey, relay):
    fan = fan_out(many(2), relay=relay)
    outside, fresh = fan.handles
    store = FanOuts(relay.redis)
    fan.cancel()
    store.leave(fan.id, 0, "elsewhere", [(outside.id, b"{}")])  # and here its worker dies

    assert inside.to_begin(store.begin(fan.id, 0)) == []

    assert fresh.state == "cancelled"
    assert relay.redis.zscore("dagrelay:cancelled", outside.id)
    assert outside.record().cancel_by == "tests@here"


def test_the_run_of_a_part_that_is_in_the_making_may_be_stopped_once_its_fan_out_is_cancelled(valkey, relay):
    fan = fan_out(many(2), relay=relay)
    made, other = (handle.id for handle in fan.handles)
    assert not relay.waits.being_stopped(made)

    fan.cancel()
    store(relay.redis, other, result="{}", result_ttl_s=60, state="done", found={})

    assert relay.waits.being_stopped(made)
    assert not relay.waits.being_stopped(other)  # its run is what it ended in


@pytest.fixture
def connected(inside: ModuleType, airflow: FakeAirflow, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The same, with two connections to the test's Airflow."""
    environ = {"AIRFLOW_CONN_DEFAULT": airflow.conn_uri, "AIRFLOW_CONN_OTHER": airflow.conn_uri}
    given = replace(settings(), connections=read_connections(environ)[0])
    monkeypatch.setattr(inside, "settings", lambda: given)
    monkeypatch.setattr(posting, "_senders", {})
    monkeypatch.setattr(clients, "_clients", {})
    return inside


def start_all(
    inside: ModuleType, relay: RelayClient, fan: FanOut, until: float = math.inf
) -> dict[str, bytes]:
    """Start a fan-out's first chunk; return the messages that left it."""
    task = SimpleNamespace(request=SimpleNamespace(id=chunk_id(fan.id, 0)))
    store = FanOuts(relay.redis)
    relay.redis.delete("triggers")
    items = inside.to_begin(store.begin(fan.id, 0))
    inside.start_some(task, store, fan.id, 0, items, again=False, until=until)
    left = relay.redis.lrange("triggers", 0, -1)
    return {json.loads(message)["headers"]["id"]: message for message in left}


def test_what_nobody_foresaw_in_one_request_leaves_the_others_as_they_are(
    connected, valkey, relay, airflow, monkeypatch
):
    real = ManySender.send

    async def send(self: ManySender, request: HttpRequest) -> HttpResponse:
        answer = await real(self, request)
        if b'"n":1' in (request.body or b"").replace(b" ", b""):
            raise KeyError("nobody foresaw this")
        return answer

    monkeypatch.setattr(ManySender, "send", send)
    fan = fan_out(many(3), relay=relay)

    left = start_all(connected, relay, fan)

    assert [one.state for one in fan.handles] == ["done", "accepted", "done"]
    assert list(left) == [fan.handles[1].id]
    assert fan.handles[1].record().unsure


def test_where_a_chunk_cannot_be_posted_at_all_its_requests_leave_it(
    connected, valkey, relay, airflow, monkeypatch
):
    monkeypatch.setattr(ManySender, "__init__", lambda *_, **__: 1 / 0)
    fan = fan_out(many(3), relay=relay)

    left = start_all(connected, relay, fan)

    assert set(left) == {one.id for one in fan.handles}
    assert not any(one.record().unsure for one in fan.handles)


def test_what_one_airflow_made_is_written_before_the_next_is_asked(
    connected, valkey, relay, airflow, monkeypatch
):
    fan = fan_out([*many(2), *many(2, connection="other")], relay=relay)
    real, seen = ManySender.send, []

    async def send(self: ManySender, request: HttpRequest) -> HttpResponse:
        seen.append([one.state for one in fan.handles])
        return await real(self, request)

    monkeypatch.setattr(ManySender, "send", send)

    assert start_all(connected, relay, fan) == {}
    assert seen == [["accepted"] * 4] * 2 + [["done", "done", "accepted", "accepted"]] * 2


def test_once_its_time_is_over_a_chunk_asks_no_airflow_any_more(connected, valkey, relay, airflow):
    fan = fan_out([*many(2), *many(2, connection="other")], relay=relay)

    left = start_all(connected, relay, fan, until=time.monotonic())

    assert left == {}
    assert [letter for *_, letter in FanOuts(relay.redis).begin(fan.id, 0).items] == ["f"] * 4
    assert not airflow.runs


def test_where_each_failure_counts_a_chunk_whose_time_is_over_comes_back_for_the_rest(
    relay, airflow, start_worker, tmp_path
):
    tmp_path.joinpath("hurried.py").write_text("import tasks.fan_out as f; f.CHUNK_BUDGET_S = 0.3")
    airflow.late_s, airflow.fault = 0.5, lambda *_: "late"
    fan = fan_out(many(12), on_error="stop", relay=relay)
    worker = start_worker(options=("-I", "hurried"), PYTHONPATH=str(tmp_path))

    assert {one.state for one in fan.get(timeout=60)} == {"done"}
    until(lambda: "its next turn" in worker.text())
    assert set(airflow.posts.values()) == {1}


def test_outcomes_too_large_together_are_told_without_what_tasks_returned(inside, valkey, relay, monkeypatch):
    fan = fan_out(many(300), relay=relay)
    for number, handle in enumerate(fan.handles):
        run = json.dumps({"dag_run_id": f"r{number}", "result": "x" * 1000})
        store(relay.redis, handle.id, result="{}", result_ttl_s=60, state="done", found={"run": run})
    whole = inside.told_outcomes(FanOuts(relay.redis), fan.id, 300)
    monkeypatch.setattr(inside, "MAX_OUTCOMES_BYTES", 300_000)
    all_at_once = Mock(side_effect=AssertionError("read all together"))
    monkeypatch.setattr(Redis, "hgetall", all_at_once)

    told = inside.told_outcomes(FanOuts(relay.redis), fan.id, 300)

    assert {len(one["run"]["result"]) for one in whole} == {1000}
    assert [one["run"] for one in told] == [{"dag_run_id": f"r{n}", "result": None} for n in range(300)]


def test_an_unknown_outcome_that_is_corrected_in_time_is_told_corrected(valkey, relay):
    fan = fan_out(many(2), relay=relay)
    first = fan.handles[0]
    unknown = {"error": "OutcomeUnknown", "error_args": "[]", "reason": "no answer"}
    store(relay.redis, first.id, result="{}", result_ttl_s=60, state="failed", found=unknown)
    outcomes = FanOuts(relay.redis).outcomes(fan.id, 2)
    assert (outcomes[0]["state"], outcomes[0]["error"], outcomes[1]) == ("failed", "OutcomeUnknown", None)

    run = {"run": json.dumps({"dag_run_id": "r"})}
    store(relay.redis, first.id, result="{}", result_ttl_s=60, state="done", found=run, correct=True)

    assert FanOuts(relay.redis).outcomes(fan.id, 2)[0]["run"] == {"dag_run_id": "r"}
    state = FanOuts(relay.redis).get(fan.id)
    assert (state.ended, state.failed) == (1, 0)


def test_a_call_that_dies_half_way_accepts_nothing_and_leaves_nothing_for_ever(valkey, relay, monkeypatch):
    real = Redis.execute_command

    def refuse(self: Redis, *args: Any, **options: Any) -> Any:
        if args[0] in ("EVALSHA", "EVAL"):  # the last script, which accepts it all
            raise ConnectionError("gone")
        return real(self, *args, **options)

    monkeypatch.setattr(Redis, "execute_command", refuse)
    with pytest.raises(BrokerUnavailable):
        fan_out(many(450), relay=relay)
    monkeypatch.undo()

    keys = relay.redis.keys("*")
    assert len(keys) == 451
    assert all(relay.redis.ttl(key) > 0 for key in keys)
    assert relay.redis.llen("triggers") == 0


def test_large_confs_come_in_smaller_chunks(valkey, relay):
    request = {"dag_id": "d", "conf": {"filling": "x" * 100_000}, "conf_by": "value"}
    fan = fan_out([request] * 25, relay=relay)

    state = FanOuts(relay.redis).get(fan.id)
    assert (state.total, state.chunks) == (25, 3)
    sizes = [len(relay.redis.hget(f"{fan_out_key(fan.id)}:requests", str(n))) for n in range(3)]
    assert max(sizes) < 1_100_000


def test_nothing_of_a_fan_out_is_left_once_its_records_expire(relay, airflow, worker):
    fan = fan_out(many(3), relay=relay)
    fan.get(timeout=60)
    until(lambda: not relay.redis.exists(f"{fan_out_key(fan.id)}:outcomes"))
    watched(relay, fan)
    until(lambda: not relay.redis.hexists("dagrelay:parked", watch_id(fan.id)))

    names = {fan.id, *(handle.id for handle in fan.handles), chunk_id(fan.id, 0)}
    keys = [key for key in map(bytes.decode, relay.redis.keys("*")) if any(name in key for name in names)]
    assert keys
    assert [key for key in keys if relay.redis.ttl(key) < 0] == []


def dagrelay(valkey: Valkey, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "producers.cli", "fan-out", *args],
        input=stdin,
        env=clean_env(DAGRELAY_REDIS_URL=valkey.url, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_shows_progress_and_tells_each_outcome(valkey, relay, airflow, worker, tmp_path):
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(5)) + "\n")

    told = dagrelay(
        valkey,
        "daily_sales",
        "--conf-file",
        str(file),
        "--until-created",
        "--then",
        "host.noted",
        "--then-queue",
        "n",
    )

    assert told.returncode == 0, told.stderr
    outcomes = [json.loads(line) for line in told.stdout.splitlines()]
    assert [airflow.runs["daily_sales", one["dag_run_id"]]["conf"]["n"] for one in outcomes] == list(range(5))
    assert "ended" in told.stderr
    assert json.loads(relay.redis.lindex("n", 0))["headers"]["task"] == "host.noted"


def test_the_command_ends_with_one_if_any_failed(valkey, airflow, worker):
    airflow.rejecting["strict"] = (400, {"detail": "a value does not fit"})

    told = dagrelay(valkey, "strict", "--conf-file", "-", "--until-created", stdin='{"n": 1}\n')

    assert told.returncode == 1
    assert json.loads(told.stdout)["error"] == "RequestRejected"


def test_the_command_prints_the_id_of_what_it_does_not_wait_for(valkey, relay, worker, airflow):
    told = dagrelay(
        valkey, "daily_sales", "--conf-file", "-", "--key-prefix", "k", stdin='{"n": 1}\n\n{"n": 2}\n'
    )

    assert told.returncode == 0, told.stderr
    until(lambda: relay.handle(told.stdout.strip()).state == "done")
    assert {run_id for _, run_id in airflow.runs} == {"relay__k-1", "relay__k-3"}


@pytest.mark.parametrize(
    ("stdin", "words"),
    [('{"n": 1}\n{"n": secret\n', "line 2: is no JSON"), ("[1]\n", "line 1: a conf is a JSON object")],
)
def test_the_command_tells_which_line_is_wrong_and_not_what_it_holds(stdin, words, valkey):
    told = dagrelay(valkey, "daily_sales", "--conf-file", "-", stdin=stdin)

    assert told.returncode == 65
    assert words in told.stderr
    assert "secret" not in told.stderr
