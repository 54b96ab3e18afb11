"""A service that triggers DAGs: requests come as JSON on stdin, one JSON line leaves for each outcome.

    {"requests": [{"dag_id": …, "conf": …, "key": …}, …],   each may have "options" of apply_async
     "threads": 1,        how many call at once
     "pause_s": 0,        between two calls of a thread
     "get_timeout_s": 30  null: only hand over}
    {"wait_for": [ID, …], "get_timeout_s": 30}              outcomes of what was handed over before

It knows nothing of tests: `producers` is all that it imports of ours.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from producers import DagrelayError, Handle, client, trigger_dag


def hand_over(given: dict[str, Any]) -> Handle | DagrelayError:
    given = dict(given)
    options = given.pop("options", None)
    try:
        if options is None:
            return trigger_dag.delay(given.pop("dag_id"), **given)
        return trigger_dag.apply_async(kwargs=given, **options)
    except DagrelayError as exc:
        return exc


def outcome(accepted: Handle | DagrelayError, timeout_s: float | None) -> dict[str, Any]:
    if isinstance(accepted, DagrelayError):
        return {"id": None, "error": type(accepted).__name__, "text": str(accepted)}
    found: dict[str, Any] = {"id": accepted.id}
    if timeout_s is None:
        return found
    try:
        return found | {"run": asdict(accepted.get(timeout=timeout_s))}
    except DagrelayError as exc:
        return found | {"error": type(exc).__name__, "text": str(exc)}


def main() -> None:
    job = json.load(sys.stdin)
    timeout_s = job.get("get_timeout_s")

    def one(given: dict[str, Any]) -> Handle | DagrelayError:
        accepted = hand_over(given)
        time.sleep(job.get("pause_s", 0))
        return accepted

    if "wait_for" in job:
        handles: list[Any] = [client().handle(task_id) for task_id in job["wait_for"]]
    else:
        with ThreadPoolExecutor(job.get("threads", 1)) as pool:
            handles = list(pool.map(one, job["requests"]))
    for handle in handles:
        print(json.dumps(outcome(handle, timeout_s)), flush=True)  # noqa: T201


main()
