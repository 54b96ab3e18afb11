"""kombu's Redis transport with another way to fetch, to acknowledge, and to wait.

What of kombu is replaced, and why, place by place (`tests/unit/redis_transport/test_kombu.py` fails when a
release of kombu changes one of them):

- `Channel.active_queues` is empty for kombu's poller, so that it sends no BRPOP and restores nothing by its
  own clock; the `Feeder` serves the queues. Fanout (remote control) stays kombu's, and so do queues without
  acknowledgement (the replies to remote control).
- `Channel.QoS` keeps no messages and restores none when a channel closes: the `Hand` of the process does.
- `Channel._put` parks what is not due yet. Everything else is published as kombu does.
- `Channel._queue_bind` does without the write where Redis is full and the binding is there; `Channel._size`
  asks without a transaction. So a worker can connect again in a full Redis, and empty it.
- `Channel._create_client` made a client object for every command, a quarter of a worker's CPU: it is kept.
- `Channel.Message` takes the body that was decoded already.
- `Transport.connection_errors` holds ResponseError: what a server answers while it fails over is a reason to
  connect again, not, as in kombu 5.7, the end of the worker.
- `Transport.register_with_event_loop` adds our timers; `Transport._deliver` parks in the stock fetch.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import tzinfo
from functools import cached_property
from typing import Any, Final, NamedTuple
from zoneinfo import ZoneInfo

import redis
from celery.exceptions import Reject
from celery.utils.dispatch import Signal
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils import json as kombu_json
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from redis.retry import Retry

from . import messages, scripts
from .hand import RETRY_S, Hand, Line, Why
from .keys import Keys
from .lot import Lot

try:
    from multiprocessing.util import register_after_fork
except ImportError:  # no fork, nothing to look after
    register_after_fork = None  # type: ignore[assignment]

log = get_logger("redis_transport")

BLOCK_S: Final = 5
"""How long a move blocks in Redis. What was blocked by a machine that was cut off ends after it."""

OVERDUE_S: Final = 10
"""How much later than that a reply may come before the connection counts as half open."""

PUMP_S: Final = 0.16
"""How often what is due is looked for: what was parked by somebody else in between comes back so much late at
the most. What is known to be due before the next look is moved on time (see `Pump`)."""

BATCH_DELAY_S: Final = 0.002
"""How long a worker with some messages in work waits for more credit before it claims again."""

MOST_A_CLAIM: Final = 200
MOST_A_MOVE: Final = 1000
MAX_RETURNS: Final = 10
"""How often a message may come back from workers, or children of a pool, that died with it, before it counts
as their reason."""

parked: Final = Signal(name="parked", providing_args=["readable", "due"])
"""Sent with a message that was parked when it was claimed: it has not been seen by Celery."""

quarantined: Final = Signal(name="quarantined", providing_args=["reason", "queue_key"])
"""Sent when a message was put into quarantine."""


_gathering = threading.local()


@contextmanager
def gathered() -> Iterator[list[tuple[str, bytes]]]:
    """Gather what this thread publishes instead of publishing it: the queue's list and the message, in order.

    For an application whose own script pushes messages together with something else. Nothing of it is parked:
    what is not due yet is when it is claimed.
    """
    found: list[tuple[str, bytes]] = []
    _gathering.messages = found
    try:
        yield found
    finally:
        _gathering.messages = None


class Message(virtual.Message):
    """A message whose body was decoded when it was read."""

    def __init__(self, payload: dict[str, Any], channel: Any = None, **kwargs: Any) -> None:
        decoded = payload.pop("decoded", None)
        super().__init__(payload, channel=channel, **kwargs)
        if decoded is not None:
            self._decoded_cache = decoded


class QoS(virtual.QoS):
    """Counts what a channel has delivered; what is to be kept, the process's hand keeps."""

    restore_at_shutdown = False

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        self._tags: set[int] = set()

    def can_consume(self) -> bool:
        return self.credit() > 0

    def can_consume_max_estimate(self) -> int:
        return self.credit()

    def credit(self) -> int:
        """Return how many messages more may be delivered."""
        return max(0, self.prefetch_count - len(self._tags)) if self.prefetch_count else MOST_A_CLAIM

    def append(self, message: Any, delivery_tag: Any) -> None:
        if self.channel.hand.attach(delivery_tag, message, self._tags.discard):
            self._tags.add(delivery_tag)

    def ack(self, delivery_tag: Any) -> None:
        self._tags.discard(delivery_tag)
        self.channel.hand.ack(delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        if requeue:
            self.give_back(delivery_tag)
        else:
            self.ack(delivery_tag)

    def give_back(self, delivery_tag: Any, why: Why = "begun") -> None:
        """Put a message back in a moment, not at once: what made it fail may still be there.

        `counted` is for what failed by itself: after `MAX_RETURNS` times it goes to quarantine.
        """
        self._tags.discard(delivery_tag)
        self.channel.hand.give_back(delivery_tag, after_s=RETRY_S, why=why)

    def restore_unacked(self) -> list[Any]:
        return []

    def restore_unacked_once(self, stderr: Any = None) -> None:
        self._on_collect.cancel()


class StockQoS(kombu_redis.QoS):
    """kombu's bookkeeping, for the stock fetch."""

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        if requeue:
            self.give_back(delivery_tag)
        else:
            super().reject(delivery_tag, requeue=False)

    def give_back(self, delivery_tag: Any, why: Why = "begun") -> None:
        """Leave it to the visibility timeout. Where Redis is full it could not be put back at all."""
        virtual.QoS.ack(self, delivery_tag)


class Move:
    """One connection that blocks on one queue list, to move a message from there into our hand."""

    def __init__(self, feeder: Feeder, queue_key: str) -> None:
        self.feeder, self.queue_key = feeder, queue_key
        self.hand_key = feeder.hand.keys.hand(feeder.hand.owner, queue_key)
        self.connection = feeder.pool.get_connection()
        self.fd = -1
        self.armed = False
        self.sent_at = 0.0
        self.client_id: Any = None

    def arm(self) -> None:
        """Send the blocking move, connecting first where there is no connection."""
        if self.fd < 0:
            self.connection.connect()
            self.connection.send_command("CLIENT", "ID")
            self.client_id = self.connection.read_response()
            self.fd = self.connection._sock.fileno()
            self.feeder.loop.add_reader(self.fd, self.on_readable)
        self.connection.send_command("BLMOVE", self.queue_key, self.hand_key, "RIGHT", "LEFT", BLOCK_S)
        self.armed, self.sent_at = True, time.monotonic()

    def on_readable(self) -> None:
        """Read the reply: a message is in our hand, or the time was over."""
        try:
            found = self.connection.read_response()
        except OutOfMemoryError:  # a move may need memory, and a claim does not: go on by claims
            self.armed = False
            self.feeder.refused()
            return
        except BaseException:
            self.close()
            raise
        self.armed = False
        if found is not None:
            self.feeder.fetched(self.queue_key)

    def overdue(self) -> bool:
        """Tell whether the reply should have been here long ago: the connection is half open."""
        return self.armed and time.monotonic() - self.sent_at > BLOCK_S + OVERDUE_S

    def close(self) -> None:
        """Disconnect. What the server moves all the same is found by a later claim."""
        if self.fd >= 0:
            with suppress(KeyError, ValueError, OSError):  # the loop was reset
                self.feeder.loop.remove(self.fd)
            self.fd = -1
        self.armed = False
        self.connection.disconnect()

    def unblock(self) -> None:
        """End the move on the server's side too, so that it fetches nothing more."""
        if self.armed and self.client_id is not None:
            self.feeder.hand.client.execute_command("CLIENT", "UNBLOCK", self.client_id)
        self.close()


class Waker:
    """A pipe that ends the wait of an event loop.

    kombu's loop measures how long it may wait before it calls us in each of its turns, so a timer that is set
    in a tick does not end the wait after it. And where it has nothing to read from (no remote control, and no
    blocking move while there is more to claim), it does not wait for anything but sleeps for 0.1 s.
    """

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._out, self._in = os.pipe()
        for fd in (self._out, self._in):
            os.set_blocking(fd, False)
        loop.add_reader(self._out, self._drain)

    def wake(self) -> None:
        """End the wait that is going on, or the next one."""
        with suppress(BlockingIOError):  # full of such wishes
            os.write(self._in, b".")

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._out, 4096)

    def close(self) -> None:
        if self._out < 0:
            return
        with suppress(KeyError, ValueError, OSError):  # the loop was reset
            self._loop.remove(self._out)
        os.close(self._out)
        os.close(self._in)
        self._out = self._in = -1


class Diverted(NamedTuple):
    """A message that was claimed, and that an application may put elsewhere before Celery sees it."""

    tag: int
    queue_key: str
    raw: bytes
    readable: messages.Readable


class Feeder:
    """Serves the queues of one channel: claims what its credit allows, and blocks where there is nothing."""

    def __init__(self, channel: Channel, loop: Any) -> None:
        self.channel, self.loop = channel, loop
        self.hand = channel.hand
        self.pool = channel.own_pool()
        self.moves: dict[str, Move] = {}
        self.queues: list[str] = []
        self.lists: list[tuple[str, str]] = []  # queue, list; in groups of equal priority
        self.more = True  # the last claim got all that it asked for
        self.full_hands: set[str] = set()
        self.waiting_since = 0.0
        self.refused_until = 0.0
        self.closed = False
        self.since = time.monotonic()
        self.waker = Waker(loop)
        self.hand.on_leave.add(self)
        if register_after_fork is not None:
            register_after_fork(self, Feeder._after_fork)

    def _after_fork(self) -> None:
        """In a child of a pool: give up the parent's sockets, without a word to the server."""
        for move in self.moves.values():
            move.connection.disconnect()  # redis-py only closes what another process has opened
        self.hand.client.close()

    def set_queues(self, queues: list[str]) -> None:
        """Serve these queues from now on."""
        if queues == self.queues:
            return
        steps, key = self.channel.priority_steps, self.hand.keys.queue
        self.lists = [(queue, key(queue, step)) for step in sorted(steps) for queue in queues]
        self.queues = list(queues)
        wanted = {list_key for _, list_key in self.lists}
        self.hand.watch(wanted)
        for gone in self.moves.keys() - wanted:
            self.moves[gone].unblock()
            self._empty_hand(gone)
            del self.moves[gone]
        self.full_hands |= wanted  # what an earlier connection may have left there
        self.more = True

    def _empty_hand(self, queue_key: str) -> None:
        """Put back what a move has fetched from a queue that is not served any more."""
        hand = self.hand
        claim(hand, [queue_key], wanted=0, group=1, fair=False, hands=[1], tags=[], shas=[])

    def tick(self) -> None:
        """Called once in each turn of the event loop. Raises what redis-py raises."""
        if self.closed or self.hand.closed:
            return
        self.hand.return_due()
        if not self.lists:
            self.hand.flush()
            return
        credit = self.channel.qos.credit()
        if (self.more and credit) or self.full_hands:
            if self._worth_it(credit):
                self.claim(credit)
                if self.more and self.channel.qos.credit():
                    # What was claimed has been parked or put aside: no task's end will wake the loop.
                    self.waker.wake()
        elif self.hand.has_acks:
            self.hand.flush()
        if self.refused_until and time.monotonic() >= self.refused_until:
            self.refused_until, self.more = 0.0, True
        if not self.more and credit and not self.refused_until:
            for _, queue_key in self.lists:
                move = self.moves.get(queue_key)
                if move is None:
                    move = self.moves[queue_key] = Move(self, queue_key)
                if not move.armed:
                    move.arm()

    def _worth_it(self, credit: int) -> bool:
        """Tell whether to claim now, or in a moment, with more credit and more acknowledgements at once."""
        if self.full_hands or not self.channel.qos._tags:
            return True
        if credit >= max(1, self.channel.qos.prefetch_count // 4):
            self.waiting_since = 0.0
            return True
        now = time.monotonic()
        if not self.waiting_since:
            self.waiting_since = now
            self.loop.call_later(BATCH_DELAY_S, _nothing)  # ends the wait of the loop, which calls tick
            self.waker.wake()  # the wait that is about to begin was measured before
            return False
        if now - self.waiting_since < BATCH_DELAY_S:
            return False
        self.waiting_since = 0.0
        return True

    def fetched(self, queue_key: str) -> None:
        """A move has put a message into our hand."""
        self.full_hands.add(queue_key)

    def refused(self) -> None:
        """Redis is full and refuses to block: claim again in a second."""
        self.refused_until = time.monotonic() + 1.0

    def claim(self, credit: int) -> None:
        """Acknowledge, empty the hands, and claim up to `credit`; deliver what was claimed."""
        wanted = min(credit, MOST_A_CLAIM)
        group = len(self.queues)
        fair = self.channel.queue_order_strategy == "round_robin"
        if fair and group > 1:  # another one first each time, or a credit of one would serve one queue only
            self.lists = [
                entry
                for start in range(0, len(self.lists), group)
                for entry in (*self.lists[start + 1 : start + group], self.lists[start])
            ]
        lists = self.lists  # the handler of a signal may set others
        keys = [key for _, key in lists]
        hands = [number for number, key in enumerate(keys, 1) if key in self.full_hands]
        tags, shas = self.hand.take_acks()
        try:
            found = claim(
                self.hand, keys, wanted=wanted, group=group, fair=fair, hands=hands, tags=tags, shas=shas
            )
        except BaseException:
            self.hand.untake_acks(tags)
            self.hand.uncertain = True
            raise
        self.full_hands.clear()
        if wanted:
            self.more = len(found) >= wanted
        for tag, _, times, raw in found:
            self.hand.hold(tag, raw, times)
        known: dict[int, messages.Readable] = {}
        if found and self.channel.diverts(len(found)):
            known = self.divert(found, lists)
            found = [one for one in found if one[0] in self.hand.held]
        for index, (tag, number, times, raw) in enumerate(found):
            queue, queue_key = lists[number - 1]
            try:
                self.channel.deliver(tag, queue, queue_key, raw, times, known.get(tag))
            except ResponseError as exc:  # full: what would need room waits, what does not goes on
                log.warning("a message could not be put where it belongs yet: %s", exc)
                self.hand.give_back(tag, after_s=RETRY_S)
            except BaseException:
                for unseen, *_ in found[index:]:
                    self.hand.give_back(unseen)
                raise

    def divert(
        self, found: list[tuple[int, int, int | None, bytes]], lists: list[tuple[str, str]]
    ) -> dict[int, messages.Readable]:
        """Have the application put elsewhere what Celery is not to see yet; return what was read for that.

        What has come back from a worker goes to Celery: its mark would be lost.
        """
        known: dict[int, messages.Readable] = {}
        fresh: list[Diverted] = []
        for tag, number, times, raw in found:
            queue, queue_key = lists[number - 1]
            try:
                readable = messages.read(raw, queue, accept=self.channel.accept, timezone=self.channel.zone)
            except messages.Unreadable:
                continue  # it is read again, and put aside
            known[tag] = readable
            if times is None and readable.eta is None and "parked_revoked" not in readable.headers:
                fresh.append(Diverted(tag, queue_key, raw, readable))
        try:
            gone = self.channel.divert(self.hand.client, self.hand.held_key, fresh) if fresh else ()
        except (RedisError, OSError) as exc:
            log.warning("messages could not be put elsewhere, Celery has them: %s", exc)
            self.hand.uncertain = True  # the answer may have been lost, and not the question
            gone = ()
        for tag in gone:
            self.hand.held.pop(tag, None)
        return known

    def renew(self) -> None:
        """Renew the lease, find what was lost from sight, and drop connections that are half open."""
        if self.closed or self.hand.closed:
            return
        self.hand.renew()
        self.full_hands |= {key for _, key in self.lists}
        for move in self.moves.values():
            if move.overdue():
                log.warning("no reply to a blocking move for %.0f s: connecting again", BLOCK_S + OVERDUE_S)
                move.close()

    def restore_dead(self) -> None:
        """Put back what dead workers held.

        Not before this one has been connected for a whole lease: after an outage of Redis every lease has
        run out, and the others, alive and busy, need time to connect and renew theirs.
        """
        if not self.closed and time.monotonic() - self.since >= self.hand.lease_s:
            self.hand.renew()  # one that stood still would take itself for dead, and run again what runs here
            self.hand.restore_dead()

    def pause(self, line: Line) -> None:
        """Stop fetching: called by another thread than the event loop's, which may stand still.

        Raises what redis-py raises.
        """
        self.closed = True
        for move in tuple(self.moves.values()):
            if move.client_id is not None:
                line.execute_command("CLIENT", "UNBLOCK", move.client_id)

    def close(self) -> None:
        """Stop fetching. What is held stays held."""
        self.closed = True
        for move in self.moves.values():
            try:
                move.unblock()
            except (RedisError, OSError):
                move.close()
        self.moves.clear()
        self.waker.close()
        self.pool.disconnect()


class Pump:
    """Brings back to their queues what is due; every worker has a pump, and each move is atomic."""

    def __init__(self, channel: Channel, loop: Any) -> None:
        self.loop = loop
        self.line = Line(channel.own_pool())
        self.lot = Lot(self.line, channel.keys)
        self.next_at = 0.0
        self.cancels, self.cancels_until = 0, 0.0
        self.closed = False
        if register_after_fork is not None:
            register_after_fork(self, Pump._after_fork)

    def _after_fork(self) -> None:
        self.line.close()

    def pump(self) -> None:
        """Bring back what is due, unless that was done a moment ago. Raises what redis-py raises."""
        now = time.monotonic()
        if self.closed or now < self.next_at:
            return
        count, next_in, workers, cancels = self.lot.move_due(MOST_A_MOVE)
        if cancels != self.cancels:
            ids, self.cancels_until = self.lot.cancelled(self.cancels_until)
            worker_state.revoked.update(ids)
            self.cancels = cancels
        if count >= MOST_A_MOVE:
            self.loop.call_soon(self.pump)
            return
        # The more workers there are, the less often each looks; the phases of their timers are random.
        self.next_at = now + (PUMP_S * workers / 2 if workers > 2 else 0)
        if next_in is not None and 0 < next_in < PUMP_S:
            self.loop.call_later(next_in + 0.001, self._pump_now)

    def _pump_now(self) -> None:
        self.next_at = 0.0
        self.pump()

    def close(self) -> None:
        self.closed = True
        self.line.close()


def _nothing() -> None:
    """Do nothing, on time."""


def claim(
    hand: Hand,
    keys: list[str],
    *,
    wanted: int,
    group: int,
    fair: bool,
    hands: list[int],
    tags: list[int],
    shas: list[str],
) -> list[tuple[int, int, int | None, bytes]]:
    """Run CLAIM; return (tag, number of the list, times returned, message) for each message claimed.

    The times are None for what has never come back, and 0 for what was begun and came back for no reason of
    its own.
    """
    own = hand.keys
    answer = scripts.CLAIM(
        hand.client,
        (
            own.leases,
            hand.held_key,
            own.returned,
            own.tags,
            own.hands(hand.owner),
            own.gone,
            *keys,
            *(own.hand(hand.owner, key) for key in keys),
        ),
        (
            hand.owner,
            hand.lease_s,
            wanted,
            group,
            int(fair),
            len(hands),
            *(len(tags), *tags),
            *(len(shas), *shas),
            *hands,
        ),
    )
    return [
        (int(answer[i]), int(answer[i + 1]), int(answer[i + 2]) if answer[i + 2] else None, answer[i + 3])
        for i in range(0, len(answer), 4)
    ]


CONNECTION_ERRORS: Final = (
    *(kind for kind in kombu_redis.Transport.connection_errors if kind is not KeyError),
    ResponseError,
)
"""What may be wrong with the connection. kombu counts KeyError too, which a message can bring about: it would
be fetched again, and again."""

_hands: dict[tuple[Any, ...], Hand] = {}
_hands_lock = threading.Lock()


class Channel(kombu_redis.Channel):
    """A channel on Redis that loses nothing and holds nothing that is not due."""

    Message = Message

    fetch = "moved"
    """Which way messages are fetched: "moved" (ours) or "stock" (kombu's)."""

    namespace = "redis_transport"
    accept: tuple[str, ...] = ("application/json",)
    park_waiting: Callable[..., str] | None = None
    """Called with (client, task id, retries, queue list, message, header `parked_wait`) for a published
    message that has this header; it parks the message in one script and returns what that says. Set it as a
    static method."""

    diverts: Callable[[int], bool] = staticmethod(lambda _: False)
    divert: Callable[[Any, str, list[Diverted]], Iterable[int]] = staticmethod(lambda *_: ())
    """Where `diverts(how many)`, `divert` is called with (client, the hash of what is held, what was
    claimed). It may park some of them in one script, which takes them out of that hash, and returns the tags
    of those. Set both as static methods."""

    put_elsewhere: Callable[[bytes, str, str], bool] | None = None
    """Called with a message that no worker can read, its queue list and the reason, before it would go to
    quarantine: it keeps the message and tells whether it did. The message is acknowledged then. Set it as a
    static method."""

    timezone: str | tzinfo = "UTC"
    """That of an eta without one: as `app.timezone` is for Celery. `worker.install` sets it so."""

    from_transport_options = (
        *kombu_redis.Channel.from_transport_options,
        "fetch",
        "namespace",
        "accept",
        "timezone",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._kept_client: Any = None
        self.feeder: Feeder | None = None
        self._no_ack_queues: set[str] = set()
        self.pump: Pump | None = None
        self._hand: Hand | None = None
        super().__init__(*args, **kwargs)
        self.QoS: Any = StockQoS if self.stock else QoS

    @property
    def stock(self) -> bool:
        return bool(self.fetch == "stock")

    @cached_property
    def keys(self) -> Keys:
        return Keys(self.global_keyprefix, self.namespace)

    @cached_property
    def zone(self) -> tzinfo:
        return ZoneInfo(self.timezone) if isinstance(self.timezone, str) else self.timezone

    @cached_property
    def lot(self) -> Lot:
        return Lot(redis.Redis(connection_pool=self.pool), self.keys)

    @property
    def hand(self) -> Hand:
        """The hand of this process in this Redis, whichever channel asks."""
        if self._hand is not None and not self._hand.closed:
            return self._hand
        conninfo = self.connection.client if self.connection else None
        if conninfo is None:  # closed; what it delivered is still held, and acknowledged
            if self._hand is None:
                raise RuntimeError("a closed channel that never consumed holds nothing")
            return self._hand
        params = self._connparams()
        name = (params.get("host"), params.get("port"), params.get("path"), params.get("db"), self.keys)
        with _hands_lock:
            found = _hands.get(name)
            if found is None or found.closed:
                line = Line(self.own_pool())
                found = _hands[name] = Hand(line, self.keys, float(self.visibility_timeout))
        self._hand = found
        return found

    def own_pool(self) -> redis.ConnectionPool:
        """Return a pool for connections that outlive this channel, or block.

        Without retries of redis-py's own: a claim whose answer is lost is looked into, not repeated.
        """
        params = self._connparams()
        params |= {"max_connections": 1000, "retry": Retry(NoBackoff(), 0), "retry_on_timeout": False}
        return redis.ConnectionPool(**params)

    # -- kombu's places

    @property
    def active_queues(self) -> list[str]:
        """The queues that kombu's poller is to serve: all in the stock fetch, else those not acknowledged.

        Such are workers' replies to each other (mingle asks when a worker starts, before its loop runs).
        """
        queues: list[str] = kombu_redis.Channel.active_queues.fget(self)
        return queues if self.stock else [queue for queue in queues if queue in self._no_ack_queues]

    @property
    def fed_queues(self) -> list[str]:
        """The queues that the feeder serves."""
        if self.stock:
            return []
        queues: list[str] = kombu_redis.Channel.active_queues.fget(self)
        return [queue for queue in queues if queue not in self._no_ack_queues]

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        (self._no_ack_queues.add if no_ack else self._no_ack_queues.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _update_queue_cycle(self) -> None:
        super()._update_queue_cycle()
        if self.feeder is not None:
            self.feeder.set_queues(self.fed_queues)

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._kept_client is None or self._kept_client.connection_pool is not self.pool:
            self._kept_client = super()._create_client()
        return self._kept_client

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Bind as kombu does. Where Redis is full, a binding that is there already will do: a worker that
        loses its connection then can connect again, and make room."""
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except OutOfMemoryError:
            if (routing_key or "", pattern or "", queue or "") not in self.get_table(exchange):
                raise

    def _size(self, queue: str) -> int:
        """Return how many messages wait. kombu asks in a transaction, which a full Redis refuses."""
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for step in self.priority_steps:
                pipe.llen(self._q_for_pri(queue, step))
            return sum(pipe.execute())

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> Any:
        """Publish a message, or park it when it is not due yet, or waits for something."""
        if (found := getattr(_gathering, "messages", None)) is not None:
            key = self.keys.queue(queue, self.priority(self._get_message_priority(message, reverse=False)))
            found.append((key, kombu_json.dumps(message).encode()))
            return None
        # A copy: kombu publishes with the same headers again where the connection was lost meanwhile.
        headers = dict(message.get("headers") or {})
        message = {**message, "headers": headers}
        waits = headers.pop("parked_wait", None)
        if waits is not None and self.park_waiting is not None:
            return self._put_waiting(queue, message, waits)
        due = messages.eta_of(message, self.zone)
        if due is None:
            return super()._put(queue, message, **kwargs)
        key = self.keys.queue(queue, self.priority(self._get_message_priority(message, reverse=False)))
        expires = messages.expires_of(message, self.zone)
        readable = messages.Readable(message, None, headers["id"], headers.get("retries") or 0, due, expires)
        due, encoded = messages.to_park(readable)
        answer = self.lot.park(
            headers["id"], due=due, retries=readable.retries, queue_key=key, message=encoded
        )
        if answer == "stale":
            log.warning("an older copy of a parked task was not published task_id=%s", headers["id"])
        elif answer == "cancelled":
            self.lot.send_on_revoked(key, encoded)
        return None

    def _put_waiting(self, queue: str, message: dict[str, Any], waits: Any) -> None:
        """Park a message that waits for more than its time, as the application's hook does it."""
        headers = message["headers"]
        key = self.keys.queue(queue, self.priority(self._get_message_priority(message, reverse=False)))
        readable = messages.Readable(message, None, headers["id"], headers.get("retries") or 0, None, None)
        headers["eta"], headers["waiting"] = None, True
        encoded = messages.compact(readable)
        answer = type(self).park_waiting(
            redis.Redis(connection_pool=self.pool), headers["id"], readable.retries, key, encoded, waits
        )
        if answer == "cancelled":
            self.lot.send_on_revoked(key, encoded)
        elif answer in ("stale", "ended"):
            log.info("an older copy of a waiting task was not parked task_id=%s: %s", headers["id"], answer)

    def feed(self, loop: Any) -> None:
        """Serve this channel's queues from an event loop."""
        if self.pump is None:
            self.pump = Pump(self, loop)
            self.pump.pump()  # so that what was cancelled is known before anything is claimed
        if self.feeder is None and not self.stock:
            self.feeder = Feeder(self, loop)
            self.feeder.set_queues(self.fed_queues)

    def deliver(
        self,
        tag: int,
        queue: str,
        queue_key: str,
        raw: bytes,
        times: int | None,
        readable: messages.Readable | None = None,
    ) -> None:
        """Hand one claimed message to Celery, or put it where it belongs. Raises what redis-py raises.

        `readable`: the message, if it was read already.
        """
        hand = self.hand
        try:
            if readable is None:
                readable = messages.read(raw, queue, accept=self.accept, timezone=self.zone)
            if times is not None and times > MAX_RETURNS:
                self.put_aside(raw, queue_key, f"{times} workers could not end it", tag)
            else:
                self._deliver(readable, tag, queue, queue_key, times)
        except messages.Unreadable as exc:
            self.put_aside(raw, queue_key, str(exc), tag)
        except Reject as exc:
            log.warning("given back, Celery could not begin it: %s", exc)
            hand.give_back(tag, after_s=RETRY_S)
        except (MemoryError, *CONNECTION_ERRORS):
            raise
        except Exception as exc:  # noqa: BLE001 - whatever it is, it must not end the worker: it is said
            if worker_state.should_stop is not None or worker_state.should_terminate is not None:
                hand.give_back(tag)  # the pool has been closed under it
                return
            self.put_aside(raw, queue_key, f"Celery cannot take it: {type(exc).__name__}: {exc}", tag)

    def _deliver(
        self, readable: messages.Readable, tag: int, queue: str, queue_key: str, times: int | None
    ) -> None:
        hand = self.hand
        if (
            times is not None
            and readable.task_id
            and self.lot.is_stale(readable.task_id, readable.retries, hand.held_key, tag)
        ):
            hand.drop(tag)
            log.info("an older copy of a parked task was dropped task_id=%s", readable.task_id)
            return
        if readable.eta is not None and not self.due_now(readable, queue_key, tag):
            return
        self.ready(readable, times)
        readable.envelope["properties"]["delivery_tag"] = tag
        readable.envelope["decoded"] = readable.decoded
        self.connection._deliver(readable.envelope, queue)

    def due_now(self, readable: messages.Readable, queue_key: str, tag: int) -> bool:
        """Park a claimed message that is not due yet; tell whether it is to be delivered now."""
        due, message = messages.to_park(readable)
        answer = self.lot.park(
            readable.task_id or "",
            due=due,
            retries=readable.retries,
            queue_key=queue_key,
            message=message,
            held="" if self.stock else self.hand.held_key,
            tag="" if self.stock else tag,
        )
        if answer == "cancelled" and readable.task_id:
            worker_state.revoked.add(readable.task_id)
        if answer in ("due", "cancelled"):
            return True
        if not self.stock:
            self.hand.drop(tag)
        if answer == "parked":
            parked.send(sender=self, readable=readable, due=due)
        return False

    def ready(self, readable: messages.Readable, times: int | None) -> None:
        """Mark what Celery is to know of a message."""
        if times is not None:
            readable.headers["redelivered"] = True
            readable.envelope["properties"]["delivery_info"]["redelivered"] = True
        if readable.headers.pop("parked_revoked", None) and readable.task_id:
            worker_state.revoked.add(readable.task_id)

    def put_aside(self, raw: bytes, queue_key: str, reason: str, tag: int) -> None:
        """Put a message that no worker can read where the application keeps such, or into quarantine."""
        hand = self.hand
        held = hand.held.get(tag)
        try:
            elsewhere = self.put_elsewhere is not None and self.put_elsewhere(raw, queue_key, reason)
        except (MemoryError, *CONNECTION_ERRORS):
            raise
        except Reject as exc:
            log.warning("given back, it could not be put elsewhere: %s", exc)
            hand.give_back(tag, after_s=RETRY_S)
            return
        except Exception as exc:  # noqa: BLE001 - whatever it is about this message, it has to go somewhere
            log.error("not put elsewhere queue=%s: %s", queue_key, type(exc).__name__)
            elsewhere = False
        if elsewhere:
            hand.ack(tag)
        else:
            self.lot.quarantine(
                raw,
                queue_key=queue_key,
                reason=reason,
                held=hand.held_key,
                tag=tag,
                sha=(held.sha if held else None) or "",
            )
            hand.held.pop(tag, None)
        log.error("quarantined, no worker can read it queue=%s: %s", queue_key, reason)
        quarantined.send(sender=self, reason=reason, queue_key=queue_key)

    def close(self) -> None:
        if self.feeder is not None:
            self.feeder.close()
        if self.pump is not None:
            self.pump.close()
        if self.connection is not None and self._consumers and not self.stock:
            self.hand  # noqa: B018 - kept for acknowledgements that come after the connection's end
        super().close()


class Cycle(kombu_redis.MultiChannelPoller):
    """kombu's poller for fanout; in each turn of the loop the feeders of the channels work too."""

    loop: Any = None

    def on_poll_start(self) -> None:
        super().on_poll_start()
        for channel in tuple(self._channels):
            served = channel.active_queues if channel.stock else channel.fed_queues
            if served and channel.pump is None and self.loop is not None:
                channel.feed(self.loop)
            if channel.feeder is not None:
                channel.feeder.tick()

    def each_feeder(self, call: Callable[[Feeder], None]) -> None:
        for channel in tuple(self._channels):
            if channel.feeder is not None:
                call(channel.feeder)

    def pump(self) -> None:
        for channel in tuple(self._channels):
            if channel.pump is not None:
                channel.pump.pump()

    def get(self, callback: Any, timeout: float | None = None) -> Any:
        if any(channel.fed_queues for channel in self._channels):
            raise RuntimeError(
                "this transport needs an event loop: use the prefork, threads or solo pool (gevent and "
                "eventlet have none)"
            )
        return super().get(callback, timeout)


class Transport(kombu_redis.Transport):
    """The transport of redis:// and rediss:// in a worker; see the package's docstring."""

    Channel = Channel
    connection_errors = (*kombu_redis.Transport.connection_errors, ResponseError)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Cycle()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)
        cycle = self.cycle
        cycle.loop = loop
        options = connection.client.transport_options
        lease_s = float(options.get("visibility_timeout", Channel.visibility_timeout))
        # Celery cancels the timers of a lost connection.
        loop.call_repeatedly(PUMP_S, cycle.pump)
        loop.call_repeatedly(lease_s / 3, cycle.each_feeder, Feeder.renew)
        loop.call_repeatedly(max(1.0, lease_s / 6), cycle.each_feeder, Feeder.restore_dead)

    def _deliver(self, message: dict[str, Any], queue: str) -> None:
        """In the stock fetch, park what is not due yet; a message that came our way was looked at already."""
        if "decoded" not in message:
            for channel in self.channels:
                if channel.stock and queue in channel.active_queues:
                    due = messages.eta_of(message, channel.zone)
                    if due is not None:
                        key = channel.keys.queue(
                            queue, channel.priority(channel._get_message_priority(message))
                        )
                        readable = messages.Readable(
                            message,
                            None,
                            message["headers"]["id"],
                            message["headers"].get("retries") or 0,
                            due,
                            messages.expires_of(message, channel.zone),
                        )
                        if not channel.due_now(readable, key, 0):
                            return
                    break
        super()._deliver(message, queue)
