"""The worker's half of `dagrelay doctor`: the settings in force, and whether each Airflow takes us.

`python -m tasks.doctor` prints a line a check and ends with 0, or 1 where a check failed (78 where the
settings are wrong: `tasks.app` sees to that). It changes nothing.
"""

from __future__ import annotations

import sys

from producers.errors import AirflowError
from producers.stores.lines import Lines, LineState

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
    kept = f"kept for {ours.conf_keep_s / 86_400:.1f} days after their last use"
    _say("worker confs", True, f"{ours.confs}, {kept}")
    for service in ours.services.values():
        if service.queue is not None:
            _say(f"service {service.id}", True, f"a queue: messages go to {service.queue.name}")
            continue
        _say(f"service {service.id}", True, f"{service.base_url}, at most {service.max_in_flight} in flight")
    if ours.services:
        _say("callbacks", True, ours.callback_url or "none: DAGRELAY_CALLBACK_URL is not set")
    for hook in ours.hooks.values():
        how = "unsigned" if hook.scheme == "none" else f"signed ({hook.scheme}), secrets: {len(hook.keys)}"
        _say(f"hook {hook.id}", True, f"{hook.server}, {how}")
    if not ours.connections:
        words = "no connection to any Airflow in this environment: set AIRFLOW_CONN_DEFAULT"
        _say("airflow", False, f"{words} as the workers have it (how theirs fare: dagrelay airflows)")
        return 1
    known = _lines(ours.redis_url)
    checks = [_check(connection, known) for connection in ours.connections.values()]
    return 0 if all(checks) else 1


def _check(connection: AirflowConnection, known: dict[str, LineState]) -> bool:
    """Ask one Airflow for its version, its scheduler, and whether it takes our credentials."""
    what = f"airflow {connection.id}"
    try:
        found = airflow_client(connection).check()
    except AirflowError as exc:
        _say(what, False, f"{connection.address}: {exc}")
        return False
    who = f"user {connection.username}" if connection.username else "token" if connection.token else "nobody"
    if connection.command is not None:
        who = "whom it runs as"
    ok = found.credentials_accepted and found.scheduler == "healthy"
    words = "" if found.credentials_accepted else f", credentials refused: {found.problem}"
    _say(
        what,
        ok,
        f"{connection.address} {found.version} (API {found.api}) as {who}, "
        f"scheduler {found.scheduler}, at most {connection.ceiling} requests in flight{words}",
    )
    if connection.failover is not None:
        ok = _check(connection.failover, known) and ok
    line = known.get(connection.id)
    if line is not None and line.held:
        _say(what, False, f"held ({line.held}): {line.held_reason}; {line.waiting} wait")
    elif line is not None and line.breaker == "open":
        _say(what, False, f"did not answer, and is probed before anything else is sent; {line.waiting} wait")
    return ok and (line is None or line.answers)


def _lines(redis_url: str) -> dict[str, LineState]:
    """Return how things stand with the connections; nothing where Redis does not answer."""
    from redis import Redis
    from redis.exceptions import RedisError

    try:
        with Redis.from_url(redis_url, socket_timeout=2, socket_connect_timeout=2) as client:
            lines = Lines(client)
            return {name: lines.state(name) for name in lines.names()}
    except RedisError:
        return {}


def _say(what: str, ok: bool, text: str) -> None:
    print(f"{'ok  ' if ok else 'BAD '} {what:12} {text}")  # noqa: T201 - a command's output


if __name__ == "__main__":
    sys.exit(main())
