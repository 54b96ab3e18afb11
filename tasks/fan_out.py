"""Fan-outs in a worker: one Celery chord for many triggers, whose parts do up to 200 of them at once.

- `fan_out` launches the chord: Celery renders header and body, and one script pushes them, once. So one that
  was killed and is delivered again launches the same chord, and never a second time.
- `trigger_chunk`, a part of its header, posts its triggers side by side over one asyncio loop. What is made
  cleanly is ended in bulk. Anything else (a conflict, a refusal, no answer, a held connection) leaves the
  chunk as a message of its own, as if it had come by itself, and the policy of `tasks/trigger.py` applies to
  it. The chunk then waits parked for the last of those, and costs nothing.
- `fan_out_end`, its body, has all outcomes, in order, as its result; it sends the caller's callback, once.
- `watch_fan_out` looks whether a fan-out that does not get on still has all of its parts, and says so if not.

What is kept in Redis, and which script does what: `producers/stores/fan_outs.py`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from celery import chord, states
from celery.canvas import maybe_signature
from celery.exceptions import Ignore, TaskPredicate
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from celery.worker.state import task_ready
from redis.exceptions import RedisError

from producers.contract import (
    QUEUE_JOBS,
    QUEUE_LOOKS,
    QUEUE_TRIGGERS,
    VERSION,
    TriggerRequest,
)
from producers.errors import (
    DagrelayError,
    FanOutBroken,
    InvalidRequest,
    RequestCancelled,
)
from producers.stores.fan_outs import (
    ASKED_BY,
    FAN_OUT,
    FAN_OUT_END,
    TRIGGER_CHUNK,
    WATCH_FAN_OUT,
    Begun,
    FanOuts,
    FanOutState,
    chunk_id,
    group_id,
    launcher_id,
    then_id,
)
from producers.stores.lines import PRIORITY_S, ahead_s
from producers.stores.waits import CANCELLED, PARKED

from . import logs, metrics
from .again import redelivered
from .airflow.client import ApiModule
from .airflow.connections import AirflowConnection
from .app import RelayRequest, RelayTask, app, backend, records, said, store_client, waits
from .gates import gate_of
from .http import HttpResponse, NoAnswer
from .http_many import in_loop
from .posting import Job, NotMade, Wanted, as_json, authorised, job_of, post, read_answer, sender_for, told_of
from .redis_transport.channel import gathered
from .redis_transport.keys import Keys
from .results import NotHandedOver
from .settings import settings
from .slots import ManyTurns
from .trigger import NEWER_RETRY_S
from .waiting import wait

log = get_logger("dagrelay.fan_out")

CHUNK_BUDGET_S: Final = 240.0
"""After this long a chunk begins no more requests, at whatever Airflow: the rest leaves it, or where each
failure counts before the next, is begun by a further delivery. A task that runs for 15 minutes ends its
process, and an Airflow that takes seconds for each trigger is no case for a batch."""

CHUNK_PRIORITY: Final = 3
"""0 goes first: what is asked for by itself overtakes the chunks that wait in the queue."""

MAX_OUTCOMES_BYTES: Final = 32_000_000
"""Of all outcomes together, as JSON: they are one result and one message. Beyond it what tasks returned
(`result_from`, up to 1 MB each) is left out of them; each request's own result still has it."""

LOOK_AGAIN_S: Final = 30 * 86_400.0
"""A chunk that waits comes back in any case after this long, to see for itself."""


class FanOutTask(RelayTask):
    """What belongs to a fan-out; its messages hold its id and no conf."""

    abstract = True

    def shown(self, args: Any, kwargs: Any, task_id: str) -> str:
        """Return which fan-out, and which part of it."""
        if not isinstance(kwargs, dict):
            return ""
        shown = {name: kwargs[name] for name in ("fan_out_id", "index") if name in kwargs}
        return ", ".join(f"{name}={str(value)[:100]}" for name, value in shown.items())


class ChunkRequest(RelayRequest):
    """A chunk's message in a worker's hands.

    Celery would take a chunk that was revoked out of its chord: what it has not begun would stay accepted,
    and the callback would never be sent. So it runs all the same, and has its whole fan-out cancelled.
    """

    def revoked(self) -> bool:
        """Have the task know of it, and go on."""
        if self.id in worker_state.revoked:
            self.request_dict["chunk_revoked"] = True
        return False

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Have the message of a chunk whose process was ended come back."""
        task_ready(self)
        self.reject(requeue=True)


class ChunkTask(FanOutTask):
    """A part of the chord's header, which never fails: that would be the end of the body."""

    abstract = True
    Request = "tasks.fan_out:ChunkRequest"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it; with what nobody foresaw its message comes back, and after some times is put aside."""
        try:
            return super().__call__(*args, **kwargs)
        except TaskPredicate:
            raise
        except Exception as exc:
            raise NotHandedOver(said(exc), by_itself=True) from exc


def fan_outs() -> FanOuts:
    """Return the fan-outs in the worker's Redis."""
    return FanOuts(store_client())


@app.task(name=FAN_OUT, bind=True, base=FanOutTask, ignore_result=True, recorded=False)
def fan_out(self: Any, /, *, fan_out_id: str, **message: Any) -> None:
    """Launch the chord, once."""
    _raise_if_newer(self, message)
    state = fan_outs().get(fan_out_id)
    if state is None or state.launched:
        return
    with gathered() as messages:
        launch(fan_out_id, state)
    if fan_outs().send_once(fan_out_id, "launched", messages):
        log.info("fan-out launched id=%s requests=%d chunks=%d", fan_out_id, state.total, state.chunks)


def launch(fan_out_id: str, state: FanOutState) -> None:
    """Publish the chord, whose ids are all made from its own."""
    end = fan_out_end.s(fan_out_id=fan_out_id).set(task_id=fan_out_id, queue=QUEUE_TRIGGERS)
    if not state.chunks:
        end.apply_async(([],))
        return
    header = [
        trigger_chunk.si(fan_out_id=fan_out_id, index=index).set(
            task_id=chunk_id(fan_out_id, index), queue=QUEUE_TRIGGERS, priority=CHUNK_PRIORITY
        )
        for index in range(state.chunks)
    ]
    # The chord's own id becomes that of its header; the one given here is the body's.
    chord(header, end, task_id=group_id(fan_out_id)).apply_async(task_id=fan_out_id)


@app.task(name=TRIGGER_CHUNK, bind=True, base=ChunkTask)
def trigger_chunk(self: Any, /, *, fan_out_id: str, index: int, **message: Any) -> None:
    """Start the triggers of one chunk; delivered again, it goes on with those that were not begun."""
    _raise_if_newer(self, message)
    store = fan_outs()
    until = time.monotonic() + CHUNK_BUDGET_S
    if getattr(self.request, "chunk_revoked", False):
        cancel_by_chunk(store, fan_out_id, self.request.id)
    again = redelivered(self) or _was_unsure(self)
    while True:
        begun = store.begin(fan_out_id, index)
        if begun is None:  # it has ended; or what was lost with its requests is found by the watch
            return
        fresh = to_begin(begun)
        # With on_error="stop" only as many are begun as can be in flight, and their ends are waited for.
        some = fresh[: _side_by_side(fresh)] if begun.on_error == "stop" else fresh
        left_over, turns = len(fresh), None
        if some:
            begun_now, turns = start_some(self, store, fan_out_id, index, some, again=again, until=until)
            left_over -= begun_now
        outside = store.close(fan_out_id, index, all_begun=not left_over)
        if left_over and turns is not None:
            raise turns.parked()
        if outside and (not left_over or begun.on_error == "stop"):
            raise wait(
                self,
                until=time.time() + LOOK_AGAIN_S,
                what=f"{outside} requests of fan-out {fan_out_id}",
            )
        if not left_over:
            return
        if time.monotonic() > until:
            raise wait(self, until=0.0, what=f"its next turn in fan-out {fan_out_id}")


@app.task(name=FAN_OUT_END, bind=True, base=FanOutTask)
def fan_out_end(self: Any, /, parts: Any = None, *, fan_out_id: str, **message: Any) -> list[dict[str, Any]]:
    """Return all outcomes in order, after the callback was sent; delivered again, it is not sent again."""
    _raise_if_newer(self, message)
    known = records().get(fan_out_id)
    if known is None or known.ended:
        raise Ignore
    store = fan_outs()
    state = store.get(fan_out_id)
    if state is None:
        raise FanOutBroken(fan_out_id, _size_of(known.progress), "its bookkeeping is gone")
    outcomes = told_outcomes(store, fan_out_id, state.total)
    if len(outcomes) < state.total:
        raise FanOutBroken(fan_out_id, state.total - len(outcomes), "a part of its bookkeeping is gone")
    waits().learn(fan_out_id, progress=_told(state))
    if state.then is not None:
        with gathered() as messages:
            callback: Any = maybe_signature(state.then, app=app)
            callback.apply_async((outcomes,), task_id=callback.options.get("task_id") or then_id(fan_out_id))
        store.send_once(fan_out_id, "then_sent", messages)
    log.info("fan-out ended id=%s %s", fan_out_id, _told(state))
    return outcomes


def told_outcomes(store: FanOuts, fan_out_id: str, total: int) -> list[dict[str, Any]]:
    """Return the outcomes that there are; without what tasks returned where they are too large together."""
    small = store.outcomes_bytes(fan_out_id) <= MAX_OUTCOMES_BYTES
    if not small:
        log.warning("outcomes without the results of tasks: too large together id=%s", fan_out_id)
    found = store.outcomes(fan_out_id, total, with_results=small)
    return [one for one in found if one is not None]


def _told(state: FanOutState) -> str:
    done = state.ended - state.failed - state.cancelled
    return f"{state.ended} of {state.total}: {done} done, {state.failed} failed, {state.cancelled} cancelled"


def _size_of(progress: str | None) -> int:
    found = re.match(r"\d+ of (\d+)", progress or "")
    return int(found[1]) if found else 0


def _raise_if_newer(task: Any, message: Mapping[str, Any]) -> None:
    version = message.get("v", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise task.retry(countdown=NEWER_RETRY_S)


def _was_unsure(task: Any) -> bool:
    """Tell whether an earlier delivery of a chunk was one whose worker had died, before it came to wait."""
    known = records().get(task.request.id) if task.request.retries else None
    return known is not None and known.unsure


def to_begin(begun: Begun) -> list[tuple[str, dict[str, Any]]]:
    """Return the requests of a chunk that are to be begun; end, or have cancelled, what is not."""
    fresh = [(task_id, envelope) for task_id, envelope, letter in begun.items if letter == "f"]
    for task_id in [task_id for task_id, _, letter in begun.items if letter == "c"]:
        found = records().get(task_id)
        end_cancelled(task_id, ASKED_BY + ((found and found.cancel_by) or "hand"))
    if not begun.stopped:
        return fresh
    for task_id, _ in fresh:
        end_cancelled(task_id, begun.stopped)
    # They may have left after it was cancelled, and an earlier worker died before it could say so to them.
    _cancel_too([task_id for task_id, _, letter in begun.items if letter == "o"], begun.stopped)
    return []


def _cancel_too(outside: Sequence[str], stopped: str) -> None:
    """Ask for what has a message of its own to be cancelled, where somebody asked that of the fan-out."""
    if outside and stopped.startswith(ASKED_BY):
        waits().cancel_many(outside, by=stopped.removeprefix(ASKED_BY))


def cancel_by_chunk(store: FanOuts, fan_out_id: str, task_id: str) -> None:
    """Cancel a fan-out one of whose chunks was revoked. The chunk itself is not: it may yet park."""
    found = records().get(task_id)
    store.cancel(fan_out_id, (found and found.cancel_by) or "hand")
    store_client().zrem(CANCELLED, task_id)


# The requests of a chunk


@dataclass(slots=True)
class _Left:
    """One request that leaves its chunk, with what is known of it."""

    task_id: str
    envelope: dict[str, Any]
    reason: str = ""
    unsure: bool = False
    run: dict[str, Any] | None = None


def _side_by_side(items: Sequence[tuple[str, dict[str, Any]]]) -> int:
    """Return how many requests to begin at once where each failure counts before the next."""
    limits = [connection.ceiling for connection in settings().connections.values()]
    return min([len(items), *limits])


def start_some(
    task: Any,
    store: FanOuts,
    fan_out_id: str,
    index: int,
    items: Sequence[tuple[str, dict[str, Any]]],
    *,
    again: bool,
    until: float,
) -> tuple[int, ManyTurns | None]:
    """Post these requests side by side; end those that were made, and have the others leave the chunk.

    `again`: an earlier worker may have posted them. `until`, by the monotonic clock, is when no more are.
    Returns how many were begun, and for what the chunk is to wait, if any of them has to wait for its turn.
    """
    made: list[Job] = []
    left: list[_Left] = []
    known: set[str] = set()
    posted: set[str] = set()
    waiting: ManyTurns | None = None
    name = ""

    def hand_on() -> None:
        known.update(job.task_id for job in made)
        known.update(one.task_id for one in left)
        _hand_on(store, fan_out_id, index, name, made, left, again=again)
        log.info(
            "chunk begun fan_out=%s index=%d started=%d left=%d", fan_out_id, index, len(made), len(left)
        )
        made.clear()
        left.clear()

    try:
        for name, wanted in _grouped(items, left).items():
            connection = settings().connections.get(name)
            if connection is None:
                left += [_Left(one.task_id, one.envelope) for one in wanted]
                continue
            # What has to pass the gate of its DAG does so by itself.
            left += [_Left(one.task_id, one.envelope) for one in wanted if gate_of(one.request, connection)]
            wanted = [one for one in wanted if gate_of(one.request, connection) is None]
            if not wanted:
                continue
            turns = ManyTurns(task, connection, _ahead_s(wanted))
            taken = turns.take(len(wanted))
            if taken.why == "open" and connection.failover is not None:
                left += [_Left(one.task_id, one.envelope) for one in wanted]  # each goes by its CLI
                continue
            if not taken.slots:
                # What is over its time ends for that reason, as trigger_dag knows to do.
                left += [
                    _Left(one.task_id, one.envelope)
                    for one in wanted
                    if one.request.give_up_after_s <= taken.age_s
                ]
                waiting = turns
                turns.wait_at_most(min(one.request.give_up_after_s for one in wanted))
                continue
            with turns:
                spoken = authorised(connection)
                if spoken is None:
                    left += [_Left(one.task_id, one.envelope) for one in wanted]
                    continue
                api, headers = spoken
                jobs = _jobs(api, headers, wanted, left)
                sender = sender_for(connection)
                try:
                    in_loop(turns.each(jobs, partial(post, sender), until)).result()
                finally:
                    posted |= {job.task_id for job in jobs if job.begun}
            for job in jobs:
                if job.answer is not None:
                    _read(api, connection, job, job.answer, made, left)
            hand_on()  # before the next Airflow is asked: it may take long
    except (NotHandedOver, RedisError):
        raise
    except Exception as exc:  # noqa: BLE001 - whatever it is, trigger_dag meets it again and decides for each
        log.error("chunk not begun in bulk fan_out=%s index=%d: %s", fan_out_id, index, said(exc))
        known |= {job.task_id for job in made} | {one.task_id for one in left}
        left += [
            _Left(task_id, envelope, said(exc), unsure=task_id in posted)
            for task_id, envelope in items
            if task_id not in known
        ]
    if made or left:
        hand_on()
    return len(known), waiting


def _ahead_s(wanted: Sequence[Wanted]) -> float:
    """Return by how much a chunk is moved forward in its line: what is asked for by itself overtakes it."""
    return ahead_s(max(one.request.priority for one in wanted)) - PRIORITY_S


def _hand_on(
    store: FanOuts,
    fan_out_id: str,
    index: int,
    connection: str,
    made: Sequence[Job],
    left: Sequence[_Left],
    *,
    again: bool,
) -> None:
    """Write what became of requests: the ends of those made, and messages for those that leave."""
    for one in left:
        if (one.unsure or again) and one.run is None:
            records().attempt_failed(one.task_id, one.reason or "its chunk was interrupted", unsure=True)
    if left:
        store.leave(fan_out_id, index, QUEUE_TRIGGERS, [(one.task_id, _message(one)) for one in left])
        _cancel_too([one.task_id for one in left], store.stopped(fan_out_id))  # meanwhile
    if made:
        runs = [(job.task_id, job.run) for job in made]
        ended = store.end_items(
            runs,
            result_ttl_s=settings().result_ttl_s,
            date_done=app.now().isoformat(),
            conf_keep_s=settings().conf_keep_s,
        )
        metrics.count_started(connection, ended, [job.asked_at for job in made])
        logs.outcomes(told_of(made, connection))


def _grouped(items: Sequence[tuple[str, dict[str, Any]]], left: list[_Left]) -> dict[str, list[Wanted]]:
    """Return what can be posted, by connection; what cannot leaves."""
    found: dict[str, list[Wanted]] = {}
    for task_id, envelope in items:
        fields = json.loads(envelope["body"])[1]
        try:
            request = TriggerRequest.from_message(fields)
        except (InvalidRequest, TypeError):
            request = None
        if request is None or fields.get("v", VERSION) > VERSION:
            left.append(_Left(task_id, envelope))  # trigger_dag says what is wrong
            continue
        one = Wanted(task_id, envelope, request, fields.get("asked"))
        found.setdefault(request.connection, []).append(one)
    return found


def _jobs(
    api: ApiModule, headers: Mapping[str, str], wanted: Sequence[Wanted], left: list[_Left]
) -> list[Job]:
    """Return these requests, ready to be posted."""
    jobs = []
    for one in wanted:
        try:
            jobs.append(job_of(api, headers, one))
        except DagrelayError:
            left.append(_Left(one.task_id, one.envelope))
    return jobs


def _read(
    api: ApiModule,
    connection: AirflowConnection,
    job: Job,
    answer: HttpResponse | NoAnswer,
    made: list[Job],
    left: list[_Left],
) -> None:
    """Decide about one answer: a run that was made, or a request that leaves."""
    run = read_answer(api, connection, job, answer)
    if isinstance(run, NotMade):
        left.append(_Left(job.task_id, job.envelope, run.reason, unsure=run.unsure))
    elif job.request.wait:
        left.append(_Left(job.task_id, job.envelope, run=run))
    else:
        job.run = as_json(run)
        made.append(job)


def _message(one: _Left) -> bytes:
    """Return a request's own message, as it was accepted; with the run that exists for it already."""
    if one.run is not None:
        positional, fields, follow_up = json.loads(one.envelope["body"])
        fields["so_far"] = {"run": one.run}
        one.envelope["body"] = as_json([positional, fields, follow_up])
    return as_json(one.envelope).encode()


def end_cancelled(task_id: str, why: str) -> None:
    """End a request that is not begun any more, as cancelled."""
    backend().end(task_id, states.REVOKED, RequestCancelled(why))


# The watch


@app.task(
    name=WATCH_FAN_OUT, bind=True, base=FanOutTask, ignore_result=True, recorded=False, send_events=False
)
def watch_fan_out(
    self: Any,
    /,
    *,
    fan_out_id: str,
    seen: str = "",
    still: int = 0,
    lost: Sequence[str] = (),
    **message: Any,
) -> None:
    """Look at a fan-out every minute: where nothing has moved, whether all of its parts are still there.

    Where nothing moves and all is there, it looks less and less often, down to every ten minutes. A part that
    is nowhere in two looks in a row is lost (in one look it may be on its way from one place to another):
    then the fan-out ends as FanOutBroken, and so does what was lost.
    """
    known = records().get(fan_out_id)
    if known is None or known.ended:
        return
    store = fan_outs()
    state = store.get(fan_out_id)
    if state is None:
        _break(fan_out_id, _size_of(known.progress), [], "its bookkeeping is gone")
        return
    now = f"{state.ended} {int(state.launched)}"
    missing: list[str] = []
    if now == seen:
        wanted = _parts(store, fan_out_id, state)
        missing = sorted(wanted.keys() - found_among(wanted.keys()))
        gone = [part for part in missing if part in lost]
        if gone == [
            fan_out_id
        ]:  # all have ended, and only the body is missing: a chord's part was not counted
            log.warning("fan-out has no body any more, it gets one id=%s", fan_out_id)
            fan_out_end.apply_async(
                kwargs={"fan_out_id": fan_out_id}, task_id=fan_out_id, queue=QUEUE_TRIGGERS
            )
        elif gone:
            requests = [task_id for part in gone for task_id in wanted[part]]
            words = f"{len(gone)} of its messages are nowhere in Redis, among them {gone[0]}"
            _break(fan_out_id, state.total - state.ended, requests, words)
            return
    still = min(still + 1, 10) if now == seen and not missing else 1
    raise self.retry(
        countdown=still * settings().fan_out_watch_s,
        kwargs={"fan_out_id": fan_out_id, "seen": now, "still": still, "lost": missing[:1000]},
    )


def _parts(store: FanOuts, fan_out_id: str, state: FanOutState) -> dict[str, list[str]]:
    """Return the messages that must be somewhere, each with the requests that are lost with it."""
    chunks = store.open_chunks(fan_out_id)
    if not state.launched:
        return {launcher_id(fan_out_id): [task_id for ids in chunks.values() for task_id in ids]}
    parts: dict[str, list[str]] = {}
    for index, ids in chunks.items():
        unended = store.unended(ids)
        parts[chunk_id(fan_out_id, index)] = [task_id for task_id, outside in unended.items() if not outside]
        parts |= {task_id: [task_id] for task_id, outside in unended.items() if outside}
    if not parts:
        parts[fan_out_id] = []
    return parts


def _break(fan_out_id: str, missing: int, lost: Sequence[str], reason: str) -> None:
    """End a fan-out that can never complete, and what was lost with it.

    So does all that its chunks have not begun: with the fan-out goes what they would read. It ends last, so
    that what is left undone here is found by the next look.
    """
    broken = FanOutBroken(fan_out_id, missing, reason)
    log.error("fan-out broken id=%s: %s", fan_out_id, broken)
    store = fan_outs()
    store.stop(fan_out_id, str(broken))
    ids = [task_id for some in store.open_chunks(fan_out_id).values() for task_id in some]
    unbegun = [task_id for task_id, outside in store.unended(ids).items() if not outside]
    for task_id in {**dict.fromkeys(unbegun), **store.unended(lost)}:
        backend().end(task_id, states.FAILURE, broken)
    backend().end(fan_out_id, states.FAILURE, broken)


_ID = re.compile(rb'"id": ?"([^"\\]{1,200})"')


def found_among(task_ids: Any) -> set[str]:
    """Return those of these tasks that have a message somewhere: parked, queued, in a hand, held, put aside.

    It reads all that lies there, and is for a fan-out which does not get on. Places are read in the order in
    which a message goes through them, so that one on its way is not missed, and what is parked once more.
    """
    wanted = set(task_ids)
    found = _parked(wanted)
    if found == wanted:
        return found
    client, keys = store_client(), Keys(namespace="dagrelay")
    for queue in (QUEUE_TRIGGERS, QUEUE_LOOKS, QUEUE_JOBS):
        for priority in (0, 3, 6, 9):
            found |= _in_list(client, keys.queue(queue, priority)) & wanted
    for name in client.scan_iter(match=f"{keys.hand_prefix}*", count=1000):
        found |= _in_list(client, name) & wanted
    for pattern in (f"{keys.held_prefix}*", "dagrelay:unacked"):
        for name in client.scan_iter(match=pattern, count=1000):
            for _, value in client.hscan_iter(name, count=200):
                found |= _ids(value) & wanted
    for one in _quarantined(client, keys):
        found |= _ids(one) & wanted
    return found | _parked(wanted - found)


def _parked(task_ids: set[str]) -> set[str]:
    some = sorted(task_ids)
    client, found = store_client(), set()
    for start in range(0, len(some), 1000):
        page = some[start : start + 1000]
        with client.pipeline(transaction=False) as pipe:
            for task_id in page:
                pipe.hexists(PARKED, task_id)
            found |= {task_id for task_id, there in zip(page, pipe.execute(), strict=True) if there}
    return found


def _in_list(client: Any, name: Any) -> set[str]:
    """Return the ids in a list, read from its head: what is pushed meanwhile moves the rest on."""
    found: set[str] = set()
    start = 0
    while page := client.lrange(name, start, start + 199):
        for value in page:
            found |= _ids(value)
        start += 200
    return found


def _quarantined(client: Any, keys: Keys) -> Iterator[bytes]:
    from .redis_transport.lot import Lot

    for one in Lot(client, keys).quarantined():
        yield one.message


def _ids(value: bytes) -> set[str]:
    return {found.decode(errors="replace") for found in _ID.findall(value)}
