"""Triggers posted side by side over one asyncio loop: by the parts of a fan-out, and out of a line.

Only what goes well ends here: a run that is made. Whatever else an answer may mean is for `trigger_dag`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from producers.contract import Asked, DagRun, TriggerRequest, reference_in
from producers.errors import AirflowUnavailable, CredentialsRefused, InvalidRequest
from producers.stores.envelope import trace_of

from . import metrics
from .airflow.answers import TokenRefused, as_dag_run
from .airflow.client import ApiModule
from .airflow.clients import airflow_client
from .airflow.connections import AirflowConnection
from .app import said
from .confs import opened
from .http import HttpRequest, HttpResponse, NoAnswer
from .http_many import ManySender
from .trigger import note_for


@dataclass(slots=True)
class Wanted:
    """One request, with its message as a dict."""

    task_id: str
    envelope: dict[str, Any]
    request: TriggerRequest
    asked: Any


@dataclass(slots=True)
class Job:
    """One request on its way: what is posted, and what came of it."""

    task_id: str
    envelope: dict[str, Any]
    request: TriggerRequest
    run_id: str
    post: HttpRequest
    asked_at: float
    begun: bool = False
    answer: HttpResponse | NoAnswer | None = None
    run: str = ""
    """What was made for it, as JSON."""


@dataclass(slots=True)
class NotMade:
    """Why there is no run, as far as this answer says; `unsure`: there may be one all the same."""

    reason: str = ""
    unsure: bool = False


_senders: dict[str, ManySender] = {}
_lock = threading.Lock()


def sender_for(connection: AirflowConnection) -> ManySender:
    """Return the process's sender for requests of one connection side by side."""
    found = _senders.get(connection.id)
    if found is None:
        verify = connection.ca_file if connection.verify and connection.ca_file else connection.verify
        made = ManySender(
            connection.base_url,
            connect_timeout_s=connection.connect_timeout_s,
            read_timeout_s=connection.read_timeout_s,
            verify=verify,
            in_flight=connection.ceiling,
        )
        with _lock:
            found = _senders.setdefault(connection.id, made)
    return found


async def post(sender: ManySender, job: Job) -> HttpResponse | NoAnswer:
    """Send one request, once; note what came of it, and return it."""
    job.begun = True
    began = time.perf_counter()
    try:
        job.answer = await sender.send(job.post)
    except NoAnswer as exc:
        job.answer = exc
    except Exception as exc:  # noqa: BLE001 - the others' answers count all the same
        job.answer = NoAnswer(said(exc), True)
    took_s = time.perf_counter() - began
    metrics.observe_request(job.request.connection, "trigger", took_s, metrics.status_of(job.answer))
    return job.answer


def authorised(connection: AirflowConnection) -> tuple[ApiModule, Mapping[str, str]] | None:
    """Return how this Airflow is spoken to; None where it cannot be found out."""
    try:
        return airflow_client(connection).authorised()
    except (AirflowUnavailable, CredentialsRefused):
        return None


def job_of(api: ApiModule, headers: Mapping[str, str], one: Wanted) -> Job:
    """Return a request, ready to be posted. Raises DagrelayError for one that cannot be."""
    request = opened(one.request)
    if request.conf_by == "reference" and reference_in(request.conf) is None:
        raise InvalidRequest("conf: is still to be stored")  # which trigger_dag does
    run_id = request.run_id_for(one.task_id)
    asked = Asked.from_message(one.asked, otherwise_at=time.time())
    trace = trace_of(one.envelope["headers"])
    made = api.create_run(request, run_id, note_for(request, one.task_id, asked, trace))
    sent = {**made.headers, **headers, **(trace.headers() if trace is not None else {})}
    made = HttpRequest(made.method, made.path, sent, made.body, made.timeout_s)
    return Job(one.task_id, one.envelope, request, run_id, made, asked.at)


def read_answer(
    api: ApiModule, connection: AirflowConnection, job: Job, answer: HttpResponse | NoAnswer
) -> dict[str, Any] | NotMade:
    """Return the run that an answer tells of, or why there is none."""
    if isinstance(answer, NoAnswer):
        return NotMade(str(answer), answer.reached)
    try:
        view = api.read_created(answer, job.request, job.run_id)
    except AirflowUnavailable as exc:
        return NotMade(str(exc), exc.unsure)
    except TokenRefused:
        return NotMade()
    except Exception as exc:  # noqa: BLE001 - whatever it is, trigger_dag meets it again and decides
        return NotMade(said(exc))
    found = as_dag_run(view, connection, created=True)
    # to_message copies all, a tenth of what a request costs here
    return {name: getattr(found, name) for name in DagRun.__slots__}


def told_of(jobs: Iterable[Job], connection: str) -> Iterable[dict[str, Any]]:
    """Yield the fields of the line that says that a run was started, for each."""
    for job in jobs:
        trace = trace_of(job.envelope["headers"])
        yield {
            "task_id": job.task_id,
            "dag_id": job.request.dag_id,
            "run_id": job.run_id,
            "connection": connection,
            "key": job.request.key,
            "outcome": "started",
            "attempts": 1,
            "age_s": round(time.time() - job.asked_at, 3),
            "trace_id": trace.trace_id if trace is not None else None,
        }


as_json = json.JSONEncoder(separators=(",", ":")).encode
