"""A worker that is told to end: what runs finishes or comes back, and all else is in the queue at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import redis

from tasks.redis_transport.hand import Line

from . import behaviour
from .behaviour import BUSY_S, LEASE_S, Server, World, until

server = behaviour.server

RUNS_S = 2 * LEASE_S
"""How long the tasks run: longer than the lease."""


@dataclass
class Ended:
    """What became of six tasks, two of them running and two more claimed, after a signal."""

    back_after_s: float = 0.0
    code: int = 0
    began: dict[str, list[str]] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    log: str = ""
    running: list[str] = field(default_factory=list)


WAYS = {
    "warm": (signal.SIGTERM, 0.0),
    "cold": (signal.SIGQUIT, 0.0),
    "soft": (signal.SIGQUIT, 1.0),
    "long soft": (signal.SIGQUIT, RUNS_S + 1),
}
POOLS = ("threads", "processes")


def end(world: World, pool: str, way: str) -> Ended:
    """Send six long tasks to a worker with two slots, end it, and let a second one do the rest."""
    number, soft_s = WAYS[way]
    found = Ended()
    first = world.worker(
        "first", pool=pool, c=2, worker_prefetch_multiplier=2, worker_soft_shutdown_timeout=soft_s
    )
    for mark in "abcdef":
        world.send("note", mark, RUNS_S if mark in "ab" else 0.1)
    until(lambda: len(world.notes("began")) == 2)
    until(lambda: world.length() == 2)
    found.running = world.marks("began")
    signalled_at = time.monotonic()
    first.send(number)
    try:
        if way != "long soft":  # in which the worker itself goes on with what it holds
            until(lambda: world.length() >= 4, timeout_s=60)
        found.back_after_s = time.monotonic() - signalled_at
        second = world.worker("second", pool="threads", c=2, wait=False)
        found.code = first.wait(30)
        second.wait_ready()
        until(lambda: set(world.marks("ended")) == set("abcdef"), timeout_s=60)
        # What runs a second time would begin within the lease.
        time.sleep(behaviour.BACK_S)
        second.stop()
    finally:
        found.log = first.text()
    for entry in world.notes("began"):
        found.began.setdefault(entry["mark"], []).append(entry["worker"])
    found.ended = world.marks("ended")
    found.left = world.held() | {"queue": world.length()}
    return found


@pytest.fixture(scope="module")
def ends(server: Server):
    """All of them at the same time: they mostly wait."""
    worlds = {(pool, way): server.world() for pool in POOLS for way in WAYS}
    with ThreadPoolExecutor(len(worlds)) as executor:
        futures: dict[tuple[str, str], Future[Ended]] = {
            (pool, way): executor.submit(end, world, pool, way) for (pool, way), world in worlds.items()
        }
        yield futures
    for world in worlds.values():
        world.close()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost_and_what_was_not_begun_is_back_at_once(ends, pool, way):
    found = ends[pool, way].result()

    assert set(found.ended) == set("abcdef")
    assert not any(found.left.values()), found.left
    for mark in set("abcdef") - set(found.running):
        assert len(found.began[mark]) == 1, found.began
    assert found.back_after_s < WAYS[way][1] + BUSY_S / 2, found.log


FINISHES = [
    *(("threads", "warm"), ("threads", "cold"), ("threads", "soft"), ("threads", "long soft")),
    *(("processes", "warm"), ("processes", "long soft")),
]


@pytest.mark.parametrize(("pool", "way"), FINISHES)
def test_what_runs_finishes_though_it_takes_longer_than_the_lease(ends, pool, way):
    """Threads cannot be killed: Celery waits for them in every shutdown."""
    found = ends[pool, way].result()

    assert sorted(found.running) == ["a", "b"]
    assert found.began["a"] == found.began["b"] == ["first"], found.log
    assert sorted(found.ended) == list("abcdef")


@pytest.mark.parametrize("way", ["cold", "soft"])
def test_what_ran_in_processes_is_cut_off_and_comes_back(ends, way):
    found = ends["processes", way].result()

    assert found.began["a"] == found.began["b"] == ["first", "second"]
    assert sorted(found.ended) == list("abcdef")  # the first time, they were cut off


def test_a_signals_handler_may_send_commands_while_it_interrupts_one(server: Server):
    """Celery's cold shutdown cancels its consumers in a handler: the same connection would never answer."""
    line = Line(redis.ConnectionPool.from_url(server.valkey.url))
    answers: list[bytes] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: answers.append(line.execute_command("PING")))
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        assert line.execute_command("BLPOP", "nothing", 1) is None
        assert answers == [b"PONG"]
        assert line.execute_command("ECHO", "hello") == b"hello"
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
        line.close()
