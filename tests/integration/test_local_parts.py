"""The local parts leave nothing behind, and keep what they were given."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import redis

from local.postgres import Postgres, copy_data
from local.process import PartFailed, Process, clean_env
from local.supervisor import Supervisor
from local.valkey import Valkey

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.integration


def running(marker: str) -> list[str]:
    """The command lines that hold this text."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if marker in line]


def gone(marker: str, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while running(marker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def has_children(marker: str, count: int) -> bool:
    deadline = time.monotonic() + 10
    while len([line for line in running(marker) if line.startswith("sleep")]) < count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def marker() -> str:
    """Seconds to sleep that no other process of this machine sleeps."""
    return f"98765.{os.getpid()}{time.monotonic_ns() % 1_000_000:06d}"


def family(marker: str) -> list[str]:
    """A command that ignores TERM, with one child, and one grandchild in a session of its own."""
    script = f"trap '' TERM; (setsid sleep {marker} &); sleep {marker} & while :; do sleep {marker}; done"
    return ["sh", "-c", script]


def test_valkey_comes_back_with_its_data_on_its_port_after_kill_9():
    with Valkey() as valkey:
        url = valkey.url
        redis.Redis.from_url(url).set("accepted", "kept")

        valkey.kill()
        assert not valkey.alive
        valkey.start()

        assert valkey.url == url
        assert redis.Redis.from_url(url).get("accepted") == b"kept"


def test_valkey_refuses_instead_of_dropping_when_it_is_full():
    with Valkey(config={"maxmemory": "3mb"}) as valkey:
        client = redis.Redis.from_url(valkey.url)
        fill = client.pipeline(transaction=False)
        for number in range(100):
            fill.set(f"key{number}", "x" * 100_000)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            fill.execute()


def test_postgres_keeps_every_letter_and_its_data(tmp_path):
    postgres = Postgres(tmp_path / "pgdata", log=tmp_path / "log")
    try:
        postgres.start()
        assert postgres.sql("SHOW server_encoding") == "UTF8"
        postgres.sql("CREATE TABLE t AS SELECT 'Zürich ✓' AS x")
        postgres.stop()
        copy_data(tmp_path / "pgdata", tmp_path / "copy")
        postgres = Postgres(tmp_path / "copy", log=tmp_path / "log")
        postgres.start()
        assert postgres.sql("SELECT x FROM t") == "Zürich ✓"
        assert "127.0.0.1" not in postgres.sql("SHOW listen_addresses")
    finally:
        postgres.stop()


def test_a_port_that_somebody_has_is_no_start():
    with Valkey() as first, pytest.raises(PartFailed, match="Address already in use"):
        Valkey(port=first.port).start()


def test_a_command_that_does_not_end_is_killed_with_all_it_started(tmp_path, marker):
    process = Process(family(marker), log=tmp_path / "log")
    assert has_children(marker, 3)

    assert process.stop(grace_s=0.3) == -signal.SIGKILL
    assert running(marker) == []


def test_nothing_is_left_when_we_are_killed(tmp_path, marker):
    code = f"""
        import sys, threading, time
        from pathlib import Path
        from local.process import Process
        command = {family(marker)!r}
        started = []
        def start():
            started.append(Process(command, log=Path({str(tmp_path / "log")!r}), grace_s=0.5))
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        print("started", flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout.readline() == "started\n"
        assert has_children(marker, 3)
        parent.kill()

    assert gone(marker, within_s=5)


def test_a_process_outlives_the_thread_that_started_it(tmp_path):
    started = []
    thread = threading.Thread(target=lambda: started.append(Process(["sleep", "600"], log=tmp_path / "log")))
    thread.start()
    thread.join()
    time.sleep(0.3)

    assert started[0].alive
    assert started[0].stop() == -signal.SIGTERM


def test_a_command_that_is_not_there_is_said_by_name(tmp_path):
    with pytest.raises(PartFailed, match="no-such-command: No such file"):
        Process(["no-such-command"], log=tmp_path / "log")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives its processes to somebody else")
def test_what_root_gives_to_another_user_finds_its_way_through_private_folders(tmp_path):
    """As initdb looks for `postgres`: by access(), which heeds kept capabilities only where it is told to."""
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "private" / "file").touch()
    said = "import os, sys; print(os.getuid() != 0, os.access(sys.argv[1], os.R_OK))"
    argv = ["/usr/bin/env", "python3", "-c", said, tmp_path / "private" / "file"]
    process = Process(argv, log=tmp_path / "log", user="nobody")
    assert process.wait(30) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().split() == ["True", "True"]


def test_a_failure_is_told_by_what_this_start_has_said_and_not_by_what_one_before_did(tmp_path):
    log = tmp_path / "log"
    for word in ("before", "now"):
        process = Process([sys.executable, "-c", f"print({word!r}); raise SystemExit(3)"], log=log)
        assert process.wait(30) == 3
    told = str(process.failure("ended"))
    assert "now" in told
    assert "before" not in told
    assert "before" in log.read_text()


def test_parts_stop_in_reverse_order_and_a_death_is_told_with_its_log(tmp_path):
    said = []
    supervisor = Supervisor(said.append)
    supervisor.start("first", lambda: Process(["sleep", "600"], log=tmp_path / "first"))
    supervisor.start(
        "second", lambda: Process(["sh", "-c", "echo its last words; exit 3"], log=tmp_path / "2nd")
    )

    with pytest.raises(PartFailed, match=r"second ended by itself(?s:.*)its last words"):
        supervisor.watch()
    supervisor.stop()

    assert said == ["stopping second", "stopping first"]


def test_up_and_down(tmp_path):
    """Up, up again, a request, a death of its Redis, down, up with what was accepted, down."""
    # Nobody listens there: the request stays accepted, which is all that this test looks at.
    env = clean_env(DAGRELAY_LOCAL_STATE=str(tmp_path), AIRFLOW_CONN_DEFAULT="http://a:b@127.0.0.1:9")

    def up_py(command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "local.up", command],
            cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "up" / "up.log").read_text()
        return done.stdout

    assert up_py("down") == "not up\n"
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "lock").write_text(str(os.getpid()))  # of a stack that the machine's end took
    try:
        first = up_py("up")
        password = (tmp_path / "up" / "flower-password").read_text()
        assert password in first
        second = up_py("up")
        assert "already up" in second
        assert password not in second

        exported = (tmp_path / "up" / "env").read_text()
        url = exported.rpartition("=")[2].strip()
        client = redis.Redis.from_url(url)
        client.set("accepted", "kept")
        os.kill(client.info("server")["process_id"], signal.SIGKILL)
        deadline = time.monotonic() + 20
        while True:
            try:
                assert client.get("accepted") == b"kept"
                break
            except redis.exceptions.ConnectionError:
                assert time.monotonic() < deadline, (tmp_path / "up" / "up.log").read_text()
                time.sleep(0.1)
    finally:
        up_py("down")
    assert gone(str(tmp_path), within_s=1)

    up_py("up")
    try:
        assert redis.Redis.from_url(url).get("accepted") == b"kept"
    finally:
        up_py("down")
