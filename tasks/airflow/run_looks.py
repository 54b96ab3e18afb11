"""Looks at DAG runs that are waited for: one list call for up to a thousand of them.

A single GET costs Airflow 25 times as much as a row of a list, so all runs of a connection are asked for at
once: those of their DAGs between the earliest and the latest of them, by the one time of a run that never
changes (Airflow 3: `run_after`; Airflow 2: its logical date), as Airflow told it of each. What is not in the
answer (deleted, or there are more runs than a list may have) is asked for by itself, a few in each look.

A look decides nothing: it has the task wake up that waits, and says when it saw the end. That one asks
Airflow itself, unless it was just now.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from producers.errors import AirflowError, AirflowUnavailable, CredentialsRefused, RequestRejected
from producers.stores.waits import Claimed, Seen
from tasks.airflow.answers import read_instant
from tasks.airflow.cli import CliClient
from tasks.airflow.client import MAX_LIST, AirflowClient, RunList

log = logging.getLogger("dagrelay.looks")

FACTS: Final[tuple[str, ...]] = ("run", "seen", "errors")
"""The record's fields that a look at a run needs."""

ENDED: Final = ("success", "failed")

DAG_RUN_LOOK_S: Final = 2.0
"""How often a run is looked at. Ends are to be seen within 3 s, with at most one list call a second."""

FEW_RUNS_LOOK_S: Final = 1.0
ONE_RUN_LOOK_S: Final = 0.5
"""The same where no more than `FEW_RUNS`, or `FEW`, are waited for: a look at them costs Airflow next to
nothing, and somebody may wait for just this one."""

CLI_LOOK_S: Final = 10.0
"""The same by Airflow's CLI, where a look costs 2 s of CPU for each DAG."""

CLI_TIME_S: Final = 15.0
"""How long such a look begins with another DAG."""

FEW_RUNS: Final = 100

MAX_PAUSE_S: Final = 30.0
"""The longest pause between two looks while Airflow gives no answer, or refuses the credentials."""

SINGLY: Final = 50
"""Runs of one look that are asked for by themselves: 50 take Airflow 0.2 s of CPU."""

FEW: Final = 2
"""So many runs are asked for by themselves at once: a list would not be cheaper, and tells of others."""

MIN_LIST: Final = 25
"""The shortest list: 25 runs with a conf of 1 MB each are 25 MB, and more than 32 MB is not read."""

CROWDED_S: Final = 600.0


def next_look_in_s(now: float, pause_s: float = 0.0, every_s: float = FEW_RUNS_LOOK_S) -> float:
    """Return the seconds until the next look, at the earliest in `pause_s`: on a grid that all runs share.

    So all of a connection's runs are due together, whenever each was started. `now` is Redis' time.
    """
    at = now + max(pause_s, every_s / 8)
    return at - now + every_s - at % every_s


def every_s_for(runs: int) -> float:
    """Return how often so many runs are looked at."""
    return ONE_RUN_LOOK_S if runs <= FEW else FEW_RUNS_LOOK_S if runs <= FEW_RUNS else DAG_RUN_LOOK_S


def look_at_runs(airflow: AirflowClient, claimed: Sequence[Claimed], now: float) -> list[Seen]:
    """Return what a look at each of these runs saw; `now` is Redis' time as they were claimed.

    Raises nothing of Airflow's: what cannot be asked is an error of the look, and no end of the waiting.
    """
    runs = [_Waited.of(one) for one in claimed]
    if isinstance(airflow, CliClient):
        look = _Look(airflow, now, CLI_LOOK_S)
        look.by_dag(airflow, runs)
        return [look.seen(run) for run in runs]
    look = _Look(airflow, now, every_s_for(len(claimed)))
    look.list_of([run for run in runs if run.at is not None])
    look.each([run for run in runs if run not in look.states and run not in look.failed])
    return [look.seen(run) for run in runs]


@dataclass(frozen=True, slots=True, eq=False)
class _Waited:
    """One run, as the record of the task that waits for it has it."""

    task_id: str
    epoch: int
    dag_id: str
    run_id: str
    at: datetime | None
    """What the run is ordered by in its Airflow."""
    seen: str
    errors: int

    @classmethod
    def of(cls, claimed: Claimed) -> _Waited:
        text, seen, errors = claimed.facts
        run: dict[str, Any] = json.loads(text or "{}")
        return cls(
            claimed.task_id,
            claimed.epoch,
            str(run.get("dag_id", "")),
            str(run.get("dag_run_id", "")),
            read_instant(run.get("run_after") or run.get("logical_date")),
            seen or "",
            int(errors or 0),
        )


class _Look:
    """One look at many runs."""

    def __init__(self, airflow: AirflowClient, now: float, every_s: float) -> None:
        self._airflow, self._every_s = airflow, every_s
        self._now, self._began = now, time.monotonic()
        self.states: dict[_Waited, str | None] = {}  # None: there is no such run
        self.failed: dict[_Waited, AirflowError] = {}

    def list_of(self, runs: list[_Waited]) -> None:
        """Ask for all of them at once."""
        if len(runs) <= FEW:
            return
        learned = _learned(self._airflow.connection.id)
        limit, unfinished = learned.asked()
        times = [run.at for run in runs if run.at is not None]
        dag_ids = sorted({run.dag_id for run in runs})
        try:
            found = self._airflow.list_dag_runs(
                dag_ids, min(times), max(times), unfinished=unfinished, limit=limit
            )
        except (AirflowUnavailable, CredentialsRefused) as exc:
            learned.no_answer()
            self.failed |= dict.fromkeys(runs, exc)
            return
        except RequestRejected as exc:  # a role that may read these DAGs, and not list all
            log.info("runs not listed connection=%s: %s", self._airflow.connection.id, exc)
            return
        learned.answer(found, limit)
        for run in runs:
            state = found.states.get((run.dag_id, run.run_id))
            if state is not None:
                self.states[run] = state

    def by_dag(self, airflow: CliClient, runs: list[_Waited]) -> None:
        """Ask for the runs of one DAG after the other, as long as there is time; chance has it which."""
        dag_ids = sorted({run.dag_id for run in runs})
        for dag_id in random.sample(dag_ids, len(dag_ids)):
            if time.monotonic() - self._began > CLI_TIME_S:
                return
            some = [run for run in runs if run.dag_id == dag_id]
            try:
                states = airflow.run_states(dag_id, {run.run_id: run.at for run in some})
            except RequestRejected as exc:
                self.failed |= dict.fromkeys(some, exc)
            except (AirflowUnavailable, CredentialsRefused) as exc:
                self.failed |= dict.fromkeys((one for one in runs if one not in self.states), exc)
                return
            else:
                self.states |= {run: states[run.run_id] for run in some if run.run_id in states}

    def each(self, runs: list[_Waited]) -> None:
        """Ask for some of them one by one, as long as there is time; chance has it that each has its turn."""
        connection = self._airflow.connection
        time_s = connection.connect_timeout_s + connection.read_timeout_s
        for run in random.sample(runs, min(SINGLY, len(runs))):
            if time.monotonic() - self._began > time_s:
                return
            try:
                view = self._airflow.get_dag_run(run.dag_id, run.run_id)
            except RequestRejected as exc:
                self.failed[run] = exc
            except (AirflowUnavailable, CredentialsRefused) as exc:  # it will not answer the next one either
                self.failed |= dict.fromkeys((one for one in runs if one not in self.states), exc)
                return
            else:
                self.states[run] = view.state if view is not None else None

    def seen(self, run: _Waited) -> Seen:
        """Return what the look saw of one run."""
        if run in self.failed:
            exc = self.failed[run]
            asked_for_s = (exc.retry_after_s if isinstance(exc, AirflowUnavailable) else None) or 0.0
            pause_s = min(MAX_PAUSE_S, DAG_RUN_LOOK_S * 2 ** min(run.errors, 10))
            in_s = self._next_in_s(max(pause_s, asked_for_s))
            return Seen(run.task_id, run.epoch, "error", in_s, str(run.errors + 1), str(exc)[:200])
        if run not in self.states:  # not its turn
            return Seen(run.task_id, run.epoch, "again", self._next_in_s())
        state = self.states[run]
        if state is None or state in ENDED:
            words = f"is {state}" if state else "is not to be found"
            observation = json.dumps({"state": state or "gone", "at": round(time.time(), 3)})
            return Seen(run.task_id, run.epoch, "wake", 0.0, observation, words)
        if state == run.seen and not run.errors:
            return Seen(run.task_id, run.epoch, "again", self._next_in_s())
        return Seen(run.task_id, run.epoch, "changed", self._next_in_s(), state, shown=state != run.seen)

    def _next_in_s(self, pause_s: float = 0.0) -> float:
        return next_look_in_s(self._now + time.monotonic() - self._began, pause_s, self._every_s)


class _Learned:
    """What this process has learned of an Airflow: how long a list may be, and whether it is long enough."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limit = MAX_LIST
        self._crowded_until = 0.0

    def asked(self) -> tuple[int, bool]:
        """Return how many runs to ask for, and whether only for those that have not ended.

        In a list of those, others' ended runs take no room. But one that is not in it has ended, or is gone,
        and is then asked for by itself: so it is for lists that would be too long.
        """
        return self._limit, time.monotonic() < self._crowded_until

    def no_answer(self) -> None:
        """Ask for fewer: a list with large confs may be too long to be read, or take too long."""
        with self._lock:
            self._limit = max(MIN_LIST, self._limit // 2)

    def answer(self, found: RunList, limit: int) -> None:
        with self._lock:
            if not found.whole and limit == MAX_LIST:
                self._crowded_until = time.monotonic() + CROWDED_S
            self._limit = min(MAX_LIST, limit * 4)


_known: dict[str, _Learned] = {}


def _learned(connection_id: str) -> _Learned:
    return _known.setdefault(connection_id, _Learned())


__all__ = ["DAG_RUN_LOOK_S", "ENDED", "FACTS", "FEW", "every_s_for", "look_at_runs", "next_look_in_s"]
