"""Redis Streams: messages per second through `dagrelay listen`, of which one is killed every 5 s.

Two listeners of one stream, as one would run them: in turn each is ended by `kill -9` and started again; then
one alone (`…_alone`). The stream lies in the Redis of the workers, and is full before they start. No message
has a `key`: what was accepted twice would be seen. The clock runs from the first message accepted to the last
one acknowledged.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from redis import Redis

from local.valkey import Valkey
from producers.contract import QUEUE_TRIGGERS

from ._listeners import accepted, figures_of, listener, under_kills
from ._report import say

MESSAGES = 100_000
CLAIM_AFTER_S = 1.0
STREAM, GROUP = "dag-triggers", "dagrelay"


def measure() -> dict[str, Any]:
    """Return the figures."""
    return figures_of("streams", MESSAGES, measure_with, ["without_record"])


def measure_with(listeners: int) -> dict[str, Any]:
    """Return what becomes of all messages with so many listeners."""
    with tempfile.TemporaryDirectory() as folder, Valkey() as valkey, Redis.from_url(valkey.url) as redis:
        fill(redis, MESSAGES)
        source = f"{valkey.url}?stream={STREAM}&group={GROUP}&claim_after_s={CLAIM_AFTER_S:g}"
        seconds, kills, _ = under_kills(
            listeners,
            lambda number: listener(source, valkey.url, Path(folder), number),
            redis,
            lambda: over(redis),
        )
        found, total = accepted(redis, MESSAGES)
        records = sum(1 for _ in redis.scan_iter("dagrelay:record:*", count=5000))
    figures: dict[str, Any] = {**found, "without_record": total - records}
    figures |= {"per_s": round(MESSAGES / seconds, 1), "kills": kills}
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


def over(redis: Redis) -> bool:
    """Tell whether every message was delivered and acknowledged."""
    if redis.llen(QUEUE_TRIGGERS) < MESSAGES:
        return False
    (group,) = redis.xinfo_groups(STREAM)
    return bool(group["pending"] == 0 and group["lag"] == 0)
