"""Many triggers at once, and one callback with all of their outcomes: a Celery chord, made by the workers.

::

    fan = fan_out([{"dag_id": "daily_sales", "conf": {"shop": n}} for n in range(10_000)], then=report.s())
    fan.progress()  # (4200, 10000)
    outcomes = fan.get(timeout=600)  # one for each request, in order: successes and failures

The caller needs neither Celery nor a result backend: the requests go to Redis, with one record each, and a
worker launches the chord (`tasks/fan_out.py`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from .client import RelayClient, client, new_task_id, told_as_unavailable, with_queue
from .contract import MAX_FAN_OUT, QUEUE_LOOKS, QUEUE_TRIGGERS, TRIGGER_DAG, Outcome, TriggerRequest
from .errors import InvalidRequest, RequestUnknown
from .handle import Handle
from .queues.message import task_id_for
from .stores.fan_outs import (
    FAN_OUT,
    WATCH_FAN_OUT,
    FanOuts,
    Item,
    launcher_id,
    message_of,
    watch_id,
)

if TYPE_CHECKING:
    from celery.canvas import Signature

OnError = Literal["continue", "stop"]


class FanOut(Handle[list[Outcome]]):
    """Many requests that were accepted together. `.get()` waits for all: one `Outcome` each, in order."""

    __slots__ = ("handles",)

    def __init__(self, fan_out_id: str, handles: list[Handle[Any]], relay: RelayClient) -> None:
        super().__init__(fan_out_id, None, relay)
        self.handles = handles
        """One handle for each request, in order; its id, status and cancel are there from the call on."""

    def __repr__(self) -> str:
        return f"<FanOut {self.id} of {len(self.handles)}>"

    def progress(self) -> tuple[int, int]:
        """Return how many of the requests have ended, and how many there are.

        Raises RequestUnknown when nothing is known of it (any more), and BrokerUnavailable.
        """
        with told_as_unavailable():
            found = FanOuts(self._client.redis).get(self.id)
        if found is None:
            raise RequestUnknown(self.id)
        return found.ended, found.total


def fan_out(
    requests: Iterable[TriggerRequest | Mapping[str, Any]],
    *,
    then: Signature[Any] | None = None,
    on_error: OnError = "continue",
    wait: Literal[True] | None = None,
    relay: RelayClient | None = None,
    by: str | None = None,
    fan_out_id: str | None = None,
    more: Sequence[Mapping[str, str]] = (),
) -> FanOut:
    """Hand many triggers to the workers at once, all or none; return without waiting for them.

    requests
        Up to 50,000 of `TriggerRequest`, or dicts of its fields. None at all is a fan-out too.
    then
        A Celery signature to be sent once, when all have ended: its first argument is the list of outcomes,
        dicts with the fields of `Outcome`. It goes to the queue that it names, else to the one to which its
        own app sends it, in the Redis of Dagrelay's workers.
    on_error
        ``stop``: after the first request that failed nothing more is started, and what was not begun ends as
        cancelled. It makes a fan-out slower: each chunk of 200 waits for what it has begun.
    wait
        True: all requests wait for the ends of their runs, as with `wait=True` in each of them.
    relay
        The client to use instead of this process's own.
    by
        Who asks, where that is not this client.
    fan_out_id
        The id of the fan-out, from which those of its requests are made: accepted twice, it is one. It must
        then be the same requests.
    more
        Further fields of the record of each request, in order; none by default.

    Everything is checked before anything is sent: raises TypeError or InvalidRequest, naming the request by
    its index, and ConfGone for a reference to what is no longer kept. Raises BrokerUnavailable when Redis
    does not take it, or does not say: send it again with the same keys, and there is still one run for each.
    """
    if on_error not in ("continue", "stop"):
        raise InvalidRequest("on_error: give 'continue' or 'stop'")
    if wait not in (True, None):
        raise InvalidRequest("wait: give True, or leave it out")
    callback = _checked_callback(then)
    checked = _checked(requests, wait=bool(wait))
    relay = relay if relay is not None else client()
    handles: list[Handle[Any]] = []

    def items() -> Iterator[Item]:
        for number, request in enumerate(checked):
            task_id = task_id_for("fan-out", fan_out_id, str(number)) if fan_out_id is not None else None
            accepted = relay.item(request, by=by, task_id=task_id, more=more[number] if more else None)
            handles.append(Handle(accepted.task_id, accepted.dag_run_id, relay))
            about = "\0".join(accepted[4:10]) + accepted.more
            yield Item(accepted.task_id, accepted.message, about, accepted.conf)

    made_id, by = fan_out_id or new_task_id(), by or relay.settings.client_name
    dag_ids = {request.dag_id for request in checked}
    with told_as_unavailable():
        FanOuts(relay.redis).accept(
            made_id,
            items(),
            launcher=(
                QUEUE_TRIGGERS,
                message_of(FAN_OUT, launcher_id(made_id), QUEUE_TRIGGERS, made_id, by),
            ),
            watch=(QUEUE_LOOKS, message_of(WATCH_FAN_OUT, watch_id(made_id), QUEUE_LOOKS, made_id, by)),
            on_error=on_error,
            then=callback,
            dag_id=dag_ids.pop() if len(dag_ids) == 1 else "",
            by=by,
        )
    return FanOut(made_id, handles, relay)


async def afan_out(requests: Iterable[TriggerRequest | Mapping[str, Any]], **options: Any) -> FanOut:
    """Do as `fan_out` does, without blocking the event loop."""
    return await asyncio.to_thread(fan_out, requests, **options)


def _checked(requests: Iterable[TriggerRequest | Mapping[str, Any]], *, wait: bool) -> list[TriggerRequest]:
    """Return the requests. Raises TypeError or InvalidRequest, naming the first wrong one by its index."""
    if isinstance(requests, Mapping | str | bytes | TriggerRequest) or not isinstance(requests, Iterable):
        raise TypeError(f"requests are several TriggerRequests or dicts, not a {type(requests).__name__}")
    checked = []
    for index, given in enumerate(islice(requests, MAX_FAN_OUT + 1)):
        try:
            checked.append(_request(given, wait=wait))
        except InvalidRequest as exc:
            raise InvalidRequest(f"requests[{index}]: {exc}") from None
        except TypeError as exc:
            raise TypeError(f"requests[{index}]: {exc}") from None
    if len(checked) > MAX_FAN_OUT:
        raise InvalidRequest(f"requests: a fan-out has at most {MAX_FAN_OUT}; make several of them")
    return checked


def _request(given: Any, *, wait: bool) -> TriggerRequest:
    if isinstance(given, TriggerRequest):
        return given.model_copy(update={"wait": True}) if wait and not given.wait else given
    if isinstance(given, Mapping):
        return TriggerRequest(**{**given, **({"wait": True} if wait else {})})
    raise TypeError(f"a request is a TriggerRequest or a dict of its fields, not a {type(given).__name__}")


def _checked_callback(then: Any) -> dict[str, Any] | None:
    """Return the callback as it lies in Redis. Raises InvalidRequest when it is none, or no JSON."""
    if then is None:
        return None
    if not isinstance(then, dict) or not then.get("task"):
        raise InvalidRequest("then: give one Celery signature, e.g. my_task.s()")
    if then["task"] == TRIGGER_DAG and not then.get("immutable"):
        raise InvalidRequest(
            "then: a list of outcomes is no conf: use trigger_dag.si(…), which takes nothing from it"
        )
    try:
        made: dict[str, Any] = json.loads(json.dumps(with_queue(then), allow_nan=False))
    except (TypeError, ValueError) as exc:
        raise InvalidRequest(f"then: is no JSON ({exc}): give text, numbers, lists and objects") from None
    return made
