"""Real parts for each test: its own Valkey, its own fake Airflow, its own worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from local.valkey import Valkey
from producers.client import RelayClient
from producers.settings import ProducerSettings
from tests.fake_airflow import FakeAirflow
from tests.worker import Worker


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.integration)


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


@pytest.fixture
def airflow() -> Iterator[FakeAirflow]:
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
