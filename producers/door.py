"""What every door does with an order: accept it once, note who wants to hear of it, and say how it went.

A door only translates. Whatever it lets in goes through here, to the same script that `.delay()` uses: an
answer of yes means that the request, its record, and the wish for answers lie in Redis.

**Answers.** A record's field `tell` names a door and a place in that door's terms. Whatever ends the request
adds to the stream ``dagrelay:replies:<door>`` in the same script (see `stores.notices`), whoever runs that
door publishes from there and only then takes it off. `at_end` holds messages which that script puts into
their queues: webhooks to be sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from .client import RelayClient, told_as_unavailable
from .errors import BrokerUnavailable, ConfGone
from .queues.message import Order
from .scopes import EVERYTHING, Scope
from .stores.claim_check import keep
from .stores.notices import tell_field
from .stores.records import Accepted

AT_ONCE: Final = 500
"""So many orders go to Redis in one round trip at the most."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One order that is in Redis. `new` is False where it was there before."""

    task_id: str
    dag_run_id: str | None
    new: bool


class Door:
    """One way in, by its name. Its methods raise BrokerUnavailable, and then nothing was answered yes."""

    def __init__(self, client: RelayClient, name: str, scope: Scope = EVERYTHING) -> None:
        self.client, self.name, self.scope = client, name, scope

    def prepare(
        self, order: Order, *, by: str | None = None, scope: Scope | None = None, **more: str
    ) -> Accepted:
        """Return an order as it goes to Redis. Raises InvalidRequest, NotAllowed; nothing is sent.

        `by` is who asked, as the run's note says it; `more` are further fields of the record, by name.
        """
        (scope if scope is not None else self.scope).check(order.request)
        envelope = order.envelope
        if envelope.reply_to is not None:
            more["tell"] = tell_field(self.name, envelope.reply_to, envelope.correlation_id)
        return self.client.item(order.request, by=by, more=more, **order.options())

    def gone(self, items: Sequence[Accepted]) -> dict[int, ConfGone]:
        """Return which of them refer to a conf that is no longer kept; the others' confs stay for an hour."""
        stored = {
            index: item.reference
            for index, item in enumerate(items)
            if item.conf is not None and item.reference and item.conf.blob is None
        }
        if not stored:
            return {}
        with told_as_unavailable():
            there = keep(self.client.redis, list(stored.values()))
        named = zip(stored.items(), there, strict=True)
        return {index: ConfGone(reference) for (index, reference), is_there in named if not is_there}

    def accept(self, items: Sequence[Accepted]) -> list[Taken | ConfGone]:
        """Have all of them in Redis, in as few round trips as may be; say of each whether it is new.

        An id that is on record stays as it is. Of the same id twice the first counts. In the place of one
        whose conf is a reference to what is no longer kept is the error: it was not accepted.
        """
        if not items:
            return []
        with told_as_unavailable():
            new = self.client.records.accept_many(items)
        return [
            is_new if isinstance(is_new, ConfGone) else Taken(item.task_id, item.dag_run_id or None, is_new)
            for item, is_new in zip(items, new, strict=True)
        ]


class Batches:
    """Has the orders of many coroutines go to Redis together: while one batch is under way the next gathers.

    So a single order is sent at once, and a thousand concurrent ones cost a few round trips. The client of
    `.delay()` blocks: it does so in `threads`, else in those of the event loop.
    """

    def __init__(self, door: Door, threads: ThreadPoolExecutor | None = None) -> None:
        self._door, self._threads = door, threads
        self._gathered: list[tuple[Accepted, asyncio.Future[Taken]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def accept(self, item: Accepted) -> Taken:
        """Return when it is in Redis. Raises BrokerUnavailable, ConfGone."""
        future: asyncio.Future[Taken] = asyncio.get_running_loop().create_future()
        self._gathered.append((item, future))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
        return await future

    async def _send(self) -> None:
        try:
            while self._gathered:
                batch, self._gathered = self._gathered[:AT_ONCE], self._gathered[AT_ONCE:]
                waiting = [(item, future) for item, future in batch if not future.cancelled()]
                items = [item for item, _ in waiting]
                try:
                    loop = asyncio.get_running_loop()
                    taken = await loop.run_in_executor(self._threads, self._door.accept, items)
                except Exception as exc:  # noqa: BLE001 - each of them is to hear of it
                    for _, future in waiting:
                        if not future.done():
                            future.set_exception(_again(exc))
                    continue
                for (_, future), one in zip(waiting, taken, strict=True):
                    if future.done():
                        continue
                    if isinstance(one, ConfGone):
                        future.set_exception(one)
                    else:
                        future.set_result(one)
        finally:
            self._sending = None


def _again(exc: Exception) -> Exception:
    """Return the exception for one of many: one object raised in many places gathers their traces."""
    if isinstance(exc, BrokerUnavailable):
        copy = BrokerUnavailable(exc.reason)
        copy.__cause__ = exc.__cause__
        return copy
    return exc
