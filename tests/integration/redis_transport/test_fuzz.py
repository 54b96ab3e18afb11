"""Random and mutated messages on the queues of a real worker, valid ones among them.

FUZZ_MESSAGES=1000000 asks for more, FUZZ_SEED for the same again. Every message is accounted for: it ran, or
Celery said what it is, or it waits parked, or it lies in quarantine.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from local.valkey import Valkey
from tasks.redis_transport import Keys, Lot

from .nursery import Nursery, is_running

MESSAGES = int(os.environ.get("FUZZ_MESSAGES", "20000"))
SEED = int(os.environ.get("FUZZ_SEED", str(random.SystemRandom().randrange(10**9))))
CHUNK = 10_000
KEYS = Keys("", "crash")  # of app.py
LISTS = tuple(KEYS.queue("q", priority) for priority in (0, 3, 6, 9))

ODD: list[Callable[[random.Random], Any]] = [
    lambda rng: None,
    lambda rng: rng.choice((True, False)),
    lambda rng: rng.choice((0, -1, 1, 2**31, 2**63, -(2**64), 10**300)),
    lambda rng: rng.choice((0.5, -1e308, float("nan"), float("inf"))),
    lambda rng: "",
    lambda rng: rng.choice(("\0", "\ud800", "é", "\u2028", "a\r\nb", "x" * 3000, "0", "null", "[]", "{}")),
    lambda rng: "".join(chr(rng.randrange(1, 0x2FF)) for _ in range(rng.randrange(20))),
    lambda rng: [],
    lambda rng: [None, 1, "x"],
    lambda rng: [[[[[]]]]],
    lambda rng: {},
    lambda rng: {"task": 1, "args": {}, "a": [{}]},
    lambda rng: {"__type__": "datetime", "__value__": "never"},
    lambda rng: {"__type__": rng.choice(("uuid", "decimal", "x", [])), "__value__": rng.choice((1, "x"))},
    lambda rng: rng.choice(("2030-01-01T00:00:00", "1999-01-01", "9999-12-31T23:59:59+00:00", "0001-01-01")),
    lambda rng: rng.choice(("utf-8", "base64", "utf-16", "binary", "zlib", "application/x-yaml", "rot13")),
]  # fmt: skip


class Fuzz:
    """Makes messages, each with an id of its own."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - a seed is the point
        self.number = 0
        self.task_id = ""
        self.kinds = [
            (30, self.valid),
            (25, self.mutated),
            (15, self.spoilt),
            (5, self.cut),
            (8, self.random_bytes),
            (8, self.random_json),
            (4, self.nested),
            (1, self.huge),
            (4, self.unknown),
        ]

    def message(self) -> tuple[bytes, str | None]:
        """Return the next one, and its id if it is a valid one, which must run once."""
        weights, makers = zip(*self.kinds, strict=True)
        self.number += 1
        maker = self.rng.choices(makers, weights)[0]
        raw = maker()
        return raw, self.task_id if maker == self.valid else None

    def parts(self) -> tuple[dict[str, Any], Any]:
        """Return the envelope and the body of a valid message, of one of the forms that there are."""
        rng, number = self.rng, self.number
        task_id = self.task_id = f"{number}-{rng.getrandbits(64):x}"
        properties: dict[str, Any] = {
            "correlation_id": task_id,
            "reply_to": "r",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "q"},
            "priority": 0,
            "body_encoding": rng.choice(("base64", "utf-8")),
            "delivery_tag": task_id,
        }
        envelope: dict[str, Any] = {
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {},
            "properties": properties,
        }
        embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
        if rng.random() < 0.15:
            body: Any = {"task": "fuzz", "id": task_id, "args": [number], "kwargs": {}, "retries": 0}
            body |= {"eta": None, "expires": None, "utc": True, "timelimit": [None, None], "taskset": None}
            return envelope, body | embed
        envelope["headers"] = {
            "lang": "py",
            "task": "fuzz",
            "id": task_id,
            "shadow": None,
            "eta": None,
            "expires": None,
            "group": None,
            "group_index": None,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": task_id,
            "parent_id": None,
            "argsrepr": f"({number},)",
            "kwargsrepr": "{}",
            "origin": "gen1@here",
            "ignore_result": False,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
        }
        return envelope, [[number], {"more": "é" * rng.randrange(5)}, embed]

    def whole(self, envelope: dict[str, Any], body: Any) -> bytes:
        text = json.dumps(body, ensure_ascii=self.rng.random() < 0.5)
        properties = envelope.get("properties")
        if isinstance(properties, dict) and properties.get("body_encoding") == "base64":
            text = base64.b64encode(text.encode(errors="replace")).decode()
        return json.dumps(envelope | {"body": text}).encode()

    def valid(self) -> bytes:
        return self.whole(*self.parts())

    def mutated(self) -> bytes:
        """Fields changed, left out, or put in."""
        envelope, body = self.parts()
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            at: Any = self.rng.choice((envelope, envelope, body))
            while True:
                places = list(at) if isinstance(at, dict) else list(range(len(at)))
                if not places:
                    break
                place = self.rng.choice(places)
                inside = at[place]
                if isinstance(inside, dict | list) and inside and self.rng.random() < 0.8:
                    at = inside
                    continue
                what = self.rng.random()
                if what < 0.15:
                    del at[place]
                elif what < 0.25 and isinstance(at, dict):
                    at[f"new{self.rng.randrange(3)}"] = self.odd()
                else:
                    at[place] = self.odd()
                break
        return self.whole(envelope, body)

    def odd(self) -> Any:
        return self.rng.choice(ODD)(self.rng)

    def spoilt(self) -> bytes:
        """Bytes changed, left out, or put in."""
        raw = bytearray(self.valid())
        for _ in range(self.rng.randrange(1, 5)):
            at = self.rng.randrange(len(raw))
            raw[at : at + self.rng.randrange(3)] = self.rng.randbytes(self.rng.randrange(3))
        return bytes(raw)

    def cut(self) -> bytes:
        raw = self.valid()
        return raw[: self.rng.randrange(len(raw))]

    def random_bytes(self) -> bytes:
        return self.rng.randbytes(self.rng.randrange(200))

    def random_json(self) -> bytes:
        return json.dumps(
            [self.odd(), {"headers": self.odd(), "body": self.odd()}][self.rng.randrange(2)]
        ).encode()

    def nested(self) -> bytes:
        """Deep, around the depth at which Python gives up."""
        depth = self.rng.choice((50, 300, *range(850, 1000, 5), 3000, 50_000))
        deep = "[" * depth + "]" * depth
        if self.rng.random() < 0.3:
            return deep.encode()
        envelope, body = self.parts()
        where: Any = self.rng.choice((envelope["headers"], envelope["properties"], envelope))
        if self.rng.random() < 0.4:
            envelope["properties"]["body_encoding"] = "utf-8"
            envelope["headers"]["eta"] = self.rng.choice((None, "2031-01-01T00:00:00"))
            body = [[self.number, "HERE"], {}, None]
            text = json.dumps(body).replace('"HERE"', deep)
            return json.dumps(envelope | {"body": text}).encode()
        where["deep"] = "HERE"
        return self.whole(envelope, body).replace(b'"HERE"', deep.encode())

    def huge(self) -> bytes:
        envelope, body = self.parts()
        size = self.rng.choice((100_000, 1_000_000))
        if isinstance(body, list) and self.rng.random() < 0.5:
            body[1]["more"] = "x" * size  # as good as any
            return self.whole(envelope, body)
        return self.rng.choice((b"[" + b"1," * size, b'"' + b"x" * size + b'"', b"9" * size, b"\0" * size))

    def unknown(self) -> bytes:
        """A message of a task that this worker does not have."""
        envelope, body = self.parts()
        (envelope["headers"] or body)["task"] = "no.such.task"
        return self.whole(envelope, body)


@pytest.mark.timeout(600 + MESSAGES / 100)
def test_no_message_stops_a_worker_and_each_is_accounted_for(
    either: Valkey, nursery: Nursery, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count = MESSAGES if type(either) is Valkey else min(MESSAGES, 2000)
    print(f"FUZZ_SEED={SEED} FUZZ_MESSAGES={count}")  # noqa: T201 - pytest shows it with a failure
    client = redis.Redis.from_url(either.url)
    client.flushdb()
    lot, fuzz = Lot(client, KEYS), Fuzz(SEED)
    notes, log = tmp_path / "notes", tmp_path / "log"
    pid = nursery.start(
        url=either.url,
        notes=str(notes),
        log=str(log),
        pool="threads",
        name="fuzz@here",
        kill_after=0,
        note_every_end=True,
        loglevel="WARNING",
    )
    total: Counter[str] = Counter()
    for first in range(0, count, CHUNK):
        must_run: set[str] = set()
        pipe = client.pipeline(transaction=False)
        size = min(CHUNK, count - first)
        for _ in range(size):
            raw, task_id = fuzz.message()
            pipe.lpush(fuzz.rng.choice(LISTS), raw)
            if task_id is not None:
                must_run.add(task_id)
            if len(pipe) >= 500:
                pipe.execute()
        pipe.execute()
        done = wait_until_all_is_done(client, pid, size, notes)

        ran = Counter(json.loads(line.partition(" ")[2]) for line in done if line.startswith("ran "))
        said = Counter(line for line in done if not line.startswith("ran "))
        parked, aside = client.hlen(KEYS.parked), client.hlen(KEYS.quarantine)
        assert must_run <= ran.keys(), must_run - ran.keys()
        assert {ran[task_id] for task_id in must_run} == {1}
        text = log.read_text(errors="replace")
        assert "onnection to broker lost" not in text  # not even for a moment
        assert "nrecoverable" not in text
        total += Counter(ran=sum(ran.values()), parked=parked, quarantined=aside) + said
        # What was accounted for so far makes room.
        log.write_text("")
        notes.write_text("")
        if first + CHUNK < count:
            client.delete(KEYS.parked, KEYS.due, KEYS.quarantine)
    print(dict(total))  # noqa: T201 - read with -s

    listed = list(lot.quarantined())
    assert len(listed) == client.hlen(KEYS.quarantine) > 100
    assert all(entry.reason and entry.queue_key in LISTS and entry.at > 0 for entry in listed)
    # What is put back as it was is put aside again, under another number.
    again = [entry for entry in listed if entry.message][:20]
    assert all(lot.replay(entry.number) for entry in again)
    wait_until_all_is_done(client, pid, 0, notes)
    now = {entry.number: entry.message for entry in lot.quarantined()}
    assert len(now) == len(listed)
    assert not now.keys() & {entry.number for entry in again}
    assert Counter(now.values()) == Counter(entry.message for entry in listed)

    assert nursery.end(pid, 15) == 0
    client.close()


def test_a_message_that_came_back_from_more_than_ten_dead_workers_is_put_aside(
    either: Valkey, nursery: Nursery, tmp_path: Path
) -> None:
    client = redis.Redis.from_url(either.url)
    client.flushdb()
    fuzz, notes = Fuzz(1), tmp_path / "notes"
    ids = []
    for times in (10, 11):
        raw = fuzz.valid()
        ids.append(fuzz.task_id)
        client.hset(KEYS.returned, hashlib.sha1(raw, usedforsecurity=False).hexdigest(), times)
        client.lpush("q", raw)
    pid = nursery.start(
        url=either.url, notes=str(notes), log=str(tmp_path / "log"), pool="solo", name="w@here", kill_after=0
    )

    done = wait_until_all_is_done(client, pid, 2, notes)

    assert done == [f'ran "{ids[0]}"']
    (entry,) = Lot(client, KEYS).quarantined()
    assert "11 workers" in entry.reason
    assert not client.exists(KEYS.returned)  # neither is counted any more
    assert nursery.end(pid, 15) == 0
    client.close()


def wait_until_all_is_done(client: redis.Redis, pid: int, size: int, notes: Path) -> list[str]:
    """Wait until nothing is queued or held and `size` messages are accounted for; return the notes."""
    before, changed = None, time.monotonic()
    while True:
        assert is_running(pid), "the worker has ended"
        queued = sum(client.llen(key) for key in LISTS)
        held = sum(client.hlen(key) for key in client.scan_iter(f"{KEYS.held_prefix}*", count=1000))
        hands = sum(client.llen(key) for key in client.scan_iter(f"{KEYS.hand_prefix}*", count=1000))
        done = notes.read_text().splitlines() if notes.exists() else []
        accounted = len(done) + client.hlen(KEYS.parked) + client.hlen(KEYS.quarantine)
        if not queued and not held and not hands and (accounted == size or not size):
            return done
        state = (queued, held, hands, accounted)
        if state != before:
            before, changed = state, time.monotonic()
        assert time.monotonic() - changed < 60, f"queued, held, in hands, accounted for of {size}: {state}"
        time.sleep(0.2)
