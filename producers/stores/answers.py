"""How what a service says of a job is read: by the request's own expressions. Pure.

Workers read answers to looks with it, and what comes from outside: of a callback also the gateway needs to
know whether it is the end of the job. What is the same for many jobs (`Rules`: expressions, states, rhythm)
is made once and kept.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import jmespath
from jmespath.functions import Functions, signature
from jmespath.visitor import Options, TreeInterpreter

from ..contract import MAX_RESULT_BYTES, PollRequest, interval_after

MAX_WORDS_BYTES: Final = 200
MAX_STATE_BYTES: Final = 64
FIND_SCANNED: Final = 4000
"""How many characters of an answer are searched for secrets before 200 bytes of it are kept."""

Kind = Literal["running", "done", "failed", "gone", "unreadable", "unavailable", "nonsense"]
Masked = Callable[[str], str]
"""Returns a text without what may be a secret in it."""


class Observed(NamedTuple):
    """What one look saw.

    Four kinds end the job: `done`, `failed`, `gone`, `unreadable` (`field` says what cannot be used).
    `running` does not; `unavailable` and `nonsense` are errors, of which `counts` tells whether they count.
    """

    kind: Kind
    state: str = ""
    """The service's word for the job's state, at most 64 bytes."""
    progress: str = ""
    result: Any = None
    words: str = ""
    """What is wrong, and the service's words: one line; of those at most 200 bytes, secrets masked."""
    field: str = ""
    counts: bool = True
    retry_after_s: float | None = None

    @property
    def ends(self) -> bool:
        """Whether the job has ended, or cannot be followed."""
        return self.kind in ("done", "failed", "gone", "unreadable")

    @property
    def is_error(self) -> bool:
        """Whether nothing was learned of the job."""
        return self.kind in ("unavailable", "nonsense")


# Rules: what is the same for all looks at a job, and for all jobs that are asked for alike


Read = Callable[[Any], Any]


class Rules(NamedTuple):
    """How answers are read, and the rhythm of the looks."""

    state: Read
    result: Read | None
    progress: Read | None
    reason: Read | None
    success: frozenset[str]
    failure: frozenset[str]
    gone: frozenset[int]
    interval_s: float
    growth: float
    max_interval_s: float
    jitter: float
    max_errors: int
    heartbeat_s: float | None
    plain: bool
    """Whether the result is a field of the answer, so that it is no larger than the answer."""

    def pause_s(self, waited_s: float, retry_after_s: float | None = None, at_least_s: float = 0.0) -> float:
        """Return the pause before the next look, with jitter, when it has been waited for `waited_s`."""
        pause = interval_after(waited_s, self)
        pause *= 1 + random.uniform(-self.jitter, self.jitter)  # noqa: S311
        if self.heartbeat_s is not None:
            pause = min(pause, self.heartbeat_s)
        return max(pause, retry_after_s or 0.0, at_least_s)


_DEFAULTS: Final = PollRequest.defaults
_RULES: Final = (
    *("state", "result", "progress", "reason", "success", "failure", "gone"),
    *("interval_s", "growth", "max_interval_s", "jitter", "max_errors", "heartbeat_s"),
)


def rules_of(message: Mapping[str, Any]) -> Rules:
    """Return the rules in a message (`PollRequest.to_message()`)."""
    get = message.get
    success, failure, gone = get("success"), get("failure"), get("gone")
    return _rules(
        get("state"),
        get("result"),
        get("progress"),
        get("reason"),
        tuple(success) if success else None,
        tuple(failure) if failure else None,
        None if gone is None else tuple(gone),
        get("interval_s"),
        get("growth"),
        get("max_interval_s"),
        get("jitter"),
        get("max_errors"),
        get("heartbeat_s"),
    )


@lru_cache(maxsize=1024)
def _rules(*given: Any) -> Rules:
    values = {
        name: _DEFAULTS[name] if value is None else value for name, value in zip(_RULES, given, strict=True)
    }
    values["plain"] = values["result"] is None or _NAME.match(values["result"]) is not None
    for name in ("state", "result", "progress", "reason"):
        values[name] = values[name] and reader(values[name])
    for name in ("success", "failure"):
        values[name] = frozenset(text.strip().lower() for text in values[name])
    values["gone"] = frozenset(values["gone"])
    return Rules(**values)


class _Functions(Functions):
    """The functions of JMESPath, of which the one that writes JSON writes none without end: see `_fits`."""

    @signature({"types": []})
    def _func_to_string(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        if not _fits(value, MAX_RESULT_BYTES):
            raise ValueError("is too large for a text")
        return json.dumps(value, separators=(",", ":"), default=str)


# One for all: it keeps nothing of what it reads.
_interpreter = TreeInterpreter(Options(custom_functions=_Functions()))
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@lru_cache(maxsize=1024)
def reader(expression: str) -> Read:
    """Return the function that a JMESPath expression is. It raises what the expression makes of a value."""
    if _NAME.match(expression):  # a plain field, as most are: a tenth of the time
        return lambda value: value.get(expression) if isinstance(value, dict) else None
    tree = jmespath.compile(expression).parsed
    return lambda value: _interpreter.visit(tree, value)


def read_answer(rules: Rules, value: Any, masked: Masked) -> Observed:
    """Return what a decoded answer says of the job, by a look or by a wake. Raises nothing."""
    try:
        state = state_text(rules.state(value))
    except Exception as exc:  # noqa: BLE001 - whatever an expression makes of somebody's answer
        return Observed("nonsense", words=f"the expression fails: {type(exc).__name__}", field="state")
    if not state:
        return Observed("nonsense", words="is missing, or no plain value", field="state")
    word = state.lower()
    if word in rules.success:
        try:
            result = rules.result(value) if rules.result is not None else None
        except Exception as exc:  # noqa: BLE001 - as above
            words = f"the expression fails: {type(exc).__name__}"
            return Observed("unreadable", cut(state, MAX_STATE_BYTES), words=words, field="result")
        return Observed("done", cut(state, MAX_STATE_BYTES), result=result)
    if word in rules.failure:
        words = _quietly(rules.reason, value)
        return Observed("failed", cut(state, MAX_STATE_BYTES), words=short(masked(words)) if words else "")
    return Observed("running", cut(state, MAX_STATE_BYTES), progress_in(rules, value))


def progress_in(rules: Rules, value: Any) -> str:
    """Return the progress in an answer, at most 64 bytes; "" for none. Raises nothing."""
    return cut(one_line(_quietly(rules.progress, value)), MAX_STATE_BYTES) if rules.progress else ""


def read_wake(rules: Rules, value: Any, masked: Masked) -> Observed:
    """Return what somebody's wake says of the job, read as if the service had answered it."""
    found = read_answer(rules, value, masked)
    return sized(found) if found.result is not None else found


def sized(found: Observed) -> Observed:
    """Return what was observed, or `unreadable` where its result is too large, or no JSON."""
    if _fits(found.result, MAX_RESULT_BYTES):
        try:
            text = json.dumps(found.result, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            return Observed("unreadable", found.state, words="is nothing that JSON can hold", field="result")
        if len(text.encode("utf-8", "replace")) <= MAX_RESULT_BYTES:
            return found
    words = f"is over the limit of {MAX_RESULT_BYTES} bytes as JSON"
    return Observed("unreadable", found.state, words=words, field="result")


def state_text(value: Any) -> str:
    """Return a state as text: numbers and booleans as JSON has them; "" for what is no plain value."""
    if isinstance(value, str):
        return one_line(value)
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, int | float):
        return json.dumps(value)
    return ""


def one_line(text: str) -> str:
    """Return a text on one line, without control characters and lone surrogates."""
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip()
    plain = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(plain.encode("utf-8", "replace").decode().split())


def cut(text: str, most_bytes: int) -> str:
    """Return the beginning of a text, at most so many bytes."""
    if len(text) * 4 <= most_bytes:
        return text
    return text.encode("utf-8", "replace")[:most_bytes].decode("utf-8", "ignore")


def short(text: str) -> str:
    """Return words as they are kept: one line, at most 200 bytes."""
    return cut(one_line(text), MAX_WORDS_BYTES)


def _fits(value: Any, most_bytes: int) -> bool:
    """Tell whether a value may be written as JSON at all: whether it has not more parts than bytes.

    An expression of a few characters (``[@,@]|[@,@]|…``) makes a value that is small in memory, as its parts
    are shared, and without end as JSON.
    """
    size, rest = 0, [value]
    while rest:
        one = rest.pop()
        if isinstance(one, list | dict):
            size += 2 * len(one)
        else:
            size += len(one) if isinstance(one, str) else 1
        if size > most_bytes:
            return False
        if isinstance(one, list):
            rest += one
        elif isinstance(one, dict):
            rest += one
            rest += one.values()
    return True


_parts_of = json.JSONEncoder(ensure_ascii=False, check_circular=False).iterencode


def _begun(value: Any, most: int) -> str:
    """Return the first characters of a value as JSON, at most so many; the rest is not written at all."""
    if isinstance(value, int | float):
        return json.dumps(value)[:most]
    parts, size = [], 0
    for part in _parts_of(value):
        parts.append(part)
        size += len(part)
        if size >= most:
            break
    return "".join(parts)[:most]


def _quietly(read: Read | None, value: Any) -> str:
    """Return what an expression finds as a text, up to what is searched for secrets; "" for nothing."""
    if read is None:
        return ""
    try:
        found = read(value)
        if found is None:
            return ""
        return found[:FIND_SCANNED] if isinstance(found, str) else _begun(found, FIND_SCANNED)
    except Exception as exc:  # noqa: BLE001 - it is there to be shown, and so is what is wrong with it
        return f"the expression fails: {type(exc).__name__}"
