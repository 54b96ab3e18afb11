"""Run one command, and leave none of its descendants behind, whatever happens to whoever asked for it.

    python -I -S guard.py REPORT_FD STOP_SIGNAL GRACE_S USER -- COMMAND...

A script, not a module: it starts in about 20 ms because it imports almost nothing. Between the asking
process and the command it stands for three reasons.

* The asking process may be killed with -9. PR_SET_PDEATHSIG alone would not do: it fires when the *thread*
  that started the command ends, not when the process does.
* A command starts others, and some move to a session of their own (Airflow's tasks do). The guard is their
  subreaper, so they stay its descendants, and it ends them when the command has ended.
* PostgreSQL refuses to run as root, so under root the command can be given to another USER ("-": as is).

It writes the command's pid to REPORT_FD, or a line that begins with "error". TERM, INT and QUIT are passed
on to the command; USR1 kills it. When the asking process disappears: STOP_SIGNAL, GRACE_S seconds, then KILL.
Ends with the command's status, or 128 + the number of the signal that ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_CAP_AMBIENT = 1, 8, 36, 47
PR_SET_SECUREBITS, NO_SETUID_FIXUP = 28, 1 << 2
CAP_DAC_OVERRIDE = 1
PARENT_CHECK_S = 0.5
LINUX = sys.platform == "linux"
libc = ctypes.CDLL(None, use_errno=True)


def drop_root(user: str) -> None:
    """Become `user`, keeping only the right to pass directories that belong to root.

    So neither the environment's nor the data's parent folders need to be opened to others. Where that right
    cannot be kept (a container without it), the command still works if the folders are open.
    """
    import pwd

    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    # Else access(), by which initdb looks for `postgres` beside itself, takes no notice of that right.
    libc.prctl(PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0)
    os.setuid(entry.pw_uid)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    bit = 1 << CAP_DAC_OVERRIDE
    data = (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)  # effective, permitted, inheritable
    if libc.capset(header, data) == 0:
        libc.prctl(PR_CAP_AMBIENT, 2, CAP_DAC_OVERRIDE, 0, 0)  # 2: raise
    elif libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:  # what the fix-up would have taken away
        raise OSError(ctypes.get_errno(), "the rights of root could not be given up")


def start(argv: list[str], user: str) -> tuple[int, str]:
    """Start the command in a session of its own; return its pid and, if it cannot be run, why."""
    me = os.getpid()
    read_end, write_end = os.pipe()  # closed by exec: end of file means that it runs
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            if user != "-":
                drop_root(user)
            if LINUX:  # after the change of user, which clears it
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != me:
                os._exit(127)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            os.execvpe(argv[0], argv, os.environ)  # noqa: S606 - a list, no shell
        except OSError as exc:
            os.write(write_end, f"{argv[0]}: {exc.strerror}".encode())
        finally:
            os._exit(127)
    os.close(write_end)
    failure = b""
    while chunk := os.read(read_end, 4096):
        failure += chunk
    os.close(read_end)
    return pid, failure.decode()


def descendants() -> list[int]:
    """The pids of all processes below this one. Empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if LINUX else []:  # noqa: PTH208 - pathlib costs 10 ms here
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue  # ended meanwhile
            children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def reap() -> dict[int, int]:
    """Collect all children that have ended: pid → wait status."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def end_descendants(main: int) -> None:
    """Kill what is left; again until nothing is, because it may be forking."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(main, signal.SIGKILL)
    for _ in range(200):
        reap()
        left = descendants()
        if not left:
            return
        for pid in left:
            send(pid, signal.SIGKILL)
        time.sleep(0.01)


def main() -> int:
    report_fd, stop_signal, grace_s, user = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        float(sys.argv[3]),
        sys.argv[4],
    )
    argv = sys.argv[6:]
    parent = os.getppid()
    os.set_inheritable(report_fd, False)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, lambda n, _frame: asked.append(n))
    signal.signal(signal.SIGCHLD, lambda _n, _frame: None)
    if LINUX:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    pid, failure = start(argv, user)
    os.write(report_fd, (f"error {failure}\n" if failure else f"{pid}\n").encode())
    os.close(report_fd)

    kill_at: float | None = None
    while True:
        ended = reap()
        if pid in ended:
            end_descendants(pid)
            status = ended[pid]
            return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        while asked:
            wanted = asked.pop(0)
            send(pid, signal.SIGKILL if wanted == signal.SIGUSR1 else wanted)
        if kill_at is None and os.getppid() != parent:
            send(pid, stop_signal)
            kill_at = time.monotonic() + grace_s
        if kill_at is not None and time.monotonic() > kill_at:
            send(pid, signal.SIGKILL)
        select.select([wake_read], [], [], PARENT_CHECK_S)
        with contextlib.suppress(BlockingIOError):
            os.read(wake_read, 4096)


if __name__ == "__main__":
    sys.exit(main())
