"""Doors that let requests in: `POST /v1/dags/{dag_id}/runs`, `POST /v1/jobs`, `POST /v1/fan-out`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..client import RelayClient, told_as_unavailable
from ..contract import MAX_FAN_OUT, TriggerRequest
from ..door import Taken
from ..errors import InvalidRequest, NotAllowed
from ..fan_out import OnError, fan_out
from ..keys import Key
from ..queues.message import Incoming, Order, json_object, order_of, task_id_for
from ..stores.envelope import trace_of
from ..stores.records import record_key
from . import schemas
from .base import Gateway, Problem, as_json, asked_by, gateway_of, in_thread, key_of
from .idempotency import IN_PROGRESS, REUSED, digest, fingerprint, idempotency_key, is_same, kept

NDJSON: Final = "application/x-ndjson"
MOST_WRONG_LINES: Final = 20
"""So many wrong lines of a fan-out are told of at once."""

FAN_OUTS_AT_ONCE: Final = 2
"""Of a process: each may hold some hundred megabytes while it is read. A further one waits its turn."""

KEEP_FINGERPRINT_S: Final = 14 * 86_400


def router() -> APIRouter:
    """Return the routes."""
    routes = APIRouter()
    reading = asyncio.Semaphore(FAN_OUTS_AT_ONCE)
    being_taken: set[str] = set()

    @routes.post("/v1/dags/{dag_id}/runs", **schemas.POST_RUN)
    async def start_run(request: Request, dag_id: str) -> Response:
        """Start one run of a DAG. Without a body it has no conf."""
        fields = await _fields(request)
        if fields.setdefault("dag_id", dag_id) != dag_id:
            raise InvalidRequest("dag_id: the path names another: leave it out")
        if "service" in fields:
            raise InvalidRequest("service: a job goes to /v1/jobs")
        return await _accept(request, fields)

    @routes.post("/v1/jobs", **schemas.POST_JOB)
    async def start_job(request: Request) -> Response:
        """Start a job on another service, and follow it until it ends."""
        fields = await _fields(request)
        if "dag_id" in fields:
            raise InvalidRequest("dag_id: a run goes to /v1/dags/{dag_id}/runs")
        return await _accept(request, fields)

    @routes.post(FAN_OUT_PATH, **schemas.POST_FAN_OUT)
    async def start_fan_out(request: Request) -> Response:
        """Start many runs, all or none: one JSON object of a trigger's fields on each line."""
        gateway, key = gateway_of(request), key_of(request)
        check_type(request, (NDJSON, "application/ndjson", "application/jsonl"), NDJSON)
        options = _fan_out_options(request)
        name = idempotency_key(request)
        fan_out_id = task_id_for(door_of(key), "message", name) if name is not None else None
        if fan_out_id is not None and fan_out_id in being_taken:
            raise Problem(409, IN_PROGRESS, headers={"Retry-After": "1"})
        if fan_out_id is not None:
            being_taken.add(fan_out_id)
        try:
            async with reading:
                body = await request.body()
                taken = await in_thread(_take_fan_out, gateway, key, body, fan_out_id, options)
        finally:
            being_taken.discard(fan_out_id or "")
        return _accepted(request, taken)

    return routes


FAN_OUT_PATH: Final = "/v1/fan-out"


def door_of(key: Key) -> str:
    """Return the name that the ids of this key's requests are unique in: nobody meets another's."""
    return f"http:{key.id}"


async def _fields(request: Request) -> dict[str, Any]:
    body = await request.body()
    if not body:
        return {}
    check_type(request, ("application/json",), "application/json")
    return json_object(body)


def check_type(request: Request, known: tuple[str, ...], right: str) -> None:
    """Raise Problem (415) for a body of another type than one of these."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in known:
        raise Problem(415, f"content-type: send {right}", headers={"Accept-Post": right})


def trace_headers(request: Request) -> dict[str, str]:
    """Return the W3C trace context that a request came with; an odd one is left out, a proxy may have put
    it there."""
    found = trace_of(dict(request.headers)) if "traceparent" in request.headers else None
    return found.headers() if found is not None else {}


async def _accept(request: Request, fields: dict[str, Any]) -> Response:
    key, name = key_of(request), idempotency_key(request)
    if name is not None and "id" in fields:
        raise InvalidRequest("id: the Idempotency-Key names the request: leave one of them out")
    around = Incoming(b"", id=name, headers=trace_headers(request))
    order = order_of(fields, door=door_of(key), message=around)
    return _accepted(request, await accept(gateway_of(request), key, order, compare=True))


async def accept(gateway: Gateway, key: Key, order: Order, *, compare: bool) -> Taken:
    """Have one order in Redis; for a repeat, say what is there. Raises the errors of this package.

    `compare`: a repeat that asks for something else is refused.
    """
    if order.envelope.reply_to is not None:
        raise InvalidRequest(
            "reply_to: HTTP has no queue for answers: name hooks in on_end, or follow /v1/tasks/{id}/events"
        )
    asked = fingerprint(order.request) if compare and order.task_id is not None else None
    more = {"fingerprint": kept(asked, gateway.relay.confs.keys)} if asked is not None else {}
    item = gateway.door.prepare(order, by=asked_by(key), scope=key.scope, **more)
    taken = await gateway.batches.accept(item)
    if taken.new:
        return taken
    return await in_thread(_known, gateway.relay, taken, asked)


def _known(relay: RelayClient, taken: Taken, asked: str | None) -> Taken:
    """Return what is on record under an id that came again. Raises Problem for another request."""
    names = ("fingerprint", "fan_out", "dag_run_id")
    with told_as_unavailable():
        values = relay.redis.hmget(record_key(taken.task_id), list(names))
    known = {name: _text(value) if value else None for name, value in zip(names, values, strict=True)}
    if asked is not None:
        there = known["fingerprint"]
        if known["fan_out"] is not None or (
            there is not None and not is_same(there, asked, relay.confs.keys)
        ):
            raise Problem(422, REUSED)
    return Taken(taken.task_id, known["dag_run_id"] or None, False)


def _accepted(request: Request, taken: Taken) -> Response:
    request.scope["state"]["task"] = taken.task_id
    return Response(
        as_json(told(taken)),
        202,
        headers={"Location": f"/v1/tasks/{taken.task_id}"},
        media_type="application/json",
    )


def told(taken: Taken) -> dict[str, Any]:
    """Return what a sender is told of what was accepted: the same whenever it sends it again."""
    url = f"/v1/tasks/{taken.task_id}"
    return {
        "id": taken.task_id,
        "dag_run_id": taken.dag_run_id,
        "status_url": url,
        "events_url": f"{url}/events",
    }


# Fan-outs


def _fan_out_options(request: Request) -> dict[str, Any]:
    given = request.query_params
    unknown = set(given) - {"on_error", "wait"}
    if unknown:
        raise InvalidRequest(f"{min(unknown)[:40]!r}: no option of a fan-out; those are on_error and wait")
    on_error, wait = given.get("on_error", "continue"), given.get("wait", "false")
    if on_error not in ("continue", "stop"):
        raise InvalidRequest("on_error: give continue or stop")
    if wait not in ("true", "false"):
        raise InvalidRequest("wait: give true or false")
    return {"on_error": on_error, "wait": True if wait == "true" else None}


def _take_fan_out(
    gateway: Gateway, key: Key, body: bytes, fan_out_id: str | None, options: dict[str, Any]
) -> Taken:
    """Read the lines and have all of them in Redis, or none. Blocks; raises the errors of this package."""
    requests = list(_requests(key, body))
    on_error: OnError = options["on_error"]
    relay = gateway.relay
    if fan_out_id is not None:
        asked = digest([*map(fingerprint, requests), options])
        with told_as_unavailable():
            # Beside the record, which is there only when all of its requests are.
            name = f"dagrelay:fan-out:{fan_out_id}:asked"
            keys = relay.confs.keys
            first = relay.redis.set(name, kept(asked, keys), nx=True, ex=KEEP_FINGERPRINT_S, get=True)
            there = relay.redis.hget(record_key(fan_out_id), "fan_out")
            is_other = there is None and relay.redis.exists(record_key(fan_out_id))
        if is_other or (first is not None and not is_same(_text(first), asked, keys)):
            raise Problem(422, REUSED)
        if there is not None:
            return Taken(fan_out_id, None, False)
    made = fan_out(
        requests,
        on_error=on_error,
        wait=options["wait"],
        relay=relay,
        by=asked_by(key),
        fan_out_id=fan_out_id,
    )
    if fan_out_id is not None:
        with told_as_unavailable():
            there = relay.redis.hget(record_key(fan_out_id), "fan_out")
        if there is None:  # meanwhile a run or a job was accepted under this id, and the fan-out was not
            raise Problem(422, REUSED)
    return Taken(made.id, None, True)


def _requests(key: Key, body: bytes) -> Iterator[TriggerRequest]:
    """Yield the triggers in the lines of a body. Raises Problem, at the end, that names the wrong lines."""
    wrong: list[dict[str, Any]] = []
    count, status = 0, 403
    for number, line in enumerate(body.split(b"\n"), 1):
        if not line.strip():
            continue
        count += 1
        try:
            request = _request(key, line, count)
        except InvalidRequest as exc:
            if not isinstance(exc, NotAllowed):
                status = 422
            wrong.append({"line": number, "detail": str(exc).replace("body: ", "", 1)})
            if len(wrong) >= MOST_WRONG_LINES or count > MAX_FAN_OUT:
                break
        else:
            if not wrong:
                yield request
    if not count:
        raise InvalidRequest('body: holds no line: send one such as {"dag_id": "daily_sales"} for each run')
    if wrong:
        detail = f"line {wrong[0]['line']}: {wrong[0]['detail']}"
        raise Problem(status, f"{detail}; nothing was taken, `errors` has the wrong lines", errors=wrong)


def _request(key: Key, line: bytes, count: int) -> TriggerRequest:
    """Return the trigger in one line. Raises InvalidRequest, NotAllowed."""
    if count > MAX_FAN_OUT:
        raise InvalidRequest(f"a fan-out has at most {MAX_FAN_OUT} requests; make several of them")
    order = order_of(json_object(line), door="")
    request = order.request
    if not isinstance(request, TriggerRequest):
        raise InvalidRequest("service: a fan-out starts runs of DAGs, and no jobs")
    if order.envelope.model_fields_set:
        names = ", ".join(sorted(order.envelope.model_fields_set))
        raise InvalidRequest(f"{names}: no field of a fan-out's request")
    key.scope.check(request)
    return request


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
