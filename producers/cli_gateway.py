"""`dagrelay gateway`: the HTTP door. `dagrelay keys`: who may ask there, and at the TCP door."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from .errors import ConfigurationError
from .exits import told
from .keys import Keys, new_key

KEYS_FILE = "DAGRELAY_GATEWAY_KEYS_FILE"


@click.command()
@click.option("--host", help="Where it listens.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="[default: 8080]")
@click.option("--workers", type=int, help="Processes.  [default: 1]")
@click.option("--keys", "keys_file", type=Path, help="The file of `dagrelay keys`.")
@click.option("--rules", "rules_file", type=Path, help="The routing rules for CloudEvents.")
@click.option("--tls-cert", type=Path, help="Speak TLS: the certificate with its chain, PEM.")
@click.option("--tls-key", type=Path, help="Its private key, PEM.")
@click.option("--insecure", is_flag=True, default=None, help="Ask for no keys: on loopback alone.")
@told
def gateway(**given: Any) -> None:
    """Take requests over HTTP: /openapi.json says which.

    Everything can be set in the environment too, as DAGRELAY_GATEWAY_PORT and so on.
    """
    try:
        from .gateway.serve import serve
        from .gateway.settings import read_gateway_settings
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"{exc.name} is not installed: the gateway needs `pip install dagrelay[gateway]`"
        ) from None
    sys.exit(serve(read_gateway_settings(**given)))


@click.group()
def keys() -> None:
    """Keys of those who ask over HTTP and TCP."""


def _file(given: Path | None) -> Path:
    if given is not None:
        return given
    named = os.environ.get(KEYS_FILE)
    if not named:
        raise ConfigurationError(f"{KEYS_FILE} is not set: set it, or give --file")
    return Path(named)


@keys.command()
@click.argument("name")
@click.option("--file", "path", type=Path, help=f"[default: {KEYS_FILE}]")
@click.option("--dag", "dags", multiple=True, help="DAGs that it may start, as a pattern.  [default: all]")
@click.option(
    "--connection", "connections", multiple=True, help="Airflows that it may use.  [default: default]"
)
@click.option("--service", "services", multiple=True, help="Services for its jobs.  [default: none]")
@click.option("--hook", "hooks", multiple=True, help="Hooks that it may have told.  [default: none]")
@click.option("--rate", "rate_per_s", type=float, help="Requests a second.  [default: no limit]")
@click.option("--burst", type=float, help="Requests at once.  [default: those of a second]")
@click.option("--may-cancel", is_flag=True, help="It may cancel what it may start.")
@click.option("--write-only", is_flag=True, help="It may not read how requests fare.")
@told
def new(name: str, path: Path | None, write_only: bool, **given: Any) -> None:
    """Add a key, and print its token: this once, for it is kept nowhere."""
    click.echo(new_key(_file(path), name, may_read=not write_only, **given))


@keys.command("list")
@click.option("--file", "path", type=Path, help=f"[default: {KEYS_FILE}]")
@told
def list_keys(path: Path | None) -> None:
    """Show the keys and what each may ask for."""
    for key in Keys.load(_file(path)):
        scope = key.scope
        rate = f"{key.rate_per_s:g}/s, {key.burst:g} at once" if key.rate_per_s else "no limit"
        may = [word for word, may in (("read", key.may_read), ("cancel", key.may_cancel)) if may]
        click.echo(
            f"{key.id}  dags={','.join(scope.dags)}  connections={','.join(scope.connections)}  "
            f"services={','.join(scope.services) or '-'}  hooks={','.join(scope.hooks) or '-'}  "
            f"may={','.join(['start', *may])}  {rate}"
        )
