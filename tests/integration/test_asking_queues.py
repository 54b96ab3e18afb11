"""A service that is a queue: asked by a message, which answers by others; with a real worker and listener."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import amqp
import pytest
from redis import Redis

import tests.import_tasks  # noqa: F401
from local import rabbitmq as local_rabbitmq
from local.process import PartFailed, Process, clean_env
from local.valkey import Valkey
from producers import (
    ExternalJobFailed,
    ExternalJobOverdue,
    ExternalJobSilent,
    Handle,
    JobOutcome,
    PollRequest,
    RequestCancelled,
)
from producers.client import RelayClient
from producers.contract import reference_for
from producers.errors import ServiceNotConfigured, ServiceUnavailable, SubmitRejected, SubmitUnknown
from producers.settings import ProducerSettings
from producers.stores.heard import answer_key, heard
from tasks.asking_queues import QueueSender
from tasks.services import Queue, Service, read_services
from tests.integration.gateway import DAGRELAY
from tests.integration.test_trigger import until
from tests.parts import need
from tests.worker import ROOT, Worker

pytestmark = pytest.mark.integration

Message = dict[str, str]


@dataclass
class Renderer:
    """The service: takes messages off one stream, and writes what `answers` says to another."""

    url: str
    asked: list[Message] = field(default_factory=list)
    answers: Callable[[Message], list[Any]] = field(default=lambda asked: [{"state": "done", "out": 1}])
    stopped: threading.Event = field(default_factory=threading.Event)

    def forget(self) -> None:
        self.asked, self.answers = [], lambda asked: [{"state": "done", "out": 1}]

    def run(self) -> None:
        with Redis.from_url(self.url, decode_responses=True) as client:
            last = "0"
            while not self.stopped.is_set():
                for _, rows in client.xread({"render": last}, block=100) or []:
                    for entry, fields in rows:
                        last = entry
                        self.asked.append(fields)
                        for answer in self.answers(fields):
                            self.say(fields, answer)

    def say(self, asked: Message, answer: Any) -> None:
        with Redis.from_url(self.url, decode_responses=True) as client:
            told = {"data": json.dumps(answer), "correlation_id": asked["correlation_id"]}
            client.xadd(asked["reply_to"], told)


@dataclass(frozen=True)
class Scene:
    valkey: Valkey
    broker: Valkey
    renderer: Renderer
    worker: Worker


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("queues")
    with Valkey() as valkey, Valkey() as broker:
        renderer = Renderer(broker.url)
        thread = threading.Thread(target=renderer.run)
        thread.start()
        service = {"url": broker.url, "queue": "render", "reply_to": "done"}
        env = {
            "DAGRELAY_SERVICE_RENDER": json.dumps(service),
            "DAGRELAY_SERVICE_AWAY": json.dumps({**service, "url": "redis://127.0.0.1:1/0"}),
            "DAGRELAY_SERVICE_OURS": json.dumps({**service, "queue": "dagrelay:parked"}),
            "DAGRELAY_RETRY_CAP_S": "0.3",
        }
        argv = [str(DAGRELAY), "listen", f"{broker.url}?stream=done", "--answers", "render"]
        listener = Process(
            argv,
            log=folder / "listen.log",
            env=clean_env(DAGRELAY_REDIS_URL=valkey.url),
            cwd=ROOT,
            name="listener",
        )
        try:
            with Worker(valkey.url, folder, **env) as worker:
                yield Scene(valkey, broker, renderer, worker)
        finally:
            listener.stop()
            renderer.stopped.set()
            thread.join()


@pytest.fixture
def scene(parts) -> Scene:
    parts.renderer.forget()
    return parts


@pytest.fixture
def relay(scene) -> Iterator[RelayClient]:
    client = RelayClient(ProducerSettings(redis_url=scene.valkey.url, client_name="tests@here"))
    yield client
    client.redis.close()


Start = Callable[..., Handle[JobOutcome]]


@pytest.fixture
def start(relay) -> Start:
    def enqueue(**more: Any) -> Handle[JobOutcome]:
        fields = {"service": "render", "via": "queue", "message": {"film": 7, "id": "{reference}"}}
        return relay.enqueue(PollRequest(**{**fields, "result": "out", "timeout_s": 60, **more}))

    return enqueue


def parked(handle: Handle[Any]) -> bool:
    found = handle.record()
    return found is not None and found.state == "waiting" and found.waits_for is not None


def test_a_message_goes_out_and_its_answer_is_the_outcome(scene, start):
    scene.renderer.answers = lambda asked: [
        {"state": "running"},
        {"state": "done", "out": json.loads(asked["data"])["film"] * 6},
    ]
    handle = start()

    assert handle.get(timeout=60) == JobOutcome("render", None, "done", 42)
    (asked,) = scene.renderer.asked
    reference = reference_for(handle.id)
    assert json.loads(asked["data"]) == {"film": 7, "id": reference}
    assert (asked["correlation_id"], asked["id"], asked["reply_to"]) == (reference, reference, "done")


def test_an_answer_that_is_no_end_is_progress_and_one_that_says_nothing_is_noted(scene, start, relay):
    scene.renderer.answers = lambda asked: []
    handle = start(progress="percent")
    until(lambda: parked(handle) and scene.renderer.asked)
    (asked,) = scene.renderer.asked

    scene.renderer.say(asked, {"state": "running", "percent": 10})
    until(lambda: handle.record().progress == "10" and parked(handle))
    assert "told: is running" in [words for _, words in relay.waits.history(handle.id)]
    scene.renderer.say(asked, {"nothing": 1})
    until(lambda: handle.record().reason is not None and parked(handle))
    assert "state: is missing" in handle.record().reason
    scene.renderer.say(asked, {"state": "failed"})

    with pytest.raises(ExternalJobFailed):
        handle.get(timeout=60)


def test_an_answer_that_comes_before_the_task_waits_is_read(scene, start):
    """The service answers at once: many of these are there before the worker has parked."""
    handles = [start() for _ in range(30)]

    assert [handle.get(timeout=60).result for handle in handles] == [1] * 30
    assert len({asked["correlation_id"] for asked in scene.renderer.asked}) == 30


def test_one_that_is_not_answered_is_overdue_or_silent_and_the_service_is_told(scene, start):
    scene.renderer.answers = lambda asked: []
    late = start(timeout_s=1.5, on_cancel={"message": {"cancel": "{reference}"}})
    silent = start(heartbeat_s=1)

    with pytest.raises(ExternalJobOverdue):
        late.get(timeout=60)
    with pytest.raises(ExternalJobSilent):
        silent.get(timeout=60)
    told = {"cancel": reference_for(late.id)}
    until(lambda: told in [json.loads(one["data"]) for one in scene.renderer.asked])
    cancel = next(one for one in scene.renderer.asked if json.loads(one["data"]) == told)
    assert cancel["correlation_id"] == reference_for(late.id)
    assert cancel["id"] != cancel["correlation_id"]


def test_a_cancelled_one_is_told_to_the_service(scene, start):
    scene.renderer.answers = lambda asked: []
    handle = start(on_cancel={"message": {"cancel": "{reference}"}})
    until(lambda: parked(handle))
    handle.cancel()

    with pytest.raises(RequestCancelled):
        handle.get(timeout=60)
    until(
        lambda: {"cancel": reference_for(handle.id)} in [json.loads(x["data"]) for x in scene.renderer.asked]
    )


def test_where_the_broker_is_away_it_is_tried_again_until_the_time_is_over(scene, start):
    handle = start(service="away", timeout_s=2)

    with pytest.raises(SubmitUnknown):
        handle.get(timeout=60)
    assert handle.record().attempts > 1


def test_with_submit_once_there_is_one_attempt_and_only_an_answer_ends_it_well(scene, start, relay):
    unknown = start(service="away", timeout_s=2, submit_once=True)
    answered = start(service="away", timeout_s=30, submit_once=True)
    until(lambda: parked(answered))

    with pytest.raises(SubmitUnknown, match="not heard of"):
        unknown.get(timeout=60)
    relay.wake(answer_key("away", reference_for(answered.id)), heard({"state": "done", "out": 3}))
    assert answered.get(timeout=60).result == 3


def test_a_place_that_is_none_and_a_service_that_is_none_are_refused(scene, start):
    with pytest.raises(Exception, match="refused to start the job: it is no place"):
        start(service="ours").get(timeout=60)
    with pytest.raises(ServiceNotConfigured, match="not configured"):
        start(service="nobody").get(timeout=60)
    with pytest.raises(ServiceNotConfigured, match="give via='queue'"):
        start(via="http", message=None, path="/x").get(timeout=60)


def test_a_worker_that_is_killed_after_it_published_publishes_the_same_again(scene, tmp_path: Path):
    """At least once: both messages carry the same ids, and one answer is enough."""
    scene.renderer.answers = lambda asked: []
    service = {"url": scene.broker.url, "queue": "render", "reply_to": "done"}
    env = {"DAGRELAY_SERVICE_RENDER": json.dumps(service)}
    with Valkey() as valkey:
        relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here"))
        handle = relay.enqueue(
            PollRequest(service="render", via="queue", message={"a": 1}, result="out", timeout_s=60)
        )
        key = f"dagrelay:record:{handle.id}"
        with Worker(valkey.url, tmp_path, name="first", **env) as worker:
            until(lambda: parked(handle))
            worker.kill()
        # As if it had ended before it could note that it has published: it is delivered again.
        relay.redis.hdel(key, "submitted_at")
        relay.waits.wake([handle.id])
        with Worker(valkey.url, tmp_path, name="second", **env):
            until(lambda: len(scene.renderer.asked) == 2)
            ids = {(one["id"], one["correlation_id"]) for one in scene.renderer.asked}
            assert ids == {(reference_for(handle.id), reference_for(handle.id))}
            until(lambda: parked(handle))
            relay.wake(answer_key("render", reference_for(handle.id)), {"state": "done", "out": 2})
            assert handle.get(timeout=60).result == 2
        relay.redis.close()


def test_over_rabbitmq_the_ids_are_where_amqp_has_them():
    """By threads of one process, over one connection, which is made anew when it breaks."""
    try:
        local_rabbitmq.ensure()
    except PartFailed as exc:
        need("RabbitMQ", False, f"{local_rabbitmq.HOW_TO_GET_IT} ({exc})")
    with local_rabbitmq.RabbitMQ() as broker:
        connection = amqp.Connection(f"127.0.0.1:{broker.port}", confirm_publish=True)
        connection.connect()
        channel = connection.channel()
        channel.auto_decode = False
        channel.queue_declare("render", auto_delete=False)
        given = {"url": f"amqp://guest:guest@127.0.0.1:{broker.port}/", "queue": "render", "reply_to": "done"}
        services, mistakes = read_services({"DAGRELAY_SERVICE_RENDER": json.dumps(given)})
        assert not mistakes
        queue = services["render"].queue
        assert queue is not None
        sender = QueueSender(services["render"], queue)

        def send(number: int) -> None:
            sender.send({"n": number}, correlation_id=f"c{number}", message_id=f"m{number}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send, range(20)))

        found = {}
        while (message := channel.basic_get("render", no_ack=True)) is not None:
            found[message.properties["message_id"]] = message
        assert set(found) == {f"m{number}" for number in range(20)}
        told = found["m7"].properties
        assert (told["correlation_id"], told["reply_to"]) == ("c7", "done")
        assert told["content_type"] == "application/json"
        assert json.loads(found["m7"].body) == {"n": 7}
        connection.close()

        nowhere = Queue(queue.url, "nobody.made.it", None)
        with pytest.raises(SubmitRejected):
            QueueSender(Service("r", "", queue=nowhere), nowhere).send(1, correlation_id="c", message_id="m")
    with pytest.raises(ServiceUnavailable) as away:
        send(99)
    assert away.value.unsure
