"""An app whose workers may be told to kill themselves after their n-th Redis command.

`nursery()` is a process that has imported everything and forks workers: a start takes 0.1 s instead of 1 s.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from celery import Celery, signals

ROOT = Path(__file__).resolve().parents[3]
if __name__ == "__main__":
    # The transport by itself, without the package's own app and its settings.
    sys.path.insert(0, str(ROOT))
    package = ModuleType("tasks")
    package.__path__ = [str(ROOT / "tasks")]
    sys.modules["tasks"] = package

from tasks.redis_transport import worker as transport_worker  # noqa: E402

NAMESPACE = "crash"
LEASE_S = 1

app: Celery[Any] = Celery("crash", set_as_current=False)
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options={"visibility_timeout": LEASE_S, "namespace": NAMESPACE},
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    task_default_queue="q",
    worker_prefetch_multiplier=2,
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    worker_enable_remote_control=False,
)


notes = -1


def note(line: str) -> None:
    """Write down that something ran, where a kill does not lose it."""
    os.write(notes, f"{line}\n".encode())  # one write at the end of the file


@app.task(name="plain")
def plain(name: str) -> None:
    note(f"plain {name}")


@app.task(name="again", bind=True)
def again(self: Any, name: str) -> None:
    """Ask for another try, twice, a moment later."""
    note(f"again {name} {self.request.retries}")
    if self.request.retries < 2:
        raise self.retry(countdown=0.1, max_retries=5)


@app.task(name="follow")
def follow(name: str) -> None:
    note(f"follow {name}")
    plain.apply_async((f"after {name}",), task_id=f"after-{name}", countdown=0.1)


@app.task(name="fuzz", bind=True)
def fuzz(self: Any, *_: Any, **__: Any) -> None:
    note("ran " + json.dumps(self.request.id))


def note_every_end() -> None:
    """Write down what Celery reports of messages that it does not run, or whose task fails."""

    def on(name: str) -> None:
        def noted(**_: Any) -> None:
            note(name)

        getattr(signals, f"task_{name}").connect(noted, weak=False)

    for name in ("failure", "revoked", "unknown", "rejected", "internal_error"):
        on(name)


def kill_after(commands: int) -> None:
    """Let this process die by SIGKILL when it has sent so many commands, counted from its first claim."""
    from redis.connection import AbstractConnection

    from tasks.redis_transport.scripts import CLAIM

    send, left = AbstractConnection.send_packed_command, commands

    def counted(self: Any, command: Any, check_health: bool = True) -> None:
        nonlocal left
        send(self, command, check_health)
        if left < commands or any(CLAIM.sha.encode() in bytes(part) for part in command):
            left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    AbstractConnection.send_packed_command = counted  # type: ignore[method-assign]


def run_worker(order: dict[str, Any]) -> None:
    """Be a worker, in a process of its own."""
    global notes
    notes = os.open(order["notes"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(log, fd)
    app.conf.broker_url = order["url"]
    if order.get("note_every_end"):
        note_every_end()
    if order["kill_after"]:
        kill_after(order["kill_after"])
    argv = ["worker", "-P", order["pool"], "-c", "2", "--without-gossip", "--without-mingle"]
    app.worker_main([*argv, "--without-heartbeat", "-l", order.get("loglevel", "INFO"), "-n", order["name"]])


def nursery(run: Callable[[dict[str, Any]], None]) -> None:
    """Read orders, one JSON object a line: fork a worker, or tell how one has ended."""
    import celery.apps.worker
    import celery.bin.worker
    import celery.concurrency.solo
    import celery.concurrency.thread
    import celery.worker.consumer  # noqa: F401
    import kombu.transport.redis  # noqa: F401 - so that the forks have them

    for line in sys.stdin:
        order = json.loads(line)
        if "end" in order:
            pid = int(order["end"])
            if order["signal"]:
                os.kill(pid, order["signal"])
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # noqa: T201
            continue
        pid = os.fork()
        if pid == 0:
            try:
                run(order)
            finally:
                os._exit(0)
        print(pid, flush=True)  # noqa: T201


if __name__ == "__main__":
    transport_worker.install(app)
    nursery(run_worker)
