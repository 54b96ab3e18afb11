"""What travels, for machines: the JSON Schema of all messages and the AsyncAPI document, from the contract.

`python -m producers.message_docs FOLDER` writes `messages.schema.json` and `asyncapi.json` into a folder;
`make messages` does so for `docs/`. The texts are those of the docstrings of the requests. `docs/messages.md`
tells the same to people.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from . import contract
from .contract import PollRequest, TriggerRequest
from .queues.message import CLOUD_EVENT_JSON, JOB_EVENT, MAX_MESSAGE_BYTES, TRIGGER_EVENT, Envelope

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

# Patterns as JavaScript and Python both read them: where Python's `$` would let a line break pass, `(?!\n)`
# refuses it. What only code can check (a date that exists, a credential by its name) is told in words.
_END: Final = r"$(?!\n)"


def _whole(pattern: re.Pattern[str]) -> str:
    return f"^{pattern.pattern.removesuffix(chr(92) + 'Z')}{_END}"


_TEXT: Final = {"pattern": r"^[^\u0000]*$"}
_INSTANT: Final = {
    "format": "date-time",
    "pattern": rf"^[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}[T ][0-9]{{2}}:[0-9]{{2}}(:[0-9]{{2}}([.][0-9]{{1,9}})?)?"
    rf"(Z|[+-][0-9]{{2}}:[0-9]{{2}}){_END}",
}
_NAME: Final = {"pattern": _whole(contract._CONNECTION)}
_DAG: Final = {"pattern": rf"^(?![.]{{1,2}}$){_whole(contract._DAG_ID)[1:]}"}
_RUN_ID: Final = {
    "maxLength": contract.MAX_RUN_ID_LENGTH,
    "pattern": rf"^(?!({'|'.join(contract._RESERVED_RUN_IDS)})|.*[.][.]|[.~]$){_whole(contract._RUN_ID)[1:]}",
}
_PATH_PART: Final = rf"(?:[!\"$-\[\]-z|~]|{contract._PLACE.pattern})*"
_PATH: Final = {"pattern": rf"^/(?!/){_PATH_PART}{_END}"}
_URL: Final = {
    "pattern": r"^https?://([A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?"
    rf"(/(?!/){_PATH_PART}|[?]{_PATH_PART})?{_END}"
}
_HEADERS: Final = {
    "propertyNames": {"pattern": _whole(contract._HEADER_NAME)},
    "additionalProperties": {"type": "string", "pattern": _whole(contract._HEADER_VALUE)},
}
_TRIGGER_REF: Final = {"$ref": "#/$defs/TriggerRequest"}
_OF_ITS_MODEL: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "TaskInstance": {
        "dag_run_id": {**_TEXT, "not": {"pattern": f"^([.]{{1,2}}|~){_END}"}},
        "task_id": _DAG,
    }
}
"""The same as `_REFINED`, where a field of that name means something else in this model."""

_REFINED: Final[Mapping[str, Mapping[str, Any]]] = {
    "dag_id": _DAG,
    "conf": {"$ref": "#/$defs/Conf"},
    "dag_run_id": _RUN_ID,
    "connection": _NAME,
    "service": _NAME,
    "on_end": {"items": {"type": "string", "minLength": 1, "maxLength": 100, **_NAME}},
    **dict.fromkeys(("logical_date", "run_after", "eta"), _INSTANT),
    **dict.fromkeys(
        (
            "key",
            "note",
            "result_from",
            "job_id",
            "id",
            "reply_to",
            "correlation_id",
            "traceparent",
            "tracestate",
        ),
        _TEXT,
    ),
    "success": {"items": {"type": "string", **_TEXT}},
    "failure": {"items": {"type": "string", **_TEXT}},
    "wake_keys": {
        "items": {
            "type": "string",
            "minLength": 1,
            "maxLength": 250,
            **_TEXT,
            "not": {"pattern": f"^{contract.ANSWER_KEYS}"},
        }
    },
    "path": _PATH,
    "url": _URL,
    "headers": _HEADERS,
    "then": _TRIGGER_REF,
    "body": {"$ref": "#/$defs/Value"},
    "message": {"$ref": "#/$defs/Value"},
}
"""What the models check in code, by the name of the field."""


def _texts_of(model: type[BaseModel]) -> dict[str, str]:
    """Return what a model's docstring says of its fields: a line of names, and indented lines below it."""
    found: dict[str, str] = {}
    for names, text in re.findall(r"^(\w+(?:, \w+)*)\n((?:    .+\n?)+)", inspect.getdoc(model) or "", re.M):
        for name in names.split(", "):
            found[name] = " ".join(text.replace("``", "`").split())
    return found


def _object(*models: type[BaseModel], rules: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the schema of an object with the fields of these models, and of no others."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    for model in models:
        schema = model.model_json_schema(ref_template="#/$defs/{model}")
        texts = _texts_of(model)
        for name, given in schema["properties"].items():
            own = _refined(name, _plain(given), _OF_ITS_MODEL.get(model.__name__, {}))
            if name in texts:
                own["description"] = texts[name]
            properties[name] = own
        required += schema.get("required", [])
    return {
        "type": "object",
        "description": (inspect.getdoc(models[0]) or "")
        .partition("\n")[0]
        .partition(". ")[0]
        .removesuffix(".")
        + ".",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **({"allOf": rules} if rules else {}),
    }


def _plain(schema: Any) -> Any:
    """Return a schema without titles, which only repeat the names."""
    if isinstance(schema, dict):
        return {name: _plain(part) for name, part in schema.items() if name != "title"}
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    return schema


def _refined(
    name: str, schema: dict[str, Any], of_its_model: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    more = of_its_model.get(name) or _REFINED.get(name)
    if more is None:
        return schema
    kinds = schema.get("anyOf")
    if "$ref" in more:
        kept = {key: schema[key] for key in ("default",) if key in schema}
        return {"anyOf": [more, {"type": "null"}], **kept} if "default" in kept else {**more, **kept}
    if kinds is None:
        return {**schema, **more}
    return {**schema, "anyOf": [kind if kind == {"type": "null"} else {**kind, **more} for kind in kinds]}


def _given(name: str, kind: str = "string") -> dict[str, Any]:
    """Return the schema of an object in which a field has a value other than null."""
    return {"required": [name], "properties": {name: {"type": kind}}}


_WAITS: Final = {"required": ["wait"], "properties": {"wait": {"const": True}}}
_OF_WAITING: Final = {
    "if": {"not": _WAITS},
    "then": {
        "properties": {
            name: {"const": TriggerRequest.model_fields[name].get_default()}
            for name in ("wait_timeout_s", "result_from", "stop_run")
        }
    },
}
_OF_TIME: Final = {"not": {"allOf": [_given("countdown", "number"), _given("eta")]}}
_OVER_A_QUEUE: Final = {"required": ["via"], "properties": {"via": {"const": "queue"}}}
_NONE: Final = {"type": "null"}
_OF_JOBS: Final = [
    {
        "if": _OVER_A_QUEUE,
        "then": {
            "required": ["message"],
            "properties": {
                **{name: {"const": PollRequest.defaults[name]} for name in contract._HTTP_ALONE},
                "message": {"not": _NONE},
                "on_cancel": {"not": {"$ref": "#/$defs/Call"}},
            },
        },
        "else": {
            "properties": {"message": _NONE, "on_cancel": {"not": {"$ref": "#/$defs/Publish"}}},
            "allOf": [
                {"not": {"allOf": [_given("path"), _given("url")]}},
                {"not": {"allOf": [_given("submit", "object"), _given("job_id")]}},
                {
                    "if": {"not": _given("submit", "object")},
                    "then": {"properties": {"submit_once": {"const": False}, "find": _NONE}},
                },
            ],
        },
    },
]


def _defs() -> dict[str, Any]:
    """Return the schemas of everything that travels, by name."""
    parts = PollRequest.model_json_schema(ref_template="#/$defs/{model}")["$defs"]
    models = {model.__name__: model for model in _models_below(contract._Request)}
    return {
        "Trigger": _object(TriggerRequest, Envelope, rules=[_OF_WAITING, _OF_TIME]),
        "Job": _object(PollRequest, Envelope, rules=[*_OF_JOBS, _OF_TIME]),
        "CloudEvent": _cloud_event(),
        "TriggerRequest": _object(TriggerRequest, rules=[_OF_WAITING]),
        **{name: _object(models[name]) for name in sorted(parts)},
        "Conf": {
            "description": "A run's configuration. As JSON at most 1,000,000 bytes, nested at most 64 "
            "levels; integers within 64 bits.",
            "type": "object",
            "propertyNames": _TEXT,
            "additionalProperties": {"$ref": "#/$defs/Value"},
        },
        "Value": {
            "description": "Any JSON without NUL characters.",
            "anyOf": [
                {"type": ["null", "boolean", "number"]},
                {"type": "string", **_TEXT},
                {"type": "array", "items": {"$ref": "#/$defs/Value"}},
                {
                    "type": "object",
                    "propertyNames": _TEXT,
                    "additionalProperties": {"$ref": "#/$defs/Value"},
                },
            ],
        },
        "Answer": _ANSWER,
        "Told": _TOLD,
    }


def _models_below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for below in model.__subclasses__():
        yield below
        yield from _models_below(below)


def _cloud_event() -> dict[str, Any]:
    def holds(kind: str, name: str) -> dict[str, Any]:
        return {
            "if": {"properties": {"type": {"const": kind}}, "not": {"required": ["data_base64"]}},
            "then": {"required": ["data"], "properties": {"data": {"$ref": f"#/$defs/{name}"}}},
        }

    text = {"type": "string", "minLength": 1, "maxLength": 2000, **_TEXT}
    return {
        "description": "A CloudEvent 1.0 in its JSON form. The types dagrelay.trigger and dagrelay.job hold "
        "a trigger or a job in `data`; all others go by the routing rules of whoever runs the door.",
        "type": "object",
        "properties": {
            "specversion": {"const": "1.0"},
            "id": {
                **text,
                "description": "With `source` the name of the event: the same twice is one request.",
            },
            "source": text,
            "type": text,
            "data": {},
            "data_base64": {"type": "string", "description": "The data as base64, instead of `data`."},
        },
        "required": ["specversion", "id", "source", "type"],
        "additionalProperties": {
            "anyOf": [
                {"type": ["null", "boolean", "integer"]},
                {"type": "string", "maxLength": 2000, **_TEXT},
            ]
        },
        "allOf": [
            holds(TRIGGER_EVENT, "Trigger"),
            holds(JOB_EVENT, "Job"),
            {"not": {"required": ["data", "data_base64"]}},
        ],
    }


def _text_or_left_out(told: str) -> dict[str, Any]:
    return {"type": "string", "description": told}


_ANSWER: Final[dict[str, Any]] = {
    "description": "What is told to the place that a message names as `reply_to`; without what is not known.",
    "type": "object",
    "properties": {
        "id": {"type": ["string", "null"], "description": "The task id; null for a refusal."},
        "what": {
            "enum": ["accepted", "refused", "progress", "ended", "corrected"],
            "description": "corrected: what ended as unknown has a run.",
        },
        "state": {
            "enum": ["accepted", "waiting", "done", "failed", "cancelled", "refused", "unknown", "progress"]
        },
        "correlation_id": {"type": ["string", "null"], "description": "As the message had it."},
        "at": {"type": "string", "format": "date-time", "description": "When that was, in UTC."},
        "dag_id": _text_or_left_out("Of a trigger."),
        "dag_run_id": _text_or_left_out("Of a trigger."),
        "service": _text_or_left_out("Of a job."),
        "job_id": _text_or_left_out("Of a job, by the service."),
        "run": {"type": "object", "description": "Of a trigger that is done: the run in Airflow."},
        "result": {"description": "Of a job that is done: what the service told."},
        "job_state": _text_or_left_out("Of a job that is done: the service's word."),
        "then": _text_or_left_out("Of a job that is done: the task id of the trigger that followed."),
        "seen": {"description": "Of a progress: the last state that was seen."},
        "progress": {"description": "Of a progress: how far it is."},
        "error": _text_or_left_out("Why it failed, was cancelled or refused: the name of an error."),
        "reason": _text_or_left_out("Its words."),
        "message_id": _text_or_left_out("Of a refusal: how the message was named."),
    },
    "required": ["id", "what", "state", "correlation_id", "at"],
}


_INSTANT_TOLD: Final = {"type": "string", "format": "date-time"}
_TOLD: Final[dict[str, Any]] = {
    "description": "What a hook is told when a request has ended; without what is not known. Fields may be "
    "added.",
    "type": "object",
    "properties": {
        "type": {
            "enum": ["dagrelay.request.ended", "dagrelay.request.corrected"],
            "description": "corrected: what ended as unknown has a run.",
        },
        "timestamp": {**_INSTANT_TOLD, "description": "When that was."},
        "data": {
            "type": "object",
            "properties": {
                "id": {"type": "string", "description": "The task id."},
                "state": {"enum": ["done", "failed", "cancelled"]},
                **{
                    name: {"type": "string"}
                    for name in (
                        *("dag_id", "dag_run_id", "key", "connection", "service", "job_id", "job_state"),
                        *("replay_of", "by", "error", "reason"),
                    )
                },
                "attempts": {"type": "integer"},
                "run": {"type": "object", "description": "The run in Airflow, without its result."},
                "accepted_at": _INSTANT_TOLD,
                "ended_at": _INSTANT_TOLD,
                "corrected_at": _INSTANT_TOLD,
            },
            "required": ["id", "state"],
        },
    },
    "required": ["type", "timestamp", "data"],
}


def message_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a message that a door takes; all that travels is in its `$defs`."""
    return {
        "$schema": DIALECT,
        "$id": f"urn:dagrelay:messages:{contract.VERSION}",
        "title": "Dagrelay messages",
        "description": f"What a door takes, as JSON of up to {MAX_MESSAGE_BYTES} bytes: docs/messages.md.",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in ("Trigger", "Job", "CloudEvent")],
        "$defs": _defs(),
    }


EXAMPLE_TRIGGER: Final[dict[str, Any]] = {
    "dag_id": "daily_sales",
    "conf": {"day": "2026-11-20"},
    "key": "sales-2026-11-20",
    "reply_to": "replies.billing",
    "correlation_id": "invoice-17",
}
EXAMPLE_JOB: Final[dict[str, Any]] = {
    "service": "render",
    "submit": {"path": "/jobs", "body": {"scene": 7}},
    "path": "/jobs/{job_id}",
    "then": {"dag_id": "publish"},
}
EXAMPLE_EVENT: Final[dict[str, Any]] = {
    "specversion": "1.0",
    "type": "com.example.order.placed",
    "source": "/shops/7",
    "id": "1001",
    "data": {"order": 1001, "total": 120},
}
EXAMPLE_ANSWER: Final[dict[str, Any]] = {
    "id": "0c5c0bd3-9f0f-5a57-8d0c-0a5a5f0fd3a2",
    "what": "ended",
    "state": "done",
    "correlation_id": "invoice-17",
    "at": "2026-11-20T08:15:02.113+00:00",
    "dag_id": "daily_sales",
    "dag_run_id": "relay__sales-2026-11-20",
}

EXAMPLE_TOLD: Final[dict[str, Any]] = {
    "type": "dagrelay.request.ended",
    "timestamp": "2026-11-20T08:15:02.113+00:00",
    "data": {
        "id": "0c5c0bd3-9f0f-5a57-8d0c-0a5a5f0fd3a2",
        "state": "done",
        "dag_id": "daily_sales",
        "dag_run_id": "relay__sales-2026-11-20",
    },
}

# Address, protocol, binding, and in words how one sends there.
_DOORS: Final[Mapping[str, tuple[str, str, dict[str, Any], str]]] = {
    "redis": (
        "dag-triggers",
        "redis",
        {},
        "A stream: XADD with the JSON as its field `data`. Further fields are headers; `id`, `reply_to`, "
        "`correlation_id` and `content_type` are understood.",
    ),
    "rabbitmq": (
        "dag-triggers",
        "amqp",
        {
            "amqp": {
                "is": "queue",
                "queue": {"name": "dag-triggers", "durable": True},
                "bindingVersion": "0.3.0",
            }
        },
        "A queue: the JSON as the body; message_id, reply_to, correlation_id, content_type and headers are "
        "understood. Publish persistent messages, with publisher confirms.",
    ),
    "sqs": (
        "dag-triggers",
        "sqs",
        {},
        "A queue: the JSON as the body, headers as message attributes.",
    ),
    "kafka": (
        "dag-triggers",
        "kafka",
        {"kafka": {"topic": "dag-triggers", "bindingVersion": "0.5.0"}},
        "A topic: the JSON as the value; headers are understood, `id` among them.",
    ),
    "tcp": (
        "/",
        "tcp",
        {},
        "A line of JSON in, a line out: `OK <id>`, `ERR <reason>` or `RETRY <seconds> <reason>`. Where "
        "the door has keys the first line is `AUTH <token>`.",
    ),
    "http": (
        "/v1/events",
        "http",
        {},
        "POST of a CloudEvent. Triggers and jobs have routes of their own: see the gateway's OpenAPI page.",
    ),
}
_SERVERS: Final[Mapping[str, tuple[str, str]]] = {
    "redis": ("redis.example:6379", "userPassword"),
    "rabbitmq": ("rabbitmq.example:5672", "userPassword"),
    "sqs": ("sqs.eu-central-1.example", "awsSignature"),
    "kafka": ("kafka.example:9092", "kafkaPassword"),
    "tcp": ("dagrelay.example:7700", "tokenLine"),
    "http": ("dagrelay.example:8080", "token"),
}


def asyncapi() -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document: every door as a channel. Hosts and names are examples."""
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for door, (address, protocol, bindings, how) in _DOORS.items():
        kinds = ("event",) if door == "http" else ("trigger", "job", "event")
        channels[door] = {
            "address": address,
            "description": how,
            "servers": [{"$ref": f"#/servers/{door}"}],
            "messages": {kind: {"$ref": f"#/components/messages/{kind}"} for kind in kinds},
            **({"bindings": bindings} if bindings else {}),
        }
        operations[f"ask_{door}"] = {
            "action": "receive",
            "channel": {"$ref": f"#/channels/{door}"},
            "summary": f"Dagrelay takes what is asked for over {protocol}",
            "messages": [{"$ref": f"#/channels/{door}/messages/{kind}"} for kind in kinds],
        }
        if door not in ("tcp", "http"):
            channels[f"{door}_replies"] = {
                "address": None,
                "description": "Where the message's `reply_to` says.",
                "servers": [{"$ref": f"#/servers/{door}"}],
                "messages": {"answer": {"$ref": "#/components/messages/answer"}},
            }
            operations[f"ask_{door}"]["reply"] = {
                "address": {"location": "$message.payload#/reply_to"},
                "channel": {"$ref": f"#/channels/{door}_replies"},
                "messages": [{"$ref": f"#/channels/{door}_replies/messages/answer"}],
            }
    channels["hooks"] = {
        "address": None,
        "description": "A POST, signed as Standard Webhooks, to each hook that a request names in `on_end`.",
        "servers": [{"$ref": "#/servers/receiver"}],
        "messages": {"told": {"$ref": "#/components/messages/told"}},
    }
    operations["tell_hooks"] = {
        "action": "send",
        "channel": {"$ref": "#/channels/hooks"},
        "summary": "Dagrelay tells hooks how a request has ended",
        "messages": [{"$ref": "#/channels/hooks/messages/told"}],
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Dagrelay",
            "version": str(contract.VERSION),
            "description": "Start and follow DAG runs of Airflow and outside jobs by a message. What this "
            "cannot say is in docs/messages.md: what becomes of a message that comes twice, or is wrong.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            name: {
                "host": host,
                "protocol": _DOORS[name][1],
                "security": [{"$ref": f"#/components/securitySchemes/{scheme}"}],
            }
            for name, (host, scheme) in _SERVERS.items()
        }
        | {"receiver": {"host": "receiver.example", "protocol": "https"}},
        "channels": channels,
        "operations": operations,
        "components": {
            "messages": {
                "trigger": _message("Trigger", EXAMPLE_TRIGGER),
                "job": _message("Job", EXAMPLE_JOB),
                "event": {**_message("CloudEvent", EXAMPLE_EVENT), "contentType": CLOUD_EVENT_JSON},
                "answer": _message("Answer", EXAMPLE_ANSWER),
                "told": _message("Told", EXAMPLE_TOLD),
            },
            "securitySchemes": {
                "userPassword": {"type": "userPassword"},
                "kafkaPassword": {"type": "scramSha512"},
                "awsSignature": {
                    "type": "userPassword",
                    "description": "AWS credentials, signature version 4.",
                },
                "token": {"type": "http", "scheme": "bearer", "description": "`dagrelay keys new`"},
                "tokenLine": {"type": "apiKey", "in": "password", "description": "AUTH <token>, as a line"},
            },
            "schemas": json.loads(json.dumps(_defs()).replace('"#/$defs/', '"#/components/schemas/')),
        },
    }


def _message(name: str, example: dict[str, Any]) -> dict[str, Any]:
    correlated = name not in ("CloudEvent", "Told")
    return {
        "name": name,
        "payload": {"$ref": f"#/components/schemas/{name}"},
        **({"correlationId": {"location": "$message.payload#/correlation_id"}} if correlated else {}),
        "examples": [{"payload": example}],
    }


def main(arguments: list[str]) -> None:
    """Write the documents into a folder."""
    folder = Path(arguments[0])
    for name, document in documents().items():
        (folder / name).write_text(document)


def documents() -> dict[str, str]:
    """Return the documents by the names of their files."""
    made = {"messages.schema.json": message_schema(), "asyncapi.json": asyncapi()}
    return {
        name: json.dumps(document, indent=2, ensure_ascii=False) + "\n" for name, document in made.items()
    }


if __name__ == "__main__":
    main(sys.argv[1:])
