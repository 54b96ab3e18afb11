"""The task send_webhook: a hook is told how a request ended.

Its message is put into the queue `jobs` by the script of the end itself (`producers/stores/notices.py`), so
nobody who asked to be told is forgotten. It says which request and which hook, and no more: how the request
stands is read when it is told, and where the hook is, and its secret, only workers know.

A delivery that fails waits in Redis and is tried again for about a day; then it is a dead letter, whose
replay sends it again. The id of a delivery stays the same through all of that: receivers drop what they
have had. Its timestamp, and so its signature, is made anew each time.
"""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

from celery.utils.log import get_logger

from producers.contract import SEND_WEBHOOK
from producers.errors import DagrelayError, HookNotConfigured, WebhookNotDelivered
from producers.stores.dead import Dead
from producers.stores.envelope import end_messages
from producers.stores.records import Record
from producers.stores.signing import sign_github, sign_standard

from . import metrics
from .again import keep_record, leave_newer, redis_now
from .app import RelayTask, app, records, store_client
from .hooks import PLACES, Hook, hook_sender
from .http import HttpRequest, HttpResponse, NoAnswer, retry_after_s
from .results import keeping, warn_of_dropped
from .settings import settings

log = get_logger("dagrelay.webhook")

ENDED: Final = "dagrelay.request.ended"
CORRECTED: Final = "dagrelay.request.corrected"

MAX_RETRY_AFTER_S: Final = 6 * 3600.0
"""What a receiver may ask for between two attempts: a day each time would outlive the record."""

MOST_TOLD: Final = 1000
"""Of one text of an event, in characters: the whole stays below 20 KB, as receivers expect."""

MAX_RUN_BYTES: Final = 8192

PLACE_WAIT_S: Final = 0.05
MAX_PLACE_WAIT_S: Final = 300.0

# Of the ids of deliveries. Never to change: one that is sent again would be another to its receiver.
_DELIVERIES = uuid.UUID("7d1c1f0a-52c3-5c58-9a5e-1f7b6f0f3a44")


class WebhookTask(RelayTask):
    """send_webhook is a worker's own affair: no record, no result."""

    abstract = True
    recorded = False

    def shown(self, args: Any, kwargs: Any, task_id: str) -> str:
        """Return which request and which hook are meant."""
        if not isinstance(kwargs, dict):
            return ""
        return ", ".join(f"{name}={str(kwargs.get(name))[:200]!r}" for name in ("task_id", "hook"))


class Failed(Exception):
    """One attempt failed. `final`: the receiver wants nothing more."""

    def __init__(self, reason: str, retry_after_s: float | None = None, *, final: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.retry_after_s, self.final = reason, retry_after_s, final


class NoPlace(Exception):
    """As many deliveries to a hook are on their way as one process may have. `wait_s`: when to come again."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(wait_s)
        self.wait_s = wait_s


@app.task(name=SEND_WEBHOOK, bind=True, base=WebhookTask, ignore_result=True)
def send_webhook(
    self: Any, /, *, task_id: str, hook: str, tried: Sequence[Sequence[Any]] = (), **message: Any
) -> None:
    """Tell a hook how a request ended. `tried`: when each attempt so far failed, and why."""
    leave_newer(self, message)
    found = records().get(task_id)
    if found is None:
        log.warning("webhook dropped task_id=%s hook=%s: the request's record is gone", task_id, hook)
        return
    known = settings().hooks.get(hook)
    if known is None:
        raise given_up(found, hook, tried, HookNotConfigured(hook))
    try:
        with places_at(known).one():
            status = deliver(known, found, at=redis_now())
    except NoPlace as exc:
        raise self.retry(countdown=0.05 + exc.wait_s) from exc
    except Failed as exc:
        tried = [*tried, (round(redis_now(), 3), exc.reason)]
        pauses_s = settings().delivery_pauses_s
        if exc.final or len(tried) > len(pauses_s):
            raise given_up(found, hook, tried, WebhookNotDelivered(hook, len(tried), exc.reason)) from exc
        asked_s = min(exc.retry_after_s or 0.0, MAX_RETRY_AFTER_S)
        wait_s = max(pauses_s[len(tried) - 1] * random.uniform(1.0, 1.2), asked_s)  # noqa: S311
        log.info("webhook waits task_id=%s hook=%s for_s=%.1f: %s", task_id, hook, wait_s, exc.reason)
        metrics.count_webhook(hook, "retried")
        kwargs = {**message, "task_id": task_id, "hook": hook, "tried": tried}
        raise self.retry(countdown=wait_s, kwargs=kwargs) from exc
    metrics.count_webhook(hook, "delivered")
    log.info(
        "webhook delivered task_id=%s hook=%s status=%d attempt=%d", task_id, hook, status, len(tried) + 1
    )


class Places:
    """The places that deliveries to one hook may take in this process: a quarter of the worker's threads.

    So a frozen receiver leaves threads for all others. Those that find none are told when to come again, one
    after the other as fast as places have become free of late: each of thousands that wait for a slow
    receiver is a task once more, and not again and again.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = threading.BoundedSemaphore(size)
        self._lock = threading.Lock()
        self._took_s = 0.1
        self._next_at = 0.0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a place. Raises NoPlace."""
        if not self._free.acquire(timeout=PLACE_WAIT_S):
            raise NoPlace(self._wait_s())
        began = time.monotonic()
        try:
            yield
        finally:
            self._free.release()
            with self._lock:
                self._took_s += 0.2 * (time.monotonic() - began - self._took_s)

    def _wait_s(self) -> float:
        now = time.monotonic()
        with self._lock:
            last = now + MAX_PLACE_WAIT_S
            self._next_at = min(max(now, self._next_at) + self._took_s / self._size, last)
            # At the limit they would all come at once.
            wait_s = self._next_at - now
            return wait_s if self._next_at < last else random.uniform(0.5, 1.0) * wait_s  # noqa: S311


_places: dict[str, Places] = {}


def places_at(hook: Hook) -> Places:
    """Return the places of a hook."""
    found = _places.get(hook.id)
    if found is None:
        size = max(1, min(PLACES, settings().concurrency // 4))
        found = _places.setdefault(hook.id, Places(size))
    return found


# One attempt


def deliver(hook: Hook, found: Record, *, at: float) -> int:
    """Send once; return the status of the answer. `at` is now, in seconds since 1970. Raises Failed."""
    request = delivery(hook, found, at=at)
    try:
        answer = hook_sender(hook).send(request)
    except NoAnswer as exc:
        raise Failed(exc.reason) from exc
    if 200 <= answer.status < 300:
        return answer.status
    raise Failed(said_no(answer), retry_after_s(answer.headers), final=answer.status == 410)


def said_no(answer: HttpResponse) -> str:
    """Return what an answer means; nothing of its words, which may quote our headers."""
    if 300 <= answer.status < 400:
        return f"it answered {answer.status}, and redirects are not followed: mend the hook's url"
    if answer.status == 410:
        return "it answered 410: the receiver wants no more of these"
    return f"it answered {answer.status}"


def delivery(hook: Hook, found: Record, *, at: float) -> HttpRequest:
    """Return the request that tells a hook how things stand."""
    kind = CORRECTED if found.corrected_at is not None else ENDED
    delivery_id = str(uuid.uuid5(_DELIVERIES, f"{kind}\n{hook.id}\n{found.task_id}"))
    when = found.corrected_at or found.ended_at or at
    event = {"type": kind, "timestamp": _iso(when), "data": told_of(found)}
    content_type = "application/json"
    if hook.format == "cloudevents":
        content_type = "application/cloudevents+json"
        event = {
            "specversion": "1.0",
            "id": delivery_id,
            "source": "/dagrelay",
            "type": kind,
            "subject": found.task_id,
            "time": _iso(when),
            "datacontenttype": "application/json",
            "data": told_of(found),
        }
    body = json.dumps(event, separators=(",", ":")).encode()
    headers = {**hook.extra_headers, "Content-Type": content_type}
    if hook.scheme == "standard":
        headers |= sign_standard(hook.keys, delivery_id, at, body)
    elif hook.scheme == "github":
        headers |= sign_github(hook.keys[0], body)
    return HttpRequest("POST", hook.path, headers, body)


def told_of(found: Record) -> dict[str, Any]:
    """Return what is told of a request: how it stands, and never what was asked for with its conf."""
    told: dict[str, Any] = {
        "id": found.task_id,
        "state": found.state,
        "dag_id": found.dag_id,
        "dag_run_id": found.dag_run_id,
        "key": found.key,
        "connection": found.connection,
        "service": found.service,
        "job_id": found.job_id,
        "job_state": found.seen if found.service else None,
        "replay_of": found.replay_of,
        "by": found.by,
        "attempts": found.attempts,
        "accepted_at": _iso(found.accepted_at),
        "ended_at": _iso(found.ended_at),
        "corrected_at": _iso(found.corrected_at),
    }
    if found.run is not None:
        run = {name: value for name, value in found.run.items() if name != "result"}  # an XCom may be large
        if len(json.dumps(run)) <= MAX_RUN_BYTES:
            told["run"] = run
    if found.state != "done":
        told["error"] = found.error
        # The words of errors that are not ours may quote a value.
        if metrics.error_label(found.error or "") not in (metrics.OTHER, "TaskFailed"):
            told["reason"] = found.reason
    return {
        name: value[:MOST_TOLD] if isinstance(value, str) else value
        for name, value in told.items()
        if value not in (None, "")
    }


def _iso(instant: float | None) -> str | None:
    return datetime.fromtimestamp(instant, UTC).isoformat(timespec="milliseconds") if instant else None


# Its end, where it cannot be delivered


def given_up(found: Record, hook: str, tried: Sequence[Sequence[Any]], error: DagrelayError) -> DagrelayError:
    """Put a delivery on the desk, and return the error to raise.

    A replay puts its message back to its queue, as it was at first.
    """
    ((queue, raw),) = end_messages([hook], found.task_id, "dagrelay")
    letter: dict[str, str | bytes | None] = {
        "dag_id": found.dag_id,
        "dag_run_id": found.dag_run_id,
        "key": found.key,
        "connection": found.connection,
        "service": found.service,
        "fan_out": found.fan_out,
        "task": SEND_WEBHOOK,
        "raw": raw,
        "queue_key": queue,
        "error": type(error).__name__,
        "error_args": json.dumps(list(error.args)),
        "reason": str(error),
        "attempts": str(len(tried)),
        "history": "\n".join(f"{at:.3f} attempt {n} failed: {why}" for n, (at, why) in enumerate(tried, 1)),
    }
    known = {name: value for name, value in letter.items() if value}
    keep_record(found.task_id, keeping().keep_s)  # the letter is to be of use as long as it is there
    warn_of_dropped(Dead(store_client()).bury(f"{found.task_id}.end.{hook}", known, keeping()))
    metrics.count_webhook(hook, "given_up")
    log.error("webhook given up task_id=%s hook=%s attempt=%d: %s", found.task_id, hook, len(tried), error)
    return error
