"""What Airflow has itself: a parent that starts a child, and one that waits for it in the triggerer."""

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG

with DAG("native_start", schedule=None, catchup=False) as native_start:
    TriggerDagRunOperator(task_id="start", trigger_dag_id="leaf")

with DAG("native_wait", schedule=None, catchup=False) as native_wait:
    TriggerDagRunOperator(
        task_id="start", trigger_dag_id="slow", wait_for_completion=True, deferrable=True, poke_interval=1
    )
