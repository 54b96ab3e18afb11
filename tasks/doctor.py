"""The worker's half of `dagrelay doctor`: the settings in force, and whether each Airflow takes us.

`python -m tasks.doctor` prints a line a check and ends with 0, or 1 where a check failed (78 where the
settings are wrong: `tasks.app` sees to that). It changes nothing.
"""

from __future__ import annotations

import sys

from producers.errors import AirflowError
from producers.stores.holds import Holds

from .airflow.clients import airflow_client
from .airflow.connections import AirflowConnection
from .settings import settings


def main() -> int:
    """Print the checks; return the exit code."""
    ours = settings()
    _say(
        "worker",
        True,
        f"concurrency={ours.concurrency} visibility_timeout_s={ours.visibility_timeout_s:g} "
        f"result_ttl_s={ours.result_ttl_s} log_level={ours.log_level}",
    )
    for service in ours.services.values():
        _say(f"service {service.id}", True, f"{service.base_url}, at most {service.max_in_flight} in flight")
    if not ours.connections:
        _say("airflow", False, "no connection to any Airflow: set AIRFLOW_CONN_DEFAULT")
        return 1
    held = _held(ours.redis_url)
    checks = [_check(connection, held) for connection in ours.connections.values()]
    return 0 if all(checks) else 1


def _check(connection: AirflowConnection, held: dict[str, str]) -> bool:
    """Ask one Airflow for its version, its scheduler, and whether it takes our credentials."""
    what = f"airflow {connection.id}"
    try:
        found = airflow_client(connection).check()
    except AirflowError as exc:
        _say(what, False, f"{connection.base_url}: {exc}")
        return False
    who = f"user {connection.username}" if connection.username else "token" if connection.token else "nobody"
    ok = found.credentials_accepted and found.scheduler == "healthy"
    words = "" if found.credentials_accepted else f", credentials refused: {found.problem}"
    _say(
        what,
        ok,
        f"{connection.base_url} {found.version} (API {found.api}) as {who}, "
        f"scheduler {found.scheduler}, at most {connection.max_in_flight} requests in flight{words}",
    )
    if connection.id in held:
        _say(what, False, f"held: {held[connection.id]}")
    return ok and connection.id not in held


def _held(redis_url: str) -> dict[str, str]:
    """Return why connections are held; nothing where Redis does not answer, which the other half says."""
    from redis import Redis
    from redis.exceptions import RedisError

    try:
        with Redis.from_url(redis_url, socket_timeout=2, socket_connect_timeout=2) as client:
            return Holds(client).reasons()
    except RedisError:
        return {}


def _say(what: str, ok: bool, text: str) -> None:
    print(f"{'ok  ' if ok else 'BAD '} {what:12} {text}")  # noqa: T201 - a command's output


if __name__ == "__main__":
    sys.exit(main())
