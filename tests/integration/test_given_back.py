"""Messages that were begun and did not end: they are told that they come again, and not for ever."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from producers.errors import OutcomeUnknown
from tests.integration.test_trigger import SALES, until

TASKS = ("-I", "tests.integration.dying")


def send(redis: Any, name: str, *args: Any) -> bytes:
    """Publish a task as a stock producer does; return its message."""
    message = {
        "body": json.dumps([args, {}, {}]),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": name, "id": f"id-{name}"},
        "properties": {"delivery_info": {"exchange": "", "routing_key": "triggers"}},
    }
    raw = json.dumps(message).encode()
    redis.lpush("triggers", raw)
    return raw


@pytest.mark.parametrize(
    ("pool", "how"), [("processes", "killed"), ("processes", "ended"), ("threads", "ended")]
)
def test_a_message_that_kills_what_runs_it_is_put_aside_after_ten_times(pool, how, relay, start_worker):
    raw = send(relay.redis, "tests.die", how)
    relay.redis.hset("dagrelay:returned", hashlib.sha1(raw, usedforsecurity=False).hexdigest(), 9)
    worker = start_worker(options=("-P", pool, "-c", "1", *TASKS))

    (letter,) = until(lambda: list(relay.dead.list()))

    assert relay.redis.llen("died") == 2
    until(lambda: relay.redis.hlen("dagrelay:returned") == 0)
    until(lambda: "11 workers could not end it" in worker.text())
    assert "11 workers could not end it" in letter.reason
    assert relay.dead.get(letter.id).raw == raw


@pytest.mark.parametrize("pool", ["processes", "threads"])
def test_what_was_begun_and_given_back_is_told_so(pool, relay, start_worker):
    send(relay.redis, "tests.not_handed_over")
    start_worker(options=("-P", pool, "-c", "1", *TASKS))

    until(lambda: relay.redis.llen("redelivered") == 2)

    assert relay.redis.lrange("redelivered", 0, -1) == [b"0", b"1"]
    until(lambda: not relay.redis.exists("dagrelay:returned"))


def test_a_child_that_was_killed_with_its_request_leaves_the_outcome_unknown(relay, airflow, start_worker):
    """The run may have been made: to give up later is not to say that there is none."""
    import os
    import signal
    import subprocess

    airflow.delay_s = 30.0
    worker = start_worker(options=("-P", "processes", "-c", "1"), DAGRELAY_LOOK_UP_EVERY_S="1")
    handle = relay.enqueue(type(SALES)("daily_sales", give_up_after_s=3))
    until(lambda: airflow.in_flight)
    children = subprocess.run(["pgrep", "-P", str(worker.pid)], capture_output=True, text=True, check=True)
    for child in children.stdout.split():
        os.kill(int(child), signal.SIGKILL)
    airflow.stop()

    with pytest.raises(OutcomeUnknown):
        handle.get(timeout=60)
