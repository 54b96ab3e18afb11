"""The account that load tests rely on finds what is wrong: each violation is made by hand, and told."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from redis import Redis

from tests import accounting

RUN = {"dag_id": "sales", "dag_run_id": "relay__a", "created": True}
MADE = {
    "dag_id": "sales",
    "dag_run_id": "relay__a",
    "note": "dagrelay task=a at=2026-11-20T10:00:00Z by=shop",
}


def message(task_id: str = "a") -> str:
    return json.dumps({"headers": {"id": task_id, "task": "tasks.trigger_dag"}, "body": "[]"})


BASE64 = base64.b64encode(message().encode()).decode()


@pytest.fixture
def redis(valkey):
    """A Redis in which the request `a` has ended well, and `b` has not."""
    client: Redis = Redis.from_url(valkey.url, decode_responses=True)
    record = {"state": "done", "ended_at": "1795000000.0", "run": json.dumps(RUN)}
    client.hset("dagrelay:record:a", mapping=record)
    client.set("celery-task-meta-a", json.dumps({"status": "SUCCESS", "result": RUN}))
    client.rpush("dagrelay:history:a", "1795000000.000 accepted")
    client.hset("dagrelay:record:b", mapping={"state": "waiting", "attempts": "3", "reason": "HTTP 502"})
    client.hset("dagrelay:parked", "b", "1\x000\x00triggers\x00" + message("b"))
    yield client
    client.close()


def told(valkey, redis, ids=("a",), runs: Any = (MADE,)) -> list[str]:
    return accounting.violations(valkey.url, ids, runs)


def test_one_end_is_no_violation(valkey, redis):
    assert told(valkey, redis) == []
    accounting.one_end_each(valkey.url, ["a", "a"], [MADE], within_s=0)


def test_what_has_not_ended_is_told_with_where_it_is_and_why(valkey, redis):
    assert told(valkey, redis, ["a", "b"]) == [
        "b: has not ended: waiting after 3 attempts (HTTP 502)",
        "b: parked",
    ]
    redis.delete("dagrelay:parked")
    assert told(valkey, redis, ["b"])[1] == "b: and it is nowhere"
    with pytest.raises(AssertionError, match="2 violations for 2 accepted requests:\nb: has not ended"):
        accounting.one_end_each(valkey.url, ["a", "b"], [MADE], within_s=0)


def test_an_id_without_a_record_is_lost(valkey, redis):
    assert told(valkey, redis, ["c"]) == ["c: has no record", "c: and it is nowhere"]


@pytest.mark.parametrize(
    ("leave", "words"),
    [
        (lambda r: r.lpush("triggers", message()), "queued in triggers"),
        (lambda r: r.lpush("triggers\x06\x163", message()), "queued in triggers"),
        (lambda r: r.lpush("dagrelay:hand:w1:triggers", message()), "fetched by the worker w1:triggers"),
        (lambda r: r.hset("dagrelay:held:w1", "7", "triggers\x00" + message()), "held by the worker w1"),
        (lambda r: r.hset("dagrelay:parked", "a", "0\x000\x00triggers\x00" + message()), "parked"),
        (lambda r: r.zadd("dagrelay:due", {"a": 1}), "due at some time"),
        (lambda r: r.zadd("dagrelay:line:default", {"a": 1}), "in the line of default"),
        (lambda r: r.zadd("dagrelay:called:default", {"a": 1}), "called from the line of default"),
        (lambda r: r.zadd("dagrelay:looks:airflow:default", {"a": 1}), "looked at, in airflow:default"),
        (lambda r: r.zadd("dagrelay:cancelled", {"a": 1}), "about to be cancelled"),
        (lambda r: r.rpush("dagrelay:seen:a", "null"), "told something that it has not read"),
        (
            lambda r: r.hset("dagrelay:unacked", "7", json.dumps([json.loads(message()), "", "triggers"])),
            "held by a worker",
        ),
        (
            lambda r: r.hset("dagrelay:quarantine", "1", json.dumps({"message": BASE64})),
            "in quarantine",
        ),
    ],
)
def test_what_has_ended_and_is_still_somewhere_is_told(valkey, redis, leave, words):
    redis.lpush("triggers", message("somebody-else"), "no message at all")
    leave(redis)
    assert told(valkey, redis) == [f"a: ended, and still {words}"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: r.delete("celery-task-meta-a"), "done, and it has no result"),
        (
            lambda r: r.set("celery-task-meta-a", '{"status": "RETRY"}'),
            "done, and its result says RETRY",
        ),
        (lambda r: r.hdel("dagrelay:record:a", "ended_at"), "done, and no time of its end is on record"),
    ],
)
def test_an_end_without_its_result_or_its_time_is_told(valkey, redis, spoil, words):
    spoil(redis)
    assert told(valkey, redis) == [f"a: {words}"]


def test_a_failure_that_nobody_would_see_is_told(valkey, redis):
    redis.hset("dagrelay:record:a", mapping={"state": "failed", "error": "GaveUp"})
    redis.hdel("dagrelay:record:a", "run")
    redis.set("celery-task-meta-a", json.dumps({"status": "FAILURE"}))
    assert told(valkey, redis, runs=None) == ["a: failed, and it is not on the desk"]
    redis.hset("dagrelay:dead:a", "error", "GaveUp")
    assert told(valkey, redis, runs=None) == ["a: failed, and it is not listed on the desk"]
    redis.zadd("dagrelay:dead", {"a": 1})
    assert told(valkey, redis, runs=None) == []
    assert told(valkey, redis) == ["a: failed (GaveUp), and it made a run: sales relay__a"]
    redis.hset("dagrelay:record:a", "error", "OutcomeUnknown")
    assert told(valkey, redis) == []


def test_something_on_the_desk_that_did_not_fail_is_told(valkey, redis):
    redis.zadd("dagrelay:dead", {"a": 1})
    assert told(valkey, redis) == ["a: done, and it is on the desk for failures"]


def test_what_airflow_has_is_compared(valkey, redis):
    second = {**MADE, "dag_run_id": "relay__a2"}
    assert told(valkey, redis, runs=()) == ["a: done, and Airflow has no run 'relay__a' of 'sales'"]
    two = "a: done, and it made 2 runs: sales relay__a, sales relay__a2"
    assert told(valkey, redis, runs=(MADE, second)) == [two]
    others = {**MADE, "note": "dagrelay task=z at=… by=shop"}
    unnamed = "a: done, and the run 'relay__a' that it made does not name it (none does)"
    assert told(valkey, redis, runs=(others,)) == [unnamed]
    # Somebody else's run, found and taken: nothing is wrong with that.
    redis.hset("dagrelay:record:a", "run", json.dumps({**RUN, "created": False}))
    assert told(valkey, redis, runs=(others,)) == []
    another = {**second, "note": MADE["note"]}
    told_so = "a: done with the run 'relay__a', and it made another: sales relay__a2"
    assert told(valkey, redis, runs=(others, another)) == [told_so]
