"""Amazon SQS: messages from a queue, answers to queues.

    sqs://?queue=dag-triggers&region=eu-central-1

Credentials are found as every AWS tool finds them (environment, profile, role of the machine); `sqs://KEY:SECRET@`
gives them in the URL. Options:

================ =====================================================================================
``queue``        where messages lie; it has to be there. A FIFO queue's name ends in `.fifo`
``region``       left out: AWS_DEFAULT_REGION, or the profile's
``endpoint``     another address than the region's: `http://127.0.0.1:7520`
``dead``         where refused ones go; `<queue>-dead` if left out, made if it is not there and may be
``visibility_s`` 120 if left out: how long others wait for what a listener had that was killed
``name``         what is the same for all listeners of the queue; endpoint or region, and queue if left out
================ =====================================================================================

**Who names a message.** SQS does, the same each time it delivers it; or the sender, in an attribute `id`.
Attributes `content_type`, `reply_to` and `correlation_id` mean what their names say, all others are headers.

boto3 is used, and not kombu's SQS transport: there, a foreign publisher's message that is given back raises
KeyError, each acknowledgement is a call of its own, and a process that ends writes what it holds, bodies
and all, to a file in /tmp.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final
from uuid import uuid4

import boto3  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

from ..errors import ConfigurationError
from .message import Incoming
from .source import Received, SourceUnavailable, Undeliverable
from .urls import parsed

FORM: Final = "sqs://?queue=dag-triggers&region=eu-central-1"

AT_ONCE: Final = 10
"""So many messages one call takes, of any kind."""
LONGEST_POLL_S: Final = 20
MOST_ATTRIBUTES: Final = 10
REASON: Final = "dagrelay_reason"

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo")
_NO_QUEUE: Final = ("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist")
# What SQS says when it will not take a message however often it is sent.
_REFUSED: Final = (
    "AccessDenied",
    "AccessDeniedException",
    "InvalidAddress",
    "InvalidMessageContents",
    "InvalidParameterValue",
    "UnsupportedOperation",
)


class SqsSource:
    """One queue. See `source.Source`."""

    def __init__(
        self,
        *,
        queue: str,
        region: str | None = None,
        endpoint: str | None = None,
        dead: str | None = None,
        visibility_s: int = 120,
        key: str | None = None,
        secret: str | None = None,
        name: str | None = None,
    ) -> None:
        self.queue = queue
        self.dead = dead or _beside(queue, "-dead")
        self.name = name or f"sqs:{_host(endpoint) or region or ''}/{queue}"
        self._visibility_s = visibility_s
        self._reach = {
            "region_name": region,
            "endpoint_url": endpoint,
            "aws_access_key_id": key,
            "aws_secret_access_key": secret,
        }
        self._client: Any = None
        self._urls: dict[str, str] = {}
        self._hand: dict[str, None] = {}  # receipt handles of what was neither done nor given back

    @classmethod
    def from_url(cls, url: str) -> SqsSource:
        """Return the source that a URL names. Raises ConfigurationError; connects to nothing."""
        options = ("queue", "region", "endpoint", "dead", "visibility_s", "name")
        given = parsed(url, form=FORM, options=options)
        where = f"the source's URL ({given.scheme}://…)"
        queue = given.options.get("queue", "")
        dead = given.options.get("dead") or _beside(queue, "-dead")
        endpoint = given.options.get("endpoint")
        mistakes = []
        if given.hosts or given.path:
            mistakes.append(f"{where}: names no host: give an endpoint as an option; it goes {FORM}")
        if not queue:
            mistakes.append(f"{where}: queue is missing: it goes {FORM}")
        elif not _NAME.fullmatch(queue):
            mistakes.append(f"{where}: queue is a name, of at most 80 letters, digits, '-' and '_'")
        elif not _NAME.fullmatch(dead):
            mistakes.append(f"{where}: dead is no name of a queue: at most 80 letters, digits, '-' and '_'")
        if dead == queue:
            mistakes.append(f"{where}: dead is the queue itself")
        if queue.endswith(".fifo") != dead.endswith(".fifo"):
            mistakes.append(f"{where}: queue and dead are both FIFO, or neither")
        if endpoint is not None and not re.match(r"https?://[^/@\s]+/?$", endpoint):
            mistakes.append(f"{where}: endpoint goes https://host:port")
        if (given.user is None) != (given.password is None):
            mistakes.append(f"{where}: credentials go KEY:SECRET@, a '/' in them as %2F")
        if mistakes:
            raise ConfigurationError(*mistakes)
        return cls(
            queue=queue,
            region=given.options.get("region"),
            endpoint=endpoint,
            dead=dead,
            visibility_s=given.number("visibility_s", 120, least=10, most=43_200),
            key=given.user,
            secret=given.password,
            name=given.options.get("name"),
        )

    def receive(self, most: int, wait_s: float) -> Sequence[Received]:
        """See `source.Source`. It waits in whole seconds, as SQS does, and at most 20."""
        found: list[Received] = []
        while len(found) < most:
            wait = 0 if found else min(LONGEST_POLL_S, math.ceil(wait_s))
            try:
                messages = self._take(min(AT_ONCE, most - len(found)), wait)
            except SourceUnavailable:
                if not found:
                    raise
                break  # these are in our hands
            found += map(self._received, messages)
            if not messages:
                break
        return found

    def _take(self, most: int, wait: int) -> list[dict[str, Any]]:
        with self._told():
            answer = self._sqs().receive_message(
                QueueUrl=self._url(self.queue),
                MaxNumberOfMessages=most,
                WaitTimeSeconds=wait,
                VisibilityTimeout=self._visibility_s,
                AttributeNames=["ApproximateReceiveCount", "MessageGroupId"],
                MessageAttributeNames=["All"],
            )
        messages: list[dict[str, Any]] = answer.get("Messages", [])
        return messages

    def _received(self, raw: dict[str, Any]) -> Received:
        headers = {name.lower(): _text(value) for name, value in raw.get("MessageAttributes", {}).items()}
        message = Incoming(
            body=raw.get("Body", "").encode(errors="surrogatepass"),
            id=headers.get("id") or raw["MessageId"],
            content_type=headers.get("content_type") or headers.get("content-type") or "",
            headers=headers,
            reply_to=headers.get("reply_to") or None,
            correlation_id=headers.get("correlation_id") or None,
        )
        self._hand[raw["ReceiptHandle"]] = None
        count = raw.get("Attributes", {}).get("ApproximateReceiveCount", "1")
        return Received(message, raw, int(count))

    def done(self, received: Sequence[Received]) -> None:
        """See `source.Source`. What others have by now is theirs: nothing is done about it."""
        for some in _tens([one.handle["ReceiptHandle"] for one in received]):
            entries = [{"Id": str(number), "ReceiptHandle": handle} for number, handle in enumerate(some)]
            for _ in range(3):  # of ten some may fail on SQS's side
                with self._told():
                    answer = self._sqs().delete_message_batch(QueueUrl=self._url(self.queue), Entries=entries)
                failed = {one["Id"] for one in answer.get("Failed", []) if not one.get("SenderFault")}
                entries = [entry for entry in entries if entry["Id"] in failed]
                if not entries:
                    break
            else:
                raise SourceUnavailable(f"SQS: {len(entries)} messages could not be deleted")
            for handle in some:
                self._hand.pop(handle, None)

    def refuse(self, received: Received, reason: str) -> None:
        """See `source.Source`. The reason is the attribute `dagrelay_reason`."""
        raw = received.handle
        # Whole if SQS takes it so: there are at most ten attributes, and they count as part of the size.
        told = {REASON: _string(reason[:1000])}
        whole = {name: _again(value) for name, value in raw.get("MessageAttributes", {}).items()} | told
        tries = ([whole] if len(whole) <= MOST_ATTRIBUTES else []) + [told, {}]
        for last, attributes in zip([False] * (len(tries) - 1) + [True], tries, strict=True):
            try:
                self._send(
                    self.dead,
                    raw["Body"],
                    attributes,
                    group=raw.get("Attributes", {}).get("MessageGroupId", "dagrelay"),
                    once=raw["MessageId"],
                    make=True,
                )
                break
            except Undeliverable as exc:
                if last:
                    raise SourceUnavailable(f"SQS: the dead queue {self.dead!r}: {exc}") from None
        self.done([received])

    def give_back(self, received: Sequence[Received]) -> None:
        """See `source.Source`."""
        self._give_back([one.handle["ReceiptHandle"] for one in received])

    def _give_back(self, handles: Iterable[str]) -> None:
        for some in _tens(list(handles)):
            entries = [
                {"Id": str(number), "ReceiptHandle": handle, "VisibilityTimeout": 0}
                for number, handle in enumerate(some)
            ]
            with self._told():
                self._sqs().change_message_visibility_batch(QueueUrl=self._url(self.queue), Entries=entries)
            for handle in some:
                self._hand.pop(handle, None)

    def publish(
        self, to: str, body: bytes, *, correlation_id: str | None, headers: Mapping[str, str]
    ) -> None:
        """See `source.Source`. `to` is the name of a queue of the same account and region."""
        # A name: from a queue's URL boto3 would take the host to send to.
        if not _NAME.fullmatch(to):
            raise Undeliverable("reply_to is the name of a queue: at most 80 letters, digits, '-' and '_'")
        attributes = {name: _string(value) for name, value in headers.items() if value}
        attributes["content_type"] = _string("application/json")
        if correlation_id:
            attributes["correlation_id"] = _string(correlation_id)
        self._send(to, body.decode(), attributes, group=correlation_id or "dagrelay", once=uuid4().hex)

    def _send(
        self,
        queue: str,
        body: str,
        attributes: dict[str, Any],
        *,
        group: str,
        once: str,
        make: bool = False,
    ) -> None:
        more: dict[str, Any] = {}
        if queue.endswith(".fifo"):
            more = {"MessageGroupId": _group(group), "MessageDeduplicationId": once}
        with self._told(queue):
            self._sqs().send_message(
                QueueUrl=self._url(queue, make=make), MessageBody=body, MessageAttributes=attributes, **more
            )

    def _url(self, queue: str, *, make: bool = False) -> str:
        if queue not in self._urls:
            if len(self._urls) > 1000:  # senders name the queues of their answers
                self._urls.clear()
            try:
                found = self._sqs().get_queue_url(QueueName=queue)
            except ClientError as exc:
                if not make or _code(exc) not in _NO_QUEUE:
                    raise
                kept = {"MessageRetentionPeriod": "1209600"}  # 14 days, the longest
                if queue.endswith(".fifo"):
                    kept["FifoQueue"] = "true"
                found = self._sqs().create_queue(QueueName=queue, Attributes=kept)
            self._urls[queue] = found["QueueUrl"]
        return self._urls[queue]

    def _sqs(self) -> Any:
        if self._client is None:
            # A session of its own: the default one is not made for several threads.
            self._client = boto3.session.Session().client(
                "sqs",
                **self._reach,
                config=Config(
                    connect_timeout=5,
                    read_timeout=LONGEST_POLL_S + 10,
                    retries={"mode": "standard", "total_max_attempts": 2},
                ),
            )
        return self._client

    @contextlib.contextmanager
    def _told(self, to: str | None = None) -> Iterator[None]:
        """Raise SourceUnavailable for what goes wrong; Undeliverable where that is the queue `to`."""
        try:
            yield
        except ClientError as exc:
            code = _code(exc)
            words = f"SQS: {code}: {exc.response.get('Error', {}).get('Message', '')}"[:300]
            if code in _NO_QUEUE:
                self._urls.pop(to or self.queue, None)
                words = f"SQS: there is no queue {to or self.queue!r} here"
            if to is not None and code in (*_NO_QUEUE, *_REFUSED):
                raise Undeliverable(words) from None
            raise SourceUnavailable(words) from None
        except (BotoCoreError, OSError, ValueError) as exc:
            raise SourceUnavailable(f"SQS: {type(exc).__name__}: {exc}"[:300]) from None

    def close(self) -> None:
        """See `source.Source`. What is in hand goes back at once, and not after the visibility timeout."""
        with contextlib.suppress(Exception):
            if self._hand:
                self._give_back(self._hand)
        self._hand.clear()
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.close()


def _tens(handles: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(handles), AT_ONCE):
        yield handles[start : start + AT_ONCE]


def _beside(queue: str, suffix: str) -> str:
    return f"{queue.removesuffix('.fifo')}{suffix}.fifo" if queue.endswith(".fifo") else f"{queue}{suffix}"


def _host(endpoint: str | None) -> str:
    return (endpoint or "").partition("://")[2].rstrip("/").lower()


def _group(name: str) -> str:
    """Return a FIFO queue's message group: 1 to 128 characters of ASCII."""
    return re.sub(r"[^!-~]", "_", name)[:128] or "dagrelay"


def _string(text: str) -> dict[str, str]:
    # XML's characters and no others, and not none of them.
    allowed = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
    return {"DataType": "String", "StringValue": allowed or "-"}


def _again(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an attribute as it is sent, from what was received."""
    return {name: value[name] for name in ("DataType", "StringValue", "BinaryValue") if name in value}


def _text(value: Mapping[str, Any]) -> str:
    if "BinaryValue" in value:
        return bytes(value["BinaryValue"]).decode(errors="replace")
    return str(value.get("StringValue", ""))


def _code(exc: ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))
