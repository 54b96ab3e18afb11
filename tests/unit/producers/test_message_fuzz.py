"""Whatever comes in is taken or refused: the benchmark's inputs, few of them. DAGRELAY_FUZZ says how many."""

from __future__ import annotations

import os

import pytest

from benchmarks.fuzz import Inputs, Parser, fuzz, parsers

INPUTS = int(os.environ.get("DAGRELAY_FUZZ", "1000"))
SEED = int(os.environ.get("DAGRELAY_FUZZ_SEED", "1"))
PARSERS = parsers()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_takes_or_refuses_whatever_comes(name: str):
    found = fuzz(name, PARSERS[name], Inputs(SEED), INPUTS)
    assert (
        found[f"{name}_refused_percent"] < 100 or name == "webhook_verify"
    )  # else it tried nothing further in


def test_the_search_finds_what_is_neither(monkeypatch):
    """And ends there: what watches over it would else end this very process a minute later."""
    watched = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: watched.append(1))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", watched.clear)

    def careless(body: bytes) -> None:
        if b"NaN" in body:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fuzz("careless", Parser(Inputs.body, careless), Inputs(SEED), 1000)
    assert not watched
