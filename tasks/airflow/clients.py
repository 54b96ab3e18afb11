"""The clients of this process: one for each connection, shared by all threads."""

from __future__ import annotations

import threading

from ..http import HttpSender
from ..metrics import measured
from .asking import watched
from .client import AirflowClient
from .connections import AirflowConnection

_clients: dict[str, AirflowClient] = {}
_lock = threading.Lock()


def airflow_client(connection: AirflowConnection) -> AirflowClient:
    """Return the process's client for a connection; its version and token are asked for on first use."""
    found = _clients.get(connection.id)
    if found is not None:
        return found
    with _lock:  # two threads that both made one would both log in
        if connection.id not in _clients:
            _clients[connection.id] = AirflowClient(
                connection,
                watched(measured(connection.id, HttpSender.for_connection(connection).send)),
            )
        return _clients[connection.id]
