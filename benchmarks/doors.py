"""How much each door takes in, and what it keeps.

- `http`: the gateway beside a bare FastAPI route that does one LPUSH; latency at half of its load;
- `streams`, `rabbitmq`: messages per second through `dagrelay listen`, which `kill -9` ends every
  5 s; none may be lost, none accepted twice;
- `sockets`: 5,000 idle connections at the TCP door; what sends too slowly or too much is cut off.

`make bench NAME=doors`, or some of them: `ARGS="http streams"`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ._report import Bound, report, say

BOUNDS = {
    "http": [Bound("ratio_http_vs_bare", at_least=0.5), Bound("http_p99_ms_at_half", at_most=25)],
    "streams": [
        Bound("streams_per_s", at_least=3000),
        Bound("streams_lost", at_most=0),
        Bound("streams_duplicates", at_most=0),
    ],
    "rabbitmq": [
        Bound("rabbitmq_per_s", at_least=3000),
        Bound("rabbitmq_lost", at_most=0),
        Bound("rabbitmq_duplicates", at_most=0),
    ],
    "sockets": [Bound("idle_connections", at_least=5000), Bound("idle_rss_mb", at_most=150)],
}


def main() -> int:
    """Measure what was asked for, each in a file of its own."""
    worst = 0
    for name in sys.argv[1:] or BOUNDS:
        say(f"doors: {name}")
        measure: Callable[[], dict[str, Any]] = import_module(f"benchmarks._doors_{name}").measure
        worst = max(worst, report(f"doors_{name}", measure(), BOUNDS[name]))
    return worst


if __name__ == "__main__":
    sys.exit(main())
