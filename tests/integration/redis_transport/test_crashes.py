"""A worker is killed after its n-th Redis command, for every n of a range; another one ends what it left.

CRASH_FROM and CRASH_TO ask for a range, each n with every server and pool; else these share the numbers.
"""

from __future__ import annotations

import os
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
from tests.chance import drawn

from .nursery import Nursery

# By some 20 commands the first batch is done, by 60 what it parked, by 90 all of it.
NUMBERS = list(range(1, 40)) + sorted(drawn("numbers").sample(range(40, 90), 13))
AT_A_TIME = 20
END_S = 100.0  # a few on a quiet machine
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
        until = time.monotonic() + END_S
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


def test_a_worker_empties_a_full_redis_and_runs_nothing_twice(
    either: Valkey, nursery: Nursery, tmp_path: Path
) -> None:
    """It claims, parks, brings back and acknowledges; and its lease of 1 s is renewed all the while."""
    client = redis.Redis.from_url(either.url)
    client.flushdb()
    count = 2000
    with Connection(either.url) as connection, connection.Producer() as producer:
        for number in range(count):
            eta = datetime.now(UTC) + timedelta(seconds=4) if number % 10 == 0 else None
            headers = {"task": "plain", "id": f"{number}", "eta": eta and eta.isoformat()}
            producer.publish([[f"{number}"], {}, {}], routing_key="q", headers=headers, serializer="json")
    notes, log = tmp_path / "notes", tmp_path / "log"
    order: dict[str, Any] = {"url": either.url, "notes": str(notes), "log": str(log), "kill_after": 0}
    order |= {"pool": "threads"}
    pid = nursery.start(**order, name="w1@here")
    other = nursery.start(**order, name="w2@here")  # would restore what seems to be dead
    while not log.exists() or log.read_text().count(" ready.") < 2:
        time.sleep(0.01)
    time.sleep(0.5)  # has both of them in the middle of it
    client.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("more", "x")
        until = time.monotonic() + END_S
        while len(notes.read_text().splitlines()) < count and time.monotonic() < until:
            time.sleep(0.1)
        ran = Counter(notes.read_text().splitlines())
        assert set(ran) == {f"plain {number}" for number in range(count)}
        time.sleep(1.5)  # longer than a lease
        held = sum(client.hlen(key) for key in client.scan_iter(f"{NAMESPACE}:held:*"))
        assert (client.llen("q"), held, client.hlen(f"{NAMESPACE}:parked")) == (0, 0, 0)
        assert Counter(notes.read_text().splitlines()) == ran
        assert set(ran.values()) == {1}
        assert "onnection to broker lost" not in log.read_text()

        client.client_kill_filter(_type="normal", skipme=True)  # they connect again
        until = time.monotonic() + END_S
        while log.read_text().count("onnected to redis") < 4 and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.5)
        assert log.read_text().count("onnected to redis") == 4
        assert log.read_text().count("onnection to broker lost") == 2
    finally:
        client.config_set("maxmemory", "0")
    assert [nursery.end(each, signal.SIGTERM) for each in (pid, other)] == [0, 0]
    client.close()
