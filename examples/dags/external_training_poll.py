"""A training on an outside service that is asked how it gets on; its result decides what is done with it.

What must run: Dagrelay's workers, with the service in their environment,
`DAGRELAY_SERVICE_TRAINING={"url": "https://training.example.org", "token": "…"}`. This Airflow needs no path
to the service and no token: it talks to Dagrelay's Redis alone (`dagrelay_default`), and runs a triggerer.

Runs on Airflow 2.11 and 3.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

try:
    from airflow.sdk import DAG, task
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.decorators import task

from producers.airflow.operators import ExternalJobOperator

with DAG("external_training_poll", schedule=None, catchup=False, tags=["example"]) as external_training_poll:
    train = ExternalJobOperator(
        task_id="train",
        service="training",
        submit={"path": "/jobs", "body": {"data": "{{ params.data }}"}, "job_id": "id"},
        path="/jobs/{job_id}",  # asked after 10 s, then ever less often, at least once a minute
        interval_s=10,
        state="status",
        progress="join(' of ', [to_string(epoch), to_string(epochs)])",  # a line of the task's log
        result="{model_uri: model.uri, loss: model.loss}",  # the task's XCom
        reason="error.message",  # what the task fails with
        on_cancel={"method": "DELETE", "path": "/jobs/{job_id}"},  # when it is marked, cleared or too late
        timeout_s=6 * 3600,
        params={"data": "s3://sales/2024"},
        retries=1,  # after a job that failed; a worker that is lost starts no second one
        retry_delay=timedelta(minutes=5),
    )

    @task
    def publish(model: dict[str, Any]) -> str:
        """Say what became of it."""
        return f"{model['model_uri']} has a loss of {model['loss']}"

    publish(train.output)
