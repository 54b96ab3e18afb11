"""Two of its runs at a time. Paused, until a test has it unpaused."""

from __future__ import annotations

try:
    from airflow.sdk import dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task


@dag(dag_id="gated", schedule=None, catchup=False, is_paused_upon_creation=True, max_active_runs=2)
def gated() -> None:
    @task
    def nothing() -> None: ...

    nothing()


gated()
