"""The whole trip on one machine: `make demo`, and `make demo-check` which does not stay.

    trigger_dag.delay("daily_sales", conf={...})  →  Valkey  →  a worker  →  Airflow 3  →  its answer

and one DAG that starts another by our operator, in that Airflow (`examples/dags/ingest_then_analytics.py`).
Everything is real and made for this run alone, on free ports, in a folder of its own below `.local/demo`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import IO, Any

import requests

from local.airflow import Airflow
from local.process import ROOT, STATE, PartFailed, clean_env, free_port
from local.supervisor import (
    Stopped,
    Supervisor,
    end_on_signals,
    start_flower,
    start_worker,
    stop_on_signals,
    wait_for_flower,
    wait_for_worker,
)
from local.valkey import Valkey

DAG_ID = "daily_sales"
CONF: dict[str, Any] = {"region": "north", "amounts": [120.5, 79.5, 300]}
EXPECTED = {"region": "north", "rows": 3, "total": 500.0}
ACCEPTED_WITHIN_S = 60.0
RUN_WITHIN_S = 120.0

PARENT_ID, CHILD_ID = "ingest", "analytics"
FILES: dict[str, Any] = {"files": ["north.csv", "south.csv", "west.csv"]}
PUBLISHED = "3 rows, 60 in total"
COMPONENTS = ("api", "scheduler", "dag-processor", "triggerer")


class Clock:
    """Prints lines with the seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {line}", flush=True)


def own_folder(base: Path) -> tuple[Path, IO[str]]:
    """Make a folder for this run and hold its lock; remove those of runs that were killed before."""
    base.mkdir(parents=True, exist_ok=True)
    for left in base.iterdir():
        lock_file = left / "in-use"
        if not lock_file.exists():
            continue
        with lock_file.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another demo runs there
            shutil.rmtree(left, ignore_errors=True)
    folder = base / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    making = base / f".{folder.name}"
    making.mkdir()
    held = (making / "in-use").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    making.rename(folder)
    return folder, held


def follow(airflow: Airflow, run_id: str, say: Clock) -> tuple[str, Any]:
    """Ask Airflow's REST API, as anybody could, until the run has ended; return its state and its XCom."""
    http = requests.Session()
    http.trust_env = False
    login = {"username": airflow.username, "password": airflow.password}
    token = http.post(f"{airflow.url}/auth/token", json=login, timeout=30)
    token.raise_for_status()
    http.headers["Authorization"] = f"Bearer {token.json()['access_token']}"
    run_url = f"{airflow.url}/api/v2/dags/{DAG_ID}/dagRuns/{run_id}"
    seen = ""
    deadline = time.monotonic() + RUN_WITHIN_S
    while True:
        answer = http.get(run_url, timeout=30)
        answer.raise_for_status()
        state = str(answer.json()["state"])
        if state != seen:
            say(f"the run is {state}")
            seen = state
        if state in ("success", "failed"):
            break
        if time.monotonic() > deadline:
            raise PartFailed(f"the run {run_id} has not ended after {RUN_WITHIN_S:g} s; it is {state}")
        time.sleep(0.3)
    xcom = http.get(f"{run_url}/taskInstances/report/xcomEntries/return_value", timeout=30)
    return state, xcom.json().get("value") if xcom.ok else None


def run(folder: Path, supervisor: Supervisor, say: Clock, *, stay: bool) -> bool:
    """Start everything, trigger one run, follow it; return whether it did what it should."""
    logs = folder / "logs"
    valkey = Valkey(folder / "valkey")
    supervisor.start("Valkey", valkey.start)
    say(f"Valkey answers on {valkey.url}")
    airflow = Airflow(
        "3",
        home=folder / "airflow",
        dags=ROOT / "examples" / "dags",
        parallelism=2,
        components=COMPONENTS,
        provider=True,
        extra_env={"DAGRELAY_REDIS_URL": valkey.url},  # what its operators hand over to
    )
    supervisor.start("Airflow", lambda: airflow.start(say, wait=False))

    flower_port, flower_user, flower_password = free_port(), "demo", secrets.token_urlsafe(9)
    flower_url = f"http://127.0.0.1:{flower_port}"
    env = clean_env(
        DAGRELAY_REDIS_URL=valkey.url,
        AIRFLOW_CONN_DEFAULT=airflow.conn_uri,
        DAGRELAY_FLOWER_USER=flower_user,
        DAGRELAY_FLOWER_PASSWORD=flower_password,
        DAGRELAY_FLOWER_PORT=str(flower_port),
        DAGRELAY_FLOWER_ADDRESS="127.0.0.1",
        PYTHONUNBUFFERED="1",
    )
    say("starting a worker and Flower meanwhile")
    worker = start_worker(env, log=logs / "worker.log")
    supervisor.start("the worker", lambda: worker)
    flower = start_flower(env, log=logs / "flower.log")
    supervisor.start("Flower", lambda: flower)
    wait_for_worker(worker, valkey.url)
    say("the worker answers")
    wait_for_flower(flower, flower_url)
    say(f"Flower answers on {flower_url}")
    airflow.wait_healthy()
    say(f"Airflow's API answers on {airflow.url}")
    airflow.wait_for_dag(DAG_ID)
    say(f"Airflow has read the DAG {DAG_ID}")

    # Only now: this is what another service would write, and it has the address from its environment.
    os.environ["DAGRELAY_REDIS_URL"] = valkey.url
    from producers import trigger_dag

    say(f'trigger_dag.delay("{DAG_ID}", conf={CONF})')
    handle = trigger_dag.delay(DAG_ID, conf=CONF)
    say(f"accepted as {handle.id}")
    started = handle.get(timeout=ACCEPTED_WITHIN_S)
    say(f"Airflow has the run {started.dag_run_id}")
    state, returned = follow(airflow, started.dag_run_id, say)
    ok = state == "success" and returned == EXPECTED

    for dag_id in (PARENT_ID, CHILD_ID):
        airflow.wait_for_dag(dag_id)
    say(f'trigger_dag.delay("{PARENT_ID}", conf={FILES}, wait=True, result_from="publish")')
    parent = trigger_dag.delay(PARENT_ID, conf=FILES, wait=True, result_from="publish").get(RUN_WITHIN_S)
    say(f"{PARENT_ID} started {CHILD_ID} by RelayTriggerDagRunOperator, waited for it, and took its result")
    ok = ok and parent.result == PUBLISHED

    print()
    print(f"  run       {started.dag_run_id}")
    print(f"  state     {state}")
    print(f"  returned  {returned}")
    print(f"  {PARENT_ID:9} {parent.state}, {parent.result!r}")
    if not ok:
        print(f"  expected  success, {EXPECTED}; {PUBLISHED!r}")
    print(f"  Flower    {flower_url}   {flower_user} / {flower_password}")
    print(f"  Airflow   {airflow.url}   {airflow.username} / {airflow.password}")
    print(f"  Redis     {valkey.url}")
    if stay:
        print(f"  logs      {os.path.relpath(logs)}, {os.path.relpath(airflow.home / 'logs')}")
        print("\nMore runs, from another terminal (they are in Flower and in Airflow at once):")
        print(f"  DAGRELAY_REDIS_URL={valkey.url} make trigger DAG={DAG_ID} CONF='{json.dumps(CONF)}'")
        print("\nCtrl-C ends all of it.", flush=True)
        supervisor.watch()
    print(flush=True)
    return ok


def main() -> int:
    """Return 0 if the run succeeded and returned what was expected."""
    parser = argparse.ArgumentParser(
        description="From trigger_dag.delay(...) to a finished run in a real Airflow."
    )
    parser.add_argument(
        "--check", action="store_true", help="do not stay: end everything when the run has ended"
    )
    options = parser.parse_args()
    say = Clock()
    supervisor = Supervisor(say)
    folder, held = own_folder(STATE / "demo")
    code = 1
    stop_on_signals()
    try:
        ok = run(folder, supervisor, say, stay=not options.check)
        code = 0 if ok else 1
    except Stopped:
        print(flush=True)
        code = 130 if options.check else 0  # to be stopped is how the demo ends, and not how the check does
    except PartFailed as exc:
        print(exc, file=sys.stderr, flush=True)
    finally:
        end_on_signals()
        supervisor.stop()
        if code == 1:
            print(f"the logs are kept in {os.path.relpath(folder)} until the next demo", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        held.close()
    say("all stopped")
    return code


if __name__ == "__main__":
    sys.exit(main())
