"""`trigger_dag` as a caller sees it: Celery's calling API, and mistakes told at the call."""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from producers import PollRequest, TriggerRequest, poll_external_job, trigger_dag
from producers.errors import InvalidRequest
from producers.stubs import body_from_chain, conf_from_chain, register_relay

CANARY = "c4n4ry-s3cret"


def finish(result: Any) -> Any:
    """Await what is to be awaited."""
    return asyncio.run(result) if inspect.iscoroutine(result) else result


@pytest.mark.parametrize(
    "call",
    [trigger_dag.delay, trigger_dag.request, trigger_dag.s, trigger_dag.si, trigger_dag.adelay],
    ids=lambda call: call.__name__,
)
@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {}, "missing 1 required positional argument: 'dag_id'"),
        (("d",), {"config": CANARY}, "unexpected keyword argument 'config'"),
        (("d", {}, CANARY), {}, "takes from 1 to 2 positional arguments"),
        (("d",), {"dag_id": CANARY}, "multiple values for argument 'dag_id'"),
    ],
)
def test_a_wrong_call_is_a_type_error_that_names_the_task(used_here, call, args, kwargs, words):
    with pytest.raises(TypeError) as caught:
        finish(call(*args, **kwargs))

    assert str(caught.value).startswith("trigger_dag() ")
    assert words in str(caught.value)
    assert CANARY not in str(caught.value)


def test_apply_async_tells_a_wrong_call_the_same_way(used_here):
    with pytest.raises(TypeError, match=r"trigger_dag\(\) got an unexpected keyword argument 'config'"):
        trigger_dag.apply_async(("d",), {"config": 1})
    with pytest.raises(TypeError, match="'queue'"):
        trigger_dag.apply_async(("d",), queue="elsewhere")
    with pytest.raises(InvalidRequest, match="dag_id: is no DAG id"):
        trigger_dag.apply_async(["no good"])


@pytest.mark.parametrize("wrong", [{"conf": [1]}, {"key": 5}, {"note": b""}, {"if_exists": "maybe"}])
def test_a_wrong_value_is_told_before_anything_is_sent(used_here, wrong):
    for call in (trigger_dag.delay, trigger_dag.s, trigger_dag.si):
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            call("d", **wrong)


def test_the_stub_takes_exactly_what_the_contract_has():
    parameters = inspect.signature(trigger_dag.request).parameters

    assert list(parameters) == list(TriggerRequest.model_fields)
    assert trigger_dag.__name__ == "trigger_dag"
    assert "one Airflow DAG run" in (trigger_dag.__doc__ or "")
    assert "delay" in repr(trigger_dag)


def test_every_argument_of_the_stub_reaches_the_request():
    given = {
        "conf": {"a": 1},
        "key": "k",
        "dag_run_id": "r",
        "logical_date": "2026-11-20T00:00:00+00:00",
        "run_after": "2026-11-21T00:00:00+00:00",
        "note": "n",
        "connection": "prod",
        "if_exists": "clear",
        "if_paused": "hold",
        "window": 3,
        "give_up_after_s": 60.0,
        "wait": True,
        "wait_timeout_s": 90.0,
        "result_from": "last",
        "stop_run": True,
    }

    assert trigger_dag.request("d", **given).to_message() == {"v": 1, "dag_id": "d", **given}


# Signatures


def test_a_signature_is_celerys_own_and_shows_no_value():
    made = trigger_dag.s("daily", conf={"token": CANARY}, key="k", connection="prod")

    sent = json.loads(json.dumps(made))

    assert sent["task"] == "tasks.trigger_dag"
    assert sent["args"] == []
    assert sent["kwargs"] == {
        "v": 1,
        "dag_id": "daily",
        "conf": {"token": CANARY},
        "key": "k",
        "connection": "prod",
    }
    assert sent["options"]["queue"] == "triggers"
    assert sent["options"]["argsrepr"] == "()"
    assert "dag_id=daily" in sent["options"]["kwargsrepr"]
    assert CANARY not in json.dumps(sent["options"])
    assert not sent["immutable"]


def test_si_takes_nothing_from_the_task_before_it():
    assert trigger_dag.si("daily").immutable
    assert trigger_dag.si("daily").clone(args=({"conf": 1},)).args == ()


def test_a_signature_fits_into_every_canvas():
    host = Celery("host", broker="memory://", set_as_current=False)
    before = host.signature("host.prepare")

    assert (before | trigger_dag.s("d")).tasks[-1].kwargs["dag_id"] == "d"
    assert len((trigger_dag.si("a") | trigger_dag.si("b")).tasks) == 2
    assert trigger_dag.s("d").set(countdown=5).options["countdown"] == 5


# The conf that a chain hands on


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((), {"dag_id": "d"}, ((), {"dag_id": "d"})),
        (("d",), {}, (("d",), {})),
        (("d", {"a": 1}), {}, (("d", {"a": 1}), {})),
        (({"a": 1}, "d"), {}, (("d",), {"conf": {"a": 1}})),
        (({"a": 1},), {"dag_id": "d"}, ((), {"dag_id": "d", "conf": {"a": 1}})),
        ((None, "d"), {"conf": {"b": 2}}, (("d",), {"conf": {"b": 2}})),
        ((None, "d", {"b": 2}), {}, (("d", {"b": 2}), {})),
        (({}, "d"), {}, (("d",), {"conf": {}})),
    ],
)
def test_the_result_of_the_task_before_becomes_the_conf(args, kwargs, expected):
    assert conf_from_chain(args, kwargs) == expected


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        (([CANARY], "d"), {}, "the task before returned a list"),
        ((42, "d"), {}, "the task before returned a int"),
        ((False, "d"), {}, "the task before returned a bool"),
        (({"a": CANARY}, "d"), {"conf": {}}, "given, and returned by the task before as well"),
        (({"a": CANARY}, "d", {"b": 2}), {}, "given, and returned by the task before as well"),
    ],
)
def test_what_cannot_become_a_conf_is_told_without_its_value(args, kwargs, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        conf_from_chain(args, kwargs)

    assert CANARY not in str(caught.value)


def test_a_relay_is_a_task_of_the_hosts_app_alone():
    host = Celery("host", broker="memory://", set_as_current=False)
    other = Celery("other", broker="memory://", set_as_current=False)

    relay = register_relay(host)

    assert relay.name == "dagrelay.trigger_dag"
    assert relay.name in host.tasks
    assert "dagrelay.trigger_dag" not in other.tasks
    assert register_relay(host, "mine").name == "mine"


# poll_external_job


def test_the_stub_of_polls_takes_exactly_what_the_contract_has():
    parameters = inspect.signature(poll_external_job.request).parameters

    assert list(parameters) == list(PollRequest.model_fields)
    assert poll_external_job.__name__ == "poll_external_job"


def test_every_argument_of_the_poll_stub_reaches_the_request():
    given: dict[str, Any] = {
        "path": "/jobs/{job_id}",
        "method": "POST",
        "body": {"id": "{job_id}"},
        "headers": {"X-Team": "a"},
        "query": {"full": "1"},
        "submit": {"path": "/jobs?ref={reference}", "body": {"to": "{callback_url}"}, "job_id": "job.id"},
        "submit_once": True,
        "find": {"path": "/jobs?ref={reference}", "job_id": "jobs[0].id"},
        "state": "job.state",
        "success": ["ok"],
        "failure": ["ko"],
        "result": "job.out",
        "progress": "job.percent",
        "reason": "job.why",
        "gone": [410],
        "interval_s": 2.0,
        "growth": 2.0,
        "max_interval_s": 20.0,
        "jitter": 0.2,
        "timeout_s": 60.0,
        "heartbeat_s": 20.0,
        "max_errors": 3,
        "then": {"dag_id": "report", "conf": {"a": 1}},
        "on_cancel": {"path": "/jobs/{job_id}", "method": "DELETE"},
        "wake_keys": ["k"],
        "on_end": ["billing"],
        "task_instance": {"dag_id": "d", "dag_run_id": "r", "task_id": "t", "map_index": 2, "try_number": 1},
    }

    sent = poll_external_job.request("train", **given).to_message()

    assert sent == {"v": 1, "service": "train", **given}
    assert set(given) | {"service", "url", "job_id", "via", "message"} == set(PollRequest.model_fields)


@pytest.mark.parametrize("call", ["delay", "apply_async", "s", "si", "adelay"])
@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"path": "/jobs/1", "state": "state["}, "state: is no JMESPath expression"),
        ({"path": "/jobs/1", "success": ["a", "B"], "failure": ["b"]}, "both have b"),
        ({"path": "http://evil/jobs"}, "path: is no path within the service"),
        ({"path": "/jobs/1", "url": "https://h/jobs/1"}, "and not both"),
        ({"path": "/jobs/1", "headers": {"Authorization": CANARY}}, "carries no credentials"),
        ({"path": "/jobs/1", "interval_s": 0}, "interval_s"),
        ({"path": "/jobs/{job_id}"}, "neither a job_id nor a submit"),
        ({"path": "/j", "then": {"dag_id": "no good"}}, "then: dag_id: is no DAG id"),
        ({"path": "/j", "submit": {"path": "/jobs", "body": object()}}, "body"),
        ({"path": "/j", "submit": {"path": "/jobs"}, "find": {"path": "/jobs"}}, "has no {reference}"),
    ],
)
def test_a_wrong_poll_is_told_at_the_call_and_nothing_is_sent(used_here, call, kwargs, words):
    args = (("train",), kwargs) if call == "apply_async" else ("train",)
    kwargs = {} if call == "apply_async" else kwargs

    with pytest.raises(InvalidRequest) as caught:
        finish(getattr(poll_external_job, call)(*args, **kwargs))

    assert words in str(caught.value)
    assert CANARY not in str(caught.value)


def test_a_trigger_that_follows_may_be_given_as_a_request():
    then = TriggerRequest("report", logical_date="2026-11-20T00:00:00+00:00")

    sent = poll_external_job.request("train", "/jobs/1", then=then).to_message()

    assert sent["then"] == {"dag_id": "report", "logical_date": "2026-11-20T00:00:00+00:00"}
    json.dumps(sent)


def test_a_signature_of_a_poll_goes_to_its_own_queue_and_shows_no_value():
    made = poll_external_job.s("train", "/jobs/{job_id}", submit={"path": "/jobs", "body": {"t": CANARY}})

    sent = json.loads(json.dumps(made))

    assert (sent["task"], sent["options"]["queue"]) == ("tasks.poll_external_job", "jobs")
    assert CANARY not in json.dumps(sent["options"])
    assert "service=train" in sent["options"]["kwargsrepr"]


@pytest.mark.parametrize(
    ("args", "submit", "expected"),
    [
        (({"n": 1},), {"path": "/jobs"}, {"path": "/jobs", "body": {"n": 1}}),
        (([1],), {"path": "/jobs"}, {"path": "/jobs", "body": [1]}),
        (("text",), {"path": "/jobs"}, {"path": "/jobs", "body": "text"}),
        ((None,), {"path": "/jobs", "body": 1}, {"path": "/jobs", "body": 1}),
        ((), {"path": "/jobs"}, {"path": "/jobs"}),
    ],
)
def test_the_result_of_the_task_before_becomes_the_body_of_submit(args, submit, expected):
    found = body_from_chain(args, {"service": "train", "submit": submit})

    assert found == ((), {"service": "train", "submit": expected})


@pytest.mark.parametrize("submit", [None, {"path": "/jobs", "body": 1}])
def test_a_result_that_no_submit_can_take_is_refused(submit):
    with pytest.raises(InvalidRequest, match=r"\.si\(\)"):
        body_from_chain(({"n": 1},), {"service": "train", "submit": submit})


# Types: what an editor and mypy tell a caller


RIGHT = """
from datetime import UTC, datetime
from producers import DagRun, Handle, JobOutcome, TriggerRequest, poll_external_job, trigger_dag

job: JobOutcome = poll_external_job.delay("train", "/jobs/1", interval_s=5).get()
follows: Handle[JobOutcome] = poll_external_job.apply_async(("train",), {"path": "/jobs/1"})
handle: Handle = trigger_dag.delay("d", {"a": 1}, key="k", logical_date=datetime.now(UTC), if_exists="clear")
run: DagRun = handle.get(timeout=5)
state: str = run.state
many: list[Handle] = trigger_dag.delay_many([TriggerRequest("d"), trigger_dag.request("d")])
later: Handle = trigger_dag.apply_async(("d",), {"key": "k"}, countdown=5)
trigger_dag.s("d").set(countdown=1)

async def ask() -> DagRun:
    return await (await trigger_dag.adelay("d")).aget(timeout=1)
"""
WRONG = """
from producers import poll_external_job, trigger_dag

trigger_dag.delay()
trigger_dag.delay(5)
trigger_dag.delay("d", conf=[1])
trigger_dag.delay("d", key=5)
trigger_dag.delay("d", kee="k")
trigger_dag.delay("d", if_exists="maybe")
trigger_dag.delay("d", if_paused="perhaps")
trigger_dag.delay("d", window="all")
trigger_dag.delay("d", give_up_after_s="1h")
trigger_dag.s("d", note=1)
trigger_dag.si()
trigger_dag.request("d", connection=None)
trigger_dag.delay_many(["d"])
x: int = trigger_dag.delay("d")
poll_external_job.delay(path="/jobs/1")  # not trigger_dag.
poll_external_job.delay("train", interval="5")  # not trigger_dag.
poll_external_job.delay("train", "/jobs/1", method="PUT")  # not trigger_dag.
"""


def test_wrong_types_of_arguments_are_found_by_mypy_before_they_run(tmp_path):
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    root = Path(__file__).resolve().parents[3]
    checked = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file", "/dev/null"),
            *("--cache-dir", tmp_path / "cache", "--python-executable", sys.executable),
            *("--follow-imports", "silent", "--ignore-missing-imports"),
            *("right.py", "wrong.py"),
        ],
        cwd=tmp_path,
        env={"MYPYPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )

    found = checked.stdout.splitlines()
    lines = {int(line.split(":")[1]) for line in found if line.startswith("wrong.py") and ": error:" in line}
    calls = {number for number, line in enumerate(WRONG.splitlines(), start=1) if "trigger_dag." in line}
    assert not [line for line in found if line.startswith("right.py")], checked.stdout
    assert lines == calls, checked.stdout + checked.stderr
