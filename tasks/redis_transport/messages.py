"""Reading a message before Celery does: what it would choke on is told apart here. Pure functions.

Celery's worker trusts its queue: bytes that are no JSON end the process, a message without an id blocks its
queue for ever, a body of two elements is put back and ends the next worker too (measured with Celery 5.7).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Any, Final

from kombu.utils import json as kombu_json

MAX_ID_LENGTH: Final = 1024

_CHARSETS: Final = {
    "utf-8": "utf-8",
    "utf8": "utf-8",
    "us-ascii": "ascii",
    "ascii": "ascii",
    "binary": "utf-8",  # kombu leaves it to its JSON decoder, which says so
}

_TEXTS = ("lang", "shadow", "group", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin")
_PROTOCOL_1: Final = {"id", "eta", "expires", "retries", "timelimit", "group_index", "args", "kwargs"}


class Unreadable(Exception):
    """No worker could ever run this message. The text says why, in terms of the message's own fields."""


@dataclass(slots=True)
class Readable:
    """A message that Celery can take. `envelope` is kombu's payload, `decoded` its body already decoded."""

    envelope: dict[str, Any]
    decoded: Any
    task_id: str | None
    retries: int
    eta: float | None
    expires: float | None

    @property
    def headers(self) -> dict[str, Any]:
        headers: dict[str, Any] = self.envelope["headers"]
        return headers


def read(raw: bytes, queue: str, *, accept: Collection[str], timezone: tzinfo) -> Readable:
    """Return a message as Celery's worker may have it. Raises Unreadable.

    What kombu and Celery can do without is filled in (delivery_info, properties). `timezone` is that of an
    eta without one, as `app.timezone` is for Celery.
    Source: "Message Protocol" in Celery's documentation; `celery.worker.request.Request`.
    """
    try:
        envelope = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise Unreadable(f"no JSON: {_said(exc)}") from None
    if not isinstance(envelope, dict):
        raise Unreadable("no JSON object")
    headers = _object(envelope, "headers")
    properties = _object(envelope, "properties")
    delivery_info = _object(properties, "delivery_info")
    delivery_info.setdefault("exchange", "")
    delivery_info.setdefault("routing_key", queue)
    for name in ("exchange", "routing_key"):
        _expect(delivery_info, name, str, "delivery_info")
    for name in ("correlation_id", "reply_to", "body_encoding"):
        _expect(properties, name, str, "properties")
    priority = properties.get("priority")
    if not _is_number_or_none(priority) or priority in (math.inf, -math.inf):
        raise Unreadable("properties.priority is no number")
    for name in ("content-type", "content-encoding"):
        _expect(envelope, name, str, "")
    content_type = envelope.get("content-type")
    if content_type not in accept:
        raise Unreadable(f"content-type is {content_type!r}, and {', '.join(sorted(accept))} is taken")
    decoded = _decoded(envelope, properties)
    if "task" in headers:
        _check_protocol_2(headers, decoded)
        facts = headers
    else:
        _check_protocol_1(headers, decoded)
        facts = decoded
    return Readable(
        envelope=envelope,
        decoded=decoded,
        task_id=facts["id"],
        retries=facts.get("retries") or 0,
        eta=_instant(facts, "eta", timezone),
        expires=_instant(facts, "expires", timezone),
    )


def strip_eta(readable: Readable) -> None:
    """Make a message runnable at once, whatever a worker's clock says when it comes back.

    The eta goes into the header `parked_eta`.
    """
    headers, body = readable.headers, readable.decoded
    if "task" in headers:
        headers["parked_eta"], headers["eta"] = headers.get("eta"), None
    elif isinstance(body, dict):  # protocol 1 has it in the body
        headers["parked_eta"], body["eta"] = body.get("eta"), None
        readable.envelope["body"] = kombu_json.dumps(body)
        readable.envelope["properties"].pop("body_encoding", None)


def expire(readable: Readable) -> None:
    """Make a message one that has expired, whatever a worker's clock says."""
    facts = readable.headers if "task" in readable.headers else readable.decoded
    facts["expires"] = "1970-01-01T00:00:00+00:00"


def encoded(readable: Readable) -> bytes:
    """Return the message as bytes for Redis."""
    return json.dumps(readable.envelope).encode()


def compact(readable: Readable) -> bytes:
    """Return the message as bytes that may lie in Redis for long: a third smaller, and the same to Celery.

    Headers that say nothing are left out, properties that repeat a header (a task that publishes itself again
    has its options in both), and the body is text and no base64.
    """
    envelope = readable.envelope
    headers = {
        name: value
        for name, value in envelope["headers"].items()
        if value not in (None, [], {}) and value != [None, None]
    }
    properties = {
        name: value
        for name, value in (envelope.get("properties") or {}).items()
        if name not in headers or headers[name] != value
    }
    if properties.get("body_encoding") == "base64" and isinstance(envelope.get("body"), str):
        try:
            envelope["body"] = base64.b64decode(envelope["body"]).decode()
            del properties["body_encoding"]
        except ValueError:
            pass
    envelope |= {"headers": headers, "properties": properties}
    return json.dumps(envelope, separators=(",", ":")).encode()


def revoked(raw: bytes) -> bytes:
    """Return a parked message marked as revoked: the worker that gets it lets Celery end it so."""
    envelope = json.loads(raw)
    envelope["headers"]["parked_revoked"] = True
    return json.dumps(envelope).encode()


def eta_of(envelope: dict[str, Any], timezone: tzinfo) -> float | None:
    """Return when a message that is being published is due, in seconds since 1970; None for at once."""
    return _instant_of(envelope, "eta", timezone)


def expires_of(envelope: dict[str, Any], timezone: tzinfo) -> float | None:
    """Return when a message that is being published expires, in seconds since 1970; None for never."""
    return _instant_of(envelope, "expires", timezone)


def _instant_of(envelope: dict[str, Any], name: str, timezone: tzinfo) -> float | None:
    headers = envelope.get("headers")
    if not isinstance(headers, dict) or not headers.get(name) or "task" not in headers:
        return None
    if not isinstance(headers.get("id"), str):
        return None
    try:
        return _instant(headers, name, timezone)
    except Unreadable:
        return None


def to_park(readable: Readable) -> tuple[float, bytes]:
    """Return until when a message with an eta is to be parked, and its bytes without the eta.

    One that expires before its time comes back when it expires, marked so that it is reported, and never run.
    """
    due = readable.eta or 0.0
    if readable.expires is not None and readable.expires <= due:
        due = readable.expires
        expire(readable)
    strip_eta(readable)
    return due, encoded(readable)


def _object(parent: dict[str, Any], name: str) -> dict[str, Any]:
    found = parent.get(name)
    if found is None:
        found = parent[name] = {}
    if not isinstance(found, dict):
        raise Unreadable(f"{name} is no object")
    return found


def _expect(parent: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> None:
    value = parent.get(name)
    if value is None:
        return
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Unreadable(f"{where}{'.' if where else ''}{name} is of type {type(value).__name__}")
    if isinstance(value, str):
        _encodable(value, name)


def _encodable(text: str, name: str) -> None:
    """Refuse what cannot be a key or an argument in Redis."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unreadable(f"{name} is no Unicode text") from None


def _decoded(envelope: dict[str, Any], properties: dict[str, Any]) -> Any:
    body = envelope.get("body")
    encoding = properties.get("body_encoding")
    if not isinstance(body, str):
        raise Unreadable(f"body is of type {type(body).__name__}")
    if encoding and encoding.lower() not in ("utf-8", "base64"):
        raise Unreadable(f"body_encoding is {encoding!r}")
    charset = (envelope.get("content-encoding") or "utf-8").lower()
    if charset not in _CHARSETS:
        raise Unreadable(f"content-encoding is {charset!r}")
    if "compression" in envelope["headers"] and envelope["headers"]["compression"]:
        raise Unreadable("the body is compressed")
    try:
        text = body
        if encoding and encoding.lower() == "base64":
            # Not json.loads of the bytes: it guesses UTF-16 and more, which the pool's decoder would not.
            text = base64.b64decode(body, validate=False).decode(_CHARSETS[charset])
        text.encode()  # lone surrogates cannot leave this process again
        # The pool decodes by kombu's loads, which also makes objects of {"__type__": …, "__value__": …}. It
        # costs more, and a body for which it fails would come back for ever.
        loads = kombu_json.loads if "__type__" in text or "\\u" in text else json.loads
        return loads(text)
    except Exception as exc:  # noqa: BLE001 - a decoder of a registered type may raise whatever it likes
        raise Unreadable(f"the body is no JSON: {_said(exc)}") from None


def _check_protocol_2(headers: dict[str, Any], body: Any) -> None:
    for name in ("task", "id"):
        if not isinstance(headers.get(name), str) or not headers[name]:
            raise Unreadable(f"headers.{name} is no text")
        _encodable(headers[name], f"headers.{name}")
    _check_length(headers["id"], "headers.id")
    _check_headers(headers, "headers")
    if headers.get("retries") is None:
        headers["retries"] = 0
    if not isinstance(body, list) or len(body) != 3:
        raise Unreadable("the body is no list of three: arguments, keyword arguments, embedded")
    args, kwargs, embed = body
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise Unreadable("the arguments are no list, or the keyword arguments no object")
    if embed is None:
        return
    if not isinstance(embed, dict):
        raise Unreadable("the third element of the body is no object")
    _check_signatures(embed)
    if not embed.keys() <= {"callbacks", "errbacks", "chain", "chord"}:
        raise Unreadable("the third element of the body holds what Celery does not know")


def _check_length(task_id: str, name: str) -> None:
    if "\0" in task_id:  # what stands between the parts of a parked message
        raise Unreadable(f"{name} holds a NUL")
    if len(task_id) > MAX_ID_LENGTH:
        raise Unreadable(f"{name} is longer than {MAX_ID_LENGTH} characters")


def _check_signatures(embed: dict[str, Any]) -> None:
    for name in ("callbacks", "errbacks", "chain"):
        several = embed.get(name)
        if several is not None and not (isinstance(several, list) and all(map(_is_signature, several))):
            raise Unreadable(f"{name} is no list of signatures")
    if embed.get("chord") is not None and not _is_signature(embed["chord"]):
        raise Unreadable("chord is no signature")


def _check_headers(headers: dict[str, Any], where: str) -> None:
    """Check what Celery reads of the headers, or of the body in protocol 1, where it is there."""
    for name in _TEXTS:
        _expect(headers, name, str, where)
    for name in ("group_index", "retries", "replaced_task_nesting"):
        _expect(headers, name, int, where)
    for name in ("ignore_result",):
        _expect(headers, name, bool, where)
    for name in ("stamps", where):
        _expect(headers, name, dict, where)
    stamped = headers.get("stamped_headers")
    if stamped is not None and not (
        isinstance(stamped, list) and all(isinstance(name, str) and name in headers for name in stamped)
    ):
        raise Unreadable(f"{where}.stamped_headers names what is not there")
    limits = headers.get("timelimit")
    if limits is not None and not (
        isinstance(limits, list) and len(limits) == 2 and all(_is_number_or_none(limit) for limit in limits)
    ):
        raise Unreadable(f"{where}.timelimit is no pair of numbers")


def _check_protocol_1(headers: dict[str, Any], body: Any) -> None:
    if not isinstance(body, dict) or "task" not in body:
        raise Unreadable("neither a task of protocol 2 (headers.task) nor of protocol 1 (task in the body)")
    for name in ("task", "id"):
        if not isinstance(body.get(name), str) or not body[name]:
            raise Unreadable(f"{name} is no text")
        _encodable(body[name], name)
    _check_length(body["id"], "id")
    if not isinstance(body.get("args", []), list) or not isinstance(body.get("kwargs", {}), dict):
        raise Unreadable("args is no list, or kwargs no object")
    _check_headers(body, "body")
    _check_signatures(body)
    _expect(body, "taskset", str, "body")
    # Celery lets headers win over the body: in a message of protocol 1 they are the user's own.
    for name in headers.keys() & (_PROTOCOL_1 | set(_TEXTS)):
        if name not in body or headers[name] != body[name]:
            raise Unreadable(f"headers.{name} is not what the body says")
    body["retries"] = body.get("retries") or 0


def _is_signature(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("task"), str)
        and isinstance(value.get("args", []), list | None)
        and isinstance(value.get("kwargs", {}), dict | None)
        and isinstance(value.get("options", {}), dict | None)
    )


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _instant(facts: dict[str, Any], name: str, timezone: tzinfo) -> float | None:
    value = facts.get(name)
    if value is None or value == "":
        facts[name] = None
        return None
    try:
        found = datetime.fromisoformat(value)
        if found.tzinfo is None:
            found = found.replace(tzinfo=timezone)
        return found.timestamp()
    except (TypeError, ValueError, OverflowError):
        raise Unreadable(f"{name} is no ISO 8601 date and time") from None


def _said(exc: Exception) -> str:
    """Return an error's words without the input that it may quote."""
    return exc.msg if isinstance(exc, json.JSONDecodeError) else type(exc).__name__
