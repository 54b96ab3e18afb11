"""`dagrelay watch`: follow requests until they end; and what a terminal shows while a command waits."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, TypeVar

import click

from .cli_waiting import _cut, _end, _output, _span, printable
from .client import RelayClient, told_as_unavailable
from .errors import BrokerUnavailable, ResultNotReady
from .exits import EX_FAILED, EX_NOINPUT, EX_TEMPFAIL, fail, told
from .handle import Handle
from .stores.fan_outs import FanOuts
from .stores.records import RESULT_PREFIX, Record

LOOK_EVERY_S: Final = 0.5
LOOKS_A_S: Final = 200
"""With many requests each is looked at less often; an end is told at once all the same."""
AGAIN_EVERY_S: Final = 1.0
INTERRUPTED: Final = 130

T = TypeVar("T")


@dataclass(frozen=True)
class Change:
    """How a request stands now, other than before. `record` is None for one that is not on record."""

    task_id: str
    record: Record | None
    words: str
    ended_of: tuple[int, int] | None = None
    """Of a fan-out: how many of its requests have ended, and how many there are."""

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.record is None or self.record.ended

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; `at` is in seconds since 1970."""
        found: dict[str, Any] = {"task_id": self.task_id, "state": "unknown"}
        if self.record is not None:
            found = self.record.to_json()
        if self.ended_of is not None:
            found["requests_ended"], found["requests"] = self.ended_of
        return {"at": round(time.time(), 3), **found}


@click.command()
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@click.option("--timeout", type=float, help="Seconds for which this command watches; the requests go on.")
@_output
@told
def watch(task_ids: tuple[str, ...], timeout: float | None, output: str) -> None:
    """Follow requests until they have ended, and print a line whenever one stands otherwise.

    Ends with 0 when all are done, 1 when one failed or was cancelled, 66 when one is not on record, 75 after
    the timeout. Ctrl-C leaves the requests as they are. With -o json one object per line.
    """
    last: dict[str, Change] = {}
    wanted = list(dict.fromkeys(task_ids))
    try:
        with Line() as line:
            for one in changes(RelayClient(), wanted, timeout, line):
                last[one.task_id] = one
                line.clear()
                _show(one, output)
    except ResultNotReady as exc:
        left = [task_id for task_id in wanted if task_id not in last or not last[task_id].over]
        fail(f"{len(left)} of {len(wanted)} had not ended after {timeout:g} s: {exc.state}", EX_TEMPFAIL)
    except KeyboardInterrupt:
        fail("no longer watched; the requests go on", INTERRUPTED)
    states = {one.record.state if one.record is not None else "unknown" for one in last.values()}
    if states & {"failed", "cancelled"}:
        sys.exit(EX_FAILED)
    if "unknown" in states:
        sys.exit(EX_NOINPUT)


def _show(one: Change, output: str) -> None:
    if output == "json":
        click.echo(json.dumps(one.to_json()))
        return
    at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    click.echo(f"{at}  {printable(one.task_id)}  {printable(one.words)}")


def changes(
    client: RelayClient, task_ids: Sequence[str], timeout: float | None, line: Line
) -> Iterator[Change]:
    """Yield how each request stands, whenever that has changed, until all have ended.

    A Redis that goes away meanwhile is waited for. Raises ResultNotReady after the timeout, and
    BrokerUnavailable when Redis does not answer at the beginning.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    open_ones: dict[str, str | None] = dict.fromkeys(task_ids)
    began, answered = time.monotonic(), False
    while open_ones:
        try:
            for one in _changes(client, open_ones, deadline, line, began):
                answered = True
                yield one
        except BrokerUnavailable:
            if not answered:
                raise
            line.show("Redis does not answer; watching goes on when it does")
            time.sleep(AGAIN_EVERY_S)
            if deadline is not None and time.monotonic() > deadline:
                raise


def _changes(
    client: RelayClient,
    open_ones: dict[str, str | None],
    deadline: float | None,
    line: Line,
    began: float,
) -> Iterator[Change]:
    """Do so over one connection. `open_ones` has what was last told of each that has not ended."""
    every_s = max(LOOK_EVERY_S, len(open_ones) / LOOKS_A_S)
    with told_as_unavailable(), client.listening.pubsub(ignore_subscribe_messages=True) as pubsub:
        # It stands before the first look, so an end between the two is not missed.
        pubsub.subscribe(*(RESULT_PREFIX + task_id for task_id in open_ones))
        due, next_look = list(open_ones), time.monotonic() + every_s
        while True:
            for task_id in due:
                one = look(client, task_id)
                if one.words != open_ones[task_id]:
                    open_ones[task_id] = one.words
                    yield one
                if one.over:
                    del open_ones[task_id]
            if not open_ones:
                return
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                some = next(iter(open_ones))
                raise ResultNotReady(some, open_ones[some] or "")
            line.show(_summary(open_ones, now - began))
            wait_s = (next_look if deadline is None else min(next_look, deadline)) - now
            message = pubsub.get_message(timeout=max(wait_s, 0.001))
            heard = message["channel"].decode().removeprefix(RESULT_PREFIX) if message is not None else ""
            due = [heard] if heard in open_ones else []
            if time.monotonic() >= next_look:
                due, next_look = list(open_ones), time.monotonic() + every_s


def _summary(open_ones: dict[str, str | None], waited_s: float) -> str:
    if len(open_ones) == 1:
        return f"{_span(waited_s)}  {next(iter(open_ones.values())) or ''}"
    return f"{_span(waited_s)}  {len(open_ones)} have not ended"


def look(client: RelayClient, task_id: str) -> Change:
    """Return how a request stands. Raises what redis-py raises."""
    found = client.records.get(task_id)
    if found is None:
        return Change(task_id, None, "is not on record")
    ended_of = None
    if found.fan_out == task_id and (state := FanOuts(client.redis).get(task_id)) is not None:
        ended_of = state.ended, state.total
    return Change(task_id, found, _words(found, ended_of), ended_of)


def _words(found: Record, ended_of: tuple[int, int] | None) -> str:
    """Return how it stands, in words."""
    if ended_of is not None:
        counted = f"{ended_of[0]} of {ended_of[1]} have ended"
        return f"{found.state}: {counted}" if found.ended else counted
    if found.ended:
        return _end(found)
    parts = [found.state if not found.waits_for else f"waits for {found.waits_for}"]
    if found.seen or found.progress:
        parts.append(" ".join(filter(None, (found.seen, found.progress))))
    if found.attempts:
        tries = f"{found.attempts} attempt{'s' if found.attempts > 1 else ''} failed"
        parts.append(f"{tries}, the last: {_cut(found.reason, 100)}" if found.reason else tries)
    elif found.reason:
        parts.append(_cut(found.reason, 100))
    return "; ".join(parts)


class Line:
    """One line on standard error that is written over, where that is a terminal; nothing anywhere else."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()
        self._text = ""

    def show(self, text: str) -> None:
        """Show this instead of what was shown."""
        if self._shows:
            self._text = _cut(text, max(20, shutil.get_terminal_size().columns) - 1)
            click.echo(f"\r\x1b[K{self._text}", nl=False, err=True)

    def clear(self) -> None:
        """Show nothing."""
        if self._text:
            self._text = ""
            click.echo("\r\x1b[K", nl=False, err=True)

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()


def outcome_of(handle: Handle[T], timeout: float | None) -> T:
    """Wait as `Handle.get` does, and raise as it does; a terminal sees meanwhile how the request stands."""
    if not sys.stderr.isatty():
        return handle.get(timeout)
    began = time.monotonic()
    with Line() as line:
        while True:
            left = AGAIN_EVERY_S if timeout is None else timeout - (time.monotonic() - began)
            try:
                return handle.get(max(0.0, min(AGAIN_EVERY_S, left)))
            except ResultNotReady:
                if left <= AGAIN_EVERY_S and timeout is not None:
                    raise
            found = handle.record()
            words = _words(found, None) if found is not None else ""
            line.show(f"{_span(time.monotonic() - began)}  {words}")
