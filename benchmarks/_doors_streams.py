"""Redis Streams: messages per second through `dagrelay listen`, of which one is killed every 5 s.

Two listeners of one stream, as one would run them: in turn each is ended by `kill -9` and started again; then
one alone (`…_alone`). The stream lies in the Redis of the workers, and is full before they start. No message
has a `key`: what was accepted twice would be seen. The clock runs from the first message accepted to the last
one acknowledged.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis import Redis

from local.process import ROOT, Process, clean_env
from local.valkey import Valkey
from producers.contract import QUEUE_TRIGGERS

from ._report import say

MESSAGES = 100_000
KILL_EVERY_S = 5.0
CLAIM_AFTER_S = 1.0
CAP_S = 120.0
STREAM, GROUP = "dag-triggers", "dagrelay"


def measure() -> dict[str, Any]:
    """Return the figures."""
    two, alone = measure_with(2), measure_with(1)
    return {
        "streams_per_s": two["per_s"],
        "streams_per_s_alone": alone["per_s"],
        "streams_lost": two["lost"] + alone["lost"],
        "streams_duplicates": two["duplicates"] + alone["duplicates"],
        "streams_messages": 2 * MESSAGES,
        "streams_kills": two["kills"] + alone["kills"],
        "streams_without_record": two["without_record"] + alone["without_record"],
    }


def measure_with(listeners: int) -> dict[str, Any]:
    """Return what becomes of all messages with so many listeners."""
    with tempfile.TemporaryDirectory() as folder, Valkey() as valkey, Redis.from_url(valkey.url) as redis:
        fill(redis, MESSAGES)
        running = [listener(valkey.url, Path(folder), number) for number in range(listeners)]
        kills = 0
        try:
            wait_for(lambda: redis.llen(QUEUE_TRIGGERS) > 0)
            began = last_kill = time.monotonic()
            while not over(redis) and time.monotonic() - began < CAP_S:
                if time.monotonic() - last_kill >= KILL_EVERY_S:
                    victim = kills % listeners
                    running[victim].kill()
                    running[victim] = listener(valkey.url, Path(folder), victim)
                    kills += 1
                    last_kill += KILL_EVERY_S
                time.sleep(0.05)
            seconds = time.monotonic() - began
        finally:
            for one in running:
                one.stop()
        figures = account(redis) | {"per_s": round(MESSAGES / seconds, 1), "kills": kills}
    say(f"streams, {listeners} listeners: {figures}")
    return figures


def fill(redis: Redis, messages: int) -> None:
    """Publish as many triggers, each told from the others by its conf."""
    with redis.pipeline(transaction=False) as pipe:
        for number in range(messages):
            pipe.xadd(STREAM, {"data": json.dumps({"dag_id": "sales", "conf": {"n": number}})})
            if number % 5000 == 4999:
                pipe.execute()
        pipe.execute()


def listener(url: str, folder: Path, number: int) -> Process:
    """Start one `dagrelay listen`."""
    source = f"{url}?stream={STREAM}&group={GROUP}&claim_after_s={CLAIM_AFTER_S:g}"
    return Process(
        [ROOT / ".venv/bin/dagrelay", "listen"],
        log=folder / f"listener-{number}.log",
        env=clean_env(DAGRELAY_REDIS_URL=url, DAGRELAY_LISTEN_URL=source),
        cwd=ROOT,
    )


def over(redis: Redis) -> bool:
    """Tell whether every message was delivered and acknowledged."""
    if redis.llen(QUEUE_TRIGGERS) < MESSAGES:
        return False
    (group,) = redis.xinfo_groups(STREAM)
    return bool(group["pending"] == 0 and group["lag"] == 0)


def account(redis: Redis) -> dict[str, Any]:
    """Count what was accepted: every message once, and each with its record."""
    accepted: Counter[int] = Counter()
    for message in redis.lrange(QUEUE_TRIGGERS, 0, -1):
        accepted[json.loads(json.loads(message)["body"])[1]["conf"]["n"]] += 1
    records = sum(1 for _ in redis.scan_iter("dagrelay:record:*", count=5000))
    return {
        "lost": MESSAGES - len(accepted),
        "duplicates": sum(accepted.values()) - len(accepted),
        "without_record": sum(accepted.values()) - records,
    }


def wait_for(ready: Callable[[], bool]) -> None:
    """Return when it is ready. Raises TimeoutError."""
    deadline = time.monotonic() + CAP_S
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError("the listeners accept nothing")
        time.sleep(0.01)
