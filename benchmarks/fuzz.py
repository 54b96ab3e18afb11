"""Whatever comes in, a parser says InvalidRequest or takes it: many wrong inputs for each, in bounded time.

Most inputs are valid messages with something wrong in them: a value of another kind, a field too many, a
broken byte; some are bytes alone. `ARGS='--inputs 1000000'` is the whole run, `--only read` one parser.
Anything but a refusal ends the run with 1 and prints the input as Python writes it.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from producers.client import RelayClient, check_observation
from producers.contract import PollRequest, TriggerRequest
from producers.door import Door
from producers.errors import InvalidRequest
from producers.gateway.idempotency import parsed
from producers.queues.listener import said_by
from producers.queues.message import MAX_REASON_LENGTH, Envelope, Incoming, event_of, json_value, read
from producers.routing import read_rules
from producers.settings import ProducerSettings
from producers.socket_listener import LineReader, LineTooLong
from producers.stores.answers import progress_in, read_wake, rules_of
from producers.stores.callbacks import Secrets
from producers.stores.heard import heard
from producers.webhooks import OutOfTime, SignatureRefused, delivery_of, read_webhooks, verify, wake_key

from ._report import Bound, report, say

INPUTS: Final = 20_000
SLOWEST_MS: Final = 500.0
"""What one input of a few kilobytes may take. A machine that does other work shows some of it here."""
STUCK_S: Final = 60

CANARY: Final = "c4n4ry"
"""Stands as a value in every conf: no refusal may quote it."""

TRIGGER: Final[dict[str, Any]] = {
    "dag_id": "daily_sales",
    "conf": {"day": CANARY, "n": [1, 2.5, None, {"deep": CANARY}]},
    "key": "sales-2026-11-20",
    "connection": "default",
    "wait": True,
    "result_from": "total",
    "window": 3,
    "on_end": ["billing"],
    "id": "m-1",
    "countdown": 5,
    "reply_to": "replies.a",
}
JOB: Final[dict[str, Any]] = {
    "service": "render",
    "path": "/jobs/{job_id}?x=1",
    "submit": {
        "path": "/jobs",
        "body": {"ref": "{reference}", "x": CANARY},
        "headers": {"X-A": "b"},
        "job_id": "id",
    },
    "find": {"path": "/jobs?ref={reference}", "job_id": "jobs[0].id"},
    "state": "status.phase",
    "success": ["done"],
    "gone": [404],
    "interval_s": 1,
    "then": {"dag_id": "publish", "conf": {"x": CANARY}},
    "on_cancel": {"path": "/jobs/{job_id}", "method": "DELETE"},
    "wake_keys": ["a"],
    "eta": "2030-01-01T00:00:00Z",
    "correlation_id": "c",
}
EVENT: Final[dict[str, Any]] = {
    "specversion": "1.0",
    "type": "com.example.order",
    "source": "/shops/7",
    "id": "1",
    "subject": "s",
    "time": "2026-11-20T00:00:00Z",
    "data": {"id": 7, "kind": "a", "total": 120, "lines": [{"x": CANARY}]},
}
TRIGGER_EVENT: Final = {**EVENT, "type": "dagrelay.trigger", "data": TRIGGER}
SEEDS: Final = (TRIGGER, JOB, EVENT, TRIGGER_EVENT, {**EVENT, "type": "dagrelay.job", "data": JOB})
FIELDS: Final = sorted(
    {
        *TriggerRequest.model_fields,
        *PollRequest.model_fields,
        *Envelope.model_fields,
        *EVENT,
        "data_base64",
        "x",
    }
)
ODD: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 2**63, -(2**63) - 1, 10**300, 1e308, -0.0, 0.5, 5.0),
    *(
        "",
        "a",
        " ",
        "\0",
        "\n",
        "\ud800",
        "\udfff",
        "ü",
        "🦉",
        "a" * 251,
        "a" * 1001,
        "a" * 5000,
        "null",
        "{}",
    ),
    *(
        "..",
        "../x",
        "//h",
        "/a b",
        "/{job_id}",
        "{",
        "}",
        "{callback_url}",
        "http://[",
        "http://u:p@h/",
        "http://h/x",
    ),
    *(
        "2030-01-01",
        "9999-12-31T23:59:59-14:00",
        "0001-01-01T00:00:00+14:00",
        "2030-13-01T00:00:00Z",
        "20300101T00Z",
    ),
    *(
        "[[",
        "a[",
        "`",
        "`{`",
        "@" * 900,
        "[@,@]|" * 150 + "@",
        "join(', ', @)",
        "a.*.b[?c=='d']",
        "sort_by(@,&a)",
    ),
    *(
        "max_active_runs",
        "reuse",
        "hold",
        "queue",
        "http",
        "GET",
        "1.0",
        "0.3",
        "dagrelay.trigger",
        "dagrelay.job",
    ),
    *("e30=", "%%%", "////", "=", "text/plain", "application/json", "application/xml"),
    *(
        [],
        [[]],
        {},
        [None],
        ["a"] * 60,
        [1] * 30,
        {"a": 1},
        {"": {}},
        {"\0": 1},
        {"\ud800": 1},
        {"a\nb": 2**70},
    ),
    *({"authorization": "x"}, {"x\ny": "z"}, {"token": "x"}, {"path": "/x"}, {"message": 1}, {"dag_id": "a"}),
)
DEEP: Final = "[" * 70 + "]" * 70
PIECES: Final = (
    *(
        b"\x00",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"\\u0000",
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
    ),
    *(b":", b"NaN", b"-Infinity", b"1e999", b"9" * 500, b"-", b"true", b"null", b'"a":1,', b'"dag_id":"b",'),
    *(
        b"[" * 2000,
        b'{"a":' * 1100,
        DEEP.encode(),
        b'"specversion"',
        b"\r\n",
        b"\n",
        b" " * 50,
        b"\xef\xbb\xbf",
    ),
)
TYPES: Final = (
    *(
        "",
        "",
        "application/json",
        "application/cloudevents+json",
        "application/cloudevents+json; charset=utf-8",
    ),
    *(
        "application/cloudevents-batch+json",
        "application/cloudevents+xml",
        "text/plain",
        "\ud800",
        ";;",
        "A/B",
    ),
)


class Inputs:
    """Wrong messages, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - no secret

    def fields(self) -> dict[str, Any]:
        """Return a valid message with up to three changes."""
        r = self.random
        found = copy.deepcopy(r.choice(SEEDS))
        for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
            where: Any = found
            while True:
                keys = list(where) if isinstance(where, dict) else list(range(len(where)))
                below = [key for key in keys if isinstance(where[key], dict | list) and where[key]]
                if not below or r.random() < 0.4:
                    break
                where = where[r.choice(below)]
            if isinstance(where, dict) and r.random() < 0.3:
                where[r.choice(FIELDS)] = copy.deepcopy(r.choice(ODD))
            elif keys and r.random() < 0.2:
                del where[r.choice(keys)]
            elif keys:
                where[r.choice(keys)] = copy.deepcopy(r.choice(ODD))
        return found

    def body(self) -> bytes:
        """Return a message as bytes: whole, with broken bytes, or bytes alone."""
        r = self.random
        if r.random() < 0.05:
            return r.randbytes(r.choice((0, 1, 2, 7, 40, 300)))
        given = self.fields()
        body = json.dumps(given, ensure_ascii=True).encode()
        if r.random() < 0.5:
            return body
        for _ in range(r.choice((1, 1, 2, 5))):
            at = r.randrange(len(body) + 1)
            kind = r.random()
            if kind < 0.5:
                body = body[:at] + r.choice(PIECES) + body[at:]
            elif kind < 0.7:
                body = body[:at] + body[at + r.choice((1, 2, 20)) :]
            elif kind < 0.85:
                body = body[:at]
            else:
                body = body[:at] + bytes((r.randrange(256),)) + body[at + 1 :]
        return body

    def text(self) -> str:
        """Return what a header may hold, and what none may."""
        r = self.random
        kind = r.random()
        if kind < 0.5:
            return str(r.choice(ODD))
        if kind < 0.8:
            return r.randbytes(r.randrange(12)).decode("latin-1")
        return "%" + r.choice(("", "4", "41", "zz", "C3%BC", "FF", "00")) + str(r.choice(ODD))

    def message(self) -> Incoming:
        """Return a message with what lies around it."""
        r = self.random
        headers = {}
        if r.random() < 0.5:
            prefix = r.choice(("ce-", "ce_", "cloudevents:", "cloudevents_"))
            for name in ("specversion", "type", "source", "id", "subject", "time", "", "é"):
                if r.random() < 0.8:
                    plain = EVENT.get(name)
                    headers[prefix + name] = (
                        plain if isinstance(plain, str) and r.random() < 0.8 else self.text()
                    )
            if r.random() < 0.3:
                headers[prefix + "type"] = r.choice(("dagrelay.trigger", "dagrelay.job"))
        for name in ("traceparent", "tracestate"):
            if r.random() < 0.2:
                headers[name] = self.text()
        around = {name: self.text() for name in ("id", "reply_to", "correlation_id") if r.random() < 0.2}
        return Incoming(self.body(), content_type=r.choice(TYPES), headers=headers, **around)


@dataclass(frozen=True)
class Parser:
    """What is tried: how an input is made, what is done with it, and how else it may refuse."""

    make: Callable[[Inputs], Any]
    run: Callable[[Any], Any]
    refuses: tuple[type[Exception], ...] = (InvalidRequest,)


RULES: Final = read_rules(
    {
        "rules": [
            {"type": "com.example.order", "filter": "data.total > `100`", "dag_id": "a", "key": "data.id"},
            {
                "type": "com.*",
                "dag_id_from": "join('_', ['p', data.kind])",
                "conf": "{x: data.lines[].x, s: source}",
            },
            {"type": "*", "source": "/shops/*", "dag_id": "b", "priority": 9},
            {"type": "x*", "dag_id": "c"},
        ]
    }
)
HOOKS: Final = read_webhooks(
    {
        "DAGRELAY_WEBHOOK_A": '{"scheme": "standard", "secrets": ["whsec_%s"], "routes": true}'
        % ("QUFB" * 8),
        "DAGRELAY_WEBHOOK_B": '{"scheme": "github", "secrets": ["%s"], "message": true}' % ("s" * 32),
        "DAGRELAY_WEBHOOK_C": '{"scheme": "stripe", "secrets": ["%s"], "routes": true}' % ("s" * 32),
        "DAGRELAY_WEBHOOK_D": '{"scheme": "hmac", "header": "x-sig", "secrets": ["%s"], "wake": "data.id"}'
        % ("s" * 32),
    }
)[0]
SIGNED: Final = (
    "webhook-id",
    "webhook-timestamp",
    "webhook-signature",
    "x-hub-signature-256",
    "stripe-signature",
)


def signed(inputs: Inputs) -> tuple[Any, dict[str, str], bytes]:
    """Return a delivery to one of the hooks, whose signature is hardly ever right."""
    r = inputs.random
    given = ("1700000000", "t=1700000000,v1=00", "v1,AAAA v1,", "sha256=" + "0" * 64, "t=,v1=,t=1", "msg_1")
    headers = {
        name: r.choice(given) if r.random() < 0.7 else inputs.text()
        for name in (*SIGNED, "x-sig", "x-github-event", "x-github-delivery")
        if r.random() < 0.8
    }
    return r.choice(list(HOOKS.values())), headers, inputs.body()


def delivered(given: tuple[Any, dict[str, str], bytes]) -> None:
    """Read a delivery as if its signature were right; that covers its id, where the scheme has one."""
    hook, headers, body = given
    found = delivery_of(hook, {**headers, "webhook-id": "msg_1"}, body)
    if hook.does == "wake":
        wake_key(hook, found.payload)
    else:
        RULES.order(found.as_event())


def routed(message: Incoming) -> None:
    """Read an event, and what it asks for."""
    event = event_of(message)
    if event is not None:
        RULES.order(event)


CALLED_BACK: Final = rules_of(
    {"state": "data.kind", "progress": "data.total", "result": "data", "reason": "conf.day"}
)
SECRETS: Final = Secrets((b"s" * 32,))


def called_back(body: bytes) -> None:
    """Read what a service says of its job."""
    value = json_value(body)
    check_observation(value)
    read_wake(CALLED_BACK, value, lambda text: text)
    progress_in(CALLED_BACK, value)
    heard(value)


def token(inputs: Inputs) -> str:
    """Return a token of a callback in which something may be wrong."""
    r = inputs.random
    given = SECRETS.token(r.choice(("a", "task-1", "ü")), r.choice((0.0, 2e9)))
    at = r.randrange(len(given) + 1)
    return given if r.random() < 0.1 else given[:at] + inputs.text() + given[at + r.randrange(3) :]


def lines(pieces: list[bytes]) -> None:
    """Read lines in pieces: what goes in comes out, cut at its line ends."""
    reader, limit = LineReader(), 300
    for piece in pieces:
        reader.feed(piece)
        while (line := reader.next(limit)) is not None:
            if b"\n" in line or len(line) > limit or not line.strip():
                raise AssertionError(f"a line of {len(line)} bytes")
    reader.rest()


def pieces_of(inputs: Inputs) -> list[bytes]:
    """Return a stream of lines, in pieces that end anywhere."""
    r = inputs.random
    whole = b"\n".join(inputs.body()[: r.choice((10, 200, 400))] for _ in range(r.randrange(4))) + b"\n"
    cuts = sorted(r.randrange(len(whole) + 1) for _ in range(r.randrange(5)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def parsers() -> dict[str, Parser]:
    """Return all parsers, by name."""
    door = Door(RelayClient(ProducerSettings(redis_url="redis://127.0.0.1:1/0", client_name="fuzz")), "fuzz")

    def prepared(message: Incoming) -> None:
        json.loads(door.prepare(read(message, door="fuzz", routes=RULES)).message)

    return {
        "read": Parser(
            lambda one: Incoming(one.body()), lambda message: read(message, door="fuzz", routes=RULES)
        ),
        "read_headers": Parser(Inputs.message, lambda message: read(message, door="fuzz", routes=RULES)),
        "prepare": Parser(Inputs.message, prepared),
        "tcp_lines": Parser(pieces_of, lines, (LineTooLong,)),
        "routing": Parser(Inputs.message, routed),
        "answers": Parser(Inputs.message, said_by),
        "webhook_verify": Parser(
            signed,
            lambda one: verify(one[0], one[1], one[2], 1.7e9),
            (SignatureRefused, OutOfTime, InvalidRequest),
        ),
        "webhook_read": Parser(signed, delivered),
        "callback": Parser(Inputs.body, called_back),
        "callback_token": Parser(token, lambda one: SECRETS.task_of(one, 1.7e9)),
        "idempotency_key": Parser(Inputs.text, parsed),
    }


def fuzz(name: str, parser: Parser, inputs: Inputs, count: int) -> dict[str, float]:
    """Try so many inputs; return how many were refused and what they took. Raises what the parser does."""
    try:
        refused, slowest, spent = _tried(name, parser, inputs, count)
    finally:  # or it ends whoever called this, a minute later
        faulthandler.cancel_dump_traceback_later()
    return {
        f"{name}_refused_percent": round(100 * refused / count, 1),
        f"{name}_us": round(spent / count / 1000, 1),
        f"{name}_slowest_ms": round(slowest / 1e6, 1),
    }


def _tried(name: str, parser: Parser, inputs: Inputs, count: int) -> tuple[int, int, int]:
    """Return how many were refused, and the nanoseconds of the slowest and of all."""
    refused, slowest, spent = 0, 0, 0
    for number in range(count):
        if number % 1000 == 0:
            faulthandler.dump_traceback_later(STUCK_S, exit=True)
        given = parser.make(inputs)
        began = time.thread_time_ns()
        try:
            parser.run(given)
        except parser.refuses as exc:
            refused += 1
            text = str(exc)
            if isinstance(exc, InvalidRequest) and CANARY in text:
                say(f"{name} quotes the conf: {text[:300]}\n  {given!r}")
                raise AssertionError("a refusal quotes the conf") from exc
            if name.startswith("read") and (len(text) > MAX_REASON_LENGTH or not text.isprintable()):
                raise AssertionError(f"a refusal is no line: {text[:300]!r}") from exc
        except Exception:
            say(f"{name} failed on {given!r}")
            raise
        took = time.thread_time_ns() - began
        spent += took
        slowest = max(slowest, took)
    return refused, slowest, spent


def main() -> int:
    """Try all parsers, or one."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--inputs", type=int, default=INPUTS, help="for each parser")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--only", help="one parser, by its name")
    given = arguments.parse_args()
    figures: dict[str, Any] = {"inputs": given.inputs, "seed": given.seed, "failed": 0}
    bounds = [Bound("failed", at_most=0)]
    for name, parser in parsers().items():
        if given.only not in (None, name):
            continue
        try:
            found = fuzz(name, parser, Inputs(given.seed), given.inputs)
        except Exception:  # noqa: BLE001 - what is looked for
            traceback.print_exc()
            figures["failed"] += 1
            continue
        say(f"{name}: {found}")
        figures |= found
        bounds.append(Bound(f"{name}_slowest_ms", at_most=SLOWEST_MS))
    return report("fuzz", figures, bounds)


if __name__ == "__main__":
    sys.exit(main())
