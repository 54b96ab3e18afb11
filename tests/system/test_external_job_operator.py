"""ExternalJobOperator and ExternalJobSensor in both real Airflows, with our provider beside them.

All DAGs of `job_dags/jobs.py` are started at once; each test ends the job of one, and looks at what became
of it.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
from redis import Redis

from local.airflow import COMPONENTS, Airflow
from local.process import ROOT, Process, clean_env, free_port
from local.valkey import Valkey
from tests.fake_service import FakeService
from tests.system.stack import QUICK, until
from tests.worker import Worker

DAGS = Path(__file__).with_name("job_dags")
SAYS = Path(__file__).with_name("callers") / "external_job_operators.py"
DAGRELAY = Path(sys.executable).with_name("dagrelay")
FLOWER = "https://flower.example.org"
MODEL = {"model_uri": "s3://models/1"}
TIMED = ("too_long", "run_too_long", "overdue")
LATER = ("through_kills", *TIMED)
CALL = """
import json, sys
from producers import poll_external_job
given = json.load(sys.stdin)
print(poll_external_job.delay(**given).id)
"""


class Rig:
    """One Airflow with our provider, one Valkey, one worker, one service; and the runs of all DAGs."""

    def __init__(self, airflow: Airflow, valkey: Valkey, folder: Path) -> None:
        self.airflow, self.valkey, self.folder = airflow, valkey, folder
        self.service = FakeService()
        self.redis: Redis = Redis.from_url(valkey.url, decode_responses=True)
        self.queued: list[dict[str, str]] = []
        self.elsewhere = ""
        self.timed = False
        self.worker: Worker

    # Airflow

    def get(self, path: str, **params: Any) -> Any:
        status, found = self.airflow.api("GET", path, params=params)
        assert status == 200, (path, status, found)
        return found

    def start(self, dag_id: str, run_id: str = "r", **conf: Any) -> None:
        body: dict[str, Any] = {"dag_run_id": run_id, "conf": conf}
        if self.airflow.version == "3":
            body["logical_date"] = None
        status, found = self.airflow.api("POST", f"/dags/{dag_id}/dagRuns", body)
        assert status == 200, (dag_id, status, found)

    def start_timed(self) -> None:
        """Start what ends by its time, once: together, and on a calm scheduler."""
        if not self.timed:
            self.timed = True
            for dag_id in TIMED:
                self.start(dag_id, request_id=self.elsewhere)

    def ended(self, dag_id: str, run_id: str = "r") -> str:
        return str(self.airflow.wait_for_run(dag_id, run_id, 150)["state"])

    def path(self, dag_id: str, run_id: str = "r", task_id: str = "job") -> str:
        return f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"

    def task(self, dag_id: str, run_id: str = "r") -> dict[str, Any]:
        return dict(self.get(self.path(dag_id, run_id)))

    def until_is(self, state: str, dag_id: str, run_id: str = "r") -> None:
        until(lambda: self.task(dag_id, run_id)["state"] == state, f"{dag_id} {state}", 120)

    def until_waits(self, dag_id: str, try_number: int = 1) -> None:
        """Wait until a triggerer has it: what is marked before that, nobody hears of."""
        self.until_is("deferred", dag_id)
        waits = f"{dag_id} waited for by a triggerer"
        until(lambda: ": waiting, job" in self.log(dag_id, try_number), waits, 60)

    def processes(self, dag_id: str) -> int:
        """Of how many processes of a DAG the scheduler has read the end.

        A task that is resumed, or made again under its id, before it has read that fails in a busy Airflow.
        """
        log = self.airflow.log_of("scheduler").read_text(errors="replace")
        lines = [line for line in log.splitlines() if "Received executor event" in line]
        return len([line for line in lines if f"dag_id='{dag_id}'" in line])

    def busy(self) -> list[str]:
        """The DAGs of tasks that Airflow is about to run, or runs though they do not wait in the worker."""
        found = self.get("/dags/~/dagRuns/~/taskInstances", limit=100)["task_instances"]
        states = (None, "scheduled", "queued", "running", "up_for_retry", "restarting")
        return [
            one["dag_id"]
            for one in found
            if one["task_id"] == "job"
            and "in_the_worker" not in one["dag_id"]
            and (one["state"] in states or not self.processes(one["dag_id"]))
        ]

    def xcom(self, dag_id: str, key: str = "return_value", run_id: str = "r", task_id: str = "job") -> Any:
        """An XCom, or None where there is no such."""
        status, found = self.airflow.api("GET", f"{self.path(dag_id, run_id, task_id)}/xcomEntries/{key}")
        if status == 404:
            return None
        if self.airflow.version == "3":
            return found["value"]
        text = found["value"]  # Airflow 2 gives the repr
        return eval(text, {}) if text[:1] in "[{" else text  # noqa: S307

    def log(self, dag_id: str, try_number: int = 1) -> str:
        """The log of a try, as text without backslashes; that of the triggerer is in it."""
        path = f"{self.path(dag_id)}/logs/{try_number}"
        if self.airflow.version == "3":
            found = self.get(path)
        else:  # which gives plain text, and of the first file alone, unless it is asked for JSON
            answer = requests.get(
                f"{self.airflow.url}/api/v1{path}",
                auth=(self.airflow.username, self.airflow.password),
                headers={"Accept": "application/json"},
                params={"full_content": True},
                timeout=30,
            )
            assert answer.status_code == 200, answer.text
            found = answer.json()
        return json.dumps(found, ensure_ascii=False).replace("\\", "")

    def says(self) -> dict[str, Any]:
        """What the operators make of arguments, in this Airflow's Python."""
        done = subprocess.run(
            [self.airflow.environment.python, str(SAYS)],
            env=self.airflow.env(),
            cwd=self.airflow.home,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def links(self, dag_id: str) -> dict[str, Any]:
        found = dict(self.get(f"{self.path(dag_id)}/links"))
        return dict(found.get("extra_links", found))

    def mark(self, dag_id: str, state: str = "failed") -> None:
        """Mark the task as a person does."""
        body: dict[str, Any] = {"new_state": state}
        if self.airflow.version == "2":
            body["dry_run"] = False
        status, found = self.airflow.api("PATCH", self.path(dag_id), body)
        assert status == 200, (status, found)

    def clear(self, dag_id: str) -> None:
        """Clear the task as a person does."""
        body = {"dry_run": False, "dag_run_id": "r", "task_ids": ["job"], "only_failed": False}
        if self.airflow.version == "2":
            body["reset_dag_runs"] = True
        status, found = self.airflow.api("POST", f"/dags/{dag_id}/clearTaskInstances", body)
        assert status == 200, (status, found)

    # The service

    def jobs(self, name: str, run_id: str | None = None) -> list[str]:
        """The ids of all jobs that a DAG has started."""
        return [
            job_id
            for job_id, job in list(self.service.jobs.items())
            if job["body"]["name"] == name and run_id in (None, job["body"].get("run"))
        ]

    def job(self, name: str, number: int = 1, run_id: str | None = None) -> str:
        """The id of a job that a DAG has started, once it has."""
        until(lambda: len(self.jobs(name, run_id)) >= number, f"job {number} of {name}", 150)
        return self.jobs(name, run_id)[number - 1]

    def end(self, name: str, number: int = 1, run_id: str | None = None, **more: Any) -> str:
        """End a job well, or as it is told."""
        job_id = self.job(name, number, run_id)
        self.service.end(job_id, **({"model": MODEL} | more))
        return job_id

    def until_cancelled(self, job_id: str) -> None:
        until(lambda: job_id in self.service.cancels, f"{job_id} cancelled", 90)

    # Requests

    def record(self, dag_id: str, run_id: str = "r") -> dict[str, str]:
        return self.redis.hgetall(f"dagrelay:record:{self.xcom(dag_id, 'dagrelay_request_id', run_id)}")

    def call(self, **given: Any) -> str:
        """Hand a job over from elsewhere; return the id of the request."""
        done = subprocess.run(
            [sys.executable, "-c", CALL],
            input=json.dumps(given),
            env=clean_env(DAGRELAY_REDIS_URL=self.valkey.url, PYTHONPATH=str(ROOT)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return str(done.stdout.strip())


@pytest.fixture(scope="module", params=["3", "2"], ids=["airflow3", "airflow2"])
def airflow(request: pytest.FixtureRequest) -> str:
    """Which Airflow; by this name the tests of one version run together."""
    return str(request.param)


@pytest.fixture(scope="module")
def rig(airflow: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp(f"jobs{airflow}")
    shutil.copytree(DAGS, folder / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    with ExitStack() as stack:
        valkey, broker = stack.enter_context(Valkey()), stack.enter_context(Valkey())
        redis = {"conn_type": "dagrelay", "extra": {"redis_url": valkey.url, "flower_url": FLOWER}}
        running = Airflow(
            airflow,  # type: ignore[arg-type]
            home=folder / "home",
            dags=folder / "dags",
            components=(*COMPONENTS[airflow], "triggerer"),  # type: ignore[index]
            provider=True,
            extra_env={
                "AIRFLOW_CONN_DAGRELAY_DEFAULT": json.dumps(redis),
                "AIRFLOW_CONN_REFUSED": "dagrelay://127.0.0.1:1/0",
                "AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "2",
            },
        )
        made = Rig(running, valkey, folder)
        stack.callback(made.redis.close)
        stack.enter_context(made.service)
        made.service.fault = lambda _, body: "422" if body.get("name") == "refused" else "answer"
        port = _start_gateway(stack, valkey, folder)
        _start_queue(stack, made, broker, folder)
        env = {
            "DAGRELAY_SERVICE_TRAIN": made.service.variable,
            "DAGRELAY_SERVICE_RENDER": json.dumps({"url": broker.url, "queue": "render", "reply_to": "done"}),
            "DAGRELAY_CALLBACK_URL": f"http://127.0.0.1:{port}/",
            "DAGRELAY_CALLBACK_SECRET": SECRET,
        }
        made.worker = stack.enter_context(Worker(valkey.url, folder, **QUICK, **env))
        stack.enter_context(running)
        _start_all(made)
        yield made


SECRET = "a-secret-of-at-least-thirty-two-characters"


def _start_gateway(stack: ExitStack, valkey: Valkey, folder: Path) -> int:
    port, keys = free_port(), folder / "keys.toml"
    env = clean_env(DAGRELAY_REDIS_URL=valkey.url, DAGRELAY_CALLBACK_SECRET=SECRET)
    env["DAGRELAY_GATEWAY_KEYS_FILE"] = str(keys)
    new_key = [str(DAGRELAY), "keys", "new", "tests", "--file", str(keys), "--dag", "none"]
    subprocess.run(new_key, env=env, capture_output=True, check=True)
    argv = [str(DAGRELAY), "gateway", "--port", str(port)]
    gateway = Process(argv, log=folder / "gateway.log", env=env, cwd=ROOT, name="gateway")
    stack.callback(gateway.stop)

    def listens() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return False
        return True

    until(listens, "a gateway that listens")
    return port


def _start_queue(stack: ExitStack, rig: Rig, broker: Valkey, folder: Path) -> None:
    """A service that is a stream, and the listener for its answers."""
    argv = [str(DAGRELAY), "listen", f"{broker.url}?stream=done", "--answers", "render"]
    env = clean_env(DAGRELAY_REDIS_URL=rig.valkey.url)
    listener = Process(argv, log=folder / "listen.log", env=env, cwd=ROOT, name="listener")
    stack.callback(listener.stop)
    stopped = threading.Event()

    def serve() -> None:
        with Redis.from_url(broker.url, decode_responses=True) as client:
            last = "0"
            while not stopped.is_set():
                for _, rows in client.xread({"render": last}, block=100) or []:
                    for last, fields in rows:  # noqa: B007 - the place to read on from
                        rig.queued.append(fields)
                        answer = json.dumps({"state": "done", "model": MODEL})
                        told = {"data": answer, "correlation_id": fields["correlation_id"]}
                        client.xadd(fields["reply_to"], told)

    thread = threading.Thread(target=serve)
    thread.start()
    stack.callback(thread.join)
    stack.callback(stopped.set)


def _start_all(rig: Rig) -> None:
    given = {"service": "train", "path": "/jobs/{job_id}", "result": "model", "interval_s": 0.3}
    rig.elsewhere = rig.call(**given, submit={"path": "/jobs", "body": {"name": "elsewhere"}})
    failing = rig.call(**given, submit={"path": "/jobs", "body": {"name": "failing"}}, reason="why")
    rig.end("failing", state="failed", why="no data")
    running = rig.service.submit(None, {"name": "runs already"})[1]
    rig.airflow.wait_for_dag("mapped")
    names = sorted(dag["dag_id"] for dag in rig.get("/dags", limit=100)["dags"])
    assert len(names) > 25
    for dag_id in names:
        if dag_id not in LATER:
            conf = {"request_id": rig.elsewhere, "failing_id": failing, "job_id": running, "bad_path": "//x"}
            rig.start(dag_id, **conf)
    until(lambda: not rig.busy(), "tasks that all wait, or have ended", 240, every_s=1)


# The end of a job is that of its task


def test_the_jobs_result_is_the_tasks_xcom(rig: Rig) -> None:
    job_id = rig.job("done")
    rig.until_is("deferred", "done")
    rig.service.jobs[job_id]["epoch"] = "3 of 9"
    until(lambda: "progress 3 of 9" in rig.log("done"), "progress in the log of the task", 30)
    rig.end("done")

    assert rig.ended("done") == "success"
    assert rig.xcom("done") == MODEL
    assert (rig.xcom("done", "job_id"), rig.xcom("done", "job_state")) == (job_id, "succeeded")
    assert rig.links("done")["Flower"] == f"{FLOWER}/task/{rig.xcom('done', 'dagrelay_request_id')}"
    assert rig.record("done")["by"] == "airflow done/job try 1 of r"
    assert rig.service.jobs[job_id]["body"]["run"] == "r"


@pytest.mark.parametrize("dag_id", ["in_the_worker", "resumed"])
def test_without_the_triggerer_to_end_it_the_result_is_the_same(rig: Rig, dag_id: str) -> None:
    job_id = rig.end(dag_id)
    assert rig.ended(dag_id) == "success"
    assert rig.xcom(dag_id) == MODEL
    assert (rig.xcom(dag_id, "job_id"), rig.xcom(dag_id, "job_state")) == (job_id, "succeeded")
    assert rig.links(dag_id)["Flower"].startswith(FLOWER)


def test_a_job_that_fails_fails_the_task_with_the_services_words(rig: Rig) -> None:
    job_id = rig.end("fails", state="failed", why="the loss is not a number")
    assert rig.ended("fails") == "failed"
    log = rig.log("fails")
    assert "ExternalJobFailed" in log
    assert "the loss is not a number" in log
    assert rig.xcom("fails", "job_id") == job_id


def test_a_retry_after_a_failed_job_starts_another(rig: Rig) -> None:
    rig.end("fails_once", state="failed")
    rig.end("fails_once", 2)
    assert rig.ended("fails_once") == "success"
    assert rig.task("fails_once")["try_number"] == 2
    assert len(rig.jobs("fails_once")) == 2


def test_a_job_that_is_refused_fails_the_task_with_the_services_words(rig: Rig) -> None:
    assert rig.ended("refused") == "failed"
    assert "no such train" in rig.log("refused")
    assert rig.service.token not in rig.log("refused")


def test_a_job_that_calls_back_ends_its_task(rig: Rig) -> None:
    job_id = rig.job("by_callback")
    rig.until_is("deferred", "by_callback")
    told = json.dumps({"state": "done", "model": MODEL}).encode()
    url = rig.service.jobs[job_id]["body"]["tell"]
    request = urllib.request.Request(url, told, {"Content-Type": "application/json"}, method="POST")
    urllib.request.urlopen(request, timeout=20).close()
    assert rig.ended("by_callback") == "success"
    assert rig.xcom("by_callback") == MODEL
    assert rig.service.looks[job_id] == 0


def test_a_job_over_a_queue_ends_its_task(rig: Rig) -> None:
    assert rig.ended("by_queue") == "success"
    assert rig.xcom("by_queue") == MODEL
    assert [json.loads(one["data"]) for one in rig.queued] == [{"name": "by_queue", "day": "r"}]


def test_mapped_tasks_have_a_job_each_and_a_result_may_be_mapped_over(rig: Rig) -> None:
    for number in (1, 2):
        rig.end("mapped", number)
    rig.end("parts", model=[4, 5])
    assert rig.ended("mapped") == "success"
    assert rig.service.jobs[rig.job("parts")]["body"]["trained"] == [MODEL, MODEL]
    found = rig.get("/dags/mapped/dagRuns/r/taskInstances")["task_instances"]
    assert len([one for one in found if one["task_id"] == "twice"]) == 2


# Somebody ends the task


def test_a_task_that_is_marked_cancels_its_job(rig: Rig) -> None:
    job_id = rig.job("marked")
    rig.until_waits("marked")
    rig.mark("marked")
    rig.until_cancelled(job_id)
    until(lambda: rig.record("marked")["state"] == "cancelled", "a request that is cancelled")


def test_a_task_that_is_marked_in_the_worker_cancels_its_job(rig: Rig) -> None:
    job_id = rig.job("marked_in_the_worker")
    rig.until_is("running", "marked_in_the_worker")
    rig.mark("marked_in_the_worker")
    rig.until_cancelled(job_id)


def test_a_job_that_is_to_be_kept_goes_on(rig: Rig) -> None:
    job_id = rig.job("kept")
    rig.until_waits("kept")
    rig.mark("kept", "success")
    rig.end("kept")
    until(lambda: rig.record("kept")["state"] == "done", "a request that is done")
    assert job_id not in rig.service.cancels


def test_a_task_that_is_cleared_cancels_its_job_and_starts_another(rig: Rig) -> None:
    first = rig.job("cleared")
    rig.until_waits("cleared")
    rig.clear("cleared")
    rig.until_cancelled(first)
    rig.end("cleared", 2)
    assert rig.ended("cleared") == "success"
    assert rig.xcom("cleared") == MODEL

    rig.clear("cleared")  # what has ended well begins anew as well
    rig.end("cleared", 3, model="other")
    until(lambda: rig.xcom("cleared") == "other", "the result of the third job", 90)
    assert len(rig.jobs("cleared")) == 3


def test_a_run_that_is_deleted_cancels_its_job_and_begins_anew_under_its_id(rig: Rig) -> None:
    job_id = rig.job("deleted")
    rig.until_waits("deleted")
    if rig.airflow.version == "3":  # it deletes no run that goes on
        status, found = rig.airflow.api("PATCH", "/dags/deleted/dagRuns/r", {"state": "failed"})
        assert status == 200, found
    status, found = rig.airflow.api("DELETE", "/dags/deleted/dagRuns/r")
    assert status == 204, found
    rig.until_cancelled(job_id)
    for number in (2, 3):
        until(lambda: rig.processes("deleted") >= number - 1, "the end of the task's process", 60)  # noqa: B023
        rig.start("deleted")
        rig.end("deleted", number, model=number)
        assert rig.ended("deleted") == "success"
        assert str(rig.xcom("deleted")) == str(number)
        status, _ = rig.airflow.api("DELETE", "/dags/deleted/dagRuns/r")
        assert status == 204


@pytest.mark.parametrize("dag_id", ["too_long", "run_too_long"])
def test_a_time_that_is_over_cancels_the_job(rig: Rig, dag_id: str) -> None:
    rig.start_timed()
    rig.until_cancelled(rig.job(dag_id))
    assert rig.ended(dag_id) == "failed"


def test_a_job_that_somebody_else_cancelled_is_not_started_again(rig: Rig) -> None:
    job_id = rig.job("cancelled_outside")
    rig.until_is("deferred", "cancelled_outside")
    done = subprocess.run(
        [str(DAGRELAY), "cancel", rig.xcom("cancelled_outside", "dagrelay_request_id")],
        env=clean_env(DAGRELAY_REDIS_URL=rig.valkey.url),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rig.until_cancelled(job_id)
    assert rig.ended("cancelled_outside") == "failed"
    assert rig.task("cancelled_outside")["try_number"] == 1


# Tries that are cut short


def test_a_try_that_is_killed_leaves_its_job_to_the_next(rig: Rig) -> None:
    until(lambda: rig.task("killed")["try_number"] == 2, "a second try", 120)
    rig.until_is("deferred", "killed")
    rig.end("killed")
    assert rig.ended("killed") == "success"
    assert "was handed over by an earlier try" in rig.log("killed", 2)
    assert len(rig.jobs("killed")) == 1


def test_a_try_that_is_terminated_leaves_no_job_that_goes_on(rig: Rig) -> None:
    until(lambda: rig.task("terminated")["try_number"] == 2, "a second try", 120)
    rig.until_waits("terminated", 2)  # under an id that was not cancelled before it was handed over
    *before, job_id = rig.jobs("terminated")
    rig.service.end(job_id, model=MODEL)
    assert rig.ended("terminated") == "success"
    for one in before:
        rig.until_cancelled(one)


# What is wrong


def test_what_is_wrong_by_its_form_is_an_import_error_that_names_the_argument(rig: Rig) -> None:
    errors = until(lambda: rig.get("/importErrors")["import_errors"], "an import error", 60)
    assert [Path(one["filename"]).name for one in errors] == ["broken.py"]
    assert "state: is no JMESPath expression" in errors[0]["stack_trace"]


def test_arguments_are_refused_by_name_as_far_as_their_templates_let_know(rig: Rig) -> None:
    said = rig.says()
    assert set(said["right"].values()) == {""}
    begins = {
        "path": "path: give the job's path, or its url, or have submit hold",
        "path_and_url": "path: give the job's path, or its url, and not both",
        "state": "state: is no JMESPath expression",
        "job_id": "path: has {job_id}, and there is neither",
        "no_callback": "path: give the job's path",
        "then": "then: dag_id: is no DAG id",
        "credentials": "headers: 'Authorization' belongs to the service's configuration",
        "queue": "path: is for via='http'",
        "states": "success and failure: both have done",
        "seconds": "timeout_s: 'soon' is no number",
    }
    for name, words in begins.items():
        assert said["wrong"][name].startswith(words), name
    begins = {
        "nothing": "path: give request_id",
        "both": "request_id: leave it out",
        "no_job": "path: has {job_id}",
    }
    for name, words in begins.items():
        assert said["sensors"][name].startswith(words), name
    assert said["sensors"][""] == ""


@pytest.mark.parametrize(
    ("dag_id", "words"),
    [
        ("no_service", "service 'nowhere' is not configured in the worker"),
        ("bad_when_run", "path: is no path within the service"),
    ],
)
def test_what_no_retry_can_mend_fails_at_once(rig: Rig, dag_id: str, words: str) -> None:
    assert rig.ended(dag_id) == "failed"
    assert rig.task(dag_id)["try_number"] == 1
    assert words in rig.log(dag_id)


def test_a_connection_that_airflow_cannot_read_fails_a_try_by_its_name(rig: Rig) -> None:
    """Airflow says so of all, while a store of secrets is away."""
    assert rig.ended("no_connection") == "failed"
    assert rig.task("no_connection")["try_number"] == 2
    assert "relay_conn_id: Airflow has no connection 'nowhere'" in rig.log("no_connection", 2)


def test_a_redis_that_is_away_fails_a_try_with_one_line_that_names_it(rig: Rig) -> None:
    assert rig.ended("redis_away") == "failed"
    assert rig.task("redis_away")["try_number"] == 2
    assert "BrokerUnavailable: 127.0.0.1:1 (relay_conn_id 'refused')" in rig.log("redis_away", 2)


# Sensors


def test_a_sensor_leaves_what_it_waits_for_alone(rig: Rig) -> None:
    rig.start_timed()
    for dag_id in ("overdue", "overdue_here"):
        assert rig.ended(dag_id) == ("failed" if dag_id == "overdue" else "success")
        assert rig.task(dag_id)["try_number"] == 1
    assert rig.task("overdue_here")["state"] == "skipped"
    rig.until_is("deferred", "sensed_marked")
    rig.until_is("deferred", "sensed")
    rig.mark("sensed_marked")
    assert rig.ended("sensed_marked") == "failed"

    job_id = rig.end("elsewhere")
    assert rig.ended("sensed") == "success"
    assert rig.xcom("sensed") == MODEL
    assert rig.xcom("sensed", "job_id") == job_id


def test_a_sensor_follows_a_job_that_runs_already(rig: Rig) -> None:
    rig.until_is("deferred", "followed")
    rig.end("runs already")
    assert rig.ended("followed") == "success"
    assert rig.xcom("followed") == MODEL


def test_a_sensor_may_be_skipped_where_the_job_fails(rig: Rig) -> None:
    assert rig.ended("soft") == "success"
    assert rig.task("soft")["state"] == "skipped"
    assert "no data" in rig.log("soft")


# Last, because it disturbs all others


def test_jobs_outlive_kills_of_every_part_and_a_restart_of_redis(rig: Rig) -> None:
    runs = [f"k{number}" for number in range(4)]
    for run_id in runs:
        rig.start("through_kills", run_id)
    for run_id in runs:
        rig.job("through_kills", run_id=run_id)
        rig.until_is("deferred", "through_kills", run_id)

    rig.airflow.kill_component("triggerer")
    rig.airflow.kill_component("scheduler")
    rig.worker.kill()
    rig.end("through_kills", run_id="k0")
    rig.worker.start()
    rig.airflow.start_component("triggerer")
    rig.airflow.start_component("scheduler")
    assert rig.ended("through_kills", "k0") == "success"

    rig.valkey.restart()
    for run_id in runs[1:3]:
        rig.end("through_kills", run_id=run_id)
        assert rig.ended("through_kills", run_id) == "success"

    rig.airflow.stop_component("triggerer")  # in good order: what waits goes on
    rig.airflow.start_component("triggerer")
    rig.end("through_kills", run_id="k3")
    assert rig.ended("through_kills", "k3") == "success"
    assert [rig.xcom("through_kills", run_id=run_id) for run_id in runs] == [MODEL] * 4
    assert len(rig.jobs("through_kills")) == 4
    assert not set(rig.jobs("through_kills")) & set(rig.service.cancels)
