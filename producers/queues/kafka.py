"""Kafka: messages from a topic, answers to topics.

    kafka://host:9092,other-host:9092/dag-triggers?group=dagrelay

Everything else that a client needs (TLS, SASL, timeouts) goes as JSON into DAGRELAY_KAFKA_CONFIG, or into the
file that DAGRELAY_KAFKA_CONFIG_FILE names, by librdkafka's names: ``{"security.protocol": "SASL_SSL", …}``.
Options:

================ =====================================================================================
``group``        the consumer group, `dagrelay` if left out: its members share the partitions
``dead``         the topic of refused messages; `<topic>.dead` if left out. Where brokers make no topics
                 by themselves it has to be there
``name``         what is the same for all listeners of the topic; hosts and topic if left out
================ =====================================================================================

**Who names a message.** Its header `id`; else its topic, partition, offset and timestamp. Headers
`content_type` (or `content-type`), `reply_to` and `correlation_id` mean what their names say; a binary
CloudEvent's attributes begin with `ce_`.

**In order.** A partition's offset is committed up to the first message that is not done, never beyond: what a
listener had in hand when it ended comes again, and nothing is passed over. confluent-kafka is used, and not
kombu's transport, which commits whatever was fetched.
"""

from __future__ import annotations

import contextlib
import json
import logging
import operator
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, KafkaError, KafkaException, Producer
from confluent_kafka import TopicPartition as Position

from ..errors import ConfigurationError
from ..settings import read_value
from .keeping import Keeper
from .message import Incoming
from .source import Received, SourceUnavailable, Undeliverable
from .urls import parsed

FORM: Final = "kafka://host:9092/dag-triggers?group=dagrelay"

ANSWER_S: Final = 10.0
KEEP_EVERY_S: Final = 3.0
"""While the owner is busy elsewhere somebody has to poll, or the group goes on without us after five minutes.
Its rebalancing waits for us as well."""

REASON: Final = "dagrelay_reason"
FROM: Final = "dagrelay_from"

_TOPIC: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
_HOSTS: Final = re.compile(r"[A-Za-z0-9._:,\[\]-]+")
_OURS: Final = ("bootstrap.servers", "enable.auto.commit", "enable.auto.offset.store", "group.id")

_UNDELIVERABLE: Final = (
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.TOPIC_EXCEPTION,
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.INVALID_RECORD,
    KafkaError.POLICY_VIOLATION,
)
# The partition is somebody else's, or will be told so in a moment: they get what is not committed.
_NOT_OURS: Final = (
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.FENCED_INSTANCE_ID,
    KafkaError._NO_OFFSET,
    KafkaError._STATE,
)

log = logging.getLogger("dagrelay.kafka")


@dataclass(frozen=True, slots=True)
class _Handle:
    """`time` is that of the partition's assignment: after a later one the message may be somebody else's."""

    time: int
    raw: Any


@dataclass
class _Partition:
    """What we have of one partition, in the order of its offsets."""

    time: int
    hand: dict[int, bool] = field(default_factory=dict)
    """Whether the message at an offset is done, from the first that is not."""
    commit: int | None = None
    """The offset to commit, if it is not yet."""

    def settle(self) -> None:
        while self.hand and self.hand[first := next(iter(self.hand))]:
            del self.hand[first]
            self.commit = first + 1


class KafkaSource:
    """One topic, as a member of a group. See `source.Source`."""

    def __init__(
        self,
        *,
        hosts: str,
        topic: str,
        group: str = "dagrelay",
        dead: str | None = None,
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.topic, self.dead = topic, dead or f"{topic}.dead"
        self.name = name or f"kafka:{','.join(sorted(hosts.split(',')))}/{topic}"
        self._reach = {"bootstrap.servers": hosts, "client.id": "dagrelay", **(config or {})}
        self._group = group
        self._keeper = Keeper(self._keep, KEEP_EVERY_S)
        self._consumer: Any = None
        self._producer: Any = None
        self._partitions: dict[int, _Partition] = {}
        self._assignments = 0
        self._paused = False
        self._early: deque[Any] = deque()  # came while only the keeper was there
        self._trouble = ""

    @classmethod
    def from_url(cls, url: str, environ: Mapping[str, str] | None = None) -> KafkaSource:
        """Return the source that a URL names. Raises ConfigurationError; connects to nothing."""
        given = parsed(url, form=FORM, options=("group", "dead", "name"))
        where = f"the source's URL ({given.scheme}://…)"
        topic = given.path.rstrip("/")
        dead = given.options.get("dead") or f"{topic}.dead"
        mistakes: list[str] = []
        if given.user is not None:
            mistakes.append(f"{where}: has a user: credentials go into DAGRELAY_KAFKA_CONFIG")
        if not _HOSTS.fullmatch(given.hosts):
            mistakes.append(f"{where}: names no host: it goes {FORM}")
        if not topic:
            mistakes.append(f"{where}: names no topic: it goes {FORM}")
        elif not _TOPIC.fullmatch(topic) or not _TOPIC.fullmatch(dead):
            mistakes.append(f"{where}: a topic is named by at most 249 letters, digits, '.', '-' and '_'")
        if dead == topic:
            mistakes.append(f"{where}: dead is the topic itself")
        config = _config(os.environ if environ is None else environ, mistakes)
        if mistakes:
            raise ConfigurationError(*mistakes)
        return cls(
            hosts=given.hosts,
            topic=topic,
            group=given.options.get("group", "dagrelay"),
            dead=dead,
            config=config,
            name=given.options.get("name"),
        )

    # Taking

    def receive(self, most: int, wait_s: float) -> Sequence[Received]:
        """See `source.Source`. The first call joins the group, which takes some seconds."""
        with self._at_work():
            consumer = self._consuming()
            self._commit()
            self._resume()
            messages = [self._early.popleft() for _ in range(min(most, len(self._early)))]
            if not messages and (first := consumer.poll(wait_s)) is not None:
                messages = [first]
            if messages and len(messages) < most:
                messages += consumer.consume(most - len(messages), timeout=0)
            received = [one for raw in messages if (one := self._received(raw)) is not None]
            if self._trouble and not received:
                trouble, self._trouble = self._trouble, ""
                raise SourceUnavailable(f"Kafka: {trouble}")
        return received

    def _received(self, raw: Any) -> Received | None:
        error = raw.error()
        if error is not None:
            if error.code() not in (KafkaError._PARTITION_EOF, KafkaError._MAX_POLL_EXCEEDED):
                self._note(error)
            return None
        partition = self._partitions.get(raw.partition())
        if partition is None:  # taken from us between two messages of this batch
            return None
        partition.hand[raw.offset()] = False
        given = _headers(raw)
        headers = {name.lower(): _text(value) for name, value in given or [] if value is not None}
        kind, at = raw.timestamp()
        # With the time: a topic that was deleted and made anew begins at offset 0 again.
        when = f"-{at}" if kind != TIMESTAMP_NOT_AVAILABLE else ""
        message = Incoming(
            body=raw.value() or b"",
            id=headers.get("id") or f"{self.topic}-{raw.partition()}-{raw.offset()}{when}",
            content_type=headers.get("content_type") or headers.get("content-type") or "",
            headers=headers,
            reply_to=headers.get("reply_to") or None,
            correlation_id=headers.get("correlation_id") or None,
            problem="headers: a name is no UTF-8" if given is None else None,
        )
        return Received(message, _Handle(partition.time, raw))

    def _consuming(self) -> Any:
        if self._consumer is None:
            own = {
                "group.id": self._group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "error_cb": self._note,
            }
            # Who starts on a topic wants what lies in it; one that is killed is noticed after 15 s.
            usual = {"auto.offset.reset": "earliest", "session.timeout.ms": 15_000}
            self._consumer = Consumer({**usual, **self._reach, **own}, logger=log)
            self._consumer.subscribe(
                [self.topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked
            )
            self._keeper.start()
        return self._consumer

    def _assigned(self, consumer: Any, positions: Sequence[Any]) -> None:
        self._assignments += 1
        for position in positions:
            self._partitions[position.partition] = _Partition(self._assignments)
        if self._paused:
            consumer.incremental_assign(positions) if self._cooperative() else consumer.assign(positions)
            consumer.pause(positions)

    def _cooperative(self) -> bool:
        return "cooperative" in str(self._reach.get("partition.assignment.strategy", ""))

    def _revoked(self, consumer: Any, positions: Sequence[Any]) -> None:
        gone = {position.partition for position in positions}
        for partition in gone:
            self._partitions.pop(partition, None)
        self._early = deque(raw for raw in self._early if raw.partition() not in gone)

    def _note(self, error: Any) -> None:
        """Remember what went wrong, for the next call to tell. librdkafka goes on connecting by itself."""
        if error.code() != KafkaError._TRANSPORT or error.fatal():  # one broker of several
            self._trouble = _words(error)

    # Letting go

    def done(self, received: Sequence[Received]) -> None:
        """See `source.Source`. What was assigned to others meanwhile comes to them: nothing is to be done."""
        with self._at_work():
            for one in received:
                partition = self._mine(one)
                if partition is not None:
                    partition.hand[one.handle.raw.offset()] = True
                    partition.settle()
            self._commit()

    def _mine(self, received: Received) -> _Partition | None:
        partition = self._partitions.get(received.handle.raw.partition())
        if partition is None or partition.time != received.handle.time:
            return None
        return partition if received.handle.raw.offset() in partition.hand else None

    def _commit(self) -> None:
        due = {number: one.commit for number, one in self._partitions.items() if one.commit is not None}
        if not due:
            return
        positions = [Position(self.topic, number, offset) for number, offset in due.items()]
        try:
            answers = self._consumer.commit(offsets=positions, asynchronous=False)
        except KafkaException as exc:
            error = exc.args[0]
            if error.code() == KafkaError.REBALANCE_IN_PROGRESS:
                return  # with the next one, if these are ours then
            if error.code() not in _NOT_OURS:
                raise
            answers = positions
        for answer in answers:
            if answer.error is not None and answer.error.code() not in _NOT_OURS:
                raise KafkaException(answer.error)
            partition = self._partitions.get(answer.partition)
            if partition is not None and partition.commit == due[answer.partition]:
                partition.commit = None

    def refuse(self, received: Received, reason: str) -> None:
        """See `source.Source`. Headers: `dagrelay_reason`, and `dagrelay_from`, where it lay."""
        with self._at_work():
            if self._mine(received) is None:
                return
            raw = received.handle.raw
            told = [
                (REASON, reason[:1000].encode(errors="replace")),
                (FROM, f"{self.topic}-{raw.partition()}-{raw.offset()}".encode()),
            ]
            # Whole if the dead topic takes it so; the last resort is where it lies.
            tries = [(raw.value(), [*(_headers(raw) or []), *told]), (raw.value(), told), (b"", told)]
            for last, (body, headers) in zip((False, False, True), tries, strict=True):
                try:
                    self._send(self.dead, body, headers, key=raw.key())
                    break
                except Undeliverable as exc:
                    if last:
                        raise SourceUnavailable(f"Kafka: the dead topic {self.dead!r}: {exc}") from None
            self.done([received])

    def give_back(self, received: Sequence[Received]) -> None:
        """See `source.Source`. What comes after them in their partitions comes again as well."""
        with self._at_work():
            first: dict[int, int] = {}
            for one in received:
                if self._mine(one) is not None:
                    number, offset = one.handle.raw.partition(), one.handle.raw.offset()
                    first[number] = min(offset, first.get(number, offset))
            for number, offset in first.items():
                partition = self._partitions[number]
                partition.hand = {at: done for at, done in partition.hand.items() if at < offset}
                self._early = deque(raw for raw in self._early if raw.partition() != number)
                self._consumer.seek(Position(self.topic, number, offset))

    # Sending

    def publish(
        self, to: str, body: bytes, *, correlation_id: str | None, headers: Mapping[str, str]
    ) -> None:
        """See `source.Source`. `to` is the name of a topic."""
        if not _TOPIC.fullmatch(to):
            raise Undeliverable("a topic is named by at most 249 letters, digits, '.', '-' and '_'")
        told = {**headers, "content_type": "application/json"}
        if correlation_id is not None:
            told["correlation_id"] = correlation_id
        given = [(name, value.encode(errors="replace")) for name, value in told.items()]
        key = correlation_id.encode(errors="replace") if correlation_id else None
        with self._at_work():
            self._send(to, body, given, key=key)  # by the key those of one request stay in order

    def _send(self, topic: str, body: bytes | None, headers: list[Any], *, key: bytes | None) -> None:
        if self._producer is None:
            usual = {
                "message.timeout.ms": int(ANSWER_S * 1000),
                "topic.metadata.propagation.max.ms": 5000,  # for as long a topic may be unknown
                "message.max.bytes": 100_000_000,  # brokers have limits of their own
                "linger.ms": 0,
            }
            self._producer = Producer({**usual, **self._reach}, logger=log)
        outcome: list[Any] = []
        try:
            self._producer.produce(
                topic, body, key=key, headers=headers, on_delivery=lambda error, _: outcome.append(error)
            )
            self._producer.flush(ANSWER_S + 2)
        except (KafkaException, BufferError) as exc:
            outcome = [exc.args[0]]
        if not outcome:
            self._producer.purge()
            self._producer.poll(0)
            raise SourceUnavailable(f"Kafka: no answer within {ANSWER_S:.0f} s")
        error = outcome[0]
        if error is None:
            return
        if isinstance(error, KafkaError) and error.code() in _UNDELIVERABLE:
            raise Undeliverable(f"Kafka: topic {topic!r}: {_words(error)}")
        raise SourceUnavailable(f"Kafka: {_words(error)}")

    # The group

    def _keep(self) -> None:
        """Poll, so that the group and the broker see us, and take nothing."""
        if self._consumer is None:
            return
        if not self._paused:
            self._consumer.pause(self._consumer.assignment())
            self._paused = True
        raw = self._consumer.poll(0)
        if raw is not None and raw.error() is None:
            self._early.append(raw)

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self._consumer.resume(self._consumer.assignment())

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._keeper.at_work():
            try:
                yield
            except KafkaException as exc:
                error = exc.args[0]
                if isinstance(error, KafkaError) and error.fatal():
                    self._drop()
                raise SourceUnavailable(f"Kafka: {_words(error)}") from None

    def _drop(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            with contextlib.suppress(Exception):
                consumer.close()
        self._partitions.clear()
        self._early.clear()
        self._paused = False

    def close(self) -> None:
        """See `source.Source`. The group gives its partitions to others at once."""
        self._keeper.stop()
        with self._keeper.at_work():
            with contextlib.suppress(Exception):
                if self._consumer is not None:
                    self._commit()
            self._drop()
            self._producer = None


def _config(environ: Mapping[str, str], mistakes: list[str]) -> dict[str, Any]:
    """Return the client's further configuration; its values, which may be secret, are in no text."""
    name = "DAGRELAY_KAFKA_CONFIG"
    text = read_value(environ, name, mistakes)
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        mistakes.append(f"{name} is no JSON: give an object by librdkafka's names")
        return {}
    if not isinstance(found, dict):
        mistakes.append(f"{name} is no JSON object")
        return {}
    for key, value in found.items():
        if key in _OURS:
            mistakes.append(f"{name}: {key} is not to be set there: it is the URL's, or ours")
        elif not isinstance(value, str | int | float):
            mistakes.append(f"{name}: {key[:60]} is neither text nor a number nor true or false")
    return found


# For a name that is no UTF-8 confluent-kafka 2.16 returns a list with a hole in it, and an error set. Only a
# call from C is checked for that: the interpreter's own, once specialised, goes on to a segmentation fault.
_headers_of: Final = operator.methodcaller("headers")


def _headers(raw: Any) -> list[Any] | None:
    """Return a message's headers, None where their names cannot be read."""
    try:
        return _headers_of(raw) or []
    except (SystemError, UnicodeDecodeError):
        return None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _words(error: Any) -> str:
    text = error.str() if isinstance(error, KafkaError) else str(error)
    return re.sub(r'value "[^"]*"', "value", " ".join(text.split()))[:300]
