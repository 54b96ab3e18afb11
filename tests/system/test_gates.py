"""A DAG that is paused, or has as many runs as it may have, holds back what asks for that: a real Airflow."""

from __future__ import annotations

from tests.system.stack import until

DAG = "gated"
FULL = f"a free place among the 2 runs of DAG {DAG}"
PAUSED = f"DAG {DAG} is paused"


def test_a_paused_dag_and_its_limit_hold_back_what_asks_for_that(shared, airflow):
    requests = [{"dag_id": DAG, "key": f"g{number}", "window": "max_active_runs"} for number in range(4)]
    waiting = shared.hand_over(*requests, {"dag_id": DAG, "key": "held", "if_paused": "hold"})

    def listed() -> str:
        return shared.dagrelay("parked", "--for", DAG).stdout

    until(lambda: (listed().count(FULL), listed().count(PAUSED)) == (2, 1), "held back", every_s=0.5)
    assert len(airflow.run_ids(DAG)) == 2
    refused = shared.trigger({"dag_id": DAG, "key": "refused", "if_paused": "fail"})
    assert refused["error"] == "DagPaused"

    unpausing = shared.trigger({"dag_id": DAG, "key": "unpausing", "if_paused": "unpause"})

    assert unpausing["run"]["created"]
    assert airflow.api("GET", f"/dags/{DAG}")[1]["is_paused"] is False
    assert all(one["run"]["created"] for one in shared.outcomes(waiting))
    wanted = {f"relay__{key}" for key in ("g0", "g1", "g2", "g3", "held", "unpausing")}
    assert airflow.run_ids(DAG) == wanted
