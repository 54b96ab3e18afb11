"""What a worker writes into a dead letter: the request whole, and a traceback that quotes nothing."""

from __future__ import annotations

import json
import traceback

import pytest

from producers.errors import GaveUp
from tasks import letters

CANARY = "c4n4ry-s3cret"


def raised(error: Exception, cause: Exception | None = None) -> str:
    """The traceback of an error, raised while another was handled."""
    with pytest.raises(type(error)) as caught:
        _raise(error, cause)
    return "".join(traceback.format_exception(caught.value))


def _raise(error: Exception, cause: Exception | None) -> None:
    try:
        if cause is not None:
            _raise(cause, None)
    finally:
        raise error


def test_the_words_of_our_own_errors_are_kept():
    told = letters.told_traceback(raised(GaveUp(5.0, "busy")))

    assert told.startswith("Traceback (most recent call last):")
    assert "raise error" in told
    assert told.endswith("producers.errors.GaveUp: gave up after 5 s, no run was made: busy")


def test_the_words_of_other_errors_are_not():
    several = f"{CANARY}\n  {CANARY}\n    {CANARY}\nKeyError {CANARY}: x\n\n{CANARY}"
    told = letters.told_traceback(raised(GaveUp(5.0, "busy"), ValueError(several)))

    assert CANARY not in told
    assert "ValueError" in told.splitlines()
    assert "During handling of" in told
    assert "GaveUp: gave up" in told


def test_an_error_of_somebody_elses_with_a_name_of_ours_is_not_ours():
    class GaveUp(Exception):
        pass

    assert CANARY not in letters.told_traceback(raised(GaveUp(CANARY)))
    assert CANARY not in letters.told_traceback(f"other.errors.GaveUp: {CANARY}")


def test_of_a_long_traceback_the_end_is_kept():
    told = letters.told_traceback('  File "x.py", line 1, in f\n' * 1000 + "KeyError: 1")

    assert len(told) == letters.MAX_TRACEBACK + 1
    assert told.startswith("…")
    assert told.endswith("KeyError")
    assert letters.told_traceback(None) == ""


def test_a_request_is_kept_with_what_follows_it_and_without_its_chord():
    beside = {"callbacks": [{"task": "c"}], "errbacks": None, "chain": [], "chord": {"task": "x"}}
    beside |= {"traceparent": "00-1", "retries": 5, "hostname": "h"}

    kept = json.loads(letters.request_text("tasks.trigger_dag", ("d",), {"v": 1}, beside, 3))

    assert kept == {
        "task": "tasks.trigger_dag",
        "args": ["d"],
        "kwargs": {"v": 1},
        "callbacks": [{"task": "c"}],
        "traceparent": "00-1",
        "priority": 3,
    }
    assert letters.request_text("tasks.fan_out_end", (), {}, {}) is None


def test_what_is_no_json_is_kept_as_text():
    kept = json.loads(letters.request_text("tasks.trigger_dag", (), {"conf": {"at": object}}, {}))

    assert isinstance(kept["kwargs"]["conf"]["at"], str)
