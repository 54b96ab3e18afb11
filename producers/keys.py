"""Keys of those who ask over HTTP and TCP: which DAGs each may start, how fast, and what else it may do.

They lie in one TOML file, which holds no secret: of each key only the hash. ``dagrelay keys new`` adds one
and shows its token, once. A change is in force within a second; a file that cannot be read leaves the keys
as they were, and is told in the log::

    [keys.billing]
    hash = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    dags = ["sales_*", "invoices"]    # patterns as in a shell; left out: all
    connections = ["default"]         # left out: that one alone
    services = ["render"]             # left out: none, so no jobs
    hooks = ["billing"]               # left out: none, so no on_end
    rate_per_s = 50                   # left out: no limit
    burst = 100                       # how many at once; left out: those of one second
    may_cancel = true                 # left out: false
    may_read = false                  # left out: true

To take a key away, remove its table.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .errors import ConfigurationError, InvalidRequest
from .scopes import ALL, EVERYTHING, Scope

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
"""How often the file is looked at."""

MOST_PER_S: Final = 1_000_000.0

_ID = re.compile(r"[A-Za-z0-9_-]{1,50}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_BEGINS: Final = "dagrelay_"  # by it those who look for leaked secrets find one


@dataclass(frozen=True, slots=True)
class Key:
    """Who asks. `id` is no secret: it is in logs, in records, and in the note of each run."""

    id: str
    scope: Scope
    rate_per_s: float | None = None
    """How many requests a second, on average; None for no limit."""
    burst: float = 1.0
    """How many at once."""
    may_read: bool = True
    may_cancel: bool = False


ANYBODY: Final = Key("anybody", EVERYTHING, may_cancel=True)
"""Who asks where no keys are asked for: `--insecure`, for one's own machine alone."""


class Keys:
    """The keys of one file, looked at again as it changes; safe for threads."""

    def __init__(self, path: Path, by_hash: Mapping[str, Key], seen: tuple[int, ...] | None) -> None:
        self._path, self._by_hash, self._seen = path, by_hash, seen
        self._next_look = time.monotonic() + LOOK_EVERY_S
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Return the keys of a file. Raises ConfigurationError with every mistake in it."""
        seen = _stamp(path)
        return cls(path, read_keys(path), seen)

    def find(self, token: str) -> Key | None:
        """Return the key with this token, or None.

        Found by its hash: how long that takes tells nothing of how much of a token was right. A token has
        256 random bits, so that its plain hash cannot be guessed at.
        """
        if time.monotonic() >= self._next_look:
            self._look_again()
        return self._by_hash.get(hash_of(token))

    def holds(self, key: Key) -> bool:
        """Tell whether a key that was found before is still there, and as it was then."""
        if time.monotonic() >= self._next_look:
            self._look_again()
        return key in self._by_hash.values()

    def __iter__(self) -> Any:
        return iter(self._by_hash.values())

    def __len__(self) -> int:
        return len(self._by_hash)

    def _look_again(self) -> None:
        if not self._lock.acquire(blocking=False):
            return  # another thread is at it
        try:
            self._next_look = time.monotonic() + LOOK_EVERY_S
            seen = _stamp(self._path)
            if seen == self._seen:
                return
            self._seen = seen
            try:
                self._by_hash = read_keys(self._path)
            except ConfigurationError as exc:
                log.error("keys not read, the former ones stay in force: %s", "; ".join(exc.mistakes))
            else:
                log.info("keys read again number=%d", len(self._by_hash))
        finally:
            self._lock.release()


def hash_of(token: str) -> str:
    """Return a token's hash as the file has it."""
    return f"sha256:{hashlib.sha256(token.encode('utf-8', 'surrogatepass')).hexdigest()}"


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes whenever the file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_keys(path: Path) -> dict[str, Key]:
    """Return the keys of a file by their hashes. Raises ConfigurationError with every mistake in it."""
    try:
        given = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"keys: {path} cannot be read ({type(exc).__name__})") from None
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationError(f"keys: {path} is no TOML: {exc}") from None
    mistakes = [f"keys: {path} has {name!r}: it holds tables [keys.NAME]" for name in given if name != "keys"]
    tables = given.get("keys", {})
    if not isinstance(tables, dict):
        mistakes.append(f"keys: {path}: `keys` is no table: it holds tables [keys.NAME]")
        tables = {}
    found: dict[str, Key] = {}
    for name, table in tables.items():
        draft = _Draft(f"[keys.{name}]", table if isinstance(table, dict) else {})
        if not isinstance(table, dict) or not _ID.fullmatch(name):
            draft.mistakes.append(f"[keys.{name}]: is no table with a name of up to 50 of A-Z a-z 0-9 _ -")
        digest = draft.hash()
        key = draft.key(name)
        mistakes += draft.mistakes
        if digest in found:
            mistakes.append(
                f"[keys.{name}]: has the hash of [keys.{found[digest].id}]: give it a token of its own"
            )
        elif digest is not None and not draft.mistakes:
            found[digest] = key
    if mistakes:
        raise ConfigurationError(*mistakes)
    return found


@dataclass
class _Draft:
    """One table of the file as it is read, and what is wrong with it."""

    where: str
    given: Mapping[str, Any]
    mistakes: list[str] = field(default_factory=list)

    KNOWN = (
        "hash",
        "dags",
        "connections",
        "services",
        "hooks",
        "rate_per_s",
        "burst",
        "may_read",
        "may_cancel",
    )

    def hash(self) -> str | None:
        value = self.given.get("hash")
        if not isinstance(value, str) or not _HASH.fullmatch(value):
            self.mistakes.append(
                f"{self.where}: hash is no `sha256:` with 64 hex digits: use dagrelay keys new"
            )
            return None
        return value

    def key(self, name: str) -> Key:
        for unknown in self.given:
            if unknown not in self.KNOWN:
                self.mistakes.append(f"{self.where}: {unknown!r} is none of {', '.join(self.KNOWN)}")
        rate = self.number("rate_per_s")
        return Key(
            name,
            Scope(
                self.patterns("dags", ALL),
                tuple(one.lower() for one in self.patterns("connections", ("default",))),
                tuple(one.lower() for one in self.patterns("services", ())),
                tuple(one.lower() for one in self.patterns("hooks", ())),
            ),
            rate,
            max(1.0, self.number("burst") or rate or 1.0),
            self.truth("may_read", True),
            self.truth("may_cancel", False),
        )

    def patterns(self, name: str, otherwise: tuple[str, ...]) -> tuple[str, ...]:
        value = self.given.get(name)
        if value is None:
            return otherwise
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            self.mistakes.append(f'{self.where}: {name} is no list of patterns, such as ["sales_*"]')
            return ()
        return tuple(value)

    def number(self, name: str) -> float | None:
        value = self.given.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST_PER_S:
            self.mistakes.append(f"{self.where}: {name} is no number over 0")
            return None
        return float(value)

    def truth(self, name: str, otherwise: bool) -> bool:
        value = self.given.get(name, otherwise)
        if not isinstance(value, bool):
            self.mistakes.append(f"{self.where}: {name} is neither true nor false")
            return False
        return value


def new_key(
    path: Path,
    name: str,
    *,
    dags: Sequence[str] = (),
    connections: Sequence[str] = (),
    services: Sequence[str] = (),
    hooks: Sequence[str] = (),
    rate_per_s: float | None = None,
    burst: float | None = None,
    may_cancel: bool = False,
    may_read: bool = True,
) -> str:
    """Add a key to the file, which is made where there is none; return its token, which is kept nowhere.

    Raises InvalidRequest for what could not be read again, ConfigurationError for a file that cannot be.
    """
    if not _ID.fullmatch(name):
        raise InvalidRequest("name: give up to 50 of A-Z a-z 0-9 _ -")
    if path.exists() and any(key.id == name for key in read_keys(path).values()):
        raise InvalidRequest(
            f"name: there is a key {name!r} already: remove its table first, or take another"
        )
    token = f"{_BEGINS}{secrets.token_urlsafe(32)}"
    lines = [f"\n[keys.{name}]", f'hash = "{hash_of(token)}"']
    several = {"dags": dags, "connections": connections, "services": services, "hooks": hooks}
    for option, patterns in several.items():
        if patterns:
            lines.append(f"{option} = [{', '.join(_quoted(one) for one in patterns)}]")
    for option, number in (("rate_per_s", rate_per_s), ("burst", burst)):
        if number is not None:
            lines.append(f"{option} = {number:g}")
    if may_cancel:
        lines.append("may_cancel = true")
    if not may_read:
        lines.append("may_read = false")
    text = "\n".join(lines) + "\n"
    draft = _Draft("", next(iter(tomllib.loads(text)["keys"].values())))
    draft.key(name)
    if draft.mistakes:
        raise InvalidRequest("; ".join(mistake.removeprefix(": ") for mistake in draft.mistakes))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Added to the end in one step: comments stay as they are, and of two at once both are there.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
        file.write(text)
    return token


def _quoted(text: str) -> str:
    if not text.isprintable() or '"' in text or "\\" in text:
        raise InvalidRequest(
            f"pattern {text[:40]!r}: give printable characters other than quotes and backslashes"
        )
    return f'"{text}"'
