"""Which of the things that a waiting task was told it may take for the run's end without asking again."""

from __future__ import annotations

import time
from typing import Any

import pytest

import tests.import_tasks  # noqa: F401
from producers.stores.heard import heard
from tasks.trigger import TRUSTED_S, just_ended

NOW = time.time()


@pytest.mark.parametrize("state", ["success", "failed"])
def test_an_end_that_a_look_saw_just_now(state):
    assert just_ended([None, {"state": state, "at": time.time()}]) == state


@pytest.mark.parametrize(
    "seen",
    [
        [],
        [None],
        ["success"],
        [{"state": "success"}],  # somebody's wake, of which nobody knows when it was true
        [{"state": "success", "at": "now"}],
        [{"state": "success", "at": NOW - TRUSTED_S - 60}],  # it may have been cleared meanwhile
        [{"state": "success", "at": NOW + 3600}],  # by another clock
        [{"state": "gone", "at": NOW}],
        [{"state": "running", "at": NOW}],
        [{"state": "success", "at": NOW}, None],  # told to look after it
        [heard({"state": "success", "at": NOW})],  # an outsider's word, in the form of a look's
    ],
)
def test_all_else_is_asked_for_again(seen: list[Any]):
    assert just_ended(seen) is None
