"""RabbitMQ: messages per second through `dagrelay listen`, of which one is killed every 5 s.

Two listeners of one quorum queue, as one would run them: in turn each is ended by `kill -9` and started
again; then one alone (`…_alone`). The queue is full before they start. The messages have a `message_id` and
no `key`: what was accepted twice would be seen. The clock runs from the first message accepted to the last.
"""

from __future__ import annotations

import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import amqp
from redis import Redis

from local.rabbitmq import RabbitMQ
from local.valkey import Valkey
from producers.contract import QUEUE_TRIGGERS
from producers.queues.rabbitmq import RabbitSource

from ._listeners import accepted, figures_of, listener, under_kills, wait_for
from ._report import say

MESSAGES = 60_000
QUEUE = "dag-triggers"


def measure() -> dict[str, Any]:
    """Return the figures."""
    return figures_of("rabbitmq", MESSAGES, measure_with, ["refused"])


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
        seconds, kills, codes = under_kills(
            listeners,
            lambda number: listener(url, valkey.url, Path(folder), number),
            redis,
            lambda: int(redis.llen(QUEUE_TRIGGERS)) >= MESSAGES,
        )
        figures: dict[str, Any] = {**accepted(redis, MESSAGES)[0]}
        figures |= {"per_s": round(MESSAGES / seconds, 1), "kills": kills, "codes": codes}
        figures |= {"left": count(channel, QUEUE), "refused": count(channel, f"{QUEUE}.dead")}
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
