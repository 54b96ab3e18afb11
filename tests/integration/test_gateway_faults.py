"""The HTTP door when something fails: Redis is away, the gateway is killed or stopped; and how it starts."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis

from local.process import clean_env, free_port
from local.valkey import Valkey
from producers.contract import QUEUE_TRIGGERS
from tests.integration.gateway import DAGRELAY, Answer, GatewayProcess
from tests.integration.test_gateway import follow, read_events, until
from tests.standing import stand_still, standing_still

pytestmark = pytest.mark.integration


def test_while_redis_is_away_nothing_is_taken_and_the_answer_says_so(tmp_path):
    with Valkey() as valkey, GatewayProcess(valkey.url, tmp_path) as gateway:
        made = gateway.run()
        valkey.stop()
        asked = [
            gateway.run(Idempotency_Key='"k"'),
            gateway.ask("POST", "/v1/fan-out", b'{"dag_id":"a"}', Content_Type="application/x-ndjson"),
            gateway.ask("GET", made.headers["location"]),
            gateway.ask("DELETE", made.headers["location"]),
            gateway.ask("GET", made.body["events_url"]),
        ]
        for answer in asked:
            assert answer.status == 503, answer
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["content-type"] == "application/problem+json"
            assert str(valkey.port) not in answer.raw.decode()
        until(lambda: gateway.ask("GET", "/readyz").status == 503)
        assert gateway.ask("GET", "/livez").status == 200

        valkey.start()
        until(lambda: gateway.ask("GET", "/readyz").status == 200)
        assert gateway.run(Idempotency_Key='"k"').status == 202
        with Redis.from_url(valkey.url) as redis:
            assert redis.llen(QUEUE_TRIGGERS) == 2


def test_a_gateway_that_is_killed_again_and_again_loses_no_yes_and_makes_no_second_run(tmp_path):
    """Senders repeat what got no answer, with the same Idempotency-Key."""
    with Valkey() as valkey, GatewayProcess(valkey.url, tmp_path) as gateway:
        stop = threading.Event()
        answers: dict[str, list[Answer]] = {}

        def sender(name: str) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                key = f"{name}-{number}"
                told: list[Answer] = answers.setdefault(key, [])
                while not told or told[-1].status != 202 or len(told) < 1 + number % 2:
                    try:
                        told.append(gateway.run(body={"conf": {"key": key}}, Idempotency_Key=f'"{key}"'))
                    except (OSError, http.client.HTTPException):  # it was cut off
                        time.sleep(0.05)

        with ThreadPoolExecutor(8) as senders:
            running = [senders.submit(sender, f"s{number}") for number in range(8)]
            try:
                for _ in range(3):
                    time.sleep(1.0)
                    gateway.kill()
                    gateway.start()
                time.sleep(0.5)
            finally:
                stop.set()
            for one in running:
                one.result(timeout=60)
        assert len(answers) > 50
        assert {answer.status for told in answers.values() for answer in told} <= {202}
        assert all(len({answer.raw for answer in told}) == 1 for told in answers.values())
        with Redis.from_url(valkey.url) as redis:
            runs = [
                json.loads(json.loads(text)["body"])[1]["conf"]["key"]
                for text in redis.lrange(QUEUE_TRIGGERS, 0, -1)
            ]
        assert sorted(runs) == sorted(answers)


def test_it_stops_in_good_order_and_ends_its_streams(tmp_path):
    with Valkey() as valkey, GatewayProcess(valkey.url, tmp_path) as gateway:
        made = gateway.run()
        with follow(gateway, made.body["events_url"]) as line, gateway.connect() as slow:
            read_events(line, 1)
            head = (
                "POST /v1/dags/a/runs HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                f"Authorization: Bearer {gateway.token}\r\nContent-Length: 2\r\n"
                "Expect: 100-continue\r\n\r\n"
            )
            slow.sendall(head.encode())
            assert b" 100 " in slow.recv(4000)  # it is in hand
            slow.sendall(b"{")
            stopping = threading.Thread(target=gateway.stop)
            stopping.start()
            assert read_events(line, 1) == []
            slow.sendall(b"}")
            assert b" 202 " in slow.recv(4000)
        stopping.join(30)
        assert gateway.process.poll() == 0
        assert "Traceback" not in gateway.text()


def test_streams_have_their_number_and_who_goes_gives_a_place(tmp_path):
    with (
        Valkey() as valkey,
        GatewayProcess(valkey.url, tmp_path, DAGRELAY_GATEWAY_MAX_STREAMS="2") as gateway,
    ):
        path = gateway.run().body["events_url"]
        with follow(gateway, path) as one, follow(gateway, path) as two:
            assert len(read_events(one, 1) + read_events(two, 1)) == 2
            refused = gateway.ask("GET", path)
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")

        def there_is_a_place() -> bool:
            with follow(gateway, path) as line:
                return bool(read_events(line, 1))

        until(there_is_a_place)


def test_while_redis_is_frozen_everybody_hears_so_within_seconds(tmp_path):
    with Valkey() as valkey, GatewayProcess(valkey.url, tmp_path) as gateway:
        path = gateway.run().headers["location"]
        stand_still(valkey.pid)
        try:

            def timed(ask) -> float:
                began = time.monotonic()
                assert ask().status == 503
                return time.monotonic() - began

            with ThreadPoolExecutor(101) as many:
                looks = [many.submit(timed, lambda: gateway.ask("GET", path)) for _ in range(100)]
                until(lambda: gateway.text().count("status=503") >= 1)
                assert timed(gateway.run) < 4  # in its own thread: for no look's sake
                assert max(look.result() for look in looks) < 8
        finally:
            os.kill(valkey.pid, signal.SIGCONT)
        until(lambda: gateway.run().status == 202)


UNFINISHED = b"POST /v1/webhooks/none HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"


def test_who_has_no_key_keeps_nobody_out_who_has(tmp_path):
    env = {"DAGRELAY_GATEWAY_MAX_IN_FLIGHT": "8", "DAGRELAY_GATEWAY_MAX_STREAMS": "2"}
    with Valkey() as valkey, GatewayProcess(valkey.url, tmp_path, **env) as gateway:
        lines = [gateway.connect() for _ in range(20)]
        for line in lines:
            line.sendall(UNFINISHED)
        until(lambda: gateway.text().count("status=503") == 16)
        assert gateway.run().status == 202
        for line in lines:
            line.close()


def test_bodies_of_who_has_no_key_have_their_room_and_no_more(tmp_path):
    env = {"DAGRELAY_GATEWAY_MAX_BODY_BYTES": "1000"}
    with Valkey() as valkey, GatewayProcess(valkey.url, tmp_path, **env) as gateway:
        lines = [gateway.connect() for _ in range(40)]
        for line in lines:
            line.sendall(UNFINISHED + b"x" * 999)
        until(lambda: gateway.text().count("status=503") == 40 - 32_000 // 999)
        assert gateway.run().status == 202
        for line in lines:
            line.close()

        def has_room_again() -> bool:
            answer = gateway.ask("POST", "/v1/webhooks/none", b"x" * 900, token=None)
            return answer.status == 401

        until(has_room_again)


def test_several_processes_share_one_port(tmp_path):
    with Valkey() as valkey, GatewayProcess(valkey.url, tmp_path, "--workers", "2") as gateway:
        answers = {gateway.run(Idempotency_Key='"k"').raw for _ in range(20)}
        assert len(answers) == 1
        with Redis.from_url(valkey.url) as redis:
            assert redis.llen(QUEUE_TRIGGERS) == 1
        # One that says nothing for a while, as at its start on a busy machine, is not ended and begun anew.
        pid = gateway.process.pid
        parts = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        with standing_still(*map(int, parts)):
            time.sleep(8)
        assert gateway.ask("GET", "/livez").status == 200
        assert Path(f"/proc/{pid}/task/{pid}/children").read_text().split() == parts


@pytest.mark.parametrize(
    ("options", "env", "parts"),
    [
        ([], {}, ["DAGRELAY_GATEWAY_KEYS_FILE", "--insecure"]),
        (["--insecure", "--host", "0.0.0.0"], {}, ["DAGRELAY_GATEWAY_HOST"]),  # noqa: S104
        (["--keys", "none.toml", "--rules", "none.toml"], {}, ["keys: none.toml", "rules: none.toml"]),
        (
            ["--insecure", "--tls-cert", "a"],
            {"DAGRELAY_GATEWAY_WORKERS": "x", "DAGRELAY_REDIS_URL": "", "DAGRELAY_GATEWAY_MAX_STREAMS": "0"},
            ["_TLS_KEY", "_WORKERS is no number", "DAGRELAY_REDIS_URL", "_MAX_STREAMS"],
        ),
    ],
)
def test_it_names_every_mistake_and_does_not_start(tmp_path, options, env, parts):
    environ = clean_env(DAGRELAY_REDIS_URL="redis://127.0.0.1:1/0") | env
    done = subprocess.run(
        [DAGRELAY, "gateway", *options], env=environ, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 78
    for part in parts:
        assert part in done.stderr


def test_a_port_that_is_taken_is_named_with_what_to_do(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environ = clean_env(DAGRELAY_REDIS_URL="redis://127.0.0.1:1/0")
        done = subprocess.run(
            [DAGRELAY, "gateway", "--insecure", "--port", port],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 78
    assert f"port {port}" in done.stderr
    assert "give another --port" in done.stderr


def test_without_keys_it_is_for_this_machine_and_no_page_of_its_browser(tmp_path):
    with Valkey() as valkey:
        gateway = GatewayProcess(valkey.url, tmp_path)
        gateway.port = free_port()
        gateway._argv = [str(DAGRELAY), "gateway", "--insecure", "--port", str(gateway.port)]
        with gateway:
            assert gateway.run(token=None).status == 202
            for headers in (
                {"Origin": "http://127.0.0.1"},
                {"Sec_Fetch_Site": "cross-site"},
                {"Host": "evil.example:80"},
                {"Host": "["},
            ):
                assert gateway.run(token=None, **headers).status == 403, headers
