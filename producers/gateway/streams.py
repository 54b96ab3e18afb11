"""Who follows which requests: one look at Redis for all of them, twice a second.

A stream costs no thread, no connection to Redis and no subscription. What changes twice between two looks is
told once, as it stands then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Final

from ..client import RelayClient, told_as_unavailable
from ..errors import BrokerUnavailable
from ..stores.records import Record, record_key
from .base import in_thread

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 0.5
CHANGES: Final = (
    *("state", "attempts", "next_at", "waits_for", "seen", "progress", "job_id", "reason", "cancel_by"),
    *("ended_at", "corrected_at", "dag_run_id"),
)
"""Fields of a record of which one changes whenever there is something to tell."""


class Streams:
    """The streams of one process."""

    def __init__(self, relay: RelayClient, most: int) -> None:
        self._relay, self._most = relay, most
        self._followers: dict[str, set[asyncio.Queue[Record | None]]] = {}
        self._last: dict[str, list[Any]] = {}
        self._count = 0
        self._looking: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def full(self) -> bool:
        """Whether there is no place for another one."""
        return self._count >= self._most or self._stopped

    @contextlib.contextmanager
    def follow(self, task_id: str) -> Iterator[asyncio.Queue[Record | None]]:
        """Yield a queue that gets each change of a request; None when this process stops."""
        changes: asyncio.Queue[Record | None] = asyncio.Queue()
        self._followers.setdefault(task_id, set()).add(changes)
        self._last.pop(task_id, None)  # the newcomer hears of how it stands now
        self._count += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_on())
        try:
            if self._stopped:
                changes.put_nowait(None)
            yield changes
        finally:
            self._count -= 1
            self._followers[task_id].discard(changes)
            if not self._followers[task_id]:
                del self._followers[task_id]
                self._last.pop(task_id, None)

    def stop(self) -> None:
        """End all streams."""
        self._stopped = True
        for followers in self._followers.values():
            for changes in followers:
                changes.put_nowait(None)

    async def _look_on(self) -> None:
        while self._followers:
            try:
                newer = await in_thread(self._changed, list(self._followers))
            except BrokerUnavailable:
                newer = []  # whoever follows hears of it when it is back
            for found in newer:
                for changes in self._followers.get(found.task_id, ()):
                    changes.put_nowait(found)
            await asyncio.sleep(LOOK_EVERY_S)

    def _changed(self, task_ids: list[str]) -> list[Record]:
        """Return those of these that have changed since the last look. Raises BrokerUnavailable."""
        with told_as_unavailable():
            pipe = self._relay.redis.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hmget(record_key(task_id), list(CHANGES))
            values = pipe.execute()
        changed = []
        for task_id, value in zip(task_ids, values, strict=True):
            if self._last.get(task_id) != value:
                try:
                    found = self._relay.record(task_id)
                except BrokerUnavailable:
                    break  # those before it are told; this one and those after it at the next look
                if found is not None:
                    changed.append(found)
                self._last[task_id] = value
        return changed
