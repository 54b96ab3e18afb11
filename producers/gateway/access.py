"""One line for each answered request, gathered and written a few times a second: a write for each would cost
a tenth of what the request does. What a killed process had gathered is lost; nothing else is told there.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TextIO

WRITE_EVERY_S = 0.1


class AccessLog:
    """The lines of one process, each with the instant (UTC) at which its request was answered."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out
        self._lines: list[str] = []
        self._second, self._instant = 0, ""

    def add(self, line: str) -> None:
        """Note a line."""
        now = time.time()
        if int(now) != self._second:
            self._second = int(now)
            self._instant = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        if not self._lines:
            asyncio.get_running_loop().call_later(WRITE_EVERY_S, self.write)
        self._lines.append(f"{self._instant}.{int(now % 1 * 1000):03}Z access {line}\n")

    def write(self) -> None:
        """Write what was gathered."""
        lines, self._lines = self._lines, []
        if lines:
            out = self._out if self._out is not None else sys.stderr
            out.write("".join(lines))
            out.flush()
