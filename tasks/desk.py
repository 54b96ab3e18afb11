"""The workers' side of the desk for failures (`producers/stores/dead.py`).

- `desk_look` asks Airflow for the runs of dead letters: who replays them has no credentials.
- `put_aside` puts a message that no worker can read on the desk, in place of the transport's quarantine.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from celery import states
from celery.app.task import Context
from celery.utils.log import get_logger

from producers.errors import (
    AirflowUnavailable,
    ConnectionNotConfigured,
    CredentialsRefused,
    Quarantined,
    RequestRejected,
)
from producers.stores.dead import DESK_LOOK, Dead

from . import letters
from .airflow.client import as_dag_run
from .app import RelayTask, app, backend, records, store_client
from .event_batches import tell
from .redis_transport import Channel
from .redis_transport.messages import MAX_ID_LENGTH, Unreadable, read
from .results import keeping, warn_of_dropped
from .settings import settings
from .slots import NoTurn, thread_turn

log = get_logger("dagrelay.desk")

LOOK_BUDGET_S: Final = 60.0
"""After this long one look asks for no more runs. Whoever waits for it has gone by then."""


# What Airflow says of runs


class DeskTask(RelayTask):
    """A worker's own affair: no record, no result."""

    abstract = True
    recorded = False

    def shown(self, args: Any, kwargs: Any, task_id: str) -> str:
        """Return how many runs are asked for."""
        return f"runs={len(kwargs.get('runs') or ())}" if isinstance(kwargs, dict) else ""


@app.task(name=DESK_LOOK, bind=True, base=DeskTask, ignore_result=True)
def desk_look(
    self: Any, /, *, look: str, page: int, runs: Sequence[tuple[str, str, str, str]], **message: Any
) -> None:
    """Say of each run whether it is there: `runs` has ids of letters, connections, DAG ids and run ids."""
    Dead(store_client()).say(look, {"page": page, "runs": look_at(runs)})


Said = dict[str, Any] | None
Ask = Callable[[str, str, str], Said]


def look_at(
    runs: Sequence[tuple[str, str, str, str]], ask: Ask | None = None, budget_s: float = LOOK_BUDGET_S
) -> dict[str, Said]:
    """Return for each letter its run's state and URL, None for no such run, or why that is not known.

    What keeps one run from being asked for keeps all others of that Airflow, but a refusal.
    """
    ask = ask or _look
    until = time.monotonic() + budget_s
    found: dict[str, Said] = {}
    unknown: dict[str, str] = {}
    for letter_id, connection, dag_id, run_id in runs:
        if connection not in unknown and time.monotonic() > until:
            unknown[connection] = f"not asked for within {budget_s:g} s"
        if connection in unknown:
            found[letter_id] = {"unknown": unknown[connection]}
            continue
        try:
            found[letter_id] = ask(connection, dag_id, run_id)
        except RequestRejected as exc:
            found[letter_id] = {"unknown": str(exc)}
        except (AirflowUnavailable, ConnectionNotConfigured, CredentialsRefused, NoTurn) as exc:
            unknown[connection] = str(exc)
            found[letter_id] = {"unknown": str(exc)}
    return found


def _look(connection: str, dag_id: str, run_id: str) -> Said:
    known = settings().connections.get(connection)
    if known is None:
        raise ConnectionNotConfigured(connection)
    with thread_turn(known) as airflow:
        view = airflow.get_dag_run(dag_id, run_id)
    if view is None:
        return None
    return {"state": view.state, "url": as_dag_run(view, known, created=False).url}


# Messages that no worker can read


def put_aside(raw: bytes, queue_key: str, reason: str) -> bool:
    """Put a message on the desk, and end its request; called by the transport, which then acknowledges it.

    Nothing else is done for a copy: of a request that has ended, or of which a newer message is in Redis.
    """
    message = _Message.of(raw, queue_key)
    found = records().get(message.task_id) if message.task_id else None
    if found is not None and (found.ended or found.retried > message.retries):
        log.warning("a copy that no worker can read is dropped task_id=%s: %s", message.task_id, reason)
        return True
    error = Quarantined(reason)
    kept: dict[str, str | bytes] = {"raw": raw, "queue_key": queue_key}
    if message.request is not None and letters.is_request(message.task):
        backend().mark_as_failure(message.task_id, error, request=message.request)
    elif found is not None:
        backend().end(found.task_id, states.FAILURE, error, letter=kept)
    else:
        kept |= {"task": message.task, "error": type(error).__name__, "error_args": json.dumps([reason])}
        kept |= {"reason": str(error)[:1000]}
        letter_id = message.task_id or f"unread-{uuid.uuid4()}"
        warn_of_dropped(Dead(store_client()).bury(letter_id, kept, keeping()))
        log.error("put on the desk letter=%s task=%s: %s", letter_id, message.task or "unknown", reason)
        return True
    tell("task-failed", uuid=message.task_id, exception=repr(error), traceback="")
    return True


@dataclass(frozen=True, slots=True)
class _Message:
    """What can be made out of a message. `request` is None where not all of it can."""

    task_id: str = ""
    task: str = ""
    retries: int = 0
    request: Context | None = None

    @classmethod
    def of(cls, raw: bytes, queue_key: str) -> _Message:
        queue = queue_key.partition("\x06")[0]
        try:
            readable = read(raw, queue, accept=Channel.accept, timezone=app.timezone)
        except Unreadable:
            return cls._by_its_headers(raw)
        if "task" not in readable.headers:  # protocol 1, which only others use
            return cls(readable.task_id or "", str(readable.decoded["task"]), readable.retries)
        headers, properties = readable.headers, readable.envelope["properties"]
        args, kwargs, embed = readable.decoded
        info = {**properties["delivery_info"], "priority": properties.get("priority")}
        request = Context({**headers, **(embed or {}), "args": args, "kwargs": kwargs, "delivery_info": info})
        return cls(readable.task_id or "", headers["task"], readable.retries, request)

    @classmethod
    def _by_its_headers(cls, raw: bytes) -> _Message:
        try:
            headers = json.loads(raw)["headers"]
            task_id, task, retries = (headers.get(name) for name in ("id", "task", "retries"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return cls()
        usable = isinstance(task_id, str) and len(task_id) <= MAX_ID_LENGTH and task_id.isprintable()
        return cls(
            task_id if usable else "",
            task[:200] if isinstance(task, str) and task.isprintable() else "",
            retries if isinstance(retries, int) else 0,
        )


Channel.put_elsewhere = staticmethod(put_aside)
