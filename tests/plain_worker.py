"""A worker process of `tests.plain_app`, and the messages for it, made by hand and pushed in bulk."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import redis

from local.process import ROOT, Process, clean_env

from .worker import CELERY

Side = Literal["ours", "stock"]
NAMESPACE = "plain"


class PlainWorker:
    """`celery -A tests.plain_app worker`, stock or ours; `with PlainWorker(...) as worker:`.

    `conf` holds Celery settings beside those of the app, `options` those of the command. It is ready when
    `__enter__` returns.
    """

    def __init__(
        self,
        side: Side,
        redis_url: str,
        folder: Path,
        *,
        name: str = "w1",
        options: tuple[str, ...] = ("-P", "threads", "-c", "64"),
        conf: dict[str, Any] | None = None,
        **env: str,
    ) -> None:
        self.log = folder / f"{name}-{side}.log"
        self._argv = [
            *(str(CELERY), "-A", "tests.plain_app", "worker", "-n", f"{name}@%h", "-l", "WARNING"),
            *("--without-mingle", "--without-gossip", "--without-heartbeat"),
            *options,
        ]
        self._env = clean_env(
            PLAIN_URL=redis_url, PLAIN_TRANSPORT=side, PLAIN_CONF=json.dumps(conf or {}), **env
        )
        self._process: Process | None = None

    def launch(self) -> None:
        """Start it without waiting until it is ready: `wait_ready` does."""
        self._seen = len(self.text())
        self._process = Process(self._argv, log=self.log, env=self._env, cwd=ROOT, name="worker", grace_s=60)

    def wait_ready(self) -> PlainWorker:
        """Return when it takes messages."""
        try:
            self.process.wait_until(
                lambda: " ready." in self.text()[self._seen :], timeout_s=60, what="ready", every_s=0.02
            )
        except BaseException:
            self.process.kill()
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
        """Everything it has written."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """SIGKILL it and everything below it."""
        self.process.kill()

    def __enter__(self) -> PlainWorker:
        self.launch()
        return self.wait_ready()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.alive:
            self._process.kill() if kind else self._process.stop()


def message(
    task: str, args: Iterable[Any] = (), *, queue: str = "celery", task_id: str = "", eta: str | None = None
) -> bytes:
    """Return a Celery message of protocol 2 as a stock producer would push it."""
    task_id = task_id or str(uuid.uuid4())
    embedded = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    headers = {
        "lang": "py",
        "task": task,
        "id": task_id,
        "shadow": None,
        "eta": eta,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": task_id,
        "parent_id": None,
        "argsrepr": "()",
        "kwargsrepr": "{}",
        "origin": "gen1@here",
        "ignore_result": True,
    }
    envelope = {
        "body": json.dumps([list(args), {}, embedded]),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": task_id,
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "delivery_tag": task_id,
        },
    }
    return json.dumps(envelope).encode()


def push(client: redis.Redis, queue: str, messages: Iterable[bytes]) -> None:
    """Push all of them at once: the queue appears whole, in one step."""
    pipe = client.pipeline(transaction=False)
    for number, each in enumerate(messages, 1):
        pipe.lpush(f"staged:{queue}", each)
        if number % 1000 == 0:
            pipe.execute()
    pipe.execute()
    client.rename(f"staged:{queue}", queue)


def left(client: redis.Redis, queue: str = "celery") -> int:
    """Return how many messages are anywhere: in the queue, in a hand, held, or unacknowledged."""
    count = client.llen(queue) + client.hlen(f"{NAMESPACE}:unacked")
    for key in client.keys(f"{NAMESPACE}:held:*"):
        count += client.hlen(key)
    for key in client.keys(f"{NAMESPACE}:hand:*"):
        count += client.llen(key)
    return int(count)


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used so far, its threads included, its children not.

    From the process's own CPU clock, to the nanosecond: /proc/PID/stat counts in steps of 10 ms.
    Source: clock_getcpuclockid(3); the number is made as glibc makes it.
    """
    return time.clock_gettime((~pid << 3) | 2)


def memory_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
