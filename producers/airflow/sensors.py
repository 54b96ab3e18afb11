"""`ExternalJobSensor`: waits for a job that was started elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar, Final, Literal

from ..client import RelayClient
from ..errors import BrokerUnavailable, InvalidRequest
from ..stores.serving import Served
from .base import RelayOperator, asked_by, left_of, refused_for_good
from .compat import AirflowException, AirflowSensorTimeout, AirflowSkipException, BaseSensorOperator
from .external_job import ExternalJobTrigger, check_when_read, given_in, request_from, take_outcome
from .hook import RelayTarget

_NO_JOB: Final = (
    "path: give request_id, of a request that was handed over elsewhere, or service with path or url, "
    "of a job that runs already"
)


class ExternalJobSensor(RelayOperator, BaseSensorOperator):  # type: ignore[misc]
    """Wait for a job that was started elsewhere, without a worker; return its result, or fail with its words.

    request_id
        The id that `.delay()`, the gateway or another door returned: that request is waited for, and left
        alone when this task is ended.
    service, path, url, job_id, …
        Or a job that runs already: it is followed as `poll_external_job` does without `submit`. When this
        task is ended, nobody follows it any more, and the job goes on.
    timeout
        As of every sensor, for how long it is waited (in seconds or as a timedelta): then the task fails, and
        is not tried again. `soft_fail` has it skipped instead, whatever went wrong with the job. `mode` and
        `poke_interval` have no effect: nothing is poked.

    XComs are those of `ExternalJobOperator`. Of another request than a job's, its outcome is returned.
    """

    template_fields: Sequence[str] = (
        *("request_id", "service", "path", "url", "body", "headers", "query", "job_id", "state", "success"),
        *("failure", "result", "progress", "reason", "interval_s", "timeout_s", "wake_keys", "on_end"),
        "relay_conn_id",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = dict.fromkeys(("body", "headers", "query"), "json")
    ui_color = "#e6f1f2"
    trigger_class = ExternalJobTrigger
    overdue_error = AirflowSensorTimeout

    def __init__(
        self,
        *,
        request_id: str | None = None,
        service: str | None = None,
        path: str | None = None,
        url: str | None = None,
        method: Literal["GET", "POST"] = "GET",
        body: Any = None,
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
        job_id: str | None = None,
        state: str | None = None,
        success: list[str] | None = None,
        failure: list[str] | None = None,
        result: str | None = None,
        progress: str | None = None,
        reason: str | None = None,
        gone: list[int] | None = None,
        interval_s: float | None = None,
        growth: float | None = None,
        max_interval_s: float | None = None,
        jitter: float | None = None,
        timeout_s: float | None = None,
        max_errors: int | None = None,
        wake_keys: list[str] | None = None,
        on_end: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.request_id = request_id
        self.service = service
        self.path = path
        self.url = url
        self.method = method
        self.body = body
        self.headers = headers
        self.query = query
        self.job_id = job_id
        self.state = state
        self.success = success
        self.failure = failure
        self.result = result
        self.progress = progress
        self.reason = reason
        self.gone = gone
        self.interval_s = interval_s
        self.growth = growth
        self.max_interval_s = max_interval_s
        self.jitter = jitter
        self.timeout_s = timeout_s
        self.max_errors = max_errors
        self.wake_keys = wake_keys
        self.on_end = on_end
        with refused_for_good():
            self._check()
        if request_id is not None:
            self.cancel_on_kill = False

    def _check(self) -> None:
        """Raise InvalidRequest for what cannot work, whatever the templates turn out to be."""
        given = {name: value for name, value in given_in(self).items() if name != "method"}
        if self.request_id is None:
            if "service" not in given:
                raise InvalidRequest(_NO_JOB)
            check_when_read(given_in(self))
        elif given:
            raise InvalidRequest(
                f"request_id: leave it out, or {', '.join(given)}: that is of a job to be followed"
            )

    # What Airflow calls

    def execute(self, context: Any) -> Any:
        """Wait for the end."""
        with self._skipping():
            return super().execute(context)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Any) -> Any:
        """Go on after the wait."""
        over = next_method == "__fail__" and "timeout" in str((next_kwargs or {}).get("error", "")).lower()
        with self._skipping():
            try:
                return super().resume_execution(next_method, next_kwargs, context)
            except AirflowSkipException:
                raise
            except AirflowException as exc:
                raise AirflowSensorTimeout(*exc.args) if over else exc from None

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """Have `soft_fail` and `never_fail` say what they say of other sensors."""
        try:
            yield
        except AirflowSkipException:
            raise
        except AirflowException as exc:
            unreached = isinstance(exc.__context__, BrokerUnavailable)  # nothing is known: tried again
            if unreached or not (self.soft_fail or getattr(self, "never_fail", False)):
                raise
            raise AirflowSkipException(str(exc)) from exc

    # The steps

    def hand_over(self, client: RelayClient, request_id: str, context: Any, served: Served) -> None:
        """Have the job followed."""
        client.enqueue(request_from(given_in(self)), task_id=request_id, by=asked_by(context))

    def outcome(self, context: Any, client: RelayClient, request_id: str) -> Any:
        """Return the job's result."""
        return take_outcome(context["ti"], client, request_id)

    def _request_for(self, context: Any, target: RelayTarget, client: RelayClient) -> str:
        if self.request_id is None:
            return super()._request_for(context, target, client)
        if not isinstance(self.request_id, str) or not self.request_id:
            raise InvalidRequest(f"request_id: is {self.request_id!r}, which is no id of a request")
        self._request_id = self.request_id
        return self.request_id

    def _served_by(self, context: Any, target: RelayTarget, client: RelayClient) -> str | None:
        return self.request_id or super()._served_by(context, target, client)

    def _left_s(self) -> float:
        return min(super()._left_s(), left_of(timedelta(seconds=self.timeout), self._began_at))
