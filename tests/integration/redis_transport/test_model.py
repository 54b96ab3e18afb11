"""Random interleavings of everything that moves a message, on a real server, against a simple model.

After each step every message is in exactly the one place that the model says: in a queue's list, in a hand,
held, parked, in quarantine, or gone because it was acknowledged or replaced by a newer copy of its task. Time
is made by setting scores. MODEL_SEEDS and MODEL_STEPS ask for more; a failure names its seed and its steps.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, get_args

import pytest
import redis
from kombu import Connection

from local.valkey import Valkey
from tasks.redis_transport import Keys, Lot, messages, scripts
from tasks.redis_transport import hand as hand_module
from tasks.redis_transport.channel import claim
from tasks.redis_transport.hand import Hand, Line, Why, restore
from tests.chance import drawn

SEEDS = int(os.environ.get("MODEL_SEEDS", "8"))
STEPS = int(os.environ.get("MODEL_STEPS", "250"))
FAR_S = 100_000.0  # a lease, and an eta, that no test waits for
QUEUES = ("a", "b")
TASKS = tuple(f"task-{number}" for number in range(6))
KEYS = Keys("pre:", "model")
LISTS = tuple(KEYS.queue(queue, priority) for priority in (0, 3) for queue in QUEUES)


class Owner:
    """A worker process, alive, or taken for dead without knowing it, or dead."""

    def __init__(self, url: str) -> None:
        self.hand = Hand(Line(redis.ConnectionPool.from_url(url)), KEYS, FAR_S)
        atexit.unregister(self.hand.release)
        self.name = self.hand.owner
        self.has: dict[
            int, tuple[int, str, int | None]
        ] = {}  # tag → number, list, times: what it thinks it holds
        self.acked: set[int] = set()  # not written yet
        self.full: set[str] = set()

    def end(self) -> None:
        self.hand.closed = True
        self.hand.client.close()


class Model:
    """Where every message is, and the random steps that change it."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.rng = url, random.Random(seed)  # noqa: S311 - a seed is the point
        self.redis = redis.Redis.from_url(url)
        self.redis.flushdb()
        options = {"global_keyprefix": KEYS.prefix}
        self.stock = Connection(url, transport_options=options)
        self.ours = Connection(
            url,
            transport="tasks.redis_transport:Transport",
            transport_options=options | {"namespace": KEYS.namespace},
        )
        self.lot: Lot = self.ours.default_channel.lot
        self.steps: list[str] = []
        self.number = 0
        self.place: dict[int, str] = {}  # of each message
        self.facts: dict[int, tuple[str, int]] = {}  # task id, retries
        self.due: set[int] = set()  # parked ones whose time has come
        self.parked: dict[str, int] = {}  # task id → message
        self.returned: Counter[int] = (
            Counter()
        )  # of those which came back; 0 where nothing counts against them
        self.cancelled: set[str] = set()
        self.home: dict[int, str] = {}  # list to which it goes back
        self.revoked: set[int] = set()
        self.owners: list[Owner] = []
        self.dead: list[Owner] = []  # killed; their leases run
        self.expired: set[str] = set()  # owners whose lease has run out
        self.gone: set[str] = set()  # restored once; to be looked at again
        for _ in range(3):
            self.new_owner()

    def close(self) -> None:
        for owner in (*self.owners, *self.dead):
            owner.end()
        self.stock.release()
        self.ours.release()
        self.redis.close()

    # -- what is so

    def look(self) -> dict[int, list[str]]:
        """Return every place in which each message is found."""
        found: dict[int, list[str]] = defaultdict(list)
        keys = [key.decode() for key in self.redis.scan_iter(count=1000)]
        own = KEYS.prefix + KEYS.namespace + ":"
        for key in keys:
            if key in LISTS or key.startswith(KEYS.hand_prefix):
                place, raws = key, self.redis.lrange(key, 0, -1)
            elif key.startswith(KEYS.held_prefix):
                place = key
                raws = [value.split(b"\0", 1)[1] for value in self.redis.hvals(key)]
            elif key == KEYS.parked:
                place, raws = "parked", [value.split(b"\0", 3)[3] for value in self.redis.hvals(key)]
                assert set(self.redis.hkeys(key)) == set(self.redis.zrange(KEYS.due, 0, -1))
            elif key == KEYS.quarantine:
                place, raws = "quarantine", [entry.message for entry in self.lot.quarantined()]
            else:
                known = ("leases", "gone", "due", "tags", "returned", "hands:", "cancelled")
                assert key.startswith(tuple(own + name for name in known)) or "_kombu" in key, key
                continue
            for raw in raws:
                found[json.loads(raw)["headers"]["number"]].append(place)
        return found

    def check(self) -> None:
        found = self.look()
        expected = {number: [place] for number, place in self.place.items() if place != "ended"}
        assert found == expected
        assert {name.decode() for name in self.redis.zrange(KEYS.gone, 0, -1)} == self.gone
        for owner in self.owners:  # who lives and is known to live, whose hands are known
            if self.redis.zscore(KEYS.leases, owner.name) is not None:
                assert {key.decode() for key in self.redis.smembers(KEYS.hands(owner.name))} == {*LISTS}
        for task_id, number in self.parked.items():
            assert self.place[number] == "parked"
            parked = self.lot.get(task_id)
            assert parked is not None
            assert parked.retries == self.facts[number][1]
            assert (parked.due_at <= time.time()) == (number in self.due)

    # -- helpers

    def new_owner(self) -> Owner:
        owner = Owner(self.url)
        owner.hand.watch(LISTS)
        self.owners.append(owner)
        return owner

    def envelope(self, task_id: str, retries: int, eta: str | None) -> tuple[Any, dict[str, Any]]:
        self.number += 1
        self.facts[self.number] = (task_id, retries)
        headers = {"task": "t", "id": task_id, "retries": retries, "eta": eta, "number": self.number}
        return [[], {}, {}], headers

    def is_older(self, task_id: str, retries: int) -> bool:
        """Tell whether a copy with more retries is parked."""
        there = self.parked.get(task_id)
        return there is not None and self.facts[there][1] > retries

    def park(self, number: int) -> None:
        """What the model makes of a message that is parked."""
        task_id, retries = self.facts[number]
        there = self.parked.get(task_id)
        if there is not None:
            if self.facts[there][1] > retries:
                self.place[number] = "ended"
                return
            self.place[there] = "ended"
            self.due.discard(there)
        self.parked[task_id] = number
        self.place[number] = "parked"

    def some(self, owner: Owner) -> int | None:
        """Choose a tag that an owner thinks it holds."""
        tags = [tag for tag in owner.has if tag not in owner.acked]
        return self.rng.choice(tags) if tags else None

    def is_held(self, owner: Owner, tag: int) -> bool:
        """Tell whether this claim of the message still counts."""
        return bool(self.redis.hexists(KEYS.held(owner.name), str(tag)))

    def raw_held(self, owner: Owner, tag: int) -> bytes | None:
        value = self.redis.hget(KEYS.held(owner.name), str(tag))
        return None if value is None else value.split(b"\0", 1)[1]

    def owner(self) -> Owner:
        return self.rng.choice(self.owners)

    def alive_again(self, owner: Owner) -> None:
        """What the model makes of a renewal, or of a claim after the lease had been restored."""
        self.expired.discard(owner.name)
        self.gone.discard(owner.name)

    # -- steps

    def publish(self) -> None:
        ours = self.rng.random() < 0.5
        queue, task_id = self.rng.choice(QUEUES), self.rng.choice(TASKS)
        retries, priority = self.rng.randint(0, 3), self.rng.choice((0, 3))
        ahead = self.rng.choice((None, FAR_S, -5.0))
        eta = None if ahead is None else (datetime.now(UTC) + timedelta(seconds=ahead)).isoformat()
        body, headers = self.envelope(task_id, retries, eta)
        connection = self.ours if ours else self.stock
        with connection.Producer() as producer:
            producer.publish(body, routing_key=queue, priority=priority, headers=headers, serializer="json")
        key = KEYS.queue(queue, priority)
        self.home[self.number] = key
        there = self.parked.get(task_id)
        if ours and ahead is not None and task_id in self.cancelled and not self.is_older(task_id, retries):
            self.place[self.number] = key
            self.revoked.add(self.number)
        elif ours and ahead == FAR_S:
            self.park(self.number)
        elif ours and ahead is not None and there is not None and self.facts[there][1] > retries:
            self.place[self.number] = "ended"
        else:
            self.place[self.number] = key
            if ours and ahead is not None and there is not None:
                self.unpark(task_id)

    def unpark(self, task_id: str) -> None:
        number = self.parked.pop(task_id)
        self.due.discard(number)
        self.place[number] = "ended"

    def move_into_hand(self) -> None:
        owner = self.rng.choice(self.owners + [dead for dead in self.dead if dead.name in self.known()])
        key = self.rng.choice(LISTS)
        if owner.name not in self.known():
            return  # it would renew its lease first
        raw = self.redis.lmove(key, KEYS.hand(owner.name, key), "RIGHT", "LEFT")
        if raw is not None:
            self.place[json.loads(raw)["headers"]["number"]] = KEYS.hand(owner.name, key)
            owner.full.add(key)

    def at_the_front(self, key: str, count: int = 1) -> set[int]:
        """The messages that come next from a list."""
        return {json.loads(raw)["headers"]["number"] for raw in self.redis.lrange(key, -count, -1)}

    def known(self) -> set[str]:
        """Owners of whose hands Redis knows."""
        return {name.decode() for key in (KEYS.leases, KEYS.gone) for name in self.redis.zrange(key, 0, -1)}

    def claim(self, lost: bool = False) -> None:
        owner = self.owner()
        wanted = self.rng.choice((0, 1, 1, 2, 5))
        lists = list(LISTS)
        before = {key: self.redis.lrange(key, 0, -1) for key in lists}
        full = [number for number, key in enumerate(lists, 1) if key in owner.full]
        tags, shas = owner.hand.take_acks()
        found = claim(
            owner.hand,
            lists,
            wanted=wanted,
            group=2,
            fair=self.rng.random() < 0.5,
            hands=full,
            tags=tags,
            shas=shas,
        )
        owner.full.clear()
        self.written(owner)
        self.alive_again(owner)
        assert len(found) <= wanted
        for tag, index, times, raw in found:
            number = json.loads(raw)["headers"]["number"]
            key = lists[index - 1]
            assert self.place[number] in (key, KEYS.hand(owner.name, key))
            if self.place[number] == key:
                assert raw == before[key].pop()  # the oldest first
            assert times == self.returned.get(number)
            self.place[number] = KEYS.held(owner.name)
            if not lost:
                owner.hand.hold(tag, raw, times)
                owner.has[tag] = (number, key, times)
        went_back: dict[str, list[int]] = defaultdict(list)
        for number, place in self.place.items():  # what the credit did not do for went back
            for key in lists:
                if place == KEYS.hand(owner.name, key) and lists.index(key) + 1 in full:
                    self.place[number] = key
                    went_back[key].append(number)
        for key, numbers in went_back.items():
            assert self.at_the_front(key, len(numbers)) == {*numbers}
        if len(found) < wanted:
            assert not any(self.redis.llen(key) for key in lists)
        if lost:
            owner.hand.uncertain = True

    def claim_whose_answer_is_lost(self) -> None:
        self.claim(lost=True)

    def written(self, owner: Owner) -> None:
        """Acknowledgements were written."""
        for tag in owner.acked:
            number, _, times = owner.has.pop(tag)
            if self.place[number] == KEYS.held(owner.name) and not self.redis.hexists(
                KEYS.held(owner.name), str(tag)
            ):
                still = self.tags_of(owner, number)
                if not still:
                    self.place[number] = "ended"
            if times is not None:
                self.returned.pop(number, None)
        owner.acked.clear()

    def tags_of(self, owner: Owner, number: int) -> list[bytes]:
        held = self.redis.hgetall(KEYS.held(owner.name))
        return [
            tag
            for tag, value in held.items()
            if json.loads(value.split(b"\0", 1)[1])["headers"]["number"] == number
        ]

    def acknowledge(self) -> None:
        owner = self.owner()
        tag = self.some(owner)
        if tag is not None and owner.hand.ack(tag):
            owner.acked.add(tag)

    def flush(self) -> None:
        owner = self.owner()
        owner.hand.flush()
        self.written(owner)

    def give_back(self) -> None:
        owner, why = self.owner(), self.rng.choice(get_args(Why))
        tag = self.some(owner)
        if tag is None:
            return
        held = self.is_held(owner, tag)
        owner.hand.give_back(tag, why=why)
        owner.hand.return_due()
        number, key, _ = owner.has.pop(tag)
        if held:
            assert self.at_the_front(key) == {number}
            self.place[number] = key
            if why != "unseen":
                self.returned[number] += why == "counted"

    def park_claimed(self) -> None:
        owner = self.owner()
        tag = self.some(owner)
        if tag is None:
            return
        number, key, times = owner.has[tag]
        task_id, retries = self.facts[number]
        raw = self.raw_held(owner, tag)
        held = raw is not None
        if raw is None:  # it is a zombie, and does not know
            raw = json.dumps({"headers": {"number": number, "id": task_id, "retries": retries}}).encode()
        readable = messages.Readable(json.loads(raw), None, task_id, retries, 0.0, None)
        messages.strip_eta(readable)
        soon = self.rng.random() < 0.3
        answer = self.lot.park(
            task_id,
            due=time.time() - 5 if soon else time.time() + FAR_S,
            retries=retries,
            queue_key=key,
            message=messages.encoded(readable),
            held=KEYS.held(owner.name),
            tag=tag,
        )
        if not held:
            assert answer == "gone"
            owner.hand.drop(tag)
            del owner.has[tag]
            if times is not None:
                self.returned.pop(number, None)
            return
        there = self.parked.get(task_id)
        if there is not None and self.facts[there][1] > retries:
            assert answer == "stale"
            self.place[number] = "ended"
        elif task_id in self.cancelled:
            assert answer == "cancelled"
            return  # it is Celery's now, which ends it
        elif soon:
            assert answer == "due"
            if there is not None:
                self.unpark(task_id)
            return  # it runs now
        else:
            assert answer == "parked"
            self.park(number)
            self.home[number] = key
        owner.hand.drop(tag)
        del owner.has[tag]
        self.returned.pop(number, None)

    def retry(self) -> None:
        """Publish the next attempt; the acknowledgement is another step, which may never come."""
        owner = self.owner()
        tag = self.some(owner)
        if tag is None:
            return
        task_id, retries = self.facts[owner.has[tag][0]]
        queue = self.rng.choice(QUEUES)
        body, headers = self.envelope(
            task_id, retries + 1, (datetime.now(UTC) + timedelta(seconds=FAR_S)).isoformat()
        )
        with self.ours.Producer() as producer:
            producer.publish(body, routing_key=queue, headers=headers, serializer="json")
        self.home[self.number] = KEYS.queue(queue)
        if task_id in self.cancelled and not self.is_older(task_id, retries + 1):
            self.place[self.number] = KEYS.queue(queue)
            self.revoked.add(self.number)
        else:
            self.park(self.number)

    def drop_stale(self) -> None:
        owner = self.owner()
        tag = self.some(owner)
        if tag is None:
            return
        number, _, times = owner.has[tag]
        task_id, retries = self.facts[number]
        there = self.parked.get(task_id)
        stale = there is not None and self.facts[there][1] > retries
        held = self.is_held(owner, tag)
        assert self.lot.is_stale(task_id, retries, KEYS.held(owner.name), tag) == stale
        if stale:
            owner.hand.drop(tag)
            del owner.has[tag]
            if held:
                self.place[number] = "ended"
            if times is not None:
                self.returned.pop(number, None)

    def time_comes(self) -> None:
        if self.parked:
            task_id = self.rng.choice(sorted(self.parked))
            self.redis.zadd(KEYS.due, {task_id: time.time() - self.rng.random()})
            self.due.add(self.parked[task_id])

    def move_due(self) -> None:
        most = self.rng.choice((1, 2, 1000))
        count, next_in, workers, _ = self.lot.move_due(most)
        assert count == min(most, len(self.due))
        assert workers == len({*self.known()} - self.gone)
        moved = [n for n in self.due if not self.redis.hexists(KEYS.parked, self.facts[n][0])]
        assert len(moved) == count  # and nothing early
        for number in moved:
            self.due.discard(number)
            del self.parked[self.facts[number][0]]
            self.place[number] = self.home[number]
        assert (next_in is None) == (not self.parked)

    def wake(self) -> None:
        ids = self.rng.sample(TASKS, 2)
        there = [self.parked[task_id] for task_id in ids if task_id in self.parked]
        assert self.lot.wake(ids) == len(there)
        self.due.update(there)
        for number in there:
            self.redis.zadd(KEYS.due, {self.facts[number][0]: 1})  # not 0: then each wake counts

    def revoke(self) -> None:
        task_id = self.rng.choice(TASKS)
        number = self.parked.get(task_id)
        assert self.lot.revoke(task_id) == (number is not None)
        if number is not None:
            self.due.add(number)
            self.revoked.add(number)
            self.redis.zadd(KEYS.due, {task_id: 1})

    def cancel(self) -> None:
        """Somebody asks for it; the parked message itself is another's affair."""
        task_id = self.rng.choice(TASKS)
        if task_id in self.cancelled:
            self.redis.zrem(KEYS.cancelled, task_id)
            self.cancelled.discard(task_id)
        else:
            self.redis.zadd(KEYS.cancelled, {task_id: time.time()})
            self.cancelled.add(task_id)
        assert set(self.lot.cancelled()[0]) == self.cancelled

    def amend_what_has_changed(self) -> None:
        """One that reads, and is overtaken by a park, changes nothing."""
        if self.parked:
            task_id = self.rng.choice(sorted(self.parked))
            keys = (KEYS.parked, KEYS.due)
            assert scripts.AMEND(self.redis, keys, (task_id, b"another", b"new")) == 0

    def renew(self) -> None:
        owner = self.owner()
        owner.hand.renew()
        owner.hand.return_due()
        self.alive_again(owner)
        # What was claimed without the owner's knowledge is back.
        for number, place in self.place.items():
            if place == KEYS.held(owner.name):
                known = [tag for tag, (n, *_) in owner.has.items() if n == number]
                if not any(self.is_held(owner, tag) for tag in known):
                    self.place[number] = self.home_of(number)

    def home_of(self, number: int) -> str:
        places = self.look()[number]
        assert len(places) == 1
        assert places[0] in LISTS
        return places[0]

    def crash(self) -> None:
        owner = self.owner()
        self.owners.remove(owner)
        self.dead.append(owner)
        owner.end()
        self.new_owner()

    def lease_runs_out(self) -> None:
        """Of a dead one, or of one that only stood still."""
        name = self.rng.choice(self.owners + self.rng.sample(self.dead, min(3, len(self.dead)))).name
        if self.redis.zadd(KEYS.leases, {name: 1}, xx=True, ch=True):
            self.expired.add(name)

    def second_look(self) -> None:
        mistaken = self.gone & {owner.name for owner in self.owners}  # they only stood still
        if self.gone:
            self.redis.zadd(KEYS.gone, {self.rng.choice(sorted(mistaken or self.gone)): 1}, xx=True)

    def restore_dead(self) -> None:
        again = {n.decode() for n in self.redis.zrangebyscore(KEYS.gone, 0, 2)}
        back = self.owner().hand.restore_dead()
        assert back == self.came_back(self.expired | again, counted=True)
        for name in again:
            self.gone.discard(name)
        self.gone |= self.expired
        self.expired.clear()

    def came_back(self, names: set[str], *, counted: bool) -> int:
        count = 0
        back: dict[str, list[int]] = defaultdict(list)
        for number, place in self.place.items():
            held = place.startswith(KEYS.held_prefix) and place.removeprefix(KEYS.held_prefix) in names
            hand = any(place.startswith(f"{KEYS.hand_prefix}{name}:") for name in names)
            if held or hand:
                self.place[number] = self.home_of(number)
                count += 1
                back[self.place[number]].append(number)
                if held and counted:
                    self.returned[number] += 1
        for key, numbers in back.items():
            assert self.at_the_front(key, len(numbers)) == {*numbers}
        return count

    def stop(self) -> None:
        """A worker ends in good order; what it held was not begun."""
        owner = self.owner()
        self.owners.remove(owner)
        tags = set(owner.acked)
        owner.hand.flush()
        self.written(owner)
        assert not tags & owner.has.keys()
        more = 1
        while more:
            answer = restore(owner.hand.client, KEYS, "stop", owner.name)
            assert answer is not None
            more = answer[2]
        self.came_back({owner.name}, counted=False)
        self.expired.discard(owner.name)
        self.gone.add(owner.name)
        owner.end()
        self.new_owner()

    def quarantine(self) -> None:
        owner = self.owner()
        tag = self.some(owner)
        if tag is None:
            return
        number, key, times = owner.has.pop(tag)
        raw = self.raw_held(owner, tag)
        sha = owner.hand.held[tag].sha or ""
        self.lot.quarantine(
            raw or b"what a zombie read",
            queue_key=key,
            reason="a test's",
            held=KEYS.held(owner.name),
            tag=tag,
            sha=sha,
        )
        owner.hand.held.pop(tag)
        if raw is not None:
            self.place[number] = "quarantine"
            self.home[number] = key
            if times is not None:
                self.returned.pop(number, None)

    def replay(self) -> None:
        entries = list(self.lot.quarantined())
        if not entries:
            return
        entry = self.rng.choice(entries)
        assert self.lot.replay(entry.number)
        assert not self.lot.replay(entry.number)
        number = json.loads(entry.message)["headers"]["number"]
        self.place[number] = entry.queue_key

    WEIGHTS: ClassVar = {
        "publish": 6,
        "move_into_hand": 3,
        "claim": 5,
        "claim_whose_answer_is_lost": 1,
        "acknowledge": 3,
        "flush": 2,
        "give_back": 2,
        "park_claimed": 3,
        "retry": 2,
        "drop_stale": 2,
        "time_comes": 2,
        "move_due": 2,
        "wake": 1,
        "revoke": 1,
        "cancel": 1,
        "amend_what_has_changed": 1,
        "renew": 2,
        "crash": 1,
        "lease_runs_out": 2,
        "second_look": 2,
        "restore_dead": 2,
        "stop": 1,
        "quarantine": 1,
        "replay": 1,
    }

    def step(self) -> None:
        name = self.rng.choices(list(self.WEIGHTS), list(self.WEIGHTS.values()))[0]
        self.steps.append(name)
        getattr(self, name)()

    def finish(self) -> None:
        """Whatever was killed: one worker that lives ends everything."""
        for owner in list(self.owners):
            self.owners.remove(owner)
            self.dead.append(owner)
            owner.end()
        last = self.new_owner()
        for owner in self.dead:
            self.redis.zadd(KEYS.leases, {owner.name: 1}, xx=True)
        last.hand.restore_dead()
        for name in self.redis.zrange(KEYS.gone, 0, -1):
            self.redis.zadd(KEYS.gone, {name: 1})
        last.hand.restore_dead()
        for task_id in self.redis.zrange(KEYS.due, 0, -1):
            self.redis.zadd(KEYS.due, {task_id: 1})
        self.lot.move_due()
        for entry in list(self.lot.quarantined()):
            self.lot.replay(entry.number)
        expected = {number for number, place in self.place.items() if place != "ended"}
        ended: list[int] = []
        while found := claim(
            last.hand, list(LISTS), wanted=200, group=2, fair=True, hands=[1, 2, 3, 4], tags=[], shas=[]
        ):
            for tag, _, times, raw in found:
                envelope = json.loads(raw)
                ended.append(envelope["headers"]["number"])
                if ended[-1] in self.revoked:
                    assert envelope["headers"]["parked_revoked"] is True
                last.hand.hold(tag, raw, times)
                last.hand.ack(tag)
            last.hand.flush()
        assert sorted(ended) == sorted(expected)
        assert self.look() == {}
        left = {key.decode() for key in self.redis.scan_iter()} - {
            KEYS.tags,
            KEYS.leases,
            KEYS.cancelled,
            KEYS.hands(last.name),
        }
        assert {key for key in left if "_kombu" not in key and key != KEYS.returned} == set()


@pytest.mark.parametrize("seed", [*range(SEEDS), drawn("seed").randrange(1000, 10**9)])
def test_every_message_is_in_exactly_one_place_whatever_happens(
    either: Valkey, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_module, "AGAIN_S", FAR_S)  # the steps say when it has passed
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
