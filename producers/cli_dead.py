"""The desk for failures on the command line: `dagrelay dead list`, `show`, `replay`, `edit`, `discard`."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar, cast

import click

from .cli_waiting import _cut, _instant, _redis_now, _span, _table, printable
from .client import RelayClient, told_as_unavailable
from .contract import (
    POLL_EXTERNAL_JOB,
    SEND_WEBHOOK,
    SET_TASK_STATE,
    TRIGGER_DAG,
    shown_message,
    shown_poll,
)
from .desk import Choice, RunSeen, checked, fields_to_edit, goes_back, pinned_fields, run_of, why_not
from .errors import AlreadyReplayed, DeadLetterUnknown, InvalidRequest, ResultNotReady
from .exits import EX_DATAERR, EX_FAILED, EX_NOINPUT, EX_TEMPFAIL, fail, told
from .stores.dead import Filter, Letter

PREVIEWED: Final = 20
"""How many letters a preview names."""

SHOWN_OF_REASON: Final = 70

_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])\Z")
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def dead() -> None:
    """What failed for good: see it, mend it, send it again.

    A dead letter has the id of the request that failed. Commands that match nothing end with 66.
    """


# Which letters


def _filters(command: F) -> F:
    """Give a command the options that say which letters."""
    for option in reversed(
        [
            click.option("--dag", "dag_id", help="Of this DAG."),
            click.option("--error", help="With this error: DagNotFound, RequestRejected, Expired, …"),
            click.option("--connection", help="For this Airflow."),
            click.option("--service", help="For this service."),
            click.option("--key-prefix", help="Whose keys begin so."),
            click.option("--reason", help="With this in the reason, whatever its case."),
            click.option("--fan-out", help="Of this fan-out, by its id."),
            click.option(
                "--since", help="Not before: 90s, 20m, 2h or 3d ago, or ISO 8601 with its time zone."
            ),
            click.option("--until", help="Not after: the same."),
        ]
    ):
        command = option(command)
    return command


def _wanted(relay: RelayClient, given: Mapping[str, Any], *, replayed: bool = False) -> Filter:
    found = {name: value for name, value in given.items() if value is not None}
    for name in ("since", "until"):
        if name in found:
            found[name] = _at(relay, name, found[name])
    return Filter(**found, replayed=replayed)


def _at(relay: RelayClient, name: str, text: str) -> float:
    """Return an instant in seconds since 1970. Raises InvalidRequest."""
    ago = _AGO.match(text)
    if ago:
        with told_as_unavailable():
            return _redis_now(relay) - float(ago[1]) * _SECONDS[ago[2]]
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise InvalidRequest(f"--{name}: give 90s, 20m, 2h or 3d, or a date and time with its time zone")
    return found.timestamp()


def _selected(
    relay: RelayClient,
    ids: Sequence[str],
    everything: bool,
    given: Mapping[str, Any],
    *,
    replayed: bool = False,
) -> list[Letter]:
    """Return the letters that a command is for; say of which ids there is none. Ends with 66 for nothing."""
    filtered = any(value is not None for value in given.values())
    if bool(ids) + filtered + everything != 1:
        raise click.UsageError("give ids, or filters, or --all for all that there are")
    if not ids:
        wanted = _wanted(relay, given, replayed=replayed)
        with told_as_unavailable():
            letters = list(relay.dead.store.list(wanted))
        if not letters:
            fail("no dead letter matches" if filtered else "there is no dead letter", EX_NOINPUT)
        return letters
    with told_as_unavailable():
        found = relay.dead.store.some(list(dict.fromkeys(ids)))
    for letter_id in dict.fromkeys(ids):
        if letter_id not in found:
            click.echo(f"dagrelay: {DeadLetterUnknown(letter_id)}", err=True)
    if not found:
        sys.exit(EX_NOINPUT)
    return list(found.values())


# To see them


@dead.command("list")
@_filters
@click.option("--replayed", is_flag=True, help="Those that were replayed, instead of those that were not.")
@click.option("-n", "most", type=click.IntRange(min=1), default=50, show_default=True, help="At the most.")
@click.option("--count", is_flag=True, help="Only how many there are, by their errors.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@told
def list_(replayed: bool, most: int, count: bool, output: str, **given: Any) -> None:
    """List dead letters, the newest first: what failed, and why.

    With -o json one object per line, its instants in seconds since 1970. No value of a conf is shown.
    """
    relay = RelayClient()
    wanted = _wanted(relay, given, replayed=replayed)
    filtered = any(value is not None for value in given.values())
    with told_as_unavailable():
        store = relay.dead.store
        if count:
            counts = Counter(one.error or "" for one in store.list(wanted))
            _show_counts(counts, output)
            matched = sum(counts.values())
        else:
            rows = _first(store.list(wanted), most)
            matched = len(rows)
            now = _redis_now(relay)
            if output == "json":
                for one in rows:
                    click.echo(json.dumps(one.to_json()))
            elif rows:
                _table(
                    ("id", "of", "error", "reason", "key", "ago", *(("replayed as",) if replayed else ())),
                    [(*_row(one, now), *((one.replayed_as or "",) if replayed else ())) for one in rows],
                )
        said = f"{matched} shown, {store.size()} on the desk, {store.replayed()} replayed"
        dropped = store.dropped()
    click.echo(said + (f", {dropped} dropped unseen since ever" if dropped else ""), err=True)
    if filtered and not matched:
        fail("no dead letter matches", EX_NOINPUT)


def _show_counts(counts: Counter[str], output: str) -> None:
    if output == "json":
        click.echo(json.dumps(dict(counts.most_common())))
    else:
        for error, many in counts.most_common():
            click.echo(f"{many:8}  {printable(error)}")


def _first(letters: Iterator[Letter], most: int) -> list[Letter]:
    return [letter for _, letter in zip(range(most), letters, strict=False)]


def _row(one: Letter, now: float) -> tuple[str, ...]:
    return (
        printable(one.id),
        _of(one),
        one.error or "",
        _cut(one.told, SHOWN_OF_REASON),
        _cut(one.key or one.dag_run_id or "", 40),
        _span(now - one.at),
    )


def _of(one: Letter) -> str:
    name = _cut(one.dag_id or one.service or one.task or "unknown", 40)
    return name if one.connection in (None, "default") else f"{name} at {one.connection}"


@dead.command()
@click.argument("letter_id", metavar="ID")
@click.option(
    "--with-conf", is_flag=True, help="With the request as it is: the values of its conf or body too."
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@told
def show(letter_id: str, with_conf: bool, output: str) -> None:
    """Show one dead letter: what was asked for, why it failed, what was tried, where in our code."""
    letter = RelayClient().dead.get(letter_id)
    if letter is None:
        fail(str(DeadLetterUnknown(letter_id)), EX_NOINPUT)
    if output == "json":
        click.echo(json.dumps(letter.to_json() | _request_json(letter, with_conf), indent=2))
        return
    for name, value in letter.to_json().items():
        if name in ("history", "traceback", "request_bytes", "raw_bytes"):
            continue
        if name == "at" or name.endswith("_at"):
            value = _instant(value)
        elif name == "error_args":
            value = json.dumps(value)
        elif not value:
            continue
        click.echo(f"{name:14} {printable(str(value))}")
    click.echo(f"{'request':14} {printable(_shown(letter))}")
    if with_conf:
        _show_request(letter)
    if letter.history:
        click.echo("\nhistory (UTC)")
        for at, what in letter.history:
            click.echo(f"  {_instant(at)}  {printable(what)}")
    if letter.traceback:
        click.echo("\ntraceback, without the words of errors that are not ours")
        for line in letter.traceback.splitlines():
            click.echo(f"  {printable(line)}")
    if not letter.replayed_as and not why_not(letter):
        click.echo(f"\nto send it again: dagrelay dead replay {letter_id}")


def _shown(letter: Letter) -> str:
    """Return the request without any value of a conf or body."""
    if letter.request is None:
        if letter.task == SEND_WEBHOOK:
            return "to tell a hook how a request ended"
        if letter.task == SET_TASK_STATE:
            return "to tell an Airflow task how a request ended"
        return f"<{letter.raw_bytes} bytes that no worker could read>" if letter.raw else why_not(letter)
    given = letter.request["kwargs"]
    shown = shown_poll(given) if letter.request["task"] == POLL_EXTERNAL_JOB else shown_message(given)
    by_position = [f"<{type(one).__name__}>" for one in letter.request["args"]]
    follows = [
        f"{name}={', '.join(str(one.get('task')) for one in letter.request[name])}"
        for name in ("callbacks", "errbacks", "chain")
        if letter.request.get(name)
    ]
    return ", ".join([*by_position, shown, *follows])


def _request_json(letter: Letter, with_conf: bool) -> dict[str, Any]:
    if not with_conf:
        return {"shown": _shown(letter)}
    words = {"reason": letter.reason, "error_args": letter.error_args}
    if letter.raw is not None:
        return {**words, "raw": base64.b64encode(letter.raw).decode()}
    return {**words, "request": letter.request}


def _show_request(letter: Letter) -> None:
    if letter.told != letter.reason:
        click.echo(f"{'reason':14} {printable(letter.reason or '')}")
    if letter.raw is not None:
        click.echo("\nmessage")
        click.echo(f"  {printable(letter.raw.decode(errors='backslashreplace'))}")
    elif letter.request is not None:
        click.echo("\nrequest")
        for line in json.dumps(letter.request, indent=2, ensure_ascii=False).splitlines():
            click.echo(f"  {printable(line)}")


# To send them again


@dataclass(frozen=True, slots=True)
class _Plan:
    """What would become of one letter."""

    letter: Letter
    run: tuple[str, str, str] | None
    """Connection, DAG id and run id of the run that may be there."""
    problem: str = ""
    """Why nothing would."""
    seen: RunSeen | None = None
    """What Airflow says of the run; None where it was not asked."""

    @property
    def exists(self) -> bool:
        return self.seen is not None and self.seen.exists

    def words(self, choice: Choice | None) -> str:
        """Return what would be done, in words."""
        if self.problem:
            return f"left: {self.problem}"
        if goes_back(self.letter):
            return "its message goes back to its queue as it was"
        if self.letter.task == POLL_EXTERNAL_JOB:
            return _words_of_job(self.letter)
        if self.run is None:
            return "a new run"
        name = f"run {self.run[2]}"
        if self.seen is None:
            return f"{name}, whether it exists or not"
        if self.seen.unknown:
            return f"{name}; whether it exists is not known: {self.seen.unknown}"
        if not self.seen.exists:
            return f"{name} is started"
        what = {"reuse": "is reused", "clear": "is cleared"}.get(choice or "", "")
        return f"{name} exists ({self.seen.state}){' and ' + what if what else ''}"


def _words_of_job(letter: Letter) -> str:
    service = letter.service or "its service"
    if letter.reference and letter.error in ("SubmitUnknown", "ExternalJobOverdue", "ExternalJobUnreadable"):
        first = letter.job_id or letter.reference
        return f"anew at {service}, by a new key; the job of the first may exist there: {first}"
    return f"anew at {service}, by a new key where it submits a job"


_sending = (
    click.option(
        "--if-exists",
        type=click.Choice(["reuse", "clear"]),
        help="What to do where the run is there already. Asked for where it is needed.",
    ),
    click.option("--yes", is_flag=True, help="Do not ask."),
    click.option("--dry-run", is_flag=True, help="Only say what would happen."),
    click.option("--no-look", is_flag=True, help="Do not have a worker ask Airflow which runs there are."),
    click.option(
        "--look-timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=30.0,
        show_default=True,
        help="Seconds to wait for that.",
    ),
    click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True),
)


def _send_options(command: F) -> F:
    for option in reversed(_sending):
        command = option(command)
    return command


@dead.command()
@click.argument("ids", metavar="[ID]...", nargs=-1)
@_filters
@click.option("--all", "everything", is_flag=True, help="All that were not replayed.")
@_send_options
@told
def replay(ids: tuple[str, ...], everything: bool, **options: Any) -> None:
    """Send dead letters again: by their ids, or all that match.

    Each becomes a new request, whose id is printed: with the same key or run id, so that it is still one run;
    with a new key towards an outside service; with its clock started anew. What was replayed before is left
    alone. Says first what would happen, and asks.
    """
    how, given = _split(options)
    relay = RelayClient()
    plans = []
    for letter in _selected(relay, ids, everything, given):
        again = letter.replayed_as is not None
        problem = f"it was replayed already, as {letter.replayed_as}" if again else why_not(letter)
        plans.append(_Plan(letter, None if problem else run_of(letter), problem))
    _send(relay, plans, how, by_ids=bool(ids))


@dead.command()
@click.argument("letter_id", metavar="ID")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Set a field of the request, or of its conf: conf.day='\"2026-01-01\"'. JSON, else text.",
)
@click.option("--unset", "removed", multiple=True, metavar="FIELD", help="Leave a field out.")
@click.option("--editor", is_flag=True, help="Change the request as JSON in $EDITOR; its conf is in it.")
@_send_options
@told
def edit(
    letter_id: str, changes: tuple[str, ...], removed: tuple[str, ...], editor: bool, **options: Any
) -> None:
    """Change the request of a dead letter and send it again, as `replay` does.

    The changed request is checked as a caller's would be. Until it is sent the letter stays as it is.
    """
    how, _ = _split(options)
    if not (changes or removed or editor):
        raise click.UsageError("give --set, --unset or --editor")
    relay = RelayClient()
    letter = relay.dead.get(letter_id)
    if letter is None:
        fail(str(DeadLetterUnknown(letter_id)), EX_NOINPUT)
    if letter.replayed_as is not None:
        fail(str(AlreadyReplayed(letter_id, letter.replayed_as)), EX_FAILED)
    before = changed_fields(letter, (), ())
    fields = changed_fields(letter, changes, removed)
    if editor:
        fields = _edited(letter, fields)
    request = checked(letter, fields)
    changed = sorted(name for name in {*before, *fields} if before.get(name) != fields.get(name))
    click.echo(f"changed: {', '.join(changed) or 'nothing'}", err=True)
    _send(relay, [_Plan(letter, run_of(letter, request))], how, by_ids=True, changed=fields)


def changed_fields(letter: Letter, changes: Sequence[str], removed: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a letter's request with these changes. Raises InvalidRequest, naming the field.

    The run id stays what it was, unless the request gets a key or another run id, or it is taken out.
    """
    fields: dict[str, Any] = json.loads(json.dumps(fields_to_edit(letter)))
    for change in changes:
        path, sign, text = change.partition("=")
        if not sign or not path:
            raise InvalidRequest(f"--set: is no FIELD=VALUE: {path[:60]!r}")
        _put(fields, path, _value(text))
    free = "dag_run_id" in removed
    for path in removed:
        if path != "dag_run_id" or path in fields:
            _take(fields, path)
    return fields if free or letter.task != TRIGGER_DAG else pinned_fields(letter, fields)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _inside(fields: dict[str, Any], path: str, *, make: bool) -> tuple[Any, str]:
    """Return what the last part of a path is in, and that part. Raises InvalidRequest."""
    *way, last = path.split(".")
    place: Any = fields
    for i, part in enumerate(way):
        if make and isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        place = _in(place, part, ".".join(way[: i + 1]))
        if not isinstance(place, dict | list):
            raise InvalidRequest(f"{'.'.join(way[: i + 1])}: is no object, so it has no {last!r}")
    return place, last


def _in(place: Any, part: str, path: str) -> Any:
    try:
        return place[int(part) if isinstance(place, list) else part]
    except (KeyError, IndexError, ValueError):
        raise InvalidRequest(f"{path}: is not there") from None


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    place, last = _inside(fields, path, make=True)
    if isinstance(place, list):
        _in(place, last, path)
        place[int(last)] = value
    else:
        place[last] = value


def _take(fields: dict[str, Any], path: str) -> None:
    place, last = _inside(fields, path, make=False)
    _in(place, last, path)
    del place[int(last) if isinstance(place, list) else last]


def _edited(letter: Letter, fields: dict[str, Any]) -> dict[str, Any]:
    """Have somebody edit the fields until they are a request; ends where nothing was saved."""
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    pinned = fields.get("dag_run_id")
    while True:
        try:
            saved = click.edit(text, extension=".json")
        except click.ClickException as exc:
            fail(f"$EDITOR: {exc.format_message()}", EX_FAILED)
        if saved is None:
            fail("nothing was saved, so nothing is sent", EX_FAILED)
        text = saved
        try:
            found = _json_object(saved)
            if found.get("key") != fields.get("key") and found.get("dag_run_id") == pinned:
                found.pop("dag_run_id", None)  # its own key is to name the run
            checked(letter, found)
        except InvalidRequest as exc:
            click.echo(f"dagrelay: {exc}", err=True)
            if not click.confirm("Edit it again?", default=True, err=True):
                fail("nothing is sent; the dead letter is as it was", EX_DATAERR)
        else:
            return found


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except RecursionError:
        raise InvalidRequest("the request is nested too deep") from None
    except ValueError as exc:
        at = f" at line {exc.lineno}, column {exc.colno}" if isinstance(exc, json.JSONDecodeError) else ""
        raise InvalidRequest(f"the request is no JSON{at}") from None
    if not isinstance(found, dict):
        raise InvalidRequest("the request is a JSON object")
    return found


@dataclass(frozen=True, slots=True)
class _How:
    """How a command sends what it sends."""

    if_exists: Choice | None
    yes: bool
    dry_run: bool
    no_look: bool
    look_timeout: float
    output: str


def _split(options: dict[str, Any]) -> tuple[_How, dict[str, Any]]:
    """Return how to send, and the filters."""
    names = _How.__slots__
    return _How(**{name: options[name] for name in names}), {
        name: value for name, value in options.items() if name not in names
    }


def _send(
    relay: RelayClient,
    plans: Sequence[_Plan],
    how: _How,
    *,
    by_ids: bool,
    changed: dict[str, Any] | None = None,
) -> None:
    """Say what would happen, ask, and do it. Ends with 1 if what was said was not done, or an id was left."""
    plans = _looked(relay, plans, how)
    choice = how.if_exists
    there = sum(plan.exists for plan in plans)
    _preview(plans, choice, to_stderr=not how.dry_run)
    if how.dry_run:
        return
    ready = [plan for plan in plans if not plan.problem]
    if not ready:
        fail("nothing was done", EX_FAILED)
    if there and choice is None:
        if how.yes:
            raise click.UsageError(f"{there} of the runs are there already: give --if-exists reuse or clear")
        choice = cast(
            Choice,
            click.prompt(
                f"{there} of the runs are there already: reuse or clear them?",
                type=click.Choice(["reuse", "clear"]),
                err=True,
            ),
        )
    if not how.yes:
        click.confirm(f"Send {_many(len(ready), 'request')}?", abort=True, err=True)
    # Where it was not looked at, the choice is for all; else for those that were there.
    asked = {plan.letter.id: choice for plan in ready if choice and (plan.exists or plan.seen is None)}
    sent = relay.dead.replay_many(
        [plan.letter.id for plan in ready],
        if_exists={one: made for one, made in asked.items() if made},
        changed=changed,
    )
    for one in sent:
        if how.output == "json":
            words = str(one.error) if one.error else None
            click.echo(json.dumps({"id": one.letter_id, "replayed_as": one.task_id or None, "error": words}))
        elif one.error is None:
            click.echo(f"{one.letter_id} replayed as {one.task_id}")
        else:
            click.echo(f"dagrelay: {one.letter_id}: {one.error}", err=True)
    if (by_ids and len(ready) < len(plans)) or any(one.error for one in sent):
        sys.exit(EX_FAILED)


def _looked(relay: RelayClient, plans: Sequence[_Plan], how: _How) -> list[_Plan]:
    """Return the plans with what Airflow says of their runs."""
    wanted = {plan.letter.id: plan.run for plan in plans if plan.run is not None}
    if how.no_look or not wanted:
        return list(plans)
    try:
        seen = relay.dead.look(wanted, how.look_timeout)
    except ResultNotReady as exc:
        fail(
            f"no worker has said within {how.look_timeout:g} s which of the runs there are ({exc.state}): is "
            "one running? Nothing was sent; give --no-look to go without, or a longer --look-timeout",
            EX_TEMPFAIL,
        )
    return [
        _Plan(plan.letter, plan.run, plan.problem, seen.get(plan.letter.id) if plan.run else None)
        for plan in plans
    ]


def _preview(plans: Sequence[_Plan], choice: Choice | None, *, to_stderr: bool) -> None:
    for plan in plans[:PREVIEWED]:
        words = printable(plan.words(choice))
        click.echo(f"{printable(plan.letter.id)}  {_of(plan.letter)}: {words}", err=to_stderr)
    if len(plans) > PREVIEWED:
        click.echo(f"… and {len(plans) - PREVIEWED} more", err=to_stderr)
    left, there = (
        sum(bool(plan.problem) for plan in plans),
        Counter(plan.seen.state for plan in plans if plan.seen is not None and plan.seen.exists),
    )
    unknown = sum(plan.seen is not None and bool(plan.seen.unknown) for plan in plans)
    said = [f"{len(plans) - left} to be sent"]
    if there:
        states = ", ".join(f"{many} {state}" for state, many in sorted(there.items()))
        said.append(f"{sum(there.values())} of their runs exist ({states})")
    if unknown:
        said.append(f"of {unknown} it is not known")
    if left:
        said.append(f"{left} left as they are")
    click.echo("; ".join(said), err=to_stderr)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


# To be rid of them


@dead.command()
@click.argument("ids", metavar="[ID]...", nargs=-1)
@_filters
@click.option("--all", "everything", is_flag=True, help="All that were not replayed.")
@click.option("--replayed", is_flag=True, help="Those that were replayed, instead of those that were not.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@told
def discard(
    ids: tuple[str, ...], everything: bool, replayed: bool, yes: bool, dry_run: bool, **given: Any
) -> None:
    """Take dead letters off the desk for good: by their ids, or all that match.

    Their requests are gone with them. The records say that it was done, and by whom.
    """
    relay = RelayClient()
    letters = _selected(relay, ids, everything, given, replayed=replayed)
    for one in letters[:PREVIEWED]:
        click.echo(
            f"{printable(one.id)}  {_of(one)}: {_cut(one.told or one.error or '', SHOWN_OF_REASON)}",
            err=not dry_run,
        )
    if len(letters) > PREVIEWED:
        click.echo(f"… and {len(letters) - PREVIEWED} more", err=not dry_run)
    if dry_run:
        click.echo(f"{_many(len(letters), 'dead letter')} to be discarded")
        return
    if not yes:
        click.confirm(f"Discard {_many(len(letters), 'dead letter')}?", abort=True, err=True)
    count = relay.dead.discard([one.id for one in letters])
    click.echo(f"{_many(count, 'dead letter')} discarded")
