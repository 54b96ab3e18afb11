"""A real worker process, as `make worker` starts it, for tests and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from local.process import Process, clean_env

ROOT = Path(__file__).resolve().parent.parent
CELERY = ROOT / ".venv" / "bin" / "celery"


class Worker:
    """`celery -A tasks worker` in a process of its own, with its own log; `with Worker(...) as worker:`.

    `connections` maps connection ids to AIRFLOW_CONN_ values. `alone=False` has it speak with other workers,
    as one by `make worker` does. It is ready when `__enter__` returns.
    """

    made_by: ClassVar[Callable[..., Process]] = Process
    """Tests set it to `preloaded.process`; benchmarks do not."""

    def __init__(
        self,
        redis_url: str,
        folder: Path,
        *,
        connections: dict[str, str] | None = None,
        name: str = "w1",
        options: tuple[str, ...] = (),
        alone: bool = True,
        **env: str,
    ) -> None:
        self.log = folder / f"{name}.log"
        self._argv = [
            *(str(CELERY), "-A", "tasks", "worker", "-n", f"{name}@%h"),
            # To ask the others takes a second when a worker starts.
            *(("--without-mingle", "--without-gossip") if alone else ()),
            *options,
        ]
        self._env = clean_env(
            DAGRELAY_REDIS_URL=redis_url,
            **{f"AIRFLOW_CONN_{name.upper()}": uri for name, uri in (connections or {}).items()},
            **{"DAGRELAY_VISIBILITY_TIMEOUT_S": "5", **env},
        )
        self._process: Process | None = None

    def start(self) -> Worker:
        """Start it; return when it takes messages."""
        seen = len(self.text())
        made = type(self).made_by
        self._process = made(self._argv, log=self.log, env=self._env, cwd=ROOT, name="worker", grace_s=20)
        try:
            self._process.wait_until(
                lambda: " ready." in self.text()[seen:], timeout_s=30, what="ready", every_s=0.05
            )
        except BaseException:
            self._process.kill()
            raise
        return self

    @property
    def process(self) -> Process:
        if self._process is None:
            raise RuntimeError("the worker was not started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        """Everything it has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def stop(self) -> int:
        """TERM, wait; return its code."""
        return self.process.stop()

    def kill(self) -> None:
        """SIGKILL it and everything below it."""
        self.process.kill()

    def cpu_s(self) -> float:
        """CPU seconds that it has used so far, its threads included."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.alive:
            self._process.kill() if kind else self._process.stop()
