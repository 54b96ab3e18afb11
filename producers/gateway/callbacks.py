"""`POST /v1/callbacks/{token}`: how a job is, told by its service. What is kept of it: `stores.callbacks`.

A token that was never signed, one that is over and one that nobody waits for are answered alike.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..client import RelayClient, check_observation, told_as_unavailable
from ..errors import BrokerUnavailable, ConfigurationError, InvalidRequest
from ..queues.message import json_value
from ..stores.answers import progress_in, read_wake, rules_of
from ..stores.callbacks import Became, Callbacks, Expected, Secrets, What, read_secrets
from ..stores.heard import heard
from .base import PROBLEM_JSON, RETRY_AFTER_S, Problem, as_json, gateway_of, in_thread
from .settings import GatewaySettings

log = logging.getLogger(__name__)

UNKNOWN: Final = "there is no such callback, or its time is over"
ENDED: Final = "the job ended already: nothing was changed"


def router() -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["callbacks"])
    routes.add_api_route(
        "/v1/callbacks/{token}",
        callback,
        methods=["POST"],
        status_code=202,
        summary="How a job is, told by its service",
        response_class=Response,
        responses=_RESPONSES,
        openapi_extra={
            "requestBody": {
                "description": "What the service would answer if it were asked; nothing at all: it is alive",
                "content": {"application/json": {"schema": {}}},
            },
            "security": [],
        },
    )
    return routes


_ANSWER: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "taken": {
            "enum": ["alive", "progress", "look", "end"],
            "description": "what it was read as: a sign of life, progress, a reason to look, or the end",
        },
    },
    "required": ["taken"],
}
_PROBLEM: Final = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    202: {"description": "taken", "content": {"application/json": {"schema": _ANSWER}}},
    **{
        status: {"description": words, "content": _PROBLEM}
        for status, words in {
            404: "there is no such callback, or its time is over",
            408: "the body took too long",
            409: "the job ended already",
            413: "the body is too large",
            422: "the body cannot be used: the detail says why",
            503: "Redis did not take it: send it again",
        }.items()
    },
}


async def callback(request: Request, token: str) -> Response:
    """Take what a service says of its job: a sign of life, progress, or the end, which counts once."""
    gateway = gateway_of(request)
    task_id = _secrets(request).task_of(token, time.time())
    if task_id is None:
        raise Problem(404, UNKNOWN)
    body = await request.body()
    try:
        became = await in_thread(_take, gateway.relay, token, body)
    except BrokerUnavailable as exc:
        log.warning("callback not taken task_id=%s: %s", task_id, exc)
        raise Problem(
            503, "it was not taken: send it again", headers={"Retry-After": str(RETRY_AFTER_S)}
        ) from None
    request.scope.setdefault("state", {})["task"] = task_id
    if became == "unknown":
        raise Problem(404, UNKNOWN)
    if became == "ended":
        raise Problem(409, ENDED)
    return Response(as_json({"taken": became}), 202, media_type="application/json")


def mistakes_of(settings: GatewaySettings) -> list[str]:
    """Return every mistake in the secrets of callbacks, by its variable's name."""
    mistakes: list[str] = []
    read_secrets(settings.environ, mistakes)
    return mistakes


def _secrets(request: Request) -> Secrets:
    state = request.app.state
    found: Secrets | None = getattr(state, "callback_secrets", None)
    if found is None:
        mistakes: list[str] = []
        found = read_secrets(gateway_of(request).settings.environ, mistakes)
        if mistakes:
            raise ConfigurationError(*mistakes)
        state.callback_secrets = found
    return found


def _take(relay: RelayClient, token: str, body: bytes) -> Became:
    """Read what was said and have it noted. Raises InvalidRequest, BrokerUnavailable."""
    callbacks = Callbacks(relay.redis)
    with told_as_unavailable():
        expected = callbacks.expected(token)
    if expected is None:
        return "unknown"
    what, value, state, progress = _read(expected, body)
    with told_as_unavailable():
        return callbacks.take(token, what, heard(value), state, progress)


def _read(expected: Expected, body: bytes) -> tuple[What, Any, str, str]:
    """Return what a body says, its value, and the state and progress in it. Raises InvalidRequest."""
    value = json_value(body) if body.strip() else None
    if value is None or value == {}:
        return "alive", None, "", ""
    check_observation(value)
    rules = rules_of(expected.rules)
    found = read_wake(rules, value, lambda text: text)
    if found.ends:
        return "end", value, found.state, ""
    if not found.is_error:
        return "progress", None, found.state, found.progress
    progress = progress_in(rules, value)
    if progress:
        return "progress", None, "", progress
    if expected.asks:
        return "look", None, "", ""
    raise InvalidRequest(f"body: the job's {found.field} {found.words}, where the request looks for it")
