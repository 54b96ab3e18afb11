"""The task set_task_state: the Airflow task that waits for a job is told how the job ended.

Its message is put into the queue `jobs` by the script of the request's end itself, as those for hooks are
(`producers/stores/notices.py`): it is never forgotten, and it may come twice. How the request ended is read
from its record. Policy is on top, in `set_task_state`; the steps are below, and know neither Celery nor
settings: `settle` asks Airflow and sets the task, `why_left_alone` decides.

An outcome that comes late, or again, must do no harm: nothing is set without a look at the task first, and
a task that has ended, was cleared, or is in another try than the one that waited is left alone. Airflow has
no way to say "set it if it is still in this try", so between the look and the change there is a moment.
"""

from __future__ import annotations

import json
import random
from typing import Any, Final, Protocol

from celery.utils.log import get_logger

from producers.contract import SET_TASK_STATE, TaskInstance
from producers.errors import (
    AirflowUnavailable,
    ConnectionNotConfigured,
    CredentialsRefused,
    InvalidRequest,
    RequestRejected,
    TaskStateNotSet,
)
from producers.stores.dead import Dead
from producers.stores.envelope import task_state_message
from producers.stores.records import KEEP_S, Record
from producers.stores.waits import history_key

from . import metrics
from .again import BACKOFF_BASE_S, keep_record, leave_newer, redis_now
from .airflow.client import TaskView
from .app import RelayTask, app, records, said, store_client
from .results import keeping, warn_of_dropped
from .settings import settings
from .slots import NoTurn, thread_turn
from .webhooks import NoPlace, Places

log = get_logger("dagrelay.task_state")

ENDED: Final = ("success", "failed", "skipped", "upstream_failed", "removed")

CLOCKS_S: Final = 2.0
"""How far Airflow's clock may be before Redis': a task that has just begun may hand its job over at once."""

LONGEST_PAUSE_S: Final = 300.0
"""Between two attempts; until then a tenth of the time that it has been tried. In an outage of an hour, ten
thousand tasks that wait for it are about fifty attempts a second, none of which asks Airflow."""

MAX_NOTE: Final = 1000
MAX_REASON: Final = 500

MOST_REPLAYS: Final = 50


class Airflow(Protocol):
    """What the steps need of `tasks.airflow.client.AirflowClient`. Raises as that does."""

    def is_mapped(self, dag_id: str, run_id: str, task_id: str) -> bool: ...
    def get_task_instance(self, task: TaskInstance) -> TaskView | None: ...
    def set_task_state(self, task: TaskInstance, state: str, note: str) -> object: ...


class NotYetKnown(Exception):
    """Airflow does not tell yet whether the try that is about to run is the one that waited for the job."""


class StateTask(RelayTask):
    """set_task_state is a worker's own affair: no record, no result."""

    abstract = True
    recorded = False

    def shown(self, args: Any, kwargs: Any, task_id: str) -> str:
        """Return which request and which task are meant."""
        if not isinstance(kwargs, dict):
            return ""
        return ", ".join(f"{name}={str(kwargs.get(name))[:400]!r}" for name in ("task_id", "task_instance"))


@app.task(name=SET_TASK_STATE, bind=True, base=StateTask, ignore_result=True)
def set_task_state(
    self: Any, /, *, task_id: str, task_instance: dict[str, Any], since: float | None = None, **message: Any
) -> None:
    """Set the Airflow task that waited for a request to success or failed.

    `since`: from when on its patience counts, in seconds since 1970, where it was tried before.
    """
    leave_newer(self, message)
    found = records().get(task_id)
    if found is None or not found.ended:
        log.warning("task state dropped task_id=%s: no end of the request is on record", task_id)
        return
    try:
        task = TaskInstance(**task_instance)
    except (InvalidRequest, TypeError) as exc:
        log.error("task state dropped task_id=%s: %s", task_id, said(exc))
        return
    connection = settings().connections.get(task.connection)
    if connection is None:
        raise given_up(found, task, str(ConnectionNotConfigured(task.connection)))
    try:
        with places_at(task.connection).one(), thread_turn(connection) as airflow:
            words = settle(found, task, airflow, accepted_at=first_accepted_at(found))
    except NoPlace as exc:
        raise self.retry(countdown=0.05 + exc.wait_s) from exc
    except RequestRejected as exc:
        raise given_up(found, task, str(exc)) from exc
    except (AirflowUnavailable, CredentialsRefused, NoTurn, NotYetKnown) as exc:
        now = redis_now()
        since = now if since is None else since
        held = isinstance(exc, NoTurn) and exc.why in ("maintenance", "credentials")
        if not held and now - since >= settings().task_state_for_s:
            raise given_up(found, task, f"{now - since:.0f} s of trying are over: {exc}") from exc
        keep_record(task_id)
        wait_s = pause_s(self.request.retries, now - since)
        log.info("task state waits task_id=%s for_s=%.1f: %s", task_id, wait_s, exc)
        kwargs = {
            **message,
            "task_id": task_id,
            "task_instance": task_instance,
            "since": since + wait_s if held else since,
        }
        raise self.retry(countdown=wait_s, kwargs=kwargs) from exc
    note(task_id, words)
    log.info("task state told task_id=%s connection=%s: %s", task_id, task.connection, words)


def pause_s(retries: int, age_s: float) -> float:
    """Return how long to wait before the next attempt, after it has been tried for so long."""
    cap_s = min(LONGEST_PAUSE_S, max(settings().retry_cap_s, age_s / 10))
    wait_s: float = min(cap_s, BACKOFF_BASE_S * 2 ** min(retries, 20))
    return random.uniform(0.5, 1.0) * wait_s  # noqa: S311


_places: dict[str, Places] = {}


def places_at(connection: str) -> Places:
    """Return the places that such tasks may take in this process: a quarter of its threads for each Airflow.

    They wait for their slots in a thread: however many jobs end together, the others go on.
    """
    found = _places.get(connection)
    if found is None:
        found = _places.setdefault(connection, Places(max(1, settings().concurrency // 4)))
    return found


# The steps


def settle(found: Record, task: TaskInstance, airflow: Airflow, *, accepted_at: float | None) -> str:
    """Set the task as the request ended, unless there is a reason not to; return what became of it.

    `accepted_at`: when the request for the job was accepted first. A request that somebody cancelled has no
    result, so its task fails as it does for a job that failed. Raises NotYetKnown, and RequestRejected for
    a task that is not there, or that names all instances of a mapped one.
    """
    state = wanted_state(found)
    view = airflow.get_task_instance(task)
    # Before it is expanded, a mapped task stands there as one, and to set that is to set all.
    may_be_many = task.map_index == -1 and (view is None or view.state is None)
    if may_be_many and airflow.is_mapped(task.dag_id, task.dag_run_id, task.task_id):
        raise RequestRejected(404, "the task is mapped: say by map_index which of its instances waits")
    if view is None:
        raise RequestRejected(404, "there is no such task instance, or its run was deleted")
    if why := why_left_alone(view, task, state, accepted_at):
        return f"{task} is left alone: {why}"
    airflow.set_task_state(task, state, note_for(found, view.note))
    return f"{task} is set to {state}"


def why_left_alone(view: TaskView, task: TaskInstance, state: str, accepted_at: float | None) -> str:
    """Return why the outcome is not for the task as it stands, "" where it is. Raises NotYetKnown."""
    if view.state in ENDED:
        return f"it is {view.state} already"
    if view.state == "restarting" or (view.state is None and view.try_number > 0):
        return "it was cleared, and is to run again"
    if view.state == "up_for_retry" and state == "failed":
        return f"its try {view.try_number} has failed already, and it is to be tried again"
    if task.try_number is not None:
        if view.try_number == task.try_number:
            return ""
        return f"it is at try {view.try_number}, and try {task.try_number} waited for the job"
    # In its first try a task runs anew in no case; and each poke of one that reschedules itself begins again.
    if view.try_number > 1 and view.start_date is not None and accepted_at is not None:
        if view.start_date.timestamp() > accepted_at + CLOCKS_S:
            return "it began after the request was accepted"
        # Again to a worker after it was deferred; or anew, and the date is that of the try before.
        if view.state in ("scheduled", "queued"):
            raise NotYetKnown("its newest try has not begun")
    return ""


def wanted_state(found: Record) -> str:
    """Return the state that the end of a request means for the task that waited for it."""
    return "success" if found.state == "done" else "failed"


def note_for(found: Record, existing: str | None) -> str:
    """Return the task's note: which request and job it was, how it ended; then what the note said before."""
    ours = f"dagrelay task={found.task_id} service={found.service or '-'}"
    if found.job_id:
        ours += f" job={' '.join(found.job_id.split())[:200]}"
    if existing and existing.startswith(ours):  # of an attempt whose answer was lost
        return existing
    lines = [f"{ours} ended={found.state}"]
    # The words of errors that are not ours may quote a value.
    if found.state != "done" and metrics.error_label(found.error or "") not in (metrics.OTHER, "TaskFailed"):
        lines.append((found.reason or "")[:MAX_REASON])
    if existing:
        lines += ["", existing]
    return "\n".join(lines)[:MAX_NOTE].rstrip()


def first_accepted_at(found: Record) -> float | None:
    """Return when what a request replays was accepted: its task may have begun anew before the replay."""
    at = found.accepted_at
    for _ in range(MOST_REPLAYS):
        before = records().get(found.replay_of) if found.replay_of else None
        if before is None or before.accepted_at is None:
            break
        found, at = before, before.accepted_at
    return at


# What becomes of it


def note(task_id: str, words: str) -> None:
    """Write a line into the history of a request that has ended."""
    with store_client().pipeline() as pipe:
        pipe.rpush(history_key(task_id), f"{redis_now():.3f} {' '.join(words.split())}")
        pipe.expire(history_key(task_id), KEEP_S)
        pipe.execute()


def given_up(found: Record, task: TaskInstance, reason: str) -> TaskStateNotSet:
    """Put it on the desk, and return the error to raise. A replay tries it again."""
    error = TaskStateNotSet(str(task), wanted_state(found), reason)
    queue, raw = task_state_message(task, found.task_id, "dagrelay")
    letter: dict[str, str | bytes | None] = {
        "dag_id": task.dag_id,
        "dag_run_id": task.dag_run_id,
        "connection": task.connection,
        "service": found.service,
        "job_id": found.job_id,
        "task": SET_TASK_STATE,
        "raw": raw,
        "queue_key": queue,
        "error": type(error).__name__,
        "error_args": json.dumps(list(error.args)),
        "reason": str(error),
    }
    known = {name: value for name, value in letter.items() if value}
    keep_record(found.task_id, keeping().keep_s)  # the letter is to be of use as long as it is there
    warn_of_dropped(Dead(store_client()).bury(f"{found.task_id}.task", known, keeping()))
    note(found.task_id, str(error))
    log.error("task state not set task_id=%s connection=%s: %s", found.task_id, task.connection, error)
    return error
