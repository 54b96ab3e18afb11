"""How fast each key may ask: a token bucket of each process, told in the headers of the IETF's draft.

Source: draft-ietf-httpapi-ratelimit-headers-10. Each worker process has its share of a key's rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..keys import Key

FORGET_ABOVE: Final = 10_000
"""So many buckets are kept; a key that was away for so long has a full one anyway."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request may pass, and what its answer says of the limit."""

    allowed: bool
    headers: tuple[tuple[bytes, bytes], ...]
    retry_after_s: int = 0


class Limits:
    """The buckets of one process."""

    def __init__(self, share: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._share, self._clock = share, clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def ask(self, key: Key) -> Verdict | None:
        """Take one from a key's bucket; None for a key without a limit."""
        if key.rate_per_s is None:
            return None
        rate, burst = key.rate_per_s * self._share, max(1.0, key.burst * self._share)
        now = self._clock()
        left, at = self._buckets.get(key.id, (burst, now))
        left = min(burst, left + (now - at) * rate)
        allowed = left >= 1.0
        if allowed:
            left -= 1.0
        if len(self._buckets) >= FORGET_ABOVE and key.id not in self._buckets:
            self._buckets.clear()
        self._buckets[key.id] = (left, now)
        policy = f'"key";q={int(burst)};w={math.ceil(burst / rate)}'
        limit = f'"key";r={int(left)};t={math.ceil((burst - left) / rate)}'
        headers = ((b"ratelimit-policy", policy.encode()), (b"ratelimit", limit.encode()))
        return Verdict(allowed, headers, 0 if allowed else max(1, math.ceil((1.0 - left) / rate)))
