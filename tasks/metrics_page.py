"""The page of a worker's metrics: what `tasks.metrics` counts and what Redis says, as Prometheus reads it."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from celery import bootsteps
from celery.concurrency.prefork import TaskPool as ProcessPool
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from producers.stores.readings import OLDER, Readings, read

from . import metrics
from .app import app, said, store_client
from .metrics import BY_NAME, METRICS, OTHER, PLACES, SAW, TRIGGERS_END_BY, Labels, Tally
from .redis_transport import quarantined
from .redis_transport.hand import taken_back
from .settings import settings

log = get_logger("dagrelay.metrics")

READ_EVERY_S: Final = 1.0
READ_TIMEOUT_S: Final = 2.0

# -- telling


class Counted:
    """What this process (with its children) has counted, as prometheus_client takes it."""

    def __init__(self, source: Tally) -> None:
        self._source = source

    def collect(self) -> Iterator[Family]:
        """Yield all metrics that are counted."""
        found: dict[str, dict[Labels, dict[int, float]]] = {}
        for name, labels in _from_the_start():
            found.setdefault(name, {})[labels] = {-1: 0.0}
        for (name, labels, bucket), value in self._source.totals().items():
            found.setdefault(name, {}).setdefault(labels, {})[bucket] = value
        for metric in METRICS:
            if metric.kind == "counter":
                counter = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
                for labels, values in sorted(found.get(metric.name, {}).items()):
                    counter.add_metric(labels, values.get(-1, 0.0))
                yield counter
            elif metric.kind == "histogram":
                histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
                bounds = [*map(str, metric.buckets), "+Inf"]
                for labels, values in sorted(found.get(metric.name, {}).items()):
                    counts = itertools.accumulate(values.get(i, 0.0) for i in range(len(bounds)))
                    histogram.add_metric(labels, list(zip(bounds, counts, strict=True)), values.get(-1, 0.0))
                yield histogram


def _from_the_start() -> Iterator[tuple[str, Labels]]:
    """Yield the counters that are there before anything was counted."""
    for connection in settings().connections:
        for outcome in ("started", "exists", "cleared", "corrected"):
            yield "dagrelay_triggers_total", (connection, outcome, "")
        yield "dagrelay_triggers_total", (connection, "cancelled", "RequestCancelled")
        for error in sorted(TRIGGERS_END_BY):
            yield "dagrelay_triggers_total", (connection, "failed", error)
        for saw in SAW:
            yield "dagrelay_looks_total", (f"airflow:{connection}", saw)
    for service in settings().services:
        yield "dagrelay_jobs_total", (service, "done", "")
        for saw in SAW:
            yield "dagrelay_looks_total", (f"service:{service}", saw)
    for place in PLACES:
        yield "dagrelay_redis_errors_total", (place,)
    yield "dagrelay_messages_taken_back_total", ()
    yield "dagrelay_messages_quarantined_total", ()


class Standing:
    """How everything stands: in Redis, and in this process."""

    def __init__(self, ask: Callable[[], Readings], most_tasks: Callable[[], int]) -> None:
        self._ask, self._most_tasks = ask, most_tasks
        self._lock = threading.Lock()
        self._readings: Readings | None = None
        self._asked_at = float("-inf")

    def readings(self) -> Readings | None:
        """Return what was read within the last second, None where Redis did not tell."""
        with self._lock:  # those who ask at the same time share one answer
            if time.monotonic() - self._asked_at >= READ_EVERY_S:
                try:
                    self._readings = self._ask()
                except (RedisError, OSError, ValueError) as exc:
                    self._readings = None
                    metrics.count_redis_error("metrics")
                    log.warning("the shared metrics could not be read: %s", said(exc))
                self._asked_at = time.monotonic()
            return self._readings

    def collect(self) -> Iterator[Family]:
        """Yield all gauges; of the shared ones only `dagrelay_redis_up` where Redis does not tell."""
        running = float(len(worker_state.active_requests))
        yield _gauge("dagrelay_worker_tasks_running", {(): running})
        yield _gauge("dagrelay_worker_tasks_max", {(): float(self._most_tasks())})
        found = self.readings()
        yield _gauge("dagrelay_redis_up", {(): float(found is not None)})
        if found is not None:
            for name, values in shared(found).items():
                yield _gauge(name, values)


def _gauge(name: str, values: Mapping[Labels, float]) -> GaugeMetricFamily:
    metric = BY_NAME[name]
    family = GaugeMetricFamily(name, metric.help, labels=metric.labels)
    for labels, value in sorted(values.items()):
        family.add_metric(labels, value)
    return family


def shared(found: Readings) -> dict[str, dict[Labels, float]]:
    """Return the shared metrics, but for `dagrelay_redis_up`: by name, then by labels."""
    lines = found.lines.values()
    dead: dict[Labels, float] = {}
    for error, count in found.dead_by_error.items():
        name = error if error == OLDER else metrics.error_label(error) or OTHER
        dead[name,] = dead.get((name,), 0.0) + count
    return {
        "dagrelay_redis_used_bytes": {(): float(found.used_bytes)},
        "dagrelay_redis_max_bytes": {(): float(found.most_bytes)},
        "dagrelay_workers": {(): float(found.workers)},
        "dagrelay_queue_messages": {(name,): float(one.messages) for name, one in found.queues.items()},
        "dagrelay_queue_oldest_seconds": {(name,): one.oldest_s or 0.0 for name, one in found.queues.items()},
        "dagrelay_messages_held": {(): float(found.held)},
        "dagrelay_waiting": {(reason,): float(count) for reason, count in found.waiting.items()},
        "dagrelay_waiting_overdue_seconds": {(): found.late_s},
        "dagrelay_looks_followed": {(group,): float(one.followed) for group, one in found.looks.items()},
        "dagrelay_looks_overdue_seconds": {(group,): one.late_s for group, one in found.looks.items()},
        "dagrelay_airflow_in_flight": {(line.connection,): float(line.in_flight) for line in lines},
        "dagrelay_airflow_limit": {(line.connection,): line.limit for line in lines},
        "dagrelay_airflow_ceiling": {(line.connection,): float(line.ceiling) for line in lines},
        "dagrelay_airflow_line": {(line.connection,): float(line.waiting) for line in lines},
        "dagrelay_airflow_line_oldest_seconds": {
            (line.connection,): max(0.0, line.oldest_s or 0.0) for line in lines
        },
        "dagrelay_airflow_breaker": {
            (line.connection, state): float(line.breaker == state)
            for line in lines
            for state in ("closed", "open", "half-open")
        },
        "dagrelay_airflow_breaker_seconds": {
            (line.connection,): max(0.0, found.at - line.opened_at) if line.opened_at else 0.0
            for line in lines
        },
        "dagrelay_airflow_held": {
            (line.connection, reason): float(line.held == reason)
            for line in lines
            for reason in ("maintenance", "credentials")
        },
        "dagrelay_dead_letters": dead or {(OTHER,): 0.0},
        "dagrelay_dead_letters_dropped": {(): float(found.dead_dropped)},
        "dagrelay_quarantine_messages": {(): float(found.quarantined)},
    }


def client_for_reading() -> Redis:
    """Return a client that gives up soon: a scrape has ten seconds, and others wait behind it."""
    pool = store_client().connection_pool
    options = pool.connection_kwargs | {
        "socket_timeout": READ_TIMEOUT_S,
        "socket_connect_timeout": READ_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_timeout": False,
    }
    return Redis(connection_pool=ConnectionPool(connection_class=pool.connection_class, **options))


class Serve(bootsteps.StartStopStep):
    """Counts, and serves the metrics, where there is a port for them."""

    requires = ("celery.worker.components:Pool",)
    label = "Metrics"

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._server: Any = None
        # Before the pool forks its first child.
        self._tally = metrics.begin_counting(processes=issubclass(worker.pool_cls, ProcessPool))
        taken_back.connect(_on_taken_back)
        quarantined.connect(_on_quarantined)

    def start(self, worker: Any) -> None:
        client = client_for_reading()
        registry = CollectorRegistry()
        registry.register(Standing(lambda: read(client), lambda: worker.pool.num_processes))
        registry.register(Counted(self._tally))  # after that: what could not be read is counted
        ProcessCollector(registry=registry)
        self._server = serve(registry, settings().metrics_host, settings().metrics_ports)

    def stop(self, worker: Any) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        metrics.stop_counting()

    def terminate(self, worker: Any) -> None:
        self.stop(worker)


class Connected(bootsteps.StartStopStep):
    """Counts how often the connection to Redis was lost and made again."""

    requires = ("celery.worker.consumer.connection:Connection",)
    label = "Connected"

    def start(self, consumer: Any) -> None:
        if consumer.restart_count:  # 0 at the first time
            metrics.count_redis_error("connection")


def _on_taken_back(count: int, **_: Any) -> None:
    metrics.count_taken_back(count)


def _on_quarantined(**_: Any) -> None:
    metrics.count_quarantined()


def serve(registry: CollectorRegistry, host: str, ports: Sequence[int]) -> Any:
    """Serve on the first port that is free; return the server, or None where there is none."""
    reason = ""
    for port in ports:
        try:
            server, _ = start_http_server(port, host, registry)
        except OSError as exc:  # in use, or no address of this machine
            reason = exc.strerror or type(exc).__name__
            continue
        socket = server.socket
        # A child of the pool would keep the port after its parent's end.
        os.register_at_fork(after_in_child=socket.close)
        log.info("metrics are served on http://%s:%d/metrics", host, port)
        return server
    several = f"s {ports[0]}-{ports[-1]}" if len(ports) > 1 else f" {ports[0]}"
    log.error(
        "no metrics are served, this worker goes on without: DAGRELAY_METRICS_PORT: port%s on %s: %s; each "
        "worker on a machine needs a port of its own: a range such as %d-%d gives it the first that is free",
        several,
        host,
        reason,
        ports[0],
        ports[0] + 7,
    )
    return None


app.steps["worker"].add(Serve)
app.steps["consumer"].add(Connected)
