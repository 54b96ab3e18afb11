"""A real RabbitMQ, with messages from a publisher that knows nothing of us."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import amqp
import pytest

from local import rabbitmq as local_rabbitmq
from local.process import ROOT, PartFailed, Process, clean_env
from local.rabbitmq import RabbitMQ
from local.valkey import Valkey
from producers.client import RelayClient
from producers.queues.listener import Listener
from producers.queues.rabbitmq import RabbitSource
from producers.queues.source import Received, SourceUnavailable, Undeliverable
from producers.queues.sources import publisher_for, source_for
from tests.fake_airflow import FakeAirflow
from tests.integration import queue_doors
from tests.integration.test_trigger import until
from tests.parts import need
from tests.standing import standing_still

pytestmark = pytest.mark.integration

TLS = Path(__file__).parent / "tls"
BODY = json.dumps({"dag_id": "sales", "conf": {"day": 1}}).encode()


@pytest.fixture(scope="module")
def broker() -> Iterator[RabbitMQ]:
    try:
        local_rabbitmq.ensure()
    except PartFailed as exc:
        need("RabbitMQ", False, f"{local_rabbitmq.HOW_TO_GET_IT} ({exc})")
    with RabbitMQ((TLS / "cert.pem", TLS / "key.pem")) as running:
        yield running


class Foreign:
    """A publisher and a reader with nothing but an AMQP library."""

    def __init__(self, broker: RabbitMQ) -> None:
        self.connection = amqp.Connection(f"127.0.0.1:{broker.port}", confirm_publish=True)
        self.connection.connect()
        self.channel = self.connection.channel()
        self.channel.auto_decode = False

    def send(self, queue: str, body: bytes | str = BODY, **properties: Any) -> None:
        self.channel.basic_publish(amqp.Message(body, **properties), exchange="", routing_key=queue)

    def take(self, queue: str, within_s: float = 10) -> Any:
        until = time.monotonic() + within_s
        while (message := self.channel.basic_get(queue, no_ack=True)) is None:
            assert time.monotonic() < until, f"nothing came to {queue}"
            time.sleep(0.02)
        return message

    def count(self, queue: str) -> int:
        """Return how many are ready."""
        declared: Any = self.channel.queue_declare(queue, passive=True)
        return int(declared.message_count)

    def until_ready(self, queue: str, number: int, within_s: float = 60) -> None:
        until = time.monotonic() + within_s
        while (found := self.count(queue)) != number:
            assert time.monotonic() < until, f"{queue} has {found} messages ready, and not {number}"
            time.sleep(0.05)


@pytest.fixture
def foreign(broker: RabbitMQ) -> Iterator[Foreign]:
    publisher = Foreign(broker)
    yield publisher
    publisher.connection.collect()


@pytest.fixture
def queue() -> str:
    return f"q-{uuid4().hex[:12]}"


@pytest.fixture
def source_of(broker: RabbitMQ, queue: str) -> Iterator[Callable[..., RabbitSource]]:
    with ExitStack() as stack:

        def make(options: str = "") -> RabbitSource:
            source = RabbitSource.from_url(f"{broker.url}?queue={queue}{options}")
            stack.callback(source.close)
            return source

        yield make


@pytest.fixture
def source(source_of: Callable[..., RabbitSource]) -> RabbitSource:
    made = source_of()
    assert made.receive(100, 0) == []  # the queue is there from here on
    return made


def take(source: RabbitSource, number: int, within_s: float = 15) -> list[Received]:
    taken: list[Received] = []
    until = time.monotonic() + within_s
    while len(taken) < number:
        assert time.monotonic() < until, f"{len(taken)} of {number} came"
        taken += source.receive(number - len(taken), 0.2)
    return taken


def test_plain_json_from_a_foreign_publisher(source: RabbitSource, foreign: Foreign, queue: str) -> None:
    foreign.send(queue)
    foreign.send(queue, b"\xff\x00 no JSON")
    foreign.send(queue, b"")
    foreign.send(
        queue,
        message_id="m1",
        content_type="application/json",
        reply_to="replies.here",
        correlation_id="c1",
        application_headers={"CloudEvents:Type": "x", "n": 7, "yes": True, "day": datetime(2026, 11, 20)},
    )

    plain, garbage, empty, full = (one.message for one in take(source, 4))

    assert (plain.body, plain.id, dict(plain.headers)) == (BODY, None, {})
    assert garbage.body == b"\xff\x00 no JSON"
    assert empty.body == b""
    assert (full.id, full.content_type, full.reply_to, full.correlation_id) == (
        "m1",
        "application/json",
        "replies.here",
        "c1",
    )
    assert full.headers == {"cloudevents:type": "x", "n": "7", "yes": "true", "day": "2026-11-20T00:00:00Z"}


def test_a_message_is_gone_only_after_done(
    source_of: Callable[..., RabbitSource], foreign: Foreign, queue: str
) -> None:
    first = source_of()
    first.receive(10, 0)
    for number in range(6):
        foreign.send(queue, message_id=str(number))
    taken = take(first, 6)
    first.done([taken[0], taken[1], taken[4]])  # in any order
    first.close()
    foreign.until_ready(queue, 3)

    second = source_of()
    again = take(second, 3)
    second.done(again)
    second.close()

    assert sorted(one.message.id or "" for one in again) == ["2", "3", "5"]
    assert {one.deliveries for one in again} == {2}
    foreign.until_ready(queue, 0)


def test_deliveries_are_counted_by_a_quorum_queue(source: RabbitSource, foreign: Foreign, queue: str) -> None:
    foreign.send(queue, message_id="poison")
    for expected in (1, 2, 3, 4):
        (one,) = take(source, 1)
        assert one.deliveries == expected
        source.give_back([one])


def test_a_classic_queue_says_only_that_it_came_before(
    source_of: Callable[..., RabbitSource], foreign: Foreign, queue: str
) -> None:
    foreign.channel.queue_declare(queue, durable=True, auto_delete=False)  # it was there before us
    source = source_of("&type=classic")
    foreign.send(queue, application_headers={"x-delivery-count": "9" * 5000})
    for expected in (1, 2, 2):
        (one,) = take(source, 1)
        assert one.deliveries == expected
        source.give_back([one])


def test_no_more_than_the_prefetch_are_in_our_hands(
    source_of: Callable[..., RabbitSource], foreign: Foreign, queue: str
) -> None:
    source = source_of("&prefetch=2")
    source.receive(100, 0)
    for _ in range(5):
        foreign.send(queue)
    taken = take(source, 2)
    assert source.receive(100, 0.3) == []
    foreign.until_ready(queue, 3)
    source.done(taken)
    assert len(take(source, 2)) == 2


def test_a_killed_listener_s_messages_come_again(
    broker: RabbitMQ, source: RabbitSource, foreign: Foreign, queue: str, tmp_path: Path
) -> None:
    source.close()
    url = f"{broker.url}?queue={queue}"
    program = (
        "import time\n"
        "from producers.queues.rabbitmq import RabbitSource\n"
        f"source = RabbitSource.from_url({url!r})\n"
        "taken = []\n"
        "while len(taken) < 5: taken += source.receive(5, 1)\n"
        "source.done(taken[:2])\n"
        "print('has them', flush=True)\n"
        "time.sleep(600)\n"
    )
    for number in range(5):
        foreign.send(queue, message_id=str(number))
    log = tmp_path / "consumer.log"
    child = Process([sys.executable, "-c", program], log=log, env=clean_env(), cwd=ROOT)
    child.wait_until(lambda: "has them" in log.read_text(), timeout_s=30, what="holding five")
    child.kill()

    again = take(source, 3)

    assert sorted(one.message.id or "" for one in again) == ["2", "3", "4"]


def test_a_refused_message_lies_in_the_dead_queue_whole(
    source: RabbitSource, foreign: Foreign, queue: str
) -> None:
    foreign.channel.queue_declare(f"{queue}.cc", auto_delete=False)
    foreign.send(
        queue,
        b"\xffno JSON",
        message_id="m1",
        content_type="text/odd",
        reply_to="r",
        expiration="600000",
        user_id="guest",
        timestamp=1_700_000_000_000,
        application_headers={"a": "b", "CC": [f"{queue}.cc"], "deep": {"list": [1, None, b"\xff"]}},
    )
    source.refuse(take(source, 1)[0], "body: is no JSON")

    dead = foreign.take(f"{queue}.dead")

    assert dead.body == b"\xffno JSON"
    headers = dict(dead.headers)
    assert headers.pop("x-delivery-count") == 0  # of the dead queue
    assert headers.pop("x-dagrelay-reason") == "body: is no JSON"
    assert headers.pop("x-dagrelay-user-id") == "guest"
    assert headers.pop("x-dagrelay-cc") == [f"{queue}.cc"]
    assert headers == {"a": "b", "deep": {"list": [1, None, b"\xff"]}}
    kept = ("message_id", "content_type", "reply_to", "timestamp", "delivery_mode")
    assert [dead.properties[name] for name in kept] == ["m1", "text/odd", "r", 1_700_000_000_000, 2]
    assert "expiration" not in dead.properties  # it would go from there too
    foreign.until_ready(queue, 0)
    assert foreign.count(f"{queue}.cc") == 1  # from its sender


def test_a_dead_queue_that_somebody_deleted_is_made_again(
    source: RabbitSource, foreign: Foreign, queue: str
) -> None:
    foreign.channel.queue_delete(f"{queue}.dead")
    foreign.send(queue)
    source.refuse(take(source, 1)[0], "no")
    assert foreign.take(f"{queue}.dead").headers["x-dagrelay-reason"] == "no"


def test_headers_as_large_as_a_frame_do_not_stop_a_refusal(
    source: RabbitSource, foreign: Foreign, queue: str
) -> None:
    foreign.send(queue, message_id="m", application_headers={"big": "x" * 130_000})
    source.refuse(take(source, 1)[0], "too much")
    dead = foreign.take(f"{queue}.dead")
    assert dead.headers["x-dagrelay-headers"] == "left out"
    assert "big" not in dead.headers
    assert (dead.body, dead.properties["message_id"]) == (BODY, "m")


def test_properties_that_cannot_be_read_stop_nothing(
    source: RabbitSource, foreign: Foreign, queue: str
) -> None:
    far = datetime(9999, 12, 31)
    odd: Any = amqp.Message(BODY, application_headers={"at": far})
    serialized = odd._serialize_properties()
    seconds = int((far - datetime(1970, 1, 1)).total_seconds()).to_bytes(8, "big")
    in_ms = serialized.replace(seconds, (1_700_000_000_000).to_bytes(8, "big"))
    odd._serialize_properties = lambda: in_ms
    foreign.channel.basic_publish(odd, exchange="", routing_key=queue)
    foreign.send(queue, message_id="good")

    (good,) = take(source, 1)

    assert good.message.id == "good"
    dead = foreign.take(f"{queue}.dead")
    assert dead.body == BODY
    assert "properties: cannot be read (ValueError: year" in dead.headers["x-dagrelay-reason"]


def send_raw(foreign: Foreign, queue: str, properties: bytes) -> None:
    """Publish with properties as they go over the wire: flags, then values."""
    message: Any = amqp.Message(BODY)
    message._serialize_properties = lambda: properties
    foreign.channel.basic_publish(message, exchange="", routing_key=queue)


# Whatever is finalised at the end of the stack, by chance in there, tells that it is the end of the stack.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_headers_nested_deeper_than_anybody_can_read_stop_nothing(
    source: RabbitSource, foreign: Foreign, queue: str
) -> None:
    table = b""
    for _ in range(5000):
        table = b"\x01aF" + struct.pack(">I", len(table)) + table
    send_raw(foreign, queue, struct.pack(">HI", 1 << 13, len(table)) + table)
    foreign.send(queue, message_id="good")
    assert [one.message.id for one in take(source, 1)] == ["good"]
    assert (
        "properties: cannot be read (Recursion" in foreign.take(f"{queue}.dead").headers["x-dagrelay-reason"]
    )


def test_what_cannot_be_read_waits_for_its_dead_queue_and_holds_up_no_other(
    source: RabbitSource, foreign: Foreign, queue: str
) -> None:
    full(foreign, f"{queue}.dead")
    send_raw(foreign, queue, struct.pack(">H", 1 << 7) + b"\x02\xff\xfe")  # a message_id that is no UTF-8
    foreign.send(queue, message_id="good")
    good: list[Received] = []
    give_up = time.monotonic() + 15
    while not good and time.monotonic() < give_up:
        with suppress(SourceUnavailable):
            good = list(source.receive(10, 0.2))
    assert [one.message.id for one in good] == ["good"]
    source.done(good)
    with pytest.raises(SourceUnavailable, match="it is full"):
        source.receive(10, 0)

    foreign.channel.queue_delete(f"{queue}.dead")

    assert source.receive(10, 0) == []
    assert "properties: cannot be read" in foreign.take(f"{queue}.dead").headers["x-dagrelay-reason"]


def full(foreign: Foreign, queue: str) -> None:
    """Make a queue that takes no more."""
    foreign.channel.queue_delete(queue)
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    foreign.channel.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)
    foreign.send(queue)


@contextmanager
def listening(url: str, relay: RelayClient) -> Iterator[Listener]:
    stop, found = threading.Event(), Listener(source_for(url), relay, publisher=publisher_for(url))
    thread = threading.Thread(target=found.run, args=(stop,))
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def test_no_answer_and_no_name_that_a_sender_chose_holds_up_the_others(
    source: RabbitSource, broker: RabbitMQ, foreign: Foreign, queue: str, relay: RelayClient
) -> None:
    source.close()
    replies = f"replies.{queue}"
    foreign.channel.queue_declare(replies, durable=True, auto_delete=False)
    full(foreign, f"{replies}.full")
    long = "\u20ac" * 250  # 750 bytes, and AMQP has 255 for it
    foreign.send(queue, json.dumps({"dag_id": "sales", "reply_to": replies, "correlation_id": long}))
    foreign.send(queue, reply_to=f"{replies}.full")
    foreign.send(
        queue, message_id="forged", reply_to="amq.rabbitmq.reply-to.g1hkAAhub2RlQGZvbwAAAAAAAAAA.x=="
    )
    foreign.send(queue, message_id="half a pair \ud800")
    foreign.send(queue)

    with listening(f"{broker.url}?queue={queue}", relay) as listener:
        until(lambda: listener.counts.accepted + listener.counts.repeated >= 5, timeout_s=60)
        foreign.until_ready(queue, 0)

    assert (listener.counts.accepted, listener.counts.repeated) == (5, 0)
    assert relay.redis.llen("triggers") == 5  # none of them twice, though nothing names three of them
    answer = foreign.take(replies)
    assert json.loads(answer.body)["correlation_id"] == long
    assert answer.headers["correlation_id"] == long


def test_where_answers_do_not_get_through_what_nothing_names_is_accepted_once(
    source: RabbitSource, broker: RabbitMQ, foreign: Foreign, queue: str, relay: RelayClient, monkeypatch
) -> None:
    source.close()

    def away(*_: Any, **__: Any) -> None:
        raise SourceUnavailable("it reads nothing from those that publish")

    monkeypatch.setattr(RabbitSource, "publish", away)
    foreign.send(queue, reply_to="replies.x")
    foreign.send(queue, message_id="named", reply_to="replies.x")

    with listening(f"{broker.url}?queue={queue}", relay):
        foreign.until_ready(queue, 0)
        until(lambda: int(relay.redis.llen("triggers")) >= 2)
        time.sleep(2)  # time enough to be delivered again

    assert relay.redis.llen("triggers") == 2
    foreign.until_ready(queue, 1)  # the one with a name waits for its answer


def test_answers_are_confirmed(source: RabbitSource, foreign: Foreign) -> None:
    replies = f"replies.{uuid4().hex}"
    foreign.channel.queue_declare(replies, durable=True, auto_delete=False)
    source.publish(replies, b'{"what":"ended"}', correlation_id="c1", headers={"what": "ended"})
    answer = foreign.take(replies)
    assert answer.body == b'{"what":"ended"}'
    assert answer.properties["correlation_id"] == "c1"
    assert answer.properties["content_type"] == "application/json"
    assert answer.headers == {"what": "ended"}


def test_an_answer_that_no_queue_takes_is_told_and_harms_nothing(
    source: RabbitSource, foreign: Foreign, queue: str
) -> None:
    foreign.send(queue)
    (held,) = take(source, 1)
    with pytest.raises(Undeliverable, match="there is no queue"):
        source.publish("nobody.here", b"{}", correlation_id=None, headers={})
    with pytest.raises(Undeliverable, match="1 to 255"):
        source.publish("x" * 300, b"{}", correlation_id=None, headers={})
    source.done([held])
    source.close()
    foreign.until_ready(queue, 0)


def test_over_tls_with_a_broker_that_shows_its_certificate(
    broker: RabbitMQ, source: RabbitSource, foreign: Foreign, queue: str
) -> None:
    source.close()
    for number in range(50):
        foreign.send(queue, b"x" * 40_000, message_id=str(number))
    reach = f"amqps://guest:guest@127.0.0.1:{broker.tls_port}?queue={queue}"
    with pytest.raises(SourceUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        RabbitSource.from_url(reach).receive(1, 0)

    source = RabbitSource.from_url(f"{reach}&ca={TLS / 'cert.pem'}")
    source.done([*(first := source.receive(50, 5)), *take(source, 50 - len(first))])
    source.publish(queue, b"{}", correlation_id="c", headers={})
    assert take(source, 1)[0].message.correlation_id == "c"
    source.close()


def test_a_broker_that_does_not_read_for_some_seconds_is_waited_for(source: RabbitSource) -> None:
    option = source._connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert option == 10_000


def test_what_only_publishes_is_sent_no_messages(
    source_of: Callable[..., RabbitSource], foreign: Foreign, queue: str
) -> None:
    foreign.channel.queue_declare(queue, durable=True, auto_delete=False)
    foreign.send(queue)
    other = source_of()
    other.publish(queue, b"{}", correlation_id=None, headers={})
    foreign.until_ready(queue, 2)


def test_a_deleted_queue_is_told_and_made_again(source: RabbitSource, foreign: Foreign, queue: str) -> None:
    foreign.channel.queue_delete(queue)
    with pytest.raises(SourceUnavailable):
        source.receive(10, 5)
    assert source.receive(10, 0) == []
    foreign.send(queue)
    assert take(source, 1)


def test_heartbeats_go_on_while_the_owner_is_busy(
    source_of: Callable[..., RabbitSource], foreign: Foreign, queue: str
) -> None:
    source = source_of("&heartbeat_s=2")
    source.receive(10, 0)
    foreign.send(queue)
    (held,) = take(source, 1)
    time.sleep(7)  # the broker closes a connection that is silent for twice its heartbeat
    assert source.receive(10, 0.1) == []
    source.done([held])
    source.close()
    foreign.until_ready(queue, 0)


def test_a_wrong_password_is_told_without_it(broker: RabbitMQ) -> None:
    source = RabbitSource.from_url(f"amqp://guest:hunter2@127.0.0.1:{broker.port}?queue=q")
    with pytest.raises(SourceUnavailable, match="refused") as told:
        source.receive(1, 0)
    assert "hunter2" not in str(told.value)


class TestOutages:
    """With a broker of their own."""

    @pytest.fixture(scope="class")
    @classmethod
    def broker(cls, broker: RabbitMQ) -> Iterator[RabbitMQ]:
        with RabbitMQ() as running:
            yield running

    # RabbitMQ 3.10 does not find a quorum queue again that it made seconds before it was killed.
    @pytest.mark.parametrize(("end", "kind"), [("stop", "quorum"), ("kill", "classic")])
    def test_a_restarted_broker(
        self, broker: RabbitMQ, source_of: Callable[..., RabbitSource], queue: str, end: str, kind: str
    ) -> None:
        source = source_of(f"&type={kind}")
        source.receive(10, 0)
        foreign = Foreign(broker)
        for number in range(3):
            foreign.send(queue, message_id=str(number), delivery_mode=2)
        held = take(source, 3)
        source.done(held[:1])
        source.publish(queue, b"{}", correlation_id="mine", headers={})

        getattr(broker, end)()
        with pytest.raises(SourceUnavailable):
            source.receive(10, 5)
        with pytest.raises(SourceUnavailable):
            source.receive(10, 0)  # nothing listens there
        source.done(held[1:2])  # cannot be acknowledged any more, which is no error
        with pytest.raises(SourceUnavailable):
            source.publish(queue, b"{}", correlation_id=None, headers={})

        broker.start()
        again = take_after_outage(source, 3)
        ids = sorted(one.message.id or one.message.correlation_id or "" for one in again)
        assert ids == ["1", "2", "mine"]
        source.refuse(held[2], "an old handle")  # came again by itself: no copy of it is made
        source.done(again)
        source.publish(queue, b"{}", correlation_id="later", headers={})
        assert take(source, 1)[0].message.correlation_id == "later"
        reader = Foreign(broker)
        assert reader.count(f"{queue}.dead") == 0
        foreign.connection.collect()
        reader.connection.collect()

    def test_a_broker_that_hangs_is_unavailable(
        self,
        broker: RabbitMQ,
        source_of: Callable[..., RabbitSource],
        queue: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("producers.queues.rabbitmq.ANSWER_S", 1.0)
        source = source_of("&heartbeat_s=2")
        source.receive(10, 0)
        foreign = Foreign(broker)
        foreign.send(queue)
        (held,) = take(source, 1)
        beam = next(pid for pid in below(broker.process.pid) if "beam" in name_of(pid))
        with standing_still(beam):
            with pytest.raises(SourceUnavailable):
                source.publish(queue, b"{}", correlation_id=None, headers={})
            with pytest.raises(SourceUnavailable):
                source.refuse(held, "no")
            with pytest.raises(SourceUnavailable):
                listen_for(source, 20)
        assert take_after_outage(source, 1)
        foreign.connection.collect()


def take_after_outage(source: RabbitSource, number: int, within_s: float = 60) -> list[Received]:
    """Quorum queues answer some time after the broker does."""
    taken: list[Received] = []
    until = time.monotonic() + within_s
    while len(taken) < number:
        assert time.monotonic() < until, f"{len(taken)} of {number} came"
        try:
            taken += source.receive(10, 0.5)
        except SourceUnavailable:
            taken = []
            time.sleep(0.2)
    return taken


def listen_for(source: RabbitSource, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        source.receive(10, 0.5)


def below(pid: int) -> list[int]:
    """Return the pids of what this process has started, and of what that has."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found


def name_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def test_a_listener_that_is_killed_loses_nothing_and_repeats_nothing(
    broker: RabbitMQ,
    foreign: Foreign,
    queue: str,
    source: RabbitSource,
    valkey: Valkey,
    airflow: FakeAirflow,
    start_worker: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source.close()
    foreign.channel.queue_declare(queue_doors.REPLIES, durable=True, auto_delete=False)

    def send(body: bytes, message_id: str, correlation_id: str) -> None:
        wish = {"reply_to": queue_doors.REPLIES, "correlation_id": correlation_id}
        foreign.send(queue, body, message_id=message_id, **wish)

    def answers() -> Iterator[bytes]:
        while (message := foreign.channel.basic_get(queue_doors.REPLIES, no_ack=True)) is not None:
            yield bytes(message.body)  # type: ignore[arg-type]

    start_worker()
    queue_doors.nothing_is_lost_and_nothing_runs_twice(
        f"{broker.url}?queue={queue}", send, answers, valkey=valkey, airflow=airflow, tmp_path=tmp_path
    )
    foreign.until_ready(queue, 0)
    assert foreign.count(f"{queue}.dead") == 0
