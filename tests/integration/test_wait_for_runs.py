"""`wait=True`: a trigger ends as its run does, and what waits for it waits in Redis."""

from __future__ import annotations

import time
from typing import Any

import pytest
from celery import Celery

from producers.contract import TriggerRequest
from producers.errors import (
    DagRunFailed,
    DagRunGone,
    DagRunOverdue,
    GaveUp,
    RequestCancelled,
    RequestRejected,
)
from producers.stores.waits import Waits
from tests.fake_airflow import FakeAirflow
from tests.integration.test_trigger import until

RUN = ("daily_sales", "relay__k1")


def request(key: str = "k1", **given: Any) -> TriggerRequest:
    return TriggerRequest("daily_sales", key=key, wait=True, **given)


def clear(airflow: FakeAirflow) -> None:
    """Have the run be cleared by another request, and run again."""
    run = airflow.runs[RUN]
    note = f"dagrelay clear=another was=2026-11-30T00:00:00+00:00\n{run['note']}"
    airflow.runs[RUN] = run | {"state": "running", "note": note}


@pytest.fixture
def waits(relay) -> Waits:
    return Waits(relay.redis)


@pytest.fixture
def parked(waits):
    """Wait until a request is parked, and return it."""
    return lambda handle: until(lambda: waits.get(handle.id))


def end(airflow, waits, handle, state: str = "success", run=RUN) -> None:
    """Have the run end, and wake the task as a look would."""
    airflow.runs[run]["state"] = state
    waits.wake([handle.id], {"state": state}, "test")


def test_a_run_that_ends_well_is_the_outcome_and_looks_see_it(relay, airflow, worker, waits, parked):
    handle = relay.enqueue(request())
    waiting = parked(handle)
    assert waiting.waits_for == "run relay__k1 of DAG daily_sales"
    assert waiting.next_look_at is not None
    record = handle.record()
    assert (record.state, record.run["dag_run_id"], record.seen) == ("waiting", "relay__k1", "queued")

    airflow.runs[RUN]["state"] = "running"
    until(lambda: handle.record().seen == "running")
    airflow.runs[RUN]["state"] = "success"
    run = handle.get(timeout=60)

    assert (run.state, run.created, run.result) == ("success", True, None)
    assert airflow.posts[RUN] == 1
    assert [words for _, words in waits.history(handle.id)][:2] == ["is running", "is success"]


def test_a_hundred_runs_are_followed_by_few_lists_and_each_is_asked_for_once(relay, airflow, worker):
    handles = relay.enqueue_many([request(f"k{n}") for n in range(100)])
    until(lambda: len(airflow.runs) == 100)
    began, lists = time.monotonic(), airflow.lists
    for n, run in enumerate(airflow.runs.values()):
        run["state"] = "failed" if n == 50 else "success"

    ended = [until(handle.ready) and handle.state for handle in handles]

    assert (ended.count("done"), ended.count("failed")) == (99, 1)
    assert airflow.lists - lists <= time.monotonic() - began + 2  # one a second at the most
    assert sum(airflow.gets.values()) <= 110  # each that ended was asked for by the task that waited


def test_what_a_task_returned_is_the_result(relay, airflow, worker, waits, parked):
    airflow.returned[*RUN, "say"] = {"rows": [1, 2.5, None, "ü"]}
    handle = relay.enqueue(request(result_from="say"))
    parked(handle)

    end(airflow, waits, handle)

    assert handle.get(timeout=60).result == {"rows": [1, 2.5, None, "ü"]}
    assert handle.record().run["result"] == {"rows": [1, 2.5, None, "ü"]}


def test_a_large_result_is_in_the_result_and_not_in_the_record_that_is_kept_for_weeks(
    relay, airflow, worker, waits, parked
):
    airflow.returned[*RUN, "say"] = "x" * 900_000
    handle = relay.enqueue(request(result_from="say"))
    parked(handle)

    end(airflow, waits, handle)

    assert handle.get(timeout=60).result == "x" * 900_000
    assert handle.record().run["dag_run_id"] == RUN[1]
    assert handle.record().run["result"] is None


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ("mapped", "result_from: .*mapped"),
        (None, "result_from: .*no task 'say'"),
        ("x" * 1_000_001, "result_from: .*1000003 bytes"),
    ],
    ids=["mapped", "unknown", "too large"],
)
def test_a_result_that_cannot_be_is_told_by_the_name_of_the_argument(returned, told, relay, airflow, worker):
    airflow.make(*RUN, state="success")
    if returned is not None:
        airflow.returned[*RUN, "say"] = returned

    with pytest.raises(RequestRejected, match=told):
        relay.enqueue(request(result_from="say")).get(timeout=60)


def test_an_airflow_that_is_away_when_the_run_has_ended_is_no_failure(relay, airflow, worker, waits, parked):
    airflow.returned[*RUN, "say"] = 42
    handle = relay.enqueue(request(result_from="say"))
    parked(handle)
    airflow.silent = True

    end(airflow, waits, handle)
    until(lambda: handle.record().attempts > 0)
    airflow.silent = False

    assert handle.get(timeout=60).result == 42


def test_what_expires_before_it_begins_does_not_expire_while_it_waits(relay, airflow, worker, waits, parked):
    handle = relay.enqueue(request(), expires=1)
    parked(handle)
    until(lambda: time.time() > handle.record().accepted_at + 1.1)

    end(airflow, waits, handle)

    assert handle.get(timeout=60).state == "success"


def test_a_failed_run_is_told_with_its_link(relay, airflow, worker, waits, parked):
    handle = relay.enqueue(request())
    parked(handle)

    end(airflow, waits, handle, "failed")

    with pytest.raises(DagRunFailed, match=r"relay__k1.*failed") as told:
        handle.get(timeout=60)
    assert told.value.url == f"{airflow.url}/dags/daily_sales/runs/relay__k1"
    assert handle.record().run["dag_run_id"] == "relay__k1"


def test_a_deleted_run_is_told(relay, airflow, worker, parked):
    handle = relay.enqueue(request())
    parked(handle)

    del airflow.runs[RUN]

    with pytest.raises(DagRunGone, match="does not exist any more"):
        handle.get(timeout=60)


def test_a_run_that_was_cleared_is_waited_for_again_until_the_same_deadline(
    relay, airflow, worker, waits, parked
):
    handle = relay.enqueue(request())
    first = parked(handle)

    waits.wake([handle.id], {"state": "success"}, "test")  # and it was cleared before the task could ask
    second = until(lambda: (found := waits.get(handle.id)) and found.epoch > first.epoch and found)

    assert second.due_at == pytest.approx(first.due_at, abs=1e-5)
    assert not waits.observations(handle.id)
    assert "had ended, and is queued again" in [words for _, words in waits.history(handle.id)]
    end(airflow, waits, handle)
    assert handle.get(timeout=60).state == "success"


@pytest.mark.parametrize("stop_run", [False, True])
def test_the_deadline_ends_the_waiting_and_the_run_only_where_asked(stop_run, relay, airflow, worker):
    handle = relay.enqueue(request(wait_timeout_s=0.5, stop_run=stop_run))

    with pytest.raises(DagRunOverdue, match="set to failed" if stop_run else "it goes on") as told:
        handle.get(timeout=60)
    assert told.value.after_s == 0.5
    assert told.value.stopped is stop_run
    assert airflow.runs[RUN]["state"] == ("failed" if stop_run else "queued")


def test_a_run_that_another_request_has_cleared_is_not_stopped_at_the_deadline_of_the_first(
    relay, airflow, worker, parked
):
    handle = relay.enqueue(request(wait_timeout_s=3, stop_run=True))
    parked(handle)
    clear(airflow)

    with pytest.raises(DagRunOverdue, match="it goes on"):
        handle.get(timeout=60)
    assert airflow.runs[RUN]["state"] == "running"


def test_a_run_that_somebody_else_made_is_not_stopped_by_one_who_joined_it(relay, airflow, worker):
    airflow.make(*RUN, state="running")
    handle = relay.enqueue(request(wait_timeout_s=0.5, stop_run=True))

    with pytest.raises(DagRunOverdue, match="it goes on"):
        handle.get(timeout=60)
    assert airflow.runs[RUN]["state"] == "running"


def test_an_end_at_the_deadline_counts(relay, airflow, worker, waits, parked):
    """The looks see nothing of it: the last question does."""
    handle = relay.enqueue(request(wait_timeout_s=0.7))
    parked(handle)
    airflow.runs[RUN]["state"] = "success"

    assert handle.get(timeout=60).state == "success"


@pytest.mark.parametrize("stop_run", [False, True])
def test_a_cancel_ends_the_waiting_and_the_run_only_where_asked(
    stop_run, relay, airflow, worker, waits, parked
):
    handle = relay.enqueue(request(stop_run=stop_run))
    other = relay.enqueue(request("k2"))
    parked(handle)
    parked(other)

    waits.cancel(handle.id, "test")

    with pytest.raises(RequestCancelled):
        handle.get(timeout=60)
    if stop_run:
        until(lambda: airflow.runs[RUN]["state"] == "failed")
    # By then a stop that nobody had asked for would be there too.
    end(airflow, waits, other, run=("daily_sales", "relay__k2"))
    other.get(timeout=60)
    assert airflow.runs[RUN]["state"] == ("failed" if stop_run else "queued")
    assert waits.size() == 0


@pytest.mark.parametrize("cleared", [False, True])
def test_a_stop_waits_for_an_airflow_that_is_away_and_leaves_alone_what_another_request_has_cleared(
    cleared, relay, airflow, worker, waits, parked
):
    handle = relay.enqueue(request(stop_run=True))
    parked(handle)
    airflow.silent = True
    waits.cancel(handle.id, "test")
    with pytest.raises(RequestCancelled):
        handle.get(timeout=60)
    if cleared:
        clear(airflow)

    airflow.silent = False

    if cleared:
        until(lambda: f"another has cleared it since task_id={handle.id}" in worker.text())
    else:
        until(lambda: airflow.runs[RUN]["state"] == "failed")
    assert airflow.runs[RUN]["state"] == ("running" if cleared else "failed")


def again(**given: Any) -> TriggerRequest:
    """The request of one who wants the run of the first to run again."""
    return request(if_exists="clear", **given)


def test_a_run_that_is_being_stopped_runs_again_for_the_next_who_does_not_join_it_before(
    relay, airflow, worker, waits, parked
):
    first = relay.enqueue(request(stop_run=True))
    parked(first)
    airflow.stops.clear()
    waits.cancel(first.id, "test")
    second = relay.enqueue(again())

    words = f"is being stopped, for request {first.id}"
    until(lambda: words in (second.record().reason or ""))
    assert airflow.runs[RUN]["state"] == "queued"
    airflow.stops.set()

    assert until(lambda: second.record().run)["cleared"] is True
    assert airflow.cleared[RUN] == 1
    end(airflow, waits, second)
    assert second.get(timeout=60).state == "success"
    assert not waits.being_stopped(first.id)


def test_a_run_that_is_overdue_and_being_stopped_runs_again_for_the_next(relay, airflow, worker, waits):
    airflow.stops.clear()
    first = relay.enqueue(request(stop_run=True, wait_timeout_s=0.5))
    until(lambda: waits.being_stopped(first.id))
    second = relay.enqueue(again())
    until(lambda: f"is being stopped, for request {first.id}" in (second.record().reason or ""))

    airflow.stops.set()

    assert until(lambda: second.record().run)["cleared"] is True
    with pytest.raises(DagRunOverdue, match="set to failed"):
        first.get(timeout=60)
    end(airflow, waits, second)
    assert second.get(timeout=60).state == "success"


@pytest.mark.parametrize("stop_run", [False, True])
def test_who_was_cancelled_and_leaves_its_run_alone_holds_nobody_up(
    stop_run, relay, airflow, worker, waits, parked
):
    first = relay.enqueue(request(stop_run=stop_run))
    parked(first)
    if stop_run:
        clear(airflow)
    waits.cancel(first.id, "test")
    with pytest.raises(RequestCancelled):
        first.get(timeout=60)

    second = relay.enqueue(again())
    assert until(lambda: second.record().run)["cleared"] is False
    end(airflow, waits, second)
    assert second.get(timeout=60).state == "success"


def test_a_run_that_another_has_cleared_since_is_joined_whatever_becomes_of_the_first(
    relay, airflow, worker, waits
):
    airflow.make(*RUN, state="running", note="dagrelay task=gone at=2026-11-30T00:00:00+00:00")
    waits.learn("gone", stopping=f"{time.time() + 3600:.3f}")
    clear(airflow)

    second = relay.enqueue(again())

    assert until(lambda: second.record().run)["cleared"] is False
    assert "is being stopped" not in worker.text().partition(second.id)[2]
    end(airflow, waits, second)
    assert second.get(timeout=60).state == "success"


def test_a_stop_whose_worker_died_before_it_could_say_so_is_over(relay, airflow, worker, waits, parked):
    handle = relay.enqueue(request(stop_run=True))
    parked(handle)
    waits.learn(handle.id, progress="stopping", stopping=f"{time.time() + 3600:.3f}")

    end(airflow, waits, handle, "failed")

    with pytest.raises(DagRunOverdue, match="set to failed"):
        handle.get(timeout=60)
    assert not waits.being_stopped(handle.id)


def test_a_stop_that_never_comes_is_not_waited_for_for_ever(relay, airflow, worker, waits):
    airflow.make(*RUN, state="running", note="dagrelay task=gone at=2026-11-30T00:00:00+00:00")
    waits.learn("gone", stopping=f"{time.time() + 3:.3f}")
    second = relay.enqueue(again(give_up_after_s=60))
    until(lambda: "is being stopped" in (second.record().reason or ""))
    assert until(lambda: second.record().run)["cleared"] is False


def test_who_finds_a_run_being_stopped_may_give_up(relay, airflow, worker, waits):
    airflow.make(*RUN, state="running", note="dagrelay task=gone at=2026-11-30T00:00:00+00:00")
    waits.learn("gone", stopping=f"{time.time() + 3600:.3f}")

    with pytest.raises(GaveUp, match="is being stopped, for request gone"):
        relay.enqueue(again(give_up_after_s=1)).get(timeout=60)


def test_a_run_of_somebody_else_that_has_ended_ends_it_at_once(relay, airflow, worker):
    airflow.make(*RUN, state="success", note="made by hand")
    assert relay.enqueue(request()).get(timeout=60).created is False
    airflow.make("daily_sales", "relay__k2", state="failed")
    with pytest.raises(DagRunFailed):
        relay.enqueue(request("k2")).get(timeout=60)
    assert not airflow.lists


def test_a_run_of_somebody_else_that_goes_on_is_waited_for(relay, airflow, worker, waits, parked):
    airflow.make(*RUN, state="running")
    handle = relay.enqueue(request())
    parked(handle)

    end(airflow, waits, handle)

    assert (run := handle.get(timeout=60)).created is False
    assert run.state == "success"


def test_a_run_that_a_batch_has_made_is_waited_for_and_not_made_again(relay, airflow, worker, valkey):
    airflow.make(*RUN)
    made = {
        "dag_id": RUN[0],
        "dag_run_id": RUN[1],
        "state": "queued",
        "run_after": airflow.runs[RUN]["run_after"],
    }
    stock = Celery("else", broker=valkey.url, set_as_current=False)
    kwargs = {"dag_id": "daily_sales", "key": "k1", "so_far": {"run": made}}

    plain = stock.send_task("tasks.trigger_dag", kwargs=kwargs, queue="triggers")
    waiting = stock.send_task("tasks.trigger_dag", kwargs=kwargs | {"wait": True}, queue="triggers")

    assert relay.handle(plain.id).get(timeout=60).state == "queued"
    airflow.runs[RUN]["state"] = "success"
    assert relay.handle(waiting.id).get(timeout=60).state == "success"
    assert not airflow.posts


def test_a_worker_killed_while_runs_are_waited_for_loses_none(relay, airflow, start_worker, waits):
    first = start_worker()
    handles = relay.enqueue_many([request(f"k{n}") for n in range(30)])
    until(lambda: waits.size() == 30)
    for run in airflow.runs.values():
        run["state"] = "success"
    until(lambda: waits.size() < 30)

    first.kill()
    start_worker(name="w2")

    assert {handle.get(timeout=60).state for handle in handles} == {"success"}
    assert max(airflow.posts.values()) == 1


def test_what_follows_in_a_chain_gets_the_run_when_it_has_ended(
    relay, airflow, worker, waits, parked, valkey
):
    stock = Celery("else", broker=valkey.url, set_as_current=False)
    first = stock.signature("tasks.trigger_dag", kwargs={"dag_id": "daily_sales", "key": "k1", "wait": True})
    then = stock.signature("tasks.trigger_dag", kwargs={"dag_id": "report", "key": "k1"})
    sent = (first.set(queue="triggers") | then.set(queue="triggers")).apply_async()
    handle = relay.handle(sent.parent.id)
    parked(handle)
    assert list(airflow.runs) == [RUN]

    end(airflow, waits, handle)

    assert relay.handle(sent.id).get(timeout=60).dag_id == "report"
    conf = airflow.runs["report", "relay__k1"]["conf"]
    assert (conf["dag_run_id"], conf["state"]) == ("relay__k1", "success")


def test_refused_credentials_end_no_waiting(relay, airflow, start_worker, waits, parked):
    worker = start_worker(DAGRELAY_HOLD_PROBE_S="1", DAGRELAY_RETRY_CAP_S="0.5")
    handle = relay.enqueue(request())
    parked(handle)
    airflow.refuse_credentials = airflow.refuse_token = True
    end(airflow, waits, handle)
    until(lambda: "held" in (handle.record().waits_for or ""))
    until(lambda: "its credentials are refused" in worker.text())
    assert airflow.logins <= 6  # one a second finds out, and not each attempt

    airflow.refuse_credentials = airflow.refuse_token = False

    assert handle.get(timeout=60).state == "success"
