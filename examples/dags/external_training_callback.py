"""A training on an outside service that calls back when it is through: nobody asks it meanwhile.

What must run: Dagrelay's workers, with the service (`DAGRELAY_SERVICE_TRAINING`) and with
`DAGRELAY_CALLBACK_URL=https://dagrelay.example.org/` and `DAGRELAY_CALLBACK_SECRET` in their environment, and
at that address the gateway (`dagrelay gateway`) with the same secret. The service is told a URL for this job
alone, and posts to it `{"status": "done", "model": {"uri": "…"}}` when it is through, or
`{"status": "running", "epoch": 3}` on the way.

Runs on Airflow 2.11 and 3, with a triggerer.
"""

from __future__ import annotations

try:
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG

from producers.airflow.operators import ExternalJobOperator

with DAG("external_training_callback", schedule=None, catchup=False, tags=["example"]) as dag:
    ExternalJobOperator(
        task_id="train",
        service="training",
        submit={"path": "/jobs", "body": {"data": "s3://sales/{{ run_id }}", "tell": "{callback_url}"}},
        state="status",
        progress="epoch",
        result="model",
        path="/jobs/{job_id}",  # asked only where it is silent for too long; without a path, never
        interval_s=900,
        max_interval_s=900,
        heartbeat_s=1800,
        on_cancel={"method": "DELETE", "path": "/jobs/{job_id}"},
    )
