"""Parts of the gateway that need no socket: keys of repeats, buckets, settings."""

from __future__ import annotations

import io

import pytest
from cryptography.fernet import Fernet

from producers.contract import TriggerRequest
from producers.errors import BrokerUnavailable, ConfigurationError
from producers.gateway.idempotency import digest, fingerprint, is_same, kept, parsed
from producers.gateway.limits import Limits
from producers.gateway.settings import is_loopback, read_gateway_settings
from producers.gateway.streams import Streams
from producers.keys import Key
from producers.scopes import EVERYTHING
from producers.stores.claim_check import ConfKeys
from producers.stores.records import Record

REDIS = {"DAGRELAY_REDIS_URL": "redis://127.0.0.1:1/0"}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('"abc"', "abc"),
        ("abc", "abc"),
        (' "a b"\t', "a b"),
        (r'"a\"b\\c"', 'a"b\\c'),
        ('"a', None),
        ('a"b', None),
        (r'"a\b"', None),
        ("a,b", None),
        ("a b", None),
        ('"a";p=1', None),
        ("", None),
        ('""', None),
        ('"ä"', None),
        ('"' + "x" * 200 + '"', "x" * 200),
        ('"' + "x" * 201 + '"', None),
    ],
)
def test_an_idempotency_key_is_one_string(text, key):
    assert parsed(text) == key


def test_what_is_asked_has_one_digest_whatever_the_order():
    assert digest({"a": 1, "b": [1, {"c": 2, "d": 3}]}) == digest({"b": [1, {"d": 3, "c": 2}], "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})


def test_what_lies_there_of_a_request_tells_nobody_that_he_guessed_its_conf():
    asked = fingerprint(TriggerRequest("d", {"pin": 1234}))
    old, none = ConfKeys(Fernet.generate_key().decode()), ConfKeys()
    assert asked not in kept(asked, old)
    assert kept(asked, old) != kept(asked, none)
    assert is_same(kept(asked, old), asked, old)
    assert not is_same(kept(asked, old), "another", old)


def test_a_repeat_is_known_again_while_keys_are_replaced():
    asked = fingerprint(TriggerRequest("d", {"pin": 1234}))
    old, new, none = Fernet.generate_key().decode(), Fernet.generate_key().decode(), ConfKeys()
    both = ConfKeys(f"{new},{old}")
    for there in (kept(asked, ConfKeys(old)), kept(asked, none)):
        assert is_same(there, asked, both)
        assert not is_same(there, "another", both)
    # It cannot be told: to refuse it would have its sender take another key, and have it done twice.
    assert is_same(kept(asked, ConfKeys(old)), asked, ConfKeys(new))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_lets_a_burst_through_and_then_its_rate():
    clock = Clock()
    limits, key = Limits(clock=clock), Key("a", EVERYTHING, rate_per_s=2, burst=3)
    assert [limits.ask(key).allowed for _ in range(4)] == [True, True, True, False]
    assert limits.ask(key).retry_after_s == 1
    clock.now = 0.5
    assert [limits.ask(key).allowed for _ in range(2)] == [True, False]
    clock.now = 1000.0
    assert [limits.ask(key).allowed for _ in range(4)] == [True, True, True, False]


def test_each_key_has_its_own_bucket_and_some_have_none():
    limits = Limits(clock=Clock())
    one, two = (Key(name, EVERYTHING, rate_per_s=1, burst=1) for name in "ab")
    assert limits.ask(one).allowed
    assert limits.ask(two).allowed
    assert not limits.ask(one).allowed
    assert limits.ask(Key("c", EVERYTHING)) is None


def test_several_processes_share_a_rate():
    clock = Clock()
    limits, key = Limits(0.25, clock), Key("a", EVERYTHING, rate_per_s=8, burst=8)
    assert [limits.ask(key).allowed for _ in range(3)] == [True, True, False]
    clock.now = 0.5
    assert limits.ask(key).allowed


@pytest.mark.parametrize(
    ("host", "is_it"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104
        ("x", False),
    ],
)
def test_loopback(host, is_it):
    assert is_loopback(host) is is_it


def test_settings_are_read_from_the_environment_and_code_goes_first(tmp_path):
    environ = REDIS | {
        "DAGRELAY_GATEWAY_PORT": "9000",
        "DAGRELAY_GATEWAY_KEYS_FILE": str(tmp_path / "k"),
        "DAGRELAY_GATEWAY_REQUIRE_IDEMPOTENCY_KEY": "1",
        "DAGRELAY_GATEWAY_HEARTBEAT_S": "2.5",
    }
    found = read_gateway_settings(environ, port=9001)
    assert (found.port, found.heartbeat_s, found.require_idempotency_key) == (9001, 2.5, True)
    assert found.keys_file == tmp_path / "k"
    assert "redis://" not in repr(found)


def test_no_setting_is_wrong_unsaid():
    environ = {"DAGRELAY_GATEWAY_PORT": "99999", "DAGRELAY_GATEWAY_INSECURE": "yes"}
    with pytest.raises(ConfigurationError) as caught:
        read_gateway_settings(environ)
    for part in ("_PORT is no port", "_INSECURE is neither", "DAGRELAY_REDIS_URL", "_KEYS_FILE"):
        assert part in str(caught.value)


async def _logged(lines: list[str], out: io.StringIO) -> None:
    from producers.gateway.access import AccessLog

    log = AccessLog(out)
    for line in lines:
        log.add(line)
    log.write()
    log.write()


def test_the_access_log_writes_each_line_once():
    import asyncio

    out = io.StringIO()
    asyncio.run(_logged(["a=1", "a=2"], out))
    told = out.getvalue().splitlines()
    assert [line.split(" ", 1)[1] for line in told] == ["access a=1", "access a=2"]


class Pipeline(list):
    def __init__(self, states) -> None:
        self.states = states

    def hmget(self, key, names) -> None:
        self.append([self.states[key.rpartition(":")[2]]])

    def execute(self) -> list:
        return list(self)


class BreaksOnce:
    """A Redis of which the answer about one record is lost, once."""

    def __init__(self, states, task_id) -> None:
        self.redis, self.states, self.breaks = self, states, task_id

    def pipeline(self, **_) -> Pipeline:
        return Pipeline(self.states)

    def record(self, task_id) -> Record:
        if self.breaks == task_id:
            self.breaks = ""
            raise BrokerUnavailable("no usable answer")
        return Record(task_id, state=self.states[task_id])


def test_no_change_is_lost_where_redis_goes_away_between_two_answers():
    streams = Streams(BreaksOnce({"a": "done", "b": "done"}, "b"), 10)
    looks = [[one.task_id for one in streams._changed(["a", "b"])] for _ in range(3)]
    assert looks == [["a"], ["b"], []]
