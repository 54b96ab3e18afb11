"""What is started: one that ends at once, one that takes a while, and one that tells what conf it got."""

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, task

with DAG("leaf", schedule=None, catchup=False) as leaf:
    EmptyOperator(task_id="nothing")

with DAG("slow", schedule=None, catchup=False) as slow:

    @task
    def sleep() -> None:
        import time

        time.sleep(4)

    sleep()

with DAG("digest", schedule=None, catchup=False) as digest:

    @task
    def digest_of() -> str:
        import hashlib
        import json

        from producers.airflow.conf import relay_conf

        return hashlib.sha256(json.dumps(relay_conf(), sort_keys=True).encode()).hexdigest()

    digest_of()
