"""Run by Airflow's Python, with our wheel beside it: says, as JSON, what operators make of arguments."""

from __future__ import annotations

import json
import sys
from typing import Any

try:
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG

from producers.airflow.operators import ExternalJobOperator
from producers.airflow.sensors import ExternalJobSensor
from producers.contract import Submit
from producers.errors import InvalidRequest

LOOK = {"service": "train", "path": "/jobs/{job_id}"}

with DAG("said", schedule=None, catchup=False) as dag:
    other = ExternalJobOperator(task_id="other", **LOOK, submit={"path": "/jobs"})


def said(operator: Any = ExternalJobOperator, **given: Any) -> str:
    """Return the refusal, or ""."""
    try:
        operator(task_id=f"job{len(dag.tasks)}", dag=dag, **given)
    except InvalidRequest as exc:
        return str(exc)
    return ""


RIGHT = {
    "templates": {
        "service": "{{ params.s }}",
        "path": "/{{ params.p }}/{job_id}",
        "submit": {"path": "/x/{{ ds }}", "method": "{{ params.m }}", "job_id": "{{ params.i }}"},
        "headers": {"X-Day": "{{ ds }}"},
        "timeout_s": "{{ params.t }}",
        "state": "{{ params.e }}",
        "success": "{{ params.l }}",
        "then": {"dag_id": "{{ params.d }}", "conf": {"day": "{{ ds }}"}, "note": "{{ ds }}"},
    },
    "submit_unknown": LOOK | {"submit": other.output, "job_id": None},
    "job_unknown": LOOK | {"job_id": other.output["job_id"]},
    "calls_back_perhaps": {"service": "train", "submit": {"path": "/jobs", "body": "{{ params.body }}"}},
    "submit_as_a_model": LOOK | {"submit": Submit(path="/jobs")},
    "url": {"service": "train", "url": "{{ params.url }}", "job_id": "1"},
    "queue": {"service": "train", "via": "queue", "message": other.output},
    "numbers_as_text": LOOK
    | {"job_id": "1", "timeout_s": "5", "max_errors": "2", "gone": ["404"]}
    | {"then": {"dag_id": "d", "priority": "3", "give_up_after_s": "60"}},
    "texts_as_numbers": {"service": "train", "path": "/jobs/{job_id}", "job_id": 5, "query": {"page": 2}},
    "texts_as_numbers_within": LOOK | {"submit": {"path": "/jobs", "headers": {"X-Day": 7}}},
}
WRONG = {
    "path": {"service": "train"},
    "path_and_url": {"service": "{{ s }}", "path": "/x", "url": "https://{{ h }}/x"},
    "state": {"service": "train", "path": "/{{ y }}", "state": "]["},
    "job_id": {"service": "train", "path": "/{{ y }}/{job_id}"},
    "no_callback": {"service": "train", "submit": {"path": "/{{ y }}"}},
    "then": LOOK | {"submit": other.output, "then": {"dag_id": "a b", "conf": {"d": "{{ ds }}"}}},
    "credentials": LOOK | {"job_id": "{{ x }}", "headers": {"Authorization": "{{ var.value.token }}"}},
    "queue": {"service": "train", "via": "queue", "message": {"a": "{{ x }}"}, "path": "/x"},
    "states": LOOK | {"job_id": "{{ x }}", "success": ["done"], "failure": ["Done"]},
    "seconds": LOOK | {"job_id": "1", "timeout_s": "soon"},
}
SENSORS = {
    "": {"request_id": "{{ x }}"},
    "nothing": {},
    "both": {"request_id": "x", "path": "/x"},
    "no_job": LOOK,
}
made = {
    "right": {name: said(**given) for name, given in RIGHT.items()},
    "wrong": {name: said(**given) for name, given in WRONG.items()},
    "sensors": {name: said(ExternalJobSensor, **given) for name, given in SENSORS.items()},
}
sys.stdout.write(json.dumps(made))
