"""A worker is killed after its n-th Redis command, for every n of a range; another one ends what it left.

CRASH_FROM and CRASH_TO ask for a range, each n with every server and pool; else these share the numbers.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection

from local.redis7 import Redis7
from local.valkey import Valkey

from .nursery import Nursery

# By some 20 commands the first batch is done, by 60 what it parked, by 90 all of it.
NUMBERS = list(range(1, 40)) + sorted(random.SystemRandom().sample(range(40, 90), 13))
AT_A_TIME = 20
NAMESPACE = "crash"  # of app.py
WANTED = {
    "plain a",
    "plain b",
    "plain eta",
    "again r 0",
    "again r 1",
    "again r 2",
    "follow f",
    "plain after f",
}


class Case:
    """One database with its messages, for one n."""

    def __init__(self, server: Valkey, number: int, folder: Path, pool: str) -> None:
        self.number, self.pool = number, pool
        self.url = server.url.removesuffix("/0") + f"/{number}"
        self.redis = redis.Redis.from_url(self.url)
        self.redis.flushdb()
        self.notes, self.log = folder / f"{number}.notes", folder / f"{number}.log"
        with Connection(self.url) as connection, connection.Producer() as producer:
            for task, name, eta in (
                ("plain", "a", None),
                ("again", "r", None),
                ("plain", "eta", 0.2),
                ("follow", "f", None),
                ("plain", "b", None),
            ):
                at = None if eta is None else (datetime.now(UTC) + timedelta(seconds=eta)).isoformat()
                producer.publish(
                    [[name], {}, {}],
                    routing_key="q",
                    headers={"task": task, "id": f"{task}-{name}", "eta": at},
                    serializer="json",
                )

    def order(self, kill_after: int = 0) -> dict[str, Any]:
        return {
            "url": self.url,
            "notes": str(self.notes),
            "log": str(self.log),
            "pool": self.pool,
            "name": f"w{self.number}-{kill_after}@here",
            "kill_after": kill_after,
        }

    def ran(self) -> Counter[str]:
        return Counter(self.notes.read_text().splitlines()) if self.notes.exists() else Counter()

    def left(self) -> dict[str, Any]:
        """What is still anywhere."""
        own = f"{NAMESPACE}:"
        found: dict[str, Any] = {}
        for raw in self.redis.scan_iter(count=1000):
            key = raw.decode()
            if key.startswith("_kombu") or key in {f"{own}tags", f"{own}leases", f"{own}gone"}:
                continue
            if not key.startswith(f"{own}hands:"):
                found[key] = self.redis.type(raw)
        return found

    def done(self) -> bool:
        ready = " ready." in self.log.read_text()
        return ready and self.ran().keys() >= WANTED and not self.left()


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_worker_killed_between_any_two_commands_leaves_everything_to_the_next(
    either: Valkey, nursery: Nursery, tmp_path: Path, pool: str
) -> None:
    if "CRASH_TO" in os.environ:
        numbers = list(range(int(os.environ.get("CRASH_FROM", "1")), int(os.environ["CRASH_TO"])))
    else:
        numbers = NUMBERS[2 * isinstance(either, Redis7) + (pool == "solo") :: 4]
    wrong: dict[int, Any] = {}
    before: dict[int, int] = {}
    twice = 0
    for first in range(0, len(numbers), AT_A_TIME):
        cases = [Case(either, number, tmp_path, pool) for number in numbers[first : first + AT_A_TIME]]
        pids = [nursery.start(**case.order(case.number)) for case in cases]
        codes = [nursery.end(pid) for pid in pids]
        assert set(codes) == {-signal.SIGKILL}
        before |= {case.number: sum(case.ran().values()) for case in cases}
        for case in cases:
            case.log.write_text("")  # so that "ready" is the second one's word
        pids = [nursery.start(**case.order()) for case in cases]
        until = time.monotonic() + 30
        while time.monotonic() < until and not all(case.done() for case in cases):
            time.sleep(0.1)
        codes = [nursery.end(pid, signal.SIGTERM) for pid in pids]
        for case, code in zip(cases, codes, strict=True):
            ran = case.ran()
            twice += sum(count - 1 for count in ran.values())
            if code or WANTED - ran.keys() or case.left():
                wrong[case.number] = (code, WANTED - ran.keys(), case.left(), case.log.read_text()[-3000:])
            case.redis.close()
    assert not wrong
    print(f"ran before the kill, by n: {before}; ran again: {twice}")  # noqa: T201 - read with -s
    # Only what the killed one had in its hands may have run again.
    assert twice <= 6 * len(numbers)
