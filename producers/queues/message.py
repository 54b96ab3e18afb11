"""What a foreign message asks for: bytes and headers in, an `Order` out. Pure; used by every door.

A message is one of

- a **trigger**: the fields of `TriggerRequest` as a JSON object, ``{"dag_id": "daily_sales", "conf": {…}}``;
- a **job**: the fields of `PollRequest`, ``{"service": "render", "submit": {…}, "path": "/jobs/{job_id}"}``;
- a **CloudEvent** 1.0 (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md), structured
  (the whole event as JSON) or binary (its attributes in headers). The types `dagrelay.trigger` and
  `dagrelay.job` hold one of the above in `data`; all others go by the routing rules (`routing`).

Beside a request's own fields the object of a trigger or a job may have those of `Envelope`: how the sender
names its message, when the request is due, and where it wants its answers.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Final, Protocol
from urllib.parse import unquote_to_bytes

from pydantic import AfterValidator, BeforeValidator, Field

from ..contract import (
    MAX_CONF_BYTES,
    MAX_CONF_DEPTH,
    MAX_WAIT_S,
    Instant,
    PollRequest,
    Seconds,
    Text,
    TriggerRequest,
    _from_number,
    _Request,
)
from ..errors import InvalidRequest
from ..stores.envelope import trace_of

MAX_MESSAGE_BYTES: Final = 2 * MAX_CONF_BYTES + 64 * 1024
"""The largest body that is read: a conf of the largest size, written wastefully, and all else."""

TRIGGER_EVENT: Final = "dagrelay.trigger"
JOB_EVENT: Final = "dagrelay.job"

CLOUD_EVENT_JSON: Final = "application/cloudevents+json"

# Of the task ids of what came with an id of its own; never to change: a repeat would be another request.
_ORDER_NAMESPACE = uuid.UUID("3b0a7b0e-38a2-5f0c-9d0b-7a1c6d2f9e55")

_HEADER_PREFIXES: Final = ("ce-", "ce_", "cloudevents:", "cloudevents_")
"""Of a binary CloudEvent's attributes: over HTTP and Kafka, and over AMQP 1.0 or a bridge from it."""

MAX_REASON_LENGTH: Final = 1000
"""Of a refusal, which may name what the sender wrote: it goes into answers, headers and dead queues."""


def _due(value: datetime) -> datetime:
    if value.year > 9998:  # in UTC it might lie beyond what a datetime can say
        raise ValueError("lies after the year 9998")
    return value


class Envelope(_Request):
    """What a trigger or a job may say beside its own fields.

    id
        How the sender names its message: one that comes again with it is the same request, for 14 days after
        that has ended. A queue door takes it from the message's own id where it is left out.
    countdown, eta
        Seconds from now, or when: the request waits until then.
    expires
        Seconds from now: one that no worker has begun by then is cancelled.
    reply_to, correlation_id
        Where answers go, in the terms of the door by which it came, and what they are to carry.
    traceparent, tracestate
        The W3C trace context to which it belongs.
    """

    id: Annotated[Text, Field(min_length=1, max_length=250)] | None = None
    countdown: (
        Annotated[float, BeforeValidator(_from_number), Field(ge=0, le=MAX_WAIT_S, allow_inf_nan=False)]
        | None
    ) = None
    eta: Annotated[Instant, AfterValidator(_due)] | None = None
    expires: Seconds | None = None
    reply_to: Annotated[Text, Field(min_length=1, max_length=250)] | None = None
    correlation_id: Annotated[Text, Field(min_length=1, max_length=250)] | None = None
    traceparent: Annotated[Text, Field(max_length=100)] | None = None
    tracestate: Annotated[Text, Field(max_length=512)] | None = None


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message as a door has got it.

    `id` is the name by which it comes again when it is delivered again: the sender's, where its protocol has
    one, else the broker's; None where it has none. Header names are in lower case, values text. `problem` is
    why it is refused without being read: the door could not make out all of it.
    """

    body: bytes
    id: str | None = None
    content_type: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    reply_to: str | None = None
    correlation_id: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """A CloudEvent. `attributes` has all of them, extensions too, as text; `data` is JSON, text or None."""

    id: str
    source: str
    type: str
    data: Any
    attributes: Mapping[str, str]


class Routes(Protocol):
    """Decides what an event asks for: see `routing`."""

    def order(self, event: Event) -> TriggerRequest | PollRequest:
        """Return the request. Raises InvalidRequest where no rule takes the event."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a message asks for. `task_id` is the same whenever the message comes again, where it has an id."""

    request: TriggerRequest | PollRequest
    task_id: str | None
    envelope: Envelope

    def options(self) -> dict[str, Any]:
        """Return the options of `RelayClient.enqueue` that it asks for."""
        told = self.envelope
        given = {
            "task_id": self.task_id,
            "countdown": told.countdown,
            "eta": told.eta,
            "expires": told.expires,
            "traceparent": told.traceparent,
            "tracestate": told.tracestate,
        }
        return {name: value for name, value in given.items() if value is not None}


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Make one printable line of bounded length of a refusal: it may hold names that the sender chose."""
    try:
        yield
    except InvalidRequest as exc:
        text = str(exc)
        if len(text) > MAX_REASON_LENGTH:
            text = f"{text[: MAX_REASON_LENGTH - 1]}…"
        if not text.isprintable():
            text = "".join(one if one.isprintable() else "?" for one in text)
        exc.reason, exc.args = text, (text,)
        raise


@_plainly()
def read(message: Incoming, *, door: str, routes: Routes | None = None) -> Order:
    """Return what a message asks for. `door` names the place that its ids are unique in.

    Raises InvalidRequest, whose text names what is wrong and what would be right, and holds no value of the
    message's conf; nothing else, whatever the bytes are. It is one line of printable text.
    """
    if message.problem is not None:
        raise InvalidRequest(message.problem)
    if len(message.body) > MAX_MESSAGE_BYTES:
        raise InvalidRequest(
            f"body: is {len(message.body)} bytes, over the limit of {MAX_MESSAGE_BYTES}: "
            "store the data elsewhere and send a reference to it"
        )
    event = event_of(message)
    if event is None:
        return order_of(json_object(message.body), door=door, message=message)
    if event.type in (TRIGGER_EVENT, JOB_EVENT):
        if not isinstance(event.data, Mapping):
            raise InvalidRequest(f"data: is no JSON object, which an event of type {event.type!r} holds")
        wanted, other = ("dag_id", "service") if event.type == TRIGGER_EVENT else ("service", "dag_id")
        if wanted not in event.data or other in event.data:
            raise InvalidRequest(f"data: of an event of type {event.type!r} has {wanted} and no {other}")
        return order_of(event.data, door=door, message=message, event=event)
    if routes is None:
        raise InvalidRequest(
            f"type: {event.type[:100]!r} is neither {TRIGGER_EVENT!r} nor {JOB_EVENT!r}, "
            "and this door has no routing rules"
        )
    return Order(routes.order(event), _task_id(door, event, None, message), _enveloped({}, message, event))


@_plainly()
def order_of(
    fields: Mapping[str, Any], *, door: str, message: Incoming | None = None, event: Event | None = None
) -> Order:
    """Return what the fields of a trigger or a job ask for. Raises InvalidRequest.

    What is left out of them is taken from the message around them.
    """
    message = message if message is not None else Incoming(b"")
    own = {name: value for name, value in fields.items() if name not in Envelope.model_fields}
    told = {name: value for name, value in fields.items() if name in Envelope.model_fields}
    envelope = _enveloped(told, message, event)
    return Order(request_of(own), _task_id(door, event, told.get("id"), message), envelope)


def request_of(fields: Mapping[str, Any]) -> TriggerRequest | PollRequest:
    """Return the request with these fields: a trigger or a job. Raises InvalidRequest."""
    if ("dag_id" in fields) == ("service" in fields):
        raise InvalidRequest("dag_id: give the DAG to run, or the service of a job, and not both")
    kind = TriggerRequest if "dag_id" in fields else PollRequest
    refused = [str(name) for name in fields if name not in kind.model_fields]
    if refused:
        shown = ", ".join(repr(name[:40]) for name in sorted(refused)[:5])
        what = "a trigger" if kind is TriggerRequest else "a job"
        raise InvalidRequest(f"{shown}: no field of {what}; those are in docs/messages.md")
    return kind(**fields)


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object that a body is. Raises InvalidRequest."""
    found = json_value(body)
    if not isinstance(found, dict):
        raise InvalidRequest(f"body: is JSON, and no object: send an object such as {_EXAMPLE}")
    return found


def json_value(body: bytes | str, where: str = "body") -> Any:
    """Return what a text is as JSON, as strictly as RFC 8259 has it. Raises InvalidRequest."""
    try:
        text = body.decode() if isinstance(body, bytes) else body
    except UnicodeDecodeError:
        raise InvalidRequest(f"{where}: is not UTF-8: send JSON, such as {_EXAMPLE}") from None
    try:
        return _decode(text)
    except RecursionError:
        raise InvalidRequest(f"{where}: is nested deeper than {MAX_CONF_DEPTH} levels") from None
    except _NotJson as exc:
        raise InvalidRequest(f"{where}: {exc}") from None
    except ValueError as exc:
        at = f" at character {exc.pos}" if isinstance(exc, json.JSONDecodeError) else ""
        raise InvalidRequest(f"{where}: is no JSON{at}: send an object such as {_EXAMPLE}") from None


_EXAMPLE: Final = '{"dag_id": "daily_sales", "conf": {"day": "2026-11-20"}}'


class _NotJson(ValueError):
    pass


def _constant(name: str) -> Any:
    raise _NotJson(f"holds {name}, which is not JSON: send null or a string")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # two readers of it would see two requests
        raise _NotJson("names a key of one object twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 400:  # Python refuses those over 4300 in words of its own
        raise _NotJson("holds a number of more than 400 digits: send it as a string")
    return int(digits)


_decode = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_pairs, parse_int=_integer).decode


# CloudEvents


def event_of(message: Incoming) -> Event | None:
    """Return the CloudEvent that a message is, None for one that is none. Raises InvalidRequest.

    Structured where its content type says so, or where its object has a `specversion`; binary where it
    has a header for that.
    """
    content_type = message.content_type.partition(";")[0].strip().lower()
    if content_type == "application/cloudevents-batch+json":
        raise InvalidRequest("content-type: a batch of events: send each as a message of its own")
    if content_type.startswith("application/cloudevents"):
        if content_type not in (CLOUD_EVENT_JSON, "application/cloudevents"):
            raise InvalidRequest(f"content-type: events are read as {CLOUD_EVENT_JSON}")
        return structured(json_object(message.body))
    prefix = next((one for one in _HEADER_PREFIXES if one + "specversion" in message.headers), None)
    if prefix is not None:
        return _binary(message, prefix, content_type)
    if b'"specversion"' in message.body:
        found = json_object(message.body)
        if "specversion" in found:
            return structured(found)
    return None


@_plainly()
def structured(given: Mapping[str, Any]) -> Event:
    """Return the event that a JSON object is. Raises InvalidRequest."""
    attributes = {}
    for name, value in given.items():
        if name in ("data", "data_base64") or value is None:
            continue
        if isinstance(value, bool):
            attributes[name] = "true" if value else "false"
        elif isinstance(value, str | int):
            attributes[name] = str(value)
        else:
            raise InvalidRequest(
                f"{name[:40]}: an attribute of an event is a string, a whole number or a boolean"
            )
    data = given.get("data")
    if given.get("data_base64") is not None:
        if data is not None:
            raise InvalidRequest("data_base64: give data or data_base64")
        if not isinstance(given["data_base64"], str):
            raise InvalidRequest("data_base64: is no text")
        try:
            raw = base64.b64decode(given["data_base64"], validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest("data_base64: is no base64") from None
        data = _data(raw, attributes.get("datacontenttype", "application/json"))
    return _event(attributes, data)


def _binary(message: Incoming, prefix: str, content_type: str) -> Event:
    attributes = {
        name.removeprefix(prefix): _percent_decoded(value) if prefix.startswith("ce") else value
        for name, value in message.headers.items()
        if name.startswith(prefix)
    }
    if content_type:
        attributes["datacontenttype"] = content_type
    data = _data(message.body, content_type or "application/json") if message.body else None
    return _event(attributes, data)


def _percent_decoded(value: str) -> str:
    """Return a header's value: over HTTP and Kafka what is not ASCII is percent-encoded."""
    if "%" not in value:
        return value
    return unquote_to_bytes(value.encode(errors="replace")).decode(errors="replace")


def _data(raw: bytes, content_type: str) -> Any:
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json" or kind.endswith("+json"):
        return json_value(raw, "data")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return base64.b64encode(raw).decode()


def _event(attributes: dict[str, str], data: Any) -> Event:
    if attributes.get("specversion") != "1.0":
        raise InvalidRequest("specversion: is not 1.0")
    for name in ("id", "source", "type"):
        if not attributes.get(name):
            raise InvalidRequest(f"{name}: is missing: every event has one")
    for name, value in attributes.items():
        if len(value) > 2000 or "\0" in value or not _is_text(value):
            raise InvalidRequest(f"{name[:40]}: is over 2000 characters, or no text")
    return Event(attributes["id"], attributes["source"], attributes["type"], data, attributes)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# What lies around it


def _enveloped(told: dict[str, Any], message: Incoming, event: Event | None) -> Envelope:
    """Return what a message says beside its request; what its body says goes before its headers."""
    around = {"reply_to": message.reply_to, "correlation_id": message.correlation_id}
    if "traceparent" not in told and "tracestate" not in told:
        # It is no part of the request, and a proxy may have put it there: an odd one is left out.
        given = (
            event.attributes if event is not None and "traceparent" in event.attributes else message.headers
        )
        trace = trace_of(given)
        if trace is not None:
            around |= trace.headers()
    for name, value in around.items():
        if value and name not in told:
            told[name] = value
    envelope = Envelope(**told)
    if envelope.countdown is not None and envelope.eta is not None:
        raise InvalidRequest("countdown and eta: give one of them")
    return envelope


def _task_id(door: str, event: Event | None, told: Any, message: Incoming) -> str | None:
    if isinstance(told, str) and told:
        return task_id_for(door, "id", told)
    if event is not None:
        return task_id_for(door, "event", event.source, event.id)
    if message.id is not None:
        return task_id_for(door, "message", message.id)
    return None


def task_id_for(*names: str) -> str:
    """Return the task id of what has these names: the same for the same names, and for no others."""
    told = "\0".join(f"{len(name)}:{name}" for name in names)
    return str(uuid.uuid5(_ORDER_NAMESPACE, told.encode("utf-8", "surrogatepass").decode("latin-1")))


__all__ = [
    "CLOUD_EVENT_JSON",
    "MAX_MESSAGE_BYTES",
    "Envelope",
    "Event",
    "Incoming",
    "Order",
    "Routes",
    "event_of",
    "json_object",
    "json_value",
    "order_of",
    "read",
    "request_of",
    "structured",
    "task_id_for",
]
