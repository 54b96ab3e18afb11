"""`dagrelay health`: for probes of containers, for monitors, for whoever wonders whether anything is stuck.

Three questions, each with its own reader:

- ``--live``, for what starts a worker again when it is dead: does the event loop of the worker on this
  machine turn? Its heartbeat says so (`stores.beats`). Redis is not asked: to start a worker again mends no
  Redis.
- ``--ready``, for what waits until a worker takes messages: does Redis answer, and is the lease of this
  machine's worker kept? Where no worker runs here, that of any.
- ``--progress``, for people and monitors, never for a probe that kills: is anything stuck? What is found is
  said in words, each with what to do.

Exit codes: 0 yes, it is well; 1 no; 75 cannot tell (no heartbeat can be read; Redis does not answer what is
asked of it); 78 a setting is missing or wrong.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from .client import RelayClient, told_as_unavailable
from .errors import BrokerUnavailable
from .exits import EX_FAILED, EX_TEMPFAIL, told
from .stores import beats
from .stores.fan_outs import FanOuts, chunk_id, watch_id
from .stores.lines import LineState
from .stores.readings import Readings, read

if TYPE_CHECKING:
    from redis import Redis

LIVE_S = 30.0
"""How old a heartbeat may be. It is written each second, and a turn of the loop may take ten."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When something counts as stuck, in seconds."""

    queue_s: float
    due_s: float
    look_s: float
    line_s: float
    breaker_s: float
    held_s: float
    fan_out_looks: int
    """So many looks of its watch in a row at which nothing had moved."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is stuck: which, for how long, and what to do."""

    what: str
    """queue, workers, due, looks, line, breaker, held, fan-out, or memory."""
    subject: str
    seconds: float | None
    words: str
    do: str


@click.command()
@click.option("--live", "question", flag_value="live", help="Does the worker here turn its event loop?")
@click.option("--ready", "question", flag_value="ready", help="Does the worker here take messages?")
@click.option("--progress", "question", flag_value="progress", help="Is anything stuck?")
@click.option("--node", help="--live, --ready: this worker, celery@host.  [default: all here]")
@click.option(
    "--within", type=click.FloatRange(min=1), default=LIVE_S, show_default=True, help="--live: seconds."
)
@click.option("--queue-age", "queue_s", type=float, default=60.0, show_default=True, help="Seconds.")
@click.option("--due-late", "due_s", type=float, default=15.0, show_default=True, help="Seconds.")
@click.option("--look-late", "look_s", type=float, default=60.0, show_default=True, help="Seconds.")
@click.option("--line-still", "line_s", type=float, default=30.0, show_default=True, help="Seconds.")
@click.option("--breaker-open", "breaker_s", type=float, default=300.0, show_default=True, help="Seconds.")
@click.option("--held-for", "held_s", type=float, default=28_800.0, show_default=True, help="Seconds.")
@click.option("--fan-out-looks", type=click.IntRange(min=1), default=4, show_default=True, help="In a row.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@told
def health(question: str | None, node: str | None, within: float, output: str, **limits: Any) -> None:
    """Tell whether a worker lives, whether it takes messages, or whether anything is stuck.

    Ends with 0 if all is well, 1 if not, and 75 if that cannot be told.
    """
    if question is None:
        raise click.UsageError("give --live, --ready or --progress")
    try:
        if question == "live":
            _answer(output, *live(node, within))
        elif question == "ready":
            _answer(output, *ready(RelayClient(), node))
        else:
            client = RelayClient()
            with told_as_unavailable():
                readings = read(client.redis)
                found = list(findings(readings, Limits(**limits), client.redis))
            _tell(output, readings, found)
    except BrokerUnavailable as exc:
        _answer(output, EX_TEMPFAIL, f"cannot tell: Redis: {exc.reason}")


def _answer(output: str, code: int, words: str) -> None:
    status = {0: "ok", EX_FAILED: "bad"}.get(code, "unknown")
    click.echo(json.dumps({"status": status, "words": words}) if output == "json" else words)
    sys.exit(code)


def _tell(output: str, readings: Readings, found: Sequence[Finding]) -> None:
    queued = sum(queue.messages for queue in readings.queues.values())
    words = (
        f"{readings.workers} workers, {queued} messages in queues, {readings.held} held by workers, "
        f"{readings.parked} tasks wait"
    )
    if output == "json":
        status = "bad" if found else "ok"
        click.echo(json.dumps({"status": status, "words": words, "findings": [asdict(one) for one in found]}))
    else:
        for one in found:
            click.echo(f"BAD  {one.what:8} {one.words}\n              {one.do}")
        click.echo(f"{'    ' if found else 'ok  '} {'all' if found else 'nothing is stuck:'} {words}")
    sys.exit(EX_FAILED if found else 0)


def live(node: str | None, within_s: float) -> tuple[int, str]:
    """Return the exit code and words: whether the workers of this machine turn their event loops."""
    try:
        known = [beat for beat in beats.read_all() if node in (None, beat.node)]
    except OSError as exc:
        return EX_TEMPFAIL, f"cannot tell: {beats.folder()} cannot be read ({type(exc).__name__})"
    here = known if node is not None else [beat for beat in known if beat.process_there] or known
    if not here:
        whose = f"the worker {node}" if node is not None else "a worker"
        return EX_TEMPFAIL, (
            f"cannot tell: no heartbeat of {whose} lies in {beats.folder()}; run this as the worker's user, "
            "in its container, with its TMPDIR"
        )
    for beat in here:
        if not beat.process_there:
            return EX_FAILED, f"{beat.node}: its process {beat.pid} is gone"
        if beat.age_s > within_s:
            return EX_FAILED, (
                f"{beat.node}: process {beat.pid} has not turned its event loop for {beat.age_s:.0f} s"
            )
    return 0, ", ".join(f"{beat.node} is {beat.state}" for beat in here)


def ready(client: RelayClient, node: str | None) -> tuple[int, str]:
    """Return the exit code and words: whether Redis answers, and a worker takes messages from it."""
    try:
        with told_as_unavailable():
            readings_at = client.redis.time()
            leases: Any = client.redis.zrange("dagrelay:leases", 0, -1, withscores=True)
    except BrokerUnavailable as exc:
        return EX_FAILED, f"not ready: Redis: {exc.reason}"
    now = readings_at[0] + readings_at[1] / 1e6
    # host:pid:…; others are those who drain a line for a worker.
    alive = {owner.decode() for owner, until in leases if until > now and b":" in owner}
    try:
        here = [one for one in beats.read_all() if node in (None, one.node) and one.process_there]
    except OSError:
        here = []
    if node is not None and not here:
        return EX_FAILED, f"not ready: no worker {node} runs on this machine"
    for beat in here:
        if beat.state != "running":
            return EX_FAILED, f"not ready: {beat.node} is {beat.state}"
        # (In the stock fetch a worker has no lease.)
        if beat.owner and beat.owner not in alive:
            return EX_FAILED, f"not ready: {beat.node} has no lease in Redis"
    if here:
        return 0, ", ".join(f"{beat.node} takes messages" for beat in here)
    if not alive:
        return EX_FAILED, "not ready: no worker is alive"
    return 0, f"{len(alive)} workers are alive, none on this machine"


def findings(readings: Readings, limits: Limits, client: Redis) -> Iterator[Finding]:
    """Yield what is stuck. Raises what redis-py raises."""
    yield from _of_workers(readings, limits)
    if readings.late_s > limits.due_s:
        yield Finding(
            "due",
            "parked",
            readings.late_s,
            f"a task has been due for {readings.late_s:.0f} s, and nobody brings it back to its queue",
            "every living worker does so: see whether one lives (`dagrelay health --live` beside it), and "
            "whether Redis answers it quickly",
        )
    for group, looks in sorted(readings.looks.items()):
        if looks.late_s > limits.look_s:
            yield Finding(
                "looks",
                group,
                looks.late_s,
                f"{group}: the first of {looks.followed} looks is {looks.late_s:.0f} s late",
                "no worker serves the queue looks, or none of those knows this one (AIRFLOW_CONN_…, "
                "DAGRELAY_SERVICE_…), or it answers slowly: raise its max_in_flight, or start more workers",
            )
    for line in readings.lines.values():
        yield from _of_line(line, readings, limits)
    if readings.most_bytes and readings.used_bytes >= readings.most_bytes:
        yield Finding(
            "memory",
            "redis",
            None,
            f"Redis is full ({readings.used_bytes} of {readings.most_bytes} bytes): nothing new is accepted",
            "raise maxmemory; what is on its way goes on and makes room",
        )
    yield from _of_fan_outs(client, readings, limits)


def _of_workers(readings: Readings, limits: Limits) -> Iterator[Finding]:
    queued = sum(queue.messages for queue in readings.queues.values())
    if not readings.workers and queued + readings.held + readings.parked:
        yield Finding(
            "workers",
            "all",
            None,
            f"no worker is alive: {queued} messages lie in queues, {readings.held} with dead workers, "
            f"{readings.parked} tasks wait",
            "start one (`make worker`), with the same DAGRELAY_REDIS_URL",
        )
    elif readings.gone_s > 2 * limits.due_s:
        yield Finding(
            "workers",
            "dead",
            readings.gone_s,
            f"a worker died {readings.gone_s:.0f} s ago, and its messages have not been taken back",
            "every living worker does so within its lease: see its log for what Redis refuses",
        )
    for name, queue in readings.queues.items():
        if queue.oldest_s is not None and queue.oldest_s > limits.queue_s:
            yield Finding(
                "queue",
                name,
                queue.oldest_s,
                f"queue {name}: its oldest message has been due for {queue.oldest_s:.0f} s, {queue.messages} "
                f"lie there, {readings.workers} workers are alive",
                "no worker serves this queue (-Q), or they do not keep up: start more, or raise "
                "DAGRELAY_WORKER_CONCURRENCY"
                if readings.workers
                else "start a worker",
            )


def _of_line(line: LineState, readings: Readings, limits: Limits) -> Iterator[Finding]:
    name = line.connection
    oldest_s = line.oldest_s or 0.0
    if line.held:
        held_s = readings.at - line.held_since if line.held_since else 0.0
        if line.held == "credentials":
            yield Finding(
                "held",
                name,
                held_s,
                f"connection {name} is held, Airflow refuses its credentials ({line.held_reason}); "
                f"{line.waiting} wait",
                f"mend AIRFLOW_CONN_{name.upper()} and start the workers again",
            )
        elif held_s > limits.held_s:
            yield Finding(
                "held",
                name,
                held_s,
                f"connection {name} has been held for {held_s:.0f} s by {line.held_by} ({line.held_reason}); "
                f"{line.waiting} wait",
                f"dagrelay release {name}, when the work there is done",
            )
        return
    broken_s = readings.at - line.opened_at if line.opened_at else 0.0
    if line.breaker != "closed" and broken_s > limits.breaker_s:
        yield Finding(
            "breaker",
            name,
            broken_s,
            f"Airflow {name} has not answered well for {broken_s:.0f} s (breaker {line.breaker}); "
            f"{line.waiting} wait",
            "see to its API server; the workers ask again by themselves, and go on when it answers",
        )
    room = int(line.limit) - line.in_flight - line.called
    if line.breaker != "open" and line.waiting and room > 0 and oldest_s > limits.line_s:
        yield Finding(
            "line",
            name,
            oldest_s,
            f"connection {name}: {line.waiting} wait in line, the first for {oldest_s:.0f} s, and {room} of "
            f"{int(line.limit)} slots are free",
            "no worker that knows this connection serves the queue triggers: see AIRFLOW_CONN_"
            f"{name.upper()} and -Q of the workers",
        )


def _of_fan_outs(client: Redis, readings: Readings, limits: Limits) -> Iterator[Finding]:
    """Yield fan-outs that do not get on: by their watches, which are parked, and what these have seen.

    One whose requests wait, for the end of a run or in line, is none: that may take days. Nor is one whose
    requests may lie in a queue, or with a worker: of these others are told.
    """
    store, aside = FanOuts(client), _quarantined(client) if readings.quarantined else set()
    queued = sum(queue.messages for queue in readings.queues.values())
    for raw, _ in client.zscan_iter("dagrelay:due", match=watch_id("*"), count=5000):
        value: Any = client.hget("dagrelay:parked", raw)
        if value is None:
            continue
        watched = arguments_of(value.split(b"\0", 3)[3])
        fan_out_id, still = str(watched.get("fan_out_id")), int(watched.get("still") or 0)
        state = store.get(fan_out_id) if still >= limits.fan_out_looks else None
        if state is None:
            continue
        chunks = store.open_chunks(fan_out_id)
        left = store.unended([one for ids in chunks.values() for one in ids])
        there = [one for one, own_message in left.items() if own_message]
        there += [chunk_id(fan_out_id, index) for index in chunks]
        stuck = [one for one in there if one in aside]
        if not stuck and not queued + readings.held:
            stuck = _not_parked(client, there)
        if stuck or not there:
            lost = f", {stuck[0]} among them, lie nowhere, or in quarantine" if stuck else ""
            yield Finding(
                "fan-out",
                fan_out_id,
                None,
                f"fan-out {fan_out_id}: {state.ended} of {state.total} have ended, and nothing has moved at "
                f"{still} looks in a row; {len(stuck)} of its messages{lost}",
                f"see `make quarantine`, and dagrelay status {stuck[0] if stuck else fan_out_id}; "
                f"dagrelay cancel {fan_out_id} ends it",
            )


def arguments_of(message: bytes) -> dict[str, Any]:
    """Return the keyword arguments of a Celery message; kombu's own have their body in base64."""
    envelope = json.loads(message)
    body = envelope["body"]
    if envelope.get("properties", {}).get("body_encoding") == "base64":
        body = base64.b64decode(body)
    found = json.loads(body)[1]
    return dict(found)


_ID = re.compile(rb'"id": ?"([^"\\]{1,200})"')


def _quarantined(client: Redis) -> set[str]:
    """Return the ids of messages in quarantine, as far as these have any."""
    found: set[str] = set()
    for _, value in client.hscan_iter("dagrelay:quarantine", count=100):
        message = base64.b64decode(json.loads(value)["message"])
        found |= {one.decode(errors="replace") for one in _ID.findall(message)}
    return found


def _not_parked(client: Redis, ids: Sequence[str]) -> list[str]:
    found = []
    for start in range(0, len(ids), 1000):
        page = ids[start : start + 1000]
        with client.pipeline(transaction=False) as pipe:
            for task_id in page:
                pipe.hexists("dagrelay:parked", task_id)
            found += [one for one, parked in zip(page, pipe.execute(), strict=True) if not parked]
    return found
