"""A worker's metrics page, as a test reads it."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[str, float]


def samples(text: str) -> Samples:
    """What a page says, without what is 0: `name{label="value"}` → number."""
    found = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(one.labels.items()) if value)
            if one.value:
                found[f"{one.name}{{{labels}}}"] = one.value
    return found


def page(port: int) -> str:
    """The page itself."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def scrape(port: int) -> Samples:
    """What the worker on this port says now."""
    return samples(page(port))


def scrape_until(port: int, ready: Callable[[Samples], bool], timeout_s: float = 20.0) -> Samples:
    """What it says once it is as expected; shared numbers are read once a second only."""
    deadline = time.monotonic() + timeout_s
    while not ready(found := scrape(port)):
        shown = {name: value for name, value in found.items() if "_bucket{" not in name}
        assert time.monotonic() < deadline, f"not as expected after {timeout_s:g} s: {shown}"
        time.sleep(0.1)
    return found


def of(found: Samples, name: str) -> Samples:
    """The samples of one metric, by their labels alone."""
    return {one.partition("{")[2][:-1]: value for one, value in found.items() if one.startswith(f"{name}{{")}
