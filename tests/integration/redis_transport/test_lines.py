"""The way to an Airflow, step by step: slots, the line, the limit, the breaker, holds."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
import redis

from local.valkey import Valkey
from producers.stores.lines import (
    FAILURES,
    PRIORITY_S,
    Lines,
    Taken,
    ahead_s,
    airflow_key,
    called_key,
    granted_key,
    line_key,
    slots_key,
)
from producers.stores.parking import CALL_S, SLOT_S
from producers.stores.records import Accepted, Records, record_key, store
from producers.stores.waits import Waits
from tasks import waiting

AIRFLOW = "default"
QUEUE = "triggers"
FAR_S = 100_000.0


def message(task_id: str, epoch: int) -> bytes:
    return json.dumps({"body": "{}", "headers": {"id": task_id, "task": "x", "retries": epoch}}).encode()


class Way:
    """The way to one Airflow with a ceiling of 4, and what a test needs of its Redis."""

    def __init__(self, url: str, ceiling: int = 4) -> None:
        self.redis = redis.Redis.from_url(url)
        self.redis.flushdb()
        self.lines, self.records, self.waits = Lines(self.redis), Records(self.redis), Waits(self.redis)
        self.ceiling = ceiling
        self.numbers = iter(range(10**6))
        self.epochs: dict[str, int] = {}
        self.called: list[str] = []

    @property
    def state(self) -> Any:
        return self.lines.state(AIRFLOW)

    def accept(self, *task_ids: str) -> None:
        """Have these accepted, and their messages in workers' hands."""
        for task_id in task_ids:
            about = Accepted(task_id, QUEUE, message(task_id, 0), 0.0, "x", "d", "r", "", AIRFLOW, "")
            self.records.accept(about)
        self.redis.delete(QUEUE)

    def take(self, task_id: str = "", want: int = 1) -> tuple[Taken, str]:
        token = f"w-{next(self.numbers)}"
        taken = self.lines.take(AIRFLOW, token, ceiling=self.ceiling, task_id=task_id, want=want)
        return taken, f"{token}.1"

    def take_all(self) -> list[str]:
        """Take all four slots; return their tokens."""
        return [self.take()[1] for _ in range(4)]

    def give(self, token: str, verdict: Any = "ok", took_s: float = 0.01, **more: Any) -> Any:
        return self.lines.give(AIRFLOW, [(token, verdict, took_s)], fingerprint="f", **more)

    def park(self, task_id: str, priority: int = 5) -> str:
        """Park a task in the line, as `tasks.slots` does."""
        epoch = self.epochs[task_id] = self.epochs.get(task_id, 0) + 1
        header = {"until": time.time() + FAR_S, "what": "its turn", "read": 0, "look": "", "look_in_s": 0.0}
        header |= {"found": {}, "line": line_key(AIRFLOW), "ahead_s": ahead_s(priority)}
        return waiting.park(self.redis, task_id, epoch, QUEUE, message(task_id, epoch), header)

    def begin(self, task_id: str) -> str:
        """Take a slot for a task, or park it; return the token, or ""."""
        taken, token = self.take(task_id)
        if taken.slots:
            return token
        assert self.park(task_id) == "parked"
        return ""

    def sent_on(self) -> list[str]:
        """Take what was called from the queue: who would run next first."""
        found = []
        while raw := self.redis.rpop(QUEUE):
            found.append(json.loads(raw)["headers"]["id"])
        return found

    def later(self, seconds: float) -> None:
        """Have it be so much later for whatever is in this connection's sorted sets and hash."""
        for key in (slots_key(AIRFLOW), called_key(AIRFLOW)):
            for member, score in self.redis.zrange(key, 0, -1, withscores=True):
                self.redis.zadd(key, {member: score - seconds})
        for field in ("probe_at", "probed_at", "cut_at", "held_since"):
            at = self.redis.hget(airflow_key(AIRFLOW), field)
            if at is not None:
                self.redis.hset(airflow_key(AIRFLOW), field, float(at) - seconds)

    def fail_until_open(self) -> None:
        for _ in range(FAILURES):
            taken, token = self.take()
            assert taken.slots
            self.give(token, "broken")
        assert self.state.breaker == "open"

    def probes(self) -> list[str]:
        return self.lines.tick([(AIRFLOW, "f")], probe_s=5.0)[0]


@pytest.fixture
def way(either: Valkey) -> Way:
    """A way on Valkey, and on the oldest Redis that is tried."""
    return Way(either.url)


# Slots


def test_no_more_are_in_flight_than_the_ceiling(way):
    tokens = way.take_all()

    taken, _ = way.take()

    assert (taken.slots, taken.why) == (0, "slot")
    assert way.state.in_flight == 4
    way.give(tokens[0])
    assert way.take()[0].slots == 1


def test_many_slots_at_once_are_as_many_as_there_are(way):
    way.take()

    taken, _ = way.take(want=10)

    assert taken.slots == 3
    assert way.state.in_flight == 4


def test_a_slot_that_nobody_renews_is_free_again_and_one_that_is_renewed_is_kept(way):
    _, kept = way.take()
    way.take()
    way.later(SLOT_S - 1)
    assert way.lines.renew(AIRFLOW, [kept]) == 1

    way.later(1.5)

    assert way.take(want=4)[0].slots == 3
    assert way.lines.renew(AIRFLOW, ["gone.1"]) == 0


def test_a_request_that_timed_out_keeps_its_slot_for_as_long_as_is_said(way):
    _, token = way.take()
    way.give(token, "timeout", 10.0, late_s=30.0)
    assert way.state.in_flight == 1

    way.later(29)
    assert way.state.in_flight == 1
    way.later(2)
    assert way.state.in_flight == 0


def test_a_smaller_ceiling_counts_at_once_and_a_larger_one_too(way):
    way.take()
    way.ceiling = 2
    assert way.take(want=5)[0].slots == 1
    way.ceiling = 6
    assert way.take(want=10)[0].slots == 4


# The line


def test_who_gives_a_slot_back_calls_the_next_who_then_has_it(way):
    way.accept("a", "b")
    tokens = way.take_all()
    assert [way.begin("a"), way.begin("b")] == ["", ""]
    assert way.state.waiting == 2

    way.give(tokens[0])

    assert way.sent_on() == ["a"]
    assert (way.state.called, way.state.waiting) == (1, 1)
    assert way.begin("a")
    assert (way.state.called, way.state.in_flight) == (0, 4)


def test_a_newcomer_does_not_overtake_who_was_called_or_waits(way):
    way.accept("a", "b", "new")
    tokens = way.take_all()
    way.begin("a"), way.begin("b")
    way.give(tokens[0])

    assert way.take("new")[0].slots == 0

    way.park("new")
    way.give(tokens[1])
    assert set(way.sent_on()) == {"a", "b"}
    assert way.state.waiting == 1


def test_the_place_of_one_that_does_not_come_is_given_on(way):
    way.accept("a", "b")
    token = way.take_all()[0]
    way.begin("a"), way.begin("b")
    way.give(token)
    assert way.sent_on() == ["a"]

    way.later(CALL_S + 0.1)
    way.probes()

    assert way.sent_on() == ["b"]


def test_what_is_parked_while_a_slot_becomes_free_is_called_at_once(way):
    """Between being told that there is none and parking, all slots were given back: nobody would call."""
    way.accept("a")
    tokens = way.take_all()
    assert way.take("a")[0].slots == 0
    for token in tokens:
        way.give(token)

    assert way.park("a") == "parked"

    assert way.sent_on() == ["a"]
    assert way.state.waiting == 0


def test_a_higher_priority_goes_first_and_age_makes_up_for_it(way):
    way.accept("old", "low", "normal", "high")
    way.redis.hset(record_key("old"), "due_at", time.time() - 3 * PRIORITY_S)
    tokens = way.take_all()
    for task_id, priority in (("low", 0), ("normal", 5), ("high", 7), ("old", 5)):
        way.take(task_id)
        way.park(task_id, priority)

    way.called = []
    for token in tokens:
        way.give(token)
        way.called += way.sent_on()

    # One after the other: each was called by itself.
    assert way.called == ["old", "high", "normal", "low"]


def test_one_that_was_cancelled_in_the_line_leaves_it_and_holds_nobody_up(way):
    way.accept("a", "b")
    token = way.take_all()[0]
    way.begin("a"), way.begin("b")

    assert way.waits.cancel("a", "tests") == "waiting"
    assert way.sent_on() == ["a"]  # for Celery to end it
    way.give(token)

    assert way.sent_on() == ["b"]
    assert way.state.waiting == 0


def test_one_that_came_back_another_way_keeps_no_place(way):
    way.accept("a", "b")
    token = way.take_all()[0]
    way.begin("a"), way.begin("b")
    way.waits.wake(["a"])
    store(way.redis, "a", result="{}", result_ttl_s=9, state="done", found={})
    assert way.sent_on() == ["a"]

    way.give(token)

    assert way.sent_on() == ["b"]


def test_an_older_copy_of_a_task_takes_no_place_from_the_newer_one(way):
    """Its worker stood still, its message went to another, who has parked it; now the first one goes on."""
    way.accept("a")
    tokens = way.take_all()
    assert way.begin("a") == ""

    assert way.take("a")[0].slots == 0
    way.epochs["a"] = 0
    assert way.park("a") == "stale"

    way.give(tokens[0])
    assert way.sent_on() == ["a"]


def test_what_waits_in_line_leaves_what_it_was_told_for_when_it_comes_back(way):
    way.accept("a")
    way.take(want=4)
    way.waits.wake_by_key("none")
    way.waits.learn("a", waits_for="a run")
    way.waits.wake(["a"], {"state": "success"})

    assert way.begin("a") == ""

    assert way.waits.observations("a", 1) == [{"state": "success"}]
    assert way.waits.size() == 1


def test_a_thread_that_waits_goes_before_all_tasks_and_hears_of_its_slot(way):
    way.accept("a")
    tokens = way.take_all()
    way.begin("a")
    way.lines.join(AIRFLOW, "thread.1")
    assert not way.redis.exists(granted_key("thread.1"))

    way.give(tokens[0])

    assert way.redis.lpop(granted_key("thread.1")) == b"1"
    assert way.state.in_flight == 4
    way.lines.leave(AIRFLOW, "thread.1")
    assert way.sent_on() == ["a"]


def test_a_thread_that_waits_no_longer_is_given_nothing(way):
    token = way.take_all()[0]
    way.lines.join(AIRFLOW, "thread.1")
    way.lines.leave(AIRFLOW, "thread.1")

    way.give(token)

    assert way.state.in_flight == 3


# The limit


def test_a_timeout_halves_the_limit_once_for_all_that_were_in_flight_with_it(way):
    tokens = way.take_all()
    for token in tokens:
        way.give(token, "strained", 5.0)

    assert way.state.limit == 2.0


def test_the_limit_never_falls_below_one_and_grows_by_one_a_round_up_to_the_ceiling(way):
    for _ in range(4):
        way.later(10)
        way.give(way.take()[1], "strained", 0.1)
        way.give(way.take()[1], "ok")
    assert 1.0 <= way.state.limit < 2.5

    for _ in range(40):
        taken, token = way.take(want=4)
        for number in range(1, taken.slots + 1):
            way.give(f"{token[:-1]}{number}", "ok")

    assert way.state.limit == 4.0


def test_slow_answers_and_an_idle_line_are_no_reason_to_send_more(way):
    way.give(way.take()[1], "strained", 0.1)
    before = way.state.limit

    way.give(way.take()[1], "ok", 0.01)  # one of two slots
    for _ in range(3):
        taken, token = way.take(want=4)
        for number in range(1, taken.slots + 1):
            way.give(f"{token[:-1]}{number}", "ok", 5.0)

    assert way.state.limit == before == 2.0


def test_a_connection_cut_is_no_sign_of_load(way):
    way.give(way.take()[1], "broken")

    assert (way.state.limit, way.state.failures) == (4.0, 1)


# The breaker


def test_failures_in_a_row_open_the_breaker_and_an_answer_between_them_does_not(way):
    for verdict in ["broken"] * (FAILURES - 1) + ["ok"] + ["broken"] * (FAILURES - 1):
        way.give(way.take()[1], verdict)
    assert way.state.breaker == "closed"

    assert way.give(way.take()[1], "broken").changed == "open"

    taken, _ = way.take()
    assert (taken.slots, taken.why) == (0, "open")


def test_while_it_is_open_nothing_is_called_and_one_worker_at_a_time_asks(way):
    way.accept("a")
    way.fail_until_open()
    assert way.begin("a") == ""
    assert way.probes() == []
    way.later(1)

    assert way.probes() == [AIRFLOW]
    assert way.probes() == []
    assert way.sent_on() == []

    way.lines.probed(AIRFLOW, "failed", fingerprint="f")
    assert way.probes() == []
    way.later(6)
    assert way.probes() == [AIRFLOW]


def test_a_worker_that_dies_with_the_question_leaves_it_to_another(way):
    way.fail_until_open()
    way.later(1)
    assert way.probes() == [AIRFLOW]

    way.later(5.1)

    assert way.probes() == [AIRFLOW]


def test_with_an_answer_it_drains_slowly_and_then_at_full_speed(way):
    way.accept(*"abcdefgh")
    way.fail_until_open()
    for task_id in "abcdefgh":
        way.begin(task_id)

    assert way.lines.probed(AIRFLOW, "ok", fingerprint="f") == "half-open"

    assert way.sent_on() == ["a"]
    changed = way.give(way.begin("a"), "ok").changed
    assert changed == "closed"  # 2 of 4
    assert set(way.sent_on()) == {"b", "c"}
    assert (way.state.limit, way.state.breaker) == (2.0, "closed")


def test_two_failures_in_a_row_while_half_open_open_it_again(way):
    way.ceiling = 8
    way.fail_until_open()
    way.lines.probed(AIRFLOW, "ok", fingerprint="f")

    way.give(way.take()[1], "broken")
    assert way.state.breaker == "half-open"
    way.give(way.take()[1], "broken")

    assert way.state.breaker == "open"


# Holds


def test_a_held_connection_is_asked_nothing_and_the_time_does_not_count(way):
    way.accept("a")
    assert way.lines.hold(AIRFLOW, "new database", "ann") == ""
    assert way.begin("a") == ""
    assert (way.state.held, way.state.held_reason, way.state.held_by) == (
        "maintenance",
        "new database",
        "ann",
    )
    way.later(1000)
    way.redis.hset(record_key("a"), "due_at", time.time() - 1003)

    assert way.probes() == []
    assert way.lines.release(AIRFLOW) == "maintenance"

    assert way.sent_on() == ["a"]
    taken, _ = way.take("a")
    assert taken.slots == 1
    assert 2 < taken.age_s < 10


def test_refused_credentials_hold_it_until_they_are_accepted(way):
    way.accept("a")
    given = way.give(way.take()[1], "refused", words="Invalid credentials")
    assert (given.changed, given.over) == ("credentials", True)
    assert way.begin("a") == ""
    assert way.probes() == [AIRFLOW]
    way.lines.probed(AIRFLOW, "refused", fingerprint="f", words="Invalid credentials", again_s=30)
    way.later(10)
    assert way.probes() == []
    way.later(25)
    assert way.probes() == [AIRFLOW]

    way.lines.probed(AIRFLOW, "ok", fingerprint="f")

    assert way.state.held == ""
    assert way.sent_on() == ["a"]


def test_other_credentials_are_tried_at_once(way):
    way.give(way.take()[1], "refused", words="no")
    way.probes()
    way.lines.probed(AIRFLOW, "refused", fingerprint="f", again_s=3600)
    way.later(3)

    assert way.lines.tick([(AIRFLOW, "f")], probe_s=5)[0] == []
    assert way.lines.tick([(AIRFLOW, "better")], probe_s=5)[0] == [AIRFLOW]
    assert way.lines.tick([(AIRFLOW, "better")], probe_s=5)[0] == []


def test_an_operators_hold_outlasts_a_probe_and_a_release_has_a_dead_airflow_asked_now(way):
    way.give(way.take()[1], "refused", words="no")
    assert way.lines.hold(AIRFLOW, "we are at it") == "credentials"
    way.lines.probed(AIRFLOW, "ok", fingerprint="f")
    assert way.state.held == "maintenance"
    assert way.lines.release(AIRFLOW) == "maintenance"
    assert way.lines.release(AIRFLOW) == ""

    way.fail_until_open()
    way.lines.probed(AIRFLOW, "failed", fingerprint="f")
    assert way.probes() == []
    way.lines.release(AIRFLOW)
    assert way.probes() == [AIRFLOW]


def test_who_sends_many_is_told_to_stop_and_for_whom(way):
    way.accept("a", "b")
    _, token = way.take(want=4)
    way.begin("a"), way.begin("b")

    first = way.lines.give(
        AIRFLOW, [("", "ok", 0.01)], fingerprint="f", want=3, rank=time.time() + 60, token="more"
    )
    assert (first.slots, first.better, first.over) == (0, 2, False)
    assert way.lines.give(AIRFLOW, [("", "ok", 0.01)], fingerprint="f", rank=0.0).better == 0

    way.lines.hold(AIRFLOW, "now")
    assert way.lines.give(AIRFLOW, [(token, "ok", 0.01)], fingerprint="f", want=3, token="more").over
    assert way.state.in_flight == 3
    assert way.sent_on() == []


# All of it


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_the_limit_holds_and_all_have_their_turn(way, seed):
    """Workers take, give, die, are slow, are cut off; in the end everybody has had a slot, and is gone."""
    chance = random.Random(seed)  # noqa: S311
    everybody = [f"t{number}" for number in range(30)]
    way.accept(*everybody)
    queue, at_work, ended = list(everybody), {}, set()
    chance.shuffle(queue)

    def turn(calm: bool) -> None:
        queue.extend(way.sent_on())
        what = chance.random()
        if queue and what < 0.5:
            task_id = queue.pop(chance.randrange(len(queue)))
            if task_id in ended or task_id in at_work:
                return
            token = way.begin(task_id)
            if token:
                at_work[task_id] = token
        elif at_work and what < 0.8:
            task_id = chance.choice(list(at_work))
            token = at_work.pop(task_id)
            verdict = "ok" if calm else chance.choice(["ok", "ok", "strained", "timeout", "broken", "unused"])
            way.give(token, verdict, chance.random(), late_s=2.0)
            ended.add(task_id) if verdict == "ok" else queue.append(task_id)
        elif at_work and what < 0.85 and not calm:  # its worker dies, and its message comes back
            task_id = chance.choice(list(at_work))
            del at_work[task_id]
            queue.append(task_id)
        elif what < 0.9:
            way.later(chance.random() * 4)
            for token in at_work.values():
                way.lines.renew(AIRFLOW, [token])
        elif what < 0.92 and not calm:
            way.lines.hold(AIRFLOW, "x") if chance.random() < 0.5 else way.lines.release(AIRFLOW)
        elif way.probes():
            way.lines.probed(AIRFLOW, "ok" if calm else chance.choice(["ok", "failed"]), fingerprint="f")
        state = way.state
        assert state.in_flight + state.called <= max(4, state.in_flight)
        assert len(at_work) <= 4

    for _ in range(400):
        turn(calm=False)
    way.lines.release(AIRFLOW)
    for _ in range(4000):
        if len(ended) == len(everybody):
            break
        turn(calm=True)

    assert ended == set(everybody)
    assert (way.state.waiting, way.waits.size()) == (0, 0)
