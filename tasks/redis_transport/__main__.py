"""`python -m tasks.redis_transport`: see and handle what is parked and what is in quarantine.

Exit codes: 0 done, 1 nothing there by that name, 69 Redis does not answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Any

import click
from redis import Redis
from redis.exceptions import RedisError

from .keys import Keys
from .lot import Lot, Quarantined

EX_UNAVAILABLE = 69


def _told(command: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            found = command(*args, **kwargs)
        except (RedisError, OSError) as exc:
            click.echo(f"Redis: {exc}", err=True)
            sys.exit(EX_UNAVAILABLE)
        sys.exit(1 if found is False else 0)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--url", envvar=["DAGRELAY_REDIS_URL", "REDIS_URL"], required=True, help="The broker's Redis.")
@click.option("--namespace", default="dagrelay", show_default=True, help="The transport option `namespace`.")
@click.option("--prefix", default="", help="The transport option `global_keyprefix`.")
@click.pass_context
def main(context: click.Context, url: str, namespace: str, prefix: str) -> None:
    """Parked tasks, and messages in quarantine.

    Give the URL by the environment (DAGRELAY_REDIS_URL): a process list shows what is on a command line.
    """
    client = Redis.from_url(url, socket_timeout=5, socket_connect_timeout=2)
    context.obj = Lot(client, Keys(prefix, namespace))


@main.command()
@click.option("-n", "most", default=50, show_default=True, help="How many to show at the most.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
@click.pass_obj
@_told
def parked(lot: Lot, most: int, output: str) -> None:
    """List parked tasks, the next due first."""
    for found in lot.list(most):
        if output == "json":
            click.echo(json.dumps({name: getattr(found, name) for name in found.__slots__}))
        else:
            click.echo(
                f"{_at(found.due_at)}  {found.task_id}  {found.task}  retries={found.retries} "
                f"since={_at(found.since)}"
            )
    click.echo(f"{lot.size()} parked", err=True)


@main.command()
@click.argument("task_ids", nargs=-1, required=True)
@click.pass_obj
@_told
def wake(lot: Lot, task_ids: tuple[str, ...]) -> bool:
    """Send parked tasks on early, by id."""
    count = lot.wake(task_ids)
    click.echo(f"{count} of {len(task_ids)} sent on; the others are not parked")
    return count > 0


@main.command()
@click.argument("task_ids", nargs=-1, required=True)
@click.pass_obj
@_told
def revoke(lot: Lot, task_ids: tuple[str, ...]) -> bool:
    """Revoke parked tasks, by id: Celery ends them at once."""
    count = sum(lot.revoke(task_id) for task_id in task_ids)
    click.echo(f"{count} of {len(task_ids)} revoked; the others are not parked")
    return count > 0


@main.group()
def quarantine() -> None:
    """Messages that no worker could read."""


@quarantine.command("list")
@click.pass_obj
@_told
def list_(lot: Lot) -> None:
    """List them: number, time, queue, size, reason."""
    for found in sorted(lot.quarantined(), key=_number):
        queue = found.queue_key.partition("\x06")[0]
        click.echo(f"{found.number}  {_at(found.at)}  {queue}  {len(found.message)} bytes  {found.reason}")


@quarantine.command()
@click.argument("number", type=int)
@click.pass_obj
@_told
def show(lot: Lot, number: int) -> bool:
    """Write the bytes of one to standard output."""
    for found in lot.quarantined():
        if found.number == number:
            click.echo(found.message, nl=False)
            return True
    click.echo(f"no message {number} in quarantine", err=True)
    return False


@quarantine.command()
@click.argument("numbers", nargs=-1, type=int)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.pass_obj
@_told
def replay(lot: Lot, numbers: tuple[int, ...], everything: bool) -> bool:
    """Put messages back to their queues as they were: say, for a worker that can read them."""
    if everything:
        numbers = tuple(found.number for found in lot.quarantined())
    count = sum(lot.replay(number) for number in numbers)
    click.echo(f"{count} of {len(numbers)} put back")
    return count > 0


def _number(found: Quarantined) -> int:
    return found.number


def _at(instant: float) -> str:
    return datetime.fromtimestamp(instant, UTC).isoformat(timespec="milliseconds")


if __name__ == "__main__":
    main(prog_name="python -m tasks.redis_transport")
