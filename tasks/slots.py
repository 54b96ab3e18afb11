"""How a worker asks an Airflow: with a slot of its connection, and never without.

`Turn` is for a task: at its first question it takes a slot, keeps it for the whole conversation, and gives it
back with what came of it. Where there is none the task parks in the connection's line and is called from
there; a thread waits for nothing. `thread_turn` is for the few who are no parked tasks (looks, lookups): they
wait for a moment, before all tasks.

What the limit is, when the breaker opens, who is next: `producers/stores/lines.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any, Final, NoReturn, TypeVar

from celery import bootsteps
from celery.exceptions import Ignore
from celery.utils.log import get_logger
from redis.exceptions import RedisError

from producers.contract import GIVE_UP_AFTER_S, QUEUE_TRIGGERS, TRIGGER_DAG, reference_in
from producers.errors import AirflowUnavailable, CredentialsRefused
from producers.stores.lines import DEFAULT_PRIORITY, Lines, Taken, Verdict, ahead_s, granted_key, line_key
from producers.stores.parking import SLOT_S

from .again import newer, redelivered, redis_now
from .airflow.asking import asking, verdict_of
from .airflow.client import AirflowClient
from .airflow.clients import airflow_client
from .airflow.connections import AirflowConnection
from .app import app, said, store_client
from .http import HttpResponse, NoAnswer, reset_after_fork
from .redis_transport import Channel
from .redis_transport.channel import Diverted
from .redis_transport.messages import Readable
from .settings import settings
from .waiting import show, wait

log = get_logger("dagrelay.slots")

TICK_S: Final = 0.5
"""How often a worker sees to the lines: what a killed one held is free by then, an outage may be over."""

JOIN_S: Final = 5.0
"""How long a thread waits for its turn."""

HELD_S: Final = 30.0
"""How often a request that is held looks at its time, where that is nearly over."""

SCARCE_S: Final = 0.25
"""How long slots are taken to be scarce after one was looked for in vain."""

EXCHANGE_S: Final = 0.03
"""How often one who sends many side by side gives slots back and takes others."""

OFF: Final = "off"
"""The token where slots are off: see `WorkerSettings.slots`."""

BUSY_S: Final = 0.25
"""When a request comes back for which its worker had no thread: others have had their turn, or another worker
takes it."""


T = TypeVar("T")


def lines() -> Lines:
    """Return the ways to the Airflows, in the worker's Redis."""
    return Lines(store_client())


class NoTurn(Exception):
    """There is no slot, and no time left to wait for one. `why`: slot, open, maintenance, credentials."""

    def __init__(self, why: str, unsure: bool = False) -> None:
        super().__init__(why, unsure)
        self.why, self.unsure = why, unsure

    def __str__(self) -> str:
        return _REASONS.get(self.why, self.why)


_REASONS: Final = {
    "slot": "Airflow has as many requests in flight as it may have",
    "open": "Airflow does not answer",
    "maintenance": "the connection is held",
    "credentials": "the connection is held until its credentials are mended",
}

_WAITS_FOR: Final = {
    "slot": "its turn at Airflow {}",
    "open": "Airflow {} to answer again",
    "maintenance": "Airflow {}, which is held: dagrelay release {}",
    "credentials": "Airflow {}, which is held until its credentials are mended",
}


class Busy(Exception):
    """All threads that one connection may have in this worker are taken."""

    def __str__(self) -> str:
        return "this worker has no thread for it"


_threads: dict[str, int] = {}
_threads_lock = threading.Lock()


class _Held:
    """The slots of this process, kept alive by a thread; and its own, per connection."""

    def __init__(self) -> None:
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        self._name = f"{os.getpid():x}{os.urandom(5).hex()}"
        self._numbers = itertools.count(1)
        self._tokens: dict[str, set[str]] = {}
        self._lock = threading.Lock()
        self._some = threading.Event()
        self._thread: threading.Thread | None = None
        _threads.clear()

    def new_token(self) -> str:
        return f"{self._name}-{next(self._numbers)}"

    def add(self, connection: str, tokens: list[str]) -> None:
        with self._lock:
            self._tokens.setdefault(connection, set()).update(tokens)
            if self._thread is None:
                thread = threading.Thread(target=self._renew, name="dagrelay-slots", daemon=True)
                thread.start()
                self._thread = thread
        self._some.set()

    def discard(self, connection: str, tokens: list[str]) -> None:
        with self._lock:
            self._tokens.get(connection, set()).difference_update(tokens)

    def _renew(self) -> None:
        while True:
            self._some.wait()
            time.sleep(SLOT_S / 3)
            with self._lock:
                found = {name: list(tokens) for name, tokens in self._tokens.items() if tokens}
                if not found:
                    self._some.clear()
            for connection, tokens in found.items():
                try:
                    lines().renew(connection, tokens)
                except (RedisError, OSError) as exc:
                    log.warning("slots not renewed yet connection=%s: %s", connection, said(exc))


held_slots = _Held()


def _enter(connection: str, whatever: bool = False) -> bool:
    """Have a thread of this process be for a connection; tell whether there was one left for it."""
    with _threads_lock:
        count = _threads.get(connection, 0)
        if count >= most_here() and not whatever:
            return False
        _threads[connection] = count + 1
        return True


def _leave(connection: str) -> None:
    with _threads_lock:
        _threads[connection] -= 1


class Turn:
    """One conversation with an Airflow: `with Turn(…) as airflow`, whose first use takes a slot.

    `until`, if set, is when the waiting in line is over, by Redis' clock; otherwise it is so when the request
    is older than `give_up_after_s`. Then using the client raises NoTurn. While there is time, it raises what
    parks the task.
    """

    def __init__(
        self,
        task: Any,
        connection: AirflowConnection,
        *,
        give_up_after_s: float,
        priority: int,
        until: float | None = None,
    ) -> None:
        self.connection, self.until, self.give_up_after_s = connection, until, give_up_after_s
        self.on = connection
        """The way that is gone: the connection, or what stands in for it."""
        self._task, self._priority = task, priority
        self._token = ""
        self._verdict: Verdict = "unused"
        self._took_s = 0.0

    def __enter__(self) -> AirflowClient:
        return _Client(self)  # type: ignore[return-value]

    def __exit__(self, kind: Any, exc: BaseException | None, traceback: Any) -> None:
        self.end(exc)

    def begin(self) -> None:
        """Take a slot, unless there is one already. Raises what parks the task, NoTurn, and redis-py's."""
        if self._token:
            return
        if not settings().slots:
            self._token = OFF
            return
        name = self.connection.id
        if not _enter(name):
            _full_until[name] = _scarce_until[name] = time.monotonic() + SCARCE_S
            raise Busy
        try:
            taken, token = _take(self.connection, self._task.request.id)
            self.on = self.connection
            if not taken.slots and not (taken.why == "open" and (token := self._take_instead())):
                _scarce_until[name] = time.monotonic() + SCARCE_S
                self._wait(taken)
        except BaseException:
            _leave(name)
            raise
        self._token, asking.asker = token, self

    def _take_instead(self) -> str:
        """Take a slot of what stands in for the connection; return its token, "" where there is none."""
        instead = self.connection.failover
        if instead is None:
            return ""
        taken, token = _take(instead, self._task.request.id)
        if not taken.slots:
            return ""
        self.on = instead
        return token

    def fail_over(self, exc: AirflowUnavailable) -> bool:
        """Go on by what stands in for the connection, after a request that has certainly not reached it.

        Tell whether it is so. Where a request may have, or was refused by somebody, the breaker decides: it
        may be that Airflow has too much to do.
        """
        if exc.unsure or self._verdict != "broken" or self.on is not self.connection or self._token == OFF:
            return False
        mine, verdict, took_s = self._token, self._verdict, self._took_s
        token = self._take_instead()
        if not token:
            return False
        log.info("airflow not reached, asked by its CLI connection=%s: %s", self.connection.id, exc.reason)
        self._token, self._verdict, self._took_s = token, "unused", 0.0
        give(self.connection, mine, verdict, took_s)
        return True

    def not_coming(self) -> None:
        """Give up the place that is kept for a task that was called: it has no thread."""
        lines().not_coming(self.connection.id, self._task.request.id)

    def saw(self, verdict: Verdict, took_s: float) -> None:
        """Note what came of one request: what is wrong counts more than what is well."""
        self._took_s = max(self._took_s, took_s)
        if self._verdict in ("unused", "ok"):
            self._verdict = verdict

    def end(self, exc: BaseException | None = None) -> None:
        """Give the slot back, if there is one."""
        if not self._token:
            return
        token, self._token, asking.asker = self._token, "", None
        if token == OFF:
            return
        _leave(self.connection.id)
        verdict, words = self._verdict, ""
        if isinstance(exc, CredentialsRefused):
            verdict, words = "refused", exc.words
        elif isinstance(exc, AirflowUnavailable) and verdict == "ok":
            verdict = "broken"  # an answer, and none of Airflow's
        self._verdict = "unused"
        give(self.on, token, verdict, self._took_s, words)

    def parked(self, why: str, exc: BaseException) -> Ignore:
        """End the conversation, park the task for what it has met there, and return what to raise."""
        self.end(exc)
        now = redis_now()
        until = now + self.give_up_after_s if self.until is None else max(self.until, now + 1)
        return self._park(why, until)

    def _wait(self, taken: Taken) -> NoReturn:
        until = self.until
        if until is None:
            until = taken.now + self.give_up_after_s - taken.age_s
        if until <= taken.now:
            raise NoTurn(taken.why, taken.unsure)
        if taken.why in ("maintenance", "credentials"):  # that time does not count
            until = max(until, taken.now + HELD_S)
        raise self._park(taken.why, until)

    def _park(self, why: str, until: float) -> Ignore:
        return park_in_line(self._task, self.connection, why, until, ahead_s(self._priority))


class _Client:
    """An Airflow client whose first use takes the slot."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.connection = turn.connection

    def __getattr__(self, name: str) -> Any:
        self._turn.begin()
        found = getattr(airflow_client(self._turn.on), name)
        return found if self.connection.failover is None else partial(self._either_way, name)

    def _either_way(self, name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(airflow_client(self._turn.on), name)(*args, **kwargs)
        except AirflowUnavailable as exc:
            if not self._turn.fail_over(exc):
                raise
        return getattr(airflow_client(self._turn.on), name)(*args, **kwargs)


@contextmanager
def thread_turn(connection: AirflowConnection, timeout_s: float = JOIN_S) -> Iterator[AirflowClient]:
    """Hold a slot for a conversation, after waiting for it in this thread if need be.

    Raises NoTurn where there is none in time, and at once where nothing may be sent.
    """
    try:
        token = _take_waiting(connection, timeout_s)
    except NoTurn as exc:
        if exc.why != "open" or connection.failover is None:
            raise
        connection = connection.failover
        token = _take_waiting(connection, timeout_s)
    turn = Turn(None, connection, give_up_after_s=0, priority=0)
    turn._token, asking.asker = token, turn
    _enter(connection.id, whatever=True)
    failure: BaseException | None = None
    try:
        yield airflow_client(connection)
    except BaseException as exc:
        failure = exc
        raise
    finally:
        turn.end(failure)


def _take_waiting(connection: AirflowConnection, timeout_s: float) -> str:
    taken, token = _take(connection)
    if taken.slots:
        return token
    if taken.why != "slot":
        raise NoTurn(taken.why)
    store, name = lines(), f"{held_slots.new_token()}.1"
    store.join(connection.id, name)
    until = time.monotonic() + timeout_s
    try:
        while (left_s := until - time.monotonic()) > 0:
            if store_client().blpop([granted_key(name)], timeout=min(left_s, 1.0)):
                held_slots.add(connection.id, [name])
                return name
    except BaseException:
        store.leave(connection.id, name)
        raise
    store.leave(connection.id, name)
    raise NoTurn("slot")


def _take(connection: AirflowConnection, task_id: str = "") -> tuple[Taken, str]:
    token = held_slots.new_token()
    taken = lines().take(connection.id, token, ceiling=connection.ceiling, task_id=task_id)
    token += ".1"
    if taken.slots:
        held_slots.add(connection.id, [token])
    return taken, token


def give(connection: AirflowConnection, token: str, verdict: Verdict, took_s: float, words: str = "") -> None:
    """Give a slot back. Where Redis does not take it, the slot runs out by itself."""
    held_slots.discard(connection.id, [token])
    try:
        given = lines().give(
            connection.id,
            [(token, verdict, took_s)],
            fingerprint=connection.fingerprint(),
            words=words,
            late_s=connection.timed_out_slot_s,
        )
    except (RedisError, OSError) as exc:
        log.warning("slot not given back, it runs out connection=%s: %s", connection.id, said(exc))
        return
    tell_of(connection, given.changed, words)


def tell_of(connection: AirflowConnection, changed: str, words: str = "") -> None:
    """Log that a connection's breaker, or a hold for its credentials, has changed."""
    if changed == "open":
        log.error("airflow does not answer, its requests wait connection=%s", connection.id)
    elif changed == "closed":
        log.warning("airflow answers again connection=%s", connection.id)
    elif changed == "credentials":
        log.error("connection held, its credentials are refused connection=%s: %s", connection.id, words)


class ManyTurns:
    """Slots for the requests of one task that sends many side by side.

    How many it has changes on the way: it takes what is free, and gives some back where others wait that go
    first, all but one. `with` it, after `take`.
    """

    def __init__(self, task: Any, connection: AirflowConnection, ahead_s: float) -> None:
        self._task, self._connection, self._ahead_s = task, connection, ahead_s
        self._tokens: list[str] = []
        self._done: list[tuple[str, Verdict, float]] = []
        self._taken = Taken(0, "", 0.0, False, 0.0)
        self._rank = 0.0
        self._over = False
        self._to_stop = 0
        self._at_most_s = 0.0

    def take(self, want: int) -> Taken:
        """Take up to so many slots, at most half of those that there may be; return what came of it."""
        token = held_slots.new_token()
        most = max(1, (self._connection.ceiling + 1) // 2)
        self._taken = taken = lines().take(
            self._connection.id,
            token,
            ceiling=self._connection.ceiling,
            task_id=self._task.request.id,
            want=min(want, most),
        )
        self._rank = taken.now - taken.age_s - self._ahead_s
        self._tokens = [f"{token}.{number}" for number in range(1, taken.slots + 1)]
        held_slots.add(self._connection.id, self._tokens)
        return taken

    def wait_at_most(self, seconds: float) -> None:
        """Have the task come back from the line after this long, whether it was its turn or not."""
        self._at_most_s = seconds

    def parked(self) -> Ignore:
        """Park the task in the line, and return the exception to raise."""
        until = redis_now() + max(1.0, self._at_most_s - self._taken.age_s)
        return park_in_line(self._task, self._connection, self._taken.why, until, self._ahead_s)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, exc: BaseException | None, traceback: Any) -> None:
        """Give back what is left: all of it where nothing was sent."""
        self._done += [(token, "unused", 0.0) for token in self._tokens]
        self._tokens = []
        self._exchange(0)

    async def each(
        self, jobs: Sequence[T], do: Callable[[T], Awaitable[HttpResponse | NoAnswer]], until: float
    ) -> None:
        """Do all of them, so many side by side as there are slots; awaited in the loop.

        Where nothing may be sent any more, or after `until` by the monotonic clock, the rest is left undone.
        """
        left = deque(jobs)

        async def work(token: str) -> None:
            while left and not self._over and time.monotonic() < until:
                if self._to_stop:
                    self._to_stop -= 1
                    break
                job = left.popleft()
                began = time.monotonic()
                verdict = verdict_of(await do(job))
                # Before the list is looked up: another thread takes it and puts a new one in its place.
                took_s = time.monotonic() - began
                if verdict == "timeout":  # the slot is the server's for some time
                    self._done.append((token, verdict, took_s))
                    return
                self._done.append(("", verdict, took_s))
            self._done.append((token, "unused", 0.0))

        at_work = {asyncio.ensure_future(work(token)) for token in self._tokens}
        self._tokens = []
        while at_work:
            _, at_work = await asyncio.wait(at_work, timeout=EXCHANGE_S)
            if self._done:
                want = 0 if self._over or time.monotonic() >= until else min(len(left), len(jobs))
                tokens = await asyncio.to_thread(self._exchange, want, len(at_work))
                at_work |= {asyncio.ensure_future(work(token)) for token in tokens}

    def _exchange(self, want: int, at_work: int = 0) -> list[str]:
        """Say what came of requests so far; take up to `want` more slots, and return their tokens."""
        done, self._done = self._done, []
        if not done:
            return []
        connection, token = self._connection, held_slots.new_token()
        most = max(1, (connection.ceiling + 1) // 2)
        held_slots.discard(connection.id, [one for one, _, _ in done if one])
        try:
            given = lines().give(
                connection.id,
                done,
                fingerprint=connection.fingerprint(),
                want=max(0, min(want, most - at_work)),
                rank=self._rank,
                token=token,
                late_s=connection.timed_out_slot_s,
            )
        except (RedisError, OSError) as exc:
            log.warning("slots not given back, they run out connection=%s: %s", connection.id, said(exc))
            self._over = True
            return []
        tell_of(connection, given.changed)
        self._over = given.over
        self._to_stop = max(0, min(given.better, at_work + given.slots - 1))
        tokens = [f"{token}.{number}" for number in range(1, given.slots + 1)]
        held_slots.add(connection.id, tokens)
        return tokens


def park_in_line(
    task: Any, connection: AirflowConnection, why: str, until: float, forward_s: float
) -> Ignore:
    """Park a task in a connection's line until its turn, or until `until`; return the exception to raise."""
    parked = wait(
        task,
        until=until,
        what=_WAITS_FOR[why].format(connection.id, connection.id),
        # Its mark is lost with this message.
        found={"unsure": "1"} if redelivered(task) else None,
        line=line_key(connection.id),
        ahead_s=forward_s,
    )
    show(task, "in line")
    return parked


def most_here() -> int:
    """Return how many of this process's threads one Airflow may have: half, where there are others."""
    one = len(settings().connections) <= 1
    return 10**6 if one else max(1, settings().concurrency // 2)


# -- what is put into the line as soon as it is claimed

_scarce_until: dict[str, float] = {}
_full_until: dict[str, float] = {}
"""Until when a connection is taken to have all the threads of this process that it may have."""


def scarce(claimed: int) -> bool:
    """Tell whether slots may be scarce for so many messages that were claimed at once."""
    if claimed > _fewest_slots() and settings().slots:
        return True
    if not _scarce_until:
        return False
    now = time.monotonic()
    return any(until > now for until in _scarce_until.values())


@cache
def _fewest_slots() -> int:
    return min((one.ceiling for one in settings().connections.values()), default=1)


def divert(client: Any, held_key: str, claimed: list[Diverted]) -> list[int]:
    """Put requests that were just claimed into their connections' lines, where there are no slots for them.

    Without that each of a backlog would be a task twice: once to find that there is none, and once more. What
    is not a plain new request has Celery begin it. Raises what redis-py raises.
    """
    from . import drain

    now = time.monotonic()
    found: dict[str, list[tuple[int, str, int, str, bytes, float, float, float | None, bool]]] = {}
    plain = [(one, facts) for one in claimed if (facts := _plain(one.readable)) is not None]
    several = Counter(connection for _, (connection, *_) in plain)
    for one, (connection, priority, give_up_after_s) in plain:
        known = settings().connections.get(connection)
        too_many = known is not None and several[connection] > known.ceiling
        if too_many or _scarce_until.get(connection, 0.0) > now:
            readable = one.readable
            found.setdefault(connection, []).append(
                (
                    one.tag,
                    readable.task_id or "",
                    readable.retries,
                    one.queue_key,
                    one.raw,
                    ahead_s(priority),
                    give_up_after_s,
                    readable.expires,
                    drain.is_plain(readable),
                )
            )
    gone: list[int] = []
    for name, items in found.items():
        what = _WAITS_FOR["slot"].format(name, name)
        full = _full_until.get(name, 0.0) > now
        parked = lines().divert(client, held_key, name, what, items, all_of_them=full)
        if parked:
            _scarce_until[name] = time.monotonic() + SCARCE_S
            drain.begin(name)
        gone += parked
    return gone


def _plain(readable: Readable) -> tuple[str, int, float] | None:
    """Return the connection, priority and patience of a message that is a plain new request, else None."""
    if readable.headers.get("task") != TRIGGER_DAG or readable.retries or not readable.task_id:
        return None
    kwargs = readable.decoded[1]
    connection, priority = kwargs.get("connection", "default"), kwargs.get("priority", DEFAULT_PRIORITY)
    give_up_after_s = kwargs.get("give_up_after_s", GIVE_UP_AFTER_S)
    if (
        "so_far" in kwargs
        or newer(kwargs)
        # What came past our door holds its stored conf, or ends as that is gone, only once it was begun.
        or ("asked" not in kwargs and any(map(reference_in, (kwargs.get("conf"), *readable.decoded[0]))))
        or not isinstance(connection, str)
        or connection not in settings().connections
        or type(priority) is not int
        or not 0 <= priority <= 9
        or type(give_up_after_s) not in (int, float)
        or not 0 < give_up_after_s < 1e9
        # What has to pass a gate waits there first.
        or kwargs.get("if_paused", "trigger") != "trigger"
        or kwargs.get("window") is not None
        or settings().connections[connection].window is not None
    ):
        return None
    return connection, priority, float(give_up_after_s)


# -- what sees to the lines


class LinesStep(bootsteps.StartStopStep):
    """Has lines go on that nobody else moves, and probes Airflows that did not answer."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    label = "Lines"

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._entry: Any = None

    def start(self, consumer: Any) -> None:
        serves = QUEUE_TRIGGERS in {queue.name for queue in consumer.task_consumer.queues}
        if consumer.hub is not None and serves and settings().connections:
            with suppress(RedisError, OSError):  # said by the first request
                for one in settings().connections.values():
                    lines().announce(one.id, one.ceiling)
                    if one.failover is not None:
                        lines().announce(one.failover.id, one.failover.ceiling)
            self._entry = consumer.hub.call_repeatedly(TICK_S, tick)

    def stop(self, consumer: Any) -> None:
        if self._entry is not None:
            self._entry.cancel()
            self._entry = None


_probing: set[str] = set()


def tick() -> None:
    """Call what there is room for, begin to drain, and begin the probes that are due. Raises nothing."""
    from . import drain

    own = settings().connections
    known = {way.id: way for one in own.values() for way in (one, one.failover) if way is not None}
    try:
        for one in own.values():
            if one.failover is not None:
                lines().stand_in(one.id, one.failover.id, 2 * one.failover.ceiling)
        due, idle = lines().tick(
            [(one.id, one.fingerprint()) for one in known.values()],
            probe_s=max((one.connect_timeout_s + one.read_timeout_s for one in known.values()), default=1.0),
        )
    except Exception as exc:  # noqa: BLE001 - Redis is away: seen to again in a moment
        log.debug("lines not seen to: %s", said(exc))
        return
    for name in idle:
        if name in own:
            drain.begin(name)
    for name in due:
        if name not in _probing:
            _probing.add(name)
            thread = threading.Thread(target=_probe, args=(known[name],), name=f"probe-{name}", daemon=True)
            thread.start()


def _probe(connection: AirflowConnection) -> None:
    """Ask an Airflow one cheap question, and say what came of it."""
    words = ""
    try:
        airflow_client(connection).ask_whether_accepted()
        verdict: Any = "ok"
    except CredentialsRefused as exc:
        verdict, words = "refused", exc.words
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is no answer
        verdict = "failed"
        log.info("airflow still does not answer connection=%s: %s", connection.id, said(exc))
    try:
        breaker = lines().probed(
            connection.id,
            verdict,
            fingerprint=connection.fingerprint(),
            words=words,
            again_s=settings().hold_probe_s,
        )
        if verdict == "ok":
            log.warning("airflow answers connection=%s breaker=%s", connection.id, breaker)
    except (RedisError, OSError) as exc:
        log.warning("probe not written connection=%s: %s", connection.id, said(exc))
    finally:
        _probing.discard(connection.id)


app.steps["consumer"].add(LinesStep)
Channel.diverts = staticmethod(scarce)
Channel.divert = staticmethod(divert)
