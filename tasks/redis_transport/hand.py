"""What this process holds: its lease, the messages that it has claimed, its acknowledgements.

One for a process, not for a channel: a connection that is lost and made again changes nothing about what is
running here, so nothing of it is given to somebody else, and a late acknowledgement goes over the new one.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import socket
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from celery.utils.dispatch import Signal
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from redis import ConnectionPool
from redis.exceptions import RedisError, ResponseError

from . import scripts
from .keys import Keys

log = get_logger("redis_transport")

AGAIN_S: Final = 7.0
"""When a dead owner's hands are looked at again. A machine that was cut off may have left moves that block in
Redis; each ends after BLOCK_S (5 s), and may until then have fetched a message more."""

RETRY_S: Final = 2.0
"""How soon a message that this process gives back is offered again, and a refused write repeated."""

RESTORE_BATCH: Final = 500

Why = Literal["counted", "begun", "unseen"]
"""Of a message that is given back: it may be the reason itself; it was begun; nobody has begun it."""

LEAVE_S: Final = 0.1
"""How often a process that ends writes what its last tasks leave to be written."""

taken_back: Final = Signal(name="taken_back", providing_args=["count"])
"""Sent when messages that a dead worker held were put back to their queues."""


@dataclass(slots=True)
class Held:
    """One claimed message. `sha` is set where it had come back before."""

    message: weakref.ref[Any] | None
    sha: str | None
    returning: bool = False


class Line:
    """One connection, and commands over it: a third of the CPU of redis-py's client, which asks its pool each
    time. What fails is not repeated: the caller finds out what became of it."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._connection: Any = None
        self._lock = threading.Lock()
        self._used_by = 0

    def another(self) -> Line:
        """Return a line of its own to the same server."""
        return Line(self._pool)

    def execute_command(self, *args: Any) -> Any:
        """Send one command and return the reply. Raises what redis-py raises."""
        if self._used_by == threading.get_ident():
            # A signal's handler (Celery's cold shutdown) has interrupted us between a command and its reply.
            other = self.another()
            try:
                return other.execute_command(*args)
            finally:
                other.close()
        with self._lock:
            self._used_by = threading.get_ident()
            try:
                return self._execute(*args)
            finally:
                self._used_by = 0

    def _execute(self, *args: Any) -> Any:
        if self._connection is None:
            self._connection = self._pool.get_connection()
        connection = self._connection
        try:
            connection.send_command(*args)
            return connection.read_response()
        except ResponseError:
            raise
        except BaseException:
            connection.disconnect()
            raise

    def close(self) -> None:
        """Disconnect; the next command connects again. In a child after a fork it closes its copy only."""
        if self._connection is not None:
            self._connection.disconnect()


class Hand:
    """The messages of one process in one Redis. Its methods are called by the event loop's thread, but `ack`,
    `give_back` and what a garbage collector calls, which any thread may."""

    def __init__(self, client: Line, keys: Keys, lease_s: float) -> None:
        self.client, self.keys, self.lease_s = client, keys, lease_s
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:12]}"
        self.pid = os.getpid()
        self.held: dict[int, Held] = {}
        self._acks: deque[int] = deque()
        self._returns: deque[tuple[float, int, Why]] = deque()
        self._queues: set[str] = set()
        self.uncertain = False
        """Whether a claim's answer was lost: messages may be ours that we do not know of."""
        self.closed = False
        self.on_leave: weakref.WeakSet[Any] = weakref.WeakSet()
        """Those whose `pause(line)` is called when this process begins to leave: its feeders."""
        self._leaving: threading.Thread | None = None
        self._left = threading.Event()
        self._apart: Line | None = None
        atexit.register(self.release)

    @property
    def held_key(self) -> str:
        return self.keys.held(self.owner)

    def hold(self, tag: int, raw: bytes, returned: int | None) -> None:
        """Note a message that was claimed; `returned` is None for one that has never come back."""
        sha = hashlib.sha1(raw, usedforsecurity=False).hexdigest() if returned is not None else None
        self.held[tag] = Held(None, sha)

    def attach(self, tag: int, message: Any, on_gone: Callable[[int], None]) -> bool:
        """Note who has a message; tell whether it is held. When nobody has it any more, it is given back.

        Celery forgets messages without a word: those of a rate-limited task when the connection is lost,
        those which a pool had not begun when it is shut down.
        """
        held = self.held.get(tag)
        if held is None:
            return False
        held.message = weakref.ref(message, lambda _: self._forgotten(tag, on_gone))
        return True

    def ack(self, tag: int) -> bool:
        """Acknowledge with the next write; tell whether it was held."""
        if tag not in self.held:
            return False
        self._acks.append(tag)
        return True

    def give_back(self, tag: int, *, after_s: float = 0.0, why: Why = "unseen") -> None:
        """Put a message back to the front of its queue, now or in a while."""
        held = self.held.get(tag)
        if held is not None and not held.returning:
            held.returning = True
            self._returns.append((time.monotonic() + after_s, tag, why))

    def _forgotten(self, tag: int, on_gone: Callable[[int], None]) -> None:
        on_gone(tag)
        held = self.held.get(tag)
        if held is not None and not self.closed and tag not in self._acks:
            self.give_back(tag)

    def drop(self, tag: int) -> None:
        """Forget a message that a script has moved on already."""
        held = self.held.pop(tag, None)
        if held is not None and held.sha is not None:
            self.client.execute_command("HDEL", self.keys.returned, held.sha)

    def take_acks(self) -> tuple[list[int], list[str]]:
        """Return the tags to acknowledge, and the SHA-1s of those that had come back before."""
        tags: list[int] = []
        shas: list[str] = []
        while (tag := _pop(self._acks)) is not None:
            held = self.held.pop(tag, None)
            if held is not None:
                tags.append(tag)
                if held.sha is not None:
                    shas.append(held.sha)
        return tags, shas

    def untake_acks(self, tags: Iterable[int]) -> None:
        """Keep acknowledgements for the next write, because this one failed."""
        for tag in tags:
            self.held.setdefault(tag, Held(None, None))
            self._acks.append(tag)

    @property
    def has_acks(self) -> bool:
        return bool(self._acks)

    def flush(self, line: Line | None = None) -> None:
        """Write the acknowledgements that are waiting. Raises what redis-py raises, and keeps them then."""
        client = line or self.client
        tags, shas = self.take_acks()
        if not tags:
            return
        try:
            scripts.ACKNOWLEDGE(client, (self.held_key, self.keys.returned), (len(tags), *tags, *shas))
        except BaseException:
            self.untake_acks(tags)
            raise

    def return_due(self, line: Line | None = None) -> None:
        """Put back what is to be put back by now. What Redis refuses is tried again in a while."""
        client = line or self.client
        now = time.monotonic()
        due: dict[Why, list[int]] = {}
        for _ in range(len(self._returns)):
            entry = _pop(self._returns)
            if entry is None:
                break
            at, tag, why = entry
            if at > now:
                self._returns.append((at, tag, why))
            elif tag in self.held:
                due.setdefault(why, []).append(tag)
        for why, tags in due.items():
            try:
                scripts.GIVE_BACK(client, (self.held_key, self.keys.returned), (why, *tags))
            except RedisError as exc:
                log.warning("messages cannot be given back yet, trying again: %s", exc)
                self._returns.extend((now + RETRY_S, tag, why) for tag in tags)
            else:
                for tag in tags:
                    self.held.pop(tag, None)

    def renew(self) -> None:
        """Renew the lease, and find what is ours without our knowing. Raises what redis-py raises."""
        if not self._queues:
            return
        was_there, known = self._renew_over(self.client)
        if self.uncertain or int(known) > len(self.held):
            self._find_unknown()
        if not was_there and self.held:
            log.error(
                "the lease of this process had run out with %d messages held: it stood still for longer than "
                "%g s, and others may run them as well",
                len(self.held),
                self.lease_s,
            )

    def _renew_over(self, line: Line) -> Any:
        own = self.keys
        return scripts.RENEW(
            line,
            (own.leases, self.held_key, own.gone, own.hands(self.owner)),
            (self.owner, self.lease_s, *tuple(self._queues)),
        )

    def renew_apart(self) -> None:
        """Renew the lease over another connection: called by a thread while the event loop stands still."""
        if self.closed or not self._queues:
            return
        if self._apart is None:
            self._apart = self.client.another()
        try:
            self._renew_over(self._apart)
        except (RedisError, OSError) as exc:
            log.warning("the lease is not renewed yet: %s", exc)

    def _find_unknown(self) -> None:
        """Give back what was claimed for us by a call whose answer was lost."""
        for raw_tag in self.client.execute_command("HKEYS", self.held_key):
            tag = int(raw_tag)
            if tag not in self.held:
                self.held[tag] = Held(None, None)
                self.give_back(tag)
        self.uncertain = False

    def watch(self, queue_keys: Iterable[str]) -> None:
        """Say from which queues moves will fetch into this process's hands, before the first of them."""
        self._queues |= set(queue_keys)
        self.renew()

    def restore_dead(self) -> int:
        """Put back what processes hold whose lease has run out; return how many messages."""
        total = 0
        while True:
            answer = restore(self.client, self.keys, "dead")
            if not answer:
                return total
            owner, back, more = answer
            total += back
            if back:
                log.warning("put back %d messages of a dead worker owner=%s", back, owner)
                taken_back.send(sender=self, count=back)
            if more and not back:
                return total

    def leave(self) -> None:
        """Renew the lease, acknowledge and give back from a thread from now on.

        Tasks still run, and the event loop has ended, or the handler of a signal holds it up (Celery's soft
        shutdown sleeps in one).
        """
        if self._leaving is None and not self.closed and os.getpid() == self.pid:
            self._leaving = threading.Thread(target=self._leave, name="redis_transport", daemon=True)
            self._leaving.start()

    def _leave(self) -> None:
        line = self.client.another()
        paused, renew_at = False, 0.0
        while not self._left.wait(LEAVE_S):
            try:
                if not paused:
                    for feeder in tuple(self.on_leave):
                        feeder.pause(line)
                    paused = True
                now = time.monotonic()
                if now >= renew_at:
                    self._empty_hands(line)
                    self._renew_over(line)
                    renew_at = now + self.lease_s / 3
                self.return_due(line)
                self.flush(line)
            except (RedisError, OSError) as exc:
                log.warning("what this worker leaves is not written yet: %s", exc)
                self._left.wait(1.0)
        line.close()

    def _empty_hands(self, line: Line) -> None:
        """Put back to the front of their queues what moves have fetched and nobody claims any more."""
        for queue_key in tuple(self._queues):
            scripts.EMPTY(line, (self.held_key, self.keys.hand(self.owner, queue_key), queue_key), ())

    def release(self) -> None:
        """Put back all that is held and end the lease: at the end of the process."""
        if self.closed or os.getpid() != self.pid:
            return
        self.closed = True
        self._left.set()
        if self._leaving is not None:
            self._leaving.join(timeout=10)
        atexit.unregister(self.release)
        if not self._queues:
            return
        try:
            self.flush()
            if begun := self._begun():
                scripts.GIVE_BACK(self.client, (self.held_key, self.keys.returned), ("begun", *begun))
            more = 1
            total = 0
            while more:
                answer = restore(self.client, self.keys, "stop", self.owner)
                if not answer:
                    break
                _, back, more = answer
                total += back
        except RedisError as exc:
            log.warning("messages not put back at the end, their lease does it: %s", exc)
        else:
            if total:
                log.info("put back %d messages that were not begun", total)
        self.held.clear()

    def _begun(self) -> list[int]:
        """Return the tags of what Celery runs: a pool whose end is forced leaves such."""
        messages = {id(request.message) for request in tuple(worker_state.active_requests)}
        held = tuple(self.held.items())
        return [tag for tag, one in held if one.message is not None and id(one.message()) in messages]


def _pop(entries: deque[Any]) -> Any:
    """Take the first entry, or None: another thread, or a handler of a signal, may have been faster."""
    try:
        return entries.popleft()
    except IndexError:
        return None


def restore(client: Line, keys: Keys, why: str, owner: str = "") -> tuple[str, int, int] | None:
    """Run RESTORE once: for one dead owner, or for the one that stops."""
    answer = scripts.RESTORE(
        client,
        (keys.leases, keys.gone, keys.returned),
        (keys.held_prefix, keys.hands_prefix, keys.hand_prefix, why, owner, AGAIN_S, RESTORE_BATCH),
    )
    if not answer:
        return None
    name = answer[0].decode() if isinstance(answer[0], bytes) else str(answer[0])
    return name, int(answer[1]), int(answer[2])
