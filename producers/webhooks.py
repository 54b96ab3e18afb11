"""Webhooks that come in: which there are, who may have sent one, and what it asks for. Pure.

`DAGRELAY_WEBHOOK_<NAME>` in the gateway's environment, as JSON; `DAGRELAY_WEBHOOK_<NAME>_FILE` names a file
that holds it. It is posted to ``/v1/webhooks/<name>``::

    DAGRELAY_WEBHOOK_SHOP={"scheme": "standard", "secrets": ["whsec_…"], "routes": true}
    DAGRELAY_WEBHOOK_CODE={"scheme": "github", "secret_file": "/run/secrets/code", "routes": true,
                           "scope": {"dags": ["build_*"]}}
    DAGRELAY_WEBHOOK_RENDER={"scheme": "standard", "secret_file": "…",
                             "wake": "join(':', ['render', data.id])"}

scheme
    ``standard``, ``github``, ``stripe``, or ``hmac``: with `header`, `algorithm` (sha256), `encoding` (hex,
    or base64) and `prefix` (""), and `event_header`, which names what happened.
secret, secrets, secret_file
    One of them. The file has one secret in each line. While one is being replaced both are listed: a delivery
    signed with any of them counts.
routes, message, wake
    One of them. ``routes: true``: the body is an event of the type ``<name>.<what happened>``, for the
    routing rules. ``message: true``: the body is a trigger or a job, as any queue may hold it. `wake`: a
    JMESPath expression over the body that yields the wake key of tasks that wait for this.
scope
    What may be asked for with it: patterns of `dags`, `connections`, `services`, `hooks`, as an API key has
    them.

**Who sent it** is decided by the raw bytes, in constant time, before anything is parsed. **When**: where the
scheme signs a timestamp, it is 5 minutes old at the most. **Once**: a delivery that comes again has the same
task id, made from its own id where that is signed with it, else from what was signed, the body. So whoever
replays a delivery starts nothing, whatever headers he gives it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

import jmespath
from jmespath.exceptions import JMESPathError

from .contract import ANSWER_KEYS
from .errors import InvalidRequest
from .queues.message import Event, json_value, task_id_for
from .scopes import ALL, Scope
from .settings import read_value
from .stores.signing import (
    ALGORITHMS,
    GITHUB_SIGNATURE,
    ID,
    SCHEMES,
    SIGNATURE,
    TIMESTAMP,
    Algorithm,
    Encoding,
    Scheme,
    key_of,
    mac,
    standard_mac,
)

WINDOW_S: Final = 300
"""How old, or how far ahead, a signed timestamp may be: what Standard Webhooks and Stripe have."""

MOST_SIGNATURES: Final = 20
"""So many of one delivery are looked at."""

MAX_WAKE_KEY: Final = 250
"""As `PollRequest.wake_keys` has it."""

Does = Literal["routes", "message", "wake"]

_VARIABLE = re.compile(r"DAGRELAY_WEBHOOK_([A-Za-z0-9_]+?)(?:_FILE)?\Z")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}\Z")
_TIMESTAMP = re.compile(r"[0-9]{1,12}", re.ASCII)
_DELIVERY_ID = re.compile(r"[!-~]{1,256}")
_EVENT = re.compile(r"[!-~]{1,200}")


class SignatureRefused(Exception):
    """The delivery is not signed by whom it should be. The text is for our own log: senders are not told."""


class OutOfTime(Exception):
    """It is signed, and too old or too far ahead. `off_s`: how many seconds after now its timestamp is."""

    def __init__(self, off_s: float) -> None:
        super().__init__(off_s)
        self.off_s = off_s


@dataclass(frozen=True)
class Webhook:
    """One that may come in. Its keys are not in its repr."""

    name: str
    scheme: Scheme
    keys: tuple[bytes, ...] = field(repr=False)
    does: Does
    scope: Scope = field(default_factory=Scope)
    wake: Any = field(default=None, repr=False)
    """The compiled expression for the key."""
    header: str = ""
    algorithm: Algorithm = "sha256"
    encoding: Encoding = "hex"
    prefix: str = ""
    event_header: str = ""

    @property
    def timed(self) -> bool:
        """Whether its signature covers a timestamp: what is older than the window is refused then."""
        return self.scheme in ("standard", "stripe")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One delivery whose signature is right.

    `id` is its own, where that is signed, else the hash of its body: it is the same whenever the delivery
    comes again, and cannot be changed without the secret. `label` is what its sender calls it.
    """

    hook: str
    id: str
    event: str
    payload: Any
    label: str = ""

    @property
    def task_id(self) -> str:
        """The task id of what it asks for: the same whenever it comes."""
        return task_id_for("webhook", self.hook, self.id)

    def as_event(self) -> Event:
        """Return it for the routing rules."""
        kind = f"{self.hook}.{self.event}" if self.event else self.hook
        source = f"/v1/webhooks/{self.hook}"
        about = {"specversion": "1.0", "id": self.id, "source": source, "type": kind}
        if self.label:
            about["deliveryid"] = self.label
        return Event(self.id, source, kind, self.payload, about)


# Who sent it


def verify(hook: Webhook, headers: Mapping[str, str], body: bytes, now: float) -> None:
    """Return if the delivery is signed with one of the hook's keys, and in time.

    Header names are in lower case; `now` is in seconds since 1970. Raises SignatureRefused, and OutOfTime for
    what is signed.
    """
    # What is missing is looked at last: the work is the same, whatever was sent, and to whichever name.
    timestamp, missing = "", ""
    if hook.scheme == "standard":
        timestamp, delivery_id = headers.get(TIMESTAMP, ""), headers.get(ID, "")
        if not _DELIVERY_ID.fullmatch(delivery_id) or not _TIMESTAMP.fullmatch(timestamp):
            missing, timestamp, delivery_id = f"{ID} or {TIMESTAMP} is missing, or unreadable", "", ""
        given = [one[3:] for one in headers.get(SIGNATURE, "").split(" ") if one.startswith("v1,")]
        expected = [standard_mac(key, delivery_id, timestamp, body) for key in hook.keys]
    elif hook.scheme == "stripe":
        pairs = [one.strip().partition("=") for one in headers.get("stripe-signature", "").split(",")]
        times = [value for name, _, value in pairs if name == "t"]
        timestamp = times[0] if len(times) == 1 else ""
        if not _TIMESTAMP.fullmatch(timestamp):
            missing, timestamp = "stripe-signature is missing, or has no one timestamp", ""
        given = [value for name, _, value in pairs if name == "v1"]
        expected = [mac(key, timestamp.encode() + b"." + body) for key in hook.keys]
    else:
        header, prefix = (
            (GITHUB_SIGNATURE, "sha256=") if hook.scheme == "github" else (hook.header, hook.prefix)
        )
        value = headers.get(header, "")
        given = [value.removeprefix(prefix)] if value.startswith(prefix) else []
        expected = [mac(key, body, hook.algorithm, hook.encoding) for key in hook.keys]
        if hook.encoding == "hex":
            given = [one.lower() for one in given]
    signed = _any_equal(given[:MOST_SIGNATURES], expected)
    if missing or not signed:
        why = "no signature is of one of its secrets" if given else "has no signature"
        raise SignatureRefused(missing or why)
    if timestamp and not -WINDOW_S <= int(timestamp) - now <= WINDOW_S:
        raise OutOfTime(int(timestamp) - now)


def _any_equal(given: Sequence[str], expected: Sequence[bytes]) -> bool:
    """Tell whether one of these is one of those, in a time that does not say which."""
    equal = False
    for one in given:
        for other in expected:
            equal |= hmac.compare_digest(one.encode("utf-8", "replace"), other)
    return equal


DECOY: Final = Webhook("", "standard", (os.urandom(32),), "message")
"""For names that there are not: their answer takes as long, and is the same."""


# What it says


def delivery_of(hook: Webhook, headers: Mapping[str, str], body: bytes) -> Delivery:
    """Return what a verified delivery says. Raises InvalidRequest."""
    payload = json_value(body)
    fields = payload if isinstance(payload, dict) else {}
    delivery_id, label = f"sha256:{hashlib.sha256(body).hexdigest()}", ""
    event = fields.get("type")
    if hook.scheme == "standard":
        delivery_id = headers[ID]
    elif hook.scheme == "stripe":
        given = fields.get("id")
        if isinstance(given, str) and _DELIVERY_ID.fullmatch(given):
            delivery_id = given
    elif hook.scheme == "github":
        event, label = headers.get("x-github-event"), headers.get("x-github-delivery", "")
    elif hook.event_header:
        event = headers.get(hook.event_header)
    what = event if isinstance(event, str) and _EVENT.fullmatch(event) else ""
    return Delivery(hook.name, delivery_id, what, payload, label if _DELIVERY_ID.fullmatch(label) else "")


def wake_key(hook: Webhook, payload: Any) -> str:
    """Return the key of the tasks that a delivery wakes. Raises InvalidRequest."""
    try:
        found = hook.wake.search(payload)
    except (JMESPathError, RecursionError) as exc:
        raise InvalidRequest(f"body: the key cannot be read from it ({type(exc).__name__})") from None
    if isinstance(found, int) and not isinstance(found, bool):
        found = str(found)
    if not isinstance(found, str) or not 0 < len(found) <= MAX_WAKE_KEY or "\0" in found:
        raise InvalidRequest(f"body: holds no key where one was looked for, a text of 1 to {MAX_WAKE_KEY}")
    if found.startswith(ANSWER_KEYS):  # or who signs webhooks could end jobs that are asked for over queues
        raise InvalidRequest(f"body: holds a key that begins with {ANSWER_KEYS!r}, which is for queues")
    return found


# Which there are


def read_webhooks(environ: Mapping[str, str]) -> tuple[dict[str, Webhook], list[str]]:
    """Return the webhooks by their lower-case names, and every mistake by its variable's name.

    One with a mistake is left out. No text holds a secret.
    """
    hooks: dict[str, Webhook] = {}
    mistakes: list[str] = []
    for stem in sorted({variable[: matched.end(1)] for variable, matched in _matches(environ)}):
        name = stem.removeprefix("DAGRELAY_WEBHOOK_").lower()
        value = read_value(environ, stem, mistakes)
        if value is None:
            continue
        if name in hooks:
            mistakes.append(f"{stem}: webhook {name!r} is set twice")
            continue
        problems: list[str] = []
        found = _webhook(name, value, problems)
        mistakes += [f"{stem}: {problem}" for problem in problems]
        if found is not None and not problems:
            hooks[name] = found
    return hooks, mistakes


def _matches(environ: Mapping[str, str]) -> list[tuple[str, re.Match[str]]]:
    return [(one, found) for one in environ if environ[one].strip() and (found := _VARIABLE.match(one))]


def _webhook(name: str, value: str, problems: list[str]) -> Webhook | None:
    try:
        given = json.loads(value)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        problems.append('is no JSON object: give {"scheme": "standard", "secrets": [...], "routes": true}')
        return None
    scheme = given.pop("scheme", None)
    if scheme not in SCHEMES:
        problems.append(f"scheme is none of {', '.join(SCHEMES)}")
        return None
    keys = _keys(scheme, given, problems)
    does, wake = _does(given, problems)
    scope = _scope(given.pop("scope", None), problems)
    own: dict[str, Any] = {}
    if scheme == "hmac":
        own = _own_scheme(given, problems)
    problems += [f"has no use for {_shown(one)}" for one in given]
    return Webhook(name, scheme, keys, does, scope, wake, **own)


def _keys(scheme: Scheme, given: dict[str, Any], problems: list[str]) -> tuple[bytes, ...]:
    ways = [one for one in ("secret", "secrets", "secret_file") if given.get(one)]
    one, several, path = (given.pop(way, None) for way in ("secret", "secrets", "secret_file"))
    if len(ways) != 1:
        problems.append("give one of secret, secrets and secret_file")
        return ()
    secrets: Any = [one] if one else several
    if path:
        try:
            secrets = [line.strip() for line in Path(str(path)).read_text("utf-8").splitlines()]
        except (OSError, ValueError) as exc:
            problems.append(f"secret_file cannot be read: {type(exc).__name__}")
            return ()
        secrets = [line for line in secrets if line]
    if not isinstance(secrets, list) or not secrets or not all(isinstance(text, str) for text in secrets):
        problems.append(f"{ways[0]} holds no text")
        return ()
    keys = []
    for number, secret in enumerate(secrets, 1):
        try:
            keys.append(key_of(scheme, secret))
        except ValueError as exc:
            problems.append(f"{ways[0]}: number {number} {exc}")
    return tuple(keys)


def _does(given: dict[str, Any], problems: list[str]) -> tuple[Does, Any]:
    wishes = [(one, given.pop(one)) for one in ("routes", "message", "wake") if one in given]
    asked = [(name, value) for name, value in wishes if value not in (False, None)]
    if len(asked) != 1:
        problems.append('give one of "routes": true, "message": true and "wake": "<JMESPath expression>"')
        return "message", None
    name, value = asked[0]
    if name != "wake":
        if value is not True:
            problems.append(f"{name} is neither true nor false")
        return cast(Does, name), None
    try:
        return "wake", jmespath.compile(value)
    except (JMESPathError, TypeError, AttributeError, RecursionError):
        problems.append("wake is no JMESPath expression")
        return "wake", None


def _scope(given: Any, problems: list[str]) -> Scope:
    if given is None:
        return Scope()
    names = ("dags", "connections", "services", "hooks")
    if not isinstance(given, dict) or not given.keys() <= set(names):
        problems.append(f"scope is no object of {', '.join(names)}")
        return Scope()
    found: dict[str, tuple[str, ...]] = {}
    for name, patterns in given.items():
        if not isinstance(patterns, list) or not all(isinstance(one, str) and one for one in patterns):
            problems.append(f"scope.{name} is no list of patterns, such as {list(ALL)}")
            continue
        found[name] = tuple(one if name == "dags" else one.lower() for one in patterns)
    return Scope(**found)


def _own_scheme(given: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("header", "event_header"):
        value = given.pop(name, "")
        if value == "" and name == "event_header":
            continue
        if not isinstance(value, str) or not _HEADER_NAME.match(value):
            problems.append(f"{name} is no name of a header")
        else:
            found[name] = value.lower()
    for name, allowed in (("algorithm", ALGORITHMS), ("encoding", ("hex", "base64"))):
        value = given.pop(name, allowed[0])
        if value not in allowed:
            problems.append(f"{name} is none of {', '.join(allowed)}")
        found[name] = value
    prefix = given.pop("prefix", "")
    if not isinstance(prefix, str):
        problems.append("prefix is no text")
    found["prefix"] = prefix
    return found


def _shown(name: str) -> str:
    return repr(name) if name.isidentifier() and len(name) <= 40 else "a name that is no plain word"
