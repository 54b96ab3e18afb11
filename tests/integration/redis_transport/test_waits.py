"""What waits for something: each step by itself, where it is repeated, comes too late, or meets another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from kombu import Connection
from redis.exceptions import OutOfMemoryError, ReadOnlyError

from local.valkey import Valkey
from producers.stores.records import Accepted, Records, record_key, store
from producers.stores.waits import (
    CANCELLED,
    CANCELS,
    DUE,
    MAX_SEEN,
    PARKED,
    Seen,
    Waits,
    history_key,
    looks_key,
    seen_key,
    wake_key,
)
from tasks import waiting
from tasks.redis_transport import Channel, Keys, Lot

from .test_scripts import full, readonly

QUEUE = "jobs"
KEYS = Keys("", "dagrelay")
GROUP = "service:trains"
FAR_S = 100_000.0


def message(task_id: str = "t", epoch: int = 0) -> bytes:
    return json.dumps({"body": "{}", "headers": {"id": task_id, "task": "x", "retries": epoch}}).encode()


class Lotful:
    """One Redis with what a test needs of it. `t` is accepted, and a worker has taken its message."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.redis = redis.Redis.from_url(url)
        self.redis.flushdb()
        self.waits, self.records, self.lot = Waits(self.redis), Records(self.redis), Lot(self.redis, KEYS)
        self.records.accept(Accepted("t", QUEUE, message(), 0.0, "x", "", "", "", "", ""))
        self.redis.delete(QUEUE)

    def wait(self, epoch: int = 1, read: int = 0, look: str = "", look_in_s: float = 0.0, **more: Any) -> str:
        header = {"until": time.time() + FAR_S, "what": "a job", "read": read, "look": look}
        header |= {"look_in_s": look_in_s, "found": {}} | more
        return waiting.park(self.redis, "t", epoch, QUEUE, message("t", epoch), header)

    def retry(self, epoch: int) -> str:
        """As Celery does it: the message is published, then the state is written."""
        answer = self.lot.park(
            "t", due=time.time() + FAR_S, retries=epoch, queue_key=QUEUE, message=message("t", epoch)
        )
        self.store("waiting", retried=str(epoch))
        return answer

    def store(self, state: Any, **found: str) -> bool:
        end = store(self.redis, "t", result=b"{}", result_ttl_s=60, state=state, found=found, next_in_s=9.0)
        return bool(end)

    def queued(self) -> list[int]:
        """The epochs of what lies in the queue."""
        return [json.loads(raw)["headers"].get("retries", 0) for raw in self.redis.lrange(QUEUE, 0, -1)]

    def all(self) -> dict[bytes, Any]:
        return {key: self.redis.dump(key) for key in self.redis.scan_iter()}


@pytest.fixture
def lot(either: Valkey) -> Iterator[Lotful]:
    made = Lotful(either.url)
    yield made
    made.redis.close()


def test_a_park_that_is_repeated_takes_away_nothing_that_came_meanwhile(lot: Lotful):
    lot.waits.wake(["t"], "first")
    assert lot.waits.observations("t") == ["first"]
    assert lot.wait(read=1) == "parked"
    lot.waits.wake(["t"], "second")

    assert lot.wait(read=1) == "stale"  # its answer was lost

    assert lot.waits.observations("t", 1) == ["second"]
    assert lot.queued() == [1]
    assert lot.lot.size() == 0


def test_an_older_copy_that_is_parked_takes_away_nothing_from_a_newer_one(lot: Lotful):
    lot.wait()
    lot.waits.wake(["t"], "first")
    lot.retry(2)  # and before its state was written, it ran; the worker that had published it died
    lot.redis.hset(record_key("t"), "retried", "1")
    lot.lot.wake(["t"])
    lot.lot.move_due()

    assert lot.waits.observations("t", epoch=2) == ["first"]
    assert lot.wait(epoch=2, read=1) == "stale"  # the older copy, of epoch 1, came back

    assert lot.waits.observations("t", epoch=2) == ["first"]


def test_the_retry_of_an_older_copy_does_not_undo_a_wait(lot: Lotful):
    lot.wait(epoch=3, look=GROUP)

    lot.store("waiting", retried="2")

    found = lot.records.get("t")
    assert found is not None
    assert (found.retried, found.next_at) == (3, None)
    _, claimed = lot.waits.claim_looks(GROUP, lease_s=9, most=9, facts=())
    assert [one.task_id for one in claimed] == ["t"]


def test_a_look_that_a_retry_has_followed_is_none(lot: Lotful):
    lot.wait(look=GROUP)
    lot.lot.wake(["t"])
    lot.lot.move_due()  # as at its deadline
    lot.retry(2)

    _, claimed = lot.waits.claim_looks(GROUP, lease_s=9, most=9, facts=())

    assert claimed == []
    assert not lot.redis.exists(looks_key(GROUP))
    assert lot.lot.size() == 1


@pytest.mark.parametrize("what", ["parked again", "looked at again", "retried", "cancelled", "ended"])
def test_a_look_that_comes_too_late_changes_nothing(lot: Lotful, what: str):
    lot.wait(look=GROUP)
    token, (look,) = lot.waits.claim_looks(GROUP, lease_s=0, most=9, facts=())
    if what == "looked at again":
        lot.waits.claim_looks(GROUP, lease_s=9, most=9, facts=())
    elif what == "cancelled":
        lot.waits.cancel("t")
    elif what == "ended":
        lot.store("done")
    else:
        lot.lot.wake(["t"])
        lot.lot.move_due()
        lot.wait(epoch=2, look=GROUP) if what == "parked again" else lot.retry(2)
    before = lot.all()

    for verb in ("again", "changed", "error", "wake"):
        assert lot.waits.report(GROUP, token, [Seen("t", look.epoch, verb, 1.0, "1", "w")]) == [False]  # type: ignore[arg-type]

    assert lot.all() == before


def test_what_a_look_saw_is_read_once_and_in_order(lot: Lotful):
    lot.wait(look=GROUP)
    token, (look,) = lot.waits.claim_looks(GROUP, lease_s=9, most=9, facts=())
    assert lot.waits.report(GROUP, token, [Seen("t", 1, "changed", 0.0, "RUNNING", "5 %")]) == [True]
    assert lot.waits.report(GROUP, token, [Seen("t", 1, "wake", 0.0, '"late"', "")]) == [False]
    token, (look,) = lot.waits.claim_looks(GROUP, lease_s=9, most=9, facts=("seen", "progress"))
    assert look.facts == ("RUNNING", "5 %")
    assert lot.waits.report(GROUP, token, [Seen("t", 1, "wake", 0.0, '"done"', "saw the end")]) == [True]
    lot.waits.wake(["t"], "and more")

    assert lot.queued() == [1]
    assert lot.waits.observations("t", 1) == ["done", "and more"]
    assert lot.wait(epoch=2, read=1) == "queued"
    assert lot.waits.observations("t", 2) == ["and more"]


def test_a_fact_with_a_nul_does_not_upset_a_claim(lot: Lotful):
    lot.wait(look=GROUP, found={"job_id": "a\0b"})
    _, (look,) = lot.waits.claim_looks(GROUP, lease_s=9, most=9, facts=("job_id", "seen"))
    assert look.facts == ("a b", None)
    assert json.loads(look.message)["headers"]["id"] == "t"


def test_a_wake_by_key_before_the_first_park_is_read(lot: Lotful):
    """Also where nothing is on record yet: the message came past our door."""
    lot.redis.delete(record_key("t"))
    lot.waits.register("t", ["hook"], 60)

    assert lot.waits.wake_by_key("hook", {"state": "done"}) == (0, 1)

    assert lot.wait() == "queued"
    assert lot.waits.observations("t", 1) == [{"state": "done"}]
    assert lot.queued() == [1]


def test_a_wake_by_id_reaches_one_that_runs_or_is_queued(lot: Lotful):
    assert lot.waits.wake(["t"], "while it runs") == []
    assert lot.wait() == "queued"
    assert lot.waits.wake(["t"], "while it is queued") == []
    assert lot.waits.observations("t", 1) == ["while it runs", "while it is queued"]
    assert lot.queued() == [1]


def test_a_mere_wake_leaves_nothing_with_a_task_that_never_waits(lot: Lotful):
    assert lot.waits.wake(["t", "unknown"]) == []
    assert not lot.redis.exists(seen_key("t"), seen_key("unknown"))


def test_the_newest_of_too_many_is_read_though_another_was_when_they_were_read(lot: Lotful):
    for number in range(MAX_SEEN + 5):
        lot.waits.wake(["t"], number)
    read = len(lot.waits.observations("t"))
    lot.waits.wake(["t"], "the end")
    assert lot.wait(read=read) == "queued"
    assert lot.waits.observations("t", 1) == [None, "the end"]


def test_of_too_many_observations_the_first_and_the_newest_are_kept(lot: Lotful):
    for number in range(MAX_SEEN + 5):
        lot.waits.wake(["t"], number)
    assert lot.waits.observations("t") == [*range(MAX_SEEN), None, MAX_SEEN + 4]


def test_what_has_ended_leaves_only_its_record_and_its_history(lot: Lotful):
    lot.waits.register("t", ["hook"], 60)
    lot.wait(look=GROUP)
    lot.waits.cancel("t", by="somebody")
    lot.waits.wake(["t"], "too late")
    lot.wait(epoch=2)  # what runs meanwhile, and is told that it is cancelled

    assert lot.store("cancelled")

    lot.redis.delete(QUEUE, "celery-task-meta-t")
    kept = {record_key("t"), history_key("t"), CANCELS}
    assert {key.decode() for key in lot.redis.scan_iter()} == kept
    assert lot.waits.wake_by_key("hook") == (0, 0)
    assert lot.waits.wake(["t"], "x") == []
    assert lot.wait(epoch=3) == "ended"
    assert lot.waits.cancel("t") == "cancelled"
    assert {key.decode() for key in lot.redis.scan_iter()} == kept


def test_an_older_copy_that_ends_a_task_leaves_no_newer_one_parked(lot: Lotful):
    lot.wait(look=GROUP)
    assert lot.store("done")
    assert not lot.redis.exists(PARKED, DUE, looks_key(GROUP))


def test_a_cancel_sends_on_what_is_parked_with_its_mark_in_one_step(lot: Lotful):
    lot.wait(look=GROUP)

    assert lot.waits.cancel("t", by="me") == "waiting"

    (raw,) = lot.redis.lrange(QUEUE, 0, -1)
    assert json.loads(raw)["headers"]["parked_revoked"] is True
    assert not lot.redis.exists(PARKED, DUE, looks_key(GROUP))
    assert lot.lot.cancelled()[0] == ["t"]
    assert [words for _, words in lot.waits.history("t")] == ["cancel asked by me"]


def test_a_cancel_that_a_park_overtakes_reaches_it(lot: Lotful, monkeypatch: pytest.MonkeyPatch):
    hmget = lot.redis.hmget

    def overtaken(*args: Any) -> Any:
        found = hmget(*args)
        if not lot.redis.hexists(PARKED, "t"):
            lot.wait()
        return found

    monkeypatch.setattr(lot.redis, "hmget", overtaken)
    assert lot.waits.cancel("t") == "waiting"
    (raw,) = lot.redis.lrange(QUEUE, 0, -1)
    assert json.loads(raw)["headers"]["parked_revoked"] is True


def test_many_are_cancelled_each_by_its_state(lot: Lotful):
    lot.wait()
    for number in range(120):
        lot.records.accept(Accepted(f"{number}", "other", message(), 0.0, "x", "", "", "", "", ""))
    states = lot.waits.cancel_many(["t", "unknown", *map(str, range(120)), "t"])
    assert states == ["waiting", "", *["accepted"] * 120, "waiting"]
    assert lot.redis.zcard(CANCELLED) == 122


def test_a_cancel_is_told_again_where_it_is_asked_again_and_where_the_clock_was_set_back(lot: Lotful):
    lot.waits.cancel("t")
    count, until = lot.lot.move_due()[3], lot.lot.cancelled()[1]
    lot.redis.zadd(CANCELLED, {"other": until - 30})
    lot.waits.cancel("t")
    assert lot.lot.move_due()[3] > count
    assert set(lot.lot.cancelled(until)[0]) == {"t", "other"}


def _waiting_without_record(lot: Lotful) -> Any:
    header = {"until": time.time() + FAR_S, "what": "", "read": 0, "look": "", "look_in_s": 0, "found": {}}
    return waiting.park(lot.redis, "new", 1, QUEUE, message("new", 1), header)


def _claimed(lot: Lotful) -> Any:
    return lot.waits.claim_looks(GROUP, lease_s=9, most=9, facts=("seen",))


def _report(verb: Any) -> Callable[[Lotful], Any]:
    # The token is that of the look as `parked` has claimed it.
    return lambda lot: lot.waits.report(
        GROUP, lot.redis.get("token").decode(), [Seen("t", 1, verb, 1.0, "1", "words")]
    )


STEPS: dict[str, tuple[Callable[[Lotful], Any], bool]] = {
    "wait": (_waiting_without_record, True),
    "wait again": (lambda lot: lot.wait(epoch=2, read=1, look=GROUP), True),
    "register": (lambda lot: lot.waits.register("t", ["a", "b"], 60), False),
    "wake": (lambda lot: lot.waits.wake(["t"], "x" * 500), False),
    "wake by key": (lambda lot: lot.waits.wake_by_key("hook", "x" * 500), False),
    "cancel": (lambda lot: lot.waits.cancel("t"), True),
    "learn": (lambda lot: lot.waits.learn("t", "words", seen="x"), False),
    "claim looks": (_claimed, True),
    "again": (_report("again"), True),
    "changed": (_report("changed"), True),
    "error": (_report("error"), True),
    "woken by a look": (_report("wake"), True),
    "end": (lambda lot: lot.store("done"), False),
    "retried": (lambda lot: lot.store("waiting", retried="2"), False),
}


@pytest.fixture
def parked(lot: Lotful) -> Lotful:
    """`t` waits, is looked at, has a key that wakes it, and so has one that has ended."""
    lot.waits.register("t", ["hook"], 60)
    lot.wait(look=GROUP)
    token, _ = lot.waits.claim_looks(GROUP, lease_s=-1, most=9, facts=())
    lot.redis.set("token", token)
    return lot


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_redis_refuses_has_changed_nothing(parked: Lotful, name: str):
    step, _ = STEPS[name]
    before = parked.all()
    with readonly(parked.redis), pytest.raises(ReadOnlyError):
        step(parked)
    assert parked.all() == before
    step(parked)
    assert parked.all() != before


@pytest.mark.parametrize("name", STEPS)
def test_where_redis_is_full_a_step_does_all_or_nothing(parked: Lotful, name: str):
    step, goes_on = STEPS[name]
    before = parked.all()
    with full(parked.redis):
        if goes_on:
            step(parked)
        else:
            with pytest.raises(OutOfMemoryError):
                step(parked)
    if goes_on:
        assert parked.all() != before
        done = parked.all()
        assert parked.redis.hlen(PARKED) == parked.redis.zcard(DUE)
        assert done.keys() - {b"jobs"}
    else:
        assert parked.all() == before


class Cut:
    """A connection that loses the answer to its first park."""

    def __init__(self, park: Callable[..., str]) -> None:
        self.park, self.calls = park, 0

    def __call__(self, *args: Any) -> str:
        answer = self.park(*args)
        self.calls += 1
        if self.calls == 1:
            raise redis.ConnectionError("lost")
        return answer


@pytest.mark.parametrize("what", ["a wait", "a retry"])
def test_what_is_published_again_because_the_answer_was_lost_waits_all_the_same(
    lot: Lotful, what: str, monkeypatch: pytest.MonkeyPatch
):
    """kombu publishes with the same headers again."""
    cut = Cut(waiting.park)
    monkeypatch.setattr(Channel, "park_waiting", staticmethod(cut))
    cut_park = Cut(Lot.park)
    monkeypatch.setattr(Lot, "park", lambda *args, **kwargs: _twice(cut_park, args, kwargs))
    headers: dict[str, Any] = {"id": "t", "task": "x", "retries": 1}
    if what == "a wait":
        headers["parked_wait"] = {"until": time.time() + FAR_S, "what": "", "read": 0, "look": GROUP}
        headers["parked_wait"] |= {"look_in_s": 0, "found": {}}
    else:
        headers["eta"] = "2999-01-01T00:00:00+00:00"
    options = {"namespace": KEYS.namespace}
    connection = Connection(lot.url, transport="tasks.redis_transport:Transport", transport_options=options)
    with connection, connection.Producer() as producer:
        producer.publish(
            [[], {}, {}],
            routing_key=QUEUE,
            headers=headers,
            serializer="json",
            retry=True,
            retry_policy={"max_retries": 2, "interval_start": 0},
        )

    assert cut.calls + cut_park.calls == 2
    assert lot.lot.size() == 1
    assert lot.queued() == []


def _twice(cut: Cut, args: Any, kwargs: Any) -> str:
    park = cut.park
    cut.park = lambda *_: park(*args, **kwargs)
    try:
        return cut()
    finally:
        cut.park = park


def test_keys_with_a_prefix_have_it_once_where_a_cancelled_message_is_sent_on(lot: Lotful):
    keys = Keys("pre:", "other")
    lot.redis.zadd(keys.cancelled, {"t": 1})
    connection = Connection(
        lot.url,
        transport="tasks.redis_transport:Transport",
        transport_options={"namespace": "other", "global_keyprefix": "pre:"},
    )
    headers = {"id": "t", "task": "x", "eta": "2999-01-01T00:00:00+00:00"}
    with connection, connection.Producer() as producer:
        producer.publish([[], {}, {}], routing_key=QUEUE, headers=headers, serializer="json")
    (raw,) = lot.redis.lrange(keys.queue(QUEUE), 0, -1)
    assert json.loads(raw)["headers"]["parked_revoked"] is True


def test_a_wake_key_forgets_whom_it_cannot_wake_any_more(lot: Lotful):
    lot.waits.register("t", ["hook", "other hook"], keep_s=600)
    assert (
        lot.redis.zrange(wake_key("hook"), 0, -1) == lot.redis.zrange(wake_key("other hook"), 0, -1) == [b"t"]
    )
    lot.redis.zadd(wake_key("hook"), {"long over": time.time() - 1})
    lot.waits.register("u", ["hook"], keep_s=600)
    assert lot.redis.zrange(wake_key("hook"), 0, -1) == [b"t", b"u"]

    lot.store("done")

    assert lot.redis.zrange(wake_key("hook"), 0, -1) == [b"u"]
    assert not lot.redis.exists(wake_key("other hook"))


def test_a_look_may_be_claimed_without_its_message(lot: Lotful):
    """A thousand runs are asked for by their records; their messages may hold a gigabyte of confs."""
    lot.wait(look=GROUP)
    _, (look,) = lot.waits.claim_looks(GROUP, lease_s=9, most=9, facts=("look",), whole=False)
    assert (look.task_id, look.epoch, look.message, look.facts) == ("t", 1, b"", (GROUP,))


def test_a_failed_attempt_of_an_older_copy_changes_nothing_about_an_end(lot: Lotful):
    lot.store("done")
    before = lot.redis.hgetall(record_key("t"))

    lot.records.attempt_failed("t", "no answer", unsure=True)

    assert lot.redis.hgetall(record_key("t")) == before
    assert not lot.waits.history("t")
