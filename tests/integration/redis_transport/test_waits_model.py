"""Random interleavings of everything that happens to tasks that wait, on a real server, against a model.

What crashes between two commands just does not send the next one, and the older message comes back. After
each step every message is in the one place that the model says, what a task has not read is what it was told,
in order, and a task that is open has a message that is not stale. Time is made by setting scores. MODEL_SEEDS
and MODEL_STEPS ask for more; a failure names its seed and its steps.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import redis

from local.valkey import Valkey
from producers.stores.records import Accepted, Records, record_key, store
from producers.stores.waits import CANCELLED, DUE, PARKED, Claimed, Seen, Waits, looks_key, seen_key
from tasks import waiting
from tasks.redis_transport import Keys, Lot
from tasks.redis_transport.channel import claim
from tasks.redis_transport.hand import Hand, Line
from tests.chance import drawn

SEEDS = int(os.environ.get("MODEL_SEEDS", "8"))
STEPS = int(os.environ.get("MODEL_STEPS", "250"))
FAR_S = 100_000.0
KEYS = Keys("", "dagrelay")
QUEUE = "jobs"
GROUPS = ("service:a", "airflow:b")
WAKE = "hook"


@dataclass
class Message:
    task_id: str
    epoch: int
    place: str  # queue, parked, gone, or held:<owner>
    waits: bool = False


@dataclass
class Task:
    state: str = ""  # "" before acceptance, open, done, cancelled
    retried: int | None = None
    waited: bool = False
    retries: bool = False  # what it waits for is its next attempt
    group: str = ""
    unread: list[Any] = field(default_factory=list)
    cancelled: bool = False
    hooked: bool = False


@dataclass
class Run:
    """One message in a worker's hands. `stage`: claimed, read, retried (published, not stored), over."""

    worker: Worker
    tag: int
    number: int
    revoked: bool
    stage: str = "claimed"
    read: list[Any] = field(default_factory=list)


class Worker:
    def __init__(self, url: str) -> None:
        self.hand = Hand(Line(redis.ConnectionPool.from_url(url)), KEYS, FAR_S)
        atexit.unregister(self.hand.release)
        self.hand.watch([QUEUE])
        self.name = self.hand.owner
        self.runs: list[Run] = []
        self.revoked: set[str] = set()

    def close(self) -> None:
        self.hand.closed = True
        self.hand.client.close()


class Model:
    """Where every message is, what every task was told, and the random steps that change it."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.rng = url, random.Random(seed)  # noqa: S311 - a seed is the point
        self.client = redis.Redis.from_url(url)
        self.client.flushdb()
        self.steps: list[str] = []
        self.lot, self.waits, self.records = Lot(self.client, KEYS), Waits(self.client), Records(self.client)
        self.ids = ["one", "two"]
        self.tasks = {task_id: Task() for task_id in self.ids}
        self.messages: dict[int, Message] = {}
        self.workers = [Worker(self.url), Worker(self.url)]
        self.batches: list[tuple[str, str, Claimed]] = []
        self.told = 0

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.client.close()

    def one_of(self, *values: Any) -> Any:
        return self.rng.choice(values)

    def step(self) -> None:
        """Do one of the steps that can be done now; a task that has ended is followed by another one."""
        for number, task_id in enumerate(self.ids):
            if self.tasks[task_id].state in ("done", "cancelled") and self.rng.random() < 0.1:
                self.ids[number] = f"{task_id}'"
                self.tasks[self.ids[number]] = Task()
        possible = [name for name in self.WEIGHTS if self.can(name)]
        name = self.rng.choices(possible, [self.WEIGHTS[one] for one in possible])[0]
        self.steps.append(name)
        getattr(self, name)()

    def can(self, name: str) -> bool:
        if name in self.NEEDS:
            return bool(self.runs(self.NEEDS[name]))
        if name in ("claim", "claim_and_begin"):
            return bool(self.client.llen(QUEUE))
        return True

    # -- helpers

    def new(self, task_id: str, epoch: int, place: str, waits: bool = False) -> bytes:
        number = len(self.messages) + 1
        self.messages[number] = Message(task_id, epoch, place, waits)
        headers = {"id": task_id, "task": "t", "retries": epoch, "number": number, "waiting": waits or None}
        return json.dumps({"body": "{}", "headers": headers}).encode()

    def parked(self, task_id: str) -> Message | None:
        found = [one for one in self.messages.values() if (one.task_id, one.place) == (task_id, "parked")]
        assert len(found) <= 1
        return found[0] if found else None

    def unpark(self, task_id: str, place: str) -> bool:
        there = self.parked(task_id)
        if there is not None:
            there.place = place
        return there is not None

    def runs(self, *stages: str) -> list[Run]:
        return [run for worker in self.workers for run in worker.runs if run.stage in stages]

    def run_at(self, stage: str) -> tuple[Run, Message, Task]:
        run = self.rng.choice(self.runs(stage))
        message = self.messages[run.number]
        return run, message, self.tasks[message.task_id]

    def observation(self) -> int:
        self.told += 1
        return self.told

    # -- the life of a message

    def accept(self) -> None:
        task_id = self.rng.choice(self.ids)
        task = self.tasks[task_id]
        fresh = not task.state
        message = self.new(task_id, 0, "queue" if fresh else "gone")
        assert self.records.accept(Accepted(task_id, QUEUE, message, 0.0, "t", "", "", "", "", "")) == fresh
        task.state = task.state or "open"

    def claim(self) -> None:
        worker = self.rng.choice(self.workers)
        for tag, _, times, raw in claim(
            worker.hand, [QUEUE], wanted=1, group=1, fair=False, hands=[], tags=[], shas=[]
        ):
            worker.hand.hold(tag, raw, times)
            headers = json.loads(raw)["headers"]
            number = headers["number"]
            message = self.messages[number]
            assert message.place == "queue"
            message.place = f"held:{worker.name}"
            if times is not None:
                there = self.parked(message.task_id)
                stale = there is not None and there.epoch > message.epoch
                assert stale == self.lot.is_stale(message.task_id, message.epoch, KEYS.held(worker.name), tag)
                if stale:
                    worker.hand.drop(tag)
                    message.place = "gone"
                    return
            revoked = bool(headers.get("parked_revoked")) or message.task_id in worker.revoked
            worker.runs.append(Run(worker, tag, number, revoked))

    def claim_and_begin(self) -> None:
        self.claim()
        for _ in self.runs("claimed"):
            self.begin()

    def begin(self) -> None:
        """Celery's own look at what is revoked, the task's at its record, then what it was told."""
        run, message, task = self.run_at("claimed")
        if run.revoked:
            self.store(message, task, "cancelled")
            run.stage = "over"
            return
        record = self.records.get(message.task_id)
        assert record is not None
        assert record.ended == (task.state in ("done", "cancelled"))
        if record.ended or record.retried > message.epoch:
            run.stage = "over"
            return
        run.read = self.waits.observations(message.task_id, message.epoch)
        assert run.read == task.unread
        run.stage = "read"
        if message.epoch > (task.retried or 0):
            task.retried = message.epoch

    def register(self) -> None:
        _, message, task = self.run_at("read")
        self.waits.register(message.task_id, [WAKE], 60)
        task.hooked |= task.state == "open"

    def wait(self) -> None:
        group, soon, repeated = self.one_of("", *GROUPS), self.one_of(True, False), self.one_of(True, False)
        late, crashes = self.rng.random() < 0.1, self.rng.random() < 0.1
        run, message, task = self.run_at("read")
        task_id, epoch, there = message.task_id, message.epoch + 1, self.parked(message.task_id)
        raw = self.new(task_id, epoch, "gone", waits=True)
        successor = self.messages[len(self.messages)]
        header = {
            "until": time.time() + (-5 if late else FAR_S),
            "what": "a job",
            "read": len(run.read),
            "look": group,
            "look_in_s": 0.0 if soon else FAR_S,
            "found": {"job_id": "7"},
        }
        answer = waiting.park(self.client, task_id, epoch, QUEUE, raw, header)
        if task.state != "open":
            assert answer == "ended"
        elif (task.retried is not None and task.retried >= epoch) or (there and there.epoch > epoch):
            assert answer == "stale"
        elif task.cancelled:
            assert answer == "cancelled"
            if crashes:  # nothing was written, and the older message is not acknowledged
                run.worker.runs.remove(run)
                return
            self.lot.send_on_revoked(QUEUE, raw)
            successor.place = "queue"
        else:
            count = len(run.read)
            assert task.unread[:count] == run.read  # what is taken away is what this one has read
            del task.unread[:count]
            task.retried, task.waited, task.retries, task.group = epoch, True, False, group
            self.unpark(task_id, "gone")
            successor.place = "queue" if late or task.unread else "parked"
            assert answer == ("parked" if successor.place == "parked" else "queued")
            if repeated:
                assert waiting.park(self.client, task_id, epoch, QUEUE, raw, header) == "stale"
        run.stage = "over"

    def retry(self) -> None:
        late = self.one_of(True, False)
        run, message, task = self.run_at("read")
        task_id, epoch, there = message.task_id, message.epoch + 1, self.parked(message.task_id)
        raw = self.new(task_id, epoch, "gone")
        successor = self.messages[len(self.messages)]
        due = time.time() + (-5 if late else FAR_S)
        answer = self.lot.park(task_id, due=due, retries=epoch, queue_key=QUEUE, message=raw)
        if there is not None and there.epoch > epoch:
            assert answer == "stale"
        elif task.cancelled:
            assert answer == "cancelled"
            self.lot.send_on_revoked(QUEUE, raw)
            successor.place = "queue"
        else:
            assert answer == ("queued" if late else "parked")
            self.unpark(task_id, "gone")
            successor.place = "queue" if late else "parked"
        run.stage = "retried"

    def store(self, message: Message, task: Task, state: Any) -> None:
        was_open = task.state == "open"
        more = {"retried": str(message.epoch + 1)} if state == "waiting" else {}
        answer = store(
            self.client,
            message.task_id,
            result=b"{}",
            result_ttl_s=60,
            state=state,
            found=more,
            next_in_s=FAR_S,
        )
        done = bool(answer)
        if state == "waiting":
            newer = task.retried is None or task.retried <= message.epoch
            assert done == (was_open and newer)
            if done:
                task.retried, task.retries = message.epoch + 1, True
            return
        assert done == was_open
        if done:
            task.state, task.unread, task.cancelled = state, [], False
            if task.waited:
                self.unpark(message.task_id, "gone")

    def store_retry(self) -> None:
        run, message, task = self.run_at("retried")
        self.store(message, task, "waiting")
        run.stage = "over"

    def end(self) -> None:
        run, message, task = self.run_at("read")
        self.store(message, task, "done")
        run.stage = "over"

    def acknowledge(self) -> None:
        run, message, _ = self.run_at("over")
        worker = run.worker
        held = self.client.hexists(KEYS.held(worker.name), str(run.tag))
        worker.hand.ack(run.tag)
        worker.hand.flush()
        worker.runs.remove(run)
        if held:
            message.place = "gone"

    def crash(self) -> None:
        self.lease_runs_out(self.one_of(0, 1), dies=True)

    def stand_still(self) -> None:
        """And go on, with what somebody else may run as well."""
        self.lease_runs_out(self.one_of(0, 1), dies=False)

    def lease_runs_out(self, who: int, dies: bool) -> None:
        worker = self.workers[who]
        self.client.zadd(KEYS.leases, {worker.name: 1}, xx=True)
        self.workers[1 - who].hand.restore_dead()
        for message in self.messages.values():
            if message.place == f"held:{worker.name}":
                message.place = "queue"
        if dies:
            worker.close()
            self.workers[who] = Worker(self.url)

    # -- what wakes

    def wake(self) -> None:
        task_id, says = self.rng.choice(self.ids), self.one_of(True, True, False)
        task = self.tasks[task_id]
        observation = self.observation() if says else None
        if task.state == "open" and (task.waited or says):
            task.unread.append(observation)
        assert self.waits.wake([task_id], observation) == ([task_id] if self.unpark(task_id, "queue") else [])

    def wake_by_key(self) -> None:
        observation = self.observation()
        woken, mailed = 0, 0
        for task_id, task in self.tasks.items():
            if task.hooked and task.state == "open":
                task.unread.append(observation)
                sent_on = self.unpark(task_id, "queue")
                woken, mailed = woken + sent_on, mailed + (not sent_on)
        assert self.waits.wake_by_key(WAKE, observation) == (woken, mailed)

    def deadline(self, task_id: str = "") -> None:
        task_id = task_id or self.rng.choice(self.ids)
        if self.parked(task_id) is not None:
            self.client.zadd(DUE, {task_id: 1}, xx=True)
            assert self.lot.move_due()[0] == 1
            self.unpark(task_id, "queue")

    def cancel(self) -> None:
        task_id = self.rng.choice(self.ids)
        task = self.tasks[task_id]
        state = self.waits.cancel(task_id)
        if task.state in ("done", "cancelled"):
            assert state == task.state
            return
        if not task.state:
            assert state == ""
            self.client.zrem(CANCELLED, task_id)  # asked for before it was accepted: another promise
            return
        task.cancelled = True
        self.unpark(task_id, "queue")

    def hear_of_cancels(self) -> None:
        self.rng.choice(self.workers).revoked.update(self.lot.cancelled()[0])

    # -- looks

    def look_is_due(self) -> None:
        task_id = self.rng.choice(self.ids)
        group = self.tasks[task_id].group
        score = self.client.zscore(looks_key(group), task_id) if group else None
        if score is not None and f"{score:.6f}" not in {token for _, token, _ in self.batches}:
            self.client.zadd(looks_key(group), {task_id: 1}, xx=True)

    def claim_looks(self) -> None:
        group, lease_s = self.rng.choice(GROUPS), self.one_of(0.0, FAR_S)
        key = looks_key(group)
        due = {raw.decode() for raw in self.client.zrangebyscore(key, 0, time.time())}
        expected = set()
        for task_id in due:
            there, task = self.parked(task_id), self.tasks[task_id]
            if there is not None and there.epoch == task.retried and not task.retries:
                expected.add(task_id)
        token, found = self.waits.claim_looks(group, lease_s=lease_s, most=10, facts=("job_id",))
        claimed = {one.task_id for one in found}
        assert claimed == expected  # no task that waits for its next attempt
        for one in found:
            there = self.parked(one.task_id)
            assert there is not None
            assert (one.epoch, one.facts) == (there.epoch, ("7",))
            self.batches.append((group, token, one))
        for task_id in due - claimed:
            assert self.client.zscore(key, task_id) is None

    def report(self) -> None:
        verb, soon = self.one_of("again", "changed", "error", "wake"), self.one_of(True, False)
        twice = self.one_of(True, False)
        if not self.batches:
            return
        index = self.rng.randrange(len(self.batches))
        group, token, look = self.batches[index] if twice else self.batches.pop(index)
        there = self.parked(look.task_id)
        score = self.client.zscore(looks_key(group), look.task_id)
        valid = there is not None and there.epoch == look.epoch and f"{score or 0:.6f}" == token
        first = "1" if verb == "error" else "running"
        if verb == "wake":
            observation = self.observation()
            first = json.dumps(observation)
        next_in_s = 0.0 if soon else FAR_S
        seen = [Seen(look.task_id, look.epoch, verb, next_in_s, first, "words")]
        assert self.waits.report(group, token, seen) == [valid]
        if valid and verb == "wake":
            self.tasks[look.task_id].unread.append(observation)
            self.unpark(look.task_id, "queue")

    # -- what is always so

    def every_message_is_in_its_place(self) -> None:
        found: dict[int, list[str]] = defaultdict(list)
        places = {"queue": self.client.lrange(QUEUE, 0, -1)}
        parked = self.client.hgetall(PARKED)
        places["parked"] = [value.split(b"\0", 3)[3] for value in parked.values()]
        assert {*parked} == {*self.client.zrange(DUE, 0, -1)}
        for key in self.client.scan_iter(f"{KEYS.held_prefix}*"):
            name = f"held:{key.decode().removeprefix(KEYS.held_prefix)}"
            places[name] = [value.split(b"\0", 1)[1] for value in self.client.hvals(key)]
        for place, raws in places.items():
            for raw in raws:
                found[json.loads(raw)["headers"]["number"]].append(place)
        assert found == {
            number: [message.place] for number, message in self.messages.items() if message.place != "gone"
        }

    def nothing_is_lost(self) -> None:
        for task_id, task in self.tasks.items():
            if task.state == "open":
                left = [m for m in self.messages.values() if m.task_id == task_id and m.place != "gone"]
                assert any(message.epoch >= (task.retried or 0) for message in left)

    def each_has_what_it_was_told_and_who_has_ended_has_nothing(self) -> None:
        for task_id, task in self.tasks.items():
            told = [json.loads(raw) for raw in self.client.lrange(seen_key(task_id), 0, -1)]
            assert told == task.unread
            looked_at = [group for group in GROUPS if self.client.zscore(looks_key(group), task_id)]
            assert (self.client.zscore(CANCELLED, task_id) is not None) == task.cancelled
            there = self.parked(task_id)
            if task.state in ("done", "cancelled"):
                assert not looked_at
                assert there is None or not there.waits
            elif there is not None and there.waits and task.group:
                assert looked_at == [task.group]

    def check(self) -> None:
        self.every_message_is_in_its_place()
        self.nothing_is_lost()
        self.each_has_what_it_was_told_and_who_has_ended_has_nothing()

    def finish(self) -> None:
        """Every worker is killed; another one brings what is left to its end."""
        cancelled = {task_id for task_id, task in self.tasks.items() if task.cancelled}
        for who in (0, 1):
            self.lease_runs_out(who, dies=True)
        for task_id in self.tasks:
            self.deadline(task_id)
        for worker in self.workers:
            worker.revoked.update(self.lot.cancelled()[0])
        while self.client.llen(QUEUE):
            self.claim_and_begin()
            if self.runs("read"):
                self.end()
            if self.runs("over"):
                self.acknowledge()
        seen = [seen_key(task_id) for task_id in self.tasks]
        assert not self.client.exists(QUEUE, PARKED, DUE, CANCELLED, *seen, *map(looks_key, GROUPS))
        assert not list(self.client.scan_iter(f"{KEYS.held_prefix}*"))
        for task_id, task in self.tasks.items():
            if task.state:
                record = self.records.get(task_id)
                assert record is not None
                assert record.ended
                assert record.state == "cancelled" or task_id not in cancelled
                assert self.client.ttl(record_key(task_id)) > 0

    NEEDS: ClassVar = {
        "begin": "claimed",
        "register": "read",
        "wait": "read",
        "retry": "read",
        "store_retry": "retried",
        "end": "read",
        "acknowledge": "over",
    }
    WEIGHTS: ClassVar = {
        "accept": 2,
        "claim": 2,
        "claim_and_begin": 6,
        "begin": 6,
        "register": 1,
        "wait": 10,
        "retry": 3,
        "store_retry": 4,
        "end": 1,
        "acknowledge": 5,
        "crash": 1,
        "stand_still": 1.5,
        "wake": 3,
        "wake_by_key": 2,
        "deadline": 2,
        "cancel": 0.5,
        "hear_of_cancels": 1,
        "look_is_due": 3,
        "claim_looks": 5,
        "report": 5,
    }


@pytest.mark.parametrize("seed", [*range(SEEDS), drawn("seed").randrange(1000, 10**9)])
def test_what_waits_is_neither_lost_nor_woken_for_an_old_reason_whatever_happens(
    either: Valkey, seed: int
) -> None:
    model = Model(either.url, seed)
    try:
        for _ in range(STEPS):
            model.step()
            model.check()
        model.finish()
    except BaseException:
        print(  # noqa: T201 - pytest shows it with the failure
            f"seed={seed} after {len(model.steps)} steps, the last: {model.steps[-12:]}"
        )
        raise
    finally:
        model.close()
