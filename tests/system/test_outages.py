"""Whatever fails on the way: every accepted request ends as exactly one run, made once."""

from __future__ import annotations

import itertools
import threading

from tests.system.stack import only, until

BROKEN = "def fragile(:  # somebody is in the middle of a deployment\n"


def test_lost_answers_and_a_proxys_pages_still_make_each_run_once(stack, airflow):
    proxy = stack.proxy()
    faults = itertools.cycle(["drop", "502 after", "pass", "502", "close"])
    first = set()

    def rule(call):
        if not call.makes_run or call.body in first:
            return "pass"
        first.add(call.body)
        return next(faults)

    proxy.rule = rule
    stack.start_worker(proxy.conn_uri(airflow.username, airflow.password))
    before = airflow.run_ids("quiet")

    said = stack.trigger(*({"dag_id": "quiet", "key": f"lost-{n}", "conf": {"n": n}} for n in range(15)))

    assert [one["run"]["dag_run_id"] for one in said] == [f"relay__lost-{n}" for n in range(15)]
    assert all(one["run"]["created"] for one in said)  # its own attempt, also where the answer was lost
    assert airflow.run_ids("quiet") - before == {f"relay__lost-{n}" for n in range(15)}
    assert [call.status for call in proxy.made()].count(200) == 15
    assert len(proxy.made()) >= 15 + 12
    assert airflow.run("quiet", "relay__lost-7")["conf"] == {"n": 7}
    stack.account([one["id"] for one in said], "quiet")


def test_a_clear_whose_answer_was_lost_is_not_done_twice(stack, airflow):
    proxy = stack.proxy()
    stack.start_worker(proxy.conn_uri(airflow.username, airflow.password))
    request = {"dag_id": "echo", "key": "clear-lost", "conf": {"n": 1}}
    stack.trigger(request)
    airflow.wait_for_run("echo", "relay__clear-lost")
    asked, cleared = threading.Event(), threading.Event()

    def rule(call):
        if cleared.is_set() or (call.clears and not asked.is_set()):
            asked.set()  # the first never reaches Airflow, the second does, and its answer is lost
            return "502"
        if call.clears:
            cleared.set()
            return "drop"
        return "pass"

    proxy.rule = rule
    (task_id,) = stack.hand_over({**request, "if_exists": "clear"})
    assert cleared.wait(30)
    # It has run again and is finished when the worker gets through once more.
    until(lambda: airflow.tries("echo", "relay__clear-lost", "say") == 2, "cleared and started again")
    airflow.wait_for_run("echo", "relay__clear-lost")
    proxy.rule = lambda call: "pass"
    (said,) = stack.outcomes([task_id])

    assert (said["run"]["cleared"], said["run"]["state"]) == (True, "success")
    assert [call.status for call in proxy.calls if call.clears] == [None, 200]
    assert airflow.tries("echo", "relay__clear-lost", "say") == 2


def test_airflow_that_hangs_and_makes_the_runs_when_nobody_waits_any_more_makes_each_once(stack, airflow):
    proxy = stack.proxy()
    stack.start_worker(
        proxy.conn_uri(airflow.username, airflow.password) + "?read_timeout_s=1&timed_out_slot_s=1"
    )
    stack.trigger({"dag_id": "quiet", "key": "hang-0"})  # it has its token
    before = airflow.run_ids("quiet")
    with airflow.frozen_api():
        ids = stack.hand_over(*({"dag_id": "quiet", "key": f"hang-{n}"} for n in range(1, 9)))
        until(lambda: count(stack, "waiting") == 8, "given up waiting for an answer")

    said = stack.outcomes(ids, 90)

    assert [one["run"]["dag_run_id"] for one in said] == [f"relay__hang-{n}" for n in range(1, 9)]
    assert all(one["run"]["created"] for one in said)
    assert airflow.run_ids("quiet") - before == {f"relay__hang-{n}" for n in range(1, 9)}
    assert len(proxy.made()) > 9
    stack.account(ids, "quiet")


def test_a_request_given_up_with_its_outcome_unknown_is_corrected_when_its_run_turns_up(stack, airflow):
    proxy = stack.proxy()
    stack.start_worker(
        proxy.conn_uri(airflow.username, airflow.password) + "?read_timeout_s=1&timed_out_slot_s=1",
        DAGRELAY_LOOK_UP_EVERY_S="1",
    )
    stack.trigger({"dag_id": "quiet", "key": "late-0"})
    with airflow.frozen_api():
        said = stack.trigger({"dag_id": "quiet", "key": "late-1", "give_up_after_s": 2})
    assert said["error"] == "OutcomeUnknown"
    assert "relay__late-1" in said["text"]

    until(lambda: stack.record(said["id"])["state"] == "done", "corrected")

    (said,) = stack.outcomes([said["id"]])
    assert (said["run"]["dag_run_id"], said["run"]["created"]) == ("relay__late-1", True)
    assert airflow.run("quiet", "relay__late-1")
    assert "corrected_at" in stack.record(said["id"])
    stack.account([said["id"]], "quiet")


def test_airflow_killed_while_triggers_arrive_has_each_run_once_when_it_is_back(stack, airflow):
    stack.start_worker()
    before = airflow.run_ids("quiet")
    requests = [{"dag_id": "quiet", "key": f"kill-{n}"} for n in range(40)]
    caller = stack.call({"requests": requests, "pause_s": 0.05, "get_timeout_s": 120})
    try:
        until(lambda: len(airflow.run_ids("quiet") - before) >= 3, "in the midst of it")
        airflow.kill_api()
        until(lambda: count(stack, "waiting") >= 10, "waiting for Airflow")
    finally:
        airflow.start_api()

    said = stack.said(caller, 180)

    expected = {f"relay__kill-{n}" for n in range(40)}
    assert [one["run"]["dag_run_id"] for one in said] == [f"relay__kill-{n}" for n in range(40)]
    assert all(one["run"]["created"] for one in said)
    assert airflow.run_ids("quiet") - before == expected
    stack.account([one["id"] for one in said], "quiet")


def test_a_worker_killed_in_the_midst_of_triggers_leaves_one_run_for_each(stack, airflow):
    proxy = stack.proxy()
    numbers = itertools.count()
    # Runs that are made, and of which the worker does not hear before its end.
    proxy.rule = lambda call: "late" if call.makes_run and next(numbers) >= 8 else "pass"
    conn_uri = proxy.conn_uri(airflow.username, airflow.password)
    worker = stack.start_worker(conn_uri)
    before = airflow.run_ids("quiet")
    ids = stack.hand_over(*({"dag_id": "quiet", "key": f"worker-{n}"} for n in range(50)))
    until(lambda: count(stack, "done") >= 8, "the first done")
    until(lambda: any(call.fault == "late" and call.status == 200 for call in proxy.made()), "in the midst")

    worker.kill()
    proxy.rule = lambda call: "pass"

    ended = [stack.record(task_id)["state"] == "done" for task_id in ids]
    assert not all(ended), "killed too late to prove anything"
    stack.start_worker(conn_uri, name="w2")
    said = stack.outcomes(ids, 90)
    assert [one["run"]["dag_run_id"] for one in said] == [f"relay__worker-{n}" for n in range(50)]
    assert all(one["run"]["created"] for one in said)
    assert airflow.run_ids("quiet") - before == {f"relay__worker-{n}" for n in range(50)}
    stack.account(ids, "quiet")


def test_a_dag_file_broken_and_mended_while_answers_were_lost_ends_well(stack, airflow):
    file = airflow.dags / "fragile.py"
    whole = file.read_text()
    proxy = stack.proxy()
    away = threading.Event()

    def rule(call):
        if call.makes_run and b"relay__committed" in call.body and not away.is_set():
            away.set()
            return "drop"
        return "502" if away.is_set() else "pass"

    proxy.rule = rule
    stack.start_worker(proxy.conn_uri(airflow.username, airflow.password), DAGRELAY_MISSING_GRACE_S="90")
    # Airflow 2 sets a DAG aside for a moment when its processor was away for long, as in the tests before.
    until(lambda: airflow.knows("fragile"), "read by Airflow")
    before = airflow.run_ids("fragile")
    committed, pending = stack.hand_over(
        {"dag_id": "fragile", "key": "committed"},
        {"dag_id": "fragile", "key": "pending", "options": {"countdown": 1}},
    )
    assert away.wait(30)
    until(lambda: airflow.run("fragile", "relay__committed"), "committed, though its answer was dropped")
    try:
        file.write_text(BROKEN)
        until(lambda: not airflow.knows("fragile"), "gone with its broken file")
        proxy.rule = lambda call: "pass"
        # Made before the file broke: found by its id, although Airflow says that there is no such DAG.
        (said,) = stack.outcomes([committed])
        assert (said["run"]["dag_run_id"], said["run"]["created"]) == ("relay__committed", True)
        until(lambda: "'fragile'" in stack.record(pending).get("reason", ""), "waiting for the DAG")
        until(lambda: stack.record(pending)["state"] == "waiting", "waiting")
    finally:
        file.write_text(whole)

    until(lambda: airflow.knows("fragile"), "back with its mended file")
    (said,) = stack.outcomes([pending])
    assert (said["run"]["dag_run_id"], said["run"]["created"]) == ("relay__pending", True)
    assert airflow.run_ids("fragile") - before == {"relay__committed", "relay__pending"}
    stack.account([committed, pending], "fragile")


@only("2")
def test_a_run_id_that_airflow_2_would_choke_on_never_reaches_it(stack, airflow):
    proxy = stack.proxy()
    stack.start_worker(proxy.conn_uri(airflow.username, airflow.password))
    stack.trigger({"dag_id": "quiet", "key": "a good one"})
    good = stack.redis.llen("triggers")
    assert good == 0

    refused = stack.trigger({"dag_id": "quiet", "dag_run_id": "day 1/2"})
    assert (refused["id"], refused["error"]) == (None, "InvalidRequest")  # at .delay(): nothing was sent
    assert "dag_run_id" in refused["text"]

    stack.publish_raw("past-the-door", {"v": 1, "dag_id": "quiet", "dag_run_id": "day 1/2"})
    until(lambda: stack.record("past-the-door").get("state") == "failed", "refused by the worker")
    assert stack.record("past-the-door")["error"] == "InvalidRequest"
    stack.account(["past-the-door"], "quiet")
    assert len(proxy.made()) == 1


def count(stack, state):
    """How many requests are in a state."""
    pipe = stack.redis.pipeline(transaction=False)
    for key in stack.redis.scan_iter(match="dagrelay:record:*", count=1000):
        pipe.hget(key, "state")
    return pipe.execute().count(state)
