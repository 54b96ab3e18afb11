"""Takes no run without a `day` of the form that its Param asks for. Paused: see `quiet`."""

from __future__ import annotations

try:
    from airflow.sdk import Param, dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
    from airflow.models.param import Param

DAY = Param(type="string", pattern=r"^\d{4}-\d{2}-\d{2}$")


@dag(dag_id="strict", schedule=None, catchup=False, is_paused_upon_creation=True, params={"day": DAY})
def strict() -> None:
    @task
    def nothing() -> None: ...

    nothing()


strict()
