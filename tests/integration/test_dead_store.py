"""The desk's scripts by themselves, on Valkey and on Redis 7: bounds, expiry, marks, a Redis that is full."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from redis.exceptions import OutOfMemoryError

from local.valkey import Valkey
from producers.client import RelayClient
from producers.errors import AlreadyReplayed, BrokerUnavailable
from producers.settings import ProducerSettings
from producers.stores.letters import DEAD, Keeping, dead_key
from producers.stores.records import record_key, store
from tests.integration.redis_transport.conftest import either

__all__ = ["either"]

RECORD = {
    "task": "tasks.trigger_dag",
    "dag_id": "d",
    "dag_run_id": "relay__t",
    "error": "GaveUp",
    "reason": "r",
}
LETTER = {
    "request": json.dumps({"task": "tasks.trigger_dag", "args": [], "kwargs": {"v": 1, "dag_id": "d"}}),
}


@pytest.fixture
def relay(either: Valkey) -> Iterator[RelayClient]:
    client = RelayClient(ProducerSettings(redis_url=either.url, client_name="tests@here"))
    client.redis.flushdb()
    yield client
    client.redis.close()


def bury(relay: RelayClient, name: str, keeping: Keeping, **found: str) -> None:
    store(
        relay.redis,
        name,
        result="{}",
        result_ttl_s=60,
        state="failed",
        found={**RECORD, **found},
        letter=LETTER,
        keeping=keeping,
    )


def test_beyond_the_limit_the_oldest_go_first_those_that_were_replayed_before_all(relay):
    for n in range(4):
        bury(relay, f"t{n}", Keeping(60, 4), error=f"E{n % 2}")
    relay.dead.replay("t2")

    bury(relay, "t4", Keeping(60, 4))
    assert [letter.id for letter in relay.dead.list()] == ["t4", "t3", "t1", "t0"]
    assert (relay.dead.store.replayed(), relay.dead.store.dropped()) == (0, 0)
    bury(relay, "t5", Keeping(60, 2))

    assert [letter.id for letter in relay.dead.list()] == ["t5", "t4"]
    assert relay.dead.store.dropped() == 3
    assert not relay.redis.exists(*(dead_key(f"t{n}") for n in range(4)))
    assert relay.dead.count_by_error() == {"GaveUp": 2}
    assert relay.dead.store.oldest_at() == relay.dead.get("t4").at


def test_letters_expire_and_leave_the_desk(relay):
    bury(relay, "old", Keeping(60))
    relay.redis.expire(dead_key("old"), 0)
    bury(relay, "new", Keeping(60))
    assert relay.dead.store.size() == 2

    assert [letter.id for letter in relay.dead.list()] == ["new"]
    assert relay.dead.store.size() == 1  # whoever lists them forgets what is gone
    at = relay.dead.get("new").at
    relay.redis.zadd(DEAD, {"new": at - 100})
    bury(relay, "newer", Keeping(60))

    assert [letter.id for letter in relay.dead.list()] == ["newer"]


def test_many_letters_are_listed_once_each_the_newest_first(relay):
    for n in range(450):
        bury(relay, f"t{n}", Keeping())

    assert [letter.id for letter in relay.dead.list()] == [f"t{n}" for n in reversed(range(450))]


def test_only_what_failed_comes_to_the_desk_and_it_leaves_with_a_correction(relay):
    bury(relay, "failed", Keeping(), error="OutcomeUnknown")
    for state in ("done", "cancelled", "waiting"):
        store(relay.redis, state, result="{}", result_ttl_s=60, state=state, found=RECORD)
    assert [letter.id for letter in relay.dead.list()] == ["failed"]

    store(relay.redis, "failed", result="{}", result_ttl_s=60, state="done", found={}, correct=True)

    assert relay.record("failed").state == "done"
    assert relay.dead.store.size() == 0
    assert not relay.redis.exists(dead_key("failed"))


def test_an_end_that_stands_brings_no_second_letter(relay):
    bury(relay, "t", Keeping())
    relay.dead.discard(["t"])

    bury(relay, "t", Keeping())

    assert relay.dead.get("t") is None


def test_what_somebody_asked_to_cancel_gets_no_letter_also_where_it_expired(relay):
    relay.redis.hset(record_key("t"), "cancel_by", "somebody")
    for name in ("t", "u"):
        expired = {**LETTER, "error": "Expired", "reason": "it expired"}
        store(relay.redis, name, result="{}", result_ttl_s=60, state="cancelled", found={}, letter=expired)

    assert [(letter.id, letter.error) for letter in relay.dead.list()] == [("u", "Expired")]


def test_a_letter_holds_what_its_record_and_its_history_said(relay):
    relay.redis.hset(record_key("t"), mapping={"key": "k", "connection": "eu", "unsure": "1", "job_id": ""})
    relay.records.attempt_failed("t", "first\nline")
    relay.waits.learn("t", "noted")

    bury(relay, "t", Keeping(), error_args='["a", 1]')

    letter = relay.dead.get("t")
    assert (letter.key, letter.connection, letter.unsure, letter.job_id) == ("k", "eu", True, None)
    assert (letter.error, letter.error_args, letter.reason) == ("GaveUp", ["a", 1], "r")
    assert [words for _, words in letter.history] == ["attempt 1 failed: first line", "noted"]
    assert letter.attempts == 2
    assert letter.at == relay.record("t").ended_at


def test_in_a_full_redis_nothing_is_marked_as_replayed_that_was_not_sent(relay):
    bury(relay, "t", Keeping())
    relay.dead.store.bury("raw", {"raw": b"\xff", "queue_key": "triggers", "error": "Quarantined"}, Keeping())
    relay.redis.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(BrokerUnavailable):
            relay.dead.replay("t")
        with pytest.raises(OutOfMemoryError):
            bury(relay, "u", Keeping())
    finally:
        relay.redis.config_set("maxmemory", "0")

    assert relay.dead.get("t").replayed_as is None
    assert relay.record("u") is None
    assert relay.redis.llen("triggers") == 0
    new = relay.dead.replay("t")
    assert relay.dead.get("t").replayed_as == new.id
    assert relay.redis.llen("triggers") == 1


def test_a_message_goes_back_once(relay):
    relay.dead.store.bury("raw", {"raw": b"\xff", "queue_key": "q", "error": "Quarantined"}, Keeping())

    relay.dead.replay("raw")

    assert relay.redis.lrange("q", 0, -1) == [b"\xff"]
    with pytest.raises(AlreadyReplayed):
        relay.dead.replay("raw")
    assert relay.redis.llen("q") == 1
    assert relay.dead.store.replayed() == 1
