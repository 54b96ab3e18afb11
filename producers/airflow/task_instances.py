"""The task that runs just now, as a job's `task_instance`: for tasks that wait without our operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..contract import TaskInstance


def task_instance_of(context: Mapping[str, Any], connection: str = "default") -> TaskInstance:
    """Return the running task of a context, with its try, for `poll_external_job(…, task_instance=…)`.

    `connection` is the id under which the workers know this Airflow. What ends after this try is over leaves
    the next one alone.
    """
    ti = context["ti"]
    return TaskInstance(
        dag_id=ti.dag_id,
        dag_run_id=ti.run_id,
        task_id=ti.task_id,
        map_index=ti.map_index if ti.map_index is not None else -1,
        try_number=ti.try_number,
        connection=connection,
    )
