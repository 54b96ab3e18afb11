"""What a worker writes into a dead letter (`producers/stores/dead.py`): the request, and the traceback.

Pure functions. The request is kept as it came, with what was to follow it, so that a replay can go on with
that: its callbacks and the rest of its chain; not its chord, which has been told of the failure and is over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from producers import errors
from producers.contract import POLL_EXTERNAL_JOB, TRIGGER_DAG

MAX_TRACEBACK: Final = 8_000
"""In characters. The end of it tells most."""

GOES_WITH: Final = ("callbacks", "errbacks", "chain", "traceparent", "tracestate")

_FRAME = re.compile(r'  File "')
_HEADING = re.compile(r"Traceback |During handling of|The above exception|  \+ Exception Group")
_EXCEPTION = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)(?::|$)")


def is_request(task: Any) -> bool:
    """Tell whether a task is one that callers ask for."""
    return task in (TRIGGER_DAG, POLL_EXTERNAL_JOB)


def request_text(
    task: str, args: Any, kwargs: Any, beside: Mapping[str, Any], priority: Any = None
) -> str | None:
    """Return a request as a letter has it, JSON; None for a task that nobody asks for by itself.

    `beside`: the headers of its message, and what is embedded in its body.
    """
    if not is_request(task):
        return None
    request = {"task": task, "args": list(args or ()), "kwargs": dict(kwargs or {})}
    request |= {name: beside[name] for name in GOES_WITH if beside.get(name)}
    if priority:
        request["priority"] = priority
    return json.dumps(request, default=str, separators=(",", ":"))


def of_message(envelope: Mapping[str, Any]) -> str | None:
    """Return the request in a message as our own client writes it: see `request_text`."""
    args, kwargs, embed = json.loads(envelope["body"])
    headers, properties = envelope["headers"], envelope.get("properties") or {}
    beside = {**headers, **(embed or {})}
    return request_text(headers["task"], args, kwargs, beside, properties.get("priority"))


def told_traceback(text: str | None) -> str:
    """Return a traceback without the words of errors that are not ours: they may quote a value.

    What is kept are the frames with their lines of code, and the classes of the errors.
    """
    if not text:
        return ""
    kept = "\n".join(_told_lines(text.splitlines()))
    return kept if len(kept) <= MAX_TRACEBACK else f"…{kept[-MAX_TRACEBACK:]}"


def _told_lines(lines: Iterable[str]) -> Iterable[str]:
    in_frame = False
    for line in lines:
        if _FRAME.match(line) or (in_frame and line.startswith("    ")) or _HEADING.match(line):
            in_frame = not _HEADING.match(line)
            yield line
        elif found := _EXCEPTION.match(line):
            in_frame = False
            known = getattr(errors, found[1].rpartition(".")[2], None)
            known = known if found[1].rpartition(".")[0] in ("", errors.__name__) else None
            ours = isinstance(known, type) and issubclass(known, errors.DagrelayError)
            yield line if ours else found[1]
        elif not line.strip():
            yield ""
        else:
            in_frame = False
