"""A training that is asked for by a message, and answers by messages.

What must run: Dagrelay's workers, with the queues in their environment,
`DAGRELAY_SERVICE_TRAINERS={"url": "amqp://user:pass@rabbitmq/", "queue": "train", "reply_to": "trained"}`,
and a listener for the answers,
`dagrelay listen 'amqp://user:pass@rabbitmq/?queue=trained' --answers trainers`. The message has our
reference as its correlation id; an answer has the same, and is `{"state": "running", "epoch": 3}` or
`{"state": "done", "model": {"uri": "…"}}`. SQS, Kafka and Redis streams do as well: see docs/doors.md.

Runs on Airflow 2.11 and 3, with a triggerer.
"""

from __future__ import annotations

try:
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG

from producers.airflow.operators import ExternalJobOperator

with DAG("external_training_queue", schedule=None, catchup=False, tags=["example"]) as dag:
    trained = ExternalJobOperator.partial(
        task_id="train",
        service="trainers",
        via="queue",
        progress="epoch",
        result="model.uri",
        on_cancel={"message": {"cancel": "{reference}"}},
        heartbeat_s=3600,  # longer without a word, and the task fails
    ).expand(message=[{"train": region} for region in ("north", "south")])
