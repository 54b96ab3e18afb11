"""Both servers that the transport is for: Valkey 9.1 and Debian's Redis 7.0."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from local.process import PartFailed
from local.redis7 import Redis7, ensure
from local.valkey import Valkey
from tests.parts import need

from .nursery import Nursery

os.environ.setdefault("DAGRELAY_REDIS_URL", "redis://127.0.0.1:1/0")  # the package `tasks` asks for it


@pytest.fixture(scope="module", params=["valkey", "redis7"])
def either(request: pytest.FixtureRequest) -> Iterator[Valkey]:
    """One server for the tests of a module; each clears what it needs cleared."""
    kind: type[Valkey] = Valkey
    if request.param == "redis7":
        missing = ""
        try:
            ensure()
        except PartFailed as exc:
            missing = str(exc)
        need("Debian's Redis 7.0", not missing, missing)
        kind = Redis7
    with kind(config={"appendonly": "no", "databases": "200"}) as server:
        yield server


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    made = Nursery(tmp_path)
    yield made
    made.close()
