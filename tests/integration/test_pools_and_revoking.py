"""Celery's own ways with our tasks: its pools, and revoking a request that waits."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from celery import Celery

from producers.contract import TriggerRequest
from producers.errors import OutcomeUnknown, RequestCancelled
from tests.integration.test_trigger import RUN, SALES, until


@pytest.fixture
def stock(valkey):
    """A stock Celery app on the same Redis: what Flower and an operator use."""
    app = Celery("operator", broker=valkey.url, backend=valkey.url, set_as_current=False)
    yield app
    app.close()


@pytest.mark.parametrize("pool", ["processes", "threads", "solo"])
def test_every_pool_makes_one_run_of_a_lost_answer(pool, relay, airflow, start_worker):
    airflow.fault = lambda number, dag_id, run_id: "drop" if number == 1 else "answer"
    start_worker(options=("-P", pool, "-c", "2"))

    assert relay.enqueue(SALES).get(timeout=60).created
    assert list(airflow.runs) == [RUN]


def test_one_setting_goes_back_to_kombus_way_to_fetch_and_parking_stays(relay, airflow, start_worker):
    airflow.fault = lambda number, dag_id, run_id: "drop" if number == 1 else "answer"
    start_worker(DAGRELAY_FETCH="stock")

    later = relay.enqueue(TriggerRequest("daily_sales", key="k2"), countdown=3)

    assert relay.enqueue(SALES).get(timeout=60).created
    until(lambda: relay.redis.zcard("dagrelay:due"))
    assert later.get(timeout=60).created
    assert not relay.redis.keys("dagrelay:held:*")  # ours would have them there
    assert len(airflow.runs) == 2


def test_workers_that_speak_with_each_other_start_and_work(relay, airflow, start_worker, stock):
    """mingle and gossip are on by default: a worker asks the others when it starts, before its loop runs."""
    start_worker(name="w1", alone=False)
    start_worker(name="w2", alone=False)

    assert relay.enqueue(SALES).get(timeout=60).created
    assert len(stock.control.ping(timeout=2)) == 2


def test_a_killed_child_leaves_its_message_to_the_lease(relay, airflow, start_worker):
    """prefork: the pool's process is killed (as by the kernel, out of memory) in the midst of a trigger."""
    import os
    import signal
    import subprocess

    airflow.delay_s = 1.0
    worker = start_worker(options=("-P", "processes", "-c", "1"))
    handle = relay.enqueue(SALES)
    until(lambda: airflow.in_flight)
    children = subprocess.run(["pgrep", "-P", str(worker.pid)], capture_output=True, text=True, check=True)

    for child in children.stdout.split():
        os.kill(int(child), signal.SIGKILL)
    airflow.delay_s = 0.0

    assert handle.get(timeout=60).created
    assert list(airflow.runs) == [RUN]


def test_a_request_that_waits_can_be_revoked(relay, airflow, start_worker, stock):
    start_worker()
    handle = relay.enqueue(SALES, countdown=3600)
    until(lambda: relay.redis.zcard("dagrelay:due"))

    stock.control.revoke(handle.id)

    with pytest.raises(RequestCancelled, match="revoked"):
        handle.get(timeout=60)
    assert not airflow.posts
    assert handle.record().state == "cancelled"


def test_a_request_revoked_after_a_lost_answer_is_looked_for(relay, airflow, start_worker, stock):
    airflow.fault = lambda number, dag_id, run_id: "reset"
    start_worker(DAGRELAY_LOOK_UP_EVERY_S="1")
    handle = relay.enqueue(TriggerRequest("daily_sales", key="k1"))
    until(lambda: handle.record().unsure)

    stock.control.revoke(handle.id)
    until(handle.ready)
    assert handle.record().error == "OutcomeUnknown"
    with pytest.raises(OutcomeUnknown, match="after an answer was lost"):
        handle.get(timeout=5)
    airflow.make(*RUN, note=f"dagrelay task={handle.id} at=…")

    until(lambda: handle.state == "done")
    assert handle.get(timeout=5).created


@pytest.mark.parametrize("pool", ["processes", "threads"])
def test_from_every_pool_it_is_told_that_a_task_waits(pool, relay, start_worker, stock):
    start_worker(options=("-P", pool, "-c", "1"))
    told: list[dict[str, str]] = []
    with stock.connection_for_read() as connection:
        receiver = stock.events.Receiver(connection, handlers={"*": told.append})

        def listen() -> None:
            with suppress(TimeoutError, OSError):
                receiver.capture(limit=None, timeout=5, wakeup=False)

        listening = threading.Thread(target=listen, daemon=True)
        listening.start()
        try:
            until(lambda: told)  # a heartbeat
            handle = relay.enqueue(TriggerRequest("daily_sales", key="k", wait=True))
            (event,) = until(lambda: [each for each in told if each["type"] == "task-waiting-queued"])
        finally:
            receiver.should_stop = True
            listening.join(10)
    assert event["uuid"] == handle.id
    assert event["hostname"].startswith("w1@")
