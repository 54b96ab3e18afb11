"""The same by Dagrelay; one whose conf is large; and as many external jobs as `JOBS` says."""

import os
from typing import Any

from airflow.sdk import DAG

from producers.airflow.operators import ExternalJobOperator, RelayTriggerDagRunOperator

with DAG("relay_start", schedule=None, catchup=False) as relay_start:
    RelayTriggerDagRunOperator(task_id="start", trigger_dag_id="leaf")

with DAG("relay_wait", schedule=None, catchup=False) as relay_wait:
    RelayTriggerDagRunOperator(task_id="start", trigger_dag_id="slow", wait_for_completion=True)


def make_large(context: dict[str, Any]) -> None:
    """Give the operator its conf as it runs: one written in a DAG file lies in Airflow's database."""
    context["task"].conf = {"rows": [f"{number:06d}" + "x" * 994 for number in range(10_000)]}


with DAG("relay_large", schedule=None, catchup=False) as relay_large:
    RelayTriggerDagRunOperator(
        task_id="start", trigger_dag_id="digest", wait_for_completion=True, pre_execute=make_large
    )

with DAG("first_job", schedule=None, catchup=False) as first_job:
    ExternalJobOperator(task_id="job", service="bench", path="/jobs/first", interval_s=2, max_interval_s=2)

with DAG("jobs", schedule=None, catchup=False, max_active_tasks=2000) as jobs:
    ExternalJobOperator.partial(
        task_id="job", service="bench", path="/jobs/{job_id}", interval_s=2, max_interval_s=2
    ).expand(job_id=[f"job-{number}" for number in range(int(os.environ.get("JOBS", "500")))])
