"""Webhooks that come in, at a real gateway: who may, once, in time, and what becomes of them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from standardwebhooks import Webhook as Official

from local.process import Process, clean_env, free_port
from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import PollRequest
from producers.queues.message import MAX_MESSAGE_BYTES
from producers.settings import ProducerSettings
from producers.stores.waits import Waits
from tests.fake_airflow import FakeAirflow
from tests.fake_service import FakeService
from tests.integration.test_trigger import until
from tests.worker import ROOT, Worker

pytestmark = pytest.mark.integration

DAGRELAY = ROOT / ".venv" / "bin" / "dagrelay"
USERS = ROOT / "deploy/redis/users.acl"

SECRET = "whsec_" + base64.b64encode(b"the first key of the shop's own").decode()
NEWER = "whsec_" + base64.b64encode(b"another key of the shop's own.").decode()
GITHUB_SECRET = "the-secret-of-the-forge"
STRIPE_SECRET = "whsec_of_the_payments"
CANARY = "c4n4ry-of-a-payload"

RULES = """
[[rules]]
type = "shop.order.*"
dag_id = "orders"
conf = "{order: data.data.id}"

[[rules]]
type = "code.push"
dag_id = "build_main"

[[rules]]
type = "pay.invoice.paid"
dag_id = "invoices"

[[rules]]
type = "shop.payroll"
dag_id = "payroll"
"""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Gateway:
    """`dagrelay gateway` in a process of its own."""

    def __init__(self, redis_url: str, folder: Path, **env: str) -> None:
        self.port = free_port()
        self.log = folder / "gateway.log"
        self._env = clean_env(DAGRELAY_REDIS_URL=redis_url, **env)
        self._argv = [str(DAGRELAY), "gateway", "--insecure", "--port", str(self.port)]
        self.process: Process | None = None

    def start(self) -> Gateway:
        self.process = Process(self._argv, log=self.log, env=self._env, cwd=ROOT, name="gateway")
        self.process.wait_until(self._answers, timeout_s=30, what="ready", every_s=0.05)
        return self

    def _answers(self) -> bool:
        try:
            return self.ask("GET", "/livez", {}, b"").status == 200
        except OSError:
            return False

    def ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {"content-type": "application/json", **headers})
            found = connection.getresponse()
            return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
        finally:
            connection.close()

    def post(self, name: str, headers: Mapping[str, str], body: bytes) -> Answer:
        return self.ask("POST", f"/v1/webhooks/{name}", headers, body)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    def stop(self) -> None:
        if self.process is not None and self.process.alive:
            self.process.stop()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("settings")
    (folder / "rules.toml").write_text(RULES)
    scope = {"dags": ["orders", "build_*"]}
    hooks = {
        "SHOP": {"scheme": "standard", "secrets": [NEWER, SECRET], "routes": True, "scope": scope},
        "CODE": {"scheme": "github", "secret": GITHUB_SECRET, "routes": True, "scope": scope},
        "PAY": {"scheme": "stripe", "secret": STRIPE_SECRET, "routes": True},
        "PLAIN": {"scheme": "standard", "secret": SECRET, "message": True},
        "RENDER": {"scheme": "standard", "secret": SECRET, "wake": "join('/', ['render', data.id])"},
    }
    found = {f"DAGRELAY_WEBHOOK_{name}": json.dumps(hook) for name, hook in hooks.items()}
    return {**found, "DAGRELAY_GATEWAY_RULES_FILE": str(folder / "rules.toml")}


@pytest.fixture(scope="module")
def running(
    settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Valkey, Gateway]]:
    with Valkey() as valkey:
        gateway = Gateway(valkey.url, tmp_path_factory.mktemp("gateway"), **settings)
        try:
            yield valkey, gateway.start()
        finally:
            gateway.stop()


@pytest.fixture
def gateway(running: tuple[Valkey, Gateway]) -> Gateway:
    return running[1]


@pytest.fixture
def relay(running: tuple[Valkey, Gateway]) -> Iterator[RelayClient]:
    client = RelayClient(ProducerSettings(redis_url=running[0].url, client_name="tests@here"))
    client.redis.flushdb()
    yield client
    client.redis.close()


def standard(
    body: bytes, name: str = "msg_1", *, at: float | None = None, secret: str = SECRET
) -> dict[str, str]:
    """Sign as the official library does."""
    when = datetime.fromtimestamp(at if at is not None else time.time(), UTC)
    return {
        "webhook-id": name,
        "webhook-timestamp": str(int(when.timestamp())),
        "webhook-signature": Official(secret).sign(name, when, body.decode()),
    }


def github(body: bytes, event: str = "push", name: str = "d-1") -> dict[str, str]:
    digest = hmac.new(GITHUB_SECRET.encode(), body, hashlib.sha256).hexdigest()
    return {"X-Hub-Signature-256": f"sha256={digest}", "X-GitHub-Event": event, "X-GitHub-Delivery": name}


def stripe(body: bytes, at: float | None = None) -> dict[str, str]:
    when = int(at if at is not None else time.time())
    digest = hmac.new(STRIPE_SECRET.encode(), f"{when}.".encode() + body, hashlib.sha256).hexdigest()
    return {"Stripe-Signature": f"t={when},v1={digest}"}


def shop(kind: str = "order.paid", **data: Any) -> bytes:
    return json.dumps({"type": kind, "timestamp": "2026-11-20T10:00:00Z", "data": {"id": 7, **data}}).encode()


def waiting(relay: RelayClient) -> int:
    return int(relay.redis.llen("triggers"))


def test_a_signed_delivery_is_a_request_once(gateway: Gateway, relay: RelayClient) -> None:
    body = shop(secret=CANARY)
    first = gateway.post("shop", standard(body), body)
    assert first.status == 202
    told = first.json()
    record = relay.record(told["id"])
    assert record is not None
    assert (record.dag_id, record.by, told["repeated"]) == ("orders", "shop@webhook", False)

    again = gateway.post("shop", standard(body, at=time.time() - 60, secret=NEWER), body)
    assert (again.status, again.json()) == (202, {**told, "repeated": True})
    other = gateway.post("shop", standard(body, "msg_2"), body)
    assert other.json()["repeated"] is False
    assert waiting(relay) == 2
    assert CANARY not in gateway.log.read_text()


def test_many_copies_at_once_are_one_request(gateway: Gateway, relay: RelayClient) -> None:
    body = shop()
    headers = standard(body)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: gateway.post("shop", headers, body), range(64)))
    assert {one.status for one in answers} == {202}
    assert sum(not one.json()["repeated"] for one in answers) == 1
    assert waiting(relay) == 1


def test_a_replay_of_github_with_other_headers_is_the_same_request(
    gateway: Gateway, relay: RelayClient
) -> None:
    body = json.dumps({"ref": "refs/heads/main", "head": "abc"}).encode()
    first = gateway.post("code", github(body), body)
    assert (first.status, first.json()["repeated"]) == (202, False)
    replay = gateway.post("code", github(body, name="d-2"), body)
    assert (replay.status, replay.json()["repeated"]) == (202, True)
    assert waiting(relay) == 1
    assert gateway.post("code", github(b'{"zen": "x"}', "ping"), b'{"zen": "x"}').status == 202
    assert waiting(relay) == 1


def test_an_event_of_stripe_is_known_by_its_id(gateway: Gateway, relay: RelayClient) -> None:
    body = b'{"id": "evt_1", "type": "invoice.paid"}'
    assert gateway.post("pay", stripe(body), body).json()["repeated"] is False
    assert gateway.post("pay", stripe(body, time.time() - 10), body).json()["repeated"] is True
    assert waiting(relay) == 1


def test_a_body_may_be_a_trigger_itself(gateway: Gateway, relay: RelayClient) -> None:
    body = b'{"dag_id": "daily", "conf": {"n": 1}, "key": "k1"}'
    told = gateway.post("plain", standard(body), body).json()
    assert told["dag_run_id"] == "relay__k1"
    assert gateway.post("plain", standard(body), body).json()["repeated"] is True
    wrong = b'{"dag_id": "daily", "reply_to": "x"}'
    answer = gateway.post("plain", standard(wrong, "msg_3"), wrong)
    assert (answer.status, answer.json()["detail"][:8]) == (422, "reply_to")
    job = b'{"service": "render", "path": "/jobs/1"}'
    assert gateway.post("plain", standard(job, "msg_4"), job).status == 403
    assert waiting(relay) == 1


def test_whoever_cannot_sign_learns_nothing(gateway: Gateway, relay: RelayClient) -> None:
    body = shop()
    good = standard(body)
    attempts = [
        ("nobody", good),
        ("shop", {}),
        ("shop", {**good, "webhook-signature": "v1,AAAA"}),
        ("shop", {**good, "webhook-id": "msg_2"}),
        ("shop", standard(body, secret="whsec_" + base64.b64encode(b"x" * 32).decode())),
        ("shop", {**standard(body, at=1.0), "webhook-signature": "v1,AAAA"}),
        ("code", good),
        ("pay", good),
        ("SHOP", good),
        ("shop%00", good),
        ("shop", {**good, "webhook-timestamp": "9" * 400}),
    ]
    answers = [gateway.post(name, headers, body) for name, headers in attempts]
    assert {one.status for one in answers} == {401}
    assert len({one.body for one in answers}) == 1
    assert len({tuple(sorted(name for name in one.headers)) for one in answers}) == 1
    assert waiting(relay) == 0
    log = gateway.log.read_text()
    for secret in (SECRET, NEWER, GITHUB_SECRET, STRIPE_SECRET):
        assert secret.removeprefix("whsec_") not in log
    assert "nobody" not in log


@pytest.mark.parametrize(("off_s", "words"), [(-400, "before our clock"), (400, "ahead of our clock")])
def test_what_is_out_of_time_is_refused(
    off_s: float, words: str, gateway: Gateway, relay: RelayClient
) -> None:
    body = shop()
    answer = gateway.post("shop", standard(body, at=time.time() + off_s), body)
    assert answer.status == 400
    assert words in answer.json()["detail"]
    assert gateway.post("pay", stripe(body, time.time() + off_s), body).status == 400
    assert waiting(relay) == 0


def test_refusals_say_what_would_be_right(gateway: Gateway, relay: RelayClient) -> None:
    for body, status, words in (
        (shop("unheard.of"), 422, "type: no routing rule"),
        (shop("payroll"), 403, "dag_id: 'payroll' is not among"),
        (b"{", 422, "body: is no JSON"),
        (b"\xff", 422, "body: is not UTF-8"),
    ):
        at = int(time.time())
        key = base64.b64decode(SECRET.removeprefix("whsec_"))
        digest = hmac.digest(key, f"m.{at}.".encode() + body, "sha256")
        signature = f"v1,{base64.b64encode(digest).decode()}"
        headers = {"webhook-id": "m", "webhook-timestamp": str(at), "webhook-signature": signature}
        answer = gateway.post("shop", headers, body)
        assert answer.status == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert words in answer.json()["detail"]
    assert waiting(relay) == 0


def test_a_body_over_the_limit_is_cut_off(gateway: Gateway) -> None:
    assert gateway.post("shop", {}, b"x" * (MAX_MESSAGE_BYTES + 1)).status == 413


def test_a_wake_reaches_the_task_that_waits(
    running: tuple[Valkey, Gateway], gateway: Gateway, relay: RelayClient, tmp_path: Path
) -> None:
    valkey = running[0]
    with FakeService() as service, FakeAirflow() as airflow:
        env = {"DAGRELAY_SERVICE_TRAIN": service.variable}
        body = json.dumps({"type": "render.done", "data": {"id": "7"}, "state": "done", "out": 42}).encode()
        early = gateway.post("render", standard(body), body)
        assert early.json() == {"woken": 0, "repeated": False}  # and it may come again
        with Worker(valkey.url, tmp_path, connections={"default": airflow.conn_uri}, **env):
            handle = relay.enqueue(
                PollRequest(
                    service="train",
                    path="/jobs/{job_id}",
                    submit={"path": "/jobs"},
                    wake_keys=["render/7"],
                    interval_s=60.0,
                    max_interval_s=60,
                    result="out",
                )
            )
            until(lambda: (found := handle.record()) is not None and found.waits_for)
            assert gateway.post("render", standard(body), body).json() == {"woken": 1, "repeated": False}
            assert handle.get(timeout=60).result == 42
            assert gateway.post("render", standard(body), body).json() == {"woken": 0, "repeated": True}
            assert not service.looks


def test_a_producers_rights_in_redis_are_enough(settings: dict[str, str], tmp_path: Path) -> None:
    """A gateway logs in to Redis as any other producer: `deploy/redis/users.acl`."""
    (line,) = [one for one in USERS.read_text().splitlines() if one.startswith("user producer ")]
    wake = json.dumps({"data": {"id": "7"}}).encode()
    with Valkey() as valkey, Redis.from_url(valkey.url, decode_responses=True) as admin:
        admin.execute_command("ACL", "SETUSER", *line.replace("CHANGE-producer", "pass").split()[1:])
        gateway = Gateway(valkey.url.replace("redis://", "redis://producer:pass@"), tmp_path, **settings)
        try:
            gateway.start()
            assert gateway.post("shop", standard(shop()), shop()).status == 202
            waits = Waits(RelayClient(ProducerSettings(redis_url=valkey.url, client_name="x")).redis)
            waits.register("t1", ["render/7"], 60.0)
            answers = [gateway.post("render", standard(wake), wake).json() for _ in range(2)]
            assert answers == [{"woken": 1, "repeated": False}, {"woken": 0, "repeated": True}]
            assert [one["reason"] + one["object"] for one in admin.acl_log()] == []
        finally:
            gateway.stop()


def test_while_redis_is_away_nothing_is_answered_yes(settings: dict[str, str], tmp_path: Path) -> None:
    body = shop()
    wake = json.dumps({"data": {"id": "7"}}).encode()
    with Valkey() as valkey:
        gateway = Gateway(valkey.url, tmp_path, **settings)
        try:
            gateway.start()
            valkey.kill()
            for name, sent in (("shop", body), ("render", wake)):
                answer = gateway.post(name, standard(sent), sent)
                assert (answer.status, answer.headers["retry-after"]) == (503, "1")
                assert str(valkey.port) not in answer.body.decode()
            valkey.start()
            until(lambda: gateway.post("shop", standard(body), body).status == 202)
        finally:
            gateway.stop()


def test_a_gateway_killed_after_it_took_a_delivery_takes_it_once(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """The sender has no answer, and sends it again to the next one."""
    with (
        Valkey() as valkey,
        RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here")).redis as redis,
    ):
        gateway = Gateway(valkey.url, tmp_path, **settings)
        try:
            gateway.start()
            sent: list[bytes] = []

            def send(number: int) -> None:
                body = shop(n=number)
                sent.append(body)
                with_name = f"msg_{number}"
                for _ in range(200):
                    try:
                        if gateway.post("shop", standard(body, with_name), body).status == 202:
                            return
                    except (OSError, http.client.HTTPException):
                        time.sleep(0.05)
                raise AssertionError("never taken")

            with ThreadPoolExecutor(8) as pool:
                done = [pool.submit(send, number) for number in range(120)]
                for _ in range(3):
                    threading.Event().wait(0.15)
                    gateway.kill()
                    gateway.start()
                for one in done:
                    one.result(timeout=60)
            assert redis.llen("triggers") == 120
        finally:
            gateway.stop()


def test_every_mistake_is_named_at_the_start_and_no_secret(tmp_path: Path) -> None:
    env = {
        "DAGRELAY_WEBHOOK_A": json.dumps({"scheme": "standard", "secret": CANARY, "routes": True}),
        "DAGRELAY_WEBHOOK_B": json.dumps({"scheme": "github", "secret": CANARY, "routes": True}),
    }
    log = tmp_path / "log"
    argv = [str(DAGRELAY), "gateway", "--insecure", "--port", str(free_port())]
    environ = clean_env(DAGRELAY_REDIS_URL="redis://127.0.0.1:1/0", **env)
    process = Process(argv, log=log, env=environ, cwd=ROOT, name="gateway")
    until(lambda: not process.alive)
    text = log.read_text()
    assert "DAGRELAY_WEBHOOK_A: secret: number 1 is no base64" in text
    assert "DAGRELAY_WEBHOOK_B: routes needs rules" in text
    assert CANARY not in text
