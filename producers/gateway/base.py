"""What all routes of the gateway share: its parts, and how a refusal is answered (RFC 9457).

A module of routes has a function `router() -> APIRouter`, which `app.create_app` includes. A route finds the
parts by `gateway_of(request)`, who asks by `key_of(request)`, and refuses by raising `Problem`, or one of the
errors of this package, which `answer_to` turns into one. A body is read by `await request.body()`: it is held
to its limits on the way (see `front`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fastapi import Request
from fastapi.responses import Response

from ..client import RelayClient
from ..door import Batches, Door
from ..errors import BrokerUnavailable, DagrelayError, InvalidRequest, NotAllowed, RequestUnknown
from ..keys import Key, Keys
from ..queues.message import Routes

if TYPE_CHECKING:
    from .settings import GatewaySettings

PROBLEM_JSON: Final = "application/problem+json"
RETRY_AFTER_S: Final = 1

THREAD_WITHIN_S: Final = 2.0
"""While Redis gives no answer at all each call holds a thread for a second: what has waited for so long for
one is told to come again, or the last of a thousand would hear nothing for minutes."""

Found = TypeVar("Found")

NOT_THERE: Final = "there is no such request, or it ended more than 14 days ago"


@dataclass(frozen=True)
class Gateway:
    """The parts of one gateway process."""

    relay: RelayClient
    settings: GatewaySettings
    routes: Routes | None = None
    keys: Keys | None = None
    """None: no key is asked for."""
    door: Door = field(init=False)
    batches: Batches = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "door", Door(self.relay, "http"))
        # Those of the event loop may all be waiting, with looks at requests.
        thread = ThreadPoolExecutor(1, "dagrelay-batches")
        object.__setattr__(self, "batches", Batches(self.door, thread))


def gateway_of(request: Request) -> Gateway:
    """Return the gateway that a request came to."""
    found: Gateway = request.app.state.gateway
    return found


async def in_thread(function: Callable[..., Found], *args: Any) -> Found:
    """Return what a function that speaks to Redis returns, and raise what it raises.

    Raises BrokerUnavailable, and has not called it, where no thread was free for it in time.
    """
    asked_at = time.monotonic()

    def call() -> Found:
        if time.monotonic() - asked_at > THREAD_WITHIN_S:
            raise BrokerUnavailable("no thread was free for a call: they wait for Redis")
        return function(*args)

    return await asyncio.to_thread(call)


def key_of(request: Request) -> Key:
    """Return who asks."""
    found: Key = request.scope["state"]["key"]
    return found


def asked_by(key: Key) -> str:
    """Return who asks as records and runs name it."""
    return f"{key.id}@gateway"


class Problem(Exception):
    """A refusal. `detail` says which field, why, and what would be right; never a secret, nor what exists."""

    def __init__(
        self, status: int, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.more = status, detail, dict(headers or {}), more

    def response(self) -> Response:
        """Return it as an answer."""
        body = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            **self.more,
        }
        return Response(as_json(body), self.status, headers=self.headers, media_type=PROBLEM_JSON)


def as_json(value: Any) -> bytes:
    """Return a value as JSON. What cannot be UTF-8 (a lone surrogate that was sent) becomes a `?`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def answer_to(exc: DagrelayError) -> Problem:
    """Return how an error of ours is answered."""
    if isinstance(exc, NotAllowed):
        return Problem(403, str(exc))
    if isinstance(exc, InvalidRequest):
        return Problem(422, str(exc))
    if isinstance(exc, RequestUnknown):
        return Problem(404, NOT_THERE)
    if isinstance(exc, BrokerUnavailable):
        # Not `str(exc)`: it has the address of Redis.
        return Problem(
            503,
            "the request was not taken: send it again, with the same Idempotency-Key or key",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )
    return Problem(500, "this should not have happened: the gateway's log says what did")
