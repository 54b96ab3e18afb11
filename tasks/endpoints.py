"""Addresses with credentials, as an operator gives them in the environment: as a URI, as JSON, in a file.

What Airflow's connections (`AIRFLOW_CONN_<ID>`) and the services (`DAGRELAY_SERVICE_<ID>`) have in common. No
text of a mistake holds a secret, nor a part of one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

T = TypeVar("T")

URI = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*)://")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}\Z")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?\Z")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9._-]+)?\Z")
_BASE_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*\Z")
_HEADER_VALUE = re.compile(r"[!-~]+\Z")

UNREADABLE = (
    "cannot be read as a URI: percent-encode what is special in user and password "
    "(@ as %40, / as %2F, # as %23, ? as %3F, : as %3A)"
)


class Mistake(Exception):
    """What is wrong with one value."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems


@dataclass
class Parts:
    """What a URI and JSON have in common."""

    kind: str
    host: str = ""
    port: Any = None
    path: str = ""
    username: str | None = None
    password: str | None = None
    extras: dict[str, Any] = field(default_factory=dict)


def variables(
    environ: Mapping[str, str], pattern: re.Pattern[str]
) -> list[tuple[str, str, Callable[[], str]]]:
    """Return for each variable its name, the id in it (the pattern's group), and how to read the value."""
    found: list[tuple[str, str, Callable[[], str]]] = []
    for variable in sorted(environ):
        matched = pattern.match(variable)
        value = environ[variable].strip()
        if matched is None or not value:  # compose passes what is not set as empty
            continue
        its_id = matched[1].lower()
        looks_like_value = value.startswith("{") or URI.match(value)
        if its_id.endswith("_file") and its_id != "_file" and not looks_like_value:
            found.append((variable, its_id.removesuffix("_file"), file_reader(value)))
        else:
            found.append((variable, its_id, lambda value=value: value))  # type: ignore[misc]
    return found


def read_each(
    environ: Mapping[str, str], pattern: re.Pattern[str], what: str, read_one: Callable[[str, str], T]
) -> tuple[dict[str, T], list[str]]:
    """Return what the variables hold by their ids, and every mistake by its variable's name.

    `read_one` makes it of an id and a value, and raises Mistake; one with a mistake is left out.
    """
    found: dict[str, T] = {}
    mistakes: list[str] = []
    for variable, its_id, read in variables(environ, pattern):
        if its_id in found:
            mistakes.append(f"{variable}: {what} {its_id!r} is set twice")
            continue
        try:
            found[its_id] = read_one(its_id, read())
        except Mistake as exc:
            mistakes += [f"{variable}: {problem}" for problem in exc.problems]
    return found, mistakes


def file_reader(path: str) -> Callable[[], str]:
    """Return a function that returns the file's text. It raises Mistake."""

    def read() -> str:
        try:
            value = Path(path).read_text("utf-8").strip()
        except (OSError, ValueError) as exc:
            raise Mistake(f"the file cannot be read ({_why(exc)})") from None
        if not value:
            raise Mistake("the file is empty")
        return value

    return read


def _why(exc: Exception) -> str:
    return (exc.strerror if isinstance(exc, OSError) else None) or type(exc).__name__


def parts_of_uri(value: str) -> Parts:
    """Take a URI apart; its query becomes the extras. Raises Mistake."""
    try:
        split = urlsplit(value)
        port = split.port
    except ValueError:  # its text would show a part of the password
        raise Mistake(UNREADABLE) from None
    if split.fragment or "@" in split.path or split.netloc.count("@") > 1 or "\\" in value:
        raise Mistake(UNREADABLE)
    return Parts(
        kind=split.scheme.lower(),
        host=unquote(split.hostname or ""),
        port=port,
        path=unquote(split.path),
        username=None if split.username is None else unquote(split.username),
        password=None if split.password is None else unquote(split.password),
        extras=dict(parse_qsl(split.query, keep_blank_values=True)),
    )


def json_object(value: str) -> dict[str, Any]:
    """Return the object that a value beginning with "{" is. Raises Mistake."""
    try:
        given = json.loads(value)
    except (ValueError, RecursionError):
        raise Mistake("begins with { and is not JSON") from None
    return dict(given)


def base_url(parts: Parts, path: str, *, tls: bool, problems: list[str]) -> str:
    """Return scheme, host, port and path, without credentials and without "/" at the end; note problems."""
    host = parts.host.strip("[]")
    if not host:
        problems.append("has no host")
    elif _IPV6.match(host):
        host = f"[{host}]"
    elif not _HOST.match(host):
        problems.append("the host is no host name")
    path = f"/{path.strip('/')}".rstrip("/")
    if not _BASE_PATH.match(path) or "/." in path:
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


def credentials_problems(username: str | None, password: str | None, token: str | None) -> list[str]:
    """Return what is wrong with credentials given together."""
    problems: list[str] = []
    if token and (username or password):
        problems.append("has a token as well as a user or password: give one of them")
    elif password and not username:
        problems.append("has a password and no user")
    for name, secret in (("user", username), ("password", password)):
        if secret and any(ord(character) < 32 for character in secret):
            problems.append(f"the {name} holds a control character")
    return problems


def shown(name: object) -> str:
    """A name as a mistake may show it: what is no plain name may be a part of a password."""
    return repr(name) if isinstance(name, str) and NAME.match(name) else "a name that is no plain word"


class Extras:
    """Takes the extras one by one, notes what is wrong with each, and refuses what nobody took."""

    def __init__(self, extras: Mapping[str, Any], problems: list[str]) -> None:
        self._left = dict(extras)
        self._problems = problems

    def take(self, name: str) -> Any:
        """Return a value as it was given; None for one that is not there, or empty."""
        value = self._left.pop(name, None)
        return None if value == "" else value

    def text(self, name: str) -> str | None:
        """Return a text, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            self._problems.append(f"{name} is no text")
            return None
        return value

    def token(self) -> str | None:
        """Return the token, given as such or by a file."""
        token, path = self.text("token"), self.text("token_file")
        if token and path:
            self._problems.append("has token and token_file: give one of them")
            return None
        if path:
            try:
                token = file_reader(path)()
            except Mistake as exc:
                self._problems += [f"token_file: {problem}" for problem in exc.problems]
                return None
        if token and not _HEADER_VALUE.match(token):
            self._problems.append("the token holds characters that a header may not have")
            return None
        return token

    def choice(self, name: str, allowed: tuple[str, ...]) -> Any:
        """Return one of the words that are allowed, or None."""
        value = self.take(name)
        if value is None or value in allowed:
            return value
        self._problems.append(f"{name} is none of {', '.join(allowed)}")
        return None

    def number(self, name: str, default: float, low: float, high: float, *, whole: bool = False) -> float:
        """Return a number within bounds."""
        value = self.take(name)
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
        """Return true or false, in one of the usual words."""
        value = self.take(name)
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
        """Return the path of a file that can be read, or None."""
        path = self.text(name)
        if path is not None:
            try:
                with Path(path).open("rb") as file:
                    file.read(1)
            except (OSError, ValueError) as exc:
                self._problems.append(f"{name}: the file cannot be read ({_why(exc)})")
        return path

    def refuse_the_rest(self, what: str = "the extra ") -> None:
        """Note everything that was not taken."""
        self._problems += [f"has no use for {what}{shown(name)}" for name in self._left]
