"""The trigger by which a task waits for a request without a worker of Airflow's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from airflow.triggers.base import BaseTrigger, TaskSuccessEvent, TriggerEvent

from ..stores.standing import Standing
from .compat import AIRFLOW_3
from .hook import DEFAULT_CONN_ID, DagrelayHook, client_for
from .waiter import waiter_for

if TYPE_CHECKING:
    from airflow.models.taskinstance import TaskInstance

UNKNOWN_FOR_S: Final = 30.0
"""How long a request without a record is waited for: Redis may be about to be restored."""


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
        try:
            target = await DagrelayHook(self.relay_conn_id).atarget()
            waiter = waiter_for(target.settings)
            changes = waiter.changes(self.request_id)
            state, told, known = "", "", False
            while not state:
                try:
                    standing = await asyncio.wait_for(anext(changes), None if known else UNKNOWN_FOR_S)
                except TimeoutError:
                    state = "unknown"
                    break
                known = bool(standing.state)
                if standing.ended:
                    state = standing.state
                elif known and (words := words_of(standing)) != told:
                    told = words
                    self.log.info("request %s: %s", self.request_id, words)
            await changes.aclose()
            xcoms = None
            if state == "done" and self.end_from_trigger:
                outcome = await waiter.outcome(self.request_id)
                xcoms = self.xcoms(outcome) if outcome is not None else None
        except asyncio.CancelledError:
            if not AIRFLOW_3 and self.cancel_on_kill and not await asyncio.to_thread(self._still_deferred):
                await self.on_kill()
            raise
        if xcoms is not None:
            yield TaskSuccessEvent(xcoms=xcoms)
        else:
            yield TriggerEvent({"request_id": self.request_id, "state": state})

    async def on_kill(self) -> None:
        """Cancel the request: somebody acted on the task. Airflow 3.3 calls it, see `run` for Airflow 2."""
        if not self.cancel_on_kill:
            return
        target = await DagrelayHook(self.relay_conn_id).atarget()
        state = await asyncio.to_thread(lambda: client_for(target).handle(self.request_id).cancel())
        self.log.info("request %s is asked to be cancelled, it was %s", self.request_id, state)

    def _still_deferred(self) -> bool:
        """Tell whether the task instance still waits: then it is the triggerer that stops."""
        from airflow.models.taskinstance import TaskInstance
        from airflow.utils.session import create_session
        from airflow.utils.state import TaskInstanceState

        ours: TaskInstance = self.task_instance
        with create_session() as session:
            found = session.get(
                TaskInstance,
                {
                    "dag_id": ours.dag_id,
                    "task_id": ours.task_id,
                    "run_id": ours.run_id,
                    "map_index": ours.map_index,
                },
            )
            return found is not None and found.state == TaskInstanceState.DEFERRED


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
