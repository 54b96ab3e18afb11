"""Whom workers tell of ends, from the environment: the hooks that a request's `on_end` names.

`DAGRELAY_HOOK_<ID>` as JSON; `DAGRELAY_HOOK_<ID>_FILE` names a file that holds it::

    DAGRELAY_HOOK_BILLING={"url": "https://billing.example/hooks/ends", "secret_file": "/run/secrets/hook"}

`secret`, `secrets` or `secret_file` (one in each line; while a secret is being replaced a delivery is signed
with each of them); `scheme`: ``standard`` (the default: https://www.standardwebhooks.com), ``github`` (one
secret) or ``none``; `format`: ``json`` (the default) or ``cloudevents``; `headers`, sent with every delivery;
`connect_timeout_s` (3.05), `read_timeout_s` (15), `verify`, `ca_file` as services have them.

A request names a hook, and only a worker knows where that is: nobody who may send requests can point a worker
at another address.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from producers.stores.signing import ID, SIGNATURE, TIMESTAMP, key_of

from .endpoints import Extras, Mistake, base_url, json_object, parts_of_uri, read_each
from .http import CONNECT_TIMEOUT_S, HttpSender, is_path
from .services import _pairs

READ_TIMEOUT_S: Final = 15.0
"""For a whole answer: what the senders of Standard Webhooks commonly wait."""

PLACES: Final = 8
"""How many deliveries of one process to one hook are on their way at the most."""

HookScheme = Literal["standard", "github", "none"]
Format = Literal["json", "cloudevents"]

_VARIABLE = re.compile(r"DAGRELAY_HOOK_([A-Za-z0-9_]+)\Z")
_OURS: Final = frozenset({ID, TIMESTAMP, SIGNATURE, "content-type", "x-hub-signature-256"})


@dataclass(frozen=True)
class Hook:
    """One receiver. Its keys, its headers and the path of its URL, which may be secret, are not in its repr.

    `server` is scheme, host and port. Durations are in seconds.
    """

    id: str
    server: str
    path: str = field(repr=False)
    keys: tuple[bytes, ...] = field(default=(), repr=False)
    scheme: HookScheme = "standard"
    format: Format = "json"
    extra_headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    read_timeout_s: float = READ_TIMEOUT_S
    verify: bool = True
    ca_file: str | None = None


def read_hooks(environ: Mapping[str, str]) -> tuple[dict[str, Hook], list[str]]:
    """Return the hooks by their lower-case id, and every mistake by its variable's name.

    One with a mistake is left out. No text holds a secret.
    """
    return read_each(environ, _VARIABLE, "hook", _hook)


def _hook(hook_id: str, value: str) -> Hook:
    """Read one value. Raises Mistake with all that is wrong with it."""
    if not value.startswith("{"):
        raise Mistake('is no JSON: give {"url": "https://…", "secret_file": "…"}')
    problems: list[str] = []
    extras = Extras(json_object(value), problems)
    server, path = _address(extras.text("url"), problems)
    scheme: HookScheme = extras.choice("scheme", ("standard", "github", "none")) or "standard"
    headers = _pairs("headers", extras.take("headers"), problems)
    if taken := sorted(name for name in headers if name.lower() in _OURS):
        problems.append(f"headers has {', '.join(taken)}, which the delivery has of its own")
    hook = Hook(
        id=hook_id,
        server=server,
        path=path,
        keys=_keys(scheme, extras, problems),
        scheme=scheme,
        format=extras.choice("format", ("json", "cloudevents")) or "json",
        extra_headers=headers,
        connect_timeout_s=extras.number("connect_timeout_s", CONNECT_TIMEOUT_S, 0.01, 60),
        read_timeout_s=extras.number("read_timeout_s", READ_TIMEOUT_S, 0.01, 60),
        verify=extras.flag("verify", True),
        ca_file=extras.file("ca_file"),
    )
    extras.refuse_the_rest("")
    if hook.ca_file and not hook.verify:
        problems.append("has a ca_file and verify=false: give one of them")
    if problems:
        raise Mistake(*problems)
    return hook


def _address(url: str | None, problems: list[str]) -> tuple[str, str]:
    """Return the server, and the path with its query."""
    if url is None or not url.startswith(("http://", "https://")):
        problems.append("has no url: give http://… or https://…")
        return "", "/"
    parts = parts_of_uri(url)
    if parts.username is not None:
        problems.append("the url has a user: send credentials in headers")
    split = urlsplit(url)
    path = (split.path or "/") + (f"?{split.query}" if split.query else "")
    if not is_path(path):
        problems.append("the url's path is none: percent-encode what is special in it")
    return base_url(parts, "", tls=parts.kind == "https", problems=problems), path


def _keys(scheme: str, extras: Extras, problems: list[str]) -> tuple[bytes, ...]:
    """Return the keys to sign with."""
    one, path, several = extras.text("secret"), extras.text("secret_file"), extras.take("secrets")
    ways = [way for way, value in (("secret", one), ("secrets", several), ("secret_file", path)) if value]
    if scheme == "none":
        if ways:
            problems.append('has a secret, and nothing is signed with scheme "none": leave one of them out')
        return ()
    if len(ways) != 1:
        problems.append(
            'give one of secret, secrets and secret_file, or scheme "none": nothing is signed then'
        )
        return ()
    secrets: Any = [one] if one else several
    if path:
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except (OSError, ValueError) as exc:
            problems.append(f"secret_file cannot be read: {type(exc).__name__}")
            return ()
        secrets = [line.strip() for line in lines if line.strip()]
    if not isinstance(secrets, list) or not secrets or not all(isinstance(text, str) for text in secrets):
        problems.append(f"{ways[0]} holds no text")
        return ()
    if scheme == "github" and len(secrets) > 1:
        problems.append('has several secrets, and scheme "github" signs with one')
    keys = []
    for number, secret in enumerate(secrets, 1):
        try:
            keys.append(key_of("github" if scheme == "github" else "standard", secret))
        except ValueError as exc:
            problems.append(f"{ways[0]}: number {number} {exc}")
    return tuple(keys)


_senders: dict[str, HttpSender] = {}
_places: dict[str, threading.BoundedSemaphore] = {}
_lock = threading.Lock()


def hook_sender(hook: Hook) -> HttpSender:
    """Return this process's sender to a hook."""
    with _lock:
        found = _senders.get(hook.id)
        if found is None or found.base_url != hook.server:
            found = _senders[hook.id] = HttpSender(
                hook.server,
                connect_timeout_s=hook.connect_timeout_s,
                read_timeout_s=hook.read_timeout_s,
                verify=hook.ca_file if hook.verify and hook.ca_file else hook.verify,
                pool_size=PLACES,
            )
    return found
