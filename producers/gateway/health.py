"""`/livez`: the process answers. `/readyz`: it can take requests, for Redis answers too."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..client import RelayClient, told_as_unavailable
from ..errors import BrokerUnavailable
from . import schemas
from .base import RETRY_AFTER_S, Problem, as_json, gateway_of, in_thread

ASK_EVERY_S: Final = 1.0
"""Redis is not asked more often than this, whoever asks us."""


def router() -> APIRouter:
    """Return the routes."""
    routes = APIRouter()
    lock = asyncio.Lock()
    known: tuple[float, bool] = (-1e9, False)

    @routes.get("/livez", **schemas.GET_LIVE)
    async def live() -> Response:
        """Tell that the process answers."""
        return Response(as_json({"status": "ok"}), media_type="application/json")

    @routes.get("/readyz", **schemas.GET_READY)
    async def ready(request: Request) -> Response:
        """Tell whether requests can be taken."""
        nonlocal known
        async with lock:
            if time.monotonic() - known[0] >= ASK_EVERY_S:
                answers = await in_thread(_answers, gateway_of(request).relay)
                known = (time.monotonic(), answers)
        if not known[1]:
            raise Problem(503, "Redis does not answer", headers={"Retry-After": str(RETRY_AFTER_S)})
        return Response(as_json({"status": "ok"}), media_type="application/json")

    return routes


def _answers(relay: RelayClient) -> bool:
    try:
        with told_as_unavailable():
            return bool(relay.redis.ping())
    except BrokerUnavailable:
        return False
