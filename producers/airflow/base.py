"""What all operators here have in common: they hand a request over, wait without a worker, take its outcome.

**Tried again, started once.** Redis knows which request serves a task instance (`stores.serving`). A try that
follows one which was killed finds that request and waits for it; one that follows a failure hands over a new
one; and when somebody clears the task instance, what still goes on is cancelled first. Airflow tells the two
apart by `max_tries`: a clear raises it, a retry does not.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final, NoReturn

from ..client import RelayClient, new_task_id, told_as_unavailable
from ..errors import (
    BrokerUnavailable,
    ConfigurationError,
    DagrelayError,
    InvalidRequest,
    RequestUnknown,
    ResultExpired,
    ResultNotReady,
)
from ..stores import serving
from .compat import AirflowException, AirflowFailException, BaseOperator
from .hook import DEFAULT_CONN_ID, DagrelayHook, RelayTarget, client_for
from .links import FLOWER_URL, FlowerLink, flower_link
from .triggers import RelayTrigger

REQUEST_ID: Final = "dagrelay_request_id"
"""The XCom with the id of the request: what Flower, `dagrelay status` and the workers' logs call it."""

WAIT_STEP_S: Final = 5.0

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
        A task with outlets is resumed on a worker all the same: the triggerer makes no asset events.
    """

    template_fields: Sequence[str] = ("relay_conn_id",)
    operator_extra_links: ClassVar[Any] = (FlowerLink(),)
    ui_color = "#e8f0fe"
    first_wait_s: float = 0.0
    trigger_class: type[RelayTrigger] = RelayTrigger
    """Its `xcoms` must make of an outcome what `outcome` returns."""

    def __init__(
        self,
        *,
        relay_conn_id: str = DEFAULT_CONN_ID,
        deferrable: bool = True,
        end_from_trigger: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.relay_conn_id = relay_conn_id
        self.deferrable = deferrable
        self.end_from_trigger = end_from_trigger
        self.flower_link: str | None = None
        self._request_id: str | None = None
        self._relay: RelayClient | None = None

    # What each operator says of its work

    def hand_over(self, client: RelayClient, request_id: str, context: Any, served: serving.Served) -> None:
        """Hand the request over under this id: once more, where it is on record already, is no harm.

        Raises the errors of `.delay()`.
        """
        raise NotImplementedError

    def outcome(self, context: Any, client: RelayClient, request_id: str) -> Any:
        """Return what becomes the task's XCom, of a request that has ended. Raises what ended it."""
        return client.handle(request_id).get(timeout=WAIT_STEP_S).to_message()

    # What Airflow calls

    def execute(self, context: Any) -> Any:
        """Hand over, or find what an earlier try has handed over; then wait for it."""
        with _told_to_airflow():
            target, client = self._reach()
            task = name_of(context, target.airflow_name)
            with told_as_unavailable():
                served = serving.take(client.redis, task, new_task_id(), str(context["ti"].max_tries))
            self._request_id = request_id = served.request_id
            if served.left is not None:
                self.log.info("the task was cleared: request %s is cancelled", served.left)
                client.handle(served.left).cancel()
            if served.how == "attached":
                self.log.info("request %s was handed over by an earlier try", request_id)
            else:
                self.hand_over(client, request_id, context, served)
                self.log.info("handed over as request %s", request_id)
            self._tell(context, target, request_id)
            if self._ends_soon(client, request_id):
                return self._end(context, target, client, request_id)
        if not self.deferrable:
            return self._wait_here(context, target, client, request_id)
        return self._defer(request_id)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        """Take the outcome, when the trigger has seen the request end."""
        with _told_to_airflow():
            target, client = self._reach()
            self._request_id = request_id = str(event["request_id"])
            self._tell(context, target, request_id)
            if event.get("state") == "unknown":
                raise RequestUnknown(request_id)
            return self._end(context, target, client, request_id)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Any) -> Any:
        """Do as Airflow does, but for a trigger that failed: what was handed over goes on, and is waited for.

        Only a time that is over ends it: then the request is cancelled.
        """
        if next_method != "__fail__":
            return super().resume_execution(next_method, next_kwargs, context)
        with _told_to_airflow():
            target, client = self._reach()
            task = name_of(context, target.airflow_name)
            with told_as_unavailable():
                served = serving.take(client.redis, task, new_task_id(), str(context["ti"].max_tries))
        self._request_id = served.request_id
        words = str((next_kwargs or {}).get("error", ""))
        if served.how == "attached" and "timeout" not in words.lower():
            self.log.warning(
                "the trigger failed (%s): request %s is waited for again", words, served.request_id
            )
            return self._defer(served.request_id)
        self.on_kill()
        return super().resume_execution(next_method, next_kwargs, context)

    def on_kill(self) -> None:
        """Cancel the request: somebody ended the task while a worker had it."""
        if self._request_id is None or self._relay is None:
            return
        try:
            state = self._relay.handle(self._request_id).cancel()
        except BrokerUnavailable as exc:
            self.log.error("request %s could not be cancelled: %s", self._request_id, exc)
        else:
            self.log.info("request %s is asked to be cancelled, it was %s", self._request_id, state)

    # The steps

    def _reach(self) -> tuple[RelayTarget, RelayClient]:
        target = DagrelayHook(self.relay_conn_id).target
        self._relay = client_for(target)
        return target, self._relay

    def _tell(self, context: Any, target: RelayTarget, request_id: str) -> None:
        """Say in Airflow which request it is, and where Flower shows it."""
        self.flower_link = flower_link(target.flower_url, request_id)
        context["ti"].xcom_push(key=REQUEST_ID, value=request_id)
        if self.flower_link:
            context["ti"].xcom_push(key=FLOWER_URL, value=self.flower_link)

    def _ends_soon(self, client: RelayClient, request_id: str) -> bool:
        """Tell whether the request has ended, after a short wait where that is worth it."""
        if self.first_wait_s:
            with suppress(DagrelayError):
                client.handle(request_id).get(timeout=self.first_wait_s)
        found = client.record(request_id)
        return found is not None and found.ended

    def _defer(self, request_id: str) -> NoReturn:
        trigger = self.trigger_class(
            request_id,
            relay_conn_id=self.relay_conn_id,
            end_from_trigger=self.end_from_trigger and self.do_xcom_push and not self.outlets,
        )
        self.defer(trigger=trigger, method_name="execute_complete")
        raise AssertionError  # defer() never returns

    def _wait_here(self, context: Any, target: RelayTarget, client: RelayClient, request_id: str) -> Any:
        """Wait in this process. While Redis is away, go on waiting: the request does so too."""
        away = False
        while True:
            try:
                client.handle(request_id).get(timeout=WAIT_STEP_S)
            except ResultNotReady:
                away = False
                continue
            except BrokerUnavailable as exc:
                if not away:
                    self.log.warning("%s; waiting on", exc)
                away = True
                continue
            except DagrelayError:
                pass  # its end, which is told below
            with _told_to_airflow():
                return self._end(context, target, client, request_id)

    def _end(self, context: Any, target: RelayTarget, client: RelayClient, request_id: str) -> Any:
        """Return the outcome of a request that has ended, or raise how."""
        try:
            return self.outcome(context, client, request_id)
        except ResultExpired:
            # It ended well long ago; whoever asks now is to begin anew.
            with told_as_unavailable():
                serving.forget(client.redis, name_of(context, target.airflow_name), request_id)
            raise


def name_of(context: Any, airflow_name: str) -> str:
    """Return by which name Redis knows a task instance: the same on every try, and in no other Airflow."""
    ti = context["ti"]
    parts = [airflow_name, ti.dag_id, ti.run_id, ti.task_id, ti.map_index]
    return str(uuid.uuid5(_TASKS, json.dumps(parts)))


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


class _told_to_airflow:
    """Turn our errors into Airflow's: into a failure for good where a retry could change nothing."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, InvalidRequest | ConfigurationError):
            raise AirflowFailException(f"{type(exc).__name__}: {exc}") from None
        if isinstance(exc, DagrelayError):
            raise AirflowException(f"{type(exc).__name__}: {exc}") from None
