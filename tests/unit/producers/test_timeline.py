"""The history of a request, as `dagrelay status` tells it: in order, and nothing twice."""

from __future__ import annotations

import pytest

from producers.cli_waiting import _span, printable, timeline
from producers.stores.records import Record


def test_a_job_is_told_from_acceptance_to_end():
    found = Record(
        "an-id",
        state="done",
        by="billing@db-1",
        accepted_at=100.0,
        due_at=105.0,
        submitting_at=105.1,
        submitted_at=105.2,
        waiting_since=105.2,
        waits_for="job 17 of service train",
        job_id="17",
        seen="succeeded",
        ended_at=120.0,
    )

    told = timeline(found, [(105.2, "is job 17"), (110.0, "is cleaning"), (119.0, "woken by a webhook")])

    assert told == [
        (100.0, "accepted, asked by billing@db-1"),
        (105.0, "due"),
        (105.1, "submission begins"),
        (105.2, "submitted: it is job 17"),
        (105.2, "waits for job 17 of service train"),
        (110.0, "is cleaning"),
        (119.0, "woken by a webhook"),
        (120.0, "done: succeeded"),
    ]


def test_an_end_that_was_corrected_is_told_as_both():
    run = {"dag_run_id": "relay__k", "state": "queued"}
    found = Record("an-id", state="done", accepted_at=1.0, ended_at=2.0, corrected_at=3.0, run=run)

    assert timeline(found, [(1.5, "attempt 1 failed: an answer was lost")]) == [
        (1.0, "accepted"),
        (1.5, "attempt 1 failed: an answer was lost"),
        (2.0, "ended, its outcome unknown"),
        (3.0, "corrected: done: run relay__k is queued"),
    ]


def test_what_was_cancelled_before_it_was_due_never_was():
    found = Record(
        "an-id", state="cancelled", accepted_at=1.0, due_at=500.0, ended_at=3.0, cancel_by="me@here"
    )

    assert [words for _, words in timeline(found, [(2.0, "cancel asked by me@here")])] == [
        "accepted",
        "cancel asked by me@here",
        "cancelled",
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-3, "0.0s"),
        (0.44, "0.4s"),
        (12.4, "12s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
    ],
)
def test_durations_are_as_people_read_them(seconds, shown):
    assert _span(seconds) == shown


def test_nothing_that_a_service_says_steers_a_terminal():
    assert printable("a\x1b[2J\nb\r\u202ec é") == "a [2J b  c é"
