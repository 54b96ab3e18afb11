"""This process's heartbeat: written as long as its event loop turns, for `dagrelay health --live`.

The loop itself notes each second that it turns, and a thread writes the file, because the loop stands still
where that is no fault: while there is no connection to Redis (Celery then tries in the same thread), and
while the solo pool runs a task in it (which the transport's budget ends).
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from contextlib import suppress
from typing import Any, Final

from celery import bootsteps
from celery.concurrency.solo import TaskPool as SoloPool
from celery.utils.log import get_logger
from celery.worker import state as worker_state

from producers.stores import beats

from .app import app
from .redis_transport import channel as transport

log = get_logger("dagrelay.beat")

BEAT_S: Final = 1.0

TURN_S: Final = 10.0
"""How long a turn of the loop may take before the heart stops: to claim 200 large messages takes a second."""


class Heart(bootsteps.StartStopStep):
    """Writes the heartbeat, from the start of the worker to its end."""

    requires = ("celery.worker.components:Pool",)
    label = "Heart"
    running: Heart | None = None

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._node = worker.hostname
        self._pool = None
        self._pid = os.getpid()
        self._turned_at = 0.0
        self.state: beats.State = "connecting"
        self._told = False

    def start(self, worker: Any) -> None:
        Heart.running, self._pool = self, worker.pool
        with suppress(OSError):
            for beat in beats.read_all():  # of those that were killed
                if not beat.process_there:
                    beats.remove(beat.node, beat.pid)
        self._beat()
        atexit.register(self._end)  # not as this step is stopped: the last tasks may still run
        threading.Thread(target=self._run, name="dagrelay-heart", daemon=True).start()

    def close(self, worker: Any) -> None:
        """Called when the worker begins to leave: its loop ends before its last tasks do."""
        self.state = "leaving"

    def turned(self) -> None:
        """Note that the event loop has turned."""
        self._turned_at = time.monotonic()
        self.state = "running"

    def _alive(self) -> bool:
        if self.state != "running" or time.monotonic() - self._turned_at < TURN_S:
            return True
        return isinstance(self._pool, SoloPool) and bool(worker_state.active_requests)

    def _end(self) -> None:
        if os.getpid() == self._pid:
            beats.remove(self._node, self._pid)

    def _run(self) -> None:
        while True:
            time.sleep(BEAT_S)
            if self._alive():
                self._beat()

    def _beat(self) -> None:
        owner = next((hand.owner for hand in tuple(transport._hands.values())), "")
        try:
            beats.write(beats.Beat(self._node, self._pid, time.monotonic(), self.state, owner))
        except OSError as exc:
            if not self._told:
                log.warning("no heartbeat is written, dagrelay health --live cannot tell: %s", exc)
            self._told = True


class Turning(bootsteps.StartStopStep):
    """Has the event loop note that it turns, while there is a connection."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    label = "Turning"
    _entry: Any = None

    def start(self, consumer: Any) -> None:
        if consumer.hub is not None and Heart.running is not None:
            self._entry = consumer.hub.call_repeatedly(BEAT_S, Heart.running.turned)

    def stop(self, consumer: Any) -> None:
        if self._entry is not None:
            self._entry.cancel()
            self._entry = None
        if Heart.running is not None and Heart.running.state == "running":
            Heart.running.state = "connecting"


app.steps["worker"].add(Heart)
app.steps["consumer"].add(Turning)
