"""Run by Airflow's Python, with our wheel beside it: says what operators for DAG runs make of arguments.

It says it as JSON. Its argument is a folder of DAG files: their import errors are said too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

from producers import TriggerRequest
from producers.airflow import dag_runs
from producers.airflow.operators import RelayFanOutOperator, RelayTriggerDagRunOperator
from producers.stores.claim_check import ConfKeys
from producers.stores.serving import RunBefore, Served

try:
    from airflow.dag_processing.dagbag import DagBag
except ImportError:  # Airflow 2
    from airflow.models.dagbag import DagBag

WRONG: dict[str, dict[str, Any]] = {
    "dag_id": {"trigger_dag_id": "no such/dag"},
    "empty": {"trigger_dag_id": ""},
    "none": {"trigger_dag_id": None},
    "run_id": {"trigger_run_id": "scheduled__x"},
    "conf": {"conf": {"at": datetime.now(UTC)}},
    "conf_text": {"conf": "{'a': 1}"},
    "conf_list": {"conf": "[1]"},
    "date": {"logical_date": "soon"},
    "connection": {"connection": "no-name"},
    "both": {"reset_dag_run": True, "skip_when_already_exists": True},
    "paused": {"fail_when_dag_is_paused": True, "if_paused": "hold"},
    "state": {"allowed_states": ["running"]},
    "no_state": {"allowed_states": ["failed"], "wait_for_completion": True},
    "no_wait": {"result_from": "say"},
    "beside_a_template": {"conf": "{{ ds }}", "window": 0},
    "truth": {"wait_for_completion": "perhaps"},
    "unknown": {"trigger_dag": "x"},
}
WRONG_MANY: dict[str, dict[str, Any]] = {
    "neither": {},
    "both": {"requests": [{"dag_id": "a"}], "confs": [{}]},
    "no_dag": {"confs": [{}]},
    "second": {"trigger_dag_id": "a", "confs": [{}, {"a": float("nan")}]},
    "conf": {"trigger_dag_id": "a", "confs": [{}, 3]},
    "empty": {"trigger_dag_id": "", "confs": [{}]},
    "field": {"requests": [{"dag_id": "{{ a }}", "configuration": {}}]},
    "missing": {"requests": [{"conf": {}}]},
    "kind": {"requests": [1]},
    "allowed": {"requests": [], "allowed_failures": 1.5},
    "on_error": {"requests": [], "on_error": "halt"},
    "text": {"requests": "a"},
}
RIGHT: list[dict[str, Any]] = [
    {
        "trigger_dag_id": "{{ var.value.x }}",
        "conf": "{{ ds }}",
        "trigger_run_id": "{{ run_id }}",
        "note": "{{ ds }}",
    },
    {
        "trigger_dag_id": "a",
        "wait_for_completion": "{{ params.wait }}",
        "result_from": "x",
        "wait_timeout_s": 5,
    },
    {
        "trigger_dag_id": "a",
        "poke_interval": 5,
        "logical_date": None,
        "failed_states": [],
        "deferrable": False,
    },
]


def refused(make: Callable[[], object]) -> str:
    """Return in which words it is."""
    try:
        make()
    except Exception as exc:  # noqa: BLE001 - whichever it is, it is told
        return f"{type(exc).__name__}: {exc}"
    return ""


def one_run(**given: Any) -> RelayTriggerDagRunOperator:
    return RelayTriggerDagRunOperator(**{"task_id": "t", "trigger_dag_id": "a", **given})


def run_ids(
    several: list[Any], before: dict[Any, Any] | None = None, cleared: bool = False, keys: str = ""
) -> list[list[str]]:
    given = [(f"requests[{index}]", one) for index, one in enumerate(several)]
    made = dag_runs.with_run_ids("task", given, before or {}, cleared=cleared, keys=ConfKeys(keys))
    return [[one.run_id_for(""), one.if_exists] for one in made]


class Client:
    """A client that keeps what it is handed."""

    def __init__(self, keys: str) -> None:
        self.confs = SimpleNamespace(keys=ConfKeys(keys))

    def enqueue(self, request: TriggerRequest, **_: Any) -> None:
        self.run_id = request.dag_run_id


def has_the_run_of(before: str, now: str) -> bool:
    """Tell whether a try has the run of the try before, where the keys for confs were others then."""
    operator = one_run(conf={"a": 1})
    operator._target = SimpleNamespace(airflow_name="af")
    ti = SimpleNamespace(dag_id="p", run_id="r", task_id="t", map_index=-1, try_number=2)
    first, second = Client(before), Client(now)
    operator.hand_over(first, "id", {"ti": ti}, Served("id", "first", None))
    operator.hand_over(second, "id", {"ti": ti}, Served("id", "again", None, "id", made=first.run_id))
    return bool(first.run_id == second.run_id)


def pure() -> dict[str, Any]:
    """Return what the functions behind the operators say."""
    some = [{"dag_id": "a", "conf": {"n": n}} for n in (1, 2, 1, 3)]
    ids = [run_id for run_id, _ in run_ids(some)]
    before = {
        ("default", "a", ids[0]): RunBefore(done=True, made=True),
        ("default", "a", ids[1]): RunBefore(done=False, made=True),
    }
    own = [{"dag_id": "a", "key": "k"}, {"dag_id": "a", "key": "m"}]
    theirs = {
        ("default", "a", "relay__k"): RunBefore(done=False, made=False),
        ("default", "a", "relay__m"): RunBefore(done=False, made=True),
    }
    key, newer = "A" * 43 + "=", "B" * 42 + "A="
    keyed = dag_runs.conf_digests(ConfKeys(f"{newer},{key}"), {"a": 1})
    plain = dag_runs.conf_digests(ConfKeys(), {"a": 1})
    reference = {"dagrelay_conf": "sha256:" + "0" * 64, "bytes": 9}
    elsewhere = {("north", "a", "relay__k"): RunBefore(done=True, made=True)} | theirs
    large = [
        {"id": "i", "dag_id": "a", "dag_run_id": "r", "state": "done", "error": None, "run": "x" * 600_000}
    ] * 2
    return {
        "ids": ids,
        "turned": sorted(run_id for run_id, _ in run_ids(some[::-1])),
        "again": [how for _, how in run_ids(some, before)],
        "cleared": [how for _, how in run_ids(some, before, cleared=True)],
        "own": [how for _, how in run_ids(own, theirs)],
        "elsewhere": [how for _, how in run_ids([own[0], own[0] | {"connection": "north"}], elsewhere)],
        "same": dag_runs.conf_digests(ConfKeys(), {"a": 1, "b": 2})
        == dag_runs.conf_digests(ConfKeys(), {"b": 2, "a": 1}),
        "keyed": keyed[0] not in plain,
        "reference": dag_runs.conf_digests(ConfKeys(key), reference),
        "first_key": run_ids(some, before, keys=key)[:2] == run_ids(some, before)[:2],
        "newer_key": [has_the_run_of(served_by, f"{newer},{key}") for served_by in ("", key, newer)],
        "allowed": [dag_runs.allowed_of(given, 50) for given in (0, 3, 0.05, 1.0)]
        + [dag_runs.allowed_of(0.29, 100)],
        "shortened": dag_runs.shortened(large)[0],
        "given": len(run_ids([TriggerRequest("a").model_dump(exclude_unset=True)])),
    }


def main() -> None:
    said = {
        "wrong": {name: refused(partial(one_run, **given)) for name, given in WRONG.items()},
        "wrong_many": {
            name: refused(partial(RelayFanOutOperator, task_id="t", **given))
            for name, given in WRONG_MANY.items()
        },
        "right": [refused(partial(one_run, **given)) for given in RIGHT],
        "pure": pure(),
        "import_errors": DagBag(sys.argv[1]).import_errors,
    }
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
