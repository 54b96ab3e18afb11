"""`dagrelay listen`: messages of one source become requests, and are acknowledged once those lie in Redis.

One loop, one batch at a time: receive, read, accept in one round trip, answer, acknowledge. Nothing is held
while Dagrelay's Redis is away: the messages go back to their source, which is asked again once Redis answers.
What cannot be read, or may not be asked for, goes to the source's own dead queue with its reason.

**What ends the listener each time.** Brokers count deliveries in many ways, or not at all, so the count is
ours: a message that was begun and not finished is on record in ``dagrelay:begun:<door>:<day>`` until it is.
Begun once before, it is taken in a small batch, and after that alone; so of those that were in hand with it
none is taken for what it did. After `max_deliveries` such starts it goes to the dead queue.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from ..client import RelayClient, told_as_unavailable
from ..door import Door, Taken
from ..errors import BrokerUnavailable, ConfGone, InvalidRequest, NotAllowed
from ..scopes import Scope
from ..stores.heard import answer_key, heard
from ..stores.records import Accepted, Script
from .message import MAX_MESSAGE_BYTES, Incoming, Order, Routes, json_object, json_value, read
from .replies import Replies, answer, answer_of, in_thread, publish, result_of, where
from .source import Received, Source, SourceUnavailable

log = logging.getLogger("dagrelay.listen")

REPLY_TO: Final = ("replies*", "amq.rabbitmq.reply-to*", "amq.gen-*")
"""Where answers may go unless it is said otherwise: a sender must not write wherever it likes."""

PREFETCH: Final = 200
MAX_DELIVERIES: Final = 5
SUSPECTS_AT_ONCE: Final = 20
"""Of those that were begun once and not finished: most of them did nothing."""

WAIT_S: Final = 1.0
RATE_EVERY_S: Final = 60.0
BACKOFF_S: Final = (0.1, 5.0)

# KEYS: the hash of what was begun. ARGV: seconds to keep it, how many are finished, those, then the names of
# what is begun now. Returns how often each was begun before, and counts those that never were.
BEGIN: Final = Script("""
local finished = tonumber(ARGV[2])
if finished > 0 then redis.call('HDEL', KEYS[1], unpack(ARGV, 3, 2 + finished)) end
if #ARGV == 2 + finished then return {} end
local names = {unpack(ARGV, 3 + finished)}
local counts = redis.call('HMGET', KEYS[1], unpack(names))
for i, name in ipairs(names) do
  if counts[i] then counts[i] = tonumber(counts[i])
  else
    counts[i] = 0
    redis.call('HSET', KEYS[1], name, 1)
  end
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return counts
""")

KEEP_S: Final = 2 * 86_400


@dataclass
class Counts:
    """What became of the messages so far."""

    accepted: int = 0
    repeated: int = 0
    refused: int = 0
    woken: int = 0
    late: int = 0

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value)


class Listener:
    """One source, one thread that reads it, one that tells how requests end. `run` may be called once.

    `publisher` is a source of the same broker for that second thread. With `answers` the messages are those
    of a service which jobs were asked of: they wake who waits for them.
    """

    def __init__(
        self,
        source: Source,
        relay: RelayClient,
        *,
        publisher: Source | None = None,
        scope: Scope = Scope(),  # noqa: B008 - frozen
        routes: Routes | None = None,
        reply_to: Sequence[str] = REPLY_TO,
        max_deliveries: int = MAX_DELIVERIES,
        prefetch: int = PREFETCH,
        answers: str | None = None,
    ) -> None:
        self.counts = Counts()
        self._source, self._relay, self._publisher = source, relay, publisher
        self._door = Door(relay, source.name, scope)
        self._routes, self._reply_to, self._answers = routes, tuple(reply_to), answers
        self._max_deliveries, self._prefetch = max_deliveries, prefetch
        self._by = "".join(one if one.isprintable() else "_" for one in source.name)[:100]
        self._hand: dict[int, Received] = {}
        """What was received and is neither acknowledged nor refused."""
        self._finished: dict[str, None] = {}
        """Names of what was begun and is done with, or went back: not to be counted any more."""
        self._down = ""
        self._wait_s = BACKOFF_S[0]

    def run(self, stop: threading.Event) -> None:
        """Go on until `stop` is set, then finish what is in hand. No message ends it, and no outage."""
        threads = []
        if self._publisher is not None:
            threads.append(in_thread(Replies(self._relay, self._source.name, self._publisher).run, stop))
        rate = _Rate(self.counts)
        log.info("listening source=%s", self._source.name)
        try:
            while not stop.is_set():
                self._turn(stop)
                rate.tell(self._source.name)
        finally:
            stop.set()
            self._forget()
            self._source.close()
            for thread in threads:
                thread.join(10)
            rate.tell(self._source.name, at_once=True)
            log.info("stopped source=%s", self._source.name)

    def _turn(self, stop: threading.Event) -> None:
        """Take one batch; after an outage wait first, and begin with a question to Redis."""
        try:
            if self._down:
                self._try_redis()
            batch = self._source.receive(self._prefetch, WAIT_S)
            if batch:
                self._hand = {id(one): one for one in batch}
                self._handle(batch)
            elif self._finished:
                self._forget()
            if self._down:
                log.info("goes on source=%s", self._source.name)
                self._down, self._wait_s = "", BACKOFF_S[0]
        except BrokerUnavailable as exc:
            self._wait(stop, f"Redis: {exc.reason}")
        except SourceUnavailable as exc:
            self._wait(stop, f"source: {exc}")
        except Exception as exc:  # noqa: BLE001 - no message ends the listener
            self._wait(stop, f"bug: {where(exc)}", counted=True)

    def _try_redis(self) -> None:
        """Raise BrokerUnavailable while Redis takes nothing: it may answer, and be full or read-only.

        A message that is received only to be given back counts as delivered with most brokers, which put it
        aside, or drop it, after so many times.
        """
        with told_as_unavailable():
            self._relay.redis.set(f"{self._key()}:try", 1, px=1)

    def _wait(self, stop: threading.Event, why: str, *, counted: bool = False) -> None:
        """Give back what is in hand, say why once, and wait, longer each time."""
        if self._down != why:
            log.warning("waits source=%s reason=%s", self._source.name, why)
        self._down = why
        if self._hand:
            if not counted:
                self._finished |= dict.fromkeys(map(_name, self._hand.values()))
            with contextlib.suppress(SourceUnavailable):  # then they come again by themselves
                self._source.give_back(list(self._hand.values()))
            self._hand = {}
        stop.wait(self._wait_s * random.uniform(0.5, 1))  # noqa: S311 - no secret
        self._wait_s = min(2 * self._wait_s, BACKOFF_S[1])

    # A batch

    def _handle(self, batch: Sequence[Received]) -> None:
        begun = self._begin([*dict.fromkeys(map(_name, batch))])
        fresh = [one for one in batch if begun[_name(one)] == 0]
        again = [one for one in batch if begun[_name(one)] == 1]
        if fresh:
            self._take(fresh)
        for start in range(0, len(again), SUSPECTS_AT_ONCE):
            some = again[start : start + SUSPECTS_AT_ONCE]
            self._count_again(some)
            self._take(some)
        for one in batch:
            times = begun[_name(one)]
            if times >= self._max_deliveries:
                why = f"it was begun {times} times and never finished: it may end the listener"
                self._refuse(one, None, why)
            elif times > 1:
                self._count_again([one])
                self._take([one])

    def _take(self, batch: Sequence[Received]) -> None:
        """Read, accept, answer and acknowledge messages; refuse those which cannot be read."""
        if self._answers is not None:
            self._wake(batch, self._answers)
            return
        good: list[tuple[Received, Order, Accepted]] = []
        bad: list[tuple[Received, InvalidRequest]] = []
        for one in batch:
            try:
                order = read(one.message, door=self._door.name, routes=self._routes)
                self._check_reply_to(order.envelope.reply_to)
                good.append((one, order, self._door.prepare(order, by=self._by)))
            except InvalidRequest as exc:
                bad.append((one, exc))
            except Exception as exc:  # noqa: BLE001 - no message ends the listener
                log.error("unreadable source=%s by=%s", self._source.name, where(exc))
                bad.append((one, InvalidRequest(f"body: could not be read ({type(exc).__name__})")))
        answers = self._door.accept([item for _, _, item in good])
        said = list(zip(good, answers, strict=True))
        bad += [(one, why) for (one, _, _), why in said if isinstance(why, ConfGone)]
        good = [one for one, why in said if isinstance(why, Taken)]
        taken = [one for one in answers if isinstance(one, Taken)]
        # What nothing names would be another request if it came again: it is not to wait for an answer's way.
        self._done([one for one, order, _ in good if order.task_id is None])
        for (_, order, _), got in zip(good, taken, strict=True):
            if order.envelope.reply_to is not None:
                self._tell_accepted(order, got.task_id, got.dag_run_id, got.new)
        self._done([one for one, order, _ in good if order.task_id is not None])
        new = sum(one.new for one in taken)
        self.counts.accepted += new
        self.counts.repeated += len(taken) - new
        for one, why in bad:
            self._refuse(one, why, str(why))

    def _wake(self, batch: Sequence[Received], service: str) -> None:
        """Hand the answers of a service to who waits for them."""
        for one in batch:
            message = one.message
            try:
                correlation_id, said = said_by(message)
                woken = self._relay.wake(answer_key(service, correlation_id), heard(said))
            except InvalidRequest as exc:
                self._refuse(one, exc, str(exc))
                continue
            if woken:
                self.counts.woken += 1
            else:
                self.counts.late += 1
                log.info("nobody waits service=%s correlation_id=%r", service, correlation_id)
            self._done([one])

    def _check_reply_to(self, to: str | None) -> None:
        if to is not None and not any(fnmatchcase(to, pattern) for pattern in self._reply_to):
            places = ", ".join(self._reply_to) or "none"
            raise NotAllowed(f"reply_to: {to!r} is no place that answers go to here: those are {places}")

    # What is told

    def _tell_accepted(self, order: Order, task_id: str, dag_run_id: str | None, new: bool) -> None:
        """Answer that a request was accepted; where it was before, and has ended, how."""
        told = order.envelope
        body = answer(
            "accepted",
            id=task_id,
            correlation_id=told.correlation_id,
            at=time.time(),
            dag_id=getattr(order.request, "dag_id", None),
            dag_run_id=dag_run_id,
            service=getattr(order.request, "service", None),
        )
        if not new and (record := self._relay.record(task_id)) is not None and record.ended:
            with told_as_unavailable():
                result = result_of(self._relay.redis, task_id)
            body = answer_of(
                "ended", task_id, record, result, correlation_id=told.correlation_id, at=time.time()
            )
        publish(self._source, told.reply_to or "", body, told.correlation_id, task_id)

    def _refuse(self, one: Received, why: InvalidRequest | None, reason: str) -> None:
        log.warning("refused source=%s message=%r reason=%s", self._source.name, one.message.id, reason)
        to, correlation_id = _wish(one.message) if why is not None else (None, None)
        if to is not None and self._answers is None and not self._closed_to(to):
            body = answer(
                "refused",
                id=None,
                correlation_id=correlation_id,
                at=time.time(),
                message_id=one.message.id,
                error=type(why).__name__,
                reason=reason,
            )
            publish(self._source, to, body, correlation_id, "")
        self._source.refuse(one, reason)
        self._let_go([one])
        self.counts.refused += 1

    def _closed_to(self, to: str) -> bool:
        try:
            self._check_reply_to(to)
        except NotAllowed:
            return True
        return False

    def _done(self, received: Sequence[Received]) -> None:
        self._source.done(received)
        self._let_go(received)

    def _let_go(self, received: Sequence[Received]) -> None:
        self._finished |= dict.fromkeys(map(_name, received))
        for one in received:
            del self._hand[id(one)]

    # What was begun

    def _key(self) -> str:
        return f"dagrelay:begun:{self._door.name}:{int(time.time() // 86_400)}"

    def _begin(self, names: list[str]) -> dict[str, int]:
        finished = [
            *itertools.islice(self._finished, 2 * self._prefetch + 1000)
        ]  # Lua takes so many arguments at once
        with told_as_unavailable():
            found = BEGIN.run(self._relay.redis, (self._key(),), (KEEP_S, len(finished), *finished, *names))
        for name in finished:
            del self._finished[name]
        return {name: int(count) for name, count in zip(names, found, strict=True)}

    def _count_again(self, some: Sequence[Received]) -> None:
        with told_as_unavailable(), self._relay.redis.pipeline(transaction=False) as pipe:
            for one in some:
                pipe.hincrby(self._key(), _name(one), 1)
            pipe.execute()

    def _forget(self) -> None:
        """Count no more what is done with; where Redis does not answer, it is left for it to expire."""
        try:
            while self._finished:
                self._begin([])
        except BrokerUnavailable:
            pass


class _Rate:
    """Says now and then how many messages there were, if there were any."""

    def __init__(self, counts: Counts) -> None:
        self._counts, self._since, self._seen = counts, time.monotonic(), 0

    def tell(self, source: str, *, at_once: bool = False) -> None:
        now = time.monotonic()
        total = sum(vars(self._counts).values())
        if total > self._seen and (at_once or now - self._since >= RATE_EVERY_S):
            rate = (total - self._seen) / (now - self._since)
            log.info("so far source=%s %s per_s=%.1f", source, self._counts, rate)
            self._since, self._seen = now, total


def said_by(message: Incoming) -> tuple[str, Any]:
    """Return the correlation id of an answer, which it carries around it or in it, and what it says.

    Raises InvalidRequest.
    """
    if message.problem is not None:
        raise InvalidRequest(message.problem)
    if len(message.body) > MAX_MESSAGE_BYTES:
        raise InvalidRequest(f"body: is over the limit of {MAX_MESSAGE_BYTES} bytes")
    said = json_value(message.body)
    inside = said.get("correlation_id") if isinstance(said, dict) else None
    found = message.correlation_id or message.headers.get("correlation_id") or inside
    if not isinstance(found, str) or not 0 < len(found) <= 250 or not found.isprintable():
        raise InvalidRequest("correlation_id: an answer carries that of what was asked, 1 to 250 characters")
    return found, said


def _name(one: Received) -> str:
    """Return the name by which a message is counted; one without an id by what it is.

    A broker's id may be longer than Redis should keep, or half a surrogate pair, which it cannot take.
    """
    name = one.message.id
    if name and len(name) <= 250 and name.isprintable():
        return name
    told = name.encode("utf-8", "surrogatepass") if name else one.message.body
    return hashlib.sha1(told, usedforsecurity=False).hexdigest()


def _wish(message: Incoming) -> tuple[str | None, str | None]:
    """Return where the sender of a refused message wants its answer, and with what id, as far as it says.

    As for a message that is taken, its body goes before what lies around it.
    """
    fields: Any = {}
    if len(message.body) <= MAX_MESSAGE_BYTES:
        with contextlib.suppress(InvalidRequest):
            fields = json_object(message.body)
    if "specversion" in fields:
        fields = fields.get("data")
    inside = fields if isinstance(fields, dict) else {}
    to = _plain(inside.get("reply_to")) or _plain(message.reply_to)
    return to, _plain(inside.get("correlation_id")) or _plain(message.correlation_id)


def _plain(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= 250 and value.isprintable() else None
