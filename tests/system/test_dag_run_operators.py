"""The operators that start DAG runs, in both real Airflows with our provider beside them.

All parents of `operator_dags/dag_run_parents.py` are started at once; each test looks at what became of one.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from local.airflow import Airflow
from local.valkey import Valkey
from tests.system.stack import QUICK, until
from tests.worker import Worker

tell = logging.getLogger(__name__)

DAGS = Path(__file__).with_name("operator_dags")
COMPONENTS = {
    "2": ("api", "scheduler", "triggerer"),
    "3": ("api", "scheduler", "dag-processor", "triggerer"),
}
EXAMPLES = Path(__file__).parents[2] / "examples" / "dags"
SAYS = Path(__file__).with_name("callers") / "dag_run_operators.py"
# Started by their tests: children that wait for a file hold Airflow's few processes.
LATER = ("marked", "fan_marked", "cleared", "cleared_and_stopped", "cleared_later", "through_kills")


class Rig:
    """One Airflow with our provider, one Valkey, one worker; and the runs of the parents."""

    def __init__(self, airflow: Airflow, valkey: Valkey, worker: Worker, folder: Path) -> None:
        self.airflow, self.valkey, self.worker, self.folder = airflow, valkey, worker, folder

    def file(self, name: str) -> Path:
        """The file for which the children of a parent wait."""
        return self.folder / f"{name}.go"

    def get(self, path: str, **params: Any) -> Any:
        status, found = self.airflow.api("GET", path, params=params)
        assert status == 200, (status, found)
        return found

    def start(self, dag_id: str, run_id: str = "r", conf: dict[str, Any] | None = None) -> None:
        body: dict[str, Any] = {"dag_run_id": run_id, "conf": conf or {}}
        if self.airflow.version == "3":
            body["logical_date"] = None
        status, found = self.airflow.api("POST", f"/dags/{dag_id}/dagRuns", body)
        assert status == 200, (status, found)

    def start_parent(self, name: str) -> None:
        self.start(
            f"parent_{name}",
            conf={"who": "Ada", "date": "2024-05-01T00:00:00+00:00", "until": str(self.file(name)), "n": 7},
        )

    def ended(self, name: str, run_id: str = "r") -> str:
        """How a parent has ended. Where it failed, the test's log has what is known of it."""
        state = str(self.airflow.wait_for_run(f"parent_{name}", run_id, 300)["state"])
        if state == "failed" and name != "mapped":
            with suppress(AssertionError):  # a try that never began has no log
                self._tell_of(name, run_id)
        return state

    def _tell_of(self, name: str, run_id: str) -> None:
        task = self.task(name, run_id)
        tell.warning("%s", task)
        for number in range(1, task["try_number"] + 1):
            tell.warning("try %d: %s", number, self.log(name, number, run_id))
        for line in self.airflow.log_of("scheduler").read_text(errors="replace").splitlines():
            if f"parent_{name}." in line and "finished with state" in line:
                tell.warning("scheduler: %s", line)
        path = f"{self._path(name, run_id, 'go')}/xcomEntries/trigger_run_id"
        status, child = self.airflow.api("GET", path)
        for line in self.worker.text().splitlines() if status == 200 else ():
            if child["value"] in line:
                tell.warning("worker: %s", line)

    def _path(self, name: str, run_id: str, task_id: str) -> str:
        return f"/dags/parent_{name}/dagRuns/{run_id}/taskInstances/{task_id}"

    def task(self, name: str, run_id: str = "r", task_id: str = "go") -> dict[str, Any]:
        return dict(self.get(self._path(name, run_id, task_id)))

    def until_deferred(self, name: str) -> None:
        """Wait until the triggerer has it: before, nobody is told what somebody does to the task."""
        until(lambda: self.task(name)["state"] == "deferred", f"{name} deferred", 240)
        words = f"request {self.xcom(name, 'dagrelay_request_id')}: "
        until(lambda: words in self.log(name), f"{name} waited for", 120, 0.5)

    def xcom(self, name: str, key: str = "return_value", run_id: str = "r", **more: Any) -> Any:
        found = self.get(f"{self._path(name, run_id, more.pop('task_id', 'go'))}/xcomEntries/{key}", **more)
        # Airflow 2 gives the repr.
        return found["value"] if self.airflow.version == "3" else _unrepr(found["value"])

    def log(self, name: str, try_number: int = 1, run_id: str = "r") -> str:
        """The log of a try, as text without backslashes; that of the triggerer is in it."""
        path = f"{self._path(name, run_id, 'go')}/logs/{try_number}"
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

    def links(self, name: str, run_id: str = "r") -> dict[str, Any]:
        found = dict(self.get(f"{self._path(name, run_id, 'go')}/links"))
        return dict(found.get("extra_links", found))

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """All runs of a child."""
        found = self.get(f"/dags/{dag_id}/dagRuns", limit=100)
        assert found["total_entries"] <= 100
        return list(found["dag_runs"])

    def children(self, dag_id: str = "child", **conf: Any) -> list[dict[str, Any]]:
        """The runs of a child whose conf has all of this."""
        return [
            run for run in self.runs(dag_id) if all((run["conf"] or {}).get(k) == v for k, v in conf.items())
        ]

    def child(self, name: str, dag_id: str = "child") -> dict[str, Any]:
        """The one run that a parent says it has started."""
        return dict(self.get(f"/dags/{dag_id}/dagRuns/{self.xcom(name, 'trigger_run_id')}"))

    def says(self) -> dict[str, Any]:
        """What the operators make of arguments, in this Airflow's Python."""
        done = subprocess.run(
            [self.airflow.environment.python, str(SAYS), str(EXAMPLES)],
            env=self.airflow.env(),
            cwd=self.airflow.home,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def set_task(self, name: str, state: str, run_id: str = "r") -> None:
        """Mark a task as a person does."""
        if self.airflow.version == "3":
            body: dict[str, Any] = {"new_state": state}
        else:
            body = {"new_state": state, "dry_run": False}
        status, found = self.airflow.api("PATCH", self._path(name, run_id, "go"), body)
        assert status == 200, (status, found)

    def clear(self, name: str, run_id: str = "r") -> None:
        """Clear a task as a person does."""
        body = {"dry_run": False, "dag_run_id": run_id, "task_ids": ["go"], "only_failed": False}
        if self.airflow.version == "2":
            body["reset_dag_runs"] = True
        status, found = self.airflow.api("POST", f"/dags/parent_{name}/clearTaskInstances", body)
        assert status == 200, (status, found)


def _unrepr(text: str) -> Any:
    return eval(text, {}) if text[:1] in "[{('\"" or text == "None" else text  # noqa: S307


@pytest.fixture(scope="module", params=["3", "2"], ids=["airflow3", "airflow2"])
def airflow(request: pytest.FixtureRequest) -> str:
    """Which Airflow; by this name the tests of one version run together."""
    return str(request.param)


@pytest.fixture(scope="module")
def rig(airflow: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp(f"operators{airflow}")
    shutil.copytree(DAGS, folder / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    with Valkey() as valkey:
        redis = {"conn_type": "dagrelay", "extra": {"redis_url": valkey.url, "flower_url": "http://flower"}}
        running = Airflow(
            airflow,  # type: ignore[arg-type]
            home=folder / "home",
            dags=folder / "dags",
            components=COMPONENTS[airflow],
            parallelism=6,
            provider=True,
            extra_env={
                "AIRFLOW_CONN_DAGRELAY_DEFAULT": json.dumps(redis),
                "AIRFLOW_CONN_REFUSED": "dagrelay://127.0.0.1:1/0",
            },
        )
        with running:
            connections = {"default": running.conn_uri, "elsewhere": running.conn_uri}
            # A busy Airflow 2 takes its DAGs for gone, now and then, for some seconds.
            quick = QUICK | {"DAGRELAY_MISSING_GRACE_S": "20"}
            with Worker(valkey.url, folder, connections=connections, **quick) as worker:
                made = Rig(running, valkey, worker, folder)
                _start_all(made)
                yield made


def _start_all(rig: Rig) -> None:
    for dag_id in ("child", "paused_child", "fanned_child", "leaf", "fanned_leaf", "parent_mapped"):
        rig.airflow.wait_for_dag(dag_id)
    for run_id in ("taken", "taken_reset"):
        rig.start("child", run_id, {"n": 1})
    for run_id in ("taken", "taken_reset"):
        rig.airflow.wait_for_run("child", run_id)
    status, _ = rig.airflow.api("PATCH", "/dags/paused_child", {"is_paused": True})
    assert status == 200
    parents = [
        dag["dag_id"] for dag in rig.get("/dags", limit=100)["dags"] if dag["dag_id"].startswith("parent_")
    ]
    assert len(parents) > 25
    for dag_id in parents:
        name = dag_id.removeprefix("parent_")
        if name not in LATER:
            rig.start_parent(name)


# Before it runs


def test_what_cannot_work_is_refused_as_the_file_is_read_and_the_examples_are_read(rig: Rig) -> None:
    said = rig.says()
    assert said["import_errors"] == {}
    assert said["right"] == ["", "", ""]
    begins = {
        "dag_id": "InvalidRequest: trigger_dag_id: is no DAG id",
        "empty": "InvalidRequest: trigger_dag_id: ",
        "none": "InvalidRequest: trigger_dag_id: is missing",
        "run_id": "InvalidRequest: trigger_run_id: would be refused",
        "conf": "InvalidRequest: conf.at is of type datetime",
        "conf_text": "InvalidRequest: conf: is text that is no JSON",
        "conf_list": "InvalidRequest: conf: is of type list",
        "date": "InvalidRequest: logical_date: is no date and time",
        "connection": "InvalidRequest: connection: is no connection id",
        "both": "InvalidRequest: reset_dag_run and skip_when_already_exists: give one",
        "paused": "InvalidRequest: fail_when_dag_is_paused: contradicts if_paused='hold'",
        "state": "InvalidRequest: allowed_states: has 'running'",
        "no_state": "InvalidRequest: failed_states: has each of the allowed_states",
        "no_wait": "InvalidRequest: result_from: needs wait_for_completion=True",
        "beside_a_template": "InvalidRequest: window: is neither",
        "truth": "InvalidRequest: wait_for_completion: is neither true nor false",
    }
    for name, words in begins.items():
        assert said["wrong"][name].startswith(words), name
    assert "trigger_dag" in said["wrong"]["unknown"]
    begins = {
        "neither": "requests: give them, or trigger_dag_id and confs",
        "both": "requests: give them, or trigger_dag_id and confs",
        "no_dag": "trigger_dag_id: goes with confs",
        "second": "confs[1]: conf.a is nan",
        "conf": "confs[1]: conf: is of type int",
        "empty": "confs[0]: dag_id: ",
        "field": "requests[0]: configuration: is no argument",
        "missing": "requests[0]: dag_id: is missing",
        "kind": "requests: has one of type int",
        "allowed": "allowed_failures: give a number",
        "on_error": "on_error: give 'continue' or 'stop'",
        "text": "requests: is text that is no JSON",
    }
    for name, words in begins.items():
        assert said["wrong_many"][name].startswith(f"InvalidRequest: {words}"), name


def test_requests_of_a_fan_out_keep_their_runs_whatever_their_order(rig: Rig) -> None:
    pure = rig.says()["pure"]
    assert len(set(pure["ids"])) == 4
    assert pure["turned"] == sorted(pure["ids"])
    assert pure["again"] == ["reuse", "clear", "clear", "clear"]
    assert pure["cleared"] == ["clear"] * 4
    assert pure["own"] == ["reuse", "clear"]
    assert pure["elsewhere"] == ["reuse", "reuse"]  # a run of that id in another Airflow is another run
    assert (pure["same"], pure["keyed"], pure["reference"]) == (True, True, ["sha256:" + "0" * 64])
    assert pure["allowed"] == [0, 3, 2, 50, 29]
    assert "run" not in pure["shortened"]


def test_another_key_for_confs_between_two_tries_makes_no_other_run(rig: Rig) -> None:
    pure = rig.says()["pure"]
    assert pure["first_key"]
    assert pure["newer_key"] == [True] * 3


# One run


def test_the_childs_result_is_the_tasks_xcom_and_the_run_says_who_asked(rig: Rig) -> None:
    assert rig.ended("result") == "success"
    assert rig.xcom("result") == {"conf": {"who": "Ada"}, "tries": 1}
    child = rig.child("result")
    assert child["dag_run_id"].startswith("relay__")
    assert "by=airflow_parent_result/go_try_1" in child["note"]
    assert child["note"].endswith("for r")


def test_the_task_links_to_the_run_and_to_flower(rig: Rig) -> None:
    assert rig.ended("result") == "success"
    child, links = rig.xcom("result", "trigger_run_id"), rig.links("result")
    assert child in links["Triggered DAG"].replace("%3A", ":")
    assert links["Triggered DAG"].startswith(rig.airflow.url)
    assert links["Flower"] == f"http://flower/task/{rig.xcom('result', 'dagrelay_request_id')}"


def test_without_result_from_the_xcom_has_the_facts_of_the_run(rig: Rig) -> None:
    assert rig.ended("facts") == "success"
    facts = rig.xcom("facts")
    assert (facts["dag_id"], facts["state"], facts["created"]) == ("leaf", "success", True)
    assert rig.child("facts", "leaf")["conf"] == {"a": [1, 2]}


def test_a_task_that_does_not_wait_ends_when_the_run_is_there(rig: Rig) -> None:
    assert rig.ended("start_only") == "success"
    assert rig.xcom("start_only")["created"] is True
    assert rig.xcom("start_only")["state"] == "queued"
    assert rig.child("start_only", "leaf")


def test_another_airflow_by_the_name_that_workers_know_it_by_and_waiting_in_the_worker(rig: Rig) -> None:
    assert rig.ended("other_airflow") == "success"
    assert rig.xcom("other_airflow")["connection"] == "elsewhere"


def test_a_dag_that_there_is_not_fails_the_task(rig: Rig) -> None:
    assert rig.ended("missing") == "failed"
    assert "Airflow has no DAG 'no_such_dag'" in rig.log("missing")


def test_a_failed_child_fails_the_task_and_is_named(rig: Rig) -> None:
    assert rig.ended("child_fails") == "failed"
    log = rig.log("child_fails")
    assert f"run '{rig.xcom('child_fails', 'trigger_run_id')}' of DAG 'child' failed" in log


@pytest.mark.parametrize("name", ["flaky", "own_run_id"])
def test_a_retry_has_the_same_child_run_again(rig: Rig, name: str) -> None:
    assert rig.ended(name) == "success"
    assert rig.task(name)["try_number"] == 2
    assert rig.xcom(name)["tries"] == 2
    assert rig.xcom(name, "trigger_run_id") == (
        "own" if name == "own_run_id" else rig.child(name)["dag_run_id"]
    )


def test_a_try_that_is_killed_leaves_its_child_to_the_next(rig: Rig) -> None:
    assert rig.ended("killed") == "success"
    assert rig.xcom("killed")["tries"] == 1
    assert "was handed over by an earlier try" in rig.log("killed", rig.task("killed")["try_number"])


def test_a_failed_child_may_be_good(rig: Rig) -> None:
    assert rig.ended("failed_is_good") == "success"
    assert rig.xcom("failed_is_good")["state"] == "failed"


def test_a_child_that_succeeds_may_be_bad_and_then_a_retry_begins_anew(rig: Rig) -> None:
    assert rig.ended("success_is_bad") == "failed"
    assert "ended as success, which is in failed_states" in rig.log("success_is_bad")
    child = rig.xcom("success_is_bad", "trigger_run_id")
    assert rig.get(f"/dags/child/dagRuns/{child}/taskInstances/say")["try_number"] == 2


def test_a_run_of_somebody_elses_fails_the_task_skips_it_or_is_cleared(rig: Rig) -> None:
    assert rig.ended("taken") == "failed"
    assert "exists already" in rig.log("taken")
    rig.ended("taken_skip")
    assert rig.task("taken_skip")["state"] == "skipped"
    assert rig.ended("taken_reset") == "success"
    assert rig.xcom("taken_reset")["tries"] == 2
    assert rig.get("/dags/child/dagRuns/taken/taskInstances/say")["try_number"] == 1


def test_a_logical_date_gives_the_run_the_id_that_airflow_would_give_it(rig: Rig) -> None:
    assert rig.ended("date") == "success"
    assert rig.child("date", "leaf")["logical_date"].startswith("2024-05-01T00:00:00")
    assert rig.xcom("date", "trigger_run_id") == "manual__2024-05-01T00:00:00+00:00"


def test_a_paused_dag_fails_the_task_where_it_is_to(rig: Rig) -> None:
    assert rig.ended("paused") == "failed"
    assert "is paused, and no run was made" in rig.log("paused")
    assert rig.runs("paused_child") == []


def test_an_unknown_connection_and_a_conf_that_is_no_json_fail_by_name(rig: Rig) -> None:
    for name, tries, words in (
        ("no_connection", 2, "relay_conn_id: Airflow has no connection 'nowhere'"),
        ("bad_conf", 1, "conf: is text that is no JSON"),
    ):
        assert rig.ended(name) == "failed"
        assert rig.task(name)["try_number"] == tries
        assert words in rig.log(name, tries)


def test_a_missing_redis_is_a_failure_that_airflow_retries(rig: Rig) -> None:
    assert rig.ended("redis_away") == "failed"
    assert rig.task("redis_away")["try_number"] == 2
    assert "127.0.0.1:1" in rig.log("redis_away")


def test_mapped_tasks_have_a_child_each_and_feed_a_fan_out(rig: Rig) -> None:
    assert rig.ended("mapped") == "success"
    assert len({run["dag_run_id"] for run in rig.runs("child") if "mapped" in (run["conf"] or {})}) == 3
    outcomes = rig.xcom("mapped", task_id="fan")
    assert [one["state"] for one in outcomes] == ["done"] * 3
    assert {run["conf"]["then"] for run in rig.runs("fanned_leaf") if "then" in (run["conf"] or {})} == {
        0,
        1,
        2,
    }


# Many


def test_a_fan_out_returns_all_outcomes_and_a_retry_repeats_only_what_failed(rig: Rig) -> None:
    assert rig.ended("fan") == "success"
    assert rig.task("fan")["try_number"] == 2
    outcomes = rig.xcom("fan")
    assert [one["run"]["result"]["conf"].get("n") for one in outcomes] == [0, 1, 1, 3]
    assert [one["run"]["result"]["tries"] for one in outcomes] == [1, 1, 1, 2]
    assert len({one["dag_run_id"] for one in outcomes}) == 4
    assert (
        len([run for run in rig.runs("fanned_child") if "n" in run["conf"] and "fail" not in run["conf"]])
        == 4
    )
    assert rig.xcom("fan", "dagrelay_fan_out")["done"] == 4


def test_a_fan_out_fails_with_the_first_failures_and_may_allow_some(rig: Rig) -> None:
    assert rig.ended("fan_fails") == "failed"
    assert "2 of 4 did not end well (allowed: 0.25): [0] run relay__" in rig.log("fan_fails")
    assert rig.ended("fan_may_fail") == "success"
    assert [one["state"] for one in rig.xcom("fan_may_fail")] == ["failed", "done", "done"]
    assert rig.ended("fan_started") == "success"
    assert [one["run"]["created"] for one in rig.xcom("fan_started")] == [True, True]


# What people do


def test_a_marked_task_stops_its_child_where_it_is_to(rig: Rig) -> None:
    rig.start_parent("marked")
    rig.until_deferred("marked")
    rig.set_task("marked", "failed")
    until(lambda: rig.child("marked")["state"] == "failed", "the child stopped", 120)


def test_a_marked_fan_out_stops_its_children(rig: Rig) -> None:
    rig.start_parent("fan_marked")
    rig.until_deferred("fan_marked")
    (child,) = until(lambda: rig.children("fanned_child", x=1), "the child there", 120)
    rig.set_task("fan_marked", "success")
    way = f"/dags/fanned_child/dagRuns/{child['dag_run_id']}"
    until(lambda: rig.get(way)["state"] == "failed", "the child stopped", 120)


def test_a_cleared_task_waits_for_the_child_that_runs(rig: Rig) -> None:
    rig.start_parent("cleared")
    rig.until_deferred("cleared")
    child = rig.xcom("cleared", "trigger_run_id")
    first = rig.xcom("cleared", "dagrelay_request_id")
    rig.clear("cleared")
    until(lambda: _other(rig, "cleared", first), "another request", 120)
    rig.file("cleared").touch()
    assert rig.ended("cleared") == "success"
    assert rig.xcom("cleared", "trigger_run_id") == child
    assert rig.xcom("cleared")["tries"] == 1


def test_a_cleared_task_that_stops_its_child_has_it_run_again(rig: Rig) -> None:
    rig.start_parent("cleared_and_stopped")
    rig.until_deferred("cleared_and_stopped")
    child = rig.xcom("cleared_and_stopped", "trigger_run_id")
    first = rig.xcom("cleared_and_stopped", "dagrelay_request_id")
    rig.clear("cleared_and_stopped")
    second = until(lambda: _other(rig, "cleared_and_stopped", first), "another request", 120)
    # It did not join the run that was just being stopped.
    until(lambda: f"run cleared task_id={second} " in rig.worker.text(), "cleared", 60)
    rig.file("cleared_and_stopped").touch()
    assert rig.ended("cleared_and_stopped") == "success"
    assert rig.xcom("cleared_and_stopped", "trigger_run_id") == child


def _other(rig: Rig, name: str, request_id: str) -> str | None:
    """Return the request with which a task waits anew, once it does."""
    if rig.task(name)["state"] != "deferred":
        return None
    found = str(rig.xcom(name, "dagrelay_request_id"))
    return found if found != request_id else None


def test_a_task_cleared_after_its_success_has_the_same_child_run_again(rig: Rig) -> None:
    rig.start_parent("cleared_later")
    assert rig.ended("cleared_later") == "success"
    child = rig.xcom("cleared_later", "trigger_run_id")
    rig.clear("cleared_later")
    until(lambda: rig.task("cleared_later")["try_number"] == 2, "the second try", 120)
    assert rig.ended("cleared_later") == "success"
    assert (rig.xcom("cleared_later", "trigger_run_id"), rig.xcom("cleared_later")["tries"]) == (child, 2)


# The last: what runs is killed


def test_kills_of_triggerer_scheduler_and_worker_in_the_midst_start_nothing_twice(rig: Rig) -> None:
    rig.start_parent("through_kills")  # its child's DAG is paused: no process of the child's is killed
    rig.until_deferred("through_kills")
    for component in ("triggerer", "scheduler"):
        rig.airflow.kill_component(component)
    rig.worker.kill()
    status, _ = rig.airflow.api("PATCH", "/dags/paused_child", {"is_paused": False})
    assert status == 200
    rig.worker.start()
    for component in ("scheduler", "triggerer"):
        rig.airflow.start_component(component)
    assert rig.ended("through_kills") == "success"
    assert rig.xcom("through_kills")["tries"] == 1
    assert [run["dag_run_id"] for run in rig.runs("paused_child")] == [
        rig.xcom("through_kills", "trigger_run_id")
    ]
