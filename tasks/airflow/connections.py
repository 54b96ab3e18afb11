"""Which Airflows there are, and how each is reached, from the environment.

Airflow's own convention: `AIRFLOW_CONN_<ID>` as a URI or as JSON; `AIRFLOW_CONN_<ID>_FILE` names a file that
holds it. In a URI user and password are percent-encoded and the query holds the extras::

    AIRFLOW_CONN_DEFAULT=http://relay:p%40ss@airflow:8080/?max_in_flight=16
    AIRFLOW_CONN_EU={"conn_type": "https", "host": "eu.example.org", "extra": {"token": "…"}}

The path is where Airflow lies behind a prefix. As in Airflow's HTTP connections, a path (JSON: `schema`) that
is just "https" asks for TLS instead.

Extras: `token` or `token_file` (a static bearer token instead of user and password), `api_version` (v1 or v2;
found by asking unless given), `max_in_flight` (requests of all workers in flight, 8), `connect_timeout_s`
(3.05), `read_timeout_s` (10), `verify` (false: do not verify TLS certificates), `ca_file` (the CA to trust),
`transport` (rest).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tasks.http import CONNECT_TIMEOUT_S, READ_TIMEOUT_S

ApiVersion = Literal["v1", "v2"]

MAX_IN_FLIGHT: Final = 8
"""For each API process of Airflow: with its default database pool of 15, the API server of 3.2 and 3.3 stops
answering altogether when more than 15 authenticated requests are in flight (apache/airflow#66493)."""

_VARIABLE = re.compile(r"AIRFLOW_CONN_([A-Za-z0-9_]+)\Z")
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*)://")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?\Z")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9._-]+)?\Z")
_BASE_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*\Z")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}\Z")
_HEADER_VALUE = re.compile(r"[!-~]+\Z")
_OURS = ("http", "https", "airflow")
_JSON_KEYS = ("conn_id", "conn_type", "description", "host", "login", "password", "port", "schema", "extra")


@dataclass(frozen=True)
class AirflowConnection:
    """One Airflow and the credentials for it. Secrets are not in its repr.

    `base_url` has no credentials and no "/" at its end. Without `username` and `token` requests carry no
    credentials. `max_in_flight` counts the requests of all workers together. Durations are in seconds:
    `connect_timeout_s` for a connection, `read_timeout_s` for a whole answer.
    """

    id: str
    base_url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    api_version: ApiVersion | None = None
    max_in_flight: int = MAX_IN_FLIGHT
    transport: Literal["rest"] = "rest"
    verify: bool = True
    ca_file: str | None = None
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    read_timeout_s: float = READ_TIMEOUT_S

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with whatever decides whether the credentials are accepted.

        A hold of refused credentials is stored under it, so that it does not bind those that replace them.
        The same in every worker; takes 0.1 s the first time, because it lies in Redis and a password must
        not be guessable from it.
        """
        decides = (self.id, self.base_url, self.username, self.password, self.token, self.api_version)
        return _digest(json.dumps(decides))

    def run_url(self, version: ApiVersion, dag_id: str, run_id: str) -> str:
        """Return where people find the run in Airflow's user interface; `version` is the API's."""
        dag, run = quote(dag_id, safe=""), quote(run_id, safe="")
        if version == "v1":
            return f"{self.base_url}/dags/{dag}/grid?dag_run_id={run}"
        return f"{self.base_url}/dags/{dag}/runs/{run}"


@lru_cache(maxsize=64)
def _digest(text: str) -> str:
    return hashlib.pbkdf2_hmac("sha256", text.encode(), b"dagrelay connection", 200_000, 8).hex()


def read_connections(environ: Mapping[str, str]) -> tuple[dict[str, AirflowConnection], list[str]]:
    """Return the connections by their lower-case id, and every mistake by its variable's name.

    A connection with a mistake is left out. Variables for something other than Airflow (`postgres://…`) are
    neither: see `other_variables`. No text holds a secret.
    """
    connections: dict[str, AirflowConnection] = {}
    mistakes: list[str] = []
    for variable, connection_id, read in _variables(environ):
        if connection_id in connections:
            mistakes.append(f"{variable}: connection {connection_id!r} is set twice")
            continue
        try:
            connection = _connection(connection_id, read())
        except _Mistake as exc:
            mistakes += [f"{variable}: {problem}" for problem in exc.problems]
        except _NotOurs as exc:
            if connection_id == "default":
                mistakes.append(f"{variable}: is of type {exc.kind}: give http://… or https://…")
        else:
            connections[connection_id] = connection
    return connections, mistakes


def other_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the names of the variables that are Airflow connections to something other than Airflow."""
    found = []
    for variable, connection_id, read in _variables(environ):
        try:
            _connection(connection_id, read())
        except _NotOurs:
            found.append(variable)
        except _Mistake:
            continue
    return found


class _Mistake(Exception):
    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems


class _NotOurs(Exception):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind if _NAME.match(kind.replace("-", "_")) else "another kind"


def _variables(environ: Mapping[str, str]) -> list[tuple[str, str, Callable[[], str]]]:
    """Return for each variable its name, the connection's id and how to read the value."""
    found: list[tuple[str, str, Callable[[], str]]] = []
    for variable in sorted(environ):
        matched = _VARIABLE.match(variable)
        value = environ[variable].strip()
        if matched is None or not value:  # compose passes what is not set as empty
            continue
        connection_id = matched[1].lower()
        looks_like_value = value.startswith("{") or _URI.match(value)
        if connection_id.endswith("_file") and connection_id != "_file" and not looks_like_value:
            found.append((variable, connection_id.removesuffix("_file"), _file_reader(value)))
        else:
            found.append((variable, connection_id, lambda value=value: value))  # type: ignore[misc]
    return found


def _file_reader(path: str) -> Callable[[], str]:
    def read() -> str:
        try:
            value = Path(path).read_text("utf-8").strip()
        except (OSError, ValueError) as exc:
            raise _Mistake(f"the file cannot be read ({_why(exc)})") from None
        if not value:
            raise _Mistake("the file is empty")
        return value

    return read


def _why(exc: Exception) -> str:
    return (exc.strerror if isinstance(exc, OSError) else None) or type(exc).__name__


@dataclass
class _Parts:
    """What a URI and JSON have in common."""

    kind: str
    host: str = ""
    port: Any = None
    path: str = ""
    username: str | None = None
    password: str | None = None
    extras: dict[str, Any] = field(default_factory=dict)


def _connection(connection_id: str, value: str) -> AirflowConnection:
    """Read one value. Raises _Mistake with all that is wrong with it, _NotOurs."""
    parts = _from_json(value) if value.startswith("{") else _from_uri(value)
    problems: list[str] = []
    base_url = _base_url(parts, problems)
    extras = _Extras(parts.extras, problems)
    token = extras.token()
    if token and (parts.username or parts.password):
        problems.append("has a token as well as a user or password: give one of them")
    elif parts.password and not parts.username:
        problems.append("has a password and no user")
    for name, secret in (("user", parts.username), ("password", parts.password)):
        if secret and any(ord(character) < 32 for character in secret):
            problems.append(f"the {name} holds a control character")
    connection = AirflowConnection(
        id=connection_id,
        base_url=base_url,
        username=parts.username or None,
        password=(parts.password or "") if parts.username else None,
        token=token,
        api_version=extras.choice("api_version", ("v1", "v2")),
        max_in_flight=int(extras.number("max_in_flight", MAX_IN_FLIGHT, 1, 1000, whole=True)),
        verify=extras.flag("verify", True),
        ca_file=extras.file("ca_file"),
        connect_timeout_s=extras.number("connect_timeout_s", CONNECT_TIMEOUT_S, 0.01, 60),
        read_timeout_s=extras.number("read_timeout_s", READ_TIMEOUT_S, 0.01, 300),
    )
    extras.transport()
    extras.refuse_the_rest()
    if connection.ca_file and not connection.verify:
        problems.append("has a ca_file and verify=false: give one of them")
    if problems:
        raise _Mistake(*problems)
    return connection


def _from_uri(value: str) -> _Parts:
    matched = _URI.match(value)
    if matched is None:
        raise _Mistake("is neither a URI (http://user:password@host:8080) nor JSON")
    kind = matched[1].lower()
    if kind not in _OURS:
        raise _NotOurs(kind)
    try:
        split = urlsplit(value)
        # Airflow also reads http://https://host, with the protocol as a part of the host.
        if split.netloc in ("http:", "https:") and split.path.startswith("//"):
            kind = split.netloc[:-1]
            split = urlsplit(value.split("://", 1)[1])
        port = split.port
    except ValueError:  # its text would show a part of the password
        raise _Mistake(_UNREADABLE) from None
    if split.fragment or "@" in split.path or split.netloc.count("@") > 1 or "\\" in value:
        raise _Mistake(_UNREADABLE)
    extras = dict(parse_qsl(split.query, keep_blank_values=True))
    inner = extras.pop("__extra__", None)
    return _with_inner_url(
        _Parts(
            kind=kind,
            host=unquote(split.hostname or ""),
            port=port,
            path=unquote(split.path),
            username=None if split.username is None else unquote(split.username),
            password=None if split.password is None else unquote(split.password),
            extras=extras | _extra_object(inner),
        )
    )


_UNREADABLE = (
    "cannot be read as a URI: percent-encode what is special in user and password "
    "(@ as %40, / as %2F, # as %23, ? as %3F, : as %3A)"
)


def _from_json(value: str) -> _Parts:
    try:
        given = json.loads(value)
    except (ValueError, RecursionError):
        raise _Mistake("begins with { and is not JSON") from None
    kind = str(given.get("conn_type") or "").lower()
    if not kind:
        raise _Mistake("has no conn_type: give http or https")
    if kind not in _OURS:
        raise _NotOurs(kind)
    problems = [f"has no use for {_shown(name)}" for name in given if name not in _JSON_KEYS]
    texts: dict[str, str | None] = {}
    for name in ("host", "login", "password", "schema"):
        if given.get(name) is not None and not isinstance(given[name], str):
            problems.append(f"{name} is no text")
        texts[name] = given.get(name) if isinstance(given.get(name), str) else None
    if problems:
        raise _Mistake(*problems)
    return _with_inner_url(
        _Parts(
            kind=kind,
            host=texts["host"] or "",
            port=given.get("port"),
            path=texts["schema"] or "",
            username=texts["login"],
            password=texts["password"],
            extras=_extra_object(given.get("extra")),
        )
    )


def _extra_object(extra: Any) -> dict[str, Any]:
    """Return the extras, which Airflow keeps as an object or as the JSON text of one."""
    if isinstance(extra, str) and extra.strip():
        try:
            extra = json.loads(extra)
        except (ValueError, RecursionError):
            raise _Mistake("extra is not JSON") from None
    if not extra:
        return {}
    if not isinstance(extra, dict):
        raise _Mistake("extra is no JSON object")
    return dict(extra)


def _with_inner_url(parts: _Parts) -> _Parts:
    """Take apart a host that is itself a URL, as Airflow's HTTP connections may have it."""
    if "://" not in parts.host:
        return parts
    try:
        inner = urlsplit(parts.host)
        port = inner.port
    except ValueError:
        raise _Mistake("the host is a URL that cannot be read") from None
    if inner.scheme not in ("http", "https") or "@" in inner.netloc:
        raise _Mistake("the host is a URL, and not a plain http:// or https:// one")
    parts.kind, parts.host = inner.scheme, inner.hostname or ""
    parts.port = port or parts.port
    parts.path = inner.path.strip("/") or parts.path
    return parts


def _base_url(parts: _Parts, problems: list[str]) -> str:
    host = parts.host.strip("[]")
    if not host:
        problems.append("has no host")
    elif _IPV6.match(host):
        host = f"[{host}]"
    elif not _HOST.match(host):
        problems.append("the host is no host name")
    path = parts.path.strip("/")
    tls = parts.kind == "https" or path.lower() == "https"
    path = "" if path.lower() in ("http", "https") else f"/{path}" if path else ""
    if re.search(r"/api(/v[12])?\Z", path):
        problems.append("the path is the API's: give Airflow's own address, without /api/…")
    elif not _BASE_PATH.match(path) or "/." in path:
        problems.append("the path is no plain path")
    port = ""
    if parts.port not in (None, ""):
        text = str(parts.port)
        if isinstance(parts.port, bool) or not (
            text.isascii() and text.isdecimal() and 0 < int(text) < 65_536
        ):
            problems.append("the port is no number from 1 to 65535")
        else:
            port = f":{int(text)}"
    return f"{'https' if tls else 'http'}://{host}{port}{path}"


def _shown(name: object) -> str:
    """A name as a mistake may show it: what is no plain name may be a part of a password."""
    return repr(name) if isinstance(name, str) and _NAME.match(name) else "a name that is no plain word"


class _Extras:
    """Takes the extras one by one, notes what is wrong with each, and refuses what nobody took."""

    def __init__(self, extras: Mapping[str, Any], problems: list[str]) -> None:
        self._left = dict(extras)
        self._problems = problems

    def _take(self, name: str) -> Any:
        value = self._left.pop(name, None)
        return None if value == "" else value

    def _text(self, name: str) -> str | None:
        value = self._take(name)
        if value is not None and not isinstance(value, str):
            self._problems.append(f"{name} is no text")
            return None
        return value

    def token(self) -> str | None:
        token, path = self._text("token"), self._text("token_file")
        if token and path:
            self._problems.append("has token and token_file: give one of them")
            return None
        if path:
            try:
                token = _file_reader(path)()
            except _Mistake as exc:
                self._problems += [f"token_file: {problem}" for problem in exc.problems]
                return None
        if token and not _HEADER_VALUE.match(token):
            self._problems.append("the token holds characters that a header may not have")
            return None
        return token

    def choice(self, name: str, allowed: tuple[str, ...]) -> Any:
        value = self._take(name)
        if value is None or value in allowed:
            return value
        self._problems.append(f"{name} is none of {', '.join(allowed)}")
        return None

    def transport(self) -> None:
        value = self._take("transport")
        if value == "cli":
            self._problems.append("transport=cli comes with a later release: use rest")
        elif value not in (None, "rest"):
            self._problems.append("transport is not rest")

    def number(self, name: str, default: float, low: float, high: float, *, whole: bool = False) -> float:
        value = self._take(name)
        if value is None:
            return default
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if low <= number <= high and (not whole or number.is_integer()):
            return number
        kind = "whole number" if whole else "number"
        self._problems.append(f"{name} is no {kind} from {low:g} to {high:g}")
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self._take(name)
        if value is None:
            return default
        word = str(value).lower()
        if word in ("true", "1", "yes", "on"):
            return True
        if word in ("false", "0", "no", "off"):
            return False
        self._problems.append(f"{name} is neither true nor false")
        return default

    def file(self, name: str) -> str | None:
        path = self._text(name)
        if path is not None:
            try:
                with Path(path).open("rb") as file:
                    file.read(1)
            except (OSError, ValueError) as exc:
                self._problems.append(f"{name}: the file cannot be read ({_why(exc)})")
        return path

    def refuse_the_rest(self) -> None:
        self._problems += [f"has no use for the extra {_shown(name)}" for name in self._left]
