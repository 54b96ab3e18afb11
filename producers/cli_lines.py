"""What operators do with the way to an Airflow: `dagrelay airflows`, `hold`, `release`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from .cli_waiting import _cut, _output, _redis_now, _span, _table
from .client import RelayClient, told_as_unavailable
from .exits import EX_FAILED, fail, told
from .stores.lines import Lines, LineState


@click.command()
@_output
@told
def airflows(output: str) -> None:
    """List the Airflows: how many requests are in flight, how many wait, and whether it answers.

    With -o json one object per line, its instants in seconds since 1970.
    """
    client = RelayClient()
    with told_as_unavailable():
        lines, now = Lines(client.redis), _redis_now(client)
        states = [lines.state(name) for name in lines.names()]
    if output == "json":
        for state in states:
            click.echo(json.dumps(asdict(state)))
    elif states:
        _table(
            ("connection", "in flight", "limit", "ceiling", "in line", "oldest", "state"),
            [
                (
                    state.connection,
                    str(state.in_flight),
                    f"{int(state.limit)}",
                    str(state.ceiling) if state.ceiling else "-",
                    str(state.waiting),
                    "-" if state.oldest_s is None else _span(state.oldest_s),
                    _cut(_stands(state, now), 70),
                )
                for state in states
            ],
        )
    else:
        click.echo("no worker has asked any Airflow yet", err=True)


def _stands(state: LineState, now: float) -> str:
    since = "" if state.held_since is None else f" for {_span(now - state.held_since)}"
    if state.held == "maintenance":
        return f"held{since} by {state.held_by}: {state.held_reason}"
    if state.held == "credentials":
        return f"held{since}, its credentials are refused: {state.held_reason}"
    if state.breaker == "open":
        return f"does not answer{'' if state.opened_at is None else f' for {_span(now - state.opened_at)}'}"
    return "answers again, slowly at first" if state.breaker == "half-open" else "answers"


@click.command()
@click.argument("connection")
@click.option("--reason", default="maintenance", show_default=True, help="Shown with what waits for it.")
@told
def hold(connection: str, reason: str) -> None:
    """Send nothing to the Airflow CONNECTION until `dagrelay release`; all that is meant for it waits.

    What is in flight ends. The time that a request waits for this does not count against it.
    """
    client = RelayClient()
    name = _known(client, connection)
    with told_as_unavailable():
        was = Lines(client.redis).hold(name, " ".join(reason.split())[:200], client.settings.client_name)
        state = Lines(client.redis).state(name)
    again = " (it was so already)" if was == "maintenance" else ""
    click.echo(f"{name} is held{again}; {state.in_flight} requests are in flight still")


@click.command()
@click.argument("connection")
@told
def release(connection: str) -> None:
    """Have requests for the Airflow CONNECTION go on: held by hand, for its credentials, or not answering.

    Ends with 1 if nothing holds it.
    """
    client = RelayClient()
    name = _known(client, connection)
    with told_as_unavailable():
        lines = Lines(client.redis)
        was, state = lines.release(name), lines.state(name)
    if not was and state.breaker != "open":
        fail(f"{name} is not held", EX_FAILED)
    if not was:
        click.echo(f"{name} does not answer: it is asked again now; {state.waiting} wait")
        return
    click.echo(f"{name} is released; {state.waiting} wait for their turn")


def _known(client: RelayClient, connection: str) -> str:
    """Return a connection's id as workers have it. Fails, naming those that there are, for another."""
    name = connection.lower()
    with told_as_unavailable():
        names = Lines(client.redis).names()
    if name not in names:
        others = ", ".join(names) or "none: no worker has asked any Airflow yet"
        fail(f"there is no connection {name!r}; known are {others}", EX_FAILED)
    return name
