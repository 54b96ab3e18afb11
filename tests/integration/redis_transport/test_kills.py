"""`kill -9` loses nothing, and repeats no more than what the killed worker had claimed.

`make bench NAME=kill` is the same with 60 000 messages, and stock kombu beside it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from local.valkey import Valkey
from tests.kills import MODES, Mode, kill_often


@pytest.mark.parametrize("mode", [MODES[0], MODES[3]], ids=lambda mode: mode.name)
def test_every_message_runs_whatever_is_killed_and_only_what_was_claimed_runs_again(
    mode: Mode, valkey: Valkey, tmp_path: Path
):
    outcome = kill_often("ours", mode, valkey.url, tmp_path, messages=3000, kills=2, after_s=(0.0, 0.1))

    assert outcome.claimed  # the kills met workers at work
    assert outcome.never_ran == 0
    assert outcome.unsettled == 0
    assert outcome.extra_runs <= outcome.claimed
