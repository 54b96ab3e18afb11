"""The gateway as processes: uvicorn with its fast parts, one log, and an end in good order."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from functools import partial
from typing import Final

import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import Multiprocess

from ..errors import ConfigurationError
from .app import create_app, gateway_of_settings
from .connection import Connection
from .settings import GatewaySettings

SWITCH_EVERY_S = 0.001
"""How long the event loop and the thread that speaks to Redis leave the interpreter to each other: at
Python's own 5 ms, an answer of Redis waits for so long while requests are read."""

WORKER_ANSWERS_WITHIN_S: Final = 30
"""uvicorn ends a process that says nothing for so long, 5 s by default. On a busy machine one takes longer
than that to begin, and was begun anew for ever."""


def serve(settings: GatewaySettings) -> int:
    """Serve until a signal comes; return the exit code. Raises ConfigurationError before it listens."""
    gateway_of_settings(settings)  # whatever is wrong is told here, once, and not by each process
    _can_listen(settings.host, settings.port)
    config = uvicorn.Config(
        partial(_app, settings),
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        loop="uvloop",
        http=Connection,
        ws="none",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=max(1, round(settings.stop_within_s)),
        backlog=2048,
        timeout_worker_healthcheck=WORKER_ANSWERS_WITHIN_S,
    )
    _log()
    if settings.workers > 1:
        Multiprocess(config, sockets=[config.bind_socket()]).run()
        return 0
    for one in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again when it has stopped in good order, which is no failure.
        signal.signal(one, lambda *_: sys.exit(0))
    server = uvicorn.Server(config)
    server.run()
    return 0 if server.started else 1


def _can_listen(host: str, port: int) -> None:
    """Raise ConfigurationError where the address is not to be had: uvicorn ends without a word of advice."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            where = f"{host}, port {port} ({exc.strerror})"
            raise ConfigurationError(
                f"the gateway cannot listen on {where}: give another --port, or --host"
            ) from None


def _app(settings: GatewaySettings) -> FastAPI:
    _log()
    sys.setswitchinterval(SWITCH_EVERY_S)
    return create_app(gateway_of_settings(settings))


def _log() -> None:
    """One line for each event on stderr, with its time."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
