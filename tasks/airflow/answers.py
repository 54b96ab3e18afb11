"""What the answers of Airflow's two APIs have in common: the types that they are read into, and the cleaning
of the words that come with an error.

Those words end in logs, records, results and Flower, and Airflow echoes what it was sent: pydantic the
`input`, jsonschema the failing value (twice), a database error the statement. A conf value may be a secret.
So only what is known to hold no value is taken over, and what is left is compared with the conf once more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal
from urllib.parse import quote

from producers.contract import DagRun, TaskInstance
from producers.errors import AirflowUnavailable, DagNotFound, RequestRejected
from tasks.airflow.connections import AirflowConnection, ApiVersion
from tasks.http import HttpResponse, retry_after_s

MAX_WORDS: Final = 500

MAX_LIST: Final = 1000
"""Runs of one list. Both versions take any limit here; a thousand are 1.3 MB where confs are small."""

JSON_HEADERS: Final = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class RunView:
    """A DAG run as Airflow shows it. Dates are aware; what Airflow does not say is None.

    `queued_at` is told by Airflow 3 only, and `run_after` too: in Airflow 2 it is None. `api` is the version
    of the API that told it.
    """

    dag_id: str
    run_id: str
    state: str
    conf: dict[str, Any] | None
    logical_date: datetime | None
    run_after: datetime | None
    note: str | None
    start_date: datetime | None
    end_date: datetime | None
    queued_at: datetime | None
    api: ApiVersion


@dataclass(frozen=True, slots=True)
class RunList:
    """How runs stand: by (DAG id, run id) the state. `whole` is false when there are more than are told."""

    states: Mapping[tuple[str, str], str]
    whole: bool


@dataclass(frozen=True, slots=True)
class DagView:
    """A DAG as Airflow shows it. `max_active_runs` is None where there is no such limit."""

    dag_id: str
    is_paused: bool
    max_active_runs: int | None


@dataclass(frozen=True, slots=True)
class Xcom:
    """What a task returned: JSON, None among it."""

    value: Any


TaskKind = Literal["plain", "mapped", "none"]


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task instance as Airflow shows it. `state` is None for one that is not scheduled (yet, or any more).

    `try_number` is that of the newest try that was scheduled, 0 for none; `start_date` that of the newest try
    that ran.
    """

    state: str | None
    try_number: int
    start_date: datetime | None
    note: str | None


def as_dag_run(view: RunView, connection: AirflowConnection, created: bool, cleared: bool = False) -> DagRun:
    """Return the run as a trigger's outcome, with the address at which people find it."""
    return DagRun(
        dag_id=view.dag_id,
        dag_run_id=view.run_id,
        state=view.state,
        created=created,
        cleared=cleared,
        logical_date=view.logical_date.isoformat() if view.logical_date else None,
        run_after=view.run_after.isoformat() if view.run_after else None,
        connection=connection.id,
        url=connection.run_url(view.api, view.dag_id, view.run_id),
    )


class DagRunExists(Exception):
    """409: the run id, or the logical date, is taken. A GET of the run id tells which."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


class TokenRefused(Exception):
    """The credentials sent with this one request were not accepted; a new token may help."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


class Forbidden(Exception):
    """403 of Airflow 2, which says the same to wrong credentials and to missing permission."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


class NotThisApi(Exception):
    """The server does not have this version of the API, or somebody else answered 404.

    `sure` is true when Airflow itself said so: then nothing was done.
    """

    def __init__(self, words: str, sure: bool) -> None:
        super().__init__(words, sure)
        self.words, self.sure = words, sure


def json_body(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def segment(name: str, value: str) -> str:
    """Return an id quoted as one segment of a path. Raises RequestRejected if it cannot be one.

    "." and ".." would be taken as steps by every HTTP library on the way, and "~" is Airflow's wildcard.
    """
    if value in ("", ".", "..", "~"):
        raise RequestRejected(
            400, f"{name} {value!r} cannot be part of a URL: Airflow could never be asked for it"
        )
    return quote(value, safe="")


def instant(value: datetime) -> str:
    """Return a date and time as both APIs read it: RFC 3339 in UTC."""
    return value.astimezone(UTC).isoformat()


def read_instant(value: Any) -> datetime | None:
    """Return a date and time of an answer, or None if it is none."""
    if not isinstance(value, str):
        return None
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def read_run(answer: Any, api: ApiVersion) -> RunView | None:
    """Return the run in a decoded answer, or None if it is no run."""
    if not isinstance(answer, dict):
        return None
    dag_id, run_id, state = (answer.get(name) for name in ("dag_id", "dag_run_id", "state"))
    if not (isinstance(dag_id, str) and isinstance(run_id, str) and isinstance(state, str)):
        return None
    conf, note = answer.get("conf"), answer.get("note")
    return RunView(
        dag_id=dag_id,
        run_id=run_id,
        state=state,
        conf=conf if isinstance(conf, dict) else None,
        logical_date=read_instant(answer.get("logical_date")),
        run_after=read_instant(answer.get("run_after")),
        note=note if isinstance(note, str) else None,
        start_date=read_instant(answer.get("start_date")),
        end_date=read_instant(answer.get("end_date")),
        queued_at=read_instant(answer.get("queued_at")),
        api=api,
    )


def run_list(response: HttpResponse) -> RunList:
    """Return the runs of a successful list. Raises AirflowUnavailable if it is none.

    Reads no more of each than is needed: there may be a thousand of them, every other second.
    """
    answer = response.json()
    runs = answer.get("dag_runs") if isinstance(answer, dict) else None
    if not isinstance(runs, list):
        raise somebody_else(response)
    states: dict[tuple[str, str], str] = {}
    for run in runs:
        match run:
            case {"dag_id": str() as dag_id, "dag_run_id": str() as run_id, "state": str() as state}:
                states[dag_id, run_id] = state
    total = answer.get("total_entries")
    return RunList(states, whole=not isinstance(total, int) or total <= len(runs))


def this_dag(response: HttpResponse, dag_id: str) -> DagView:
    """Return the DAG in a successful answer. Raises AirflowUnavailable if it is none, or another one.

    Raises DagNotFound for one that Airflow shows still, and takes no run for: its file is gone, or broken.
    """
    match response.json():
        case {"dag_id": str() as told, "is_paused": bool() as is_paused, **rest} if told == dag_id:
            if rest.get("is_stale") is True or rest.get("is_active") is False:  # Airflow 3, Airflow 2
                raise DagNotFound(dag_id, "its file is gone, or cannot be read")
            limit = rest.get("max_active_runs")
            if isinstance(limit, int) and limit > 0:  # 0 is none to the scheduler too
                return DagView(told, is_paused, limit)
            return DagView(told, is_paused, None)
        case _:
            raise somebody_else(response)


def total(response: HttpResponse) -> int:
    """Return how many entries a successful list has in all. Raises AirflowUnavailable if it does not say."""
    match response.json():
        case {"total_entries": int() as found} if found >= 0:
            return found
        case _:
            raise somebody_else(response)


def xcom(response: HttpResponse) -> Xcom:
    """Return what a task returned. Raises AirflowUnavailable if the answer is none."""
    answer = response.json()
    if not isinstance(answer, dict) or "value" not in answer:
        raise somebody_else(response)
    return Xcom(answer["value"])


def this_run(response: HttpResponse, dag_id: str, run_id: str, api: ApiVersion) -> RunView:
    """Return the run in a successful answer. Raises AirflowUnavailable if it is no run, or another one."""
    view = read_run(response.json(), api)
    if view is None:
        raise somebody_else(response)
    if (view.dag_id, view.run_id) != (dag_id, run_id):
        raise AirflowUnavailable("the answer is about another run than the one asked for")
    return view


def this_task(response: HttpResponse, task: TaskInstance) -> TaskView:
    """Return the task instance in a successful answer. Raises AirflowUnavailable if it is none, or
    another.
    """
    match response.json():
        case {
            "dag_id": task.dag_id,
            "dag_run_id": task.dag_run_id,
            "task_id": task.task_id,
            "map_index": task.map_index,
            "state": str() | None as state,
            "try_number": int() as try_number,
            **rest,
        }:
            note = rest.get("note")
            started = read_instant(rest.get("start_date"))
            return TaskView(state, try_number, started, note if isinstance(note, str) else None)
        case _:
            raise somebody_else(response)


def is_mapped(response: HttpResponse) -> bool:
    """Return what a list of a mapped task's instances says, an empty one too. Raises AirflowUnavailable."""
    match response.json():
        case {"task_instances": list()}:
            return True
        case _:
            raise somebody_else(response)


def unavailable(response: HttpResponse, words: str = "") -> AirflowUnavailable:
    """Return the error for an answer that asks to come back later, or tells of trouble."""
    reason = f"it answered {response.status}" + (f": {words}" if words else "")
    return AirflowUnavailable(reason[:MAX_WORDS], retry_after_s(response.headers), True)


def somebody_else(response: HttpResponse) -> AirflowUnavailable:
    """Return the error for an answer that is not in Airflow's form: a proxy's page, an error page."""
    if 300 <= response.status < 400:
        reason = (
            f"a redirect ({response.status}), which is not followed: is the address of the connection right?"
        )
    else:
        titled = re.search(r"<title[^>]*>([^<]{1,200})", response.text(4000), re.IGNORECASE)
        title = f" ({one_line(titled[1])[:80]})" if titled else ""
        reason = f"somebody else answered {response.status}{title}, not in the form of Airflow's API"
    return AirflowUnavailable(reason, retry_after_s(response.headers), True)


def one_line(text: str) -> str:
    return " ".join(text.split())


_PARAM = re.compile(r"Invalid input for param (?P<name>[^\n:]{1,100}): ")
_FAILED = re.compile(
    r"\n\s*\n\s*Failed validating '(?P<rule>\w+)' in [^\n:]*:\n(?P<schema>.*?)\n\s*\n\s*On ", re.DOTALL
)
_NO_VALUE = re.compile(r"No value passed( and Param has no default value)?\.?\Z")
_ENOUGH = 40
_OTHER_SCHEMA = re.compile(r".* - '(?P<field>[\w.]{1,100})'\Z", re.DOTALL)


def clean(text: str) -> str:
    """Return the part of an error's text that cannot hold a conf value, on one line.

    A failed Param is told as "Invalid input for param NAME: " and jsonschema's text, whose first line and
    last section are the value, and whose middle is the DAG's own schema: that is what we keep.
    """
    param = _PARAM.match(text)
    failed = _FAILED.search(text)
    head = param[0] if param else ""
    if failed:
        return one_line(f"{head}its value fails {failed['rule']!r} of the schema {failed['schema']}")
    if param:
        rest = text[param.end() :]
        return head + (rest if _NO_VALUE.match(rest) else "its value does not fit the DAG's schema for it")
    if "Failed validating" in text or "\nOn instance" in text:
        return "a value does not fit its schema"
    if field := _OTHER_SCHEMA.match(text):  # Airflow 2: "VALUE is not of type 'object' - 'conf'"
        return f"{field['field']}: its value does not fit the API's schema"
    return one_line(text.partition("\n")[0])


def scrubbed(words: str, conf: Any) -> str:
    """Return the words, at most 500 characters, with every value of the conf that occurs in them as "***".

    The second net: values of four characters and more, in the spellings of Python and JSON. Of a long value
    the beginning is enough to be found, because Airflow, or we, may have cut it.
    """
    words = words[: 4 * MAX_WORDS]
    for secret in _spellings(conf):
        start = words.find(secret[:_ENOUGH])
        while start >= 0:
            end = start + _same_at_start(words[start:], secret)
            # As many stars, so that nothing moves up from behind the cut, where half a value may stand.
            words = words[:start] + "*" * (end - start) + words[end:]
            start = words.find(secret[:_ENOUGH], end)
    return re.sub(r"\*{4,}", "***", words[:MAX_WORDS])


def _same_at_start(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _spellings(conf: Any) -> list[str]:
    found: set[str] = set()
    todo = [conf]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, str):
            found |= {value, one_line(value), repr(value)[1:-1], json.dumps(value)[1:-1]}
            found.add(json.dumps(value, ensure_ascii=False)[1:-1])
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found |= {repr(value), json.dumps(value)}
    return sorted((one for one in found if len(one) >= 4), key=len, reverse=True)
