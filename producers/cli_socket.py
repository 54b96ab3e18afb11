"""`dagrelay socket`: the TCP door as a process."""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import sys
from asyncio import sslproto
from pathlib import Path
from typing import Any

import click

from .client import RelayClient
from .errors import ConfigurationError
from .exits import told
from .keys import Keys
from .queues.message import MAX_MESSAGE_BYTES
from .routing import load_rules

TLS_BUFFER_BYTES = 32 * 1024

_FILE = click.Path(path_type=Path)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=7700, show_default=True, help="0: a free one.")
@click.option("--path", type=_FILE, help="A Unix socket, instead of an address.")
@click.option("--mode", default="600", show_default=True, help="With --path: who may use it, as for chmod.")
@click.option(
    "--keys",
    "keys_file",
    type=_FILE,
    help="The file of those who may ask: see `dagrelay keys new`.",
)
@click.option(
    "--rules",
    "rules_file",
    type=_FILE,
    help="Which run a CloudEvent asks for; without it, only those that name it themselves.",
)
@click.option("--insecure", is_flag=True, help="No keys: whoever reaches it may ask. On loopback alone.")
@click.option("--certfile", "--tls-cert", "certfile", type=_FILE, help="TLS, with this certificate (PEM).")
@click.option("--keyfile", "--tls-key", "keyfile", type=_FILE, help="Its key, where that lies elsewhere.")
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="In all. Each is an open file: `ulimit -Hn` limits them too.",
)
@click.option(
    "--per-address",
    type=click.IntRange(min=1),
    default=1_000,
    show_default=True,
    help="From one address (of IPv6 one /64): more, where many come through one proxy.",
)
@click.option(
    "--max-line",
    type=click.IntRange(min=100, max=MAX_MESSAGE_BYTES),
    default=MAX_MESSAGE_BYTES,
    show_default=True,
    help="Bytes of one line; a longer one is cut off.",
)
@click.option(
    "--line-timeout", type=float, default=30.0, show_default=True, help="Seconds that one line may take."
)
@click.option(
    "--idle", type=float, default=86_400.0, show_default=True, help="Seconds that one may say nothing."
)
@click.option("--grace", type=float, default=10.0, show_default=True, help="Seconds to end in, after TERM.")
@told
def socket(
    host: str,
    port: int,
    path: Path | None,
    mode: str,
    keys_file: Path | None,
    rules_file: Path | None,
    insecure: bool,
    certfile: Path | None,
    keyfile: Path | None,
    max_connections: int,
    per_address: int,
    max_line: int,
    line_timeout: float,
    idle: float,
    grace: float,
) -> None:
    """Take in requests over TCP: one JSON line in, one line out.

    The answer is OK <id>, ERR <reason>, or RETRY <seconds> <reason>. With --keys the first line is AUTH
    <token>. Ends on TERM or Ctrl-C, when every line that it has is answered.
    """
    # Only here: it needs what Windows does not have, where callers run the other commands.
    from .socket_listener import Limits, SocketDoor

    mistakes = []
    try:
        permissions = int(mode, 8)
    except ValueError:
        permissions = -1
    if not 0 <= permissions <= 0o777:
        mistakes.append("--mode: give three digits, as for chmod: 660")
    relay, keys, rules = None, None, None
    try:
        relay = RelayClient()
    except ConfigurationError as exc:
        mistakes += exc.mistakes
    try:
        keys = Keys.load(keys_file) if keys_file is not None else None
    except ConfigurationError as exc:
        mistakes += exc.mistakes
    try:
        rules = load_rules(rules_file) if rules_file is not None else None
    except ConfigurationError as exc:
        mistakes += exc.mistakes
    tls = None
    if certfile is not None:
        try:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(certfile, keyfile, password=_no_password)
        except (OSError, ssl.SSLError, ValueError) as exc:
            mistakes.append(f"--certfile, --keyfile: cannot be read ({type(exc).__name__})")
    elif keyfile is not None:
        mistakes.append("--keyfile: goes with --certfile")
    if mistakes or relay is None:
        raise ConfigurationError(*mistakes)
    door = SocketDoor(
        relay,
        host=host,
        port=port,
        path=path,
        mode=permissions,
        keys=keys,
        insecure=insecure,
        routes=rules,
        tls=tls,
        limits=Limits(
            connections=max_connections,
            per_address=per_address,
            line_bytes=max_line,
            line_s=line_timeout,
            idle_s=idle,
        ),
    )
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    asyncio.run(_serve(door, grace))


async def _serve(door: Any, grace_s: float) -> None:
    # Of this process alone: asyncio keeps a buffer of 256 KB for each TLS connection, and a record has 16.
    sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await door.serve(stop, grace_s)


def _no_password() -> str:
    """Refuse a key with a passphrase, for which OpenSSL would ask the terminal."""
    raise ValueError
