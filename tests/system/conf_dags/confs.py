"""DAGs that read the conf of their run, and one that hands it on as it came: see `test_confs.py`."""

from __future__ import annotations

import hashlib
import json
from typing import Any

try:
    from airflow.sdk import DAG, task
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.decorators import task

from producers.airflow.conf import relay_conf
from producers.airflow.operators import RelayTriggerDagRunOperator


@task
def read(**context: Any) -> dict[str, Any]:
    conf = relay_conf(context)
    assert conf == relay_conf()
    text = json.dumps(conf, sort_keys=True, separators=(",", ":"))
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "keys": sorted(conf)}


with DAG("reads", schedule=None) as reads:
    read()

with DAG("hands_on", schedule=None) as hands_on:
    RelayTriggerDagRunOperator(
        task_id="go", trigger_dag_id="reads", conf="{{ dag_run.conf | tojson }}", trigger_run_id="handed_on"
    )
