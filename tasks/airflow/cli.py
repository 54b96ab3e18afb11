"""Speaking to one Airflow by its command `airflow`: what to say, how to read what it prints, and who asks.

A call costs 1.3 to 2 s of CPU. Before its answer the command prints log lines, on standard output too; its
failures are Python's tracebacks. `-o json` makes a text of every value (`"True"`, `"1"`), so a conf is read
from `dags state`. Measured against 2.11.2 and 3.3.2, which differ in the names of options and in how a run is
named: Airflow 2 wants the logical date where Airflow 3 takes the run id.

A conf is an argument of the command, which other users of that machine may read while it runs; Airflow has no
other way to take one.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn, TypeVar

from producers.contract import TaskInstance, TriggerRequest
from producers.errors import AirflowUnavailable, CredentialsRefused, DagNotFound, RequestRejected
from tasks.airflow.answers import (
    DagRunExists,
    DagView,
    RunView,
    clean,
    instant,
    json_body,
    read_instant,
    scrubbed,
)
from tasks.airflow.client import Check
from tasks.airflow.command import MAX_ARGUMENT_BYTES, NotRun, Ran, TooLong
from tasks.airflow.connections import AirflowConnection, ApiVersion
from tasks.airflow.single_flight import SingleFlight

log = logging.getLogger("dagrelay.airflow")

Run = Callable[[Sequence[str], str], Ran]
"""Runs `airflow` with these arguments; the text says for the metrics what is asked. Raises as `command.run`
does."""

LIST_FROM: Final = 3
"""From so many runs of a DAG on one list is asked for in Airflow 3; of fewer each state by itself, as a list
of all the runs that a DAG ever had may be long."""

LONG_S: Final = 600.0
"""For so long no list is asked for of a DAG whose list could not be had: of 80,000 runs it takes Airflow 3 a
minute of CPU and 2 GB, and is then not read."""

SINGLY_S: Final = 15.0
"""How long runs of such a DAG are asked for by themselves in one look."""

T = TypeVar("T")

_STATES: Final = ("queued", "running", "success", "failed")


class NoEnd(AirflowUnavailable):
    """A list was begun, and has not ended in time, or was too long."""


class AnotherVersion(Exception):
    """The command does not know the arguments that we gave it."""


# What to say


def ask_version() -> list[str]:
    return ["version"]


def ask_whether_reached() -> list[str]:
    """The cheapest question that the command needs its database for."""
    return ["db", "check"]


def ask_scheduler() -> list[str]:
    return ["jobs", "check", "--job-type=SchedulerJob"]


def create_run(request: TriggerRequest, run_id: str, api: ApiVersion) -> list[str]:
    """Return the call that makes the run.

    Without `--no-replace-microseconds` a logical date loses its own, and two runs that Airflow 2 makes of a
    DAG within one second, each with the time as its logical date, are in each other's way.
    """
    # Given as an option here, and by itself in every question about the run.
    found = ["dags", "trigger", _plain(request.dag_id), f"--run-id={_plain(run_id)}"]
    if request.conf is not None:
        found.append(f"--conf={json_body(request.conf).decode()}")
    if request.logical_date is not None:
        option = "--exec-date" if api == "v1" else "--logical-date"
        found.append(f"{option}={instant(request.logical_date)}")
    return [*found, "--no-replace-microseconds", "--output=json"]


def ask_state(dag_id: str, which: str) -> list[str]:
    """Return the question for a run's state and conf; `which`: its logical date (Airflow 2), its id (3)."""
    return ["dags", "state", _plain(dag_id), _plain(which)]


def ask_tasks(dag_id: str, run_id: str) -> list[str]:
    """Return the question for the tasks of a run: each tells the run's logical date."""
    return ["tasks", "states-for-dag-run", _plain(dag_id), _plain(run_id), "--output=json"]


def list_runs(
    dag_id: str,
    api: ApiVersion,
    *,
    state: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[str]:
    """Return the question for a DAG's runs, all of them unless bounded by state or by logical date."""
    found = ["dags", "list-runs", *((f"--dag-id={dag_id}",) if api == "v1" else (_plain(dag_id),))]
    if state is not None:
        found.append(f"--state={state}")
    if since is not None:
        found.append(f"--start-date={instant(since)}")
    if until is not None:
        found.append(f"--end-date={instant(until)}")
    return [*found, "--output=json"]


def ask_dag(dag_id: str) -> list[str]:
    return ["dags", "details", _plain(dag_id), "--output=json"]


def unpause(dag_id: str) -> list[str]:
    return ["dags", "unpause", _plain(dag_id)]


def _plain(argument: str) -> str:
    """Return an id that is taken for no option. Raises RequestRejected."""
    if argument.startswith("-"):
        raise RequestRejected(
            400, "not by Airflow's CLI: the id begins with '-', which it takes for an option"
        )
    return argument


# How to read it


def read_version(ran: Ran) -> str:
    """Return Airflow's version ("3.3.2"). Raises AirflowUnavailable."""
    lines = ran.out.split("\n")
    found = [line.strip() for line in lines if re.fullmatch(r"\d+\.\d+\.\S{1,30}", line.strip())]
    if ran.code != 0 or not found:
        raise refusal(ran, sure=True)
    return found[-1]


def read_created(ran: Ran, request: TriggerRequest, run_id: str, api: ApiVersion) -> RunView:
    """Return the run that was made. Raises DagRunExists, DagNotFound, and what else `refusal` finds."""
    if ran.code != 0:
        raise refusal(ran, request.dag_id, request.conf)
    for row in rows(ran) or ():
        if (row.get("dag_id"), row.get("dag_run_id")) == (request.dag_id, run_id):
            return _run_view(row, run_id, api, conf=request.conf)
    raise AirflowUnavailable("the CLI ended well, and printed no run", None, True)


def read_state(ran: Ran) -> tuple[str, dict[str, Any] | None] | None:
    """Return a run's state and conf, or None if there is no such run, or no such DAG."""
    if ran.code != 0:
        if _no_such_dag(ran):
            return None
        raise refusal(ran, sure=True)
    for line in reversed(ran.out.splitlines()):
        state, _, conf = line.partition(", ")
        if line == "None":
            return None
        if state in _STATES:
            try:
                found = json.loads(conf) if conf else None
            except ValueError:
                continue
            return state, found if isinstance(found, dict) else None
    raise AirflowUnavailable("the CLI ended well, and printed no state", None, False)


def read_tasks(ran: Ran) -> tuple[bool, datetime | None]:
    """Return whether there is such a run, and its logical date if it has one, and a task that tells it."""
    if ran.code != 0:
        name, text = failure(ran)
        no_date = "Error parsing the supplied execution_date" in text  # nor a run id, to Airflow 2
        if name == "DagRunNotFound" or no_date or _no_such_dag(ran):
            return False, None
        raise refusal(ran, sure=True)
    found = rows(ran)
    if found is None:
        raise AirflowUnavailable("the CLI ended well, and printed no tasks", None, False)
    dates = (read_instant(row.get("logical_date") or row.get("execution_date")) for row in found)
    return True, next((date for date in dates if date is not None), None)


def read_runs(ran: Ran, api: ApiVersion) -> list[RunView]:
    """Return a DAG's runs, none if there is no such DAG."""
    if ran.code != 0:
        if _no_such_dag(ran):
            return []
        raise refusal(ran, sure=True)
    found = rows(ran)
    if found is None:
        raise AirflowUnavailable("the CLI ended well, and printed no runs", None, False)
    return [_run_view(row, str(row.get("run_id")), api) for row in found]


def read_dag(ran: Ran, dag_id: str) -> DagView:
    """Return the DAG. Raises DagNotFound, also for one whose file is gone."""
    if ran.code != 0:
        raise DagNotFound(dag_id, "there is no such DAG") if _no_such_dag(ran) else refusal(ran, sure=True)
    for row in rows(ran) or ():
        if row.get("dag_id") == dag_id:
            if row.get("is_stale") == "True" or row.get("is_active") == "False":
                raise DagNotFound(dag_id, "its file is gone, or cannot be read")
            limit = str(row.get("max_active_runs"))
            most = int(limit) if limit.isdecimal() and int(limit) > 0 else None
            return DagView(dag_id, row.get("is_paused") == "True", most)
    raise AirflowUnavailable("the CLI ended well, and printed no DAG", None, False)


def read_done(ran: Ran) -> None:
    """Return if the command ended well. Raises what `refusal` finds."""
    if ran.code != 0:
        raise refusal(ran, sure=True)


def rows(ran: Ran) -> list[dict[str, Any]] | None:
    """Return what it printed as JSON, which is a line of its own after the logs; None if there is none."""
    for line in reversed(ran.out.splitlines()):
        if line.startswith("["):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, list) and all(isinstance(row, dict) for row in found):
                return found
    return None


def failure(ran: Ran) -> tuple[str, str]:
    """Return class and text of the exception that ended it; the class is empty where there is none.

    It may be on standard output: a terminal in between has but one.
    """
    for printed in (ran.err, ran.out):
        _, found, last = printed.rpartition("Traceback (most recent call last):\n")
        if found:
            raised = re.search(r"^([\w.]+)(?:: |$)(.*)", last, re.MULTILINE | re.DOTALL)
            if raised:
                return raised[1].rpartition(".")[2], raised[2].strip()
    return "", ran.err.strip()


def answered(ran: Ran) -> bool:
    """Tell whether it was Airflow that ended it, well or not: then it is there, with its database."""
    return ran.code == 0 or isinstance(refusal(ran), DagRunExists | DagNotFound | RequestRejected)


def refusal(ran: Ran, dag_id: str = "", conf: Any = None, *, sure: bool = False) -> Exception:
    """Return what it means that the command failed; `sure`: it was a mere question.

    DagRunExists, DagNotFound, RequestRejected, CredentialsRefused, AnotherVersion, AirflowUnavailable.
    """
    name, text = failure(ran)
    words = scrubbed(clean(text), conf)
    if _is_taken(name, text):
        return DagRunExists("a run with this id, or with this logical date, exists")
    if name in ("DagNotFound", "SerializedDagNotFound") or _no_such_dag(ran):
        return DagNotFound(dag_id, words)
    # Any other of these may be about Airflow's configuration.
    if name == "ParamValidationError" or (name in _REFUSALS and "trigger_dag.py" in ran.err):
        return RequestRejected(400, words)
    if ran.code == 2 and re.search(r"^airflow .*command error: ", ran.err, re.MULTILINE):
        return AnotherVersion()
    if name:
        return AirflowUnavailable(f"the CLI ended with {name}", None, not sure)
    last = scrubbed(ran.err.strip().rpartition("\n")[2], conf)[:200]
    said = f": {last}" if last else ""
    if ran.code in (126, 127):
        return AirflowUnavailable(f"the command is not there, or may not be run{said}", None, False)
    if _NOT_ALLOWED.search(last):
        return CredentialsRefused("", last)
    how = f"was ended by signal {-ran.code}" if ran.code < 0 else f"ended with {ran.code}"
    return AirflowUnavailable(f"the CLI {how}{said}", None, not sure)


_REFUSALS: Final = ("ValueError", "AirflowException", "AirflowBadRequest")
_NOT_ALLOWED: Final = re.compile(
    r"Permission denied \(|Host key verification failed"
    r"|^Error from server \(Forbidden\)|^error: You must be logged in"
)


def _is_taken(name: str, text: str) -> bool:
    """Tell whether a run is in the way: Airflow saw it, or its database did, where two came at once."""
    if name == "IntegrityError":
        return "dag_run" in text
    # Airflow 2: our run is there, and another one with our logical date.
    return name in ("DagRunAlreadyExists", "MultipleResultsFound")


def _no_such_dag(ran: Ran) -> bool:
    return re.search(r"^DAG: \S+ does not exist in 'dag' table$", ran.err, re.MULTILINE) is not None


def _run_view(row: Mapping[str, Any], run_id: str, api: ApiVersion, conf: Any = None) -> RunView:
    date = row.get("logical_date") or row.get("execution_date")
    return RunView(
        dag_id=str(row.get("dag_id")),
        run_id=run_id,
        state=str(row.get("state")),
        conf=conf,
        logical_date=read_instant(date),
        run_after=read_instant(row.get("run_after")),
        note=None,
        start_date=read_instant(row.get("start_date")),
        end_date=read_instant(row.get("end_date")),
        queued_at=None,
        api=api,
    )


# Who asks


class CliClient:
    """One Airflow by its CLI: what `AirflowClient` is by the API, and raises as that does.

    It knows no notes. What the CLI has no command for is refused by name: as a request that is wrong, or,
    where the CLI stands in for an API that is away, as something to be tried again.
    """

    def __init__(self, connection: AirflowConnection, run: Run) -> None:
        self.connection = connection
        self._run = run
        self._version = ""
        self._versions: SingleFlight[str] = SingleFlight()
        self._long_until: dict[str, float] = {}

    def create_dag_run(self, request: TriggerRequest, run_id: str, note: str) -> RunView:
        """Make the run, without a note."""
        self._refuse_options(request.dag_id, run_id)
        for name, given in (
            ("run_after", request.run_after is not None),
            ("result_from", request.result_from is not None),
            ("stop_run", request.stop_run),
        ):
            if given:
                self._cannot(f"it has no way for {name}")
        api = self._api()
        return self._ask(
            create_run(request, run_id, api),
            "trigger",
            lambda ran: read_created(ran, request, run_id, api),
            sure=False,
        )

    def get_dag_run(self, dag_id: str, run_id: str) -> RunView | None:
        """Return the run, or None if there is none, or no such DAG. Two calls."""
        self._refuse_options(dag_id, run_id)
        api = self._api()
        there, date = True, None
        if not _DATE_LIKE.match(run_id):
            there, date = self._ask(ask_tasks(dag_id, run_id), "get", read_tasks)
        if _DATE_LIKE.match(run_id) or (there and date is None and api == "v1"):  # it may have no tasks
            listed = self._ask(list_runs(dag_id, api), "list", lambda ran: read_runs(ran, api))
            found = next((one for one in listed if one.run_id == run_id), None)
            there, date = found is not None, found.logical_date if found else None
        if not there or (api == "v1" and date is None):
            return None
        stands = self._stands(dag_id, instant(date) if api == "v1" and date is not None else run_id)
        if stands is None:
            return None
        row = {"dag_id": dag_id, "state": stands[0], "logical_date": instant(date) if date else None}
        return _run_view(row, run_id, api, conf=stands[1])

    def find_run_by_logical_date(self, dag_id: str, logical_date: datetime) -> str | None:
        """Return the id of the run that holds this logical date, or None."""
        api = self._api()
        asked = list_runs(dag_id, api, since=logical_date, until=logical_date)
        found = self._ask(asked, "find", lambda ran: read_runs(ran, api))
        return found[0].run_id if found else None

    def run_states(self, dag_id: str, runs: Mapping[str, datetime | None]) -> dict[str, str | None]:
        """Return how these runs of a DAG stand; None for one that is not there. Some, where time is short.

        `runs`: by its id the logical date of each, if it is known: in Airflow 2 the list begins with the
        earliest. In Airflow 3 it is of all the runs that the DAG ever had, and may be too long to be had.
        """
        api = self._api()
        few = len(runs) < LIST_FROM or self._long_until.get(dag_id, 0.0) > time.monotonic()
        if api == "v2" and few and not any(map(_DATE_LIKE.match, runs)):
            return self._singly(dag_id, list(runs))
        dates = [date for date in runs.values() if date is not None]
        since = min(dates) if api == "v1" and len(dates) == len(runs) else None
        try:
            listed = self._ask(list_runs(dag_id, api, since=since), "list", lambda ran: read_runs(ran, api))
        except NoEnd:
            self._long_until[dag_id] = time.monotonic() + LONG_S
            raise
        found = {one.run_id: one.state for one in listed}
        return {run_id: found.get(run_id) for run_id in runs}

    def _singly(self, dag_id: str, run_ids: list[str]) -> dict[str, str | None]:
        """Ask for one run after the other as long as there is time; chance has it which."""
        found: dict[str, str | None] = {}
        began = time.monotonic()
        for run_id in random.sample(run_ids, len(run_ids)):
            if found and time.monotonic() - began > SINGLY_S:
                break
            stands = self._stands(dag_id, run_id)
            found[run_id] = stands[0] if stands else None
        return found

    def get_dag(self, dag_id: str) -> DagView:
        """Return whether a DAG is paused, and how many of its runs may run at a time. Raises DagNotFound."""
        return self._ask(ask_dag(dag_id), "other", lambda ran: read_dag(ran, dag_id))

    def unpause_dag(self, dag_id: str) -> None:
        """Have a DAG's runs go on. That there is no such DAG is not told."""
        self._ask(unpause(dag_id), "change", read_done)

    def count_unfinished_runs(self, dag_id: str) -> int:
        """Return how many runs of a DAG are queued or running, 0 if there is no such DAG. Two calls."""
        api = self._api()
        return sum(
            len(self._ask(list_runs(dag_id, api, state=state), "list", lambda ran: read_runs(ran, api)))
            for state in ("queued", "running")
        )

    def clear_dag_run(self, dag_id: str, run_id: str) -> None:
        """Refuse: without a note nobody could tell whether it was done already."""
        self._cannot("it has no way to clear a run just once")

    def set_note(self, dag_id: str, run_id: str, note: str) -> None:
        """Refuse: it is the first step of a clear."""
        self._cannot("it has no way to clear a run just once")

    def fail_dag_run(self, dag_id: str, run_id: str) -> None:
        """Refuse."""
        self._cannot("it has no way to set a run to failed")

    def get_xcom(self, dag_id: str, run_id: str, task_id: str) -> NoReturn:
        """Refuse."""
        self._cannot("it has no way to read what a task returned")

    def is_mapped(self, dag_id: str, run_id: str, task_id: str) -> NoReturn:
        """Refuse."""
        self._cannot("it has no way to tell whether a task is mapped")

    def get_task_instance(self, task: TaskInstance) -> NoReturn:
        """Refuse: it shows no try of a task."""
        self._cannot("it has no way to set the state of a task")

    def set_task_state(self, task: TaskInstance, state: str, note: str) -> NoReturn:
        """Refuse."""
        self._cannot("it has no way to set the state of a task")

    def authorised(self) -> NoReturn:
        """Refuse: nothing is sent side by side."""
        raise AirflowUnavailable("not by Airflow's CLI", None, False)

    def version(self) -> str:
        """Return Airflow's version, such as "3.3.2"; asked for once."""
        return self._version or self._versions.do(self._found_version)

    def _found_version(self) -> str:
        if not self._version:  # else another thread found it as this one came
            self._version = self._ask(ask_version(), "other", read_version)
            log.info("airflow found connection=%s version=%s by its CLI", self.connection.id, self._version)
        return self._version

    def ask_whether_accepted(self) -> None:
        """Have the command look whether it reaches its database."""
        self._ask(ask_whether_reached(), "other", read_done)

    def check(self) -> Check:
        """Ask for the version, and whether the database is reached and the scheduler lives."""
        version = self.version()
        self.ask_whether_accepted()
        alive = self._ask(ask_scheduler(), "other", lambda ran: ran.code == 0)
        return Check(version, self._api(), "healthy" if alive else "unhealthy", True)

    def _api(self) -> ApiVersion:
        return self.connection.api_version or ("v1" if self.version().startswith("2.") else "v2")

    def _stands(self, dag_id: str, which: str) -> tuple[str, dict[str, Any] | None] | None:
        return self._ask(ask_state(dag_id, which), "get", read_state)

    def _ask(self, arguments: Sequence[str], kind: str, read: Callable[[Ran], T], *, sure: bool = True) -> T:
        """Run the command and read what it printed; `sure`: it is a mere question, and does nothing."""
        try:
            return read(self._run(arguments, kind))
        except NotRun as exc:
            raised = NoEnd if exc.reached and kind == "list" else AirflowUnavailable
            raise raised(f"the CLI: {exc.reason}", None, exc.reached and not sure) from None
        except TooLong as exc:
            self._cannot(
                f"the conf makes an argument of {exc.size_bytes:,} bytes, and a command line holds "
                f"{MAX_ARGUMENT_BYTES:,}: pass a reference to it",
                status=413,
            )
        except CredentialsRefused as exc:
            raise CredentialsRefused(self.connection.id, exc.words) from None
        except AnotherVersion:
            self._version = ""
            pinned = self.connection.api_version
            hint = f"is api_version={pinned} right?" if pinned else "it is asked for its version again"
            raise AirflowUnavailable(f"the CLI does not know our arguments: {hint}", None, False) from None

    def _refuse_options(self, *ids: str) -> None:
        """Refuse what `_plain` would, in the words of what there is no way for: the API takes such ids."""
        if any(one.startswith("-") for one in ids):
            self._cannot("an id begins with '-', which it takes for an option", status=400)

    def _cannot(self, why: str, status: int = 501) -> NoReturn:
        words = f"not by Airflow's CLI: {why}"
        if self.connection.stands_in:
            raise AirflowUnavailable(f"the API is away, and {words}", None, False)
        raise RequestRejected(status, words)


_DATE_LIKE: Final = re.compile(r"[-0-9PR]")
"""How a run id begins that Airflow looks for as a date, or a duration, where there is no such run; or that
its command takes for an option."""
