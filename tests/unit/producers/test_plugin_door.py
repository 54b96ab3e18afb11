"""The door beside an Airflow component: its settings, and what becomes of it; without any Airflow."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

import pytest

from producers.airflow import door
from producers.airflow.door import Door, arguments, component_of
from producers.errors import ConfigurationError

CANARY = "c4n4ry-s3cret"


@pytest.mark.parametrize(
    ("argv", "component"),
    [
        (["/bin/airflow", "scheduler"], "scheduler"),
        (["/x/airflow/__main__.py", "triggerer", "--skip-serve-logs"], "triggerer"),
        (["/bin/airflow", "tasks", "run", "scheduler"], "tasks"),
        (["gunicorn: worker"], ""),
        ([], ""),
    ],
)
def test_the_component_is_what_the_command_line_starts(argv, component):
    assert component_of(argv) == component


def test_each_variable_is_an_option_of_dagrelay_socket():
    environ = {
        "DAGRELAY_PLUGIN_COMPONENT": "scheduler",
        "DAGRELAY_PLUGIN_PORT": "7701",
        "DAGRELAY_PLUGIN_KEYS": "/etc/keys",
        "DAGRELAY_PLUGIN_MAX_CONNECTIONS": "100",
        "DAGRELAY_PLUGIN_INSECURE": "False",
        "DAGRELAY_PLUGIN_RULES": "",
        "DAGRELAY_REDIS_URL": "redis://host",
    }
    assert arguments(environ) == ["--port=7701", "--keys=/etc/keys", "--max-connections=100"]
    assert arguments({"DAGRELAY_PLUGIN_INSECURE": "true"}) == ["--insecure"]
    tls = {"DAGRELAY_PLUGIN_TLS_CERT": "/c.pem", "DAGRELAY_PLUGIN_TLS_KEY": "/k.pem"}  # as doors.md has it
    assert arguments(tls) == ["--certfile=/c.pem", "--keyfile=/k.pem"]


def test_variables_that_say_nothing_are_all_named_at_once():
    with pytest.raises(ConfigurationError) as told:
        arguments({"DAGRELAY_PLUGIN_PROT": "7701", "DAGRELAY_PLUGIN_INSECURE": "perhaps"})

    assert "DAGRELAY_PLUGIN_PROT: is no setting, those are CERTFILE" in str(told.value)
    assert "DAGRELAY_PLUGIN_INSECURE: is neither true nor false" in str(told.value)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"DAGRELAY_PLUGIN_PROT": "1"}, "dagrelay: DAGRELAY_PLUGIN_PROT: is no setting"),
        ({"DAGRELAY_PLUGIN_PORT": "many"}, "'many' is not a valid integer range"),
        ({"DAGRELAY_PLUGIN_KEYS": "/nowhere"}, "dagrelay: "),
        ({}, "dagrelay: "),  # no keys, and not said to do without
    ],
)
def test_bad_settings_end_the_door_with_a_line_that_names_them(environ, said):
    done = subprocess.run(
        [sys.executable, "-m", "producers.airflow.door", str(os.getpid())],
        env={"PATH": os.environ["PATH"], "DAGRELAY_REDIS_URL": f"redis://x:{CANARY}@127.0.0.1:1", **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert CANARY not in done.stderr


def test_a_door_that_cannot_be_started_is_told_and_harms_nobody(monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    made = Door("scheduler")

    made.start()
    made.stop()

    assert "no TCP door: it cannot be started" in caplog.text


def test_a_door_that_ends_by_itself_is_told(monkeypatch, caplog):
    monkeypatch.setenv("DAGRELAY_PLUGIN_PROT", "1")
    made = Door("scheduler")
    with caplog.at_level(logging.INFO):
        made.start()
        deadline = time.monotonic() + 60
        while "the TCP door has ended" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)

    assert "component=scheduler code=78" in caplog.text
    assert made.pid is None


def test_a_fork_of_the_host_leaves_the_door_alone(monkeypatch):
    made = Door("scheduler")
    ended = []
    made._process = type("Process", (), {"terminate": lambda self: ended.append(1)})()
    monkeypatch.setattr(door.os, "getpid", lambda: made.host_pid + 1)

    made.stop()

    assert not ended
