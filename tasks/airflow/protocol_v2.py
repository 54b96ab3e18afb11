"""The REST API of Airflow 3 (`/api/v2`): what to send, and how to read what comes back. Pure functions.

An error's `detail` has four shapes: a text, a list of objects (pydantic's), a list of texts, an object (a
database error's). Readers raise the typed errors; what is not in Airflow's own form is `AirflowUnavailable`.
Measured against 3.3.2; the recordings lie in tests/unit/tasks/airflow/answers/v2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

from producers.contract import TaskInstance, TriggerRequest
from producers.errors import DagBroken, DagNotFound, RequestRejected
from tasks.airflow.answers import (
    JSON_HEADERS,
    MAX_LIST,
    DagRunExists,
    DagView,
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
from tasks.http import HttpRequest, HttpResponse

API: Final[ApiVersion] = "v2"

# Starlette's own words for what no route of Airflow's answered: a proxy's rewrite, another application.
_NOT_AIRFLOWS_WORDS = ("Not Found", "Method Not Allowed", "Internal Server Error")


def ask_version() -> HttpRequest:
    return HttpRequest("GET", "/api/v2/version")


def ask_health() -> HttpRequest:
    return HttpRequest("GET", "/api/v2/monitor/health")


def ask_whether_accepted() -> HttpRequest:
    """A cheap question that only somebody with valid credentials gets an answer to."""
    return HttpRequest("GET", "/api/v2/dags?limit=1")


def create_run(request: TriggerRequest, run_id: str, note: str) -> HttpRequest:
    """Return the POST that makes the run. `logical_date` must be there, also as null."""
    body: dict[str, Any] = {
        "dag_run_id": run_id,
        "logical_date": instant(request.logical_date) if request.logical_date else None,
        "note": note,
    }
    if request.conf is not None:
        body["conf"] = request.conf
    if request.run_after is not None:
        body["run_after"] = instant(request.run_after)
    segment("run id", run_id)
    return HttpRequest("POST", f"{_dag(request.dag_id)}/dagRuns", JSON_HEADERS, json_body(body))


def get_run(dag_id: str, run_id: str) -> HttpRequest:
    return HttpRequest("GET", _run(dag_id, run_id))


def find_by_logical_date(dag_id: str, logical_date: datetime) -> HttpRequest:
    at = instant(logical_date)
    query = urlencode({"logical_date_gte": at, "logical_date_lte": at, "limit": 1})
    return HttpRequest("GET", f"{_dag(dag_id)}/dagRuns?{query}")


def clear_run(dag_id: str, run_id: str) -> HttpRequest:
    """Return the POST that has every task of the run run again; without `dry_run: false` nothing happens."""
    return HttpRequest("POST", f"{_run(dag_id, run_id)}/clear", JSON_HEADERS, json_body({"dry_run": False}))


def set_note(dag_id: str, run_id: str, note: str) -> HttpRequest:
    return HttpRequest(
        "PATCH", f"{_run(dag_id, run_id)}?update_mask=note", JSON_HEADERS, json_body({"note": note})
    )


def fail_run(dag_id: str, run_id: str) -> HttpRequest:
    """Return the PATCH that sets the run to failed, by which Airflow ends its tasks. `read_run` reads it."""
    return HttpRequest(
        "PATCH", f"{_run(dag_id, run_id)}?update_mask=state", JSON_HEADERS, json_body({"state": "failed"})
    )


def list_runs(
    dag_ids: Sequence[str],
    since: datetime,
    until: datetime,
    *,
    unfinished: bool = False,
    limit: int = MAX_LIST,
) -> HttpRequest:
    """Return the question for the runs of these DAGs whose `run_after` lies within, the newest first.

    It is the one list that is not cut to 100 runs. There is no filter by run id, and none by which a run
    could leave out its conf.
    """
    body: dict[str, Any] = {
        "dag_ids": list(dag_ids),
        "run_after_gte": instant(since),
        "run_after_lte": instant(until),
        "order_by": "-id",
        "page_limit": limit,
    }
    if unfinished:
        body["states"] = ["queued", "running"]
    return HttpRequest("POST", "/api/v2/dags/~/dagRuns/list", JSON_HEADERS, json_body(body))


def get_dag(dag_id: str) -> HttpRequest:
    return HttpRequest("GET", _dag(dag_id))


def unpause_dag(dag_id: str) -> HttpRequest:
    """Return the PATCH that has a DAG's runs go on. `read_dag` reads it."""
    return HttpRequest(
        "PATCH", f"{_dag(dag_id)}?update_mask=is_paused", JSON_HEADERS, json_body({"is_paused": False})
    )


def count_unfinished(dag_id: str) -> HttpRequest:
    """Return the question how many runs of a DAG are queued or running; `read_count` reads it.

    No run is shown with it: each would come with its conf. By cursor Airflow 3.3 would count to a limit.
    """
    return HttpRequest("GET", f"{_dag(dag_id)}/dagRuns?state=queued&state=running&limit=0")


def get_task(dag_id: str, run_id: str, task_id: str) -> HttpRequest:
    return HttpRequest("GET", f"{_run(dag_id, run_id)}/taskInstances/{segment('task id', task_id)}")


def get_xcom(dag_id: str, run_id: str, task_id: str) -> HttpRequest:
    """Return the question for what a task returned."""
    return HttpRequest("GET", f"{get_task(dag_id, run_id, task_id).path}/xcomEntries/return_value")


def list_mapped(dag_id: str, run_id: str, task_id: str) -> HttpRequest:
    """Return the question whether a task has many instances; `read_is_mapped` reads it.

    The task as its DAG has it (`/dags/{dag_id}/tasks/{task_id}`) does not tell that of one within a task
    group that is mapped, and neither does its instance before the group is expanded.
    """
    return HttpRequest("GET", f"{get_task(dag_id, run_id, task_id).path}/listMapped?limit=1")


def get_task_instance(task: TaskInstance) -> HttpRequest:
    return HttpRequest("GET", _task(task))


def set_task_state(task: TaskInstance, state: str, note: str) -> HttpRequest:
    """Return the PATCH that ends one task instance, and gives it a note in the same step.

    Always with the index: without one, every instance of a mapped task is set.
    """
    return HttpRequest("PATCH", _task(task), JSON_HEADERS, json_body({"new_state": state, "note": note}))


def read_version(response: HttpResponse) -> str | None:
    """Return Airflow's version ("3.3.2"), or None if this API does not exist there.

    Raises AirflowUnavailable if the answer does not tell.
    """
    answer = response.json()
    version = answer.get("version") if isinstance(answer, dict) else None
    if response.status == 200 and isinstance(version, str) and version[:1].isdecimal():
        return version[:40]
    if response.status == 404:
        return None
    raise unavailable(response) if response.status >= 429 else somebody_else(response)


def read_created(response: HttpResponse, request: TriggerRequest, run_id: str) -> RunView:
    """Return the run that the POST made. Raises DagRunExists and whatever `refusal` finds."""
    if response.status in (200, 201):
        return this_run(response, request.dag_id, run_id, API)
    words = own_words(response)
    if response.status == 409 and words is not None:
        raise DagRunExists(scrubbed(words, request.conf))
    if response.status == 404 and words is not None and re.match(r"(The )?Dag\b", words, re.IGNORECASE):
        raise DagNotFound(request.dag_id, scrubbed(words, request.conf))
    if response.status == 400 and words is not None and "has import errors" in words:
        raise DagBroken(request.dag_id, scrubbed(words, request.conf))
    raise refusal(response, request.conf)


def read_run(response: HttpResponse, dag_id: str, run_id: str) -> RunView | None:
    """Return the run that a GET, clear or note answered with, or None if there is no such run (or DAG)."""
    if response.status == 200:
        return this_run(response, dag_id, run_id, API)
    words = own_words(response)
    if response.status == 404 and words is not None and re.search(r"\bDag", words, re.IGNORECASE):
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
    if response.status == 404 and words is not None and re.search(r"\bDag", words, re.IGNORECASE):
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


def read_task(response: HttpResponse) -> TaskKind:
    """Return whether a run has such a task, and whether it has many instances."""
    if response.status == 200 and isinstance(response.json(), dict):
        return "plain"
    words = own_words(response)
    if response.status == 404 and words is not None and re.search(r"\btask\b", words, re.IGNORECASE):
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
    if response.status == 404 and own_words(response) is not None and removed(response) is None:
        return None
    raise refusal(response)


def read_task_set(response: HttpResponse) -> None:
    """Return if the task instance is in the state that was asked for. Raises what `refusal` finds."""
    answer = response.json()
    if response.status == 200 and isinstance(answer, dict) and "task_instances" in answer:
        return
    words = own_words(response)
    if response.status == 409 and words is not None and "already in" in words:
        return
    raise somebody_else(response) if response.status == 200 else refusal(response)


def read_found(response: HttpResponse) -> str | None:
    """Return the id of the first run of a list, or None if it is empty."""
    if response.status != 200:
        words = own_words(response)
        if response.status == 404 and words is not None and re.search(r"\bDag", words, re.IGNORECASE):
            return None
        raise refusal(response)
    answer = response.json()
    runs = answer.get("dag_runs") if isinstance(answer, dict) else None
    if not isinstance(runs, list):
        raise somebody_else(response)
    return next((run["dag_run_id"] for run in runs if isinstance(run, dict) and "dag_run_id" in run), None)


def read_accepted(response: HttpResponse) -> None:
    """Return if the credentials are accepted, whatever else they may not do. Raises what `refusal` finds."""
    if response.status == 200 and isinstance(response.json(), dict):
        return
    try:
        raise refusal(response)
    except RequestRejected as exc:
        if exc.status != 403:
            raise


def read_scheduler(response: HttpResponse) -> str | None:
    """Return the scheduler's status ("healthy", "unhealthy"), or None if it is not told."""
    return scheduler_of(response.json())


def scheduler_of(health: Any) -> str | None:
    scheduler = health.get("scheduler") if isinstance(health, dict) else None
    status = scheduler.get("status") if isinstance(scheduler, dict) else None
    return status if isinstance(status, str) else None


def refusal(response: HttpResponse, conf: Any = None) -> Exception:
    """Return what an answer without success means, whatever was asked.

    TokenRefused, NotThisApi, AirflowUnavailable, RequestRejected.
    """
    status, words = response.status, own_words(response)
    if status == 404:
        gone = removed(response)
        if gone is not None or words is None:
            return NotThisApi(gone or str(somebody_else(response).reason), sure=gone is not None)
    if status == 429 or status >= 500:
        return unavailable(response, scrubbed(words or "", conf))
    if words is None or status < 400 or status not in (400, 401, 403, 404, 409, 413, 415, 422):
        return somebody_else(response)
    if status == 401 or (status == 403 and "Invalid JWT token" in words):
        return TokenRefused(scrubbed(words, conf))
    return RequestRejected(status, scrubbed(words, conf))


def removed(response: HttpResponse) -> str | None:
    """Return Airflow 3's words for a path of Airflow 2, or None if it is another answer."""
    answer = response.json()
    error = answer.get("error") if isinstance(answer, dict) else None
    return error[:200] if isinstance(error, str) and "Airflow 3" in error else None


def own_words(response: HttpResponse) -> str | None:
    """Return what Airflow says in its own form, without what it echoes; None if it is not that form."""
    answer = response.json()
    detail: Any = answer.get("detail") if isinstance(answer, dict) else None
    match detail:
        case str() if detail not in _NOT_AIRFLOWS_WORDS:
            return clean(detail)
        case list() if detail and all(
            isinstance(one, dict) and isinstance(one.get("msg"), str) for one in detail
        ):
            return "; ".join(_validation(one) for one in detail[:5])
        case list() if detail and all(isinstance(one, str) for one in detail):
            return "; ".join(clean(one) for one in detail[:5])
        case {"reason": str() as reason}:
            # Its statement and orig_error hold values where [api] expose_stacktrace is on.
            logged = re.search(r"look for ID (\w{1,20})", str(detail.get("message")))
            return clean(reason) + (f" (see the API server's log, ID {logged[1]})" if logged else "")
        case _:
            return None


def _validation(problem: dict[str, Any]) -> str:
    """One of pydantic's problems: where and what, not the `input`, nor the `ctx` that quotes it.

    Of the place only the field of the body: deeper are keys of the conf.
    """
    place = problem.get("loc")
    names = [str(part) for part in place[1:2]] if isinstance(place, list) else []
    return ": ".join([*names, clean(problem["msg"])])


def _dag(dag_id: str) -> str:
    return f"/api/v2/dags/{segment('DAG id', dag_id)}"


def _run(dag_id: str, run_id: str) -> str:
    return f"{_dag(dag_id)}/dagRuns/{segment('run id', run_id)}"


def _task(task: TaskInstance) -> str:
    """Return the path of one task instance; -1 is that of a task that is not mapped, and of nothing else."""
    return f"{get_task(task.dag_id, task.dag_run_id, task.task_id).path}/{task.map_index}"
