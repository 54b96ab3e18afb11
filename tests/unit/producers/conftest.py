"""A producer that is configured for a Redis that nobody ever calls."""

from __future__ import annotations

from importlib import import_module

import pytest

from producers.client import RelayClient
from producers.settings import ProducerSettings


@pytest.fixture
def nobody() -> RelayClient:
    """A client whose Redis does not exist: it connects on its first call, and no unit test makes one."""
    return RelayClient(ProducerSettings(redis_url="redis://127.0.0.1:1/0", client_name="billing@host-7"))


@pytest.fixture
def used_here(nobody: RelayClient, monkeypatch: pytest.MonkeyPatch) -> RelayClient:
    """The same, as what `trigger_dag` uses in this process."""
    # By import: the package's own `client` is the function.
    monkeypatch.setattr(import_module("producers.client"), "_client", nobody)
    return nobody
