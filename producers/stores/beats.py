"""The heartbeat of a worker process: a small file on its own machine, for probes in the same container.

A worker writes it once a second, as long as its event loop turns (`tasks/beat.py`). It needs neither Redis
nor Celery's remote control, so a probe that reads it says nothing of these: a worker that waits for Redis to
come back is alive, and to start it again would mend nothing.

The files lie in a folder of the user's own below the temporary one, one for each worker process.
Instants are those of the machine's monotonic clock, which all of its processes share, and nobody sets.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

State = Literal["connecting", "running", "leaving"]


@dataclass(frozen=True, slots=True)
class Beat:
    """What a worker said of itself last. `at` is in seconds of the machine's monotonic clock."""

    node: str
    """Celery's name for it, celery@host."""
    pid: int
    at: float
    state: State
    """`connecting` while there is no connection to Redis; `leaving` while its last tasks end."""
    owner: str = ""
    """Whose lease is its own, in Redis; empty before it has one."""

    @property
    def age_s(self) -> float:
        """Seconds since it was written."""
        return time.monotonic() - self.at

    @property
    def process_there(self) -> bool:
        """Whether there is a process with this id (it may be another one by now)."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def folder() -> Path:
    """Return the folder of this user's heartbeats."""
    return Path(tempfile.gettempdir()) / f"dagrelay-{os.getuid()}"


def path_of(node: str, pid: int) -> Path:
    """Return the file of a worker."""
    return folder() / f"{re.sub(r'[^A-Za-z0-9@._-]', '_', node)[:200]}.{pid}.beat"


def write(beat: Beat) -> None:
    """Write a heartbeat, whole or not at all. Raises OSError, also where the folder is somebody else's."""
    path = path_of(beat.node, beat.pid)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if path.parent.is_symlink() or path.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{path.parent} belongs to somebody else")
    new = path.with_suffix(".new")
    new.write_text(json.dumps(asdict(beat)))
    new.replace(path)


def read_all() -> list[Beat]:
    """Return the heartbeats of this machine's workers (of this user), whether they live or not.

    Raises OSError where they cannot be read; that there are none is no error.
    """
    found = []
    with suppress(FileNotFoundError):
        for path in sorted(folder().iterdir()):
            if path.suffix == ".beat":
                with suppress(FileNotFoundError, ValueError, TypeError):
                    found.append(Beat(**json.loads(path.read_text())))
    return found


def remove(node: str, pid: int) -> None:
    """Take a heartbeat away, at the end of a worker."""
    with suppress(OSError):
        path_of(node, pid).unlink()


__all__ = ["Beat", "State", "folder", "path_of", "read_all", "remove", "write"]
