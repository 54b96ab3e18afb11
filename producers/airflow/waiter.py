"""How triggers wait: all those of one process together, on one connection to Redis and one question.

A triggerer runs thousands of triggers in one event loop. Each of them waits for one request; every
`LOOK_EVERY_S` one script tells which of all these stand otherwise than before. That costs Redis about 1 µs
for each and look, needs nothing to be registered or renewed there, and so survives whatever happens to
either side.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import weakref
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import NoScriptError, RedisError

from ..settings import ProducerSettings
from ..stores.standing import AT_ONCE, LOOK, Standing, changes_in, look_args
from ..stores.states import RESULT_PREFIX

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 0.25
PER_SECOND: Final = 10_000
"""So many requests are looked at in a second at the most: beyond a quarter of that, looks come less often."""

AGAIN_AFTER_S: Final = 2.0
"""After Redis did not answer."""

ANSWER_TIMEOUT_S: Final = 5.0

MOST_OUTCOME_BYTES: Final = 48_000
"""The largest outcome that becomes an XCom in the triggerer, whose one thread has others to serve."""


class Waiter:
    """All that one event loop waits for in one Redis."""

    def __init__(self, settings: ProducerSettings) -> None:
        pool = BlockingConnectionPool.from_url(
            settings.redis_url,
            max_connections=1,
            timeout=ANSWER_TIMEOUT_S,
            socket_timeout=ANSWER_TIMEOUT_S,
            socket_connect_timeout=ANSWER_TIMEOUT_S,
            client_name="dagrelay-triggerer",
        )
        self._redis = Redis(connection_pool=pool)
        self._known: dict[str, Standing | None] = {}
        self._followers: dict[str, list[Changes]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._new = asyncio.Event()

    @property
    def stops(self) -> bool:
        """Whether its event loop is ending: then it is not one who waits that is cancelled, but all."""
        return self._looking is not None and (self._looking.cancelling() > 0 or self._looking.cancelled())

    def changes(self, request_id: str) -> Changes:
        """Return how a request stands: now, and whenever that changes; it never ends by itself.

        Of what changes several times between two looks the last is told. While Redis is away nothing is
        told, and what happened is afterwards.
        """
        changes = Changes(self, request_id)
        self._followers.setdefault(request_id, []).append(changes)
        known = self._known.get(request_id)
        if known is not None:
            changes.tell(known)
        else:
            self._known[request_id] = None
            self._new.set()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_on(), name="dagrelay waiter")
        return changes

    def leave(self, changes: Changes) -> None:
        """Look for one no longer who has followed a request."""
        followers = self._followers.get(changes.request_id, [])
        if changes in followers:
            followers.remove(changes)
            if not followers:
                del self._followers[changes.request_id], self._known[changes.request_id]

    async def outcome(self, request_id: str) -> Any:
        """Return what a request that ended well has ended in, as JSON values.

        None where that is too large to be handled here (`MOST_OUTCOME_BYTES`), is kept no longer, or cannot
        be asked for now.
        """
        try:
            text = await self._redis.getrange(RESULT_PREFIX + request_id, 0, MOST_OUTCOME_BYTES)
            found = json.loads(text) if len(text) <= MOST_OUTCOME_BYTES else {}
        except (RedisError, OSError, ValueError):
            return None
        return found.get("result") if found.get("status") == "SUCCESS" else None

    async def _look_on(self) -> None:
        """Look as long as the event loop lives: those who wait come and go."""
        away = False
        try:
            while True:
                self._new.clear()
                if not self._known:
                    await self._new.wait()
                    continue
                try:
                    await self._look()
                except Exception as exc:  # noqa: BLE001 - whatever it is: nobody else looks for all who wait
                    if not away:
                        log.warning(
                            "Dagrelay's Redis does not answer (%s: %s); asked again", type(exc).__name__, exc
                        )
                    away = True
                    await asyncio.sleep(AGAIN_AFTER_S)
                    continue
                if away:
                    log.info("Dagrelay's Redis answers again")
                away = False
                with contextlib.suppress(TimeoutError):  # one that comes new is looked at without waiting
                    pause_s = max(LOOK_EVERY_S, len(self._known) / PER_SECOND)
                    await asyncio.wait_for(self._new.wait(), pause_s)
                    await asyncio.sleep(0.01)  # and those that come with it
        finally:
            await self._redis.aclose()

    async def _look(self) -> None:
        """Tell each follower what has changed. Raises what redis-py raises."""
        ids = list(self._known)
        for start in range(0, len(ids), AT_ONCE):
            some = {one: self._known[one] for one in ids[start : start + AT_ONCE] if one in self._known}
            answer = await self._run(look_args(some))
            for request_id, standing in changes_in(answer).items():
                if request_id not in self._known:
                    continue  # nobody waits for it any more
                self._known[request_id] = standing
                for changes in self._followers.get(request_id, ()):
                    changes.tell(standing)

    async def _run(self, args: list[str]) -> Any:
        try:
            return await self._redis.execute_command("EVALSHA", LOOK.sha, 0, *args)
        except NoScriptError:
            return await self._redis.execute_command("EVAL", LOOK.lua, 0, *args)


class Changes:
    """How one request stands, for one who follows it. A triggerer holds thousands of these: of a queue's size
    each would take a quarter of all that a trigger takes."""

    __slots__ = ("_told", "_waiter", "_woken", "request_id")

    def __init__(self, waiter: Waiter, request_id: str) -> None:
        self._waiter, self.request_id = waiter, request_id
        self._told: Standing | None = None
        self._woken: asyncio.Future[None] | None = None

    def tell(self, standing: Standing) -> None:
        """Say how it stands now."""
        self._told = standing
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def __aiter__(self) -> Changes:
        return self

    async def __anext__(self) -> Standing:
        """Return how it stands, once that is not what was returned last. Who is cancelled here has left."""
        try:
            while self._told is None:
                self._woken = asyncio.get_running_loop().create_future()
                await self._woken
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._woken = None
        told, self._told = self._told, None
        return told

    def close(self) -> None:
        """Follow it no longer."""
        self._waiter.leave(self)


_waiters: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Waiter]] = (
    weakref.WeakKeyDictionary()
)


def waiter_for(settings: ProducerSettings) -> Waiter:
    """Return the waiter of this event loop for a Redis."""
    of_loop = _waiters.setdefault(asyncio.get_running_loop(), {})
    found = of_loop.get(settings.redis_url)
    if found is None:
        found = of_loop[settings.redis_url] = Waiter(settings)
    return found
