"""The account of all accepted requests: exactly one end each, in Redis and in Airflow.

    one_end_each(valkey.url, [handle.id for handle in accepted], runs=airflow.runs("quiet"))

It imports nothing of ours and reads Redis as it lies there (the keys are told in the docstrings of
`producers/stores/`), so that what is wrong in our own reading of it shows too. For each accepted id:

- its record says that it has ended, when, and how; its result is there and says the same;
- it is nowhere any more: not queued, fetched, held by a worker, parked, in a line, called from one, looked
  at, about to be cancelled, or in quarantine, and no observation waits for it;
- one that failed is on the desk for failures, and nothing else is, but what expired before it was begun;
- with `runs`, what Airflow lists: one that is done has its one run there; no run names a request that did not
  end in it.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from redis import Redis

RESULTS = {"done": "SUCCESS", "failed": "FAILURE", "cancelled": "REVOKED"}
MAY_HAVE_A_RUN = ("OutcomeUnknown", "DagRunFailed", "DagRunOverdue", "DagRunGone", "RequestCancelled")
"""Ends beside "done" that a request may come to although it has made a run."""

TOLD = 20
SEPARATOR = "\x06\x16"  # between a queue's name and a priority
_MADE_BY = re.compile(r"^dagrelay task=(\S+)", re.MULTILINE)

Runs = Iterable[Mapping[str, Any]]
"""Runs as Airflow's API gives them: dag_id, dag_run_id, note and more."""


def one_end_each(
    redis_url: str, accepted: Iterable[str], runs: Runs | None = None, *, within_s: float = 10.0
) -> None:
    """Raise AssertionError unless each accepted id has come to exactly one end.

    Within seconds, because what is left behind an end goes a moment later: an acknowledgement, a stale copy
    of a message. `runs` are those that there are when all have ended.
    """
    ids = list(dict.fromkeys(accepted))
    assert ids, "nothing was accepted: there is nothing to account for"
    deadline = time.monotonic() + within_s
    while (found := violations(redis_url, ids, runs)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if found:
        more = f"\n… and {len(found) - TOLD} more" if len(found) > TOLD else ""
        raise AssertionError(
            f"{len(found)} violations for {len(ids)} accepted requests:\n" + "\n".join(found[:TOLD]) + more
        )


def violations(redis_url: str, accepted: Iterable[str], runs: Runs | None = None) -> list[str]:
    """Return what is wrong now, a line each; of a request that has not ended, just that."""
    ids = list(dict.fromkeys(accepted))
    client = Redis.from_url(redis_url)
    try:
        records, results, desk = _read(client, ids)
        places = _places(client, set(ids))
    finally:
        client.close()
    found = []
    made = None if runs is None else _by_maker(runs)
    for task_id, record, result, dead in zip(ids, records, results, desk, strict=True):
        wrong = [*_of_record(record, result)]
        if record.get("state") in RESULTS:
            wrong += [f"ended, and still {place}" for place in places[task_id]]
            wrong += _of_desk(record["state"], dead)
            if made is not None:
                wrong += _of_runs(task_id, record, made)
        elif not places[task_id]:
            wrong.append("and it is nowhere")
        else:
            wrong += places[task_id]
        found += [f"{task_id}: {text}" for text in wrong]
    return found


def _read(
    client: Redis, ids: list[str]
) -> tuple[list[dict[str, str]], list[dict[str, Any]], list[tuple[bool, str | None]]]:
    """Return of each id its record, its result, whether the desk lists it, and its error there."""
    pipe = client.pipeline(transaction=False)
    for task_id in ids:
        pipe.hgetall(f"dagrelay:record:{task_id}")
        pipe.get(f"celery-task-meta-{task_id}")
        pipe.zscore("dagrelay:dead", task_id)
        pipe.zscore("dagrelay:dead-replayed", task_id)
        pipe.hget(f"dagrelay:dead:{task_id}", "error")
    answers = pipe.execute()
    records = [{_text(k): _text(v) for k, v in raw.items()} for raw in answers[0::5]]
    results = [json.loads(raw) if raw else {} for raw in answers[1::5]]
    desk = [
        (score is not None or replayed is not None, None if error is None else _text(error))
        for score, replayed, error in zip(answers[2::5], answers[3::5], answers[4::5], strict=True)
    ]
    return records, results, desk


def _of_record(record: Mapping[str, str], result: Mapping[str, Any]) -> list[str]:
    state = record.get("state")
    if not record:
        return ["has no record"]
    if state not in RESULTS:
        reason = f" ({record['reason']})" if record.get("reason") else ""
        return [f"has not ended: {state} after {record.get('attempts', '0')} attempts{reason}"]
    wrong = []
    if not record.get("ended_at"):
        wrong.append(f"{state}, and no time of its end is on record")
    if state == "failed" and not record.get("error"):
        wrong.append("failed, and its record does not say of what")
    if not result:
        wrong.append(f"{state}, and it has no result")
    elif result.get("status") != RESULTS[state]:
        wrong.append(f"{state}, and its result says {result.get('status')}")
    return wrong


def _of_desk(state: str, dead: tuple[bool, str | None]) -> list[str]:
    listed, error = dead
    if state == "failed" and not (listed and error):
        missing = "listed on" if error else "on"
        return [f"failed, and it is not {missing} the desk"]
    expired = state == "cancelled" and error == "Expired"
    if state != "failed" and not expired and (listed or error):
        return [f"{state}, and it is on the desk for failures"]
    return []


def _of_runs(task_id: str, record: Mapping[str, str], made: Mapping[str, set[tuple[str, str]]]) -> list[str]:
    """Compare with Airflow's runs: `made` has them under "" and by the request that their notes name."""
    mine = made.get(task_id, set())
    names = ", ".join(f"{dag_id} {run_id}" for dag_id, run_id in sorted(mine))
    if len(mine) > 1:
        return [f"{record['state']}, and it made {len(mine)} runs: {names}"]
    if record["state"] == "done":
        run = json.loads(record.get("run") or "{}")
        own = (run.get("dag_id", ""), run.get("dag_run_id", ""))
        if own not in made[""]:
            return [f"done, and Airflow has no run {own[1]!r} of {own[0]!r}"]
        if run.get("created") and mine != {own}:
            return [f"done, and the run {own[1]!r} that it made does not name it ({names or 'none does'})"]
        if mine - {own}:
            return [f"done with the run {own[1]!r}, and it made another: {names}"]
    elif mine and record.get("error") not in MAY_HAVE_A_RUN and not record.get("run"):
        return [f"{record['state']} ({record.get('error')}), and it made a run: {names}"]
    return []


def _by_maker(runs: Runs) -> dict[str, set[tuple[str, str]]]:
    found: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
    for run in runs:
        key = (str(run["dag_id"]), str(run["dag_run_id"]))
        assert key not in found[""], f"Airflow lists {key} twice"
        found[""].add(key)
        for task_id in _MADE_BY.findall(str(run.get("note") or "")):
            found[task_id].add(key)
    found[""].update()
    return found


def _places(client: Redis, ids: set[str]) -> dict[str, list[str]]:
    """Return where each id is still, in words."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for key in client.scan_iter(count=5000):
        words, there = _place(client, _text(key))
        for task_id in ids.intersection(map(_text, there)):
            found[task_id].append(words)
    return found


def _place(client: Redis, name: str) -> tuple[str, Iterable[Any]]:
    """Return what it means to be in a key of Redis, and the ids there; none for records, results and ends."""
    if name.startswith("celery-task-meta-"):
        return "", ()
    if not name.startswith("dagrelay:"):  # the queues, whatever their names
        raws = client.lrange(name, 0, -1) if client.type(name) == b"list" else []
        return f"queued in {name.partition(SEPARATOR)[0]}", map(_id_of, raws)
    own, _, of = name.removeprefix("dagrelay:").partition(":")
    match own:
        case "due":
            return "due at some time", client.zrange(name, 0, -1)
        case "parked":
            return "parked", client.hkeys(name)
        case "line":
            return f"in the line of {of}", client.zrange(name, 0, -1)
        case "called":
            return f"called from the line of {of}", client.zrange(name, 0, -1)
        case "looks":
            return f"looked at, in {of}", client.zrange(name, 0, -1)
        case "cancelled":
            return "about to be cancelled", client.zrange(name, 0, -1)
        case "seen":
            return "told something that it has not read", (of,)
        case "hand":
            return f"fetched by the worker {of}", map(_id_of, client.lrange(name, 0, -1))
        case "held":
            values = (value.partition(b"\0")[2] for value in client.hvals(name))
            return f"held by the worker {of}", map(_id_of, values)
        case "unacked":  # DAGRELAY_FETCH=stock
            values = (json.dumps(json.loads(value)[0]).encode() for value in client.hvals(name))
            return "held by a worker", map(_id_of, values)
        case "quarantine":
            values = (base64.b64decode(json.loads(value)["message"]) for value in client.hvals(name))
            return "in quarantine", map(_id_of, values)
    return "", ()


def _id_of(raw: bytes) -> str:
    """Return the task id of a message, or "" where it is none."""
    try:
        return str(json.loads(raw)["headers"]["id"])
    except (ValueError, KeyError, TypeError):
        return ""


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
