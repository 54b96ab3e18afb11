"""Workers of `behaviour_app` on a Valkey, and what their tasks noted: for the tests beside this module."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import redis
from celery import Celery
from celery.backends.redis import RedisBackend

import tests.import_tasks  # noqa: F401
from local.process import Process, clean_env, tail
from local.valkey import Valkey
from tasks.redis_transport import Keys, Lot

from . import behaviour_app

ROOT = Path(__file__).resolve().parents[3]
CELERY = ROOT / ".venv" / "bin" / "celery"
CLOCK = Path(__file__).with_name("clock")
LEASE_S = behaviour_app.LEASE_S
BACK_S = LEASE_S + max(1.0, LEASE_S / 6)
"""How long a dead worker's messages may take to come back: the lease, and the interval of the look for it."""
BUSY_S = 20.0
"""What a busy machine may add to anything."""
AT_ONCE = 3 if "PYTEST_XDIST_WORKER" in os.environ else 7
"""How many scenarios run at once; fewer where other processes run tests as well."""
STOCK, OURS = "kombu.transport.redis:Transport", "tasks.redis_transport:Transport"


def until(true: Callable[[], Any], timeout_s: float = 60.0, what: str = "") -> Any:
    """Wait until something is true; return it. Fails the test when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s:g} s{': ' if what else ''}{what}")
        time.sleep(0.02)
    return found


class Quiet(RedisBackend):
    """A result backend that is only asked: a result that nobody wants any more needs no Redis."""

    def on_task_call(self, producer: Any, task_id: str) -> None:
        pass

    def add_pending_result(self, result: Any, **kwargs: Any) -> Any:
        return result

    def remove_pending_result(self, result: Any) -> Any:
        return result


def ended(result: Any, timeout_s: float = 20.0) -> Any:
    """Wait for a result and return it."""
    until(result.ready, timeout_s, "a result")
    return result.result


class Worker:
    """One `celery worker` of the behaviour app; ready when `start` returns."""

    def __init__(self, world: World, name: str, argv: list[str], env: dict[str, str]) -> None:
        self.world, self.name, self._argv, self._env = world, name, argv, env
        self.log = world.folder / f"{name}.log"
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        """Everything that it has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def started_at(self) -> float:
        """When it was ready by its own clock, in seconds since 1970."""
        line = next(line for line in self.text().splitlines() if " ready." in line)
        return datetime.strptime(line[1:20], "%Y-%m-%d %H:%M:%S").timestamp()

    def launch(self) -> Worker:
        """Start it and do not wait."""
        self._seen = len(self.text())
        self._process = Process(self._argv, log=self.log, env=self._env, cwd=ROOT, name=self.name, grace_s=20)
        return self

    def wait_ready(self) -> Worker:
        self.process.wait_until(lambda: " ready." in self.text()[self._seen :], timeout_s=60, what="ready")
        return self

    def send(self, number: signal.Signals) -> None:
        self.process.send(number)

    def wait(self, timeout_s: float = 30) -> int:
        """Wait for its end; return its code."""
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        return self.process.stop()

    def kill(self) -> None:
        """SIGKILL it and everything below it."""
        self.process.kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.alive:
            self._process.kill()


class World:
    """One database of a Valkey with workers, a stock producer and what was noted in it."""

    def __init__(self, url: str, folder: Path, **conf: Any) -> None:
        self.url, self.folder, self.conf = url, folder, conf
        folder.mkdir(parents=True, exist_ok=True)
        self._notes = folder / "notes.jsonl"
        self._stack = ExitStack()
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        self._stack.callback(self.redis.close)
        options = conf.get("broker_transport_options", {})
        self.keys = Keys(options.get("global_keyprefix", ""))
        self.lot = Lot(self.redis, self.keys)
        self.app = self.producer(STOCK)

    def producer(self, transport: str, **conf: Any) -> Celery[Any]:
        """Return an app that publishes by this transport, whatever other tests have registered."""
        app = Celery("producer", set_as_current=False)
        app.conf.update(behaviour_app.DEFAULTS)
        app.conf.update(
            broker_url=self.url,
            result_backend=f"{__name__}:Quiet+{self.url}",
            broker_transport=transport,
        )
        app.conf.update(self.conf | conf)
        if transport == OURS:  # as `install` does in a worker
            app.conf.broker_transport_options |= {"timezone": app.timezone}
        self._stack.callback(app.close)
        return app

    def worker(
        self,
        name: str = "w1",
        *,
        pool: str = "threads",
        c: int = 2,
        transport: str = "ours",
        options: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        wait: bool = True,
        **conf: Any,
    ) -> Worker:
        """Start a worker; it is killed at the end if it still runs. `conf` are settings of Celery."""
        argv = [
            *(str(CELERY), "-A", "tests.integration.redis_transport.behaviour_app", "worker"),
            *("-n", f"{name}@test", "-l", "INFO", "--without-mingle", "--without-gossip"),
            *("-P", pool, "-c", str(c)),
            *options,
        ]
        told = {
            "BEHAVIOUR_BROKER": self.url,
            "BEHAVIOUR_NOTES": str(self._notes),
            "BEHAVIOUR_TRANSPORT": transport,
            "BEHAVIOUR_CONF": json.dumps(self.conf | conf),
        }
        environment = clean_env(**(told | (env or {})))
        worker = self._stack.enter_context(Worker(self, name, argv, environment)).launch()
        return worker.wait_ready() if wait else worker

    def send(self, task: str, *args: Any, app: Celery[Any] | None = None, **options: Any) -> Any:
        """Publish a task of the behaviour app."""
        return (app or self.app).send_task(f"{behaviour_app.__name__}.{task}", args, **options)

    def signature(self, task: str, *args: Any, **options: Any) -> Any:
        return self.app.signature(f"{behaviour_app.__name__}.{task}", args, **options)

    def notes(self, event: str | None = None, mark: object = None) -> list[dict[str, Any]]:
        """Return what tasks have noted, in that order."""
        text = self._notes.read_text() if self._notes.exists() else ""
        found = [json.loads(line) for line in text.splitlines()]
        return [
            entry
            for entry in found
            if event in (None, entry["event"]) and (mark is None or entry["mark"] == mark)
        ]

    def marks(self, event: str) -> list[Any]:
        return [entry["mark"] for entry in self.notes(event)]

    def length(self, queue: str = "work") -> int:
        """Return how many messages of normal priority a queue holds."""
        return int(self.redis.llen(self.keys.queue(queue)))

    def held(self) -> dict[str, int]:
        """Return how many messages each owner holds, hands included."""
        found: dict[str, int] = {}
        for key in self.redis.scan_iter(f"{self.keys.held('')}*", count=1000):
            found[key] = self.redis.hlen(key)
        for key in self.redis.scan_iter(f"{self.keys.hand_prefix}*", count=1000):
            found[key] = self.redis.llen(key)
        return found

    def close(self) -> None:
        self._stack.close()


class Server:
    """A Valkey of which each test has a database of its own."""

    def __init__(self, valkey: Valkey, folder: Path) -> None:
        self.valkey, self.folder = valkey, folder
        self._numbers = itertools.count()

    def world(self, **conf: Any) -> World:
        number = next(self._numbers)
        url = f"{self.valkey.url.removesuffix('/0')}/{number}"
        return World(url, self.folder / f"db{number}", **conf)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Valkey(config={"databases": "128"}) as valkey:
        yield Server(valkey, folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The Valkey that this module's tests share, each with a database of its own."""
    with serving(tmp_path_factory.mktemp("behaviour")) as found:
        yield found


class Place:
    """Where one scenario has its worlds; all of it is ended with the scenario."""

    def __init__(self, shared: Server, folder: Path) -> None:
        self._shared, self._folder = shared, folder
        self._stack = ExitStack()
        self._worlds: list[World] = []

    def world(self, **conf: Any) -> World:
        """Make a world in the shared Valkey. `conf` are Celery settings of its workers and producers."""
        return self._add(self._shared.world(**conf))

    def _add(self, world: World) -> World:
        self._stack.callback(world.close)
        self._worlds.append(world)
        return world

    def logs(self) -> str:
        """Return the ends of the workers' logs, and what is held."""
        return "\n".join(
            f"--- {log.stem}\n{tail(log, 60)}" for world in self._worlds for log in world.folder.glob("*.log")
        )

    def server(self) -> Server:
        """Start a Valkey of its own, to be cut off or restarted."""
        return self._stack.enter_context(serving(self._folder))

    def own_world(self, **conf: Any) -> tuple[Valkey, World]:
        server = self.server()
        return server.valkey, self._add(server.world(**conf))

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def side_by_side(scenario: Callable[..., None]) -> Callable[..., None]:
    """Make a test of a scenario which runs beside the others of its module, because all of them mostly wait.

    A scenario takes a `Place`, and further arguments from `pytest.mark.parametrize`. Its module needs the
    fixtures `server` and `running` from here.
    """

    def test(running: Any, request: pytest.FixtureRequest, **_: Any) -> None:
        running[request.node.name].result()

    names = ["running", "request", *list(inspect.signature(scenario).parameters)[1:]]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    test.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    test.__name__, test.__doc__, test.__module__ = scenario.__name__, scenario.__doc__, scenario.__module__
    test.scenario = scenario  # type: ignore[attr-defined]
    return test


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, server: Server) -> Iterator[dict[str, Future[None]]]:
    """The selected scenarios of this module, at work."""

    def run(item: Any) -> None:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        with Place(server, server.folder / item.name) as place:
            try:
                item.function.scenario(place, **params)
            except BaseException as exc:
                exc.add_note(place.logs())
                raise

    with ThreadPoolExecutor(AT_ONCE) as executor:
        items = [
            item
            for item in request.session.items
            if getattr(item, "module", None) is request.module and hasattr(item.function, "scenario")
        ]
        futures = {item.name: executor.submit(run, item) for item in items}
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.fixture
def make_world(server: Server) -> Iterator[Callable[..., World]]:
    """Make a world in the shared Valkey; its workers are ended with the test."""
    with ExitStack() as stack:

        def make(**conf: Any) -> World:
            world = server.world(**conf)
            stack.callback(world.close)
            return world

        yield make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


def children(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    return [
        int(child)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
