"""The names of everything that this transport keeps in Redis beside the queues themselves."""

from __future__ import annotations

from dataclasses import dataclass

SEPARATOR = "\x06\x16"
"""kombu's: the messages of a queue with a priority lie in a list of their own, `queue\\x06\\x163`."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names for one installation: `prefix` is kombu's global_keyprefix, `namespace` the application's."""

    prefix: str = ""
    namespace: str = "redis_transport"

    def _own(self, name: str) -> str:
        return f"{self.prefix}{self.namespace}:{name}"

    def queue(self, queue: str, priority: int = 0) -> str:
        """The list of a queue's messages of one priority."""
        return f"{self.prefix}{queue}{SEPARATOR}{priority}" if priority else f"{self.prefix}{queue}"

    @property
    def leases(self) -> str:
        """Sorted set: owner → until when its lease runs."""
        return self._own("leases")

    @property
    def gone(self) -> str:
        """Sorted set: dead owner → when its hands are looked at a last time."""
        return self._own("gone")

    def held(self, owner: str) -> str:
        """Hash: tag → queue list, NUL, message: what this owner has claimed and not acknowledged."""
        return self._own(f"held:{owner}")

    def hands(self, owner: str) -> str:
        """Set: the queue lists into whose hands this owner may be moving messages."""
        return self._own(f"hands:{owner}")

    def hand(self, owner: str, queue_key: str) -> str:
        """List: what a blocking move has fetched from a queue list and no claim has seen yet."""
        return self._own(f"hand:{owner}:{queue_key}")

    @property
    def hand_prefix(self) -> str:
        """`hand(owner, queue_key)` is this, the owner, a colon and the queue's key."""
        return self._own("hand:")

    @property
    def held_prefix(self) -> str:
        return self._own("held:")

    @property
    def hands_prefix(self) -> str:
        return self._own("hands:")

    @property
    def tags(self) -> str:
        """Counter: the last tag that was given out."""
        return self._own("tags")

    @property
    def returned(self) -> str:
        """Hash: SHA-1 of a message that came back unacknowledged → how often that counts against it.

        0 for one that had been begun, and could not end for a reason that was not its own.
        """
        return self._own("returned")

    @property
    def parked(self) -> str:
        """Hash: task id → retries, NUL, since when, NUL, queue list, NUL, message."""
        return self._own("parked")

    @property
    def due(self) -> str:
        """Sorted set: task id → when it comes back to its queue."""
        return self._own("due")

    @property
    def cancelled(self) -> str:
        """Sorted set: task id → when somebody asked to cancel it."""
        return self._own("cancelled")

    @property
    def cancels(self) -> str:
        """Counter of such wishes: by it workers see that there is a new one."""
        return self._own("cancels")

    @property
    def quarantine(self) -> str:
        """Hash: number → JSON of a message that no worker can read, where it lay, and why."""
        return self._own("quarantine")
