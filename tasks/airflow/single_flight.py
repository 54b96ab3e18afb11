"""Many threads that need the same thing at once: one fetches it, all get what came of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from producers.errors import AirflowUnavailable, DagrelayError
from tasks.http import reset_after_fork

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Runs a piece of work for all threads that ask for it meanwhile, its failure included.

    With a plain lock, each of twenty waiting threads would wait out the timeout of a dead server in turn.
    """

    def __init__(self) -> None:
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Forget work under way in the parent: its thread does not exist here."""
        self._lock = threading.Lock()
        self._flight: Future[T] | None = None

    @property
    def busy(self) -> bool:
        """Whether a thread is at it."""
        return self._flight is not None

    def do(self, work: Callable[[], T]) -> T:
        """Return what `work` returned, or raise what it raised, here or in the thread that is at it."""
        with self._lock:
            flight, mine = self._flight, self._flight is None
            if flight is None:
                flight = self._flight = Future()
        if not mine:
            try:
                return flight.result()
            except DagrelayError as exc:
                raise type(exc)(*exc.args) from None  # a copy: a traceback belongs to one thread
        try:
            result = work()
        except BaseException as exc:
            self._flight = None
            interrupted = AirflowUnavailable("the question was interrupted", None, False)
            flight.set_exception(exc if isinstance(exc, Exception) else interrupted)
            raise
        self._flight = None
        flight.set_result(result)
        return result
