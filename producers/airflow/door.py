"""The TCP door beside one component of an Airflow: a child of that process, which ends with it.

``DAGRELAY_PLUGIN_COMPONENT=scheduler`` (or ``triggerer``, or ``dag-processor``) starts it there, and in no
other process. It is ``dagrelay socket``, with each option as a variable: ``--port`` is
``DAGRELAY_PLUGIN_PORT``, ``--keys`` is ``DAGRELAY_PLUGIN_KEYS``. ``DAGRELAY_REDIS_URL`` names the Redis.

A process, and no thread, for its host's sake: a busy door would take the scheduler's one interpreter lock and
its memory; and executors and parsers are forks of the scheduler, which would inherit the port and every
connection. So the host has one child more, whatever comes in. What goes wrong is a line in the host's log,
and the host goes on without a door.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

PREFIX: Final = "DAGRELAY_PLUGIN_"
COMPONENT: Final = f"{PREFIX}COMPONENT"
COMPONENTS: Final = ("scheduler", "triggerer", "dag-processor")
"""Those that tell plug-ins of their start, and are one process each."""
STOP_S: Final = 0.8
"""How long the host's end waits for the door's, which takes 0.1 s unless Redis is slow."""
LOOK_S: Final = 0.5
"""How often the door looks whether its host is still there."""
NICENESS: Final = 5
"""The host's work goes first, where there is not enough of the machine for both."""
EXPENDABLE: Final = 500
"""The kernel, out of memory, kills the door before its host (whose own score is 0)."""


def component_of(argv: Sequence[str]) -> str:
    """Return which component of Airflow a command line starts, or "": `airflow scheduler …`."""
    return argv[1] if len(argv) > 1 else ""


class Door:
    """The door, as its host sees it. No method raises anything."""

    def __init__(self, component: str) -> None:
        self.component, self.host_pid = component, os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The process of the door, as long as it is known to run."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def start(self) -> None:
        """Start it, and return at once."""
        # Without Airflow's own secrets, of which the door needs none.
        env = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")}
        command = [sys.executable, "-P", "-m", "producers.airflow.door", str(self.host_pid)]
        try:
            self._process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL)  # noqa: S603 - ours
            threading.Thread(target=self._watch, name="dagrelay-door", daemon=True).start()
        except (OSError, RuntimeError) as exc:
            log.error("no TCP door: it cannot be started component=%s reason=%s", self.component, exc)
            return
        log.info("the TCP door starts component=%s pid=%d", self.component, self._process.pid)

    def stop(self) -> None:
        """Have it answer every line that it has, and end; wait for that for `STOP_S` at the most."""
        if self._process is None or os.getpid() != self.host_pid:
            return
        self._stopping = True
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)

    def _watch(self) -> None:
        assert self._process is not None  # noqa: S101
        code = self._process.wait()
        if not self._stopping:
            said = "the TCP door has ended: the lines before say why; it comes back with its host"
            log.error("%s component=%s code=%d", said, self.component, code)


def arguments(environ: Mapping[str, str]) -> list[str]:
    """Return the arguments of `dagrelay socket` that the variables say.

    Raises ConfigurationError, naming every variable that says nothing.
    """
    from ..cli_socket import socket
    from ..errors import ConfigurationError

    options = {
        opt.removeprefix("--").replace("-", "_").upper(): option
        for option in socket.params
        for opt in option.opts
    }
    given: list[str] = []
    mistakes: list[str] = []
    for variable, value in environ.items():
        name = variable.removeprefix(PREFIX)
        if name == variable or variable == COMPONENT or not value:
            continue
        if (option := options.get(name)) is None:
            mistakes.append(f"{variable}: is no setting, those are {', '.join(sorted(options))}")
        elif not getattr(option, "is_flag", False):
            given.append(f"{option.opts[0]}={value}")
        elif value.lower() in ("1", "true"):
            given.append(option.opts[0])
        elif value.lower() not in ("0", "false"):
            mistakes.append(f"{variable}: is neither true nor false")
    if mistakes:
        raise ConfigurationError(*mistakes)
    return given


def main() -> None:
    """Be the door: until the host says TERM, or has gone."""
    host_pid = int(sys.argv[1])
    threading.Thread(target=_end_with, args=(host_pid,), name="dagrelay-host", daemon=True).start()
    os.nice(NICENESS)
    with contextlib.suppress(OSError):  # not on Linux
        Path("/proc/self/oom_score_adj").write_text(str(EXPENDABLE))

    import click

    from ..cli_socket import socket
    from ..exits import EX_CONFIG, fail, told

    try:
        socket.main(told(arguments)(os.environ), prog_name="dagrelay socket", standalone_mode=False)
    except click.ClickException as exc:
        fail(exc.format_message(), EX_CONFIG)


def _end_with(host_pid: int) -> None:
    """End this process in good order once its host has gone: after kill -9 of that, nothing is left."""
    while os.getppid() == host_pid:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
