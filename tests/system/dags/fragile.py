"""The one whose file a test breaks and mends. Paused: see `quiet`."""

from __future__ import annotations

try:
    from airflow.sdk import dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task


@dag(dag_id="fragile", schedule=None, catchup=False, is_paused_upon_creation=True)
def fragile() -> None:
    @task
    def nothing() -> None: ...

    nothing()


fragile()
