"""From `.delay()` to the run, through a real Valkey and real worker processes, whatever fails on the way."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from producers.contract import TriggerRequest
from producers.errors import (
    ConnectionNotConfigured,
    DagBroken,
    DagNotFound,
    GaveUp,
    InvalidRequest,
    LogicalDateTaken,
    OutcomeUnknown,
    RequestCancelled,
    RequestRejected,
    RunConflict,
    RunExists,
)

SALES = TriggerRequest("daily_sales", {"day": "2026-11-20"}, key="k1")
RUN = ("daily_sales", "relay__k1")


def until(ready: Callable[[], object], timeout_s: float = 60.0) -> object:
    """Return what `ready` says as soon as it is true; fail the test after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not (found := ready()):
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.05)
    return found


def test_a_trigger_becomes_a_run(relay, airflow, worker):
    run = relay.enqueue(SALES).get(timeout=60)

    assert (run.dag_id, run.dag_run_id, run.created) == ("daily_sales", "relay__k1", True)
    assert airflow.runs[RUN]["conf"] == {"day": "2026-11-20"}


def test_the_run_says_who_asked_for_it(relay, airflow, worker):
    handle = relay.enqueue(TriggerRequest("daily_sales", key="k1", note="for the audit"))
    handle.get(timeout=60)

    ours, _, theirs = airflow.runs[RUN]["note"].partition("\n\n")
    assert f"task={handle.id}" in ours
    assert "key=k1" in ours
    assert "by=tests@here" in ours
    assert theirs == "for the audit"


def test_a_thousand_keys_a_third_sent_twice_a_fifth_of_the_answers_lost_one_run_each(relay, airflow, worker):
    airflow.fault = lambda number, dag_id, run_id: "drop" if number % 5 == 0 else "answer"
    requests = [TriggerRequest("daily_sales", {"n": n}, key=f"k{n}") for n in range(1000)]

    handles = relay.enqueue_many(requests) + relay.enqueue_many(requests[::3])
    runs = [handle.get(timeout=60) for handle in handles]

    assert len(airflow.runs) == 1000
    assert {run_id for _, run_id in airflow.runs} == {f"relay__k{n}" for n in range(1000)}
    assert sum(run.created for run in runs) == 1000
    assert [run.dag_run_id for run in runs[1000:]] == [run.dag_run_id for run in runs[:1000][::3]]


@pytest.mark.parametrize("fault", ["drop", "500", "503", "429", "reset", "html", "late"])
def test_whatever_becomes_of_an_answer_there_is_one_run(fault, relay, airflow, worker):
    airflow.fault = lambda number, dag_id, run_id: fault if number == 1 else "answer"

    run = relay.enqueue(SALES).get(timeout=60)

    assert run.created
    assert list(airflow.runs) == [RUN]
    assert airflow.posts[RUN] == 2
    assert relay.record(relay.handle(run_task(airflow)).id).attempts == 2


def run_task(airflow) -> str:
    """The task id in the note of the one run there is."""
    return airflow.runs[RUN]["note"].split("task=")[1].split()[0]


def test_retry_after_is_honoured(relay, airflow, start_worker):
    airflow.fault = lambda number, dag_id, run_id: "503" if number == 1 else "answer"
    start_worker()

    relay.enqueue(SALES).get(timeout=60)

    assert airflow.post_times[1] - airflow.post_times[0] >= 1.0


def test_an_airflow_that_is_down_gets_its_triggers_when_it_is_back(relay, airflow, start_worker):
    start_worker()
    airflow.stop()

    handle = relay.enqueue(SALES)
    until(lambda: handle.state == "waiting")
    assert "unavailable" in handle.record().reason
    airflow.start()

    assert handle.get(timeout=60).created


def test_a_worker_killed_in_the_midst_makes_each_run_once(relay, airflow, start_worker):
    airflow.delay_s = 0.05
    first = start_worker()
    handles = relay.enqueue_many(TriggerRequest("daily_sales", key=f"k{n}") for n in range(200))
    until(lambda: len(airflow.runs) > 20)

    first.kill()
    start_worker(name="w2")

    assert all(handle.get(timeout=60).created for handle in handles)
    assert len(airflow.runs) == 200


def test_a_missing_dag_gets_the_time_of_a_redeploy(relay, airflow, start_worker):
    airflow.missing.add("daily_sales")
    start_worker(DAGRELAY_MISSING_GRACE_S="30")
    handle = relay.enqueue(SALES)
    until(lambda: handle.state == "waiting")

    airflow.missing.clear()

    assert handle.get(timeout=60).created


def test_a_dag_that_stays_missing_is_told(relay, airflow, worker):
    airflow.missing.add("daily_sales")

    with pytest.raises(DagNotFound, match="daily_sales"):
        relay.enqueue(SALES).get(timeout=60)


def test_a_dag_that_stays_broken_is_told(relay, airflow, worker):
    airflow.broken.add("daily_sales")

    with pytest.raises(DagBroken, match="import errors"):
        relay.enqueue(SALES).get(timeout=60)


def test_a_run_that_exists_is_found_although_the_dag_is_broken_now(relay, airflow, start_worker):
    """The answer to the first attempt was lost, and the DAG's file broke before the second."""
    start_worker(DAGRELAY_MISSING_GRACE_S="60")
    airflow.fault = lambda number, dag_id, run_id: "drop" if number == 1 else "answer"
    handle = relay.enqueue(SALES)
    until(lambda: airflow.runs)
    airflow.broken.add("daily_sales")

    assert handle.get(timeout=60).created


def test_a_rejection_is_told_in_airflows_words(relay, airflow, worker):
    airflow.rejecting["daily_sales"] = (400, {"detail": "Invalid input for param must: No value passed"})

    with pytest.raises(RequestRejected, match="Invalid input for param must"):
        relay.enqueue(SALES).get(timeout=60)
    assert airflow.posts[RUN] == 1


def test_an_equal_run_of_somebody_else_is_reused(relay, airflow, worker):
    airflow.make(*RUN, conf={"day": "2026-11-20"}, note="made by hand")

    assert relay.enqueue(SALES).get(timeout=60).created is False


def test_another_conf_under_the_same_key_is_a_conflict(relay, airflow, worker):
    airflow.make(*RUN, conf={"day": "a-secret"})

    with pytest.raises(RunConflict, match="values differ under: day") as told:
        relay.enqueue(SALES).get(timeout=60)
    assert "a-secret" not in str(told.value)


@pytest.mark.parametrize("if_exists", ["fail", "skip"])
def test_if_exists_decides_about_an_equal_run(if_exists, relay, airflow, worker):
    airflow.make(*RUN, conf={"day": "2026-11-20"})
    handle = relay.enqueue(TriggerRequest("daily_sales", SALES.conf, key="k1", if_exists=if_exists))

    if if_exists == "fail":
        with pytest.raises(RunExists):
            handle.get(timeout=60)
    else:
        assert handle.get(timeout=60).created is False


def test_a_finished_run_is_cleared_once(relay, airflow, worker):
    airflow.make(*RUN, conf={"day": "2026-11-20"}, state="success", start_date="2026-11-20T00:00:00+00:00")

    run = relay.enqueue(TriggerRequest("daily_sales", SALES.conf, key="k1", if_exists="clear")).get(
        timeout=10
    )

    assert (run.created, run.cleared, run.state) == (False, True, "queued")
    assert airflow.cleared[RUN] == 1


def test_a_logical_date_that_is_taken_names_the_run_that_has_it(relay, airflow, worker):
    airflow.make("daily_sales", "scheduled__1", logical_date="2026-11-20T00:00:00+00:00")
    request = TriggerRequest("daily_sales", key="k1", logical_date="2026-11-20T00:00:00+00:00")

    with pytest.raises(LogicalDateTaken, match="scheduled__1"):
        relay.enqueue(request).get(timeout=60)


def test_refused_credentials_hold_the_connection_and_the_requests_wait(relay, airflow, start_worker):
    airflow.refuse_credentials = True
    worker = start_worker()

    handles = [relay.enqueue(TriggerRequest("daily_sales", key=f"k{n}")) for n in range(5)]
    until(lambda: all(handle.state == "waiting" for handle in handles))

    until(lambda: "credentials are refused" in worker.text())
    assert airflow.password not in worker.text()
    assert airflow.logins <= 5  # those that were on their way when it was found out, and none after
    assert not airflow.runs


def test_better_credentials_are_not_bound_by_the_hold(relay, airflow, start_worker):
    wrong = airflow.conn_uri.replace(airflow.password, "wrong")
    first = start_worker(connections={"default": wrong})
    handle = relay.enqueue(SALES)
    until(lambda: handle.state == "waiting")
    first.stop()

    start_worker(name="w2")
    other = relay.enqueue(TriggerRequest("daily_sales", key="k2"))

    assert other.get(timeout=60).created


def test_a_connection_that_the_worker_does_not_have_is_told(relay, worker):
    with pytest.raises(ConnectionNotConfigured, match="AIRFLOW_CONN_ELSEWHERE"):
        relay.enqueue(TriggerRequest("daily_sales", connection="elsewhere")).get(timeout=60)


def test_giving_up_when_nothing_can_have_reached_airflow(relay, airflow, start_worker):
    start_worker()
    airflow.stop()

    with pytest.raises(GaveUp, match="no run was made"):
        relay.enqueue(TriggerRequest("daily_sales", key="k1", give_up_after_s=1)).get(timeout=60)


def test_an_unknown_outcome_is_looked_up_and_corrected(relay, airflow, worker):
    """Every answer is lost and no run is seen; after the end, the run is there after all."""
    airflow.fault = lambda number, dag_id, run_id: "reset"
    handle = relay.enqueue(TriggerRequest("daily_sales", key="k1", give_up_after_s=1))
    with pytest.raises(OutcomeUnknown):
        handle.get(timeout=60)

    airflow.make(*RUN, note=f"dagrelay task={handle.id} at=…")

    until(lambda: handle.state == "done")
    assert handle.get(timeout=5).created
    assert handle.record().corrected_at is not None


def test_a_countdown_waits_in_redis(relay, airflow, worker):
    before = time.time()

    relay.enqueue(SALES, countdown=2).get(timeout=60)

    assert 2.0 <= airflow.post_times[0] - before < 6.0


def test_what_expired_before_it_was_begun_is_told(relay, airflow, start_worker):
    handle = relay.enqueue(SALES, expires=0.2)
    time.sleep(0.4)
    start_worker()

    with pytest.raises(RequestCancelled, match="expired"):
        handle.get(timeout=60)
    assert not airflow.posts
    assert handle.record().state == "cancelled"


def test_an_invalid_message_of_somebody_else_is_told_by_name(relay, worker, valkey):
    from celery import Celery

    stock = Celery("else", broker=valkey.url, backend=valkey.url, set_as_current=False)

    result = stock.send_task("tasks.trigger_dag", kwargs={"dag_id": "d", "confg": {}}, queue="triggers")

    with pytest.raises(InvalidRequest, match="confg"):
        relay.handle(result.id).get(timeout=60)


def test_a_message_by_position_and_by_name_from_any_celery_client(airflow, relay, worker, valkey):
    from celery import Celery

    stock = Celery("else", broker=valkey.url, backend=valkey.url, set_as_current=False)

    sent = [
        stock.send_task("tasks.trigger_dag", ("daily_sales", {"n": 1}), {"key": "a"}, queue="triggers"),
        stock.send_task("tasks.trigger_dag", (), {"dag_id": "daily_sales", "key": "b"}, queue="triggers"),
    ]

    assert [relay.handle(result.id).get(timeout=60).dag_run_id for result in sent] == ["relay__a", "relay__b"]
    assert relay.record(sent[0].id).state == "done"


def test_a_message_of_a_newer_release_waits_for_a_newer_worker(relay, worker, valkey, airflow):
    from celery import Celery

    stock = Celery("else", broker=valkey.url, set_as_current=False)

    sent = stock.send_task("tasks.trigger_dag", (), {"v": 2, "what": "ever"}, queue="triggers")

    until(lambda: relay.handle(sent.id).state == "waiting")
    assert "knows more than v1" in relay.record(sent.id).reason
    assert not airflow.posts
