"""Looks at what is waited for: hundreds at a time, in one Celery task, for all that waits in Redis.

Waiting tasks may carry a look: "GET this job's state", "the state of this run". The parts, in their order:

- `Watch`, a step of every worker, asks Redis when the next look is due, and then has a message
  `tasks.look` on its way to the queue `looks`: at most one that has not begun, for all workers together
  (else they pile up when looks are slow). The message says nothing of what is due.
- The task `look` claims what is due when it runs, group by group, under a lease, and has it looked at: jobs
  over one asyncio loop (`tasks.http_many`), DAG runs by list calls. It goes on as long as more is due.
- `Reporter` writes what was seen, many looks in one script: again, changed, error, or the end, with which the
  task that waits is sent on to its queue. A worker that dies leaves leases, which run out.

A group is one service or one Airflow: each has its own limit, so a slow one holds up nobody else.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, Protocol

from celery import bootsteps
from celery.utils.log import get_logger
from redis.exceptions import OutOfMemoryError, RedisError

from producers.contract import POLL_EXTERNAL_JOB, QUEUE_LOOKS, TRIGGER_DAG
from producers.stores.readings import LOOK_GROUPS
from producers.stores.waits import Claimed, Seen, Waits

from . import metrics
from .app import RelayTask, app, store_client
from .http import reset_after_fork
from .settings import settings
from .slots import JOIN_S, NoTurn, thread_turn
from .waiting import parked_look, show_waiting

log = get_logger("dagrelay.looks")

LOOK: Final = "tasks.look"

CALL: Final = "dagrelay:look-call"
"""There while a message `tasks.look` has been sent and has not begun."""

CALL_S: Final = 2.0
"""After this long another may be sent: the first may be held by a worker whose threads are all busy."""

IDLE_S: Final = 1.0
"""How often a worker asks what is due, where it knows of nothing that is due earlier."""

BEAT_S: Final = 0.2
"""How long a batch waits for more to be due, and for more answers to be written at once."""

PAUSE_S: Final = 0.1
"""The shortest time between two batches that a worker asks for."""

BATCH_S: Final = 2.0
"""How long a batch goes on claiming. A task of Celery's that runs for long is not seen to end in Flower, and
holds up a worker that is to stop."""

LIST_EVERY_S: Final = 1.0
"""At most one list call to an Airflow in this time, by all workers together."""

SLACK_S: Final = 5.0
"""How much longer a lease is than the HTTP timeouts of its look."""

LIST_SLACK_S: Final = 0.05
"""It may come a little early: the next look is due on a grid, and would wait for the one after it."""

MOST_LOOKS: Final = 500
MOST_TEXT: Final = 1_000_000
"""How many looks, and how many characters of what they saw, are written in one script."""

Done = Callable[[list[Seen]], None]


class Follower(Protocol):
    """One group of looks: how many may be claimed, and how they are done."""

    group: str
    lease_s: float
    facts: tuple[str, ...]
    whole: bool
    """Whether a look needs the message that is parked: a thousand of them may be a gigabyte of confs."""

    def room(self) -> int:
        """Return how many looks may be claimed now."""

    def start(self, claimed: Sequence[Claimed], now: float, done: Done) -> None:
        """Begin to look, and call `done` from any thread with what was seen, once for each look claimed."""


class Reporter:
    """Writes what looks have seen, from a thread of its own, and shows in Flower what has changed."""

    def __init__(self) -> None:
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        self._seen: queue.SimpleQueue[tuple[str, str, list[Seen]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, group: str, token: str, seen: list[Seen]) -> None:
        """Have these written with the next batch."""
        self._seen.put((group, token, seen))
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="dagrelay-looks", daemon=True)
                    thread.start()
                    self._thread = thread  # one that could not be started is tried again with the next

    def _run(self) -> None:
        while True:
            batches: dict[tuple[str, str], list[Seen]] = {}
            group, token, seen = self._seen.get()
            batches[group, token] = list(seen)
            time.sleep(BEAT_S / 5)
            while not self._seen.empty():
                group, token, seen = self._seen.get()
                batches.setdefault((group, token), []).extend(seen)
            for (group, token), all_seen in batches.items():
                try:
                    self._write(group, token, all_seen)
                except (RedisError, OSError) as exc:
                    # Nothing is lost: their lease runs out, and they are looked at again.
                    metrics.count_redis_error("looks")
                    log.warning("what %d looks saw is not written group=%s: %s", len(all_seen), group, exc)
                except Exception:
                    log.exception("what %d looks saw is not written group=%s", len(all_seen), group)

    def _write(self, group: str, token: str, seen: list[Seen]) -> None:
        waits = Waits(store_client())
        for part in parts_of(seen):
            saw: Counter[str] = Counter()
            for one, counted in zip(part, waits.report(group, token, part), strict=True):
                saw[one.verb if counted else "late"] += 1
                if counted and one.verb == "changed" and one.shown:
                    name = TRIGGER_DAG if group.startswith("airflow:") else POLL_EXTERNAL_JOB
                    show_waiting(one.task_id, name, one.first, one.second)
            for what, count in saw.items():
                metrics.count_looks(group, what, count)


def parts_of(seen: Sequence[Seen]) -> Iterator[list[Seen]]:
    """Yield what is written in one script: Redis does nothing else meanwhile, and a result may have 1 MB."""
    part: list[Seen] = []
    size = 0
    for one in seen:
        length = len(one.first) + len(one.second)
        if part and (len(part) == MOST_LOOKS or size + length > MOST_TEXT):
            yield part
            part, size = [], 0
        part.append(one)
        size += length
    if part:
        yield part


reporter = Reporter()


class _Batch:
    """The looks that one task has claimed and that are not written yet."""

    def __init__(self) -> None:
        self._open = 0
        self._changed = threading.Condition()

    def begin(self, follower: Follower, token: str, claimed: Sequence[Claimed]) -> None:
        with self._changed:
            self._open += len(claimed)
        now = float(token) - follower.lease_s
        if metrics.tally is not None:
            for one in claimed:
                metrics.observe_look(follower.group, one.late_s)

        def done(seen: list[Seen]) -> None:
            reporter.put(follower.group, token, seen)
            with self._changed:
                self._open -= len(seen)
                if self._open <= 0:
                    self._changed.notify_all()

        follower.start(claimed, now, done)

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is done, at the most so long; tell whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._open <= 0, timeout_s)


class LookTask(RelayTask):
    """Looks are a worker's own affair: no record, no result, nothing to show."""

    abstract = True
    recorded = False
    send_events = False  # in Flower they would soon fill the list of tasks, and push the others out

    def shown(self, args: Any, kwargs: Any, task_id: str) -> str:
        """Return nothing: it has no arguments."""
        return ""


@app.task(name=LOOK, bind=True, base=LookTask, ignore_result=True)
def look(self: Any) -> None:
    """Look at everything that is due, until nothing is, or for `BATCH_S`."""
    store_client().delete(CALL)
    look_at_what_is_due()


def look_at_what_is_due() -> None:
    """Look at everything that is due, until nothing is, or for `BATCH_S`."""
    waits = Waits(store_client())
    batch = _Batch()
    until = time.monotonic() + BATCH_S
    found_at = time.monotonic()
    while time.monotonic() < until:
        claimed = claim_due(waits, batch)
        if claimed:
            found_at = time.monotonic()
        elif time.monotonic() - found_at > 2 * PAUSE_S:
            break
        batch.wait(BEAT_S) if claimed else time.sleep(BEAT_S)
    # The slow ones go on by themselves: the loop and the reporter do not need this task.
    batch.wait(BATCH_S)


def claim_due(waits: Waits, batch: _Batch) -> int:
    """Claim what is due in every group that has room, and begin to look; return how many."""
    total = 0
    members = followers()
    names = [follower.group for follower in members]
    for follower, (due, _) in zip(members, waits.due_looks(names), strict=True):
        room = min(due, follower.room())
        if room > 0 and may_begin(follower.group, due):
            token, claimed = waits.claim_looks(
                follower.group,
                lease_s=follower.lease_s,
                most=room,
                facts=follower.facts,
                whole=follower.whole,
            )
            if claimed:
                batch.begin(follower, token, claimed)
                total += len(claimed)
    return total


def may_begin(group: str, due: int) -> bool:
    """Tell whether looks of a group may begin: those at DAG runs are paced, over all workers.

    `due`: how many would. So few that they need no list may begin twice as often.
    """
    if not group.startswith("airflow:"):
        return True
    from .airflow.run_looks import FEW

    pace = f"dagrelay:listed:{group.partition(':')[2]}"
    pace_s = LIST_EVERY_S / 2 if due <= FEW else LIST_EVERY_S
    pace_s -= LIST_SLACK_S
    try:
        return bool(store_client().set(pace, "1", nx=True, px=int(pace_s * 1000)))
    except OutOfMemoryError:
        return True  # Redis is full: at the pace of the batches, so that what has ended makes room


# -- the followers of this process: one for each service and each Airflow that it knows

_followers: list[Follower] | None = None
_followers_lock = threading.Lock()


def followers() -> list[Follower]:
    """Return the groups that this worker looks at."""
    global _followers
    if _followers is None:
        with _followers_lock:
            if _followers is None:
                from .job_looks import JobFollower

                made: list[Follower] = [RunFollower(name) for name in settings().connections]
                made += [JobFollower(one) for one in settings().services.values() if one.queue is None]
                _followers = made
    return _followers


class RunFollower:
    """The DAG runs of one Airflow: list calls, from a thread."""

    whole = False

    def __init__(self, connection: str) -> None:
        from .airflow.run_looks import FACTS

        known = settings().connections[connection]
        self.group = f"airflow:{connection}"
        self.lease_s = 3 * (known.connect_timeout_s + known.read_timeout_s) + JOIN_S + SLACK_S
        self.facts = FACTS
        self._connection = known
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        self._busy = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"looks-{self._connection.id}")

    def room(self) -> int:
        """Return how many runs one list call may be asked for."""
        return 0 if self._busy else 1000

    def start(self, claimed: Sequence[Claimed], now: float, done: Done) -> None:
        """Ask for all of them at once."""
        self._busy = True
        self._pool.submit(self._look, claimed, now, done)

    def _look(self, claimed: Sequence[Claimed], now: float, done: Done) -> None:
        from .airflow.run_looks import look_at_runs

        seen: list[Seen] = []
        try:
            with thread_turn(self._connection) as airflow:
                seen = look_at_runs(airflow, claimed, now)
        except NoTurn as exc:
            log.info("runs not looked at connection=%s: %s", self._connection.id, exc)
        except Exception:
            log.exception("looks failed group=%s", self.group)
        finally:
            self._busy = False
            done(seen + unseen(claimed, seen))


def unseen(claimed: Sequence[Claimed], seen: Sequence[Seen], again_in_s: float = 10.0) -> list[Seen]:
    """Return, for the looks of which nothing was said, that they are to be done again."""
    known = {one.task_id for one in seen}
    return [Seen(one.task_id, one.epoch, "again", again_in_s) for one in claimed if one.task_id not in known]


# -- when to look


class Watch(bootsteps.StartStopStep):
    """Has a batch begin when a look is due."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    label = "Looks"
    _running: Watch | None = None

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._hub: Any = None
        self._entry: Any = None
        self._at = 0.0
        self._serves = False

    def start(self, consumer: Any) -> None:
        self._hub = consumer.hub
        self._serves = QUEUE_LOOKS in {queue.name for queue in consumer.task_consumer.queues}
        if self._hub is not None and self._serves:
            groups = [follower.group for follower in followers()]
            with suppress(RedisError):  # it is for those only who want to know how late looks are
                if groups:
                    store_client().sadd(LOOK_GROUPS, *groups)
            Watch._running = self
            self.ask_in(PAUSE_S)

    def stop(self, consumer: Any) -> None:
        Watch._running = None
        if self._entry is not None:
            self._entry.cancel()
            self._entry = None
        self._hub = None

    def ask_in(self, pause_s: float) -> None:
        """Ask what is due after a pause; called in the event loop."""
        if self._entry is not None:
            self._entry.cancel()
        self._at = time.monotonic() + pause_s
        if self._hub is not None:
            self._entry = self._hub.call_later(pause_s, self._ask)

    def ask_soon(self, due_in_s: float) -> None:
        """Ask when a look that was just parked is due, if that is earlier; called from any thread."""
        hub = self._hub
        if hub is not None and time.monotonic() + due_in_s < self._at:
            hub.call_soon(self._maybe_earlier, due_in_s)

    def _maybe_earlier(self, due_in_s: float) -> None:
        if time.monotonic() + due_in_s < self._at:
            self.ask_in(max(due_in_s, PAUSE_S))

    def _ask(self) -> None:
        self._entry = None
        if self._hub is not None:
            self.ask_in(next_ask())


def next_ask() -> float:
    """Have a batch begin if something is due; return in how many seconds to ask again."""
    try:
        client = store_client()
        due = Waits(client).due_looks([follower.group for follower in followers()])
        if any(count for count, _ in due):
            if client.set(CALL, "1", nx=True, px=int(CALL_S * 1000)):
                look.apply_async(queue=QUEUE_LOOKS)
            return PAUSE_S
        soonest = min((next_in for _, next_in in due if next_in is not None), default=IDLE_S)
        return min(IDLE_S, max(PAUSE_S, soonest + 0.002))
    except OutOfMemoryError:
        # Not even a message can be sent. Looks find what has ended, and its end makes room.
        if _without_message.acquire(blocking=False):
            threading.Thread(target=_look_without_message, name="dagrelay-looks-full", daemon=True).start()
        return IDLE_S
    except Exception as exc:  # noqa: BLE001 - Redis is away, or the publish failed: asked again in a second
        metrics.count_redis_error("looks")
        log.warning("not known which looks are due: %s", exc)
        return IDLE_S


_without_message = threading.Lock()


def _look_without_message() -> None:
    try:
        look_at_what_is_due()
    except Exception:
        log.exception("looks failed while Redis is full")
    finally:
        _without_message.release()


@parked_look.connect
def _on_parked_look(due_in_s: float, **_: Any) -> None:
    running = Watch._running
    if running is not None:
        running.ask_soon(due_in_s)


app.steps["consumer"].add(Watch)

__all__ = ["Follower", "Watch", "followers", "look"]
