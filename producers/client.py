"""The one door to Redis: every producer publishes through here, and nothing else in this package does.

What leaves is a Celery task message (protocol 2) as any Celery client writes it, pushed by our own
connection in the same script that begins the request's record. So a host's Celery app, its settings, its
`CELERY_BROKER_URL` and its connections play no part in it, and neither Celery nor kombu is imported
until somebody asks for a signature.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, overload

from redis import BlockingConnectionPool, ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from . import tracing
from .contract import (
    MAX_RESULT_BYTES,
    Asked,
    DagRun,
    JobOutcome,
    PollRequest,
    TriggerRequest,
    conf_problem,
    is_sealed,
    reference_in,
)
from .desk import Desk
from .errors import BrokerUnavailable, ConfGone, ConfigurationError, DagrelayError, InvalidRequest
from .handle import Handle
from .settings import ProducerSettings, read_conf, read_settings
from .stores.claim_check import ClaimChecks, ConfKeys, ConfRules, upload
from .stores.envelope import PRIORITY_SEPARATOR, PRIORITY_STEPS, item_of
from .stores.heard import heard
from .stores.records import Accepted, Record, Records
from .stores.waits import Waits

if TYPE_CHECKING:
    from celery.canvas import Signature


def new_task_id() -> str:
    """Return an id for one accepted request: a random UUID, at half the cost of `str(uuid.uuid4())`."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


class RelayClient:
    """Publishes requests and answers for them; safe for threads, and in a child after a fork.

    Opens no connection before the first call. Raises ConfigurationError, from its constructor, when the
    settings are missing or wrong.
    """

    def __init__(self, settings: ProducerSettings | None = None) -> None:
        self.settings = settings if settings is not None else read_settings()
        self.redis = connect(self.settings)
        self.listening = listen(self.settings)
        """For `Handle.get()`: each waiting thread holds a connection, for which no call must have to wait."""
        self.records = Records(self.redis)
        self.confs = ConfRules(ConfKeys(self.settings.conf_key), self.settings.conf_limit_bytes)
        self.waits = Waits(self.redis)
        """What waits there. Its methods raise what redis-py raises, those of this class BrokerUnavailable."""
        self.dead = Desk(self)
        """What failed for good: to be listed, sent again or discarded."""

    @overload
    def enqueue(self, request: TriggerRequest, **options: Any) -> Handle[DagRun]: ...

    @overload
    def enqueue(self, request: PollRequest, **options: Any) -> Handle[JobOutcome]: ...

    def enqueue(self, request: TriggerRequest | PollRequest, **options: Any) -> Handle[Any]:
        """Hand one request to the workers; return without waiting for them.

        The options are those of `trigger_dag.apply_async`. Raises BrokerUnavailable within about 1 s when
        Redis does not answer. Whether the message arrived is then unknown: send again with the same
        `key`, and there is still one run. Raises ConfGone where the conf is a reference to one that is no
        longer kept: nothing was sent.
        """
        item = self.item(request, **options)
        with told_as_unavailable():
            new = self.records.accept(item)
        # An id that was on record before keeps the run id of that first call: looked up when asked for.
        return Handle(item.task_id, item.dag_run_id or None if new else None, self)

    def enqueue_many(self, requests: Iterable[TriggerRequest | PollRequest]) -> list[Handle[Any]]:
        """Hand many requests to the workers in one pipeline; return a handle for each, in order.

        Raises BrokerUnavailable when the connection breaks: some may then have arrived. Send all of them
        again with the same keys, and there is still one run for each. Raises ConfGone where the conf of one
        is a reference to what is no longer kept: all the others have been accepted.
        """
        handles: list[Handle[Any]] = []
        references: list[str] = []

        def items() -> Iterator[Accepted]:
            for request in requests:
                item = self.item(request)
                handles.append(Handle(item.task_id, item.dag_run_id or None, self))
                references.append(item.reference)
                with told_as_unavailable():
                    upload(self.redis, item.conf)
                yield item._replace(conf=None)  # so that not all of them lie in memory

        batch = self.records.batch(items())
        with told_as_unavailable():
            answers = batch.execute()[1:]
        gone = b"".join(answers).find(b"2")
        if gone >= 0:
            raise ConfGone(references[gone])
        return handles

    def resolve_conf(self, conf: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the real conf of a run: what its conf refers to, else the conf itself; {} for None.

        Raises ConfGone when it is no longer kept, ConfKeyMissing where this client has not the key, and
        BrokerUnavailable.
        """
        with told_as_unavailable():
            return ClaimChecks(self.redis, self.confs.keys).real(None if conf is None else dict(conf))

    def handle(self, task_id: str) -> Handle[Any]:
        """Return a handle for a request that was accepted earlier, here or elsewhere."""
        return Handle(task_id, None, self)

    def record(self, task_id: str) -> Record | None:
        """Return what is on record of a request, or None. Raises BrokerUnavailable."""
        with told_as_unavailable():
            return self.records.get(task_id)

    def wake(self, key: str, observation: Any = None) -> int:
        """Wake the tasks that wait for a key, and hand them what was observed; return how many there are.

        One that is just about to wait reads it as it begins to. `observation` is any JSON; None says: go and
        look yourself. Raises InvalidRequest, and BrokerUnavailable.
        """
        check_observation(observation)
        with told_as_unavailable():
            return sum(self.waits.wake_by_key(key, heard(observation), by=self.settings.client_name))

    def item(
        self,
        request: TriggerRequest | PollRequest,
        *,
        by: str | None = None,
        more: Mapping[str, str] | None = None,
        task_id: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        expires: float | datetime | None = None,
        priority: int = 0,
        link: Any = None,
        link_error: Any = None,
        chain: list[Any] | None = None,
        ignore_result: bool = False,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> Accepted:
        """Return a request as it goes to Redis, with the options of `enqueue`; nothing is sent.

        `by` is who asks, where that is not this client; `more` are further fields of the record. Raises
        InvalidRequest when an option is wrong.
        """
        if not isinstance(request, TriggerRequest | PollRequest):
            raise TypeError(f"a request is a TriggerRequest or a PollRequest, not a {type(request).__name__}")
        now = time.time()
        if task_id is None:
            task_id = new_task_id()
        else:
            _check_task_id(task_id)
        delay_s = _delay_s(now, countdown, eta)
        return item_of(
            request,
            task_id=task_id,
            asked=Asked(at=now, by=by or self.settings.client_name, due=now + delay_s if delay_s else None),
            delay_s=delay_s,
            expires_at=_expires_at(now, expires) if expires is not None else None,
            priority=priority,
            callbacks=_signatures(link, "link"),
            errbacks=_signatures(link_error, "link_error"),
            chain=chain,
            ignore_result=ignore_result,
            trace=tracing.of_call(traceparent, tracestate),
            more=more,
            confs=self.confs,
        )


def connect(settings: ProducerSettings) -> Redis:
    """Return a client with a pool of its own, whose calls end within about 1 s; it connects on first use."""
    pool = BlockingConnectionPool.from_url(
        settings.redis_url,
        max_connections=settings.max_connections,
        timeout=settings.timeout_s,
        **_connection_options(settings),
    )
    return Redis(connection_pool=pool)


def listen(settings: ProducerSettings) -> Redis:
    """Return a client for subscriptions, whose pool has as many connections as there are waiting threads."""
    pool = ConnectionPool.from_url(settings.redis_url, max_connections=2**31, **_connection_options(settings))
    return Redis(connection_pool=pool)


def _connection_options(settings: ProducerSettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "socket_timeout": settings.timeout_s,
        "socket_connect_timeout": settings.timeout_s,
        "health_check_interval": 0,
        # Once again, for a pooled connection that the server has closed meanwhile. It can do no harm:
        # an id that is on record is not queued again.
        "retry": Retry(NoBackoff(), 1),
        "client_name": "dagrelay-producer",
    }
    if not settings.redis_url.startswith("unix"):
        options["socket_keepalive"] = True
    return options


class told_as_unavailable:
    """Turn what redis-py raises into BrokerUnavailable, without the address's password."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, DagrelayError):  # ResultNotReady is a TimeoutError, which is an OSError
            return
        if isinstance(exc, RedisConnectionError | RedisTimeoutError | OSError):
            raise BrokerUnavailable(f"no usable answer ({type(exc).__name__}: {exc})") from exc
        if isinstance(exc, RedisError):  # OOM, READONLY, NOPERM, LOADING: it answered, and did not take it
            raise BrokerUnavailable(f"it refused ({type(exc).__name__}: {exc})") from exc


def _check_task_id(given: str) -> None:
    if not isinstance(given, str) or not 0 < len(given) <= 200 or not given.isprintable():
        raise InvalidRequest("task_id: give 1 to 200 printable characters, or leave it out")


def check_observation(observation: Any) -> None:
    """Raise InvalidRequest for what a woken task could not be handed: it lies in Redis until it is read."""
    problem = conf_problem(observation, "observation")
    if not problem and len(json.dumps(observation, ensure_ascii=False).encode()) > MAX_RESULT_BYTES:
        problem = f"observation is over the limit of {MAX_RESULT_BYTES} bytes as JSON"
    if problem:
        raise InvalidRequest(problem)


def _delay_s(now: float, countdown: float | None, eta: datetime | None) -> float:
    """Return in how many seconds the request is due, 0 for at once."""
    if countdown is not None and eta is not None:
        raise InvalidRequest("countdown and eta: give one of them")
    if eta is not None:
        if not isinstance(eta, datetime) or eta.tzinfo is None:
            raise InvalidRequest("eta: give a datetime with its time zone, e.g. datetime.now(UTC) + …")
        try:
            delay_s = max(0.0, eta.timestamp() - now)
        except (OverflowError, ValueError):  # with its offset it lies before the year 1 or after 9999
            delay_s = 4e9
        if delay_s >= 4e9:
            raise InvalidRequest("eta: is more than a hundred years away")
        return delay_s
    if countdown is None:
        return 0.0
    if isinstance(countdown, bool) or not isinstance(countdown, int | float) or not 0 <= countdown < 4e9:
        raise InvalidRequest("countdown: give seconds from now, 0 or more")
    return float(countdown)


def _expires_at(now: float, expires: float | datetime) -> float:
    if isinstance(expires, datetime):
        if expires.tzinfo is None:
            raise InvalidRequest("expires: give a datetime with its time zone, or seconds from now")
        return expires.timestamp()
    if isinstance(expires, bool) or not isinstance(expires, int | float) or not 0 < expires < 4e9:
        raise InvalidRequest("expires: give seconds from now, or a datetime")
    return now + expires


def _signatures(given: Any, option: str) -> list[Signature[Any]] | None:
    """Return callbacks as they travel in a message: a list of signatures, which are plain dicts."""
    if given is None:
        return None
    several = given if isinstance(given, list | tuple) else [given]
    for signature in several:
        if not isinstance(signature, dict) or not signature.get("task"):
            raise InvalidRequest(f"{option}: give a Celery signature, e.g. my_task.s(), or a list of them")
    return [with_queue(signature) for signature in several] or None


def with_queue(signature: Any, app: Any = None) -> Any:
    """Return a callback with the queue to which its own app sends it, where it names none.

    The worker that sends it knows no other app's routes, nor its default queue: nobody would read it.
    """
    if not isinstance(signature, dict):
        return signature
    app = getattr(signature, "_app", None) or app
    options = signature.get("options") or {}
    if app is None or options.keys() & {"queue", "exchange", "routing_key"}:
        return signature  # of a canvas, this is for all that it has
    kwargs = dict(signature.get("kwargs") or {})
    for part in _PARTS.get(signature.get("task", ""), ()):
        inner: Any = kwargs.get(part)
        several = isinstance(inner, list | tuple)
        kwargs[part] = [with_queue(one, app) for one in inner] if several else with_queue(inner, app)
    if signature.get("task") in _PARTS:
        return {**signature, "kwargs": kwargs}
    queue: Any = None
    with suppress(KeyError):  # a queue that its app does not know, and may not make
        route = app.amqp.router.route({}, signature["task"], signature.get("args") or (), kwargs)
        queue = route.get("queue")
    name = getattr(queue, "name", queue)
    return {**signature, "options": {**options, "queue": name}} if isinstance(name, str) else signature


_PARTS: Final = {
    "celery.chain": ("tasks",),
    "celery.group": ("tasks",),
    "celery.chord": ("header", "body"),
}
"""Where a canvas has its signatures."""


_client: RelayClient | None = None
_lock = threading.Lock()


def configure(*, redis_url: str | None = None, client_name: str | None = None) -> None:
    """Set in code what the environment would give: the Redis of Dagrelay's workers, and who asks.

    Call it at start-up. What is left out comes from `DAGRELAY_REDIS_URL` and `DAGRELAY_CLIENT_NAME`.
    Raises ConfigurationError, naming every mistake.
    """
    global _client
    new = RelayClient(read_settings(redis_url=redis_url, client_name=client_name))
    with _lock:
        old, _client = _client, new
    if old is not None:
        old.redis.close()


def client() -> RelayClient:
    """Return this process's client. Raises ConfigurationError when `DAGRELAY_REDIS_URL` is not set."""
    global _client
    found = _client
    if found is not None:
        return found
    with _lock:
        if _client is None:
            _client = RelayClient()
        return _client


def conf_keys() -> ConfKeys:
    """Return the keys for confs of this process's client, or of the environment where there is none yet.

    Raises ConfigurationError where they are wrong.
    """
    if _client is not None:
        return _client.confs.keys
    mistakes: list[str] = []
    key, _ = read_conf(os.environ, mistakes)
    if mistakes:
        raise ConfigurationError(*mistakes)
    return ConfKeys(key)


def resolve_conf(conf: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the real conf of a run, as `dag_run.conf` or Airflow's API shows it: see `relay_conf` for DAGs.

    A conf that is no reference is returned as it is, and needs no Redis. Raises as the client's method does.
    """
    if reference_in(conf) is None and not is_sealed(conf):
        return {} if conf is None else dict(conf)
    return client().resolve_conf(conf)


__all__ = [
    "PRIORITY_SEPARATOR",
    "PRIORITY_STEPS",
    "ConfigurationError",
    "RelayClient",
    "client",
    "configure",
    "new_task_id",
    "resolve_conf",
]
