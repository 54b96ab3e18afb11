"""`dagrelay watch`, `job`, `completion`, `schema`, and what all commands have in common."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest

from local.process import ROOT, clean_env, free_port
from producers.cli import main
from producers.contract import QUEUE_JOBS, PollRequest, TriggerRequest
from producers.fan_out import fan_out
from tests.fake_service import FakeService
from tests.integration.test_trigger import until
from tests.parts import need

pytestmark = pytest.mark.integration

OK, FAILED, WRONG_REQUEST, UNKNOWN, TRY_AGAIN = 0, 1, 65, 66, 75
CANARY = "c4n4ry-s3cret"
COMMAND = (sys.executable, "-m", "producers.cli")

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(valkey, tmp_path) -> dict[str, str]:
    return clean_env(PYTHONPATH=str(ROOT), DAGRELAY_REDIS_URL=valkey.url)


@pytest.fixture
def dagrelay(environment, tmp_path) -> Command:
    def run(*args: str, stdin: str = "", **env: str) -> Any:
        told = subprocess.run(
            [*COMMAND, *args],
            input=stdin,
            env=environment | env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in told.stderr
        assert CANARY not in told.stdout + told.stderr
        return told

    return run


@pytest.fixture
def started(environment) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command, to be looked at while it runs."""
    running: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        running.append(
            subprocess.Popen(
                [*COMMAND, *args],
                env=environment | {"PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # Of a shell's background job, which the tests may be, SIGINT is ignored: by its children too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return running[-1]

    yield start
    for one in running:
        one.kill()
        one.communicate()


# dagrelay watch


def test_watch_follows_until_the_run_is_there(dagrelay, relay, worker):
    handle = relay.enqueue(TriggerRequest("daily_sales", key="w1"))

    told = dagrelay("watch", handle.id)

    assert told.returncode == OK
    *_, last = told.stdout.splitlines()
    assert f"  {handle.id}  done: run relay__w1 is " in last
    assert told.stderr == ""  # no terminal, no bar


def test_watch_tells_each_change_as_it_comes(started, relay, worker, airflow):
    handle = relay.enqueue(TriggerRequest("daily_sales", key="w2", wait=True))
    watching = started("watch", handle.id)
    assert watching.stdout is not None
    while "waits for" not in (line := watching.stdout.readline()):
        assert line, watching.communicate()
    airflow.runs["daily_sales", "relay__w2"]["state"] = "success"

    out, _ = watching.communicate(timeout=30)

    assert watching.returncode == OK
    assert "done: run relay__w2 is success" in out.splitlines()[-1]


def test_watch_ends_with_one_for_a_failure_and_says_why(dagrelay, relay, worker, airflow):
    airflow.rejecting["strict"] = (400, {"detail": "a value does not fit"})
    handle = relay.enqueue(TriggerRequest("strict"))

    told = dagrelay("watch", "-o", "json", handle.id)

    assert told.returncode == FAILED
    last = json.loads(told.stdout.splitlines()[-1])
    assert (last["task_id"], last["state"], last["error"]) == (handle.id, "failed", "RequestRejected")
    assert "a value does not fit" in last["reason"]
    assert last["at"] == pytest.approx(time.time(), abs=60)


def test_watch_of_several_tells_of_all_and_which_is_not_there(dagrelay, relay, worker):
    handles = [relay.enqueue(TriggerRequest("daily_sales", key=f"several-{n}")) for n in range(20)]
    ids = [one.id for one in handles]

    told = dagrelay("watch", "nobodys-id", *ids, ids[0])

    assert told.returncode == UNKNOWN
    assert "nobodys-id  is not on record" in told.stdout
    assert sorted(line.split()[1] for line in told.stdout.splitlines() if " done: " in line) == sorted(ids)


def test_watch_of_a_fan_out_counts(dagrelay, relay, worker):
    fan = fan_out([{"dag_id": "daily_sales", "conf": {"n": n}} for n in range(30)], relay=relay)

    told = dagrelay("watch", fan.id, "-o", "json")

    assert told.returncode == OK
    last = json.loads(told.stdout.splitlines()[-1])
    assert (last["state"], last["requests"], last["requests_ended"]) == ("done", 30, 30)
    shown = json.loads(dagrelay("status", fan.id, "-o", "json").stdout)
    assert (shown["requests"], shown["requests_ended"]) == (30, 30)


def test_watch_gives_up_after_its_time_and_the_request_goes_on(dagrelay, relay):
    handle = relay.enqueue(TriggerRequest("daily_sales"))

    told = dagrelay("watch", handle.id, "--timeout", "0.5")

    assert told.returncode == TRY_AGAIN
    assert told.stderr == "dagrelay: 1 of 1 had not ended after 0.5 s: accepted\n"
    assert handle.state == "accepted"


def test_watch_interrupted_leaves_the_request(started, relay):
    handle = relay.enqueue(TriggerRequest("daily_sales"))
    watching = started("watch", handle.id)
    assert watching.stdout is not None
    assert "accepted" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)

    _, said = watching.communicate(timeout=20)

    assert watching.returncode == 130
    assert said == "dagrelay: no longer watched; the requests go on\n"
    assert handle.state == "accepted"


def test_watch_goes_on_when_redis_was_away(started, relay, valkey, start_worker):
    handle = relay.enqueue(TriggerRequest("daily_sales", key="away"))
    watching = started("watch", handle.id)
    assert watching.stdout is not None
    assert "accepted" in watching.stdout.readline()
    valkey.kill()
    time.sleep(1.5)
    assert watching.poll() is None
    valkey.start()
    start_worker()

    out, said = watching.communicate(timeout=40)

    assert watching.returncode == OK, said
    assert "done: run relay__away" in out


def test_watch_without_a_redis_says_so(dagrelay):
    told = dagrelay("watch", "x", DAGRELAY_REDIS_URL=f"redis://:{CANARY}@127.0.0.1:{free_port()}/0")

    assert told.returncode == TRY_AGAIN
    assert "no usable answer" in told.stderr


def on_a_terminal(environment: dict[str, str], *args: str) -> tuple[int, str, str]:
    """Run the command with a terminal for standard error; return its code, its output and what was shown."""
    leader, follower = pty.openpty()
    running = subprocess.Popen(
        [*COMMAND, *args], env=environment | {"TERM": "xterm"}, stdout=subprocess.PIPE, stderr=follower
    )
    os.close(follower)
    shown = b""
    deadline = time.monotonic() + 40
    try:
        while time.monotonic() < deadline:
            if select.select([leader], [], [], 0.2)[0]:
                try:
                    shown += os.read(leader, 4096)
                except OSError:
                    break  # it has ended
        assert running.stdout is not None
        out = running.stdout.read().decode()
        return running.wait(10), out, shown.decode()
    finally:
        running.kill()
        os.close(leader)


def test_a_terminal_sees_how_far_it_is(environment, relay, worker, airflow):
    handle = relay.enqueue(TriggerRequest("d1"), countdown=8)  # the command may take seconds to start

    code, out, shown = on_a_terminal(environment, "watch", handle.id)

    assert code == OK
    assert "done: run" in out
    assert "\x1b" not in out
    assert "waits for its time" in shown or "accepted" in shown
    assert shown.endswith("\r\x1b[K")  # nothing stays


def test_a_terminal_sees_how_a_trigger_that_waits_stands(environment, worker):
    code, out, shown = on_a_terminal(environment, "trigger", "d2", "--countdown", "3", "--until-created")

    assert code == OK
    assert json.loads(out.partition("\n")[2])["dag_id"] == "d2"
    assert "\r\x1b[K" in shown
    assert shown.endswith("\r\x1b[K")


# dagrelay job


def newest(relay: Any) -> dict[str, Any]:
    message = json.loads(relay.redis.lindex(QUEUE_JOBS, 0))
    kwargs: dict[str, Any] = json.loads(message["body"])[1]
    return kwargs


def test_a_job_by_its_options_and_by_json_is_the_same(dagrelay, relay, tmp_path):
    submit = {"path": "/jobs", "body": {"n": 1}, "job_id": "id"}
    options = ("--service", "render", "--path", "/jobs/{job_id}", "--submit", json.dumps(submit))
    options = (*options, "--interval", "2", "--job-timeout", "600", "--wake-key", "k", "--on-end", "billing")
    fields = {"service": "render", "path": "/jobs/{job_id}", "submit": submit, "interval_s": 2}
    fields |= {"timeout_s": 600, "wake_keys": ["k"], "on_end": ["billing"]}
    (tmp_path / "job.json").write_text(json.dumps(fields))

    messages = []
    for args, stdin in ((options, ""), (("@job.json",), ""), (("-",), json.dumps(fields))):
        told = dagrelay("job", *args, stdin=stdin)
        assert (told.returncode, told.stderr) == (OK, "")
        assert relay.record(told.stdout.strip()).service == "render"
        messages.append({name: value for name, value in newest(relay).items() if name != "asked"})
    assert messages[0] == messages[1] == messages[2]
    assert PollRequest.from_message(messages[0]) == PollRequest(**fields)
    dagrelay("job", "--path", "/other", "@job.json")
    assert newest(relay)["path"] == "/other"


def test_a_job_that_is_given_again_with_its_id_is_one(dagrelay, relay):
    args = ("job", "--id", "nightly-7", "--service", "render", "--path", "/jobs/1")
    assert dagrelay(*args).stdout == dagrelay(*args).stdout
    assert relay.redis.llen(QUEUE_JOBS) == 1


def test_a_job_ends_as_the_service_says(dagrelay, relay, start_worker):
    with FakeService() as service:
        start_worker(DAGRELAY_SERVICE_TRAIN=service.variable)
        request = {"service": "train", "path": "/jobs/{job_id}", "interval_s": 0.2}
        request |= {"submit": {"path": "/jobs", "body": {}, "job_id": "id"}}
        done = relay.enqueue(PollRequest(**request))
        until(lambda: service.jobs)
        service.end(next(iter(service.jobs)))
        done.get(timeout=60)
        known = next(iter(service.jobs))
        told = dagrelay(
            "job", "--wait", "--service", "train", "--path", f"/jobs/{known}", "--interval", "0.2"
        )
        assert told.returncode == OK, told.stderr
        outcome = json.loads(told.stdout.partition("\n")[2])
        assert outcome["service"] == "train"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "service: is missing"),
        (("--service", "render"), "path: give the job's path, or its url"),
        (("[]",), "REQUEST: is no JSON object"),
        ((CANARY,), "REQUEST: is no JSON at character 0"),
        (("--service", "r", "--path", "/", "--submit", CANARY), "--submit: is no JSON"),
        (("@nowhere",), "REQUEST: @nowhere cannot be read"),
        (('{"dag_id": "d"}',), "dag_id: is of a trigger"),
        (('{"service": "r", "path": "/", "reply_to": "q"}',), "reply_to: a command has no queue"),
        (('{"service": "r", "path": "/", "colour": 1}',), "'colour': no field of a job"),
    ],
)
def test_a_wrong_job_is_told(dagrelay, relay, args, words):
    told = dagrelay("job", *args)

    assert told.returncode == WRONG_REQUEST
    assert words in told.stderr
    assert not relay.redis.exists(QUEUE_JOBS)


# What others need


def test_a_fan_outs_outcomes_as_a_table(dagrelay, worker):
    told = dagrelay(
        "fan-out", "d", "--conf-file", "-", "--until-created", "-o", "table", stdin='{"n": 1}\n{"n": 2}\n'
    )

    assert told.returncode == OK
    head, *rows = told.stdout.splitlines()
    assert head.split() == ["state", "run", "id", "reason"]
    assert [row.split()[0] for row in rows] == ["done", "done"]


def test_bash_completes_the_commands_and_their_options(tmp_path, environment):
    need("bash 4.4", shutil.which("bash") is not None, "install bash")
    # As an installed script: the command's name is the program's.
    (tmp_path / "dagrelay").write_text(
        f"#!{sys.executable}\nimport sys; sys.argv[0] = 'dagrelay'\nfrom producers.cli import main; main()\n"
    )
    (tmp_path / "dagrelay").chmod(0o755)
    script = """
        eval "$(dagrelay completion bash)"
        complete -p dagrelay
        COMP_WORDS=(dagrelay wat) COMP_CWORD=1
        _dagrelay_completion dagrelay; echo "${COMPREPLY[@]}"
        COMP_WORDS=(dagrelay trigger d --if-pau) COMP_CWORD=3 COMPREPLY=()
        _dagrelay_completion dagrelay; echo "${COMPREPLY[@]}"
        COMP_WORDS=(dagrelay trigger d --if-paused h) COMP_CWORD=4 COMPREPLY=()
        _dagrelay_completion dagrelay; echo "${COMPREPLY[@]}"
    """
    told = subprocess.run(
        ["bash", "-c", script],
        env=environment | {"PATH": f"{tmp_path}:{environment['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert told.stdout.splitlines()[1:] == ["watch", "--if-paused", "hold"], told.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_their_scripts(dagrelay, shell):
    told = dagrelay("completion", shell)

    assert told.returncode == OK
    assert "dagrelay" in told.stdout
    assert dagrelay("completion", "tcsh").returncode == 2


def test_the_schema_is_printed(dagrelay):
    for option in ((), ("--asyncapi",)):
        told = dagrelay("schema", *option)
        assert told.returncode == OK
        assert isinstance(json.loads(told.stdout), dict)


def commands(group: click.Command = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    yield " ".join(path), group
    if isinstance(group, click.Group):
        for name, one in group.commands.items():
            yield from commands(one, (*path, name))


def test_no_option_takes_a_secret():
    """What is on a command line is in the list of processes, and in a shell's history."""
    secret = ("passw", "passphrase", "secret", "token", "credential", "apikey", "api-key", "redis")
    wrong = [
        f"{command} {name}"
        for command, found in commands()
        for parameter in found.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if any(word in name.lower() for word in secret) and not name.endswith("-file")
    ]
    assert len(list(commands())) > 20
    assert not wrong


def test_each_command_says_what_it_is_for():
    told = [
        (command, parameter.name)
        for command, found in commands()
        for parameter in found.params
        if isinstance(parameter, click.Option) and not parameter.help and parameter.name != "output"
    ]
    assert all(found.help for _, found in commands())
    assert not told


def test_every_list_can_be_had_as_json():
    """`-o json|table` on what shows something."""
    found = dict(commands())
    for name in ("status", "parked", "airflows", "dead list", "watch", "fan-out"):
        (output,) = [one for one in found[name].params if one.name == "output"]
        assert isinstance(output.type, click.Choice)
        assert set(output.type.choices) >= {"table", "json"}, name
