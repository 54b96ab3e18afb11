"""CloudEvents 1.0 at `POST /v1/events`: structured, binary, and in batches.

Sources: the specification's HTTP and JSON bindings, v1.0.2. An event names itself by source and id: one that
comes again is the same request, whatever it says the second time.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..door import Taken
from ..errors import ConfGone, InvalidRequest, NotAllowed
from ..keys import Key
from ..queues.message import CLOUD_EVENT_JSON, Incoming, Order, json_value, read
from . import schemas
from .base import Gateway, Problem, as_json, asked_by, gateway_of, in_thread, key_of
from .runs import accept, door_of, told, trace_headers

BATCH_JSON: Final = "application/cloudevents-batch+json"
MOST_EVENTS: Final = 1000


def router() -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/v1/events", **schemas.POST_EVENTS)
    async def take_events(request: Request) -> Response:
        """Start what one event, or each event of a batch, asks for by the routing rules."""
        gateway, key = gateway_of(request), key_of(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await request.body()
        if kind == BATCH_JSON:
            taken = await _take_batch(gateway, key, body, trace_headers(request))
            return Response(as_json([told(one) for one in taken]), 202, media_type="application/json")
        if kind != CLOUD_EVENT_JSON and "ce-specversion" not in request.headers:
            raise Problem(
                415,
                f"content-type: send an event as {CLOUD_EVENT_JSON}, several as {BATCH_JSON}, "
                "or its attributes in headers, ce-specversion and so on",
                headers={"Accept-Post": f"{CLOUD_EVENT_JSON}, {BATCH_JSON}"},
            )
        headers = {name: value for name, value in request.headers.items() if name.startswith("ce-")}
        message = Incoming(body, content_type=kind, headers=headers | trace_headers(request))
        one = await accept(gateway, key, _order(gateway, key, message), compare=False)
        request.scope["state"]["task"] = one.task_id
        return Response(
            as_json(told(one)),
            202,
            headers={"Location": f"/v1/tasks/{one.task_id}"},
            media_type="application/json",
        )

    return routes


def _order(gateway: Gateway, key: Key, message: Incoming) -> Order:
    order = read(message, door=door_of(key), routes=gateway.routes)
    if order.envelope.reply_to is not None:
        raise InvalidRequest("reply_to: HTTP has no queue for answers: name hooks in on_end")
    return order


async def _take_batch(gateway: Gateway, key: Key, body: bytes, trace: dict[str, str]) -> list[Taken]:
    """Have all events of a batch in Redis, or none. Raises Problem, and the errors of this package."""
    events = json_value(body)
    if not isinstance(events, list):
        raise InvalidRequest("body: a batch is a JSON array of events")
    if len(events) > MOST_EVENTS:
        raise InvalidRequest(f"body: a batch has at most {MOST_EVENTS} events; send several of them")
    items, wrong, status = [], [], 403
    for index, event in enumerate(events):
        try:
            message = Incoming(as_json(event), content_type=CLOUD_EVENT_JSON, headers=trace)
            order = _order(gateway, key, message)
            items.append(gateway.door.prepare(order, by=asked_by(key), scope=key.scope))
        except InvalidRequest as exc:
            if not isinstance(exc, NotAllowed):
                status = 422
            wrong.append({"index": index, "detail": str(exc)})
    if not wrong:
        gone = await in_thread(gateway.door.gone, items)
        wrong, status = [{"index": index, "detail": str(exc)} for index, exc in gone.items()], 422
    if wrong:
        detail = f"event {wrong[0]['index']}: {wrong[0]['detail']}"
        raise Problem(status, f"{detail}; nothing was taken, `errors` has the wrong events", errors=wrong)
    answers: list[Taken | ConfGone] = await in_thread(gateway.door.accept, items)
    taken = []
    for one in answers:
        if isinstance(one, ConfGone):
            raise one  # it was deleted since then; the others are in, and sent again they are the same
        taken.append(one)
    return taken
