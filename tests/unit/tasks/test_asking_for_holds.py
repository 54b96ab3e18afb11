"""Whether a connection is held is asked once a second, not for each trigger; a hold counts at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tasks import trigger
from tasks.airflow.connections import read_connections

CONNECTION = read_connections({"AIRFLOW_CONN_DEFAULT": "http://u:p@host:8080"})[0]["default"]


class Waits(Exception):
    """The task is to be tried again later."""


class Holds:
    """What Redis says."""

    def __init__(self) -> None:
        self.asked, self.left_s = 0, 0.0

    def ask(self, connection: str, fingerprint: str) -> float:
        self.asked += 1
        return self.left_s


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> Holds:
    found = Holds()
    monkeypatch.setattr(trigger, "_holds", lambda: found)
    monkeypatch.setattr(trigger, "_free_until", {})
    monkeypatch.setattr(trigger, "_retry", lambda task, exc, wait_s: Waits())
    monkeypatch.setattr(trigger, "records", lambda: SimpleNamespace(attempt_failed=lambda *a, **k: None))
    return found


TASK = SimpleNamespace(request=SimpleNamespace(id="t1"))


def test_a_free_connection_is_asked_for_once_a_second(holds: Holds, monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(trigger.time, "monotonic", lambda: now)
    for _ in range(50):
        assert trigger._wait_if_held(TASK, CONNECTION) is False
    assert holds.asked == 1
    now += trigger.FREE_FOR_S
    trigger._wait_if_held(TASK, CONNECTION)
    assert holds.asked == 2


def test_a_hold_of_our_own_counts_at_once(holds: Holds):
    trigger._wait_if_held(TASK, CONNECTION)
    holds.left_s = 30.0
    with pytest.raises(Waits):
        trigger._wait_if_held(TASK, CONNECTION, surely=True)
    with pytest.raises(Waits):  # and for every trigger after it
        trigger._wait_if_held(TASK, CONNECTION)


def test_a_held_connection_is_asked_for_each_time(holds: Holds):
    holds.left_s = 30.0
    for _ in range(2):
        with pytest.raises(Waits):
            trigger._wait_if_held(TASK, CONNECTION)
    assert holds.asked == 2


def test_one_request_finds_out_and_the_next_asks_again(holds: Holds):
    holds.left_s = -1.0
    assert trigger._wait_if_held(TASK, CONNECTION) is True
    holds.left_s = 30.0
    with pytest.raises(Waits):
        trigger._wait_if_held(TASK, CONNECTION)
