"""One child process with everything below it: started, watched, ended; and small helpers around that."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

GUARD = Path(__file__).with_name("guard.py")
ROOT = Path(__file__).resolve().parent.parent
"""The repository: where `tasks`, `producers` and `celeryconfig` are importable from."""
STATE = Path(os.environ.get("DAGRELAY_LOCAL_STATE") or ROOT / ".local").resolve()
"""Where everything that is made on this machine lies. A test that needs a `make up` of its own moves it."""

Progress = Callable[[str], None]
"""Told what is being done now, one short line each."""

# What a child may inherit. Everything else (AIRFLOW__…, CELERY_…, PYTHON…) would change what it does.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE")


STILL_WAITING_S = 10.0


class PartFailed(RuntimeError):
    """A part did not start, or ended by itself. The text holds the end of its log."""


def quiet(_line: str) -> None:
    """A `Progress` that says nothing."""


class Process:
    """A running command, alone in its session, which cannot outlive this process (see `guard.py`).

    Output goes to `log`, appended. `pid` is the command's own, for SIGSTOP and for reading /proc. `send`,
    `stop` and `kill` go through the guard, so a pid that was given to somebody else meanwhile is never hit.
    Raises PartFailed if the command cannot be run at all.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace_s: float = 10.0,
        name: str | None = None,
    ) -> None:
        self.argv = [str(part) for part in argv]
        self.name = name or Path(self.argv[0]).name
        self.log = log
        self.stop_signal = stop_signal
        self.grace_s = grace_s
        self._asked_to_stop = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._log_began = output.tell()
            self._guard, said = self._launch(output, env, cwd, user)
        if not said.isdecimal():
            self._guard.wait()
            raise PartFailed(f"{self.name} cannot be run: {said.removeprefix('error ') or 'its guard ended'}")
        self.pid = int(said)

    def _launch(
        self, output: BinaryIO, env: Mapping[str, str] | None, cwd: Path | None, user: str | None
    ) -> tuple[subprocess.Popen[bytes], str]:
        """Start the guard; return it, and the line in which it says the command's pid or what went wrong."""
        read_end, write_end = os.pipe()
        guard = [sys.executable, "-I", "-S", str(GUARD), str(write_end)]
        try:
            made = subprocess.Popen(
                [*guard, str(int(self.stop_signal)), str(self.grace_s), user or "-", "--", *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                cwd=cwd,
                pass_fds=(write_end,),
                start_new_session=True,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        with os.fdopen(read_end) as report:
            return made, report.readline().strip()

    def poll(self) -> int | None:
        """The command's return code, negative for a signal; None while it runs."""
        code = self._guard.poll()
        return -(code - 128) if code is not None and code > 128 else code

    @property
    def alive(self) -> bool:
        return self._guard.poll() is None

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end and return the code as `poll` does. Raises TimeoutError."""
        try:
            self._guard.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} still runs after {timeout_s} s") from None
        code = self.poll()
        return 0 if code is None else code

    def send(self, number: int) -> None:
        """Send TERM, INT or QUIT to the command (not to those it started)."""
        if self.alive:
            self._guard.send_signal(number)

    def kill(self) -> int:
        """SIGKILL the command and everything below it; return when all of it is gone."""
        self.send(signal.SIGUSR1)
        return self.wait()

    def ask_to_stop(self) -> None:
        """Send the stop signal and do not wait: `stop` does, later."""
        self._asked_to_stop = True
        self.send(self.stop_signal)

    def stop(self, *, grace_s: float | None = None) -> int:
        """Ask the command to end, kill it after `grace_s` (None: as given at start), return its code."""
        if not self._asked_to_stop:  # some take a second TERM for "at once"
            self.ask_to_stop()
        try:
            return self.wait(self.grace_s if grace_s is None else grace_s)
        except TimeoutError:
            return self.kill()

    def failure(self, what: str) -> PartFailed:
        """The error that says `what` went wrong and shows the end of the log."""
        return PartFailed(
            f"{self.name}: {what}\n--- end of {self.log}\n{tail(self.log, since=self._log_began)}"
        )

    def wait_until(
        self, ready: Callable[[], bool], *, timeout_s: float, what: str, every_s: float = 0.05
    ) -> None:
        """Call `ready` until it is true. Raises PartFailed if the command ends or the time is over."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.alive:
                raise self.failure(f"ended with {self.poll()} before {what}")
            if time.monotonic() > deadline:
                raise self.failure(f"not {what} after {timeout_s:g} s")
            time.sleep(every_s)


def run_to_end(process: Process, *, timeout_s: float, what: str, progress: Progress = quiet) -> None:
    """Wait until a command has ended well. Raises PartFailed, saying `what` could not be done.

    Says every 10 s that it still waits. Whatever interrupts the waiting ends the command too.
    """
    began = time.monotonic()
    code = None
    try:
        while code is None and (waited_s := time.monotonic() - began) < timeout_s:
            if waited_s >= STILL_WAITING_S:
                progress(f"still at it: {what} ({waited_s:.0f} s)")
            with contextlib.suppress(TimeoutError):
                code = process.wait(min(STILL_WAITING_S, timeout_s - waited_s))
    finally:
        if code is None:
            process.kill()
    if code is None:
        raise process.failure(f"could not {what} within {timeout_s:g} s")
    if code != 0:
        raise process.failure(f"could not {what}: ended with {code}")


def tail(path: Path, lines: int = 30, *, since: int = 0) -> str:
    """The last lines of a file, of what was written `since` a size in bytes; empty if there is none."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(since, path.stat().st_size - 32_768))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    return ""


def free_port() -> int:
    """A TCP port on loopback that nobody listens on.

    From below the range that Linux hands to outgoing connections (32768 up), so that none of those takes it
    between this call and the bind; at random, so that two stacks that start together rarely meet.
    """
    for _ in range(200):
        port = random.randint(20_000, 32_000)  # noqa: S311 - no secret
        if port_free(port):
            return port
    raise PartFailed("no free TCP port between 20000 and 32000 on 127.0.0.1")


def port_free(port: int) -> bool:
    """Whether a server could listen on this TCP port of loopback now."""
    with socket.socket() as probe:
        # As servers do: else a connection that ended a moment ago makes the port look taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def clean_env(**extra: str) -> dict[str, str]:
    """The environment for a child: only what is harmless of ours, and `extra`."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ} | extra


def secret_file(path: Path, content: str) -> None:
    """Write a file that only its owner can read, never readable by others even for a moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(content)
    new.replace(path)
