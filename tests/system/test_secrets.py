"""A secret in a conf, and those of the connection, are nowhere but in the message and in Airflow."""

from __future__ import annotations

import base64
import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress

import pytest

from local.process import ROOT, Process, clean_env, free_port
from tests.system.stack import until

CANARY = "kanarienvogel-conf-7f3a"
FLOWER_PASSWORD = "kanarienvogel-flower-51c2"
CONF = {"password": CANARY, "deep": [{CANARY[:6]: f"x{CANARY}y"}], "n": 1}
LOGIN = {"Authorization": "Basic " + base64.b64encode(f"dagrelay:{FLOWER_PASSWORD}".encode()).decode()}
# Where a message itself lies until it is done; and what failed for good, until somebody has seen to it.
LETTERS = "dagrelay:dead:"
MESSAGES = ("triggers", "jobs", "looks", "dagrelay:parked", "dagrelay:held:", "dagrelay:hand:", LETTERS)


class Listening:
    """Everything that is published in Redis: events for Flower, results, control."""

    def __init__(self, redis) -> None:
        self.heard: list[str] = []
        self._pubsub = redis.pubsub(ignore_subscribe_messages=True)
        self._pubsub.psubscribe(**{"*": lambda message: self.heard.append(str(message["data"]))})
        self._thread = self._pubsub.run_in_thread(sleep_time=0.1, daemon=True)

    def stop(self) -> str:
        self._thread.stop()
        self._thread.join(10)
        self._pubsub.close()
        return readable("\n".join(self.heard))


@pytest.fixture
def flower(stack) -> Iterator[str]:
    """Flower for this test's Redis; its address."""
    port = free_port()
    process = Process(
        [sys.executable, "-m", "celery", "-A", "tasks", "flower", "--conf=flowerconfig.py"],
        log=stack.folder / "flower.log",
        env=clean_env(
            DAGRELAY_REDIS_URL=stack.valkey.url,
            DAGRELAY_FLOWER_PORT=str(port),
            DAGRELAY_FLOWER_PASSWORD=FLOWER_PASSWORD,
        ),
        cwd=ROOT,
        name="flower",
    )
    try:
        url = f"http://127.0.0.1:{port}"
        process.wait_until(lambda: page(f"{url}/healthcheck") is not None, timeout_s=60, what="answering")
        yield url
    finally:
        process.stop()


def test_a_secret_in_the_conf_is_nowhere_after_success_retry_rejection_and_failure(stack, airflow, flower):
    proxy = stack.proxy()
    tried = set()

    def rule(call):
        if call.makes_run and b"canary-retry" in call.body and call.body not in tried:
            tried.add(call.body)
            return "502 after"
        return "pass"

    proxy.rule = rule
    worker = stack.start_worker(
        proxy.conn_uri(airflow.username, airflow.password), DAGRELAY_LOG_LEVEL="DEBUG"
    )
    until(lambda: "flower_worker_online{" in (page(f"{flower}/metrics") or ""), "the worker seen by Flower")
    until(lambda: "w1@" in (page(f"{flower}/api/workers?refresh=1") or ""), "the worker asked by Flower")
    listening = Listening(stack.redis)

    ids = stack.hand_over(
        {"dag_id": "quiet", "key": "canary-ok", "conf": CONF},
        {"dag_id": "quiet", "key": "canary-retry", "conf": CONF},
        {"dag_id": "strict", "key": "canary-rejected", "conf": CONF | {"day": CANARY}},
        {"dag_id": "no_such_dag", "key": "canary-unknown", "conf": CONF},
        {"dag_id": "quiet", "key": "canary-later", "conf": CONF, "options": {"countdown": 3}},
    )
    stack.publish_raw("canary-invalid", {"v": 1, "dag_id": "quiet", "conf": [CANARY]})
    stack.publish_raw("canary-mistyped", {"v": 1, "dag_id": "quiet", "config": CONF})
    until(lambda: stack.record(ids[3]).get("state") == "waiting", "one that waits")
    # While some wait: everything in Redis but the messages themselves.
    seen_waiting = dump(stack.redis, but=MESSAGES)
    said = stack.outcomes([*ids, "canary-invalid", "canary-mistyped"])
    other = CONF | {"n": 2, "password": CANARY * 2}
    said.append(stack.trigger({"dag_id": "quiet", "key": "canary-ok", "conf": other}))

    ends = [one.get("error", "run") for one in said]
    assert ends[:5] == ["run", "run", "RequestRejected", "DagNotFound", "run"]
    assert ends[5:] == ["InvalidRequest", "InvalidRequest", "RunConflict"]
    all_ids = [one["id"] for one in said]
    until(lambda: (page(f"{flower}/api/tasks") or "").count('"uuid"') >= len(all_ids), "all tasks in Flower")

    places = {
        "outcomes": json.dumps(said, ensure_ascii=False),
        "worker's log": worker.text(),
        "Flower's log": (stack.folder / "flower.log").read_text(),
        "Redis while some wait": seen_waiting,
        "Redis at the end, messages and all": dump(stack.redis, but=(LETTERS,)),
        "published": listening.stop(),
        "the desk": "\n".join(
            stack.dagrelay("dead", *arguments).stdout
            for arguments in (("list",), ("list", "-o", "json"), ("show", all_ids[2]), ("show", all_ids[5]))
        ),
        "status": "\n".join(stack.dagrelay("status", one).stdout for one in (all_ids[2], all_ids[4])),
    } | {path: page(flower + path) or "" for path in flower_pages(all_ids)}
    for name, text in places.items():
        assert len(text) > 20, f"nothing was looked at: {name}"
        assert CANARY not in text, name
        assert airflow.password not in text, name
        assert FLOWER_PASSWORD not in text, name
        assert not re.search(r"eyJ[\w-]+\.eyJ", text), f"a token: {name}"  # a JSON Web Token's two halves
    assert all(one in places["published"] for one in all_ids)  # it did hear the events
    assert all(one in places["/api/tasks"] for one in all_ids)
    assert airflow.run("quiet", "relay__canary-ok")["conf"]["password"] == CANARY


def readable(text):
    """The text, and below it what stands in it as base64: so kombu packs the bodies of its messages."""
    packed = re.findall(r"[A-Za-z0-9+/]{24,}={0,2}", text)
    found = [text]
    for one in packed:
        with suppress(ValueError):
            found.append(base64.b64decode(one).decode(errors="replace"))
    return "\n".join(found)


def flower_pages(ids):
    order = "order[0][column]=0&order[0][dir]=asc&columns[0][data]=name"
    yield from ("/", "/workers", "/tasks", "/broker", "/metrics", "/api/tasks", "/api/workers")
    yield f"/tasks/datatable?draw=1&start=0&length=50&{order}"
    yield from (f"/task/{one}" for one in ids)
    yield from (f"/api/task/info/{one}" for one in ids)


def page(url):
    """What is there, or None while there is nothing."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=LOGIN), timeout=20) as answer:
            return answer.read().decode()
    except OSError:
        return None


def dump(redis, but=()):
    """Everything in a Redis as text, except the keys that begin so."""
    found = []
    for key in redis.scan_iter(count=1000):
        if key.startswith(tuple(but)) and but:
            continue
        read = {
            "string": lambda key: redis.get(key),
            "hash": lambda key: redis.hgetall(key),
            "list": lambda key: redis.lrange(key, 0, -1),
            "set": lambda key: list(redis.smembers(key)),
            "zset": lambda key: redis.zrange(key, 0, -1),
            "stream": lambda key: redis.xrange(key),
        }
        kind = redis.type(key)
        if kind != "none":  # it has gone meanwhile
            found.append(f"{key} {read[kind](key)}")
    return readable("\n".join(found))
