"""The gateway's settings: read once, from the environment and what the command line says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigurationError
from ..queues.message import MAX_MESSAGE_BYTES
from ..settings import ProducerSettings, read_settings

PREFIX: Final = "DAGRELAY_GATEWAY_"


@dataclass(frozen=True)
class GatewaySettings:
    """Each field is `DAGRELAY_GATEWAY_<NAME>` in the environment, and where that makes sense an option.

    Durations in seconds, sizes in bytes; what is said to be of a process counts for each worker process.
    """

    producer: ProducerSettings
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    keys_file: Path | None = None
    insecure: bool = False
    """No keys: for one's own machine alone, so only on loopback."""
    rules_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    require_idempotency_key: bool = False
    max_body_bytes: int = MAX_MESSAGE_BYTES
    max_fan_out_bytes: int = 64 * 1024 * 1024
    body_timeout_s: float = 30.0
    """For a head to be there whole, and then for a body: what is slower is cut off."""
    max_in_flight: int = 1000
    """Requests of a process at once; one more is asked to come again."""
    max_streams: int = 500
    """Streams of events of a process at once."""
    heartbeat_s: float = 15.0
    """Between two comments in a stream in which nothing happens."""
    stop_within_s: float = 20.0
    """When it is to end: for what it has in hand."""
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    """All of the environment that begins with DAGRELAY_, for doors with settings of their own."""


def read_gateway_settings(environ: Mapping[str, str] | None = None, **given: Any) -> GatewaySettings:
    """Return the settings; what is given in code (and is not None) goes before the environment.

    Raises ConfigurationError with every mistake at once, by the variable's name.
    """
    environ = os.environ if environ is None else environ
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    for one in fields(GatewaySettings):
        if one.name in ("producer", "environ"):
            continue
        value = given.get(one.name)
        if value is None and (text := environ.get(PREFIX + one.name.upper())):
            value = _read(one.name, str(one.type), text, mistakes)
        if value is not None:
            values[one.name] = value
    try:
        producer = read_settings(environ, client_name=given.get("client_name"))
    except ConfigurationError as exc:
        mistakes += exc.mistakes
        producer = None
    ours = {name: value for name, value in environ.items() if name.startswith("DAGRELAY_")}
    found = GatewaySettings(producer or ProducerSettings("", ""), environ=ours, **values)
    mistakes += _problems(found)
    if mistakes:
        raise ConfigurationError(*mistakes)
    return found


def _read(name: str, kind: str, text: str, mistakes: list[str]) -> Any:
    if kind.startswith("Path"):
        return Path(text)
    if kind == "bool":
        if text in ("0", "1"):
            return text == "1"
        mistakes.append(f"{PREFIX}{name.upper()} is neither 0 nor 1")
        return None
    if kind == "str":
        return text
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        mistakes.append(f"{PREFIX}{name.upper()} is no number")
        return None


def _problems(found: GatewaySettings) -> list[str]:
    problems = []
    for one in fields(found):
        value = getattr(found, one.name)
        if one.type in ("int", "float") and not 0 < value < float("inf") and one.name != "port":
            problems.append(f"{PREFIX}{one.name.upper()} is no number over 0")
    if not 0 <= found.port <= 65535:
        problems.append(f"{PREFIX}PORT is no port")
    if (found.tls_cert is None) != (found.tls_key is None):
        problems.append(f"{PREFIX}TLS_CERT and {PREFIX}TLS_KEY: give both or neither")
    if found.keys_file is None and not found.insecure:
        problems.append(
            f"{PREFIX}KEYS_FILE is not set: make a key by `dagrelay keys new NAME --file FILE`, or, on your "
            "own machine alone, give --insecure"
        )
    if found.keys_file is not None and found.insecure:
        problems.append(f"{PREFIX}KEYS_FILE and --insecure: give one of them")
    if found.insecure and not is_loopback(found.host):
        problems.append(
            f"{PREFIX}HOST: without keys only 127.0.0.1, ::1 or localhost, where others cannot come"
        )
    return problems


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
