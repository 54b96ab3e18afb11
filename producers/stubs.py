"""The tasks as callers see them: Celery's own calling API over the one door in `client.py`."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec

from .client import client
from .contract import (
    POLL_EXTERNAL_JOB,
    TRIGGER_DAG,
    IfExists,
    TriggerRequest,
)
from .errors import InvalidRequest, NotSupportedYet
from .handle import Handle

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature

P = ParamSpec("P")

# Any fixed value will do: it turns the id of a host's task into the id of the request that it makes.
_RELAY_NAMESPACE = uuid.UUID("b7a5c7f2-9b7e-5e0a-8a53-9d2f6a0f4c11")


class TaskStub(Generic[P]):
    """A Celery task that runs elsewhere: `.delay()`, `.apply_async()`, `.s()`, `.si()`, `.adelay()`.

    The arguments are checked here, by the function that it was made from, so a mistake is a TypeError or
    an InvalidRequest at the caller and never a poisoned message.
    """

    def __init__(self, name: str, request: Callable[P, TriggerRequest]) -> None:
        self.name = name
        self.request: Callable[P, TriggerRequest] = request
        """Check the arguments and return them as a `TriggerRequest`, without sending anything."""
        self.__name__, self.__doc__ = request.__name__, request.__doc__
        self.__wrapped__ = request  # what `inspect.signature` and editors read

    def __repr__(self) -> str:
        return f"<{self.name}: use .delay(), .apply_async() or .s()>"

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> Handle:
        """Hand the request to the workers and return at once.

        Raises TypeError or InvalidRequest for what is wrong with the arguments (nothing was sent), and
        BrokerUnavailable within about 1 s when Redis does not take it: send again with the same key.
        """
        return client().enqueue(self.request(*args, **kwargs))

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
    ) -> Handle:
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
            Signatures to send on success and on failure; workers must be able to route them.

        Raises as `delay` does.
        """
        request = self.request(*args, **(kwargs or {}))
        return client().enqueue(
            request,
            task_id=task_id,
            countdown=countdown,
            eta=eta,
            expires=expires,
            priority=priority,
            link=link,
            link_error=link_error,
            ignore_result=ignore_result,
        )

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> Handle:
        """Do as `delay` does, without blocking the event loop."""
        return await asyncio.to_thread(self.delay, *args, **kwargs)

    def delay_many(self, requests: Iterable[TriggerRequest]) -> list[Handle]:
        """Hand many requests to the workers in one pipeline; return a handle for each, in order.

        Raises BrokerUnavailable when the connection breaks, and some may then have arrived: send all of
        them again with the same keys, and there is still one run for each.
        """
        return client().enqueue_many(requests)

    def s(self, *args: P.args, **kwargs: P.kwargs) -> Signature[Any]:
        """Return a signature for a canvas. In a chain, the result of the task before becomes the conf.

        Called by itself (`.delay()`, `.apply_async()`) it goes through our door. Within a canvas of the
        host it is sent by the host's Celery app, whose broker must then be the Redis of Dagrelay's
        workers; where it is another, use `register_relay`.
        """
        return self._signature(False, self.request(*args, **kwargs))

    def si(self, *args: P.args, **kwargs: P.kwargs) -> Signature[Any]:
        """Return an immutable signature: it takes nothing from the task before it."""
        return self._signature(True, self.request(*args, **kwargs))

    def _signature(self, immutable: bool, request: TriggerRequest) -> Signature[Any]:
        from .signatures import signature

        return signature(self, request, immutable=immutable)


def _trigger_dag(
    dag_id: str,
    conf: dict[str, Any] | None = None,
    *,
    key: str | None = None,
    dag_run_id: str | None = None,
    logical_date: datetime | str | None = None,
    run_after: datetime | str | None = None,
    note: str | None = None,
    connection: str = "default",
    if_exists: IfExists = "reuse",
    give_up_after_s: float | None = None,
) -> TriggerRequest:
    """Start one Airflow DAG run; repeated with the same key, it is still one run.

    The arguments are those of `producers.contract.TriggerRequest`, which describes each.
    """
    given: dict[str, Any] = {"dag_id": dag_id}
    if conf is not None:
        given["conf"] = conf
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
    if give_up_after_s is not None:
        given["give_up_after_s"] = give_up_after_s
    return TriggerRequest(**given)


_trigger_dag.__name__ = _trigger_dag.__qualname__ = "trigger_dag"  # what a TypeError calls it

trigger_dag = TaskStub(TRIGGER_DAG, _trigger_dag)


class _PollExternalJob:
    """`poll_external_job` as this release has it: declared by name, and refused with a clear word."""

    name = POLL_EXTERNAL_JOB

    def delay(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise NotSupportedYet; nothing is sent."""
        raise NotSupportedYet(
            "poll_external_job is declared, and not built yet in this release: nothing was sent"
        )

    apply_async = s = si = delay

    async def adelay(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise NotSupportedYet; nothing is sent."""
        self.delay()


poll_external_job = _PollExternalJob()


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
