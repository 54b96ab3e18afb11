"""How much later a DAG run starts when it is asked for through Dagrelay, on an idle system.

From the call until the POST has reached Airflow: `.delay()`, through Redis and a worker process, beside
`requests.post` called directly, with a new connection (what most services do) and on a kept one. Airflow is
the tests' fake, which notes when each POST has come.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import requests

from local.valkey import Valkey
from producers import Handle, configure, trigger_dag
from tests.fake_airflow import FakeAirflow
from tests.worker import Worker

from ._report import Bound, interleaved, quantile, report, say

CALLS = 400
WARM_UP = 30
PAUSE_S = 0.01  # idle: the call before has ended, and its worker waits again
CONF = {"day": "2026-11-20", "region": "north", "rows": 1200, "full": True}


def main() -> int:
    """Measure and report."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Valkey() as valkey,
        FakeAirflow() as airflow,
        Worker(valkey.url, Path(folder), connections={"default": airflow.conn_uri}),
        requests.Session() as session,
    ):
        configure(redis_url=valkey.url)
        post = {
            "url": f"{airflow.url}/api/v2/dags/daily_sales/dagRuns",
            "headers": {"Authorization": f"Bearer {airflow.token}"},
        }

        def until_it_arrives(call: Callable[[], object]) -> float:
            """Milliseconds from the call until Airflow has the POST."""
            before = len(airflow.post_times)
            began = time.time()
            accepted = call()
            while len(airflow.post_times) == before:
                time.sleep(0.0002)
            if isinstance(accepted, Handle):
                accepted.get(timeout=30)
            time.sleep(PAUSE_S)
            return (airflow.post_times[before] - began) * 1000

        def direct(send: Callable[..., requests.Response]) -> None:
            send(**post, json={"conf": CONF, "dag_run_id": f"direct-{time.time_ns()}", "logical_date": None})

        ways: dict[str, Callable[[], float]] = {
            "relay": lambda: until_it_arrives(lambda: trigger_dag.delay("daily_sales", conf=CONF)),
            "direct": lambda: until_it_arrives(lambda: direct(requests.post)),
            "direct_session": lambda: until_it_arrives(lambda: direct(session.post)),
        }
        say(f"{CALLS} calls of each, after {WARM_UP} to warm up")
        interleaved(WARM_UP, ways)
        found = interleaved(CALLS, ways)

    p50 = {name: quantile(values, 0.5) for name, values in found.items()}
    p99 = {name: quantile(values, 0.99) for name, values in found.items()}
    figures = {
        "calls": CALLS,
        "overhead_p50_ms": round(p50["relay"] - p50["direct"], 2),
        "overhead_p50_ms_over_session": round(p50["relay"] - p50["direct_session"], 2),
        "p50_ms": round(p50["relay"], 2),
        "p99_ms": round(p99["relay"], 2),
        "direct_p50_ms": round(p50["direct"], 2),
        "direct_p99_ms": round(p99["direct"], 2),
        "direct_session_p50_ms": round(p50["direct_session"], 2),
        "direct_session_p99_ms": round(p99["direct_session"], 2),
    }
    return report("latency", figures, [Bound("overhead_p50_ms", at_most=10)])


if __name__ == "__main__":
    sys.exit(main())
