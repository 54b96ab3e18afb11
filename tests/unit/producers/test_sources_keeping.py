"""What is kept while the owner of a source is busy elsewhere."""

from __future__ import annotations

import time

import pytest

from producers.queues import keeping
from producers.queues.keeping import Keeper


def kept(keeper: Keeper, times: list[float], number: int) -> bool:
    until = time.monotonic() + 10
    while len(times) < number and time.monotonic() < until:
        time.sleep(0.01)
    return len(times) >= number


def test_it_keeps_while_nobody_is_at_work_and_never_beside_them():
    times: list[float] = []
    keeper = Keeper(lambda: times.append(time.monotonic()), every_s=0.02)
    keeper.start()
    keeper.start()  # it has begun
    try:
        assert kept(keeper, times, 2)
        with keeper.at_work(), keeper.at_work():
            before = len(times)
            time.sleep(0.15)
            assert len(times) == before
        assert kept(keeper, times, before + 1)
    finally:
        keeper.stop()
    time.sleep(0.05)
    after = len(times)
    time.sleep(0.1)
    assert len(times) == after


def test_what_goes_wrong_does_not_end_it():
    times: list[float] = []

    def keep() -> None:
        times.append(0.0)
        raise OSError("gone")

    keeper = Keeper(keep, every_s=0.02)
    keeper.start()
    assert kept(keeper, times, 3)
    keeper.stop()


def test_an_owner_that_hangs_keeps_nothing_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keeping, "LONGEST_S", 0.1)
    times: list[float] = []
    keeper = Keeper(lambda: times.append(0.0), every_s=0.02)
    keeper.start()
    time.sleep(0.4)
    found = len(times)
    time.sleep(0.1)
    keeper.stop()
    assert 0 < found == len(times)
