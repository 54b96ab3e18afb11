"""Which run is a task instance's own, and what a stopped fan-out means for its next try, by a real Valkey."""

from __future__ import annotations

import json

import pytest

from producers.client import RelayClient, new_task_id
from producers.contract import TriggerRequest
from producers.fan_out import FanOut, fan_out
from producers.stores import serving
from producers.stores.records import record_key
from producers.stores.serving import RunBefore, RunName, runs_before

pytestmark = pytest.mark.integration

REQUEST = TriggerRequest(dag_id="daily_sales")


def take(relay: RelayClient, generation: str = "1") -> serving.Served:
    return serving.take(relay.redis, "task-1", new_task_id(), generation)


def failed(relay: RelayClient, request_id: str, **run: object) -> None:
    """Hand a request over, and have it end as a failed run does."""
    relay.enqueue(REQUEST, task_id=request_id)
    fields = (
        {"state": "failed", "run": json.dumps({"dag_run_id": "r1", **run})} if run else {"state": "failed"}
    )
    relay.redis.hset(record_key(request_id), mapping=fields)


def test_a_run_that_was_made_stays_the_task_instances_own_whatever_comes_between(relay):
    failed(relay, take(relay).request_id, created=True, cleared=False)
    second = take(relay)
    assert second.made == "r1"
    failed(relay, second.request_id)  # it never came to its run
    assert take(relay, "2").made == "r1"


@pytest.mark.parametrize("then", [{"state": "cancelled", "unsure": "1"}, {"state": "accepted"}])
def test_a_run_that_is_found_to_be_made_only_later_is_the_task_instances_own(relay, then):
    first = take(relay)
    relay.enqueue(REQUEST, task_id=first.request_id)
    relay.redis.hset(record_key(first.request_id), mapping=then)  # Airflow's answer was lost, or is to come
    second = take(relay, "2")
    assert second.made is None
    failed(relay, second.request_id)  # RunExists
    made = {"state": "done", "run": json.dumps({"dag_run_id": "r1", "created": True})}
    relay.redis.hset(record_key(first.request_id), mapping=made)  # looked up
    assert take(relay, "2").made == "r1"


def test_a_run_that_was_only_joined_is_somebody_elses(relay):
    failed(relay, take(relay).request_id, created=False, cleared=False)
    assert take(relay).made is None


def test_a_try_cut_short_before_it_handed_over_leaves_what_it_was_told_to_the_next(relay):
    first = take(relay)
    failed(relay, first.request_id, created=True)
    told = [take(relay, "2") for _ in range(2)]
    assert told[0].request_id == told[1].request_id
    assert [(one.how, one.before, one.cleared, one.made) for one in told] == [
        ("again", first.request_id, True, "r1")
    ] * 2


def test_a_fan_out_that_somebody_stopped_is_not_waited_for_by_the_next_try(relay):
    first = take(relay)
    fan_out([REQUEST], relay=relay, fan_out_id=first.request_id)
    assert take(relay).how == "attached"
    relay.handle(first.request_id).cancel()
    found = take(relay)
    assert (found.how, found.left, found.before) == ("again", None, first.request_id)


# What became of each run of a fan-out

RUNS = [
    TriggerRequest(dag_id="etl", dag_run_id="r", connection="north"),
    TriggerRequest(dag_id="etl", dag_run_id="r", connection="south"),
]
NORTH, SOUTH = ("north", "etl", "r"), ("south", "etl", "r")


def ended(relay: RelayClient, fan: FanOut, *ends: dict[str, object] | None) -> dict[RunName, RunBefore]:
    """Have the requests of a fan-out end, with their runs or, for None, before they came to them."""
    for handle, run in zip(fan.handles, ends, strict=True):
        fields = {"state": "cancelled"}
        if run is not None:
            state = "done" if run["state"] == "success" else "failed"
            fields = {"state": state, "run": json.dumps({"dag_run_id": "r", **run})}
        relay.redis.hset(record_key(handle.id), mapping=fields)
    return runs_before(relay.redis, [one.id for one in fan.handles])


def handed_on(before: dict[RunName, RunBefore], *, cleared: bool = False) -> list[dict[str, str]]:
    return [before[name].handed_on(cleared=cleared) for name in (NORTH, SOUTH)]


def test_runs_of_one_id_in_two_airflows_are_two(relay):
    first = fan_out(RUNS, relay=relay)
    before = ended(relay, first, {"state": "success", "created": True}, {"state": "failed", "created": False})
    assert before == {NORTH: RunBefore(done=True, made=True), SOUTH: RunBefore(done=False, made=False)}


def test_what_a_fan_out_did_not_come_to_is_as_the_one_before_left_it(relay):
    first = fan_out(RUNS, relay=relay)
    before = ended(relay, first, {"state": "success", "created": True}, {"state": "failed", "created": True})

    second = fan_out(RUNS, relay=relay, more=handed_on(before))
    assert ended(relay, second, None, None) == before  # somebody stopped it
    third = fan_out(RUNS, relay=relay, more=handed_on(before, cleared=True))
    assert ended(relay, third, None, None) == {
        NORTH: RunBefore(done=False, made=True),
        SOUTH: RunBefore(done=False, made=True),
    }


def test_a_run_of_our_own_that_a_try_only_waited_for_stays_our_own(relay):
    first = fan_out(RUNS, relay=relay)
    made = {"state": "success", "created": True}
    before = ended(relay, first, made, made)

    joined = {"state": "failed", "created": False, "cleared": False}
    second = fan_out(RUNS, relay=relay, more=handed_on(before))
    assert set(ended(relay, second, joined, joined).values()) == {RunBefore(done=False, made=True)}
