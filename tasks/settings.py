"""The worker's settings: the one place on this side that reads the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from producers.errors import ConfigurationError
from producers.stores.callbacks import SECRET, Secrets, read_secrets
from producers.stores.claim_check import ConfRules, read_conf_rules

from .airflow.connections import AirflowConnection, read_connections
from .hooks import Hook, read_hooks
from .services import Service, read_services


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to know. Durations are in seconds; secrets are not shown."""

    redis_url: str = field(repr=False)
    connections: Mapping[str, AirflowConnection]
    services: Mapping[str, Service] = field(default_factory=dict)
    hooks: Mapping[str, Hook] = field(default_factory=dict)
    callback_url: str | None = None
    """Where services reach a gateway of ours, from outside: without "/" at its end."""
    callback_secrets: Secrets = Secrets()  # noqa: RUF009 - frozen
    concurrency: int = 16
    visibility_timeout_s: float = 30.0
    slots: bool = True
    """False for benchmarks alone: nothing is counted, and nothing spares Airflow."""
    fetch: str = "moved"
    """How messages are fetched from Redis: "moved", our transport's way, or "stock", kombu's."""
    result_ttl_s: int = 86_400
    log_level: str = "INFO"
    log_format: Literal["logfmt", "json"] = "logfmt"
    missing_grace_s: float = 60.0
    """How long a DAG may be missing or broken: while its file is redeployed, Airflow's processor drops it
    1–5 s after the change and has it back after its next parse (30 s by default)."""
    look_up_for_s: float = 900.0
    """How long an unknown outcome is looked up after giving up: on an overloaded Airflow 3.3.2, runs of
    lost answers were seen up to six minutes later."""
    look_up_every_s: float = 30.0
    find_for_s: float = 60.0
    """How long after a submission whose answer was lost its job may appear late, before a lookup that finds
    nothing is believed: as long as a slow server may go on with a request whose client has gone."""
    retry_cap_s: float = 20.0
    """The longest wait between two attempts; what Airflow asks for by Retry-After goes beyond it."""
    hold_probe_s: float = 30.0
    """How often a connection whose credentials were refused is tried again, by one cheap question."""
    fan_out_watch_s: float = 60.0
    """How often a fan-out that does not get on is looked at: whether all of its parts are still there."""
    metrics_ports: range = range(0)
    """The TCP ports of which this process takes the first free one for its metrics; none: it serves none."""
    metrics_host: str = "0.0.0.0"  # noqa: S104 - that of a container; what is served there names no dag and no key
    delivery_pauses_s: tuple[float, ...] = (
        *(5, 30, 120, 600, 1800, 3600),
        *(2 * 3600, 3 * 3600, 4 * 3600, 6 * 3600, 8 * 3600),
    )
    """The pauses between the attempts to tell a hook: about a day in all, so that a receiver that is away for
    a night still hears of what ended. They grow by a fifth at random."""
    task_state_for_s: float = 86_400.0
    """How long it is tried to tell an Airflow task how its job ended, without holds of its connection."""
    dead_keep_s: int = 14 * 86_400
    """How long a dead letter is kept."""
    dead_max: int = 100_000
    """How many dead letters are kept: the oldest go first. Each holds its request, conf and all, mostly below
    2 KB; none may be over a megabyte or two."""
    confs: ConfRules = ConfRules()  # noqa: RUF009 - frozen
    """The keys for confs, and from which size on they go by reference."""
    conf_ttl_s: int = 30 * 86_400
    """How long a stored conf is kept after the last request with it has ended."""

    @property
    def conf_keep_s(self) -> int:
        """As long as that, and never shorter than a dead letter."""
        return max(self.conf_ttl_s, self.dead_keep_s)


def _redis_url(environ: Mapping[str, str], mistakes: list[str]) -> str:
    url = environ.get("DAGRELAY_REDIS_URL", "")
    path = environ.get("DAGRELAY_REDIS_URL_FILE")
    if url and path:
        mistakes.append("DAGRELAY_REDIS_URL and DAGRELAY_REDIS_URL_FILE are both set: unset one of them")
    elif path:
        try:
            url = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as exc:
            mistakes.append(f"DAGRELAY_REDIS_URL_FILE cannot be read: {type(exc).__name__}")
            return ""
    if not url:
        mistakes.append(
            "DAGRELAY_REDIS_URL is not set: give the Redis to work from, e.g. redis://host:6379/0"
        )
    elif url.startswith("sentinel://"):
        mistakes.append(
            "DAGRELAY_REDIS_URL is a Sentinel URL, and workers speak to one Redis: give the address of its "
            "primary, or of a proxy that follows it, as redis://[user:password@]host:port/db, or rediss://"
        )
    elif not url.startswith(("redis://", "rediss://")):
        mistakes.append(
            "DAGRELAY_REDIS_URL is no Redis URL: redis://[user:password@]host:port/db, or rediss://"
        )
    return url


def _number(
    environ: Mapping[str, str], name: str, default: float, low: float, high: float, mistakes: list[str]
) -> float:
    text = environ.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        mistakes.append(f"{name} is {text[:20]!r}: give a number from {low:g} to {high:g}")
        return default
    return value


def _pauses(environ: Mapping[str, str], mistakes: list[str]) -> tuple[float, ...]:
    name = "DAGRELAY_DELIVERY_PAUSES_S"
    text = environ.get(name, "")
    if not text:
        return WorkerSettings.delivery_pauses_s
    try:
        pauses = tuple(float(one) for one in text.split(","))
    except ValueError:
        pauses = ()
    if not 0 < len(pauses) <= 50 or not all(0.05 <= pause <= 86_400 for pause in pauses):
        mistakes.append(f"{name} is {text[:40]!r}: give up to 50 numbers from 0.05 to 86400, as 5,30,120")
    return pauses


_HOST = re.compile(r"[A-Za-z0-9_.:-]{1,253}")


def _metrics(environ: Mapping[str, str], mistakes: list[str]) -> tuple[range, str]:
    """Return the ports and the address on which to serve metrics."""
    text = environ.get("DAGRELAY_METRICS_PORT", "")
    host = environ.get("DAGRELAY_METRICS_HOST") or WorkerSettings.metrics_host
    if not _HOST.fullmatch(host):
        mistakes.append(
            f"DAGRELAY_METRICS_HOST is {host[:40]!r}: give an address of this machine, e.g. 0.0.0.0"
        )
    if not text:
        return range(0), host
    parts = text.split("-")
    numbers = [int(part) for part in parts if part.isascii() and part.isdecimal() and len(part) <= 5]
    first, last = (numbers[0], numbers[-1]) if numbers else (0, 0)
    if len(numbers) != len(parts) or len(parts) > 2 or not 1 <= first <= last <= 65_535:
        mistakes.append(
            f"DAGRELAY_METRICS_PORT is {text[:20]!r}: give a TCP port from 1 to 65535, or a range such as "
            "9464-9471 for several workers on one machine"
        )
        return range(0), host
    return range(first, last + 1), host


def _callback_url(environ: Mapping[str, str], secrets: Secrets, mistakes: list[str]) -> str | None:
    url = environ.get("DAGRELAY_CALLBACK_URL", "").rstrip("/")
    if not url:
        return None
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc
    except ValueError:
        wrong = True
    if wrong or not url.isprintable() or set(url) & set(" ?#\\"):
        mistakes.append(
            "DAGRELAY_CALLBACK_URL is no plain http:// or https:// URL: give the gateway's address as "
            "services see it, e.g. https://dagrelay.example.org"
        )
    elif not secrets:
        mistakes.append(f"DAGRELAY_CALLBACK_URL is set without {SECRET}: openssl rand -hex 32 makes one")
    return url


def read_settings(environ: Mapping[str, str]) -> WorkerSettings:
    """Return the settings. Raises ConfigurationError with every mistake at once, by the variable's name."""
    mistakes: list[str] = []
    redis_url = _redis_url(environ, mistakes)
    connections, wrong = read_connections(environ)
    mistakes += wrong
    services, wrong = read_services(environ)
    mistakes += wrong
    hooks, wrong = read_hooks(environ)
    mistakes += wrong
    level = environ.get("DAGRELAY_LOG_LEVEL", "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        mistakes.append(f"DAGRELAY_LOG_LEVEL is {level[:20]!r}: give DEBUG, INFO, WARNING or ERROR")
    log_format = environ.get("DAGRELAY_LOG_FORMAT") or "logfmt"
    if log_format not in ("logfmt", "json"):
        mistakes.append(f"DAGRELAY_LOG_FORMAT is {log_format[:20]!r}: give logfmt or json")
    fetch = environ.get("DAGRELAY_FETCH", "moved")
    if fetch not in ("moved", "stock"):
        mistakes.append(f"DAGRELAY_FETCH is {fetch[:20]!r}: give moved or stock")
    callback_secrets = read_secrets(environ, mistakes)
    callback_url = _callback_url(environ, callback_secrets, mistakes)
    metrics_ports, metrics_host = _metrics(environ, mistakes)
    settings = WorkerSettings(
        slots=environ.get("DAGRELAY_SLOTS") != "off",
        fetch=fetch,
        redis_url=redis_url,
        connections=connections,
        services=services,
        callback_url=callback_url,
        callback_secrets=callback_secrets,
        hooks=hooks,
        delivery_pauses_s=_pauses(environ, mistakes),
        concurrency=int(_number(environ, "DAGRELAY_WORKER_CONCURRENCY", 16, 1, 512, mistakes)),
        visibility_timeout_s=_number(environ, "DAGRELAY_VISIBILITY_TIMEOUT_S", 30, 3, 3600, mistakes),
        result_ttl_s=int(_number(environ, "DAGRELAY_RESULT_TTL_S", 86_400, 60, 30 * 86_400, mistakes)),
        log_level=level,
        log_format="json" if log_format == "json" else "logfmt",
        missing_grace_s=_number(environ, "DAGRELAY_MISSING_GRACE_S", 60, 0, 86_400, mistakes),
        look_up_for_s=_number(environ, "DAGRELAY_LOOK_UP_FOR_S", 900, 0, 86_400, mistakes),
        look_up_every_s=_number(environ, "DAGRELAY_LOOK_UP_EVERY_S", 30, 1, 3600, mistakes),
        find_for_s=_number(environ, "DAGRELAY_FIND_FOR_S", 60, 0, 86_400, mistakes),
        retry_cap_s=_number(environ, "DAGRELAY_RETRY_CAP_S", 20, 0.1, 3600, mistakes),
        hold_probe_s=_number(environ, "DAGRELAY_HOLD_PROBE_S", 30, 1, 3600, mistakes),
        fan_out_watch_s=_number(environ, "DAGRELAY_FAN_OUT_WATCH_S", 60, 0.2, 3600, mistakes),
        metrics_ports=metrics_ports,
        metrics_host=metrics_host,
        task_state_for_s=_number(environ, "DAGRELAY_TASK_STATE_FOR_S", 86_400, 0, 30 * 86_400, mistakes),
        dead_keep_s=int(_number(environ, "DAGRELAY_DEAD_KEEP_S", 14 * 86_400, 60, 366 * 86_400, mistakes)),
        dead_max=int(_number(environ, "DAGRELAY_DEAD_MAX", 100_000, 1, 10_000_000, mistakes)),
        confs=read_conf_rules(environ, mistakes),
        conf_ttl_s=int(_number(environ, "DAGRELAY_CONF_TTL_S", 30 * 86_400, 60, 366 * 86_400, mistakes)),
    )
    if mistakes:
        raise ConfigurationError(*mistakes)
    return settings


@cache
def settings() -> WorkerSettings:
    """Return this process's settings, read once. Raises ConfigurationError."""
    return read_settings(os.environ)
