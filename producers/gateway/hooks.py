"""`POST /v1/webhooks/{name}`: signed webhooks of other systems. What they are, and how read: `webhooks`.

Unknown names and wrong signatures are answered alike, after the same work: who cannot sign learns nothing of
what there is.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..client import told_as_unavailable
from ..errors import InvalidRequest
from ..queues.message import Envelope, Incoming, Order, read
from ..stores.heard import heard
from ..webhooks import (
    DECOY,
    Delivery,
    OutOfTime,
    SignatureRefused,
    Webhook,
    delivery_of,
    read_webhooks,
    verify,
    wake_key,
)
from .base import PROBLEM_JSON, Gateway, Problem, as_json, gateway_of, in_thread
from .settings import GatewaySettings

log = logging.getLogger(__name__)

WOKEN_KEPT_S: Final = 2 * 86_400
"""How long it is remembered that a delivery woke somebody: senders repeat theirs for a day or so, and one
without a signed timestamp may be replayed by whoever saw it."""

_REFUSED: Final = "the delivery is not signed as one for this address is: check its name and its secret"


def router() -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["webhooks"])
    routes.add_api_route(
        "/v1/webhooks/{name}",
        webhook,
        methods=["POST"],
        status_code=202,
        summary="A signed webhook of another system",
        response_class=Response,
        responses=_RESPONSES,
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": {}}}},
            "security": [],
        },
    )
    return routes


_ANSWER: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "of the request that it became"},
        "dag_run_id": {"type": ["string", "null"]},
        "woken": {"type": "integer", "description": "how many tasks it woke"},
        "repeated": {"type": "boolean", "description": "it had come before, and nothing was done"},
    },
    "required": ["repeated"],
}
_PROBLEM: Final = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    202: {
        "description": "taken, or taken before",
        "content": {"application/json": {"schema": _ANSWER}},
    },
    **{
        status: {
            "description": words,
            "content": _PROBLEM,
        }
        for status, words in {
            400: "signed, and more than 5 minutes old",
            401: "not signed as it should be, or no such webhook",
            403: "signed, and asks for what this webhook may not",
            408: "the body took too long",
            413: "the body is too large",
            422: "signed, and its body cannot be used: the detail says why",
            503: "Redis did not take it: send it again",
        }.items()
    },
}


async def webhook(request: Request, name: str) -> Response:
    """Take one delivery. A repeated one is answered with a yes, and changes nothing."""
    gateway = gateway_of(request)
    body = await request.body()
    known = _webhooks(request).get(name)
    hook = known if known is not None else DECOY
    try:
        verify(hook, request.headers, body, time.time())
    except SignatureRefused as exc:
        log.warning("webhook refused name=%s: %s", hook.name or "unknown", exc)
        raise Problem(401, _REFUSED, headers={"WWW-Authenticate": "Webhook"}) from None
    except OutOfTime as exc:
        log.warning("webhook refused name=%s: its timestamp is %+.0f s off", hook.name, exc.off_s)
        raise Problem(
            400,
            f"its timestamp is {abs(exc.off_s):.0f} s {'ahead of' if exc.off_s > 0 else 'before'} our clock, "
            "and 300 s are allowed: sign it anew, and look at both clocks",
        ) from None
    delivery = delivery_of(hook, request.headers, body)
    if hook.scheme == "github" and delivery.event == "ping":  # GitHub asks whether there is somebody
        return _taken({"repeated": False})
    if hook.does == "wake":
        return await _wake(gateway, hook, delivery)
    order = _order(gateway, hook, delivery, body)
    item = gateway.door.prepare(order, by=f"{hook.name}@webhook", scope=hook.scope)
    taken = await gateway.batches.accept(item)
    log.info("webhook name=%s task_id=%s new=%d", hook.name, taken.task_id, taken.new)
    request.scope.setdefault("state", {})["task"] = taken.task_id
    return _taken({"id": taken.task_id, "dag_run_id": taken.dag_run_id, "repeated": not taken.new})


def mistakes_of(settings: GatewaySettings) -> list[str]:
    """Return every mistake in the webhooks of a gateway, by its variable's name."""
    hooks, mistakes = read_webhooks(settings.environ)
    routed = [hook.name for hook in hooks.values() if hook.does == "routes"]
    if routed and settings.rules_file is None:
        mistakes += [
            f"DAGRELAY_WEBHOOK_{name.upper()}: routes needs rules: set DAGRELAY_GATEWAY_RULES_FILE"
            for name in routed
        ]
    return mistakes


def _webhooks(request: Request) -> Mapping[str, Webhook]:
    """Return the webhooks of this process, read once; its settings have named the mistakes in them."""
    state = request.app.state
    if not hasattr(state, "webhooks"):
        state.webhooks, _ = read_webhooks(gateway_of(request).settings.environ)
    found: Mapping[str, Webhook] = state.webhooks
    return found


def _order(gateway: Gateway, hook: Webhook, delivery: Delivery, body: bytes) -> Order:
    """Return what a delivery asks for. Raises InvalidRequest."""
    if hook.does == "routes":
        if gateway.routes is None:
            raise InvalidRequest("type: this gateway has no routing rules")
        return Order(gateway.routes.order(delivery.as_event()), delivery.task_id, Envelope())
    # Nothing of the headers: they are not signed.
    message = Incoming(body, id=delivery.id)
    order = read(message, door=f"webhook {hook.name}", routes=gateway.routes)
    if order.envelope.reply_to is not None:
        raise InvalidRequest("reply_to: a webhook has nowhere to answer to: name a hook in on_end")
    return order


async def _wake(gateway: Gateway, hook: Webhook, delivery: Delivery) -> Response:
    """Wake the tasks that wait for a delivery, with what it says.

    That it did is noted afterwards: a delivery whose answer was lost may wake them once more, with the same,
    and none is lost. One that woke nobody is not noted: somebody may wait for it when it comes again.
    """
    key = wake_key(hook, delivery.payload)
    digest = hashlib.sha256(delivery.id.encode()).hexdigest()
    mark = f"dagrelay:webhook:{hook.name}:{digest}"
    redis = gateway.relay.redis

    def wake() -> int | None:
        with told_as_unavailable():
            if redis.exists(mark):
                return None
            woken = gateway.relay.wake(key, heard(delivery.payload))
            if woken:
                redis.set(mark, "1", ex=WOKEN_KEPT_S)
            return woken

    woken = await in_thread(wake)
    log.info("webhook name=%s woken=%s", hook.name, "before" if woken is None else woken)
    return _taken({"woken": woken or 0, "repeated": woken is None})


def _taken(answer: Mapping[str, Any]) -> Response:
    return Response(as_json(answer), 202, media_type="application/json")
