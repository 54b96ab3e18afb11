"""Kafka's protocol over TCP, by librdkafka's mock cluster, with messages from a plain producer."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import confluent_kafka
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from local.process import ROOT, Process, clean_env
from local.valkey import Valkey
from producers.errors import InvalidRequest
from producers.queues.kafka import KafkaSource
from producers.queues.listener import said_by
from producers.queues.message import read
from producers.queues.source import Received, SourceUnavailable, Undeliverable
from tests.fake_airflow import FakeAirflow
from tests.integration import queue_doors
from tests.kafka_mock import KafkaMock
from tests.standing import standing_still

pytestmark = pytest.mark.integration

BODY = json.dumps({"dag_id": "sales"}).encode()


@pytest.fixture(scope="module")
def kafka() -> Iterator[KafkaMock]:
    with KafkaMock() as running:
        yield running


@pytest.fixture
def topic() -> str:
    return f"t-{uuid4().hex[:12]}"


@pytest.fixture
def send(kafka: KafkaMock, topic: str) -> Callable[..., None]:
    producer = Producer({"bootstrap.servers": kafka.hosts})

    def one(body: bytes | None = BODY, **more: Any) -> None:
        producer.produce(topic, body, **{"partition": 0, **more})
        assert producer.flush(10) == 0

    return one


@pytest.fixture
def source_of(kafka: KafkaMock, topic: str) -> Iterator[Callable[..., KafkaSource]]:
    with ExitStack() as stack:

        def make(**config: Any) -> KafkaSource:
            environ = {"DAGRELAY_KAFKA_CONFIG": json.dumps({"session.timeout.ms": 6000, **config})}
            source = KafkaSource.from_url(kafka.url(topic), environ)
            stack.callback(source.close)
            return source

        yield make


def take(source: KafkaSource, number: int, within_s: float = 40) -> list[Received]:
    taken: list[Received] = []
    until = time.monotonic() + within_s
    while len(taken) < number:
        assert time.monotonic() < until, f"{len(taken)} of {number} came"
        taken += source.receive(number - len(taken), 0.5)
    return taken


def committed(kafka: KafkaMock, topic: str, partition: int = 0) -> int:
    consumer = Consumer({"bootstrap.servers": kafka.hosts, "group.id": "dagrelay"})
    (found,) = consumer.committed([TopicPartition(topic, partition)], timeout=10)
    consumer.close()
    return int(found.offset)


def read_topic(kafka: KafkaMock, topic: str) -> Any:
    consumer = Consumer(
        {"bootstrap.servers": kafka.hosts, "group.id": uuid4().hex, "auto.offset.reset": "earliest"}
    )
    consumer.assign([TopicPartition(topic, number, 0) for number in range(4)])
    until = time.monotonic() + 20
    while (found := consumer.poll(0.5)) is None or found.error() is not None:
        assert time.monotonic() < until, f"nothing came to {topic}"
    consumer.close()
    return found


def bodies(received: list[Received]) -> list[bytes]:
    return [one.message.body for one in received]


def test_plain_json_from_a_foreign_publisher(
    source_of: Callable[..., KafkaSource], send: Callable[..., None], topic: str
) -> None:
    send()
    send(b"\xff no JSON")
    send(None)  # a tombstone
    send(
        headers=[
            ("id", b"m1"),
            ("CE_Type", b"x"),
            ("content-type", b"application/json"),
            ("reply_to", b"replies"),
            ("correlation_id", b"c1"),
            ("odd", b"\xff"),
            ("none", None),
        ]
    )
    plain, garbage, tombstone, full = (one.message for one in take(source_of(), 4))
    assert plain.body == BODY
    assert (plain.id or "").startswith(f"{topic}-0-0-1")  # its offset, its time
    assert garbage.body == b"\xff no JSON"
    assert tombstone.body == b""
    assert (full.id, full.content_type, full.reply_to, full.correlation_id) == (
        "m1",
        "application/json",
        "replies",
        "c1",
    )
    assert full.headers["ce_type"] == "x"


def test_only_what_is_done_up_to_the_first_that_is_not_is_committed(
    kafka: KafkaMock, source_of: Callable[..., KafkaSource], send: Callable[..., None], topic: str
) -> None:
    for number in range(6):
        send(b"%d" % number)
    first = source_of()
    taken = take(first, 6)
    first.done([taken[5], taken[0], taken[3]])
    assert committed(kafka, topic) == 1
    first.done([taken[1]])
    assert committed(kafka, topic) == 2
    first.done([taken[2]])
    assert committed(kafka, topic) == 4
    first.close()

    second = source_of()
    assert bodies(take(second, 2)) == [b"4", b"5"]


def test_what_is_given_back_comes_again_in_order(
    kafka: KafkaMock, source_of: Callable[..., KafkaSource], send: Callable[..., None], topic: str
) -> None:
    for number in range(6):
        send(b"%d" % number)
    source = source_of()
    taken = take(source, 4)
    source.done([taken[0], taken[3]])
    source.give_back([taken[2], taken[1]])
    source.done(taken[2:])  # they are not ours any more
    assert committed(kafka, topic) == 1
    again = take(source, 5)
    assert bodies(again) == [b"1", b"2", b"3", b"4", b"5"]
    source.done(again)
    assert committed(kafka, topic) == 6


def test_a_killed_listener_s_messages_come_again(
    kafka: KafkaMock,
    source_of: Callable[..., KafkaSource],
    send: Callable[..., None],
    topic: str,
    tmp_path: Path,
) -> None:
    for number in range(5):
        send(b"%d" % number)
    program = (
        "import time\n"
        "from producers.queues.kafka import KafkaSource\n"
        f"source = KafkaSource.from_url({kafka.url(topic)!r})\n"
        "taken = []\n"
        "while len(taken) < 5: taken += source.receive(5, 1)\n"
        "source.done(taken[:2])\n"
        "print('has them', flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "consumer.log"
    config = '{"session.timeout.ms": 6000}'
    child = Process(
        [sys.executable, "-c", program], log=log, env=clean_env(DAGRELAY_KAFKA_CONFIG=config), cwd=ROOT
    )
    child.wait_until(lambda: "has them" in log.read_text(), timeout_s=60, what="holding five")
    child.kill()
    assert bodies(take(source_of(), 3)) == [b"2", b"3", b"4"]


def test_a_refused_message_lies_in_the_dead_topic_whole(
    kafka: KafkaMock, source_of: Callable[..., KafkaSource], send: Callable[..., None], topic: str
) -> None:
    send(b"\xff", key=b"k", headers=[("a", b"b")])
    source = source_of()
    source.refuse(take(source, 1)[0], "body: is no JSON")
    dead = read_topic(kafka, f"{topic}.dead")
    assert (dead.value(), dead.key()) == (b"\xff", b"k")
    assert dict(dead.headers()) == {
        "a": b"b",
        "dagrelay_reason": b"body: is no JSON",
        "dagrelay_from": f"{topic}-0-0".encode(),
    }
    assert committed(kafka, topic) == 1


def send_with_header(hosts: str, topic: str, name: bytes) -> None:
    """Publish with a header name that confluent-kafka itself cannot write: librdkafka can."""
    (path,) = (Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs").glob("librdkafka-*")
    library = ctypes.CDLL(str(path))
    for function in (library.rd_kafka_conf_new, library.rd_kafka_new, library.rd_kafka_headers_new):
        function.restype = ctypes.c_void_p
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    why = ctypes.create_string_buffer(512)
    config = pointer(library.rd_kafka_conf_new())
    library.rd_kafka_conf_set(config, b"bootstrap.servers", hosts.encode(), why, size(512))
    producer = pointer(library.rd_kafka_new(0, config, why, size(512)))
    headers = pointer(library.rd_kafka_headers_new(size(1)))
    library.rd_kafka_header_add(headers, name, ctypes.c_ssize_t(len(name)), b"v", ctypes.c_ssize_t(1))
    where = (
        number(1),
        topic.encode(),
        number(3),
        ctypes.c_int32(0),
    )  # topic and partition, by rdkafka.h's tags
    what = (number(4), BODY, size(len(BODY)), number(7), number(2), number(10), headers)  # value, copied
    assert library.rd_kafka_producev(producer, *where, *what, number(0)) == 0
    assert library.rd_kafka_flush(producer, 10_000) == 0
    library.rd_kafka_destroy(producer)


def test_a_header_name_that_cannot_be_read_is_refused_and_stops_no_partition(
    kafka: KafkaMock, source_of: Callable[..., KafkaSource], send: Callable[..., None], topic: str
) -> None:
    for number in range(50):  # only code that has run for a while would crash
        send(headers=[("n", str(number))])
    send_with_header(kafka.hosts, topic, b"\xff\xfe")
    send()
    source = source_of()
    *before, odd, after = take(source, 52)
    source.done([*before, after])
    with pytest.raises(InvalidRequest, match="headers: a name is no UTF-8"):
        read(odd.message, door="d")
    with pytest.raises(InvalidRequest, match="headers: a name is no UTF-8"):
        said_by(odd.message)
    source.refuse(odd, "headers: a name is no UTF-8")
    assert read_topic(kafka, f"{topic}.dead").value() == BODY
    assert committed(kafka, topic) == 52


def test_answers_are_confirmed(kafka: KafkaMock, source_of: Callable[..., KafkaSource]) -> None:
    replies = f"replies-{uuid4().hex}"
    source = source_of()
    source.publish(replies, b'{"what":"ended"}', correlation_id="c1", headers={"what": "ended"})
    answer = read_topic(kafka, replies)
    assert (answer.value(), answer.key()) == (b'{"what":"ended"}', b"c1")
    assert dict(answer.headers())["correlation_id"] == b"c1"
    with pytest.raises(Undeliverable, match="a topic is named"):
        source.publish("no topic", b"{}", correlation_id=None, headers={})


def test_the_assignment_is_kept_while_the_owner_is_busy(
    kafka: KafkaMock, source_of: Callable[..., KafkaSource], send: Callable[..., None], topic: str
) -> None:
    source = source_of(**{"max.poll.interval.ms": 6000})
    for number in range(3):
        send(b"%d" % number)
    held = take(source, 3)
    for number in range(3, 6):
        send(b"%d" % number)
    time.sleep(14)  # Dagrelay's Redis is away
    source.done(held)
    assert committed(kafka, topic) == 3
    assert bodies(take(source, 3)) == [b"3", b"4", b"5"]


def test_partitions_move_and_nothing_is_passed_over(
    kafka: KafkaMock, source_of: Callable[..., KafkaSource], send: Callable[..., None]
) -> None:
    for number in range(40):
        send(b"%d" % number, partition=number % 4)
    first, second = source_of(), source_of()
    held = take(first, 8)
    seen: set[bytes] = set()
    until = time.monotonic() + 60
    rest: list[Received] = []
    while len(seen) < 40:
        assert time.monotonic() < until, f"only {len(seen)} of 40 came"
        for source in (first, second):
            some = source.receive(5, 0.3)
            rest += some
            source.done(some)
            seen |= set(bodies(list(some)))
        first.done(held)
        seen |= set(bodies(held))
    assert len(seen) == 40


def test_a_broker_that_is_away_is_unavailable(topic: str) -> None:
    with KafkaMock() as kafka:
        source = KafkaSource.from_url(kafka.url(topic), {})
        source.publish(topic, BODY, correlation_id=None, headers={})
        (held,) = take(source, 1)
        with standing_still(kafka.pid), pytest.raises(SourceUnavailable):
            source.publish("replies", b"{}", correlation_id=None, headers={})
        source.publish("replies", b"{}", correlation_id=None, headers={})
        source.done([held])
    with pytest.raises(SourceUnavailable):
        listen_for(source, 30)
    source.close()


def listen_for(source: KafkaSource, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        source.receive(10, 0.5)


def test_a_listener_that_is_killed_loses_nothing_and_repeats_nothing(
    kafka: KafkaMock,
    topic: str,
    valkey: Valkey,
    airflow: FakeAirflow,
    start_worker: Callable[..., Any],
    tmp_path: Path,
) -> None:
    producer = Producer({"bootstrap.servers": kafka.hosts})
    reader = Consumer(
        {"bootstrap.servers": kafka.hosts, "group.id": uuid4().hex, "auto.offset.reset": "earliest"}
    )

    def send(body: bytes, message_id: str, correlation_id: str) -> None:
        # No id: the offset names it.
        wish = {"reply_to": queue_doors.REPLIES, "correlation_id": correlation_id}
        producer.produce(topic, body, headers=[(name, value.encode()) for name, value in wish.items()])
        assert producer.flush(10) == 0

    def answers() -> Iterator[bytes]:
        while (message := reader.poll(0.2)) is not None:
            if message.error() is None:
                yield message.value() or b""

    producer.produce(queue_doors.REPLIES, b'{"correlation_id": "c0", "what": "made"}')  # the topic
    assert producer.flush(10) == 0
    reader.assign([TopicPartition(queue_doors.REPLIES, number, 0) for number in range(4)])
    start_worker()
    queue_doors.nothing_is_lost_and_nothing_runs_twice(
        kafka.url(topic),
        send,
        answers,
        valkey=valkey,
        airflow=airflow,
        tmp_path=tmp_path,
        DAGRELAY_KAFKA_CONFIG='{"session.timeout.ms": 6000}',
    )
    reader.close()
    assert sum(max(0, committed(kafka, topic, number)) for number in range(4)) == queue_doors.MESSAGES
