"""Workers and the way to an Airflow: how much they ask of it at once, and what becomes of what waits."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from producers.contract import TriggerRequest
from producers.errors import GaveUp, OutcomeUnknown
from producers.fan_out import fan_out
from producers.stores.lines import Lines, line_key, slots_key
from tests.fake_airflow import FakeAirflow
from tests.integration.test_trigger import until
from tests.standing import stand_still


def requests(count: int, name: str = "k", **fields: Any) -> list[TriggerRequest]:
    return [TriggerRequest("daily_sales", {"n": n}, key=f"{name}{n}", **fields) for n in range(count)]


@pytest.fixture
def lines(relay) -> Lines:
    return Lines(relay.redis)


@pytest.fixture
def other() -> Iterator[FakeAirflow]:
    """Another Airflow."""
    with FakeAirflow() as airflow:
        yield airflow


def ended(handles: list[Any], timeout: float = 60) -> list[Any]:
    return [handle.get(timeout=timeout) for handle in handles]


def test_two_workers_together_never_ask_more_at_once_than_the_connection_says(relay, airflow, start_worker):
    """Each of them has threads for all of it, and both go by the same slots; nothing is left behind."""
    airflow.delay_s = 0.01
    uri = f"{airflow.conn_uri}/?max_in_flight=3&api_workers=2"
    for name in ("w1", "w2"):
        start_worker(name=name, connections={"default": uri})
    handles = relay.enqueue_many(requests(300)) + [
        relay.enqueue(one) for one in requests(20, "waited", wait=True)
    ]
    fan = fan_out(requests(100, "fan"), relay=relay)

    runs = ended(handles[:300])
    outcomes = fan.get(timeout=60)
    waiting = [("daily_sales", f"relay__waited{n}") for n in range(20)]
    until(lambda: all(run in airflow.runs for run in waiting))
    for run in waiting:
        airflow.runs[run]["state"] = "success"
    waited = ended(handles[300:])

    assert 3 <= airflow.most_in_flight <= 6
    assert all(run.created for run in runs)
    assert {one.state for one in outcomes} == {"done"}
    assert {run.state for run in waited} == {"success"}
    assert set(airflow.posts.values()) == {1}
    assert len(airflow.runs) == 420
    until(lambda: Lines(relay.redis).state("default").in_flight == 0)
    assert Lines(relay.redis).state("default").waiting == 0
    assert [one.task for one in relay.waits.parked()] == ["tasks.watch_fan_out"]
    assert not relay.redis.keys("dagrelay:held:drain-*")


def test_a_frozen_airflow_holds_up_no_other(relay, airflow, other, start_worker, lines):
    airflow.fault, airflow.late_s = lambda *_: "late", 60.0
    connections = {
        "default": f"{airflow.conn_uri}/?read_timeout_s=8&timed_out_slot_s=1",
        "other": other.conn_uri,
    }
    start_worker(connections=connections, DAGRELAY_WORKER_CONCURRENCY="6")
    stuck = relay.enqueue_many(requests(60))
    until(lambda: lines.state("default").in_flight + lines.state("default").waiting >= 10)

    quick = relay.enqueue_many(requests(60, connection="other"))

    assert all(run.created for run in ended(quick, 60))
    assert not any(handle.record().ended for handle in stuck)


def test_the_requests_of_a_killed_workers_slots_are_made_by_another(relay, airflow, start_worker, lines):
    """It holds every slot when it is killed; the rest of the line goes on within seconds."""
    airflow.fault, airflow.late_s = lambda *_: "late", 60.0
    first = start_worker(name="w1", DAGRELAY_VISIBILITY_TIMEOUT_S="5")
    handles = relay.enqueue_many(requests(40))
    until(lambda: lines.state("default").in_flight == 8)
    first.kill()
    airflow.fault = lambda *_: "answer"
    start_worker(name="w2", DAGRELAY_VISIBILITY_TIMEOUT_S="5")

    until(lambda: sum(handle.record().ended for handle in handles) >= 30, 60)

    runs = ended(handles)
    assert {run.dag_run_id for run in runs} == {f"relay__k{n}" for n in range(40)}
    assert all(run.created for run in runs)


def test_an_outage_stops_the_line_and_counts_no_attempts_of_what_waits(relay, airflow, start_worker, lines):
    worker = start_worker()
    ended([relay.enqueue(TriggerRequest("daily_sales"))])
    airflow.stop()
    handles = relay.enqueue_many(requests(50))
    until(lambda: lines.state("default").breaker == "open")
    until(lambda: lines.state("default").waiting >= 20)
    late = relay.enqueue(TriggerRequest("daily_sales", key="late"))
    until(lambda: late.state == "waiting")
    assert "to answer again" in late.record().waits_for or "its turn" in late.record().waits_for

    airflow.start()

    assert len(ended([*handles, late], 30)) == 51
    assert late.record().attempts == 1
    assert sum(handle.record().attempts for handle in handles) < 50 + 40
    text = worker.text()
    assert text.count("airflow does not answer, its requests wait") >= 1
    assert "airflow answers" in text
    assert {airflow.posts[key] for key in airflow.runs} == {1}


def test_what_waits_in_line_ends_when_its_time_is_over(relay, airflow, start_worker, lines):
    airflow.stop()
    start_worker()
    lines.hold("default", "new database")
    held = relay.enqueue(TriggerRequest("daily_sales", key="held", give_up_after_s=1))
    until(lambda: held.state == "waiting")
    time.sleep(1.2)  # longer than it has; held time does not count
    assert not held.record().ended
    lines.release("default")

    with pytest.raises(GaveUp, match="no run was made"):
        held.get(timeout=60)


def test_one_whose_answer_was_lost_and_whose_time_is_over_in_line_says_so(relay, airflow, start_worker):
    start_worker(connections={"default": f"{airflow.conn_uri}/?max_in_flight=1"})
    airflow.fault, airflow.silent = lambda *_: "drop", True
    handle = relay.enqueue(TriggerRequest("daily_sales", key="k", give_up_after_s=3))

    with pytest.raises(OutcomeUnknown):
        handle.get(timeout=60)


def test_a_higher_priority_goes_first(relay, airflow, start_worker, lines):
    start_worker(connections={"default": f"{airflow.conn_uri}/?max_in_flight=1"})
    ended([relay.enqueue(TriggerRequest("daily_sales", key="first"))])
    lines.hold("default", "until all have come")
    handles = [
        relay.enqueue(TriggerRequest("daily_sales", key=f"p{priority}", priority=priority))
        for priority in (5, 0, 9, 3, 7)
    ]
    until(lambda: lines.state("default").waiting == 5)

    lines.release("default")
    ended(handles)

    order = [run_id for _, run_id in airflow.runs]
    assert order[1:] == ["relay__p9", "relay__p7", "relay__p5", "relay__p3", "relay__p0"]


def test_a_long_line_is_drained_and_what_is_not_plain_has_its_turn_in_it(relay, airflow, start_worker, lines):
    """Callbacks, waits, conflicts, bad requests among hundreds of plain ones: each ends as it would alone."""
    airflow.delay_s = 0.002
    airflow.make("daily_sales", "relay__k7", conf={"n": "another"})
    airflow.missing.add("nowhere")
    worker = start_worker(
        connections={"default": f"{airflow.conn_uri}/?max_in_flight=2"}, DAGRELAY_MISSING_GRACE_S="0"
    )
    plain = relay.enqueue_many(requests(400))
    odd = [
        relay.enqueue(TriggerRequest("daily_sales", key="waited", wait=True)),
        relay.enqueue(TriggerRequest("nowhere", key="missing")),
    ]
    until(lambda: ("daily_sales", "relay__waited") in airflow.runs, 60)
    airflow.runs["daily_sales", "relay__waited"]["state"] = "success"

    errors = {}
    for n, handle in enumerate(plain):
        try:
            assert handle.get(timeout=60).created
        except Exception as exc:  # noqa: BLE001 - which, is what this is about
            errors[n] = type(exc).__name__
    assert errors == {7: "RunConflict"}
    assert odd[0].get(timeout=60).state == "success"
    with pytest.raises(Exception, match="nowhere"):
        odd[1].get(timeout=60)
    assert airflow.most_in_flight <= 2
    assert worker.text().count("outcome=started") >= 390
    assert all(handle.record().attempts == 1 for n, handle in enumerate(plain) if n != 7)


def test_a_backlog_goes_into_the_line_and_not_through_celery_first(relay, airflow, start_worker, lines):
    airflow.delay_s = 1.0
    handles = relay.enqueue_many(requests(60))

    worker = start_worker(
        connections={"default": f"{airflow.conn_uri}/?max_in_flight=2"},
        DAGRELAY_WORKER_CONCURRENCY="16",
        DAGRELAY_LOG_LEVEL="DEBUG",
    )

    until(lambda: lines.state("default").waiting + len(airflow.runs) >= 50)
    received = [line for line in worker.text().splitlines() if line.endswith("] received")]
    assert 1 <= len(received) <= 8  # it was one for each thread, and then for all
    airflow.delay_s = 0.0
    ended(handles)


def test_a_token_that_has_expired_is_renewed_while_a_line_is_drained(relay, airflow, start_worker, lines):
    airflow.delay_s = 0.005
    start_worker(connections={"default": f"{airflow.conn_uri}/?max_in_flight=2"})
    handles = relay.enqueue_many(requests(300))
    until(lambda: len(airflow.runs) > 50)
    airflow.token = "another"

    assert all(run.created for run in ended(handles))
    assert set(airflow.posts.values()) == {1}
    assert airflow.logins <= 4


def test_answers_lost_while_a_line_is_drained_make_no_second_run(relay, airflow, start_worker):
    airflow.fault = lambda number, *_: (
        ("drop", "500", "503", "reset")[number % 4] if number % 9 == 0 else "answer"
    )
    start_worker(connections={"default": f"{airflow.conn_uri}/?max_in_flight=2"}, DAGRELAY_RETRY_CAP_S="0.3")
    handles = relay.enqueue_many(requests(200))

    assert all(run.created for run in ended(handles))
    assert len(airflow.runs) == 200


@pytest.mark.parametrize("moment", [0.3, 0.6, 0.9])
def test_a_worker_killed_while_it_drains_leaves_one_run_for_each(relay, airflow, start_worker, moment):
    airflow.delay_s = 0.1
    connections = {"default": f"{airflow.conn_uri}/?max_in_flight=4"}
    first = start_worker(name="w1", connections=connections, DAGRELAY_VISIBILITY_TIMEOUT_S="5")
    handles = relay.enqueue_many(requests(300))
    until(lambda: relay.redis.keys("dagrelay:held:drain-*"))
    time.sleep(moment)  # not waited for: any moment will do
    first.kill()
    before = len(airflow.runs)
    assert before < 300, "killed too late to prove anything"
    airflow.delay_s = 0.01
    start_worker(name="w2", connections=connections, DAGRELAY_VISIBILITY_TIMEOUT_S="5")

    runs = ended(handles)

    assert {run.dag_run_id for run in runs} == {f"relay__k{n}" for n in range(300)}
    assert all(run.created for run in runs)
    assert len(airflow.runs) == 300


def test_a_worker_that_stops_while_it_drains_puts_back_what_it_has_not_begun(relay, airflow, start_worker):
    airflow.delay_s = 0.02
    connections = {"default": f"{airflow.conn_uri}/?max_in_flight=4"}
    first = start_worker(name="w1", connections=connections)
    handles = relay.enqueue_many(requests(300))
    until(lambda: relay.redis.keys("dagrelay:held:drain-*"))

    assert first.stop() == 0

    assert not relay.redis.keys("dagrelay:held:drain-*")
    made = len(airflow.runs)
    done = sum(handle.record().state == "done" for handle in handles)
    assert done == made < 300
    start_worker(name="w2", connections=connections)
    assert all(run.created for run in ended(handles))
    assert set(airflow.posts.values()) == {1}


def test_cancelled_in_a_long_line_is_never_asked_for(relay, airflow, start_worker, lines):
    lines.announce("default", 2)
    lines.hold("default", "until all have come")
    start_worker(connections={"default": f"{airflow.conn_uri}/?max_in_flight=2"})
    handles = relay.enqueue_many(requests(50))
    until(lambda: lines.state("default").waiting == 50)
    for handle in handles[::5]:
        handle.cancel()
    until(lambda: all(handle.state == "cancelled" for handle in handles[::5]))

    lines.release("default")
    ended([handle for n, handle in enumerate(handles) if n % 5])

    assert len(airflow.runs) == 40
    assert lines.state("default").waiting == 0


def test_a_fan_out_in_line_gives_up_what_is_over_its_time_and_makes_the_rest(
    relay, airflow, start_worker, lines
):
    lines.announce("default", 2)
    lines.hold("default", "until some are over their time")
    start_worker(connections={"default": f"{airflow.conn_uri}/?max_in_flight=2"})
    fan = fan_out(
        [*requests(3), *requests(3, "patient", give_up_after_s=60)], on_error="continue", relay=relay
    )
    until(lambda: lines.state("default").waiting)
    assert not airflow.runs

    lines.release("default")

    assert [one.state for one in fan.get(timeout=60)] == ["done"] * 6
    assert airflow.most_in_flight <= 2


def test_the_commands_hold_and_release_a_connection(valkey, relay, airflow, start_worker, dagrelay):
    start_worker()
    ended([relay.enqueue(TriggerRequest("daily_sales"))])

    assert dagrelay("hold", "elsewhere").returncode == 1
    held = dagrelay("hold", "default", "--reason", "new database")
    assert (held.returncode, held.stdout.split(";")[0]) == (0, "default is held")
    handle = relay.enqueue(TriggerRequest("daily_sales", key="k"))
    until(lambda: handle.state == "waiting")
    shown = dagrelay("airflows").stdout
    assert "new database" in shown
    (state,) = map(json.loads, dagrelay("airflows", "-o", "json").stdout.splitlines())
    assert (state["connection"], state["held"], state["waiting"]) == ("default", "maintenance", 1)
    assert "dagrelay release default" in dagrelay("status", handle.id).stdout

    released = dagrelay("release", "default")

    assert (released.returncode, released.stdout) == (0, "default is released; 0 wait for their turn\n") or (
        "default is released" in released.stdout
    )
    assert handle.get(timeout=60).created
    again = dagrelay("release", "default")
    assert (again.returncode, "default is not held" in again.stderr) == (1, True)


def test_slots_of_a_stopped_process_run_out_and_its_late_answers_do_no_harm(
    relay, airflow, start_worker, lines
):
    """A worker that stands still (a paused machine) loses its slots, goes on, and all is as it should be."""
    airflow.delay_s = 0.2
    first = start_worker(name="w1", connections={"default": f"{airflow.conn_uri}/?max_in_flight=2"})
    handles = relay.enqueue_many(requests(30))
    until(lambda: lines.state("default").in_flight == 2)
    stand_still(first.pid)
    resume = threading.Timer(8, lambda: os.kill(first.pid, signal.SIGCONT))
    resume.start()
    start_worker(name="w2", connections={"default": f"{airflow.conn_uri}/?max_in_flight=2"})

    runs = ended(handles)
    resume.join()

    assert all(run.created for run in runs)
    assert len(airflow.runs) == 30
    until(lambda: not relay.redis.exists(slots_key("default"), line_key("default")))


@pytest.fixture
def dagrelay(valkey) -> Callable[..., Any]:
    """The command `dagrelay`."""
    import subprocess
    import sys

    from local.process import ROOT, clean_env

    env = clean_env(DAGRELAY_REDIS_URL=valkey.url, DAGRELAY_CLIENT_NAME="tests@here")

    def run(*argv: str) -> Any:
        command = [sys.executable, "-m", "producers.cli", *argv]
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)

    return run
