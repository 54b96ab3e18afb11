"""Confs that go by reference, and confs that are sealed: what can be told without a Redis."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from cryptography.fernet import Fernet
from hypothesis import given, settings
from hypothesis import strategies as st

from producers.contract import (
    PollRequest,
    TriggerRequest,
    _conf_problem,
    conf_problem,
    is_sealed,
    reference_in,
    shown_message,
)
from producers.errors import ConfGone, ConfigurationError, ConfKeyMissing, ConfUnreadable, error_from
from producers.settings import read_settings
from producers.stores.claim_check import ClaimChecks, ConfKeys, ConfRules, conf_key
from producers.stores.envelope import with_packed
from producers.stubs import trigger_dag

CANARY = "c4n4ry-s3cret"
OLD, NEW, OTHER = (Fernet.generate_key().decode() for _ in range(3))

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
confs = st.dictionaries(names, values, max_size=5)


class Shelf(dict[str, bytes]):
    """What lies in Redis."""


def stored(conf: dict[str, Any], keys: ConfKeys, shelf: Shelf) -> Any:
    """Store a conf; return what a run has instead."""
    packed = ConfRules(keys).packed(TriggerRequest("d", conf).conf, "reference")
    assert packed.blob is not None
    shelf[conf_key(packed.reference)] = packed.blob()
    return json.loads(json.dumps(packed.conf))


def mixed(value: Any) -> Any:
    """The same with its keys in another order."""
    if isinstance(value, dict):
        return {name: mixed(item) for name, item in reversed(value.items())}
    return [mixed(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("keys", ["", NEW], ids=["plain", "with a key"])
@given(conf=confs)
@settings(max_examples=60, deadline=None)
def test_a_conf_comes_back_as_it_was_and_equal_ones_have_one_reference(keys, conf):
    shelf = Shelf()
    reference = stored(conf, ConfKeys(keys), shelf)

    assert reference == stored(mixed(conf), ConfKeys(keys), shelf)
    assert ClaimChecks(shelf, ConfKeys(keys)).real(reference) == conf
    assert TriggerRequest("d", reference).conf == reference


def test_what_a_conf_is_called_by_each_key_is_known_to_whoever_has_them_the_first_one_first():
    data = b'{"a":1}'

    assert ConfKeys(f"{NEW},{OLD}").references_of(data) == [
        ConfKeys(NEW).reference_of(data),
        ConfKeys(OLD).reference_of(data),
        ConfKeys().reference_of(data),
    ]
    assert ConfKeys().references_of(data) == [ConfKeys().reference_of(data)]


@given(conf=confs)
@settings(max_examples=60, deadline=None)
def test_a_sealed_conf_comes_back_as_it_was(conf):
    sealed = ConfKeys(NEW).seal(conf)

    assert is_sealed(TriggerRequest("d", sealed).conf)
    assert ConfKeys(NEW).open(json.loads(json.dumps(sealed))) == conf


@given(conf=st.dictionaries(names, values | st.integers() | st.floats() | st.text(), max_size=4))
@settings(max_examples=100, deadline=None)
def test_the_quick_look_at_a_conf_says_what_the_slow_one_says(conf):
    assert conf_problem(conf) == _conf_problem(conf, "conf", 0)


def test_a_conf_goes_by_reference_above_the_limit_and_where_it_is_asked_for():
    rules = ConfRules(limit_bytes=100)
    small, large = {"a": 1}, {"a": "x" * 100}
    assert rules.packed(small) == (small, "", None)
    assert reference_in(rules.packed(large).conf)
    assert rules.packed(large, "value") == (large, "", None)
    assert reference_in(rules.packed(small, "reference").conf)
    assert rules.packed(None, "reference") == (None, "", None)
    frame = len('{"a":""}')
    assert rules.packed({"a": "x" * (100 - frame)}).reference == ""
    assert rules.packed({"a": "x" * (101 - frame)}).reference


def test_what_stands_for_a_conf_is_not_stored_or_sealed_again():
    rules = ConfRules(ConfKeys(NEW), limit_bytes=0)
    reference = rules.packed({"a": 1}).conf
    assert rules.packed(reference, "reference") == (reference, reference_in(reference), None)
    sealed = ConfKeys(OLD).seal({"a": 1})
    assert rules.packed(sealed, "reference") == (sealed, "", None)


def test_a_key_is_told_by_a_name_and_a_conf_by_no_plain_hash():
    data = {"pin": 1234}
    plain, ours, others = (stored(data, ConfKeys(key), Shelf()) for key in ("", NEW, OTHER))
    assert plain["dagrelay_conf"].startswith("sha256:")
    assert ours["dagrelay_conf"].startswith(f"hmac-sha256:{ConfKeys(NEW).names[0]}:")
    assert len({one["dagrelay_conf"].split(":")[-1] for one in (plain, ours, others)}) == 3
    assert NEW not in repr(ConfKeys(NEW))
    assert NEW not in repr(read_settings({"DAGRELAY_REDIS_URL": "redis://h", "DAGRELAY_CONF_KEY": NEW}))


def test_nothing_of_a_conf_lies_there_in_plain_where_there_is_a_key():
    shelf = Shelf()
    stored({"a": CANARY * 3}, ConfKeys(NEW), shelf)
    (blob,) = shelf.values()
    assert CANARY.encode() not in blob
    assert blob[0] == 0x80  # a Fernet token's bytes, not its text


def test_after_a_rotation_the_old_key_still_opens_and_the_new_one_seals():
    shelf, both = Shelf(), ConfKeys(f"{NEW}, {OLD}")
    before = stored({"a": 1}, ConfKeys(OLD), shelf)
    assert ClaimChecks(shelf, both).real(before) == {"a": 1}
    assert both.open(ConfKeys(OLD).seal({"a": 1})) == {"a": 1}
    assert ConfKeys(NEW).open(both.seal({"a": 1})) == {"a": 1}
    after = stored({"a": 1}, both, shelf)
    assert before != after
    assert ClaimChecks(shelf, both).is_it(before["dagrelay_conf"], {"a": 1})
    assert not ClaimChecks(shelf, both).is_it(before["dagrelay_conf"], {"a": 2})


@pytest.mark.parametrize("keys", ["", OTHER], ids=["no key", "another key"])
def test_without_its_key_a_conf_is_not_read_and_the_error_names_the_key(keys):
    shelf = Shelf()
    reference = stored({"a": CANARY}, ConfKeys(NEW), shelf)
    with pytest.raises(ConfKeyMissing) as caught:
        ClaimChecks(shelf, ConfKeys(keys)).real(reference)
    assert ConfKeys(NEW).names[0] in str(caught.value)
    assert "DAGRELAY_CONF_KEY" in str(caught.value)
    with pytest.raises(ConfKeyMissing) as caught:
        ConfKeys(keys).open(ConfKeys(NEW).seal({"a": CANARY}))
    assert CANARY not in str(caught.value)
    assert str(error_from("ConfKeyMissing", json.loads(json.dumps(caught.value.args)))) == str(caught.value)


def test_what_somebody_else_put_there_is_not_believed():
    shelf = Shelf()
    one, other = stored({"a": 1}, ConfKeys(), shelf), stored({"a": 2}, ConfKeys(), shelf)
    shelf[conf_key(one["dagrelay_conf"])] = shelf[conf_key(other["dagrelay_conf"])]
    with pytest.raises(ConfUnreadable, match="not what the reference names"):
        ClaimChecks(shelf, ConfKeys()).real(one)
    shelf[conf_key(one["dagrelay_conf"])] = b"nonsense"
    with pytest.raises(ConfUnreadable, match="damaged"):
        ClaimChecks(shelf, ConfKeys()).real(one)


def test_a_bomb_is_not_unpacked():
    import zlib

    shelf = Shelf()
    one = stored({"a": 1}, ConfKeys(), shelf)
    shelf[conf_key(one["dagrelay_conf"])] = zlib.compress(b" " * 50_000_000)
    with pytest.raises(ConfUnreadable):
        ClaimChecks(shelf, ConfKeys()).real(one)


def test_an_expired_reference_says_what_to_do():
    reference = stored({"a": 1}, ConfKeys(), Shelf())
    with pytest.raises(ConfGone, match="DAGRELAY_CONF_TTL_S") as caught:
        ClaimChecks({}, ConfKeys()).real(reference)
    assert reference["dagrelay_conf"] in str(caught.value)


@pytest.mark.parametrize(
    "conf",
    [
        {"dagrelay_conf": "sha256:" + "a" * 63, "bytes": 1},
        {"dagrelay_conf": "sha256:" + "a" * 64, "bytes": True},
        {"dagrelay_conf": "sha256:" + "a" * 64, "bytes": -1},
        {"dagrelay_conf": "sha256:" + "a" * 64 + "\n", "bytes": 1},
        {"dagrelay_conf": "sha256:" + "a" * 64},
        {"dagrelay_conf": "sha256:" + "a" * 64, "size": 1},
    ],
)
def test_only_the_form_that_ours_have_is_a_reference(conf):
    assert reference_in(conf) is None
    with pytest.raises(ValueError, match="kept for references"):
        TriggerRequest("d", conf)


def test_the_trigger_that_follows_a_job_has_its_conf_treated_alike():
    request = PollRequest(service="s", path="/j", then={"dag_id": "d", "conf": {"a": "x" * 100}})
    made, packed = with_packed(request, ConfRules(limit_bytes=10))
    assert made.then["conf"]["dagrelay_conf"] == packed.reference
    made, packed = with_packed(request, ConfRules(ConfKeys(NEW)))
    assert is_sealed(made.then["conf"])
    assert request.then["conf"] == {"a": "x" * 100}
    assert PollRequest.from_message(made.to_message())


def test_flower_is_shown_neither_the_keys_nor_the_values_of_a_sealed_conf():
    sealed = {"dag_id": "d", "conf": ConfKeys(NEW).seal({"pin": CANARY})}
    assert "conf=<sealed>" in TriggerRequest(**sealed).shown("t")
    assert "conf=<sealed>" in shown_message(sealed)
    reference = stored({"pin": CANARY}, ConfKeys(), Shelf())
    shown = TriggerRequest("d", reference).shown("t")
    assert "a reference; 23 bytes" in shown
    assert "pin" not in shown


@pytest.fixture
def key_in_environment(monkeypatch):
    monkeypatch.setenv("DAGRELAY_CONF_KEY", NEW)
    monkeypatch.setattr(sys.modules["producers.client"], "_client", None)


@pytest.mark.usefixtures("key_in_environment")
def test_a_signature_carries_its_conf_sealed():
    made = trigger_dag.s("d", {"a": CANARY})
    assert CANARY not in json.dumps(made)
    assert ConfKeys(NEW).open(made["kwargs"]["conf"]) == {"a": CANARY}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"DAGRELAY_CONF_KEY": CANARY}, "DAGRELAY_CONF_KEY holds what is no Fernet key"),
        ({"DAGRELAY_CONF_KEY": f"{NEW},{CANARY}"}, "DAGRELAY_CONF_KEY holds what is no Fernet key"),
        ({"DAGRELAY_CONF_KEY_FILE": "/nowhere"}, "DAGRELAY_CONF_KEY_FILE cannot be read"),
        ({"DAGRELAY_CONF_LIMIT_BYTES": "-1"}, "DAGRELAY_CONF_LIMIT_BYTES is '-1'"),
        ({"DAGRELAY_CONF_LIMIT_BYTES": "1000001"}, "DAGRELAY_CONF_LIMIT_BYTES is '1000001'"),
    ],
)
def test_a_wrong_setting_is_told_by_its_name_and_without_its_value(environ, words):
    with pytest.raises(ConfigurationError) as caught:
        read_settings({"DAGRELAY_REDIS_URL": "redis://h", **environ})
    assert words in str(caught.value)
    assert CANARY not in str(caught.value)


def test_a_key_comes_from_a_file_too(tmp_path):
    path = tmp_path / "key"
    path.write_text(f"{NEW}\n")
    found = read_settings({"DAGRELAY_REDIS_URL": "redis://h", "DAGRELAY_CONF_KEY_FILE": str(path)})
    assert found.conf_key == NEW


def test_nobody_loads_cryptography_without_a_key():
    code = (
        "import sys; from producers import RelayClient, TriggerRequest\n"
        "from producers.settings import read_settings\n"
        "client = RelayClient(read_settings({}, redis_url='redis://nowhere'))\n"
        "client.item(TriggerRequest('d', {'a': 'x' * 50_000}))\n"
        "print('cryptography.fernet' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
