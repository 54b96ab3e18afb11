"""`python -m tasks.redis_transport`: parked tasks and the quarantine, from a shell."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import redis

import tests.import_tasks  # noqa: F401 - before `tasks`, which reads its settings
from local.process import clean_env
from tasks.redis_transport import Keys, Lot
from tests.worker import ROOT

MESSAGE = json.dumps({"headers": {"task": "add", "id": "t1"}, "body": "[[], {}, {}]", "properties": {}})


@pytest.fixture
def lot(valkey):
    with redis.Redis.from_url(valkey.url) as client:
        yield Lot(client, Keys("", "dagrelay"))


@pytest.fixture
def run(valkey):
    def run_(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "tasks.redis_transport", *arguments],
            env=clean_env(DAGRELAY_REDIS_URL=valkey.url),
            cwd=ROOT,
            capture_output=True,
            check=False,
        )

    return run_


def park(lot: Lot, task_id: str = "t1") -> None:
    lot.park(task_id, due=time.time() + 3600, retries=2, queue_key="q", message=MESSAGE.encode())


def test_what_is_parked_is_listed(lot, run):
    park(lot)

    assert b" t1  add  retries=2" in run("parked").stdout
    assert json.loads(run("parked", "-o", "json").stdout)["task_id"] == "t1"


def test_a_parked_task_is_sent_on_early(lot, run):
    park(lot)

    assert run("wake", "t1", "nobody").stdout.startswith(b"1 of 2")
    assert lot.move_due()[0] == 1
    assert run("wake", "t1").returncode == 1


def test_a_parked_task_is_revoked(lot, run):
    park(lot)

    assert run("revoke", "t1").returncode == 0
    lot.move_due()
    (left,) = lot._client.lrange("q", 0, -1)
    assert json.loads(left)["headers"]["parked_revoked"] is True


def test_what_is_in_quarantine_is_listed_shown_and_put_back(lot, run):
    raw = b"no \xff JSON"
    lot.quarantine(raw, queue_key="q", reason="no JSON: Expecting value")

    number = run("quarantine", "list").stdout.split()[0].decode()
    assert b"no JSON: Expecting value" in run("quarantine", "list").stdout
    assert run("quarantine", "show", number).stdout == raw
    assert run("quarantine", "replay", number).returncode == 0
    assert lot._client.lrange("q", 0, -1) == [raw]
    assert run("quarantine", "replay", number).returncode == 1


def test_a_redis_that_does_not_answer_is_told(run, valkey):
    valkey.stop()

    assert run("parked").returncode == 69
