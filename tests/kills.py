"""Kills workers while they are busy, and counts what became of every message."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import redis

from tests.plain_worker import NAMESPACE, PlainWorker, Side, left, message, push

VISIBILITY_TIMEOUT_S = 3
"""Of both sides, with stock's sweep as quick as it can be set: what a dead worker held is back in seconds."""

END_S = 120.0


@dataclass
class Outcome:
    """What became of `messages`. `claimed` is what the killed workers held at their ends, as Redis has it."""

    messages: int
    kills: int = 0
    claimed: int = 0
    never_ran: int = 0
    ran_twice: int = 0
    extra_runs: int = 0
    unsettled: int = 0
    stray: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Mode:
    """How many workers, and which pool."""

    name: str
    workers: int
    options: tuple[str, ...]


MODES = (
    Mode("threads", 1, ("-P", "threads", "-c", "16")),
    Mode("processes", 1, ("-P", "processes", "-c", "2")),
    Mode("two_threads", 2, ("-P", "threads", "-c", "16")),
    Mode("two_processes", 2, ("-P", "processes", "-c", "2")),
)


def kill_often(
    side: Side,
    mode: Mode,
    redis_url: str,
    folder: Path,
    *,
    messages: int,
    kills: int,
    after_s: tuple[float, float] = (0.02, 0.4),
    seed: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Have workers run `messages` small tasks, kill one of them `kills` times in the midst of it, start the
    next; return what became of the messages once all is quiet.

    Each task leaves a line in a file, which outlives the kill of its writer. A kill comes `after_s` seconds
    (at random) after a worker has begun to run tasks: SIGKILL to the worker alone (its children of a
    pool find out) or to everything below it as well.
    """
    draw = random.Random(seed)  # noqa: S311 - no secret
    client = redis.Redis.from_url(redis_url)
    client.flushall()
    file = folder / f"{side}-{mode.name}.ran"
    file.unlink(missing_ok=True)
    file.touch()
    outcome = Outcome(messages)
    push(client, "celery", (message("note", (number,)) for number in range(messages)))

    def launched(number: int) -> PlainWorker:
        worker = PlainWorker(
            side,
            redis_url,
            folder,
            name=f"{mode.name}{number}",
            options=mode.options,
            conf={
                "broker_transport_options": {
                    "visibility_timeout": VISIBILITY_TIMEOUT_S,
                    "unacked_restore_interval": 1,
                    "unacked_restore_throttle": 1,
                }
            },
            PLAIN_FILE=str(file),
        )
        worker.launch()
        return worker

    workers = [launched(number) for number in range(mode.workers)]
    try:
        for number in range(kills):
            victim = workers.pop(0)
            victim.wait_ready()
            _wait_for_more(file, timeout_s=5)
            time.sleep(draw.uniform(*after_s))
            if draw.random() < 0.5:
                os.kill(victim.pid, signal.SIGKILL)
                victim.process.wait(10)
            else:
                victim.kill()
            outcome.kills += 1
            outcome.claimed += _claimed(client, side, victim.pid)
            progress(f"{side} {mode.name}: kill {number + 1} of {kills}, {client.llen('celery')} to go")
            workers.append(launched(mode.workers + number))
        for worker in workers:
            worker.wait_ready()
        deadline = time.monotonic() + END_S
        while left(client) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
    runs = Counter(int(line) for line in file.read_text().split())
    outcome.unsettled = left(client)
    outcome.never_ran = sum(1 for number in range(messages) if number not in runs)
    outcome.ran_twice = sum(1 for times in runs.values() if times > 1)
    outcome.extra_runs = sum(runs.values()) - len(runs)
    client.close()
    return outcome


def total(outcomes: Sequence[Outcome]) -> Outcome:
    """Add up."""
    names = ("messages", "kills", "claimed", "never_ran", "ran_twice", "extra_runs", "unsettled")
    return Outcome(**{name: sum(getattr(each, name) for each in outcomes) for name in names})


def _wait_for_more(file: Path, timeout_s: float) -> None:
    """Wait until a task has run from now on, or there is none left to run."""
    size, deadline = file.stat().st_size, time.monotonic() + timeout_s
    while file.stat().st_size == size and time.monotonic() < deadline:
        time.sleep(0.002)


def _claimed(client: redis.Redis, side: Side, pid: int) -> int:
    """Return how many messages a worker that was killed just now holds."""
    if side == "stock":  # its set is everybody's
        return int(client.hlen(f"{NAMESPACE}:unacked"))
    count = sum(client.hlen(key) for key in client.keys(f"{NAMESPACE}:held:*:{pid}:*"))
    return int(count + sum(client.llen(key) for key in client.keys(f"{NAMESPACE}:hand:*:{pid}:*")))
