"""500 DAG runs waited for on a real Airflow 3.3.2: how soon their ends are seen, and what that costs Airflow.

Every request is `trigger_dag.delay(..., wait=True)`. An end is seen when the request has ended (`ended_at` of
its record), and came when Airflow says that the run ended (`end_date`); both clocks are this machine's. The
calls are counted by a proxy between the worker and Airflow.
"""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from local.airflow import Airflow
from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import TriggerRequest
from producers.handle import Handle
from producers.settings import ProducerSettings
from tests.plain_worker import cpu_s
from tests.system.proxy import Proxy
from tests.worker import Worker

from ._report import Bound, quantile, report, say

RUNS = 500
DAG = """
try:
    from airflow.sdk import DAG
    from airflow.providers.standard.operators.empty import EmptyOperator
except ImportError:
    from airflow import DAG
    from airflow.operators.empty import EmptyOperator
short = DAG("short", schedule=None, max_active_runs=64, is_paused_upon_creation=False)
with short:
    EmptyOperator(task_id="nothing")
"""


def main() -> int:
    """Measure and report."""
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder))
    bounds = [
        Bound("seen_p95_s", at_most=3),
        Bound("list_calls_per_s", at_most=1),
        Bound("ended", at_least=RUNS),
    ]
    return report("runs", figures, bounds)


def measure(folder: Path) -> dict[str, Any]:
    """Trigger them all, wait for all of them, and compare the times."""
    (folder / "dags").mkdir()
    (folder / "dags" / "short.py").write_text(DAG)
    with Airflow("3", home=folder / "home", dags=folder / "dags") as airflow, Valkey() as valkey:
        while airflow.api("GET", "/dags/short")[0] != 200:
            time.sleep(0.5)
        proxy = Proxy(airflow.url)
        with (
            proxy,
            Worker(
                valkey.url,
                folder,
                connections={"default": proxy.conn_uri(airflow.username, airflow.password)},
            ) as worker,
        ):
            relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="benchmark"))
            began, cpu = time.time(), cpu_s(worker.pid)
            handles = relay.enqueue_many(TriggerRequest("short", wait=True) for _ in range(RUNS))
            ended = wait(handles, 240)
            took_s, cpu = time.time() - began, cpu_s(worker.pid) - cpu
            late = []
            for handle in ended:
                record = handle.record()
                _, run = airflow.api("GET", f"/dags/short/dagRuns/{handle.dag_run_id}")
                late.append((record.ended_at if record and record.ended_at else 0.0) - at(run["end_date"]))
            lists = [call.at for call in proxy.calls if call.path.endswith("/list")]
            gets = [call for call in proxy.calls if call.method == "GET" and "/dagRuns/" in call.path]
            most = max((sum(1 for other in lists if one <= other < one + 5) for one in lists), default=0)
            return {
                "runs": RUNS,
                "ended": len(ended),
                "took_s": round(took_s, 1),
                "seen_p50_s": round(quantile(late, 0.5), 2),
                "seen_p95_s": round(quantile(late, 0.95), 2),
                "seen_max_s": round(max(late), 2),
                "list_calls": len(lists),
                "list_calls_per_s": round(most / 5, 2),
                "gets": len(gets),
                "cpu_s": round(cpu, 2),
            }


def at(text: str) -> float:
    """Return Airflow's date and time in seconds since 1970."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def wait(handles: list[Handle], timeout_s: float) -> list[Handle]:
    """Return those that have ended in time."""
    deadline = time.monotonic() + timeout_s
    open_, ended = list(handles), []
    while open_ and time.monotonic() < deadline:
        time.sleep(2)
        now = [handle for handle in open_ if handle.ready()]
        ended += now
        open_ = [handle for handle in open_ if handle not in now]
        say(f"{len(ended)} of {len(handles)} ended")
    return ended


if __name__ == "__main__":
    sys.exit(main())
