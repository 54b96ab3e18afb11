"""The tasks as callers see them: Celery's own calling API over the one door in `client.py`."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, cast

from .client import client
from .contract import (
    POLL_EXTERNAL_JOB,
    QUEUE_JOBS,
    QUEUE_TRIGGERS,
    TRIGGER_DAG,
    Call,
    DagRun,
    Find,
    IfExists,
    IfPaused,
    JobOutcome,
    PollRequest,
    Publish,
    Submit,
    TaskInstance,
    TriggerRequest,
    Window,
)
from .errors import InvalidRequest
from .handle import Handle

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature

P = ParamSpec("P")
R = TypeVar("R", TriggerRequest, PollRequest)
T = TypeVar("T")

# Any fixed value will do: it turns the id of a host's task into the id of the request that it makes.
_RELAY_NAMESPACE = uuid.UUID("b7a5c7f2-9b7e-5e0a-8a53-9d2f6a0f4c11")


class TaskStub(Generic[P, R, T]):
    """A Celery task that runs elsewhere: `.delay()`, `.apply_async()`, `.s()`, `.si()`, `.adelay()`.

    `P` are its arguments, `R` the request that they make, `T` what it ends in.

    The arguments are checked here, by the function that it was made from, so a mistake is a TypeError or
    an InvalidRequest at the caller and never a poisoned message.
    """

    def __init__(self, name: str, queue: str, outcome: type[T], request: Callable[P, R]) -> None:
        self.name, self.queue, self.outcome = name, queue, outcome
        self.request: Callable[P, R] = request
        """Check the arguments and return them as a request, without sending anything."""
        self.__name__, self.__doc__ = request.__name__, request.__doc__
        self.__wrapped__: Callable[P, R] = request  # what `inspect.signature` and editors read

    def __repr__(self) -> str:
        return f"<{self.name}: use .delay(), .apply_async() or .s()>"

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> Handle[T]:
        """Hand the request to the workers and return at once.

        Raises TypeError or InvalidRequest for what is wrong with the arguments (nothing was sent), and
        BrokerUnavailable within about 1 s when Redis does not take it: send again with the same key.
        """
        return cast(Handle[T], client().enqueue(self.request(*args, **kwargs)))

    def apply_async(
        self,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        task_id: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        expires: float | datetime | None = None,
        priority: int = 0,
        link: Any = None,
        link_error: Any = None,
        ignore_result: bool = False,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> Handle[T]:
        """Do as `delay` does, with Celery's options.

        countdown, eta
            Seconds from now, or when (aware): the request waits in Redis until then.
        expires
            Seconds from now, or when: a request that no worker has begun by then is cancelled.
        task_id
            An id of your own. An id that is on record already is not accepted a second time: the call then
            returns the handle of the first, whatever its arguments were.
        priority
            0 to 9 as in Celery on Redis: 0 goes first.
        link, link_error
            Signatures to send on success and on failure: to the queue that each names, else to the one to
            which its own app sends it, in the Redis of Dagrelay's workers.
        traceparent, tracestate
            The W3C trace context to which this belongs. Left out, it is that of OpenTelemetry's current span,
            where the caller has one. It goes to the worker, to Airflow and into the run's note.

        Raises as `delay` does.
        """
        request = self.request(*args, **(kwargs or {}))
        handle = client().enqueue(
            request,
            task_id=task_id,
            countdown=countdown,
            eta=eta,
            expires=expires,
            priority=priority,
            link=link,
            link_error=link_error,
            ignore_result=ignore_result,
            traceparent=traceparent,
            tracestate=tracestate,
        )
        return cast(Handle[T], handle)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> Handle[T]:
        """Do as `delay` does, without blocking the event loop."""
        return await asyncio.to_thread(self.delay, *args, **kwargs)

    def delay_many(self, requests: Iterable[R]) -> list[Handle[T]]:
        """Hand many requests to the workers in one pipeline; return a handle for each, in order.

        Raises BrokerUnavailable when the connection breaks, and some may then have arrived: send all of
        them again with the same keys, and there is still one run for each.
        """
        return client().enqueue_many(requests)

    def s(self, *args: P.args, **kwargs: P.kwargs) -> Signature[Any]:
        """Return a signature for a canvas. In a chain, the result of the task before becomes the conf of a
        trigger, and the body of a poll's `submit`.

        Called by itself (`.delay()`, `.apply_async()`) it goes through our door. Within a canvas of the
        host it is sent by the host's Celery app, whose broker must then be the Redis of Dagrelay's
        workers; where it is another, use `register_relay`.
        """
        return self._signature(False, self.request(*args, **kwargs))

    def si(self, *args: P.args, **kwargs: P.kwargs) -> Signature[Any]:
        """Return an immutable signature: it takes nothing from the task before it."""
        return self._signature(True, self.request(*args, **kwargs))

    def _signature(self, immutable: bool, request: TriggerRequest | PollRequest) -> Signature[Any]:
        from .signatures import signature

        return signature(self, request, immutable=immutable)


def _trigger_dag(
    dag_id: str,
    conf: dict[str, Any] | None = None,
    *,
    conf_by: Literal["auto", "value", "reference"] = "auto",
    key: str | None = None,
    dag_run_id: str | None = None,
    logical_date: datetime | str | None = None,
    run_after: datetime | str | None = None,
    note: str | None = None,
    connection: str = "default",
    if_exists: IfExists = "reuse",
    if_paused: IfPaused = "trigger",
    window: Window | None = None,
    give_up_after_s: float | None = None,
    priority: int | None = None,
    wait: bool = False,
    wait_timeout_s: float | None = None,
    result_from: str | None = None,
    stop_run: bool = False,
    on_end: list[str] | None = None,
) -> TriggerRequest:
    """Start one Airflow DAG run; repeated with the same key, it is still one run.

    The arguments are those of `producers.contract.TriggerRequest`, which describes each.
    """
    given: dict[str, Any] = {"dag_id": dag_id}
    if conf is not None:
        given["conf"] = conf
    if conf_by != "auto":
        given["conf_by"] = conf_by
    if key is not None:
        given["key"] = key
    if dag_run_id is not None:
        given["dag_run_id"] = dag_run_id
    if logical_date is not None:
        given["logical_date"] = logical_date
    if run_after is not None:
        given["run_after"] = run_after
    if note is not None:
        given["note"] = note
    if connection != "default":
        given["connection"] = connection
    if if_exists != "reuse":
        given["if_exists"] = if_exists
    if if_paused != "trigger":
        given["if_paused"] = if_paused
    if window is not None:
        given["window"] = window
    if give_up_after_s is not None:
        given["give_up_after_s"] = give_up_after_s
    if priority is not None:
        given["priority"] = priority
    if wait:
        given["wait"] = wait
    if wait_timeout_s is not None:
        given["wait_timeout_s"] = wait_timeout_s
    if result_from is not None:
        given["result_from"] = result_from
    if stop_run:
        given["stop_run"] = stop_run
    if on_end:
        given["on_end"] = on_end
    return TriggerRequest(**given)


_trigger_dag.__name__ = _trigger_dag.__qualname__ = "trigger_dag"  # what a TypeError calls it

trigger_dag = TaskStub(TRIGGER_DAG, QUEUE_TRIGGERS, DagRun, _trigger_dag)


def _poll_external_job(
    service: str,
    path: str | None = None,
    *,
    via: Literal["http", "queue"] = "http",
    message: Any = None,
    url: str | None = None,
    method: Literal["GET", "POST"] = "GET",
    body: Any = None,
    headers: dict[str, str] | None = None,
    query: dict[str, str] | None = None,
    submit: Submit | dict[str, Any] | None = None,
    submit_once: bool = False,
    find: Find | dict[str, Any] | None = None,
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
    heartbeat_s: float | None = None,
    max_errors: int | None = None,
    then: TriggerRequest | dict[str, Any] | None = None,
    on_cancel: Call | Publish | dict[str, Any] | None = None,
    wake_keys: list[str] | None = None,
    on_end: list[str] | None = None,
    task_instance: TaskInstance | dict[str, Any] | None = None,
) -> PollRequest:
    """Start a job on an outside service (with `submit`) and follow it until it ends; waiting costs no worker.

    The arguments are those of `producers.contract.PollRequest`, which describes each.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    if isinstance(then, dict):
        with suppress(InvalidRequest, TypeError):  # which PollRequest tells
            then = TriggerRequest(**then)
    if isinstance(then, TriggerRequest):  # as JSON: an instant becomes text
        given["then"] = TriggerRequest.fields_of(then.to_message())
    return PollRequest(**given)


_poll_external_job.__name__ = _poll_external_job.__qualname__ = "poll_external_job"

poll_external_job = TaskStub(POLL_EXTERNAL_JOB, QUEUE_JOBS, JobOutcome, _poll_external_job)


def register_relay(host_app: Celery, name: str = "dagrelay.trigger_dag") -> Any:
    """Give the host's own Celery app a task that calls `trigger_dag.delay()`; return that task.

    For canvases of a host whose broker is not the Redis of Dagrelay's workers:
    ``chain(prepare.s(), relay.s("daily_sales"))`` runs on the host's workers, sends the request through
    our door, and returns the id of the accepted request. A result of the task before it becomes the conf.
    When the host's broker delivers that task twice, it is still one request.
    """

    @host_app.task(name=name, bind=True, shared=False)
    def relay(self: Any, *args: Any, **kwargs: Any) -> str:
        args, kwargs = conf_from_chain(args, kwargs)
        task_id = str(uuid.uuid5(_RELAY_NAMESPACE, self.request.id)) if self.request.id else None
        return trigger_dag.apply_async(args, kwargs, task_id=task_id).id

    return relay


def body_from_chain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take the result that a chain puts before the arguments as the body of a poll's `submit`.

    Raises InvalidRequest when there is no `submit`, or it has a body already.
    """
    if not args or (isinstance(args[0], str) and "service" not in kwargs):
        return args, kwargs
    result, *rest = args
    if result is None:
        return tuple(rest), kwargs
    submit = kwargs.get("submit")
    if not isinstance(submit, dict) or submit.get("body") is not None:
        raise InvalidRequest(
            "submit: the result of the task before becomes its body: give a submit without one, or use .si()"
        )
    return tuple(rest), {**kwargs, "submit": {**submit, "body": result}}


def conf_from_chain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take the result that a chain puts before the arguments as the conf, if it is an object.

    Raises InvalidRequest when it is something else, or when a conf was given as well.
    """
    if args and not isinstance(args[0], str):
        result, *rest = args
        if result is None:
            return tuple(rest), kwargs
        if not isinstance(result, dict):
            raise InvalidRequest(
                f"conf: the task before returned a {type(result).__name__}; a conf is an object (a dict); "
                "use .si() to take nothing from it"
            )
        if "conf" in kwargs or len(rest) > 1:
            raise InvalidRequest(
                "conf: given, and returned by the task before as well; use .si() to take nothing from it"
            )
        return tuple(rest), {**kwargs, "conf": result}
    return args, kwargs
