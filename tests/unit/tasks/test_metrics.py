"""What is counted, under which labels, and what Prometheus is told of it. Over HTTP it is in integration."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from redis.exceptions import ConnectionError as RedisConnectionError

from producers.contract import POLL_EXTERNAL_JOB, TRIGGER_DAG, TriggerRequest
from producers.errors import ConfigurationError
from producers.stores.lines import LineState
from producers.stores.readings import Looks, Queue, Readings
from producers.stores.records import Ended
from tasks import metrics, metrics_page
from tasks.airflow import protocol_v1, protocol_v2
from tasks.http import HttpRequest, HttpResponse, NoAnswer
from tasks.metrics import METRICS, Tally
from tasks.metrics_page import Counted, Standing
from tasks.settings import WorkerSettings, read_settings
from tests.scraping import samples

ROOT = Path(__file__).resolve().parents[3]
REDIS = {"DAGRELAY_REDIS_URL": "redis://127.0.0.1:1/0"}
CONF_VALUE = "c4n4ry"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    """A worker with one Airflow and one service."""
    found = read_settings(
        {
            **REDIS,
            "AIRFLOW_CONN_DEFAULT": "http://u:p@127.0.0.1:1",
            "DAGRELAY_SERVICE_TRAIN": "http://127.0.0.1:1",
        }
    )
    monkeypatch.setattr(metrics, "settings", lambda: found)
    monkeypatch.setattr(metrics_page, "settings", lambda: found)
    return found


@pytest.fixture
def tally() -> Iterator[Tally]:
    yield metrics.begin_counting(processes=False)
    metrics.stop_counting()


def page_of(*collectors: Any) -> str:
    registry = CollectorRegistry()
    for one in collectors:
        registry.register(one)
    return generate_latest(registry).decode()


def ended(task: str = TRIGGER_DAG, **more: str) -> Ended:
    fields = dict.fromkeys(Ended._fields, "") | {"task": task, "connection": "default", "age_s": "0.2"}
    return Ended(**fields | more)


# Counting


def test_without_a_port_nothing_is_counted():
    metrics.count_end("done", {"created": True}, ended(), {})
    metrics.observe_request("default", "trigger", 0.1, "2xx")
    assert metrics.tally is None


@pytest.mark.parametrize(
    ("state", "result", "labels"),
    [
        ("done", {"created": True}, 'outcome="started"'),
        ("done", {"created": False}, 'outcome="exists"'),
        ("done", {"created": False, "cleared": True}, 'outcome="cleared"'),
        ("failed", {"exc_type": "DagNotFound"}, 'error="DagNotFound",outcome="failed"'),
        ("failed", {"exc_type": "SomebodysOwn"}, 'error="other",outcome="failed"'),
        ("cancelled", {"exc_type": "OutcomeUnknown"}, 'error="OutcomeUnknown",outcome="cancelled"'),
    ],
)
def test_a_trigger_is_counted_by_how_it_ended(tally, state, result, labels):
    metrics.count_end(state, result, ended(), {"asked": {"at": 1.0}})

    found = samples(page_of(Counted(tally)))
    assert found[f'dagrelay_triggers_total{{connection="default",{labels}}}'] == 1
    assert sum(value for name, value in found.items() if name.startswith("dagrelay_triggers_total")) == 1


def test_an_end_that_is_corrected_is_counted_as_that(tally):
    metrics.count_end("done", {"created": True}, ended(), corrected=True)
    found = samples(page_of(Counted(tally)))
    assert found == {'dagrelay_triggers_total{connection="default",outcome="corrected"}': 1}


def test_a_job_is_counted_by_its_service(tally):
    metrics.count_end("failed", {"exc_type": "SubmitRejected"}, ended(POLL_EXTERNAL_JOB, service="train"))
    assert samples(page_of(Counted(tally))) == {
        'dagrelay_jobs_total{error="SubmitRejected",outcome="failed",service="train"}': 1
    }


def test_what_a_message_names_makes_no_series(tally):
    """Anybody who may enqueue names connections, services and errors as he likes."""
    for number in range(50):
        metrics.count_end("failed", {"exc_type": f"E{number}"}, ended(connection=f"c{number}"))
        metrics.count_end(
            "failed", {"exc_type": f"E{number}"}, ended(POLL_EXTERNAL_JOB, service=f"s{number}")
        )
    assert samples(page_of(Counted(tally))) == {
        'dagrelay_triggers_total{connection="other",error="other",outcome="failed"}': 50,
        'dagrelay_jobs_total{error="other",outcome="failed",service="other"}': 50,
    }


def test_a_mistake_of_ours_does_not_fill_a_prometheus(tally, monkeypatch):
    monkeypatch.setattr(metrics, "MOST_SERIES", 3)
    for number in range(10):
        tally.add("dagrelay_retries_total", (f"tasks.{number}", ""))
    found = samples(page_of(Counted(tally)))
    assert sum(found.values()) == 10
    assert found['dagrelay_retries_total{error="other",task="other"}'] == 7


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ({"asked": {"at": 100.0}}, 90.2),
        ({"asked": {"at": 100.0, "due": 190.0}}, 0.2),
        ({"asked": "odd"}, 90.2),
        ({"wait": True, "asked": {"at": 100.0}}, None),
        (None, None),
    ],
)
def test_the_seconds_of_a_trigger_count_from_when_it_was_due(tally, message, seconds):
    metrics.count_end("done", {"created": True}, ended(age_s="90.2"), message)
    found = samples(page_of(Counted(tally)))
    assert found.get('dagrelay_trigger_seconds_sum{connection="default"}') == pytest.approx(seconds)


def test_a_histogram_adds_up(tally):
    for seconds in (0.001, 0.01, 0.04, 700.0):
        metrics.observe_request("default", "trigger", seconds, "2xx")

    found = samples(page_of(Counted(tally)))
    name, labels = "dagrelay_airflow_request_seconds", 'connection="default",kind="trigger"'
    bounds = ("0.01", "0.05", "30.0", "+Inf")
    bucket = [found.get(f'{name}_bucket{{{labels},le="{bound}"}}') for bound in bounds]
    assert bucket == [2, 3, 3, 4]
    assert found[f"{name}_count{{{labels}}}"] == 4
    assert found[f"{name}_sum{{{labels}}}"] == pytest.approx(700.051)


def test_what_was_not_counted_yet_is_served_as_nothing(tally):
    """Prometheus sees no increase in a counter that begins with 1."""
    page = page_of(Counted(tally))
    assert (
        'dagrelay_triggers_total{connection="default",error="RequestRejected",outcome="failed"} 0.0' in page
    )
    assert 'dagrelay_redis_errors_total{where="task"} 0.0' in page
    assert "dagrelay_messages_taken_back_total 0.0" in page


@pytest.mark.parametrize("protocol", [protocol_v1, protocol_v2])
def test_a_request_is_counted_as_the_question_that_it_is(protocol):
    now = datetime.now(UTC)
    asked = {
        "trigger": protocol.create_run(TriggerRequest(dag_id="d", conf={"a": CONF_VALUE}), "r", ""),
        "get": protocol.get_run("d", "r"),
        "find": protocol.find_by_logical_date("d", now),
        "list": protocol.list_runs(["d"], now, now),
        "clear": protocol.clear_run("d", "r"),
        "change": protocol.set_note("d", "r", "n"),
        "result": protocol.get_xcom("d", "r", "t"),
        "login": HttpRequest("POST", "/auth/token"),
        "other": protocol.ask_version(),
    }
    assert {kind: metrics.kind_of(request) for kind, request in asked.items()} == {
        kind: kind for kind in asked
    }
    assert metrics.kind_of(protocol.fail_run("d", "r")) == "change"
    assert metrics.kind_of(protocol.get_task("d", "r", "t")) == "result"


def test_each_request_to_airflow_is_noted_answered_or_not(tally):
    answers: list[Any] = [
        HttpResponse(200),
        HttpResponse(429),
        HttpResponse(503),
        NoAnswer("no complete answer", True, True),
        NoAnswer("cut", True),
        NoAnswer("refused", False),
    ]

    def send(request: HttpRequest) -> HttpResponse:
        answer = answers.pop(0)
        if isinstance(answer, NoAnswer):
            raise answer
        return answer

    noted = metrics.measured("default", send)
    for _ in range(3):
        noted(HttpRequest("POST", "/api/v2/dags/d/dagRuns"))
    for _ in range(3):
        with pytest.raises(NoAnswer):
            noted(HttpRequest("POST", "/api/v2/dags/d/dagRuns"))

    found = samples(page_of(Counted(tally)))
    assert {
        name.partition("status=")[2]: value
        for name, value in found.items()
        if name.startswith("dagrelay_airflow_requests_total")
    } == {f'"{status}"}}': 1 for status in ("2xx", "429", "5xx", "timeout", "lost", "unreached")}
    assert found['dagrelay_airflow_request_seconds_count{connection="default",kind="trigger"}'] == 6


# Children of a pool


class Child:
    """A forked child that has done something, and stays until it is told to go."""

    def __init__(self, what: Callable[[], None]) -> None:
        ready, done = os.pipe()
        hold, self._let_go = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                what()
                os.write(done, b".")
                os.read(hold, 1)
            finally:
                os._exit(0)
        os.close(done)
        assert os.read(ready, 1) == b"."
        os.close(ready)
        os.close(hold)

    def end(self) -> None:
        os.write(self._let_go, b".")
        os.close(self._let_go)
        os.waitpid(self._pid, 0)


def test_what_children_count_is_added_up_while_they_live_and_after():
    tally = metrics.begin_counting(processes=True)
    try:
        metrics.count_redis_error("task")
        metrics.observe_request("default", "get", 0.2, "2xx")

        def work() -> None:
            metrics.count_redis_error("task")
            metrics.observe_request("default", "get", 0.2, "2xx")

        children = [Child(work), Child(work)]

        def seen() -> tuple[float, float, float]:
            found = samples(page_of(Counted(tally)))
            of_get = 'connection="default",kind="get"'
            return (
                found['dagrelay_redis_errors_total{where="task"}'],
                found[f"dagrelay_airflow_request_seconds_count{{{of_get}}}"],
                round(found[f"dagrelay_airflow_request_seconds_sum{{{of_get}}}"], 6),
            )

        assert seen() == (3, 3, 0.6)
        assert seen() == (3, 3, 0.6)  # not twice
        children[0].end()
        assert seen() == (3, 3, 0.6)
        folder = tally.folder
        assert folder is not None
        assert len(list(folder.iterdir())) == 1  # a pool that replaces its children leaves no heap of files
        children[1].end()
        assert seen() == (3, 3, 0.6)
        assert not list(folder.iterdir())
    finally:
        metrics.stop_counting()
    assert not folder.exists()


# How everything stands


def readings(**given: Any) -> Readings:
    line = LineState(
        connection="default",
        ceiling=8,
        limit=2.5,
        in_flight=2,
        called=1,
        waiting=7,
        oldest_s=12.5,
        breaker="half-open",
        opened_at=990.0,
        held="credentials",
        held_reason="401",
        held_by="a worker",
        held_since=980.0,
        failures=3,
    )
    fields: dict[str, Any] = {
        "at": 1000.0,
        "workers": 3,
        "gone_s": 0.0,
        "held": 5,
        "queues": {"triggers": Queue(4, 3.5), "jobs": Queue(0, None), "looks": Queue(1, None)},
        "parked": 40,
        "late_s": 1.5,
        "gated": 2,
        "looks": {"airflow:default": Looks(10, 0.5), "service:train": Looks(20, 0.0)},
        "lines": {"default": line},
        "dead": 6,
        "dead_by_error": {"RequestRejected": 2, "Expired": 1, "SomebodysOwn": 1, "": 1, "older": 1},
        "dead_dropped": 7,
        "quarantined": 2,
        "used_bytes": 100,
        "most_bytes": 0,
    }
    return Readings(**fields | given)


def test_everybody_says_the_same_of_what_is_shared():
    found = samples(page_of(Standing(readings, lambda: 16)))
    of = 'connection="default"'
    assert found.pop("dagrelay_worker_tasks_max{}") == 16
    assert found == {
        "dagrelay_redis_up{}": 1,
        "dagrelay_redis_used_bytes{}": 100,
        "dagrelay_workers{}": 3,
        'dagrelay_queue_messages{queue="triggers"}': 4,
        'dagrelay_queue_messages{queue="looks"}': 1,
        'dagrelay_queue_oldest_seconds{queue="triggers"}': 3.5,
        "dagrelay_messages_held{}": 5,
        'dagrelay_waiting{reason="slot"}': 7,
        'dagrelay_waiting{reason="run"}': 10,
        'dagrelay_waiting{reason="job"}': 20,
        'dagrelay_waiting{reason="gate"}': 2,
        'dagrelay_waiting{reason="time"}': 1,
        "dagrelay_waiting_overdue_seconds{}": 1.5,
        'dagrelay_looks_followed{group="airflow:default"}': 10,
        'dagrelay_looks_followed{group="service:train"}': 20,
        'dagrelay_looks_overdue_seconds{group="airflow:default"}': 0.5,
        f"dagrelay_airflow_in_flight{{{of}}}": 2,
        f"dagrelay_airflow_limit{{{of}}}": 2.5,
        f"dagrelay_airflow_ceiling{{{of}}}": 8,
        f"dagrelay_airflow_line{{{of}}}": 7,
        f"dagrelay_airflow_line_oldest_seconds{{{of}}}": 12.5,
        f'dagrelay_airflow_breaker{{{of},state="half-open"}}': 1,
        f"dagrelay_airflow_breaker_seconds{{{of}}}": 10,
        f'dagrelay_airflow_held{{{of},reason="credentials"}}': 1,
        'dagrelay_dead_letters{error="RequestRejected"}': 2,
        'dagrelay_dead_letters{error="Expired"}': 1,
        "dagrelay_dead_letters_dropped{}": 7,
        'dagrelay_dead_letters{error="other"}': 2,
        'dagrelay_dead_letters{error="older"}': 1,
        "dagrelay_quarantine_messages{}": 2,
    }


def test_redis_is_read_once_a_second_however_many_ask():
    asked = []

    def ask() -> Readings:
        asked.append(1)
        return readings()

    standing = Standing(ask, lambda: 1)
    for _ in range(5):
        page_of(standing)
    assert len(asked) == 1


def test_while_redis_is_away_the_page_says_so_and_nothing_that_may_be_untrue(tally):
    def ask() -> Readings:
        raise RedisConnectionError("nobody there")

    page = page_of(Standing(ask, lambda: 16), Counted(tally))
    assert "dagrelay_redis_up 0.0" in page
    assert 'dagrelay_redis_errors_total{where="metrics"} 1.0' in page
    assert "dagrelay_workers" not in page
    assert "dagrelay_airflow_limit" not in page


def test_every_metric_is_served_and_none_that_is_not_declared(tally):
    metrics.count_retry("tasks.trigger_dag", "AirflowUnavailable")
    metrics.observe_trigger("default", 1.0)
    metrics.count_job("train", "done")
    metrics.count_webhook("billing", "delivered")
    metrics.observe_request("default", "get", 1.0, "2xx")
    metrics.observe_service_request("train", "look", 1.0, "2xx")
    metrics.count_looks("service:train", "again", 3)
    metrics.observe_look("service:train", 0.1)
    metrics.count_taken_back(2)
    metrics.count_quarantined()
    page = page_of(Counted(tally), Standing(readings, lambda: 1))

    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert families.keys() == {metric.name.removesuffix("_total") for metric in METRICS}
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert family.samples, metric.name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)


# Settings


@pytest.mark.parametrize(
    ("text", "ports"), [("", range(0)), ("9464", range(9464, 9465)), ("9464-9471", range(9464, 9472))]
)
def test_the_port_is_one_or_a_range(text, ports):
    assert read_settings({**REDIS, "DAGRELAY_METRICS_PORT": text}).metrics_ports == ports


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DAGRELAY_METRICS_PORT", "0"),
        ("DAGRELAY_METRICS_PORT", "65536"),
        ("DAGRELAY_METRICS_PORT", "9471-9464"),
        ("DAGRELAY_METRICS_PORT", "9464-9465-9466"),
        ("DAGRELAY_METRICS_PORT", "tcp://10.0.0.1:9464"),  # what Kubernetes sets for a service of that name
        ("DAGRELAY_METRICS_PORT", "９４６４"),
        ("DAGRELAY_METRICS_HOST", "http://0.0.0.0"),
        ("DAGRELAY_METRICS_HOST", "a b"),
    ],
)
def test_a_wrong_setting_is_told_by_its_name(name, value):
    with pytest.raises(ConfigurationError) as caught:
        read_settings({**REDIS, name: value})
    (mistake,) = caught.value.mistakes
    assert mistake.startswith(f"{name} is ")


# The document


def test_the_document_has_every_metric_as_it_is():
    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(dagrelay_\w+)` \| (\w+) \| ([^|]*) \| ([^|]+) \|$", text, re.M)
    told = {(name, kind, tuple(re.findall(r"`(\w+)`", labels)), words) for name, kind, labels, words in rows}
    assert told == {(metric.name, metric.kind, metric.labels, metric.help) for metric in METRICS}
    assert len(rows) == len(METRICS)
