"""The producer's settings: the one place of this package that reads the environment."""

from __future__ import annotations

import base64
import binascii
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from redis.connection import parse_url

from .errors import ConfigurationError

CONF_KEY = "DAGRELAY_CONF_KEY"
CONF_LIMIT = "DAGRELAY_CONF_LIMIT_BYTES"
CONF_LIMIT_BYTES = 32_768
"""A conf of more bytes as JSON goes by reference: see `stores.claim_check`."""

_REDIS_URL = re.compile(r"(redis|rediss|unix)://.+")


@dataclass(frozen=True)
class ProducerSettings:
    """What a producer needs to know. `redis_url` may hold a password and is not shown."""

    redis_url: str = field(repr=False)
    client_name: str
    """Who asks, as the run's note in Airflow says it."""
    timeout_s: float = 0.45
    """For connecting and for each answer. Tried twice at the most, so a call ends within about 1 s."""
    max_connections: int = 20
    """Of this process. A further thread waits for one for `timeout_s`."""
    conf_key: str = field(default="", repr=False)
    """The keys by which confs are sealed, with commas between them: see `stores.claim_check`."""
    conf_limit_bytes: int = CONF_LIMIT_BYTES


def read_value(environ: Mapping[str, str], name: str, mistakes: list[str]) -> str | None:
    """Return a variable's value, or what the file named by `<name>_FILE` holds; None where neither is set."""
    value = environ.get(name)
    path = environ.get(f"{name}_FILE")
    if value and path:
        mistakes.append(f"{name} and {name}_FILE are both set: unset one of them")
    if value:
        return value
    if path:
        try:
            return Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as exc:
            mistakes.append(f"{name}_FILE cannot be read: {type(exc).__name__}")
    return None


def conf_key_problem(text: str) -> str:
    """Return what is wrong with the keys for confs, or ""; shows none of them."""
    for key in filter(None, (one.strip() for one in text.split(","))):
        try:
            size = len(base64.b64decode(key, altchars=b"-_", validate=True))
        except (binascii.Error, ValueError):
            size = 0
        if size != 32:
            return (
                "holds what is no Fernet key: python -c 'from cryptography.fernet import Fernet; "
                "print(Fernet.generate_key().decode())' makes one; several go with commas between them"
            )
    if text.strip(" ,") and find_spec("cryptography") is None:
        return "is set, and the package cryptography is not installed: pip install 'dagrelay[crypto]'"
    return ""


def read_conf(environ: Mapping[str, str], mistakes: list[str]) -> tuple[str, int]:
    """Return the keys for confs, and above how many bytes confs go by reference; note every mistake."""
    key = (read_value(environ, CONF_KEY, mistakes) or "").strip()
    if problem := conf_key_problem(key):
        mistakes.append(f"{CONF_KEY} {problem}")
    text = environ.get(CONF_LIMIT) or str(CONF_LIMIT_BYTES)
    if not (text.isascii() and text.isdecimal() and len(text) <= 7 and int(text) <= 1_000_000):
        mistakes.append(f"{CONF_LIMIT} is {text[:20]!r}: give a whole number from 0 to 1000000")
        return key, CONF_LIMIT_BYTES
    return key, int(text)


def redis_url_problem(url: str) -> str:
    """Return what is wrong with a Redis URL, or ""; never shows the URL, which may hold a password."""
    if url.startswith("sentinel"):
        return "names Sentinel, which is not supported: give the address of the primary"
    form = "is no Redis URL: redis://[user:password@]host:port/db, or rediss:// with TLS"
    if not _REDIS_URL.fullmatch(url):
        return form
    hint = f"{form}; characters of a password other than letters and digits go as %XX"
    try:
        given, parts = parse_url(url), urlsplit(url)
    except ValueError:  # its text may hold a part of the password
        return hint
    if "path" not in given and (not parts.hostname or ("db" not in given and parts.path.strip("/"))):
        return hint  # redis-py would go to localhost, or to database 0
    return ""


def default_client_name() -> str:
    """Return `program@host`."""
    program = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else "python"
    name = f"{program or 'python'}@{socket.gethostname()}"[:100]
    return "".join(character if character.isprintable() else "_" for character in name)


def read_settings(environ: Mapping[str, str] | None = None, **given: str | None) -> ProducerSettings:
    """Return the settings from the environment; what is given in code goes first.

    Raises ConfigurationError with every mistake at once, by the variable's name.
    """
    environ = os.environ if environ is None else environ
    mistakes: list[str] = []
    url = given.get("redis_url") or read_value(environ, "DAGRELAY_REDIS_URL", mistakes)
    if not url:
        if not mistakes:
            mistakes.append(
                "DAGRELAY_REDIS_URL is not set: give the Redis of Dagrelay's workers, e.g. redis://host:6379/0"
            )
    elif problem := redis_url_problem(url):
        mistakes.append(f"DAGRELAY_REDIS_URL {problem}")
    name = given.get("client_name") or environ.get("DAGRELAY_CLIENT_NAME") or default_client_name()
    if not name.isprintable():
        mistakes.append("DAGRELAY_CLIENT_NAME holds characters that cannot be printed")
    conf_key, conf_limit_bytes = read_conf(environ, mistakes)
    if mistakes:
        raise ConfigurationError(*mistakes)
    return ProducerSettings(
        redis_url=url or "", client_name=name[:100], conf_key=conf_key, conf_limit_bytes=conf_limit_bytes
    )
