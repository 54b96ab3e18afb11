"""The one door to Redis: every producer publishes through here, and nothing else in this package does.

What leaves is a Celery task message (protocol 2) as any Celery client writes it, pushed by our own
connection in the same script that begins the request's record. So a host's Celery app, its settings, its
`CELERY_BROKER_URL` and its connections play no part in it, and neither Celery nor kombu is imported
until somebody asks for a signature.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from redis import BlockingConnectionPool, ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from .contract import MAX_RESULT_BYTES, QUEUE_TRIGGERS, TRIGGER_DAG, Asked, TriggerRequest, conf_problem
from .errors import BrokerUnavailable, ConfigurationError, DagrelayError, InvalidRequest
from .handle import Handle
from .settings import ProducerSettings, read_settings
from .stores.records import Accepted, Record, Records
from .stores.waits import Waits

if TYPE_CHECKING:
    from celery.canvas import Signature

PRIORITY_SEPARATOR = "\x06\x16"
"""kombu keeps a priority of a queue in a list of its own: `queue`, `queue\\x06\\x163`, …"""

PRIORITY_STEPS = (0, 3, 6, 9)


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
        self.waits = Waits(self.redis)
        """What waits there. Its methods raise what redis-py raises, those of this class BrokerUnavailable."""

    def enqueue(self, request: TriggerRequest, **options: Any) -> Handle:
        """Hand one request to the workers; return without waiting for them.

        The options are those of `trigger_dag.apply_async`. Raises BrokerUnavailable within about 1 s when
        Redis does not answer. Whether the message arrived is then unknown: send again with the same
        `key`, and there is still one run.
        """
        item = self._item(request, **options)
        with told_as_unavailable():
            new = self.records.accept(item)
        # An id that was on record before keeps the run id of that first call: looked up when asked for.
        return Handle(item.task_id, item.dag_run_id if new else None, self)

    def enqueue_many(self, requests: Iterable[TriggerRequest]) -> list[Handle]:
        """Hand many requests to the workers in one pipeline; return a handle for each, in order.

        Raises BrokerUnavailable when the connection breaks: some may then have arrived. Send all of them
        again with the same keys, and there is still one run for each.
        """
        handles = []

        def items() -> Iterator[Accepted]:
            for request in requests:
                item = self._item(request)
                handles.append(Handle(item.task_id, item.dag_run_id, self))
                yield item

        batch = self.records.batch(items())
        with told_as_unavailable():
            batch.execute()
        return handles

    def handle(self, task_id: str) -> Handle:
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
            return sum(self.waits.wake_by_key(key, observation, by=self.settings.client_name))

    def _item(
        self,
        request: TriggerRequest,
        *,
        task_id: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        expires: float | datetime | None = None,
        priority: int = 0,
        link: Any = None,
        link_error: Any = None,
        ignore_result: bool = False,
    ) -> Accepted:
        """Return a request as it goes to Redis. Raises InvalidRequest when an option is wrong."""
        if not isinstance(request, TriggerRequest):
            raise TypeError(f"a request is a TriggerRequest, not a {type(request).__name__}")
        now = time.time()
        task_id = _task_id(task_id)
        delay_s = _delay_s(now, countdown, eta)
        asked = Asked(at=now, by=self.settings.client_name, due=now + delay_s if delay_s else None)
        run_id = request.run_id_for(task_id)
        message = request.to_message()
        message["asked"] = asked.to_message()
        return Accepted(
            task_id=task_id,
            queue=_queue_key(QUEUE_TRIGGERS, priority),
            message=_envelope(
                task=TRIGGER_DAG,
                task_id=task_id,
                queue=QUEUE_TRIGGERS,
                kwargs=message,
                callbacks=_signatures(link, "link"),
                errbacks=_signatures(link_error, "link_error"),
                kwargsrepr=request.shown_with(run_id),
                eta=_iso(now + delay_s) if delay_s else None,
                expires=_iso(_expires_at(now, expires)) if expires is not None else None,
                priority=priority,
                origin=self.settings.client_name,
                ignore_result=ignore_result,
            ),
            delay_s=delay_s,
            task=TRIGGER_DAG,
            dag_id=request.dag_id,
            dag_run_id=run_id,
            key=request.key or "",
            connection=request.connection,
            by=self.settings.client_name,
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


def _envelope(
    *,
    task: str,
    task_id: str,
    queue: str,
    kwargs: Mapping[str, Any],
    callbacks: list[Signature[Any]] | None,
    errbacks: list[Signature[Any]] | None,
    kwargsrepr: str,
    eta: str | None,
    expires: str | None,
    priority: int,
    origin: str,
    ignore_result: bool,
) -> bytes:
    """Return a Celery protocol 2 message as kombu's Redis transport keeps it.

    Source: "Message Protocol" in Celery's documentation, and `kombu.transport.virtual` for the envelope.
    """
    follow_up = '"chain":null,"chord":null'
    follow_up += f',"callbacks":{_as_json(callbacks)}' if callbacks else ',"callbacks":null'
    follow_up += f',"errbacks":{_as_json(errbacks)}' if errbacks else ',"errbacks":null'
    body = f"[[],{_as_json(kwargs)},{{{follow_up}}}]"
    return (
        _ENVELOPE
        % {
            "body": _quoted(body),
            "task": _quoted(task),
            "id": _quoted(task_id),
            "eta": _quoted(eta) if eta else "null",
            "expires": _quoted(expires) if expires else "null",
            "kwargsrepr": _quoted(kwargsrepr),
            "origin": _quoted(origin),
            "ignore_result": "true" if ignore_result else "false",
            "queue": _quoted(queue),
            "priority": repr(priority),
        }
    ).encode()


_as_json = json.JSONEncoder(allow_nan=False, check_circular=False, separators=(",", ":")).encode
_quoted = json.encoder.encode_basestring_ascii
"""A text as JSON."""

# The envelope as JSON text, its variable parts to be filled in: eight times as fast as to encode it anew.
_ENVELOPE: Final = re.sub(
    r'"(%\(\w+\)s)"',
    r"\1",
    json.dumps(
        {
            "body": "%(body)s",
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {
                "lang": "py",
                "task": "%(task)s",
                "id": "%(id)s",
                "shadow": None,
                "eta": "%(eta)s",
                "expires": "%(expires)s",
                "group": None,
                "group_index": None,
                "retries": 0,
                "timelimit": [None, None],
                "root_id": "%(id)s",
                "parent_id": None,
                "argsrepr": "()",
                "kwargsrepr": "%(kwargsrepr)s",
                "origin": "%(origin)s",
                "ignore_result": "%(ignore_result)s",
            },
            "properties": {
                "correlation_id": "%(id)s",
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "%(queue)s"},
                "priority": "%(priority)s",
                "delivery_tag": "%(id)s",
            },
        }
    ),
)


def check_observation(observation: Any) -> None:
    """Raise InvalidRequest for what a woken task could not be handed: it lies in Redis until it is read."""
    problem = conf_problem(observation, "observation")
    if not problem and len(_as_json(observation).encode()) > MAX_RESULT_BYTES:
        problem = f"observation is over the limit of {MAX_RESULT_BYTES} bytes as JSON"
    if problem:
        raise InvalidRequest(problem)


def _queue_key(queue: str, priority: int) -> str:
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 9:
        raise InvalidRequest("priority: give a whole number from 0 (first) to 9")
    step = max(step for step in PRIORITY_STEPS if step <= priority)
    return f"{queue}{PRIORITY_SEPARATOR}{step}" if step else queue


def _task_id(given: str | None) -> str:
    if given is None:
        return new_task_id()
    if not isinstance(given, str) or not 0 < len(given) <= 200 or not given.isprintable():
        raise InvalidRequest("task_id: give 1 to 200 printable characters, or leave it out")
    return given


def _delay_s(now: float, countdown: float | None, eta: datetime | None) -> float:
    """Return in how many seconds the request is due, 0 for at once."""
    if countdown is not None and eta is not None:
        raise InvalidRequest("countdown and eta: give one of them")
    if eta is not None:
        if not isinstance(eta, datetime) or eta.tzinfo is None:
            raise InvalidRequest("eta: give a datetime with its time zone, e.g. datetime.now(UTC) + …")
        return max(0.0, eta.timestamp() - now)
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


def _iso(instant: float) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=instant)).isoformat()


def _signatures(given: Any, option: str) -> list[Signature[Any]] | None:
    """Return callbacks as they travel in a message: a list of signatures, which are plain dicts."""
    if given is None:
        return None
    several = given if isinstance(given, list | tuple) else [given]
    for signature in several:
        if not isinstance(signature, dict) or not signature.get("task"):
            raise InvalidRequest(f"{option}: give a Celery signature, e.g. my_task.s(), or a list of them")
    return list(several) or None


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


__all__ = ["ConfigurationError", "RelayClient", "client", "configure", "new_task_id"]
