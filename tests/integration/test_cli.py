"""The command `dagrelay` as a shell or cron sees it: its exit codes, what it prints, what it never prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from local.process import clean_env, free_port
from producers.contract import QUEUE_TRIGGERS
from tests.integration.test_trigger import until

ROOT = Path(__file__).resolve().parents[2]
CANARY = "c4n4ry-s3cret"
OK, FAILED, WRONG_REQUEST, TRY_AGAIN, WRONG_CONFIGURATION = 0, 1, 65, 75, 78

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def dagrelay(valkey, tmp_path) -> Command:
    """Run the command in a folder of its own, for this test's Redis."""

    def run(*args: str, stdin: str | bytes = "", cwd: Path = tmp_path, **env: str) -> Any:
        given = stdin if isinstance(stdin, bytes) else stdin.encode()
        environment = clean_env(PYTHONPATH=str(ROOT), DAGRELAY_REDIS_URL=valkey.url) | env
        ended = subprocess.run(
            [sys.executable, "-m", "producers.cli", *args],
            input=given,
            env=environment,
            cwd=cwd,
            capture_output=True,
            timeout=60,
            check=False,
        )
        told = subprocess.CompletedProcess(
            ended.args, ended.returncode, ended.stdout.decode(), ended.stderr.decode()
        )
        assert "Traceback" not in told.stderr
        assert CANARY not in told.stdout + told.stderr
        return told

    return run


@pytest.fixture
def server(valkey):
    with Redis.from_url(valkey.url, decode_responses=True) as client:
        yield client


def sent(server: Redis) -> dict[str, Any]:
    """The newest message: what a worker will be told."""
    kwargs: dict[str, Any] = json.loads(json.loads(server.lindex(QUEUE_TRIGGERS, 0))["body"])[1]
    return kwargs


# dagrelay trigger


def test_an_accepted_request_prints_its_id_alone(dagrelay, server):
    told = dagrelay("trigger", "daily_sales", "--key", "k1")

    assert (told.returncode, told.stderr) == (OK, "")
    assert server.hget(f"dagrelay:record:{told.stdout.strip()}", "dag_run_id") == "relay__k1"


def test_every_option_reaches_the_worker(dagrelay, server):
    told = dagrelay(
        *(
            "trigger",
            "daily_sales",
            "--conf",
            '{"day": "ü"}',
            "--key",
            "k",
            "--run-id",
            "mine",
            "--note",
            "n",
        ),
        *("--logical-date", "2026-11-20T00:00:00Z", "--run-after", "2026-11-21T00:00:00+01:00"),
        *("--connection", "prod", "--if-exists", "skip", "--give-up-after", "60", "--countdown", "2"),
        DAGRELAY_CLIENT_NAME="cron@db-1",
    )

    assert told.returncode == OK
    message = sent(server)
    asked = message.pop("asked")
    assert message == {
        "v": 1,
        "dag_id": "daily_sales",
        "conf": {"day": "ü"},
        "key": "k",
        "dag_run_id": "mine",
        "note": "n",
        "logical_date": "2026-11-20T00:00:00+00:00",
        "run_after": "2026-11-21T00:00:00+01:00",
        "connection": "prod",
        "if_exists": "skip",
        "give_up_after_s": 60.0,
    }
    assert asked["by"] == "cron@db-1"
    assert asked["due"] == pytest.approx(asked["at"] + 2, abs=0.01)


def test_a_conf_may_come_from_a_file_or_from_standard_input(dagrelay, server, tmp_path):
    (tmp_path / "conf.json").write_text('{"from": "a file"}')

    assert dagrelay("trigger", "d", "--conf", "@conf.json").returncode == OK
    assert sent(server)["conf"] == {"from": "a file"}
    assert dagrelay("trigger", "d", "--conf", "-", stdin='{"from": "stdin"}').returncode == OK
    assert sent(server)["conf"] == {"from": "stdin"}


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        (("d", "--conf", f'{{"password": "{CANARY}"'), "", "--conf: is no JSON at character"),
        (("d", "--conf", CANARY), "", "--conf: is no JSON at character 0"),
        (("d", "--conf", "-"), f"password={CANARY}", "--conf: is no JSON"),
        (("d", "--conf", "-"), b"\xff\xfe" + CANARY.encode(), "--conf: "),
        (("d", "--conf", "-"), "[" * 200_000, "nested deeper than 64 levels"),
        (("d", "--conf", "@nowhere.json"), "", "@nowhere.json cannot be read (FileNotFoundError)"),
        (("d", "--conf", f'["{CANARY}"]'), "", "conf: is of type list"),
        (("d", "--conf", f'{{"a": NaN, "b": "{CANARY}"}}'), "", "conf.a is nan"),
        (
            ("d", "--conf", f'{{"a": 99999999999999999999, "b": "{CANARY}"}}'),
            "",
            "conf.a is an integer beyond",
        ),
        (("no good",), "", "dag_id: is no DAG id"),
        (("d", "--run-id", "a..b"), "", "dag_run_id: would be refused by Airflow"),
        (("d", "--logical-date", "2026-11-20"), "", "logical_date: "),
        (("d", "--give-up-after", "nan"), "", "give_up_after_s: "),
        (("d", "--countdown", "-5"), "", "countdown: "),
        (("d", "--key", ""), "", "key: "),
    ],
)
def test_a_wrong_request_exits_with_65_and_sends_nothing(dagrelay, server, args, stdin, words):
    told = dagrelay("trigger", *args, stdin=stdin)

    assert (told.returncode, told.stdout) == (WRONG_REQUEST, "")
    assert told.stderr.startswith("dagrelay: ")
    assert words in told.stderr
    assert server.dbsize() == 0


def test_a_redis_that_does_not_take_it_exits_with_75(dagrelay, server):
    for url in (f"redis://:{CANARY}@127.0.0.1:{free_port()}/0",):
        for command in (("trigger", "d"), ("status", "some-id")):
            told = dagrelay(*command, DAGRELAY_REDIS_URL=url)
            assert (told.returncode, told.stdout) == (TRY_AGAIN, "")
            assert "send again with the same key" in told.stderr
    server.config_set("maxmemory", "1mb")
    assert dagrelay("trigger", "d").returncode == TRY_AGAIN
    server.config_set("maxmemory", "0")
    assert server.dbsize() == 0


@pytest.mark.parametrize("command", [("trigger", "d"), ("status", "x"), ("doctor",)], ids=" ".join)
def test_a_wrong_configuration_exits_with_78_and_names_every_mistake(dagrelay, command):
    told = dagrelay(*command, DAGRELAY_REDIS_URL=f"http://:{CANARY}@h", DAGRELAY_CLIENT_NAME="a\tb")

    assert told.returncode == WRONG_CONFIGURATION
    assert [line.split()[1] for line in told.stderr.splitlines()] == [
        "DAGRELAY_REDIS_URL",
        "DAGRELAY_CLIENT_NAME",
    ]
    assert "DAGRELAY_REDIS_URL is not set" in dagrelay(*command, DAGRELAY_REDIS_URL="").stderr


def test_wait_prints_the_run(dagrelay, worker, airflow):
    told = dagrelay(
        "trigger", "daily_sales", "--conf", '{"day": 1}', "--key", "w", "--wait", "--timeout", "30"
    )

    task_id, _, run = told.stdout.partition("\n")
    assert told.returncode == OK
    assert json.loads(run)["dag_run_id"] == "relay__w"
    assert task_id in airflow.runs["daily_sales", "relay__w"]["note"]


def test_wait_tells_why_there_is_no_run(dagrelay, worker, airflow):
    airflow.rejecting["strict"] = (400, {"detail": "a param is missing"})

    told = dagrelay("trigger", "strict", "--wait", "--timeout", "30")

    assert told.returncode == FAILED
    assert "RequestRejected" in told.stderr
    assert "a param is missing" in told.stderr


def test_wait_ends_at_its_timeout_and_the_request_goes_on(dagrelay, server):
    told = dagrelay("trigger", "d", "--wait", "--timeout", "0.2")

    assert told.returncode == FAILED
    assert "goes on" in told.stderr
    assert told.stdout.strip()  # the id, to ask again
    assert server.llen(QUEUE_TRIGGERS) == 1


# dagrelay status


def test_status_tells_what_is_on_record(dagrelay, relay, airflow, worker):
    airflow.rejecting["strict"] = (400, {"detail": "a param is missing"})
    done = dagrelay("trigger", "daily_sales", "--key", "s").stdout.strip()
    failed = dagrelay("trigger", "strict", "--conf", f'{{"token": "{CANARY}"}}').stdout.strip()
    until(lambda: relay.handle(done).ready() and relay.handle(failed).ready())

    as_json = json.loads(dagrelay("status", done, "-o", "json").stdout)
    assert (as_json["task_id"], as_json["state"], as_json["attempts"]) == (done, "done", 1)
    assert as_json["run"]["dag_run_id"] == as_json["dag_run_id"] == "relay__s"

    table = dagrelay("status", failed)
    assert table.returncode == OK
    rows = dict(line.split(maxsplit=1) for line in table.stdout.splitlines())
    assert rows["state"] == "failed"
    assert rows["error"] == "RequestRejected"
    assert "a param is missing" in rows["reason"]
    assert rows["accepted_at"].endswith("+00:00")


@pytest.mark.parametrize("output", ["table", "json"])
def test_an_unknown_id_is_told(dagrelay, output):
    told = dagrelay("status", "nobodys-id", "-o", output)

    assert (told.returncode, told.stdout) == (FAILED, "")
    assert "nobodys-id" in told.stderr


# dagrelay doctor


def test_doctor_finds_all_well_and_shows_no_password(dagrelay, worker, valkey, server):
    server.execute_command("ACL", "SETUSER", "relay", "on", f">{CANARY}", "~*", "&*", "+@all")
    url = valkey.url.replace("redis://", f"redis://relay:{CANARY}@")

    told = dagrelay("doctor", DAGRELAY_REDIS_URL=url, CELERY_BROKER_URL="redis://127.0.0.1:1/0")

    assert told.returncode == OK, told.stdout
    assert "redis://relay:***@" in told.stdout
    assert not [line for line in told.stdout.splitlines() if line.startswith("BAD")]
    assert "w1@" in told.stdout
    assert "not tried here" in told.stdout


def test_doctor_tells_what_is_missing_or_unsafe(dagrelay, server):
    server.config_set("appendonly", "no")
    server.config_set("maxmemory-policy", "allkeys-lru")

    told = dagrelay("doctor")

    assert told.returncode == FAILED
    bad = [line.split()[1] for line in told.stdout.splitlines() if line.startswith("BAD")]
    assert bad == ["appendonly", "maxmemory", "workers"]


def test_doctor_tells_that_redis_is_not_there(dagrelay):
    told = dagrelay("doctor", DAGRELAY_REDIS_URL=f"redis://:{CANARY}@127.0.0.1:{free_port()}/0")

    assert told.returncode == FAILED
    bad = [line.split()[1] for line in told.stdout.splitlines() if line.startswith("BAD")]
    assert bad == ["redis"]


def test_doctor_tries_airflow_where_the_workers_code_lies(dagrelay, airflow):
    login = airflow.conn_uri.replace(airflow.password, CANARY)

    told = dagrelay("doctor", cwd=ROOT, AIRFLOW_CONN_DEFAULT=login)

    assert told.returncode == FAILED  # no worker, and the credentials are wrong
    line = next(line for line in told.stdout.splitlines() if " airflow default" in line)
    assert line.startswith("BAD")
    assert airflow.url in line


def test_doctor_runs_no_module_of_a_host_that_has_our_name(dagrelay, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "doctor.py").write_text(f"print('{CANARY}')")

    assert "not tried here" in dagrelay("doctor").stdout


def test_the_command_says_what_it_can_do(dagrelay):
    told = dagrelay("--help")

    assert told.returncode == OK
    for command in ("trigger", "status", "doctor"):
        assert command in told.stdout
        assert dagrelay(command, "-h").returncode == OK
