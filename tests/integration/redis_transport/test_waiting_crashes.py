"""A worker is killed after its n-th Redis command while its tasks wait, are woken and are looked at.

CRASH_FROM and CRASH_TO ask for a range, each n with both servers; else these share the numbers.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from local.redis7 import Redis7
from local.valkey import Valkey
from producers.stores.records import Accepted, Records
from producers.stores.waits import CANCELLED, DUE, PARKED, Waits, looks_key
from tasks import waiting
from tasks.redis_transport import Keys
from tests.chance import drawn

from .nursery import Nursery

NUMBERS = sorted(drawn("numbers").sample(range(1, 90), 32))  # by some 90 commands all of it is done
AT_A_TIME = 16
END_S = 100.0  # 16 workers take 5 s to start and end on a quiet machine, and a minute on a busy one
KEYS = Keys("", "dagrelay")
CYCLES = ("a", "b")


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    made = Nursery(tmp_path, "waiting_app")
    yield made
    made.close()


class Case:
    """One database with two cycles, for one n."""

    def __init__(self, server: Valkey, number: int, folder: Path) -> None:
        self.number = number
        self.url = server.url.removesuffix("/0") + f"/{number}"
        self.redis = redis.Redis.from_url(self.url)
        self.redis.flushdb()
        self.records = Records(self.redis)
        self.notes, self.log = folder / f"{number}.notes", folder / f"{number}.log"
        for name in CYCLES:
            envelope = {
                "body": json.dumps([[name], {}, {}]),
                "content-type": "application/json",
                "content-encoding": "utf-8",
                "headers": {"task": "cycle", "id": f"cycle-{name}"},
                "properties": {"delivery_info": {"exchange": "", "routing_key": "triggers"}},
            }
            about = ("cycle", "", "", "", "", "")
            raw = json.dumps(envelope).encode()
            assert self.records.accept(Accepted(f"cycle-{name}", "triggers", raw, 0.0, *about))

    def order(self, kill_after: int = 0) -> dict[str, Any]:
        return {
            "url": self.url,
            "notes": str(self.notes),
            "log": str(self.log),
            "pool": "threads",
            "name": f"w{self.number}-{kill_after}@here",
            "kill_after": kill_after,
        }

    def states(self) -> list[str]:
        found = [self.records.get(f"cycle-{name}") for name in CYCLES]
        return [one.state if one else "gone" for one in found]

    def left(self) -> list[str]:
        """What is still anywhere, of messages and of what was kept for what waits."""
        keys = [key.decode() for key in self.redis.scan_iter(count=1000)]
        kept = ("triggers", PARKED, DUE, CANCELLED, looks_key(""), KEYS.held_prefix, KEYS.hand_prefix)
        return [key for key in keys if key.startswith((*kept, "dagrelay:seen:", KEYS.quarantine))]

    def all(self) -> dict[bytes, Any]:
        """Everything in Redis, whatever the order in which it is kept."""
        client = self.redis
        read: dict[bytes, Callable[[bytes], Any]] = {
            b"hash": client.hgetall,
            b"set": client.smembers,
            b"string": client.get,
        }
        read |= {b"zset": lambda key: client.zrange(key, 0, -1, withscores=True)}
        read |= {b"list": lambda key: client.lrange(key, 0, -1)}
        return {key: read[client.type(key)](key) for key in client.scan_iter(count=1000)}

    def done(self) -> bool:
        return set(self.states()) == {"done"} and not self.left()

    def twice_at_once(self) -> list[str]:
        """Attempts that began before the same one had ended in the same process.

        The attempt after it may begin sooner: what waits may be woken as soon as it is parked, and its
        function ends only then.
        """
        running: set[tuple[str, str, str]] = set()
        found = []
        for line in self.notes.read_text().splitlines():
            what, name, retries, pid = line.split()
            if what == "end":
                running.discard((name, retries, pid))
            elif (name, retries, pid) in running:
                found.append(line)
            else:
                running.add((name, retries, pid))
        return found


def test_a_worker_killed_between_any_two_commands_of_a_wait_leaves_it_to_the_next(
    either: Valkey, nursery: Nursery, tmp_path: Path
) -> None:
    if "CRASH_TO" in os.environ:
        numbers = list(range(int(os.environ.get("CRASH_FROM", "1")), int(os.environ["CRASH_TO"])))
    else:
        numbers = NUMBERS[isinstance(either, Redis7) :: 2]
    wrong: dict[int, Any] = {}
    for first in range(0, len(numbers), AT_A_TIME):
        cases = [Case(either, number, tmp_path) for number in numbers[first : first + AT_A_TIME]]
        pids = [nursery.start(**case.order(case.number)) for case in cases]
        assert {nursery.end(pid) for pid in pids} == {-signal.SIGKILL}
        pids = [nursery.start(**case.order()) for case in cases]
        until = time.monotonic() + END_S
        while time.monotonic() < until and not all(case.done() for case in cases):
            time.sleep(0.1)
        codes = [nursery.end(pid, signal.SIGTERM) for pid in pids]
        for case, code in zip(cases, codes, strict=True):
            if code or not case.done() or case.twice_at_once():
                wrong[case.number] = (code, case.states(), case.left(), case.notes.read_text())
                wrong[case.number] += (case.twice_at_once(), case.log.read_text()[-3000:])
            case.redis.close()
    assert not wrong


def test_what_was_cancelled_before_a_worker_starts_is_not_begun(
    either: Valkey, nursery: Nursery, tmp_path: Path
) -> None:
    """It knows of it before it claims anything, not a moment later."""
    cases = [Case(either, number, tmp_path) for number in range(100, 108)]
    for case in cases:
        assert Waits(case.redis).cancel("cycle-a") == "accepted"
    pids = [nursery.start(**case.order()) for case in cases]
    until = time.monotonic() + END_S
    while time.monotonic() < until and {*map(tuple, (c.states() for c in cases))} != {("cancelled", "done")}:
        time.sleep(0.1)
    assert [nursery.end(pid, signal.SIGTERM) for pid in pids] == [0] * len(pids)
    assert [case.states() for case in cases] == [["cancelled", "done"]] * len(cases)
    assert not [case.number for case in cases if "begin a" in case.notes.read_text()]
    for case in cases:
        case.redis.close()


def test_what_waits_is_all_there_after_the_machine_of_redis_has_died(
    nursery: Nursery, tmp_path: Path
) -> None:
    """Killed, with its append-only file: parked tasks, what they were told, looks, cancels, and who waits."""
    with Valkey(tmp_path / "data", config={"databases": "200"}) as server:
        case = Case(server, 1, tmp_path)
        waits = Waits(case.redis)
        envelope: dict[str, Any] = {
            "body": '[["x"],{},{}]',
            "content-type": "application/json",
            "headers": {"task": "cycle", "retries": 1, "waiting": True},
            "properties": {},
        }
        for number in range(200):
            task_id = f"parked-{number}"
            about = ("cycle", "", "", "", "", "")
            case.records.accept(Accepted(task_id, "none", b"", 0.0, *about))
            waits.register(task_id, ["hook"], 600)
            header: dict[str, Any] = {"until": 4e9, "what": "a key", "read": 0, "found": {}}
            header |= {"look": "service:x", "look_in_s": 0}
            envelope["headers"] |= {"id": task_id}
            raw = json.dumps(envelope).encode()
            waiting.park(case.redis, task_id, 1, "triggers", raw, header)
        waits.cancel("parked-0")
        case.redis.delete("none")
        time.sleep(1.1)  # appendfsync everysec: the last second is what a dying machine loses
        before = case.all()

        server.kill()
        server.start()

        assert case.all() == before
        pid = nursery.start(**case.order())
        waits.wake_by_key("hook", "looked at")
        until = time.monotonic() + END_S
        while time.monotonic() < until and not case.done():
            time.sleep(0.1)
        assert nursery.end(pid, signal.SIGTERM) == 0
        assert case.done()
        found = [case.records.get(f"parked-{number}") for number in range(200)]
        states = Counter(one.state if one else "gone" for one in found)
        assert states == {"done": 199, "cancelled": 1}
        ran = Counter(line for line in case.notes.read_text().splitlines() if line.startswith("begin x"))
        assert sum(ran.values()) == 199
        case.redis.close()
