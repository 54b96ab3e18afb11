"""A task that is wrong by its form, which Airflow must say when it reads this file."""

from __future__ import annotations

try:
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG

from producers.airflow.operators import ExternalJobOperator

with DAG("broken", schedule=None, catchup=False):
    ExternalJobOperator(
        task_id="job",
        service="train",
        path="/jobs/{job_id}",
        submit={"path": "/jobs", "body": {"day": "{{ ds }}"}},
        success=["done"],
        failure=["DONE"],
        state="status ||| x",
    )
