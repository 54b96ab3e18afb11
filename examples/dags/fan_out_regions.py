"""One task starts fifty runs of another DAG, and the next gets all of their outcomes.

Needs what `ingest_then_analytics.py` says, and `daily_sales.py` beside it. Up to two runs may fail; with more
the task is tried again, and starts only those once more. No more than eight of them are in Airflow at a time.

Runs on Airflow 2.11 and 3.
"""

from __future__ import annotations

from typing import Any

try:
    from airflow.sdk import dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task

from producers.airflow.operators import RelayFanOutOperator


@dag(dag_id="fan_out_regions", schedule=None, catchup=False, tags=["example"])
def fan_out_regions() -> None:
    @task
    def confs() -> list[dict[str, Any]]:
        return [{"region": f"region-{number:02d}", "amounts": [number, 2 * number]} for number in range(50)]

    regions = RelayFanOutOperator(
        task_id="regions",
        trigger_dag_id="daily_sales",
        confs=confs(),
        result_from="report",
        window=8,
        allowed_failures=2,
        retries=1,
    )

    @task
    def join(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
        """Add up the results; what failed has none."""
        reports = [one["run"]["result"] for one in outcomes if one["state"] == "done"]
        return {"regions": len(reports), "total": sum(report["total"] for report in reports)}

    join(regions.output)


fan_out_regions()
