"""A small Celery app on stock kombu or on our transport, alike in all else: for tests and benchmarks.

`celery -A tests.plain_app worker`, told by the environment:

- PLAIN_URL: the Redis; PLAIN_TRANSPORT: "ours" or "stock"; PLAIN_CONF: further settings, as JSON
- PLAIN_FILE: where `note` and `late` append a line for each run (a write to a file outlives `kill -9`)
- PLAIN_POST_URL: where `post` posts to; PLAIN_JOBS_URL: where `follow` asks for jobs

The transport is imported by itself (see `tests.transport_alone`), so that both sides log as Celery does by
default, at WARNING.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import requests
from celery import Celery, signals
from redis import Redis
from requests.adapters import HTTPAdapter

from tests import transport_alone

NAMESPACE = "plain"
URL = os.environ["PLAIN_URL"]

app: Celery[Any] = Celery("plain", broker=URL)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    # Own names, so that this app and another may share a Redis.
    broker_transport_options={
        "visibility_timeout": 3600,
        "unacked_key": f"{NAMESPACE}:unacked",
        "unacked_index_key": f"{NAMESPACE}:unacked_index",
        "unacked_mutex_key": f"{NAMESPACE}:unacked_mutex",
    },
)
given = json.loads(os.environ.get("PLAIN_CONF", "{}"))
app.conf.broker_transport_options |= given.pop("broker_transport_options", {})
app.conf.update(given)

if os.environ["PLAIN_TRANSPORT"] == "ours":
    transport_alone.make_importable()
    from tasks.redis_transport import worker as redis_transport_worker

    app.conf.broker_transport_options |= {"namespace": NAMESPACE}
    redis_transport_worker.install(app)


_fd = (
    os.open(os.environ["PLAIN_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    if "PLAIN_FILE" in os.environ
    else -1
)
_session = requests.Session()
_session.mount("http://", HTTPAdapter(pool_maxsize=64))
_session.trust_env = False  # it would look into the environment for each request
_redis = Redis.from_url(URL)
_post_url = os.environ.get("PLAIN_POST_URL", "")


@app.task(name="noop")
def noop(*_: Any) -> None:
    """Do nothing."""


@app.task(name="note")
def note(number: int) -> None:
    """Leave a line that says that this ran."""
    os.write(_fd, b"%d\n" % number)


@app.task(name="late")
def late(due: float) -> None:
    """Leave a line that says how many seconds after its time it ran."""
    os.write(_fd, b"%.4f\n" % (time.time() - due))


@app.task(name="begun")
def begun() -> None:
    """Tell the instant at which it began."""
    at = time.time()
    _redis.lpush("begun", repr(at))


@app.task(name="post")
def post(number: int) -> None:
    """Post over a kept-alive connection."""
    answer = _session.post(_post_url, json={"dag_run_id": f"r{number}", "conf": {}, "logical_date": None})
    answer.raise_for_status()


@app.task(name="naive")
def naive(number: int) -> None:
    """Post as most would write it: a new connection each time."""
    answer = requests.post(
        _post_url, json={"dag_run_id": f"r{number}", "conf": {}, "logical_date": None}, timeout=30
    )
    answer.raise_for_status()


@signals.worker_ready.connect
def _say_ready(**_: Any) -> None:
    sys.stderr.write(" ready.\n")  # Celery says so at INFO only


@app.task(name="follow", bind=True, max_retries=None)
def follow(self: Any, job: str, every_s: float) -> None:
    """Look at a job as most would write it: ask, and try again later."""
    answer = _session.get(f"{os.environ['PLAIN_JOBS_URL']}/{job}")
    answer.raise_for_status()
    if answer.json()["state"] == "running":
        raise self.retry(countdown=every_s)
