"""RabbitMQ: messages per second through `dagrelay listen`, of which one is killed every 5 s.

Two listeners of one quorum queue, as one would run them: in turn each is ended by `kill -9` and started
again; then one alone (`…_alone`). The queue is full before they start. The messages have a `message_id` and
no `key`: what was accepted twice would be seen. The clock runs from the first message accepted to the last.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import amqp
from redis import Redis

from local.process import ROOT, Process, clean_env
from local.rabbitmq import RabbitMQ
from local.valkey import Valkey
from producers.contract import QUEUE_TRIGGERS
from producers.queues.rabbitmq import RabbitSource

from ._report import say

MESSAGES = 60_000
KILL_EVERY_S = 5.0
CAP_S = 120.0
QUEUE = "dag-triggers"


def measure() -> dict[str, Any]:
    """Return the figures."""
    two, alone = measure_with(2), measure_with(1)
    return {
        "rabbitmq_per_s": two["per_s"],
        "rabbitmq_per_s_alone": alone["per_s"],
        "rabbitmq_lost": two["lost"] + alone["lost"],
        "rabbitmq_duplicates": two["duplicates"] + alone["duplicates"],
        "rabbitmq_messages": 2 * MESSAGES,
        "rabbitmq_kills": two["kills"] + alone["kills"],
        "rabbitmq_refused": two["refused"] + alone["refused"],
    }


def measure_with(listeners: int) -> dict[str, Any]:
    """Return what becomes of all messages with so many listeners."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RabbitMQ() as broker,
        Valkey() as valkey,
        Redis.from_url(valkey.url) as redis,
    ):
        url = f"{broker.url}?queue={QUEUE}"
        channel = fill(broker, url)
        running = [listener(url, valkey.url, Path(folder), number) for number in range(listeners)]
        kills = 0
        try:
            wait_for(lambda: redis.llen(QUEUE_TRIGGERS) > 0)
            began = last_kill = time.monotonic()
            while redis.llen(QUEUE_TRIGGERS) < MESSAGES and time.monotonic() - began < CAP_S:
                if time.monotonic() - last_kill >= KILL_EVERY_S:
                    victim = kills % listeners
                    running[victim].kill()
                    running[victim] = listener(url, valkey.url, Path(folder), victim)
                    kills += 1
                    last_kill += KILL_EVERY_S
                time.sleep(0.05)
            seconds = time.monotonic() - began
        finally:
            codes = [one.stop() for one in running]  # what is in hand is acknowledged first
        left = count(channel, QUEUE)
        figures = account(redis) | {"per_s": round(MESSAGES / seconds, 1), "kills": kills}
        figures |= {"left": left, "refused": count(channel, f"{QUEUE}.dead"), "codes": codes}
    say(f"rabbitmq, {listeners} listeners: {figures}")
    return figures


def fill(broker: RabbitMQ, url: str) -> Any:
    """Publish as many triggers, each told from the others by its conf; return the channel."""
    source = RabbitSource.from_url(url)
    source.receive(1, 0)  # it makes the queue
    source.close()
    patient: dict[Any, Any] = {socket.TCP_USER_TIMEOUT: 60_000}  # the broker stops reading now and then
    connection = amqp.Connection(f"127.0.0.1:{broker.port}", socket_settings=patient)
    connection.connect()
    channel = connection.channel()
    for number in range(MESSAGES):
        body = json.dumps({"dag_id": "sales", "conf": {"n": number}})
        message = amqp.Message(body, message_id=f"m{number}", delivery_mode=2)
        channel.basic_publish(message, exchange="", routing_key=QUEUE)
    wait_for(lambda: count(channel, QUEUE) == MESSAGES)
    return channel


def count(channel: Any, queue: str) -> int:
    return int(channel.queue_declare(queue, passive=True).message_count)


def listener(source: str, redis: str, folder: Path, number: int) -> Process:
    """Start one `dagrelay listen`."""
    return Process(
        [ROOT / ".venv/bin/dagrelay", "listen"],
        log=folder / f"listener-{number}.log",
        env=clean_env(DAGRELAY_REDIS_URL=redis, DAGRELAY_LISTEN_URL=source),
        cwd=ROOT,
    )


def account(redis: Redis) -> dict[str, Any]:
    """Count what was accepted: every message once."""
    accepted: Counter[int] = Counter()
    for message in redis.lrange(QUEUE_TRIGGERS, 0, -1):
        accepted[json.loads(json.loads(message)["body"])[1]["conf"]["n"]] += 1
    return {"lost": MESSAGES - len(accepted), "duplicates": sum(accepted.values()) - len(accepted)}


def wait_for(ready: Callable[[], bool]) -> None:
    """Return when it is ready. Raises TimeoutError."""
    deadline = time.monotonic() + CAP_S
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError("the listeners accept nothing")
        time.sleep(0.01)
