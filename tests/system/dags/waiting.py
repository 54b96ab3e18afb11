"""Its tasks wait to be told the end of a job: one, three of a mapped one, and one whose process sleeps.

Those that wait deferred say who they are, as `task_instance_of(context)` would. No triggerer runs here, so
nobody wakes them.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

try:
    from airflow.providers.standard.triggers.temporal import TimeDeltaTrigger
    from airflow.sdk import BaseOperator, dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
    from airflow.models.baseoperator import BaseOperator
    from airflow.triggers.temporal import TimeDeltaTrigger


class Waits(BaseOperator):
    """Defers for an hour."""

    def __init__(self, *, number: int = 0, **more: Any) -> None:
        super().__init__(**more)
        self.number = number

    def execute(self, context: Any) -> None:
        """Say who it is, and wait."""
        ti = context["ti"]
        told = {"dag_id": ti.dag_id, "dag_run_id": ti.run_id, "task_id": ti.task_id}
        ti.xcom_push(key="me", value={**told, "map_index": ti.map_index, "try_number": ti.try_number})
        self.defer(trigger=TimeDeltaTrigger(timedelta(hours=1)), method_name="never")

    def never(self, context: Any, event: Any = None) -> None:
        """It is told before."""


@dag(dag_id="waiting", schedule=None, catchup=False)
def waiting() -> None:
    @task
    def sleeps() -> None:
        time.sleep(600)

    @task
    def after() -> None: ...

    sleeps()
    Waits(task_id="alone") >> after()
    Waits.partial(task_id="each").expand(number=[0, 1, 2])


waiting()
