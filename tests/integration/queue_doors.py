"""One promise for every broker: a listener that is killed in the midst loses nothing and repeats nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from local.process import ROOT, Process, clean_env
from local.valkey import Valkey
from tests.fake_airflow import FakeAirflow
from tests.integration.test_trigger import until

MESSAGES = 120
PREFETCH = 10
REPLIES = "replies-of-test"

Send = Callable[[bytes, str, str], None]
"""Publish a body with this id, which wants its answers in REPLIES with this correlation id."""


def listener(url: str, valkey: Valkey, log: Path, **env: str) -> Process:
    """Start `dagrelay listen` as a process."""
    return Process(
        [ROOT / ".venv/bin/dagrelay", "listen", "--prefetch", str(PREFETCH)],
        log=log,
        env=clean_env(DAGRELAY_REDIS_URL=valkey.url, DAGRELAY_LISTEN_URL=url, **env),
        cwd=ROOT,
        grace_s=20,
    )


def nothing_is_lost_and_nothing_runs_twice(
    url: str,
    send: Send,
    answers: Callable[[], Iterable[bytes]],
    *,
    valkey: Valkey,
    airflow: FakeAirflow,
    tmp_path: Path,
    **env: str,
) -> None:
    """Kill a listener among many messages, start another; all senders hear of one run each.

    `answers` returns those that came since it was called last. A worker has to run.
    """
    for number in range(MESSAGES):
        send(json.dumps({"dag_id": "sales", "conf": {"n": number}}).encode(), f"m{number}", f"c{number}")
    first = listener(url, valkey, tmp_path / "first.log", **env)
    until(lambda: len(airflow.runs) >= 5, timeout_s=60)
    first.kill()
    second = listener(url, valkey, tmp_path / "second.log", **env)
    heard: dict[str, set[str]] = defaultdict(set)

    def all_ended() -> bool:
        for body in answers():
            told: dict[str, Any] = json.loads(body)
            heard[told["correlation_id"]].add(told["what"])
        return sum("ended" in words for words in heard.values()) == MESSAGES

    try:
        until(all_ended, timeout_s=150)
    finally:
        code = second.stop()
    assert code == 0
    assert sorted(run["conf"]["n"] for run in airflow.runs.values()) == list(range(MESSAGES))
    # Those that the first had in hand when it was killed may hear at once how they ended.
    assert sum("accepted" not in words for words in heard.values()) <= PREFETCH
