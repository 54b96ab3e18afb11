"""The publishers in `examples/publishers` run as they stand: to a real door, a real worker, and back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from local.process import STATE, Process, clean_env, free_port
from local.valkey import Valkey
from producers.client import RelayClient
from tests import npm
from tests.fake_airflow import FakeAirflow
from tests.parts import need
from tests.worker import ROOT, Worker

EXAMPLES = ROOT / "examples/publishers"
DAGRELAY = ROOT / ".venv/bin/dagrelay"
ODD = {"text": "\"quotes\" 'quotes' $HOME `ls` \\ ünïcödé 🦉 %s\n\r\n", "n": [1, 2.5, None, True]}

pytestmark = pytest.mark.integration


def until(seen: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := seen():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {timeout_s:.0f} s")


def run(*argv: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in argv],
        capture_output=True,
        text=True,
        timeout=240,  # Go compiles its library the first time
        cwd=cwd,
        env=clean_env(**env),
    )


def stopped_port() -> int:
    """A port at which nobody listens."""
    return free_port()


@pytest.fixture
def listener(worker: Worker, valkey: Valkey, tmp_path: Path) -> Iterator[Process]:
    """`dagrelay listen` on the stream `dag-triggers` of the workers' own Redis."""
    log = tmp_path / "listen.log"
    env = clean_env(DAGRELAY_REDIS_URL=valkey.url, DAGRELAY_LISTEN_URL=f"{valkey.url}?stream=dag-triggers")
    process = Process([DAGRELAY, "listen"], log=log, env=env, name="listener")
    try:
        process.wait_until(
            lambda: log.exists() and "listening" in log.read_text(),
            timeout_s=30,
            what="listening",
            every_s=0.05,
        )
        yield process
    finally:
        process.stop()


@pytest.fixture
def door(worker: Worker, valkey: Valkey, tmp_path: Path) -> Iterator[int]:
    """`dagrelay socket` at a free port, without keys."""
    port, log = free_port(), tmp_path / "socket.log"
    env = clean_env(DAGRELAY_REDIS_URL=valkey.url)
    process = Process(
        [DAGRELAY, "socket", "--insecure", "--port", str(port)], log=log, env=env, name="socket"
    )
    try:
        process.wait_until(
            lambda: log.exists() and "listening" in log.read_text(),
            timeout_s=30,
            what="listening",
            every_s=0.05,
        )
        yield port
    finally:
        process.stop()


@pytest.fixture
def gateway(worker: Worker, valkey: Valkey, tmp_path: Path) -> Iterator[str]:
    """`dagrelay gateway` at a free port, with a key; its URL."""
    there = run(DAGRELAY, "gateway", "--help").returncode == 0
    need("dagrelay gateway", there, "it comes with the extra `gateway`")
    port, log = free_port(), tmp_path / "gateway.log"
    env = clean_env(DAGRELAY_REDIS_URL=valkey.url)
    process = Process(
        [DAGRELAY, "gateway", "--insecure", "--port", str(port)], log=log, env=env, name="gateway"
    )
    url = f"http://127.0.0.1:{port}"
    try:
        process.wait_until(
            lambda: run("curl", "-sf", f"{url}/livez").returncode == 0, timeout_s=30, what="up", every_s=0.2
        )
        yield url
    finally:
        process.stop()


def started(airflow: FakeAirflow, dag_id: str, run_id: str | None = None) -> tuple[str, str]:
    """Wait for the one run of a DAG, and return its key."""
    found = until(lambda: [key for key in airflow.runs if key[0] == dag_id], f"a run of {dag_id}")
    assert len(found) == 1
    assert run_id is None or found[0][1] == run_id
    return found[0]


# bash


def test_bash_asks_over_a_stream(listener: Process, valkey: Valkey, airflow: FakeAirflow):
    message = {"dag_id": "bash_stream", "conf": ODD, "key": "k1"}
    done = run(
        EXAMPLES / "bash/stream.sh", json.dumps(message, ensure_ascii=False), REDIS_PORT=str(valkey.port)
    )
    assert done.returncode == 0, done.stderr
    assert Redis.from_url(valkey.url).xrange("dag-triggers", done.stdout.strip(), done.stdout.strip())
    started(airflow, "bash_stream", "relay__k1")
    assert airflow.confs == [ODD]


def test_bash_says_no_to_a_redis_that_says_no(tmp_path: Path):
    script = EXAMPLES / "bash/stream.sh"
    with Valkey() as valkey, Redis.from_url(valkey.url) as client:
        client.config_set("requirepass", "se cr$et")
        port = str(valkey.port)
        refused = run(script, "{}", REDIS_PORT=port)
        assert (refused.returncode, refused.stdout) == (65, "")
        assert "NOAUTH" in refused.stderr
        wrong = run(script, "{}", REDIS_PORT=port, REDIS_PASSWORD="no")
        assert wrong.returncode == 65
        taken = run(script, "{}", REDIS_PORT=port, REDIS_PASSWORD="se cr$et", STREAM="s", REDIS_DB="3")
        assert taken.returncode == 0, taken.stderr
        named = run(script, "{}", REDIS_PORT=port, REDIS_USER="default", REDIS_PASSWORD="se cr$et")
        assert named.returncode == 0, named.stderr
        with Redis(port=valkey.port, password="se cr$et", db=3) as third:
            assert third.xlen("s") == 1
    assert run(script, "{}", REDIS_PORT=str(stopped_port())).returncode == 75


def test_bash_asks_over_tcp(door: int, airflow: FakeAirflow):
    script, port = EXAMPLES / "bash/line.sh", str(door)
    pretty = json.dumps({"dag_id": "bash_line", "conf": ODD, "key": "k1"}, indent=2)
    done = run(script, pretty, DAGRELAY_PORT=port)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) == 36
    again = run(script, pretty, DAGRELAY_PORT=port)
    assert again.returncode == 0
    started(airflow, "bash_line", "relay__k1")
    wrong = run(script, '{"dag_id": "../x"}', DAGRELAY_PORT=port)
    assert wrong.returncode == 65
    assert "dag_id" in wrong.stderr
    assert run(script, "{}", DAGRELAY_PORT=str(stopped_port())).returncode == 75


def test_curl_asks_over_http(gateway: str, airflow: FakeAirflow):
    script = EXAMPLES / "bash/http.sh"
    first = run(script, "bash_http", json.dumps({"conf": ODD}), "curl-1", DAGRELAY_URL=gateway)
    assert first.returncode == 0, first.stdout + first.stderr
    again = run(script, "bash_http", json.dumps({"conf": ODD}), "curl-1", DAGRELAY_URL=gateway)
    assert again.stdout == first.stdout
    started(airflow, "bash_http", json.loads(first.stdout)["dag_run_id"])
    wrong = run(script, "bash_http", '{"conf": 1}', "curl-2", DAGRELAY_URL=gateway)
    assert wrong.returncode == 65
    assert "conf" in wrong.stdout
    away = run(script, "bash_http", "{}", "curl-3", DAGRELAY_URL=f"http://127.0.0.1:{stopped_port()}")
    assert away.returncode == 75


# Node


def node(folder: str) -> Path:
    found = npm.installed(EXAMPLES / folder)
    need(f"Node's packages of {folder}", found is not None, npm.HOW_TO_GET_IT)
    assert found is not None
    return found


def test_node_asks_over_a_stream_and_hears_how_it_ended(
    listener: Process, valkey: Valkey, airflow: FakeAirflow
):
    folder = node("node")
    message = {"dag_id": "node_stream", "conf": ODD, "key": "k1", "correlation_id": "c1"}
    done = run("node", "stream.mjs", json.dumps(message), cwd=folder, REDIS_URL=valkey.url)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {answer["what"] for answer in answers} >= {"ended"}
    assert {answer["correlation_id"] for answer in answers} == {"c1"}
    assert answers[-1]["run"]["dag_run_id"] == started(airflow, "node_stream")[1] == "relay__k1"


def test_node_hears_why_it_was_refused(listener: Process, valkey: Valkey):
    done = run("node", "stream.mjs", '{"dag_id": "a", "config": {}}', cwd=node("node"), REDIS_URL=valkey.url)
    assert done.returncode == 1
    (answer,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert answer["what"] == "refused"
    assert "'config': no field of a trigger" in answer["reason"]


def test_node_asks_over_http(gateway: str, airflow: FakeAirflow):
    need("node", shutil.which("node") is not None, "install Node 20")
    script = EXAMPLES / "node/http.mjs"
    first = run("node", script, "node_http", json.dumps({"conf": ODD}), "node-1", DAGRELAY_URL=gateway)
    assert first.returncode == 0, first.stdout + first.stderr
    started(airflow, "node_http", json.loads(first.stdout)["dag_run_id"])
    wrong = run("node", script, "node_http", '{"conf": 1}', "node-2", DAGRELAY_URL=gateway)
    assert wrong.returncode == 65


def test_celery_node_calls_our_task_and_has_its_result(
    worker: Worker, relay: RelayClient, valkey: Valkey, airflow: FakeAirflow
):
    folder = node("celery-node")
    message = json.dumps({"dag_id": "celery_node", "conf": ODD, "key": "k1"})
    done = run("node", "trigger.mjs", message, cwd=folder, DAGRELAY_REDIS_URL=valkey.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["dag_run_id"] == "relay__k1"
    started(airflow, "celery_node", "relay__k1")
    assert airflow.confs == [ODD]
    relay_record = relay.record(done.stderr.strip())
    assert relay_record is not None
    assert relay_record.state == "done"

    wrong = run("node", "trigger.mjs", '{"dag_id": "../x"}', cwd=folder, DAGRELAY_REDIS_URL=valkey.url)
    assert wrong.returncode == 1


# Go


def test_go_asks_over_http_and_over_a_stream(
    listener: Process, valkey: Valkey, airflow: FakeAirflow, tmp_path: Path, request: pytest.FixtureRequest
):
    ours = str(Path(sys.executable).parent)  # where the lock puts it
    go = os.environ.get("GO") or shutil.which("go") or shutil.which("go", path=ours)
    need("go", bool(go), "install Go 1.22, or name it as GO")
    program = tmp_path / "publisher"
    env = {"GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "GOCACHE": str(STATE / "go")}
    assert run(str(go), "vet", ".", cwd=EXAMPLES / "go", **env).returncode == 0
    built = run(str(go), "build", "-o", program, ".", cwd=EXAMPLES / "go", **env)
    assert built.returncode == 0, built.stderr

    message = json.dumps({"dag_id": "go_stream", "conf": ODD, "key": "k1"})
    done = run(program, "stream", message, REDIS_ADDR=f"127.0.0.1:{valkey.port}")
    assert done.returncode == 0, done.stderr
    started(airflow, "go_stream", "relay__k1")
    assert run(program, "stream", "{}", REDIS_ADDR=f"127.0.0.1:{stopped_port()}").returncode == 75

    url = request.getfixturevalue("gateway")
    done = run(program, "http", "go_http", json.dumps({"conf": ODD}), "go-1", DAGRELAY_URL=url)
    assert done.returncode == 0, done.stdout + done.stderr
    started(airflow, "go_http", json.loads(done.stdout)["dag_run_id"])
    assert run(program, "http", "go_http", '{"conf": 1}', "go-2", DAGRELAY_URL=url).returncode == 65


# Python


def test_python_asks_over_a_stream_without_our_package(
    listener: Process, valkey: Valkey, airflow: FakeAirflow
):
    message = json.dumps({"dag_id": "python_stream", "conf": ODD, "key": "k1"})
    done = run(ROOT / ".venv/bin/python", EXAMPLES / "python/stream.py", message, REDIS_URL=valkey.url)
    assert done.returncode == 0, done.stderr
    started(airflow, "python_stream", "relay__k1")
