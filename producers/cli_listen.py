"""`dagrelay listen`: the queue doors."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import click

from .client import RelayClient
from .errors import ConfigurationError
from .exits import told
from .queues.listener import MAX_DELIVERIES, PREFETCH, REPLY_TO, Listener
from .queues.sources import FORMS, publisher_for, source_for
from .routing import load_rules
from .scopes import Scope
from .settings import read_settings, read_value

MOST_AT_ONCE = 2000

log = logging.getLogger("dagrelay.listen")


@click.command()
@click.argument("source_url", required=False)
@click.option(
    "--rules",
    "--routes",
    "routes",
    type=click.Path(path_type=Path),
    help="Which run a CloudEvent asks for; without it, only those that name it themselves.",
)
@click.option(
    "--dags", default="*", show_default=True, help="DAGs that may be started: patterns, with commas."
)
@click.option("--connections", default="default", show_default=True, help="Airflows, likewise.")
@click.option(
    "--services", default="", help="Services that may be asked for jobs, likewise.  [default: none]"
)
@click.option("--hooks", default="", help="Hooks that may be told of an end, likewise.  [default: none]")
@click.option(
    "--reply-to",
    default=",".join(REPLY_TO),
    show_default=True,
    help="Places that answers may go to, likewise; empty for none.",
)
@click.option("--answers", metavar="SERVICE", help="The messages are answers of this service to jobs.")
@click.option(
    "--max-deliveries",
    type=click.IntRange(min=2),
    default=MAX_DELIVERIES,
    show_default=True,
    help="A message that was begun so often and never finished is put aside.",
)
@click.option(
    "--prefetch",
    type=click.IntRange(1, MOST_AT_ONCE),
    default=PREFETCH,
    show_default=True,
    help="Messages in hand at the most.",
)
@told
def listen(
    source_url: str | None,
    routes: Path | None,
    dags: str,
    connections: str,
    services: str,
    hooks: str,
    reply_to: str,
    answers: str | None,
    max_deliveries: int,
    prefetch: int,
) -> None:
    """Take requests from a queue, until TERM or Ctrl-C; what is in hand is finished first.

    SOURCE_URL names the queue; left out, DAGRELAY_LISTEN_URL does, or the file that DAGRELAY_LISTEN_URL_FILE
    names: there a password is not seen in the list of processes. DAGRELAY_REDIS_URL is the Redis of the
    workers.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("dagrelay").setLevel(logging.INFO)  # the brokers' clients tell more than one wants
    mistakes: list[str] = []
    with _gathered(mistakes):
        relay = RelayClient(read_settings())
    with _gathered(mistakes):
        url = source_url or _url_of_environment()
        source = source_for(url)
    with _gathered(mistakes):
        rules = load_rules(routes) if routes is not None else None
    if mistakes:
        raise ConfigurationError(*mistakes)
    if source_url and _holds_password(source_url):
        log.warning(
            "the password is in the list of processes: use DAGRELAY_LISTEN_URL or DAGRELAY_LISTEN_URL_FILE"
        )
    listener = Listener(
        source,
        relay,
        publisher=None if answers else publisher_for(url),
        scope=Scope(_listed(dags), *(_listed(one.lower()) for one in (connections, services, hooks))),
        routes=rules,
        reply_to=_listed(reply_to),
        max_deliveries=max_deliveries,
        prefetch=prefetch,
        answers=answers.lower() if answers else None,
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    listener.run(stop)


@contextmanager
def _gathered(mistakes: list[str]) -> Iterator[None]:
    """Note what is wrong, so that all of it is told at once."""
    try:
        yield
    except ConfigurationError as exc:
        mistakes += exc.mistakes


def _url_of_environment() -> str:
    mistakes: list[str] = []
    url = read_value(os.environ, "DAGRELAY_LISTEN_URL", mistakes)
    if not url and not mistakes:
        mistakes.append(f"DAGRELAY_LISTEN_URL is not set, and no SOURCE_URL given: {FORMS}")
    if mistakes:
        raise ConfigurationError(*mistakes)
    return url or ""


def _holds_password(url: str) -> bool:
    try:
        return urlsplit(url).password is not None or "password=" in url
    except ValueError:
        return False


def _listed(patterns: str) -> tuple[str, ...]:
    return tuple(one for one in (part.strip() for part in patterns.split(",")) if one)
