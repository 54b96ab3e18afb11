"""The task trigger_dag: one request becomes one DAG run, delivered once or ten times.

Policy is on top, in `trigger_dag` and, where the end of the run is waited for, in `_come_back`; the steps are
below and know neither Celery nor settings: `start_run` asks Airflow, `settle_existing` decides about a run
that is there already, `end_of` reads what became of it.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn, Protocol

from celery.exceptions import Retry
from celery.utils.log import get_logger

from producers.contract import (
    MAX_RESULT_BYTES,
    QUEUE_LOOKS,
    TRIGGER_DAG,
    Asked,
    DagRun,
    TriggerRequest,
    shown_message,
)
from producers.errors import (
    AirflowUnavailable,
    ConfKeyMissing,
    ConnectionNotConfigured,
    CredentialsRefused,
    DagBroken,
    DagNotFound,
    DagrelayError,
    DagRunFailed,
    DagRunGone,
    DagRunOverdue,
    GaveUp,
    InvalidRequest,
    LogicalDateTaken,
    OutcomeUnknown,
    RequestRejected,
    RunConflict,
    RunExists,
)
from producers.stores.envelope import Trace
from producers.stores.records import Record

from . import tracing
from .again import BACKOFF_CAP_S as BACKOFF_CAP_S
from .again import NEWER_RETRY_S as NEWER_RETRY_S
from .again import backoff_s, leave_newer, on_record, redelivered, redis_now
from .again import retry as _retry
from .airflow.client import DagRunExists, DagView, RunView, as_dag_run
from .airflow.connections import AirflowConnection
from .airflow.run_looks import ENDED, next_look_in_s
from .app import RelayRequest, RelayTask, app, backend, records, waits
from .confs import left, taken_up, to_compare
from .gates import hand_over
from .results import NotHandedOver
from .settings import settings
from .slots import BUSY_S, Busy, NoTurn, Turn, thread_turn
from .waiting import show, wait

log = get_logger("dagrelay.trigger")

MISSING_RETRY_S = 5.0

STOP_RETRY_S = 0.5
STOP_RETRY_CAP_S = 5.0
"""How soon a request looks again that found its run being stopped for another: a stop takes Airflow a moment,
or, where a run has thousands of tasks, a minute."""

TRUSTED_S = 5.0
"""How long what a look has seen may be taken for true."""

SETTLE_OUTCOME = "tasks.settle_outcome"
STOP_RUN = "tasks.stop_run"

STOPPING = "stopping"
"""In the record's `progress` while a run that is overdue is set to failed: that failure is then ours."""

_OURS = re.compile(r"^dagrelay task=(\S+)", re.MULTILINE)  # a clear puts its own line before it
_CLEARED = re.compile(r"^dagrelay clear=(\S+) was=(\S*)", re.MULTILINE)


class BeingStopped(DagrelayError):
    """The run is about to be set to failed, for another request that was cancelled or is overdue."""


class Airflow(Protocol):
    """What the steps need of `tasks.airflow.client.AirflowClient`. Raises as that does."""

    connection: AirflowConnection

    def create_dag_run(self, request: TriggerRequest, run_id: str, note: str) -> RunView: ...
    def get_dag_run(self, dag_id: str, run_id: str) -> RunView | None: ...
    def find_run_by_logical_date(self, dag_id: str, logical_date: datetime) -> str | None: ...
    def clear_dag_run(self, dag_id: str, run_id: str) -> object: ...
    def set_note(self, dag_id: str, run_id: str, note: str) -> object: ...
    def fail_dag_run(self, dag_id: str, run_id: str) -> object: ...
    def get_dag(self, dag_id: str) -> DagView: ...
    def count_unfinished_runs(self, dag_id: str) -> int: ...
    def unpause_dag(self, dag_id: str) -> object: ...
    def get_xcom(self, dag_id: str, run_id: str, task_id: str) -> Any: ...


class TriggerTask(RelayTask):
    """trigger_dag, as the worker handles its messages."""

    abstract = True

    def shown(self, args: Any, kwargs: Any, task_id: str) -> str:
        """Return a message as Flower and logs may show it: dag id, run id and key; never a conf's values."""
        if not isinstance(kwargs, dict):
            return ""
        try:
            merged = _with_positional(tuple(args or ()), kwargs)
            return TriggerRequest.from_message(merged).shown(task_id)
        except (InvalidRequest, TypeError):
            return shown_message(kwargs)

    def on_revoked(self, request: RelayRequest) -> None:
        """A request cancelled after an answer was lost may have its run: it is looked for.

        A run whose end was waited for goes on, unless the request says otherwise.
        """
        found = records().get(request.id)
        if found is None or found.ended or not found.dag_id or not found.dag_run_id:
            return
        connection = found.connection or "default"
        if found.unsure and found.run is None:
            look_up_later(request.id, found.dag_id, found.dag_run_id, connection)
            request.request_dict["unsure"] = True
        if request.kwargs.get("stop_run") is True:
            ours = found.run is not None and is_ours(found.run)
            stop_later(request.id, found.dag_id, found.dag_run_id, connection, known_ours=ours)


@app.task(name=TRIGGER_DAG, bind=True, base=TriggerTask)
def trigger_dag(self: Any, *before: Any, **message: Any) -> dict[str, Any]:
    """Start one Airflow DAG run; delivered twice, it still starts one.

    Keyword arguments: a message as `producers.contract` describes it. A positional argument is the result
    of the task before it in a chain, and becomes the conf; or dag_id, or dag_id and conf, as clients in
    other languages send them.
    """
    task_id = self.request.id
    leave_newer(self, message)
    found = on_record(self)
    if found is not None and found.state == "done" and found.run is not None:
        return found.run
    request = TriggerRequest.from_message(_with_positional(before, message))
    asked = Asked.from_message(message.get("asked"), otherwise_at=datetime.now(UTC).timestamp())
    run_id = request.run_id_for(task_id)
    connection = settings().connections.get(request.connection)
    if connection is None:
        raise ConnectionNotConfigured(request.connection)
    made = _made_so_far(message)
    request = taken_up(self, request, made=made is not None or (found is not None and found.run is not None))
    unsure = redelivered(self) or (found is not None and found.unsure)
    turn = Turn(self, connection, give_up_after_s=request.give_up_after_s, priority=request.priority)
    try:
        with turn as airflow:
            if request.wait and found is not None and found.run is not None:
                return _come_back(self, request, found, turn, airflow)
            if made is not None:
                return _when_ended(self, request, made, turn, airflow)
            ways: dict[str, Any] = {
                "task_id": task_id,
                "airflow": airflow,
                "unsure": unsure,
                "being_stopped": waits().being_stopped,
            }
            run = hand_over(
                self,
                request,
                turn,
                airflow,
                start=partial(start_run, request, asked=asked, **ways),
                look=partial(there_already, request, **ways),
            )
    except Busy as exc:
        raise _without_thread(self, turn, exc) from exc
    except ConfKeyMissing as exc:  # by which it is to be compared with a run that is there
        raise left(self, exc) from exc
    except NoTurn as exc:
        unsure = exc.unsure or redelivered(self)
        run = _give_up(request, run_id, task_id, None, unsure=unsure, reason=str(exc))
    except CredentialsRefused as exc:
        records().attempt_failed(task_id, str(exc))
        raise turn.parked("credentials", exc) from exc
    except BeingStopped as exc:
        so_far = records().attempt_failed(task_id, str(exc))
        if so_far.age_s >= request.give_up_after_s:
            raise GaveUp(request.give_up_after_s, str(exc)) from exc
        pause_s = min(STOP_RETRY_CAP_S, STOP_RETRY_S * 1.5 ** min(so_far.count - 1, 10))
        raise _retry(self, exc, pause_s * random.uniform(0.7, 1.3)) from exc  # noqa: S311
    except (DagNotFound, DagBroken) as exc:
        so_far = records().attempt_failed(task_id, str(exc), missing=True)
        if so_far.missing_s >= settings().missing_grace_s or so_far.age_s >= request.give_up_after_s:
            raise
        raise _retry(self, exc, min(MISSING_RETRY_S, settings().missing_grace_s)) from exc
    except AirflowUnavailable as exc:
        lost = exc.unsure or redelivered(self)
        so_far = records().attempt_failed(task_id, str(exc), unsure=lost)
        wait_s = backoff_s(so_far.count - 1, exc.retry_after_s, settings().retry_cap_s)
        if so_far.age_s + wait_s < request.give_up_after_s:
            raise _retry(self, exc, wait_s) from exc
        run = _give_up(request, run_id, task_id, turn, unsure=so_far.unsure, reason=exc.reason)
    if not request.wait:
        return run.to_message()
    log.info(  # without a wait this is the outcome, which is logged as it is written
        "run %s task_id=%s dag_id=%s run_id=%s connection=%s key=%s attempt=%d",
        "started" if run.created else "cleared" if run.cleared else "exists",
        task_id,
        run.dag_id,
        run.dag_run_id,
        run.connection,
        request.key,
        (found.attempts if found else 0) + 1,
    )
    try:
        with turn as airflow:
            return _when_ended(self, request, run, turn, airflow)
    except Busy as exc:
        raise _without_thread(self, turn, exc) from exc


def _without_thread(task: Any, turn: Turn, exc: Busy) -> Retry:
    """Publish a task anew for which its worker has no thread, and return the exception to raise."""
    turn.not_coming()
    if redelivered(task):
        waits().learn(task.request.id, unsure="1")  # its mark is lost with this message
    return _retry(task, exc, BUSY_S * 2 ** min(task.request.retries, 4) * random.uniform(0.7, 1.3))  # noqa: S311


def _when_ended(
    task: Any,
    request: TriggerRequest,
    run: DagRun,
    turn: Turn,
    airflow: Airflow,
    *,
    read: int = 0,
    since: float | None = None,
) -> dict[str, Any]:
    """Return the run as the task's outcome, or raise how it ended; while it has not, park the task.

    `read`: how many observations the task has read. `since`: when it began to wait, if it did.
    """
    if not request.wait:
        return run.to_message()
    if run.state in ENDED:
        turn.until, turn.give_up_after_s = None, request.give_up_after_s + request.wait_timeout_s
        try:
            return end_of(request, run, airflow).to_message()
        except (AirflowUnavailable, CredentialsRefused, NoTurn) as exc:
            # The run has ended well, and its result is there: that Airflow is away is no failure.
            waited = records().attempt_failed(task.request.id, str(exc))
            if isinstance(exc, NoTurn) or waited.age_s > turn.give_up_after_s:
                words = f"result_from: the run succeeded, and what its task returned cannot be read: {exc}"
                raise RequestRejected(503, words) from exc
            if isinstance(exc, CredentialsRefused):
                raise turn.parked("credentials", exc) from exc
            raise _retry(task, exc, _backoff_of(waited.count, exc)) from exc
    now = redis_now()
    known = {name: value for name, value in run.to_message().items() if value is not None}
    parked = wait(
        task,
        until=(since or now) + request.wait_timeout_s,
        what=f"run {run.dag_run_id} of DAG {run.dag_id}",
        read=read,
        look=f"airflow:{request.connection}",
        look_in_s=next_look_in_s(now),
        # What the deadline counts from; the script, which else says so, takes it a moment later.
        found={"run": json.dumps(known), "seen": run.state, "waiting_since": f"{since or now:.6f}"},
    )
    show(task, run.state)
    raise parked


def _come_back(
    task: Any, request: TriggerRequest, found: Record, turn: Turn, airflow: Airflow
) -> dict[str, Any]:
    """Decide about a task that has waited for the end of its run: woken, at its deadline, or delivered again.

    An end that a look saw just now counts. Whatever else it was told, it asks Airflow itself: a run that had
    ended may have been cleared, and run again.
    """
    run = DagRun.from_message(found.run or {})
    seen = waits().observations(task.request.id, task.request.retries)
    since = found.waiting_since or redis_now()
    ended = just_ended(seen)
    if ended is not None and found.progress != STOPPING:
        run = replace(run, state=ended)
        return _when_ended(task, request, run, turn, airflow, read=len(seen), since=since)
    turn.until = since + request.wait_timeout_s
    left_s = turn.until - redis_now()
    try:
        view = airflow.get_dag_run(run.dag_id, run.dag_run_id)
    except NoTurn:
        _end_overdue(task, request, run, None)
    except (AirflowUnavailable, CredentialsRefused, RequestRejected) as exc:
        if left_s > 0:
            so_far = records().attempt_failed(task.request.id, str(exc))
            if isinstance(exc, CredentialsRefused):
                raise turn.parked("credentials", exc) from exc
            raise _retry(task, exc, min(left_s, _backoff_of(so_far.count, exc))) from exc
        _end_overdue(task, request, run, None)  # nobody knows whether it has ended meanwhile
    if view is None:
        raise DagRunGone(run.dag_id, run.dag_run_id)
    if view.state == "failed" and found.progress == STOPPING:  # by a worker that died before it could say so
        waits().stop_is_over(task.request.id)
        raise DagRunOverdue(run.dag_id, run.dag_run_id, request.wait_timeout_s, run.url, True)
    run = replace(run, state=view.state)
    if left_s <= 0 and run.state not in ENDED:
        _end_overdue(task, request, run, airflow, note=view.note)
    if run.state not in ENDED and any(one and one.get("state") in ENDED for one in seen):
        waits().learn(task.request.id, f"had ended, and is {run.state} again")
    return _when_ended(task, request, run, turn, airflow, read=len(seen), since=since)


def just_ended(seen: Sequence[Any]) -> str | None:
    """Return the state in which a look saw the run end just now, by this machine's clock; else None.

    To ask again for each of many runs that end together took Airflow longer than all the lists did.
    """
    last = seen[-1] if seen and isinstance(seen[-1], dict) else {}
    state, at = last.get("state"), last.get("at")
    if state not in ENDED or not isinstance(at, int | float):
        return None
    return str(state) if -TRUSTED_S < time.time() - at < TRUSTED_S else None


def is_ours(run: Mapping[str, Any]) -> bool:
    """Tell whether a request made (or cleared) its run, or joined one that somebody else had made."""
    return bool(run.get("created") or run.get("cleared"))


def _end_overdue(
    task: Any, request: TriggerRequest, run: DagRun, airflow: Airflow | None, note: str | None = None
) -> NoReturn:
    """Raise DagRunOverdue, after the run was stopped if the request says so and the run is (still) its own.

    Without an Airflow that was just asked for the run's state, it is stopped later, unless it has ended.
    """
    stopped = False
    ours = is_ours(run.to_message()) and not cleared_by_another(note, task.request.id)
    if request.stop_run and ours:
        words, until = "overdue: the run is set to failed", _stop_is_over_at()
        waits().learn(task.request.id, words, progress=STOPPING, stopping=until)
        if airflow is None:
            stop_later(task.request.id, run.dag_id, run.dag_run_id, request.connection, known_ours=True)
            raise DagRunOverdue(run.dag_id, run.dag_run_id, request.wait_timeout_s, run.url, False)
        try:
            airflow.fail_dag_run(run.dag_id, run.dag_run_id)
            stopped = True
            waits().stop_is_over(task.request.id)
        except (AirflowUnavailable, CredentialsRefused, RequestRejected) as exc:
            log.warning("run not stopped yet dag_id=%s run_id=%s: %s", run.dag_id, run.dag_run_id, exc)
            stop_later(task.request.id, run.dag_id, run.dag_run_id, request.connection, known_ours=True)
    raise DagRunOverdue(run.dag_id, run.dag_run_id, request.wait_timeout_s, run.url, stopped)


@app.task(name=STOP_RUN, bind=True, ignore_result=True, recorded=False)
def stop_run(
    self: Any,
    *,
    task_id: str,
    dag_id: str,
    dag_run_id: str,
    connection: str,
    known_ours: bool,
    until: float,
) -> None:
    """Set the run of a request that has ended to failed, unless it has ended itself.

    Without `known_ours` only where its note names the request: it may be somebody else's. What another
    request has cleared since is that one's. `until` is in seconds since 1970.
    """
    known = settings().connections.get(connection)
    about = f"task_id={task_id} dag_id={dag_id} run_id={dag_run_id}"
    try:
        if known is not None:
            with thread_turn(known) as airflow:
                log.info("%s %s", _stop(airflow, task_id, dag_id, dag_run_id, known_ours), about)
    except RequestRejected as exc:
        log.warning("run not stopped %s: %s", about, exc)
    except (AirflowUnavailable, CredentialsRefused, NoTurn) as exc:
        if datetime.now(UTC).timestamp() < until:
            raise self.retry(countdown=_backoff_of(self.request.retries + 1, exc), exc=exc) from exc
        log.warning("run not stopped %s: %s", about, exc)
    waits().stop_is_over(task_id)


def _stop(airflow: Airflow, task_id: str, dag_id: str, dag_run_id: str, known_ours: bool) -> str:
    """Set a run to failed, where that is for this request to do; return in words what was done."""
    view = airflow.get_dag_run(dag_id, dag_run_id)
    if view is None or view.state in ENDED:
        return "run has ended, nothing to stop"
    if not (known_ours or names(view.note, task_id)):
        return "run left alone, it is somebody else's"
    if cleared_by_another(view.note, task_id):
        return "run left alone, another has cleared it since"
    airflow.fail_dag_run(dag_id, dag_run_id)
    return "run stopped"


@app.task(name=SETTLE_OUTCOME, bind=True, ignore_result=True)
def settle_outcome(
    self: Any, *, task_id: str, dag_id: str, dag_run_id: str, connection: str, until: float
) -> None:
    """Look for the run of a request that ended with its outcome unknown; if it is there, correct the end.

    `until` is in seconds since 1970. It creates nothing.
    """
    known = settings().connections.get(connection)
    if known is None:
        return
    try:
        with thread_turn(known) as airflow:
            view = airflow.get_dag_run(dag_id, dag_run_id)
    except (AirflowUnavailable, CredentialsRefused, RequestRejected, NoTurn) as exc:
        log.info("unknown outcome not looked up task_id=%s: %s", task_id, exc)
        view = None
    if view is not None:
        created = names(view.note, task_id) or (known.by_cli and not view.note)
        run = as_dag_run(view, known, created=created)
        backend().correct(task_id, run.to_message())
    elif datetime.now(UTC).timestamp() < until:
        raise self.retry(countdown=settings().look_up_every_s)
    else:
        log.warning("outcome stays unknown task_id=%s dag_id=%s run_id=%s", task_id, dag_id, dag_run_id)


def start_run(
    request: TriggerRequest,
    *,
    task_id: str,
    asked: Asked,
    airflow: Airflow,
    unsure: bool = False,
    being_stopped: Callable[[str], bool] | None = None,
) -> DagRun:
    """Bring the run about and return it; called again for the same request, it is the same run.

    `unsure`: an earlier attempt may have made it. `being_stopped` tells whether the run of another request is
    about to be stopped (see `clear_once`).

    Raises what `AirflowClient.create_dag_run` raises, and RunConflict, RunExists or LogicalDateTaken. No
    permanent verdict without a look at the run id: Airflow checks the DAG, its import errors and its
    params before it looks whether the run exists, and an earlier attempt may have made it.
    """
    run_id = request.run_id_for(task_id)
    try:
        note = note_for(request, task_id, asked, tracing.current())
        view = airflow.create_dag_run(request, run_id, note)
    except DagRunExists:
        existing = airflow.get_dag_run(request.dag_id, run_id)
        if existing is not None:
            return settle_existing(
                request,
                existing,
                task_id=task_id,
                airflow=airflow,
                unsure=unsure,
                being_stopped=being_stopped,
            )
        if request.logical_date is not None:
            holder = airflow.find_run_by_logical_date(request.dag_id, request.logical_date)
            if holder is not None and holder != run_id:
                raise LogicalDateTaken(request.dag_id, request.logical_date.isoformat(), holder) from None
        raise AirflowUnavailable("the run that was in the way is gone again", None, False) from None
    except RequestRejected:  # DagNotFound and DagBroken among them
        existing = airflow.get_dag_run(request.dag_id, run_id)
        if existing is None:
            raise
        return settle_existing(
            request, existing, task_id=task_id, airflow=airflow, unsure=unsure, being_stopped=being_stopped
        )
    return as_dag_run(view, airflow.connection, created=True)


def there_already(
    request: TriggerRequest,
    *,
    task_id: str,
    airflow: Airflow,
    unsure: bool = False,
    being_stopped: Callable[[str], bool] | None = None,
) -> DagRun | None:
    """Return the run of a request that is held back, if there is one: what `start_run` would find.

    One that has ended and is to be cleared needs a place as a new one does.
    """
    existing = airflow.get_dag_run(request.dag_id, request.run_id_for(task_id))
    if existing is None:
        return None
    if request.if_exists == "clear" and existing.state in ENDED and not names(existing.note, task_id):
        return None
    return settle_existing(
        request, existing, task_id=task_id, airflow=airflow, unsure=unsure, being_stopped=being_stopped
    )


def settle_existing(
    request: TriggerRequest,
    existing: RunView,
    *,
    task_id: str,
    airflow: Airflow,
    unsure: bool = False,
    being_stopped: Callable[[str], bool] | None = None,
) -> DagRun:
    """Decide about a run that has our run id: our own earlier attempt, or somebody else's run.

    Airflow's CLI writes no note, and reads none: there what is as we asked for it is our own if an earlier
    attempt may have made it (`unsure`). Raises RunConflict when it differs, RunExists when the request says
    if_exists="fail".
    """
    mine = names(existing.note, task_id)
    if unsure and airflow.connection.by_cli and not existing.note:
        mine = mine or not difference_of(request, existing)
    if mine:
        return as_dag_run(existing, airflow.connection, created=True)
    if request.if_exists == "skip":
        return as_dag_run(existing, airflow.connection, created=False)
    if difference := difference_of(request, existing):
        raise RunConflict(request.dag_id, existing.run_id, difference)
    if request.if_exists == "fail":
        raise RunExists(request.dag_id, existing.run_id, existing.state)
    if request.if_exists == "clear":
        return clear_once(existing, task_id=task_id, airflow=airflow, being_stopped=being_stopped)
    return as_dag_run(existing, airflow.connection, created=False)


def end_of(request: TriggerRequest, run: DagRun, airflow: Airflow) -> DagRun:
    """Return a run that has ended as the outcome of a request that waited for it, with its result.

    Raises DagRunFailed, and RequestRejected naming `result_from` where that task has no such result.
    """
    if run.state == "failed":
        raise DagRunFailed(run.dag_id, run.dag_run_id, run.url)
    if request.result_from is None:
        return run
    try:
        value = airflow.get_xcom(run.dag_id, run.dag_run_id, request.result_from)
    except RequestRejected as exc:
        raise RequestRejected(exc.status, f"result_from: {exc.words}") from exc
    size = len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > MAX_RESULT_BYTES:
        raise RequestRejected(
            413,
            f"result_from: task {request.result_from!r} returned {size} bytes, over the limit of "
            f"{MAX_RESULT_BYTES}: have it store the data elsewhere and return a reference",
        )
    return replace(run, result=value)


def clear_once(
    existing: RunView,
    *,
    task_id: str,
    airflow: Airflow,
    being_stopped: Callable[[str], bool] | None = None,
) -> DagRun:
    """Clear a finished run so that it runs again, once for this request; leave an unfinished one alone.

    Raises BeingStopped for one that is about to be stopped, as `being_stopped` tells of the request that its
    note names: who joined it would be told that it failed, and a moment later it can be cleared.

    Airflow has no key for a clear. So the run's note first says that this request clears it, and which
    start it saw: found again with another start, or unfinished, the clear has been done.
    """
    start = existing.start_date.isoformat() if existing.start_date else "-"
    mark = _CLEARED.search(existing.note or "")
    mine = mark is not None and mark.group(1) == task_id
    if existing.state not in ("success", "failed"):
        owner = owner_in(existing.note)
        if being_stopped is None or mine or owner is None:
            return as_dag_run(existing, airflow.connection, created=False, cleared=mine)
        if being_stopped(owner):
            raise BeingStopped(f"run {existing.run_id!r} is being stopped, for request {owner}")
        # It may have been stopped since it was looked at, and nothing says so any more.
        now = airflow.get_dag_run(existing.dag_id, existing.run_id) or existing
        return clear_once(now, task_id=task_id, airflow=airflow)
    if mark is not None and mine and mark.group(2) != start:
        return as_dag_run(existing, airflow.connection, created=False, cleared=True)
    if not mine:
        kept = _CLEARED.sub("", existing.note or "").strip()
        airflow.set_note(
            existing.dag_id, existing.run_id, f"dagrelay clear={task_id} was={start}\n{kept}"[:1000]
        )
    airflow.clear_dag_run(existing.dag_id, existing.run_id)
    now = airflow.get_dag_run(existing.dag_id, existing.run_id) or existing
    return as_dag_run(now, airflow.connection, created=False, cleared=True)


def note_for(request: TriggerRequest, task_id: str, asked: Asked, trace: Trace | None = None) -> str:
    """Return the run's note: by which task, when, who asked for it, with which key, in which trace; then the
    caller's own.

    Provenance only: anyone may edit a note, and Airflow's CLI cannot set one.
    """
    at = datetime.fromtimestamp(asked.at, UTC).isoformat(timespec="seconds")
    ours = f"dagrelay task={task_id} at={at}"
    if asked.by:
        ours += f" by={_one_word(asked.by)[:80]}"
    if request.key:
        ours += f" key={_one_word(request.key)[:80]}"
    traced = f" traceparent={trace.traceparent}" if trace is not None else ""
    ours = ours[: 300 - len(traced)] + traced  # half a trace would be none
    return f"{ours}\n\n{request.note}" if request.note else ours


def names(note: str | None, task_id: str) -> bool:
    """Tell whether a run's note says that this task made it."""
    return task_id in _OURS.findall((note or "").partition("\n\n")[0])


def cleared_by_another(note: str | None, task_id: str) -> bool:
    """Tell whether a run's note says that another task has cleared it, after this one made or cleared it."""
    mark = _CLEARED.search(note or "")
    return mark is not None and mark.group(1) != task_id


def owner_in(note: str | None) -> str | None:
    """Return the task that has made a run, or cleared it since, by the run's note; None for none."""
    cleared = _CLEARED.search(note or "")
    made = _OURS.findall((note or "").partition("\n\n")[0])
    return cleared.group(1) if cleared else made[0] if made else None


def difference_of(request: TriggerRequest, existing: RunView) -> str:
    """Return how an existing run differs from what is asked for, without any value, or ""."""
    compared = to_compare(request.conf, existing.conf)
    if difference := compared if isinstance(compared, str) else _conf_difference(*compared):
        return difference
    if request.logical_date is not None and request.logical_date != existing.logical_date:
        there_at = existing.logical_date.isoformat() if existing.logical_date else "none"
        return f"another logical date ({there_at})"
    return ""


def _conf_difference(asked: Any, there: Any) -> str:
    if _canonical(asked) == _canonical(there):
        return ""
    asked, there = asked or {}, there or {}
    if set(asked) != set(there):
        return f"another conf (its keys differ in: {', '.join(sorted(set(asked) ^ set(there)))[:200]})"
    differing = [name for name in sorted(asked) if _canonical(asked[name]) != _canonical(there[name])]
    return f"another conf (its values differ under: {', '.join(differing)[:200]})"


def _canonical(value: Any) -> Any:
    """Return a value that is equal for equal JSON: 1 and 1.0 are, 1 and true are not; {} is none at all."""
    if isinstance(value, dict):
        return {name: _canonical(item) for name, item in value.items()} or None
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, bool):
        return ("bool", value)
    return value


def _one_word(text: str) -> str:
    return re.sub(r"\s+", "_", text)


def _with_positional(before: tuple[Any, ...], message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with what came by position. Raises InvalidRequest when that contradicts it."""
    merged = dict(message)
    rest = list(before)
    if rest and isinstance(rest[0], str):
        merged.setdefault("dag_id", rest[0])
        if merged["dag_id"] != rest.pop(0):
            raise InvalidRequest("dag_id: given by position and by name, and they differ")
    if rest:
        conf = rest.pop(0)
        if conf is not None:
            if "conf" in merged:
                raise InvalidRequest("conf: given by position (or by the task before) and by name")
            merged["conf"] = conf
    if rest:
        raise InvalidRequest("at most dag_id and conf may be given by position")
    return merged


def _made_so_far(message: Mapping[str, Any]) -> DagRun | None:
    """Return the run that a batch of a fan-out has made for this request already, if so."""
    so_far = message.get("so_far")
    run = so_far.get("run") if isinstance(so_far, Mapping) else None
    if not isinstance(run, Mapping) or not {"dag_id", "dag_run_id", "state"} <= run.keys():
        return None
    return DagRun.from_message(run)


def _backoff_of(attempts: int, exc: Exception) -> float:
    """Return how long to wait before Airflow is asked again, after so many attempts."""
    asked_s = exc.retry_after_s if isinstance(exc, AirflowUnavailable) else None
    return backoff_s(attempts - 1, asked_s, settings().retry_cap_s)


def _give_up(
    request: TriggerRequest, run_id: str, task_id: str, turn: Turn | None, *, unsure: bool, reason: str
) -> DagRun:
    """End a request whose time is over: look once more, then raise GaveUp or OutcomeUnknown.

    Without a turn, where nothing may be sent to Airflow, it is looked for later only.
    """
    if not unsure:
        raise GaveUp(request.give_up_after_s, reason)
    if turn is not None:
        with suppress(*_NOT_SETTLED), turn as airflow:
            existing = airflow.get_dag_run(request.dag_id, run_id)
            if existing is not None:
                return settle_existing(request, existing, task_id=task_id, airflow=airflow, unsure=unsure)
    look_up_later(task_id, request.dag_id, run_id, request.connection)
    raise OutcomeUnknown(request.dag_id, run_id, reason)


_NOT_SETTLED = (AirflowUnavailable, CredentialsRefused, RequestRejected, NoTurn, Busy, ConfKeyMissing)


def look_up_later(task_id: str, dag_id: str, run_id: str, connection: str) -> None:
    """Publish the task that looks for a run after the request has ended. Raises NotHandedOver."""
    _publish_later(
        settle_outcome, "look-up", 2, task_id=task_id, dag_id=dag_id, dag_run_id=run_id, connection=connection
    )


def stop_later(task_id: str, dag_id: str, run_id: str, connection: str, *, known_ours: bool) -> None:
    """Publish the task that sets a run to failed after the request has ended. Raises NotHandedOver.

    The record says so first: who wants that run again waits until it is done.
    """
    waits().learn(task_id, stopping=_stop_is_over_at())
    _publish_later(
        stop_run,
        "stop",
        0,
        task_id=task_id,
        dag_id=dag_id,
        dag_run_id=run_id,
        connection=connection,
        known_ours=known_ours,
    )


def _stop_is_over_at() -> str:
    """Return until when a stop that is asked for now may yet be done, by Redis' clock.

    Whoever does it says so; this is for one that is lost. Its last attempt may come late.
    """
    return f"{redis_now() + settings().look_up_for_s + settings().retry_cap_s + 60:.3f}"


def _publish_later(task: Any, what: str, countdown: float, **kwargs: Any) -> None:
    kwargs["until"] = datetime.now(UTC).timestamp() + settings().look_up_for_s
    try:
        task.apply_async(kwargs=kwargs, queue=QUEUE_LOOKS, countdown=countdown or None)
    except Exception as exc:
        raise NotHandedOver(f"the {what} of {kwargs['task_id']} could not be published: {exc}") from exc
