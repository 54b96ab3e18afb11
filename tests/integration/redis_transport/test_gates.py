"""The gate of a DAG, step by step: who may hand a run over, who waits, who is next, who asks Airflow."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
import redis

from local.valkey import Valkey
from producers.errors import DagNotFound
from producers.stores.gates import (
    ASKED_AT_ONCE,
    ASKING_S,
    CALLED_AT_ONCE,
    FRESH_S,
    HAND_S,
    PAUSE_S,
    SLOWEST_S,
    DagFacts,
    Entered,
    Gates,
    line_key,
)
from producers.stores.lines import Lines, ahead_s, called_key
from producers.stores.parking import CALL_S
from producers.stores.records import Accepted, Records, record_key, store
from producers.stores.waits import Waits
from tasks import waiting
from tests.integration.redis_transport.test_scripts import full

AIRFLOW, DAG = "default", "daily"
QUEUE = "triggers"
FAR_S = 100_000.0
RUNS = DagFacts()
PAUSED = DagFacts(paused=True)


def message(task_id: str, epoch: int) -> bytes:
    headers = {"id": task_id, "task": "x", "retries": epoch, "waiting": True}
    return json.dumps({"body": "{}", "headers": headers}).encode()


class Door:
    """The gate of one DAG, and what a test needs of its Redis."""

    def __init__(self, url: str) -> None:
        self.redis = redis.Redis.from_url(url)
        self.redis.flushdb()
        self.gates, self.records = Gates(self.redis), Records(self.redis)
        self.lines, self.waits = Lines(self.redis), Waits(self.redis)
        self.epochs: dict[str, int] = {}

    def now(self) -> float:
        seconds, micros = self.redis.time()
        return float(seconds) + float(micros) / 1e6

    def accept(self, task_id: str) -> None:
        """Have one accepted, and its message in a worker's hands."""
        about = Accepted(
            task_id, QUEUE, message(task_id, 0), 0.0, "x", DAG, f"run-{task_id}", "", AIRFLOW, ""
        )
        self.records.accept(about)
        self.redis.delete(QUEUE)

    def enter(
        self,
        task_id: str,
        window: int | str | None = None,
        if_paused: str = "trigger",
        run_id: str = "",
        dag_id: str = DAG,
    ) -> Entered:
        if not self.redis.exists(record_key(task_id)):
            self.accept(task_id)
        return self.gates.enter(
            AIRFLOW, dag_id, task_id, run_id or f"run-{task_id}", if_paused=if_paused, window=window
        )

    def park(
        self,
        task_id: str,
        window: int | str | None = None,
        if_paused: str = "trigger",
        priority: int = 5,
        told: Entered | None = None,
        dag_id: str = DAG,
    ) -> str:
        """Park a task at the gate, as `tasks.gates` does."""
        epoch = self.epochs[task_id] = self.epochs.get(task_id, 0) + 1
        found = {} if told is None else {"held_at": str(told.held_s), "paused_at": str(told.paused_s)}
        header = {"until": time.time() + FAR_S, "what": "its turn", "read": 0, "look": "", "look_in_s": 0.0}
        header |= {"line": line_key(AIRFLOW, dag_id, if_paused, window), "ahead_s": ahead_s(priority)}
        header["found"] = {"gated": "1", **found}
        return waiting.park(self.redis, task_id, epoch, QUEUE, message(task_id, epoch), header)

    def wait(self, task_id: str, window: int | str | None = None, if_paused: str = "trigger") -> str:
        """Have one try to pass and wait; return why it may not."""
        told = self.enter(task_id, window, if_paused)
        assert told.verdict not in ("pass", "ask"), told
        assert self.park(task_id, window, if_paused, told=told) == "parked"
        return told.verdict

    def say(self, facts: Any, asked_at: float | None = None, dag_id: str = DAG) -> None:
        self.gates.answered(AIRFLOW, dag_id, self.now() if asked_at is None else asked_at, facts)

    def made(self, task_id: str) -> None:
        self.gates.made(AIRFLOW, DAG, task_id, f"run-{task_id}")

    def not_made(self, task_id: str) -> None:
        self.gates.not_made(AIRFLOW, DAG, task_id)

    def sent_on(self) -> list[str]:
        """Take what was called from the queue, in the order in which it was."""
        found = [json.loads(raw)["headers"]["id"] for raw in self.redis.lrange(QUEUE, 0, -1)]
        self.redis.delete(QUEUE)
        return found

    def later(self, seconds: float) -> None:
        """Have it be so much later for whatever is known of gates."""
        for pattern in ("gate-tickets:*", "gate-made:*", "gates:*"):
            for key in self.redis.scan_iter(f"dagrelay:{pattern}"):
                for member, score in self.redis.zrange(key, 0, -1, withscores=True):
                    self.redis.zadd(key, {member: score - seconds})
        for key in self.redis.scan_iter("dagrelay:gate-facts:*"):
            for field in ("asked_at", "seen_at", "changed_at", "asking", "paused_from"):
                at = self.redis.hget(key, field)
                if at is not None:
                    self.redis.hset(key, field, f"{float(at) - seconds:.6f}")
        for key in self.redis.scan_iter("dagrelay:gate-asker:*"):
            self.redis.pexpire(key, max(0, self.redis.pttl(key) - int(1000 * seconds)))

    def tick(self) -> list[str]:
        """Do as a worker does twice a second; return the DAGs for which it is to ask."""
        return [dag_id for _, dag_id in self.gates.tick([AIRFLOW])]


@pytest.fixture
def door(either: Valkey) -> Door:
    """A gate on Valkey, and on the oldest Redis that is tried."""
    return Door(either.url)


# Places


def test_the_first_asks_and_others_wait_for_the_answer(door):
    assert door.enter("a", 2).verdict == "ask"
    assert door.wait("b", 2) == "turn"
    door.say(RUNS)

    assert door.sent_on() == ["b"]
    assert door.enter("a", 2).verdict == "pass"
    assert door.enter("b", 2).verdict == "pass"
    assert door.wait("c", 2) == "full"


def test_runs_that_there_are_and_those_handed_over_take_places_together(door):
    door.say(DagFacts(active=3))

    verdicts = [door.enter(name, 5).verdict for name in "abc"]

    assert verdicts == ["pass", "pass", "full"]
    told = door.enter("d", "max_active_runs")
    assert (told.verdict, told.places) == ("pass", None)  # the DAG has no limit of its own


def test_the_dags_own_limit_is_a_window(door):
    door.say(DagFacts(limit=4, active=3))

    assert door.enter("a", "max_active_runs").verdict == "pass"
    told = door.enter("b", "max_active_runs")
    assert (told.verdict, told.places) == ("full", 4)


def test_a_run_handed_over_takes_a_place_until_it_is_counted(door):
    door.say(RUNS)
    before = door.now()
    assert door.enter("a", 1).verdict == "pass"
    door.made("a")
    assert door.enter("b", 1).verdict == "full"

    door.say(RUNS, asked_at=before)  # when it was asked, the run was not there yet
    assert door.enter("b", 1).verdict == "full"
    door.say(DagFacts(active=1))
    assert door.enter("b", 1).verdict == "full"
    door.say(RUNS)  # it has ended
    assert door.enter("b", 1).verdict == "pass"


def test_an_answer_to_an_older_question_changes_nothing(door):
    before = door.now()
    door.say(DagFacts(active=5))

    door.say(RUNS, asked_at=before)

    assert door.enter("a", 5).verdict == "full"


def test_a_place_of_which_nothing_came_goes_to_the_next(door):
    door.say(RUNS)
    assert door.enter("a", 1).verdict == "pass"
    door.wait("b", 1)

    door.not_made("a")

    assert door.sent_on() == ["b"]
    assert door.enter("c", 1).verdict == "full"  # it is on its way
    assert door.enter("b", 1).verdict == "pass"


def test_after_a_lost_answer_the_place_is_kept_for_the_next_attempt(door):
    door.say(RUNS)
    assert door.enter("a", 1).verdict == "pass"
    door.records.attempt_failed("a", "no answer", unsure=True)

    door.not_made("a")
    assert door.enter("b", 1).verdict == "full"
    door.say(DagFacts(active=1))  # its run was made, and is counted

    assert door.enter("a", 1).verdict == "pass"
    door.later(HAND_S + 1)
    door.say(RUNS)
    assert door.enter("b", 1).verdict == "pass"


def test_what_airflow_said_is_believed_for_a_while(door):
    for turn in range(50):
        door.say(RUNS)
        door.later(FRESH_S - 0.5)
        began = door.now()
        told = [door.enter(f"{name}{turn}", 200).verdict for name in "ab"]
        if door.now() - began < 0.4:  # else this machine was too busy for it to be new
            break
        door.later(ASKING_S)
    assert told == ["ask", "pass"]  # old enough to be asked for again, and new enough to be believed
    door.later(1)

    assert door.enter("c", 200).verdict == "turn"
    door.later(ASKING_S)
    assert door.enter("c", 200).verdict == "ask"  # who asked was killed


def test_a_repeat_is_known_by_its_run(door):
    door.say(RUNS)
    assert not door.enter("a", 1, run_id="relay__k").made_here
    door.gates.made(AIRFLOW, DAG, "a", "relay__k")

    told = door.enter("b", 1, run_id="relay__k")

    assert (told.verdict, told.made_here) == ("full", True)


# Who waits, and who is next


def test_places_that_get_free_go_to_the_first_by_age_and_priority(door):
    door.say(DagFacts(active=2))
    for name, priority in (("old", 5), ("young", 5), ("urgent", 7)):
        told = door.enter(name, 2)
        door.park(name, 2, priority=priority, told=told)

    door.say(DagFacts(active=1))
    assert door.sent_on() == ["urgent"]
    door.say(DagFacts(active=1))
    assert door.sent_on() == []  # the place is the called one's
    assert door.enter("newcomer", 2).verdict == "full"
    assert door.enter("urgent", 2).verdict == "pass"
    door.made("urgent")
    door.say(RUNS)
    assert door.sent_on() == ["old", "young"]


def test_a_called_one_that_does_not_come_loses_its_place(door):
    door.say(DagFacts(active=1))
    door.wait("a", 1)
    door.wait("b", 1)
    door.say(RUNS)
    assert door.sent_on() == ["a"]

    door.later(CALL_S + 0.1)
    door.say(RUNS)

    assert door.sent_on() == ["b"]
    assert door.wait("a", 1) == "full"
    assert door.enter("b", 1).verdict == "pass"


def test_those_who_ask_for_less_do_not_wait_for_those_who_ask_for_more(door):
    door.say(DagFacts(paused=True, active=3))
    door.wait("held", None, "hold")
    door.wait("small", 1)
    door.wait("large", 3)

    door.say(DagFacts(paused=True, active=2))
    assert door.sent_on() == ["large"]
    door.say(DagFacts(active=2))
    assert door.sent_on() == ["held"]


def test_who_waits_for_a_place_is_called_when_it_is_to_fail_or_to_unpause(door):
    door.say(DagFacts(active=1))
    door.wait("fails", 1, "fail")
    door.wait("first", 1, "unpause")
    door.wait("second", 1, "unpause")

    door.say(DagFacts(paused=True, active=1))

    assert sorted(door.sent_on()) == ["fails", "first"]
    assert door.enter("fails", 1, "fail").verdict == "paused"
    assert door.enter("first", 1, "unpause").verdict == "paused"
    door.say(DagFacts(active=1))
    assert door.wait("first", 1, "unpause") == "full"


def test_what_is_wrong_with_a_dag_is_met_by_those_who_wait(door):
    door.say(DagFacts(active=1))
    door.wait("a", 1)

    door.say(DagNotFound(DAG, "gone"))

    assert door.sent_on() == ["a"]
    problem = door.enter("a", 1).problem
    assert isinstance(problem, DagNotFound)
    assert problem.args == (DAG, "gone")
    door.say(RUNS)
    assert door.enter("a", 1).verdict == "pass"


def test_many_are_called_a_few_at_a_time(door):
    for number in range(CALLED_AT_ONCE + 20):
        door.say(PAUSED)
        door.wait(f"t{number}", None, "hold")

    door.say(RUNS)
    assert len(door.sent_on()) == CALLED_AT_ONCE
    assert door.tick() == []

    assert len(door.sent_on()) == 20


def test_one_that_was_cancelled_is_no_more_in_the_line(door):
    door.say(DagFacts(active=1))
    door.wait("a", 1)

    door.waits.cancel("a")

    assert door.sent_on() == ["a"]
    assert not door.redis.exists(line_key(AIRFLOW, DAG, "trigger", 1))
    door.later(FRESH_S)
    assert door.tick() == []


def test_one_called_to_its_airflow_that_may_not_pass_gives_its_place_there_back(door):
    door.say(DagFacts(active=1))
    door.accept("a")
    door.redis.zadd(called_key(AIRFLOW), {"a": door.now() + CALL_S})

    assert door.wait("a", 1) == "full"

    assert not door.redis.exists(called_key(AIRFLOW))


def test_it_goes_on_where_redis_is_full(door):
    door.say(DagFacts(active=1))
    door.wait("a", 1)

    with full(door.redis):
        door.say(RUNS)
        assert door.enter("a", 1).verdict == "pass"
        door.made("a")

    assert door.sent_on() == ["a"]


# The time that does not count


def test_the_time_for_which_a_dag_is_paused_does_not_count_and_nothing_counts_twice(door):
    door.say(PAUSED)
    told = door.enter("a", None, "hold")
    door.park("a", None, "hold", told=told)
    door.redis.hincrbyfloat(record_key("a"), "due_at", -100)
    door.later(100)

    door.lines.hold(AIRFLOW, "maintenance")
    door.redis.hincrbyfloat(f"dagrelay:airflow:{AIRFLOW}", "held_since", -40)
    told = door.enter("a", None, "hold")

    assert told.age_s == pytest.approx(0, abs=1)
    assert float(door.redis.hget(record_key("a"), "held_s")) == pytest.approx(100, abs=1)
    assert told.paused_s == pytest.approx(60, abs=1)
    assert told.held_s == pytest.approx(40, abs=1)


def test_the_time_for_which_one_waits_for_a_place_counts(door):
    door.say(DagFacts(active=1))
    door.wait("a", 1)
    door.redis.hincrbyfloat(record_key("a"), "due_at", -100)

    assert door.enter("a", 1).age_s == pytest.approx(100, abs=1)


# Who asks


def test_one_worker_asks_for_what_waits_and_again_after_a_while(door):
    door.say(DagFacts(active=1))
    door.wait("a", 1)
    assert door.tick() == []  # it is known
    door.later(FRESH_S)

    assert door.tick() == [DAG]
    assert door.tick() == []
    door.say(DagFacts(active=1))
    door.gates.asked(AIRFLOW)
    door.later(1.1)
    assert door.tick() == [DAG]
    door.later(ASKING_S + 0.1)  # that worker was killed
    assert door.tick() == [DAG]
    door.gates.not_answered(AIRFLOW, DAG)
    door.gates.asked(AIRFLOW)
    door.later(FRESH_S)
    assert door.tick() == [DAG]


def test_where_nobody_waits_nothing_is_asked(door):
    door.say(DagFacts(active=1))
    door.enter("a", 1)
    door.later(100)

    assert door.tick() == []


@pytest.mark.parametrize(("quiet_s", "pause_s"), [(0, 1), (120, 4), (10_000, SLOWEST_S)])
def test_where_nothing_changes_it_is_asked_more_rarely(door, quiet_s, pause_s):
    door.say(DagFacts(active=1))
    door.wait("a", 1)
    door.later(quiet_s)
    door.say(DagFacts(active=1))

    door.later(pause_s - 0.3)
    assert door.tick() == []
    door.later(0.6)
    assert door.tick() == [DAG]


def test_a_few_are_asked_for_at_a_time_and_none_while_their_airflow_is_held(door):
    for number in range(ASKED_AT_ONCE + 2):
        dag_id = f"dag{number}"
        door.say(DagFacts(active=1), dag_id=dag_id)
        door.accept(f"t{number}")
        door.park(f"t{number}", 1, dag_id=dag_id)
    door.later(FRESH_S)

    door.lines.hold(AIRFLOW, "maintenance")
    assert door.tick() == []
    door.lines.release(AIRFLOW)
    assert len(first := door.tick()) == ASKED_AT_ONCE
    assert door.tick() == []
    door.gates.asked(AIRFLOW)
    door.later(PAUSE_S)
    assert sorted(first + door.tick()) == [f"dag{number}" for number in range(ASKED_AT_ONCE + 2)]


def test_how_many_wait_is_told(door):
    door.redis.sadd("dagrelay:airflows", AIRFLOW)
    door.say(DagFacts(paused=True, active=1))
    door.wait("a", 1)
    door.wait("b", None, "hold")

    assert door.gates.waiting() == 2
    assert door.waits.get("b").waits_for == "DAG daily is paused"
    assert door.waits.get("a").waits_for == "a free place among the 1 run of DAG daily"
    door.say(DagFacts(active=1))
    assert door.gates.waiting() == 1


# All together


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_there_are_never_more_runs_than_the_window(door, seed):
    """Requests come, answers are lost, workers die, places run out; somebody counts all the while."""
    chance = random.Random(seed)  # noqa: S311
    window, runs, posted, asking = 3, set[str](), dict[str, bool](), list[tuple[float, int]]()
    open_, parked, most, ended = list[str](), set[str](), 0, 0
    numbers = iter(range(10**6))
    for _ in range(1200):
        what = chance.random()
        parked -= (called := set(door.sent_on()))
        open_ += called
        if what < 0.2 and len(open_) + len(parked) < 12:
            open_.append(f"t{next(numbers)}")
            door.accept(open_[-1])
        elif what < 0.55 and open_:
            task_id = open_.pop(chance.randrange(len(open_)))
            told = door.enter(task_id, window)
            if told.verdict == "pass":
                lost = chance.random() < 0.3
                if chance.random() < 0.8 or posted.get(task_id):  # its run is made, or was
                    if not posted.get(task_id):
                        runs.add(task_id)
                    posted[task_id] = True
                    if not lost:
                        door.made(task_id)
                        store(door.redis, task_id, result="{}", result_ttl_s=60, state="done", found={})
                        ended += 1
                elif not lost:
                    door.not_made(task_id)
                    store(door.redis, task_id, result="{}", result_ttl_s=60, state="failed", found={})
                if lost:  # it tries again, with its own place
                    door.records.attempt_failed(task_id, "no answer", unsure=True)
                    open_.append(task_id)
            elif told.verdict == "ask":
                asking.append((door.now(), len(runs)))
                open_.append(task_id)
            elif posted.get(task_id):  # it is looked for, and found
                store(door.redis, task_id, result="{}", result_ttl_s=60, state="done", found={})
                ended += 1
            else:
                door.park(task_id, window, told=told)
                parked.add(task_id)
        elif what < 0.65 and asking:  # answers come late, and not in their order
            at, count = asking.pop(chance.randrange(len(asking)))
            door.say(DagFacts(active=count), asked_at=at)
            if chance.random() < 0.9:
                door.gates.asked(AIRFLOW)
        elif what < 0.8 and runs:
            runs.remove(chance.choice(sorted(runs)))
        elif what < 0.95:
            asking += [(door.now(), len(runs)) for _ in door.tick()]
        else:
            seconds = chance.random() * 3
            door.later(seconds)
            asking = [(at - seconds, count) for at, count in asking]
        most = max(most, len(runs))
        assert most <= window
    assert most > 1
    assert ended > 20
