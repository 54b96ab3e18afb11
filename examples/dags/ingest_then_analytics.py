"""One DAG starts another, waits for it without a worker, and takes its result.

Needs `pip install dagrelay` in Airflow, a connection `dagrelay_default` to Dagrelay's Redis, and Dagrelay's
workers, which know this Airflow as `default`. Tried again, or cleared, `ingest` finds the run of `analytics`
that is its own; the conf may have any size, for `relay_conf` fetches what is too large to travel.

Runs on Airflow 2.11 and 3. Start `ingest`, with a conf or without: {"files": ["a.csv", "b.csv"]}.
"""

from __future__ import annotations

from typing import Any

try:
    from airflow.sdk import dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task

from producers.airflow.conf import relay_conf
from producers.airflow.operators import RelayTriggerDagRunOperator


@dag(dag_id="ingest", schedule=None, catchup=False, tags=["example"])
def ingest() -> None:
    @task
    def read() -> dict[str, Any]:
        """Return what was read; it becomes the conf of the other DAG."""
        files = relay_conf().get("files", ["a.csv"])
        return {"rows": [{"file": name, "amount": 10 * number} for number, name in enumerate(files, 1)]}

    analytics = RelayTriggerDagRunOperator(
        task_id="analytics",
        trigger_dag_id="analytics",
        conf=read(),
        wait_for_completion=True,
        result_from="count",
        note="started by {{ run_id }}",
        retries=2,
    )

    @task
    def publish(report: dict[str, Any]) -> str:
        """Take what the task `count` of the other DAG has returned."""
        return f"{report['rows']} rows, {report['total']} in total"

    publish(analytics.output)


@dag(dag_id="analytics", schedule=None, catchup=False, tags=["example"])
def analytics() -> None:
    @task
    def count() -> dict[str, Any]:
        rows = relay_conf().get("rows", [])
        return {"rows": len(rows), "total": sum(row["amount"] for row in rows)}

    count()


ingest()
analytics()
