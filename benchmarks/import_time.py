"""What our provider adds to the time in which an Airflow reads a DAG file.

Airflow's own Python reads a file in a fresh process: a DAG with Airflow's BashOperator where our wheel is not
(`without`), the same where it is installed and not used (`installed`), and one with an operator of ours
beside it (`with`). Counted from where a process of the DAG processor begins: Airflow itself is loaded. In
turns; of wall seconds the least, which other work on the machine disturbs least; of CPU seconds the median.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from local.airflow import Environment, base_env
from local.provider import provider_for

from ._report import Bound, interleaved, report, say

ROUNDS = 9
PLAIN = """
try:
    from airflow.sdk import DAG
    from airflow.providers.standard.operators.bash import BashOperator
except ImportError:
    from airflow import DAG
    from airflow.operators.bash import BashOperator
with DAG("plain", schedule=None):
    BashOperator(task_id="one", bash_command="true")
"""
OURS = f"""{PLAIN}
from producers.airflow.operators import ExternalJobOperator, RelayTriggerDagRunOperator
with DAG("ours", schedule=None):
    RelayTriggerDagRunOperator(task_id="one", trigger_dag_id="plain")
"""
READ = """
import sys, time
try:
    from airflow.dag_processing.dagbag import DagBag
except ImportError:
    from airflow.models.dagbag import DagBag
wall, cpu = time.perf_counter(), time.process_time()
bag = DagBag(sys.argv[1])
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
assert bag.dags and not bag.import_errors, bag.import_errors
print(wall, cpu)
"""


def main() -> int:
    """Measure both versions and report."""
    figures = measured("3") | measured("2")
    figures["extra_s"] = max(figures["airflow2_extra_s"], figures["airflow3_extra_s"])
    return report("import_time", figures, [Bound("extra_s", at_most=0.5)])


def measured(version: Literal["2", "3"]) -> dict[str, float]:
    """Return the figures of one Airflow, in seconds."""
    environment = Environment(version)
    with (
        environment.ensure(say),
        provider_for(environment, say) as provider,
        tempfile.TemporaryDirectory() as folder,
    ):
        plain, ours = Path(folder, "plain.py"), Path(folder, "ours.py")
        plain.write_text(PLAIN)
        ours.write_text(OURS)
        bare = base_env(environment, Path(folder)) | {"PYTHONWARNINGS": "ignore"}
        full = bare | {"PYTHONPATH": provider.pythonpath}
        cpu: dict[str, list[float]] = {"without": [], "installed": [], "with": []}

        def read(way: str, file: Path, env: dict[str, str]) -> float:
            command = [str(environment.python), "-c", READ, str(file)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(done.stderr)
            took = [float(one) for one in done.stdout.splitlines()[-1].split()]
            cpu[way].append(took[1])
            return took[0]

        ways: dict[str, Callable[[], float]] = {
            "without": partial(read, "without", plain, bare),
            "installed": partial(read, "installed", plain, full),
            "with": partial(read, "with", ours, full),
        }
        interleaved(1, ways)  # the bytecode is compiled, the files are in memory
        for earlier in cpu.values():
            earlier.clear()
        wall = {way: min(took) for way, took in interleaved(ROUNDS, ways).items()}
    used = {way: statistics.median(took) for way, took in cpu.items()}
    say(f"Airflow {environment.release}: { ({way: round(took, 3) for way, took in wall.items()}) }")
    return {
        f"airflow{version}_without_s": round(wall["without"], 3),
        f"airflow{version}_extra_s": round(wall["with"] - wall["without"], 3),
        f"airflow{version}_extra_cpu_s": round(used["with"] - used["without"], 3),
        f"airflow{version}_installed_extra_cpu_s": round(used["installed"] - used["without"], 3),
    }


if __name__ == "__main__":
    sys.exit(main())
