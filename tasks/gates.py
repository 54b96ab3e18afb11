"""How a worker hands a run over to a DAG that may be paused, or have as many runs as it is to have.

`hand_over` stands before the POST of a trigger. A request that says nothing of either goes straight on. Any
other passes the gate of its DAG; where it may not pass now, it parks there and is called, and a thread waits
for nothing. What it may, and who is next: `producers/stores/gates.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from celery import bootsteps
from celery.exceptions import Ignore
from celery.utils.log import get_logger
from redis.exceptions import RedisError

from producers.contract import QUEUE_TRIGGERS, DagRun, IfPaused, TriggerRequest, Window
from producers.errors import (
    AirflowUnavailable,
    CredentialsRefused,
    DagNotFound,
    DagPaused,
    LogicalDateTaken,
    RequestRejected,
    RunConflict,
    RunExists,
)
from producers.stores.gates import DagFacts, Entered, Gates, line_key, waits_for
from producers.stores.lines import ahead_s

from .again import redelivered, redis_now
from .airflow.answers import DagView
from .airflow.connections import AirflowConnection
from .app import app, said, store_client
from .settings import settings
from .slots import NoTurn, Turn, thread_turn
from .waiting import show, wait

log = get_logger("dagrelay.gates")

TICK_S: Final = 0.5
"""How often a worker looks whether Airflow is to be asked for what waits."""

PAUSED_S: Final = 30.0
"""How long a request waits at least for its paused DAG, before it looks whether its time is over: while it
waits for that with `hold`, the time stands still."""


class Airflow(Protocol):
    """What a gate asks of `tasks.airflow.client.AirflowClient`. Raises as that does."""

    def get_dag(self, dag_id: str) -> DagView: ...
    def count_unfinished_runs(self, dag_id: str) -> int: ...
    def unpause_dag(self, dag_id: str) -> object: ...


@dataclass(frozen=True, slots=True)
class Gate:
    """What a request asks of its DAG before its run is handed over."""

    connection: str
    dag_id: str
    if_paused: IfPaused
    window: Window | None

    @property
    def line(self) -> str:
        """Where those wait that ask for the same."""
        return line_key(self.connection, self.dag_id, self.if_paused, self.window)

    def waits_for(self, told: Entered) -> str:
        """Say in words what keeps a request from passing."""
        return waits_for(
            self.dag_id, self.if_paused, self.window, paused=told.verdict == "paused", places=told.places
        )


def gate_of(request: TriggerRequest, connection: AirflowConnection) -> Gate | None:
    """Return the gate that a request has to pass, or None."""
    window = request.window if request.window is not None else connection.window
    if window is None and request.if_paused == "trigger":
        return None
    return Gate(connection.id, request.dag_id, request.if_paused, window)


def gates() -> Gates:
    """Return the gates of all DAGs, in the worker's Redis."""
    return Gates(store_client())


def hand_over(
    task: Any,
    request: TriggerRequest,
    turn: Turn,
    airflow: Airflow,
    *,
    start: Callable[[], DagRun],
    look: Callable[[], DagRun | None],
) -> DagRun:
    """Have `start` bring a run about once it may be; park the task until then, by raising what parks it.

    `look` returns the request's run if there is one already: that is not held back. Raises what these two
    raise; DagPaused, if the request says so; NoTurn, where its time is over; and RequestRejected where the
    DAG may not be unpaused.
    """
    gate = gate_of(request, turn.connection)
    if gate is None:
        return start()
    store, task_id = gates(), task.request.id
    run_id = request.run_id_for(task_id)
    there = _enter(task, request, gate, turn, airflow, run_id, look)
    if there is not None:
        return there
    try:
        run = start()
    except (RequestRejected, RunConflict, RunExists, LogicalDateTaken, NoTurn):
        with _told_later():
            store.not_made(gate.connection, gate.dag_id, task_id)
        raise
    # Otherwise the ticket is kept: it tries again with it, also if an answer was lost.
    with _told_later():
        if run.created or run.cleared:
            store.made(gate.connection, gate.dag_id, task_id, run_id)
        else:
            store.not_made(gate.connection, gate.dag_id, task_id)
    return run


@contextmanager
def _told_later() -> Iterator[None]:
    """Go on where Redis does not take it: a ticket runs out by itself."""
    try:
        yield
    except (RedisError, OSError) as exc:
        log.warning("ticket not given back, it runs out: %s", said(exc))


def _enter(
    task: Any,
    request: TriggerRequest,
    gate: Gate,
    turn: Turn,
    airflow: Airflow,
    run_id: str,
    look: Callable[[], DagRun | None],
) -> DagRun | None:
    """Return None once the run may be handed over; or the run that is there already."""
    store, looked, unpaused = gates(), False, False
    while True:
        told = store.enter(
            gate.connection,
            gate.dag_id,
            task.request.id,
            run_id,
            if_paused=gate.if_paused,
            window=gate.window,
            ahead_s=ahead_s(request.priority),
        )
        if told.verdict == "pass":
            return None
        if told.verdict == "ask":
            _ask(gate.connection, gate.dag_id, airflow)
            continue
        over = told.age_s >= request.give_up_after_s
        if not looked and _may_be_there(task, request, told, over=over):
            looked = True
            with _only_asked():
                there = look()
            if there is not None:
                return there
        if told.problem is not None:
            raise told.problem
        if told.verdict == "paused" and gate.if_paused == "fail":
            raise DagPaused(gate.dag_id)
        if told.verdict == "paused" and gate.if_paused == "unpause" and not unpaused:
            try:
                _unpause(gate, airflow)
            except RequestRejected:
                with _only_asked():
                    there = look()
                if there is None:
                    raise
                return there
            unpaused = True
            continue
        if over:
            words = gate.waits_for(told)
            raise NoTurn(words if told.verdict == "paused" else f"it still waited for {words}", told.unsure)
        raise _park(task, request, gate, turn, told)


def _may_be_there(task: Any, request: TriggerRequest, told: Entered, *, over: bool) -> bool:
    """Tell whether to look for the run of a request that may not pass now.

    An earlier attempt may have made it, or another request with the same key. Of those that wait for a place
    there may be thousands: they are looked for where it is known that there is one, and else when they are
    called.
    """
    if told.unsure or told.made_here or redelivered(task):
        return True
    verdict = over or told.problem is not None or (told.verdict == "paused" and request.if_paused == "fail")
    named = request.key is not None or request.dag_run_id is not None
    return verdict or (told.verdict == "paused" and named and not told.before)


@contextmanager
def _only_asked() -> Iterator[None]:
    """Have it known of a question that got no answer that nothing was done by it."""
    try:
        yield
    except AirflowUnavailable as exc:
        raise AirflowUnavailable(exc.reason, exc.retry_after_s, False) from None


def _ask(connection: str, dag_id: str, airflow: Airflow) -> None:
    """Ask Airflow how things stand with a DAG, and say so at its gate."""
    store, asked_at = gates(), redis_now()
    try:
        with _only_asked():
            facts = facts_of(airflow, dag_id)
    except RequestRejected as exc:  # DagNotFound too: whoever waits is to meet it
        store.answered(connection, dag_id, asked_at, exc)
    except BaseException:
        with suppress(RedisError, OSError):
            store.not_answered(connection, dag_id)
        raise
    else:
        store.answered(connection, dag_id, asked_at, facts)


def facts_of(airflow: Airflow, dag_id: str) -> DagFacts:
    """Return what Airflow says of a DAG, after two cheap questions."""
    dag = airflow.get_dag(dag_id)
    return DagFacts(dag.is_paused, dag.max_active_runs, airflow.count_unfinished_runs(dag_id))


def _unpause(gate: Gate, airflow: Airflow) -> None:
    try:
        with _only_asked():
            airflow.unpause_dag(gate.dag_id)
    except DagNotFound:
        raise
    except RequestRejected as exc:
        if exc.status == 403:
            raise RequestRejected(
                403, f"if_paused='unpause': DAG {gate.dag_id} is paused, and may not be unpaused: {exc.words}"
            ) from exc
        raise
    log.info("dag unpaused dag_id=%s connection=%s", gate.dag_id, gate.connection)
    _ask(gate.connection, gate.dag_id, airflow)


def _park(task: Any, request: TriggerRequest, gate: Gate, turn: Turn, told: Entered) -> Ignore:
    """Park a task at its gate until it is called, or its time is over; return the exception to raise."""
    turn.end()
    found = {"gated": "1", "held_at": f"{told.held_s:.3f}"}
    if gate.if_paused == "hold":
        found["paused_at"] = f"{told.paused_s:.3f}"
    if redelivered(task):
        found["unsure"] = "1"  # its mark is lost with this message
    left_s = request.give_up_after_s - told.age_s
    if told.verdict == "paused":
        left_s = max(left_s, PAUSED_S)
    parked = wait(
        task,
        until=told.now + left_s,
        what=gate.waits_for(told),
        found=found,
        line=gate.line,
        ahead_s=ahead_s(request.priority),
    )
    show(task, "dag paused" if told.verdict == "paused" else "in line")
    return parked


# -- what asks for those that wait


class GatesStep(bootsteps.StartStopStep):
    """Has Airflow asked for the DAGs at whose gates somebody waits."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    label = "Gates"

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._entry: Any = None

    def start(self, consumer: Any) -> None:
        serves = QUEUE_TRIGGERS in {queue.name for queue in consumer.task_consumer.queues}
        if consumer.hub is not None and serves and settings().connections:
            self._entry = consumer.hub.call_repeatedly(TICK_S, tick)

    def stop(self, consumer: Any) -> None:
        if self._entry is not None:
            self._entry.cancel()
            self._entry = None


def tick() -> None:
    """Have go on what may, and begin to ask for what is due. Raises nothing."""
    known = settings().connections
    try:
        due = gates().tick(known)
    except Exception as exc:  # noqa: BLE001 - Redis is away: seen to again in a moment
        log.debug("gates not seen to: %s", said(exc))
        return
    found: dict[str, list[str]] = {}
    for name, dag_id in due:
        found.setdefault(name, []).append(dag_id)
    for name, dag_ids in found.items():
        thread = threading.Thread(
            target=_ask_for, args=(known[name], dag_ids), name=f"gates-{name}", daemon=True
        )
        thread.start()


def _ask_for(connection: AirflowConnection, dag_ids: list[str]) -> None:
    """Ask for these DAGs, one after the other. Raises nothing: what is not asked for is due again."""
    store = gates()
    try:
        for dag_id in dag_ids:
            try:
                with thread_turn(connection) as airflow:
                    _ask(connection.id, dag_id, airflow)
            except (AirflowUnavailable, CredentialsRefused, NoTurn) as exc:
                store.not_answered(connection.id, dag_id)
                log.info("dag not asked for dag_id=%s connection=%s: %s", dag_id, connection.id, said(exc))
        store.asked(connection.id)
    except Exception as exc:  # noqa: BLE001 - a thread of its own: nobody else would say it
        log.warning("gates not asked for connection=%s: %s", connection.id, said(exc))


app.steps["consumer"].add(GatesStep)
