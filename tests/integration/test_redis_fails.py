"""Redis full, read-only, cut off or gone while a worker works: what was accepted still ends, once."""

from __future__ import annotations

import threading
import time

import pytest
import redis

from producers.contract import TriggerRequest
from tests.integration.test_trigger import RUN, SALES, until


@pytest.fixture
def server(valkey):
    """A client for the server itself, to break it with."""
    with redis.Redis.from_url(valkey.url) as client:
        yield client


def full(server):
    server.config_set("maxmemory", "1mb")


def roomy(server):
    server.config_set("maxmemory", "0")


def read_only(server):
    server.execute_command("REPLICAOF", "127.0.0.1", "1")


def writable(server):
    server.execute_command("REPLICAOF", "NO", "ONE")


BREAK = {"full": (full, roomy), "read only": (read_only, writable)}


@pytest.mark.parametrize("how", BREAK)
def test_an_end_that_cannot_be_written_is_not_acknowledged(how, relay, airflow, start_worker, server):
    """The run is made, and Redis takes no writes when its end is to be written."""
    break_it, mend_it = BREAK[how]
    airflow.fault = lambda number, dag_id, run_id: "late"
    airflow.late_s = 1.0
    worker = start_worker()
    handle = relay.enqueue(SALES)
    until(lambda: airflow.runs)

    break_it(server)
    until(lambda: "not acknowledged" in worker.text())
    time.sleep(1)
    mend_it(server)

    run = handle.get(timeout=60)
    assert run.created
    assert list(airflow.runs) == [RUN]
    assert handle.record().state == "done"
    until(lambda: not server.exists("dagrelay:unacked"))


@pytest.mark.parametrize("how", BREAK)
def test_a_retry_that_cannot_be_published_is_not_acknowledged(how, relay, airflow, start_worker, server):
    """Airflow is down, the attempt fails, and Redis does not take the next one."""
    break_it, mend_it = BREAK[how]
    airflow.delay_s = 1.0
    airflow.fault = lambda number, dag_id, run_id: "503" if number == 1 else "answer"
    worker = start_worker()
    handle = relay.enqueue(SALES)
    until(lambda: airflow.in_flight)

    break_it(server)
    until(lambda: "not acknowledged" in worker.text())
    time.sleep(1)
    mend_it(server)

    assert handle.get(timeout=60).created
    assert list(airflow.runs) == [RUN]


def test_connections_that_are_cut_again_and_again_lose_nothing(relay, airflow, start_worker, server):
    airflow.delay_s = 0.02
    start_worker()
    stop = threading.Event()

    def cut() -> None:
        pause_s = 0.3
        while not stop.wait(pause_s):
            server.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            pause_s *= 1.1  # a busy machine may need longer to connect

    cutter = threading.Thread(target=cut)
    handles = [relay.enqueue(TriggerRequest("daily_sales", key=f"k{n}")) for n in range(100)]
    cutter.start()
    until(lambda: len(airflow.runs) == 100, timeout_s=60)
    stop.set()
    cutter.join()

    assert all(handle.get(timeout=60).created for handle in handles)
    assert len(airflow.runs) == 100


def test_a_redis_that_is_killed_and_started_again_loses_nothing(relay, airflow, start_worker, valkey):
    airflow.delay_s = 0.05
    start_worker()
    handles = [relay.enqueue(TriggerRequest("daily_sales", key=f"k{n}")) for n in range(100)]
    time.sleep(1.1)  # appendfsync everysec: the last second is what a dying machine loses
    valkey.kill()
    time.sleep(0.5)
    valkey.start()

    assert all(handle.get(timeout=60).created for handle in handles)
    assert len(airflow.runs) == 100
