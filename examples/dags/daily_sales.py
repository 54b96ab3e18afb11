"""The example of the demo: counts what one day's sales of a region come to.

Runs on Airflow 2.11 and 3. Its conf: {"region": "north", "amounts": [12.5, 30]}.
"""

from __future__ import annotations

from typing import Any

try:
    from airflow.sdk import dag, get_current_context, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
    from airflow.operators.python import get_current_context


@dag(dag_id="daily_sales", schedule=None, catchup=False, tags=["example"])
def daily_sales() -> None:
    @task
    def report() -> dict[str, Any]:
        """Read the conf of this run and return the sums; Airflow keeps them as the task's XCom."""
        conf = get_current_context()["dag_run"].conf or {}
        amounts = [float(amount) for amount in conf.get("amounts", [])]
        return {"region": conf.get("region", "everywhere"), "rows": len(amounts), "total": sum(amounts)}

    report()


daily_sales()
