"""A service on RabbitMQ, SQS or Kafka is asked over its queue, and its answer ends the job."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import boto3
import pytest

from local import rabbitmq
from local.process import PartFailed, Process, clean_env
from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import PollRequest
from producers.errors import ExternalJobFailed
from producers.queues.source import SourceUnavailable
from producers.queues.sources import source_for
from producers.settings import ProducerSettings
from tests.integration.gateway import DAGRELAY
from tests.integration.test_listen_sqs import Moto
from tests.kafka_mock import KafkaMock
from tests.parts import need
from tests.worker import ROOT, Worker

pytestmark = pytest.mark.integration


def urls_of(kind: str, stack: ExitStack, folder: Path) -> tuple[str, str, str]:
    """Start a broker; return its URL as workers have it, that of the queue `render`, and that of `done`."""
    if kind == "rabbitmq":
        try:
            rabbitmq.ensure()
        except PartFailed as exc:
            need("RabbitMQ", False, f"{rabbitmq.HOW_TO_GET_IT} ({exc})")
        url = stack.enter_context(rabbitmq.RabbitMQ()).url
        return url, f"{url}?queue=render&type=classic", f"{url}?queue=done&type=classic"
    if kind == "sqs":
        moto = Moto(folder).start()
        stack.callback(moto.kill)
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
        client: Any = boto3.client("sqs", region_name="eu-central-1", endpoint_url=moto.endpoint, **keys)
        for name in ("render", "done"):
            client.create_queue(QueueName=name)
        url = f"sqs://x:x@?region=eu-central-1&endpoint={moto.endpoint}"
        return url, f"{url}&queue=render", f"{url}&queue=done"
    kafka = stack.enter_context(KafkaMock())
    return f"kafka://{kafka.hosts}", kafka.url("render"), kafka.url("done")


def serve(url: str, stopped: threading.Event) -> None:
    """Be the service: a film of 13 fails, all others are made."""
    source = source_for(url)
    while not stopped.is_set():
        with suppress(SourceUnavailable):
            for received in source.receive(10, 0.2):
                asked = received.message
                film = json.loads(asked.body)["film"]
                answer = (
                    {"state": "failed", "why": "bad luck"} if film == 13 else {"state": "done", "out": film}
                )
                for body in ({"state": "running"}, answer):
                    source.publish(
                        str(asked.reply_to),
                        json.dumps(body).encode(),
                        correlation_id=asked.correlation_id,
                        headers={},
                    )
                source.done([received])
    source.close()


@pytest.fixture(params=["rabbitmq", "sqs", "kafka"])
def relay(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RelayClient]:
    """A caller, whose workers know the service `render`, which is there."""
    with ExitStack() as stack:
        url, render, done = urls_of(request.param, stack, tmp_path)
        valkey = stack.enter_context(Valkey())
        stopped = threading.Event()
        service = threading.Thread(target=serve, args=(render, stopped))
        service.start()
        stack.callback(service.join)
        stack.callback(stopped.set)
        env = clean_env(DAGRELAY_REDIS_URL=valkey.url, DAGRELAY_LISTEN_URL=done)
        argv = [str(DAGRELAY), "listen", "--answers", "render"]
        listener = Process(argv, log=tmp_path / "listen.log", env=env, cwd=ROOT, name="listener")
        stack.callback(listener.stop)
        log = tmp_path / "listen.log"  # an answer to a place that is not there yet would be lost
        listener.wait_until(lambda: "listening source=" in log.read_text(), timeout_s=60, what="listening")
        config = {"url": url, "queue": "render", "reply_to": "done"}
        settings = {"DAGRELAY_SERVICE_RENDER": json.dumps(config), "DAGRELAY_RETRY_CAP_S": "0.3"}
        stack.enter_context(Worker(valkey.url, tmp_path, **settings))
        yield RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here"))


def test_each_job_ends_by_the_answer_to_it(relay: RelayClient):
    handles = {
        film: relay.enqueue(
            PollRequest(
                service="render",
                via="queue",
                message={"film": film},
                result="out",
                reason="why",
                timeout_s=120,
            )
        )
        for film in (7, 8, 13)
    }
    assert [handles[film].get(timeout=90).result for film in (7, 8)] == [7, 8]
    with pytest.raises(ExternalJobFailed, match="bad luck"):
        handles[13].get(timeout=60)
