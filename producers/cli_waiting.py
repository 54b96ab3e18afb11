"""What operators do with requests that are on their way: `dagrelay parked`, `wake`, `cancel`, `status`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import click

from .client import RelayClient, check_observation, told_as_unavailable
from .errors import InvalidRequest
from .exits import EX_FAILED, fail, told
from .stores.dead import Letter
from .stores.fan_outs import FanOuts
from .stores.heard import heard
from .stores.records import ENDED, Record
from .stores.waits import Waiting

CANCEL_WAIT_S = 5.0
"""How long `cancel` waits to tell the end: a worker that is idle ends what was parked within 0.2 s."""

PAGE = 500

_output = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True
)


@click.command()
@click.option("-n", "most", type=click.IntRange(min=0), default=50, show_default=True, help="At the most.")
@click.option("--service", help="Only jobs of this service.")
@click.option("--connection", help="Only what is for this Airflow.")
@click.option("--for", "text", help="Only where this is in what it waits for, why, or in its id.")
@_output
@told
def parked(most: int, service: str | None, connection: str | None, text: str | None, output: str) -> None:
    """List what waits in Redis: for what, since when, until when. What comes back first is first.

    With -o json one object per line, its instants in seconds since 1970.
    """
    client = RelayClient()
    with told_as_unavailable():
        now, total = _redis_now(client), client.waits.size()
        rows = []
        for one in _all_parked(client) if most else ():
            if _matches(one, service, connection, text):
                rows.append(one)
                if len(rows) == most:
                    break
    if output == "json":
        for one in rows:
            click.echo(json.dumps(asdict(one)))
    elif rows:
        _table(
            ("id", "of", "waits for", "since", "next look", "back", "last state"),
            [
                (
                    one.task_id,
                    _cut(one.dag_id or one.service or one.task, 30),
                    _cut(_what(one), 50),
                    _span(now - one.since),
                    "-" if one.next_look_at is None else _in(one.next_look_at - now),
                    _in(one.due_at - now),
                    _cut(" ".join(filter(None, (one.seen, one.progress))) or "-", 40),
                )
                for one in rows
            ],
        )
    click.echo(f"{len(rows)} shown, {total} parked in all", err=True)


def _all_parked(client: RelayClient) -> Iterator[Waiting]:
    after = 0
    while after < client.waits.size():
        yield from client.waits.parked(PAGE, after)
        after += PAGE


def _matches(one: Waiting, service: str | None, connection: str | None, text: str | None) -> bool:
    return (
        (service is None or one.service == service.lower())
        and (connection is None or one.connection == connection.lower())
        and (text is None or text in f"{one.waits_for}\n{one.reason or ''}\n{one.task_id}")
    )


def _what(one: Waiting) -> str:
    return f"{one.waits_for}: {one.reason}" if one.reason else one.waits_for


@click.command()
@click.argument("task_ids", metavar="ID...", nargs=-1)
@click.option("--key", help="Wake all that waits for this key, instead of ids.")
@click.option(
    "--observation", help="What was observed, as JSON, for the tasks to read.  [default: go and look]"
)
@told
def wake(task_ids: tuple[str, ...], key: str | None, observation: str | None) -> None:
    """Send parked tasks on at once: a retry is tried now, a job or run is looked at now.

    Ends with 1 if nothing was waiting.
    """
    if bool(task_ids) == (key is not None):
        raise click.UsageError("give ids, or --key")
    observed = heard(_observation(observation))
    client = RelayClient()
    by = client.settings.client_name
    if key is not None:
        with told_as_unavailable():
            woken, mailed = client.waits.wake_by_key(key, observed, by=by)
        if not woken + mailed:
            fail(f"nothing waits for the key {key!r}", EX_FAILED)
        click.echo(f"{woken} woken" + (f", {mailed} will read it before they wait" if mailed else ""))
        return
    with told_as_unavailable():
        sent_on = set(client.waits.wake(dict.fromkeys(task_ids), observed, by=by))
    reached = len(sent_on)
    for task_id in dict.fromkeys(task_ids):
        if task_id in sent_on:
            click.echo(f"{task_id} woken")
            continue
        found = client.record(task_id)
        click.echo(f"{task_id} does not wait: {_stands(found)}")
        reached += found is not None and not found.ended
    if not reached:
        sys.exit(EX_FAILED)


def _observation(given: str | None) -> Any:
    if given is None:
        return None
    try:
        observed = json.loads(given)
    except (ValueError, RecursionError):
        raise InvalidRequest("--observation: is no JSON") from None  # without the text: it may hold a secret
    check_observation(observed)
    return observed


def _stands(found: Record | None) -> str:
    if found is None:
        return "no request with this id is on record"
    return (
        f"it has ended as {found.state}"
        if found.ended
        else "it is in a queue, or runs just now, and reads this before it waits"
    )


@click.command()
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@click.option("--no-wait", is_flag=True, help="Only ask; do not wait for a worker to end them.")
@told
def cancel(task_ids: tuple[str, ...], no_wait: bool) -> None:
    """Cancel requests that have not ended. What runs just now is not disturbed.

    Says for each what became of it, and waits up to 5 s for that. Ends with 1 if one of them had ended
    otherwise, or is unknown.
    """
    client = RelayClient()
    before: dict[str, str] = {}
    for task_id in task_ids:
        if task_id not in before:
            before[task_id] = client.handle(task_id).cancel()
    asked = [task_id for task_id, state in before.items() if state not in (*ENDED, "unknown")]
    ended = {} if no_wait else _ends(client, asked)
    well = True
    for task_id, state in before.items():
        if state in ENDED:
            words = f"had ended as {state}"
            well &= state == "cancelled"
        elif state == "unknown":
            words = "is not on record; if it comes nevertheless, it is refused"
            well = False
        elif task_id in ended:
            words = (
                "cancelled"
                if ended[task_id] == "cancelled"
                else f"ran just then, and ended as {ended[task_id]}"
            )
            well &= ended[task_id] == "cancelled"
            found = client.record(task_id)
            if found is not None and found.error in ("OutcomeUnknown", "SubmitUnknown"):
                words += "; whether it was started before is not known: see `dagrelay status`"
        elif no_wait:
            words = "to be cancelled"
        else:
            words = "to be cancelled, and no worker has ended it yet: it runs just now, or none is there"
        click.echo(f"{task_id} {words}")
    if not well:
        sys.exit(EX_FAILED)


def _ends(client: RelayClient, task_ids: list[str]) -> dict[str, str]:
    """Wait for the ends of these; return how they ended, as far as they did."""
    ended: dict[str, str] = {}
    deadline = time.monotonic() + CANCEL_WAIT_S
    while len(ended) < len(task_ids):
        for task_id in task_ids:
            if task_id not in ended:
                found = client.record(task_id)
                if found is not None and found.ended:
                    ended[task_id] = found.state
        if time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    return ended


@click.command()
@click.argument("task_id")
@_output
@told
def status(task_id: str, output: str) -> None:
    """Show what is on record of a request, and its history from acceptance to end."""
    client = RelayClient()
    found = client.record(task_id)
    with told_as_unavailable():
        letter = client.dead.store.some([task_id]).get(task_id)
    if found is None:
        desk = f"; there is a dead letter: dagrelay dead show {task_id}" if letter else ""
        fail(f"no request with the id {task_id} is on record{desk}", EX_FAILED)
    history = timeline(found, client.handle(task_id).history())
    with told_as_unavailable():
        waiting = None if found.ended else client.waits.get(task_id)
        fan = FanOuts(client.redis).get(task_id) if found.fan_out == task_id else None
    if waiting is not None and found.waits_for:  # at a gate it may be something else by now
        found = replace(found, waits_for=waiting.waits_for)
    if output == "json":
        shown = found.to_json() | {"history": [{"at": at, "what": what} for at, what in history]}
        if waiting is not None:
            shown["parked"] = {"due_at": waiting.due_at, "next_look_at": waiting.next_look_at}
        if fan is not None:
            shown["requests"], shown["requests_ended"] = fan.total, fan.ended
        if letter is not None:
            shown["dead_letter"] = {"at": letter.at, "replayed_as": letter.replayed_as}
        click.echo(json.dumps(shown, indent=2))
        return
    for name, value in found.to_json().items():
        if name.endswith("_at") or name == "waiting_since":
            value = _instant(value)
        elif name in ("run", "error_args"):
            value = json.dumps(value)
        elif not value:  # nothing was retried, held, …
            continue
        elif name == "outcome":
            value = json.dumps(value)
        click.echo(f"{name:14} {printable(str(value))}")
    if waiting is not None:
        if waiting.next_look_at is not None:
            click.echo(f"{'next_look_at':14} {_instant(waiting.next_look_at)}")
        click.echo(f"{'back_at':14} {_instant(waiting.due_at)}")
    if fan is not None:
        click.echo(f"{'requests':14} {fan.total}, of which {fan.ended} have ended")
    if letter is not None:
        click.echo(f"{'dead_letter':14} {_on_the_desk(letter)}")
    click.echo("\nhistory (UTC)")
    for at, what in history:
        click.echo(f"  {_instant(at)}  {printable(what)}")


def _on_the_desk(letter: Letter) -> str:
    if letter.replayed_as is not None:
        return f"replayed as {letter.replayed_as}: dagrelay status {letter.replayed_as}"
    return f"dagrelay dead show {letter.id}; to send it again: dagrelay dead replay {letter.id}"


def timeline(found: Record, told_of_it: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return the history of a request: what its record says and what was noted, in the order of time."""
    known: list[tuple[float | None, int, str]] = [
        (found.accepted_at, 0, "accepted" + (f", asked by {found.by}" if found.by else "")),
        (found.submitting_at, 2, "submission begins"),
        (found.submitted_at, 2, f"submitted: it is job {found.job_id}"),
        (found.waiting_since, 3, f"waits for {found.waits_for}"),
        (found.ended_at, 4, "ended, its outcome unknown" if found.corrected_at else _end(found)),
        (found.corrected_at, 5, f"corrected: {_end(found)}"),
    ]
    delayed = found.due_at is not None and found.due_at - (found.accepted_at or 0.0) > 0.1
    if found.due_at is not None and delayed and found.due_at < (found.ended_at or math.inf):
        known.append((found.due_at, 0, "due"))
    events = [(round(at, 3), order, what) for at, order, what in known if at is not None]
    attached = f"is job {found.job_id}"  # a worker's note of what the record says as well
    events += [(round(at, 3), 1, what) for at, what in told_of_it if what != attached]
    return [(at, what) for at, _, what in sorted(events, key=lambda event: event[:2])]


def _end(found: Record) -> str:
    if found.state == "done" and found.run is not None:
        return f"done: run {found.run.get('dag_run_id')} is {found.run.get('state')}"
    if found.state == "cancelled" and found.cancel_by:
        return "cancelled"
    words = found.reason or (found.seen if found.state == "done" else "")
    because = f": {words}" if words else ""
    error = f" ({found.error})" if found.error and found.state == "failed" else ""
    return f"{found.state}{error}{because}"


def _redis_now(client: RelayClient) -> float:
    seconds, micros = client.redis.time()
    return float(seconds) + float(micros) / 1e6


def _instant(at: Any) -> str:
    return datetime.fromtimestamp(float(at), UTC).isoformat(timespec="milliseconds")


def _in(seconds: float) -> str:
    return f"in {_span(seconds)}" if seconds >= 0.05 else "now"


def _span(seconds: float) -> str:
    """Return a duration as people read it: 0.4s, 12s, 3m12s, 2h05m, 3d04h."""
    if seconds < 10:
        return f"{max(seconds, 0.0):.1f}s"
    whole = round(seconds)
    for unit, of, below, name in ((86400, 3600, "h", "d"), (3600, 60, "m", "h"), (60, 1, "s", "m")):
        if whole >= unit:
            return f"{whole // unit}{name}{whole % unit // of:02}{below}"
    return f"{whole}s"


def printable(text: str) -> str:
    """Return a text on one line, without what would steer a terminal: it may be an outside service's."""
    return "".join(character if character.isprintable() else " " for character in text)


def _cut(text: str, most: int) -> str:
    shown = printable(text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
