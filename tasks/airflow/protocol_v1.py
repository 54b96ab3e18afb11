"""The REST API of Airflow 2 (`/api/v1`): what to send, and how to read what comes back. Pure functions.

Errors are problem+json: `title`, `status`, `detail`. What Airflow 2 answers 500 to, an illegal run id and a
body over 1 MB, is refused here before it is sent: a retry would meet the same 500 for ever.
Measured against 2.11.2; the recordings lie in tests/unit/tasks/airflow/answers/v1.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

from producers.contract import TaskInstance, TriggerRequest, is_run_id
from producers.errors import DagBroken, DagNotFound, RequestRejected
from tasks.airflow.answers import (
    JSON_HEADERS,
    MAX_LIST,
    DagRunExists,
    DagView,
    Forbidden,
    NotThisApi,
    RunList,
    RunView,
    TaskKind,
    TaskView,
    TokenRefused,
    Xcom,
    clean,
    instant,
    is_mapped,
    json_body,
    run_list,
    scrubbed,
    segment,
    somebody_else,
    this_dag,
    this_run,
    this_task,
    total,
    unavailable,
    xcom,
)
from tasks.airflow.connections import ApiVersion
from tasks.airflow.protocol_v2 import read_found as _read_found
from tasks.airflow.protocol_v2 import read_version as read_version  # the answer is the same
from tasks.airflow.protocol_v2 import removed, scheduler_of
from tasks.http import HttpRequest, HttpResponse

API: Final[ApiVersion] = "v1"

MAX_BODY_BYTES: Final = 983_040
"""Measured: one byte more is answered with 500. `[webserver] allowed_payload_size` is 1.0 MB by default, and
the last 64 KiB below it cannot be read because 1.0 is no integer (werkzeug asks gunicorn for a float)."""


def ask_version() -> HttpRequest:
    return HttpRequest("GET", "/api/v1/version")


def ask_health() -> HttpRequest:
    return HttpRequest("GET", "/api/v1/health")


def ask_whether_accepted() -> HttpRequest:
    """A cheap question that only somebody with valid credentials gets an answer to."""
    return HttpRequest("GET", "/api/v1/dags?limit=1")


def create_run(request: TriggerRequest, run_id: str, note: str) -> HttpRequest:
    """Return the POST that makes the run. Raises RequestRejected for what Airflow 2 cannot take.

    `logical_date` and `conf` must be absent where there is none: null is refused.
    """
    if request.run_after is not None:
        raise RequestRejected(
            400, "run_after: Airflow 2 does not have it; hold the request back with eta instead"
        )
    if not is_run_id(run_id):
        raise RequestRejected(400, "the run id is not one that Airflow takes: A-Z a-z 0-9 _ . ~ : + - only")
    segment("run id", run_id)
    body: dict[str, Any] = {"dag_run_id": run_id, "note": note}
    if request.logical_date is not None:
        body["logical_date"] = instant(request.logical_date)
    if request.conf is not None:
        body["conf"] = request.conf
    encoded = json_body(body)
    if len(encoded) > MAX_BODY_BYTES:
        raise RequestRejected(
            413,
            f"the request is {len(encoded)} bytes, and Airflow 2 takes {MAX_BODY_BYTES}: send a reference",
        )
    return HttpRequest("POST", f"{_dag(request.dag_id)}/dagRuns", JSON_HEADERS, encoded)


def get_run(dag_id: str, run_id: str) -> HttpRequest:
    return HttpRequest("GET", _run(dag_id, run_id))


def find_by_logical_date(dag_id: str, logical_date: datetime) -> HttpRequest:
    at = instant(logical_date)
    query = urlencode({"execution_date_gte": at, "execution_date_lte": at, "limit": 1})
    return HttpRequest("GET", f"{_dag(dag_id)}/dagRuns?{query}")


def clear_run(dag_id: str, run_id: str) -> HttpRequest:
    """Return the POST that has every task of the run run again; without `dry_run: false` nothing happens."""
    return HttpRequest("POST", f"{_run(dag_id, run_id)}/clear", JSON_HEADERS, json_body({"dry_run": False}))


def set_note(dag_id: str, run_id: str, note: str) -> HttpRequest:
    return HttpRequest("PATCH", f"{_run(dag_id, run_id)}/setNote", JSON_HEADERS, json_body({"note": note}))


def fail_run(dag_id: str, run_id: str) -> HttpRequest:
    """Return the PATCH that sets the run to failed, by which Airflow ends its tasks. `read_run` reads it."""
    return HttpRequest("PATCH", _run(dag_id, run_id), JSON_HEADERS, json_body({"state": "failed"}))


def list_runs(
    dag_ids: Sequence[str],
    since: datetime,
    until: datetime,
    *,
    unfinished: bool = False,
    limit: int = MAX_LIST,
) -> HttpRequest:
    """Return the question for the runs of these DAGs whose logical date lies within, the newest first.

    It is the one list that is not cut to 100 runs. Airflow 2 has no `run_after`; every run of it has a
    logical date, which never changes, and which may lie far in the past or future.
    """
    body: dict[str, Any] = {
        "dag_ids": list(dag_ids),
        "execution_date_gte": instant(since),
        "execution_date_lte": instant(until),
        "order_by": "-id",
        "page_limit": limit,
    }
    if unfinished:
        body["states"] = ["queued", "running"]
    return HttpRequest("POST", "/api/v1/dags/~/dagRuns/list", JSON_HEADERS, json_body(body))


def get_dag(dag_id: str) -> HttpRequest:
    return HttpRequest("GET", _dag(dag_id))


def unpause_dag(dag_id: str) -> HttpRequest:
    """Return the PATCH that has a DAG's runs go on. `read_dag` reads it."""
    return HttpRequest(
        "PATCH", f"{_dag(dag_id)}?update_mask=is_paused", JSON_HEADERS, json_body({"is_paused": False})
    )


def count_unfinished(dag_id: str) -> HttpRequest:
    """Return the question how many runs of a DAG are queued or running; `read_count` reads it.

    One of them is shown, without its conf: a limit of 0 means a hundred to Airflow 2.
    """
    query = "state=queued&state=running&limit=1&fields=dag_run_id"
    return HttpRequest("GET", f"{_dag(dag_id)}/dagRuns?{query}")


def get_task(dag_id: str, run_id: str, task_id: str) -> HttpRequest:
    return HttpRequest("GET", f"{_run(dag_id, run_id)}/taskInstances/{segment('task id', task_id)}")


def get_xcom(dag_id: str, run_id: str, task_id: str, *, as_text: bool = False) -> HttpRequest:
    """Return the question for what a task returned, as JSON or as Python's repr of it.

    Airflow before 2.10 knows the repr alone, and answers 400 to the other question.
    """
    path = f"{get_task(dag_id, run_id, task_id).path}/xcomEntries/return_value"
    return HttpRequest("GET", path if as_text else f"{path}?stringify=false")


def list_mapped(dag_id: str, run_id: str, task_id: str) -> HttpRequest:
    """Return the question whether a task has many instances; `read_is_mapped` reads it.

    The task as its DAG has it (`/dags/{dag_id}/tasks/{task_id}`) does not tell that of one within a task
    group that is mapped, and neither does its instance before the group is expanded.
    """
    return HttpRequest("GET", f"{get_task(dag_id, run_id, task_id).path}/listMapped?limit=1")


def get_task_instance(task: TaskInstance) -> HttpRequest:
    return HttpRequest("GET", _task(task))


def set_task_state(task: TaskInstance, state: str, note: str) -> HttpRequest:
    """Return the PATCH that ends one task instance; the note goes by `set_task_note`.

    Without `dry_run: false` it is answered with 200, and nothing happens. Without an index it means -1, and a
    mapped task is not found.
    """
    return HttpRequest("PATCH", _task(task), JSON_HEADERS, json_body({"new_state": state, "dry_run": False}))


def set_task_note(task: TaskInstance, note: str) -> HttpRequest:
    return HttpRequest("PATCH", f"{_task(task)}/setNote", JSON_HEADERS, json_body({"note": note}))


def read_created(response: HttpResponse, request: TriggerRequest, run_id: str) -> RunView:
    """Return the run that the POST made. Raises DagRunExists and whatever `refusal` finds."""
    if response.status in (200, 201):
        return this_run(response, request.dag_id, run_id, API)
    words = own_words(response)
    if response.status == 409 and words is not None:
        raise DagRunExists(scrubbed(words, request.conf))
    if response.status == 404 and words is not None and words.startswith("DAG"):
        raise DagNotFound(request.dag_id, scrubbed(words, request.conf))
    if response.status == 400 and words is not None and "has import errors" in words:
        raise DagBroken(request.dag_id, scrubbed(words, request.conf))
    raise refusal(response, request.conf)


def read_run(response: HttpResponse, dag_id: str, run_id: str) -> RunView | None:
    """Return the run that a GET, clear or note answered with, or None if there is no such run (or DAG)."""
    if response.status == 200:
        return this_run(response, dag_id, run_id, API)
    words = own_words(response)
    if response.status == 404 and words is not None and words.lower().startswith("dag"):
        return None
    raise refusal(response)


def read_runs(response: HttpResponse) -> RunList:
    """Return how the runs of a list stand."""
    if response.status != 200:
        raise refusal(response)
    return run_list(response)


def read_dag(response: HttpResponse, dag_id: str) -> DagView:
    """Return the DAG that a GET or a change answered with. Raises DagNotFound, and what `refusal` finds."""
    if response.status == 200:
        return this_dag(response, dag_id)
    raise _no_dag(response, dag_id) or refusal(response)


def read_count(response: HttpResponse, dag_id: str) -> int:
    """Return how many runs a list has in all. Raises DagNotFound, and what `refusal` finds."""
    if response.status == 200:
        return total(response)
    raise _no_dag(response, dag_id) or refusal(response)


def _no_dag(response: HttpResponse, dag_id: str) -> DagNotFound | None:
    words = own_words(response)
    if response.status == 404 and words is not None and words.lower().startswith("dag"):
        return DagNotFound(dag_id, scrubbed(words, None))
    return None


def read_xcom(response: HttpResponse) -> Xcom | None:
    """Return what a task returned, or None if there is nothing: see `read_task` for why."""
    if response.status == 200:
        return xcom(response)
    words = own_words(response)
    if response.status == 404 and words is not None and words.startswith("XCom"):
        return None
    raise refusal(response)


def read_xcom_text(response: HttpResponse) -> Xcom | None:
    """Do as `read_xcom` does, for an answer that is Python's repr: a text that is neither stays a text."""
    found = read_xcom(response)
    return Xcom(_from_repr(found.value)) if found is not None else None


def _from_repr(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
            # Sets, bytes, tuples as keys: Python's, and not JSON. A tuple becomes a list, as in Airflow 3.
            return json.loads(json.dumps(found, allow_nan=False))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return value


def read_task(response: HttpResponse) -> TaskKind:
    """Return whether a run has such a task, and whether it has many instances."""
    if response.status == 200 and isinstance(response.json(), dict):
        return "plain"
    words = own_words(response)
    if response.status == 404 and words is not None and words.lower().startswith("task"):
        return "mapped" if "is mapped" in words else "none"
    raise refusal(response)


def read_is_mapped(response: HttpResponse) -> bool:
    """Return whether a task is mapped, by itself or with its task group; one that is not there is not."""
    if response.status == 200:
        return is_mapped(response)
    if response.status == 404 and own_words(response) is not None:
        return False
    raise refusal(response)


def read_task_instance(response: HttpResponse, task: TaskInstance) -> TaskView | None:
    """Return the task instance, None if there is no such one (or no such run, or DAG)."""
    if response.status == 200:
        return this_task(response, task)
    if response.status == 404 and own_words(response) is not None:
        return None
    raise refusal(response)


def read_task_set(response: HttpResponse) -> None:
    """Return if the task instance was changed: Airflow 2 says no more than {}.

    Raises what `refusal` finds.
    """
    if response.status == 200 and isinstance(response.json(), dict):
        return
    raise somebody_else(response) if response.status == 200 else refusal(response)


def read_found(response: HttpResponse) -> str | None:
    """Return the id of the first run of a list, or None if it is empty, or if there is no such DAG."""
    if response.status == 200:
        return _read_found(response)
    words = own_words(response)
    if response.status == 404 and words is not None and words.lower().startswith("dag"):
        return None
    raise refusal(response)


def read_accepted(response: HttpResponse) -> None:
    """Return if the credentials are accepted. Raises TokenRefused if not, and what `refusal` finds.

    A role that may not even list DAGs cannot be told from wrong credentials, and counts as them.
    """
    if response.status == 200 and isinstance(response.json(), dict):
        return
    try:
        raise refusal(response)
    except Forbidden as exc:
        raise TokenRefused(exc.words) from None


def read_scheduler(response: HttpResponse) -> str | None:
    """Return the scheduler's status ("healthy", "unhealthy"), or None if it is not told."""
    return scheduler_of(response.json())


def refusal(response: HttpResponse, conf: Any = None) -> Exception:
    """Return what an answer without success means, whatever was asked.

    TokenRefused (401), Forbidden (403), NotThisApi, AirflowUnavailable, RequestRejected.
    """
    status, words = response.status, own_words(response)
    if words is None and status in (404, 405):  # 405 is what Airflow 3 answers to a POST under /api/v1
        gone = removed(response)
        return NotThisApi(gone or str(somebody_else(response).reason), sure=gone is not None)
    if status == 429 or status >= 500:
        return unavailable(response, scrubbed(words or "", conf))
    if words is None or status not in (400, 401, 403, 404, 409, 413, 415, 422):
        return somebody_else(response)
    if status == 401:
        return TokenRefused(scrubbed(words, conf))
    if status == 403:
        return Forbidden(scrubbed(words, conf))
    return RequestRejected(status, scrubbed(words, conf))


def own_words(response: HttpResponse) -> str | None:
    """Return what Airflow says in its own form, without what it echoes; None if it is not that form."""
    answer = response.json()
    if not isinstance(answer, dict) or answer.get("status") != response.status:
        return None
    title, detail = answer.get("title"), answer.get("detail")
    if not isinstance(title, str):
        return None
    # Of what went wrong inside the server the detail may be anything; the title is the kind of error.
    told = isinstance(detail, str) and detail and response.status < 500
    return f"{clean(title)}: {clean(detail)}" if told and isinstance(detail, str) else clean(title)


def _dag(dag_id: str) -> str:
    return f"/api/v1/dags/{segment('DAG id', dag_id)}"


def _run(dag_id: str, run_id: str) -> str:
    return f"{_dag(dag_id)}/dagRuns/{segment('run id', run_id)}"


def _task(task: TaskInstance) -> str:
    path = get_task(task.dag_id, task.dag_run_id, task.task_id).path
    return f"{path}/{task.map_index}" if task.map_index >= 0 else path  # its routes know no -1
