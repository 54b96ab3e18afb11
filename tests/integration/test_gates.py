"""Runs held back for a DAG that is paused, or has as many runs as it is to have: through real workers."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner
from redis import Redis

from producers.cli import main
from producers.contract import TriggerRequest
from producers.errors import DagNotFound, DagPaused, GaveUp, RequestCancelled, RequestRejected
from producers.fan_out import fan_out
from tests.fake_airflow import FakeAirflow
from tests.integration.test_trigger import until

PAUSED = {"is_paused": True}


@pytest.fixture
def dag(request: pytest.FixtureRequest) -> str:
    """A DAG that no other test has asked for."""
    return re.sub(r"\W", "_", request.node.name)[:100]


def waits_for(relay: Any, handle: Any) -> str:
    """What a parked request waits for, or ""."""
    found = relay.waits.get(handle.id)
    return found.waits_for if found is not None else ""


def parked(relay: Any, *handles: Any, what: str) -> None:
    """Wait until these are parked for that."""
    until(lambda: all(waits_for(relay, one) == what for one in handles))


@contextmanager
def scheduler(airflow: FakeAirflow, dag_id: str, run_s: float = 0.05) -> Iterator[None]:
    """Have the runs of a DAG end, each some time after it was made."""
    over = threading.Event()

    def run() -> None:
        seen: dict[str, float] = {}
        while not over.wait(0.02):
            for one in airflow.unfinished(dag_id):
                since = seen.setdefault(one["dag_run_id"], time.monotonic())
                if time.monotonic() - since > run_s:
                    one["state"] = "success"

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def end(airflow: FakeAirflow, dag_id: str, run_id: str) -> None:
    airflow.runs[dag_id, run_id]["state"] = "success"


# The DAG is paused


def test_a_request_is_held_until_its_dag_is_unpaused(relay, airflow, worker, dag):
    airflow.dags[dag] = PAUSED

    handle = relay.enqueue(TriggerRequest(dag, if_paused="hold"))
    parked(relay, handle, what=f"DAG {dag} is paused")
    assert not airflow.runs
    airflow.dags[dag] = {}

    assert handle.get(timeout=60).created


def test_by_default_a_run_of_a_paused_dag_is_made_and_nothing_is_asked(relay, airflow, worker, dag):
    airflow.dags[dag] = PAUSED

    assert relay.enqueue(TriggerRequest(dag)).get(timeout=60).created
    assert not airflow.asked


def test_a_request_may_fail_instead_unless_its_run_is_there(relay, airflow, worker, dag):
    airflow.dags[dag] = PAUSED
    airflow.make(dag, "relay__there")

    with pytest.raises(DagPaused, match=f"DAG '{dag}' is paused, and no run was made"):
        relay.enqueue(TriggerRequest(dag, if_paused="fail")).get(timeout=60)
    there = relay.enqueue(TriggerRequest(dag, if_paused="fail", key="there")).get(timeout=60)

    assert (there.created, list(airflow.runs)) == (False, [(dag, "relay__there")])
    airflow.dags[dag] = {}
    assert until(lambda: _made_or_paused(relay, dag))


def _made_or_paused(relay: Any, dag: str) -> bool:
    """That a DAG was paused is believed for two seconds."""
    try:
        return bool(relay.enqueue(TriggerRequest(dag, if_paused="fail")).get(timeout=60).created)
    except DagPaused:
        return False


def test_a_request_may_unpause_its_dag_which_is_done_once(relay, airflow, worker, dag):
    airflow.dags[dag] = PAUSED

    runs = [relay.enqueue(TriggerRequest(dag, if_paused="unpause")).get(timeout=60) for _ in range(2)]

    assert all(run.created for run in runs)
    assert airflow.unpaused[dag] == 1
    assert airflow.dags[dag]["is_paused"] is False


def test_a_role_that_may_not_unpause_is_told_in_words(relay, airflow, worker, dag):
    airflow.dags[dag], airflow.may_unpause = PAUSED, False

    with pytest.raises(RequestRejected, match=f"DAG {dag} is paused, and may not be unpaused: Forbidden"):
        relay.enqueue(TriggerRequest(dag, if_paused="unpause")).get(timeout=60)
    assert not airflow.runs


def test_a_repeat_whose_run_is_there_is_not_held(relay, airflow, worker, dag):
    airflow.dags[dag] = PAUSED
    airflow.make(dag, "relay__k1")

    again = relay.enqueue(TriggerRequest(dag, key="k1", if_paused="hold")).get(timeout=60)

    assert again.created is False
    assert not airflow.posts


def test_what_is_held_for_a_dag_that_is_deleted_ends(relay, airflow, worker, dag):
    airflow.dags[dag] = PAUSED
    handles = [relay.enqueue(TriggerRequest(dag, if_paused="hold")) for _ in range(3)]
    parked(relay, *handles, what=f"DAG {dag} is paused")

    airflow.missing.add(dag)

    for handle in handles:
        with pytest.raises(DagNotFound):
            handle.get(timeout=60)


# The window


def test_no_more_than_its_window_are_unfinished_whoever_made_them(relay, airflow, worker, dag):
    airflow.make(dag, "by_somebody_else", state="running")
    handles = [relay.enqueue(TriggerRequest(dag, key=f"k{n}", window=2)) for n in range(3)]

    first = until(lambda: next((one for one in handles if one.ready()), None))
    parked(
        relay,
        *(one for one in handles if one is not first),
        what=f"a free place among the 2 runs of DAG {dag}",
    )
    assert len(airflow.unfinished(dag)) == 2
    end(airflow, dag, "by_somebody_else")
    until(lambda: sum(one.ready() for one in handles) == 2)
    for run in airflow.unfinished(dag):
        run["state"] = "failed"

    assert all(one.get(timeout=60).created for one in handles)


def test_many_workers_together_do_not_overshoot(relay, airflow, start_worker, dag):
    for number in range(3):
        start_worker(name=f"w{number}")
    airflow.dags[dag] = {"max_active_runs": 5}

    handles = relay.enqueue_many([TriggerRequest(dag, window="max_active_runs") for _ in range(60)])

    what = f"a free place among the 5 runs of DAG {dag}"
    until(lambda: sum(waits_for(relay, one) == what for one in handles) == 55)
    assert len(airflow.runs) == 5
    with scheduler(airflow, dag):
        until(lambda: sum(one.ready() for one in handles) >= 15, timeout_s=60)
    assert airflow.most_unfinished[dag] == 5


def test_a_fan_out_keeps_to_the_window_of_its_requests(relay, airflow, worker, dag):
    airflow.dags[dag] = {}

    with scheduler(airflow, dag):
        fan = fan_out([{"dag_id": dag, "window": 12} for _ in range(50)], relay=relay)
        outcomes = fan.get(timeout=60)

    assert [one.state for one in outcomes] == ["done"] * 50
    assert airflow.most_unfinished[dag] == 12


def test_a_lost_answer_neither_makes_two_runs_nor_one_too_many(relay, airflow, worker, dag):
    airflow.dags[dag] = {}
    airflow.fault = lambda number, dag_id, run_id: "drop" if airflow.posts[dag_id, run_id] == 1 else "answer"

    with scheduler(airflow, dag, run_s=0.5):
        handles = relay.enqueue_many([TriggerRequest(dag, key=f"k{n}", window=3) for n in range(9)])
        assert all(one.get(timeout=60).created for one in handles)

    assert len(airflow.runs) == 9
    assert airflow.most_unfinished[dag] <= 3


def test_a_repeat_of_a_run_that_is_unfinished_needs_no_place(relay, airflow, worker, dag):
    request = TriggerRequest(dag, key="k1", window=1)
    assert relay.enqueue(request).get(timeout=60).created

    assert relay.enqueue(request).get(timeout=60).created is False

    assert airflow.posts[dag, "relay__k1"] == 1


def test_a_connection_has_a_window_for_requests_that_name_none(relay, airflow, start_worker, dag):
    start_worker(connections={"default": f"{airflow.conn_uri}/?window=1"})
    airflow.make(dag, "by_somebody_else", state="running")

    held = relay.enqueue(TriggerRequest(dag))
    parked(relay, held, what=f"a free place among the 1 run of DAG {dag}")
    assert relay.enqueue(TriggerRequest(dag, window=2)).get(timeout=60).created
    for run in airflow.unfinished(dag):
        run["state"] = "success"

    assert held.get(timeout=60).created


def test_one_that_waits_for_a_place_gives_up_in_time(relay, airflow, worker, dag):
    airflow.make(dag, "by_somebody_else", state="running")

    handle = relay.enqueue(TriggerRequest(dag, window=1, give_up_after_s=1))

    with pytest.raises(GaveUp, match=f"a free place among the 1 run of DAG {dag}"):
        handle.get(timeout=60)


def test_what_is_urgent_goes_first_and_a_smaller_window_holds_up_nobody(relay, airflow, worker, dag):
    airflow.make(dag, "a", state="running")
    airflow.make(dag, "b", state="running")
    small = relay.enqueue(TriggerRequest(dag, key="small", window=1))
    what = f"a free place among the {{}} of DAG {dag}"
    parked(relay, small, what=what.format("1 run"))
    late = relay.enqueue(TriggerRequest(dag, key="late", window=2, priority=4))
    urgent = relay.enqueue(TriggerRequest(dag, key="urgent", window=2, priority=6))
    parked(relay, late, urgent, what=what.format("2 runs"))

    end(airflow, dag, "a")
    assert urgent.get(timeout=60).created
    assert not late.ready()
    end(airflow, dag, "b")
    assert late.get(timeout=60).created
    assert not small.ready()


def test_a_run_that_is_waited_for_needs_no_place_while_it_runs(relay, airflow, worker, dag):
    first = relay.enqueue(TriggerRequest(dag, key="k1", window=1, wait=True))
    parked(relay, first, what=f"run relay__k1 of DAG {dag}")
    second = relay.enqueue(TriggerRequest(dag, key="k2", window=1, wait=True))
    parked(relay, second, what=f"a free place among the 1 run of DAG {dag}")
    epoch = relay.waits.get(first.id).epoch

    assert relay.waits.wake([first.id]) == [first.id]
    until(lambda: (found := relay.waits.get(first.id)) and found.epoch > epoch)
    assert waits_for(relay, first) == f"run relay__k1 of DAG {dag}"
    end(airflow, dag, "relay__k1")

    assert first.get(timeout=60).state == "success"
    parked(relay, second, what=f"run relay__k2 of DAG {dag}")


def test_a_worker_killed_as_it_hands_a_run_over_costs_no_place(relay, airflow, start_worker, dag):
    airflow.dags[dag], airflow.late_s = {}, 60.0
    airflow.fault = lambda number, dag_id, run_id: "late" if number == 1 else "answer"
    killed = start_worker(name="w1", DAGRELAY_VISIBILITY_TIMEOUT_S="3")
    handles = [relay.enqueue(TriggerRequest(dag, key=f"k{n}", window=1)) for n in range(2)]
    until(lambda: airflow.runs)
    start_worker(name="w2", DAGRELAY_VISIBILITY_TIMEOUT_S="3")
    killed.kill()

    first = until(lambda: next((one for one in handles if one.ready()), None))
    assert first.get().created
    other = next(one for one in handles if one is not first)
    parked(relay, other, what=f"a free place among the 1 run of DAG {dag}")
    for run in airflow.unfinished(dag):
        run["state"] = "success"

    assert other.get(timeout=60).created
    assert airflow.most_unfinished[dag] == 1


# What waits there


def test_what_waits_is_shown_woken_without_harm_and_cancelled(
    relay, valkey, airflow, worker, dag, monkeypatch
):
    monkeypatch.setenv("DAGRELAY_REDIS_URL", valkey.url)
    airflow.make(dag, "by_somebody_else", state="running")
    handle = relay.enqueue(TriggerRequest(dag, window=1))
    what = f"a free place among the 1 run of DAG {dag}"
    parked(relay, handle, what=what)
    epoch = relay.waits.get(handle.id).epoch

    assert what in CliRunner().invoke(main, ["status", handle.id]).output
    assert relay.waits.wake([handle.id]) == [handle.id]
    until(lambda: (found := relay.waits.get(handle.id)) and found.epoch > epoch)
    assert not handle.ready()
    handle.cancel()

    with pytest.raises(RequestCancelled):
        handle.get(timeout=60)
    with Redis.from_url(valkey.url) as client:
        assert not list(client.scan_iter(f"dagrelay:gate:default:{dag}:*"))
    assert len(airflow.runs) == 1


def test_an_airflow_that_was_away_is_asked_again(relay, airflow, worker, dag):
    airflow.make(dag, "by_somebody_else", state="running")
    handle = relay.enqueue(TriggerRequest(dag, window=1))
    parked(relay, handle, what=f"a free place among the 1 run of DAG {dag}")

    airflow.silent = True
    end(airflow, dag, "by_somebody_else")
    until(lambda: f"dag not asked for dag_id={dag}" in worker.text())
    assert not handle.ready()
    airflow.silent = False

    assert handle.get(timeout=60).created


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--window", "0"], "window: is neither a whole number of 1 or more nor the word"),
        (["--window", "all"], "window: is neither"),
        (["--if-paused", "perhaps"], "--if-paused"),
    ],
)
def test_the_command_tells_what_is_wrong_by_name(options, told, monkeypatch):
    monkeypatch.setenv("DAGRELAY_REDIS_URL", "redis://127.0.0.1:1")

    result = CliRunner().invoke(main, ["trigger", "d", *options])

    assert result.exit_code != 0
    assert told in result.output


def test_the_command_has_both(relay, valkey, airflow, worker, dag, monkeypatch):
    monkeypatch.setenv("DAGRELAY_REDIS_URL", valkey.url)
    airflow.dags[dag] = PAUSED

    for window in ("3", "max_active_runs"):
        options = ["--window", window, "--if-paused", "unpause", "--until-created", "--timeout", "10"]
        result = CliRunner().invoke(main, ["trigger", dag, *options])
        assert result.exit_code == 0, result.output
    assert airflow.unpaused[dag] == 1
