"""Whatever fails, and whichever of several workers meets it: each accepted request has exactly one end.

Three workers whose clocks are a minute apart serve one Airflow behind a proxy that knows all faults of a
network. What `time.time`, `time.time_ns` and `datetime.now` tell in a worker is shifted (see `clock`), which
is what our code and Celery's go by; its monotonic clock and what C libraries ask for themselves are not.

`stack.account` is the test here: what it finds of a request is told there.
"""

from __future__ import annotations

import itertools
import re
import time
from datetime import datetime

import pytest

from local.process import ROOT
from tests.system.stack import Stack, only, until

CLOCK = ROOT / "tests" / "integration" / "redis_transport" / "clock"
SHIFTS_S = (-60, 0, 60)
FAULTS = ("drop", "502 after", "502", "503", "504", "429", "close", "reset")


@pytest.fixture(scope="module")
def folder(airflow, tmp_path_factory):
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def stack(airflow, folder):
    """The three workers (`stack.workers`) behind one proxy (`stack.front`), for all tests of this file."""
    made = Stack(airflow, folder)
    try:
        made.front = made.proxy()
        uri = made.front.conn_uri(airflow.username, airflow.password) + "?read_timeout_s=2&timed_out_slot_s=2"
        made.workers = [
            made.start_worker(uri, name=f"w{number}", PYTHONPATH=str(CLOCK), CLOCK_SHIFT_S=str(shift_s))
            for number, shift_s in enumerate(SHIFTS_S, 1)
        ]
        yield made
    finally:
        made.close()


@pytest.fixture
def proxy(stack):
    """The proxy, which lets everything pass until it is told otherwise."""
    stack.front.rule = lambda call: "pass"
    stack.front.calls.clear()
    return stack.front


def test_each_fault_of_a_network_and_clocks_a_minute_apart(stack, proxy, airflow):
    assert [clock_s(worker) for worker in stack.workers] == list(SHIFTS_S)
    faults, seen = itertools.cycle(one for fault in FAULTS for one in (fault, "pass")), set()

    def rule(call):
        if not call.makes_run or call.body in seen:
            return "pass"
        seen.add(call.body)
        return next(faults)

    proxy.rule = rule
    good = requests("faults", 2 * 2 * len(FAULTS))
    bad = [{**one, "dag_id": "strict", "conf": {"day": "never"}} for one in requests("bad", 4)]
    ids = stack.hand_over(*good, *bad)
    said = stack.outcomes(ids, 90)

    assert all(one["run"]["created"] for one in said[: len(good)])
    assert [one["error"] for one in said[len(good) :]] == ["RequestRejected"] * 4
    stack.account(ids, "quiet", "strict")
    met = [call.fault for call in proxy.made()]
    assert all(met.count(fault) >= 2 for fault in FAULTS)
    assert all(f"task_id={task_id}" in said_by(stack) for task_id in ids)


def test_an_api_that_freezes_and_is_killed_while_triggers_arrive(stack, proxy, airflow):
    caller = stack.call({"requests": requests("frozen", 40), "pause_s": 0.1, "get_timeout_s": None})
    try:
        until(lambda: answered(proxy) >= 3, "in the midst of it")
        with airflow.frozen_api():
            until(lambda: waiting(stack), "given up waiting for an answer")
        airflow.kill_api()
        ids = [one["id"] for one in stack.said(caller)]
        until(lambda: waiting(stack) >= 10, "waiting for Airflow")
        sure = [one for one in records(stack, "frozen-") if one["state"] == "waiting" and "unsure" not in one]
        cancelled = [one["task_id"] for one in sure[-2:]]
        assert [stack.dagrelay("cancel", task_id).returncode for task_id in cancelled] == [0, 0]
    finally:
        airflow.start_api()

    said = {one["id"]: one for one in stack.outcomes(ids, 90)}

    assert len(said) == 40
    assert [said.pop(task_id)["error"] for task_id in cancelled] == ["RequestCancelled"] * 2
    assert all(one["run"]["created"] for one in said.values())
    stack.account(ids, "quiet")


@only("3")
def test_airflow_without_its_database_for_a_while(stack, proxy, airflow):
    with airflow.without_database():
        ids = stack.hand_over(*requests("database", 20))
        until(lambda: waiting(stack) >= 5, "waiting for Airflow")
        assert 200 not in {call.status for call in proxy.made()}

    said = stack.outcomes(ids, 90)

    assert all(one["run"]["created"] for one in said)
    stack.account(ids, "quiet")


@only("3")
def test_answers_after_half_a_minute_and_a_redis_that_is_killed_meanwhile(stack, proxy, airflow):
    slow = ["late", "held back", "late", "held back"]
    proxy.rule = lambda call: slow.pop() if call.makes_run and slow else "pass"
    ids = stack.hand_over(*requests("slow", 4))
    until(lambda: not slow, "on their way")
    caller = stack.call({"requests": requests("redis", 40), "pause_s": 0.1, "get_timeout_s": None})
    until(lambda: len(records(stack, "redis-")) >= 3, "in the midst of it")

    stack.valkey.kill()
    time.sleep(1)  # so long it is away; callers are told within a second
    stack.valkey.start()

    ids += [one["id"] for one in stack.said(caller) if one["id"]]
    said = stack.outcomes(ids, 120)
    assert all(one["run"]["created"] for one in said)
    # Also when the requests that were held back have reached Airflow, after the runs were there.
    held_back = [call for call in proxy.made() if call.fault == "held back"]
    until(lambda: all(call.status for call in held_back), "come to Airflow at last")
    assert [call.status for call in held_back] == [409, 409]
    stack.account(ids, "quiet")

    # Those that Redis did not take go through when they are sent again, and those that it took are the same.
    again = stack.trigger(*requests("redis", 40))
    keyed = {run_id for run_id in airflow.run_ids("quiet") if run_id.startswith("relay__load-redis-")}
    assert len(keyed) == 40
    stack.account([*ids, *(one["id"] for one in again)], "quiet")


def requests(name, count):
    return [{"dag_id": "quiet", "key": f"load-{name}-{n}", "conf": {"n": n}} for n in range(count)]


def records(stack, name=""):
    """The records of requests of these tests, or of one of them."""
    keys = list(stack.redis.scan_iter(match="dagrelay:record:*", count=1000))
    pipe = stack.redis.pipeline(transaction=False)
    for key in keys:
        pipe.hgetall(key)
    found = [one | {"task_id": key.split(":")[2]} for key, one in zip(keys, pipe.execute(), strict=True)]
    return [one for one in found if one.get("key", "").startswith(f"load-{name}")]


def waiting(stack):
    """How many requests wait, for whatever."""
    return sum(one["state"] == "waiting" for one in records(stack))


def answered(proxy):
    return sum(call.status == 200 for call in proxy.made())


def said_by(stack):
    return "".join(worker.text() for worker in stack.workers)


def clock_s(worker):
    """By how many seconds a worker's clock is wrong, to the minute: its log's last line says it."""
    (*_, last) = re.finditer(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d", worker.text())
    told = datetime.fromisoformat(last[0]).timestamp()
    return round((told - worker.log.stat().st_mtime) / 60) * 60
