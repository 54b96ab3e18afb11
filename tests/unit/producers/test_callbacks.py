"""A callback's token proves whose it is and until when; secrets come from the environment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producers.stores.callbacks import Secrets, callback_key, read_secrets
from producers.stores.heard import answer_key, heard, said

NOW = 1_780_000_000.0
OURS = Secrets((b"a" * 40, b"b" * 40))
CANARY = "c4n4ry"


@given(st.text(min_size=1, max_size=200).filter(lambda text: text.isprintable()), st.floats(0, 1e9))
def test_a_token_is_the_same_each_time_and_names_its_task(task_id, left_s):
    token = OURS.token(task_id, NOW + left_s)

    assert token == OURS.token(task_id, NOW + left_s)
    assert OURS.task_of(token, NOW) == task_id


def test_a_token_of_an_older_secret_is_taken_and_no_other():
    old, other = Secrets((b"b" * 40,)), Secrets((b"c" * 40,))

    assert OURS.task_of(old.token("t", NOW), NOW) == "t"
    assert old.task_of(OURS.token("t", NOW), NOW) is None
    assert OURS.task_of(other.token("t", NOW), NOW) is None
    assert Secrets().task_of(OURS.token("t", NOW), NOW) is None


def test_a_token_is_over_some_time_after_its_deadline():
    token = OURS.token("t", NOW)

    assert OURS.task_of(token, NOW + 50) == "t"  # clocks differ: Redis' decides
    assert OURS.task_of(token, NOW + 100) is None


@given(st.text(max_size=80))
def test_no_text_is_a_token(text):
    assert OURS.task_of(text, NOW) is None


@given(st.integers(0, 200), st.characters(codec="ascii"))
def test_a_token_that_is_changed_is_none(at, character):
    token = OURS.token("the-task", NOW)
    at %= len(token)
    changed = token[:at] + character + token[at + 1 :]

    assert OURS.task_of(changed, NOW) == ("the-task" if changed == token else None)


def test_the_key_in_redis_holds_no_token():
    token = OURS.token("t", NOW)

    assert token.split(".")[2] not in callback_key(token)


# Secrets


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"DAGRELAY_CALLBACK_SECRET": CANARY}, "has fewer than 32 characters"),
        ({"DAGRELAY_CALLBACK_SECRET": "x" * 40, "DAGRELAY_CALLBACK_SECRET_OLD": CANARY}, "_OLD has fewer"),
        ({"DAGRELAY_CALLBACK_SECRET_OLD": "x" * 40}, "is set without DAGRELAY_CALLBACK_SECRET"),
        ({"DAGRELAY_CALLBACK_SECRET_FILE": "/nowhere"}, "_FILE cannot be read"),
    ],
)
def test_a_secret_that_is_none_is_named_and_not_shown(environ, words):
    mistakes: list[str] = []
    read_secrets(environ, mistakes)

    (mistake,) = mistakes
    assert words in mistake
    assert CANARY not in mistake


def test_secrets_come_from_the_environment_or_a_file(tmp_path):
    file = tmp_path / "secret"
    file.write_text("f" * 40 + "\n")
    mistakes: list[str] = []

    found = read_secrets(
        {
            "DAGRELAY_CALLBACK_SECRET_FILE": str(file),
            "DAGRELAY_CALLBACK_SECRET_OLD": f"{'g' * 40}, {'h' * 40}",
        },
        mistakes,
    )

    assert not mistakes
    assert found.keys == (b"f" * 40, b"g" * 40, b"h" * 40)
    assert "fff" not in repr(found)
    assert not read_secrets({}, mistakes)


# What is heard


def test_what_is_heard_is_wrapped_once_whatever_it_looks_like():
    forged = {"end": "done", "state": "x"}

    assert said(heard(forged)) == (True, forged)
    assert heard(heard(forged)) == heard(forged)
    assert said(heard({"said": forged})) == (True, {"said": forged})  # JSON that looks like ours is none
    assert said(forged) == (False, forged)
    assert heard(None) is None


def test_the_key_of_an_answer_has_the_service_in_it():
    assert answer_key("a", "r") != answer_key("b", "r")
