"""Real parts: a Valkey, a fake Airflow and a worker process.

A test that asks for `worker` gets the ones that its module shares (a worker takes a second and more to
start), with an Airflow as good as new. Any other test gets its own, and starts workers by `start_worker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from local.valkey import Valkey
from producers.client import RelayClient
from producers.settings import ProducerSettings
from tests.fake_airflow import FakeAirflow
from tests.worker import Worker


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.integration)


@dataclass(frozen=True)
class Shared:
    valkey: Valkey
    airflow: FakeAirflow
    worker: Worker


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("shared")
    with Valkey() as valkey, FakeAirflow() as airflow:
        connections = {"default": f"{airflow.conn_uri}/?read_timeout_s=1&timed_out_slot_s=1"}
        # Short where a user's would be long: nobody waits a minute for a test.
        env = {"DAGRELAY_MISSING_GRACE_S": "1", "DAGRELAY_LOOK_UP_EVERY_S": "1"}
        options = getattr(request.module, "WORKER_OPTIONS", ())
        with Worker(valkey.url, folder, connections=connections, options=options, **env) as worker:
            yield Shared(valkey, airflow, worker)


@pytest.fixture
def worker(shared: Shared) -> Worker:
    """The worker that this module's tests share, with no memory of how the Airflow fared."""
    shared.airflow.forget()
    with Redis.from_url(shared.valkey.url) as client:
        for name in [*client.scan_iter("dagrelay:airflow:*"), *client.scan_iter("dagrelay:slots:*")]:
            client.delete(name)
    return shared.worker


@pytest.fixture
def valkey(request: pytest.FixtureRequest) -> Iterator[Valkey]:
    if "worker" in request.fixturenames:
        yield request.getfixturevalue("shared").valkey
        return
    with Valkey() as server:
        yield server


@pytest.fixture
def airflow(request: pytest.FixtureRequest) -> Iterator[FakeAirflow]:
    if "worker" in request.fixturenames:
        yield request.getfixturevalue("shared").airflow
        return
    with FakeAirflow() as server:
        yield server


@pytest.fixture
def relay(valkey: Valkey) -> Iterator[RelayClient]:
    """A producer for this test's Valkey."""
    client = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="tests@here"))
    yield client
    client.redis.close()


@pytest.fixture
def start_worker(valkey: Valkey, airflow: FakeAirflow, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start a worker for this test's Valkey and Airflow; it is stopped at the end."""
    with ExitStack() as stack:

        def start(**options: Any) -> Worker:
            options.setdefault("connections", {"default": airflow.conn_uri})
            return stack.enter_context(Worker(valkey.url, tmp_path, **options))

        yield start
