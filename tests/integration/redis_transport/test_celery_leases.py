"""What a worker holds is its own while it lives, whatever becomes of its connections, and then another's."""

from __future__ import annotations

import time

import pytest

from . import behaviour
from .behaviour import BACK_S, BUSY_S, LEASE_S, Place, World, side_by_side, until

server = behaviour.server
running = behaviour.running

POOLS = ("threads", "processes")
QUEUES = ("work", "more", "most")
LONG_S = 3 * LEASE_S


def all_end_once(world: World, marks: set[str], timeout_s: float = 40.0) -> None:
    """Wait until all have ended; then as long as something might come back; and nothing may have."""
    until(lambda: marks <= set(world.marks("ended")), timeout_s, f"the end of {sorted(marks)}")
    time.sleep(BACK_S)
    assert sorted(world.marks("began")) == sorted(marks)
    until(lambda: not any(world.held().values()), what="the last acknowledgement")


@pytest.mark.parametrize("pool", [*POOLS, "solo"])
@side_by_side
def test_a_task_longer_than_the_lease_begins_once(place: Place, pool: str) -> None:
    world = place.world()
    world.worker("w1", pool=pool, c=2)
    world.worker("w2", pool=pool, c=2)
    for mark in "abc":
        world.send("note", mark, LONG_S)

    all_end_once(world, set("abc"))


@pytest.mark.parametrize("pool", POOLS)
@side_by_side
def test_connections_cut_under_running_tasks_repeat_none(place: Place, pool: str) -> None:
    """Four times; the last acknowledgements go over other connections than the messages came by."""
    _, world = place.own_world()
    workers = [world.worker(name, pool=pool, c=3, options=("-Q", ",".join(QUEUES))) for name in ("w1", "w2")]
    first = {f"{queue}-{number}" for queue in QUEUES for number in range(4)}
    for mark in sorted(first):
        world.send("note", mark, 3.0, queue=mark.partition("-")[0])
    until(lambda: len(world.notes("began")) == 6)

    for _ in range(4):
        world.redis.client_kill_filter(_type="normal", skipme=True)
        world.redis.client_kill_filter(_type="pubsub", skipme=True)
        time.sleep(0.7)
    until(lambda: first <= set(world.marks("ended")), 60)
    after = {f"{queue}-after" for queue in QUEUES}
    for queue in QUEUES:
        world.send("note", f"{queue}-after", queue=queue)

    all_end_once(world, first | after)
    for worker in workers:
        assert worker.process.alive
        assert "Unrecoverable" not in worker.text(), worker.text()


@pytest.mark.parametrize(("pool", "how"), [("threads", "stopped"), ("processes", "killed")])
@side_by_side
def test_a_restart_of_redis_under_running_tasks_repeats_none(place: Place, pool: str, how: str) -> None:
    """Without results: Celery itself needs Redis to write those, see below."""
    valkey, world = place.own_world(task_ignore_result=True)
    workers = [world.worker(name, pool=pool, c=2, options=("-Q", ",".join(QUEUES))) for name in ("w1", "w2")]
    first = {f"{queue}-{number}" for queue in QUEUES for number in range(3)}
    for mark in sorted(first):
        world.send("note", mark, 4.0, queue=mark.partition("-")[0])
    until(lambda: len(world.notes("began")) == 4)
    time.sleep(1.1)  # appendfsync everysec: the last second is what a dying machine loses

    valkey.kill() if how == "killed" else valkey.stop()
    time.sleep(LEASE_S)  # so every lease has run out when it is back
    valkey.start()
    until(lambda: first <= set(world.marks("ended")), 60)
    after = {f"{queue}-after" for queue in QUEUES}
    for queue in QUEUES:
        world.send("note", f"{queue}-after", queue=queue)

    all_end_once(world, first | after)
    for worker in workers:
        assert worker.process.alive
        assert "Unrecoverable" not in worker.text(), worker.text()


@side_by_side
def test_a_task_whose_result_cannot_be_written_is_not_held_for_ever(place: Place) -> None:
    """Celery's thread pool drops such a request without a word."""
    valkey, world = place.own_world()
    world.worker("w1", c=2)
    world.send("note", "a", 2.0)
    until(lambda: world.notes("began"))

    valkey.stop()
    until(lambda: world.notes("ended"))
    time.sleep(1)
    valkey.start()

    until(lambda: world.marks("ended") == ["a", "a"])
    until(lambda: not any(world.held().values()), what="the acknowledgement")


@pytest.mark.parametrize("pool", POOLS)
@side_by_side
def test_what_a_killed_worker_held_is_soon_with_another_one(place: Place, pool: str) -> None:
    """Two running and two claimed; the other worker has been there for longer than a lease."""
    world = place.world()
    first = world.worker("first", pool=pool, c=2, worker_prefetch_multiplier=2)
    for mark in "abcd":
        world.send("note", mark, 60.0 if mark in "ab" else 0.0)
    until(lambda: len(world.notes("began")) == 2)
    until(lambda: sum(world.held().values()) == 4)
    second = world.worker("second", pool="threads", c=4)
    time.sleep(LEASE_S + 0.5)

    first.kill()
    killed_at = time.monotonic()
    until(lambda: len(world.notes("began")) == 6, BACK_S + BUSY_S)

    assert time.monotonic() - killed_at < BACK_S + BUSY_S / 2
    again = [entry for entry in world.notes("began") if entry["worker"] == "second"]
    assert sorted(entry["mark"] for entry in again) == list("abcd")
    assert all(entry["redelivered"] for entry in again)
    second.kill()


@side_by_side
def test_our_short_lease_leaves_the_tasks_of_a_stock_worker_alone(place: Place) -> None:
    """One database, and kombu's own key names there. Our lease is 3 s, and its tasks run for 9 s."""
    world = place.world()
    its_own = {"task_default_queue": "stock", "broker_transport_options": {"visibility_timeout": 3600}}
    world.worker("stock", c=1, transport="stock", **its_own)
    for mark in "ab":
        world.send("note", mark, LONG_S, queue="stock")
    until(lambda: world.notes("began"))
    assert world.redis.hlen("unacked") >= 1

    world.worker("ours1", c=1)
    world.worker("ours2", c=1, options=("-Q", "work,idle"))

    all_end_once(world, set("ab"), timeout_s=60)
    assert {entry["worker"] for entry in world.notes("began")} == {"stock"}


@side_by_side
def test_a_stock_worker_of_little_patience_leaves_our_tasks_alone(place: Place) -> None:
    """One database. It puts back whatever it finds unacknowledged for a second, and our tasks run for 9 s."""
    world = place.world()
    hasty = {"visibility_timeout": 1, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    world.worker("stock", c=1, transport="stock", task_default_queue="stock", broker_transport_options=hasty)
    world.worker("ours", c=2, worker_prefetch_multiplier=2)
    for mark in "abcd":
        world.send("note", mark, LONG_S if mark in "ab" else 0.0)
    until(lambda: sum(world.held().values()) == 4)
    its_own = world.send("note", "stock", 4.0, queue="stock")

    until(lambda: set("abcd") <= set(world.marks("ended")), 60)
    time.sleep(BACK_S)
    ours = [entry["mark"] for entry in world.notes("began") if entry["id"] != its_own.id]
    assert sorted(ours) == list("abcd")
    assert len(world.notes("began", "stock")) > 1  # its own it does run again: it is as hasty as it was told


@pytest.mark.parametrize("pool", [*POOLS, "solo"])
@side_by_side
def test_a_task_over_its_budget_ends_its_process_and_comes_back(place: Place, pool: str) -> None:
    world = place.world()
    stuck = world.worker("stuck", pool=pool, c=2, env={"BEHAVIOUR_BUDGET_S": "2"})
    hangs = world.send("note", "hangs", 600.0)
    until(lambda: world.notes("began"))

    code = stuck.wait(40)

    assert code == 70, stuck.text()
    assert "stuck" in stuck.text()
    assert hangs.id in stuck.text().partition("CRITICAL")[2]
    until(lambda: world.length() == 1 or sum(world.held().values()) == 0, what="its message in the queue")
    world.worker("next")
    until(lambda: len(world.notes("began")) == 2, BACK_S + BUSY_S)
    assert world.notes("began")[1]["worker"] == "next"
