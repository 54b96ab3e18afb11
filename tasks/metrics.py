"""A worker's numbers for Prometheus: what there is, and how it is counted. `metrics_page` serves it.

Two kinds, in `METRICS`, which `docs/metrics.md` repeats as a table (a test compares them):

- *Counted here*: what this process has done since its start, by `count_…` and `observe_…`. Where
  `DAGRELAY_METRICS_PORT` is not set these return at once; else each takes one to two microseconds. Sum them
  over all workers.
- *Shared*: how everything stands in Redis (`producers.stores.readings`), read when somebody asks, at most
  once a second. Every worker says the same: take the `max` of them, not the sum.

The children of a pool (`-P processes`) each count in a file of their own, which their parent reads and adds
up (`Tally`). prometheus_client's own way to do that is not taken: it must be chosen by the environment before
the package is first imported, which Celery does by way of Flower, and it keeps a file for every child that
ever was. From it come the formats, the files and the server.

Labels are connections and services of this worker, classes of `producers.errors`, names of tasks and queues,
and the words listed here. What else comes (a message may name any connection) counts as "other", so that
nobody outside can make the number of series grow. No DAG, no key, no id.
"""

from __future__ import annotations

import bisect
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from celery.utils.log import get_logger

from producers import errors
from producers.contract import POLL_EXTERNAL_JOB, TRIGGER_DAG
from producers.stores.dead import EXPIRED
from producers.stores.records import Ended

from .http import HttpRequest, HttpResponse, NoAnswer, reset_after_fork
from .settings import settings

log = get_logger("dagrelay.metrics")

Kind = Literal["counter", "histogram", "gauge"]

REQUEST_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""An Airflow that is well answers in 0.01 to 0.1 s; after 10 s a request is given up by default."""

END_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0)
"""From one trigger on an idle system, 0.05 s, to `give_up_after_s`."""

LATE_S: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, as it is served and documented."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether every worker says the same of it."""
        return self.kind == "gauge" and not self.name.startswith("dagrelay_worker_")


METRICS: Final = tuple(
    Metric(*fields)
    for fields in (
        # Counted here
        (
            "dagrelay_triggers_total",
            "counter",
            ("connection", "outcome", "error"),
            "Triggers that ended: started, exists, cleared, failed or cancelled (with the error), corrected",
        ),
        (
            "dagrelay_trigger_seconds",
            "histogram",
            ("connection",),
            "From when a trigger was due until it was done, of those that do not wait for the run's end",
            END_S,
        ),
        (
            "dagrelay_jobs_total",
            "counter",
            ("service", "outcome", "error"),
            "Jobs on outside services that ended: done, failed or cancelled (with the error)",
        ),
        (
            "dagrelay_webhooks_total",
            "counter",
            ("hook", "outcome"),
            "Attempts to tell a hook of an end: delivered, retried (later), given_up (a dead letter)",
        ),
        (
            "dagrelay_retries_total",
            "counter",
            ("task", "error"),
            "Attempts that were not the end: the task is tried again later",
        ),
        (
            "dagrelay_airflow_request_seconds",
            "histogram",
            ("connection", "kind"),
            "Requests to Airflow: how long they took, answered or not",
            REQUEST_S,
        ),
        (
            "dagrelay_airflow_requests_total",
            "counter",
            ("connection", "kind", "status"),
            "Requests to Airflow by what came of them: 2xx … 5xx, 429, timeout, lost, unreached",
        ),
        (
            "dagrelay_service_request_seconds",
            "histogram",
            ("service", "kind"),
            "Requests to outside services: how long they took, answered or not",
            REQUEST_S,
        ),
        (
            "dagrelay_service_requests_total",
            "counter",
            ("service", "kind", "status"),
            "Requests to outside services by what came of them",
        ),
        (
            "dagrelay_looks_total",
            "counter",
            ("group", "saw"),
            "Looks at what is waited for: again (nothing new), changed, error, wake (its end), late",
        ),
        (
            "dagrelay_look_delay_seconds",
            "histogram",
            ("group",),
            "How long after it was due a look began",
            LATE_S,
        ),
        (
            "dagrelay_messages_taken_back_total",
            "counter",
            (),
            "Messages put back to their queues because the worker that held them had died",
        ),
        (
            "dagrelay_messages_quarantined_total",
            "counter",
            (),
            "Messages put aside because no worker could read or end them",
        ),
        (
            "dagrelay_redis_errors_total",
            "counter",
            ("where",),
            "What Redis did not take or tell: task, looks, connection (lost), metrics",
        ),
        # This process, now
        ("dagrelay_worker_tasks_running", "gauge", (), "Tasks that this worker runs now"),
        ("dagrelay_worker_tasks_max", "gauge", (), "Tasks that this worker can run at the same time"),
        # Shared
        ("dagrelay_redis_up", "gauge", (), "Whether Redis could be read for the shared metrics: 1 or 0"),
        ("dagrelay_redis_used_bytes", "gauge", (), "Memory that Redis uses"),
        ("dagrelay_redis_max_bytes", "gauge", (), "Memory that Redis may use; 0: no limit"),
        ("dagrelay_workers", "gauge", (), "Worker processes whose lease runs"),
        ("dagrelay_queue_messages", "gauge", ("queue",), "Messages in a queue, of all priorities"),
        (
            "dagrelay_queue_oldest_seconds",
            "gauge",
            ("queue",),
            "How long the oldest message in a queue has been due; 0 where there is none or it does not tell",
        ),
        ("dagrelay_messages_held", "gauge", (), "Messages that workers have claimed and not acknowledged"),
        ("dagrelay_waiting", "gauge", ("reason",), "Tasks that wait in Redis: slot, gate, run, job, time"),
        (
            "dagrelay_waiting_overdue_seconds",
            "gauge",
            (),
            "How long the first task whose time has come has not been brought back to its queue",
        ),
        ("dagrelay_looks_followed", "gauge", ("group",), "Tasks that are followed by looks"),
        (
            "dagrelay_looks_overdue_seconds",
            "gauge",
            ("group",),
            "How long the first look that is due has not been begun",
        ),
        ("dagrelay_airflow_in_flight", "gauge", ("connection",), "Slots taken, by all workers together"),
        ("dagrelay_airflow_limit", "gauge", ("connection",), "Slots that there are now: the adaptive limit"),
        ("dagrelay_airflow_ceiling", "gauge", ("connection",), "Slots that there are at the most"),
        ("dagrelay_airflow_line", "gauge", ("connection",), "Tasks that wait in line for a slot"),
        (
            "dagrelay_airflow_line_oldest_seconds",
            "gauge",
            ("connection",),
            "How long the first in line has been due; 0 where there is none",
        ),
        (
            "dagrelay_airflow_breaker",
            "gauge",
            ("connection", "state"),
            "The circuit breaker: 1 for the state that it is in, closed, open or half-open",
        ),
        (
            "dagrelay_airflow_breaker_seconds",
            "gauge",
            ("connection",),
            "How long the breaker has not been closed; 0 where it is",
        ),
        (
            "dagrelay_airflow_held",
            "gauge",
            ("connection", "reason"),
            "1 while a connection is held, for maintenance or for its credentials",
        ),
        ("dagrelay_dead_letters", "gauge", ("error",), "Dead letters that nobody has replayed, by error"),
        (
            "dagrelay_dead_letters_dropped",
            "gauge",
            (),
            "Dead letters that have gone unseen so far, because there were too many",
        ),
        (
            "dagrelay_quarantine_messages",
            "gauge",
            (),
            "Messages in quarantine: no worker could read them, nor put them among the dead letters",
        ),
    )
)

BY_NAME: Final[Mapping[str, Metric]] = {metric.name: metric for metric in METRICS}

OTHER: Final = "other"

MOST_SERIES: Final = 20_000
"""Of one process. The labels that there are never reach it; a mistake of ours is not to fill a Prometheus."""


def _errors(root: type[Exception]) -> frozenset[str]:
    kinds = (kind for kind in vars(errors).values() if isinstance(kind, type))
    return frozenset(kind.__name__ for kind in kinds if issubclass(kind, root))


ERRORS: Final = _errors(errors.DagrelayError) | {EXPIRED}

TRIGGERS_END_BY: Final = (
    _errors(errors.AirflowError)
    | {"ConnectionNotConfigured", "FanOutBroken", "InvalidRequest", "Quarantined"}
) - {"AirflowError", "AirflowUnavailable", "CredentialsRefused"}
"""Served from the start, as 0: Prometheus sees no increase in what begins with 1."""

SAW: Final = ("again", "changed", "error", "wake", "late")
PLACES: Final = ("task", "looks", "connection", "metrics")

Labels = tuple[str, ...]
Key = tuple[str, Labels, int]
"""Name, labels, and of a histogram the bucket; -1 is its sum, or a counter."""


# -- counting


class Tally:
    """What this process has counted. Safe to use from threads; a child after a fork begins anew.

    With a `folder` each child writes its counts into a file there, memory that outlives it; the process that
    made the tally reads them (`totals`). A child holds a lock on its file: one whose lock is free is that of
    a dead child, and is added to the rest and removed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._maker = os.getpid()
        self._begin()
        if folder is not None:
            from prometheus_client.mmap_dict import MmapedDict

            self._kind: Any = MmapedDict
        reset_after_fork(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[Key, float] = {}
        self._file: Any = None
        self._texts: dict[Key, str] = {}
        self._locked = -1

    def after_fork(self) -> None:
        """Begin at nothing, in a file of one's own."""
        self._begin()
        if self.folder is None or os.getpid() == self._maker:
            return
        try:
            made = self.folder / f"{os.getpid()}-{time.monotonic_ns()}.new"
            self._file = self._kind(str(made))
            self._locked = os.open(made, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(self._locked, fcntl.LOCK_EX)
            made.rename(made.with_suffix(".counts"))  # seen only once it is locked
        except OSError as exc:
            self._file = None
            log.warning("what this process does is not counted: %s", exc)

    def add(self, name: str, labels: Labels = (), amount: float = 1.0) -> None:
        """Count something."""
        with self._lock:
            self._add((name, labels, -1), amount)

    def observe(self, name: str, labels: Labels, value: float) -> None:
        """Count a value in its bucket of a histogram."""
        bucket = bisect.bisect_left(BY_NAME[name].buckets, value)
        with self._lock:
            self._add((name, labels, bucket), 1.0)
            self._add((name, labels, -1), value)

    def _add(self, key: Key, amount: float) -> None:
        values = self._values
        if key not in values and len(values) >= MOST_SERIES:
            key = (key[0], (OTHER,) * len(key[1]), key[2])
        value = values[key] = values.get(key, 0.0) + amount
        if self._file is not None:
            text = self._texts.get(key)
            if text is None:
                text = self._texts[key] = json.dumps(key)
            self._file.write_value(text, value, 0.0)

    def totals(self) -> dict[Key, float]:
        """Return all counts, those of children too: name, labels and bucket (-1: the sum, or a counter)."""
        with self._lock:
            total = self._of_children(self.folder) if self.folder is not None else {}
            for key, value in self._values.items():
                total[key] = total.get(key, 0.0) + value
            return total

    def _of_children(self, folder: Path) -> dict[Key, float]:
        """Return what living children have counted; keep what dead ones have."""
        living: dict[Key, float] = {}
        for path in sorted(folder.glob("*.counts")):
            dead = _lock_is_free(path)  # asked first: then nothing comes to it any more
            into = self._values if dead else living
            for key, value in _counts_in(path):
                into[key] = into.get(key, 0.0) + value
            if dead:
                path.unlink(missing_ok=True)
        return living

    def close(self) -> None:
        """Remove the files."""
        if self.folder is not None and os.getpid() == self._maker:
            shutil.rmtree(self.folder, ignore_errors=True)


def _lock_is_free(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _counts_in(path: Path) -> Iterator[tuple[Key, float]]:
    from prometheus_client import mmap_dict

    kept: Any = mmap_dict.MmapedDict
    with suppress(RuntimeError, ValueError):  # read in the midst of growing: the rest is there the next time
        for text, value, *_ in kept.read_all_values_from_file(str(path)):
            name, labels, bucket = json.loads(text)
            yield (name, tuple(labels), bucket), value


tally: Tally | None = None
"""None where no metrics are served: then nothing is counted."""


def count_trigger(connection: str, outcome: str, error: str = "", amount: int = 1) -> None:
    """Count triggers that have ended; `error` is the class that ended them."""
    if tally is not None:
        known = connection if connection in settings().connections else OTHER
        tally.add("dagrelay_triggers_total", (known, outcome, error_label(error)), amount)


def observe_trigger(connection: str, seconds: float) -> None:
    """Note how long after it was due a trigger was done."""
    if tally is not None:
        known = connection if connection in settings().connections else OTHER
        tally.observe("dagrelay_trigger_seconds", (known,), seconds)


def count_started(connection: str, ended: int, asked_at: Sequence[float]) -> None:
    """Count triggers that were started and ended together; `asked_at`: when each was accepted."""
    if tally is None or not ended:
        return
    count_trigger(connection, "started", amount=ended)
    now = time.time()
    for at in asked_at[:ended]:
        observe_trigger(connection, max(0.0, now - at))


def count_job(service: str, outcome: str, error: str = "") -> None:
    """Count a job on an outside service that has ended."""
    if tally is not None:
        known = service if service in settings().services else OTHER
        tally.add("dagrelay_jobs_total", (known, outcome, error_label(error)))


def count_webhook(hook: str, outcome: str) -> None:
    """Count an attempt to tell a hook."""
    if tally is not None:
        tally.add("dagrelay_webhooks_total", (hook if hook in settings().hooks else OTHER, outcome))


def count_retry(task: str, error: str) -> None:
    """Count an attempt that was not the end; `task` is a name of ours."""
    if tally is not None:
        tally.add("dagrelay_retries_total", (task, error_label(error)))


def count_looks(group: str, saw: str, amount: int = 1) -> None:
    """Count looks of a group by what they saw."""
    if tally is not None:
        tally.add("dagrelay_looks_total", (group, saw), amount)


def observe_look(group: str, late_s: float) -> None:
    """Note how late a look began."""
    if tally is not None:
        tally.observe("dagrelay_look_delay_seconds", (group,), late_s)


def count_taken_back(count: int) -> None:
    """Count messages that a dead worker held."""
    if tally is not None:
        tally.add("dagrelay_messages_taken_back_total", (), count)


def count_quarantined() -> None:
    """Count a message that was put aside."""
    if tally is not None:
        tally.add("dagrelay_messages_quarantined_total")


def count_redis_error(where: str) -> None:
    """Count something that Redis did not take or tell."""
    if tally is not None:
        tally.add("dagrelay_redis_errors_total", (where,))


def error_label(name: str) -> str:
    """Return the name of a class of ours, "other" for any other one."""
    return name if not name or name in ERRORS else OTHER


def observe_request(connection: str, kind: str, seconds: float, status: str) -> None:
    """Note one request to an Airflow: which one, how long it took, what came of it."""
    if tally is not None:
        tally.observe("dagrelay_airflow_request_seconds", (connection, kind), seconds)
        tally.add("dagrelay_airflow_requests_total", (connection, kind, status))


def observe_service_request(service: str, kind: str, seconds: float, status: str) -> None:
    """Note one request to an outside service."""
    if tally is not None:
        tally.observe("dagrelay_service_request_seconds", (service, kind), seconds)
        tally.add("dagrelay_service_requests_total", (service, kind, status))


def status_of(answer: HttpResponse | NoAnswer) -> str:
    """Return what came of a request, in one of nine words."""
    if isinstance(answer, NoAnswer):
        if not answer.reached:
            return "unreached"
        return "timeout" if answer.timed_out else "lost"
    return "429" if answer.status == 429 else f"{answer.status // 100}xx"


def kind_of(request: HttpRequest) -> str:
    """Return which question to Airflow this is, in either version of its API."""
    path, _, query = request.path.partition("?")
    tail = path.rpartition("/")[2]
    if path.endswith("/dagRuns"):
        return "trigger" if request.method == "POST" else "find" if query else "list"
    if path.endswith("/dagRuns/list"):
        return "list"
    if tail == "clear":
        return "clear"
    if request.method == "PATCH":
        return "change"
    if "/taskInstances/" in path:
        return "result"
    if "/dagRuns/" in path:
        return "get"
    return "login" if path.startswith("/auth/") else "other"


Send = Callable[[HttpRequest], HttpResponse]


def measured(connection: str, send: Send) -> Send:
    """Return `send` so that each request to an Airflow is noted."""

    def noted(request: HttpRequest) -> HttpResponse:
        if tally is None:
            return send(request)
        began = time.perf_counter()
        try:
            answer = send(request)
        except NoAnswer as exc:
            observe_request(connection, kind_of(request), time.perf_counter() - began, status_of(exc))
            raise
        observe_request(connection, kind_of(request), time.perf_counter() - began, status_of(answer))
        return answer

    return noted


def call_service(service: str, send: Send, request: HttpRequest) -> HttpResponse:
    """Send one request to an outside service, and note it."""
    began = time.perf_counter()
    try:
        answer = send(request)
    except NoAnswer as exc:
        observe_service_request(service, "call", time.perf_counter() - began, status_of(exc))
        raise
    observe_service_request(service, "call", time.perf_counter() - began, status_of(answer))
    return answer


async def look_at_service(
    service: str, send: Callable[[HttpRequest], Awaitable[HttpResponse]], request: HttpRequest
) -> HttpResponse:
    """Send one request of a look to an outside service, and note it."""
    began = time.perf_counter()
    try:
        answer = await send(request)
    except NoAnswer as exc:
        observe_service_request(service, "look", time.perf_counter() - began, status_of(exc))
        raise
    observe_service_request(service, "look", time.perf_counter() - began, status_of(answer))
    return answer


def count_end(state: str, result: Any, ended: Ended, message: Any = None, *, corrected: bool = False) -> None:
    """Count a request that has just ended; `ended` is what its record says.

    `result` is Celery's: the run, or the exception as Celery keeps it. `message`: its arguments, if known.
    `corrected`: it had ended before, its outcome unknown.
    """
    if tally is None:
        return
    error = str(result.get("exc_type", "")) if isinstance(result, dict) and state != "done" else ""
    if ended.task == POLL_EXTERNAL_JOB:
        count_job(ended.service, state, error)
    elif ended.task == TRIGGER_DAG:
        run = result if isinstance(result, dict) else {}
        how = "started" if run.get("created") else "cleared" if run.get("cleared") else "exists"
        if corrected:
            how, error = "corrected", ""
        count_trigger(ended.connection, how if state == "done" else state, error)
        if state == "done" and ended.age_s and isinstance(message, Mapping) and not message.get("wait"):
            observe_trigger(ended.connection, max(0.0, float(ended.age_s) - _delay_s(message)))


def _delay_s(message: Mapping[str, Any]) -> float:
    """Return how long after it was accepted a request was due, as its caller said."""
    asked = message.get("asked")
    at, due = (asked.get("at"), asked.get("due")) if isinstance(asked, Mapping) else (None, None)
    return float(due) - float(at) if isinstance(at, int | float) and isinstance(due, int | float) else 0.0


_FOLDER: Final = "dagrelay-metrics-"


def _remove_left_behind() -> None:
    """Remove the files of workers that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*-*"):
        pid = path.name.removeprefix(_FOLDER).partition("-")[0]
        if pid.isdecimal() and path.stat().st_uid == os.getuid() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


def begin_counting(*, processes: bool) -> Tally:
    """Count from now on; `processes`: children of this process do the work."""
    global tally
    folder = None
    if processes:
        try:
            _remove_left_behind()
            folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
        except OSError as exc:
            log.error("what the processes of the pool do is not counted: %s", exc)
    tally = Tally(folder)
    return tally


def stop_counting() -> None:
    """Count no more, and remove what was written."""
    global tally
    if tally is not None:
        tally.close()
    tally = None
