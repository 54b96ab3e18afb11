"""What is in our hands stays there while its owner is busy elsewhere.

Brokers take back what a silent client holds: RabbitMQ when heartbeats stay out, SQS when the visibility
timeout is over, Kafka when nobody polls for five minutes. While Dagrelay's Redis is away a listener holds
what it has and is silent; were that to come back each time, it would be counted as if it were poison.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

log = logging.getLogger(__name__)

LONGEST_S: Final = 1500.0
"""Of silence, 25 minutes: then the owner hangs, and others get what it holds. RabbitMQ ends a consumer that
acknowledges nothing for 30."""


class Keeper:
    """Calls `keep` every so many seconds, from a thread of its own, while the owner is not at work.

    The owner is at work within `at_work()`, and `keep` is never called then: neither needs a lock.
    """

    def __init__(self, keep: Callable[[], None], every_s: float) -> None:
        self._keep, self._every_s = keep, every_s
        self._hand = threading.RLock()
        self._left_at = time.monotonic()
        self._stop: threading.Event | None = None

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        with self._hand:
            try:
                yield
            finally:
                self._left_at = time.monotonic()

    def start(self) -> None:
        """Begin, unless it has. The thread ends with the process."""
        if self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=(self._stop,), name="keeper", daemon=True).start()

    def stop(self) -> None:
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(self._every_s):
            with self._hand:
                silent_s = time.monotonic() - self._left_at
                if stop.is_set() or not self._every_s <= silent_s <= LONGEST_S:
                    continue
                try:
                    self._keep()
                except Exception as exc:  # noqa: BLE001 - the owner's next call meets it, and tells of it
                    log.debug("what is in hand could not be kept: %s", type(exc).__name__)
