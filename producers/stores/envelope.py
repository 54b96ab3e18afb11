"""A request as it goes to Redis: a Celery task message (protocol 2), and what its record says of it.

Callers publish with it, and workers where one request follows from another. Neither Celery nor kombu is
needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..contract import (
    POLL_EXTERNAL_JOB,
    QUEUE_JOBS,
    QUEUE_TRIGGERS,
    SEND_WEBHOOK,
    SET_TASK_STATE,
    TRIGGER_DAG,
    VERSION,
    Asked,
    PollRequest,
    TaskInstance,
    TriggerRequest,
)
from ..errors import InvalidRequest
from .claim_check import ConfRules, Packed
from .notices import at_end_field
from .records import Accepted

if TYPE_CHECKING:
    from celery.canvas import Signature

PRIORITY_SEPARATOR = "\x06\x16"
"""kombu keeps a priority of a queue in a list of its own: `queue`, `queue\\x06\\x163`, …"""

PRIORITY_STEPS = (0, 3, 6, 9)


class Trace(NamedTuple):
    """A caller's W3C trace context. It travels in the message's headers, where Celery's own instrumentation
    for OpenTelemetry has it, and is no part of what is asked for.
    """

    traceparent: str
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        return self.traceparent[3:35]

    def headers(self) -> dict[str, str]:
        """Return it as headers, of a message or of an HTTP request."""
        if not self.tracestate:
            return {"traceparent": self.traceparent}
        return {"traceparent": self.traceparent, "tracestate": self.tracestate}


# Version ff and ids of zeros alone are invalid: W3C Trace Context, section 3.2.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII
)
_TRACESTATE: Final = re.compile(r"[!-~][ -~]{0,511}")


def trace_of(headers: Mapping[str, Any]) -> Trace | None:
    """Return the trace context in the headers of a message; None where there is none, or it is invalid."""
    parent = headers.get("traceparent")
    if not isinstance(parent, str) or not _TRACEPARENT.fullmatch(parent):
        return None
    state = headers.get("tracestate")
    return Trace(parent, state if isinstance(state, str) and _TRACESTATE.fullmatch(state) else "")


def item_of(
    request: TriggerRequest | PollRequest,
    *,
    task_id: str,
    asked: Asked,
    delay_s: float = 0.0,
    expires_at: float | None = None,
    priority: int = 0,
    callbacks: list[Signature[Any]] | None = None,
    errbacks: list[Signature[Any]] | None = None,
    chain: list[Any] | None = None,
    ignore_result: bool = False,
    trace: Trace | None = None,
    more: Mapping[str, str] | None = None,
    confs: ConfRules = ConfRules(),  # noqa: B008 - frozen
) -> Accepted:
    """Return a request as it goes to Redis, for `Records.accept`. Raises InvalidRequest for the priority.

    `delay_s` counts from `asked.at`; `expires_at` is in seconds since 1970. `chain`: what follows it in a
    Celery chain, the last first. `more` are further fields of the record, without NUL. `confs` says which
    confs go by reference, and seals the others where there is a key.
    """
    request, packed = with_packed(request, confs)
    message = request.to_message()
    message["asked"] = asked.to_message()
    if isinstance(request, TriggerRequest):
        task, queue = TRIGGER_DAG, QUEUE_TRIGGERS
        run_id = request.run_id_for(task_id)
        shown, fields = request.shown_with(run_id), ""
        about = (task, request.dag_id, run_id, request.key or "", request.connection, asked.by)
    else:
        task, queue = POLL_EXTERNAL_JOB, QUEUE_JOBS
        shown = request.shown(task_id)
        fields = f"\0service\0{request.service}\0reference\0{request.reference_for(task_id)}"
        if request.job_id is not None:
            fields += f"\0job_id\0{request.job_id}"
        about = (task, "", "", "", "", asked.by)
    sent_on = end_messages(request.on_end, task_id, asked.by)
    if isinstance(request, PollRequest) and request.task_instance is not None:
        sent_on.append(task_state_message(request.task_instance, task_id, asked.by))
    if sent_on:
        fields += f"\0at_end\0{at_end_field(sent_on)}"
    if packed.reference:
        fields += f"\0conf_ref\0{packed.reference}"
    for name, value in (more or {}).items():
        fields += f"\0{name}\0{value}"
    return Accepted(
        task_id,
        _queue_key(queue, priority),
        _envelope(
            task=task,
            task_id=task_id,
            queue=queue,
            kwargs=message,
            callbacks=callbacks,
            errbacks=errbacks,
            chain=chain,
            kwargsrepr=shown,
            eta=_iso(asked.at + delay_s) if delay_s else None,
            expires=_iso(expires_at) if expires_at is not None else None,
            priority=priority,
            origin=asked.by,
            ignore_result=ignore_result,
            trace=trace,
        ),
        delay_s,
        *about,
        fields,
        packed,
    )


def with_packed(
    request: TriggerRequest | PollRequest, confs: ConfRules
) -> tuple[TriggerRequest | PollRequest, Packed]:
    """Return a request with its conf (or that of the trigger which follows it) as it goes into a message."""
    if isinstance(request, TriggerRequest):
        packed = confs.packed(request.conf, request.conf_by)
        if packed.conf is not request.conf:
            request = request.model_copy(update={"conf": packed.conf})
        return request, packed
    then = request.then
    if then is None or then.get("conf") is None:
        return request, Packed(None)
    packed = confs.packed(then["conf"], then.get("conf_by", "auto"))
    return request.model_copy(update={"then": {**then, "conf": packed.conf}}), packed


def end_messages(hooks: Sequence[str], task_id: str, by: str) -> list[tuple[str, bytes]]:
    """Return the messages, with their lists, that have workers tell hooks of a request's end.

    Their ids are made from the request's: one that comes twice is one.
    """
    return [
        _sent_on(
            SEND_WEBHOOK,
            f"{task_id}.end.{hook}",
            {"v": VERSION, "task_id": task_id, "hook": hook},
            f"task_id={task_id!r}, hook={hook!r}",
            by,
        )
        for hook in dict.fromkeys(hooks)
    ]


def task_state_message(task: TaskInstance, task_id: str, by: str) -> tuple[str, bytes]:
    """Return the message, with its list, that has workers tell an Airflow task of a request's end."""
    about = task.model_dump(mode="json", exclude_unset=True)
    return _sent_on(
        SET_TASK_STATE,
        f"{task_id}.task",
        {"v": VERSION, "task_id": task_id, "task_instance": about},
        f"task_id={task_id!r}, task_instance={str(task)!r}",
        by,
    )


def _sent_on(task: str, message_id: str, kwargs: Mapping[str, Any], shown: str, by: str) -> tuple[str, bytes]:
    raw = _envelope(
        task=task,
        task_id=message_id,
        queue=QUEUE_JOBS,
        kwargs=kwargs,
        callbacks=None,
        errbacks=None,
        kwargsrepr=shown,
        eta=None,
        expires=None,
        priority=0,
        origin=by,
        ignore_result=True,
    )
    return QUEUE_JOBS, raw


def _envelope(
    *,
    task: str,
    task_id: str,
    queue: str,
    kwargs: Mapping[str, Any],
    callbacks: list[Signature[Any]] | None,
    errbacks: list[Signature[Any]] | None,
    kwargsrepr: str,
    eta: str | None,
    expires: str | None,
    priority: int,
    origin: str,
    ignore_result: bool,
    trace: Trace | None = None,
    chain: list[Any] | None = None,
) -> bytes:
    """Return a Celery protocol 2 message as kombu's Redis transport keeps it.

    Source: "Message Protocol" in Celery's documentation, and `kombu.transport.virtual` for the envelope.
    """
    follow_up = f'"chain":{_as_json(chain) if chain else "null"},"chord":null'
    follow_up += f',"callbacks":{_as_json(callbacks)}' if callbacks else ',"callbacks":null'
    follow_up += f',"errbacks":{_as_json(errbacks)}' if errbacks else ',"errbacks":null'
    body = f"[[],{_as_json(kwargs)},{{{follow_up}}}]"
    return (
        _ENVELOPE
        % {
            "body": _quoted(body),
            "task": _quoted(task),
            "id": _quoted(task_id),
            "eta": _quoted(eta) if eta else "null",
            "expires": _quoted(expires) if expires else "null",
            "kwargsrepr": _quoted(kwargsrepr),
            "origin": _quoted(origin),
            "ignore_result": "true" if ignore_result else "false",
            "trace": f", {_as_json(trace.headers())[1:-1]}" if trace is not None else "",
            "queue": _quoted(queue),
            "priority": repr(priority),
        }
    ).encode()


_as_json = json.JSONEncoder(allow_nan=False, check_circular=False, separators=(",", ":")).encode
_quoted = json.encoder.encode_basestring_ascii
"""A text as JSON."""

# The envelope as JSON text, its variable parts to be filled in: eight times as fast as to encode it anew.
_ENVELOPE: Final = re.sub(
    r'"(%\(\w+\)s)"',
    r"\1",
    json.dumps(
        {
            "body": "%(body)s",
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {
                "lang": "py",
                "task": "%(task)s",
                "id": "%(id)s",
                "shadow": None,
                "eta": "%(eta)s",
                "expires": "%(expires)s",
                "group": None,
                "group_index": None,
                "retries": 0,
                "timelimit": [None, None],
                "root_id": "%(id)s",
                "parent_id": None,
                "argsrepr": "()",
                "kwargsrepr": "%(kwargsrepr)s",
                "origin": "%(origin)s",
                "ignore_result": "%(ignore_result)s",
            },
            "properties": {
                "correlation_id": "%(id)s",
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "%(queue)s"},
                "priority": "%(priority)s",
                "delivery_tag": "%(id)s",
            },
        }
    ),
).replace("%(ignore_result)s", "%(ignore_result)s%(trace)s")


def _queue_key(queue: str, priority: int) -> str:
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 9:
        raise InvalidRequest("priority: give a whole number from 0 (first) to 9")
    step = max(step for step in PRIORITY_STEPS if step <= priority)
    return f"{queue}{PRIORITY_SEPARATOR}{step}" if step else queue


def _iso(instant: float) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=instant)).isoformat()
