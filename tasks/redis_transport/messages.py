"""Reading a message before Celery does: what it would choke on is told apart here. Pure functions.

Celery's worker trusts its queue: bytes that are no JSON end the process, a message without an id blocks its
queue for ever, a body of two elements is put back and ends the next worker too (measured with Celery 5.7).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Any, Final

MAX_ID_LENGTH: Final = 1024

_TEXTS = ("lang", "shadow", "group", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin")


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
        _check_protocol_1(decoded)
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
        readable.envelope["body"] = json.dumps(body)
        readable.envelope["properties"].pop("body_encoding", None)


def encoded(readable: Readable) -> bytes:
    """Return the message as bytes for Redis."""
    return json.dumps(readable.envelope).encode()


def revoked(raw: bytes) -> bytes:
    """Return a parked message marked as revoked: the worker that gets it lets Celery end it so."""
    envelope = json.loads(raw)
    envelope["headers"]["parked_revoked"] = True
    return json.dumps(envelope).encode()


def eta_of(envelope: dict[str, Any], timezone: tzinfo) -> float | None:
    """Return when a message that is being published is due, in seconds since 1970; None for at once."""
    headers = envelope.get("headers")
    if not isinstance(headers, dict) or not headers.get("eta") or not isinstance(headers.get("id"), str):
        return None
    try:
        return _instant(headers, "eta", timezone)
    except Unreadable:
        return None


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
    if charset not in ("utf-8", "utf8", "us-ascii", "ascii", "binary"):
        raise Unreadable(f"content-encoding is {charset!r}")
    if "compression" in envelope["headers"] and envelope["headers"]["compression"]:
        raise Unreadable("the body is compressed")
    try:
        text: str | bytes = body
        if encoding and encoding.lower() == "base64":
            text = base64.b64decode(body, validate=False)
        return json.loads(text)
    except (ValueError, RecursionError, binascii.Error) as exc:
        raise Unreadable(f"the body is no JSON: {_said(exc)}") from None


def _check_protocol_2(headers: dict[str, Any], body: Any) -> None:
    for name in ("task", "id"):
        if not isinstance(headers.get(name), str) or not headers[name]:
            raise Unreadable(f"headers.{name} is no text")
        _encodable(headers[name], f"headers.{name}")
    if len(headers["id"]) > MAX_ID_LENGTH:
        raise Unreadable(f"headers.id is longer than {MAX_ID_LENGTH} characters")
    for name in _TEXTS:
        _expect(headers, name, str, "headers")
    for name in ("group_index", "retries", "replaced_task_nesting"):
        _expect(headers, name, int, "headers")
    for name in ("ignore_result",):
        _expect(headers, name, bool, "headers")
    for name in ("stamps", "headers"):
        _expect(headers, name, dict, "headers")
    if headers.get("retries") is None:
        headers["retries"] = 0
    stamped = headers.get("stamped_headers")
    if stamped is not None and not (
        isinstance(stamped, list) and all(isinstance(name, str) and name in headers for name in stamped)
    ):
        raise Unreadable("headers.stamped_headers names what is not there")
    limits = headers.get("timelimit")
    if limits is not None and not (
        isinstance(limits, list) and len(limits) == 2 and all(_is_number_or_none(limit) for limit in limits)
    ):
        raise Unreadable("headers.timelimit is no pair of numbers")
    if not isinstance(body, list) or len(body) != 3:
        raise Unreadable("the body is no list of three: arguments, keyword arguments, embedded")
    args, kwargs, embed = body
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise Unreadable("the arguments are no list, or the keyword arguments no object")
    if embed is None:
        return
    if not isinstance(embed, dict):
        raise Unreadable("the third element of the body is no object")
    for name in ("callbacks", "errbacks", "chain"):
        several = embed.get(name)
        if several is not None and not (isinstance(several, list) and all(map(_is_signature, several))):
            raise Unreadable(f"{name} is no list of signatures")
    if embed.get("chord") is not None and not _is_signature(embed["chord"]):
        raise Unreadable("chord is no signature")
    if not embed.keys() <= {"callbacks", "errbacks", "chain", "chord"}:
        raise Unreadable("the third element of the body holds what Celery does not know")


def _check_protocol_1(body: Any) -> None:
    if not isinstance(body, dict) or "task" not in body:
        raise Unreadable("neither a task of protocol 2 (headers.task) nor of protocol 1 (task in the body)")
    for name in ("task", "id"):
        if not isinstance(body.get(name), str) or not body[name]:
            raise Unreadable(f"{name} is no text")
        _encodable(body[name], name)
    if not isinstance(body.get("args", []), list) or not isinstance(body.get("kwargs", {}), dict):
        raise Unreadable("args is no list, or kwargs no object")
    for name in ("retries", "group_index"):
        _expect(body, name, int, "body")
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
