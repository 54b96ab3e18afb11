"""A conf from a caller to a task, in both real Airflows: 10 MB by reference, small ones sealed on the way."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from local.airflow import Airflow
from local.process import ROOT, clean_env
from local.valkey import Valkey
from tests.system.stack import QUICK
from tests.worker import Worker

DAGS = Path(__file__).with_name("conf_dags")
KEY = base64.urlsafe_b64encode(os.urandom(32)).decode()
COMPONENTS = {
    "2": ("api", "scheduler", "triggerer"),
    "3": ("api", "scheduler", "dag-processor", "triggerer"),
}
MOST_BYTES = 2048
"""Of a run in Airflow, whatever its conf is."""


class Rig:
    """One Airflow with our provider, one Valkey, one worker, and a caller: all of them have the key."""

    def __init__(self, airflow: Airflow, valkey: Valkey, folder: Path) -> None:
        self.airflow, self.folder = airflow, folder
        self.redis = Redis.from_url(valkey.url)
        self._env = clean_env(DAGRELAY_REDIS_URL=valkey.url, DAGRELAY_CONF_KEY=KEY)

    def trigger(self, dag_id: str, conf: Any, run_id: str) -> None:
        """Have the command start a run, and wait for its end."""
        path = self.folder / f"{run_id}.json"
        path.write_text(json.dumps(conf))
        argv = [
            sys.executable,
            "-m",
            "producers.cli",
            "trigger",
            dag_id,
            "--conf",
            f"@{path}",
            "--run-id",
            run_id,
        ]
        done = subprocess.run(
            [*argv, "--until-created"], cwd=ROOT, env=self._env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert self.airflow.wait_for_run(dag_id, run_id, 180)["state"] == "success"

    def run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        status, found = self.airflow.api("GET", f"/dags/{dag_id}/dagRuns/{run_id}")
        assert status == 200, found
        return dict(found)

    def read(self, run_id: str) -> Any:
        """What the task of the DAG `reads` has returned."""
        path = f"/dags/reads/dagRuns/{run_id}/taskInstances/read/xcomEntries/return_value"
        status, found = self.airflow.api("GET", path)
        assert status == 200, found
        value = found["value"]
        return eval(value, {}) if isinstance(value, str) else value  # noqa: S307 - Airflow 2 gives the repr

    def everything(self) -> bytes:
        """The dumps of all that lies in Redis."""
        return b"".join(self.redis.dump(name) or b"" for name in self.redis.scan_iter(count=1000))


@pytest.fixture(scope="module", params=["3", "2"], ids=["airflow3", "airflow2"])
def airflow(request: pytest.FixtureRequest) -> str:
    """Which Airflow; by this name the tests of one version run together."""
    return str(request.param)


@pytest.fixture(scope="module")
def rig(airflow: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp(f"confs{airflow}")
    shutil.copytree(DAGS, folder / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    with Valkey(config={"rdbcompression": "no"}) as valkey:  # what is dumped is to be searched
        redis = {"conn_type": "dagrelay", "extra": {"redis_url": valkey.url, "conf_key": KEY}}
        running = Airflow(
            airflow,  # type: ignore[arg-type]
            home=folder / "home",
            dags=folder / "dags",
            components=COMPONENTS[airflow],
            provider=True,
            extra_env={"AIRFLOW_CONN_DAGRELAY_DEFAULT": json.dumps(redis)},
        )
        with running:
            for dag_id in ("reads", "hands_on"):
                running.wait_for_dag(dag_id)
            env = {**QUICK, "DAGRELAY_CONF_KEY": KEY}
            with Worker(valkey.url, folder, connections={"default": running.conn_uri}, **env):
                yield Rig(running, valkey, folder)


def told(conf: Any) -> dict[str, Any]:
    text = json.dumps(conf, sort_keys=True, separators=(",", ":"))
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "keys": sorted(conf)}


def test_a_conf_of_10_mb_arrives_whole_and_is_handed_on_while_the_runs_stay_small(rig: Rig) -> None:
    draw = random.Random(11)  # noqa: S311
    conf = {"rows": [{"id": n, "name": f"{draw.random()}" * 3} for n in range(150_000)], "ü": "…"}
    assert len(json.dumps(conf)) > 10_000_000

    rig.trigger("reads", conf, "large")
    assert rig.read("large") == told(conf)
    rig.trigger("hands_on", conf, "parent")
    assert rig.airflow.wait_for_run("reads", "handed_on", 180)["state"] == "success"
    assert rig.read("handed_on") == told(conf)

    runs = [rig.run("reads", "large"), rig.run("hands_on", "parent"), rig.run("reads", "handed_on")]
    assert len({json.dumps(run["conf"], sort_keys=True) for run in runs}) == 1
    assert all(len(json.dumps(run)) < MOST_BYTES for run in runs)


def test_a_small_conf_is_in_the_run_as_it_is_and_nowhere_in_redis(rig: Rig) -> None:
    conf = {"pin": "c4n4ry-s3cret"}
    rig.trigger("reads", conf, "small")
    assert rig.run("reads", "small")["conf"] == conf
    assert rig.read("small") == told(conf)
    there = rig.everything()
    assert b"small" in there  # else this looked at nothing
    assert b"c4n4ry-s3cret" not in there
