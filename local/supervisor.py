"""Start parts in order, watch them, stop them in reverse; and what the parts of ours look like.

One after the other, because the order matters at the end: whoever stops Redis before the worker leaves the
running task unacknowledged (tried with launchers that send TERM to all at once).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Protocol

import requests
from celery import Celery

from local.process import ROOT, PartFailed, Process, Progress

CHECK_EVERY_S = 0.3
WORKER_START_S = 60.0
WORKER_GRACE_S = 60.0  # longer than any HTTP request of a task takes: a running one ends and is acknowledged
FLOWER_START_S = 60.0
FLOWER_GRACE_S = 10.0
RESTART_PAUSE_MAX_S = 30.0
STEADY_S = 60.0  # who ran this long is not in a crash loop: the pause before a restart begins anew


class Stopped(BaseException):
    """Somebody asked us to stop: Ctrl-C, TERM, or the terminal was closed."""


class Part(Protocol):
    """What the supervisor asks of a part: `Valkey`, `Airflow` and `Process` all have it."""

    @property
    def alive(self) -> bool: ...

    def stop(self) -> object: ...

    def failure(self, what: str) -> PartFailed: ...


class Supervisor:
    """Holds what runs. `say` is told what is being started and stopped."""

    def __init__(self, say: Progress) -> None:
        self.say = say
        self._parts: dict[str, tuple[Callable[[], Part], Part]] = {}
        self._started_at: dict[str, float] = {}
        self._pause_s: dict[str, float] = {}

    def start(self, name: str, start: Callable[[], Part]) -> Part:
        """Call `start` and keep what it returns; parts end in the reverse order of these calls."""
        part = start()
        self._parts[name] = (start, part)
        self._started_at[name] = time.monotonic()
        return part

    def parts(self) -> list[tuple[str, Part]]:
        """What runs, in the order in which it was started."""
        return [(name, part) for name, (_, part) in self._parts.items()]

    def check(self) -> None:
        """Raise PartFailed, with the end of the log, if a part has ended by itself."""
        for name, (_, part) in self._parts.items():
            if not part.alive:
                raise part.failure(f"{name} ended by itself")

    def watch(self, *, restart: bool = False) -> None:
        """Stay until a signal raises `Stopped`.

        Raises PartFailed as soon as a part ends by itself; with `restart` it is started again instead, after
        a pause that grows from 1 s to 30 s.
        """
        while True:
            if restart:
                for name in [name for name, (_, part) in self._parts.items() if not part.alive]:
                    self._restart(name)
            else:
                self.check()
            time.sleep(CHECK_EVERY_S)

    def _restart(self, name: str) -> None:
        start, part = self._parts[name]
        steady = time.monotonic() - self._started_at[name] > STEADY_S
        pause_s = 1.0 if steady else self._pause_s.get(name, 1.0)
        self._pause_s[name] = min(2 * pause_s, RESTART_PAUSE_MAX_S)
        self.say(f"{name} ended by itself; it is started again in {pause_s:g} s\n{part.failure('ended')}")
        part.stop()
        time.sleep(pause_s)
        try:
            self.start(name, start)
        except PartFailed as exc:  # the next check finds it dead again
            self.say(str(exc))

    def stop(self) -> None:
        """End everything, last started first; one that cannot be ended does not keep the others."""
        while self._parts:
            name, (_, part) = self._parts.popitem()
            self.say(f"stopping {name}")
            try:
                part.stop()
            except Exception as exc:  # noqa: BLE001 - the others must be stopped all the same
                self.say(f"{name}: {exc}")


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stop_on_signals() -> None:
    """From now on TERM, INT and HUP raise `Stopped` in the main thread, once; then as `end_on_signals`."""

    def handle(number: int, _frame: FrameType | None) -> None:
        end_on_signals()
        raise Stopped(number)

    for each in SIGNALS:
        signal.signal(each, handle)


def end_on_signals() -> None:
    """From now on such a signal ends this process at once; the guards end what it started, in no order."""
    for each in SIGNALS:
        signal.signal(each, lambda number, _frame: os._exit(128 + number))


def celery(*arguments: str) -> list[str]:
    """`celery -A tasks …` with the running Python; its working directory must be the repository."""
    return [sys.executable, "-m", "celery", "-A", "tasks", *arguments]


def start_worker(env: Mapping[str, str], *, log: Path, node: str = "worker") -> Process:
    """Start one worker named `node@%h`; does not wait. `wait_for_worker` does."""
    return Process(
        celery("worker", "-n", f"{node}@%h"),
        log=log,
        env=env,
        cwd=ROOT,
        grace_s=WORKER_GRACE_S,
        name=node,
    )


def wait_for_worker(process: Process, redis_url: str) -> None:
    """Wait until a worker answers a ping through Redis, so that it takes tasks. Raises PartFailed."""
    app = Celery("local", set_as_current=False)
    # Not as an argument: CELERY_BROKER_URL in the environment would win.
    app.conf.update(broker_url=redis_url, broker_connection_retry_on_startup=False)

    def answers() -> bool:
        replies = app.control.ping(timeout=0.5) or []
        return any(node.startswith(f"{process.name}@") for reply in replies for node in reply)

    try:
        process.wait_until(answers, timeout_s=WORKER_START_S, what="answering")
    finally:
        app.close()


def start_flower(env: Mapping[str, str], *, log: Path) -> Process:
    """Start Flower with `flowerconfig.py`, which reads DAGRELAY_FLOWER_…; does not wait."""
    return Process(
        celery("flower", "--conf=flowerconfig.py"),
        log=log,
        env=env,
        cwd=ROOT,
        grace_s=FLOWER_GRACE_S,
        name="flower",
    )


def wait_for_flower(process: Process, url: str) -> None:
    """Wait until Flower answers. Raises PartFailed."""
    session = requests.Session()
    session.trust_env = False

    def answers() -> bool:
        try:
            return session.get(f"{url}/healthcheck", timeout=2).ok
        except requests.RequestException:
            return False

    process.wait_until(answers, timeout_s=FLOWER_START_S, what="answering", every_s=0.1)
