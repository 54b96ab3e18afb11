"""A task for the tests' workers: it waits, and each observation tells it what to do next."""

from __future__ import annotations

from typing import Any

from producers.stores.heard import said
from tasks.app import app, waits
from tasks.waiting import show, wait


@app.task(name="tests.wait_for", bind=True)
def wait_for(self: Any, what: str, until: float, look: str = "", key: str = "") -> Any:
    """Wait until one says {"return": …} or {"raise": …}; {"state": …, "progress": …} is shown in Flower."""
    if key:
        waits().register(self.request.id, [key], keep_s=60)
    seen = [said(one)[1] for one in waits().observations(self.request.id, self.request.retries)]
    shown = {}
    for one in seen:
        if isinstance(one, dict):
            if "return" in one:
                return one["return"]
            if "raise" in one:
                raise ValueError(one["raise"])
            shown = one
    waiting = wait(
        self, until=until, what=what, read=len(seen), look=look, look_in_s=3600, found=_found(shown)
    )
    show(self, shown.get("state", ""), shown.get("progress", ""))
    raise waiting


def _found(shown: dict[str, str]) -> dict[str, str]:
    return {"seen": shown.get("state", ""), "progress": shown.get("progress", "")} if shown else {}
