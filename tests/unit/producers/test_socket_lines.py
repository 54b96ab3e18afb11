"""What the TCP door makes of the bytes that come in, without a socket."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from producers.client import RelayClient
from producers.errors import ConfigurationError
from producers.keys import Key, Keys, new_key
from producers.scopes import EVERYTHING
from producers.socket_listener import LineReader, LineTooLong, SocketDoor, _Allowance, _shown


def lines_of(reader: LineReader, limit: int = 100) -> list[bytes]:
    found = []
    while (line := reader.next(limit)) is not None:
        found.append(line)
    return found


def test_lines_are_cut_the_same_however_small_the_pieces():
    whole = b'{"a": 1}\r\n\n  \n{"b": 2}\n\t{"c": "\xc3\xbc"}  \nrest'
    for size in (1, 2, 3, 7, 100):
        reader, found = LineReader(), []
        for start in range(0, len(whole), size):
            reader.feed(whole[start : start + size])
            found += lines_of(reader)
        assert found == [b'{"a": 1}', b'{"b": 2}', b'{"c": "\xc3\xbc"}']
        assert reader.rest() == b"rest"
        assert len(reader) == 0


@pytest.mark.parametrize("end", [b"", b"\n", b"\nshort\n"])
def test_a_line_over_the_limit_is_told_whether_it_has_ended_or_not(end):
    reader = LineReader()
    reader.feed(b"x" * 100)
    assert reader.next(100) is None
    reader.feed(b"x" + end)
    with pytest.raises(LineTooLong):
        reader.next(100)


def test_a_long_line_in_many_pieces_is_looked_at_once():
    class Counted(bytearray):
        looked_at = 0

        def find(self, wanted, start=0):  # type: ignore[no-untyped-def]
            Counted.looked_at += len(self) - start
            return super().find(wanted, start)

    reader = LineReader()
    reader._buffer = Counted()
    for _ in range(2000):
        reader._buffer += b"x" * 10
        assert reader.next(1_000_000) is None
    assert Counted.looked_at == 20_000


def test_whatever_comes_in_is_cut_into_lines():
    rng = random.Random(6)  # noqa: S311 - no secret
    for _ in range(2000):
        reader = LineReader()
        for _ in range(rng.randrange(6)):
            reader.feed(bytes(rng.choice(b'\n\r\x00{}" \xffab') for _ in range(rng.randrange(30))))
        try:
            assert all(line and b"\n" not in line for line in lines_of(reader, 40))
        except LineTooLong:
            assert len(reader) > 40


def test_a_reason_is_one_line_that_steers_no_terminal():
    assert _shown("a\nOK forged\x1b[31m") == "a OK forged [31m"
    assert len(_shown("x" * 10_000)) == 500


def test_a_key_asks_no_faster_than_it_may():
    allowance = _Allowance(Key("k", EVERYTHING, rate_per_s=2, burst=3), 3, 100.0)
    assert [allowance.take(100.0) for _ in range(3)] == [0, 0, 0]
    assert allowance.take(100.0) == pytest.approx(0.5)
    assert allowance.take(100.5) == 0
    assert allowance.take(100.75) == pytest.approx(0.25)
    assert [allowance.take(1000.0) for _ in range(4)][:3] == [0, 0, 0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "--keys"),
        ({"insecure": True, "host": "0.0.0.0"}, "--insecure"),  # noqa: S104
        ({"insecure": True, "host": "relay.example"}, "--insecure"),
        ({"path": "/tmp/" + "x" * 100}, "--path"),
        ({"path": "/tmp/x", "mode": 0o666}, "--mode"),
    ],
)
def test_nobody_is_let_in_by_oversight(nobody: RelayClient, given, words):
    with pytest.raises(ConfigurationError, match=words):
        SocketDoor(nobody, **given)


def test_who_may_be_let_in(nobody: RelayClient, tmp_path: Path):
    new_key(tmp_path / "keys", "billing")
    keys = Keys.load(tmp_path / "keys")
    SocketDoor(nobody, host="0.0.0.0", keys=keys)  # noqa: S104
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        SocketDoor(nobody, host=host, insecure=True)
    SocketDoor(nobody, path=tmp_path / "door")
    SocketDoor(nobody, path=tmp_path / "door", mode=0o666, keys=keys)
