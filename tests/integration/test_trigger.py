"""From `.delay()` to the run, through a real Valkey and a real worker process."""

from producers.contract import TriggerRequest


def test_a_trigger_becomes_a_run(relay, airflow, start_worker):
    start_worker()

    run = relay.enqueue(TriggerRequest("daily_sales", {"day": "2026-11-20"}, key="k1")).get(timeout=10)

    assert (run.dag_id, run.dag_run_id, run.created) == ("daily_sales", "relay__k1", True)
    assert airflow.runs["daily_sales", "relay__k1"]["conf"] == {"day": "2026-11-20"}
