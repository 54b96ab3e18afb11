"""A real Airflow 3.3.2 to be triggered: one API process, its database pool as Airflow has it by default."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType

import requests

from local.airflow import Airflow

from ._report import say

WARM_UP = 40
WARM_DAG = "warm"
PAGE = 1000
DAGS = """
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG

for name in {names}:
    # Paused, as an Airflow that cannot keep up: its scheduler starts 17 runs a second, and is asked for 100.
    with DAG(name, schedule=None, is_paused_upon_creation=True) as dag:
        EmptyOperator(task_id="nothing")
    globals()[name] = dag
"""
AS_INSTALLED = {  # by Airflow's defaults, where local.airflow is quicker to see a changed file
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "30",
    "AIRFLOW__DAG_PROCESSOR__STALE_DAG_THRESHOLD": "50",
}
_ANSWERED = re.compile(r"\[http\.access\].* status_code=(\d+)")


@dataclass
class Made:
    """The runs of one DAG: when the first for each number was made, and how many there are beyond that."""

    at: dict[int, float] = field(default_factory=dict)
    extra: int = 0

    def times(self) -> list[float]:
        """Return when they were made, in seconds since 1970, in order."""
        return sorted(self.at.values())


class Target:
    """The Airflow; `with Target(folder, dag_ids) as target:`. Its scheduler runs, its DAGs are paused."""

    def __init__(self, folder: Path, dag_ids: Sequence[str]) -> None:
        (folder / "dags").mkdir(parents=True)
        self._dag_ids = [WARM_DAG, *dag_ids]
        (folder / "dags" / "overload.py").write_text(DAGS.format(names=self._dag_ids))
        self.airflow = Airflow(
            "3", home=folder / "home", dags=folder / "dags", pool_size="default", extra_env=AS_INSTALLED
        )

    def token(self) -> str:
        """Return a token for its API."""
        answer = requests.post(
            f"{self.airflow.url}/auth/token",
            json={"username": self.airflow.username, "password": self.airflow.password},
            timeout=30,
        )
        answer.raise_for_status()
        return str(answer.json()["access_token"])

    def restart(self) -> None:
        """Have a new API server, and let it warm up: whatever is measured next finds it alike."""
        self.airflow.restart_api()
        self.warm_up()

    def warm_up(self) -> None:
        """Have it make a few runs, one after the other."""
        for _ in range(WARM_UP):
            status, found = self.airflow.api("POST", f"/dags/{WARM_DAG}/dagRuns", {"logical_date": None})
            if status != 200:
                raise RuntimeError(f"Airflow answered {status} to the first triggers: {found}")

    def _wait_until_read(self) -> None:
        deadline = time.monotonic() + 60
        while any(self.airflow.api("GET", f"/dags/{name}")[0] != 200 for name in self._dag_ids):
            if time.monotonic() > deadline:
                raise TimeoutError("Airflow has not read the DAGs after 60 s")
            time.sleep(0.5)

    def runs(self, dag_id: str) -> Made:
        """Return what was made of the triggers, by the number in each conf: all pages of the list."""
        made = Made()
        ids: set[str] = set()
        total = 1
        while len(ids) < total:
            body = {"dag_ids": [dag_id], "page_limit": PAGE, "page_offset": len(ids), "order_by": "id"}
            status, page = self.airflow.api("POST", "/dags/~/dagRuns/list", body, timeout_s=120)
            if status != 200:
                raise RuntimeError(f"Airflow answered {status} to a list of its runs")
            total = page["total_entries"]
            if total and not page["dag_runs"]:
                raise RuntimeError(f"Airflow lists {len(ids)} of {total} runs")
            for run in page["dag_runs"]:
                if run["dag_run_id"] in ids:
                    raise RuntimeError("Airflow lists a run twice: it made runs meanwhile")
                ids.add(run["dag_run_id"])
                number, at = int(run["conf"]["n"]), moment(run["queued_at"])
                made.extra += number in made.at
                made.at[number] = min(at, made.at.get(number, at))
        return made

    def log_size(self) -> int:
        """Return how long the API's log is, for `answers_5xx`."""
        return self.airflow.log_of("api").stat().st_size

    def answers_5xx(self, since: int) -> int:
        """Return how many 5xx the API has answered since its log was so long, by its own word."""
        with self.airflow.log_of("api").open("rb") as log:
            log.seek(since)
            text = log.read().decode(errors="replace")
        return sum(1 for status in _ANSWERED.findall(text) if status.startswith("5"))

    def __enter__(self) -> Target:
        self.airflow.start(say)
        try:
            self._wait_until_read()
            self.warm_up()
        except BaseException:
            self.airflow.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.airflow.stop()


def moment(text: str) -> float:
    """Return Airflow's date and time in seconds since 1970."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
