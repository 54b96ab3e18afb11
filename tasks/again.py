"""What every task does with a message that comes again: told once more, dropped, or tried again later."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from celery.exceptions import Ignore, Retry
from celery.utils.log import get_logger

from producers.contract import VERSION
from producers.errors import InvalidRequest, error_from
from producers.stores.records import KEEP_S, Record, record_key

from .app import records, said, store_client

log = get_logger("dagrelay.task")

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 20.0
"""Of full jitter: the wait before attempt n is drawn from 0 to min(cap, base × 2ⁿ), so that the workers of
an outage do not come back as one."""

NEWER_RETRY_S = 60.0


def backoff_s(retries: int, retry_after_s: float | None = None, cap_s: float = BACKOFF_CAP_S) -> float:
    """Return how long to wait before the next attempt: full jitter, and at least what the server asks for."""
    drawn = random.uniform(0, min(cap_s, BACKOFF_BASE_S * 2 ** min(retries, 20)))  # noqa: S311
    return max(drawn, retry_after_s or 0.0)


def newer(message: Mapping[str, Any]) -> bool:
    """Tell whether a message is of a newer version than we know."""
    version = message.get("v", VERSION)
    return isinstance(version, int) and version > VERSION


def leave_newer(task: Any, message: Mapping[str, Any]) -> None:
    """Leave a message of a newer version to a newer worker, by raising Retry; do nothing about others."""
    if newer(message):
        reason = InvalidRequest(f"needs a worker that knows more than v{VERSION} of the messages")
        raise retry(task, reason, NEWER_RETRY_S)


def redelivered(task: Any) -> bool:
    """Tell whether a worker may have begun this message before."""
    return bool((task.request.delivery_info or {}).get("redelivered"))


def on_record(task: Any) -> Record | None:
    """Return what is on record of a message that may be a copy, or has been worked on before.

    Drops what a retry has replaced, and raises again what an end was; an end that is no error is the
    caller's.
    """
    if not task.request.retries and not redelivered(task):
        return None
    found = records().get(task.request.id)
    if found is None or found.state == "done":
        return found
    if found.ended:
        raise error_from(found.error or "TaskFailed", found.error_args or [found.reason or found.state])
    if found.retried > task.request.retries:
        log.info("stale copy dropped task_id=%s attempt=%d", task.request.id, task.request.retries + 1)
        raise Ignore
    return found


def redis_now() -> float:
    """Return the time by Redis' clock, in seconds since 1970."""
    seconds, microseconds = store_client().time()
    return float(seconds) + float(microseconds) / 1e6


def retry(task: Any, exc: Exception, wait_s: float) -> Retry:
    """Publish the next attempt and return the exception to raise."""
    log.info("waits task_id=%s for_s=%.1f: %s", task.request.id, wait_s, said(exc))
    found: Retry = task.retry(countdown=wait_s, exc=exc)
    return found


def keep_record(task_id: str, more_s: int = 0) -> None:
    """Keep the record of a request that has ended, without which nobody knows what to tell of its end."""
    store_client().expire(record_key(task_id), KEEP_S + more_s)
