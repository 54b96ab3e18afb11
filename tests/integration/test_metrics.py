"""The metrics of real workers: scraped, and compared with what was done."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from local import prometheus
from local.process import Process, free_port, port_free
from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import PollRequest, TriggerRequest
from producers.errors import DagrelayError
from producers.fan_out import fan_out
from producers.stores.lines import Lines
from tests.fake_airflow import FakeAirflow
from tests.fake_service import FakeService
from tests.integration.test_trigger import until
from tests.parts import need
from tests.scraping import Samples, of, page, samples, scrape_until
from tests.standing import stand_still
from tests.unit.test_monitoring import dashboard_expressions
from tests.worker import Worker

TRIGGERS, REQUESTS = "dagrelay_triggers_total", "dagrelay_airflow_requests_total"
DEFAULT = 'connection="default"'
CONF_VALUE, DAG_ID, KEY = "c4n4ry-conf", "c4n4ry-dag", "c4n4ry-key"

Start = Callable[..., tuple[Worker, int]]


@pytest.fixture
def start(valkey: Valkey, airflow: FakeAirflow, tmp_path: Path) -> Iterator[Start]:
    """Start a worker that serves its metrics; return it with its port."""
    with ExitStack() as stack:

        def begin(name: str = "w1", *options: str, extras: str = "", **env: str) -> tuple[Worker, int]:
            port = free_port()
            env = {"DAGRELAY_METRICS_PORT": str(port), "DAGRELAY_METRICS_HOST": "127.0.0.1", **env}
            worker = Worker(
                valkey.url,
                tmp_path,
                name=name,
                options=options,
                connections={"default": f"{airflow.conn_uri}/?read_timeout_s=1{extras}"},
                DAGRELAY_RETRY_CAP_S="0.3",
                DAGRELAY_MISSING_GRACE_S="0.5",
                **env,
            )
            return stack.enter_context(worker), port

        yield begin


def end_of(relay: RelayClient, **request: Any) -> str:
    """Have a request done; return how it ended: its class of error, or ""."""
    try:
        relay.enqueue(TriggerRequest(**request)).get(timeout=60)
    except DagrelayError as exc:
        return type(exc).__name__
    return ""


def two_free_ports() -> tuple[int, int]:
    """Two neighbours, for a range."""
    while True:
        port = free_port()
        if port_free(port + 1):
            return port, port + 1


def ended(found: Samples) -> float:
    return sum(of(found, TRIGGERS).values())


# -P processes: children that are replaced, so that what dead ones have counted must stay.
@pytest.mark.parametrize(
    "pool", [("-c", "4"), ("-P", "processes", "-c", "2", "--max-tasks-per-child", "3"), ("-P", "solo")]
)
def test_what_was_done_is_counted_once_in_every_pool(start, relay, airflow, pool):
    _, port = start("w1", *pool)
    airflow.rejecting["bad"] = (400, {"detail": "no"})
    # The first attempt of each run of this one is refused for the time being.
    airflow.fault = lambda number, dag_id, run_id: (
        "503" if dag_id == "busy" and airflow.posts[dag_id, run_id] == 1 else "answer"
    )

    for number in range(8):
        assert end_of(relay, dag_id="good", conf={"a": number}) == ""
    assert end_of(relay, dag_id="good", conf={"a": 1}, key="k") == ""
    assert end_of(relay, dag_id="good", conf={"a": 1}, key="k") == ""  # its run is there
    assert end_of(relay, dag_id="good", conf={"a": 2}, key="k") == "RunConflict"
    assert end_of(relay, dag_id="bad") == "RequestRejected"
    assert end_of(relay, dag_id="busy") == ""

    found = scrape_until(port, lambda found: ended(found) == 13)
    assert of(found, TRIGGERS) == {
        'connection="default",outcome="started"': 10,
        'connection="default",outcome="exists"': 1,
        'connection="default",error="RunConflict",outcome="failed"': 1,
        'connection="default",error="RequestRejected",outcome="failed"': 1,
    }
    assert of(found, "dagrelay_trigger_seconds_count") == {'connection="default"': 11}
    by_kind: dict[str, float] = {}
    for labels, value in of(found, REQUESTS).items():
        kind = labels.split('kind="')[1].partition('"')[0]
        by_kind[kind] = by_kind.get(kind, 0) + value
    assert by_kind["trigger"] == sum(airflow.posts.values())
    assert by_kind["get"] == sum(airflow.gets.values())
    assert of(found, REQUESTS)['connection="default",kind="trigger",status="5xx"'] == 1
    assert sum(of(found, "dagrelay_airflow_request_seconds_count").values()) == sum(by_kind.values())
    again = scrape_until(port, lambda found: len(of(found, "dagrelay_dead_letters")) == 2)
    assert of(again, "dagrelay_dead_letters") == {'error="RunConflict"': 1, 'error="RequestRejected"': 1}
    assert of(again, TRIGGERS) == of(found, TRIGGERS)


def test_a_line_that_is_drained_is_counted_too(start, relay, airflow):
    """What ends in bulk, without a Celery task for each."""
    airflow.delay_s = 0.3
    _, port = start(extras="&max_in_flight=2")
    handles = relay.enqueue_many(TriggerRequest(dag_id="good") for _ in range(300))
    # The line is there before anybody has asked for a slot: a backlog goes into it as it is claimed.
    found = scrape_until(port, lambda found: of(found, "dagrelay_airflow_in_flight").get(DEFAULT, 0) > 0)
    assert of(found, "dagrelay_waiting")['reason="slot"'] == of(found, "dagrelay_airflow_line")[DEFAULT]
    assert of(found, "dagrelay_airflow_in_flight")[DEFAULT] <= of(found, "dagrelay_airflow_limit")[DEFAULT]
    airflow.delay_s = 0.0
    for handle in handles:
        handle.get(timeout=60)
    found = scrape_until(port, lambda found: ended(found) == 300)
    assert of(found, TRIGGERS) == {f'{DEFAULT},outcome="started"': 300}
    assert of(found, "dagrelay_trigger_seconds_count") == {DEFAULT: 300}
    assert of(found, REQUESTS)[f'{DEFAULT},kind="trigger",status="2xx"'] == sum(airflow.posts.values()) == 300


def test_fan_outs_jobs_and_looks_are_counted(start, relay, airflow):
    with FakeService() as service:
        _, port = start(DAGRELAY_SERVICE_TRAIN=service.variable)
        handle = fan_out([TriggerRequest(dag_id="good") for _ in range(30)], relay=relay)
        assert len(handle.get(timeout=60)) == 30

        submit = {"path": "/jobs", "body": {"ref": "{reference}"}}
        job = PollRequest(service="train", path="/jobs/{job_id}", submit=submit, interval_s=0.2)
        following = relay.enqueue(job)
        waiting = relay.enqueue(TriggerRequest(dag_id="good", wait=True))
        # At the "time" is the watch of the fan-out, which looks once more in a minute.
        waiting_by = {'reason="run"': 1, 'reason="job"': 1, 'reason="time"': 1}
        found = scrape_until(
            port,
            lambda found: (
                of(found, "dagrelay_waiting") == waiting_by and len(of(found, "dagrelay_looks_total")) >= 2
            ),
        )
        followed = of(found, "dagrelay_looks_followed")
        assert followed == {'group="airflow:default"': 1, 'group="service:train"': 1}

        (job_id,) = service.jobs
        service.jobs[job_id]["state"] = "done"
        airflow.runs["good", f"relay__{waiting.id}"]["state"] = "success"
        following.get(timeout=60)
        waiting.get(timeout=60)

        found = scrape_until(port, lambda found: ended(found) == 31 and "dagrelay_jobs_total" in str(found))
    assert of(found, TRIGGERS) == {'connection="default",outcome="started"': 31}
    assert of(found, "dagrelay_jobs_total") == {'outcome="done",service="train"': 1}
    looks = of(found, "dagrelay_looks_total")
    assert looks['group="service:train",saw="wake"'] == 1
    assert looks['group="airflow:default",saw="wake"'] == 1
    delays = of(found, "dagrelay_look_delay_seconds_count")
    assert delays['group="service:train"'] == sum(service.looks.values())
    calls = of(found, "dagrelay_service_requests_total")
    assert calls['kind="call",service="train",status="2xx"'] == len(service.posts)
    assert calls['kind="look",service="train",status="2xx"'] == sum(service.looks.values())
    assert of(found, REQUESTS)['connection="default",kind="trigger",status="2xx"'] == 31


def test_the_page_names_no_dag_no_key_no_id_and_no_conf(start, relay):
    _, port = start()
    handle = relay.enqueue(TriggerRequest(dag_id=DAG_ID, conf={"a": CONF_VALUE}, key=KEY))
    handle.get(timeout=60)
    text = page(port)
    assert of(samples(text), TRIGGERS)
    for word in (DAG_ID, CONF_VALUE, KEY, handle.id, "adminpw", "a-token"):
        assert word not in text


def test_a_port_that_is_taken_is_told_and_the_worker_works_on(start, relay):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        worker, _ = start(DAGRELAY_METRICS_PORT=str(port))
        told = [line for line in worker.text().splitlines() if "DAGRELAY_METRICS_PORT" in line]
        assert len(told) == 1
        assert str(port) in told[0]
        assert "a range such as" in told[0]
        assert end_of(relay, dag_id="good") == ""


def test_of_a_range_each_worker_takes_the_first_free_port_and_all_say_the_same(start, relay):
    ports = two_free_ports()
    given = {"DAGRELAY_METRICS_PORT": f"{ports[0]}-{ports[1]}"}
    start("w1", **given)
    start("w2", **given)
    third, _ = start("w3", **given)
    until(lambda: "no metrics are served" in third.text())

    Lines(relay.redis).hold("default", "test")
    pages = [scrape_until(each, lambda found: found.get("dagrelay_workers{}") == 3) for each in ports]
    for name in ("dagrelay_airflow_held", "dagrelay_waiting", "dagrelay_redis_up"):
        assert of(pages[0], name) == of(pages[1], name)
    assert of(pages[0], "dagrelay_airflow_held") == {'connection="default",reason="maintenance"': 1}


def test_what_lies_and_waits_is_told_with_its_age(start, relay, airflow):
    """By a worker that serves none of it."""
    _, port = start("w1", "-Q", "looks")
    began = time.monotonic()
    for number in range(5):
        relay.enqueue(TriggerRequest(dag_id="good"), priority=3 * (number % 3))
    relay.enqueue(TriggerRequest(dag_id="good"), countdown=600)
    found = scrape_until(
        port, lambda found: of(found, "dagrelay_queue_oldest_seconds").get('queue="triggers"', 0) >= 2
    )
    assert of(found, "dagrelay_queue_messages") == {'queue="triggers"': 6}  # nobody has parked the last yet
    age_s = of(found, "dagrelay_queue_oldest_seconds")['queue="triggers"']
    assert age_s <= time.monotonic() - began + 1

    start("w2")
    found = scrape_until(
        port,
        lambda found: (
            not of(found, "dagrelay_queue_messages")
            and of(found, "dagrelay_waiting") == {'reason="time"': 1}
            and found["dagrelay_workers{}"] == 2
        ),
    )
    assert not of(found, "dagrelay_queue_oldest_seconds")


def test_what_a_dead_worker_held_is_counted_as_taken_back(start, relay, airflow):
    airflow.fault = lambda number, dag_id, run_id: "late"
    airflow.late_s = 0.9
    dying, _ = start("w1", "-c", "4")
    for _ in range(4):
        relay.enqueue(TriggerRequest(dag_id="good"))
    while airflow.in_flight < 2:
        time.sleep(0.01)
    dying.process.kill()
    airflow.fault = lambda number, dag_id, run_id: "answer"
    _, port = start("w2")
    found = scrape_until(port, lambda found: ended(found) == 4, timeout_s=60)
    assert 1 <= found["dagrelay_messages_taken_back_total{}"] <= 4


@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_while_redis_is_away_the_page_says_so_and_comes_back(start, valkey, relay, how):
    _, port = start()
    assert end_of(relay, dag_id="good") == ""
    counted = of(scrape_until(port, lambda found: ended(found) == 1), TRIGGERS)
    valkey.stop() if how == "stopped" else stand_still(valkey.pid)
    try:
        # Each page within the ten seconds that Prometheus waits for one: `page` waits no longer.
        found = scrape_until(port, lambda found: "dagrelay_redis_up{}" not in found)
        assert of(found, TRIGGERS) == counted  # what was counted here is known
        assert "dagrelay_workers{}" not in found
        assert of(found, "dagrelay_redis_errors_total")['where="metrics"'] >= 1
        assert "dagrelay_redis_up 0.0" in page(port)
    finally:
        valkey.start() if how == "stopped" else os.kill(valkey.pid, signal.SIGCONT)

    def back(found: Samples) -> bool:
        lost = of(found, "dagrelay_redis_errors_total").get('where="connection"', 0)
        return found.get("dagrelay_redis_up{}") == 1 and (lost >= 1 or how == "frozen")

    scrape_until(port, back, timeout_s=60)
    assert end_of(relay, dag_id="good") == ""


# A real Prometheus


def ask(port: int, expr: str) -> list[Any]:
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": expr})
    with urllib.request.urlopen(url, timeout=10) as answer:
        found = json.loads(answer.read())
    assert found["status"] == "success", expr
    return list(found["data"]["result"])


def test_a_real_prometheus_can_answer_every_question_of_the_dashboard(start, relay, airflow, tmp_path):
    program = prometheus.ensure("prometheus")
    need("prometheus", program is not None, prometheus.HOW_TO_GET_IT)
    airflow.rejecting["bad"] = (400, {"detail": "no"})
    with FakeService() as service:
        _, worker_port = start(DAGRELAY_SERVICE_TRAIN=service.variable)
        configuration = tmp_path / "prometheus.yml"
        configuration.write_text(
            "global: {scrape_interval: 1s}\n"
            "scrape_configs:\n"
            f"  - {{job_name: dagrelay, static_configs: [{{targets: ['127.0.0.1:{worker_port}']}}]}}\n"
        )
        port = free_port()
        argv = [
            program,
            f"--config.file={configuration}",
            f"--storage.tsdb.path={tmp_path}/tsdb",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        server = Process(argv, log=tmp_path / "prometheus.log", name="prometheus")
        try:
            server.wait_until(lambda: answers(port), timeout_s=30, what="answering")
            submit = {"path": "/jobs", "body": {"ref": "{reference}"}}
            job = PollRequest(service="train", path="/jobs/{job_id}", submit=submit, interval_s=0.2)
            following = relay.enqueue(job)
            # One scrape with what begins at nothing, and one when something has been done.
            server.wait_until(lambda: bool(ask(port, "up == 1")), timeout_s=30, what="scraping")
            assert end_of(relay, dag_id="good") == ""
            assert end_of(relay, dag_id="bad") == "RequestRejected"
            server.wait_until(lambda: bool(service.jobs), timeout_s=30, what="asking the service")
            next(iter(service.jobs.values()))["state"] = "done"
            following.get(timeout=60)
            silent = {
                "dagrelay_redis_max_bytes",  # Redis has no limit here
                "dagrelay_retries_total",  # nothing was tried again
                "dagrelay_webhooks_total",  # no hook is told of anything
            }

            def unanswered() -> list[str]:
                return [
                    f"{title}: {expr}"
                    for title, expr in dashboard_expressions()
                    if not ask(port, expr) and not any(name in expr for name in silent)
                ]

            server.wait_until(lambda: not unanswered(), timeout_s=60, what=str(unanswered()), every_s=0.5)
            (failed,) = ask(port, 'sum by (error) (dagrelay_triggers_total{outcome="failed"}) > 0')
            assert failed["metric"] == {"error": "RequestRejected"}
        finally:
            server.stop()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
