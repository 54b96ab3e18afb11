"""SQS as moto's server speaks it, with messages from plain boto3."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3  # type: ignore[import-untyped]
import pytest

from local.process import ROOT, Process, clean_env, free_port
from local.valkey import Valkey
from producers.queues.source import Received, SourceUnavailable, Undeliverable
from producers.queues.sqs import SqsSource
from tests.fake_airflow import FakeAirflow
from tests.integration import queue_doors

pytestmark = pytest.mark.integration

BODY = json.dumps({"dag_id": "sales"})


class Moto:
    """moto's server, whose port stays the same."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._log = folder / "moto.log"
        self._process: Process | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Moto:
        seen = len(self._log.read_text()) if self._log.exists() else 0
        program = Path(sys.executable).with_name("moto_server")
        self._process = Process(
            [program, "-H", "127.0.0.1", "-p", str(self.port)], log=self._log, env=clean_env(), name="moto"
        )
        self._process.wait_until(
            lambda: "Running on" in self._log.read_text()[seen:], timeout_s=60, what="listening"
        )
        return self

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    server = Moto(tmp_path_factory.mktemp("moto")).start()
    yield server
    server.kill()


def client_of(moto: Moto) -> Any:
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
    return boto3.client("sqs", region_name="eu-central-1", endpoint_url=moto.endpoint, **keys)


@pytest.fixture
def foreign(moto: Moto) -> Any:
    return client_of(moto)


@pytest.fixture
def queue(foreign: Any) -> str:
    name = f"q-{uuid4().hex[:12]}"
    foreign.create_queue(QueueName=name)
    return name


@pytest.fixture
def source_of(moto: Moto) -> Iterator[Callable[..., SqsSource]]:
    with ExitStack() as stack:

        def make(queue: str, options: str = "") -> SqsSource:
            source = SqsSource.from_url(url_of(moto, queue, options))
            stack.callback(source.close)
            return source

        yield make


@pytest.fixture
def source(source_of: Callable[..., SqsSource], queue: str) -> SqsSource:
    return source_of(queue)


def url_of(moto: Moto, queue: str, options: str = "") -> str:
    return f"sqs://x:x@?queue={queue}&region=eu-central-1&endpoint={moto.endpoint}{options}"


def send(foreign: Any, queue: str, body: str = BODY, **more: Any) -> str:
    url = foreign.get_queue_url(QueueName=queue)["QueueUrl"]
    return str(foreign.send_message(QueueUrl=url, MessageBody=body, **more)["MessageId"])


def counts(foreign: Any, queue: str) -> tuple[int, int]:
    """Return how many lie there, and how many are in somebody's hands."""
    url = foreign.get_queue_url(QueueName=queue)["QueueUrl"]
    found = foreign.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    return int(found["ApproximateNumberOfMessages"]), int(found["ApproximateNumberOfMessagesNotVisible"])


def read_queue(foreign: Any, queue: str) -> Any:
    url = foreign.get_queue_url(QueueName=queue)["QueueUrl"]
    until = time.monotonic() + 20
    while not (found := foreign.receive_message(QueueUrl=url, MessageAttributeNames=["All"]).get("Messages")):
        assert time.monotonic() < until, f"nothing came to {queue}"
    return found[0]


def take(source: SqsSource, number: int, within_s: float = 30) -> list[Received]:
    taken: list[Received] = []
    until = time.monotonic() + within_s
    while len(taken) < number:
        assert time.monotonic() < until, f"{len(taken)} of {number} came"
        taken += source.receive(number - len(taken), 1)
    return taken


def string(text: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": text}


def test_plain_json_from_a_foreign_publisher(source: SqsSource, foreign: Any, queue: str) -> None:
    plain_id = send(foreign, queue)
    send(foreign, queue, "no JSON")
    attributes = {
        "id": string("m1"),
        "reply_to": string("replies"),
        "correlation_id": string("c1"),
        "content_type": string("application/json"),
        "Raw": {"DataType": "Binary", "BinaryValue": b"\xff\x01"},
        "Number": {"DataType": "Number", "StringValue": "7"},
    }
    send(foreign, queue, MessageAttributes=attributes)
    found = {one.message.id: one.message for one in take(source, 3)}
    assert found[plain_id].body == BODY.encode()
    full = found["m1"]
    assert (full.reply_to, full.correlation_id, full.content_type) == ("replies", "c1", "application/json")
    assert (full.headers["raw"], full.headers["number"]) == ("\ufffd\x01", "7")
    assert b"no JSON" in {message.body for message in found.values()}


def test_a_message_is_gone_only_after_done(
    source_of: Callable[..., SqsSource], foreign: Any, queue: str
) -> None:
    ids = [send(foreign, queue) for _ in range(23)]  # three calls of ten
    first = source_of(queue)
    taken = take(first, 23)
    assert sorted(one.message.id or "" for one in taken) == sorted(ids)
    assert counts(foreign, queue) == (0, 23)
    first.done(taken[:12])
    assert counts(foreign, queue) == (0, 11)
    first.close()  # the rest goes back at once
    assert counts(foreign, queue) == (11, 0)

    second = source_of(queue)
    again = take(second, 11)
    assert {one.deliveries for one in again} == {2}
    second.give_back(again[:1])
    second.done(again[1:])
    (last,) = take(second, 1)
    assert (last.message.id, last.deliveries) == (again[0].message.id, 3)
    second.done([last])
    assert counts(foreign, queue) == (0, 0)
    second.done([last])  # twice is no error


def test_a_killed_listener_s_messages_come_again(
    moto: Moto, source: SqsSource, foreign: Any, queue: str, tmp_path: Path
) -> None:
    ids = [send(foreign, queue) for _ in range(5)]
    program = (
        "import time\n"
        "from producers.queues.sqs import SqsSource\n"
        f"source = SqsSource.from_url({url_of(moto, queue, '&visibility_s=10')!r})\n"
        "taken = []\n"
        "while len(taken) < 5: taken += source.receive(5, 1)\n"
        "source.done(taken[:2])\n"
        "print('has them', flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "consumer.log"
    child = Process([sys.executable, "-c", program], log=log, env=clean_env(), cwd=ROOT)
    child.wait_until(lambda: "has them" in log.read_text(), timeout_s=60, what="holding five")
    child.kill()
    again = take(source, 3)
    assert {one.message.id for one in again} < set(ids)


def test_a_refused_message_lies_in_the_dead_queue_whole(source: SqsSource, foreign: Any, queue: str) -> None:
    send(foreign, queue, "no JSON", MessageAttributes={"a": string("b")})
    source.refuse(take(source, 1)[0], "body: is no JSON")
    dead = read_queue(foreign, f"{queue}-dead")
    assert dead["Body"] == "no JSON"
    texts = {name: value["StringValue"] for name, value in dead["MessageAttributes"].items()}
    assert texts == {"a": "b", "dagrelay_reason": "body: is no JSON"}
    assert counts(foreign, queue) == (0, 0)


def test_ten_attributes_do_not_stop_a_refusal(source: SqsSource, foreign: Any, queue: str) -> None:
    send(foreign, queue, "no JSON", MessageAttributes={f"a{number}": string("b") for number in range(10)})
    source.refuse(take(source, 1)[0], "no\x00pe")
    dead = read_queue(foreign, f"{queue}-dead")
    assert dead["Body"] == "no JSON"
    assert dead["MessageAttributes"]["dagrelay_reason"]["StringValue"] == "no\ufffdpe"


def test_a_fifo_queue(source_of: Callable[..., SqsSource], foreign: Any) -> None:
    queue = f"q-{uuid4().hex[:12]}.fifo"
    foreign.create_queue(QueueName=queue, Attributes={"FifoQueue": "true"})
    for number in range(3):
        send(foreign, queue, str(number), MessageGroupId="g", MessageDeduplicationId=str(number))
    source = source_of(queue)
    taken = take(source, 3)
    assert [one.message.body for one in taken] == [b"0", b"1", b"2"]
    source.refuse(taken[0], "no")
    source.done(taken[1:])
    assert read_queue(foreign, queue.replace(".fifo", "-dead.fifo"))["Body"] == "0"
    source.publish(queue, b"{}", correlation_id="an id with blanks", headers={})
    assert take(source, 1)[0].message.correlation_id == "an id with blanks"


def test_answers_go_to_queues_by_name_only(source: SqsSource, foreign: Any) -> None:
    replies = f"replies-{uuid4().hex}"
    with pytest.raises(Undeliverable, match="there is no queue"):
        source.publish(replies, b"{}", correlation_id=None, headers={})
    with pytest.raises(Undeliverable, match="the name of a queue"):
        source.publish("http://127.0.0.1:1/1/q", b"{}", correlation_id=None, headers={})
    foreign.create_queue(QueueName=replies)
    source.publish(replies, b'{"what":"ended"}', correlation_id="c1", headers={"what": "ended"})
    answer = read_queue(foreign, replies)
    assert answer["Body"] == '{"what":"ended"}'
    assert answer["MessageAttributes"]["correlation_id"]["StringValue"] == "c1"


def test_a_queue_that_is_not_there_is_told_and_found_later(
    source_of: Callable[..., SqsSource], foreign: Any
) -> None:
    queue = f"q-{uuid4().hex[:12]}"
    source = source_of(queue)
    with pytest.raises(SourceUnavailable, match=f"there is no queue '{queue}'"):
        source.receive(1, 0)
    foreign.create_queue(QueueName=queue)
    send(foreign, queue)
    assert take(source, 1)


def test_an_outage(tmp_path: Path, source_of: Callable[..., SqsSource]) -> None:
    server = Moto(tmp_path).start()
    foreign = client_of(server)
    foreign.create_queue(QueueName="q")
    source = SqsSource.from_url(url_of(server, "q"))
    assert source.receive(1, 0) == []
    server.kill()
    with pytest.raises(SourceUnavailable):
        source.receive(1, 0)
    with pytest.raises(SourceUnavailable):
        source.publish("q", b"{}", correlation_id=None, headers={})
    server.start()  # moto has forgotten everything
    foreign.create_queue(QueueName="q")
    send(foreign, "q")
    assert take(source, 1)
    source.close()
    server.kill()


def test_a_listener_that_is_killed_loses_nothing_and_repeats_nothing(
    moto: Moto,
    foreign: Any,
    queue: str,
    valkey: Valkey,
    airflow: FakeAirflow,
    start_worker: Callable[..., Any],
    tmp_path: Path,
) -> None:
    replies = foreign.create_queue(QueueName=queue_doors.REPLIES)["QueueUrl"]

    def send_one(body: bytes, message_id: str, correlation_id: str) -> None:
        wish = {"id": message_id, "reply_to": queue_doors.REPLIES, "correlation_id": correlation_id}
        attributes = {name: string(value) for name, value in wish.items()}
        send(foreign, queue, body.decode(), MessageAttributes=attributes)

    def answers() -> Iterator[bytes]:
        while found := foreign.receive_message(QueueUrl=replies, MaxNumberOfMessages=10).get("Messages"):
            for message in found:
                yield message["Body"].encode()

    start_worker()
    queue_doors.nothing_is_lost_and_nothing_runs_twice(
        url_of(moto, queue, "&visibility_s=10"),
        send_one,
        answers,
        valkey=valkey,
        airflow=airflow,
        tmp_path=tmp_path,
    )
    assert counts(foreign, queue) == (0, 0)
