"""A DAG here starts a DAG in another Airflow, of another version if need be, and waits for it.

Dagrelay's workers must know that Airflow: `AIRFLOW_CONN_WAREHOUSE=https://user:password@warehouse.example.org`
in their environment. This Airflow needs no connection to it, no network path and no password: it talks to
Dagrelay's Redis alone (`dagrelay_default`).

Runs on Airflow 2.11 and 3. The other Airflow needs a DAG `daily_sales` (see `daily_sales.py`).
"""

from __future__ import annotations

try:
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG

from producers.airflow.operators import RelayTriggerDagRunOperator

with DAG("cross_airflow", schedule=None, catchup=False, tags=["example"]) as cross_airflow:
    RelayTriggerDagRunOperator(
        task_id="warehouse",
        connection="warehouse",
        trigger_dag_id="daily_sales",
        conf={"region": "north", "amounts": [12.5, 30]},
        wait_for_completion=True,
        wait_timeout_s=3600,
        result_from="report",
        if_paused="hold",  # its people pause it now and then: the request waits until they do no more
        stop_run=True,  # whoever marks or clears this task stops the run over there
    )
