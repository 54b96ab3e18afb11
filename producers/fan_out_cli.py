"""`dagrelay fan-out`: many runs of a DAG from a file of confs, with their progress and one outcome each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, Any

import click

from .cli_waiting import _cut, _table
from .client import RelayClient
from .contract import MAX_CONF_DEPTH
from .errors import InvalidRequest, ResultNotReady
from .exits import EX_FAILED, told
from .fan_out import FanOut, OnError, fan_out

PROGRESS_EVERY_S = 0.2


@click.command("fan-out")
@click.argument("dag_id")
@click.option(
    "--conf-file",
    type=click.File(encoding="utf-8"),
    required=True,
    help="The confs: one JSON object a line, one run each; - for standard input.",
)
@click.option(
    "--key-prefix", help="Makes a repeated command the same runs: their keys are PREFIX-1, PREFIX-2, …"
)
@click.option("--connection", default="default", show_default=True, help="Which Airflow.")
@click.option(
    "--on-error",
    type=click.Choice(["continue", "stop"]),
    default="continue",
    show_default=True,
    help="What the first failure does to those that were not begun.",
)
@click.option("--then", help="A Celery task to be sent all outcomes at the end, by its name.")
@click.option("--then-queue", default="celery", show_default=True, help="The queue of that task.")
@click.option("--until-created", is_flag=True, help="Wait until all runs exist, and print the outcomes.")
@click.option("--wait", is_flag=True, help="Wait until all runs have ended, and print the outcomes.")
@click.option("--timeout", type=float, help="Seconds for which this command waits; the fan-out goes on.")
@click.option("-o", "--output", type=click.Choice(["json", "table"]), default="json", show_default=True)
@told
def fan_out_command(
    dag_id: str,
    conf_file: IO[str],
    key_prefix: str | None,
    connection: str,
    on_error: OnError,
    then: str | None,
    then_queue: str,
    until_created: bool,
    wait: bool,
    timeout: float | None,
    output: str,
) -> None:
    """Start one run of DAG_ID for each conf in a file; print the id of the fan-out.

    With --wait or --until-created a bar on standard error shows how far it is, the id is printed there too,
    and standard output gets one outcome a line, in the order of the file. Ends with 1 if any of
    them is no success.
    """
    if until_created and wait:
        raise click.UsageError("give --until-created or --wait")
    requests = []
    for number, conf in _confs(conf_file):
        key = {"key": f"{key_prefix}-{number}"} if key_prefix else {}
        requests.append({"dag_id": dag_id, "conf": conf, "connection": connection, **key})
    callback: Any = None
    if then is not None:  # what a Celery signature is, without Celery
        callback = {"task": then, "args": [], "kwargs": {}, "options": {"queue": then_queue}}
        callback |= {"subtask_type": None, "immutable": False}
    fan = fan_out(requests, then=callback, on_error=on_error, wait=wait or None, relay=RelayClient())
    follow = until_created or wait
    click.echo(fan.id, err=follow)
    if not follow:
        return
    _show_progress(fan, timeout)
    outcomes = fan.get(timeout=10)
    if output == "table":
        rows: list[tuple[str, ...]] = [
            (one.state, one.dag_run_id, one.id, _cut(one.reason or one.error or "", 70)) for one in outcomes
        ]
        _table(("state", "run", "id", "reason"), rows)
    else:
        for one in outcomes:
            click.echo(json.dumps(one.to_message()))
    if any(one.state != "done" for one in outcomes):
        sys.exit(EX_FAILED)


def _confs(lines: IO[str]) -> Iterator[tuple[int, Any]]:
    """Yield the confs with the numbers of their lines. Raises InvalidRequest, without what the line holds."""
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                conf = json.loads(line)
            except RecursionError:
                raise InvalidRequest(
                    f"line {number}: is nested deeper than {MAX_CONF_DEPTH} levels"
                ) from None
            except ValueError as exc:
                at = f", column {exc.colno}" if isinstance(exc, json.JSONDecodeError) else ""
                raise InvalidRequest(f"line {number}: is no JSON{at}") from None
            if not isinstance(conf, dict):
                raise InvalidRequest(f"line {number}: a conf is a JSON object, one on each line")
            yield number, conf
    except UnicodeDecodeError:
        raise InvalidRequest("--conf-file: is no UTF-8 text") from None


def _show_progress(fan: FanOut, timeout: float | None) -> None:
    """Show how many have ended until all have. Raises ResultNotReady after the timeout."""
    deadline = None if timeout is None else time.monotonic() + timeout
    with ExitStack() as stack:
        total = len(fan.handles)
        bar = stack.enter_context(
            click.progressbar(length=total, label="ended", show_pos=True, file=sys.stderr)
        )
        shown = 0
        while not fan.ready():
            ended, _ = fan.progress()
            bar.update(ended - shown)
            shown = ended
            if deadline is not None and time.monotonic() > deadline:
                raise ResultNotReady(fan.id, f"{ended} of {total} have ended")
            time.sleep(PROGRESS_EVERY_S)
        bar.update(total - shown)
