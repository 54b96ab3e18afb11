"""The Celery result backend that keeps the record of a request together with its result.

Every state of a task passes here: a retry, the end, a revocation. Result and record are written by one
script (`producers.stores.records.STORE`), so there is never a result without its record, nor an end
without its reason. What cannot be written raises NotHandedOver: the message is then not acknowledged,
and comes back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from celery import states
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from celery.exceptions import Reject
from celery.utils.log import get_logger

from producers.contract import POLL_EXTERNAL_JOB, TRIGGER_DAG, TaskInstance, TriggerRequest, reference_for
from producers.errors import DagrelayError, InvalidRequest, OutcomeUnknown, SubmitUnknown, error_from
from producers.stores.dead import EXPIRED
from producers.stores.envelope import end_messages, task_state_message
from producers.stores.fan_outs import FanOuts
from producers.stores.letters import Keeping
from producers.stores.notices import at_end_field
from producers.stores.records import Ended, State, store

from . import letters, logs, metrics
from .settings import settings

log = get_logger("dagrelay.results")


class NotHandedOver(Reject):
    """What was to follow a message could not be written to Redis, so the message stays unacknowledged.

    A Reject, because Celery lets only that pass from every place where it writes something.
    """

    def __init__(self, reason: str = "", requeue: bool = True, by_itself: bool = False) -> None:
        super().__init__(reason, requeue=True)
        self.reason = reason
        self.by_itself = by_itself
        """Whether the message may be the reason, and not Redis: it is not to come back for ever."""


RECORDED_BYTES = 4096
"""What a record keeps of a run, or of a job's outcome, 14 days long. A larger one is so for what a task of
the run, or the job, has returned: that is in the result, for as long as results are kept, and in the outcome
of a fan-out."""

HOOK = re.compile(r"[A-Za-z0-9_]{1,100}\Z")
MAX_HOOKS = 5

_STATES: dict[str, State] = {
    states.SUCCESS: "done",
    states.FAILURE: "failed",
    states.REVOKED: "cancelled",
    states.RETRY: "waiting",
}


class RecordedBackend(RedisBackend):
    """Redis results as Celery has them, each with its record."""

    thread_safe = True  # redis-py's pool is, and nothing else is shared; else each thread has a pool
    _chunk: dict[str, dict[str, Any]] = {}  # noqa: RUF012 - never changed, only replaced
    """The messages of the chunk of a fan-out that was read last: a broken one ends all of them in turn."""

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = task_id
        try:
            if state in _STATES:
                self.store_with_record(task_id, meta, request)
            else:
                self.set(self.get_key_for_task(task_id), self.encode(meta))
        except Exception as exc:
            if state not in states.READY_STATES:
                # Its message is in Redis already, and that is what counts.
                log.warning("state not written task_id=%s state=%s: %s", task_id, state, exc)
                return result
            metrics.count_redis_error("task")
            raise NotHandedOver(f"the end of {task_id} could not be written: {exc}") from exc
        return result

    def mark_as_revoked(
        self, task_id: str, reason: str = "", request: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """End a message that its worker drops because it was revoked.

        Celery's revoke command also does this in every worker at once, for a task that another one may be
        working on: the record would say cancelled, and the run exist. Without a message in hand, nothing is
        written here; whoever has it drops it before its next attempt.
        """
        if request is not None:
            super().mark_as_revoked(task_id, reason, request, *args, **kwargs)

    def correct(self, task_id: str, result: dict[str, Any]) -> bool:
        """Replace an end that was OutcomeUnknown by the run that was found; tell whether it was one."""
        meta = self._get_result_meta(result=result, state=states.SUCCESS, traceback=None, request=None)
        return self.store_with_record(task_id, {**meta, "task_id": task_id}, None, correct=True)

    def end(
        self, task_id: str, state: str, exc: DagrelayError, letter: Mapping[str, str | bytes] | None = None
    ) -> bool:
        """End a task from outside of it, with a failure or a cancellation; tell whether it had not ended.

        `letter`: what its dead letter has to hold, if its request is not known.
        """
        result = {
            "exc_type": type(exc).__name__,
            "exc_message": list(exc.args),
            "exc_module": type(exc).__module__,
        }
        meta = self._get_result_meta(result=result, state=state, traceback=None, request=None)
        return self.store_with_record(task_id, {**meta, "task_id": task_id}, None, letter=letter)

    def store_with_record(
        self,
        task_id: str,
        meta: dict[str, Any],
        request: Any,
        *,
        correct: bool = False,
        letter: Mapping[str, str | bytes] | None = None,
    ) -> bool:
        """Write a result and its record in one step; tell whether it changed anything."""
        state, result = _STATES[meta["status"]], meta["result"]
        expired = state == "cancelled" and _words_of(result) == "expired"
        found = _of_request(request, result) | _of_outcome(state, result)
        if state != "waiting":
            found |= _whom_to_tell(task_id, request)
        next_in_s = 0.0
        if state == "waiting":
            found = {name: value for name, value in found.items() if not name.startswith("error")}
            found["retried"] = str((getattr(request, "retries", None) or 0) + 1)
            next_in_s = getattr(request, "next_in_s", None) or 0.0
        elif state == "cancelled" and getattr(request, "unsure", False):
            end = _cancelled_unsure(task_id, found)
            found |= _of_outcome("failed", end)
            meta = {**meta, "result": end}
        buried = self._letter(task_id, state, meta, expired, request, letter or {})
        ended = store(
            self.client,
            task_id,
            result=self.encode(meta),
            result_ttl_s=self.expires,
            state=state,
            found=found,
            next_in_s=next_in_s,
            correct=correct,
            letter=buried,
            keeping=keeping() if buried is not None else Keeping(),
            conf_keep_s=settings().conf_keep_s,
        )
        if isinstance(ended, Ended):
            logs.outcome(task_id, state, ended, meta["result"], correct=correct)
            message = getattr(request, "kwargs", None)
            metrics.count_end(state, meta["result"], ended, message, corrected=correct)
            warn_of_dropped(int(ended.letters_dropped))
        elif ended and state == "waiting":
            why = meta["result"] if isinstance(meta["result"], dict) else {}
            metrics.count_retry(found.get("task", ""), str(why.get("exc_type", "")))
        return bool(ended)

    def _letter(
        self,
        task_id: str,
        state: State,
        meta: dict[str, Any],
        expired: bool,
        request: Any,
        otherwise: Mapping[str, str | bytes],
    ) -> dict[str, str | bytes] | None:
        """Return what goes on the desk with this end, beside what the record says; None for nothing.

        What failed goes there, and what expired before a worker could begin it: nobody asked for that. Not
        what follows a failure in a chain, and is marked as failed with it: it lies in the letter of that.
        """
        follows = isinstance(request, Context) and request.delivery_info is None
        if follows or (state != "failed" and not expired):
            return None
        letter: dict[str, str | bytes] = {"traceback": letters.told_traceback(meta.get("traceback"))}
        text = self._request_text(task_id, request)
        letter |= {"request": text} if text is not None else otherwise
        if expired and meta["result"].get("exc_type") not in ("OutcomeUnknown", "SubmitUnknown"):
            letter |= {"error": EXPIRED, "reason": "it expired before a worker could begin it"}
        return {name: value for name, value in letter.items() if value}

    def _request_text(self, task_id: str, request: Any) -> str | None:
        """Return a request as a letter has it: that of the message in hand, else that of its fan-out."""
        kwargs = getattr(request, "kwargs", None)
        if isinstance(kwargs, dict):
            priority = (request.delivery_info or {}).get("priority")
            return letters.request_text(request.task, request.args, kwargs, vars(request), priority)
        if request is not None:
            return None
        messages = self._chunk
        if task_id not in messages:
            messages = self._chunk = FanOuts(self.client).messages_beside(task_id)
        envelope = messages.get(task_id)
        return letters.of_message(envelope) if envelope is not None else None

    def on_chord_part_return(
        self, request: Any, state: str, result: Any, propagate: Any = None, **kwargs: Any
    ) -> None:
        """Count a chord's part; what cannot be counted leaves the message unacknowledged."""
        try:
            super().on_chord_part_return(request, state, result, propagate, **kwargs)
        except Reject:
            raise
        except Exception as exc:
            metrics.count_redis_error("task")
            raise NotHandedOver(f"the chord of {request.id} could not be told: {exc}") from exc


def _words_of(result: Any) -> str:
    """Return the words of an error as Celery keeps it, where it has no others."""
    arguments = result.get("exc_message") if isinstance(result, dict) else None
    return (
        str(arguments[0]) if isinstance(arguments, list | tuple) and len(arguments) == 1 else str(arguments)
    )


def keeping() -> Keeping:
    """Return for how long dead letters are kept, and how many."""
    return Keeping(settings().dead_keep_s, settings().dead_max)


def warn_of_dropped(count: int) -> None:
    """Say how many dead letters went unseen, if any did."""
    if count:
        log.warning(
            "dead letters dropped count=%d: there were more than DAGRELAY_DEAD_MAX=%d, and the oldest went",
            count,
            settings().dead_max,
        )


def _cancelled_unsure(task_id: str, found: dict[str, str]) -> dict[str, Any]:
    """Return the end of a request that was cancelled after an answer was lost, as Celery keeps exceptions."""
    why = f"{found.get('reason')}, after an answer was lost"
    end: DagrelayError = OutcomeUnknown(found.get("dag_id", ""), found.get("dag_run_id", ""), why)
    if found.get("task") == POLL_EXTERNAL_JOB:
        end = SubmitUnknown(found.get("service", ""), reference_for(task_id), why)
    return {
        "exc_type": type(end).__name__,
        "exc_message": list(end.args),
        "exc_module": type(end).__module__,
    }


def _of_request(request: Any, result: Any) -> dict[str, str]:
    """Return what a request says of itself: it begins the record of one that came past our door."""
    kwargs = getattr(request, "kwargs", None)
    if request is None or not isinstance(kwargs, dict):
        return {}
    found = {"task": str(getattr(request, "task", None) or "")}
    if found["task"] == TRIGGER_DAG:
        for name in ("dag_id", "key", "connection"):
            if isinstance(kwargs.get(name), str):
                found[name] = kwargs[name][:512]
        if isinstance(result, dict) and isinstance(result.get("dag_run_id"), str):
            found["dag_run_id"] = result["dag_run_id"]  # the same: the run was asked for by it
            return {name: value for name, value in found.items() if value}
        with suppress(TypeError, ValueError):  # an invalid message has no run id, and ends for that reason
            found["dag_run_id"] = TriggerRequest.from_message(kwargs).run_id_for(request.id)
    elif found["task"] == POLL_EXTERNAL_JOB and isinstance(kwargs.get("service"), str):
        found["service"] = kwargs["service"][:100]
    return {name: value for name, value in found.items() if value}


def _whom_to_tell(task_id: str, request: Any) -> dict[str, str]:
    """Return what an end is to send on: the record of a request that came past our door does not have it."""
    kwargs = getattr(request, "kwargs", None)
    if not isinstance(kwargs, dict) or getattr(request, "task", None) not in (TRIGGER_DAG, POLL_EXTERNAL_JOB):
        return {}
    hooks, task = kwargs.get("on_end"), kwargs.get("task_instance")
    named = [
        one.lower()
        for one in (hooks[:MAX_HOOKS] if isinstance(hooks, list) else ())
        if isinstance(one, str) and HOOK.match(one)
    ]
    sent_on = end_messages(named, task_id, "dagrelay")
    if request.task == POLL_EXTERNAL_JOB and isinstance(task, dict):
        with suppress(InvalidRequest, TypeError):  # which the request ends with
            sent_on.append(task_state_message(TaskInstance(**task), task_id, "dagrelay"))
    return {"at_end": at_end_field(sent_on)} if sent_on else {}


def _of_outcome(state: State, result: Any) -> dict[str, str]:
    """Return why it waits or how it ended. Results are our own, and hold neither conf nor secret."""
    if state == "done" and isinstance(result, dict) and "service" in result:
        found = {"reason": "", "seen": str(result.get("state"))[:64]}
        text = json.dumps(result)
        return found | ({"outcome": text} if len(text) <= RECORDED_BYTES else {})
    if state == "done":
        run = result if isinstance(result, dict) and "dag_run_id" in result else None
        if run is None:
            return {"reason": ""}
        found = {"reason": "", "run": json.dumps(run)}
        if len(found["run"]) > RECORDED_BYTES:
            found["run_kept"] = json.dumps({**run, "result": None})
        return found
    if isinstance(result, dict):  # an exception as Celery keeps it
        arguments = result.get("exc_message")
        listed = list(arguments) if isinstance(arguments, list | tuple) else [str(arguments)]
        return {
            "error": str(result.get("exc_type")),
            "error_args": json.dumps(listed, default=str),
            "reason": str(error_from(str(result.get("exc_type")), listed))[:1000],
        }
    return {"reason": str(result)[:1000]}
