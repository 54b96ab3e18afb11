"""The ways to have triggers reach an Airflow, side by side: what became of each, told alike."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import redis

from local.process import ROOT, Process, clean_env
from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import TriggerRequest
from producers.handle import Handle
from producers.settings import ProducerSettings
from tests.plain_worker import message, push
from tests.worker import CELERY, Worker

from ._direct import trigger_all
from ._drops import Drops
from ._report import say
from ._target import Made, Target

WORKERS, THREADS = 2, 64
CAP_S = 300.0
"""Of every way that has no shorter one: it ends long before."""


@dataclass
class Found:
    """What became of the triggers of one way. `seconds` until the last run was made, or until the cap."""

    per_s: float = 0.0
    seconds: float = 0.0
    made: int = 0
    lost: int = 0
    duplicates: int = 0
    open: int = 0
    errors: int = 0
    answers_5xx: int = 0
    why: dict[str, int] = field(default_factory=dict)
    """The errors by their reason: attempts that did not end in a run's answer."""


@dataclass
class Told:
    """What a way says of its triggers: which it still tries, how its failed attempts ended, and when the call
    began that handed over all of them (seconds since 1970): what it starts before that is not measured."""

    trying: set[int]
    why: Counter[str]
    began: float


REST_S = 10.0
"""Such a machine is quicker for some seconds after a rest: one whose workers have just started is not."""

Way = Callable[[Target, str, range, Path], Told]
"""Has runs of a DAG made for the numbers, and returns when all has ended or its time is over."""


def measure(opened: Opened, target: Target, dag_id: str, numbers: range, folder: Path, name: str) -> Found:
    """Have one way trigger, by a new API server; list what was made; say how it went."""
    target.restart()
    log_size = target.log_size()
    told = whole(opened)(target, dag_id, numbers, folder)
    cap = time.time()
    answers_5xx = target.answers_5xx(log_size)
    if told.trying:  # it may not answer any more, or still be at it
        target.airflow.kill_api()
        target.airflow.start_api()
    made = target.runs(dag_id)
    found = account(made, numbers, told.trying, told.why)
    in_time = [at for number, at in made.at.items() if number in numbers and at <= cap]
    found.seconds = (cap if told.trying else max(in_time, default=cap)) - told.began
    found.per_s = round(len(in_time) / found.seconds, 1)
    found.seconds = round(found.seconds, 1)
    found.answers_5xx = answers_5xx
    say(f"{name}: {found}")
    return found


def in_turn(
    ways: Mapping[str, Opened],
    target: Target,
    dag_ids: Mapping[str, str],
    numbers: range,
    each: int,
    folder: Path,
) -> dict[str, Found]:
    """Have several ways trigger in turn, `each` numbers at a time, by one new API server.

    The speed of such a machine changes by half within a minute: what is done in turns of seconds finds it
    alike.
    """
    target.restart()
    log_size = target.log_size()
    spans: dict[str, list[tuple[range, float]]] = {name: [] for name in ways}
    told: dict[str, Told] = {name: Told(set(), Counter(), 0.0) for name in ways}
    parts = [numbers[begin : begin + each] for begin in range(0, len(numbers), each)]
    with contextlib.ExitStack() as opened:
        triggers = {
            name: opened.enter_context(way(target, dag_ids[name], folder)) for name, way in ways.items()
        }
        time.sleep(REST_S)
        for turn, part in enumerate(parts):
            for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
                one = triggers[name](part)
                spans[name].append((part, one.began))
                told[name].trying |= one.trying
                told[name].why = one.why  # of all turns so far
    answers_5xx = target.answers_5xx(log_size)
    founds = {}
    for name in ways:
        made = target.runs(dag_ids[name])
        found = account(made, numbers, told[name].trying, told[name].why)
        found.seconds = sum(
            max(made.at.get(number, began) for number in part) - began for part, began in spans[name]
        )
        found.per_s = round(found.made / found.seconds, 1)
        found.seconds = round(found.seconds, 1)
        found.answers_5xx = answers_5xx
        say(f"{name}: {found}")
        founds[name] = found
    return founds


def account(made: Made, numbers: range, trying: set[int], why: Counter[str]) -> Found:
    """Compare what was accepted with the runs that there are."""
    return Found(
        made=sum(number in made.at for number in numbers),
        lost=sum(number not in made.at and number not in trying for number in numbers),
        duplicates=made.extra,
        open=len(trying),
        errors=sum(why.values()),
        why=dict(why.most_common(8)),
    )


# The ways


Slice = Callable[[range], Told]
"""Has runs made for these numbers, and returns when all have ended or the time is over."""

Opened = Callable[[Target, str, Path], contextlib.AbstractContextManager[Slice]]
"""Starts what a way needs to trigger that DAG, and stops it in the end."""


def whole(opened: Opened) -> Way:
    """Return the way that does all of the numbers at once, after a rest."""

    def way(target: Target, dag_id: str, numbers: range, folder: Path) -> Told:
        with opened(target, dag_id, folder) as trigger:
            time.sleep(REST_S)
            return trigger(numbers)

    return way


def direct(in_flight: int) -> Opened:
    """The best client that speaks to Airflow directly."""

    @contextlib.contextmanager
    def opened(target: Target, dag_id: str, folder: Path) -> Iterator[Slice]:
        url, token = f"{target.airflow.url}/api/v2/dags/{dag_id}/dagRuns", target.token()

        def trigger(numbers: range) -> Told:
            began = time.time()
            found = trigger_all(url, token, numbers, in_flight, CAP_S)
            del found["200"]
            return Told(set(), found, began)

        yield trigger

    return opened


def stock(task: str, cap_s: float, via: Drops | None = None) -> Opened:
    """The task of `naive_app` with that name."""

    @contextlib.contextmanager
    def opened(target: Target, dag_id: str, folder: Path) -> Iterator[Slice]:
        notes = folder / f"{dag_id}.notes"
        notes.touch()
        env = clean_env(
            AIRFLOW_URL=via.url if via else target.airflow.url,
            AIRFLOW_USER=target.airflow.username,
            AIRFLOW_PASSWORD=target.airflow.password,
            DAG_ID=dag_id,
            FILE=str(notes),
        )
        with Valkey() as valkey, stock_workers(valkey.url, env, folder, dag_id):
            client = redis.Redis.from_url(valkey.url)

            def trigger(numbers: range) -> Told:
                began = time.time()
                push(client, "celery", (message(task, (number,)) for number in numbers))
                wanted, ended, why = set(numbers), set[int](), Counter[str]()
                deadline, told_at = time.monotonic() + cap_s, time.monotonic()
                while not wanted <= ended and time.monotonic() < deadline:
                    time.sleep(0.2)
                    ended, why = read_notes(notes)
                    if time.monotonic() - told_at > 5:
                        told_at = time.monotonic()
                        say(f"{dag_id}: {len(wanted & ended)} of {len(numbers)} ended, {dict(why)}")
                return Told(wanted - ended, why, began)

            yield trigger

    return opened


@contextlib.contextmanager
def stock_workers(redis_url: str, env: dict[str, str], folder: Path, name: str) -> Iterator[None]:
    """Run two stock workers on `naive_app`; they are killed at the end."""
    with contextlib.ExitStack() as parts:
        for number in range(WORKERS):
            log = folder / f"{name}-{number}.log"
            options = ("-P", "threads", "-c", str(THREADS), "-n", f"{name}{number}@%h", "-l", "WARNING")
            process = Process(
                [CELERY, "-A", "benchmarks.others.naive_app", "worker", "--without-mingle", *options],
                log=log,
                env=env | {"URL": redis_url},
                cwd=ROOT,
                name="worker",
            )
            parts.callback(process.kill)
            process.wait_until(partial(_says_ready, log), timeout_s=60, what="ready")
        yield


def _says_ready(log: Path) -> bool:
    return " ready." in log.read_text()


def read_notes(file: Path) -> tuple[set[int], Counter[str]]:
    """Return the numbers that have ended, and the reasons of failed attempts."""
    ended, why = set[int](), Counter[str]()
    for line in file.read_text().splitlines():
        number, what, reason = line.split()
        if what != "again":
            ended.add(int(number))
        if what != "done":
            why[reason] += 1
    return ended, why


def relay(via: Drops | None = None) -> Opened:
    """Dagrelay: two workers, nothing else set."""

    @contextlib.contextmanager
    def opened(target: Target, dag_id: str, folder: Path) -> Iterator[Slice]:
        airflow = target.airflow
        uri = via.conn_uri(airflow.username, airflow.password) if via else airflow.conn_uri
        with Valkey() as valkey, relay_workers(valkey.url, uri, folder):
            requests = Requests(valkey.url, dag_id)

            def trigger(numbers: range) -> Told:
                began = time.time()
                requests.hand_over(numbers)
                trying = requests.wait(CAP_S, dag_id)
                return Told(trying, requests.why(), began)

            yield trigger

    return opened


@contextlib.contextmanager
def relay_workers(redis_url: str, uri: str, folder: Path, count: int = WORKERS) -> Iterator[list[Worker]]:
    """Run workers of 64 threads with the settings that they have by default."""
    with contextlib.ExitStack() as parts:
        yield [
            parts.enter_context(worker(redis_url, uri, folder, f"relay{number}")) for number in range(count)
        ]


def worker(redis_url: str, uri: str, folder: Path, name: str, slots: str = "on") -> Worker:
    """Return a worker of 64 threads that was not started yet."""
    env = {"DAGRELAY_SLOTS": slots} if slots != "on" else {}
    return Worker(
        redis_url,
        folder,
        connections={"default": uri},
        name=name,
        options=(),
        alone=True,
        DAGRELAY_WORKER_CONCURRENCY=str(THREADS),
        DAGRELAY_VISIBILITY_TIMEOUT_S="30",
        **env,
    )


class Requests:
    """Requests that were handed to Dagrelay for one DAG, by their numbers."""

    def __init__(self, redis_url: str, dag_id: str) -> None:
        self._relay = RelayClient(ProducerSettings(redis_url=redis_url, client_name="benchmark"))
        self._dag_id = dag_id
        self._handles: dict[int, Handle[Any]] = {}
        self._records: dict[int, tuple[str, int, str]] = {}
        """Of those that have ended: state, attempts, error."""

    @property
    def redis(self) -> redis.Redis:
        return self._relay.redis

    def hand_over(self, numbers: Sequence[int]) -> None:
        """Hand over all of them at once."""
        handles = self._relay.enqueue_many(self._request(number) for number in numbers)
        self._handles |= dict(zip(numbers, handles, strict=True))

    def hand_over_one(self, number: int) -> None:
        """Hand over one, as a service does."""
        self._handles[number] = self._relay.enqueue(self._request(number))

    def _request(self, number: int) -> TriggerRequest:
        return TriggerRequest(self._dag_id, conf={"n": number})

    def look(self, most: int | None = None) -> int:
        """Read the records of those that have not ended yet; return how many there are still.

        With `most` only the last of them: to read more would take a core's share from those who do the work.
        """
        trying = [number for number in list(self._handles) if number not in self._records]
        if most is not None:
            trying = trying[-most:]
        pipe = self.redis.pipeline(transaction=False)
        for number in trying:
            pipe.hmget(f"dagrelay:record:{self._handles[number].id}", "state", "attempts", "error")
        for number, (state, attempts, error) in zip(trying, pipe.execute(), strict=True):
            if state in (b"done", b"failed", b"cancelled"):
                self._records[number] = (state.decode(), int(attempts), (error or b"").decode())
        return len(self._handles) - len(self._records)

    def wait(self, cap_s: float, name: str) -> set[int]:
        """Wait until all have ended; return the numbers of those that have not when the time is over."""
        deadline, told_at = time.monotonic() + cap_s, time.monotonic()
        left = len(self._handles)
        while left and time.monotonic() < deadline:
            time.sleep(0.2)
            before, left = left, self.look(most=10)
            if before - left == min(before, 10):
                left = self.look()
            if time.monotonic() - told_at > 5:
                told_at = time.monotonic()
                say(f"{name}: {self.look()} of {len(self._handles)} have not ended")
        self.look()
        return self._handles.keys() - self._records.keys()

    def why(self) -> Counter[str]:
        """Return how often an attempt failed and was made again, and which errors ended a request."""
        found: Counter[str] = Counter()
        for state, attempts, error in self._records.values():
            if state != "done":
                found[error or state] += 1
            if attempts > 1:
                found["made again"] += attempts - 1
        return found
