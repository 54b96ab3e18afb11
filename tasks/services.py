"""Which outside services there are, and how each is reached, from the environment.

`DAGRELAY_SERVICE_<ID>` as a URI or as JSON; `DAGRELAY_SERVICE_<ID>_FILE` names a file that holds it. In a URI
user and password are percent-encoded and the query holds the rest::

    DAGRELAY_SERVICE_TRAIN=https://user:p%40ss@train.example.org/api?max_in_flight=16
    DAGRELAY_SERVICE_RENDER={"url": "https://render.example.org", "token_file": "/run/secrets/render"}

`token` or `token_file` (sent as a bearer token), or user and password (`username`, `password` in JSON; basic
authentication); in JSON also `headers` and `query`, sent with every request (`{"X-Api-Key": "…"}`);
`idempotency_header` (Idempotency-Key), `max_in_flight` (requests of one worker process in flight, 64),
`min_interval_s` (the shortest pause between two looks at one job that a request may ask for, 1),
`connect_timeout_s` (3.05), `read_timeout_s` (10), `verify` (false: do not verify TLS certificates), `ca_file`
(the CA to trust).

A service may also be a queue, for requests with ``via="queue"``::

    DAGRELAY_SERVICE_RENDER={"url": "amqp://user:p%40ss@host/", "queue": "render", "reply_to": "done"}

The url is one that `dagrelay listen` takes (`url_file` names a file that holds it), `queue` the place to
which messages are published, `reply_to` what they say of where to answer.

A message names a service, and only a worker knows where it is: no message points a worker at another host,
and no message holds a credential.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final
from urllib.parse import SplitResult, quote, unquote, urlencode, urlsplit

from producers.errors import ConfigurationError, ServiceNotConfigured
from producers.stores.callbacks import PATH as CALLBACK_PATH

from .endpoints import (
    UNREADABLE,
    URI,
    Extras,
    Mistake,
    Parts,
    base_url,
    credentials_problems,
    file_reader,
    json_object,
    parts_of_uri,
    read_each,
)
from .http import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, HttpSender

MAX_IN_FLIGHT: Final = 64
MIN_INTERVAL_S: Final = 1.0
SINGLE_CALLS: Final = 16
"""How many calls outside the batches (submissions, lookups) of one process are in flight at the most."""

_VARIABLE = re.compile(r"DAGRELAY_SERVICE_([A-Za-z0-9_]+)\Z")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}\Z")
_HEADER_VALUE = re.compile(r"[\t -~]{0,8000}\Z")
_OURS_ALONE = ("host", "content-length", "transfer-encoding", "connection", "te", "trailer", "upgrade")
_DOTS = re.compile(r"[/\\]\.{1,2}(?=[/\\;?]|\Z)")
_SHORTEST_SECRET: Final = 4


@dataclass(frozen=True)
class Queue:
    """Where the messages for a service go. The url may hold a password."""

    url: str = field(repr=False)
    name: str
    reply_to: str | None = None


@dataclass(frozen=True)
class Service:
    """One outside service and the credentials for it. Secrets are not in its repr.

    `base_url` has no credentials and no "/" at its end; it is empty for a `queue`. `extra_headers` and
    `query` go with every request and may hold secrets. Durations are in seconds.
    """

    id: str
    base_url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    extra_headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    query: Mapping[str, str] = field(default_factory=dict, repr=False)
    idempotency_header: str = "Idempotency-Key"
    max_in_flight: int = MAX_IN_FLIGHT
    min_interval_s: float = MIN_INTERVAL_S
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    read_timeout_s: float = READ_TIMEOUT_S
    verify: bool = True
    ca_file: str | None = None
    queue: Queue | None = None

    @property
    def trusts(self) -> bool | str:
        """What is trusted of TLS certificates, as the senders take it: all, none, or those of a CA's file."""
        return self.ca_file if self.verify and self.ca_file else self.verify

    def headers(self) -> Mapping[str, str]:
        """Return the headers that carry the credentials; not to be changed."""
        return self._headers

    @cached_property
    def _headers(self) -> dict[str, str]:
        found = dict(self.extra_headers)
        if self.token:
            found["Authorization"] = f"Bearer {self.token}"
        elif self.username:
            found["Authorization"] = f"Basic {self._basic}"
        return found

    @cached_property
    def header_names(self) -> frozenset[str]:
        """The names of the headers that are ours alone, in lower case: a message's own are left out."""
        return frozenset(name.lower() for name in (*self._headers, self.idempotency_header))

    @cached_property
    def _basic(self) -> str:
        return base64.b64encode(f"{self.username}:{self.password or ''}".encode()).decode()

    @cached_property
    def query_text(self) -> str:
        """The query that goes with every request, encoded; "" for none."""
        return urlencode(self.query)

    def check_url(self, url: str) -> str:
        """Return the path, with its query, of an absolute URL within the service.

        Scheme, host, port and base path must be the service's own. Raises ServiceNotConfigured.
        """
        ours = urlsplit(self.base_url)
        try:
            theirs = urlsplit(url)
            same = _origin(theirs) == _origin(ours)
        except ValueError:
            raise ServiceNotConfigured(self.id, "the url cannot be read") from None
        if not same or theirs.username is not None or theirs.password is not None or theirs.fragment:
            raise ServiceNotConfigured(
                self.id,
                "the url is not within it: scheme, host and port must be those of its address in the worker",
            )
        path = theirs.path or "/"
        if ours.path and path != ours.path and not path.startswith(ours.path + "/"):
            raise ServiceNotConfigured(self.id, "the url is not below the path of its address in the worker")
        path = path[len(ours.path) :] or "/"
        return self.check_path(path + (f"?{theirs.query}" if theirs.query else ""))

    def check_path(self, path: str) -> str:
        """Return a path that stays within the service. Raises ServiceNotConfigured where it has a "..".

        However it is spelt: servers and proxies differ in what they decode, and how often.
        """
        plain = path.partition("?")[0]
        for _ in range(4):
            if _DOTS.search(plain):
                raise ServiceNotConfigured(
                    self.id, "the path has a step '.' or '..', which may lead out of it"
                )
            if "%" not in plain:
                break
            plain = unquote(plain)
        return path

    def masked(self, text: str) -> str:
        """Return a text in which none of our credentials, and nothing that looks like one, is left."""
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, "***")
        return _TOKENS.sub(lambda found: f"{found[1] or found[2] or found[3] or ''}***", text)

    @cached_property
    def _secrets(self) -> tuple[str, ...]:
        known = {self.password, self.token, *self.extra_headers.values(), *self.query.values()}
        if self.username:
            known.add(self._basic)
        if self.queue is not None:
            password = urlsplit(self.queue.url).password
            known |= {password, unquote(password or "")}
        plain = {one for one in known if one and len(one) >= _SHORTEST_SECRET}
        spelt = plain | {quote(one, safe="") for one in plain} | {json.dumps(one)[1:-1] for one in plain}
        return tuple(sorted(spelt, key=len, reverse=True))


# A JWT; what follows Bearer or Basic; and what follows the name of a secret.
_TOKENS = re.compile(
    r"eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?"
    r"|(\b(?:bearer|basic)\s+)[\w.~+/=-]{6,}"
    r"|((?:token|secret|passw(?:or)?d|api[_-]?key|access[_-]?key|authorization|credentials?)[\"']?\s*[:=]\s*[\"']?)"
    r"(?!\*\*\*)[^\s\"',;&}<]+"
    rf"|({re.escape(CALLBACK_PATH)})[\w.~%-]+",
    re.IGNORECASE,
)


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def read_services(environ: Mapping[str, str]) -> tuple[dict[str, Service], list[str]]:
    """Return the services by their lower-case id, and every mistake by its variable's name.

    A service with a mistake is left out. No text holds a secret.
    """
    return read_each(environ, _VARIABLE, "service", _service)


def _service(service_id: str, value: str) -> Service:
    """Read one value. Raises Mistake with all that is wrong with it."""
    problems: list[str] = []
    as_json = value.startswith("{")
    given = json_object(value) if as_json else {}
    if "queue" in given:
        return _queue_service(service_id, given)
    parts = _from_json(given) if as_json else _from_uri(value)
    extras = Extras(parts.extras, problems)
    if as_json:
        parts.username, parts.password = extras.text("username"), extras.text("password")
    token = extras.token()
    problems += credentials_problems(parts.username, parts.password, token)
    headers = _pairs("headers", extras.take("headers") if as_json else None, problems)
    if (token or parts.username) and any(name.lower() == "authorization" for name in headers):
        problems.append("headers has Authorization beside a token or user: give one of them")
    header = extras.text("idempotency_header") or "Idempotency-Key"
    if not _HEADER_NAME.match(header) or header.lower() in _OURS_ALONE:
        problems.append("idempotency_header is no name of a header")
    service = Service(
        id=service_id,
        base_url=base_url(parts, parts.path, tls=parts.kind == "https", problems=problems),
        username=parts.username or None,
        password=(parts.password or "") if parts.username else None,
        token=token,
        extra_headers=headers,
        query=_pairs("query", extras.take("query") if as_json else None, problems),
        idempotency_header=header,
        max_in_flight=int(extras.number("max_in_flight", MAX_IN_FLIGHT, 1, 1000, whole=True)),
        min_interval_s=extras.number("min_interval_s", MIN_INTERVAL_S, 0.01, 86_400),
        connect_timeout_s=extras.number("connect_timeout_s", CONNECT_TIMEOUT_S, 0.01, 60),
        read_timeout_s=extras.number("read_timeout_s", READ_TIMEOUT_S, 0.01, 300),
        verify=extras.flag("verify", True),
        ca_file=extras.file("ca_file"),
    )
    extras.refuse_the_rest("")
    if service.ca_file and not service.verify:
        problems.append("has a ca_file and verify=false: give one of them")
    if problems:
        raise Mistake(*problems)
    return service


def _from_uri(value: str) -> Parts:
    matched = URI.match(value)
    if matched is None or matched[1].lower() not in ("http", "https"):
        raise Mistake("is neither a URI (https://user:password@host:8443/base) nor JSON")
    return parts_of_uri(value)


def _queue_service(service_id: str, given: dict[str, Any]) -> Service:
    """Read a service that is a queue. Raises Mistake."""
    problems: list[str] = []
    extras = Extras(given, problems)
    url, path = extras.text("url"), extras.text("url_file")
    name, reply_to = extras.text("queue"), extras.text("reply_to")
    if (url is None) == (path is None):
        problems.append("has no url: give url or url_file, one of them")
    elif path is not None:
        url = file_reader(path)()
    if not name:
        problems.append("queue is empty: give the place to which messages are published")
    extras.refuse_the_rest("")
    if url is not None and name:
        url = _with_queue(url, name)
        from producers.queues.sources import publisher_for  # here: most workers have no such service

        try:
            publisher_for(url)  # which does not connect yet
        except ConfigurationError as exc:
            problems += exc.mistakes
        except ValueError:  # its text may show a part of the password
            problems.append(f"the url {UNREADABLE}")
    if problems or url is None or not name:
        raise Mistake(*problems)
    return Service(service_id, base_url="", queue=Queue(url, name, reply_to))


def _with_queue(url: str, name: str) -> str:
    """Return the URL as a source takes it: most name a queue, which is where ours goes."""
    scheme, _, rest = url.partition("://")
    if scheme.lower() in ("amqp", "amqps", "sqs") and not re.search(r"[?&]queue=", rest):
        return f"{url}{'&' if '?' in rest else '?'}queue={quote(name, safe='')}"
    address, mark, query = rest.partition("?")
    if scheme.lower() == "kafka" and not address.partition("/")[2]:
        return f"{scheme}://{address.rstrip('/')}/{quote(name, safe='')}{mark}{query}"
    return url


def _from_json(given: dict[str, Any]) -> Parts:
    url = given.pop("url", None)
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise Mistake("has no url: give http://… or https://…")
    parts = parts_of_uri(url)
    if parts.username is not None or parts.password is not None or parts.extras:
        raise Mistake("the url has a user or a query: give username, password and query beside it")
    parts.extras = given
    return parts


def _pairs(name: str, given: Any, problems: list[str]) -> dict[str, str]:
    """Return an object of texts, fit for headers (and for a query)."""
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        problems.append(f"{name} is no object of texts")
        return {}
    if name == "headers" and not all(
        _HEADER_NAME.match(key) and _HEADER_VALUE.match(text) and key.lower() not in _OURS_ALONE
        for key, text in given.items()
    ):
        problems.append("headers has one that no request may carry, or with characters that it may not have")
        return {}
    return dict(given)


# Single calls


_senders: dict[str, HttpSender] = {}
_lock = threading.Lock()


def service_sender(service: Service) -> HttpSender:
    """Return this process's sender for single calls: to submit, to find, to look once, to cancel."""
    found = _senders.get(service.id)
    if found is not None and found.base_url == service.base_url:
        return found
    with _lock:
        made = HttpSender(
            service.base_url,
            connect_timeout_s=service.connect_timeout_s,
            read_timeout_s=service.read_timeout_s,
            verify=service.trusts,
            pool_size=min(service.max_in_flight, SINGLE_CALLS),
        )
        _senders[service.id] = made
    return made
