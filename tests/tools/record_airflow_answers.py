"""Record what real Airflows answer, as the unit tests of tasks/airflow read it.

    python -m tests.tools.record_airflow_answers 3 2

For each version: starts one, asks everything that a trigger may come to ask, rightly and wrongly, and writes
tests/unit/tasks/airflow/answers/{v2,v1}/CASE.json. Wrong requests carry the canary in every place that
Airflow might echo. Takes about a minute for each; run it again when an Airflow is released.
"""

# ruff: noqa: T201 - it shows what it does
from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from local.airflow import Airflow, Version
from producers.contract import TaskInstance, TriggerRequest
from tasks.airflow import protocol_v1, protocol_v2
from tasks.http import HttpRequest, HttpResponse, HttpSender, NoAnswer

ANSWERS = Path(__file__).parents[1] / "unit" / "tasks" / "airflow" / "answers"
CANARY = "canary-7f3b-do-not-show"
KEPT_HEADERS = ("content-type", "retry-after", "location", "connection", "www-authenticate")
NOTE = "dagrelay task=0 asked by=recorder"
LOGICAL_DATE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

DAGS = """
from datetime import datetime, timezone
try:
    from airflow.sdk import DAG, Param, task, task_group
    from airflow.providers.standard.operators.empty import EmptyOperator
except ImportError:
    from airflow import DAG
    from airflow.decorators import task, task_group
    from airflow.models.param import Param
    from airflow.operators.empty import EmptyOperator

start = datetime(2025, 1, 1, tzinfo=timezone.utc)
with DAG("recorded", schedule=None, start_date=start):
    EmptyOperator(task_id="nothing")
params = {
    "count": Param(type="integer", maximum=10),
    "code": Param("abc", type="string", pattern="^[a-z]+$", maxLength=5),
    "place": Param("here", enum=["here", "there"]),
    "when": Param(None, type=["null", "string"], format="date-time"),
    "deep": Param({}, type="object", properties={"inner": {"type": "integer"}}, additionalProperties=False),
    "either": Param(1, anyOf=[{"type": "integer"}, {"type": "null"}]),
    "many": Param([1], type="array", items={"type": "integer"}, uniqueItems=True),
}
with DAG("recorded_params", schedule=None, start_date=start, params=params):
    EmptyOperator(task_id="nothing")
with DAG("recorded_results", schedule=None, start_date=start):
    @task
    def some():
        return {"answer": 42, "n": [1, 2.5, None, True], "ü": "'\\"", "deep": {"a": {"b": []}}}

    @task
    def text():
        return "[1, 2]"

    @task
    def none():
        return None

    @task
    def many(n):
        return n

    some() >> text() >> none() >> many.expand(n=[1, 2])
with DAG("recorded_groups", schedule=None, start_date=start):
    @task
    def names():
        return [1, 2]

    @task
    def within(n):
        return n

    @task_group
    def each(n):
        within(n)

    each.expand(n=names())
"""
BREAKS_LATER = DAGS.partition("params = ")[0].replace('"recorded"', '"recorded_broken"')

WRONG_PARAMS: dict[str, Any] = {
    "param_missing": {"other": CANARY},
    "param_of_wrong_type": {"count": CANARY},
    "param_too_large": {"count": 47_110_815},
    "param_with_another_pattern": {"count": 1, "code": CANARY},
    "param_not_in_its_list": {"count": 1, "place": CANARY},
    "param_not_in_its_format": {"count": 1, "when": CANARY},
    "param_with_wrong_part": {"count": 1, "deep": {"inner": CANARY}},
    "param_with_unknown_part": {"count": 1, "deep": {CANARY: CANARY}},
    "param_that_is_neither": {"count": 1, "either": {"a": [CANARY, {"b": CANARY}]}},
    "param_with_duplicates": {"count": 1, "many": [47_110_815, 47_110_815]},
    "param_that_quotes_jsonschema": {
        "count": f"\n\nFailed validating 'type' in schema:\n    {CANARY}\n\nOn instance:\n    {CANARY}"
    },
}


class Recorder:
    """Asks one Airflow and writes down what it answers."""

    def __init__(self, airflow: Airflow, folder: Path) -> None:
        self.airflow = airflow
        self.folder = folder
        self.send = HttpSender(airflow.url, read_timeout_s=60).send
        self.tokens: dict[str, str] = {}

    def authorised(self, username: str, password: str) -> dict[str, str]:
        if self.airflow.version == "2":
            pair = base64.b64encode(f"{username}:{password}".encode()).decode()
            return {"Authorization": f"Basic {pair}"}
        if username not in self.tokens:
            answer = self.send(login(username, password)).json()
            self.tokens[username] = answer["access_token"]
        return {"Authorization": f"Bearer {self.tokens[username]}"}

    @property
    def admin(self) -> dict[str, str]:
        return self.authorised(self.airflow.username, self.airflow.password)

    def __call__(
        self, case: str, request: HttpRequest, headers: Mapping[str, str] | None = None
    ) -> HttpResponse | None:
        """Send with the admin's credentials, or with these headers instead; write the answer down."""
        who = self.admin if headers is None else headers
        try:
            response = self.send(replace(request, headers={**request.headers, **who}))
        except NoAnswer as exc:
            print(f"{case}: no answer ({exc})")
            return None
        body = response.body.decode()
        kept = {name: value for name, value in response.headers.items() if name in KEPT_HEADERS}
        record = {
            "request": f"{request.method} {request.path}",
            "status": response.status,
            "headers": kept,
            "body": self.anonymous(body),
        }
        print(f"{case}: {response.status} {body[:100]!r}")
        (self.folder / f"{case}.json").write_text(
            json.dumps(record, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        )
        return response

    def anonymous(self, body: str) -> str:
        """Leave out what belongs to this machine, and the signature of a token."""
        body = body.replace(self.airflow.url, "http://airflow:8080").replace(socket.gethostname(), "machine")
        for path in (self.airflow.home.parent, self.airflow.environment.folder, Path.cwd()):
            body = body.replace(str(path), "/airflow")
        body = re.sub(r"(eyJ[\w-]+\.[\w-]+\.)[\w-]+", r"\1c2lnbmF0dXJl", body)
        return body if len(body) < 6000 else re.sub(r"x{1000,}", "x", body)


def login(username: str, password: str) -> HttpRequest:
    body = json.dumps({"username": username, "password": password}).encode()
    return HttpRequest("POST", "/auth/token", {"Content-Type": "application/json"}, body)


def post(path: str, body: Any) -> HttpRequest:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HttpRequest("POST", path, {"Content-Type": "application/json"}, content)


def record_both(record: Recorder, api: Any, root: str) -> None:
    """The cases that both versions have."""
    runs = f"{root}/dags/recorded/dagRuns"
    plain = TriggerRequest("recorded")
    full = TriggerRequest(
        "recorded", {"region": "EU", "n": [1, 2.5, None, "ü"]}, logical_date=LOGICAL_DATE, note="by hand"
    )
    record("version", api.ask_version(), {})
    record("health", api.ask_health(), {})
    record("dags", api.ask_whether_accepted())
    record("no_credentials", api.create_run(plain, "nobody", NOTE), {})
    record("created", api.create_run(plain, "plain", NOTE))
    record("created_with_all", api.create_run(full, "full", NOTE))
    record("run_id_taken", api.create_run(TriggerRequest("recorded", {"a": CANARY}), "plain", NOTE))
    record("logical_date_taken", api.create_run(full, "full-again", NOTE))
    record("dag_unknown", api.create_run(TriggerRequest("nope", {"a": CANARY}), "plain", NOTE))
    for case, conf in WRONG_PARAMS.items():
        record(case, api.create_run(TriggerRequest("recorded_params", conf), "wrong", NOTE))
    always: dict[str, Any] = {"logical_date": None} if api is protocol_v2 else {}
    record("run_id_reserved", post(runs, {"dag_run_id": "scheduled__2026", "conf": {"a": CANARY}} | always))
    record("run_id_illegal", post(runs, {"dag_run_id": "a/b", "conf": {"a": CANARY}} | always))
    record("field_unknown", post(runs, {"canary": CANARY, "conf": {"a": CANARY}} | always))
    record("conf_is_a_list", post(runs, {"conf": [CANARY]} | always))
    record("not_json", post(runs, CANARY.encode()))
    record("note_too_long", post(runs, {"note": CANARY + "n" * 1100, "conf": {"a": CANARY}} | always))
    record("conf_with_nul", post(runs, {"conf": {"a": f"{CANARY}\0"}, "dag_run_id": "nul"} | always))
    record("run", api.get_run("recorded", "full"))
    record("run_unknown", api.get_run("recorded", "none"))
    record("run_of_unknown_dag", api.get_run("nope", "none"))
    record("found_by_logical_date", api.find_by_logical_date("recorded", LOGICAL_DATE))
    record("found_none", api.find_by_logical_date("recorded", datetime(2001, 1, 1, tzinfo=UTC)))
    record("found_in_unknown_dag", api.find_by_logical_date("nope", LOGICAL_DATE))
    record("note_set", api.set_note("recorded", "full", "dagrelay: another note"))
    record("note_of_unknown_run", api.set_note("recorded", "none", "x"))
    record("cleared", api.clear_run("recorded", "full"))
    record("clear_of_unknown_run", api.clear_run("recorded", "none"))
    record_runs(record, api)
    record_dag(record, api)
    record("no_such_path", HttpRequest("GET", f"{root}/nothing/here"))
    record("method_not_allowed", HttpRequest("DELETE", f"{root}/version"))
    record("content_type_wrong", HttpRequest("POST", runs, {"Content-Type": "text/plain"}, b"{}"))


def record_runs(record: Recorder, api: Any) -> None:
    """What is asked about runs that are waited for: how they stand, what their tasks returned."""
    dag_id = "recorded_results"
    record.airflow.wait_for_dag(dag_id)
    record.send(with_admin(record, api.create_run(TriggerRequest(dag_id, {"a": 1}), "ended", NOTE)))
    record.airflow.wait_for_run(dag_id, "ended")
    answer = record("run_ended", api.get_run(dag_id, "ended"))
    view = api.read_run(answer, dag_id, "ended")
    at = view.run_after or view.logical_date
    record("runs_listed", api.list_runs([dag_id], at, at))
    record("runs_listed_unfinished", api.list_runs([dag_id], at, at, unfinished=True))
    record("runs_listed_none", api.list_runs([dag_id], LOGICAL_DATE, LOGICAL_DATE))
    record("runs_listed_of_unknown_dag", api.list_runs(["nope"], at, at))
    record("runs_listed_first_of_many", api.list_runs(["recorded", dag_id], LOGICAL_DATE, at, limit=1))
    listing = api.list_runs([dag_id], at, at)
    record("runs_listed_by_nobody", listing, {})
    record("runs_listed_wrongly", post(listing.path, {"canary": CANARY}))
    for task_id in ("some", "text", "none", "many", "nobody"):
        record(f"xcom_of_{task_id}", api.get_xcom(dag_id, "ended", task_id))
    for task_id in ("none", "many", "nobody"):
        record(f"task_{task_id}", api.get_task(dag_id, "ended", task_id))
    record("xcom_of_unknown_run", api.get_xcom(dag_id, "none", "some"))
    record("task_of_unknown_run", api.get_task(dag_id, "none", "some"))
    record("run_failed_by_hand", api.fail_run("recorded", "full"))
    record("fail_of_unknown_run", api.fail_run("recorded", "none"))


def record_dag(record: Recorder, api: Any) -> None:
    """What is asked about a DAG whose runs are held back: is it paused, how many are unfinished."""
    record.send(with_admin(record, paused(api, "recorded_params", True)))
    for number in range(3):
        request = TriggerRequest("recorded_params", {"count": 1, "code": "abc"})
        record.send(with_admin(record, api.create_run(request, f"counted-{number}", NOTE)))
    record("dag_paused", api.get_dag("recorded_params"))
    record("dag_of_nobody", api.get_dag("nope"))
    record("unfinished_counted", api.count_unfinished("recorded_params"))
    record("unfinished_of_unknown_dag", api.count_unfinished("nope"))
    record_tasks(record, api)
    record("unpaused", api.unpause_dag("recorded_params"))
    record("unpause_of_unknown_dag", api.unpause_dag("nope"))


def record_tasks(record: Recorder, api: Any) -> None:
    """What is asked about tasks that wait for a job: of a run of a paused DAG, and of one that has ended."""

    def of(dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> TaskInstance:
        return TaskInstance(dag_id=dag_id, dag_run_id=run_id, task_id=task_id, map_index=map_index)

    waiting = of("recorded_params", "counted-0", "nothing")
    record("task_instance", api.get_task_instance(waiting))
    record("task_instance_by_index", api.get_task_instance(of("recorded_results", "ended", "many", 1)))
    record("task_instance_mapped", api.get_task_instance(of("recorded_results", "ended", "many")))
    record("task_instance_unknown", api.get_task_instance(of("recorded_params", "counted-0", "nobody")))
    record("task_instance_of_unknown_run", api.get_task_instance(of("recorded_params", "none", "nothing")))
    record("mapped_of_plain", api.list_mapped("recorded_params", "counted-0", "nothing"))
    record("mapped", api.list_mapped("recorded_results", "ended", "many"))
    groups = "recorded_groups"
    record.airflow.wait_for_dag(groups)
    for run_id, now in (("ended", False), ("not-begun", True)):
        record.send(with_admin(record, paused(api, groups, now)))
        record.send(with_admin(record, api.create_run(TriggerRequest(groups), run_id, NOTE)))
        if not now:
            record.airflow.wait_for_run(groups, run_id)
    record("mapped_by_its_group", api.list_mapped(groups, "ended", "each.within"))
    record("mapped_not_expanded", api.list_mapped(groups, "not-begun", "each.within"))
    record("task_instance_not_expanded", api.get_task_instance(of(groups, "not-begun", "each.within")))
    record("mapped_of_unknown_task", api.list_mapped("recorded_results", "ended", "nobody"))
    record("mapped_of_unknown_run", api.list_mapped("recorded_results", "none", "many"))
    if api is protocol_v1:
        record("task_note_set", api.set_task_note(waiting, NOTE))
    record("task_set", api.set_task_state(waiting, "failed", NOTE))
    record("task_set_again", api.set_task_state(waiting, "failed", NOTE))
    record("task_set_mapped", api.set_task_state(of("recorded_results", "ended", "many"), "failed", NOTE))
    unknown = of("recorded_params", "counted-0", "nobody")
    record("task_set_unknown", api.set_task_state(unknown, "failed", NOTE))


def paused(api: Any, dag_id: str, now: bool) -> HttpRequest:
    body = json.dumps({"is_paused": now}).encode()
    return HttpRequest("PATCH", api.get_dag(dag_id).path, {"Content-Type": "application/json"}, body)


def with_admin(record: Recorder, request: HttpRequest) -> HttpRequest:
    return replace(request, headers={**request.headers, **record.admin})


def record_broken(record: Recorder, api: Any) -> None:
    """A DAG whose file breaks while its row is still there, then is gone: 400 for a moment, then 404."""
    record.airflow.wait_for_dag("recorded_broken")
    (record.airflow.dags / "breaks_later.py").write_text(BREAKS_LATER + "\nraise RuntimeError('broken')\n")
    request = TriggerRequest("recorded_broken", {"a": CANARY})
    deadline = time.monotonic() + 60
    number, last = 0, None
    while time.monotonic() < deadline:
        number += 1
        response = record.send(with_admin(record, api.create_run(request, f"broken-{number}", NOTE)))
        if response.status != last:
            print(f"broken DAG: {response.status}")
            last = response.status
            if response.status in (400, 404):
                case = "dag_broken" if response.status == 400 else "dag_gone"
                record(case, api.create_run(request, f"broken-{number}", NOTE))
        if response.status == 404:
            return
        time.sleep(0.2)


def signed(claims: Mapping[str, Any], secret: str) -> str:
    def part(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).decode().rstrip("=")

    head = part(json.dumps({"alg": "HS512", "typ": "JWT"}).encode()) + "." + part(json.dumps(claims).encode())
    return f"{head}.{part(hmac.new(secret.encode(), head.encode(), hashlib.sha512).digest())}"


def record_v2(record: Recorder) -> None:
    """Airflow 3."""
    airflow, api = record.airflow, protocol_v2
    plain = TriggerRequest("recorded", {"a": CANARY})
    record("login", login(airflow.username, airflow.password), {})
    record("login_refused", login(airflow.username, CANARY), {})
    record("login_malformed", post("/auth/token", {"password": CANARY}), {})
    record("login_for_nobody", HttpRequest("GET", "/auth/token"), {})
    record_both(record, api, "/api/v2")
    later = TriggerRequest("recorded", run_after=datetime(2031, 1, 1, tzinfo=UTC))
    record("created_for_later", api.create_run(later, "later", NOTE))
    record("v1_removed", protocol_v1.create_run(plain, "v1", NOTE))
    record("v1_version", protocol_v1.ask_version(), {})
    claims = json.loads(base64.urlsafe_b64decode(record.tokens["admin"].split(".")[1] + "=="))
    old = claims | {name: claims[name] - 100_000 for name in ("iat", "nbf", "exp")}
    secret = json.loads((airflow.home / "secrets.json").read_text())["jwt_secret"]
    request = api.create_run(plain, "refused", NOTE)
    record("token_expired", request, {"Authorization": f"Bearer {signed(old, secret)}"})
    record("token_invalid", request, {"Authorization": f"Bearer {signed(claims, 'x' * 64)}"})
    record("token_is_none", request, {"Authorization": "Bearer nonsense"})
    record("basic_auth", request, {"Authorization": "Basic YWRtaW46YWRtaW4="})
    viewer = json.loads((airflow.home / "passwords.json").read_text())["viewer"]
    record("forbidden", request, record.authorised("viewer", viewer))
    record("unpause_forbidden", api.unpause_dag("recorded"), record.authorised("viewer", viewer))
    task = TaskInstance(dag_id="recorded_params", dag_run_id="counted-0", task_id="nothing")
    forbidden = api.set_task_state(task, "success", NOTE)
    record("task_set_forbidden", forbidden, record.authorised("viewer", viewer))
    record_broken(record, api)
    airflow.extra_env["AIRFLOW__API__EXPOSE_STACKTRACE"] = "True"
    airflow.restart_api()
    record("run_id_taken_with_stacktrace", api.create_run(plain, "plain", NOTE))
    record(
        "conf_with_nul_with_stacktrace",
        post("/api/v2/dags/recorded/dagRuns", {"conf": {"a": f"{CANARY}\0"}, "logical_date": None}),
    )
    airflow.postgres.stop()
    record("database_down_with_stacktrace", request)
    del airflow.extra_env["AIRFLOW__API__EXPOSE_STACKTRACE"]


def record_v1(record: Recorder) -> None:
    """Airflow 2."""
    airflow, api = record.airflow, protocol_v1
    plain = TriggerRequest("recorded", {"a": CANARY})
    record("v2_version", protocol_v2.ask_version(), {})
    record("v2_create", protocol_v2.create_run(plain, "v2", NOTE), {})
    record("v2_login", login(airflow.username, CANARY), {})
    record_both(record, api, "/api/v1")
    request = api.create_run(plain, "refused", NOTE)
    wrong = base64.b64encode(f"admin:{CANARY}".encode()).decode()
    record("password_wrong", request, {"Authorization": f"Basic {wrong}"})
    record("dags_password_wrong", api.ask_whether_accepted(), {"Authorization": f"Basic {wrong}"})
    record("bearer", request, {"Authorization": "Bearer nonsense"})
    status, answer = airflow.api(
        "POST",
        "/users",
        {
            "username": "viewer",
            "password": "viewer",
            "first_name": "v",
            "last_name": "w",
            "email": "v@example.org",
            "roles": [{"name": "Viewer"}],
        },
    )
    assert status == 200, answer
    viewer = record.authorised("viewer", "viewer")
    record("forbidden", request, viewer)
    record("unpause_forbidden", api.unpause_dag("recorded"), viewer)
    task = TaskInstance(dag_id="recorded_params", dag_run_id="counted-0", task_id="nothing")
    record("task_set_forbidden", api.set_task_state(task, "success", NOTE), viewer)
    record("dags_of_viewer", api.ask_whether_accepted(), viewer)
    for size in (protocol_v1.MAX_BODY_BYTES, protocol_v1.MAX_BODY_BYTES + 1, 1_048_577):
        start = json.dumps({"dag_run_id": f"size-{size}", "conf": {"a": ""}}).encode()[:-3]
        body = start + b"x" * (size - len(start) - 3) + b'"}}'
        assert len(body) == size
        record(f"size_{size}", post("/api/v1/dags/recorded/dagRuns", body))
    record("run_after", post("/api/v1/dags/recorded/dagRuns", {"run_after": "2031-01-01T00:00:00+00:00"}))
    record_broken(record, api)
    airflow.postgres.stop()
    record("database_down", request)


@contextmanager
def running(version: Version) -> Iterator[Airflow]:
    with tempfile.TemporaryDirectory() as folder:
        dags = Path(folder) / "dags"
        dags.mkdir()
        (dags / "recorded.py").write_text(DAGS)
        (dags / "breaks_later.py").write_text(BREAKS_LATER)
        more = {}
        if version == "3":
            more = {
                "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin,viewer:viewer",
                # Long enough to see 400 "has import errors" before the DAG counts as gone.
                "AIRFLOW__DAG_PROCESSOR__STALE_DAG_THRESHOLD": "10",
            }
        airflow = Airflow(version, home=Path(folder) / "home", dags=dags, extra_env=more)
        try:
            airflow.start(print)
            airflow.wait_for_dag("recorded")
            airflow.wait_for_dag("recorded_params")
            yield airflow
        finally:
            airflow.stop()


def main() -> None:
    for version in sys.argv[1:] or ("3", "2"):
        assert version in ("2", "3")
        folder = ANSWERS / ("v2" if version == "3" else "v1")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with running(version) as airflow:
            (record_v2 if version == "3" else record_v1)(Recorder(airflow, folder))


if __name__ == "__main__":
    main()
