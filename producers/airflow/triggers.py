"""The trigger by which a task waits for a request without a worker of Airflow's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from airflow.triggers.base import BaseTrigger, TaskSuccessEvent, TriggerEvent
from asgiref.sync import sync_to_async  # type: ignore[import-not-found]  # Airflow brings it

from ..errors import BrokerUnavailable
from ..stores.standing import Standing
from .compat import AIRFLOW_3, conf
from .hook import DEFAULT_CONN_ID, DagrelayHook, RelayTarget, client_for
from .waiter import Waiter, waiter_for

UNKNOWN_FOR_S: Final = 30.0
"""How long a request without a record is waited for: Redis may be about to be restored."""

CANCEL_WITHIN_S: Final = 25.0
"""How long Redis may be away when a request is to be cancelled. Airflow 3.3 grants 30 s."""

RESUMED_AFTER_S: Final = 3.0
"""How long after it began a trigger has a worker resume its task, at the soonest; in Airflow 3 after the time
in which that notices the end of a process. See `_resumed_after_s`."""

_asked = False
"""Whether a trigger of this process has asked Airflow for something."""


class RelayTrigger(BaseTrigger):  # type: ignore[misc]
    """Fires once, when a request has ended: ``{"request_id": …, "state": …}``, which is done, failed,
    cancelled, or unknown where there is no such request (any more).

    Writes what is told of it into the task's log meanwhile. When somebody marks the waiting task, clears it
    or deletes its run, the request is cancelled, unless `cancel_on_kill` is false; when the triggerer stops,
    it is not. With `end_from_trigger` a request that ended well ends the task right here, which saves a
    second or two, and a start of a worker.
    """

    def __init__(
        self,
        request_id: str,
        *,
        relay_conn_id: str = DEFAULT_CONN_ID,
        cancel_on_kill: bool = True,
        end_from_trigger: bool = False,
    ) -> None:
        super().__init__()
        self.request_id, self.relay_conn_id = request_id, relay_conn_id
        self.cancel_on_kill, self.end_from_trigger = cancel_on_kill, end_from_trigger

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what another triggerer makes it from: no secret, and nothing of the request itself."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "request_id": self.request_id,
                "relay_conn_id": self.relay_conn_id,
                "cancel_on_kill": self.cancel_on_kill,
                "end_from_trigger": self.end_from_trigger,
            },
        )

    def xcoms(self, outcome: Any) -> dict[str, Any] | None:
        """Return the XComs of a task that ends here, from the outcome of its request (its `to_message()`).

        None has a worker take the outcome instead, as it does wherever the request did not end well.
        """
        return {"return_value": outcome}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait for the end of the request."""
        waiter, began = None, time.monotonic()
        try:
            target = await DagrelayHook(self.relay_conn_id).atarget()
            waiter = waiter_for(target.settings)
            await self._have_airflow_ready()
            state = await self._end(waiter)
            xcoms = None
            if state == "done" and self.end_from_trigger:
                outcome = await waiter.outcome(self.request_id)
                xcoms = self.xcoms(outcome) if outcome is not None else None
                if xcoms is not None:
                    xcoms = {} if await self._pushed(xcoms) else None
            if xcoms is None:
                await asyncio.sleep(_resumed_after_s() - (time.monotonic() - began))
        except asyncio.CancelledError:
            # Airflow 3.3 calls on_kill itself. Where the loop ends, it is the triggerer that stops.
            if not hasattr(BaseTrigger, "on_kill") and not (waiter is not None and waiter.stops):
                await self.on_kill()
            raise
        if xcoms is not None:
            yield TaskSuccessEvent(xcoms=xcoms)
        else:
            yield TriggerEvent({"request_id": self.request_id, "state": state})

    async def _have_airflow_ready(self) -> None:
        """Ask Airflow 3 for anything, once in a process, while nobody waits for the answer.

        Its triggerer sets up what it answers triggers by at the first question: for 3 to 6 s of CPU no task
        ends there. Else the first outcomes would wait for that.
        """
        global _asked
        if AIRFLOW_3 and self.end_from_trigger and not _asked:
            _asked = True
            await self._still_deferred()

    async def _end(self, waiter: Waiter) -> str:
        """Return how the request has ended, once it has; the task's log tells meanwhile how it stands."""
        changes = waiter.changes(self.request_id)
        told = ""
        try:
            standing = await anext(changes)
            while not standing.ended:
                words = words_of(standing) if standing.state else "not on record yet"
                if words != told:
                    told = words
                    self.log.info("request %s: %s", self.request_id, words)
                if standing.state:
                    standing = await anext(changes)
                else:
                    standing = await asyncio.wait_for(anext(changes), UNKNOWN_FOR_S)
        except TimeoutError:
            return "unknown"
        finally:
            changes.close()
        return standing.state

    async def _pushed(self, xcoms: dict[str, Any]) -> bool:
        """Write XComs as a task does, and tell whether that went well.

        Those of a TaskSuccessEvent Airflow 3.3 keeps, and gives, as text; and Airflow 2 writes them where a
        backend that raises, because its store is away, ends the triggerer.
        """
        try:
            await sync_to_async(_push)(self.task_instance, xcoms)
        except Exception as exc:  # noqa: BLE001 - whatever it is, a worker can do it
            self.log.warning("XComs not written here (%s: %s), a worker does it", type(exc).__name__, exc)
            return False
        return True

    async def on_kill(self) -> None:
        """Cancel the request, unless the task waits on: then another triggerer has taken this trigger over.

        Airflow 3.3 calls it when somebody acts on the task; with any other, `run` does.
        """
        if not self.cancel_on_kill or await self._still_deferred():
            return
        target = await DagrelayHook(self.relay_conn_id).atarget()
        state = await asyncio.to_thread(self._cancel, target)
        self.log.info("request %s is asked to be cancelled, it was %s", self.request_id, state)

    def _cancel(self, target: RelayTarget) -> str:
        until = time.monotonic() + CANCEL_WITHIN_S
        while True:
            try:
                return client_for(target).handle(self.request_id).cancel()
            except BrokerUnavailable:
                if time.monotonic() > until:
                    raise
                time.sleep(1)

    async def _still_deferred(self) -> bool:
        """Tell whether the task instance still waits, as far as Airflow says."""
        ours = self.task_instance
        if ours is None:
            return False
        try:
            ask = sync_to_async(_states_3 if AIRFLOW_3 else _states_2)
            states = await ask(ours.dag_id, ours.run_id, ours.task_id, ours.map_index)
        except Exception as exc:  # noqa: BLE001 - Airflow's own; and it has said that somebody acted
            self.log.warning("cannot ask for the state of the task (%s: %s)", type(exc).__name__, exc)
            return False
        return "deferred" in states


def _resumed_after_s() -> float:
    """Return how long after it began a trigger may have a worker resume its task.

    Until Airflow's scheduler has read the end of the process that deferred the task, it takes that for the
    end of the one that resumes it, and fails the task. One in five ends it reads late: the supervisor of
    Airflow 3 (3.3.2, `_monitor_subprocess`) sees the last pipe close, finds the process there still, for a
    millisecond, and looks again after `[workers] min_heartbeat_interval`.
    """
    if not AIRFLOW_3:
        return RESUMED_AFTER_S
    return RESUMED_AFTER_S + float(conf.getfloat("workers", "min_heartbeat_interval", fallback=5.0))


def _push(ti: Any, xcoms: dict[str, Any]) -> None:
    if AIRFLOW_3:
        from airflow.sdk.execution_time.xcom import XCom
    else:
        from airflow.models.xcom import XCom
    about = {"dag_id": ti.dag_id, "task_id": ti.task_id, "run_id": ti.run_id, "map_index": ti.map_index}
    for key, value in xcoms.items():
        XCom.set(key=key, value=value, **about)


def _states_3(dag_id: str, run_id: str, task_id: str, map_index: int) -> list[str]:
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    found = RuntimeTaskInstance.get_task_states(
        dag_id=dag_id, run_ids=[run_id], task_ids=[task_id], map_index=map_index
    )
    return [str(state) for states in found.values() for state in states.values()]


def _states_2(dag_id: str, run_id: str, task_id: str, map_index: int) -> list[str]:
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    with create_session() as session:
        key = {"dag_id": dag_id, "task_id": task_id, "run_id": run_id, "map_index": map_index}
        found = session.get(TaskInstance, key)
        return [str(found.state)] if found is not None else []


def words_of(standing: Standing) -> str:
    """Return how a request that goes on stands, in one line."""
    parts = [standing.state]
    if standing.job_id:
        parts.append(f"job {standing.job_id}")
    if standing.seen:
        parts.append(f"seen {standing.seen}")
    if standing.progress:
        parts.append(f"progress {standing.progress}")
    if not standing.seen and standing.waits_for:
        parts.append(f"waits for {standing.waits_for}")
    if not standing.seen and standing.reason:
        parts.append(standing.reason)
    return ", ".join(parts)
