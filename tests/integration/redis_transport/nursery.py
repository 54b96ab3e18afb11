"""Workers of `app.py` that are forked from one process, and so start in 0.1 s."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from local.process import ROOT, clean_env


class Nursery:
    """The process that forks: `app.nursery`. `close` ends every worker that it has begun."""

    def __init__(self, folder: Path, module: str = "app") -> None:
        with (folder / "nursery.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"tests.integration.redis_transport.{module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=clean_env(),
                text=True,
            )
        self.running: set[int] = set()

    def _ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, **order: Any) -> int:
        """Fork a worker; see `app.run_worker` for what it is told. Return its pid."""
        pid = self._ask(order)
        self.running.add(pid)
        return pid

    def end(self, pid: int, number: int = 0) -> int:
        """Send a signal (0: none), wait, and return the code."""
        code = self._ask({"end": pid, "signal": number})
        self.running.discard(pid)
        return code

    def close(self) -> None:
        for pid in tuple(self.running):
            self.end(pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()


def is_running(pid: int) -> bool:
    """Tell whether a process is there and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
