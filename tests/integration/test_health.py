"""dagrelay health: what lives, what is ready, and each kind of thing that can be stuck, made to be so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from redis import Redis

from local.process import ROOT, clean_env
from local.valkey import Valkey
from producers.cli import main
from producers.cli_health import arguments_of
from producers.contract import TriggerRequest
from producers.fan_out import fan_out
from producers.stores.fan_outs import watch_id
from producers.stores.lines import Lines
from producers.stores.readings import LOOK_GROUPS
from tests.fake_airflow import FakeAirflow
from tests.standing import standing_still
from tests.worker import Worker

Health = Callable[..., tuple[int, dict[str, Any]]]


def until(ask: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := ask()):
        assert time.monotonic() < deadline, f"not {what} after {timeout_s:g} s"
        time.sleep(0.1)
    return found


@pytest.fixture
def health(valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Health:
    """Ask as a probe does, but in this process; return the exit code and the answer."""

    def ask(*options: str, folder: Path = tmp_path, **env: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        given = {"DAGRELAY_REDIS_URL": valkey.url, **env}
        done = CliRunner().invoke(main, ["health", *options, "-o", "json"], env=given)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, json.loads(done.stdout) if done.stdout else {"stderr": done.stderr}

    return ask


@pytest.fixture
def start(valkey: Valkey, airflow: FakeAirflow, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start a worker whose heartbeat lies in this test's folder."""
    with ExitStack() as stack:

        def begin(name: str = "w1", *options: str, **env: str) -> Worker:
            worker = Worker(
                valkey.url,
                tmp_path,
                name=name,
                options=options,
                connections={"default": f"{airflow.conn_uri}/?read_timeout_s=1"},
                TMPDIR=str(tmp_path),
                **env,
            )
            return stack.enter_context(worker)

        yield begin


def beat_of(folder: Path) -> dict[str, Any]:
    """What the worker whose heartbeat lies there has said of itself last."""
    (path,) = folder.glob("dagrelay-*/*.beat")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def the_finding(answer: dict[str, Any], what: str) -> dict[str, Any]:
    (found,) = [one for one in answer["findings"] if one["what"] == what]
    assert found["words"]
    assert found["do"]
    return dict(found)


def kinds(answer: dict[str, Any]) -> set[str]:
    return {one["what"] for one in answer["findings"]}


# Live and ready


def test_a_worker_lives_while_its_loop_turns_and_is_dead_when_it_does_not(start, health):
    assert health("--live")[0] == 75  # there is none
    worker = start()
    assert health("--live")[0] == 0
    assert until(lambda: health("--ready")[1]["status"] == "ok", "ready")
    with standing_still(worker.pid):
        told = until(lambda: (found := health("--live", "--within", "3"))[0] and found, "told as dead")
        code, answer = told
        assert code == 1
        assert str(worker.pid) in answer["words"]
    until(lambda: health("--live", "--within", "3")[0] == 0, "alive again")

    worker.kill()
    code, answer = health("--live")
    assert code == 1
    assert "is gone" in answer["words"]


@pytest.mark.parametrize("pool", ["threads", "processes", "solo"])
def test_in_every_pool_a_worker_lives_and_is_ready_and_leaves_no_heartbeat(start, health, tmp_path, pool):
    worker = start("w1", "-P", pool, "-c", "2")
    until(lambda: "running" in health("--live")[1]["words"], "running")
    assert health("--ready")[0] == 0
    assert health("--ready", "--node", "somebody@else")[0] == 1
    assert worker.stop() == 0
    assert not list(tmp_path.glob("dagrelay-*/*.beat"))


def test_a_worker_that_waits_for_redis_lives_and_is_not_ready(start, health, valkey, tmp_path):
    start()
    until(lambda: "running" in health("--live")[1]["words"], "running")
    valkey.stop()
    until(lambda: "connecting" in health("--live")[1]["words"], "connecting")
    # For longer than it could be from before.
    began = beat_of(tmp_path)["at"]
    until(lambda: beat_of(tmp_path)["at"] > began + 2, "still beating")
    assert health("--live", "--within", "1.5")[0] == 0
    code, answer = health("--ready")
    assert code == 1
    assert "Redis" in answer["words"]
    assert health("--progress")[0] == 75
    valkey.start()
    until(lambda: health("--ready")[0] == 0, "ready again", timeout_s=60)


def test_a_worker_whose_celery_heartbeat_is_the_first_to_meet_a_redis_that_is_gone_lives(
    start, health, valkey, tmp_path
):
    """Celery has its event loop publish that heartbeat for as long as it takes."""
    start("w1", "-I", "tests.integration.slow_loop", SLOW_LOOP=str(tmp_path))
    until(lambda: health("--ready")[0] == 0, "ready")
    (tmp_path / "asked").touch()
    until((tmp_path / "begun").exists, "standing still")
    valkey.stop()
    (tmp_path / "asked").unlink()
    until(lambda: "connecting" in health("--live")[1]["words"], "connecting")
    valkey.start()
    until(lambda: health("--ready")[0] == 0, "ready again")


def test_a_worker_whose_tasks_still_run_while_it_ends_lives(start, health, relay, airflow, tmp_path):
    airflow.fault = lambda number, dag_id, run_id: "late"
    airflow.late_s = 0.9
    worker = start()
    until(lambda: "running" in health("--live")[1]["words"], "running")
    relay.enqueue(TriggerRequest(dag_id="slow"))
    until(lambda: airflow.in_flight, "asked")
    worker.process.ask_to_stop()
    (beat,) = tmp_path.glob("dagrelay-*/*.beat")
    states = set()
    while worker.process.alive:
        if beat.exists():
            states.add(json.loads(beat.read_text())["state"])
        time.sleep(0.02)
    assert states <= {"running", "leaving"}
    assert not beat.exists()


def test_heartbeats_of_workers_that_were_killed_are_cleared_away(start, health, tmp_path):
    start("w1").kill()
    assert health("--live")[0] == 1
    start("w2")
    code, answer = health("--live")
    assert code == 0
    assert "w1" not in answer["words"]
    assert len(list(tmp_path.glob("dagrelay-*/*.beat"))) == 1


def test_without_a_worker_here_any_worker_makes_it_ready(start, health, tmp_path):
    assert health("--ready")[0] == 1
    start()
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert health("--ready", folder=other)[0] == 0
    assert health("--live", folder=other)[0] == 75


def test_the_health_check_of_the_image_is_the_same_question(start, valkey, tmp_path):
    """The command of the Dockerfile, with a living worker and with a dead one."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    (check,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", text, re.M)
    path = {"PATH": f"{Path(sys.executable).parent}:{clean_env()['PATH']}"}

    def status() -> int:
        env = clean_env(DAGRELAY_REDIS_URL=valkey.url, TMPDIR=str(tmp_path)) | path
        done = subprocess.run(
            json.loads(check), cwd=ROOT, env=env, capture_output=True, timeout=30, check=False
        )
        return done.returncode

    worker = start()
    assert status() == 0
    worker.kill()
    assert status() == 1


def test_wrong_usage_and_wrong_settings_are_told(health):
    assert health()[0] == 2
    code, answer = health("--progress", DAGRELAY_REDIS_URL="http://nowhere")
    assert code == 78
    assert "DAGRELAY_REDIS_URL" in answer["stderr"]


# Is anything stuck?


def test_where_all_is_well_nothing_is_stuck(start, health, relay):
    start()
    relay.enqueue(TriggerRequest(dag_id="good")).get(timeout=60)
    relay.enqueue(TriggerRequest(dag_id="good"), countdown=600)
    relay.enqueue(TriggerRequest(dag_id="good", wait=True))
    until(lambda: relay.waits.size() == 2, "parked")
    code, answer = health("--progress")
    assert (code, answer["status"], answer["findings"]) == (0, "ok", [])
    assert "1 workers" in answer["words"]


def test_what_nobody_takes_is_found(health, relay):
    relay.enqueue(TriggerRequest(dag_id="good"))
    code, answer = until(lambda: (found := health("--progress", "--queue-age", "1"))[1] and found, "asked")
    assert code == 1
    assert "make worker" in the_finding(answer, "workers")["do"]
    answer = until(
        lambda: "queue" in kinds(found := health("--progress", "--queue-age", "1")[1]) and found, "old"
    )
    found = the_finding(answer, "queue")
    assert found["subject"] == "triggers"
    assert found["seconds"] >= 1


def test_a_queue_that_no_worker_serves_is_found(start, health, relay):
    start("w1", "-Q", "looks")
    relay.enqueue(TriggerRequest(dag_id="good"))
    answer = until(
        lambda: "queue" in kinds(found := health("--progress", "--queue-age", "1")[1]) and found, "old"
    )
    assert kinds(answer) == {"queue"}
    assert "-Q" in the_finding(answer, "queue")["do"]


def test_what_is_due_and_not_brought_back_is_found(start, health, relay):
    """The only worker stands still: its lease runs out, and what was parked comes due."""
    worker = start()
    relay.enqueue(TriggerRequest(dag_id="good"), countdown=2)
    until(lambda: relay.waits.size() == 1, "parked")
    with standing_still(worker.pid):
        answer = until(
            lambda: (
                {"due", "workers"} <= kinds(found := health("--progress", "--due-late", "1")[1]) and found
            ),
            "found",
        )
        assert the_finding(answer, "due")["seconds"] > 1
    until(lambda: health("--progress", "--due-late", "1")[0] == 0, "well again")


def test_messages_of_a_dead_worker_that_nobody_takes_back_are_found(start, health, relay, airflow, valkey):
    airflow.fault = lambda number, dag_id, run_id: "late"
    airflow.late_s = 0.9
    start()
    relay.enqueue(TriggerRequest(dag_id="good"))
    client = relay.redis
    until(lambda: airflow.in_flight, "asked")
    owner = client.zrange("dagrelay:leases", 0, -1)[0].decode()
    # A lease that is over while another worker lives, and does not restore it.
    seconds, _ = client.time()
    client.zadd("dagrelay:leases", {"dead:1:x": seconds - 60, owner: seconds + 60})
    code, answer = health("--progress", "--due-late", "5")
    assert code == 1
    assert the_finding(answer, "workers")["subject"] == "dead"


def test_looks_that_nobody_does_are_found(start, health, relay):
    start("w1", "-Q", "triggers,jobs")
    relay.redis.sadd(LOOK_GROUPS, "airflow:default")
    relay.enqueue(TriggerRequest(dag_id="good", wait=True))
    answer = until(
        lambda: "looks" in kinds(found := health("--progress", "--look-late", "1")[1]) and found, "late"
    )
    found = the_finding(answer, "looks")
    assert found["subject"] == "airflow:default"
    assert "looks" in found["do"]


def test_an_airflow_that_does_not_answer_is_found_and_not_its_line_as_well(start, health, relay, airflow):
    airflow.stop()
    start(DAGRELAY_RETRY_CAP_S="0.2")
    for _ in range(8):
        relay.enqueue(TriggerRequest(dag_id="good"))
    lines = Lines(relay.redis)
    until(lambda: "default" in lines.names() and lines.state("default").breaker == "open", "open")
    answer = until(
        lambda: (
            "breaker" in kinds(found := health("--progress", "--breaker-open", "1", "--line-still", "1")[1])
            and found
        ),
        "found",
    )
    assert kinds(answer) == {"breaker"}
    assert the_finding(answer, "breaker")["subject"] == "default"
    airflow.start()
    until(lambda: health("--progress", "--breaker-open", "1")[0] == 0, "well again")


def test_a_line_with_room_that_does_not_move_is_found(health, relay, start):
    """No worker knows the connection: made by hand, as workers see to all lines that they know."""
    start()
    task_id = relay.enqueue(TriggerRequest(dag_id="good"), countdown=600).id
    client = relay.redis
    client.sadd("dagrelay:airflows", "gone")
    client.hset("dagrelay:airflow:gone", mapping={"ceiling": 8, "limit": 8})
    client.zadd("dagrelay:line:gone", {task_id: client.time()[0] - 100})
    client.hset(f"dagrelay:record:{task_id}", "due_at", client.time()[0] - 100)
    code, answer = health("--progress")
    assert code == 1
    found = the_finding(answer, "line")
    assert found["subject"] == "gone"
    assert "AIRFLOW_CONN_GONE" in found["do"]


def test_holds_are_found_for_credentials_at_once_and_by_hand_when_they_are_old(start, health, relay, airflow):
    start()
    lines = Lines(relay.redis)
    lines.hold("default", "an upgrade", by="anna")
    assert health("--progress")[0] == 0
    code, answer = health("--progress", "--held-for", "0")
    assert code == 1
    found = the_finding(answer, "held")
    assert "an upgrade" in found["words"]
    assert "dagrelay release default" in found["do"]
    lines.release("default")

    airflow.refuse_credentials = True
    relay.enqueue(TriggerRequest(dag_id="good"))
    answer = until(lambda: "held" in kinds(found := health("--progress")[1]) and found, "held")
    assert "AIRFLOW_CONN_DEFAULT" in the_finding(answer, "held")["do"]


def test_a_fan_out_that_lost_a_part_is_found_and_one_that_waits_is_not(start, health, relay, airflow):
    start()  # the watch itself would find it too, and end it, some minutes later
    handle = fan_out([TriggerRequest(dag_id="good", wait=True) for _ in range(3)], relay=relay)
    until(lambda: len(airflow.runs) == 3, "started")
    client = relay.redis

    def looked_at_four_times() -> bool:
        value = client.hget("dagrelay:parked", watch_id(handle.id))
        if not value:  # a look is under way, and no other may come behind it: it would see what is lost below
            return False
        if int(arguments_of(value.split(b"\0", 3)[3]).get("still", 0)) >= 4:
            return True
        client.zadd("dagrelay:due", {watch_id(handle.id): 0}, xx=True)  # now, and not in a minute
        return False

    until(looked_at_four_times, "looked at four times")
    assert health("--progress")[0] == 0  # its requests wait for their runs, and that may take days

    lost = handle.handles[0].id
    client.hdel("dagrelay:parked", lost)
    client.zrem("dagrelay:due", lost)
    answer = until(lambda: "fan-out" in kinds(found := health("--progress")[1]) and found, "found")
    found = the_finding(answer, "fan-out")
    assert found["subject"] == handle.id
    assert lost in found["words"]


def test_a_redis_that_is_full_is_found(start, health, valkey):
    start()
    client = Redis.from_url(valkey.url)
    client.config_set("maxmemory", client.info("memory")["used_memory"] - 1000)
    code, answer = health("--progress")
    client.config_set("maxmemory", 0)
    assert code == 1
    assert "maxmemory" in the_finding(answer, "memory")["do"]
