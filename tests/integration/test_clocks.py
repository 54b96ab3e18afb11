"""Workers whose machine's clock is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from producers.contract import TriggerRequest

CLOCK = Path(__file__).parent / "redis_transport" / "clock"


@pytest.mark.parametrize("shift_s", [3600, -3600])
def test_a_retry_comes_when_it_is_due_and_no_hour_later_or_at_once(relay, airflow, start_worker, shift_s):
    airflow.fault = lambda number, dag_id, run_id: "503" if number == 1 else "answer"  # come back after 1 s
    start_worker(PYTHONPATH=str(CLOCK), CLOCK_SHIFT_S=str(shift_s))

    handle = relay.enqueue(TriggerRequest("daily_sales"))

    assert handle.get(timeout=60).created
    first, second = airflow.post_times
    assert second - first >= 0.9
