"""How a task waits for something: `raise wait(task, …)`, and what Flower sees of it.

The task's own message, whole, with its callbacks, its group and its chord, is parked with a deadline in one
script (`producers.stores.waits.WAIT`), together with the record that says what it waits for. It comes back to
its queue at the deadline, by a wake, or by a look that saw the end, and runs again through Celery's ordinary
path. Its retries are the number of this wait (its epoch); nothing of what it knows lies in the message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from celery.exceptions import Ignore, Reject
from celery.utils.dispatch import Signal
from celery.utils.log import get_logger

from producers.stores.records import record_key
from producers.stores.waits import CANCELLED, DUE, PARKED, WAIT, looks_key, seen_key

from .event_batches import tell
from .results import NotHandedOver

log = get_logger("dagrelay.waiting")

STATES_SHOWN: Final = 50
"""How many states of outside jobs one worker shows in Flower by name: each is a label of its metrics."""

parked_look: Final = Signal(name="parked_look", providing_args=["due_in_s"])
"""Sent when a task was parked that is to be looked at in so many seconds."""

_shown: set[str] = set()


def wait(
    task: Any,
    *,
    until: float,
    what: str,
    read: int = 0,
    look: str = "",
    look_in_s: float = 0.0,
    found: Mapping[str, str] | None = None,
    line: str = "",
    ahead_s: float = 0.0,
) -> Ignore:
    """Park the task that is running and return the exception to raise.

    until
        The deadline, in seconds since 1970 by Redis' clock: then it comes back in any case.
    what
        What it waits for, in words, as `dagrelay parked` shows it. No secret, no value of a conf.
    read
        How many observations it has read; while there are more, it comes back at once.
    look, look_in_s
        The group of looks (`service:<id>`, `airflow:<id>`) that follow the job, and when the first is due.
    found
        Fields of the record, to be written in the same step.
    line, ahead_s
        The line (a sorted set in Redis) from which it is called, in the order of their age; it counts as so
        many seconds older than it is. What waits in one reads no observations, and may still expire.

    Raises NotHandedOver when Redis does not take it: the message then stays unacknowledged.
    """
    request = task.request
    header = {
        "until": until,
        "what": what,
        "read": read,
        "look": look,
        "look_in_s": look_in_s,
        "found": dict(found or {}),
        "line": line,
        "ahead_s": ahead_s,
    }
    successor = task.signature_from_request(
        request,
        retries=request.retries + 1,
        # It says until when a task may begin, and this one has begun, unless it waits for its turn.
        expires=request.expires if line else None,
        headers={"parked_wait": header},
    )
    try:
        successor.apply_async()
        if look:
            parked_look.send(sender=task, due_in_s=look_in_s)
    except Reject:
        raise
    except Exception as exc:
        raise NotHandedOver(f"the wait of {request.id} could not be parked: {exc}") from exc
    if not line:  # in a line there may be thousands, each for a moment
        log.info("waits task_id=%s for=%s", request.id, what)
    return Ignore()


def park(client: Any, task_id: str, epoch: int, queue_key: str, message: bytes, header: Any) -> str:
    """Park a message that waits; called by the transport with what `wait` has put into its header."""
    found = [text for pair in header["found"].items() for text in pair]
    look = header["look"]
    answer = WAIT.run(
        client,
        (PARKED, DUE, record_key(task_id), seen_key(task_id), CANCELLED, looks_key(look)),
        (
            task_id,
            f"{header['until']:.6f}",
            epoch,
            queue_key,
            message,
            header["read"],
            f"{header['look_in_s']:.3f}",
            header["what"],
            look,
            header.get("line", ""),
            header.get("ahead_s", 0),
            *found,
        ),
    )
    return answer.decode() if isinstance(answer, bytes) else str(answer)


def show(task: Any, state: str = "", progress: str = "") -> None:
    """Show in Flower that the running task now waits, and in which state the outside job is."""
    show_waiting(task.request.id, task.name, state, progress)


def show_waiting(task_id: str, name: str, state: str = "", progress: str = "") -> None:
    """Show in Flower that a task waits: its state there becomes WAITING, or WAITING-RUNNING and the like."""
    slug = re.sub(r"[^a-z0-9_]+", "_", state.lower()).strip("_")[:24]
    if slug and slug not in _shown:
        if len(_shown) >= STATES_SHOWN:
            slug = ""
        else:
            _shown.add(slug)
    tell(f"task-waiting-{slug}" if slug else "task-waiting", uuid=task_id, name=name, progress=progress)
