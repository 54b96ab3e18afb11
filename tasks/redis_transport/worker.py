"""What the transport adds to a Celery worker: `install(app)`.

- A revoke also reaches a task that is parked: it is marked and sent on, so that Celery itself ends it, at
  once, whichever worker gets it, and also if every worker is started again meanwhile.
- A message that is parked when it is claimed is announced to Flower, once, as received.
- While a worker ends, its lease is kept as long as its tasks run, and what it has not begun is given back at
  once; the same lease is kept while a task of the solo pool holds up the event loop.
- What the thread pool drops, because its end could not be written, is given back.
- A task that runs for longer than its budget ends the process, loudly, instead of being renewed for ever.
- A pool without an event loop is refused at the start, with the reason.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from celery import Celery, bootsteps, signals
from celery.concurrency.prefork import _run_ready_callbacks as run_acknowledgements
from celery.concurrency.solo import TaskPool as SoloPool
from celery.exceptions import ImproperlyConfigured
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from celery.worker.control import Panel
from celery.worker.request import Request

from . import channel as transport
from . import register
from .hand import LEAVE_S, Why
from .messages import Readable

log = get_logger("redis_transport")

BUDGET_S: Final = 900.0
"""How long a task may run by default. Ours need less than one minute."""

REVOKED_MOST: Final = 1_000_000
REVOKED_S: Final = 14 * 86_400.0

BUDGET_CHECK_S: Final = 10.0
EXIT_STUCK: Final = 70
"""EX_SOFTWARE: what the process ends with when a task is stuck."""

EXIT_GRACE_S: Final = 10.0


def install(app: Celery[Any], *, budget_s: float = BUDGET_S) -> None:
    """Use the transport in the workers of this app."""
    signals.celeryd_init.connect(_on_celeryd_init, weak=False)
    app.steps["worker"].add(RefuseGreen)
    app.steps["worker"].add(Leave)
    app.steps["worker"].add(Dropped)
    app.steps["consumer"].add(Announce)
    Budget.budget_s = budget_s
    app.steps["consumer"].add(Budget)
    if Panel.data.get("revoke") is not _revoke_parked_too:
        _revoke_parked_too.original = Panel.data["revoke"]
        Panel.data["revoke"] = _revoke_parked_too


def _on_celeryd_init(instance: Any, **_: Any) -> None:
    register()
    # What somebody asked to cancel is in Redis for two weeks, and read from there once. Celery's own limits
    # (50,000, three hours) would forget it while its message still lies in a queue.
    worker_state.revoked.maxlen, worker_state.revoked.expires = REVOKED_MOST, REVOKED_S
    # Not by a transport option: `inspect stats` and Flower get those as JSON.
    transport.Channel.timezone = instance.app.timezone


class PoolRefused(ImproperlyConfigured):
    """This transport does not work in a pool of this kind. An error of ours: its words may be logged."""


class RefuseGreen(bootsteps.Step):
    """Refuse gevent and eventlet: their loop is not the one that this transport's sockets are read by."""

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        if getattr(worker.pool_cls, "is_green", False):
            raise PoolRefused(
                "the pools gevent and eventlet have no event loop for this transport, and nothing would "
                "bring back what is parked: use -P threads, or processes, or solo"
            )
        super().__init__(worker, **kwargs)


class Leave(bootsteps.StartStopStep):
    """Keep the lease while the worker ends, and give back at once what it has not begun.

    Celery ends its event loop first and then waits for the tasks that run.
    """

    requires = ("celery.worker.components:Pool",)  # so it is stopped after the consumer, before the pool

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        wait = worker.wait_for_soft_shutdown

        def leave_and_wait() -> None:  # called by the handler of a signal, with the event loop standing still
            _leave()
            wait()

        worker.wait_for_soft_shutdown = leave_and_wait

    def stop(self, worker: Any) -> None:
        _leave()
        executor = getattr(worker.pool, "executor", None)
        if executor is None:
            return
        # The thread pool does the same next; but it keeps the last of them in a variable while it waits. And
        # in a cold shutdown it does not wait, though its threads cannot be ended: their acknowledgements,
        # which Celery leaves to the event loop, would never be done. (Its prefork pool does them like this.)
        executor.shutdown(wait=False, cancel_futures=True)
        while any(thread.is_alive() for thread in tuple(executor._threads)):
            if worker.hub is not None:
                run_acknowledgements(worker.hub)
            time.sleep(LEAVE_S)

    def terminate(self, worker: Any) -> None:
        self.stop(worker)


def _leave() -> None:
    for hand in tuple(transport._hands.values()):
        hand.leave()


class Dropped(bootsteps.Step):
    """Give back what the thread pool drops.

    When Celery cannot write a task's end (the result backend is away), its tracer raises. The thread pool
    keeps that exception to itself, and the request stays among the running ones for ever, with its message.
    """

    requires = ("celery.worker.components:Pool",)

    def create(self, worker: Any) -> None:
        pool = worker.pool
        if getattr(pool, "executor", None) is None:
            return
        on_apply = pool.on_apply

        def apply(*args: Any, callback: Any = None, **kwargs: Any) -> Any:
            result = on_apply(*args, callback=callback, **kwargs)
            result.f.add_done_callback(partial(_on_done, callback))
            return result

        pool.on_apply = apply


def _on_done(callback: Any, future: Future[Any]) -> None:
    if future.cancelled() or (exc := future.exception()) is None:
        return
    request = getattr(callback, "__self__", None)
    if not isinstance(request, Request):
        return
    log.error("its end could not be written, it comes back task_id=%s: %r", request.id, exc)
    worker_state.task_ready(request)
    if not request.acknowledged:
        request.acknowledged = True
        # A task that asks for more memory than there is does so again.
        why: Why = "counted" if isinstance(exc, MemoryError) else "begun"
        request.message.channel.qos.give_back(request.message.delivery_tag, why)


class Announce(bootsteps.StartStopStep):
    """Tell Flower of a message that was parked before Celery has seen it."""

    requires = ("celery.worker.consumer.events:Events",)

    def start(self, consumer: Any) -> None:
        self._dispatcher = consumer.event_dispatcher
        self._app = consumer.app
        transport.parked.connect(self._on_parked, weak=False, dispatch_uid="redis_transport")

    def stop(self, consumer: Any) -> None:
        transport.parked.disconnect(self._on_parked, dispatch_uid="redis_transport")

    def _on_parked(self, readable: Readable, due: float, **_: Any) -> None:
        dispatcher, headers = self._dispatcher, readable.headers
        if dispatcher is None or not dispatcher.enabled or "task" not in headers:
            return
        task = self._app.tasks.get(headers["task"])
        if task is None or not task.send_events:
            return
        args, kwargs = headers.get("argsrepr") or "", headers.get("kwargsrepr") or ""
        if hasattr(task, "shown") and isinstance(readable.decoded, list):
            # A task may say itself what of its arguments may be seen: `shown(args, kwargs, task_id)`.
            args, kwargs = "()", task.shown(readable.decoded[0], readable.decoded[1], headers["id"])
        dispatcher.send(
            "task-received",
            uuid=headers["id"],
            name=headers["task"],
            args=args,
            kwargs=kwargs,
            root_id=headers.get("root_id"),
            parent_id=headers.get("parent_id"),
            retries=headers.get("retries") or 0,
            eta=datetime.fromtimestamp(due, UTC).isoformat(),
            expires=headers.get("expires"),
        )


class Budget(bootsteps.StartStopStep):
    """End the process when a task has run for longer than its budget."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    budget_s = BUDGET_S

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._controller = consumer.controller
        # By our own clock, the monotonic one: Celery notes the wall's, which may be set.
        self._seen: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
        self._solo: threading.Thread | None = None

    def start(self, consumer: Any) -> None:
        if isinstance(consumer.pool, SoloPool):
            if self._solo is None:
                self._solo = threading.Thread(target=self._watch_solo, name="redis_transport", daemon=True)
                self._solo.start()
        elif consumer.hub is not None:
            self._entry = consumer.hub.timer.call_repeatedly(
                min(BUDGET_CHECK_S, self.budget_s / 4), self.check, ()
            )

    def stop(self, consumer: Any) -> None:
        entry = getattr(self, "_entry", None)
        if entry is not None:
            entry.cancel()

    def check(self) -> None:
        """Look at every running task; end the process for one that is over its budget."""
        now = time.monotonic()
        for request in tuple(worker_state.active_requests):
            ran_s = now - self._seen.setdefault(request, now)
            if ran_s > self.budget_s:
                self._controller.exitcode = EXIT_STUCK  # Celery's own for a cold shutdown is 0
                end_stuck(
                    f"task {request.name}[{request.id}] runs for {ran_s:.0f} s, over its {self.budget_s:g} s"
                )
                return

    def _watch_solo(self) -> None:
        """Do from a thread what the event loop cannot while a task of the solo pool runs in it."""
        check_s = min(BUDGET_CHECK_S, self.budget_s / 4)
        check_at = time.monotonic()
        while worker_state.should_terminate is None:
            hands = tuple(transport._hands.values())
            time.sleep(min([1.0, check_s, *(hand.lease_s / 3 for hand in hands)]))
            for hand in hands:
                hand.renew_apart()
            if time.monotonic() >= check_at:
                check_at = time.monotonic() + check_s
                self.check()


def end_stuck(reason: str) -> None:
    """End this process: give back what it holds, ask Celery for a cold shutdown, and insist."""
    log.critical("this worker is stuck and ends: %s", reason)
    for hand in tuple(transport._hands.values()):
        hand.release()
    worker_state.should_terminate = EXIT_STUCK  # type: ignore[assignment]
    # A thread that is stuck would keep the process alive for ever.
    timer = threading.Timer(EXIT_GRACE_S, os._exit, (EXIT_STUCK,))
    timer.daemon = True
    timer.start()


def _revoke_parked_too(state: Any, task_id: Any = None, **kwargs: Any) -> Any:
    """Revoke, and send on what of it is parked."""
    ids = [task_id] if isinstance(task_id, str) else list(task_id or ())
    original = _revoke_parked_too.original
    answer = original(state, task_id, **kwargs)
    try:
        with state.app.connection_for_write() as connection:
            lot = connection.default_channel.lot
            for each in ids:
                lot.revoke(each)
    except Exception as exc:  # noqa: BLE001 - the revoke itself has been done; a parked task ends when it is due
        log.warning("a parked task was not looked for: %s", exc)
    return answer
