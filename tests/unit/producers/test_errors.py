"""Every error says what happened, and reaches the caller as the class that the worker raised."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producers import errors, exits
from producers.errors import DagrelayError, TaskFailed, error_from

CLASSES = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, DagrelayError) and found.__module__ == errors.__name__
]
VALUES = {
    "str": "a word",
    "int": 422,
    "float": 86400.0,
    "bool": False,
    "float | None": 2.5,
    "str | None": "another word",
}


def examples(kind: type[DagrelayError]) -> list[DagrelayError]:
    """The error with all its arguments, and with the required ones only."""
    if kind.__init__ is Exception.__init__:  # it takes a sentence
        return [kind("a word")]
    parameters = list(inspect.signature(kind).parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return [kind("one", "two")]
    full = [VALUES[str(parameter.annotation)] for parameter in parameters]
    required = [
        VALUES[str(parameter.annotation)] for parameter in parameters if parameter.default is parameter.empty
    ]
    return [kind(*full), kind(*required)]


EXAMPLES = [error for kind in CLASSES for error in examples(kind)]


def names(error: DagrelayError) -> str:
    return f"{type(error).__name__}{error.args}"


def the_same(one: BaseException, other: BaseException) -> bool:
    return type(one) is type(other) and one.args == other.args and str(one) == str(other)


def test_there_are_errors_to_test():
    assert len(CLASSES) > 20


@pytest.mark.parametrize("error", EXAMPLES, ids=names)
def test_an_error_survives_redis(error):
    """As Celery keeps it: the name of its class, and its args as JSON."""
    kept = json.loads(json.dumps({"exc_type": type(error).__name__, "exc_message": error.args}))

    back = error_from(kept["exc_type"], kept["exc_message"])

    assert the_same(back, error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=names)
def test_an_error_survives_the_way_between_processes(error):
    """Hosts send exceptions through multiprocessing and concurrent.futures."""
    assert the_same(pickle.loads(pickle.dumps(error)), error)  # noqa: S301
    assert the_same(copy.copy(error), error)


@pytest.mark.parametrize("error", EXAMPLES, ids=names)
def test_an_error_says_its_arguments(error):
    said = str(error)

    assert said.strip()
    assert not said.startswith("(")  # the repr of a tuple is no sentence


def test_the_tree_in_the_docstring_is_the_tree():
    drawn: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│ ├└─]*)(\w+)(  |$)", line):
            drawn.append((len(match.group(1)) // 4, match.group(2)))
    parents = {}
    above: dict[int, str] = {}
    for depth, name in drawn:
        above[depth] = name
        parents[name] = above.get(depth - 1, "Exception")

    assert parents == {kind.__name__: kind.__bases__[0].__name__ for kind in CLASSES}


@pytest.mark.parametrize("kind", ["SomethingNew", "ValueError", "dict", "error_from", "annotations", ""])
def test_what_this_release_does_not_know_still_says_its_words(kind):
    back = error_from(kind, ["its", "words"])

    assert isinstance(back, TaskFailed)
    assert str(back) == f"{kind}: its, words"


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([kind.__name__ for kind in CLASSES]), st.lists(ANY_JSON, max_size=4))
def test_no_arguments_of_another_release_keep_an_error_from_being_told(kind: str, arguments: list[Any]):
    back = error_from(kind, arguments)

    assert isinstance(back, DagrelayError)
    assert isinstance(str(back), str)
    repr(back)


def test_a_command_that_is_not_allowed_ends_with_77(capsys):
    @exits.told
    def command() -> None:
        raise errors.NotAllowed("dag_id: 'x' is not among those that you may start")

    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 77
    assert capsys.readouterr().err.startswith("dagrelay: dag_id: ")
