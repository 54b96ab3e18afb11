"""Looks at the jobs of one outside service: many at once over the process's loop, each by its own message."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, cast

from celery.utils.log import get_logger

from producers.errors import DagrelayError
from producers.stores.answers import Observed
from producers.stores.waits import Claimed, Seen

from . import metrics
from .app import said
from .http import NoAnswer, reset_after_fork
from .http_many import ManySender, in_loop
from .job_answers import End, Look, given_up, look_of, no_answer, read_look
from .looks import SLACK_S, Done
from .services import Service

log = get_logger("dagrelay.looks")

FACTS: Final = ("job_id", "reference", "waiting_since", "seen", "progress", "errors")
"""What a look needs of the record."""

TOGETHER_S: Final = 0.01
"""Answers that come within this time are handed over as one."""

DEEPEST: Final = 8
"""How many looks may be claimed for each that may be in flight, where the service answers quickly: a claim of
many costs little more than one of few."""

QUEUED_S: Final = 2.0
"""How long a look may lie here until its turn comes, by the service's latest answers."""

MAX_ANSWER_BYTES: Final = 4_000_000
"""The largest answer to a look. A result may have 1 MB; up to a thousand looks are in flight in a process."""


class JobFollower:
    """The jobs of one service: as many at once as its `max_in_flight` says."""

    facts: tuple[str, ...] = FACTS
    whole = True

    def __init__(self, service: Service) -> None:
        self.service = service
        self.group = f"service:{service.id}"
        # Longer than a look can take: a look that is still going on is never claimed by another.
        self.lease_s = service.connect_timeout_s + service.read_timeout_s + SLACK_S
        self._sender = ManySender(
            service.base_url,
            connect_timeout_s=service.connect_timeout_s,
            read_timeout_s=service.read_timeout_s,
            verify=service.trusts,
            in_flight=service.max_in_flight,
            max_answer_bytes=MAX_ANSWER_BYTES,
        )
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        self._open = 0
        self._counting = threading.Lock()  # begun in Celery's threads, ended in the loop's
        self._queue: deque[tuple[Claimed, float, float, Done]] = deque()
        self._lines: set[asyncio.Task[None]] = set()
        self._took_s = QUEUED_S  # until it is known
        self._handing_over = False
        self._seen: list[tuple[Done, Seen]] = []

    def room(self) -> int:
        """Return how many looks may be claimed: so many that each has its turn within its lease."""
        deep = max(1, min(DEEPEST, int(QUEUED_S / max(self._took_s, 0.001))))
        return max(0, self.service.max_in_flight * deep - self._open)

    def start(self, claimed: Sequence[Claimed], now: float, done: Done) -> None:
        """Ask about all of them, as many at once as may be."""
        with self._counting:
            self._open += len(claimed)
        in_loop(self._begin(claimed, now, done))

    async def _begin(self, claimed: Sequence[Claimed], now: float, done: Done) -> None:
        turn_until = time.monotonic() + SLACK_S / 2
        self._queue.extend((one, now, turn_until, done) for one in claimed)
        for _ in range(min(len(claimed), self.service.max_in_flight - len(self._lines))):
            line = asyncio.create_task(self._line())
            self._lines.add(line)  # the loop itself holds tasks weakly only

    async def _line(self) -> None:
        try:
            await self._work()
        finally:
            # At once: a callback comes a turn later, and what begins in between would count on this line.
            self._lines.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    async def _work(self) -> None:
        """Look at one after the other, as long as there are any."""
        while self._queue:
            claimed, now, turn_until, done = self._queue.popleft()
            began = time.monotonic()
            if began > turn_until:  # it may not be over within its lease: the next claim has it again
                self._took_s = QUEUED_S
                self._hand(done, Seen(claimed.task_id, claimed.epoch, "again", 0.0))
                continue
            try:
                seen = await self._look(claimed, now)
            except Exception as exc:  # noqa: BLE001 - whatever it is, the other looks go on
                # Its words may hold a URL, and that a credential: the class and the place are enough.
                log.error("a look failed task_id=%s: %s at %s", claimed.task_id, said(exc), place_of(exc))
                seen = Seen(claimed.task_id, claimed.epoch, "again", self.lease_s)
            self._took_s += (time.monotonic() - began - self._took_s) / 8
            self._hand(done, seen)

    def _hand(self, done: Done, seen: Seen) -> None:
        """Hand over what a look saw, with those that end about now."""
        with self._counting:
            self._open -= 1
        self._seen.append((done, seen))
        if not self._handing_over:
            self._handing_over = True
            asyncio.get_running_loop().call_later(TOGETHER_S, self._hand_over)

    def _hand_over(self) -> None:
        self._handing_over = False
        seen, self._seen = self._seen, []
        by_batch: dict[int, tuple[Done, list[Seen]]] = {}
        for done, one in seen:
            by_batch.setdefault(id(done), (done, []))[1].append(one)
        for done, several in by_batch.values():
            done(several)

    async def _look(self, claimed: Claimed, now: float) -> Seen:
        job_id, reference, since, seen, progress, errors = claimed.facts
        message = message_of(claimed)
        try:
            look = look_of(
                message, self.service, claimed.task_id, job_id=job_id, reference=reference, seen=seen
            )
        except DagrelayError as exc:
            end = Observed("unreadable", words=said(exc), field="job_id")
            return ended(claimed, end)
        try:
            answer = await metrics.look_at_service(self.service.id, self._sender.send, look.request)
            observed = read_look(look, answer)
        except NoAnswer as exc:
            observed = no_answer(exc.reason)
        waited_s = now - float(since) if since else 0.0
        return told(claimed, look, observed, waited_s, seen or "", progress or "", int(errors or 0))


def told(
    claimed: Claimed,
    look: Look,
    observed: Observed,
    waited_s: float,
    seen: str,
    progress: str,
    errors: int,
) -> Seen:
    """Return what a look saw as the store takes it; `seen`, `progress` and `errors` are what was known."""
    rules = look.rules
    if observed.ends:
        return ended(claimed, observed)
    pause_s = rules.pause_s(waited_s, observed.retry_after_s)
    if observed.is_error:
        if not observed.counts:
            return Seen(claimed.task_id, claimed.epoch, "again", pause_s)
        errors += 1
        if errors > rules.max_errors:
            return ended(claimed, given_up(observed, errors))
        # Twice as long with each error, so that a service that is down is left alone.
        pause_s = max(pause_s, min(rules.max_interval_s, rules.interval_s * 2 ** min(errors, 20)))
        return Seen(claimed.task_id, claimed.epoch, "error", pause_s, str(errors), observed.words)
    if observed.state != seen or observed.progress != progress or errors:
        return Seen(
            claimed.task_id,
            claimed.epoch,
            "changed",
            pause_s,
            observed.state,
            observed.progress,
            shown=observed.state != seen,
        )
    return Seen(claimed.task_id, claimed.epoch, "again", pause_s)


def place_of(exc: BaseException) -> str:
    """Return where an exception was raised: file and line."""
    frames = traceback.extract_tb(exc.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"


def ended(claimed: Claimed, observed: Observed) -> Seen:
    """Return that a job has ended: the task that waits is sent on, with how."""
    words = f"the job is {observed.state}" if observed.state else f"the job ended: {observed.kind}"
    observation = json.dumps(End.of(observed).to_json())
    return Seen(claimed.task_id, claimed.epoch, "wake", 0.0, observation, words)


def message_of(claimed: Claimed) -> dict[str, Any]:
    """Return the keyword arguments of a parked message."""
    envelope = json.loads(claimed.message)
    kwargs: dict[str, Any] = json.loads(envelope["body"])[1]
    return kwargs
