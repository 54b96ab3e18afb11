"""What all operators here have in common: they hand a request over, wait without a worker, take its outcome.

**Tried again, started once.** Redis knows which request serves a task instance (`stores.serving`). A try that
follows one which was killed finds that request and waits for it; one that follows a failure hands over a new
one; and when somebody clears the task instance, what still goes on is cancelled first: see `generation_of`.

**Killed.** Whoever ends the task (marks it, clears it, deletes its run) ends the request, in the worker by
`on_kill`, while it is deferred by the trigger. Airflow calls `on_kill` at any SIGTERM, that of a node being
drained among them, and does not say which it is; so such a one ends the request too, and a retry begins anew.
What is deferred has no process that could be drained. After SIGKILL nothing is ended, and a retry goes on.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final, NoReturn
from urllib.parse import urlsplit

from ..client import RelayClient, new_task_id, told_as_unavailable
from ..contract import JobOutcome
from ..errors import (
    BrokerUnavailable,
    DagrelayError,
    InvalidRequest,
    RequestCancelled,
    RequestUnknown,
    ResultExpired,
    SubmitUnknown,
)
from ..handle import outcome_error
from ..stores import serving
from ..stores.standing import Standing, look
from .compat import AirflowException, AirflowFailException, BaseOperator, get_listener_manager
from .hook import DEFAULT_CONN_ID, DagrelayHook, RelayTarget, client_for
from .links import FLOWER_URL, FlowerLink, flower_link
from .triggers import RelayTrigger, words_of

REQUEST_ID: Final = "dagrelay_request_id"
"""The XCom with the id of the request: what Flower, `dagrelay status` and the workers' logs call it."""

WAIT_STEP_S: Final = 5.0

TRIGGER_FAILED_S: Final = 60.0
"""How long a worker waits itself after a trigger failed: one that always fails is tried no more often."""

OUTCOME_WITHIN_S: Final = 60.0
"""How long Redis may be away when the outcome is to be taken: the work is done, nothing is to be undone."""

_ENDS: Final = ("execute_complete", "outcome", "post_execute")
"""What an operator's class does at the end, in a worker."""

# Of the names by which Redis knows task instances. Never to change: a retry would start anew.
_TASKS: Final = uuid.UUID("3c6f1d0a-7d0e-5b7c-9a53-0f4de2b64a11")


class RelayOperator(BaseOperator):  # type: ignore[misc]
    """An operator whose work is a request of Dagrelay's. Not to be used by itself.

    `first_wait_s`: how long a worker waits for the end before the task is deferred, where it comes soon.

    relay_conn_id
        The Airflow connection to Dagrelay's Redis (templated). See `hook`.
    deferrable
        Wait in the triggerer (the default). False: in the worker, which does nothing else meanwhile.
    end_from_trigger
        Have the triggerer end a task whose request ended well (the default), without a worker of Airflow's.
        A task with outlets, callbacks on success, a `post_execute`, `multiple_outputs` or tasks mapped over
        its result is resumed on a worker all the same, and so is one whose class ends otherwise than ours,
        and each where a plug-in listens to the successes of tasks: the triggerer does nothing of that.
    cancel_on_kill
        Cancel the request when somebody marks or clears the task, or deletes its run (the default). What a
        clear leaves going on is then not waited for any more.
    """

    template_fields: Sequence[str] = ("relay_conn_id",)
    operator_extra_links: ClassVar[Any] = (FlowerLink(),)
    ui_color = "#e8f0fe"
    first_wait_s: float = 0.0
    overdue_error: type[Exception] = AirflowException
    trigger_class: type[RelayTrigger] = RelayTrigger
    """Its `xcoms` must make of an outcome what `outcome` returns."""

    def __init__(
        self,
        *,
        relay_conn_id: str = DEFAULT_CONN_ID,
        deferrable: bool = True,
        end_from_trigger: bool = True,
        cancel_on_kill: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.relay_conn_id = relay_conn_id
        self.deferrable = deferrable
        # Airflow refuses every DAG with an attribute `end_from_trigger` where some plug-in has a listener.
        self.ends_in_triggerer = end_from_trigger
        self.cancel_on_kill = cancel_on_kill
        self.flower_link: str | None = None
        self._request_id: str | None = None
        self._target: RelayTarget | None = None
        self._task_name = ""
        self._killed = False
        self._began_at: datetime | None = None

    # What each operator says of its work

    @abstractmethod
    def hand_over(self, client: RelayClient, request_id: str, context: Any, served: serving.Served) -> None:
        """Hand the request over under this id: once more, where it is on record already, is no harm.

        Raises the errors of `.delay()`.
        """

    def outcome(self, context: Any, client: RelayClient, request_id: str) -> Any:
        """Return what becomes the task's XCom, of a request that has ended. Raises what ended it."""
        return ended_as(client, request_id).to_message()

    # What Airflow calls

    def execute(self, context: Any) -> Any:
        """Hand over, or find what an earlier try has handed over; then wait for it."""
        self._began_at = context["ti"].start_date
        with _told_to_airflow(self):
            target, client = self._reach()
            request_id = self._request_for(context, target, client)
            self._link(target, request_id)
            context["ti"].xcom_push(key=REQUEST_ID, value=request_id)
            if self.flower_link:
                context["ti"].xcom_push(key=FLOWER_URL, value=self.flower_link)
            if self._ends_soon(client, request_id):
                return self._end(context, target, client, request_id)
        if not self.deferrable:
            return self._wait_here(context, target, client, request_id)
        return self._defer(request_id)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        """Take the outcome, when the trigger has seen the request end."""
        with _told_to_airflow(self):
            target, client = self._reach()
            request_id = self._request_id = str(event["request_id"])
            self._link(target, request_id)
            if event.get("state") == "unknown":
                raise RequestUnknown(request_id)
            return self._end(context, target, client, request_id)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Any) -> Any:
        """Do as Airflow does, but for a trigger that failed: what was handed over goes on, and is waited for.

        Only a time that is over ends it: then the request is cancelled.
        """
        if next_method != "__fail__":
            return super().resume_execution(next_method, next_kwargs, context)
        self._began_at = context["ti"].start_date
        words = str((next_kwargs or {}).get("error", ""))
        with _told_to_airflow(self):
            target, client = self._reach()
            request_id = self._request_id = self._served_by(context, target, client)
        if request_id is None:
            return super().resume_execution(next_method, next_kwargs, context)
        self._link(target, request_id)
        if "timeout" in words.lower():
            found = client.record(request_id)
            if found is not None and found.ended:  # in time: an end at the deadline counts
                with _told_to_airflow(self):
                    return self._end(context, target, client, request_id)
            self.on_kill()
            return super().resume_execution(next_method, next_kwargs, context)
        trace = "\n".join((next_kwargs or {}).get("traceback") or ())
        self.log.warning("the trigger failed (%s): waiting for request %s here\n%s", words, request_id, trace)
        if self.deferrable and not self._wait_for_end(client, request_id, TRIGGER_FAILED_S):
            return self._defer(request_id)
        return self._wait_here(context, target, client, request_id)

    def on_kill(self) -> None:
        """Cancel the request: somebody ended the task while a worker had it."""
        self._killed = True
        if self._request_id is None or self._target is None or not self.cancel_on_kill:
            return
        # A client of its own: a signal may have interrupted the other one with its lock held.
        client = RelayClient(self._target.settings)
        try:
            state = client.handle(self._request_id).cancel()
            if state == "unknown":  # not handed over yet; and under this id it would be cancelled at once
                with told_as_unavailable():
                    serving.forget(client.redis, self._task_name, self._request_id)
        except BrokerUnavailable as exc:
            self.log.error("request %s could not be cancelled: %s", self._request_id, exc)
        else:
            self.log.info("request %s is asked to be cancelled, it was %s", self._request_id, state)
        finally:
            client.redis.close()

    # The steps

    def _reach(self) -> tuple[RelayTarget, RelayClient]:
        self._target = DagrelayHook(self.relay_conn_id).target
        return self._target, client_for(self._target)

    def _request_for(self, context: Any, target: RelayTarget, client: RelayClient) -> str:
        """Return the id of the request that serves this task instance, handed over if it was not before."""
        self._task_name = name_of(context, target.airflow_name)
        with told_as_unavailable():
            served = serving.take(client.redis, self._task_name, new_task_id(), generation_of(context))
        self._request_id = served.request_id
        if served.left is not None and self.cancel_on_kill:
            self.log.info("the task was cleared: request %s is cancelled", served.left)
            client.handle(served.left).cancel()
        if served.how == "attached":
            self.log.info("request %s was handed over by an earlier try", served.request_id)
        else:
            self._end_if_killed()
            self.hand_over(client, served.request_id, context, served)
            self.log.info("handed over as request %s", served.request_id)
            self._end_if_killed()
        return served.request_id

    def _end_if_killed(self) -> None:
        """Raise where somebody ended the task meanwhile: Airflow 3 returns from its signal's handler."""
        if self._killed:
            self.on_kill()  # what had not been accepted then is now
            raise AirflowException("the task was ended while it handed over its request")

    def _served_by(self, context: Any, target: RelayTarget, client: RelayClient) -> str | None:
        """Return the request that was handed over for this task instance, or None."""
        with told_as_unavailable():
            return serving.serves(client.redis, name_of(context, target.airflow_name))

    def _link(self, target: RelayTarget, request_id: str) -> None:
        """Have Airflow link to the request in Flower. Airflow 3 asks for it at the end of each process."""
        self.flower_link = flower_link(target.flower_url, request_id)

    def _ends_soon(self, client: RelayClient, request_id: str) -> bool:
        """Tell whether the request has ended, after a short wait where that is worth it."""
        if self.first_wait_s:
            with suppress(DagrelayError):
                client.handle(request_id).get(timeout=self.first_wait_s)
        found = client.record(request_id)
        return found is not None and found.ended

    def _defer(self, request_id: str) -> NoReturn:
        left = timedelta(seconds=self._left_s()) if self._left_s() < float("inf") else None
        trigger = self.trigger_class(
            request_id,
            relay_conn_id=self.relay_conn_id,
            cancel_on_kill=self.cancel_on_kill,
            end_from_trigger=self._may_end_in_triggerer(),
        )
        self.defer(trigger=trigger, method_name="execute_complete", timeout=left)
        raise AssertionError  # defer() never returns

    def _left_s(self) -> float:
        """Return for how long the end may still be waited for.

        That is what is left of `execution_timeout`, to which Airflow 3 does not hold a deferred task.
        """
        return left_of(self.execution_timeout, self._began_at)

    def _may_end_in_triggerer(self) -> bool:
        if not self.ends_in_triggerer or not self.do_xcom_push or self.outlets or self.on_success_callback:
            return False
        if self.multiple_outputs or self._post_execute_hook is not None:
            return False
        ours = (f"{__package__}.", "airflow.")
        if not all(getattr(type(self), name).__module__.startswith(ours) for name in _ENDS):
            return False
        if get_listener_manager().hook.on_task_instance_success.get_hookimpls():
            return False
        return next(iter(self.iter_mapped_dependants()), None) is None

    def _wait_here(self, context: Any, target: RelayTarget, client: RelayClient, request_id: str) -> Any:
        """Wait in this process until the request has ended, and take its outcome."""
        with _told_to_airflow(self):
            if not self._wait_for_end(client, request_id, self._left_s()):
                self.on_kill()
                raise self.overdue_error(f"request {request_id} has not ended in time")
            return self._end(context, target, client, request_id)

    def _wait_for_end(self, client: RelayClient, request_id: str, at_most_s: float = float("inf")) -> bool:
        """Tell whether the request has ended within a time. While Redis is away, wait on: the request does.

        Raises RequestUnknown.
        """
        until = time.monotonic() + at_most_s
        known: Standing | None = None
        away = False
        while (left_s := until - time.monotonic()) > 0:
            try:
                with told_as_unavailable():
                    changed = look(client.redis, request_id, known)
                if changed is not None:
                    known = changed
                    if known.ended:
                        return True
                    if known.state:
                        self.log.info("request %s: %s", request_id, words_of(known))
                client.handle(request_id).get(timeout=min(WAIT_STEP_S, left_s))
            except BrokerUnavailable as exc:
                if not away:
                    self.log.warning("%s; waiting on", exc)
                away = True
                time.sleep(1)
                continue
            except RequestUnknown:
                raise
            except DagrelayError:
                pass  # not yet, or its end: which the next look tells
            away = False
        return False

    def _end(self, context: Any, target: RelayTarget, client: RelayClient, request_id: str) -> Any:
        """Return the outcome of a request that has ended, or raise how."""
        until = time.monotonic() + OUTCOME_WITHIN_S
        while True:
            try:
                return self.outcome(context, client, request_id)
            except BrokerUnavailable as exc:
                if time.monotonic() > until:
                    raise
                self.log.warning("%s; asked again for the outcome", exc)
                time.sleep(2)
            except ResultExpired:  # it ended well, and what it yielded is gone: the next try is to begin anew
                with told_as_unavailable():
                    serving.forget(client.redis, name_of(context, target.airflow_name), request_id)
                raise


def ended_as(client: RelayClient, request_id: str) -> Any:
    """Return the outcome of a request that has ended, or raise how it did.

    Where that was over a day ago, while this Airflow was away, as it is on record: a job that took a night is
    not started again for want of its result, nor one that somebody cancelled. Raises ResultExpired where what
    was asked for is not on record.
    """
    try:
        return client.handle(request_id).get(timeout=WAIT_STEP_S)
    except ResultExpired:
        found = client.record(request_id)
        if found is not None and found.state in ("failed", "cancelled"):
            status = "FAILURE" if found.state == "failed" else "REVOKED"
            error = {"exc_type": found.error, "exc_message": found.error_args}
            raise outcome_error(status, error) from None
        if found is not None and found.outcome is not None:
            return JobOutcome.from_message(found.outcome)
        raise


def name_of(context: Any, airflow_name: str) -> str:
    """Return by which name Redis knows a task instance: the same on every try, and in no other Airflow."""
    ti = context["ti"]
    parts = [airflow_name, ti.dag_id, ti.run_id, ti.task_id, ti.map_index]
    return str(uuid.uuid5(_TASKS, json.dumps(parts)))


def generation_of(context: Any) -> str:
    """Return what changes when all is to be done anew, and not when a try follows another.

    A clear raises `max_tries`. A run that is deleted and made again under its id begins at another instant.
    """
    began = getattr(context.get("dag_run"), "start_date", None)
    return f"{context['ti'].max_tries} {began.timestamp() if began else ''}"


def left_of(timeout: timedelta | None, began_at: datetime | None) -> float:
    """Return how many seconds are left of a time, at least 1: that it is over is for Airflow to say."""
    if timeout is None:
        return float("inf")
    waited = datetime.now(UTC) - began_at if began_at else timedelta()
    return max(1.0, (timeout - waited).total_seconds())


def asked_by(context: Any) -> str:
    """Return who asks, as records and notes of runs have it: which task of this Airflow, and which try."""
    ti = context["ti"]
    index = f"[{ti.map_index}]" if ti.map_index >= 0 else ""
    return f"airflow {ti.dag_id}/{ti.task_id}{index} try {ti.try_number} of {ti.run_id}"[:100]


def has_template(value: Any) -> bool:
    """Tell whether a value, or a part of it, is known only when the task runs: a template, or an XCom."""
    if isinstance(value, str):
        return "{{" in value or "{%" in value
    if isinstance(value, dict):
        return any(has_template(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set):
        return any(has_template(part) for part in value)
    return hasattr(value, "iter_references") or callable(value)  # an XComArg; what Airflow calls to render


NO_RETRY: Final = (InvalidRequest, RequestCancelled, SubmitUnknown)
"""After these Airflow does not try again: it could change nothing, somebody wanted the end, or the work may
go on unseen and would be started twice. Not after a ConfigurationError: where a store of secrets is away,
Airflow says that there is no such connection, and what was handed over waits to be found."""


class _Refused(InvalidRequest, AirflowFailException):  # type: ignore[misc]
    """What is wrong with an operator's arguments; where a mapped task is made as it runs, for good."""


_Refused.__name__ = _Refused.__qualname__ = InvalidRequest.__name__  # it is nothing else to who reads it


class refused_for_good:
    """Have Airflow try no mapped task again whose arguments are wrong: it makes its operator as it runs."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, InvalidRequest):
            raise _Refused(exc.reason) from None


class _told_to_airflow:
    """Turn our errors into Airflow's: into a failure for good where a retry is not wanted (`NO_RETRY`)."""

    def __init__(self, operator: RelayOperator) -> None:
        self._operator = operator

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if not isinstance(exc, DagrelayError):
            return
        told = AirflowFailException if isinstance(exc, NO_RETRY) else AirflowException
        if isinstance(exc, BrokerUnavailable) and self._operator._target:
            where = urlsplit(self._operator._target.settings.redis_url)
            at = f"{where.hostname}:{where.port or 6379}" if where.hostname else where.path
            conn = self._operator.relay_conn_id
            raise told(f"{type(exc).__name__}: {at} (relay_conn_id {conn!r}): {exc}") from None
        raise told(f"{type(exc).__name__}: {exc}") from None
