"""How everything stands, as a real Redis tells it: queues and their ages, above all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from producers.client import RelayClient
from producers.contract import TriggerRequest
from producers.stores.parking import CALL_S
from producers.stores.readings import LOOK_GROUPS, OLDER, read
from tests.plain_worker import message


@pytest.fixture
def client(relay: RelayClient) -> Any:
    return relay.redis


def accepted_ago(relay: RelayClient, seconds: float, *, priority: int = 0) -> str:
    """Enqueue a request as if that had been so long ago; return its id."""
    task_id = relay.enqueue(TriggerRequest(dag_id="d"), priority=priority).id
    relay.redis.hset(f"dagrelay:record:{task_id}", "due_at", now(relay.redis) - seconds)
    return task_id


def now(client: Any) -> float:
    seconds, micros = client.time()
    return float(seconds + micros / 1e6)


def age_of(client: Any, queue: str = "triggers") -> float | None:
    return read(client).queues[queue].oldest_s


def test_an_empty_redis_has_nothing(client):
    found = read(client)
    assert (found.workers, found.held, found.parked, found.dead, found.quarantined) == (0, 0, 0, 0, 0)
    assert {name: (one.messages, one.oldest_s) for name, one in found.queues.items()} == {
        "triggers": (0, None),
        "jobs": (0, None),
        "looks": (0, None),
    }
    assert (found.lines, found.looks, found.dead_by_error) == ({}, {}, {})


def test_the_oldest_of_all_priorities_counts_from_when_it_was_due(relay, client):
    for seconds, priority in ((30, 0), (20, 0), (50, 6), (40, 6)):
        accepted_ago(relay, seconds, priority=priority)
    found = read(client).queues["triggers"]
    assert found.messages == 4
    assert found.oldest_s == pytest.approx(50, abs=5)


def test_what_comes_back_counts_from_its_next_attempt_and_not_from_its_acceptance(relay, client):
    task_id = accepted_ago(relay, 5000)
    again(client, task_id)
    client.hset(f"dagrelay:record:{task_id}", "next_at", now(client) - 7)
    assert age_of(client) == pytest.approx(7, abs=5)


def test_what_was_called_from_a_line_counts_from_the_call(relay, client):
    task_id = accepted_ago(relay, 5000)
    again(client, task_id)
    client.hset(f"dagrelay:record:{task_id}", "line", "dagrelay:line:eu")
    client.zadd("dagrelay:called:eu", {task_id: now(client) - 3 + CALL_S})
    assert age_of(client) == pytest.approx(3, abs=5)


def test_what_was_woken_counts_from_the_last_line_of_its_history_where_nothing_is_surer(relay, client):
    woken = accepted_ago(relay, 5000)
    again(client, woken)
    client.rpush(f"dagrelay:history:{woken}", f"{now(client) - 9:.3f} woken by hand")
    assert age_of(client) == pytest.approx(9, abs=5)
    accepted_ago(relay, 60)  # behind it, and sure
    assert age_of(client) == pytest.approx(60, abs=5)


def test_a_record_that_is_broken_is_no_reason_to_tell_nothing(relay, client):
    task_id = accepted_ago(relay, 10)
    client.hset(f"dagrelay:record:{task_id}", "due_at", "yesterday")
    assert read(client).queues["triggers"].messages == 1


def test_messages_that_do_not_tell_have_no_age_and_hide_nobody_elses(relay, client):
    client.lpush("looks", message("tasks.look", queue="looks"))
    client.lpush("triggers", b"no message at all", b'{"headers": {"id": 7}}', message("tasks.stop_run"))
    assert age_of(client, "looks") is None
    assert age_of(client) is None
    accepted_ago(relay, 40)
    found = read(client)
    assert found.queues["triggers"].messages == 4
    assert found.queues["triggers"].oldest_s == pytest.approx(40, abs=5)


def test_an_id_in_a_conf_is_not_taken_for_the_messages_own(relay, client):
    other = accepted_ago(relay, 9000)
    client.delete("triggers")
    conf = {"id": other, "headers": {"id": other, "retries": 3}, "text": f'"headers": {{"id": "{other}"}}'}
    task_id = relay.enqueue(TriggerRequest(dag_id="d", conf=conf)).id
    client.hset(f"dagrelay:record:{task_id}", "due_at", now(client) - 11)
    assert age_of(client) == pytest.approx(11, abs=5)


def test_part_of_a_fan_out_counts_from_the_fan_outs_acceptance(client):
    client.hset("dagrelay:record:abc", "due_at", now(client) - 25)
    client.lpush("triggers", message("tasks.trigger_chunk", task_id="abc.7"))
    assert age_of(client) == pytest.approx(25, abs=5)


def test_what_waits_is_told_by_what_for(client):
    client.sadd("dagrelay:airflows", "eu")
    client.sadd(LOOK_GROUPS, "airflow:eu", "service:train")
    client.zadd("dagrelay:line:eu", {"a": 1, "b": 2})
    client.zadd("dagrelay:gates:eu", {"dag": 1})
    client.sadd("dagrelay:gate-lines:eu:dag", "hold,2", "trigger,1")
    client.zadd("dagrelay:gate:eu:dag:hold,2", {"c": 1, "d": 2})
    client.zadd("dagrelay:gate:eu:dag:trigger,1", {"e": 1})
    client.zadd("dagrelay:looks:airflow:eu", {"f": 1, "g": 2, "h": 3, "i": 4})
    client.zadd("dagrelay:looks:service:train", {"j": now(client) + 60})
    client.zadd("dagrelay:due", dict.fromkeys("abcdefghijklmn", now(client) + 600))
    found = read(client)
    assert found.waiting == {"slot": 2, "gate": 3, "run": 4, "job": 1, "time": 4}
    assert found.looks["service:train"].late_s == 0
    assert found.looks["airflow:eu"].followed == 4


def test_what_is_due_and_lies_there_is_late_but_not_what_was_just_woken(client):
    client.zadd("dagrelay:due", {"woken": 0, "later": now(client) + 100})
    assert read(client).late_s == 0
    client.zadd("dagrelay:due", {"due": now(client) - 12})
    assert read(client).late_s == pytest.approx(12, abs=5)


def test_workers_are_those_whose_lease_runs_and_not_who_drains_a_line(client):
    at = now(client)
    client.zadd(
        "dagrelay:leases", {"h:1:a": at + 30, "h:2:b": at + 30, "drain-eu-1a": at + 15, "h:3:c": at - 70}
    )
    client.hset("dagrelay:held:h:1:a", "1", b"m")
    client.hset("dagrelay:held:drain-eu-1a", mapping={"2": b"m", "3": b"m"})
    found = read(client)
    assert (found.workers, found.held) == (2, 3)
    assert found.gone_s == pytest.approx(70, abs=5)


def test_dead_letters_are_counted_by_error_as_far_as_they_are_read(client):
    pipe = client.pipeline(transaction=False)
    for number in range(1100):
        pipe.zadd("dagrelay:dead", {f"d{number}": number})
        pipe.hset(f"dagrelay:dead:d{number}", "error", "GaveUp" if number % 2 else "RunConflict")
    pipe.zadd("dagrelay:dead-replayed", {"r": 1})
    pipe.set("dagrelay:dead-dropped", 3)
    pipe.execute()
    found = read(client)
    assert (found.dead, found.dead_dropped) == (1100, 3)
    assert found.dead_by_error == {"GaveUp": 500, "RunConflict": 500, OLDER: 100}


def test_a_read_changes_nothing(relay, client):
    accepted_ago(relay, 5)
    client.zadd("dagrelay:leases", {"h:1:a": now(client) + 30})
    before = client.info("persistence")["rdb_changes_since_last_save"], client.dbsize()
    read(client)
    assert (client.info("persistence")["rdb_changes_since_last_save"], client.dbsize()) == before


def again(client: Any, task_id: str) -> None:
    """Make a queued message one that has waited, or failed, once."""
    (raw,) = client.lrange("triggers", 0, -1)
    found = json.loads(raw)
    assert found["headers"]["id"] == task_id
    found["headers"]["retries"] = 1
    client.delete("triggers")
    client.lpush("triggers", json.dumps(found))
