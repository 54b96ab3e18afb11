"""What a worker logs: one line for each record, as key=value (logfmt) or as JSON.

A call site writes its fields into the text, as in ``log.info("waits task_id=%s: %s", task_id, why)``. In a
template of ours a name, "=" and a placeholder are a field, a last ": %s" is the field `reason`, and the rest
is the message. So a value is known as such, whatever it holds, and is quoted where it must be. `told` takes
fields that no template names.

What may quote a conf or a secret is not written: the bodies of messages, which Celery logs where it can make
nothing of one, and the words of exceptions of which we do not know what they say.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from types import TracebackType
from typing import Any, Final, Literal, TextIO

from celery.app import trace as celery_trace
from celery.apps import worker as celery_worker
from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import consumer as celery_consumer

from producers.contract import POLL_EXTERNAL_JOB, TRIGGER_DAG
from producers.errors import DagrelayError, error_from
from producers.stores.records import Ended, State

from . import tracing

Format = Literal["logfmt", "json"]
Fields = Mapping[str, Any]
Part = str | tuple[str, Any]
"""Of a record: a piece of its message, or a field."""

OURS: Final = ("dagrelay", "redis_transport")
"""Loggers in whose templates fields are looked for."""

SPEAKABLE: Final = ("producers", "tasks", "redis", "kombu")
"""Packages whose exceptions say nothing that must not be in a log; so do the operating system's."""

MAX_FIELD: Final = 1000
MAX_MESSAGE: Final = 2000
MAX_TRACEBACK: Final = 6000
"""In characters: Docker and others cut what is longer than 16 KB into several lines."""

log = logging.getLogger("dagrelay.outcome")


def set_up(level: int, form: Format, stream: TextIO | None = None) -> None:
    """Have everything that this process logs go to stderr in that form; called again, it sets the levels.

    So do Python's warnings, and what nobody caught.
    """
    root = logging.getLogger()
    if not any(isinstance(handler, _Handler) for handler in root.handlers):
        _install(root, form, stream if stream is not None else sys.stderr)
    root.setLevel(level)
    # That a task was received, has succeeded or is tried again is a line of our own, or Flower's; and a line
    # costs about as much as a write to Redis.
    for double in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(double).setLevel(max(level, logging.WARNING) if level > logging.DEBUG else level)
    # Celery's pool logs whole messages, conf and all, at DEBUG: that one stays at INFO whatever is asked.
    for chatty in ("celery.pool", "celery.concurrency", "kombu", "amqp", "urllib3"):
        logging.getLogger(chatty).setLevel(max(logging.INFO, level))


def _install(root: logging.Logger, form: Format, stream: TextIO) -> None:
    logging.raiseExceptions = False  # an error in logging would be told with the values of the record
    root.addHandler(_Handler(stream, form))
    logging.captureWarnings(True)
    # Ten lines at each lost connection, of a setting that we have made.
    warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
    warnings.formatwarning = _one_line
    sys.excepthook = _not_caught
    threading.excepthook = _not_caught_in_a_thread
    if form == "json":
        # What a signal handler says goes past the log; it may not take a lock.
        celery_worker.safe_say = _say


def told(words: str, /, level: int = logging.INFO, *, logger: logging.Logger = log, **fields: Any) -> None:
    """Log a message with fields; those that are None are left out."""
    if logger.isEnabledFor(level):
        logger.log(level, words, extra={"fields": fields})


def outcome(task_id: str, state: State, ended: Ended, result: Any, *, correct: bool = False) -> None:
    """Log how a request ended: one line for each. The outcome is the word that metrics count it by.

    `result` is that of Celery's result. A worker's own tasks, and the chunks of a fan-out, are no requests.
    """
    if ended.task not in (TRIGGER_DAG, POLL_EXTERNAL_JOB):
        return
    known = result if isinstance(result, dict) else {}
    ours = known.get("exc_module") == DagrelayError.__module__
    error = known.get("exc_type") if state != "done" else None
    how: str = state
    if correct:
        how = "corrected"
    elif state == "done" and ended.task == TRIGGER_DAG:
        how = "started" if known.get("created") else "cleared" if known.get("cleared") else "exists"
    level = logging.INFO
    if state == "failed":
        level = logging.WARNING if ours else logging.ERROR
    told(
        f"request {state}",
        level,
        task_id=task_id,
        dag_id=ended.dag_id or None,
        run_id=ended.dag_run_id or None,
        connection=ended.connection or None,
        key=ended.key or None,
        service=ended.service or None,
        job_id=ended.job_id or None,
        outcome=how,
        state=known.get("state"),
        error=error,
        attempts=int(ended.attempts) if ended.attempts.isdecimal() else None,
        age_s=float(ended.age_s) if ended.age_s else None,
        reason=str(error_from(str(error), list(known["exc_message"]))) if error and ours else None,
    )


def outcomes(many: Iterable[Fields]) -> None:
    """Log requests that ended in bulk: a line for each as `outcome` writes it, all written at once."""
    if not log.isEnabledFor(logging.INFO):
        return
    records = []
    for fields in many:
        record = logging.LogRecord(log.name, logging.INFO, __file__, 0, "request done", (), None)
        record.fields = fields
        records.append(record)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Handler):
            handler.emit_all(records)


def words_of(exc: BaseException) -> str:
    """Return what an exception says; only its class where its words may quote a conf or a secret."""
    name, module = type(exc).__name__, type(exc).__module__
    if module.partition(".")[0] not in SPEAKABLE and not (module == "builtins" and isinstance(exc, OSError)):
        return name
    try:
        return str(exc) if isinstance(exc, DagrelayError) else f"{name}: {exc}"
    except Exception:  # noqa: BLE001 - a subclass of somebody's
        return name


class _Handler(logging.StreamHandler[TextIO]):
    """Writes whole lines to a stream, in one of the two forms."""

    def __init__(self, stream: TextIO, form: Format) -> None:
        super().__init__(stream)
        if form == "json":
            reconfigure = getattr(stream, "reconfigure", None)
            if (
                reconfigure is not None
            ):  # JSON is UTF-8, whatever the locale; a lone surrogate stays an escape
                reconfigure(encoding="utf-8", errors="backslashreplace")
            self.setFormatter(Json())
        else:
            self.setFormatter(Logfmt(below=stream.isatty()))

    def emit_all(self, records: Iterable[logging.LogRecord]) -> None:
        """Write many lines at once."""
        lines = "".join(f"{self.format(record)}\n" for record in records)
        with self.lock:
            self.stream.write(lines)
            self.flush()


class Logfmt(logging.Formatter):
    """``2026-11-20 07:15:00,042 INFO dagrelay.trigger run started task_id=… dag_id=…``.

    Local time. A traceback is a field like any other, or stands `below`, for people.
    """

    def __init__(self, *, below: bool = False) -> None:
        super().__init__()
        self._below = below
        self._second: tuple[int, str] = 0, ""

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if self._second[0] != second:
            self._second = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        pieces = [f"{self._second[1]},{int(record.msecs):03d} {record.levelname} {record.name} "]
        below = ""
        for part in _parts(record):
            if isinstance(part, str):
                text = part.lstrip(" ") if pieces[-1].endswith(" ") else part  # a field between was left out
                if text:
                    pieces.append(_escaped(text[:MAX_MESSAGE]))
            elif self._below and part[0] == "traceback":
                below = "\n" + part[1]
            elif part[1] is not None:
                gap = "" if pieces[-1].endswith(" ") else " "
                pieces.append(f"{gap}{part[0]}={quoted(part[1])}")
        return "".join(pieces).rstrip() + below


class Json(logging.Formatter):
    """``{"time": "2026-11-20T06:15:00.042Z", "level": "INFO", "logger": …, "message": …, fields…}``. UTC."""

    def __init__(self) -> None:
        super().__init__()
        self._second: tuple[int, str] = 0, ""

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if self._second[0] != second:
            self._second = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        words = ""
        line: dict[str, Any] = {
            "time": f"{self._second[1]}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": "",
        }
        for part in _parts(record):
            if isinstance(part, str):
                words = words.rstrip() + part if part[:1] in " ,:;" else words + part
            elif part[1] is not None:
                line[f"{part[0]}_" if part[0] in line else part[0]] = _as_value(part[1])
        line["message"] = words.strip()[:MAX_MESSAGE]
        return _as_json(line)


_as_json = json.JSONEncoder(ensure_ascii=False, separators=(", ", ": ")).encode


def quoted(value: Any) -> str:
    """Return a value as logfmt has it: as it is, or in quotes with escapes where a reader could not tell."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = value if isinstance(value, str) else str(value)
    if _is_plain(text):
        return text
    if text.isprintable() and text and not _TO_QUOTE.search(text):
        return text
    inner = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_escaped(inner)}"'


_is_plain: Final = re.compile(r"[!#-<>-~]+").fullmatch
_TO_QUOTE: Final = re.compile(r'[\s"=]')


def _escaped(text: str) -> str:
    """Return a text that is one line, and moves no terminal: what is not printable is an escape."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    return json.dumps(character)[1:-1] if character != "\x7f" else "\\u007f"


def _as_value(value: Any) -> Any:
    """Return a field's value as JSON has it: a number, true or false, or a text."""
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and value - value == 0:  # neither infinite nor NaN
        return value
    return str(value)


def _parts(record: logging.LogRecord) -> Iterator[Part]:
    """Yield what a record says, piece by piece. Never raises: what cannot be put together is left out."""
    rewrite = _REWRITTEN.get(record.msg) if isinstance(record.msg, str) else None
    trace = record.exc_info
    if rewrite is not None:
        try:
            words, fields, keep = rewrite(record.args)
        except Exception:  # noqa: BLE001 - another Celery says it otherwise
            words, fields, keep = "something that Celery says with a whole message in it", {}, False
        yield words
        yield from fields.items()
        trace = trace if keep else None
    elif record.name.partition(".")[0] in OURS and isinstance(record.msg, str):
        yield from _read(record.msg, record.args)
    else:
        try:
            yield record.getMessage()
        except Exception:  # noqa: BLE001 - whatever a library's values do
            yield str(record.msg)
    given: Fields = getattr(record, "fields", {})
    for name, value in given.items():
        yield name, value[:MAX_FIELD] if isinstance(value, str) else value
    if "trace_id" not in given and (trace_id := tracing.trace_id()):
        yield "trace_id", trace_id
    if trace and isinstance(trace, tuple) and trace[1] is not None:
        yield "traceback", "".join(_traceback(trace[1], trace[2]))[-MAX_TRACEBACK:].rstrip()
    elif record.stack_info:
        yield "traceback", record.stack_info[-MAX_TRACEBACK:]


def _read(template: str, args: Any) -> Iterator[Part]:
    """Yield what a template of ours says with its arguments."""
    values = args if isinstance(args, tuple) else (args,) if args else ()
    pieces = _template(template)
    if len(values) != sum(spec != "" for _, _, spec in pieces):
        yield template
        return
    rest = iter(values)
    for literal, name, spec in pieces:
        if literal:
            yield literal
        if not spec:
            continue
        value = next(rest)
        if type(value) is str and spec == "%s":  # most are: this is three times as fast
            yield (name, value[:MAX_FIELD]) if name else value
            continue
        if name and value is None:
            continue
        try:
            text = words_of(value) if isinstance(value, BaseException) else spec % value
        except Exception:  # noqa: BLE001 - a line with a hole is better than none
            text = f"<{type(value).__name__}>"
        if not name:
            yield text
        elif isinstance(value, bool | int | float):
            yield name, value if spec == "%s" else type(value)(text)
        else:
            yield name, text[:MAX_FIELD]


@lru_cache(maxsize=1000)
def _template(template: str) -> tuple[tuple[str, str, str], ...]:
    """Split a template: a text, then the name of a field ('' for none) and a placeholder ('' for none)."""
    pieces, literal, end = [], "", 0
    for found in _PLACEHOLDER.finditer(template):
        literal += template[end : found.start()]
        end = found.end()
        if found["spec"] == "%%":
            literal += f"{found['name'] or ''}%"
            continue
        name = (found["name"] or "").rstrip("=")
        if not name and end == len(template) and literal.endswith(": "):
            literal, name = literal[:-2], "reason"
        pieces.append((literal, name, found["spec"]))
        literal = ""
    return (*pieces, (literal + template[end:], "", ""))


_PLACEHOLDER: Final = re.compile(
    r"(?P<name>(?<!\S)[a-z][a-z0-9_]*=)?(?P<spec>%%|%[-+ #0]*\d*(?:\.\d+)?[a-zA-Z])"
)


def _traceback(exc: BaseException, trace: Any, seen: tuple[int, ...] = ()) -> Iterator[str]:
    """Yield a traceback as Python writes it, without the words of exceptions that may quote a value."""
    before = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    if before is not None and id(before) not in seen and len(seen) < 10:
        yield from _traceback(before, before.__traceback__, (*seen, id(exc)))
        how = "the direct cause of" if exc.__cause__ else "handled when there was"
        yield f"\nThe above exception was {how} the following exception:\n\n"
    if trace is not None:
        yield "Traceback (most recent call last):\n"
        yield from traceback.format_tb(trace)
    words = words_of(exc)
    name = type(exc).__name__
    yield f"{words}\n" if words.startswith(name) else f"{name}: {words}\n"


# What Celery says with the whole message in it, or with the words of any exception.


def _unknown_task(args: Any) -> tuple[str, Fields, bool]:
    _, _, headers, delivery = args
    known, where = headers if isinstance(headers, Mapping) else {}, delivery or {}
    fields = {"task": known.get("task"), "task_id": known.get("id"), "queue": where.get("routing_key")}
    return "discarded, no such task is known here", fields, False


def _invalid_task(args: Any) -> tuple[str, Fields, bool]:
    return "discarded, Celery cannot make a task of a message", {"error": type(args[0]).__name__}, False


def _unknown_message(args: Any) -> tuple[str, Fields, bool]:
    return "discarded, a message that is no task", {}, False


def _failed(args: Any) -> tuple[str, Fields, bool]:
    """What a task raised that is no error of ours; with the traceback, whose last line names it."""
    return f"task {args['description']}", {"task": args["name"], "task_id": args["id"]}, True


def _rejected(args: Any) -> tuple[str, Fields, bool]:
    """What was not handed over, for a reason that is told where it is known."""
    return "task rejected", {"task": args["name"], "task_id": args["id"]}, False


_REWRITTEN: Final[dict[str, Callable[[Any], tuple[str, Fields, bool]]]] = {
    celery_consumer.UNKNOWN_TASK_ERROR: _unknown_task,
    celery_consumer.INVALID_TASK_ERROR: _invalid_task,
    celery_consumer.MESSAGE_DECODE_ERROR: _invalid_task,
    celery_consumer.UNKNOWN_FORMAT: _unknown_message,
    celery_trace.LOG_FAILURE.strip(): _failed,
    celery_trace.LOG_INTERNAL_ERROR.strip(): _failed,
    celery_trace.LOG_REJECTED.strip(): _rejected,
}


def _one_line(message: Any, category: type[Warning], filename: str, lineno: int, line: Any = None) -> str:
    return f"{filename}:{lineno}: {category.__name__}: {message}"


def _not_caught(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, exc, trace)
    else:
        logging.critical("not caught", exc_info=(kind, exc, trace))


def _not_caught_in_a_thread(caught: threading.ExceptHookArgs) -> None:
    if caught.exc_type is SystemExit or caught.exc_value is None:
        return
    exc: tuple[type[BaseException], BaseException, TracebackType | None]
    exc = caught.exc_type, caught.exc_value, caught.exc_traceback
    logging.critical("not caught in thread %s", caught.thread.name if caught.thread else "", exc_info=exc)


def _say(message: str, f: Any = None) -> None:
    """Write what Celery says in a signal handler as a line of the log."""
    now = time.time()
    line = {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z",
        "level": "INFO",
        "logger": "celery.apps.worker",
        "message": message.strip(),
    }
    with suppress(OSError):
        os.write(2, f"{_as_json(line)}\n".encode())
