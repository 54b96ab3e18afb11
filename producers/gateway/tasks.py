"""How a request fares: `GET` and `DELETE /v1/tasks/{id}`, and its changes as they come."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from ..cli_waiting import timeline
from ..client import told_as_unavailable
from ..contract import PollRequest, TriggerRequest
from ..errors import NotAllowed
from ..keys import Key
from ..scopes import ALL
from ..stores.fan_outs import FanOuts
from ..stores.records import ENDED, Record
from . import schemas
from .base import NOT_THERE, RETRY_AFTER_S, Gateway, Problem, as_json, asked_by, gateway_of, in_thread, key_of
from .streams import Streams

INSTANTS: Final = (
    "accepted_at",
    "due_at",
    "next_at",
    "waiting_since",
    "submitted_at",
    "ended_at",
    "corrected_at",
)
PLAIN: Final = (
    *("state", "dag_id", "dag_run_id", "connection", "key", "service", "job_id", "reference", "by"),
    *("attempts", "waits_for", "seen", "progress", "reason", "error", "run", "fan_out", "replay_of"),
)


def router(streams: Streams) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.get("/v1/tasks/{task_id}", **schemas.GET_TASK)
    async def status(request: Request, task_id: str) -> Response:
        """Return how a request stands, and what happened to it so far."""
        _check_may_read(key_of(request))
        found, history = await in_thread(_look, gateway_of(request), key_of(request), task_id)
        past = timeline(found, history)
        told = shown(found) | {"history": [{"at": instant(at), "what": what} for at, what in past]}
        return Response(as_json(told), media_type="application/json")

    @routes.delete("/v1/tasks/{task_id}", **schemas.DELETE_TASK)
    async def cancel(request: Request, task_id: str) -> Response:
        """Ask for a request to be cancelled. What runs just now ends as it would have."""
        key = key_of(request)
        if not key.may_cancel:
            raise Problem(403, "this key may not cancel: that takes one with may_cancel = true")
        state = await in_thread(_cancel, gateway_of(request), key, task_id)
        if state in ("done", "failed"):
            raise Problem(409, f"the request has ended as {state}: there is nothing to cancel", state=state)
        return Response(as_json({"id": task_id, "state": state}), 202, media_type="application/json")

    @routes.get("/v1/tasks/{task_id}/events", **schemas.GET_EVENTS)
    async def events(request: Request, task_id: str) -> Response:
        """Follow a request until it ends, by server-sent events."""
        gateway, key = gateway_of(request), key_of(request)
        _check_may_read(key)
        found, _ = await in_thread(_look, gateway, key, task_id)
        seen = request.headers.get("last-event-id")
        if found.ended and seen == event_id(found):
            return Response(status_code=204)  # by which an EventSource ends its asking
        if streams.full:
            raise Problem(
                503,
                "too many streams at once: ask again, or ask for /v1/tasks/{id}",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        told = _events(streams, gateway, key, found, seen)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(told, media_type="text/event-stream", headers=headers)

    return routes


def shown(found: Record) -> dict[str, Any]:
    """Return what a sender may know of a request: never its conf, which is not on record."""
    told: dict[str, Any] = {"id": found.task_id}
    for name in PLAIN:
        value = getattr(found, name)
        if value is not None and value != "":
            told[name] = value
    for name in INSTANTS:
        value = getattr(found, name)
        if value is not None:
            told[name] = instant(value)
    return told


def instant(at: float) -> str:
    """Return seconds since 1970 as RFC 3339 has them."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def event_id(found: Record) -> str:
    """Return the id of the event that tells of this state: the same wherever and whenever it is told."""
    return hashlib.sha256(as_json(shown(found))).hexdigest()[:20]


def covers(key: Key, found: Record) -> bool:
    """Tell whether a key may know of a request: one that it might have asked for itself."""
    scope = key.scope
    if found.fan_out == found.task_id:  # its requests may be of many DAGs
        return found.by == asked_by(key) or (scope.dags == ALL and scope.connections == ALL)
    try:
        if found.service is not None:
            scope.check(PollRequest(service=found.service, path="/"))
        elif found.dag_id:
            scope.check(TriggerRequest(dag_id=found.dag_id, connection=found.connection or "default"))
        else:
            return False
    except NotAllowed:
        return False
    return True


def _check_may_read(key: Key) -> None:
    if not key.may_read:
        raise Problem(403, "this key may not read: that takes one without may_read = false")


def _look(gateway: Gateway, key: Key, task_id: str) -> tuple[Record, list[tuple[float, str]]]:
    """Return the record and its history. Raises Problem (404), for what the key does not cover likewise."""
    handle = gateway.relay.handle(task_id)
    found = handle.record()
    if found is None or not covers(key, found):
        raise Problem(404, NOT_THERE)
    return found, handle.history()


def _cancel(gateway: Gateway, key: Key, task_id: str) -> str:
    relay, by = gateway.relay, asked_by(key)
    found = relay.record(task_id)
    if found is None or not covers(key, found):
        raise Problem(404, NOT_THERE)
    with told_as_unavailable():
        if found.fan_out == task_id:
            FanOuts(relay.redis).cancel(task_id, by=by)
            return found.state
        return relay.waits.cancel(task_id, by=by) or found.state


async def _events(
    streams: Streams, gateway: Gateway, key: Key, found: Record, seen: str | None
) -> AsyncIterator[bytes]:
    """Yield the events of one request: its state now unless the sender has seen it, each change, the end.

    A key that is taken away, or changed, ends it: whoever follows asks again, and is refused or not.
    """
    with streams.follow(found.task_id) as changes:
        if event_id(found) != seen:
            yield _event(found)
        while not found.ended:
            try:
                async with asyncio.timeout(gateway.settings.heartbeat_s):
                    newer = await changes.get()
            except TimeoutError:
                if _taken_away(gateway, key):
                    return
                yield b": still here\n\n"
                continue
            if newer is None or _taken_away(gateway, key):  # or the gateway stops: another one is asked
                return
            if event_id(newer) != event_id(found):
                yield _event(newer)
            found = newer


def _taken_away(gateway: Gateway, key: Key) -> bool:
    return gateway.keys is not None and not gateway.keys.holds(key)


def _event(found: Record) -> bytes:
    kind = b"end" if found.state in ENDED else b"state"
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (event_id(found).encode(), kind, as_json(shown(found)))
