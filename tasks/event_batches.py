"""Celery's events in batches: what Flower sees comes a moment later, and costs a fraction.

Celery's worker publishes what has gathered in each turn of its event loop, mostly one event or two. With
three events a task, that was a fifth of the CPU of a busy worker.
"""

from __future__ import annotations

import os
from typing import Any, Final

from celery import bootsteps

EVERY_S: Final = 0.05
MOST: Final = 2000
"""How many gather at the most. Celery's own limit of 24 has the thread that meets it publish them, and all
others that want to say something wait for it."""


_dispatcher: Any = None
_pid = 0  # a child that a pool forks later has the dispatcher too, and its parent's connection in it


def tell(kind: str, **fields: Any) -> None:
    """Send an event about a task beside those that Celery sends, where this process may: in a worker's own
    process, with events enabled. What is not sent is lost, as events are."""
    dispatcher = _dispatcher
    if dispatcher is not None and dispatcher.enabled and os.getpid() == _pid:
        dispatcher.send(kind, **fields)


class EventBatches(bootsteps.StartStopStep):
    """Publish the events of tasks every `EVERY_S`, where there are any."""

    requires = ("celery.worker.consumer.events:Events",)

    def start(self, consumer: Any) -> None:
        global _dispatcher, _pid
        _dispatcher, _pid = consumer.event_dispatcher, os.getpid()
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
