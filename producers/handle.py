"""What a caller holds of an accepted request: its id, and the way to its outcome."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any, Generic, cast

from .contract import DagRun, JobOutcome, Outcome
from .errors import (
    DagrelayError,
    RequestCancelled,
    RequestUnknown,
    ResultExpired,
    ResultNotReady,
    error_from,
)
from .stores.records import RESULT_PREFIX, Record

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from .client import RelayClient

    T = TypeVar("T", default=DagRun)  # a plain `Handle` is that of a trigger
else:
    from typing import TypeVar

    T = TypeVar("T")

CHECK_EVERY_S = 1.0
"""A published result may be missed (Pub/Sub keeps nothing): so it is also looked for, this often."""

NOT_ON_RECORD_S = 5.0
"""How long `.get()` waits for an id without a record: a request sent through a host's own Celery canvas
gets its record from the worker."""


class Handle(Generic[T]):
    """One accepted request, which ends in a `T`. Touches Redis only when asked for something."""

    __slots__ = ("_client", "_dag_run_id", "id")

    def __init__(self, task_id: str, dag_run_id: str | None, client: RelayClient) -> None:
        self.id = task_id
        """The task id: what Flower, the logs and the run's note in Airflow show."""
        self._dag_run_id = dag_run_id
        self._client = client

    def __repr__(self) -> str:
        return f"<Handle {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def dag_run_id(self) -> str | None:
        """The id that the run has, or will have, in Airflow; None for an id that is not on record."""
        if self._dag_run_id is None:
            found = self.record()
            self._dag_run_id = found.dag_run_id if found else None
        return self._dag_run_id

    def record(self) -> Record | None:
        """Return what is on record of the request, or None. Raises BrokerUnavailable."""
        return self._client.record(self.id)

    @property
    def state(self) -> str:
        """accepted, waiting, done, failed or cancelled; "unknown" for an id that is not on record."""
        found = self.record()
        return found.state if found else "unknown"

    def ready(self) -> bool:
        """Tell whether the request has ended, in whichever way."""
        found = self.record()
        return found is not None and found.ended

    def successful(self) -> bool:
        """Tell whether the request has ended well."""
        return self.state == "done"

    def get(self, timeout: float | None = None) -> T:
        """Wait for the end and return the outcome, or raise the error that ended the request.

        The outcome of a trigger is its `DagRun`, that of a poll a `JobOutcome`, that of a fan-out a list of
        `Outcome`.

        `timeout` is in seconds; without it, wait as long as it takes. Raises ResultNotReady after the
        timeout (the request goes on), ResultExpired when the result is no longer kept, RequestUnknown for
        an id that was never accepted, BrokerUnavailable when Redis does not answer, and every
        `AirflowError` and `ExternalJobError` of the worker.
        """
        from .client import told_as_unavailable

        deadline = None if timeout is None else time.monotonic() + timeout
        with told_as_unavailable():
            outcome = self._look()
            if outcome is not None:
                return cast(T, outcome_or_raise(outcome))
            started = time.monotonic()
            # The subscription stands before the second look, so an end between the two is not missed.
            with self._client.listening.pubsub(ignore_subscribe_messages=True) as pubsub:
                pubsub.subscribe(RESULT_PREFIX + self.id)
                while True:
                    outcome = self._look()
                    if outcome is not None:
                        return cast(T, outcome_or_raise(outcome))
                    now = time.monotonic()
                    self._raise_if_hopeless(waited_s=now - started)
                    left = CHECK_EVERY_S if deadline is None else min(CHECK_EVERY_S, deadline - now)
                    if left <= 0:
                        raise ResultNotReady(self.id, self.state)
                    _wait_for_message(pubsub, left)

    async def aget(self, timeout: float | None = None) -> T:
        """Do as `get` does, without blocking the event loop."""
        return await asyncio.to_thread(self.get, timeout)

    def cancel(self) -> str:
        """Ask for the request to be cancelled; return the state that it is in, as `state` says it.

        What has ended stays as it is. What waits is ended at once, by a worker, and what lies in a queue as
        soon as a worker takes it. What runs just now is not disturbed: it ends as it would have, unless it
        comes to wait or to try again; then it is cancelled. Afterwards `.get()` raises RequestCancelled. A
        DAG run that exists goes on, unless the request says `stop_run=True`. Raises BrokerUnavailable.

        Of a fan-out nothing more is started, and what waits is cancelled; it then ends with all outcomes.
        """
        from .client import told_as_unavailable
        from .stores.fan_outs import FanOuts

        with told_as_unavailable():
            found = self._client.records.get(self.id)
            if found is not None and found.fan_out == self.id:
                FanOuts(self._client.redis).cancel(self.id, by=self._client.settings.client_name)
                return found.state
            return self._client.waits.cancel(self.id, by=self._client.settings.client_name) or "unknown"

    def history(self) -> list[tuple[float, str]]:
        """Return what happened to the request, beside what its record says: instants (seconds since 1970, by
        Redis' clock) and words. Raises BrokerUnavailable.
        """
        from .client import told_as_unavailable

        with told_as_unavailable():
            return self._client.waits.history(self.id)

    def _look(self) -> dict[str, Any] | None:
        """Return the result as Celery keeps it, if it is an end."""
        raw = self._client.redis.get(RESULT_PREFIX + self.id)
        if raw is None:
            return None
        found = json.loads(raw)
        return found if found.get("status") in ("SUCCESS", "FAILURE", "REVOKED") else None

    def _raise_if_hopeless(self, waited_s: float) -> None:
        """Raise when no result will come: it has expired, or there never was such a request."""
        found = self._client.records.get(self.id)
        if found is None:
            if waited_s >= NOT_ON_RECORD_S:
                raise RequestUnknown(self.id)
        elif found.ended and self._look() is None:  # the second look: it may have ended in between
            raise ResultExpired(self.id, found.state, found.reason or "")


def _wait_for_message(pubsub: Any, left_s: float) -> None:
    """Return when something was published, or after `left_s`."""
    pubsub.get_message(timeout=left_s)


def outcome_or_raise(outcome: dict[str, Any]) -> Any:
    """Return what a Celery result holds (a run, a job's outcome, a list of outcomes), or raise its error."""
    if outcome["status"] == "SUCCESS":
        return _read(outcome.get("result"))
    raise outcome_error(outcome["status"], outcome.get("result"))


def _read(result: Any) -> Any:
    if isinstance(result, dict):
        if "dag_run_id" in result:
            return (Outcome if "id" in result else DagRun).from_message(result)
        if "service" in result:
            return JobOutcome.from_message(result)
    if isinstance(result, list):
        return [_read(one) for one in result]
    raise outcome_error("SUCCESS", result)


def outcome_error(status: str, result: Any) -> DagrelayError:
    """Return the error in a Celery result that is no success."""
    kind, arguments = "TaskFailed", [status, str(result)]
    if isinstance(result, dict):
        kind = str(result.get("exc_type"))
        given = result.get("exc_message")
        arguments = list(given) if isinstance(given, list | tuple) else [str(given)]
    if status == "REVOKED" and kind not in ("OutcomeUnknown", "SubmitUnknown"):  # those: it may exist
        return RequestCancelled(", ".join(str(argument) for argument in arguments))
    return error_from(kind, arguments)
