"""What the parents in `dag_run_parents.py` start.

`child` does what its conf says: {"fail": true} fails, {"fail_once": true} fails when it runs for the first
time, {"until": path} runs until that file is there. It returns its conf, and how often it was run.

`leaf` does nothing, and costs no process.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

try:
    from airflow.providers.standard.operators.empty import EmptyOperator
    from airflow.sdk import DAG, dag, get_current_context, task
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.decorators import dag, task
    from airflow.operators.empty import EmptyOperator
    from airflow.operators.python import get_current_context


def as_told() -> None:
    @task
    def say() -> dict[str, Any]:
        context = get_current_context()
        conf = context["dag_run"].conf or {}
        tries = context["ti"].try_number
        if "until" in conf:
            deadline = time.monotonic() + 900
            while not Path(conf["until"]).exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(conf["until"])
                time.sleep(0.1)
        if conf.get("fail") or (conf.get("fail_once") and tries == 1):
            raise ValueError("as the conf says")
        return {"conf": conf, "tries": tries}

    say()


for name in ("child", "paused_child", "fanned_child"):
    globals()[name] = dag(dag_id=name, schedule=None, catchup=False, max_active_runs=32)(as_told)()

for name in ("leaf", "fanned_leaf"):
    with DAG(name, schedule=None, catchup=False, max_active_runs=32) as made:
        EmptyOperator(task_id="say")
    globals()[name] = made
