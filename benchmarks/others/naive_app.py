"""`celery -A benchmarks.others.naive_app worker`: triggers as they are mostly written, on stock Celery.

`trigger` is the plain task, as Celery's own documentation writes one that calls an API; `trigger_session`
shares one `requests.Session` among all threads, as a good engineer would. The token is fetched once. Told by
the environment: URL (the Redis), AIRFLOW_URL, AIRFLOW_USER, AIRFLOW_PASSWORD, DAG_ID, and FILE, where each
attempt leaves a line: the number of the trigger, what came of it (done, again, failed), and why.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import requests
from celery import Celery, Task, signals
from requests.adapters import HTTPAdapter

app: Celery[Any] = Celery("naive", broker=os.environ["URL"])
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)

AIRFLOW = os.environ["AIRFLOW_URL"]
RUNS_URL = f"{AIRFLOW}/api/v2/dags/{os.environ['DAG_ID']}/dagRuns"
TIMEOUT_S = 30

_login = requests.post(
    f"{AIRFLOW}/auth/token",
    json={"username": os.environ["AIRFLOW_USER"], "password": os.environ["AIRFLOW_PASSWORD"]},
    timeout=TIMEOUT_S,
)
_login.raise_for_status()
HEADERS = {"Authorization": f"Bearer {_login.json()['access_token']}"}

session = requests.Session()
session.mount("http://", HTTPAdapter(pool_maxsize=64))  # a connection for each thread: the default keeps 10
session.headers.update(HEADERS)

_notes = os.open(os.environ["FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


class Noted(Task):  # type: ignore[type-arg]
    """Notes what came of each attempt; it changes nothing of what a task does."""

    abstract = True

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        _note(args[0], "done", "-")

    def on_retry(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        _note(args[0], "again", _reason(exc))

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        _note(args[0], "failed", _reason(exc))


@app.task(name="trigger", base=Noted, autoretry_for=(requests.RequestException,), retry_backoff=True)
def trigger(number: int) -> None:
    """Start a run: a new connection each time."""
    body = {"conf": {"n": number}, "logical_date": None}
    answer = requests.post(RUNS_URL, json=body, headers=HEADERS, timeout=TIMEOUT_S)
    answer.raise_for_status()


@app.task(name="trigger_session", base=Noted, autoretry_for=(requests.RequestException,), retry_backoff=True)
def trigger_session(number: int) -> None:
    """Start a run over a kept-alive connection."""
    answer = session.post(RUNS_URL, json={"conf": {"n": number}, "logical_date": None}, timeout=TIMEOUT_S)
    answer.raise_for_status()


def _note(number: int, what: str, reason: str) -> None:
    os.write(_notes, f"{number} {what} {reason}\n".encode())


def _reason(exc: Exception) -> str:
    response = getattr(exc, "response", None)
    return str(response.status_code) if response is not None else type(exc).__name__


@signals.worker_ready.connect
def _say_ready(**_: Any) -> None:
    sys.stderr.write(" ready.\n")  # Celery says so at INFO only
