"""Flower shows what was asked and how it went, to those who may know it, and no secret to anybody.

Real parts: an embedded Valkey with a password, a worker, Flower with the project's own settings, a browser
where there is one; and a fake Airflow that echoes what it was sent.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from local.process import ROOT, Process, clean_env, free_port
from local.valkey import Valkey
from producers import AirflowError, JobOutcome, PollRequest, RelayClient, RequestCancelled, TriggerRequest
from producers.handle import Handle
from producers.settings import ProducerSettings
from tests import browser
from tests.fake_airflow import FakeAirflow
from tests.fake_service import FakeService
from tests.parts import need
from tests.worker import Worker

pytestmark = pytest.mark.integration

START_TIMEOUT_S = 60.0
# Each its own, so that a leak says what leaked.
CONF_VALUE, REDIS_PASSWORD = "kanarienvogel-conf-7f3a", "kanarienvogel-redis-9e0d"
AIRFLOW_PASSWORD, AIRFLOW_TOKEN = "kanarienvogel-airflow-2b77", "kanarienvogel-token-51c2"
SERVICE_TOKEN, BODY_VALUE = "kanarienvogel-service-8d1c", "kanarienvogel-body-4a0b"
FLOWER_PASSWORD = "kanarienvogel,flower:b64 4"  # with what Flower, a login and a shell might split
SECRETS = (
    *(CONF_VALUE, REDIS_PASSWORD, AIRFLOW_PASSWORD, AIRFLOW_TOKEN, FLOWER_PASSWORD),
    *(SERVICE_TOKEN, BODY_VALUE),
)
DAG_ID, KEY = "daily_sales", "sales-2026-11-20"
REJECTED_DAG_ID = "picky"
LOGIN = f"dagrelay:{FLOWER_PASSWORD}"


@dataclass
class Stack:
    """What runs, and what it did: `task_id` was retried and done, of all `task_ids` some have failed."""

    flower: Process
    worker: Worker
    service: FakeService
    url: str
    redis_url: str
    task_id: str
    task_ids: list[str]

    @property
    def client(self) -> RelayClient:
        return RelayClient(ProducerSettings(redis_url=self.redis_url, client_name="test-flower"))

    def shows(self, path: str, *words: str) -> None:
        """Wait until a page shows these words."""
        self.flower.wait_until(
            lambda: all(word in self.get(path)[1] for word in words),
            timeout_s=START_TIMEOUT_S,
            what=f"showing {words} on {path}",
            every_s=0.1,
        )

    def shows_state(self, task_id: str, state: str) -> dict[str, Any]:
        """Wait until Flower has a task in this state; return what it has."""
        path = f"/api/task/info/{task_id}"
        self.shows(path, f'"state": "{state}"')
        found: dict[str, Any] = json.loads(self.get(path)[1])
        return found

    def events(self) -> dict[str, float]:
        """How many events Flower has counted so far about each kind of task."""
        counted: Counter[str] = Counter()
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith("flower_events_total{"):
                labels, _, count = line.rpartition(" ")
                found = re.search(r'[{,]task="([^"]*)"', labels)
                counted[found.group(1) if found else ""] += float(count)
        return counted

    def get(self, path: str, login: str | None = LOGIN, method: str = "GET") -> tuple[int, str]:
        """Return status and body, 4xx and 5xx included; redirects are not followed."""
        request = urllib.request.Request(self.url + path, method=method)
        if login is not None:
            request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        try:
            with OPENER.open(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read().decode()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


OPENER = urllib.request.build_opener(NoRedirect)


def up(url: str) -> bool:
    try:
        with OPENER.open(f"{url}/healthcheck", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("flower")
    secret = folder / "flower_password"
    secret.write_text(FLOWER_PASSWORD)
    airflow = FakeAirflow()
    airflow.password, airflow.token = AIRFLOW_PASSWORD, AIRFLOW_TOKEN
    service = FakeService()
    service.token = SERVICE_TOKEN
    with airflow, service, Valkey() as valkey:
        Redis.from_url(valkey.url).config_set("requirepass", REDIS_PASSWORD)
        redis_url = valkey.url.replace("redis://", f"redis://:{REDIS_PASSWORD}@")
        connections = {"default": airflow.conn_uri}
        # Named as Celery names one by itself, and as the health check expects it.
        env = {"DAGRELAY_SERVICE_TRAIN": service.variable}
        with Worker(redis_url, folder, name="celery", connections=connections, **env) as worker:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            flower = Process(
                [sys.executable, "-m", "celery", "-A", "tasks", "flower", "--conf=flowerconfig.py"],
                log=folder / "flower.log",
                env=clean_env(
                    DAGRELAY_REDIS_URL=redis_url,
                    DAGRELAY_FLOWER_PORT=str(port),
                    DAGRELAY_FLOWER_PASSWORD_FILE=str(secret),
                ),
                cwd=ROOT,
                name="flower",
            )
            try:
                flower.wait_until(lambda: up(url), timeout_s=START_TIMEOUT_S, what="answering")
                yield used(Stack(flower, worker, service, url, redis_url, "", []), airflow)
            finally:
                flower.stop()


def used(stack: Stack, airflow: FakeAirflow) -> Stack:
    """Send a few requests and return the stack when Flower shows how they ended."""
    # Events come by Pub/Sub, which keeps nothing: first hear the worker, then send.
    stack.shows("/metrics", "flower_worker_online{")
    stack.shows("/api/workers?refresh=1", "celery@")
    conf = {"password": CONF_VALUE}
    airflow.fault = lambda number, dag_id, run_id: "503" if number == 1 else "answer"
    echo = [{"type": "missing", "loc": ["body", "conf"], "msg": "Field required", "input": conf}]
    airflow.rejecting[REJECTED_DAG_ID] = (422, {"detail": echo})
    client = stack.client
    done = client.enqueue(TriggerRequest(DAG_ID, conf, key=KEY, note=CONF_VALUE))
    done.get(timeout=START_TIMEOUT_S)
    assert airflow.posts[DAG_ID, f"relay__{KEY}"] == 2
    rejected = client.enqueue(TriggerRequest(REJECTED_DAG_ID, conf))
    with pytest.raises(AirflowError):
        rejected.get(timeout=START_TIMEOUT_S)
    # A stock client shows all arguments in its messages; valid, and as no door of ours would take it.
    stock = Celery(broker=stack.redis_url, set_as_current=False)
    stock_ids = [
        stock.send_task("tasks.trigger_dag", kwargs=kwargs, queue="triggers", ignore_result=True).id
        for kwargs in ({"dag_id": DAG_ID, "conf": conf}, {"dag_id": DAG_ID, "konf": conf, "note": CONF_VALUE})
    ]
    stack.task_id, stack.task_ids = done.id, [done.id, rejected.id, *stock_ids]
    for task_id, state in zip(stack.task_ids, ("SUCCESS", "FAILURE", "SUCCESS", "FAILURE"), strict=True):
        stack.shows_state(task_id, state)
    return stack


def pages() -> list[tuple[str, str]]:
    """Every method and address that this Flower serves, by its own table."""
    from flower.urls import handlers

    found = []
    for handler in handlers:
        pattern = handler.regex.pattern if hasattr(handler, "regex") else handler[0]
        target = handler.handler_class if hasattr(handler, "handler_class") else handler[1]
        path = re.sub(r"\(.*?\)", "x", pattern).rstrip("$").removesuffix("/?").replace(".*", "/nowhere")
        found += [(m.upper(), path) for m in ("get", "post", "put", "delete", "patch") if m in vars(target)]
    return found


OPEN_PAGES = {
    ("GET", "/healthcheck"): 200,  # for probes
    ("GET", "/static/x"): 404,  # style sheets and scripts
    ("GET", "/logout"): 200,  # says that one is logged out
    ("GET", "/nowhere"): 404,
    ("POST", "/nowhere"): 404,
}


@pytest.mark.parametrize("login", [None, "dagrelay:wrong", "dagrelay:", f"other:{FLOWER_PASSWORD}"])
def test_without_the_login_every_page_is_closed(stack, login):
    asked = pages()
    assert len(asked) > 30
    assert {("GET", "/metrics"), ("GET", "/api/tasks"), ("GET", "/"), ("GET", "/tasks")} <= set(asked)
    answers = {(m, path): stack.get(path, login, m)[0] for m, path in asked}
    assert answers == {page: OPEN_PAGES.get(page, 401) for page in asked}


def test_pages_without_a_login_show_nothing_of_ours(stack):
    for method, path in OPEN_PAGES:
        body = stack.get(path, None, method)[1]
        assert not [word for word in (*SECRETS, DAG_ID, KEY, stack.task_id) if word in body], path
    assert stack.get("/healthcheck", None) == (200, "OK")


def test_with_the_login_every_page_is_there(stack):
    for path in ("/", "/tasks", "/workers", "/broker", "/metrics", "/api/tasks", f"/task/{stack.task_id}"):
        assert stack.get(path)[0] == 200, path
    assert "flower_events_total" in stack.get("/metrics")[1]
    assert stack.task_id in stack.get("/api/tasks")[1]


def test_a_task_says_dag_run_and_key(stack):
    status, body = stack.get(f"/api/task/info/{stack.task_id}")
    assert status == 200
    shown = json.loads(body)["kwargs"]
    for word in (DAG_ID, KEY, f"relay__{KEY}", "password"):  # of the conf the names, not the values
        assert word in shown


def test_no_page_and_no_log_shows_a_secret(stack):
    workers = list(json.loads(stack.get("/api/workers?refresh=1")[1]))
    assert workers
    table = (
        "/tasks/datatable?draw=1&start=0&length=50&order[0][column]=0&order[0][dir]=asc&columns[0][data]=name"
    )
    paths = [
        "/",
        "/workers",
        "/tasks",
        "/broker",
        "/metrics",
        "/api/tasks",
        "/api/workers",
        table,
        *(f"/worker/{name}" for name in workers),
        *(f"/task/{task_id}" for task_id in stack.task_ids),
        *(f"/api/task/info/{task_id}" for task_id in stack.task_ids),
        *(f"/api/task/result/{task_id}" for task_id in stack.task_ids),
    ]
    for path in paths:
        status, body = stack.get(path)
        assert status == 200, path
        assert not [secret for secret in SECRETS if secret in body], path
    for log in (stack.flower.log, stack.worker.log):
        text = log.read_text()
        assert text
        assert not [secret for secret in SECRETS if secret in text], log.name
    assert all(task_id in stack.worker.text() for task_id in stack.task_ids)  # it was looked at something


def test_no_secret_is_in_the_process_list(stack):
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it has ended
    need("a process list", bool(lines), "this test reads /proc, which Linux has")
    assert any("flower --conf=flowerconfig.py" in line for line in lines)
    assert not [line for line in lines if any(secret in line for secret in SECRETS)]


def test_without_a_password_flower_ends_at_once_and_says_why(stack):
    result = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tasks", "flower", "--conf=flowerconfig.py"],
        cwd=ROOT,
        env=clean_env(DAGRELAY_REDIS_URL=stack.redis_url),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 78  # EX_CONFIG
    assert "DAGRELAY_FLOWER_PASSWORD" in result.stderr
    assert "Traceback" not in result.stderr
    assert REDIS_PASSWORD not in result.stdout + result.stderr


def test_the_health_check_of_flower_asks_flower(stack):
    """The command of docker-compose.yml, with the port of this one and with one where nobody is."""
    compose = (ROOT / "docker-compose.yml").read_text()
    (code,) = re.findall(r"^ +- (import urllib\.request.*:5555/.*)$", compose, re.M)

    def status(port: str) -> int:
        argv = [sys.executable, "-c", code.replace("5555", port)]
        return subprocess.run(argv, capture_output=True, timeout=START_TIMEOUT_S, check=False).returncode

    assert status(stack.url.rpartition(":")[2]) == 0
    assert status(str(free_port())) != 0


def follow(stack: Stack, name: str) -> Handle[JobOutcome]:
    """Have a job started and followed."""
    job = PollRequest(
        service="train",
        submit={"path": "/jobs", "body": {"name": name, "secret": BODY_VALUE}},
        path="/jobs/{job_id}",
        progress="progress",
        reason="why",
        interval_s=0.05,
        max_interval_s=0.1,
        on_cancel={"method": "DELETE", "path": "/jobs/{job_id}"},
    )
    handle = stack.client.enqueue(job)
    stack.shows_state(handle.id, "WAITING-RUNNING")
    return handle


def job_of(handle: Handle[JobOutcome]) -> str:
    found = handle.record()
    assert found is not None
    assert found.job_id is not None
    return found.job_id


def test_a_waiting_task_shows_the_states_of_its_job_and_nothing_for_looks_that_see_nothing_new(stack):
    handle = follow(stack, "long")
    job_id = job_of(handle)
    before, looked = stack.events(), stack.service.looks[job_id]
    stack.worker.process.wait_until(
        lambda: stack.service.looks[job_id] >= looked + 25, timeout_s=20, what="looking", every_s=0.05
    )

    stack.service.jobs[job_id] |= {"state": "Cleaning up!", "progress": "80 %"}
    shown = stack.shows_state(handle.id, "WAITING-CLEANING_UP")

    assert shown["progress"] == "80 %"
    assert shown["name"] == "tasks.poll_external_job"
    assert "train" in shown["kwargs"]
    # Events come in order: had the looks before sent any, they would be counted.
    assert stack.events() - before == Counter({"tasks.poll_external_job": 1})
    stack.service.end(job_id)
    handle.get(timeout=60)
    stack.shows_state(handle.id, "SUCCESS")
    assert not [name for name in stack.events() if "look" in name]


def test_a_waiting_task_whose_job_fails_is_shown_as_failed(stack):
    handle = follow(stack, "bad")
    stack.service.end(job_of(handle), "failed", why="no such rail")
    shown = stack.shows_state(handle.id, "FAILURE")
    assert "no such rail" in shown["exception"]


def test_a_waiting_task_is_revoked_by_flowers_api_and_shown_as_revoked(stack):
    handle = follow(stack, "unwanted")
    job_id = job_of(handle)

    assert stack.get(f"/api/task/revoke/{handle.id}", method="POST")[0] == 200

    with pytest.raises(RequestCancelled):
        handle.get(timeout=60)
    stack.shows_state(handle.id, "REVOKED")
    stack.worker.process.wait_until(
        lambda: job_id in stack.service.cancels, timeout_s=10, what="telling the service", every_s=0.05
    )


def test_a_waiting_task_that_is_cancelled_is_shown_as_revoked(stack):
    handle = follow(stack, "unwanted too")
    assert handle.cancel() == "waiting"
    stack.shows_state(handle.id, "REVOKED")


def test_in_a_browser_the_task_can_be_read_and_its_conf_cannot(stack):
    chromium = browser.find()
    need("a browser (Chromium)", chromium is not None, browser.HOW_TO_GET_IT)
    assert chromium
    from playwright.sync_api import sync_playwright

    user, _, password = LOGIN.partition(":")
    elsewhere: list[str] = []
    failed: list[str] = []
    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=chromium.path, env=clean_env(**chromium.env))
        try:
            page = program.new_page(http_credentials={"username": user, "password": password})
            page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith(stack.url) else None)
            page.on("pageerror", lambda error: failed.append(str(error)))
            page.goto(f"{stack.url}/tasks")
            row = page.locator("#tasks-table tbody tr", has_text=KEY)
            row.first.wait_for(timeout=20_000)
            assert row.count() == 1
            shown = row.inner_text()
            for word in ("tasks.trigger_dag", stack.task_id[:8], "SUCCESS", DAG_ID, KEY):
                assert word.lower() in shown.lower(), shown
            tasks_page = page.content()
            page.goto(f"{stack.url}/task/{stack.task_id}")
            page.get_by_text(f"relay__{KEY}").first.wait_for(timeout=20_000)
            for content in (tasks_page, page.content()):
                assert not [secret for secret in SECRETS if secret in content]
        finally:
            program.close()
    assert not failed
    assert not [url for url in elsewhere if not url.startswith(("data:", "blob:"))]


def test_in_a_browser_a_waiting_task_says_what_its_job_does_and_can_be_revoked(stack):
    chromium = browser.find()
    need("a browser (Chromium)", chromium is not None, browser.HOW_TO_GET_IT)
    assert chromium
    from playwright.sync_api import sync_playwright

    handle = follow(stack, "seen by people")
    stack.service.jobs[job_of(handle)] |= {"state": "baking", "progress": "2 of 5 loaves"}
    stack.shows_state(handle.id, "WAITING-BAKING")
    user, _, password = LOGIN.partition(":")
    failed: list[str] = []
    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=chromium.path, env=clean_env(**chromium.env))
        try:
            page = program.new_page(http_credentials={"username": user, "password": password})
            page.on("pageerror", lambda error: failed.append(str(error)))
            page.goto(f"{stack.url}/tasks")
            row = page.locator("#tasks-table tbody tr", has_text="WAITING-BAKING")
            row.first.wait_for(timeout=20_000)
            assert row.count() == 1
            assert "train" in row.inner_text()
            page.goto(f"{stack.url}/task/{handle.id}")
            page.get_by_text("WAITING-BAKING").first.wait_for(timeout=20_000)
            text = page.inner_text("#task-page")
            assert "2 of 5 loaves" in text
            assert not [secret for secret in SECRETS if secret in page.content()]
            page.click("#task-revoke")
            stack.shows_state(handle.id, "REVOKED")
            page.reload()
            page.get_by_text("REVOKED").first.wait_for(timeout=20_000)
            assert "2 of 5 loaves" not in page.inner_text("#task-page")
        finally:
            program.close()
    assert not failed
    assert handle.state == "cancelled"
