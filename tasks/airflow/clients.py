"""The clients of this process: one for each connection, shared by all threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ..http import HttpSender
from ..metrics import measured, observe_request
from .asking import asking, watched
from .cli import CliClient, Run, answered
from .client import AirflowClient
from .command import NotRun, Ran, run
from .connections import AirflowConnection, Command

CALL_LIKE: float = 10.0
"""So many times as long as a request to the API a call of the CLI takes, without being slow."""

_clients: dict[str, AirflowClient] = {}
_lock = threading.Lock()


def airflow_client(connection: AirflowConnection) -> AirflowClient:
    """Return the process's client for a connection; its version and token are asked for on first use."""
    found = _clients.get(connection.id)
    if found is not None:
        return found
    with _lock:  # two threads that both made one would both log in
        if connection.id not in _clients:
            _clients[connection.id] = _made(connection)
        return _clients[connection.id]


def _made(connection: AirflowConnection) -> AirflowClient:
    if connection.command is not None:
        return CliClient(connection, _told(connection.id, connection.command))  # type: ignore[return-value]
    return AirflowClient(
        connection, watched(measured(connection.id, HttpSender.for_connection(connection).send))
    )


def _told(connection: str, command: Command) -> Run:
    """Return what runs a connection's command, with each call noted as a request to the API is."""

    def noted(arguments: Sequence[str], kind: str) -> Ran:
        asker, began = asking.asker, time.monotonic()
        try:
            ran = run(command, arguments)
        except NotRun as exc:
            took_s = time.monotonic() - began
            status = "timeout" if exc.timed_out else "lost" if exc.reached else "unreached"
            observe_request(connection, kind, took_s, status)
            if asker is not None:
                asker.saw("timeout" if exc.timed_out else "broken", took_s)
            raise
        took_s, well = time.monotonic() - began, answered(ran)
        observe_request(connection, kind, took_s, "2xx" if ran.code == 0 else "4xx" if well else "5xx")
        if asker is not None:
            asker.saw("ok" if well else "broken", took_s / CALL_LIKE)
        return ran

    return noted
