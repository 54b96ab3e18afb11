"""What is asked of an outside service about a job, and what its answers mean: pure functions.

The batches of looks come through here two thousand times a second, so for them a request is not parsed again:
`look_of` reads the parked message, which was checked as it was accepted. How answers are read is in
`producers.stores.answers`.

**An observation** is what a look, or a wake, hands to the task that waits: JSON. Ours is an `End`. ``null``
means: go and look yourself. Anything else is what somebody said (`producers.stores.heard`: a callback, a
message, a wake), taken as what the service would have answered, and read by the same expressions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, cast
from urllib.parse import quote, unquote_plus, urlencode

from producers.contract import MAX_RESULT_BYTES, Call, reference_for
from producers.errors import (
    DagrelayError,
    ExternalJobFailed,
    ExternalJobGone,
    ExternalJobUnreadable,
    InvalidRequest,
)
from producers.stores.answers import (
    FIND_SCANNED,
    Observed,
    Rules,
    read_answer,
    reader,
    rules_of,
    short,
    sized,
    state_text,
)

from .http import HttpRequest, HttpResponse, retry_after_s
from .services import Service

MAX_JOB_ID: Final = 500

EndKind = Literal["done", "failed", "gone", "unreadable"]


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
    callback_url: str | None = None,
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
        callback_url=callback_url,
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
    callback_url: str | None = None,
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
    fills = {"job_id": job_id or "", "reference": reference or ""}
    if callback_url is not None:
        fills["callback_url"] = callback_url
        headers = with_filled(headers, {"callback_url": callback_url}) if headers else headers
    if query:
        texts = {name: with_filled(text, fills) for name, text in query.items() if name not in service.query}
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
        content = json.dumps(with_filled(body, fills), allow_nan=False).encode()
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


def with_filled(value: Any, fills: Mapping[str, str]) -> Any:
    """Return a value with the placeholders in its texts filled; what is filled in is left as it is."""
    if isinstance(value, str):
        if "{" not in value:
            return value
        return _PLACE.sub(lambda found: fills.get(found[1], found[0]), value)
    if isinstance(value, dict):
        return {name: with_filled(item, fills) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_filled(item, fills) for item in value]
    return value


_PLACE = re.compile(r"\{(job_id|reference|callback_url)\}")


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
        found = read_answer(look.rules, value, look.service.masked)
        if found.kind == "nonsense":
            return found._replace(words=_kept(look.service, found.words, response))
        if found.result is None or (look.rules.plain and len(response.body) <= MAX_RESULT_BYTES):
            return found
        return sized(found)
    if status in look.rules.gone:
        words = f"it answered {status}"
        if look.fresh:
            return Observed("unavailable", words=f"{words}, and the job was never seen yet", field="answer")
        return Observed("gone", state=str(status), words=words)
    return unavailable(look.service, response)


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


def shown_answer(service: Service, response: HttpResponse) -> str:
    """Return the first 200 bytes of an answer on one line, secrets masked; "" for an empty one."""
    # Masked before it is cut: half a secret is not recognised as one.
    return short(service.masked(response.text(FIND_SCANNED)))


def _kept(service: Service, words: str, response: HttpResponse) -> str:
    answer = shown_answer(service, response)
    return f"{words}: {answer}" if answer else words


def _nonsense(service: Service, field: str, words: str, response: HttpResponse) -> Observed:
    return Observed("nonsense", words=_kept(service, words, response), field=field)
