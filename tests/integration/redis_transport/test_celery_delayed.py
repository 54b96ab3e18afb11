"""Delayed tasks wait in Redis: on time, once, held by no worker; revoked, they are ended by Celery itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import chord

from . import behaviour
from .behaviour import BUSY_S, CLOCK, OURS, Place, Server, World, ended, side_by_side, until

server = behaviour.server
running = behaviour.running

ZONE = "America/New_York"


@pytest.fixture(scope="module")
def shared(server: Server) -> Iterator[World]:
    """A world with two workers, in a time zone that is not UTC; its producers believe the same."""
    world = server.world(timezone=ZONE)
    for name in ("w1", "w2"):
        world.worker(name, c=4)
    yield world
    world.close()


@pytest.fixture
def ours(shared: World) -> Any:
    """A producer that publishes by our transport, as a worker does."""
    return shared.producer(OURS)


def began(world: World, mark: object, timeout_s: float = 20) -> dict[str, Any]:
    return until(lambda: world.notes("began", mark), timeout_s, f"the beginning of {mark}")[0]


def test_delayed_tasks_of_every_kind_begin_on_time_and_nothing_is_held_in_a_worker(shared: World, ours: Any):
    """countdown and eta, aware and naive; by our transport and by a stock producer; 80 of them."""
    wanted: dict[str, float] = {}
    start = time.time() + 6.0  # by then all of them are parked, on a busy machine too
    for number in range(20):
        due = start + number * 0.05
        aware = datetime.fromtimestamp(due, UTC)
        for kind, app, options in (
            ("ours-countdown", ours, {"countdown": due - time.time()}),
            ("ours-aware", ours, {"eta": aware}),
            ("stock-countdown", None, {"countdown": due - time.time()}),
            ("stock-offset", None, {"eta": aware.astimezone(ZoneInfo("Asia/Kolkata"))}),
        ):
            mark = f"{kind}-{number}"
            shared.send("note", mark, app=app, **options)
            wanted[mark] = due
    until(lambda: shared.lot.size() == 80)
    assert not shared.length()
    assert not any(shared.held().values())
    scheduled = shared.app.control.inspect(timeout=2).scheduled()
    assert scheduled
    assert not any(scheduled.values())

    until(lambda: wanted.keys() <= set(shared.marks("began")))

    late = sorted(
        entry["at"] - wanted[entry["mark"]] for entry in shared.notes("began") if entry["mark"] in wanted
    )
    print(f"late by {late[0]:.3f}, median {late[40]:.3f}, p95 {late[76]:.3f}, {late[-1]:.3f} s")  # noqa: T201
    assert len(late) == 80  # each of them once
    assert late[0] > -0.05
    assert late[-1] < BUSY_S
    assert shared.lot.size() == 0


def test_a_naive_eta_is_read_in_the_time_zone_of_the_app(shared: World, ours: Any):
    due = time.time() + 2.0
    naive = datetime.fromtimestamp(due, ZoneInfo(ZONE)).replace(tzinfo=None)
    for mark, app in (("naive-ours", ours), ("naive-stock", None)):
        shared.send("note", mark, app=app, eta=naive)
    for mark in ("naive-ours", "naive-stock"):
        assert -0.05 < began(shared, mark)["at"] - due < BUSY_S
    # What another client may put into the header itself, without an offset.
    due = time.time() + 2.0
    naive = datetime.fromtimestamp(due, ZoneInfo(ZONE)).replace(tzinfo=None)
    publish_with_eta(shared, "naive-raw", naive.isoformat())
    assert -0.05 < began(shared, "naive-raw")["at"] - due < BUSY_S


def publish_with_eta(world: World, mark: str, eta: str, task_id: str = "") -> None:
    """Publish as a client that writes the header `eta` itself."""
    task_id = task_id or f"id-{mark}"
    headers = {"lang": "c", "task": f"{behaviour.behaviour_app.__name__}.note", "id": task_id, "eta": eta}
    with world.app.producer_pool.acquire() as producer:
        body = ((mark,), {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
        producer.publish(body, routing_key="work", headers=headers, serializer="json", correlation_id=task_id)


def test_a_retry_waits_in_redis_and_comes_back_on_time(shared: World):
    result = shared.send("again", "again", 2, 1.0)
    until(lambda: shared.notes("began", "again"))
    until(lambda: shared.lot.get(result.id) and result.state == "RETRY")  # which is written after it

    assert ended(result) == "again"

    attempts = shared.notes("began", "again")
    assert [entry["retries"] for entry in attempts] == [0, 1, 2]
    gaps = [after["at"] - before["at"] for before, after in pairwise(attempts)]
    assert all(1.0 <= gap < 1.0 + BUSY_S for gap in gaps)


def test_a_chord_of_tasks_that_retry_completes_once(shared: World):
    header = [shared.signature("again", number, 2, 0.4) for number in range(6)]

    result = chord(header, app=shared.app)(shared.signature("total", "chord"))

    assert ended(result, 30) == 15
    time.sleep(1)
    assert len(shared.notes("total", "chord")) == 1
    assert len([entry for entry in shared.notes("ended") if entry["mark"] in range(6)]) == 6


def test_years_ahead_a_task_waits_for_nothing_but_redis_and_can_be_listed_and_sent_on(
    shared: World, ours: Any
):
    far = datetime.now(UTC) + timedelta(days=3650)
    ids = {
        mark: shared.send("note", mark, app=app, eta=far).id
        for mark, app in (("far-ours", ours), ("far-stock", None))
    }
    until(lambda: all(shared.lot.get(task_id) for task_id in ids.values()))

    found = {parked.task_id: parked for parked in shared.lot.list()}
    for task_id in ids.values():
        parked = found[task_id]
        assert parked.task.endswith(".note")
        assert abs(parked.due_at - far.timestamp()) < 0.01
        assert abs(parked.since - time.time()) < BUSY_S
        assert (parked.retries, parked.queue_key) == (0, "work")
        assert shared.lot.get(task_id) == parked
    assert shared.lot.wake([*ids.values(), "nobody"]) == 2

    for mark in ids:
        entry = began(shared, mark, BUSY_S)
        assert entry["retries"] == 0
        assert not entry["redelivered"]
    assert shared.lot.size() == 0


def test_a_later_message_of_the_same_task_replaces_the_parked_one(shared: World, ours: Any):
    first = shared.send("note", "first", app=ours, countdown=600, task_id="same")
    until(lambda: shared.lot.get(first.id))
    shared.send("note", "second", countdown=1200, task_id="same")  # a stock producer, so by way of a worker
    until(lambda: (shared.lot.get("same") or pytest.fail("gone")).due_at > time.time() + 900)
    assert shared.lot.size() == 1

    shared.lot.wake(["same"])

    began(shared, "second")
    assert not shared.notes("began", "first")


def test_from_inside_a_task_delayed_tasks_never_touch_a_queue(shared: World):
    task_id = ended(shared.send("later", "later", 600.0))
    assert shared.lot.get(task_id)
    shared.lot.wake([task_id])
    until(lambda: shared.notes("ended", "later"))


def revoked_and_told(world: World, app: Any, mark: str) -> Any:
    """Park a task that is part of a chord; return its result and the chord's."""
    failing = world.signature("note", mark).set(countdown=3600, task_id=f"id-{mark}")
    good = world.signature("note", 1)
    body = world.signature("total", mark).on_error(world.signature("told"))
    return app.AsyncResult(f"id-{mark}"), chord([failing, good], app=app)(body)


class Events:
    """Everything that workers tell Flower, by task id."""

    def __init__(self, world: World) -> None:
        self.seen: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._world = world
        self._thread = threading.Thread(target=self._capture, daemon=True)

    def _capture(self) -> None:
        with self._world.producer(behaviour.STOCK).connection_for_read() as connection:
            receiver = self._world.app.events.Receiver(connection, handlers={"*": self.seen.append})
            with receiver.consumer_context() as (connection, _, _):
                self._ready.set()
                while not self._stop.is_set():
                    try:
                        connection.drain_events(timeout=0.2)
                    except TimeoutError:
                        continue

    def of(self, task_id: str) -> list[str]:
        return [event["type"] for event in self.seen if event.get("uuid") == task_id]

    def __enter__(self) -> Events:
        self._thread.start()
        assert self._ready.wait(10)
        time.sleep(0.3)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)


def test_a_delayed_task_is_told_to_flower_once_as_received(shared: World, ours: Any):
    """By a stock producer it is seen when it is parked; by our transport when it comes back from the lot."""
    with Events(shared) as events:
        stock = shared.send("note", "told-stock", countdown=1.5)
        own = shared.send("note", "told-ours", app=ours, countdown=1.5)
        retried = shared.send("again", "told-again", 2, 0.3)
        until(lambda: "task-received" in events.of(stock.id), 1.2, "before its time")
        for mark in ("told-stock", "told-ours", "told-again"):
            until(lambda mark=mark: shared.notes("ended", mark))
        time.sleep(1)

        # Once when it is parked; what follows is Celery's own, of a message that came back to its queue.
        assert events.of(stock.id) == ["task-received", "task-received", "task-started", "task-succeeded"]
        assert events.of(own.id) == ["task-received", "task-started", "task-succeeded"]
        attempt = ["task-received", "task-started"]
        assert events.of(retried.id) == [
            *attempt,
            "task-retried",
            *attempt,
            "task-retried",
            *attempt,
            "task-succeeded",
        ]
        first = next(event for event in events.seen if event.get("uuid") == stock.id)
        assert first["name"].endswith(".note")
        assert (
            abs(
                datetime.fromisoformat(first["eta"]).timestamp()
                - shared.notes("began", "told-stock")[0]["at"]
            )
            < BUSY_S
        )


def test_a_parked_task_that_is_revoked_is_ended_by_celery_at_once(shared: World):
    with Events(shared) as events:
        result, whole = revoked_and_told(shared, shared.app, "revoked")
        until(lambda: shared.lot.get(result.id))
        asked_at = time.monotonic()

        shared.app.control.revoke(result.id)

        until(lambda: result.state == "REVOKED", BUSY_S)
        until(lambda: "task-revoked" in events.of(result.id), BUSY_S)
        until(lambda: shared.notes("told", whole.id), BUSY_S, "the chord's errback")
        assert time.monotonic() - asked_at < BUSY_S
        time.sleep(0.5)
        assert events.of(result.id).count("task-revoked") == 1
        assert shared.lot.size() == 0
        assert not shared.notes("began", "revoked")
        assert not shared.notes("total", "revoked")
        assert not whole.successful()


@pytest.mark.parametrize("by", ["ours", "stock"])
def test_what_would_expire_before_its_time_is_reported_when_it_expires(shared: World, ours: Any, by: str):
    with Events(shared) as events:
        sent_at = time.time()
        result = shared.send(
            "note", f"expires-{by}", app=ours if by == "ours" else None, countdown=600, expires=1.5
        )

        until(lambda: result.state == "REVOKED", 1.5 + BUSY_S)
        until(lambda: "task-revoked" in events.of(result.id), BUSY_S)

        assert time.time() - sent_at >= 1.4
        (told,) = (event for event in events.seen if event["type"] == "task-revoked")
        assert told["uuid"] == result.id
        assert told["expired"]
    assert not shared.notes("began", f"expires-{by}")
    assert shared.lot.size() == 0


@side_by_side
def test_a_task_revoked_before_every_worker_was_restarted_stays_revoked(place: Place) -> None:
    """By Celery's command while nobody takes messages, and in the lot while no worker is there."""
    world = place.world()
    first = world.worker("w1")
    asked = world.send("note", "a", countdown=3600)
    found = world.send("note", "b", countdown=3600)
    until(lambda: world.lot.size() == 2)
    world.app.control.cancel_consumer("work", reply=True, timeout=5, limit=1)
    world.app.control.revoke(asked.id)
    until(lambda: world.length() == 1, what="the revoked one back in its queue, marked")
    first.stop()
    assert world.lot.revoke(found.id)
    assert not world.lot.revoke(asked.id)

    world.worker("w2")

    until(lambda: asked.state == found.state == "REVOKED", BUSY_S)
    assert not world.notes("began")


@side_by_side
def test_what_expires_while_no_worker_is_there_is_reported_by_the_next_one(place: Place) -> None:
    world = place.world()
    worker = world.worker("w1")
    result = world.send("note", "a", countdown=2, expires=3)
    until(lambda: world.lot.get(result.id))
    worker.stop()
    time.sleep(4)

    world.worker("w2")

    until(lambda: result.state == "REVOKED", BUSY_S)
    assert not world.notes("began")


@side_by_side
def test_workers_with_clocks_a_minute_apart_run_delayed_tasks_on_time_and_once(place: Place) -> None:
    """Each of the two gets tasks that the other one has parked: theirs are different queues."""
    world = place.world()

    def clock(shift_s: int) -> dict[str, str]:
        return {"PYTHONPATH": str(CLOCK), "CLOCK_SHIFT_S": str(shift_s)}

    ahead = world.worker("ahead", env=clock(60), options=("-Q", "ahead,work"))
    behind = world.worker("behind", env=clock(-60), options=("-Q", "behind,work"))
    world.worker("right", options=("-Q", "right,work"))
    assert ahead.started_at() - time.time() > 45  # by what they log
    assert behind.started_at() - time.time() < -45
    due = time.time() + 4.0
    eta = datetime.fromtimestamp(due, UTC)
    wanted = [f"{queue}-{number}" for queue in ("ahead", "behind", "right", "work") for number in range(5)]
    for mark in wanted:
        world.send("note", mark, queue=mark.partition("-")[0], eta=eta)

    until(lambda: len(world.notes("ended")) == 20)
    time.sleep(1)

    assert sorted(world.marks("began")) == sorted(wanted)
    late = [entry["at"] - due for entry in world.notes("began")]
    assert min(late) > -0.05
    assert max(late) < BUSY_S
    assert {entry["worker"] for entry in world.notes("began")} >= {"ahead", "behind", "right"}
