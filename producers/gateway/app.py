"""The gateway as an application of FastAPI: its parts put together, and what all answers have in common."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from ..client import RelayClient
from ..errors import ConfigurationError, DagrelayError
from ..keys import Keys
from ..routing import Rules, load_rules
from . import callbacks, events, health, hooks, page, runs, schemas, tasks
from .access import AccessLog
from .base import Gateway, Problem, answer_to
from .connection import HEAD_WITHIN_S
from .front import Front
from .settings import GatewaySettings
from .streams import Streams

log = logging.getLogger(__name__)


def create_app(gateway: Gateway) -> FastAPI:
    """Return the application."""
    streams, access = Streams(gateway.relay, gateway.settings.max_streams), AccessLog()
    app = FastAPI(
        title="Dagrelay gateway",
        version=_version(),
        docs_url=None,  # its page would load scripts from somebody else's server: see `page`
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lambda _: _until_stopped(gateway, streams, access),
    )
    app.state.gateway = gateway
    for routes in (
        runs.router(),
        events.router(),
        hooks.router(),
        callbacks.router(),
        tasks.router(streams),
        health.router(),
        page.router(),
    ):
        # Not include_router, by which each request is matched twice: a tenth of what one costs.
        app.router.routes.extend(routes.routes)
    app.add_middleware(cast(Any, Front), gateway=gateway, access=access)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(DagrelayError, _error)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _wrong_parameter)
    described: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not described:
            described.update(schemas.describe(app))
        return described

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def gateway_of_settings(settings: GatewaySettings) -> Gateway:
    """Return the parts that settings name. Raises ConfigurationError with every mistake in their files."""
    mistakes: list[str] = []
    keys: Keys | None = None
    rules: Rules | None = None
    if settings.keys_file is not None:
        try:
            keys = Keys.load(settings.keys_file)
        except ConfigurationError as exc:
            mistakes += exc.mistakes
    if settings.rules_file is not None:
        try:
            rules = load_rules(settings.rules_file)
        except ConfigurationError as exc:
            mistakes += exc.mistakes
    mistakes += hooks.mistakes_of(settings) + callbacks.mistakes_of(settings)
    if mistakes:
        raise ConfigurationError(*mistakes)
    return Gateway(RelayClient(settings.producer), settings, rules, keys)


@contextlib.asynccontextmanager
async def _until_stopped(
    gateway: Gateway, streams: Streams, access: AccessLog
) -> AsyncIterator[dict[str, Any]]:
    """End the streams of events as soon as the process is asked to stop: it waits for what is in hand."""
    former = {}
    for one in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(one)
        if not callable(before) or before is signal.default_int_handler:
            continue  # no server that stops by itself: a test

        def stop(number: int, frame: FrameType | None, before: Any = before) -> None:
            streams.stop()
            before(number, frame)

        former[one] = before
        signal.signal(one, stop)
    try:
        yield {HEAD_WITHIN_S: gateway.settings.body_timeout_s}
    finally:
        streams.stop()
        access.write()
        for one, before in former.items():
            signal.signal(one, before)


async def _problem(_: Request, exc: Exception) -> Response:
    return cast(Problem, exc).response()


async def _error(_: Request, exc: Exception) -> Response:
    answer = answer_to(cast(DagrelayError, exc))
    if answer.status >= 500:
        log.error("a request was not taken error=%s reason=%s", type(exc).__name__, exc)
    return answer.response()


_SAID = {
    404: "there is nothing at this path; what there is stands in /openapi.json",
    405: "this path has no such method; those that it has are in the header Allow",
}


async def _http(_: Request, exc: Exception) -> Response:
    found = cast(HTTPException, exc)
    detail = _SAID.get(found.status_code, str(found.detail))
    return Problem(found.status_code, detail, headers=found.headers).response()


async def _wrong_parameter(_: Request, exc: Exception) -> Response:
    said = [
        f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}"
        for one in cast(RequestValidationError, exc).errors()
    ]
    return Problem(422, "; ".join(said)).response()


def _version() -> str:
    try:
        return version("dagrelay")
    except PackageNotFoundError:  # a copy within somebody's service
        return "0"
