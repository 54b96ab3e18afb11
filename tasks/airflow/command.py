"""Running a command: with an end to its time, to what it prints, and to what it leaves behind."""

from __future__ import annotations

import errno
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from tasks.airflow.connections import Command

MAX_ARGUMENT_BYTES: Final = 131_071
"""Linux takes no longer argument, whatever there is room for in all (MAX_ARG_STRLEN, less the NUL)."""

MAX_OUTPUT_BYTES: Final = 16_000_000
"""What a command may print: 80,000 runs of a list."""

KEPT_ERRORS_BYTES: Final = 65_536
"""Of its standard error the end is kept: what an exception says is last."""

GRACE_S: Final = 3.0
"""How long a command that was told to end may take for it."""

ORPHAN_S: Final = 15.0
"""How much longer than its time a command lives whose worker was killed."""

_INHERITED: Final = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|AIRFLOW_HOME|AIRFLOW_CONFIG|AIRFLOW__\w+"
    r"|SSH_AUTH_SOCK|KUBECONFIG|KUBERNETES_SERVICE_(HOST|PORT)|DOCKER_(HOST|CONFIG|CONTEXT|TLS_VERIFY|CERT_PATH)"
    r"|SSL_CERT_(FILE|DIR)|(?i:https?_proxy|no_proxy)"
)
"""What a command finds of the worker's environment: its own secrets (DAGRELAY_…, AIRFLOW_CONN_…) are not for
it. AIRFLOW__… is Airflow's own configuration."""

# The kernel ends it by SIGALRM, should nobody be left to do so: an alarm outlives the exec.
_WITH_ALARM: Final = """
import os, signal, sys
signal.alarm(int(sys.argv[1]))
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as exc:
    print(exc.strerror, file=sys.stderr)
    sys.exit(126)
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that has ended: its exit code (negative: the signal that ended it) and what it printed."""

    code: int
    out: str
    err: str


class NotRun(Exception):
    """A command did not come to its end. `reached`: it was begun, and may have done what it was to do."""

    def __init__(self, reason: str, reached: bool, timed_out: bool = False) -> None:
        super().__init__(reason, reached, timed_out)
        self.reason, self.reached, self.timed_out = reason, reached, timed_out

    def __str__(self) -> str:
        return self.reason


class TooLong(Exception):
    """The arguments are more than a command line holds."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.size_bytes = size_bytes


def argv_of(command: Command, arguments: Sequence[str]) -> list[str]:
    """Return what is executed. Raises TooLong.

    Where a shell is at the other end each argument is quoted for it, and it gets them as one.
    """
    passed = [shlex.quote(one) for one in arguments] if command.remote_shell else list(arguments)
    argv = [*command.argv, *passed]
    sizes = [len(one.encode("utf-8", "surrogatepass")) for one in argv]
    longest = sum(sizes) + len(sizes) if command.remote_shell else max(sizes)
    if longest > MAX_ARGUMENT_BYTES:
        raise TooLong(longest)
    return argv


def environment(command: Command, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return what the command finds in its environment."""
    kept = {name: value for name, value in inherited.items() if _INHERITED.fullmatch(name)}
    return kept | dict(command.env)


def run(command: Command, arguments: Sequence[str]) -> Ran:
    """Run it, without a shell and without input, and return what came of it. Raises NotRun and TooLong.

    It is alone in its process group. What is left of that at the end, or after `timeout_s`, is ended.
    """
    argv = argv_of(command, arguments)
    env = environment(command, os.environ)
    if shutil.which(argv[0], path=env.get("PATH")) is None:
        raise NotRun("the command of the connection is not there, or may not be run", False)
    alarm_s = int(command.timeout_s + ORPHAN_S)
    try:
        process = subprocess.Popen(  # noqa: S603 - the operator's command, and no shell
            [sys.executable, "-I", "-S", "-c", _WITH_ALARM, str(alarm_s), *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
    except OSError as exc:
        if exc.errno == errno.E2BIG:
            raise TooLong(sum(map(len, argv))) from None
        raise NotRun(f"no process could be started: {exc.strerror}", False) from None
    with process:
        try:
            out, err = _read(process, time.monotonic() + command.timeout_s)
        except BaseException:
            _end(process, signal.SIGTERM)
            raise
        finally:
            _end(process, signal.SIGKILL)
    return Ran(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


def _read(process: subprocess.Popen[bytes], until: float) -> tuple[bytes, bytes]:
    """Return what it prints until it ends. Raises NotRun after its time, or when it prints too much."""
    out, err = bytearray(), bytearray()
    kept: dict[Any, bytearray] = {process.stdout: out, process.stderr: err}
    with selectors.DefaultSelector() as selector:
        for stream in kept:
            selector.register(stream, selectors.EVENT_READ)
        ended = False
        while selector.get_map():
            ready = selector.select(0 if ended else min(0.2, max(0.0, until - time.monotonic())))
            for key, _ in ready:
                piece = os.read(key.fd, 65_536)
                kept[key.fileobj] += piece
                if not piece:
                    selector.unregister(key.fileobj)
            del err[:-KEPT_ERRORS_BYTES]
            if len(out) > MAX_OUTPUT_BYTES:
                raise NotRun(f"it printed more than {MAX_OUTPUT_BYTES:,} bytes", True)
            if ended and not ready:
                break  # a child of its own holds the pipe, and has nothing to say
            if time.monotonic() > until:
                raise NotRun("it did not end in time", True, True)
            ended = _has_ended(process)
        while not _has_ended(process):
            if time.monotonic() > until:
                raise NotRun("it did not end in time", True, True)
            time.sleep(0.02)
    return bytes(out), bytes(err)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether it has ended; its id stays its own, and its group's, until somebody waits for it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Send a signal to all of its group; after TERM give them a moment."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, how)
    until = time.monotonic() + GRACE_S
    while how == signal.SIGTERM and not _has_ended(process) and time.monotonic() < until:
        time.sleep(0.02)
