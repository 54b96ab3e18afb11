"""Shift the clock of a Python process by CLOCK_SHIFT_S seconds: for a worker whose machine's clock is wrong.

Python imports this by itself at its start, where this folder is on PYTHONPATH.
"""

import datetime
import os
import time

SHIFT_S = float(os.environ.get("CLOCK_SHIFT_S", "0"))

_time, _datetime = time.time, datetime.datetime


class Shifted(_datetime):
    """A datetime whose now is shifted."""

    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return cls.now(datetime.UTC).replace(tzinfo=None)


if SHIFT_S:
    time.time = lambda: _time() + SHIFT_S
    time.time_ns = lambda: int((_time() + SHIFT_S) * 1e9)
    datetime.datetime = Shifted  # type: ignore[misc]
