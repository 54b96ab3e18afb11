"""Who ends a task, and what a clear cancels, as operators and triggers say in both Airflows; none runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from local.airflow import PYTHON_BELOW, RELEASE, Environment, base_env
from local.provider import provider_for
from tests.parts import need

DOCS = Path(__file__).parents[2] / "docs" / "airflow.md"
SAYS = Path(__file__).with_name("callers") / "operator_ends.py"


@pytest.mark.parametrize("airflow", ["3", "2"], ids=["airflow3", "airflow2"])
def test_the_triggerer_ends_what_it_can_end_as_a_worker_would(airflow, tmp_path):
    below = PYTHON_BELOW[airflow]
    need(f"Airflow {RELEASE[airflow]}", sys.version_info[:2] < below, f"it needs a Python below {below}")
    (documented,) = re.findall("^AIRFLOW_CONN_DAGRELAY_DEFAULT='(.*)'$", DOCS.read_text(), re.MULTILINE)
    environment = Environment(airflow)
    environment.ensure()
    with provider_for(environment) as provider:
        done = subprocess.run(
            [environment.python, SAYS],
            env=base_env(environment, tmp_path)
            | {"PYTHONPATH": provider.pythonpath, "AIRFLOW_CONN_DAGRELAY_DEFAULT": documented},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])

    assert said["in_triggerer"] == ["plain", "its own beginning"]
    # The XComs are written before Airflow 2 writes them, where a store that is away would end the triggerer.
    assert said["taken"] == ["TaskSuccessEvent", {}, [["return_value", "t", 3]], []]
    # A worker may take it once the scheduler has read the end of the process that deferred the task.
    assert said["refused"] == ["TriggerEvent", {}, [], [8 if airflow == "3" else 3]]
    # Once in a process, before anybody waits for an answer: Airflow 3 makes its triggerer ready by then.
    assert said["asked"] == ([["d", "r", "t", 3]] if airflow == "3" else [])
    # An end at the deadline counts: it may have waited for the process that deferred the task.
    ended, over = said["at_the_deadline"]
    assert ended == ["its outcome", []]
    assert over == ["TaskDeferralTimeout" if airflow == "3" else "TaskDeferralError", ["cancelled"]]
    # Not run again for want of a result, which Celery keeps for a day.
    late = said["taken_late"]
    assert (late["run"]["state"], late["failed run that may"]["state"]) == ("success", "failed")
    assert late["job"] == 7
    assert late["long result"].startswith("AirflowException: ResultExpired")
    assert late["failed"].startswith("AirflowException: ExternalJobFailed")
    # Nor is started again what somebody ended, or what may go on unseen.
    assert late["cancelled"].startswith("AirflowFailException: RequestCancelled")
    assert late["unknown"].startswith("AirflowFailException: SubmitUnknown")
    assert said["flower_url"] == "https://flower.example.org"  # Airflow reads no URI with a second ://
    assert said["cancelled"] == [["old"], []]
    assert said["mapped"] == [True] * 5  # no retry for what it cannot mend, as with tasks that are not mapped
