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
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Final, Literal, Self

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
)

from .errors import InvalidRequest

VERSION: Final = 1

TRIGGER_DAG: Final = "tasks.trigger_dag"
POLL_EXTERNAL_JOB: Final = "tasks.poll_external_job"

QUEUE_TRIGGERS: Final = "triggers"
QUEUE_JOBS: Final = "jobs"
QUEUE_LOOKS: Final = "looks"

MAX_CONF_BYTES: Final = 1_000_000
"""The largest conf as JSON. Airflow 2 answers 500 or 413 to a body over its default of 1 MB."""

MAX_CONF_DEPTH: Final = 64
"""How deep a conf may be nested: far above any real one, far below what a JSON parser's stack bears."""

MAX_KEY_LENGTH: Final = 512
MAX_RUN_ID_LENGTH: Final = 250
"""Airflow's column holds 250 characters; 2.11 answers 400 beyond, 3.3 answers 422."""

MAX_NOTE_LENGTH: Final = 700
"""Airflow takes 1000; our provenance has up to 300 of them."""

GIVE_UP_AFTER_S: Final = 86_400.0


_RUN_ID = re.compile(r"[A-Za-z0-9_.~:+-]+\Z")
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
        and text != "~"  # taken by 3.3, and then not addressable: it is the wildcard
        and not text.startswith(_RESERVED_RUN_IDS)
    )


def _dag_id(value: str) -> str:
    if not _DAG_ID.match(value):
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
            problem = conf_problem(item, f"{where}.{key}", depth + 1)
            if problem:
                return problem
        return ""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            problem = conf_problem(item, f"{where}[{index}]", depth + 1)
            if problem:
                return problem
        return ""
    # Subclasses, enums among them: JSON sees the plain value, whatever their own str() says.
    if isinstance(value, str):
        return conf_problem(str.__str__(value), where, depth)
    if isinstance(value, int):
        return conf_problem(int.__int__(value), where, depth)
    if isinstance(value, float):
        return conf_problem(float.__float__(value), where, depth)
    hint = {"bytes": "decode it, or send base64", "datetime": "send .isoformat()", "Decimal": "send str()"}
    how = hint.get(kind.__name__, "send strings, numbers, booleans, null, lists and objects")
    return f"{where} is of type {kind.__name__}, which is not JSON: {how}"


class _CheckedConf(dict[str, Any]):
    """A conf whose size as JSON is known: to find it is half the cost of a request."""

    __slots__ = ("size_bytes",)
    size_bytes: int


def _conf(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"is of type {type(value).__name__}: a conf is an object (a dict)")  # noqa: TRY004 - pydantic takes ValueError
    problem = conf_problem(value)
    if problem:
        raise ValueError(problem)
    size = len(_as_json(value).encode())
    if size > MAX_CONF_BYTES:
        raise ValueError(
            f"is {size} bytes as JSON, over the limit of {MAX_CONF_BYTES}: "
            "store the data elsewhere and send a reference to it"
        )
    checked = _CheckedConf(value)
    checked.size_bytes = size
    return checked


# One encoder for all calls: json.dumps with options makes a new one for each. A circle is found by its depth.
_as_json = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, separators=(",", ":"), default=str
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
        cls.defaults = {name: field.default for name, field in cls.model_fields.items()}

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
                message[name] = value.isoformat() if isinstance(value, datetime) else value
        return message


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
        lines.append(text if text.startswith((name, "a key of")) else f"{name}: {text}")
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


Text = Annotated[str, AfterValidator(_text)]
Instant = Annotated[AwareDatetime, BeforeValidator(_from_iso)]
IfExists = Literal["reuse", "fail", "clear", "skip"]


class TriggerRequest(_Request):
    """One DAG run that somebody wants. Raises `InvalidRequest` naming every wrong argument.

    dag_id
        The DAG to run.
    conf
        The run's configuration: a JSON object of at most 1 MB.
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
        again (one that is still queued or running is left alone), or ``skip``: ask no questions, even
        if its conf differs. A run with another conf is a `RunConflict` for all but ``skip``.
    give_up_after_s
        How long to go on trying, in seconds from the time it is due; time during which the connection
        is held does not count. Default 24 h.
    """

    dag_id: Annotated[str, Field(min_length=1, max_length=250), AfterValidator(_dag_id)]
    conf: Annotated[
        dict[str, Any] | None,
        PlainValidator(_conf),
        WithJsonSchema({"type": ["object", "null"]}),
        Field(repr=False),
    ] = None
    key: Annotated[Text, Field(min_length=1, max_length=MAX_KEY_LENGTH)] | None = None
    dag_run_id: Annotated[str, Field(min_length=1), AfterValidator(_run_id)] | None = None
    logical_date: Instant | None = None
    run_after: Instant | None = None
    note: Annotated[Text, Field(max_length=MAX_NOTE_LENGTH)] | None = None
    connection: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_connection)] = "default"
    if_exists: IfExists = "reuse"
    give_up_after_s: Annotated[float, BeforeValidator(_from_number), Field(gt=0, allow_inf_nan=False)] = (
        GIVE_UP_AFTER_S
    )

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
        """Return the request in a message. Raises `InvalidRequest`, as the constructor does."""
        return cls(**cls.fields_of(message))

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
        for name in ("key", "logical_date", "run_after", "connection", "if_exists"):
            value = getattr(self, name)
            if value != self.defaults[name]:
                parts.append(f"{name}={str(value)!r}")
        if self.note:
            parts.append(f"note=<{len(self.note)} characters>")
        return ", ".join(parts)


def conf_summary(conf: Mapping[str, Any]) -> str:
    """Return what may be shown of a conf: the names of up to eight keys and the size as JSON."""
    names = [str(name)[:40] for name in list(conf)[:8]]
    more = f", +{len(conf) - 8} more" if len(conf) > 8 else ""
    size = conf.size_bytes if isinstance(conf, _CheckedConf) else len(_as_json(conf).encode())
    return f"{', '.join(names)}{more}; {size} bytes" if names else "empty"


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

    def to_message(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> DagRun:
        """Return the run in a result; fields of a newer release are left out."""
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
        "tasks": {TRIGGER_DAG: TriggerRequest.model_json_schema()},
    }
