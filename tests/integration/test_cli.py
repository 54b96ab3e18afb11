"""The command `dagrelay` as a shell or cron sees it: its exit codes, what it prints, what it never prints."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from local.process import clean_env, free_port
from producers.contract import QUEUE_TRIGGERS, TriggerRequest
from producers.errors import InvalidRequest, RequestCancelled
from producers.stores.waits import DUE, PARKED
from tests.integration.test_trigger import until

WORKER_OPTIONS = ("-I", "tests.integration.waiting")
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
        for command in (
            ("trigger", "d"),
            ("status", "an-id"),
            ("parked",),
            ("wake", "an-id"),
            ("wake", "--key", "k"),
            ("cancel", "an-id"),
        ):
            told = dagrelay(*command, DAGRELAY_REDIS_URL=url)
            assert (told.returncode, told.stdout) == (TRY_AGAIN, "")
            assert "send again with the same key" in told.stderr
    server.config_set("maxmemory", "1mb")
    assert dagrelay("trigger", "d").returncode == TRY_AGAIN
    server.config_set("maxmemory", "0")
    assert server.dbsize() == 0


@pytest.mark.parametrize("command", [("trigger", "d"), ("parked",), ("doctor",)], ids=" ".join)
def test_a_wrong_configuration_exits_with_78_and_names_every_mistake(dagrelay, command):
    told = dagrelay(*command, DAGRELAY_REDIS_URL=f"http://:{CANARY}@h", DAGRELAY_CLIENT_NAME="a\tb")

    assert told.returncode == WRONG_CONFIGURATION
    assert [line.split()[1] for line in told.stderr.splitlines()] == [
        "DAGRELAY_REDIS_URL",
        "DAGRELAY_CLIENT_NAME",
    ]
    assert "DAGRELAY_REDIS_URL is not set" in dagrelay(*command, DAGRELAY_REDIS_URL="").stderr


def test_until_created_prints_the_run(dagrelay, worker, airflow):
    told = dagrelay(
        *("trigger", "daily_sales", "--conf", '{"day": 1}', "--key", "w"),
        *("--until-created", "--timeout", "30"),
    )

    task_id, _, run = told.stdout.partition("\n")
    assert told.returncode == OK
    assert json.loads(run)["dag_run_id"] == "relay__w"
    assert task_id in airflow.runs["daily_sales", "relay__w"]["note"]


@pytest.mark.parametrize("option", ["--until-created", "--wait"])
def test_whoever_waits_is_told_why_there_is_no_run(dagrelay, worker, airflow, option):
    airflow.rejecting["strict"] = (400, {"detail": "a param is missing"})

    told = dagrelay("trigger", "strict", option, "--timeout", "30")

    assert told.returncode == FAILED
    assert "RequestRejected" in told.stderr
    assert "a param is missing" in told.stderr


@pytest.mark.parametrize(
    ("state", "code", "words"), [("success", OK, '"state": "success"'), ("failed", FAILED, "DagRunFailed")]
)
def test_wait_ends_as_the_run_does(dagrelay, relay, worker, airflow, state, code, words):
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(dagrelay, "trigger", "daily_sales", "--key", state, "--wait", "--timeout", "30")
        (waiting,) = until(lambda: list(relay.waits.parked()))
        shown = dagrelay("parked", "--connection", "default")
        airflow.runs["daily_sales", f"relay__{state}"]["state"] = state
        told = told.result()

    assert told.returncode == code
    assert words in told.stdout + told.stderr
    assert told.stdout.splitlines()[0] == waiting.task_id
    assert f"run relay__{state} of DAG daily_sales" in shown.stdout
    assert waiting.task_id in shown.stdout
    assert [line.partition(":")[0] for line in history(dagrelay("status", waiting.task_id))][-1] in (
        "done",
        "failed (DagRunFailed)",
    )


def test_what_is_waited_for_reaches_the_worker(dagrelay, server):
    options = ("--wait", "--wait-timeout", "60", "--result-from", "last", "--stop-run", "--timeout", "0.1")

    assert dagrelay("trigger", "d", *options).returncode == FAILED

    message = sent(server)
    assert {name: message[name] for name in ("wait", "wait_timeout_s", "result_from", "stop_run")} == {
        "wait": True,
        "wait_timeout_s": 60.0,
        "result_from": "last",
        "stop_run": True,
    }


def test_until_created_asks_for_nothing_more_than_a_run(dagrelay, server):
    assert dagrelay("trigger", "d", "--until-created", "--timeout", "0.1").returncode == FAILED

    assert "wait" not in sent(server)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--stop-run",), WRONG_REQUEST, "stop_run: needs wait=True"),
        (("--wait-timeout", "5"), WRONG_REQUEST, "wait_timeout_s: needs wait=True"),
        (("--wait", "--wait-timeout", "-5"), WRONG_REQUEST, "wait_timeout_s: "),
        (("--wait", "--until-created"), 2, "--until-created or --wait"),
    ],
)
def test_wrong_options_of_waiting_send_nothing(dagrelay, server, options, code, words):
    told = dagrelay("trigger", "d", *options)

    assert told.returncode == code
    assert words in told.stderr
    assert server.dbsize() == 0


@pytest.mark.parametrize("option", ["--until-created", "--wait"])
def test_waiting_ends_at_its_timeout_and_the_request_goes_on(dagrelay, server, option):
    told = dagrelay("trigger", "d", option, "--timeout", "0.2")

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
    rows = dict(line.split(maxsplit=1) for line in table.stdout.partition("\n\n")[0].splitlines())
    assert rows["state"] == "failed"
    assert rows["error"] == "RequestRejected"
    assert "a param is missing" in rows["reason"]
    assert rows["accepted_at"].endswith("+00:00")


@pytest.mark.parametrize("output", ["table", "json"])
def test_an_unknown_id_is_told(dagrelay, output):
    told = dagrelay("status", "nobodys-id", "-o", output)

    assert (told.returncode, told.stdout) == (FAILED, "")
    assert "nobodys-id" in told.stderr


def history(told: subprocess.CompletedProcess[str]) -> list[str]:
    """The words of a history, as the table shows it."""
    lines = told.stdout.partition("history (UTC)\n")[2].splitlines()
    assert all(line.split()[0].endswith("+00:00") for line in lines)
    return [line.split(maxsplit=1)[1] for line in lines]


def test_status_tells_the_history_of_a_trigger_with_its_failed_attempts(dagrelay, relay, airflow, worker):
    airflow.fault = lambda number, dag_id, run_id: "503" if number <= 4 else "answer"
    handle = relay.enqueue(TriggerRequest("daily_sales", key="h"))
    for attempt in range(1, 5):
        until(lambda attempt=attempt: handle.record().attempts >= attempt)
        until(lambda: handle.ready() or relay.waits.wake([handle.id]))
    handle.get(timeout=60)

    words = history(dagrelay("status", handle.id))
    assert words[0] == "accepted, asked by tests@here"
    failed = [line for line in words if line.startswith("attempt ")]
    assert [line.partition(" failed: ")[0] for line in failed] == [f"attempt {n}" for n in range(1, 5)]
    assert all("Airflow unavailable" in line for line in failed)
    assert "woken by hand" in words
    assert words[-1] == "done: run relay__h is queued"

    as_json = json.loads(dagrelay("status", handle.id, "-o", "json").stdout)
    assert [one["what"] for one in as_json["history"]] == words
    times = [one["at"] for one in as_json["history"]]
    assert times == sorted(times)


def test_a_long_outage_does_not_make_a_long_history(relay, server):
    handle = relay.enqueue(TriggerRequest("d"))
    for _ in range(50):
        relay.records.attempt_failed(handle.id, "Airflow unavailable: 503")
    assert [words for _, words in handle.history()] == [
        "attempt 1 failed: Airflow unavailable: 503",
        "attempt 50 failed: Airflow unavailable: 503",
    ]

    for number in range(200):
        relay.records.attempt_failed(handle.id, f"another\nreason {number} " + "x" * 1000)
    lines = [words for _, words in handle.history()]
    assert len(lines) == 30
    assert lines[-1].startswith("attempt 250 failed: another reason 199 xxx")
    assert max(map(len, lines)) < 250
    assert 0 < server.ttl(f"dagrelay:history:{handle.id}") <= 14 * 86_400


# dagrelay parked, wake, cancel: of tasks that wait in a real worker


@pytest.fixture
def begin(valkey, relay, worker):
    """Have a task wait; return its id. What still waits at the end is cancelled."""
    host = Celery(broker=valkey.url, set_as_current=False)
    ids = []

    def begin(what: str, seconds: float = 3600, **kwargs: Any) -> str:
        kwargs |= {"what": what, "until": time.time() + seconds}
        ids.append(host.send_task("tests.wait_for", kwargs=kwargs, queue="jobs").id)
        until(lambda: relay.waits.get(ids[-1]))
        return ids[-1]

    yield begin
    for one in relay.waits.parked(100):
        relay.waits.cancel(one.task_id)
    until(lambda: not relay.waits.size())
    host.close()


def test_parked_tells_what_waits_for_what_and_until_when(dagrelay, relay, begin):
    later = begin("job 17 of service train", 7200, look="service:train")
    sooner = begin("job 18 of service train", 60)
    relay.waits.wake([later], {"state": "running\x1b[31m", "progress": "40 %"})
    until(lambda: relay.waits.get(later) and relay.waits.get(later).seen)
    delayed = relay.enqueue(TriggerRequest("daily_sales", connection="eu"), countdown=100_000)

    told = dagrelay("parked")

    assert told.returncode == OK
    head, *rows = told.stdout.splitlines()
    assert head.split("  ")[0].strip() == "id"
    assert [row.split()[0] for row in rows] == [sooner, later, delayed.id]  # what comes back first is first
    assert "job 18 of service train" in rows[0]
    assert "in 1h" not in rows[0]
    assert "job 17 of service train" in rows[1]
    assert "in 59m" in rows[1] or "in 1h00m" in rows[1]  # its next look
    assert "in 1h59m" in rows[1] or "in 2h00m" in rows[1]  # when it comes back
    assert rows[1].endswith("running [31m 40 %")  # nothing that steers a terminal
    assert "daily_sales" in rows[2]
    assert "its time" in rows[2]
    assert "3 shown, 3 parked in all" in told.stderr

    as_json = [json.loads(line) for line in dagrelay("parked", "-o", "json").stdout.splitlines()]
    assert [one["task_id"] for one in as_json] == [sooner, later, delayed.id]
    assert as_json[1]["next_look_at"] == pytest.approx(time.time() + 3600, abs=60)

    _, *rows = dagrelay("parked", "-n", "1").stdout.splitlines()
    assert [row.split()[0] for row in rows] == [sooner]
    for options, expected in (
        (("--for", "job 17"), [later]),
        (("--for", delayed.id), [delayed.id]),
        (("--connection", "EU"), [delayed.id]),
        (("--service", "nobody"), []),
    ):
        told = dagrelay("parked", "-o", "json", *options)
        assert [json.loads(line)["task_id"] for line in told.stdout.splitlines()] == expected
        assert f"{len(expected)} shown, 3 parked in all" in told.stderr
    assert delayed.cancel() == "accepted"


def test_parked_pages_through_more_than_a_page(dagrelay, relay):
    relay.redis.config_set("appendonly", "no")
    for number in range(1100):
        relay.enqueue(TriggerRequest(f"d{number}"), countdown=1000 + number)
    message = relay.redis.lrange("triggers", 0, -1)
    # As a worker parks them, without one.
    for raw in message:
        headers = json.loads(raw)["headers"]
        due = datetime.fromisoformat(headers["eta"]).timestamp()
        relay.redis.hset(PARKED, headers["id"], b"0\x001\x00triggers\x00" + raw)
        relay.redis.zadd(DUE, {headers["id"]: due})

    told = dagrelay("parked", "-n", "2000", "-o", "json")

    assert [json.loads(line)["dag_id"] for line in told.stdout.splitlines()] == [f"d{n}" for n in range(1100)]
    assert "1100 shown, 1100 parked in all" in told.stderr
    assert "1 shown, 1100 parked in all" in dagrelay("parked", "-n", "1").stderr


def test_nothing_parked_is_told_too(dagrelay):
    told = dagrelay("parked")

    assert (told.returncode, told.stdout) == (OK, "")
    assert "0 parked in all" in told.stderr


def test_wake_sends_on_what_waits_and_says_what_does_not(dagrelay, relay, begin):
    task_id = begin("a signal")

    told = dagrelay("wake", task_id, "nobodys-id", "--observation", '{"return": 7}')

    assert told.returncode == OK
    assert told.stdout.splitlines() == [
        f"{task_id} woken",
        "nobodys-id does not wait: no request with this id is on record",
    ]
    until(lambda: relay.handle(task_id).ready())
    again = dagrelay("wake", task_id)
    assert (again.returncode, again.stdout) == (FAILED, f"{task_id} does not wait: it has ended as done\n")
    words = history(dagrelay("status", task_id))
    assert any(line.startswith("woken by ") for line in words)
    assert "waits for a signal" in words


def test_wake_by_key_wakes_all_that_wait_for_it(dagrelay, relay, begin):
    ids = [begin("a webhook", key="order-7"), begin("a webhook", key="order-7")]

    told = dagrelay("wake", "--key", "order-7", "--observation", '{"return": 1}')

    assert (told.returncode, told.stdout) == (OK, "2 woken\n")
    until(lambda: all(relay.handle(task_id).successful() for task_id in ids))
    told = dagrelay("wake", "--key", "order-7")
    assert (told.returncode, told.stdout) == (FAILED, "")
    assert "nothing waits for the key 'order-7'" in told.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, "give ids, or --key"),
        (("an-id", "--key", "k"), 2, "give ids, or --key"),
        (("an-id", "--observation", CANARY), WRONG_REQUEST, "--observation: is no JSON"),
        (("an-id", "--observation", '{"a": NaN}'), WRONG_REQUEST, "observation.a is nan"),
        (("an-id",), FAILED, ""),
    ],
)
def test_a_wrong_wake_is_told(dagrelay, args, code, words):
    told = dagrelay("wake", *args)

    assert told.returncode == code
    assert words in told.stderr


def test_cancel_ends_what_waits_and_tells_how_each_stands(dagrelay, relay, begin, airflow):
    waits = begin("job 17", look="service:train")
    ended = relay.enqueue(TriggerRequest("daily_sales", key="c"))
    ended.get(timeout=60)

    told = dagrelay("cancel", waits, ended.id, "nobodys-id")

    assert told.returncode == FAILED  # not all of them were there to be cancelled
    assert told.stdout.splitlines() == [
        f"{waits} cancelled",
        f"{ended.id} had ended as done",
        "nobodys-id is not on record; if it comes nevertheless, it is refused",
    ]
    assert ended.state == "done"
    words = history(dagrelay("status", waits))
    assert any(line.startswith("cancel asked by ") for line in words)
    assert words[-1].startswith("cancelled")
    assert not relay.redis.exists("dagrelay:looks:service:train")
    again = dagrelay("cancel", waits)
    assert (again.returncode, again.stdout) == (OK, f"{waits} had ended as cancelled\n")


def test_cancel_ends_a_retry_and_no_run_is_made(dagrelay, relay, worker, airflow):
    airflow.refuse_credentials = airflow.refuse_token = True
    handle = relay.enqueue(TriggerRequest("daily_sales", key="never"))
    until(lambda: relay.waits.get(handle.id))
    assert "Airflow default, which is held until its" in dagrelay("parked").stdout

    told = dagrelay("cancel", handle.id)

    assert (told.returncode, told.stdout) == (OK, f"{handle.id} cancelled\n")
    with pytest.raises(RequestCancelled):
        handle.get(timeout=5)
    assert not airflow.runs


def test_cancel_without_a_worker_is_kept_for_the_one_that_comes(dagrelay, relay, start_worker, airflow):
    handle = relay.enqueue(TriggerRequest("daily_sales"))
    assert dagrelay("cancel", "--no-wait", handle.id).stdout == f"{handle.id} to be cancelled\n"

    start_worker()

    with pytest.raises(RequestCancelled):
        handle.get(timeout=60)
    assert not airflow.runs
    assert handle.state == "cancelled"


def test_a_handle_cancels_and_a_client_wakes(relay, begin):
    task_id = begin("a message", key="k-1")

    assert relay.wake("k-1", {"state": "seen"}) == 1
    assert relay.wake("nobodys-key") == 0
    with pytest.raises(InvalidRequest, match=r"observation\.at is of type datetime"):
        relay.wake("k-1", {"at": datetime.now(UTC)})
    until(lambda: relay.waits.get(task_id))
    handle = relay.handle(task_id)
    assert handle.cancel() == "waiting"
    until(handle.ready)
    assert handle.state == "cancelled"
    assert handle.cancel() == "cancelled"
    assert [words for _, words in handle.history()] == ["woken by tests@here", "cancel asked by tests@here"]
    assert relay.handle("nobodys-id").cancel() == "unknown"


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
    for command in ("trigger", "parked", "wake", "cancel", "status", "doctor"):
        assert command in told.stdout
        assert dagrelay(command, "-h").returncode == OK
