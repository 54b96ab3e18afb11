"""`dagrelay job`: what `poll_external_job` does, from a shell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .cli_watch import outcome_of
from .client import RelayClient
from .contract import MAX_CONF_DEPTH, PollRequest
from .errors import InvalidRequest
from .exits import told
from .queues.message import order_of


@click.command()
@click.argument("request", required=False)
@click.option("--service", help="Which service, as the workers name it.")
@click.option("--path", help="What is asked for the job's state: a path within the service.")
@click.option("--submit", help='How the job is started: \'{"path": "/jobs", "body": {…}, "job_id": "id"}\'.')
@click.option("--job-id", help="The id of a job that runs already.")
@click.option("--state", help="A JMESPath expression for the state in the answer.  [default: state]")
@click.option("--result", help="Likewise, for the outcome's result.")
@click.option("--interval", "interval_s", type=float, help="Seconds to the first look.  [default: 5]")
@click.option("--job-timeout", "timeout_s", type=float, help="Seconds for the whole job.  [default: 24 h]")
@click.option("--then", help="The DAG run that follows a success: a trigger, as JSON.")
@click.option("--wake-key", "wake_keys", multiple=True, help="A name by which it may be woken.")
@click.option("--on-end", multiple=True, help="A hook, as the workers name it, that is told of the end.")
@click.option("--id", "message_id", help="Names this request: given again, it is the same one.")
@click.option("--countdown", type=float, help="Seconds to wait before the first attempt.")
@click.option("--wait", is_flag=True, help="Wait until the job has ended, and print its outcome as JSON.")
@click.option("--timeout", type=float, help="Seconds for which this command waits; the request goes on.")
@told
def job(
    request: str | None,
    submit: str | None,
    then: str | None,
    message_id: str | None,
    countdown: float | None,
    wait: bool,
    timeout: float | None,
    **given: Any,
) -> None:
    """Start and follow a job of an outside service; print the task id of the accepted request.

    REQUEST has the fields of a job as a JSON object: as text, in @FILE, or - for standard input, where it is
    not seen in the list of processes. An option goes before the field of its name.

    With --wait it ends as the job does: 0 for a success, 1 for a failure.
    """
    fields = json_given("REQUEST", request) if request is not None else {}
    if not isinstance(fields, dict):
        raise InvalidRequest("REQUEST: is no JSON object")
    for name, value in given.items():
        if value not in (None, ()):
            fields[name] = list(value) if isinstance(value, tuple) else value
    for name, value in (("submit", submit), ("then", then)):
        if value is not None:
            fields[name] = json_given(f"--{name}", value)
    for name, value in (("id", message_id), ("countdown", countdown)):
        if value is not None:
            fields[name] = value
    if "dag_id" in fields:
        raise InvalidRequest("dag_id: is of a trigger: use `dagrelay trigger`")
    if "service" not in fields:
        raise InvalidRequest("service: is missing: give --service, or a REQUEST that names one")
    if "reply_to" in fields:
        raise InvalidRequest("reply_to: a command has no queue to answer on: use --wait, or --on-end")
    order = order_of(fields, door="cli")
    if not isinstance(order.request, PollRequest):
        raise InvalidRequest("REQUEST: is no job")
    handle = RelayClient().enqueue(order.request, **order.options())
    click.echo(handle.id)
    if wait:
        click.echo(json.dumps(outcome_of(handle, timeout).to_message(), indent=2))


def json_given(option: str, given: str) -> Any:
    """Return the JSON that was given as text, @file or -. Raises InvalidRequest, without the text itself."""
    try:
        if given == "-":
            given = sys.stdin.read()
        elif given.startswith("@"):
            given = Path(given[1:]).read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"{option}: {given} cannot be read ({type(exc).__name__})") from exc
    try:
        return json.loads(given)
    except RecursionError:
        raise InvalidRequest(f"{option}: is nested deeper than {MAX_CONF_DEPTH} levels") from None
    except ValueError as exc:
        # Without the text itself, which may hold a secret.
        where = f" at character {exc.pos}" if isinstance(exc, json.JSONDecodeError) else ""
        raise InvalidRequest(
            f"{option}: is no JSON{where}: give an object such as '{{\"day\": 1}}'"
        ) from None
