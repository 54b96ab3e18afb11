"""The workers' own app, with tasks that wait, are woken and looked at; forked as `app.py` forks its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
os.environ.setdefault("DAGRELAY_REDIS_URL", "redis://127.0.0.1:1/0")

from celery.exceptions import Ignore

from tasks.app import app, records, waits
from tasks.looks import Watch
from tasks.redis_transport import register
from tasks.waiting import wait
from tests.integration.redis_transport import app as crash

GROUP = "service:crash"
QUEUE = "triggers"
FAR_S = 4e9
CYCLES = ("a", "b")


@app.task(name="cycle", bind=True)
def cycle(self: Any, name: str) -> Any:
    """Wait for a key, which may turn long before; then for a look; then end with what was told."""
    found = records().get(self.request.id)
    if found is not None and (found.ended or found.retried > self.request.retries):
        raise Ignore  # an older copy, or a newer one has ended
    crash.note(f"begin {name} {self.request.retries} {os.getpid()}")
    try:
        told = waits().observations(self.request.id, self.request.retries)
        if "looked at" in told:
            return told
        if "turned" in told:
            look.apply_async((), task_id=f"look-{name}", queue=QUEUE)
            raise wait(self, until=FAR_S, what="a look", read=told.index("turned") + 1, look=GROUP)
        waits().register(self.request.id, [name], 60)
        turn.apply_async((name,), task_id=f"turn-{name}", queue=QUEUE)
        raise wait(self, until=FAR_S, what="a key", read=len(told))
    finally:
        crash.note(f"end {name} {self.request.retries} {os.getpid()}")


@app.task(name="turn", recorded=False, ignore_result=True)
def turn(name: str) -> None:
    waits().wake_by_key(name, "turned")


@app.task(name="look", bind=True, recorded=False, ignore_result=True)
def look(self: Any) -> None:
    """Claim what is to be looked at and wake it, until there is nothing more to wait for."""
    from producers.stores.waits import Seen

    token, claimed = waits().claim_looks(GROUP, lease_s=0.3, most=10, facts=())
    waits().report(
        GROUP, token, [Seen(one.task_id, one.epoch, "wake", 0.0, '"looked at"') for one in claimed]
    )
    ends = [found.ended for name in CYCLES if (found := records().get(f"cycle-{name}"))]
    if not all(ends):
        raise self.retry(countdown=0.1)


def run_worker(order: dict[str, Any]) -> None:
    """Be a worker, in a process of its own."""
    app.conf.broker_url = order["url"]
    app.conf.result_backend = "tasks.results:RecordedBackend+" + order["url"]
    app.conf.broker_transport_options["visibility_timeout"] = crash.LEASE_S
    crash.app = app
    app.steps["consumer"].discard(Watch)
    crash.run_worker(order)


if __name__ == "__main__":
    register()
    crash.nursery(run_worker)
