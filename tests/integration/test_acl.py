"""The rules of `deploy/redis/users.acl`: each role can do its work with them, and a producer nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from local.process import ROOT, Process, clean_env, free_port
from local.valkey import Valkey
from producers import fan_out
from producers.client import RelayClient
from producers.contract import TriggerRequest
from producers.errors import DagNotFound
from producers.settings import ProducerSettings
from producers.stores.claim_check import PIECE_BYTES
from producers.stores.lines import Lines
from producers.stores.waits import Waits
from tests.fake_airflow import FakeAirflow
from tests.fake_service import FakeService
from tests.integration.gateway import GatewayProcess
from tests.integration.test_trigger import until
from tests.worker import Worker

USERS = ROOT / "deploy/redis/users.acl"
PASSWORD = "an-0perators-s3cret"
LOGIN = {"Authorization": "Basic " + b64encode(f"dagrelay:{PASSWORD}".encode()).decode()}


@dataclass(frozen=True)
class Scene:
    valkey: Valkey
    airflow: FakeAirflow
    worker: Worker

    def url(self, user: str) -> str:
        return self.valkey.url.replace("redis://", f"redis://{user}:{PASSWORD}@")

    def redis(self, user: str) -> Redis:
        return Redis.from_url(self.url(user), decode_responses=True)

    def dagrelay(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = clean_env(DAGRELAY_REDIS_URL=self.url("operator"), AIRFLOW_CONN_DEFAULT=self.airflow.conn_uri)
        argv = [sys.executable, "-m", "producers.cli", *arguments]
        return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    def denied(self) -> set[tuple[str, str, str]]:
        """What was refused since the last time, to whom."""
        with self.redis("admin") as admin:
            found = {(one["username"], one["reason"], one["object"]) for one in admin.acl_log()}
            admin.acl_log_reset()
        return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A Valkey that has loaded the file as it is, but for the passwords, and a worker with its own user."""
    folder = tmp_path_factory.mktemp("acl")
    users = folder / "users.acl"
    users.write_text("user default on nopass ~* &* +@all\n")  # until it is up
    with Valkey(config={"aclfile": str(users)}) as valkey, FakeAirflow() as airflow:
        text = USERS.read_text()
        for name in ("admin", "producer", "gateway", "listener", "worker", "operator", "flower"):
            assert f"user {name} on >CHANGE-{name} " in text
            text = text.replace(f">CHANGE-{name} ", f">{PASSWORD} ")
        users.write_text(text)
        with Redis.from_url(valkey.url) as anybody:
            anybody.acl_load()
        url = valkey.url.replace("redis://", f"redis://worker:{PASSWORD}@")
        env = {"DAGRELAY_FAN_OUT_WATCH_S": "0.5", "DAGRELAY_MISSING_GRACE_S": "0"}
        connections = {"default": airflow.conn_uri}
        with Worker(url, folder, connections=connections, alone=False, **env) as worker:
            yield Scene(valkey, airflow, worker)


@pytest.fixture
def relay(scene: Scene) -> Iterator[RelayClient]:
    """A producer with its own user."""
    scene.airflow.forget()
    client = RelayClient(ProducerSettings(redis_url=scene.url("producer"), client_name="tests@here"))
    yield client
    client.redis.close()


def test_a_producer_and_a_worker_do_all_that_they_have_to(scene, relay):
    airflow = scene.airflow
    airflow.missing = {"nowhere"}
    assert relay.enqueue(TriggerRequest("sales", key="k1")).get(timeout=60).created
    assert all(one.get(timeout=60) for one in relay.enqueue_many([TriggerRequest("sales") for _ in range(3)]))
    with pytest.raises(DagNotFound):
        relay.enqueue(TriggerRequest("nowhere")).get(timeout=60)
    later = relay.enqueue(TriggerRequest("sales"), countdown=0.5, link=None, expires=60)
    assert later.get(timeout=60).created
    assert later.state == "done"

    waits = relay.enqueue(TriggerRequest("sales", key="w", wait=True))
    until(lambda: ("sales", "relay__w") in airflow.runs)
    airflow.runs["sales", "relay__w"]["state"] = "success"
    assert waits.get(timeout=60).state == "success"

    fan = fan_out([{"dag_id": "sales", "key": f"f{n}"} for n in range(300)], relay=relay)
    assert {one.state for one in fan.get(timeout=60)} == {"done"}
    assert fan.progress() == (300, 300)
    assert relay.wake("nobody/waits", {"for": "it"}) == 0
    assert scene.denied() == set()


def test_a_producer_stores_confs_and_reads_those_whose_reference_it_has(scene, relay):
    large = {"noise": os.urandom(2 * PIECE_BYTES).hex()}
    run = relay.enqueue(TriggerRequest("sales", large)).get(timeout=60)
    there = scene.airflow.runs["sales", run.dag_run_id]["conf"]
    assert relay.resolve_conf(there) == large
    relay.enqueue(TriggerRequest("sales", there)).get(timeout=60)
    conf = {"a": "x" * 50_000}
    fan = fan_out([{"dag_id": "sales", "conf": conf}, {"dag_id": "sales", "conf": there}], relay=relay)
    assert {one.state for one in fan.get(timeout=60)} == {"done"}
    for user in ("gateway", "listener"):
        other = RelayClient(ProducerSettings(redis_url=scene.url(user), client_name="tests@here"))
        assert other.enqueue(TriggerRequest("sales", {**large, "user": user})).id
        other.redis.close()
    assert scene.denied() == set()


def test_a_listener_accepts_puts_aside_and_tells(scene, relay, tmp_path):
    """Its stream lies in another Redis: what it may there is for that one to say."""
    with Valkey() as broker:
        sent = Redis.from_url(broker.url, decode_responses=True)
        url = f"{broker.url}?stream=in&claim_after_s=0.5"
        env = clean_env(DAGRELAY_REDIS_URL=scene.url("listener"), DAGRELAY_LISTEN_URL=url)
        argv = [sys.executable, "-m", "producers.cli", "listen"]
        listener = Process(argv, log=tmp_path / "listener", env=env, cwd=ROOT, name="listener")
        try:
            for number in range(3):
                body = json.dumps({"dag_id": "sales", "key": f"l{number}", "reply_to": "replies"})
                sent.xadd("in", {"data": body})
            sent.xadd("in", {"data": "no JSON"})
            until(lambda: sent.xlen("in.dead") == 1)
            until(lambda: told(sent).count("ended") == 3)
            assert told(sent).count("accepted") == 3
        finally:
            assert listener.stop() == 0
        argv += ["--answers", "render"]
        listener = Process(argv, log=tmp_path / "answers", env=env, cwd=ROOT, name="listener")
        try:
            sent.xadd("in", {"data": "{}", "correlation_id": "nobody"})
            until(
                lambda: (
                    not sent.xpending("in", "dagrelay")["pending"] and sent.xinfo_groups("in")[0]["lag"] == 0
                )
            )
        finally:
            assert listener.stop() == 0
    assert scene.denied() == set()


def told(broker: Redis) -> list[str]:
    """What a listener has told so far."""
    return [json.loads(fields["data"])["what"] for _, fields in broker.xrange("replies")]


def test_a_gateway_takes_what_it_has_to(scene, relay, tmp_path):
    secret = {"DAGRELAY_CALLBACK_SECRET": "c" * 40}
    with ExitStack() as stack:
        service = stack.enter_context(FakeService())
        gateway = stack.enter_context(GatewayProcess(scene.url("gateway"), tmp_path, **secret))
        env = {"DAGRELAY_SERVICE_TRAIN": service.variable, **secret}
        env["DAGRELAY_CALLBACK_URL"] = f"http://127.0.0.1:{gateway.port}"
        scene.worker.stop()  # which knows no service
        stack.callback(scene.worker.start)
        connections = {"default": scene.airflow.conn_uri}
        stack.enter_context(
            Worker(scene.url("worker"), tmp_path, connections=connections, name="calls", alone=False, **env)
        )
        lines = b'{"dag_id": "sales"}\n{"dag_id": "sales"}\n'
        fan = gateway.ask("POST", "/v1/fan-out", lines, Content_Type="application/x-ndjson")
        run = gateway.run("sales")
        again = gateway.run("sales", Idempotency_Key="one")
        submit = {"path": "/jobs?ref={reference}", "body": {"callback": "{callback_url}"}, "job_id": "id"}
        job = gateway.ask("POST", "/v1/jobs", {"service": "train", "submit": submit, "heartbeat_s": 60})
        assert {one.status for one in (fan, run, again, job)} == {202}
        until(lambda: service.posts)
        path = "/v1/callbacks/" + str(service.posts[0][1]["callback"]).partition("/v1/callbacks/")[2]
        for said in ({"state": "running", "progress": 5}, {"state": "done"}):
            assert gateway.ask("POST", path, said, token=None).status == 202
        assert relay.handle(job.body["id"]).get(timeout=60).state == "done"
        for one in (fan, run, again):
            until(lambda one=one: gateway.ask("GET", f"/v1/tasks/{one.body['id']}").body["state"] == "done")
        assert gateway.ask("DELETE", f"/v1/tasks/{run.body['id']}").status == 409  # it has ended
    assert scene.denied() == set()


def test_a_producer_cancels_what_waits_wherever_it_does(scene, relay):
    parked = relay.enqueue(TriggerRequest("sales"), countdown=3600)
    until(lambda: parked.record().state == "accepted" and Waits(scene.redis("admin")).get(parked.id))
    running = relay.enqueue(TriggerRequest("sales", key="run", wait=True))
    until(lambda: running.record().waits_for)
    many = fan_out([{"dag_id": "sales", "wait": True} for _ in range(3)], relay=relay)
    until(lambda: all(one.record().waits_for for one in many.handles))
    relay.enqueue(TriggerRequest("sales")).get(timeout=60)  # the connection is known
    lines = Lines(Redis.from_url(scene.url("operator")))
    lines.hold("default", "maintenance", "tests@here")
    in_line = relay.enqueue(TriggerRequest("sales"))
    until(lambda: in_line.record().state == "waiting")

    for handle in (parked, running, in_line):
        handle.cancel()
    many.cancel()
    until(lambda: {one.state for one in (parked, running, in_line, *many.handles)} == {"cancelled"})
    assert any("cancel asked by tests@here" in words for _, words in in_line.history())
    assert lines.release("default") == "maintenance"
    assert scene.denied() == set()


def test_an_operator_has_all_of_the_command(scene, relay):
    scene.airflow.missing = {"nowhere"}
    failed = relay.enqueue(TriggerRequest("nowhere", key="dead"))
    waiting = relay.enqueue(TriggerRequest("sales"), countdown=3600)
    until(lambda: failed.state == "failed")

    doctor = scene.dagrelay("doctor")
    assert "ok   workers" in doctor.stdout, doctor.stdout
    assert failed.id in scene.dagrelay("dead", "list").stdout
    scene.airflow.missing = set()
    assert scene.dagrelay("dead", "replay", failed.id, "--yes").returncode == 0
    until(lambda: ("nowhere", "relay__dead") in scene.airflow.runs)
    assert waiting.id in scene.dagrelay("parked").stdout
    assert scene.dagrelay("wake", waiting.id).returncode == 0
    assert waiting.get(timeout=60).created
    sent = scene.dagrelay("trigger", "sales", "--until-created")
    assert sent.returncode == 0, sent.stderr
    for command in (["status", failed.id], ["health", "--progress"]):
        done = scene.dagrelay(*command)
        assert done.returncode == 0, done.stderr
    assert scene.denied() == set()


def test_flower_sees_tasks_and_revokes_them(scene, relay, tmp_path):
    port = free_port()
    flower = Process(
        [sys.executable, "-m", "celery", "-A", "tasks", "flower", "--conf=flowerconfig.py"],
        log=tmp_path / "flower.log",
        env=clean_env(
            DAGRELAY_REDIS_URL=scene.url("flower"),
            DAGRELAY_FLOWER_PORT=str(port),
            DAGRELAY_FLOWER_PASSWORD=PASSWORD,
        ),
        cwd=ROOT,
        name="flower",
    )

    def page(path: str, data: bytes | None = None) -> str:
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data, headers=LOGIN)
            with urllib.request.urlopen(request, timeout=20) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    try:
        flower.wait_until(lambda: page("/healthcheck") == "OK", timeout_s=60, what="answering")
        until(lambda: "w1@" in page("/api/workers?refresh=1"), timeout_s=60)

        sent: list[str] = []

        def seen() -> bool:
            one = relay.enqueue(TriggerRequest("sales"))
            one.get(timeout=60)
            sent.append(one.id)
            shown = page("/api/tasks")  # events come when they come: that of an earlier one will do
            return any(task_id in shown for task_id in sent)

        until(seen, timeout_s=60)
        assert '"triggers"' in page("/api/queues/length")
        waiting = relay.enqueue(TriggerRequest("sales"), countdown=3600)
        until(lambda: Waits(scene.redis("admin")).get(waiting.id))
        assert "Revoked" in page(f"/api/task/revoke/{waiting.id}", b"")
        until(lambda: waiting.state == "cancelled", timeout_s=60)
    finally:
        flower.stop()
    assert scene.denied() == set()


READS = """return redis.call('HGETALL', 'dagrelay:parked')"""
DROPS = """return redis.call('DEL', 'triggers')"""
MORE: dict[str, tuple[Any, ...]] = {
    # To read what others have asked for.
    "list the keys": ("KEYS", "*"),
    "scan the keys": ("SCAN", "0"),
    "read a queue": ("LRANGE", "triggers", "0", "-1"),
    "take from a queue": ("LPOP", "triggers"),
    "move a queue": ("BLMOVE", "triggers", "dagrelay:wake:x", "LEFT", "RIGHT", "0"),
    "copy a queue": ("COPY", "triggers", "dagrelay:wake:x"),
    "dump a queue": ("DUMP", "triggers"),
    "read all that waits": ("HGETALL", "dagrelay:parked"),
    "read all that waits, otherwise": ("HVALS", "dagrelay:parked"),
    "list what waits": ("ZRANGE", "dagrelay:due", "0", "-1"),
    "list what waits, otherwise": ("HKEYS", "dagrelay:parked"),
    "list what is looked at": ("ZRANGE", "dagrelay:looks:airflow:default", "0", "-1"),
    "read what waits by a script": ("EVAL", READS, "1", "dagrelay:parked"),
    "read what a worker holds": ("HGETALL", "dagrelay:held:x"),
    "read a dead letter": ("HGETALL", "dagrelay:dead:x"),
    "list the confs that are stored": ("SCAN", "0", "MATCH", "dagrelay:conf:*"),
    "see who holds a conf": ("SMEMBERS", "dagrelay:conf:x:held"),
    "let go of a conf for somebody else": ("SREM", "dagrelay:conf:x:held", "y"),
    "make something else a conf": ("RENAME", "dagrelay:record:x", "dagrelay:conf:x"),
    "list dead letters": ("ZRANGE", "dagrelay:dead", "0", "-1"),
    "read the quarantine": ("HGETALL", "dagrelay:quarantine"),
    # To lose or change it.
    "delete a queue": ("DEL", "triggers"),
    "delete a queue by a script": ("EVAL", DROPS, "1", "triggers"),
    "rename a queue": ("RENAME", "triggers", "dagrelay:wake:x"),
    "cut a queue": ("LTRIM", "triggers", "1", "0"),
    "have a queue expire": ("EXPIRE", "triggers", "0"),
    "set a queue": ("SET", "triggers", "x"),
    "clear what is due": ("ZREMRANGEBYSCORE", "dagrelay:due", "-inf", "+inf"),
    "clear a line": ("ZREMRANGEBYSCORE", "dagrelay:line:default", "-inf", "+inf"),
    "delete what waits": ("DEL", "dagrelay:parked"),
    "end somebody else's task": ("SET", "celery-task-meta-x", "{}"),
    "hold an Airflow": ("HSET", "dagrelay:airflow:default", "held", "maintenance"),
    "take slots": ("ZADD", "dagrelay:slots:default", "9e9", "x"),
    "take a lease": ("ZADD", "dagrelay:leases", "9e9", "x"),
    # To speak with workers, and to be more.
    "command the workers": ("PUBLISH", "/0.celery.pidbox", "{}"),
    "tell what they are told": ("PUBLISH", "celery-task-meta-x", "{}"),
    "hear everything": ("PSUBSCRIBE", "*"),
    "hear the events": ("SUBSCRIBE", "/0.celeryev/task.multi"),
    "another queue": ("LPUSH", "celery", "x"),
    "a key of its own": ("SET", "mine", "x"),
    "empty it": ("FLUSHDB",),
    "read the settings": ("CONFIG", "GET", "*"),
    "change them": ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"),
    "read the rules": ("ACL", "LIST"),
    "change the rules": ("ACL", "SETUSER", "producer", "+@all"),
    "see all commands": ("MONITOR",),
    "see the others": ("CLIENT", "LIST"),
    "throw them out": ("CLIENT", "KILL", "TYPE", "normal"),
    "stop it": ("SHUTDOWN", "NOSAVE"),
    "make it a replica": ("REPLICAOF", "127.0.0.1", "1"),
    "a function": ("FUNCTION", "LIST"),
}


@pytest.mark.parametrize("command", MORE.values(), ids=MORE)
def test_a_producer_can_do_nothing_else(scene, command):
    with scene.redis("producer") as producer, pytest.raises(RedisError) as refused:
        producer.execute_command(*command)

    assert "ermission" in str(refused.value)
    assert {user for user, *_ in scene.denied()} == {"producer"}


@pytest.mark.parametrize("user", ["worker", "operator", "flower"])
@pytest.mark.parametrize(
    "command",
    [
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("MONITOR",),
        ("KEYS", "*"),
        ("SET", "mine", "x"),
    ],
    ids=lambda command: command[0],
)
def test_no_role_but_the_administrator_rules_the_server(scene, user, command):
    with scene.redis(user) as client, pytest.raises(RedisError, match="ermission"):
        client.execute_command(*command)
    scene.denied()


@pytest.mark.parametrize(
    "command",
    [
        ("LRANGE", "triggers", "0", "-1"),
        ("LPUSH", "triggers", "x"),
        ("HGETALL", "dagrelay:parked"),
        ("GET", "dagrelay:x"),
    ],
    ids=" ".join,
)
def test_flower_reads_no_message_and_sends_none(scene, command):
    with scene.redis("flower") as flower, pytest.raises(RedisError, match="ermission"):
        flower.execute_command(*command)
    scene.denied()


@pytest.mark.parametrize("url", ["redis://", "redis://producer:wrong@", "redis://default:x@"])
def test_nobody_comes_in_without_a_password(scene, url):
    client = Redis.from_url(scene.valkey.url.replace("redis://", url))
    with client, pytest.raises((AuthenticationError, ResponseError)):
        client.ping()
    scene.denied()
