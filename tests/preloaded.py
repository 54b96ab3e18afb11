"""Worker processes of tests, forked from one that has imported Celery and what else a worker needs.

A worker spends a second of CPU on its imports, and the suite starts hundreds. So each test process has one
server beside it that imports third-party packages, and nothing of ours, once. For a worker it forks, and the
fork runs the command as `exec` would have run it: in a session of its own, below a guard (`local/guard.py`),
with its own environment, folder, log and arguments. Nothing else is shared but memory that nobody writes.

What the interpreter reads before its first line (PYTHON…, LD_…), and what has to be imported in another
order (gevent), needs an `exec`: see `can_run`. Benchmarks always have one.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from local import guard
from local.process import ROOT, Process

PACKAGES = (
    "aiohttp",
    "celery.app.log",
    "celery.apps.worker",
    "celery.backends.redis",
    "celery.bin.celery",
    "celery.concurrency.thread",
    "celery.events.dispatcher",
    "celery.worker.consumer",
    "cryptography.fernet",
    "fastapi",
    "jmespath",
    "kombu.transport.redis",
    "pydantic",
    "redis.asyncio",
    "requests",
    "uvicorn.protocols.http.httptools_impl",
)
"""Nothing that reads the environment, or starts a thread, as it is imported."""

OTHERWISE_BEGUN = frozenset({"gevent", "eventlet", "--workers"})
"""Arguments of what imports in another order, or starts interpreters of its own."""

READ_AT_THE_START = ("LD_", "PYTHON", "OTEL_", "PROMETHEUS_")


def can_run(argv: Sequence[str | Path], env: Mapping[str, str]) -> bool:
    """Tell whether a Python script may be run by a fork."""
    if not guard.LINUX or OTHERWISE_BEGUN & {str(part) for part in argv}:
        return False
    return not any(name.startswith(READ_AT_THE_START) for name in env)


def process(argv: Sequence[str | Path], *, env: Mapping[str, str], **given: Any) -> Process:
    """Start a Python script, by a fork where that will do."""
    return (Preloaded if can_run(argv, env) else Process)(argv, env=env, **given)


class Preloaded(Process):
    """A `Process` whose command, a Python script of this environment, is run by a fork of the server."""

    def _launch(self, output: Any, env: Mapping[str, str] | None, cwd: Path | None, user: str | None) -> Any:
        assert user is None
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.connect(_server().path)
        order = {
            "argv": self.argv,
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
            "stop": int(self.stop_signal),
            "grace_s": self.grace_s,
        }
        text = json.dumps(order).encode() + b"\n"
        sent = socket.send_fds(link, [text], [output.fileno()])
        link.sendall(text[sent:])
        remote = _Guard(link)
        return remote, remote.line()


class _Guard:
    """The guard of a fork, as far as `Process` asks for one (see `subprocess.Popen`)."""

    def __init__(self, link: socket.socket) -> None:
        self._link, self._text, self._code = link, b"", None
        self._pid = int(self.line())

    def line(self) -> str:
        while b"\n" not in self._text:
            more = self._link.recv(4096)
            if not more:
                return ""
            self._text += more
        found, _, self._text = self._text.partition(b"\n")
        return found.decode()

    def poll(self) -> int | None:
        if self._code is None and select.select([self._link], [], [], 0)[0]:
            self._ended()
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            if not select.select([self._link], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("guard", timeout or 0.0)
            self._ended()
        assert self._code is not None
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # it is reaped only once the link is closed, so the pid is still its own
            os.kill(self._pid, number)

    def _ended(self) -> None:
        said = self.line()
        self._code = int(said) if said else 128 + signal.SIGKILL  # the server was killed, and all with it
        self._link.close()


class _Server:
    """The process that forks, one for each process of tests; it ends with that."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.preloaded"],
            stdin=subprocess.PIPE,
            stdout=write,
            cwd=ROOT,
            env={name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ},
            start_new_session=True,
        )
        os.close(write)
        with os.fdopen(self._read) as told:
            self.path = told.readline().strip()
        assert self.path, "the server of preloaded workers did not start"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None


_known: list[_Server] = []
_knowing = threading.Lock()


def _server() -> _Server:
    with _knowing:
        if not _known or not _known[0].alive:
            _known[:] = [_Server()]
        return _known[0]


# In the server


class _Run(BaseException):
    """Leaves everything that the server was at, so that the command runs with nothing below it."""

    def __init__(self, argv: list[str]) -> None:
        super().__init__()
        self.argv = argv


def serve() -> None:
    """Fork when asked to, until nobody holds our standard input any more. Raises _Run in what is forked."""
    for name in PACKAGES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("")  # Linux: a name that is free, in no folder
    listener.listen(100)
    os.write(1, listener.getsockname() + b"\n")
    os.close(1)
    os.dup2(2, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    guards: dict[int, socket.socket] = {}
    while True:
        ready = select.select([0, listener, wake_read, *guards.values()], [], [])[0]
        if 0 in ready:
            return
        if wake_read in ready:
            os.read(wake_read, 4096)
            for pid, link in guards.items():
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is not None:
                    with contextlib.suppress(OSError):
                        link.sendall(b"%d\n" % ended.si_status)
        for pid, link in list(guards.items()):
            if link in ready:  # who asked has heard of the end, or has gone
                link.close()
                del guards[pid]
        if listener in ready:
            link = listener.accept()[0]
            guards[_fork(link)] = link


def _fork(link: socket.socket) -> int:
    """Fork a guard for the order that comes over a link; return its pid. Raises _Run below the guard."""
    text, ancillary, _, _ = link.recvmsg(1 << 20, socket.CMSG_SPACE(array.array("i").itemsize))
    output = array.array("i", ancillary[0][2][:4])[0]
    while not text.endswith(b"\n"):
        text += link.recv(1 << 20)
    order = json.loads(text)
    pid = os.fork()
    if pid:
        os.close(output)
        return pid
    signal.set_wakeup_fd(-1)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    report = _only_open({0: nothing, 1: output, 2: output}, link.detach())
    os.environ.clear()
    os.environ.update(order["env"])
    time.tzset()
    os.chdir(order["cwd"])
    os.write(report, b"%d\n" % os.getpid())
    about = [report, order["stop"], order["grace_s"]]
    sys.argv = ["guard", *map(str, about), "-", "--", *order["argv"]]
    guard.start = _start
    code = 1
    try:
        code = guard.main()
    except _Run:
        raise
    except BaseException:  # noqa: BLE001 - it may not go back to what the server does
        traceback.print_exc()
    os._exit(code)


def _only_open(wanted: dict[int, int], kept: int) -> int:
    """Have the standard streams be these files, and close all others but one; return its new number."""
    for number, file in wanted.items():
        os.dup2(file, number)
    os.dup2(kept, 3)
    os.closerange(4, 1 + max(int(one.name) for one in Path("/proc/self/fd").iterdir()))
    return 3


def _start(argv: list[str], user: str) -> tuple[int, str]:
    """Do as `guard.start` does, with a fork in place of `exec`."""
    me = os.getpid()
    read_end, write_end = os.pipe()  # closed when the command has its own signals
    pid = os.fork()
    if pid:
        os.close(write_end)
        os.read(read_end, 1)
        os.close(read_end)
        return pid, ""
    os.setsid()
    guard.libc.prctl(guard.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != me:
        os._exit(127)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.closerange(3, 64)
    raise _Run(argv)


def main() -> None:
    try:
        serve()
    except _Run as run:
        argv = run.argv
    else:
        return
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
