"""What a trigger promises, with nothing in its way: one request, one run, and what the caller is told."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from datetime import UTC, datetime, timedelta

from tests.system.stack import CALLER_NAME, only, until


def test_a_trigger_becomes_one_finished_run_that_has_the_conf(shared, airflow):
    conf = {"region": "Lübeck", "amounts": [12.5, 30, None], "deep": {"a": [{"b": True}]}, "n": 2**53 + 1}
    before = airflow.run_ids("echo")

    said = shared.trigger({"dag_id": "echo", "conf": conf, "key": "first"})

    run = said["run"]
    assert (run["dag_id"], run["dag_run_id"], run["created"]) == ("echo", "relay__first", True)
    assert run["state"] in ("queued", "running")
    assert run["url"].startswith(f"{airflow.url}/dags/echo/")
    assert airflow.run_ids("echo") - before == {"relay__first"}
    assert airflow.wait_for_run("echo", "relay__first")["state"] == "success"
    assert airflow.returned("echo", "relay__first", "say")["conf"] == conf


def test_the_note_says_which_task_made_the_run_for_whom_and_when_and_what_the_caller_wrote(shared, airflow):
    began = datetime.now(UTC) - timedelta(seconds=1)
    said = shared.trigger({"dag_id": "quiet", "key": "noted", "note": "Monthly: ask Kim\nsecond line"})

    note = airflow.run("quiet", "relay__noted")["note"]
    ours, _, theirs = note.partition("\n\n")
    words = dict(word.split("=", 1) for word in ours.split()[1:])
    assert ours.startswith("dagrelay ")
    assert (words["task"], words["by"], words["key"]) == (said["id"], CALLER_NAME, "noted")
    assert began.replace(microsecond=0) <= datetime.fromisoformat(words["at"]) <= datetime.now(UTC)
    assert theirs == "Monthly: ask Kim\nsecond line"


def test_twenty_callers_with_one_key_get_one_run_and_one_of_them_made_it(shared, airflow):
    before = airflow.run_ids("quiet")
    request = {"dag_id": "quiet", "key": "same", "conf": {"b": 2, "a": 1.0}}
    equal = {"dag_id": "quiet", "key": "same", "conf": {"a": 1, "b": 2}}  # the same JSON

    callers = [
        shared.call({"requests": [request, equal] * 2 + [request], "threads": 5, "get_timeout_s": 60})
        for _ in range(4)
    ]
    said = [one for caller in callers for one in shared.said(caller)]

    assert len({one["id"] for one in said}) == 20
    assert Counter(one.get("run", one).get("dag_run_id") for one in said) == {"relay__same": 20}
    assert Counter(one["run"]["created"] for one in said) == {True: 1, False: 19}
    assert airflow.run_ids("quiet") - before == {"relay__same"}


def test_another_request_under_the_same_key_is_told_what_differs_and_never_the_values(shared, airflow):
    first = {"dag_id": "quiet", "key": "taken", "conf": {"region": "north-9351", "day": 1}}
    shared.trigger(first)

    values, keys, skipped = shared.trigger(
        {**first, "conf": {"region": "south-8264", "day": 1}},
        {**first, "conf": {"region": "north-9351", "week": 7}},
        {**first, "conf": {"region": "south-8264"}, "if_exists": "skip"},
    )

    assert values["error"] == keys["error"] == "RunConflict"
    assert "region" in values["text"]
    assert "day" not in values["text"].replace("relay__taken", "")
    assert "day" in keys["text"]
    assert "week" in keys["text"]
    for text in (values["text"], keys["text"]):
        assert "relay__taken" in text
        assert "9351" not in text
        assert "8264" not in text
    assert (skipped["run"]["dag_run_id"], skipped["run"]["created"]) == ("relay__taken", False)
    assert airflow.run("quiet", "relay__taken")["conf"] == first["conf"]


def test_if_exists_says_what_becomes_of_somebody_elses_equal_run(shared, airflow):
    status, _ = airflow.api(
        "POST",
        "/dags/quiet/dagRuns",
        {"dag_run_id": "theirs", "conf": {"a": 1}}
        | ({"logical_date": None} if airflow.version == "3" else {}),
    )
    assert status == 200
    same = {"dag_id": "quiet", "dag_run_id": "theirs", "conf": {"a": 1}}

    reuse, fail, skip, clear = shared.trigger(
        *({**same, "if_exists": what} for what in ("reuse", "fail", "skip", "clear"))
    )

    assert fail["error"] == "RunExists"
    assert "theirs" in fail["text"]
    for kept in (reuse, skip, clear):  # it is queued: there is nothing to clear
        run = kept["run"]
        assert (run["dag_run_id"], run["created"], run["cleared"]) == ("theirs", False, False)
    assert airflow.run("quiet", "theirs")["note"] is None


def test_clear_reruns_a_finished_run_once_for_each_request(shared, airflow):
    request = {"dag_id": "echo", "key": "again", "conf": {"n": 1}}
    shared.trigger(request)
    airflow.wait_for_run("echo", "relay__again")
    assert airflow.tries("echo", "relay__again", "say") == 1
    clear = {**request, "if_exists": "clear", "options": {"task_id": "clear-again"}}

    said = shared.trigger(clear, clear)  # one id: accepted once

    assert [one["id"] for one in said] == ["clear-again"] * 2
    for one in said:
        assert (one["run"]["created"], one["run"]["cleared"]) == (False, True)
    assert airflow.wait_for_run("echo", "relay__again")["state"] == "success"
    assert airflow.tries("echo", "relay__again", "say") == 2
    # Once more with the id that is on record: it is told its end and does nothing.
    assert shared.trigger(clear)["run"]["cleared"]
    # Another request clears it again; the run still says who made it.
    assert shared.trigger({**request, "if_exists": "clear"})["run"]["cleared"]
    until(lambda: airflow.tries("echo", "relay__again", "say") == 3, "run a third time")
    assert "key=again" in airflow.run("echo", "relay__again")["note"]


def test_an_unknown_dag_is_told_after_the_grace_and_not_before(shared, airflow):
    (task_id,) = shared.hand_over({"dag_id": "no_such_dag", "key": "k"})
    until(lambda: shared.record(task_id)["state"] == "waiting", "waiting")
    assert "no_such_dag" in shared.record(task_id)["reason"]

    (said,) = shared.outcomes([task_id])

    assert said["error"] == "DagNotFound"
    assert "no_such_dag" in said["text"]
    record = shared.record(task_id)
    assert float(record["ended_at"]) - float(record["accepted_at"]) >= 3  # DAGRELAY_MISSING_GRACE_S
    assert record["state"] == "failed"


def test_refused_params_are_told_in_airflows_words_without_the_value(shared, airflow):
    before = airflow.run_ids("strict")

    wrong, missing, right = shared.trigger(
        {"dag_id": "strict", "conf": {"day": "canary-7d1f"}, "key": "wrong"},
        {"dag_id": "strict", "key": "missing"},
        {"dag_id": "strict", "conf": {"day": "2026-11-20"}, "key": "right"},
    )

    assert wrong["error"] == missing["error"] == "RequestRejected"
    assert "Invalid input for param day" in wrong["text"]
    assert r"^\\d{4}" in wrong["text"]  # the DAG's own schema: what would be right
    assert "canary" not in wrong["text"]
    assert "No value passed" in missing["text"]
    assert right["run"]["created"]
    assert airflow.run_ids("strict") - before == {"relay__right"}


def test_a_logical_date_is_the_runs_and_a_taken_one_names_the_run_that_has_it(shared, airflow):
    day = "2026-11-20T06:00:00+01:00"
    first = shared.trigger({"dag_id": "quiet", "key": "dated", "logical_date": day})
    run = airflow.run("quiet", "relay__dated")
    assert datetime.fromisoformat(run["logical_date"]) == datetime.fromisoformat(day)
    assert datetime.fromisoformat(first["run"]["logical_date"]) == datetime.fromisoformat(day)

    other, same, moved = shared.trigger(
        {"dag_id": "quiet", "key": "dated-2", "logical_date": "2026-11-20T05:00:00+00:00"},
        {"dag_id": "quiet", "key": "dated", "logical_date": "2026-11-20T05:00:00+00:00"},
        {"dag_id": "quiet", "key": "dated", "logical_date": "2026-11-21T05:00:00+00:00"},
    )

    assert other["error"] == "LogicalDateTaken"
    assert "'relay__dated'" in other["text"]
    assert airflow.run("quiet", "relay__dated-2") is None
    assert (same["run"]["dag_run_id"], same["run"]["created"]) == ("relay__dated", False)
    assert moved["error"] == "RunConflict"
    assert "logical date" in moved["text"]


@only("3")
def test_run_after_holds_the_run_back_in_airflow_3(shared, airflow):
    now = datetime.now(UTC)
    later, soon = now + timedelta(hours=1), now + timedelta(seconds=4)

    said = shared.trigger(
        {"dag_id": "echo", "key": "later", "run_after": later.isoformat()},
        {"dag_id": "echo", "key": "soon", "run_after": soon.isoformat()},
    )

    assert [one["run"]["state"] for one in said] == ["queued", "queued"]
    started = datetime.fromisoformat(airflow.wait_for_run("echo", "relay__soon")["start_date"])
    assert started >= soon
    run = airflow.run("echo", "relay__later")
    assert (run["state"], datetime.fromisoformat(run["run_after"])) == ("queued", later)


@only("2")
def test_run_after_is_refused_clearly_for_airflow_2(shared, airflow):
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()

    said = shared.trigger({"dag_id": "quiet", "key": "later", "run_after": later})

    assert said["error"] == "RequestRejected"
    assert "run_after" in said["text"]
    assert "Airflow 2" in said["text"]
    assert airflow.run("quiet", "relay__later") is None


def test_the_caller_may_name_the_run_and_any_key_is_one_run(shared, airflow):
    odd = "Käse/№ 1?#%&\n" * 30
    named, first, second = shared.trigger(
        {"dag_id": "quiet", "dag_run_id": "our.own:run+1~x", "key": "ignored-for-the-id"},
        {"dag_id": "quiet", "key": odd},
        {"dag_id": "quiet", "key": odd},
    )

    assert named["run"]["dag_run_id"] == "our.own:run+1~x"
    assert airflow.run("quiet", "our.own:run+1~x")["conf"] == {}
    assert first["run"]["dag_run_id"] == second["run"]["dag_run_id"]
    assert {first["run"]["created"], second["run"]["created"]} == {True, False}
    assert airflow.run("quiet", first["run"]["dag_run_id"])


def test_a_run_of_a_paused_dag_is_made_and_waits_there(shared, airflow):
    said = shared.trigger({"dag_id": "quiet", "key": "paused"})

    assert (said["run"]["created"], said["run"]["state"]) == (True, "queued")
    assert airflow.api("GET", "/dags/quiet")[1]["is_paused"] is True
    assert airflow.run("quiet", "relay__paused")["state"] == "queued"


def test_a_conf_of_900_kb_arrives_intact(shared, airflow):
    conf = {"data": base64.b64encode(hashlib.shake_256(b"seed").digest(660_000)).decode(), "ü": "ß" * 5000}
    text = json.dumps(conf, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    assert 880_000 < len(text) < 920_000

    said = shared.trigger({"dag_id": "echo", "conf": conf, "conf_by": "value", "key": "large"})

    assert said["run"]["created"]
    assert airflow.wait_for_run("echo", "relay__large")["state"] == "success"
    returned = airflow.returned("echo", "relay__large", "say")
    assert (returned["bytes"], returned["sha256"]) == (len(text), hashlib.sha256(text).hexdigest())


@only("2")
def test_a_conf_beyond_what_airflow_2_takes_is_refused_and_the_caller_told_what_to_do(shared, airflow):
    conf = {"data": "x" * 990_000}
    said = shared.trigger({"dag_id": "quiet", "key": "too-large", "conf": conf, "conf_by": "value"})

    assert said["error"] == "RequestRejected"
    assert "983040" in said["text"]
    assert "send a reference" in said["text"]
    assert airflow.run("quiet", "relay__too-large") is None


def test_the_command_triggers_waits_and_shows_how_a_request_stands(shared, airflow):
    done = shared.dagrelay(
        "trigger", "quiet", "--conf", '{"a": 1}', "--key", "cli", "--until-created", "--timeout", "60"
    )
    assert done.returncode == 0, done.stderr
    task_id, _, run = done.stdout.partition("\n")
    assert json.loads(run)["dag_run_id"] == "relay__cli"
    assert airflow.run("quiet", "relay__cli")["conf"] == {"a": 1}

    status = shared.status(task_id)
    assert (status["state"], status["attempts"], status["by"]) == ("done", 1, CALLER_NAME)
    assert status["accepted_at"] <= status["ended_at"]
    assert status["run"]["dag_run_id"] == "relay__cli"

    failed = shared.dagrelay("trigger", "strict", "--until-created", "--timeout", "60")
    assert failed.returncode == 1
    assert "RequestRejected" in failed.stderr
    status = shared.status(failed.stdout.strip())
    assert (status["state"], status["error"]) == ("failed", "RequestRejected")
    assert "No value passed" in status["reason"]

    assert shared.dagrelay("trigger", "quiet", "--conf", "[1]").returncode == 65
    assert shared.dagrelay("status", "nobody").returncode == 1
    assert shared.dagrelay("doctor").returncode in (0, 1)  # its own tests say what it must find
