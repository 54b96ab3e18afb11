"""The parking lot: messages that are not due yet, one for each task id, and the quarantine beside it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from . import messages, scripts
from .keys import Keys


@dataclass(frozen=True, slots=True)
class Parked:
    """One parked message. Instants are seconds since 1970 by Redis' clock."""

    task_id: str
    task: str
    due_at: float
    since: float
    retries: int
    queue_key: str


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One message that no worker can read, with the reason and the queue list where it lay."""

    number: int
    at: float
    queue_key: str
    reason: str
    message: bytes


class Lot:
    """The parked messages in one Redis. Every method raises what redis-py raises."""

    def __init__(self, client: Any, keys: Keys) -> None:
        self._client, self._keys = client, keys

    def park(
        self,
        task_id: str,
        *,
        due: float,
        retries: int,
        queue_key: str,
        message: bytes,
        held: str = "",
        tag: int | str = "",
    ) -> str:
        """Park one message until `due`; see the script PARK for what is returned."""
        answer = scripts.PARK(
            self._client,
            (self._keys.parked, self._keys.due, held or self._keys.held(""), self._keys.cancelled),
            (task_id, f"{due:.6f}", retries, queue_key, message, tag),
        )
        return _text(answer)

    def move_due(self, most: int = 1000) -> tuple[int, float | None, int, int]:
        """Bring back what is due; return how many, in how many seconds the next is due, how many workers
        there are, and how often a cancel was asked for so far."""
        keys = self._keys
        count, next_in, workers, cancels = scripts.MOVE(
            self._client, (keys.parked, keys.due, keys.leases, keys.cancels), (most,)
        )
        return int(count), float(next_in) if next_in else None, int(workers), int(cancels)

    def cancelled(self, since: float = 0.0) -> tuple[list[str], float]:
        """Return the tasks that somebody asked to cancel since then, and until when this tells.

        And those of the minute before: Redis' clock may have been set back.
        """
        found = self._client.execute_command(
            "ZRANGE", self._keys.cancelled, f"{since - 60:.6f}", "+inf", "BYSCORE", "WITHSCORES"
        )
        flat = [item for entry in found for item in entry] if found and isinstance(found[0], list) else found
        return [_text(one) for one in flat[::2]], float(flat[-1]) if flat else since

    def is_stale(self, task_id: str, retries: int, held: str, tag: int) -> bool:
        """Tell whether a newer copy of a task waits; the one with this tag is dropped then."""
        return bool(scripts.STALE(self._client, (self._keys.parked, held), (task_id, retries, tag)))

    def size(self) -> int:
        """Return how many messages are parked."""
        return int(self._client.zcard(self._keys.due))

    def list(self, most: int = 1000) -> Iterator[Parked]:
        """Yield parked messages, the next due first."""
        due = self._client.zrange(self._keys.due, 0, most - 1, withscores=True)
        for raw_id, due_at in due:
            found = self.get(_text(raw_id), due_at=due_at)
            if found is not None:
                yield found

    def get(self, task_id: str, due_at: float | None = None) -> Parked | None:
        """Return one parked message, or None."""
        value = self._client.hget(self._keys.parked, task_id)
        if value is None:
            return None
        retries, since, queue_key, message = _bytes(value).split(b"\0", 3)
        if due_at is None:
            due_at = self._client.zscore(self._keys.due, task_id) or 0.0
        task = json.loads(message)["headers"].get("task", "")
        return Parked(task_id, task, float(due_at), float(since), int(retries), queue_key.decode())

    def wake(self, task_ids: Iterable[str]) -> int:
        """Send parked tasks on early; return how many were parked."""
        pipe = self._client.pipeline(transaction=False)
        for task_id in task_ids:
            # XX: one that has left meanwhile is not to come back. CH counts what was changed.
            pipe.zadd(self._keys.due, {task_id: 0}, xx=True, ch=True)
        return sum(pipe.execute())

    def revoke(self, task_id: str) -> bool:
        """Mark a parked task as revoked and send it on, for Celery to end it; tell whether it was parked."""
        while True:
            value = self._client.hget(self._keys.parked, task_id)
            if value is None:
                return False
            head, message = _bytes(value).rsplit(b"\0", 1)
            amended = head + b"\0" + messages.revoked(message)
            if scripts.AMEND(self._client, (self._keys.parked, self._keys.due), (task_id, value, amended)):
                return True

    def send_on_revoked(self, queue_key: str, message: bytes) -> None:
        """Put a message that was not parked, because it is cancelled, to its queue with its mark."""
        self._client.lpush(queue_key, messages.revoked(message))

    def quarantine(
        self, raw: bytes, *, queue_key: str, reason: str, held: str = "", tag: int | str = "", sha: str = ""
    ) -> None:
        """Put a message aside with its bytes and a reason."""
        entry = json.dumps(
            {
                "at": time.time(),
                "queue_key": queue_key,
                "reason": reason,
                "message": base64.b64encode(raw).decode(),
            }
        )
        keys = self._keys
        scripts.QUARANTINE(
            self._client,
            (held or keys.held(""), keys.quarantine, keys.tags, keys.returned),
            (tag, sha, entry),
        )

    def quarantined(self) -> Iterator[Quarantined]:
        """Yield what is in quarantine."""
        for number, value in self._client.hscan_iter(self._keys.quarantine):
            yield _quarantined(int(number), value)

    def replay(self, number: int) -> bool:
        """Put a quarantined message back to its queue as it was; tell whether it was there."""
        value = self._client.hget(self._keys.quarantine, str(number))
        if value is None:
            return False
        found = _quarantined(number, value)
        return bool(
            scripts.REPLAY(
                self._client, (self._keys.quarantine, found.queue_key), (number, value, found.message)
            )
        )


def _quarantined(number: int, value: Any) -> Quarantined:
    entry = json.loads(value)
    message = base64.b64decode(entry["message"])
    return Quarantined(number, entry["at"], entry["queue_key"], entry["reason"], message)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
