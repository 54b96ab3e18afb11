"""A small Celery app for the tests of the transport: nothing of Airflow, nothing of ours but the transport.

A worker of it is told by the environment what it is (`behaviour.Worker` sets this): BEHAVIOUR_BROKER,
BEHAVIOUR_NOTES (the file in which its tasks note what they do), BEHAVIOUR_TRANSPORT ("ours" or "stock"),
BEHAVIOUR_BUDGET_S, and BEHAVIOUR_CONF, a JSON object of Celery settings.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

from celery import Celery, Task, states
from celery.backends.redis import RedisBackend
from celery.concurrency.thread import TaskPool

BROKER = os.environ.get("BEHAVIOUR_BROKER", "redis://127.0.0.1:1/0")
NOTES = os.environ.get("BEHAVIOUR_NOTES", os.devnull)
LEASE_S = 3.0

DEFAULTS = {
    "broker_url": BROKER,
    "result_backend": f"{__name__}:Results+{BROKER}",
    "broker_transport_options": {"visibility_timeout": LEASE_S},
    "broker_connection_retry_on_startup": True,
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "task_default_queue": "work",
    "worker_prefetch_multiplier": 1,
    "worker_send_task_events": True,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_hijack_root_logger": False,
}

app = Celery("behaviour", set_as_current=True)
app.conf.update(DEFAULTS)
app.conf.update(json.loads(os.environ.get("BEHAVIOUR_CONF", "{}")))
if os.environ.get("BEHAVIOUR_TRANSPORT") == "ours":
    # As if it were published by itself: `tasks/__init__` would make the application and take over the log.
    package = sys.modules["tasks"] = ModuleType("tasks")
    package.__path__ = [str(Path(__file__).resolve().parents[3] / "tasks")]
    from tasks.redis_transport import worker as redis_transport_worker

    redis_transport_worker.install(app, budget_s=float(os.environ.get("BEHAVIOUR_BUDGET_S", "900")))


class Results(RedisBackend):
    """Celery's own, which notes a retry after it was published: where a machine is busy, the note came after
    the end, and took its place for ever. Here it takes the place of nothing."""

    def _set_with_state(self, key: str, value: object, state: str) -> None:
        if state == states.RETRY:
            self.client.set(key, value, ex=self.expires, nx=True)
        else:
            super()._set_with_state(key, value, state)


class GreenPool(TaskPool):
    """What gevent's pool says of itself, without gevent."""

    is_green = True


def now() -> float:
    """Seconds since 1970 by the machine's clock, also where `clock/sitecustomize.py` shifts Python's."""
    return time.clock_gettime(time.CLOCK_REALTIME)


def write(task: Task, event: str, mark: object, **more: object) -> None:
    """Note an event. A line is one write to a file opened for appending: nothing is mixed, nothing waits."""
    request = task.request
    line = json.dumps(
        {
            "event": event,
            "mark": mark,
            "id": request.id,
            "at": now(),
            "pid": os.getpid(),
            "worker": (request.hostname or "").partition("@")[0],
            "retries": request.retries,
            "redelivered": bool((request.delivery_info or {}).get("redelivered")),
            "header": bool((request.headers or {}).get("redelivered")),
        }
        | more
    )
    with open(NOTES, "ab", buffering=0) as file:  # noqa: PTH123 - unbuffered
        file.write(line.encode() + b"\n")


@app.task(bind=True)
def note(self: Task, mark: object = None, sleep_s: float = 0.0) -> object:
    """Note the beginning, sleep, note the end."""
    write(self, "began", mark)
    if sleep_s:
        time.sleep(sleep_s)
    write(self, "ended", mark)
    return mark


@app.task(bind=True)
def again(self: Task, mark: object, times: int, countdown: float) -> object:
    """Ask for another attempt so many times, then return the mark."""
    write(self, "began", mark)
    if self.request.retries < times:
        raise self.retry(countdown=countdown, max_retries=None)
    write(self, "ended", mark)
    return mark


@app.task(bind=True)
def total(self: Task, numbers: list[int], mark: object = None) -> int:
    """Note and return a sum: the body of chords."""
    write(self, "total", mark, sum=sum(numbers))
    return sum(numbers)


@app.task(bind=True)
def broken(self: Task, mark: object = None) -> None:
    """Fail."""
    write(self, "began", mark)
    raise ValueError(mark)


@app.task(bind=True)
def told(self: Task, task_id: str) -> None:
    """An errback: note whose failure it was told of."""
    write(self, "told", task_id)


@app.task(bind=True, rate_limit="4/s")
def limited(self: Task, mark: object = None) -> None:
    """Note, four times a second at the most."""
    write(self, "began", mark)


@app.task(bind=True)
def later(self: Task, mark: object, countdown: float) -> str:
    """Publish a delayed task from inside a worker, so by its own transport; return its id."""
    write(self, "began", mark)
    return str(note.apply_async((mark,), countdown=countdown).id)
