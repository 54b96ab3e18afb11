"""Requests that come by the doors, to a real Airflow: one run each, and whoever asked hears of its end."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from local.process import ROOT, Process, clean_env, free_port
from tests.system.stack import until

DAGRELAY = Path(sys.executable).with_name("dagrelay")
STREAM = "dag-triggers"


@pytest.fixture
def doors(shared, tmp_path) -> Iterator[dict[str, Any]]:
    """A listener, a gateway with a key, and the TCP door, beside the worker of the version."""
    redis_url = shared.valkey.url
    ports = {"gateway": free_port(), "socket": free_port()}
    keys = tmp_path / "keys.toml"
    env = clean_env(DAGRELAY_REDIS_URL=redis_url, DAGRELAY_GATEWAY_KEYS_FILE=str(keys))
    made = [str(DAGRELAY), "keys", "new", "tests", "--file", str(keys), "--dag", "quiet", "--dag", "echo"]
    token = subprocess.run(made, env=env, capture_output=True, text=True, check=True).stdout.strip()
    commands = {
        "listen": ("listen", f"{redis_url}?stream={STREAM}", "--dags", "quiet,echo"),
        "gateway": ("gateway", "--port", str(ports["gateway"])),
        "socket": ("socket", "--port", str(ports["socket"]), "--keys", str(keys)),
    }
    with ExitStack() as stack:
        for name, command in commands.items():
            log = tmp_path / f"{name}.log"
            process = Process([str(DAGRELAY), *command], log=log, env=env, cwd=ROOT, name=name)
            stack.callback(process.stop)
        for port in ports.values():
            until(lambda port=port: listens(port), "a door that listens")
        yield {**ports, "token": token}


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def posted(doors: dict[str, Any], path: str, body: Any, **headers: str) -> dict[str, Any]:
    sent = {"Authorization": f"Bearer {doors['token']}", "Content-Type": "application/json", **headers}
    url = f"http://127.0.0.1:{doors['gateway']}{path}"
    request = urllib.request.Request(url, json.dumps(body).encode(), sent, method="POST")
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status == 202
        found: dict[str, Any] = json.load(answer)
        return found


def test_a_request_by_each_door_is_one_run_and_tells_its_end(shared, airflow, doors):
    before = airflow.run_ids("echo")
    conf = {"from": "a door", "deep": [{"n": 1}]}
    message = {"dag_id": "echo", "conf": conf, "wait": True}

    with Redis.from_url(shared.valkey.url, decode_responses=True) as redis:
        for _ in range(2):  # sent twice, and one run
            fields = {"key": "door-stream", "reply_to": "replies", "correlation_id": "c1"}
            redis.xadd(STREAM, {"data": json.dumps({**message, **fields}), "id": "m1"})
        asked = [
            posted(doors, "/v1/dags/echo/runs", {"conf": conf, "wait": True}, **{"Idempotency-Key": "once"})
            for _ in range(2)
        ]
        assert asked[0] == asked[1]
        with (
            socket.create_connection(("127.0.0.1", doors["socket"]), timeout=20) as line,
            line.makefile() as said,
        ):
            body = json.dumps({**message, "key": "door-line"})
            line.sendall(f"AUTH {doors['token']}\n{body}\n{body}\n".encode())
            answers = [said.readline().split()[0] for _ in range(3)]
        assert answers == ["OK"] * 3

        wanted = {"relay__door-stream", "relay__door-line", asked[0]["dag_run_id"]}
        until(lambda: airflow.run_ids("echo") - before == wanted, "one run by each door")

        def told() -> dict[str, Any] | None:
            heard = [json.loads(fields["data"]) for _, fields in redis.xrange("replies")]
            return next((one for one in heard if one["what"] == "ended"), None)

        end = until(told, "told of its end", timeout_s=120)
    assert (end["state"], end["run"]["state"], end["correlation_id"]) == ("done", "success", "c1")
    url = f"http://127.0.0.1:{doors['gateway']}/v1/tasks/{asked[0]['id']}"

    def state() -> str:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {doors['token']}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return str(json.load(answer)["state"])

    until(lambda: state() == "done", "a run over HTTP that has ended", timeout_s=120)
    assert airflow.run_ids("echo") - before == wanted
    assert airflow.returned("echo", asked[0]["dag_run_id"], "say")["conf"] == conf
