"""A place that messages come from, and answers go to: what a queue door needs to know of a broker.

One module each: `redis_stream`, `rabbitmq`, `sqs`, `kafka`. A source blocks, and belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .message import Incoming


@dataclass(frozen=True, slots=True)
class Received:
    """One message in our hands: nobody else gets it before it is done, or we are gone."""

    message: Incoming
    handle: Any
    """What the source needs to acknowledge it."""
    deliveries: int = 1
    """How often it was delivered, this time included, as far as the broker counts."""


class SourceUnavailable(Exception):
    """The broker does not answer, or refuses. The text says why, without a secret."""


class PlaceFull(SourceUnavailable):
    """The broker answers, and this one place takes nothing more for now; all others may."""


class Undeliverable(Exception):
    """The broker answers, and there is no such place, or it may not be written to: to try again is no use."""


class Source(Protocol):
    """Every method raises SourceUnavailable, and may be called again afterwards: it connects anew.

    It connects on first use, and has messages sent to it only once `receive` was called: a listener has a
    second one, in another thread, which only publishes.
    """

    name: str
    """The same for all who take from the same place; no secret: ids are unique within it."""

    def receive(self, most: int, wait_s: float) -> Sequence[Received]:
        """Return up to so many messages; wait up to so many seconds for the first."""

    def done(self, received: Sequence[Received]) -> None:
        """Acknowledge: they will not come again."""

    def refuse(self, received: Received, reason: str) -> None:
        """Put one into the source's own dead queue, whole and with the reason; then acknowledge it."""

    def give_back(self, received: Sequence[Received]) -> None:
        """Leave them for somebody else, as if they had not been received."""

    def publish(
        self, to: str, body: bytes, *, correlation_id: str | None, headers: Mapping[str, str]
    ) -> None:
        """Send a JSON text to a place in this source's terms; return when the broker has it.

        Raises Undeliverable too, and PlaceFull.
        """

    def close(self) -> None:
        """Let go of everything; never raises."""
