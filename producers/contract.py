"""What travels from a caller to a worker and back: names, requests, outcomes.

Task and queue names are data, written out: messages in Redis outlive renamed functions. A message is
the keyword arguments of a Celery task, plain JSON: the fields of a request as its caller gave them
(those left at their default are left out), and beside them

``v``
    the version of this contract, 1. A worker that meets a newer one leaves the message waiting for a
    newer worker; it never fails it.
``asked``
    who asked and when: ``{"at": seconds since 1970, "by": "billing@host-7"}``, and ``due`` where the
    caller named a later time. It is provenance; a message without it is valid.
``so_far``
    what earlier attempts learned, written by workers alone (see `tasks/trigger.py`).

`json_schema()` yields the schema of the messages for publishers in other languages.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from .errors import InvalidRequest

VERSION: Final = 1

TRIGGER_DAG: Final = "tasks.trigger_dag"
POLL_EXTERNAL_JOB: Final = "tasks.poll_external_job"
SEND_WEBHOOK: Final = "tasks.send_webhook"
SET_TASK_STATE: Final = "tasks.set_task_state"

QUEUE_TRIGGERS: Final = "triggers"
QUEUE_JOBS: Final = "jobs"
QUEUE_LOOKS: Final = "looks"

MAX_CONF_BYTES: Final = 1_000_000
"""The largest conf as JSON. Airflow 2 answers 500 or 413 to a body over its default of 1 MB."""

MAX_REFERENCED_BYTES: Final = 64_000_000
"""The largest conf that goes by reference, as JSON: it lies in Redis, and in memory where it is read."""

REFERENCE: Final = "dagrelay_conf"
SEALED: Final = "dagrelay_sealed"
"""The keys of what stands for a conf: see `stores.claim_check`."""

MAX_CONF_DEPTH: Final = 64
"""How deep a conf may be nested: far above any real one, far below what a JSON parser's stack bears."""

MAX_KEY_LENGTH: Final = 512
MAX_RUN_ID_LENGTH: Final = 250
"""Airflow's column holds 250 characters; 2.11 answers 400 beyond, 3.3 answers 422."""

MAX_NOTE_LENGTH: Final = 700
"""Airflow takes 1000; our provenance has up to 300 of them."""

GIVE_UP_AFTER_S: Final = 86_400.0

WAIT_TIMEOUT_S: Final = 86_400.0
"""How long the end of a run, or of an external job, is waited for unless the request says otherwise."""

MAX_WAIT_S: Final = 90 * 86_400.0
MAX_RESULT_BYTES: Final = 1_000_000
"""The largest result of an external job, or XCom of a run, as JSON: it lies in Redis and travels on."""

MAX_MULTIPLIED: Final = 4096
"""How many times what it reads a JMESPath expression may yield."""

MAX_FAN_OUT: Final = 50_000

ANSWER_KEYS: Final = "answer:"
"""What the wake keys of answers over queues begin with: nobody else has such, or he would read them."""

MAX_ACTIVE_RUNS: Final = "max_active_runs"
"""The window that is as large as the DAG's own limit."""


_RUN_ID = re.compile(r"[A-Za-z0-9_.~:+-]+\Z")
_REFERENCE = re.compile(r"(?:sha256|hmac-sha256:[0-9a-f]{8}):[0-9a-f]{64}\Z")
# Fernet's: version 0x80, a time of 64 bits (before 2106), 16 bytes, at least a block, 32 bytes. What nobody
# could ever open is refused: else its request would wait for a worker with its key without end.
_TOKEN = re.compile(r"gAAAAA[A-Za-z0-9_-]{92,}={0,2}\Z")
# Airflow's own prefixes: the API answers 400 to a run id that begins with one of them.
_RESERVED_RUN_IDS = ("scheduled__", "backfill__", "asset_triggered__", "dataset_triggered__")
_DAG_ID = re.compile(r"[\w.-]+\Z")
_CONNECTION = re.compile(r"[A-Za-z0-9_]+\Z")
# Keys outside Airflow's alphabet become a uuid5 under this namespace; it must never change, or the same
# key would become another run.
_KEY_NAMESPACE = uuid.UUID("6f2ad0a1-1f54-5c39-9ad9-6ef0d4c8a7b1")
_INT64 = 1 << 63


def is_run_id(text: str) -> bool:
    """Tell whether Airflow 2.11 and 3.3 both take `text` as a run id that a caller may choose."""
    return (
        len(text) <= MAX_RUN_ID_LENGTH
        and _RUN_ID.match(text) is not None
        and ".." not in text  # 3.3 calls it a path traversal
        and text != "."  # no URL can name it
        and text != "~"  # taken by 3.3, and then not addressable: it is the wildcard
        and not text.startswith(_RESERVED_RUN_IDS)
    )


def _dag_id(value: str) -> str:
    if not _DAG_ID.match(value) or value in (".", ".."):
        raise ValueError("is no DAG id: letters, digits, '_', '-' and '.' only")
    return value


def _connection(value: str) -> str:
    if not _CONNECTION.match(value):
        raise ValueError("is no connection id: letters, digits and '_' only, as in AIRFLOW_CONN_<ID>")
    return value.lower()


def _run_id(value: str) -> str:
    if not is_run_id(value):
        raise ValueError(
            "would be refused by Airflow: up to 250 of A-Z a-z 0-9 _ . ~ : + -, without '..', "
            f"and not beginning with {', '.join(_RESERVED_RUN_IDS)}"
        )
    return value


def _task_id(value: str) -> str:
    if not _DAG_ID.match(value) or value in (".", ".."):
        raise ValueError("is no task id: letters, digits, '_', '-' and '.' only")
    return value


def _existing_run_id(value: str) -> str:
    if value in (".", "..", "~"):
        raise ValueError("cannot be part of a URL: Airflow could never be asked for it")
    return value


def _text(value: str) -> str:
    problem = _text_problem(value)
    if problem:
        raise ValueError(problem)
    return value


def _text_problem(value: str) -> str:
    if "\x00" in value:
        return "holds a NUL character, which Airflow's database refuses"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return "holds a lone surrogate, which is no Unicode text"
    return ""


def conf_problem(value: Any, where: str = "conf", depth: int = 0) -> str:
    """Return what is wrong with a conf, naming the place, or "" when it is JSON that Airflow can run.

    Refused beyond plain JSON: integers outside 64 bits (Airflow 3's executor cannot pack them: the run
    fails without a log), NUL characters and lone surrogates (refused by its database).
    """
    return "" if _is_plain(value, depth) else _conf_problem(value, where, depth)


def _is_plain(value: Any, depth: int) -> bool:
    """Tell whether `_conf_problem` has nothing to say: which names places, and takes twice as long."""
    kind = type(value)
    if kind is str:
        return not _text_problem(value)
    if value is None or kind is bool:
        return True
    if kind is int:
        return bool(-_INT64 <= value < _INT64)
    if kind is float:
        return math.isfinite(value)
    if depth >= MAX_CONF_DEPTH:
        return False
    depth += 1
    if kind is dict:
        for name, item in value.items():
            if type(name) is not str or _text_problem(name) or not _is_plain(item, depth):
                return False
        return True
    return kind is list and all(_is_plain(item, depth) for item in value)


def _conf_problem(value: Any, where: str, depth: int) -> str:
    if value is None or value is True or value is False:
        return ""
    kind = type(value)
    if kind is str:
        problem = _text_problem(value)
        return problem and f"{where} {problem}"
    if kind is int:
        if not -_INT64 <= value < _INT64:
            return f"{where} is an integer beyond 64 bits, which Airflow 3 cannot run: send it as a string"
        return ""
    if kind is float:
        if value != value or value in (float("inf"), float("-inf")):
            return f"{where} is {value!r}, which is not JSON: send null or a string"
        return ""
    if depth >= MAX_CONF_DEPTH:
        return f"{where} is nested deeper than {MAX_CONF_DEPTH} levels"
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{where} has the key {key!r}, which is no string: JSON keys are strings"
            problem = _text_problem(key)
            if problem:
                return f"a key of {where} {problem}"
            problem = _conf_problem(item, f"{where}.{_shown_key(key)}", depth + 1)
            if problem:
                return problem
        return ""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            problem = _conf_problem(item, f"{where}[{index}]", depth + 1)
            if problem:
                return problem
        return ""
    # Subclasses, enums among them: JSON sees the plain value, whatever their own str() says.
    if isinstance(value, str):
        return _conf_problem(str.__str__(value), where, depth)
    if isinstance(value, int):
        return _conf_problem(int.__int__(value), where, depth)
    if isinstance(value, float):
        return _conf_problem(float.__float__(value), where, depth)
    hint = {"bytes": "decode it, or send base64", "datetime": "send .isoformat()", "Decimal": "send str()"}
    how = hint.get(kind.__name__, "send strings, numbers, booleans, null, lists and objects")
    return f"{where} is of type {kind.__name__}, which is not JSON: {how}"


def _shown_key(key: str) -> str:
    """Return a key as a refusal may name it: one line, not long, whatever its sender wrote."""
    return key if key.isidentifier() and len(key) <= 80 else repr(key[:80])


def reference_in(conf: Any) -> str | None:
    """Return the reference that a conf is, of the form that ours have; None for any other conf."""
    if not isinstance(conf, dict) or len(conf) != 2:
        return None
    reference, size = conf.get(REFERENCE), conf.get("bytes")
    if not isinstance(reference, str) or not _REFERENCE.match(reference):
        return None
    return reference if type(size) is int and 0 < size <= MAX_REFERENCED_BYTES else None


def is_sealed(conf: Any) -> bool:
    """Tell whether a conf is a sealed one."""
    if not isinstance(conf, dict) or len(conf) != 1:
        return False
    token = conf.get(SEALED)
    return isinstance(token, str) and len(token) % 4 == 0 and _TOKEN.match(token) is not None


def canonical_json(conf: Mapping[str, Any]) -> bytes:
    """Return a conf as JSON that is the same for equal confs, whatever the order of their keys."""
    return _as_canonical_json(conf).encode()


def conf_bytes(conf: Mapping[str, Any]) -> int:
    """Return the size of a conf as JSON."""
    return conf.size_bytes if isinstance(conf, _CheckedConf) else len(_as_json(conf).encode())


class _CheckedConf(dict[str, Any]):
    """A conf whose size as JSON is known: to find it is half the cost of a request."""

    __slots__ = ("size_bytes",)
    size_bytes: int


def _conf(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"is of type {type(value).__name__}: a conf is an object (a dict)")  # noqa: TRY004 - pydantic takes ValueError
    problem = _reserved_problem(value) or conf_problem(value)
    if problem:
        raise ValueError(problem)
    checked = _CheckedConf(value)
    checked.size_bytes = len(_as_json(value).encode())
    if checked.size_bytes > MAX_REFERENCED_BYTES:
        raise ValueError(_too_large(checked.size_bytes, MAX_REFERENCED_BYTES))
    return checked


def _reserved_problem(conf: dict[str, Any]) -> str:
    if REFERENCE in conf and reference_in(conf) is None:
        return (
            f"has the key {REFERENCE!r}, which is kept for references: the real conf of a run is what "
            "relay_conf(context) returns, to be changed and handed on; or hand on the reference as it is"
        )
    if SEALED in conf and not is_sealed(conf):
        return f"has the key {SEALED!r}, which is kept for sealed confs: give the whole conf anew"
    return ""


def _too_large(size: int, limit: int, how: str = "") -> str:
    return f"is {size} bytes as JSON, over the limit of {limit}{how}: {_STORE_IT}"


_STORE_IT: Final = "store the data elsewhere and send a reference to it"

# One encoder for all calls: json.dumps with options makes a new one for each. A circle is found by its depth.
_as_json = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, separators=(",", ":"), default=str
).encode
_as_canonical_json = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, separators=(",", ":"), default=str, sort_keys=True
).encode


class _Request(BaseModel):
    # hide_input_in_errors: a validation error ends in logs and results, and a conf may hold a secret.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, hide_input_in_errors=True, ser_json_inf_nan="null"
    )

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as exc:
            raise _invalid(exc) from None

    defaults: ClassVar[dict[str, Any]]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls.defaults = {
            name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items()
        }

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the JSON Schema, in its own words.

        pydantic leaves `ge` and its like where a validator of ours comes first, and no reader knows them.
        """
        schema: dict[str, Any] = _in_schema_words(super().model_json_schema(*args, **kwargs))
        return schema

    @classmethod
    def fields_of(cls, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the request's own fields of a message, without what travels beside them."""
        return {name: value for name, value in message.items() if name not in ("v", "asked", "so_far")}

    def to_message(self) -> dict[str, Any]:
        """Return the request as plain JSON values, without the fields left at their default."""
        message: dict[str, Any] = {"v": VERSION}
        for name in self.model_fields_set:
            value = getattr(self, name)
            if value != self.defaults[name]:
                if isinstance(value, datetime):
                    value = value.isoformat()
                elif isinstance(value, BaseModel):
                    value = value.model_dump(mode="json", exclude_unset=True)
                message[name] = value
        return message


_BOUNDS: Final = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def _in_schema_words(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {_BOUNDS.get(name, name): _in_schema_words(part) for name, part in schema.items()}
    if isinstance(schema, list):
        return [_in_schema_words(part) for part in schema]
    return schema


def _invalid(exc: ValidationError) -> InvalidRequest:
    """Say a validation error by the names of the arguments, without the values."""
    lines = []
    for problem in exc.errors(include_url=False, include_input=False, include_context=False):
        name = ".".join(str(part) for part in problem["loc"]) or "request"
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            text = "is no argument of this request"
        elif problem["type"] == "missing":
            text = "is missing"
        named = not problem["loc"] or text.startswith((name, "a key of"))
        lines.append(text if named else f"{name}: {text}")
    return InvalidRequest("; ".join(lines))


def _from_iso(value: Any) -> Any:
    """Take a date and time as text too: messages are JSON, and strict mode would refuse it."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("is no ISO 8601 date and time") from None
    return value


def _from_number(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError("is too large") from None
    return value


def window_problem(value: Any) -> str:
    """Return what is wrong with a window, or ""."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if whole or (isinstance(value, str) and value == MAX_ACTIVE_RUNS):
        return ""
    return f"is neither a whole number of 1 or more nor the word {MAX_ACTIVE_RUNS!r}"


def _window(value: Any) -> Any:
    if value is None:
        return None
    if problem := window_problem(value):
        raise ValueError(problem)
    return value


Text = Annotated[str, AfterValidator(_text)]
Hooks = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_connection)]],
    Field(max_length=5),
]
Instant = Annotated[AwareDatetime, BeforeValidator(_from_iso)]
IfExists = Literal["reuse", "fail", "clear", "skip"]
IfPaused = Literal["trigger", "hold", "fail", "unpause"]
Window = int | Literal["max_active_runs"]


class TriggerRequest(_Request):
    """One DAG run that somebody wants. Raises `InvalidRequest` naming every wrong argument.

    dag_id
        The DAG to run.
    conf
        The run's configuration: a JSON object. A large one goes by reference, which the DAG resolves by
        `relay_conf(context)`: see `conf_by`.
    conf_by
        How the conf reaches the run: by ``value`` (at most 1 MB as JSON), by ``reference`` (up to 64 MB: it
        lies in Redis, and the run's conf in Airflow is a few bytes that name it), or ``auto`` (the default):
        by reference above `DAGRELAY_CONF_LIMIT_BYTES`, 32 KB. A reference goes on as it is.
    key
        What makes two requests the same: the same key of the same DAG is the same run, whoever sends it
        and however often. Without it every call is a request of its own.
    dag_run_id
        The run id to use instead of `relay__<key>` or `relay__<task id>`.
    logical_date
        The run's logical date, with its time zone. Airflow allows one run for each; leave it out unless
        the DAG reads it.
    run_after
        Airflow 3 holds the run back until then. (To hold the request back instead, use `countdown` or
        `eta` of `apply_async`, which also Airflow 2 can do.)
    note
        Shown with the run in Airflow, up to 700 characters, after our line of provenance.
    connection
        Which Airflow: the worker knows it as `AIRFLOW_CONN_<ID>`.
    if_exists
        What to do when a run with this run id exists already, made by somebody else, with an equal conf:
        ``reuse`` it (the default), ``fail`` with `RunExists`, ``clear`` it so that a finished run runs
        again (one that is still queued or running is left alone; one that is about to be stopped for another
        request is waited for), or ``skip``: ask no questions, even if its conf differs. A run with another
        conf is a `RunConflict` for all but ``skip``.
    if_paused
        What to do while the DAG is paused: ``trigger`` all the same, as Airflow does (the default: the run is
        made, and sits queued until the DAG is unpaused), ``hold`` the request until then, ``fail`` with
        `DagPaused`, or ``unpause`` the DAG, which needs a role that may.
    window
        Hand the run over only while fewer than so many runs of the DAG are queued or running in Airflow,
        whoever made them; ``"max_active_runs"`` for as many as the DAG itself may have. The request waits in
        Redis for a free place. None (the default) is what the connection says, which is no window unless
        its extra `window` is set. What Airflow's scheduler starts in the meantime is not prevented.
    give_up_after_s
        How long to go on trying, in seconds from the time it is due; time during which the connection is
        held does not count, nor the time for which ``if_paused="hold"`` waits for its DAG. The time that it
        waits for a place in its `window` does: what is not handed over in time may not be wanted any more.
        Default 24 h.
    priority
        From 0 to 9, higher first, among the requests that wait for their turn at the same Airflow. Each step
        is worth a minute of waiting, so that none waits for ever. Default 5.
    wait
        End only when the run does: the outcome is then the run's final state, and a failed run raises
        `DagRunFailed`. Waiting costs no worker.
    wait_timeout_s
        With `wait`: how long to wait for the end, in seconds from when the run exists. Default 24 h. Then
        `DagRunOverdue` ends the waiting; the run goes on, unless `stop_run` says otherwise.
    result_from
        With `wait`: the id of a task of the run whose XCom `return_value` becomes `DagRun.result`.
    stop_run
        With `wait`: when the waiting ends before the run does (`wait_timeout_s`, a cancel), set the run to
        failed in Airflow, which ends its tasks. A run that somebody else made, and that this request only
        joined, is left alone.
    on_end
        Whom to tell when the request has ended, by a signed webhook: names of hooks that the workers know as
        `DAGRELAY_HOOK_<ID>`.
    """

    dag_id: Annotated[str, Field(min_length=1, max_length=250), AfterValidator(_dag_id)]
    conf: Annotated[
        dict[str, Any] | None,
        PlainValidator(_conf),
        WithJsonSchema({"type": ["object", "null"]}),
        Field(repr=False),
    ] = None
    conf_by: Literal["auto", "value", "reference"] = "auto"
    key: Annotated[Text, Field(min_length=1, max_length=MAX_KEY_LENGTH)] | None = None
    dag_run_id: Annotated[str, Field(min_length=1), AfterValidator(_run_id)] | None = None
    logical_date: Instant | None = None
    run_after: Instant | None = None
    note: Annotated[Text, Field(max_length=MAX_NOTE_LENGTH)] | None = None
    connection: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_connection)] = "default"
    if_exists: IfExists = "reuse"
    if_paused: IfPaused = "trigger"
    window: Annotated[
        Window | None,
        PlainValidator(_window),
        WithJsonSchema(
            {"anyOf": [{"type": "integer", "minimum": 1}, {"const": MAX_ACTIVE_RUNS}, {"type": "null"}]}
        ),
    ] = None
    give_up_after_s: Annotated[float, BeforeValidator(_from_number), Field(gt=0, allow_inf_nan=False)] = (
        GIVE_UP_AFTER_S
    )
    priority: Annotated[int, Field(ge=0, le=9, strict=True)] = 5
    wait: bool = False
    wait_timeout_s: Annotated[
        float, BeforeValidator(_from_number), Field(gt=0, le=MAX_WAIT_S, allow_inf_nan=False)
    ] = WAIT_TIMEOUT_S
    result_from: Annotated[Text, Field(min_length=1, max_length=250)] | None = None
    stop_run: bool = False
    on_end: Hooks = Field(default_factory=list)

    @model_validator(mode="after")
    def _as_a_whole(self) -> Self:
        if self.conf_by == "value" and self.conf is not None and conf_bytes(self.conf) > MAX_CONF_BYTES:
            how = " by value; leave conf_by out, and it goes by reference"
            raise ValueError(f"conf: {_too_large(conf_bytes(self.conf), MAX_CONF_BYTES, how)}")
        if not self.wait:
            for name in ("wait_timeout_s", "result_from", "stop_run"):
                if getattr(self, name) != self.defaults[name]:
                    raise ValueError(f"{name}: needs wait=True")
        return self

    def __init__(
        self, dag_id: str | None = None, conf: dict[str, Any] | None = None, /, **fields: Any
    ) -> None:
        # dag_id and conf may be given by position, as to `.delay()`.
        for name, value in (("dag_id", dag_id), ("conf", conf)):
            if value is not None:
                if name in fields:
                    raise TypeError(f"TriggerRequest() got multiple values for argument {name!r}")
                fields[name] = value
        super().__init__(**fields)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Self:
        """Return the request in a message, in which no conf is over 1 MB.

        Raises `InvalidRequest`, as the constructor does.
        """
        request = cls(**cls.fields_of(message))
        _check_inline("conf", request.conf)
        return request

    def run_id_for(self, task_id: str) -> str:
        """Return the run id of this request: the one given, else from its key, else from the task id.

        The same request always gets the same one, on every attempt and by whichever way to Airflow.
        """
        if self.dag_run_id is not None:
            return self.dag_run_id
        plain = f"relay__{self.key if self.key is not None else task_id}"
        if is_run_id(plain):
            return plain
        return f"relay__{uuid.uuid5(_KEY_NAMESPACE, plain)}"

    def shown(self, task_id: str) -> str:
        """Return the request as Flower and logs may show it: of the conf only its keys and size."""
        return self.shown_with(self.run_id_for(task_id))

    def shown_with(self, run_id: str) -> str:
        """Do as `shown` does, for a run id that is known already."""
        parts = [f"dag_id={self.dag_id!r}", f"run_id={run_id!r}"]
        if self.conf is not None:
            parts.append(f"conf=<{conf_summary(self.conf)}>")
        for name in (
            "key",
            "logical_date",
            "run_after",
            "connection",
            "if_exists",
            "if_paused",
            "window",
            "priority",
            "wait",
            "result_from",
        ):
            value = getattr(self, name)
            if value != self.defaults[name]:
                parts.append(f"{name}={str(value)!r}")
        if self.note:
            parts.append(f"note=<{len(self.note)} characters>")
        return ", ".join(parts)


def _check_inline(name: str, conf: Any) -> None:
    if isinstance(conf, dict) and not is_sealed(conf) and conf_bytes(conf) > MAX_CONF_BYTES:
        how = " within a message"
        raise InvalidRequest(f"{name}: {_too_large(conf_bytes(conf), MAX_CONF_BYTES, how)}")


def _json_value(value: Any) -> Any:
    problem = conf_problem(value, "body")
    if problem:
        raise ValueError(problem)
    if len(_as_json(value).encode()) > MAX_CONF_BYTES:
        raise ValueError(f"is over the limit of {MAX_CONF_BYTES} bytes as JSON")
    return value


def _path(value: str) -> str:
    if not _PATH.match(value) or value.startswith("//") or "\\" in value or "#" in value:
        raise ValueError(
            "is no path within the service: begin with one '/', percent-encode what is special, name no host"
        )
    unknown = set(re.findall(r"\{([^{}]*)\}", value)) - {"job_id", "reference"}
    if unknown or "{" in _PLACE.sub("", value) or "}" in _PLACE.sub("", value):
        raise ValueError("has a placeholder that is neither {job_id} nor {reference}")
    _query(dict(parse_qsl(value.partition("?")[2], keep_blank_values=True)))
    return value


def _url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise ValueError("is no http:// or https:// URL without credentials")
    if "#" in value:
        raise ValueError("has a '#': percent-encode it, as %23")
    _path((parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
    return value


def _expression(value: str) -> str:
    import jmespath  # here: a service that polls nothing does not load it

    try:
        parsed = jmespath.compile(value).parsed
    except (jmespath.exceptions.JMESPathError, RecursionError) as exc:
        raise ValueError(f"is no JMESPath expression: {' '.join(str(exc).split())[:200]}") from None
    if _multiplies_by(parsed) > MAX_MULTIPLIED:
        raise ValueError(f"may make more than {MAX_MULTIPLIED} times as much of an answer as it is: say less")
    return value


def _multiplies_by(node: Mapping[str, Any]) -> int:
    """Return how many times what it reads an expression may yield: `[@,@]|[@,@]|…` doubles it each time.

    Such a value costs next to nothing until somebody walks through it, or writes it as JSON.
    """
    children = [child for child in node.get("children", ()) if isinstance(child, Mapping)]
    several = node.get("type") in ("multi_select_list", "multi_select_dict", "function_expression")
    factor = max(1, len(children)) if several else 1
    for child in children:
        factor *= _multiplies_by(child)
        if factor > MAX_MULTIPLIED:
            break
    return factor


def _headers(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not _HEADER_NAME.match(name) or not _HEADER_VALUE.match(text):
            raise ValueError(f"{name[:40]!r} is no header of printable characters")
        if name.lower() in _NOT_A_CALLERS_HEADER or _SECRETIVE.search(name):
            raise ValueError(
                f"{name!r} belongs to the service's configuration in the worker: "
                "a message carries no credentials, and no header that decides where it goes"
            )
    return value


def _query(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if _SECRETIVE.search(name):
            raise ValueError(
                f"{name!r} looks like a credential: those belong to the service's configuration in the worker"
            )
    return value


_PATH = re.compile(r"/[!-~]*\Z")
_PLACE = re.compile(r"\{(job_id|reference)\}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}\Z")
_HEADER_VALUE = re.compile(r"[\t -~]{0,1000}\Z")
_NOT_A_CALLERS_HEADER = (
    "authorization",
    "connection",
    "content-length",
    "cookie",
    "host",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
)
_SECRETIVE = re.compile(
    r"(?i)(token|secret|passw|credential|signature|(?<![a-z])(api|access|auth|private)[_-]?key|(?<![a-z])auth\Z)"
)


def _wake_key(value: str) -> str:
    if value.startswith(ANSWER_KEYS):
        raise ValueError(f"begins with {ANSWER_KEYS!r}, as the keys of answers over queues do: take another")
    return value


Expression = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_expression)]
Path = Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(_path)]
Headers = Annotated[dict[str, str], Field(max_length=20), AfterValidator(_headers)]
Query = Annotated[dict[str, str], Field(max_length=50), AfterValidator(_query)]
Seconds = Annotated[float, BeforeValidator(_from_number), Field(gt=0, le=MAX_WAIT_S, allow_inf_nan=False)]
Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
WakeKey = Annotated[Text, Field(min_length=1, max_length=250), AfterValidator(_wake_key)]
States = Annotated[list[Text], Field(min_length=1, max_length=50)]


class Call(_Request):
    """One request to a service. `path` and the texts in `body` and `query` may hold {job_id} and {reference}.

    {reference} is our own name for the job, the same on every attempt; {job_id} is the service's. The texts
    in the `body`, `query` and `headers` of a submission may also hold {callback_url}: a URL for this job
    alone, to which the service may POST what it would answer to a look, until `timeout_s` is over.
    """

    path: Path
    method: Method = "GET"
    body: Annotated[Any, AfterValidator(_json_value), Field(repr=False)] = None
    headers: Headers = Field(default_factory=dict, repr=False)
    query: Query = Field(default_factory=dict, repr=False)


class Submit(Call):
    """How a job is started. `job_id` finds its id in the answer; {job_id} is not known yet."""

    method: Method = "POST"
    job_id: Expression = "id"


class Find(Call):
    """How a job is found by our {reference}. `job_id` finds its id in the answer, null for no such job."""

    job_id: Expression = "id"


class Publish(_Request):
    """One message to a service that is a queue: any JSON. Its texts may hold {reference}."""

    message: Annotated[Any, AfterValidator(_json_value), Field(repr=False)]


def _cancel(value: Any) -> Any:
    if isinstance(value, dict):
        return Publish(**value) if "message" in value else Call(**value)
    return value


class TaskInstance(_Request):
    """One task of one DAG run, as Airflow addresses it. Raises `InvalidRequest` naming every wrong argument.

    dag_id, dag_run_id, task_id
        Which task of which run; the run may be a scheduled one.
    map_index
        Which instance of a mapped task. -1 (the default) is a task that is not mapped, and never all
        instances of one that is.
    try_number
        Which try of it waits for the job, from 1. A task that has been cleared, or tried again, since then is
        left alone. Without it, so is one in a later try than its first that began after the request was
        accepted.
    connection
        In which Airflow: the worker knows it as `AIRFLOW_CONN_<ID>`.
    """

    dag_id: Annotated[str, Field(min_length=1, max_length=250), AfterValidator(_dag_id)]
    dag_run_id: Annotated[
        Text, Field(min_length=1, max_length=MAX_RUN_ID_LENGTH), AfterValidator(_existing_run_id)
    ]
    task_id: Annotated[str, Field(min_length=1, max_length=250), AfterValidator(_task_id)]
    map_index: Annotated[int, Field(ge=-1, le=2**31 - 1)] = -1
    try_number: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    connection: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_connection)] = "default"

    def __str__(self) -> str:
        index = f"[{self.map_index}]" if self.map_index >= 0 else ""
        return f"task {self.task_id}{index} of run {self.dag_run_id} of DAG {self.dag_id}"


class PollRequest(_Request):
    """One job on an outside service, to be started (optional) and followed until it ends.

    Raises `InvalidRequest` naming every wrong argument.

    service
        Which service: the worker knows its address and credentials as `DAGRELAY_SERVICE_<ID>`.
    via
        How it is spoken to: ``http``, or ``queue``: then `message` is published, with our {reference} as its
        correlation id, and what comes back with that is read as an answer. It is published again, with the
        same ids, where it is not certain that it was, unless `submit_once` says otherwise.
    message
        With ``via="queue"``: what is published, any JSON; its texts may hold {reference} and {callback_url}.
    path, url
        What is asked for the job's state: a path within the service (with {job_id}, {reference}), or an
        absolute URL, which must be the service's own. May be left out where `submit` holds {callback_url}:
        then the service alone tells how the job is.
    method, body, headers, query
        Of that question. No credentials: those are the service's.
    submit
        How the job is started: ``{"path": "/jobs", "body": {…}, "job_id": "id"}``. It carries an idempotency
        key made from the task id. Without it the job runs already.
    submit_once
        The service does not honour such a key: after a lost answer nothing is submitted again; `find` tells
        whether the job exists, and without it the request ends as `SubmitUnknown`.
    find
        How a job is found by our reference: ``{"path": "/jobs?ref={reference}", "job_id": "jobs[0].id"}``.
    job_id
        The id of a job that runs already.
    state, success, failure
        A JMESPath expression for the state in the answer, and which states end it. Compared as text, without
        regard to case.
    result, progress, reason
        JMESPath expressions: for the outcome's result (up to 1 MB as JSON), for what Flower and the record
        show meanwhile, and for the service's words when it failed.
    gone
        HTTP statuses that mean: there is no such job any more.
    interval_s, growth, max_interval_s, jitter
        The rhythm: the first look after `interval_s`, each pause `growth` times the one before, up to
        `max_interval_s`, each up to `jitter` (a fraction) longer or shorter. Retry-After is honoured.
    timeout_s
        For the whole, in seconds from when it is due; then `ExternalJobOverdue`.
    heartbeat_s
        How long the job may be silent: longer without a callback, an answer or a look that found it, and it
        is looked at at once; where nothing can be asked, it ends as `ExternalJobSilent`.
    max_errors
        How many looks in a row may fail (no answer, 5xx, nonsense) before it is a failure; 429 is none.
    then
        The trigger of a DAG run that follows a success, as a dict of `TriggerRequest`'s fields; its conf gets
        the outcome under the key ``job``.
    on_cancel
        What is asked of the service when the request is cancelled or overdue:
        ``{"method": "DELETE", "path": "/jobs/{job_id}"}``; with ``via="queue"`` what is published then:
        ``{"message": {"cancel": "{reference}"}}``.
    wake_keys
        Names by which somebody may wake it (`wake`): a webhook, a callback, a message.
    on_end
        Whom to tell when the request has ended: see `TriggerRequest`.
    task_instance
        The Airflow task that waits for the job, as a dict of `TaskInstance`'s fields: it is set to success
        when the job is done, and to failed when the request ends in any other way. A task that has ended, or
        runs anew, is left alone.
    """

    service: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_connection)]
    path: Path | None = None
    via: Literal["http", "queue"] = "http"
    message: Annotated[Any, AfterValidator(_json_value), Field(repr=False)] = None
    url: Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(_url)] | None = None
    method: Literal["GET", "POST"] = "GET"
    body: Annotated[Any, AfterValidator(_json_value), Field(repr=False)] = None
    headers: Headers = Field(default_factory=dict, repr=False)
    query: Query = Field(default_factory=dict, repr=False)
    submit: Submit | None = None
    submit_once: bool = False
    find: Find | None = None
    job_id: Annotated[Text, Field(min_length=1, max_length=500)] | None = None
    state: Expression = "state"
    success: States = Field(default_factory=lambda: ["success", "succeeded", "completed", "done", "finished"])
    failure: States = Field(
        default_factory=lambda: ["failed", "failure", "error", "cancelled", "canceled", "aborted", "timeout"]
    )
    result: Expression | None = None
    progress: Expression | None = None
    reason: Expression | None = None
    gone: Annotated[list[int], Field(max_length=20)] = Field(default_factory=lambda: [404, 410])
    interval_s: Seconds = 5.0
    growth: Annotated[float, BeforeValidator(_from_number), Field(ge=1, le=10)] = 1.5
    max_interval_s: Seconds = 60.0
    jitter: Annotated[float, BeforeValidator(_from_number), Field(ge=0, le=0.5)] = 0.1
    timeout_s: Seconds = WAIT_TIMEOUT_S
    heartbeat_s: Seconds | None = None
    max_errors: Annotated[int, Field(ge=0, le=10_000)] = 20
    then: dict[str, Any] | None = Field(default=None, repr=False)
    on_cancel: Annotated[Call | Publish | None, BeforeValidator(_cancel)] = None
    wake_keys: Annotated[list[WakeKey], Field(max_length=20)] = Field(default_factory=list)
    on_end: Hooks = Field(default_factory=list)
    task_instance: TaskInstance | None = None

    @model_validator(mode="after")
    def _as_a_whole(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def calls_back(self) -> bool:
        """Whether the service is told a URL to call back."""
        told = self.message if self.submit is None else [_texts_of(self.submit), self.submit.headers]
        return told is not None and _CALLBACK in _as_json(told)

    @property
    def asks(self) -> bool:
        """Whether the service can be asked how the job is."""
        return self.path is not None or self.url is not None

    @property
    def names_job_id(self) -> bool:
        """Whether a question to the service holds {job_id}: then one is needed."""
        given = [self.path, self.url, self.query, self.body]
        if isinstance(self.on_cancel, Call):
            given.append(_texts_of(self.on_cancel))
        return "{job_id}" in _as_json(given)

    def _problems(self) -> Iterator[str]:
        if self.via == "queue":
            yield from self._problems_via_queue()
        else:
            yield from self._problems_via_http()
        both = {text.lower() for text in self.success} & {text.lower() for text in self.failure}
        if both:
            yield f"success and failure: both have {', '.join(sorted(both))[:200]}"
        if self.max_interval_s < self.interval_s and "max_interval_s" in self.model_fields_set:
            yield "max_interval_s: is below interval_s"
        if self.then is not None:
            conf = self.then.get("conf")
            if isinstance(conf, dict) and "job" in conf:
                yield "then: its conf has the key 'job', under which the outcome goes"
            try:
                TriggerRequest(**self.then)
            except (InvalidRequest, TypeError) as exc:
                yield f"then: {exc}"

    def _problems_via_queue(self) -> Iterator[str]:
        if self.message is None:
            yield "message: is missing: it is what via='queue' publishes"
        for name in _HTTP_ALONE:
            if getattr(self, name) != self.defaults[name]:
                yield f"{name}: is for via='http': over a queue a message is sent, and answers awaited"
        if self.message is not None and "{job_id}" in _as_json(self.message):
            yield "message: has {job_id}, and over a queue there is none: use {reference}"
        if isinstance(self.on_cancel, Call):
            yield "on_cancel: is a request, and the service is a queue: give {'message': …}"
        elif self.on_cancel is not None and "{job_id}" in _as_json(self.on_cancel.message):
            yield "on_cancel: has {job_id}, and over a queue there is none: use {reference}"

    def _problems_via_http(self) -> Iterator[str]:
        if self.message is not None:
            yield "message: needs via='queue'"
        if isinstance(self.on_cancel, Publish):
            yield "on_cancel: holds a message, which needs via='queue': give a method and a path"
        if self.path is not None and self.url is not None:
            yield "path: give the job's path, or its url, and not both"
        if not self.asks and not self.calls_back:
            yield "path: give the job's path, or its url, or have submit hold {callback_url}"
        if not self.asks:
            for name in ("query", "body", "headers"):
                if getattr(self, name):
                    yield f"{name}: belongs to the question for the job's state, and there is no path"
        if self.heartbeat_s is not None and not self.calls_back:
            yield "heartbeat_s: needs {callback_url} in submit, by which the job is heard of"
        for name in ("body", "query", "headers", "find", "on_cancel"):
            given = getattr(self, name)
            if given and _CALLBACK in (
                given.model_dump_json() if isinstance(given, Call) else _as_json(given)
            ):
                yield f"{name}: has {{callback_url}}, which only submit may hold"
        if self.submit is not None and self.job_id is not None:
            yield "job_id: a job that is submitted has none yet: leave it out, or leave submit out"
        if self.submit is None and (self.submit_once or self.find is not None):
            yield f"{'find' if self.find else 'submit_once'}: needs submit"
        if self.submit is None and self.job_id is None:
            for name in ("path", "url", "query", "body"):
                given = getattr(self, name)
                if given and "{job_id}" in _as_json(given):
                    yield f"{name}: has {{job_id}}, and there is neither a job_id nor a submit that yields it"
        if self.submit is not None and "{job_id}" in _texts_of(self.submit):
            yield "submit: has {job_id}, which is known only afterwards"
        if self.find is not None and "{job_id}" in _texts_of(self.find):
            yield "find: has {job_id}, which it is to find: use {reference}"
        if self.find is not None and self.submit is not None:
            for name, call in (("find", self.find), ("submit", self.submit)):
                if "{reference}" not in _texts_of(call):
                    yield f"{name}: has no {{reference}}, by which the job could be found"

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Self:
        """Return the request in a message, in which no conf is over 1 MB.

        Raises `InvalidRequest`, as the constructor does.
        """
        request = cls(**cls.fields_of(message))
        _check_inline("then: conf", (request.then or {}).get("conf"))
        return request

    def reference_for(self, task_id: str) -> str:
        """Return our own name for the job, which is also its idempotency key: the same on every attempt."""
        return reference_for(task_id)

    def shown(self, task_id: str) -> str:
        """Return the request as Flower and logs may show it: no body, no header, no query, no message."""
        parts = [f"service={self.service!r}"]
        if self.via != "http":
            parts.append(f"via={self.via!r}")
        for name in ("path", "job_id"):
            value = getattr(self, name)
            if value is not None:
                parts.append(f"{name}={value.partition('?')[0]!r}")
        if self.url is not None:
            parts.append(f"url={self.url.partition('?')[0]!r}")
        if self.submit is not None:
            parts.append(f"submit='{self.submit.method} {self.submit.path.partition('?')[0]}'")
        if self.then is not None:
            parts.append(f"then={str(self.then.get('dag_id'))!r}")
        if self.task_instance is not None:
            parts.append(f"task_instance={str(self.task_instance)!r}")
        return ", ".join(parts)


def reference_for(task_id: str) -> str:
    """Return the name and idempotency key of the job that a task submits."""
    return str(uuid.uuid5(_KEY_NAMESPACE, f"job {task_id}"))


def _texts_of(call: Call) -> str:
    """Return all that may hold a placeholder, as one text."""
    return _as_json([call.path, call.body, call.query])


_CALLBACK: Final = "{callback_url}"

_HTTP_ALONE: Final = (
    *("path", "url", "method", "body", "headers", "query", "submit", "find", "job_id", "gone"),
    *("interval_s", "growth", "max_interval_s", "jitter", "max_errors"),
)
"""The fields of a `PollRequest` that say nothing where the service is a queue."""


class Rhythm(Protocol):
    """How often something is looked at: see `PollRequest`."""

    @property
    def interval_s(self) -> float: ...
    @property
    def growth(self) -> float: ...
    @property
    def max_interval_s(self) -> float: ...


def interval_after(waited_s: float, rhythm: Rhythm) -> float:
    """Return the pause before the next look, without jitter, when it has been waited for `waited_s`.

    Pauses i, i·g, i·g², … sum up to waited = i·(gⁿ−1)/(g−1), so the next one, i·gⁿ, is i + (g−1)·waited:
    nothing needs to be kept between two looks.
    """
    grown = rhythm.interval_s + (rhythm.growth - 1) * max(0.0, waited_s)
    return min(max(rhythm.max_interval_s, rhythm.interval_s), grown)


def conf_summary(conf: Mapping[str, Any]) -> str:
    """Return what may be shown of a conf: the names of up to eight keys and the size as JSON."""
    if is_sealed(conf):
        return "sealed"
    if (reference := reference_in(conf)) is not None:
        return f"{reference[:-52]}…, a reference; {conf['bytes']} bytes"
    names = [str(name)[:40] for name in list(conf)[:8]]
    more = f", +{len(conf) - 8} more" if len(conf) > 8 else ""
    return f"{', '.join(names)}{more}; {conf_bytes(conf)} bytes" if names else "empty"


def shown_poll(message: Mapping[str, Any]) -> str:
    """Do as `shown_message` does, for a `PollRequest`."""
    shown = {}
    for name, value in message.items():
        if name in ("v", "asked", "so_far"):
            continue
        plain = name in ("service", "via", "path", "url", "job_id", "submit_once") and isinstance(
            value, str | bool
        )
        shown[name] = str(value).partition("?")[0][:250] if plain else f"<{type(value).__name__}>"
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def shown_message(message: Mapping[str, Any]) -> str:
    """Return a message as Flower and logs may show it, whether it is valid or not.

    Never a value of a conf, nor the value of a field that we do not know: it may be a mistyped `conf`.
    """
    shown = {}
    for name, value in message.items():
        if name in ("v", "asked", "so_far"):
            continue
        if name == "conf" and isinstance(value, Mapping):
            shown[name] = f"<{conf_summary(value)}>"
        elif name in ("conf", "note") or name not in TriggerRequest.model_fields:
            shown[name] = f"<{type(value).__name__}>"
        else:
            shown[name] = str(value)[:MAX_RUN_ID_LENGTH]
    return ", ".join(f"{name}={value}" for name, value in shown.items())


@dataclass(frozen=True, slots=True)
class DagRun:
    """How a trigger ended: the run that exists in Airflow for it.

    `created` is true when this request made the run, also by an attempt whose answer was lost; false
    when a run with an equal conf was there already. `state` is Airflow's word at that moment (queued,
    running, success, failed). `url` leads to the run in Airflow's user interface.
    """

    dag_id: str
    dag_run_id: str
    state: str
    created: bool = True
    cleared: bool = False
    logical_date: str | None = None
    run_after: str | None = None
    connection: str = "default"
    url: str | None = None
    result: Any = None

    def to_message(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> DagRun:
        """Return the run in a result; fields of a newer release are left out."""
        return cls(**{name: message[name] for name in cls.__slots__ if name in message})


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How an external job ended well. `state` is the service's word, `then` the trigger that it led to."""

    service: str
    job_id: str | None
    state: str
    result: Any = None
    then: str | None = None

    def to_message(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> JobOutcome:
        """Return the outcome in a result; fields of a newer release are left out."""
        return cls(**{name: message[name] for name in cls.__slots__ if name in message})


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request of a fan-out ended: done (its run), failed or cancelled (the error and its reason)."""

    id: str
    dag_id: str
    dag_run_id: str
    state: Literal["done", "failed", "cancelled"]
    run: dict[str, Any] | None = None
    error: str | None = None
    reason: str | None = None

    def to_message(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Outcome:
        """Return the outcome in a result; fields of a newer release are left out."""
        return cls(**{name: message[name] for name in cls.__slots__ if name in message})


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asked, when, and from when on the request counts. Instants are seconds since 1970, UTC."""

    at: float
    by: str = ""
    due: float | None = None

    def to_message(self) -> dict[str, Any]:
        """Return it as plain JSON values, without what is empty."""
        message: dict[str, Any] = {"at": self.at}
        if self.by:
            message["by"] = self.by
        if self.due:
            message["due"] = self.due
        return message

    @classmethod
    def from_message(cls, message: Any, *, otherwise_at: float) -> Asked:
        """Return the provenance in a message; what is missing or odd becomes its default, never a failure."""
        given = message if isinstance(message, Mapping) else {}
        at, by, due = given.get("at"), given.get("by"), given.get("due")
        return cls(
            at=float(at) if isinstance(at, int | float) else otherwise_at,
            by=by[:100] if isinstance(by, str) else "",
            due=float(due) if isinstance(due, int | float) else None,
        )

    @property
    def due_at(self) -> float:
        """The time from which `give_up_after_s` counts."""
        return self.due if self.due is not None else self.at


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the messages, for publishers in other languages."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Dagrelay messages",
        "version": VERSION,
        "tasks": {
            TRIGGER_DAG: TriggerRequest.model_json_schema(),
            POLL_EXTERNAL_JOB: PollRequest.model_json_schema(),
        },
    }
