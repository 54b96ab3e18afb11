"""What is asked of an outside service about a job, and what its answers mean: pure functions.

The batches of looks come through here two thousand times a second, so for them a request is not parsed again:
`look_of` reads the parked message (which was checked as it was accepted), and what is the same for many jobs
(`Rules`: expressions, states, rhythm) is made once and kept.

**An observation** is what a look, or a wake, hands to the task that waits: JSON. Ours is an `End`. ``null``
means: go and look yourself. Anything else is taken as what the service would have answered (the body of a
webhook), and read by the same expressions.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, cast
from urllib.parse import quote, unquote_plus, urlencode

import jmespath
from jmespath.functions import Functions, signature
from jmespath.visitor import Options, TreeInterpreter

from producers.contract import MAX_RESULT_BYTES, Call, PollRequest, interval_after, reference_for
from producers.errors import (
    DagrelayError,
    ExternalJobFailed,
    ExternalJobGone,
    ExternalJobUnreadable,
    InvalidRequest,
)

from .http import HttpRequest, HttpResponse, retry_after_s
from .services import Service

MAX_WORDS_BYTES: Final = 200
MAX_STATE_BYTES: Final = 64
MAX_JOB_ID: Final = 500
FIND_SCANNED: Final = 4000
"""How many characters of an answer are searched for secrets before 200 bytes of it are kept."""

Kind = Literal["running", "done", "failed", "gone", "unreadable", "unavailable", "nonsense"]
EndKind = Literal["done", "failed", "gone", "unreadable"]


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


@dataclass(frozen=True, slots=True)
class End:
    """How a job ended, as an observation.

    As JSON ``{"end": "done", "state": …, "result": …, "words": …, "field": …}``, where all but `end` and
    `state` may be missing.
    """

    end: EndKind
    state: str = ""
    result: Any = None
    words: str = ""
    field: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, without what is empty."""
        found: dict[str, Any] = {"end": self.end, "state": self.state}
        if self.result is not None:
            found["result"] = self.result
        if self.words:
            found["words"] = self.words
        if self.field:
            found["field"] = self.field
        return found

    @classmethod
    def from_json(cls, observation: Any) -> End | None:
        """Return the end in an observation, or None: it is something else."""
        if not isinstance(observation, dict) or observation.get("end") not in _ENDS:
            return None
        if not {"end", "state"} <= observation.keys() <= _FIELDS:
            return None  # a service's own word
        texts = {name: str(observation.get(name, "")) for name in ("state", "words", "field")}
        return cls(end=observation["end"], result=observation.get("result"), **texts)

    @classmethod
    def of(cls, observed: Observed) -> End:
        """Return the end that was observed (`observed.ends`)."""
        kind = cast(EndKind, observed.kind)
        return cls(kind, observed.state, observed.result, observed.words, observed.field)

    def error(self, service: str, job_id: str | None) -> DagrelayError | None:
        """Return the error that a request ends with, None for a job that is done."""
        if self.end == "done":
            return None
        if self.end == "failed":
            return ExternalJobFailed(service, job_id, self.state, self.words)
        if self.end == "gone":
            return ExternalJobGone(service, job_id, self.state, self.words)
        return ExternalJobUnreadable(service, job_id, self.field, self.words)


_ENDS: Final = ("done", "failed", "gone", "unreadable")
_FIELDS: Final = {"end", "state", "result", "words", "field"}


def given_up(last: Observed, errors: int) -> Observed:
    """Return the end of a job whose looks have failed too often in a row; `last` is the last of them."""
    field = last.field or "answer"
    return Observed("unreadable", words=short(f"{errors} looks in a row failed: {last.words}"), field=field)


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
    plain: bool
    """Whether the result is a field of the answer, so that it is no larger than the answer."""

    def pause_s(self, waited_s: float, retry_after_s: float | None = None, at_least_s: float = 0.0) -> float:
        """Return the pause before the next look, with jitter, when it has been waited for `waited_s`."""
        pause = interval_after(waited_s, self)
        pause *= 1 + random.uniform(-self.jitter, self.jitter)  # noqa: S311
        return max(pause, retry_after_s or 0.0, at_least_s)


_DEFAULTS: Final = PollRequest.defaults
_RULES: Final = (
    *("state", "result", "progress", "reason", "success", "failure", "gone"),
    *("interval_s", "growth", "max_interval_s", "jitter", "max_errors"),
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


# Requests


class Look(NamedTuple):
    """One look that is to be done: the request, and all that it takes to read its answer."""

    service: Service
    rules: Rules
    job_id: str | None
    request: HttpRequest
    fresh: bool
    """It was submitted by us and has never been seen: "no such job" may mean "not yet"."""


def look_of(
    message: Mapping[str, Any],
    service: Service,
    task_id: str,
    *,
    job_id: str | None,
    reference: str | None = None,
    seen: str | None = None,
) -> Look:
    """Return the look of a waiting task, from its message and what its record says.

    `job_id`, `reference` and `seen` are the record's fields. Raises ServiceNotConfigured for a URL that is
    not within the service, InvalidRequest for a job id that no path can hold.
    """
    job_id = job_id or message.get("job_id")
    path = message.get("path") or _path_within(service, message["url"])
    request = request_of(
        service,
        message.get("method", "GET"),
        path,
        job_id=job_id,
        reference=reference or None,
        task_id=task_id,
        body=message.get("body"),
        headers=message.get("headers"),
        query=message.get("query"),
    )
    return Look(service, rules_of(message), job_id, request, not seen and "submit" in message)


def call_of(
    service: Service,
    call: Call,
    *,
    task_id: str,
    job_id: str | None = None,
    idempotency_key: str | None = None,
) -> HttpRequest:
    """Return the HTTP request of a submission, a lookup or a cancel. Raises as `look_of` does."""
    made = request_of(
        service,
        call.method,
        call.path,
        job_id=job_id,
        reference=None,
        task_id=task_id,
        body=call.body,
        headers=call.headers,
        query=call.query,
    )
    if idempotency_key is not None:
        headers = {**made.headers, service.idempotency_header: idempotency_key}
        return HttpRequest(made.method, made.path, headers, made.body)
    return made


def request_of(
    service: Service,
    method: str,
    path: str,
    *,
    job_id: str | None,
    reference: str | None,
    task_id: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    query: Mapping[str, str] | None = None,
) -> HttpRequest:
    """Return a request with its placeholders filled and the service's credentials in it.

    The service's own headers and query stand in place of the message's of the same names.
    """
    if reference is None and (body is not None or query or "{reference}" in path):
        reference = reference_for(task_id)
    filled = _filled(path, job_id, reference or "") if "{" in path else path
    if "/." in filled or "%" in filled or "\\." in filled:
        service.check_path(filled)
    if service.query and "?" in filled:
        filled = _without(service.query, filled)
    if query:
        texts = {
            name: _with(text, job_id, reference or "")
            for name, text in query.items()
            if name not in service.query
        }
        if texts:
            filled += ("&" if "?" in filled else "?") + urlencode(texts)
    if service.query:
        filled += ("&" if "?" in filled else "?") + service.query_text
    sent = service.headers()
    if headers:
        ours = service.header_names
        sent = {**{name: text for name, text in headers.items() if name.lower() not in ours}, **sent}
    content: bytes | None = None
    if body is not None:
        content = json.dumps(_with(body, job_id, reference or ""), allow_nan=False).encode()
        if not any(name.lower() == "content-type" for name in sent):
            sent = {"Content-Type": "application/json", **sent}
    return HttpRequest(method, filled, sent, content)


def _without(names: Container[str], path: str) -> str:
    """Return a path without the parts of its query that have one of these names."""
    plain, _, query = path.partition("?")
    kept = "&".join(part for part in query.split("&") if unquote_plus(part.partition("=")[0]) not in names)
    return f"{plain}?{kept}" if kept else plain


def _filled(path: str, job_id: str | None, reference: str) -> str:
    """Return a path with its placeholders filled, percent-encoded."""
    if "{job_id}" in path:
        if job_id is None:
            raise InvalidRequest("path: has {job_id}, and no job id is known")
        if "." in job_id and not {".", ".."}.isdisjoint(job_id.split("/")):
            raise InvalidRequest(f"job_id: {job_id!r} cannot be part of a URL")
        path = path.replace("{job_id}", quote(job_id, safe=""))
    return path.replace("{reference}", reference)


def _with(value: Any, job_id: str | None, reference: str) -> Any:
    """Return a value with the placeholders in its texts filled, as they are."""
    if isinstance(value, str):
        if "{" not in value:
            return value
        return value.replace("{reference}", reference).replace("{job_id}", job_id or "")
    if isinstance(value, dict):
        return {name: _with(item, job_id, reference) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with(item, job_id, reference) for item in value]
    return value


@lru_cache(maxsize=1024)
def _path_of_url(service_id: str, base_url: str, url: str) -> str:
    return Service(service_id, base_url).check_url(url)


def _path_within(service: Service, url: str) -> str:
    return _path_of_url(service.id, service.base_url, url)


# Answers


def read_look(look: Look, response: HttpResponse) -> Observed:
    """Return what an answer to a look says of the job. Raises nothing."""
    status = response.status
    if 200 <= status < 300:
        value = decoded(response.body)
        if value is _NOT_JSON:
            return _nonsense(look.service, "answer", "is not JSON", response)
        found = read_answer(look.rules, value, look.service)
        if found.kind == "nonsense":
            return found._replace(words=_kept(look.service, found.words, response))
        if found.result is None or (look.rules.plain and len(response.body) <= MAX_RESULT_BYTES):
            return found
        return _sized(found)
    if status in look.rules.gone:
        words = f"it answered {status}"
        if look.fresh:
            return Observed("unavailable", words=f"{words}, and the job was never seen yet", field="answer")
        return Observed("gone", state=str(status), words=words)
    return unavailable(look.service, response)


def read_answer(rules: Rules, value: Any, service: Service) -> Observed:
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
        return Observed(
            "failed", cut(state, MAX_STATE_BYTES), words=short(service.masked(words)) if words else ""
        )
    progress = _quietly(rules.progress, value) if rules.progress is not None else ""
    return Observed("running", cut(state, MAX_STATE_BYTES), cut(one_line(progress), MAX_STATE_BYTES))


def read_wake(rules: Rules, value: Any, service: Service) -> Observed:
    """Return what somebody's wake says of the job, read as if the service had answered it."""
    found = read_answer(rules, value, service)
    return _sized(found) if found.result is not None else found


def no_answer(reason: str) -> Observed:
    """Return what a look saw that got no answer."""
    return Observed("unavailable", words=short(reason), field="answer")


def unavailable(service: Service, response: HttpResponse) -> Observed:
    """Return what an answer says that is neither 2xx nor `gone`."""
    status = response.status
    asked_s = retry_after_s(response.headers) if status in (429, 503) else None
    if status in (401, 403):
        words = f"it refuses the credentials of the worker ({status})"
    elif 300 <= status < 400:
        words = f"a redirect ({status}), which is not followed: is the address of the service right?"
    else:
        words = f"it answered {status}"
    return Observed(
        "unavailable",
        words=_kept(service, words, response),
        field="answer",
        counts=status != 429,
        retry_after_s=asked_s,
    )


def job_id_in(expression: str, response: HttpResponse) -> str | None:
    """Return the job id in an answer of 2xx, None for null. Raises ValueError with what is wrong."""
    value = decoded(response.body)
    if value is _NOT_JSON:
        raise ValueError("the answer is not JSON")
    try:
        found = reader(expression)(value)
    except Exception as exc:  # noqa: BLE001 - as above
        raise ValueError(f"the expression fails: {type(exc).__name__}") from None
    if found is None:
        return None
    text = state_text(found)
    if not text or isinstance(found, bool):
        raise ValueError("is no text and no number")
    if len(text) > MAX_JOB_ID or not text.isprintable() or text in (".", ".."):
        raise ValueError(f"is none that a request can name: up to {MAX_JOB_ID} printable characters")
    return text


_NOT_JSON: Final = object()


def _refuse(_: str) -> Any:
    raise ValueError("is no JSON")


_decode = json.JSONDecoder(parse_constant=_refuse).decode


def decoded(body: bytes) -> Any:
    """Return what a body is as JSON, or a mark that it is none."""
    try:
        return _decode(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return _NOT_JSON


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


def shown_answer(service: Service, response: HttpResponse) -> str:
    """Return the first 200 bytes of an answer on one line, secrets masked; "" for an empty one."""
    # Masked before it is cut: half a secret is not recognised as one.
    return short(service.masked(response.text(FIND_SCANNED)))


def _kept(service: Service, words: str, response: HttpResponse) -> str:
    answer = shown_answer(service, response)
    return f"{words}: {answer}" if answer else words


def _nonsense(service: Service, field: str, words: str, response: HttpResponse) -> Observed:
    return Observed("nonsense", words=_kept(service, words, response), field=field)


def _sized(found: Observed) -> Observed:
    if _fits(found.result, MAX_RESULT_BYTES):
        try:
            text = json.dumps(found.result, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            return Observed("unreadable", found.state, words="is nothing that JSON can hold", field="result")
        if len(text.encode("utf-8", "replace")) <= MAX_RESULT_BYTES:
            return found
    words = f"is over the limit of {MAX_RESULT_BYTES} bytes as JSON"
    return Observed("unreadable", found.state, words=words, field="result")


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
    except Exception as exc:  # noqa: BLE001 - it is there to be shown, no more, and so is what is wrong with it
        return f"the expression fails: {type(exc).__name__}"
