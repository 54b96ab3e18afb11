"""API keys: read from one file, stored hashed, in force within a second of a change."""

from __future__ import annotations

import logging

import pytest

from producers import keys as module
from producers.contract import PollRequest, TriggerRequest
from producers.errors import ConfigurationError, InvalidRequest, NotAllowed
from producers.keys import Keys, hash_of, new_key


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.toml"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)


def test_a_new_key_is_found_by_its_token_and_lies_there_hashed(path):
    token = new_key(path, "billing", dags=["sales_*"], rate_per_s=50, may_cancel=True)

    key = Keys.load(path).find(token)

    assert key is not None
    assert (key.id, key.rate_per_s, key.burst, key.may_cancel, key.may_read) == (
        "billing",
        50,
        50,
        True,
        True,
    )
    key.scope.check(TriggerRequest("sales_daily"))
    with pytest.raises(NotAllowed):
        key.scope.check(TriggerRequest("other"))
    with pytest.raises(NotAllowed):
        key.scope.check(TriggerRequest("sales_daily", connection="eu"))
    assert token not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("token", ["", "x", "dagrelay_", "sha256:", "\udc80", "é" * 5000])
def test_no_other_text_is_a_token(path, token):
    new_key(path, "billing")
    keys = Keys.load(path)
    assert keys.find(token) is None
    assert keys.find(hash_of(token)) is None


def test_the_hash_in_the_file_is_no_token(path):
    token = new_key(path, "billing")
    assert Keys.load(path).find(hash_of(token)) is None


def test_without_services_a_key_starts_no_jobs(path):
    token = new_key(path, "billing")
    key = Keys.load(path).find(token)
    with pytest.raises(NotAllowed):
        key.scope.check(PollRequest(service="render", path="/jobs/1"))


def test_connections_and_services_are_compared_in_lower_case(path):
    token = new_key(path, "billing", connections=["EU"], services=["Render"])
    key = Keys.load(path).find(token)
    key.scope.check(TriggerRequest("a", connection="eu"))
    key.scope.check(PollRequest(service="render", path="/jobs/1"))


def test_a_change_of_the_file_is_in_force_and_a_removed_key_is_gone(path):
    first = new_key(path, "first")
    keys = Keys.load(path)
    second = new_key(path, "second")
    assert keys.find(second).id == "second"
    assert keys.find(first).id == "first"

    path.write_text(path.read_text().replace("[keys.first]", "[keys.renamed]"))
    assert keys.find(first).id == "renamed"
    path.write_text("")
    assert keys.find(first) is None


def test_a_broken_file_leaves_the_keys_as_they_were_and_is_told(path, caplog):
    token = new_key(path, "billing")
    keys = Keys.load(path)
    path.write_text("[keys.billing\n")
    with caplog.at_level(logging.ERROR):
        assert keys.find(token).id == "billing"
        assert keys.find(token).id == "billing"
    assert len(caplog.records) == 1
    path.unlink()
    assert keys.find(token).id == "billing"


def test_all_mistakes_are_told_together_by_name(path):
    path.write_text(
        'other = 1\n[keys.a]\nhash = "plain"\ndags = "x"\nmay_cancel = 1\nrate_per_s = -1\nsecret = 1\n'
        '[keys."b c"]\n'
    )
    with pytest.raises(ConfigurationError) as caught:
        Keys.load(path)
    text = str(caught.value)
    for part in ("'other'", "hash", "dags", "may_cancel", "rate_per_s", "'secret'", "[keys.b c]"):
        assert part in text


def test_two_keys_share_no_hash(path):
    new_key(path, "a")
    line = path.read_text().splitlines()[2]
    path.write_text(path.read_text() + f"\n[keys.b]\n{line}\n")
    with pytest.raises(ConfigurationError, match="hash of"):
        Keys.load(path)


@pytest.mark.parametrize(
    ("name", "options"),
    [("", {}), ("a b", {}), ("a", {"dags": ['x"y']}), ("a", {"rate_per_s": 0}), ("a", {"rate_per_s": -3})],
)
def test_what_could_not_be_read_again_is_not_written(path, name, options):
    with pytest.raises(InvalidRequest):
        new_key(path, name, **options)
    assert not path.exists()


def test_a_name_is_given_once(path):
    new_key(path, "a")
    with pytest.raises(InvalidRequest, match="already"):
        new_key(path, "a")
