"""The gateway's OpenAPI 3.1 description: what each route takes, and every answer that it gives.

Bodies are read by our own parsers, which the queue doors share, so their schemas are told here and come from
the contract.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response

from ..contract import PollRequest, TriggerRequest
from ..queues.message import Envelope
from .base import PROBLEM_JSON

_WHY: Final = {
    400: "The Idempotency-Key is malformed, or missing where it is required; or this is no HTTP",
    401: "No key, or one that is not known; always with the same text",
    403: "The key may not ask for this",
    404: "There is no such request, or the key does not cover it",
    408: "The body took too long",
    409: "It cannot be done now, or any more",
    413: "The body is too large",
    415: "The body is of another type",
    422: "The request is wrong: `detail` names the field, why, and what would be right",
    429: "Too many requests with this key",
    503: "Not taken, Redis does not answer or there is too much at once: send it again",
}
_RETRY_AFTER: Final = {
    "Retry-After": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}, "required": True}
}


def _problem(status: int) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": _WHY[status],
        "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    if status in (429, 503):
        answer["headers"] = _RETRY_AFTER
    if status == 401:
        answer["headers"] = {"WWW-Authenticate": {"schema": {"const": "Bearer"}, "required": True}}
    return answer


def _route(
    good: dict[int, dict[str, Any]], *problems: int, body: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Return what a route's decorator takes."""
    extra: dict[str, Any] = {"parameters": more.pop("parameters", [])}
    if body is not None:
        extra["requestBody"] = body
    if more.pop("security", True):
        extra["security"] = [{"key": []}]
    answers = good | {status: _problem(status) for status in problems}
    status = next(iter(good))
    # response_class: FastAPI is not to add a media type of its own.
    return {
        "responses": answers,
        "status_code": status,
        "openapi_extra": extra,
        "response_class": Response,
        **more,
    }


def _json(description: str, name: str, **more: Any) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"description": description, "content": {"application/json": {"schema": schema}}, **more}


_IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "One string in double quotes, which may be left out: sent again with it, a request is the "
    "same one, for 14 days after its end.",
    "schema": {
        "type": "string",
        "pattern": r'^("([ !#-\[\]-~]|\\["\\]){1,200}"|[!#-+\--:<-\[\]-~]{1,200})$',
    },
    "example": '"8e03978e-40d5-43dd-bc93-6894a57f9324"',
}
_LOCATION: Final = {
    "headers": {"Location": {"schema": {"type": "string", "format": "uri-reference"}, "required": True}}
}
_TASK_ID: Final = {"type": "string", "minLength": 1}
_ALWAYS: Final = (401, 403, 408, 413, 422, 429, 503)

POST_RUN: Final = _route(
    {202: _json("Accepted: it lies in Redis", "Accepted", **_LOCATION)},
    *(400, 415, *_ALWAYS),
    tags=["requests"],
    parameters=[_IDEMPOTENCY_KEY],
    body={"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Run"}}}},
)
POST_JOB: Final = _route(
    {202: _json("Accepted: it lies in Redis", "Accepted", **_LOCATION)},
    *(400, 415, *_ALWAYS),
    tags=["requests"],
    parameters=[_IDEMPOTENCY_KEY],
    body={
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Job"}}},
    },
)
POST_FAN_OUT: Final = _route(
    {202: _json("Accepted: all of it lies in Redis", "Accepted", **_LOCATION)},
    *(400, 409, 415, *_ALWAYS),
    tags=["requests"],
    parameters=[
        _IDEMPOTENCY_KEY,
        {
            "name": "on_error",
            "in": "query",
            "description": "`stop`: after the first that failed, nothing more is started",
            "schema": {"enum": ["continue", "stop"], "default": "continue"},
        },
        {
            "name": "wait",
            "in": "query",
            "description": "All of them wait for the ends of their runs",
            "schema": {"enum": ["true", "false"], "default": "false"},
        },
    ],
    body={
        "required": True,
        "description": "A trigger's fields as one JSON object on each line; at most 50,000",
        "content": {"application/x-ndjson": {"schema": {"type": "string", "minLength": 2}}},
    },
)
POST_EVENTS: Final = _route(
    {
        202: {
            "description": "Accepted: what the event, or each event of a batch, asks for lies in Redis",
            "content": {
                "application/json": {
                    "schema": {
                        "oneOf": [
                            {"$ref": "#/components/schemas/Accepted"},
                            {"type": "array", "items": {"$ref": "#/components/schemas/Accepted"}},
                        ]
                    }
                }
            },
        }
    },
    *(415, *_ALWAYS),
    tags=["requests"],
    body={
        "required": True,
        "description": "A CloudEvent 1.0. In binary mode its attributes are headers (`ce-id` and so on), and "
        "the body is its data.",
        "content": {
            "application/cloudevents+json": {"schema": {"$ref": "#/components/schemas/CloudEvent"}},
            "application/cloudevents-batch+json": {
                "schema": {
                    "type": "array",
                    "maxItems": 1000,
                    "items": {"$ref": "#/components/schemas/CloudEvent"},
                }
            },
        },
    },
)
GET_TASK: Final = _route(
    {200: _json("How it stands", "Task")},
    *(401, 403, 404, 408, 413, 429, 503),
    tags=["tasks"],
)
DELETE_TASK: Final = _route(
    {202: _json("Asked for; `state` is how it stood", "Cancelled")},
    *(401, 403, 404, 408, 409, 413, 429, 503),
    tags=["tasks"],
)
GET_EVENTS: Final = _route(
    {
        200: {
            "description": "Events `state` and at last `end`, each with a Task as its data",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "It has ended, and you have seen that: ask no more"},
    },
    *(401, 403, 404, 408, 413, 429, 503),
    tags=["tasks"],
    parameters=[
        {
            "name": "Last-Event-ID",
            "in": "header",
            "description": "The id of the last event that was seen: it is not told again",
            "schema": {"type": "string", "pattern": "^[0-9a-f]{0,20}$"},
        }
    ],
)
_OK: Final = _json("It does", "Health")
GET_LIVE: Final = _route({200: _OK}, 408, 413, tags=["health"], security=False)
GET_READY: Final = _route({200: _OK}, 408, 413, 503, tags=["health"], security=False)

_INSTANT: Final = {"type": "string", "format": "date-time"}
_STATES: Final = ["accepted", "waiting", "done", "failed", "cancelled"]
_TEXTS: Final = (
    *("dag_id", "dag_run_id", "connection", "key", "service", "job_id", "reference", "by", "waits_for"),
    *("seen", "progress", "reason", "error", "fan_out", "replay_of"),
)
_TIMES: Final = (
    *("accepted_at", "due_at", "next_at", "waiting_since", "submitted_at", "ended_at", "corrected_at"),
)


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the description of an application's routes."""
    found = get_openapi(
        title="Dagrelay gateway",
        version=app.version,
        summary="Start Airflow DAG runs, and jobs elsewhere, exactly once; see how they fare.",
        routes=app.routes,
    )
    parts = found.setdefault("components", {})
    parts["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "A key of `dagrelay keys new`"}
    }
    schemas = {**parts.get("schemas", {}), **_schemas()}
    # FastAPI's own words for a wrong parameter: here they are a Problem, as all others.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for operation in (one for path in found["paths"].values() for one in path.values()):
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]
    parts["schemas"] = schemas
    return found


def _schemas() -> dict[str, Any]:
    envelope = Envelope.model_json_schema()["properties"]
    for name in ("reply_to", "correlation_id"):
        envelope.pop(name)
    found: dict[str, Any] = {}
    for name, model in (("Run", TriggerRequest), ("Job", PollRequest)):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        schema["properties"] |= envelope
        schema["title"] = name
        if name == "Run":  # it is in the path
            schema["properties"].pop("dag_id")
            schema["required"] = [field for field in schema.get("required", []) if field != "dag_id"]
            if not schema["required"]:
                del schema["required"]
        schema["description"] = schema.get("description", "").split("\n\n")[0]
        found[name] = schema
    found["Problem"] = {
        "type": "object",
        "description": "RFC 9457",
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "errors": {"type": "array", "items": {"type": "object"}},
        },
        "required": ["type", "title", "status", "detail"],
    }
    found["Accepted"] = {
        "type": "object",
        "properties": {
            "id": _TASK_ID,
            "dag_run_id": {
                "type": ["string", "null"],
                "description": "The run's id in Airflow; null for a job",
            },
            "status_url": {"type": "string", "format": "uri-reference"},
            "events_url": {"type": "string", "format": "uri-reference"},
        },
        "required": ["id", "dag_run_id", "status_url", "events_url"],
        "additionalProperties": False,
    }
    found["Cancelled"] = {
        "type": "object",
        "properties": {"id": _TASK_ID, "state": {"enum": _STATES}},
        "required": ["id", "state"],
    }
    found["Health"] = {"type": "object", "properties": {"status": {"const": "ok"}}, "required": ["status"]}
    found["Task"] = {
        "type": "object",
        "properties": {
            "id": _TASK_ID,
            "state": {"enum": _STATES},
            "attempts": {"type": "integer"},
            "run": {"type": "object", "description": "The run that it ended in"},
            **{name: {"type": "string"} for name in _TEXTS},
            **dict.fromkeys(_TIMES, _INSTANT),
            "history": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"at": _INSTANT, "what": {"type": "string"}},
                    "required": ["at", "what"],
                },
            },
        },
        "required": ["id", "state"],
    }
    text = {"type": "string", "minLength": 1, "maxLength": 2000}
    found["CloudEvent"] = {
        "type": "object",
        "description": "https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md",
        "properties": {
            "specversion": {"const": "1.0"},
            "id": text,
            "source": text,
            "type": text,
            "datacontenttype": {"type": ["string", "null"]},
            "subject": {"type": ["string", "null"]},
            "time": {"type": ["string", "null"]},
            "data": {},
        },
        "required": ["specversion", "id", "source", "type"],
    }
    return found
