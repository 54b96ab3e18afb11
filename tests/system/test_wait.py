"""What `wait=True` promises with a real Airflow: the outcome is the run's end, whatever ends it."""

from __future__ import annotations

from datetime import datetime

from tests.system.stack import Stack, until


def parked(stack: Stack, **request: object) -> str:
    """Hand over a request for a run of the paused DAG, and wait until its end is waited for."""
    (task_id,) = stack.hand_over({"dag_id": "quiet", "wait": True, **request})
    until(lambda: stack.record(task_id).get("waits_for"), "waiting for the run")
    return task_id


def test_the_outcome_is_how_the_run_ended_and_what_its_task_returned(shared, airflow):
    good, bad, wrong = shared.trigger(
        {"dag_id": "echo", "key": "w1", "conf": {"n": 1}, "wait": True, "result_from": "say"},
        {"dag_id": "echo", "key": "w2", "conf": {"fail": True}, "wait": True},
        {"dag_id": "echo", "key": "w3", "wait": True, "result_from": "nobody"},
    )

    assert (good["run"]["state"], good["run"]["created"]) == ("success", True)
    assert good["run"]["result"]["conf"] == {"n": 1}
    assert good["run"]["result"] == airflow.returned("echo", "relay__w1", "say")
    assert bad["error"] == "DagRunFailed"
    assert f"{airflow.url}/dags/echo/" in bad["text"]
    assert wrong["error"] == "RequestRejected"
    assert "result_from: the run has no task 'nobody'" in wrong["text"]
    # Seen within 3 s of the end, and while it ran.
    ended = airflow.run("echo", "relay__w1")["end_date"]
    assert float(shared.record(good["id"])["ended_at"]) - datetime.fromisoformat(ended).timestamp() < 3.5
    history = "\n".join(entry["what"] for entry in shared.status(good["id"])["history"])
    assert "is success" in history


def test_a_run_that_somebody_sets_to_failed_has_failed_and_one_deleted_is_gone(shared, airflow):
    cancelled, deleted = parked(shared, key="w4"), parked(shared, key="w5")

    status, _ = airflow.api("PATCH", "/dags/quiet/dagRuns/relay__w4", {"state": "failed"})
    assert status == 200
    status, _ = airflow.api("DELETE", "/dags/quiet/dagRuns/relay__w5")
    assert status == 204

    failed, gone = shared.outcomes([cancelled, deleted])
    assert (failed["error"], gone["error"]) == ("DagRunFailed", "DagRunGone")


def test_a_run_that_is_cleared_is_waited_for_until_it_ends_again(shared, airflow):
    ended = {"dag_id": "echo", "key": "w1", "conf": {"n": 1}, "wait": True}  # by the test above, if it ran
    assert shared.trigger(ended)["run"]["state"] == "success"
    tries = airflow.tries("echo", "relay__w1", "say")
    task_id = parked(shared, key="w7")
    with shared.unseen():
        way = "/dags/quiet/dagRuns/relay__w7"
        assert airflow.api("PATCH", way, {"state": "success"})[0] == 200
        assert airflow.api("POST", f"{way}/clear", {"dry_run": False})[0] == 200
    woken = shared.dagrelay("wake", task_id)
    assert woken.returncode == 0, woken.stderr

    said = shared.trigger({**ended, "if_exists": "clear"})

    assert (said["run"]["state"], said["run"]["cleared"]) == ("success", True)
    assert airflow.tries("echo", "relay__w1", "say") == tries + 1
    assert shared.record(task_id)["state"] == "waiting"
    assert airflow.api("PATCH", "/dags/quiet/dagRuns/relay__w7", {"state": "success"})[0] == 200
    assert shared.outcomes([task_id])[0]["run"]["state"] == "success"


def test_a_deadline_or_a_cancel_ends_the_waiting_and_the_run_only_where_asked(shared, airflow):
    overdue, stopped = shared.hand_over(
        {"dag_id": "quiet", "key": "w8", "wait": True, "wait_timeout_s": 2},
        {"dag_id": "quiet", "key": "w9", "wait": True, "wait_timeout_s": 2, "stop_run": True},
    )
    cancelled = parked(shared, key="w10", stop_run=True)

    done = shared.dagrelay("cancel", cancelled)
    assert done.returncode == 0, done.stderr

    said = shared.outcomes([overdue, stopped, cancelled])
    assert [one["error"] for one in said] == ["DagRunOverdue", "DagRunOverdue", "RequestCancelled"]
    assert "it goes on" in said[0]["text"]
    assert "it was set to failed" in said[1]["text"]
    until(lambda: airflow.run("quiet", "relay__w10")["state"] == "failed", "stopped")
    assert airflow.run("quiet", "relay__w8")["state"] == "queued"
    assert airflow.run("quiet", "relay__w9")["state"] == "failed"
