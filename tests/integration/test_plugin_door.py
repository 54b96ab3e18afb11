"""The plug-in's door beside a host process, which need not be an Airflow: how both end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from local.process import ROOT, clean_env, free_port
from tests.integration.test_trigger import until

pytestmark = pytest.mark.integration

HOST = """
import sys, time
from producers.airflow.door import Door
door = Door("scheduler")
door.start()
print(door.pid, flush=True)
sys.stdin.readline()
began = time.monotonic()
door.stop()
print(time.monotonic() - began, flush=True)
sys.stdin.readline()
"""


class Host:
    """A process with the door beside it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port
        self.door = int(self.line())

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def stop_door(self) -> float:
        """Have the host stop its door; return how long that took it."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.line())

    def connect(self) -> socket.socket:
        def tried() -> socket.socket | None:
            try:
                return socket.create_connection(("127.0.0.1", self.port), timeout=20)
            except OSError:
                return None

        return until(tried, 60)  # type: ignore[return-value]


@contextmanager
def host(url: str, port: int, log: Path) -> Iterator[Host]:
    env = clean_env(
        DAGRELAY_REDIS_URL=url,
        DAGRELAY_PLUGIN_PORT=str(port),
        DAGRELAY_PLUGIN_INSECURE="1",
        PYTHONPATH=str(ROOT),
    )
    with (
        log.open("ab") as output,
        subprocess.Popen(
            [sys.executable, "-c", HOST],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        ) as process,
    ):
        try:
            yield Host(process, port)
        finally:
            process.kill()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_kill_9_of_the_host_leaves_nothing(valkey, tmp_path):
    with host(valkey.url, free_port(), tmp_path / "log") as one:
        one.connect().close()
        os.kill(one.process.pid, signal.SIGKILL)

        until(lambda: gone(one.door))


def test_a_host_that_died_before_the_door_was_up_leaves_nothing(valkey, tmp_path):
    with host(valkey.url, free_port(), tmp_path / "log") as one:
        os.kill(one.process.pid, signal.SIGKILL)

        until(lambda: gone(one.door))


def test_what_was_sent_is_answered_before_the_door_ends(valkey, tmp_path):
    with host(valkey.url, free_port(), tmp_path / "log") as one, one.connect() as sender:
        for number in range(50):
            sender.sendall(b'{"dag_id": "simple", "key": "k%d"}\n' % number)
        with sender.makefile("r") as answers:
            first = answers.readline()
            one.stop_door()
            said = [first, *answers.readlines()]

    assert all(line.startswith("OK ") for line in said)
    until(lambda: gone(one.door))


def test_the_end_of_the_host_waits_for_no_redis_that_hangs(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        with host(url, free_port(), tmp_path / "log") as one, one.connect() as sender:
            sender.sendall(b'{"dag_id": "simple"}\n' * 1000)
            time.sleep(0.2)
            assert one.stop_door() < 5  # 0.8 s on a machine with nothing else to do
            assert one.process.poll() is None


def test_kill_9_of_the_door_is_told_and_the_host_goes_on(valkey, tmp_path):
    log = tmp_path / "log"
    with host(valkey.url, free_port(), log) as one:
        one.connect().close()
        os.kill(one.door, signal.SIGKILL)

        until(lambda: "the TCP door has ended" in log.read_text())
        assert "code=-9" in log.read_text()
        assert one.process.poll() is None
        assert one.stop_door() < 5
