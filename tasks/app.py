"""The Celery app of the workers, and the base of their tasks.

What the base adds to Celery's, for every task of ours:

- Nothing is acknowledged before its successor is in Redis. Celery throws a message away when the retry
  that should follow it cannot be published, and marks a task failed when its end cannot be written; here
  such a message stays unacknowledged, and the transport puts it back to its queue in a moment.
- What Flower and the logs show of the arguments is made again by us for every message, received or
  published: a plain retry would show the conf, and so would a message of somebody else.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import WorkerLostError
from celery import Celery, Task, signals
from celery.app.trace import TraceInfo, trace_ok_t
from celery.exceptions import Reject, Retry
from celery.states import REJECTED
from celery.utils.log import get_logger
from celery.worker.request import Request
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from producers.contract import shown_message
from producers.errors import ConfigurationError, DagrelayError
from producers.stores.records import Records
from producers.stores.waits import Waits

from . import logs, metrics, tracing, waiting
from .event_batches import EventBatches, RelayEvents, tell
from .redis_transport import Channel, Why
from .redis_transport import worker as redis_transport_worker
from .results import NotHandedOver, RecordedBackend
from .settings import settings

if TYPE_CHECKING:
    from redis import Redis

log = get_logger("dagrelay.task")


class RelayRequest(Request):
    """One message in a worker's hands."""

    _failed_by_itself = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shown = self._task.shown(self._args, self._kwargs, self.id)
        self._argsrepr, self._kwargsrepr = "()", shown
        # The trace that logs the outcome reads these.
        self._request_dict["argsrepr"], self._request_dict["kwargsrepr"] = "()", shown
        if self._task.recorded:
            # The end of a request is written with its result: also for a caller who has no use for that.
            self._ignore_result = self._request_dict["ignore_result"] = False

    def reject(self, requeue: bool = False) -> None:
        """Leave a message that is to come back unacknowledged; reject the others as Celery does.

        The transport puts it back in a moment, not at once: what made it fail may still be there.
        """
        if not requeue:
            super().reject(requeue=False)
            return
        if not self.acknowledged:
            self.acknowledged = True
            log.warning("not acknowledged, comes back task_id=%s", self.id)
            begun: Why = "unseen" if self.time_start is None else "begun"
            why: Why = "counted" if self._failed_by_itself else begun
            self._message.channel.qos.give_back(self._message.delivery_tag, why)
            self.send_event("task-rejected", requeue=True)

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """Note whether the message itself may be the reason: such a one is not given back for ever.

        So it may be with what a child of the pool died of.
        """
        exc = exc_info.exception
        if isinstance(exc, ExceptionWithTraceback):
            exc = exc.exc
        died = isinstance(exc, WorkerLostError | SystemExit | KeyboardInterrupt)
        self._failed_by_itself = died or (isinstance(exc, NotHandedOver) and exc.by_itself)
        return super().on_failure(exc_info, *args, **kwargs)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        try:
            self._task.on_revoked(self)
            # Flower takes a state of ours (WAITING) for later than REVOKED, unless there is a retry between.
            tell("task-retried", uuid=self.id)
            super()._announce_revoked(reason, terminated, signum, expired)
        except (NotHandedOver, RedisError) as exc:  # outside a pool, where nobody would catch it
            log.warning("revocation not written task_id=%s: %s", self.id, exc)
            self.reject(requeue=True)


class RelayTask(Task[Any, Any]):
    """The base of our tasks."""

    abstract = True
    Request = "tasks.app:RelayRequest"
    acks_late = True
    max_retries = None  # a deadline ends a request, never a count
    throws = (DagrelayError,)  # told by the line of the outcome, and no traceback makes it clearer
    shared = False
    recorded = True
    """Whether its messages are requests, each with a record of its own, or a worker's own affair."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it. What it could not read from Redis or write there leaves its message unacknowledged."""
        try:
            return self.run(*args, **kwargs)
        except RedisError as exc:
            metrics.count_redis_error("task")
            raise NotHandedOver(f"Redis: {exc}") from exc

    def shown(self, args: Any, kwargs: Any, task_id: str) -> str:
        """Return the arguments as Flower and logs may show them."""
        return shown_message(kwargs) if isinstance(kwargs, dict) else ""

    def on_revoked(self, request: RelayRequest) -> None:
        """Do what a cancelled (or expired) message needs, before its end is written."""

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Publish it, with what may be shown of its arguments and nothing else."""
        shown = self.shown(args, kwargs or {}, options.get("task_id") or "")
        options["argsrepr"], options["kwargsrepr"] = "()", shown
        return super().apply_async(args, kwargs, **options)

    def retry(self, *, countdown: float, exc: Exception | None = None, **options: Any) -> Retry:
        """Publish the next attempt, due in `countdown` seconds, and return the exception to raise.

        Its instant is by Redis' clock, which decides when it is due: this machine's may be wrong by a minute.
        Raises NotHandedOver when Redis does not take it.
        """
        self.request.next_in_s = countdown
        eta = None
        if countdown > 0:
            seconds, microseconds = store_client().time()
            eta = datetime.fromtimestamp(seconds + microseconds / 1e6 + countdown, UTC)
        try:
            return super().retry(countdown=None if eta else 0, eta=eta, exc=exc, throw=False, **options)
        except Reject as exc:
            raise NotHandedOver(f"the retry of {self.request.id} could not be published: {exc}") from exc

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, queue: Any = None, **options: Any
    ) -> Any:
        """Return the running message as it goes on; its trace stays with it, whatever headers are given."""
        if "headers" in options:
            options["headers"] = {**tracing.headers_of(request or self.request), **options["headers"]}
        return super().signature_from_request(request, args, kwargs, queue, **options)

    # Celery's worker sets this on every task; what it sets is wrapped.
    @property
    def __trace__(self) -> Callable[..., Any] | None:
        return self.__dict__.get("_trace")

    @__trace__.setter
    def __trace__(self, tracer: Callable[..., Any] | None) -> None:
        self.__dict__["_trace"] = tracing.traced(self, _keep_unfinished(tracer)) if tracer else None


def _keep_unfinished(tracer: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Celery's tracer so that whatever escapes it leaves the message unacknowledged.

    What escapes it is a write to Redis that failed after the task's own code had ended. The thread pool
    would drop such an exception, and the request with it.
    """

    def trace(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        try:
            return tracer(uuid, args, kwargs, request)
        except MemoryError:
            raise
        except BaseException as exc:
            if not isinstance(exc, Exception) and threading.current_thread() is threading.main_thread():
                raise  # the end of this process, or child of the pool; in a thread it would end nothing
            of_redis = isinstance(exc, RedisError | OperationalError | OSError)
            kept = (
                exc
                if isinstance(exc, NotHandedOver)
                else NotHandedOver(logs.words_of(exc), by_itself=not of_redis)
            )
            log.warning("not written task_id=%s: %s", uuid, kept.reason)
            try:
                raise kept
            except NotHandedOver:
                return trace_ok_t(ExceptionInfo(internal=True), TraceInfo(REJECTED, kept), 0.0, None)

    return trace


def _make_app() -> Celery[Any]:
    try:
        settings()
    except ConfigurationError as exc:
        for mistake in exc.mistakes:
            print(f"dagrelay: {mistake}", file=sys.stderr)  # noqa: T201 - there is no log yet
        raise SystemExit(78) from None  # EX_CONFIG
    # Celery follows these before all that celeryconfig.py says: on a machine that has them for another app, a
    # worker would wait at another Redis than the one that its callers write to.
    for name in ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL", "RESULT_BACKEND"):
        if os.environ.pop(f"CELERY_{name}", None):
            print(  # noqa: T201 - there is no log yet
                f"dagrelay: CELERY_{name} is not followed, DAGRELAY_REDIS_URL is", file=sys.stderr
            )
    made = Celery("dagrelay", task_cls=RelayTask, events=RelayEvents, set_as_current=True)
    made.config_from_object("celeryconfig")
    redis_transport_worker.install(made)
    Channel.park_waiting = staticmethod(waiting.park)
    made.steps["consumer"].add(EventBatches)
    return made


app = _make_app()


def store_client() -> Redis:
    """Return the worker's Redis client for the stores: the result backend's, one pool for the process."""
    return backend().client


def backend() -> RecordedBackend:
    """Return the worker's result backend."""
    return cast(RecordedBackend, app.backend)


def records() -> Records:
    """Return the records in the worker's Redis."""
    return Records(store_client())


def waits() -> Waits:
    """Return what waits in the worker's Redis."""
    return Waits(store_client())


@signals.setup_logging.connect
def _set_up_logging(loglevel: Any = None, **_: Any) -> None:
    """Log to stderr, one line per outcome, as `tasks.logs` has it."""
    level = logging.getLevelNamesMapping()[settings().log_level]
    if isinstance(loglevel, int):  # Celery's option says WARNING when it is not given: what tells more counts
        level = min(level, loglevel)
    logs.set_up(level, settings().log_format)


@signals.celeryd_init.connect
def _log_from_the_start(instance: Any, **_: Any) -> None:
    """Log what Celery warns of before it has logging set up; print no banner where all is to be JSON."""
    _set_up_logging()
    if settings().log_format == "json":
        instance.quiet = True


@signals.celeryd_after_setup.connect
def _refuse_queues_that_nobody_fills(**_: Any) -> None:
    known = {queue.name for queue in app.conf.task_queues}
    if unknown := sorted(set(app.amqp.queues.consume_from) - known):
        print(  # noqa: T201 - there is no log yet
            f"dagrelay: -Q {','.join(unknown)}: the queues are {', '.join(sorted(known))}", file=sys.stderr
        )
        raise SystemExit(78)  # EX_CONFIG


@signals.celeryd_after_setup.connect
def _collect_less_garbage(**_: Any) -> None:
    """Leave what was imported alone, and look at the rest less often: a twentieth of a busy worker's CPU."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@signals.worker_init.connect
def _say_what_is_served(**_: Any) -> None:
    for connection in settings().connections.values():
        log.info("connection id=%s url=%s", connection.id, connection.address)
    if not settings().connections:
        log.error("no connection to any Airflow: set AIRFLOW_CONN_DEFAULT")


def said(exc: BaseException) -> str:
    """Return an error's words where it is ours, and only its class where it is not: it may quote a value."""
    return str(exc) if isinstance(exc, DagrelayError) else type(exc).__name__
