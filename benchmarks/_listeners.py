"""`dagrelay listen` under `kill -9`: what the benchmarks of the queue doors have in common."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from redis import Redis

from local.process import ROOT, Process, clean_env
from producers.contract import QUEUE_TRIGGERS

KILL_EVERY_S = 5.0
CAP_S = 120.0


def figures_of(
    name: str, messages: int, measure_with: Callable[[int], dict[str, Any]], also: Sequence[str]
) -> dict[str, Any]:
    """Return the figures of two listeners, and of one alone; what is counted is that of both together."""
    two, alone = measure_with(2), measure_with(1)
    sums = {f"{name}_{what}": two[what] + alone[what] for what in ("lost", "duplicates", "kills", *also)}
    rates = {f"{name}_per_s": two["per_s"], f"{name}_per_s_alone": alone["per_s"]}
    return {**rates, **sums, f"{name}_messages": 2 * messages}


def listener(source: str, redis_url: str, folder: Path, number: int) -> Process:
    """Start one `dagrelay listen`."""
    return Process(
        [ROOT / ".venv/bin/dagrelay", "listen"],
        log=folder / f"listener-{number}.log",
        env=clean_env(DAGRELAY_REDIS_URL=redis_url, DAGRELAY_LISTEN_URL=source),
        cwd=ROOT,
    )


def under_kills(
    listeners: int, start: Callable[[int], Process], redis: Redis, over: Callable[[], bool]
) -> tuple[float, int, list[int]]:
    """Have so many listeners at work until it is over, and one of them in turn killed and started again.

    Returns the seconds since the first message was accepted, how many were killed, and the codes at the end:
    what is in hand is acknowledged first.
    """
    running = [start(number) for number in range(listeners)]
    kills = 0
    try:
        wait_for(lambda: int(redis.llen(QUEUE_TRIGGERS)) > 0)
        began = last_kill = time.monotonic()
        while not over() and time.monotonic() - began < CAP_S:
            if time.monotonic() - last_kill >= KILL_EVERY_S:
                victim = kills % listeners
                running[victim].kill()
                running[victim] = start(victim)
                kills += 1
                last_kill += KILL_EVERY_S
            time.sleep(0.05)
        seconds = time.monotonic() - began
    finally:
        codes = [one.stop() for one in running]
    return seconds, kills, codes


def accepted(redis: Redis, messages: int) -> tuple[dict[str, int], int]:
    """Count what was accepted, each told by the number in its conf: lost and duplicates, and all of them."""
    found: Counter[int] = Counter()
    for message in redis.lrange(QUEUE_TRIGGERS, 0, -1):
        found[json.loads(json.loads(message)["body"])[1]["conf"]["n"]] += 1
    total = sum(found.values())
    return {"lost": messages - len(found), "duplicates": total - len(found)}, total


def wait_for(ready: Callable[[], bool]) -> None:
    """Return when it is ready. Raises TimeoutError."""
    deadline = time.monotonic() + CAP_S
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError("the listeners accept nothing")
        time.sleep(0.01)
