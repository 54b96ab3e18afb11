"""Processes that stand still, as on a machine that is paused."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

STANDS_WITHIN_S = 30.0


@contextmanager
def standing_still(*pids: int) -> Iterator[None]:
    """Have processes stop where they are; afterwards they go on."""
    try:
        for pid in pids:
            stand_still(pid)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def stand_still(pid: int) -> None:
    """Stop a process, and return when each of its threads stands.

    `kill` only asks one of them to: until that one has a CPU, the others go on, and answer.
    """
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + STANDS_WITHIN_S
    while any(state not in "TtZX" for state in _states(pid)):  # stopped, or at its end
        assert time.monotonic() < until, f"process {pid} does not stand still"
        time.sleep(0.005)


def _states(pid: int) -> Iterable[str]:
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            yield stat.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # a thread that has ended
            continue
