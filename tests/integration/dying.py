"""Tasks for the tests' workers that do not end: they kill their process, or cannot hand over what follows."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tasks.app import app, store_client
from tasks.results import NotHandedOver


@app.task(name="tests.die", recorded=False, ignore_result=True)
def die(how: str) -> None:
    """End the process that runs it, and note when it begins."""
    store_client().rpush("died", os.getpid())
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(3)


@app.task(name="tests.not_handed_over", bind=True, recorded=False, ignore_result=True)
def not_handed_over(self: Any) -> None:
    """Note whether it is told that it came back; at the first time it does."""
    redelivered = bool((self.request.delivery_info or {}).get("redelivered"))
    if store_client().rpush("redelivered", int(redelivered)) == 1:
        raise NotHandedOver("as if Redis was full")
