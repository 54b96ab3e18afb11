"""Paused from the beginning: its runs are made and wait, so that a test of triggers costs no scheduler."""

from __future__ import annotations

try:
    from airflow.sdk import dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task


@dag(dag_id="quiet", schedule=None, catchup=False, is_paused_upon_creation=True)
def quiet() -> None:
    @task
    def nothing() -> None: ...

    nothing()


quiet()
