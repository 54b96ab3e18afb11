"""What `.get()` makes of a result as Celery keeps it."""

from __future__ import annotations

import pytest

from producers.errors import DagNotFound, RequestCancelled, ResultNotReady, TaskFailed
from producers.handle import Handle, outcome_error


@pytest.mark.parametrize(
    ("status", "result", "expected"),
    [
        (
            "FAILURE",
            {"exc_type": "DagNotFound", "exc_message": ["d", "gone"], "exc_module": "producers.errors"},
            DagNotFound("d", "gone"),
        ),
        (
            "FAILURE",
            {"exc_type": "KeyError", "exc_message": ["x"], "exc_module": "builtins"},
            TaskFailed("KeyError", "x"),
        ),
        ("FAILURE", {"exc_type": "Odd", "exc_message": "one text"}, TaskFailed("Odd", "one text")),
        ("FAILURE", {}, TaskFailed("None", "None")),
        ("FAILURE", "only text", TaskFailed("FAILURE", "only text")),
        ("FAILURE", None, TaskFailed("FAILURE", "None")),
        ("SUCCESS", 5, TaskFailed("SUCCESS", "5")),
        (
            "REVOKED",
            {"exc_type": "TaskRevokedError", "exc_message": ["expired"]},
            RequestCancelled("expired"),
        ),
    ],
)
def test_every_kind_of_result_becomes_one_of_our_errors(status, result, expected):
    error = outcome_error(status, result)

    assert type(error) is type(expected)
    assert error.args == expected.args


def test_a_handle_is_its_id(nobody):
    one, same, other = Handle("a", None, nobody), Handle("a", "r", nobody), Handle("b", None, nobody)

    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != "a"
    assert repr(one) == "<Handle a>"


def test_a_timeout_of_get_is_a_timeout_error_of_python_too():
    """`except TimeoutError` is what a caller writes without reading our documentation."""
    assert issubclass(ResultNotReady, TimeoutError)
