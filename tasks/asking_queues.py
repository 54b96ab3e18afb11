"""The way to services that are queues: one connection of a process to each, made when it is first needed."""

from __future__ import annotations

import json
import threading
from typing import Any

from producers.errors import ConfigurationError, ServiceUnavailable, SubmitRejected
from producers.queues.source import Source, SourceUnavailable, Undeliverable
from producers.queues.sources import publisher_for

from .http import reset_after_fork
from .services import Queue, Service


class QueueSender:
    """Publishes to one service, one message after the other; safe for threads, and after a fork."""

    def __init__(self, service: Service, queue: Queue) -> None:
        self.service, self._queue = service, queue
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Leave the connection to the parent; a lock may have been held as it forked."""
        self._lock = threading.Lock()
        self._source: Source | None = None

    def send(self, message: Any, *, correlation_id: str, message_id: str) -> None:
        """Publish once; return when the broker has it.

        Raises ServiceUnavailable where it may have it or not, and SubmitRejected where there is no such
        place.
        """
        body = json.dumps(message, allow_nan=False).encode()
        headers = {"id": message_id}
        if self._queue.reply_to:
            headers["reply_to"] = self._queue.reply_to
        try:
            with self._lock:
                if self._source is None:
                    self._source = publisher_for(self._queue.url, keep_all=True)
                self._source.publish(self._queue.name, body, correlation_id=correlation_id, headers=headers)
        except SourceUnavailable as exc:
            raise ServiceUnavailable(self.service.masked(str(exc))) from exc
        except ConfigurationError as exc:  # a package that is missing here
            raise ServiceUnavailable(self.service.masked(str(exc)), None, False) from exc
        except Undeliverable as exc:
            raise SubmitRejected(self.service.id, 0, self.service.masked(str(exc))) from exc


_senders: dict[str, QueueSender] = {}
_lock = threading.Lock()


def queue_sender(service: Service) -> QueueSender:
    """Return this process's sender to a service that is a queue."""
    if service.queue is None:
        raise ValueError(f"service {service.id!r} is no queue")
    with _lock:
        found = _senders.get(service.id)
        if found is None or found.service != service:
            found = _senders[service.id] = QueueSender(service, service.queue)
    return found
