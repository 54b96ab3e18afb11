"""A long line is drained: its plain requests are posted side by side, many for a step in Redis.

A request that waits for its turn could be called, and be one Celery task like any other. That costs a worker
some 2.5 ms of CPU, and on the machine of an Airflow that is at its limit each of them is a part of a trigger.
So who puts requests into a line also begins to drain it: it takes the plain ones (new, without callbacks, not
to be waited for) into its own hands, as a consumer takes messages, posts them over one asyncio loop with the
slots that there are, and writes the ends of those that became a run in bulk. Whatever else an answer means is
for Celery: such a request goes to the front of its queue, with its place in flight kept.

A worker that dies leaves what it held to the others, as with any message: its lease runs out, and they come
back as delivered again.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import threading
import time
from collections import deque
from typing import Any, Final

from celery import signals
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from redis.exceptions import RedisError

from producers.contract import TRIGGER_DAG, TriggerRequest
from producers.errors import DagrelayError, InvalidRequest
from producers.stores.fan_outs import FanOuts
from producers.stores.lines import Drained, Verdict

from . import logs, metrics
from .airflow.asking import verdict_of
from .airflow.connections import AirflowConnection
from .app import app, records, said, store_client
from .event_batches import tell
from .http import reset_after_fork
from .http_many import in_loop
from .posting import Job, NotMade, Wanted, as_json, authorised, job_of, post, read_answer, sender_for, told_of
from .redis_transport.keys import Keys
from .redis_transport.messages import Readable
from .settings import settings
from .slots import held_slots, lines, tell_of

log = get_logger("dagrelay.drain")

LEASE_S: Final = 8.0
"""How long what a worker holds is its own when it is not heard of."""

STEP_S: Final = 0.2
"""How often a step in Redis is made. Each costs as much as posting two requests, and an Airflow on the same
cores gets what is saved."""

IDLE_S: Final = 0.1
"""How often one who has no slots asks for some."""

STARVED_S: Final = 0.5
"""How long requests are held without a slot to post them with."""

MOST_AHEAD: Final = 400
"""So many requests are held at the most that have not been sent."""

_KEYS: Final = Keys(namespace="dagrelay")


def is_plain(readable: Readable) -> bool:
    """Tell whether a new request may be posted without Celery: nothing follows its end."""
    args, kwargs, embed = readable.decoded
    headers = readable.headers
    return (
        not args
        and not any((embed or {}).values())
        and not headers.get("group")
        and readable.expires is None
        and kwargs.keys() <= PLAIN_FIELDS
        # The record of what came past our door does not say whom to tell; Celery's end has that written.
        and not (kwargs.get("on_end") and "asked" not in kwargs)
    )


PLAIN_FIELDS: Final = frozenset(
    {"v", "asked", "dag_id", "conf", "key", "dag_run_id", "logical_date", "run_after", "note", "connection"}
    | {"give_up_after_s", "priority", "if_exists", "on_end"}
)


class Drain:
    """Drains the line of one connection, in the process's asyncio loop, for as long as there is something."""

    def __init__(self, connection: AirflowConnection) -> None:
        self._connection = connection
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._running = False
        self._stopping = False
        self._ended = threading.Event()
        self._ended.set()
        self._times = itertools.count(1)
        self._name = f"drain-{self._connection.id}-{os.getpid():x}{os.urandom(4).hex()}"

    def begin(self) -> None:
        """Drain, unless it is being done; called from any thread."""
        with self._lock:
            if self._running or self._stopping:
                return
            self._running = True
            self._ended.clear()
        in_loop(self._run())

    def stop(self, timeout_s: float) -> None:
        """Take nothing more, end what is in flight and put back the rest."""
        self._stopping = True
        self._ended.wait(timeout_s)

    async def _run(self) -> None:
        # Each time under another name: what one that failed has left comes back when its lease has run out.
        work = _Work(self._connection, f"{self._name}-{next(self._times)}")
        try:
            await work.run(lambda: self._stopping)
        except (RedisError, OSError) as exc:
            log.warning("line not drained connection=%s: %s", self._connection.id, said(exc))
        except Exception:
            log.exception("line not drained connection=%s", self._connection.id)
        finally:
            self._running = False
            self._ended.set()


class _Work:
    """One time of draining."""

    def __init__(self, connection: AirflowConnection, name: str) -> None:
        self._connection, self._name = connection, name
        self._held_key = _KEYS.held(name)
        self._left: deque[tuple[str, bytes]] = deque()
        self._done: list[tuple[str, Verdict, float]] = []
        self._made: list[Job] = []
        self._put_back: list[tuple[str, bool]] = []
        self._not_made: list[tuple[str, NotMade]] = []
        self._api: Any = None
        self._spoken: Any = None
        self._tokens: set[str] = set()
        self._to_stop = 0
        self._over = False
        self._sent = 0
        self._per_round = 8.0

    async def run(self, stopping: Any) -> None:
        at_work: set[asyncio.Future[None]] = set()
        idle, starved_since = 0, None
        try:
            while True:
                stop = self._over or stopping()
                ahead = min(MOST_AHEAD, int(2 * self._per_round) + 2)
                want = 0 if stop else max(0, ahead - len(self._left))
                slots = 0 if stop else self._connection.ceiling - len(at_work)
                found, tokens = await asyncio.to_thread(self._exchange, want, slots, len(at_work))
                self._left.extend(found.requests)
                at_work |= {asyncio.ensure_future(self._work(token)) for token in tokens}
                if stop or self._over:
                    while self._left:
                        self._put_back.append((self._left.popleft()[0], False))
                if not at_work:
                    if self._done or self._made or self._put_back or self._not_made:
                        continue
                    # What is in hand is in no line, so it does not stay there without a slot.
                    now = time.monotonic()
                    if self._left and now - (starved_since := starved_since or now) > STARVED_S:
                        while self._left:
                            self._put_back.append((self._left.popleft()[0], False))
                        starved_since = None
                        continue
                    idle += 1
                    if stop or self._over or (not found.requests and not self._left and idle > 3):
                        return
                    await asyncio.sleep(IDLE_S)
                    continue
                idle, starved_since = 0, None
                before = self._sent
                over, at_work = await asyncio.wait(at_work, timeout=STEP_S)
                for one in over:
                    one.result()  # what nobody foresaw ends it all
                self._per_round = max(2.0, 0.7 * self._per_round + 0.3 * (self._sent - before))
        finally:
            for one in at_work:
                one.cancel()
            held_slots.discard(self._connection.id, list(self._tokens))

    async def _work(self, token: str) -> None:
        """Post one after the other, with one slot."""
        sender = sender_for(self._connection)
        while self._left and not self._over:
            if self._to_stop:
                self._to_stop -= 1
                break
            task_id, message = self._left.popleft()
            if task_id in worker_state.revoked:
                self._put_back.append((task_id, False))  # for Celery to end it
                continue
            job = self._job(task_id, message)
            if job is None:
                self._put_back.append((task_id, True))
                break  # the slot is for it
            began = time.monotonic()
            answer = await post(sender, job)
            took_s = time.monotonic() - began
            self._sent += 1
            verdict = verdict_of(answer)
            run = read_answer(self._api, self._connection, job, answer)
            if isinstance(run, NotMade):
                # The slot is for it, or, where it timed out, the server's for some time.
                self._not_made.append((task_id, run))
                self._done.append((token, verdict, took_s))
                return
            job.run = as_json(run)
            self._made.append(job)
            self._done.append(("", verdict, took_s))
        self._done.append((token, "unused", 0.0))

    def _job(self, task_id: str, message: bytes) -> Job | None:
        """Return a request, ready to be posted; None for one that somebody else is to judge."""
        spoken = self._spoken
        if spoken is None:
            return None
        try:
            envelope = json.loads(message)
            body = envelope["body"]
            if (envelope.get("properties") or {}).get("body_encoding") == "base64":
                body = base64.b64decode(body)
            fields = json.loads(body)[1]
            request = TriggerRequest.from_message(fields)
            self._api, headers = spoken
            return job_of(self._api, headers, Wanted(task_id, envelope, request, fields.get("asked")))
        except (InvalidRequest, DagrelayError, TypeError, ValueError, LookupError):
            return None

    def _exchange(self, want: int, slots: int, at_work: int) -> tuple[Drained, list[str]]:
        """Write what has ended, put back what is to be, and take requests and slots; in a thread."""
        connection = self._connection
        made, self._made = self._made, []
        not_made, self._not_made = self._not_made, []
        done, self._done = self._done, []
        put_back, self._put_back = self._put_back, []
        ended: list[str] = []
        if want:
            self._spoken = authorised(connection)
        for task_id, why in not_made:
            if why.reason:
                records().attempt_failed(task_id, why.reason, unsure=why.unsure)
        lines().put_back(connection.id, self._held_key, [*put_back, *((one, True) for one, _ in not_made)])
        if made:
            self._end(made)
            ended += [job.task_id for job in made]
        token = held_slots.new_token()
        over = [one for one, _, _ in done if one]
        self._tokens.difference_update(over)
        held_slots.discard(connection.id, over)
        found = lines().drain(
            connection.id,
            self._name,
            self._held_key,
            _KEYS.leases,
            lease_s=LEASE_S,
            ended=ended,
            done=done,
            fingerprint=connection.fingerprint(),
            slots=slots,
            token=token,
            at_work=at_work,
            left=len(self._left),
            requests=want,
            late_s=connection.timed_out_slot_s,
        )
        tell_of(connection, found.changed)
        # One is kept for what is in hand: it was before those that wait.
        self._over, self._to_stop = found.over, min(found.stop, max(0, at_work - (1 if self._left else 0)))
        tokens = [f"{token}.{number}" for number in range(1, found.slots + 1)]
        self._tokens.update(tokens)
        held_slots.add(connection.id, tokens)
        return found, tokens

    def _end(self, made: list[Job]) -> None:
        """Write the ends of requests that became a run, and tell of them."""
        count = FanOuts(store_client()).end_items(
            [(job.task_id, job.run) for job in made],
            result_ttl_s=settings().result_ttl_s,
            date_done=app.now().isoformat(),
            conf_keep_s=settings().conf_keep_s,
        )
        metrics.count_started(self._connection.id, count, [job.asked_at for job in made])
        logs.outcomes(told_of(made, self._connection.id))
        for job in made:
            shown = job.request.shown_with(job.run_id)
            tell("task-received", uuid=job.task_id, name=TRIGGER_DAG, args="()", kwargs=shown, retries=0)
            tell("task-started", uuid=job.task_id)
            tell("task-succeeded", uuid=job.task_id, result=job.run_id, runtime=0.0)


_drains: dict[str, Drain] = {}
_lock = threading.Lock()


def begin(connection: str) -> None:
    """Have a connection's line drained by this process."""
    found = _drains.get(connection)
    if found is None:
        with _lock:
            found = _drains.setdefault(connection, Drain(settings().connections[connection]))
    found.begin()


def stop_all(timeout_s: float = 12.0) -> None:
    """Take nothing more out of any line, and wait for what is in flight."""
    for one in list(_drains.values()):
        one._stopping = True
    for one in list(_drains.values()):
        one.stop(timeout_s)


@signals.worker_shutdown.connect
def _at_the_end(**_: Any) -> None:
    stop_all()
