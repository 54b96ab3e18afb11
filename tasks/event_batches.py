"""Celery's events in batches, and without waiting: Flower sees them a moment later, for less of the CPU.

Celery's worker publishes what has gathered in each turn of its event loop, mostly one event or two. With
three events a task, that was a fifth of the CPU of a busy worker.
"""

from __future__ import annotations

import os
from typing import Any, Final

from celery import bootsteps, signals
from celery.app.events import Events
from celery.events.dispatcher import EventDispatcher
from celery.utils.log import get_logger

log = get_logger("dagrelay.events")

EVERY_S: Final = 0.05
MOST: Final = 2000
"""How many gather at the most. Celery's own limit of 24 has the thread that meets it publish them, and all
others that want to say something wait for it."""


class NoWaiting(EventDispatcher):
    """A dispatcher that waits for no connection: what it cannot publish it keeps until there is one again.

    Celery (5.7.0) has its heartbeat published with as many retries as it takes, in the event loop. Where that
    is the first to meet a Redis that is gone, the loop stands still until Redis is back: signals are not
    heeded, and the worker is told as dead.
    """

    def send(self, type: str, *args: Any, **fields: Any) -> Any:
        """Send an event, as Celery does with `retry=False`."""
        fields["retry"] = False
        return super().send(type, *args, **fields)


class RelayEvents(Events):
    """Celery's events, by a dispatcher that does not wait."""

    dispatcher_cls = f"{__name__}:NoWaiting"


_dispatcher: Any = None
_worker: tuple[int, str, Any] | None = None
"""The worker's process, its name, and its app; known in the children of its pool too."""


@signals.celeryd_after_setup.connect
def _on_setup(sender: str, instance: Any, **_: Any) -> None:
    global _worker
    _worker = os.getpid(), sender, instance.app


def tell(kind: str, **fields: Any) -> None:
    """Send an event about a task beside those that Celery sends, where events are on.

    In a child of a pool it goes out at once: the dispatcher, and the connection in it, are its parent's. What
    cannot be sent is lost, as events are.
    """
    if _worker is None:
        return
    pid, name, app = _worker
    dispatcher = _dispatcher
    if os.getpid() == pid:
        if dispatcher is not None and dispatcher.enabled:
            dispatcher.send(kind, **fields)
    elif app.conf.worker_send_task_events:
        try:
            with app.events.default_dispatcher(hostname=name) as its_own:
                its_own.send(kind, **fields)
        except Exception as exc:  # noqa: BLE001 - kombu raises what the connection raised, of many kinds
            log.info("an event is not sent kind=%s: %s", kind, type(exc).__name__)


class EventBatches(bootsteps.StartStopStep):
    """Publish the events of tasks every `EVERY_S`, where there are any."""

    requires = ("celery.worker.consumer.events:Events",)

    def start(self, consumer: Any) -> None:
        global _dispatcher
        _dispatcher = consumer.event_dispatcher
        self._hub, self._dispatcher = consumer.hub, consumer.event_dispatcher
        self._waiting = False
        if self._hub is not None and self._dispatcher is not None:
            self._dispatcher.buffer_limit = MOST
            self._dispatcher.on_send_buffered = self._on_buffered

    def stop(self, consumer: Any) -> None:
        global _dispatcher
        _dispatcher = None
        if getattr(self, "_waiting", False):
            self._flush()

    def _on_buffered(self) -> None:
        """Called by whichever thread has said something."""
        if not self._waiting:
            self._waiting = True
            self._hub.call_soon(self._hub.call_later, EVERY_S, self._flush)  # a timer is the loop's to set

    def _flush(self) -> None:
        self._waiting = False
        self._dispatcher.flush()
