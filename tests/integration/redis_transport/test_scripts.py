"""Each script by itself where Redis refuses writes, and what an owner leaves who was taken for dead."""

from __future__ import annotations

import atexit
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError

from local.valkey import Valkey
from tasks.redis_transport import Keys, Lot, scripts
from tasks.redis_transport.channel import Feeder, claim
from tasks.redis_transport.hand import Hand, Line, restore

KEYS = Keys("", "scripts")
FAR_S = 100_000.0


def message(task_id: str, retries: int = 0) -> bytes:
    return json.dumps(
        {"headers": {"id": task_id, "retries": retries, "task": "t"}, "body": "x" * 500}
    ).encode()


class Scene:
    """Two owners, A who holds something and B who is dead with something, and one message in every place."""

    def __init__(self, url: str) -> None:
        self.redis = redis.Redis.from_url(url)
        self.redis.flushdb()
        self.lot = Lot(self.redis, KEYS)
        self.a, self.b = self.hand(url), self.hand(url)
        for hand in (self.a, self.b):
            hand.watch(["q"])
        self.tags: dict[bytes, int] = {}
        for hand, names in ((self.b, ("b1", "b2")), (self.a, ("a1", "a2", "a3"))):
            for name in names:
                self.redis.lpush("q", message(name))
            for tag, _, times, raw in self.claim(hand, 3):
                hand.hold(tag, raw, times)
                self.tags[raw] = tag
        for hand in (self.a, self.b):
            self.redis.lpush("q", message(hand.owner[-3:]))
            self.redis.lmove("q", KEYS.hand(hand.owner, "q"), "RIGHT", "LEFT")
        for name, due in (("p1", 1.0), ("p2", time.time() + FAR_S)):
            self.lot.park(name, due=time.time() + FAR_S, retries=2, queue_key="q", message=message(name, 2))
            self.redis.zadd(KEYS.due, {name: due})
        self.lot.quarantine(b"bad", queue_key="q", reason="r")
        self.redis.lpush("q", message("q1"), message("q2"))
        self.redis.zadd(KEYS.leases, {self.b.owner: 1})
        self.released: list[str] = []

    def hand(self, url: str) -> Hand:
        hand = Hand(Line(redis.ConnectionPool.from_url(url)), KEYS, FAR_S)
        atexit.unregister(hand.release)
        return hand

    def claim(self, hand: Hand, wanted: int, hands: tuple[int, ...] = (), tags: tuple[int, ...] = ()) -> Any:
        shas = ["0" * 40] if tags else []
        return claim(hand, ["q"], wanted=wanted, group=1, fair=False, hands=[*hands], tags=[*tags], shas=shas)

    def tag(self, name: str) -> int:
        return self.tags[message(name)]

    def all(self) -> dict[bytes, Any]:
        """Everything in Redis."""
        return {key: self.redis.dump(key) for key in self.redis.scan_iter()}

    def messages(self) -> list[bytes]:
        """Every message, wherever it is, without its place."""
        found = self.redis.lrange("q", 0, -1)
        for hand in (self.a, self.b):
            found += self.redis.lrange(KEYS.hand(hand.owner, "q"), 0, -1)
            found += [value.split(b"\0", 1)[1] for value in self.redis.hvals(KEYS.held(hand.owner))]
        found += [value.split(b"\0", 3)[3] for value in self.redis.hvals(KEYS.parked)]
        found += [entry.message for entry in self.lot.quarantined()]
        return sorted(found)

    def close(self) -> None:
        for hand in (self.a, self.b):
            hand.closed = True
            hand.client.close()
        self.redis.close()


@pytest.fixture
def scene(either: Valkey) -> Iterator[Scene]:
    made = Scene(either.url)
    yield made
    made.close()


@contextmanager
def full(client: redis.Redis) -> Iterator[None]:
    client.config_set("maxmemory", "1mb")  # less than the server takes when it is empty
    try:
        yield
    finally:
        client.config_set("maxmemory", "0")


@contextmanager
def readonly(client: redis.Redis) -> Iterator[None]:
    client.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        client.replicaof("NO", "ONE")


def park(scene: Scene, name: str, **more: Any) -> Any:
    facts = {"due": time.time() + FAR_S, "retries": 5, "queue_key": "q", "message": message(name, 5)} | more
    return scene.lot.park(name, **facts)


def held(scene: Scene, name: str) -> dict[str, Any]:
    return {"held": KEYS.held(scene.a.owner), "tag": scene.tag(name)}


# Every script in every way it writes: what is done, whether it goes on where Redis is full, and how many
# messages more or fewer there are after it.
STEPS: dict[str, tuple[Callable[[Scene], Any], bool, int]] = {
    "claim": (lambda s: s.claim(s.a, 2), True, 0),
    "claim the hand": (lambda s: s.claim(s.a, 2, (1,)), True, 0),
    "empty the hand": (lambda s: s.claim(s.a, 0, (1,)), True, 0),
    "empty the hand at the end": (lambda s: s.a._empty_hands(s.a.client), True, 0),
    "acknowledge and claim": (lambda s: s.claim(s.a, 2, (1,), (s.tag("a1"),)), True, -1),
    "claim without a lease": (lambda s: (s.redis.zscore(KEYS.leases, "x"), s.claim(s.b, 2)), True, 0),
    "acknowledge": (lambda s: (s.a.ack(s.tag("a1")), s.a.flush()), True, -1),
    "renew": (lambda s: s.a.renew(), True, 0),
    "renew what had run out": (lambda s: s.b.renew(), True, 0),
    "give back": (
        lambda s: scripts.GIVE_BACK(
            s.redis, (KEYS.held(s.a.owner), KEYS.returned), ("unseen", s.tag("a1"), s.tag("a2"))
        ),
        True,
        0,
    ),
    "give back, counted": (
        lambda s: scripts.GIVE_BACK(
            s.redis, (KEYS.held(s.a.owner), KEYS.returned), ("counted", s.tag("a1"), s.tag("a2"))
        ),
        True,
        0,
    ),
    "give back, begun": (
        lambda s: scripts.GIVE_BACK(
            s.redis, (KEYS.held(s.a.owner), KEYS.returned), ("begun", s.tag("a1"), s.tag("a2"))
        ),
        True,
        0,
    ),
    "restore": (lambda s: s.a.restore_dead(), True, 0),
    "stop": (lambda s: restore(s.a.client, KEYS, "stop", s.a.owner), True, 0),
    "publish what waits": (lambda s: park(s, "new"), False, 1),
    "publish what is due": (lambda s: park(s, "new", due=1.0), False, 1),
    "publish a newer copy": (lambda s: park(s, "p2"), False, 0),
    "publish a newer copy, due": (lambda s: park(s, "p2", due=1.0), False, 0),
    "park what is claimed": (lambda s: park(s, "a1", message=message("a1"), **held(s, "a1")), True, 0),
    "park a newer copy": (lambda s: park(s, "p2", **held(s, "a1")), True, -1),
    "drop an older copy": (lambda s: park(s, "p2", retries=1, **held(s, "a1")), True, -1),
    "claimed, and due": (lambda s: park(s, "p2", due=1.0, **held(s, "a1")), True, -1),
    "stale": (lambda s: s.lot.is_stale("p1", 1, KEYS.held(s.a.owner), s.tag("a1")), True, -1),
    "move": (lambda s: s.lot.move_due(), True, 0),
    "wake": (lambda s: s.lot.wake(["p2"]), False, 0),
    "revoke": (lambda s: s.lot.revoke("p2"), True, 0),
    "quarantine": (
        lambda s: s.lot.quarantine(message("a1"), queue_key="q", reason="r", **held(s, "a1")),
        True,
        0,
    ),
    "replay": (lambda s: s.lot.replay(next(s.lot.quarantined()).number), True, 0),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_script_that_redis_refuses_has_changed_nothing(scene, name):
    step, _, _ = STEPS[name]
    before = scene.all()

    with readonly(scene.redis), pytest.raises(ReadOnlyError):
        step(scene)

    assert scene.all() == before
    step(scene)  # and afterwards it does what it should
    assert scene.all() != before


@pytest.mark.parametrize("name", STEPS)
def test_where_redis_is_full_a_script_does_all_or_nothing(scene, name):
    step, goes_on, more = STEPS[name]
    before, messages = scene.all(), scene.messages()

    with full(scene.redis):
        if goes_on:
            step(scene)
        else:
            with pytest.raises(OutOfMemoryError):
                step(scene)

    if goes_on:
        assert scene.all() != before
        assert len(scene.messages()) == len(messages) + more
    else:
        assert scene.all() == before


@pytest.mark.parametrize("again", ["renew", "claim"])
def test_an_owner_that_was_taken_for_dead_and_lives_leaves_nothing_when_it_dies(scene, again):
    """It stood still for longer than its lease, everything was restored, and it goes on."""
    scene.redis.zadd(KEYS.leases, {scene.a.owner: 1})
    scene.b.restore_dead()  # B itself, and A
    for _ in range(2):
        for owner in scene.redis.zrange(KEYS.gone, 0, -1):
            scene.redis.zadd(KEYS.gone, {owner: 1})
        scene.b.restore_dead()
    assert not scene.redis.exists(KEYS.hands(scene.a.owner))

    if again == "renew":
        scene.a.renew()
    else:
        assert scene.claim(scene.a, 1)
    messages = scene.messages()
    scene.redis.lmove("q", KEYS.hand(scene.a.owner, "q"), "RIGHT", "LEFT")
    assert not scene.b.restore_dead()  # it lives

    scene.redis.zadd(KEYS.leases, {scene.a.owner: 1})  # now it is dead
    assert scene.b.restore_dead() >= 1
    assert scene.messages() == messages
    assert not scene.redis.exists(KEYS.hand(scene.a.owner, "q"), KEYS.held(scene.a.owner))


def test_what_a_process_holds_no_more_it_neither_parks_nor_puts_aside(scene):
    """It stood still; its message was restored, and is somebody else's now."""
    scene.redis.zadd(KEYS.leases, {scene.a.owner: 1})
    scene.b.restore_dead()
    before = scene.all()

    assert park(scene, "a1", **held(scene, "a1")) == "gone"
    scene.lot.quarantine(message("a2"), queue_key="q", reason="r", **held(scene, "a2"))

    assert scene.all() == before


def test_a_list_of_another_type_loses_nothing(scene):
    """Somebody has written a string where the queue `wrong` lies."""
    scene.redis.set("wrong", "x")
    messages = scene.messages()
    found = claim(scene.a, ["q", "wrong"], wanted=9, group=2, fair=True, hands=[1], tags=[], shas=[])
    assert len(found) == 3
    assert scene.messages() == messages


def test_ten_thousand_acknowledgements_are_one_write(scene):
    """As many as a long outage of Redis may leave; Lua unpacks some 8,000 at the most."""
    for first in (True, False):
        tags = {f"{number}": b"q\0x" for number in range(10**6, 10**6 + 20_000)}
        scene.redis.hset(KEYS.held(scene.a.owner), mapping=tags)  # type: ignore[arg-type]
        scene.redis.hset(KEYS.returned, mapping={f"{number:040}": 1 for number in range(20_000)})
        shas = [f"{number:040}" for number in range(20_000)]
        numbers = [int(tag) for tag in tags]
        if first:
            claim(scene.a, ["q"], wanted=1, group=1, fair=False, hands=[], tags=numbers, shas=shas)
        else:
            keys = (KEYS.held(scene.a.owner), KEYS.returned)
            scripts.ACKNOWLEDGE(scene.redis, keys, (len(numbers), *numbers, *shas))
        assert scene.redis.hlen(KEYS.held(scene.a.owner)) < 10
        assert scene.redis.hlen(KEYS.returned) == 0


def test_a_process_that_stood_still_does_not_take_itself_for_dead(scene):
    scene.redis.zadd(KEYS.leases, {scene.a.owner: 1})
    held = scene.redis.hgetall(KEYS.held(scene.a.owner))
    Feeder.restore_dead(SimpleNamespace(hand=scene.a, closed=False, since=-inf))
    assert scene.redis.hgetall(KEYS.held(scene.a.owner)) == held
    assert not scene.redis.exists(KEYS.held(scene.b.owner))


def test_one_owner_whose_messages_cannot_go_back_does_not_hold_up_the_thread(scene):
    """Its queue's key has become a string: said by an error, and nothing is lost."""
    scene.redis.rename("q", "was")
    scene.redis.set("q", "x")
    with pytest.raises(redis.ResponseError):
        scene.a.restore_dead()
    scene.redis.rename("was", "q")
    messages = scene.messages()
    assert scene.a.restore_dead() == 3
    assert scene.messages() == messages
