"""The Airflow connection by which operators, sensors and triggers reach Dagrelay's Redis.

An Airflow connection of type ``dagrelay``, by default `dagrelay_default`::

    AIRFLOW_CONN_DAGRELAY_DEFAULT=dagrelay://user:p%40ss@redis:6379/0?flower_url=https%3A%2F%2Fflower

Host, port, login and password are those of Redis, the schema is the number of its database. Extras:
``ssl`` (true: TLS), ``redis_url`` (a whole Redis URL instead of all these), ``conf_key`` (what confs are
sealed with; default: `DAGRELAY_CONF_KEY`), ``conf_limit_bytes`` (default: `DAGRELAY_CONF_LIMIT_BYTES`),
``flower_url`` (for the links to tasks), ``airflow_name`` (what this Airflow is called, where several share
one Redis; default: its address).

Where there is no connection `dagrelay_default`, the environment counts, as for every producer:
`DAGRELAY_REDIS_URL` and its like.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote, urlsplit
from weakref import WeakKeyDictionary

from ..errors import ConfigurationError
from ..settings import CONF_KEY, CONF_LIMIT, ProducerSettings, read_settings
from .compat import AIRFLOW_3, AirflowNotFoundException, BaseHook, conf, mask_secret
from .provider import form_behaviour, form_widgets

if TYPE_CHECKING:
    from ..client import RelayClient

DEFAULT_CONN_ID: Final = "dagrelay_default"
KNOWN_FOR_S: Final = 5.0
EXTRAS: Final = ("airflow_name", "conf_key", "conf_limit_bytes", "flower_url", "redis_url", "ssl")


@dataclass(frozen=True)
class RelayTarget:
    """What an Airflow connection says: the producer's settings, and what only Airflow has a use for."""

    settings: ProducerSettings
    flower_url: str | None = None
    airflow_name: str = ""


class DagrelayHook(BaseHook):  # type: ignore[misc]
    """The way to one Dagrelay. Raises ConfigurationError, naming the connection, where that is wrong."""

    conn_name_attr = "relay_conn_id"
    default_conn_name = DEFAULT_CONN_ID
    conn_type = "dagrelay"
    hook_name = "Dagrelay"

    def __init__(self, relay_conn_id: str = DEFAULT_CONN_ID, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.relay_conn_id = relay_conn_id

    @property
    def target(self) -> RelayTarget:
        """What the connection says. Asks Airflow for it, in this thread."""
        try:
            connection = self.get_connection(self.relay_conn_id)
        except AirflowNotFoundException:
            return _from_environment(self.relay_conn_id)
        target = target_of(connection, self.relay_conn_id)
        # Airflow hides the password by itself, and knows nothing of what our extras hold.
        for secret in (*target.settings.conf_key.split(","), urlsplit(target.settings.redis_url).password):
            if secret:
                mask_secret(unquote(secret))
        return target

    async def atarget(self) -> RelayTarget:
        """Do as `target` does, within an event loop; what was said within `KNOWN_FOR_S` stands.

        So a triggerer that takes up a thousand triggers asks Airflow once.
        """
        known = _known.setdefault(asyncio.get_running_loop(), {}).setdefault(self.relay_conn_id, _Known())
        async with known.lock:
            if known.target is None or time.monotonic() - known.at > KNOWN_FOR_S:
                known.target, known.at = await self._ask(), time.monotonic()
            return known.target

    async def _ask(self) -> RelayTarget:
        ask = getattr(self, "aget_connection", None)
        try:
            if ask is not None:
                connection = await ask(self.relay_conn_id)
            else:  # Airflow 2, and 3.0
                connection = await asyncio.to_thread(self.get_connection, self.relay_conn_id)
        except AirflowNotFoundException:
            return _from_environment(self.relay_conn_id)
        return target_of(connection, self.relay_conn_id)

    def get_conn(self) -> RelayClient:
        """Return the client, one for each process and target."""
        return client_for(self.target)

    client = get_conn

    def test_connection(self) -> tuple[bool, str]:
        """Tell whether Redis answers, and in which words it does not: what Airflow's "Test" button shows."""
        from ..client import told_as_unavailable
        from ..errors import BrokerUnavailable

        try:
            with told_as_unavailable():
                self.get_conn().redis.ping()
        except (ConfigurationError, BrokerUnavailable) as exc:
            return False, str(exc)
        return True, "Redis answers"

    @staticmethod
    def get_connection_form_widgets() -> dict[str, Any]:
        """Return the fields for the extras in Airflow's form for such a connection."""
        return form_widgets()

    @staticmethod
    def get_ui_field_behaviour() -> dict[str, Any]:
        """Return what Airflow's form for such a connection calls the other fields."""
        return form_behaviour()


class _Known:
    """What an event loop knows of one connection, or is about to."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.target: RelayTarget | None = None
        self.at = 0.0


_known: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Known]] = WeakKeyDictionary()


def client_for(target: RelayTarget) -> RelayClient:
    """Return this process's client for a target."""
    return _client(target.settings)


@lru_cache(maxsize=8)
def _client(settings: ProducerSettings) -> RelayClient:
    from ..client import RelayClient

    return RelayClient(settings)


def _from_environment(conn_id: str) -> RelayTarget:
    if conn_id != DEFAULT_CONN_ID:
        raise ConfigurationError(
            f"relay_conn_id: Airflow has no connection {conn_id!r} that it can read: make one of type "
            f"dagrelay, or leave relay_conn_id out and set DAGRELAY_REDIS_URL"
        )
    try:
        settings = read_settings()
    except ConfigurationError as exc:
        raise ConfigurationError(
            f"relay_conn_id: Airflow has no connection {conn_id!r} that it can read, and the environment "
            f"does not do: {exc}"
        ) from None
    return RelayTarget(settings, airflow_name=default_airflow_name())


def target_of(connection: Any, conn_id: str) -> RelayTarget:
    """Return what an Airflow connection says. Raises ConfigurationError, naming every mistake."""
    extra: Mapping[str, Any] = connection.extra_dejson
    mistakes = [
        f"{name!r} is no extra of it: there are {', '.join(EXTRAS)}" for name in extra if name not in EXTRAS
    ]
    if connection.conn_type not in ("dagrelay", "redis", None, ""):
        mistakes.append(f"is of type {connection.conn_type!r}, not dagrelay")
    texts = {name: _text(extra.get(name)) for name in EXTRAS}
    url = texts["redis_url"] or _url_of(connection, texts["ssl"], mistakes)
    environ = dict(os.environ)
    for name, variable in (("conf_key", CONF_KEY), ("conf_limit_bytes", CONF_LIMIT)):
        if texts[name]:
            environ.pop(f"{variable}_FILE", None)
            environ[variable] = texts[name]
    settings = None
    if not mistakes:
        try:
            settings = read_settings(environ, redis_url=url)
        except ConfigurationError as exc:
            mistakes.append(str(exc))
    if settings is None:
        raise ConfigurationError(*[f"connection {conn_id!r}: {one}" for one in mistakes])
    return RelayTarget(
        settings,
        (texts["flower_url"] or "").rstrip("/") or None,
        texts["airflow_name"] or default_airflow_name(),
    )


def _url_of(connection: Any, ssl: str, mistakes: list[str]) -> str:
    if not connection.host:
        mistakes.append("has no host: give that of Dagrelay's Redis, or a whole URL as the extra redis_url")
        return ""
    if ssl.lower() not in ("", "true", "false", "1", "0"):
        mistakes.append("the extra ssl is neither true nor false")
    who = ""
    if connection.login or connection.password:
        who = f"{quote(connection.login or '', safe='')}:{quote(connection.password or '', safe='')}@"
    scheme = "rediss" if ssl.lower() in ("true", "1") else "redis"
    host = f"[{connection.host}]" if ":" in connection.host else connection.host
    return f"{scheme}://{who}{host}:{connection.port or 6379}/{connection.schema or 0}"


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def default_airflow_name() -> str:
    """Return the address of this Airflow, as its configuration has it: what tells it from others."""
    return str(conf.get("api" if AIRFLOW_3 else "webserver", "base_url", fallback=""))
