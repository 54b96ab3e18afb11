"""DAGs with one external job each: the cases of `test_external_job_operator.py`. The task is called `job`."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from typing import Any

try:
    from airflow.sdk import DAG, task
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.decorators import task

from producers.airflow.operators import ExternalJobOperator
from producers.airflow.sensors import ExternalJobSensor


class Dying(ExternalJobOperator):
    """Its process is killed in its first try, when the job has just been handed over."""

    def hand_over(self, client: Any, request_id: str, context: Any, served: Any) -> None:
        super().hand_over(client, request_id, context, served)
        if context["ti"].try_number == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Terminated(ExternalJobOperator):
    """It gets a SIGTERM in its first try, before anything is handed over, as on a node that is drained."""

    def hand_over(self, client: Any, request_id: str, context: Any, served: Any) -> None:
        if context["ti"].try_number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        super().hand_over(client, request_id, context, served)


def job(
    name: str, operator: type = ExternalJobOperator, dag: dict[str, Any] | None = None, **given: Any
) -> None:
    """Make the DAG of one case. The service is told the name, by which the test finds its job."""
    with DAG(name, schedule=None, catchup=False, **dag or {}) as made:
        if operator is not ExternalJobSensor:
            defaults = {
                "service": "train",
                "path": "/jobs/{job_id}",
                "submit": {"path": "/jobs", "body": {"name": name, "run": "{{ run_id }}"}},
                "on_cancel": {"method": "DELETE", "path": "/jobs/{job_id}"},
                "result": "model",
                "progress": "epoch",
                "reason": "why",
                "interval_s": 0.3,
                "max_interval_s": 0.5,
            }
            given = defaults | given
        operator(task_id="job", retry_delay=timedelta(seconds=1), **given)
    globals()[name] = made


def sensor(name: str, **given: Any) -> None:
    """Make the DAG of one sensor; its request, or its job, is named by the run's conf."""
    with DAG(name, schedule=None, catchup=False) as made:
        ExternalJobSensor(task_id="job", retry_delay=timedelta(seconds=1), **given)
    globals()[name] = made


job("done", timeout_s="{{ 600 * 2 }}")
job("in_the_worker", deferrable=False)
job("resumed", end_from_trigger=False)
job("fails")
job("fails_once", retries=1)
job("refused", retries=0)
job("killed", Dying, retries=1)
job("terminated", Terminated, retries=1)
job("marked")
job("marked_in_the_worker", deferrable=False)
job("kept", cancel_on_kill=False)
job("cleared")
job("deleted")
job("cancelled_outside", retries=3)
job("too_long", execution_timeout=timedelta(seconds=20))
job("run_too_long", dag={"dagrun_timeout": timedelta(seconds=40)})
job("no_service", service="nowhere", retries=3)
job("no_connection", relay_conn_id="nowhere", retries=1)
job("redis_away", relay_conn_id="refused", retries=1)
job("bad_when_run", path="{{ dag_run.conf['bad_path'] }}", retries=3)
job(
    "by_callback",
    path=None,
    submit={"path": "/jobs", "body": {"name": "by_callback", "tell": "{callback_url}"}},
)
QUEUE = {"service": "render", "via": "queue", "message": {"name": "by_queue", "day": "{{ run_id }}"}}
job("by_queue", **QUEUE, path=None, submit=None, on_cancel=None, interval_s=None, max_interval_s=None)
job("through_kills")

sensor("sensed", request_id="{{ dag_run.conf['request_id'] }}")
sensor("sensed_marked", request_id="{{ dag_run.conf['request_id'] }}")
sensor(
    "followed", service="train", path="/jobs/{job_id}", job_id="{{ dag_run.conf['job_id'] }}", result="model"
)
sensor("soft", request_id="{{ dag_run.conf['failing_id'] }}", soft_fail=True)
sensor("overdue", request_id="{{ dag_run.conf['request_id'] }}", timeout=15, retries=3)
sensor(
    "overdue_here", request_id="{{ dag_run.conf['request_id'] }}", timeout=3, deferrable=False, soft_fail=True
)

with DAG("mapped", schedule=None, catchup=False) as mapped:

    @task
    def twice(n: int) -> int:
        """Return twice a number."""
        return 2 * n

    trained = ExternalJobOperator.partial(
        task_id="job", service="train", path="/jobs/{job_id}", result="model", interval_s=0.3
    ).expand(submit=[{"path": "/jobs", "body": {"name": "mapped", "n": n}} for n in (1, 2)])

    parts = ExternalJobOperator(
        task_id="parts",
        service="train",
        path="/jobs/{job_id}",
        submit={"path": "/jobs", "body": {"name": "parts", "trained": trained.output}},
        result="model",
        interval_s=0.3,
    )
    twice.expand(n=parts.output)
