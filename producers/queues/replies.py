"""Answers over queues: what a sender that named `reply_to` is told, and the thread that tells it.

An answer is a JSON object:

==================== ========================================================================================
id                   the request's task id; null for a refusal
what                 accepted · refused · progress · ended · corrected (what ended as unknown has a run)
state                accepted, waiting, done, failed, cancelled; refused; unknown (its record has expired)
correlation_id       as the sender gave it
at                   when that was, ISO 8601 UTC
dag_id, dag_run_id   of a trigger; service, job_id of a job
run                  of a trigger that is done: the run as `DagRun` has it
result, job_state    of a job that is done: the service's result, and its last state
seen, progress       of a progress: the last state that was seen, and how far it is
error, reason        why it failed, was cancelled, waits or was refused: a class of `errors`, and its words
message_id           of a refusal: how the message was named
==================== ========================================================================================

What is not known is left out. *Accepted* and *refused* are told before the message is acknowledged, all else
from the stream ``dagrelay:replies:<door>`` (see `stores.notices`), by whichever listener of that door reads
it first; it is taken off there once the broker has it. So an answer may come twice, and *ended* may overtake
*accepted*; none is lost while the door has a listener, and its place takes it. One exception: a message that
nothing names is acknowledged before *accepted* is told, as it would be a second run if it came again.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from redis.exceptions import RedisError, ResponseError

from ..client import RelayClient, connect
from ..stores.notices import replies_key
from ..stores.records import RESULT_PREFIX, Record, Records
from .redis_stream import LEAVE, begin_group, consumer_name, entries, forget_consumers
from .source import PlaceFull, Source, SourceUnavailable, Undeliverable

log = logging.getLogger("dagrelay.listen")

GROUP: Final = "listeners"
AT_ONCE: Final = 100
CLAIM_AFTER_S: Final = 30.0
"""A listener that has not told an answer for so long is taken for dead."""

WAIT_S: Final = 1.0
TIMEOUT_S: Final = 5.0
BACKOFF_S: Final = (0.2, 10.0)


def answer(what: str, *, id: str | None, correlation_id: str | None, at: float, **more: Any) -> bytes:
    """Return an answer as JSON, without what is None. `at` is in seconds since 1970."""
    told = {"id": id, "what": what, "state": more.pop("state", what), "correlation_id": correlation_id}
    told["at"] = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    told |= {name: value for name, value in more.items() if value not in (None, "")}
    return json.dumps(told).encode()


def answer_of(
    what: str,
    task_id: str,
    record: Record | None,
    result: Mapping[str, Any] | None,
    *,
    correlation_id: str | None,
    at: float,
) -> bytes:
    """Return what is to be told of a request. `result` is Celery's, which holds more than the record does."""
    if record is None:
        return answer(what, id=task_id, correlation_id=correlation_id, at=at, state="unknown")
    more: dict[str, Any] = {
        "state": record.state,
        "dag_id": record.dag_id,
        "dag_run_id": record.dag_run_id,
        "service": record.service,
        "job_id": record.job_id,
    }
    if record.ended:
        what = "corrected" if what == "corrected" else "ended"
        at = (record.corrected_at if what == "corrected" else record.ended_at) or at
        found = result.get("result") if result is not None and result.get("status") == "SUCCESS" else None
        if record.state == "done" and isinstance(found, dict) and "service" in found:
            more |= {
                "result": found.get("result"),
                "job_state": found.get("state"),
                "then": found.get("then"),
            }
        elif record.state == "done":
            more["run"] = found if isinstance(found, dict) else record.run
        elif record.state == "failed":
            more |= {"error": record.error, "reason": record.reason}
        else:
            by = f"asked by {record.cancel_by}" if record.cancel_by else record.reason
            more |= {"error": record.error or "RequestCancelled", "reason": by}
    else:
        more |= {"seen": record.seen, "progress": record.progress, "reason": record.reason}
    return answer(what, id=task_id, correlation_id=correlation_id, at=at, **more)


class Replies:
    """Publishes what `dagrelay:replies:<door>` has, until it is stopped. Belongs to one thread."""

    def __init__(self, relay: RelayClient, door: str, publisher: Source) -> None:
        # A client of its own: a read that waits would fail by the short timeout of the others.
        self._redis = connect(replace(relay.settings, timeout_s=TIMEOUT_S))
        self._records = Records(self._redis)
        self._key, self._publisher = replies_key(door), publisher
        self._consumer = consumer_name()
        self._begun = False
        self._own = False
        """Whether there is something that was read and not told."""
        self._claim_at = 0.0
        self.told = 0

    def run(self, stop: threading.Event) -> None:
        """Go on until `stop` is set. Raises nothing: what fails is logged, and tried again."""
        wait_s, _ = BACKOFF_S
        while not stop.is_set():
            try:
                self._turn()
                wait_s, _ = BACKOFF_S
            except (RedisError, OSError, SourceUnavailable) as exc:
                log.warning("answers wait reason=%s: %s", type(exc).__name__, exc)
                self._own = True
                stop.wait(wait_s)
                wait_s = min(2 * wait_s, BACKOFF_S[1])
        self._leave()

    def _turn(self) -> None:
        try:
            if not self._begun:
                begin_group(self._redis, self._key, GROUP)
                self._begun = True
            rows = self._next()
        except ResponseError as exc:
            if not str(exc).startswith("NOGROUP"):
                raise
            self._begun = False
            return
        told = []
        try:
            for entry, fields in rows:
                if fields is not None:
                    self._tell_or_log(entry, {_text(name): _text(value) for name, value in fields.items()})
                told.append(entry)
        finally:
            if told:
                with self._redis.pipeline(transaction=False) as pipe:
                    pipe.xdel(self._key, *told)  # first: what is pending without an entry is found
                    pipe.xack(self._key, GROUP, *told)
                    pipe.execute()

    def _next(self) -> list[tuple[bytes, dict[bytes, bytes] | None]]:
        if self._own:
            answered = self._redis.xreadgroup(GROUP, self._consumer, {self._key: "0"}, count=AT_ONCE)
            if rows := entries(answered):
                return rows
            self._own = False
        if (now := time.monotonic()) >= self._claim_at:
            idle_ms = int(CLAIM_AFTER_S * 1000)
            _, rows, *_ = self._redis.xautoclaim(self._key, GROUP, self._consumer, idle_ms, count=AT_ONCE)
            if rows:
                return list(rows)
            self._claim_at = now + CLAIM_AFTER_S / 2
            forget_consumers(self._redis, self._key, GROUP, idle_s=10 * CLAIM_AFTER_S)
        block_ms = int(WAIT_S * 1000)
        return entries(
            self._redis.xreadgroup(GROUP, self._consumer, {self._key: ">"}, count=AT_ONCE, block=block_ms)
        )

    def _tell_or_log(self, entry: bytes, notice: Mapping[str, str]) -> None:
        try:
            self._tell(entry, notice)
        except (RedisError, OSError, SourceUnavailable):
            raise
        except Exception as exc:  # noqa: BLE001 - one that cannot be told must not hold up all others
            log.error("answer lost task_id=%s by=%s", notice.get("id"), where(exc))

    def _tell(self, entry: bytes, notice: Mapping[str, str]) -> None:
        task_id, what = notice.get("id", ""), notice.get("what", "")
        record = self._records.get(task_id)
        if what == "progress" and record is not None and record.ended:
            return  # the end is told by a notice of its own
        body = answer_of(
            what,
            task_id,
            record,
            result_of(self._redis, task_id) if record is not None and record.ended else None,
            correlation_id=notice.get("correlation_id") or None,
            at=int(entry.partition(b"-")[0]) / 1000,
        )
        publish(self._publisher, notice.get("to", ""), body, notice.get("correlation_id") or None, task_id)
        self.told += 1

    def _leave(self) -> None:
        try:
            if self._begun:
                LEAVE.run(self._redis, (self._key,), (GROUP, self._consumer))
            self._redis.close()
        except (RedisError, OSError):
            pass  # another listener removes it
        self._publisher.close()


def result_of(redis: Any, task_id: str) -> dict[str, Any] | None:
    """Return a request's Celery result; None where there is none any more."""
    raw = redis.get(RESULT_PREFIX + task_id)
    found = json.loads(raw) if raw else None
    return found if isinstance(found, dict) else None


def publish(source: Source, to: str, body: bytes, correlation_id: str | None, task_id: str) -> None:
    """Publish an answer; one that cannot be delivered is logged and let go. Raises SourceUnavailable.

    So is one whose place is full: whoever reads no more there must not hold up all others.
    """
    try:
        source.publish(
            to, body, correlation_id=correlation_id, headers={"task_id": task_id} if task_id else {}
        )
    except (Undeliverable, PlaceFull) as exc:
        log.warning("answer undeliverable task_id=%s to=%r reason=%s", task_id, to, exc)


def where(exc: BaseException) -> str:
    """Say an error of ours by its kind and place: its text may hold what a message says."""
    place = traceback.extract_tb(exc.__traceback__)[-1]
    return f"{type(exc).__name__} in {place.name}:{place.lineno}"


def in_thread(run: Callable[[threading.Event], None], stop: threading.Event) -> threading.Thread:
    """Start a thread for what runs until `stop` is set."""
    thread = threading.Thread(target=run, args=(stop,), name="replies", daemon=True)
    thread.start()
    return thread


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
