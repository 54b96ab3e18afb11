"""What `kill -9` loses and repeats: 60 000 small tasks, 30 kills of busy workers, ours and stock in turn.

One and two workers, threads and child processes. `claimed` is what the killed workers held at their ends, as
Redis has it: so many may run again, and no more. Stock's figure there is what all its workers had
unacknowledged. Both have late acknowledgement and a visibility timeout of 3 s. These are counts, not times:
one round of each.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from local.valkey import Valkey
from tests.kills import MODES, Outcome, kill_often, total
from tests.plain_worker import Side

from ._report import Bound, report, say

MESSAGES, KILLS = 60_000, 30
SIDES: tuple[Side, ...] = ("ours", "stock")
PREFIXES: dict[Side, str] = {"ours": "", "stock": "stock_"}


def main() -> int:
    """Measure and report."""
    found: dict[Side, dict[str, Outcome]] = {"ours": {}, "stock": {}}
    with tempfile.TemporaryDirectory() as folder, Valkey() as valkey:
        for number, mode in enumerate(MODES):
            kills = KILLS // len(MODES) + (number < KILLS % len(MODES))
            for side in SIDES:
                found[side][mode.name] = kill_often(
                    side,
                    mode,
                    valkey.url,
                    Path(folder),
                    messages=MESSAGES // len(MODES),
                    kills=kills,
                    progress=say,
                )
                say(f"{side} {mode.name}: {found[side][mode.name]}")

    ours, stock = (total(list(found[side].values())) for side in SIDES)
    figures: dict[str, Any] = {
        "messages": ours.messages,
        "kills": ours.kills,
        "never_ran": ours.never_ran,
        "extra_runs": ours.extra_runs,
        "ran_twice": ours.ran_twice,
        "claimed_at_kills": ours.claimed,
        "left_over": ours.unsettled,
        "stock_kills": stock.kills,
        "stock_never_ran": stock.never_ran,
        "stock_extra_runs": stock.extra_runs,
        "stock_ran_twice": stock.ran_twice,
        "stock_claimed_at_kills": stock.claimed,
        "by_mode": {
            f"{prefix}{mode.name}": {
                "never_ran": found[side][mode.name].never_ran,
                "ran_twice": found[side][mode.name].ran_twice,
                "claimed": found[side][mode.name].claimed,
            }
            for side, prefix in PREFIXES.items()
            for mode in MODES
        },
    }
    bounds = [
        Bound("never_ran", at_most=0),
        Bound("extra_runs", at_most=ours.claimed),
        Bound("left_over", at_most=0),
    ]
    return report("kill", figures, bounds)


if __name__ == "__main__":
    sys.exit(main())
