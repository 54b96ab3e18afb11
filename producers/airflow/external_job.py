"""`ExternalJobOperator`: a job on an outside service, started and followed by Dagrelay's workers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel

from ..client import RelayClient
from ..contract import Call, Find, JobOutcome, PollRequest, Publish, Submit, TriggerRequest
from ..errors import DagrelayError, InvalidRequest
from ..stores.serving import Served
from ..stubs import poll_external_job
from .base import RelayOperator, asked_by, ended_as, has_template, refused_for_good
from .triggers import RelayTrigger

FIELDS: Final = tuple(name for name in PollRequest.model_fields if name != "task_instance")
"""The arguments of `poll_external_job` that are the operators' too: here it is the operator that waits."""

_RENDERED_AS_JSON: Final = ("message", "body", "headers", "query", "submit", "find", "then", "on_cancel")
_NOT_TEMPLATES: Final = ("via", "method", "submit_once")
_NUMBERS: Final = frozenset(
    name
    for request in (PollRequest, TriggerRequest)
    for name, field in request.model_fields.items()
    if "float" in str(field.annotation)
)
_WHOLE: Final = ("max_errors", "gone", "priority")
_TEXTS: Final = ("headers", "query")
_CALLS: Final = ("submit", "find", "on_cancel")


class ExternalJobTrigger(RelayTrigger):
    """Ends the task of a job with the job's result."""

    def xcoms(self, outcome: Any) -> dict[str, Any] | None:
        """Return the XComs of a job that is done."""
        return xcoms_of(JobOutcome.from_message(outcome)) if "service" in outcome else None


class ExternalJobOperator(RelayOperator):
    """Hand a job to `poll_external_job` (by polling, callback or queue), wait for it without a worker, return
    its result, or fail with the service's words.

    The arguments are those of `poll_external_job`, which `producers.contract.PollRequest` describes; those of
    `RelayOperator` and of every operator come beside them. What is wrong by its form is refused when the DAG
    is read; of what is templated, what is wrong whatever the templates hold.

    XComs: ``return_value`` is what the expression `result` has picked, and there is none without it;
    ``job_id``, ``job_state`` (the service's word), ``then`` (the id of the trigger that followed), and
    ``dagrelay_request_id`` as soon as the request is accepted.

    A failed task that is tried again starts another job. One whose try was cut short (SIGKILL, a lost worker)
    follows the same job on. A job that somebody cancelled, or whose submission may have been taken
    (`SubmitUnknown`), fails without a retry.
    """

    template_fields: Sequence[str] = (
        *(name for name in FIELDS if name not in _NOT_TEMPLATES),
        "relay_conn_id",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = dict.fromkeys(_RENDERED_AS_JSON, "json")
    ui_color = "#e3f4ea"
    trigger_class = ExternalJobTrigger

    def __init__(
        self,
        *,
        service: str,
        path: str | None = None,
        via: Literal["http", "queue"] = "http",
        message: Any = None,
        url: str | None = None,
        method: Literal["GET", "POST"] = "GET",
        body: Any = None,
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
        submit: Submit | dict[str, Any] | None = None,
        submit_once: bool = False,
        find: Find | dict[str, Any] | None = None,
        job_id: str | None = None,
        state: str | None = None,
        success: list[str] | None = None,
        failure: list[str] | None = None,
        result: str | None = None,
        progress: str | None = None,
        reason: str | None = None,
        gone: list[int] | None = None,
        interval_s: float | None = None,
        growth: float | None = None,
        max_interval_s: float | None = None,
        jitter: float | None = None,
        timeout_s: float | None = None,
        heartbeat_s: float | None = None,
        max_errors: int | None = None,
        then: TriggerRequest | dict[str, Any] | None = None,
        on_cancel: Call | Publish | dict[str, Any] | None = None,
        wake_keys: list[str] | None = None,
        on_end: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.service = service
        self.path = path
        self.via = via
        self.message = message
        self.url = url
        self.method = method
        self.body = body
        self.headers = headers
        self.query = query
        self.submit = as_plain(submit)
        self.submit_once = submit_once
        self.find = as_plain(find)
        self.job_id = job_id
        self.state = state
        self.success = success
        self.failure = failure
        self.result = result
        self.progress = progress
        self.reason = reason
        self.gone = gone
        self.interval_s = interval_s
        self.growth = growth
        self.max_interval_s = max_interval_s
        self.jitter = jitter
        self.timeout_s = timeout_s
        self.heartbeat_s = heartbeat_s
        self.max_errors = max_errors
        self.then = as_plain(then)
        self.on_cancel = as_plain(on_cancel)
        self.wake_keys = wake_keys
        self.on_end = on_end
        with refused_for_good():
            check_when_read(given_in(self))

    def hand_over(self, client: RelayClient, request_id: str, context: Any, served: Served) -> None:
        """Hand the job over. Raises InvalidRequest for what is wrong now that templates are filled in."""
        client.enqueue(request_from(given_in(self)), task_id=request_id, by=asked_by(context))

    def outcome(self, context: Any, client: RelayClient, request_id: str) -> Any:
        """Return the job's result."""
        return take_outcome(context["ti"], client, request_id)


def take_outcome(ti: Any, client: RelayClient, request_id: str) -> Any:
    """Return the result of a job that has ended, and push what else is known of it. Raises what ended it."""
    try:
        outcome = ended_as(client, request_id)
    except DagrelayError:
        found = client.record(request_id)
        if found is not None and found.job_id:
            ti.xcom_push(key="job_id", value=found.job_id)
        raise
    if not isinstance(outcome, JobOutcome):  # a trigger, or a fan-out: whoever gave its id knows which
        return [one.to_message() for one in outcome] if isinstance(outcome, list) else outcome.to_message()
    xcoms = xcoms_of(outcome)
    result = xcoms.pop("return_value", None)
    for key, value in xcoms.items():
        ti.xcom_push(key=key, value=value)
    return result


def xcoms_of(outcome: JobOutcome) -> dict[str, Any]:
    """Return what becomes of an outcome in Airflow, by the XComs' keys."""
    found = {
        "return_value": outcome.result,
        "job_id": outcome.job_id,
        "job_state": outcome.state,
        "then": outcome.then,
    }
    return {key: value for key, value in found.items() if value is not None}


# The request, from what an operator was given


def given_in(operator: Any) -> dict[str, Any]:
    """Return the arguments of `poll_external_job` that an operator was given."""
    found = {name: getattr(operator, name, None) for name in FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def request_from(given: dict[str, Any]) -> PollRequest:
    """Return the request. Raises InvalidRequest.

    Numbers may be text, as templates make them, and what is text a number: as an XCom, or as what a DAG with
    `render_template_as_native_obj` makes of a template.
    """
    return poll_external_job.request(**{name: _as_asked(name, _listed(given[name])) for name in given})


def _listed(value: Any) -> Any:
    """Return a value with lists for what mapped tasks have returned, which Airflow reads lazily."""
    if isinstance(value, dict):
        return {key: _listed(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_listed(part) for part in value]
    return value


def _as_asked(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        if name in _TEXTS:
            return {key: _text(part) for key, part in value.items()}
        if name == "then":
            return {key: _number(key, part) for key, part in value.items()}
        if name in _CALLS:
            return {key: _as_asked(key, part) if key in _TEXTS else part for key, part in value.items()}
    if name == "job_id":
        return _text(value)
    if name == "gone" and isinstance(value, list):
        return [_number(name, part) for part in value]
    return _number(name, value)


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _number(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value) if name in _NUMBERS else int(value) if name in _WHOLE else value
    except ValueError:
        raise InvalidRequest(f"{name}: {value[:50]!r} is no number") from None


def as_plain(value: Any) -> Any:
    """Return a part of a request as a dict: Airflow fills in the templates of no other object."""
    if isinstance(value, TriggerRequest):
        return TriggerRequest.fields_of(value.to_message())
    return value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else value


# When the DAG is read


def check_when_read(given: dict[str, Any]) -> None:
    """Raise InvalidRequest for what is wrong whatever the templates hold.

    With stand-ins for what is not known yet, once such that hold nothing, once such that hold every
    placeholder: only what is wrong both times is wrong.
    """
    if not has_template(given):
        request_from(given)
        return
    bare, full = (_problems(_with_stand_ins(given, filling)) for filling in ("x", _ALL))
    if both := [problem for problem in bare if problem in full]:
        raise InvalidRequest("; ".join(both))


def _problems(given: dict[str, Any]) -> list[str]:
    try:
        request_from(given)
    except InvalidRequest as exc:
        return exc.reason.split("; ")
    return []


_ALL: Final = "x{job_id}{reference}{callback_url}"
_FULL: Final[dict[str, Any]] = {
    "path": "/x{job_id}{reference}",
    "url": "https://x/{job_id}{reference}",
    "message": {"x": "{reference}{callback_url}"},
    "body": {"x": "{job_id}{reference}"},
    "query": {"x": "{job_id}{reference}"},
    "submit": {"path": "/x", "body": "{reference}{callback_url}"},
    "find": {"path": "/{reference}"},
    "job_id": "x",
}
"""Of fields of which nothing is known: what holds every placeholder that it may. Others are left out."""

_TEMPLATE: Final = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)


def _with_stand_ins(given: dict[str, Any], filling: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        if not has_template(value):
            found[name] = value
        elif name == "service":
            found[name] = "x"
        elif name == "then" and isinstance(value, dict):
            found[name] = {"dag_id": "x"} | {k: part for k, part in value.items() if not has_template(part)}
        elif isinstance(value, dict) or (name in _PLACES and isinstance(value, str) and _literal(value)):
            found[name] = _stand_in(name, value, filling)
        elif filling == _ALL and name in _FULL:
            found[name] = _FULL[name]
    return found


def _stand_in(name: str, value: Any, filling: str) -> Any:
    """Return a part of a field as it may be: its own text as it is, and the filling for what is not known."""
    if isinstance(value, dict):
        return {_filled(key, filling): _stand_in(str(key), part, filling) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_stand_in("", part, filling) for part in value]
    if not has_template(value):
        return value
    if name in _NESTED:
        return _NESTED[name]
    text = _filled(value, filling.replace("{callback_url}", "") if name in _PLACES else filling)
    return "/" + text.removeprefix("/") if name == "path" else text


_PLACES: Final = ("path", "url")
_NESTED: Final = {"method": "GET", "job_id": "id"}
"""Of a call: what is neither a path nor a text that may hold a placeholder."""


def _filled(value: Any, filling: str) -> str:
    return _TEMPLATE.sub(filling, value) if isinstance(value, str) else filling


def _literal(text: str) -> str:
    """Return what a template holds beside its expressions."""
    return _TEMPLATE.sub("", text)
