"""From a URL to the source that it names. What a source needs is imported only when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from ..errors import ConfigurationError
from .redis_stream import RedisStreams
from .source import Source

_OTHERS: Final = {
    "amqp": ("rabbitmq", "RabbitSource"),
    "amqps": ("rabbitmq", "RabbitSource"),
    "sqs": ("sqs", "SqsSource"),
    "kafka": ("kafka", "KafkaSource"),
}
_STREAMS: Final = ("redis", "rediss", "unix")

FORMS: Final = (
    "redis://host:6379/0?stream=dag-triggers, amqp://host/vhost?queue=dag-triggers, "
    "sqs://?queue=dag-triggers, kafka://host:9092/dag-triggers"
)


def source_for(url: str) -> Source:
    """Return the source that a URL names, not connected yet. Its forms are in each source's module.

    Raises ConfigurationError, which shows nothing of the URL that may be secret.
    """
    return _source(url)


def publisher_for(url: str, *, keep_all: bool = False) -> Source:
    """Return a source of which only `publish` and `close` are used. Raises ConfigurationError.

    `keep_all`: what is published are requests, none of which may go. Answers nobody reads may.
    """
    return _source(url, receives=False, keep_all=keep_all)


def _source(url: str, *, receives: bool = True, keep_all: bool = False) -> Source:
    scheme = url.partition("://")[0].lower()
    if scheme in _STREAMS:
        return RedisStreams.from_url(url, receives=receives, keep_all=keep_all)
    if scheme not in _OTHERS:
        raise ConfigurationError(f"the source's URL is none of the forms {FORMS}")
    module, name = _OTHERS[scheme]
    try:
        kind = getattr(import_module(f".{module}", __package__), name)
    except ImportError as exc:
        missing = (exc.name or "").partition(".")[0]
        raise ConfigurationError(
            f"a source {scheme}:// needs the package {missing!r}, which is not installed here: "
            "pip install 'dagrelay[queues]'"
        ) from exc
    found: Source = kind.from_url(url)
    return found
