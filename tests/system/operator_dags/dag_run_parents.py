"""Parents that start the DAGs in `dag_run_children.py`: each is a case of `test_dag_run_operators.py`."""

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

from producers.airflow.operators import RelayFanOutOperator, RelayTriggerDagRunOperator

QUICK = {"retry_delay": timedelta(seconds=1)}
FILE = "{{ dag_run.conf['until'] }}"


class Dying(RelayTriggerDagRunOperator):
    """Its process is killed in its first try, when the request has just been handed over."""

    def hand_over(self, client: Any, request_id: str, context: Any, served: Any) -> None:
        super().hand_over(client, request_id, context, served)
        if context["ti"].try_number == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def parent(name: str, operator: type = RelayTriggerDagRunOperator, **arguments: Any) -> None:
    """Make the DAG of one case: its task is called `go`."""
    with DAG(f"parent_{name}", schedule=None, catchup=False) as made:
        if operator is not RelayFanOutOperator:
            arguments.setdefault("trigger_dag_id", "child")
        operator(task_id="go", **QUICK, **arguments)
    globals()[made.dag_id] = made


WAIT = {"wait_for_completion": True}

parent(
    "result", **WAIT, result_from="say", conf={"who": "{{ dag_run.conf['who'] }}"}, note="for {{ run_id }}"
)
parent("facts", trigger_dag_id="leaf", **WAIT, conf='{{ {"a": [1, 2]} | tojson }}')
parent("start_only", trigger_dag_id="leaf")
parent("other_airflow", trigger_dag_id="leaf", **WAIT, connection="elsewhere", deferrable=False)
parent("missing", trigger_dag_id="no_such_dag")
parent("child_fails", **WAIT, conf={"fail": True})
parent("flaky", **WAIT, conf={"fail_once": True}, result_from="say", retries=1)
# Airflow 2.11 may count the killed try twice: by its exit code, and by what the executor says.
parent("killed", Dying, **WAIT, result_from="say", retries=3)
parent("failed_is_good", **WAIT, conf={"fail": True}, allowed_states=["success", "failed"], failed_states=[])
parent("success_is_bad", **WAIT, failed_states=["success"], allowed_states=["failed"], retries=1)
parent("taken", trigger_run_id="taken", conf={"n": 1}, **WAIT)
parent("taken_skip", trigger_run_id="taken", conf={"n": 2}, skip_when_already_exists=True)
parent(
    "taken_reset", trigger_run_id="taken_reset", conf={"n": 1}, reset_dag_run=True, result_from="say", **WAIT
)
parent("own_run_id", trigger_run_id="own", conf={"fail_once": True}, result_from="say", retries=1, **WAIT)
parent("date", trigger_dag_id="leaf", logical_date="{{ dag_run.conf['date'] }}", **WAIT)
parent("paused", trigger_dag_id="paused_child", fail_when_dag_is_paused=True)
parent("no_connection", relay_conn_id="nowhere", retries=1)
parent("redis_away", relay_conn_id="refused", retries=1)
parent("bad_conf", conf="{{ dag_run.conf }}", retries=3)
parent("marked", conf={"until": FILE}, stop_run=True, **WAIT)
parent("cleared", conf={"until": FILE}, result_from="say", **WAIT)
parent("cleared_and_stopped", conf={"until": FILE}, result_from="say", stop_run=True, **WAIT)
parent("cleared_later", conf={"n": "{{ dag_run.conf['n'] }}"}, result_from="say", **WAIT)
parent("through_kills", trigger_dag_id="paused_child", result_from="say", **WAIT)

FANNED = {"trigger_dag_id": "fanned_child", "result_from": "say"}
parent(
    "fan",
    RelayFanOutOperator,
    confs=[{"n": 0}, {"n": 1}, {"n": 1}, {"n": 3, "fail_once": True}],
    retries=1,
    **FANNED,
)
parent(
    "fan_fails",
    RelayFanOutOperator,
    confs=[{"n": n, "fail": n < 2} for n in range(4)],
    allowed_failures=0.25,
    **FANNED,
)
parent(
    "fan_may_fail",
    RelayFanOutOperator,
    requests=[{"dag_id": "fanned_child", "conf": {"m": n, "fail": n == 0}} for n in range(3)],
    allowed_failures=1,
)
parent(
    "fan_started",
    RelayFanOutOperator,
    trigger_dag_id="fanned_leaf",
    confs=[{"s": 1}, None],
    wait_for_completion=False,
)
parent(
    "fan_marked",
    RelayFanOutOperator,
    trigger_dag_id="fanned_child",
    confs=[{"until": FILE, "x": 1}],
    stop_run=True,
)

with DAG("parent_mapped", schedule=None, catchup=False) as parent_mapped:

    @task
    def confs() -> list[dict[str, Any]]:
        return [{"mapped": number} for number in range(3)]

    @task
    def requests(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"dag_id": "fanned_leaf", "conf": {"then": one["return"]["conf"]["mapped"]}} for one in given]

    @task
    def together(results: Any) -> list[dict[str, Any]]:
        return [{"return": one} for one in results]

    go = RelayTriggerDagRunOperator.partial(
        task_id="go", trigger_dag_id="child", result_from="say", **WAIT
    ).expand(conf=confs())
    RelayFanOutOperator(task_id="fan", requests=requests(together(go.output)))
