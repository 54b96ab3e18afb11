"""Which Airflows there are, and how each is reached, from the environment.

Airflow's own convention: `AIRFLOW_CONN_<ID>` as a URI or as JSON; `AIRFLOW_CONN_<ID>_FILE` names a file that
holds it. In a URI user and password are percent-encoded and the query holds the extras::

    AIRFLOW_CONN_DEFAULT=http://relay:p%40ss@airflow:8080/?max_in_flight=16
    AIRFLOW_CONN_EU={"conn_type": "https", "host": "eu.example.org", "extra": {"token": "…"}}

The path is where Airflow lies behind a prefix. As in Airflow's HTTP connections, a path (JSON: `schema`) that
is just "https" asks for TLS instead.

Extras: `token` or `token_file` (a static bearer token instead of user and password), `api_version` (v1 or v2;
found by asking unless given), `max_in_flight` (requests of all workers in flight, for each process of
Airflow's API server, 8), `api_workers` (how many of those there are, 1), `connect_timeout_s` (3.05),
`read_timeout_s` (10), `timed_out_slot_s` (how long a request that got no answer in time still counts as one
in flight, 30), `window` (the one of requests that name none: a whole number, or max_active_runs), `verify`
(false: do not verify TLS certificates), `ca_file` (the CA to trust), `transport` (rest, or cli: see below),
`failover` (cli: what the API cannot be reached for goes by the CLI).

By Airflow's own command (`tasks/airflow/cli.py`)::

    AIRFLOW_CONN_DEFAULT={"conn_type": "airflow", "extra": {"transport": "cli"}}
    AIRFLOW_CONN_EU={"conn_type": "airflow", "extra": {"transport": "cli",
        "cli_command": ["kubectl", "exec", "deploy/airflow-scheduler", "--", "airflow"]}}
    AIRFLOW_CONN_US=http://relay:p%40ss@airflow:8080/?failover=cli&cli_command=ssh+af@host+airflow

`cli_command` (a JSON list; a text is split as a shell would; "airflow"), `cli_remote_shell` (true where the
command hands its arguments to a shell, as ssh does: they are quoted once more; true for ssh), `cli_env` (a
JSON object: what the command finds in its environment beside the few variables that it inherits),
`cli_timeout_s` (how long a call may take, 60), and with `failover` `cli_max_in_flight` (2, which is
`max_in_flight`'s default where all goes by the CLI). No credentials belong to it. A host is for links only.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import PurePath
from typing import Any, Final, Literal
from urllib.parse import quote, urlsplit

from producers.contract import MAX_ACTIVE_RUNS, Window, window_problem
from tasks.endpoints import (
    NAME,
    URI,
    Extras,
    Mistake,
    Parts,
    base_url,
    credentials_problems,
    json_object,
    parts_of_uri,
    shown,
    variables,
)
from tasks.http import CONNECT_TIMEOUT_S, READ_TIMEOUT_S

ApiVersion = Literal["v1", "v2"]

MAX_IN_FLIGHT: Final = 8
"""For each API process of Airflow: with its default database pool of 15, the API server of 3.2 and 3.3 stops
answering altogether when more than 15 authenticated requests are in flight (apache/airflow#66493)."""

TIMED_OUT_SLOT_S: Final = 30.0
"""How long a request that timed out counts as one in flight: Airflow 3.3.2 works on for about so long."""

CLI_MAX_IN_FLIGHT: Final = 2
"""A call of the CLI takes 1.3 to 2 s of CPU and 150 MB, where a request to the API takes some 10 ms."""

CLI_TIMEOUT_S: Final = 60.0

_VARIABLE = re.compile(r"AIRFLOW_CONN_([A-Za-z0-9_]+)\Z")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_OURS = ("http", "https", "airflow")
_JSON_KEYS = ("conn_id", "conn_type", "description", "host", "login", "password", "port", "schema", "extra")


@dataclass(frozen=True)
class Command:
    """Airflow's own command, and how it is called. Its words and its environment may hold secrets."""

    argv: tuple[str, ...] = field(default=("airflow",), repr=False)
    remote_shell: bool = False
    """Whether it hands its arguments to a shell."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    timeout_s: float = CLI_TIMEOUT_S


@dataclass(frozen=True)
class AirflowConnection:
    """One Airflow and the credentials for it. Secrets are not in its repr.

    `base_url` has no credentials and no "/" at its end. Without `username` and `token` requests carry no
    credentials. `ceiling` counts the requests of all workers together. Durations are in seconds:
    `connect_timeout_s` for a connection, `read_timeout_s` for a whole answer. By the CLI there are no
    credentials, `base_url` is for links and may be empty, and `read_timeout_s` is how long a call may take.
    """

    id: str
    base_url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    api_version: ApiVersion | None = None
    max_in_flight: int = MAX_IN_FLIGHT
    api_workers: int = 1
    transport: Literal["rest", "cli"] = "rest"
    command: Command | None = None
    """Airflow's CLI, where the transport is that."""
    stands_in: bool = False
    """Whether this is the `failover` of another connection."""
    failover: AirflowConnection | None = None
    """The way that is gone while the API cannot be reached: the CLI, with slots and a breaker of its own."""
    verify: bool = True
    ca_file: str | None = None
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    read_timeout_s: float = READ_TIMEOUT_S
    timed_out_slot_s: float = TIMED_OUT_SLOT_S
    window: Window | None = None
    """That of requests which name none."""

    @property
    def ceiling(self) -> int:
        """The most requests of all workers together that may be in flight."""
        return self.max_in_flight * self.api_workers

    @property
    def by_cli(self) -> bool:
        """Whether a run may have been made by the CLI, which writes no note."""
        return self.transport == "cli" or self.failover is not None

    @property
    def address(self) -> str:
        """Where Airflow is, as logs show it: of a command its first word, as others may be secrets."""
        if self.command is None:
            return self.base_url
        return f"the command {PurePath(self.command.argv[0]).name}"

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with whatever decides whether the credentials are accepted.

        A hold of refused credentials is stored under it, so that it does not bind those that replace them.
        The same in every worker; takes 0.1 s the first time, because it lies in Redis and a password must
        not be guessable from it.
        """
        decides = [self.id, self.base_url, self.username, self.password, self.token, self.api_version]
        if self.command is not None:
            decides += [shlex.join(self.command.argv), json.dumps(dict(self.command.env), sort_keys=True)]
        return _digest(json.dumps(decides))

    def run_url(self, version: ApiVersion, dag_id: str, run_id: str) -> str | None:
        """Return where people find the run in Airflow's user interface; `version` is the API's.

        None for a connection by the CLI that names no host.
        """
        if not self.base_url:
            return None
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
    for variable, connection_id, read in variables(environ, _VARIABLE):
        if connection_id in connections:
            mistakes.append(f"{variable}: connection {connection_id!r} is set twice")
            continue
        try:
            connection = _connection(connection_id, read())
        except Mistake as exc:
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
    for variable, connection_id, read in variables(environ, _VARIABLE):
        try:
            _connection(connection_id, read())
        except _NotOurs:
            found.append(variable)
        except Mistake:
            continue
    return found


class _NotOurs(Exception):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind if NAME.match(kind.replace("-", "_")) else "another kind"


def _connection(connection_id: str, value: str) -> AirflowConnection:
    """Read one value. Raises Mistake with all that is wrong with it, _NotOurs."""
    parts = _from_json(value) if value.startswith("{") else _from_uri(value)
    problems: list[str] = []
    extras = Extras(parts.extras, problems)
    transport: Literal["rest", "cli"] = extras.choice("transport", ("rest", "cli")) or "rest"
    if transport == "cli":
        return _by_cli(connection_id, parts, extras, problems)
    address = _base_url(parts, problems)
    token = extras.token()
    problems += credentials_problems(parts.username, parts.password, token)
    connection = AirflowConnection(
        id=connection_id,
        base_url=address,
        username=parts.username or None,
        password=(parts.password or "") if parts.username else None,
        token=token,
        api_version=extras.choice("api_version", ("v1", "v2")),
        max_in_flight=int(extras.number("max_in_flight", MAX_IN_FLIGHT, 1, 1000, whole=True)),
        api_workers=int(extras.number("api_workers", 1, 1, 256, whole=True)),
        verify=extras.flag("verify", True),
        ca_file=extras.file("ca_file"),
        connect_timeout_s=extras.number("connect_timeout_s", CONNECT_TIMEOUT_S, 0.01, 60),
        read_timeout_s=extras.number("read_timeout_s", READ_TIMEOUT_S, 0.01, 300),
        timed_out_slot_s=extras.number("timed_out_slot_s", TIMED_OUT_SLOT_S, 0, 3600),
        window=_window(extras, problems),
    )
    if extras.choice("failover", ("cli",)):
        in_flight = int(extras.number("cli_max_in_flight", CLI_MAX_IN_FLIGHT, 1, 100, whole=True))
        stand_in = replace(
            _cli(f"{connection_id}.cli", extras, problems, connection, in_flight), stands_in=True
        )
        connection = replace(connection, failover=stand_in)
    extras.refuse_the_rest()
    if connection.ca_file and not connection.verify:
        problems.append("has a ca_file and verify=false: give one of them")
    if problems:
        raise Mistake(*problems)
    return connection


def _by_cli(connection_id: str, parts: Parts, extras: Extras, problems: list[str]) -> AirflowConnection:
    """Return a connection that has no API. Raises Mistake with all that is wrong with it."""
    for name, given in (("user", parts.username), ("password", parts.password)):
        if given:
            problems.append(f"has a {name}, and transport=cli takes none: leave it out")
    for name in ("token", "token_file"):
        if extras.take(name) is not None:
            problems.append(f"has a {name}, and transport=cli takes none: leave it out")
    described = AirflowConnection(
        id=connection_id,
        base_url=_base_url(parts, problems) if parts.host else "",
        api_version=extras.choice("api_version", ("v1", "v2")),
        timed_out_slot_s=extras.number("timed_out_slot_s", TIMED_OUT_SLOT_S, 0, 3600),
        window=_window(extras, problems),
    )
    in_flight = int(extras.number("max_in_flight", CLI_MAX_IN_FLIGHT, 1, 100, whole=True))
    connection = _cli(connection_id, extras, problems, described, in_flight)
    extras.refuse_the_rest()
    if problems:
        raise Mistake(*problems)
    return connection


def _cli(
    connection_id: str, extras: Extras, problems: list[str], like: AirflowConnection, in_flight: int
) -> AirflowConnection:
    """Return the way by the CLI to the Airflow of another connection."""
    command = _command(extras, problems)
    return AirflowConnection(
        id=connection_id,
        base_url=like.base_url,
        api_version=like.api_version,
        max_in_flight=in_flight,
        transport="cli",
        command=command,
        connect_timeout_s=0.0,
        read_timeout_s=command.timeout_s,
        timed_out_slot_s=like.timed_out_slot_s,
        window=like.window,
    )


def _command(extras: Extras, problems: list[str]) -> Command:
    argv = _words(extras.take("cli_command"), problems)
    remote_shell = extras.flag("cli_remote_shell", PurePath(argv[0]).name == "ssh")
    timeout_s = extras.number("cli_timeout_s", CLI_TIMEOUT_S, 1, 600)
    return Command(argv, remote_shell, _environment(extras.take("cli_env"), problems), timeout_s)


def _words(value: Any, problems: list[str]) -> tuple[str, ...]:
    """Return the words of a command, given as a list, or as a text that is JSON or as for a shell."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else shlex.split(value)
        except (ValueError, RecursionError):
            value = [""]
    if value is None:
        return ("airflow",)
    if not (
        isinstance(value, list) and value and all(isinstance(one, str) for one in value) and value[0]
    ) or any("\0" in one for one in value):
        problems.append("cli_command is no list of words")
        return ("airflow",)
    return tuple(value)


def _environment(value: Any, problems: list[str]) -> dict[str, str]:
    """Return names and values, given as an object, or as the JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = [value]
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(
        _ENV_NAME.match(name) and isinstance(text, str) and "\0" not in text for name, text in value.items()
    ):
        problems.append("cli_env is no JSON object of names and texts")
        return {}
    return value


def _window(extras: Extras, problems: list[str]) -> Window | None:
    """Return the window of requests which name none; in a URI a number is text."""
    value = extras.take("window")
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if value is None:
        return None
    if problem := window_problem(value):
        problems.append(f"window {problem}")
        return None
    return MAX_ACTIVE_RUNS if isinstance(value, str) else int(value)


def _from_uri(value: str) -> Parts:
    matched = URI.match(value)
    if matched is None:
        raise Mistake("is neither a URI (http://user:password@host:8080) nor JSON")
    kind = matched[1].lower()
    if kind not in _OURS:
        raise _NotOurs(kind)
    # Airflow also reads http://https://host, with the protocol as a part of the host.
    if twice := re.match(r"[^:]+://(https?)://", value):
        kind, value = twice[1], value.split("://", 1)[1]
    parts = parts_of_uri(value)
    parts.kind = kind
    inner = parts.extras.pop("__extra__", None)
    parts.extras |= _extra_object(inner)
    return _with_inner_url(parts)


def _from_json(value: str) -> Parts:
    given = json_object(value)
    kind = str(given.get("conn_type") or "").lower()
    if not kind:
        raise Mistake("has no conn_type: give http or https")
    if kind not in _OURS:
        raise _NotOurs(kind)
    problems = [f"has no use for {shown(name)}" for name in given if name not in _JSON_KEYS]
    texts: dict[str, str | None] = {}
    for name in ("host", "login", "password", "schema"):
        if given.get(name) is not None and not isinstance(given[name], str):
            problems.append(f"{name} is no text")
        texts[name] = given.get(name) if isinstance(given.get(name), str) else None
    if problems:
        raise Mistake(*problems)
    return _with_inner_url(
        Parts(
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
            raise Mistake("extra is not JSON") from None
    if not extra:
        return {}
    if not isinstance(extra, dict):
        raise Mistake("extra is no JSON object")
    return dict(extra)


def _with_inner_url(parts: Parts) -> Parts:
    """Take apart a host that is itself a URL, as Airflow's HTTP connections may have it."""
    if "://" not in parts.host:
        return parts
    try:
        inner = urlsplit(parts.host)
        port = inner.port
    except ValueError:
        raise Mistake("the host is a URL that cannot be read") from None
    if inner.scheme not in ("http", "https") or "@" in inner.netloc:
        raise Mistake("the host is a URL, and not a plain http:// or https:// one")
    parts.kind, parts.host = inner.scheme, inner.hostname or ""
    parts.port = port or parts.port
    parts.path = inner.path.strip("/") or parts.path
    return parts


def _base_url(parts: Parts, problems: list[str]) -> str:
    path = parts.path.strip("/")
    tls = parts.kind == "https" or path.lower() == "https"
    path = "" if path.lower() in ("http", "https") else path
    if re.search(r"(\A|/)api(/v[12])?\Z", path):
        problems.append("the path is the API's: give Airflow's own address, without /api/…")
        path = ""
    return base_url(parts, path, tls=tls, problems=problems)
