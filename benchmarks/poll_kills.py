"""200 × kill -9 of the only worker while it submits jobs to outside services, at random moments.

Half of the requests go to a service that honours idempotency keys: in the end exactly one job exists for
each. Half go to one that does not (`submit_once=True`, without a `find`): never two jobs exist for one, and
where it is not known whether there is one, the request says so (SubmitUnknown).
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import PollRequest, Submit, reference_for
from producers.handle import Handle
from producers.settings import ProducerSettings
from tests.worker import Worker

from ._report import Bound, report, say
from .stub import Stub

KILLS = 200
A_ROUND = 16
END_S = 120.0


def main() -> int:
    """Kill, count, and report."""
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder))
    bounds = [
        Bound("kills", at_least=KILLS),
        Bound("keyed_twice", at_most=0),
        Bound("keyed_never", at_most=0),
        Bound("once_twice", at_most=0),
        Bound("once_unsaid", at_most=0),
        Bound("open", at_most=0),
    ]
    return report("poll_kills", figures, bounds)


def run(folder: Path) -> dict[str, Any]:
    """Have requests come all the while, and kill the worker again and again."""
    keyed: list[Handle] = []
    once: list[Handle] = []
    draw = random.Random(20261120)  # noqa: S311
    with Valkey() as valkey, Stub() as stub:
        relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="benchmark"))

        def start(name: str) -> Worker:
            return Worker(
                valkey.url,
                folder,
                name=name,
                options=("-c", "4"),
                DAGRELAY_VISIBILITY_TIMEOUT_S="3",
                DAGRELAY_SERVICE_KEYED=json.dumps({"url": f"{stub.url}/keyed"}),
                DAGRELAY_SERVICE_ONCE=json.dumps({"url": stub.url}),
            )

        for kill in range(KILLS):
            requests = [request("keyed", False), request("once", True)] * (A_ROUND // 2)
            handles = relay.enqueue_many(requests)
            keyed += handles[::2]
            once += handles[1::2]
            with start("k") as worker:
                time.sleep(draw.uniform(0, 0.25))
                worker.kill()
            if kill % 20 == 19:
                say(f"{kill + 1} kills")
        with start("last"):
            deadline = time.monotonic() + END_S
            open_ = [*keyed, *once]
            while open_ and time.monotonic() < deadline:
                time.sleep(1)
                open_ = [handle for handle in open_ if not settled(handle)]
        made = Counter(stub.jobs())
        errors = Counter((handle.record() or raise_unknown(handle)).error for handle in once)
        unsaid = [
            handle
            for handle in once
            if not made[reference_for(handle.id)] and (handle.record() or raise_unknown(handle)).error is None
        ]
        return {
            "kills": KILLS,
            "requests": len(keyed) + len(once),
            "keyed_twice": sum(made[reference_for(handle.id)] > 1 for handle in keyed),
            "keyed_never": sum(made[reference_for(handle.id)] == 0 for handle in keyed),
            "once_twice": sum(made[reference_for(handle.id)] > 1 for handle in once),
            "once_made": sum(made[reference_for(handle.id)] == 1 for handle in once),
            "once_unknown": errors["SubmitUnknown"],
            "once_unsaid": len(unsaid),
            "open": len(open_),
        }


def request(service: str, submit_once: bool) -> PollRequest:
    return PollRequest(
        service=service,
        path="/jobs/{job_id}",
        submit=Submit(path="/jobs", body={"reference": "{reference}"}),
        submit_once=submit_once,
        interval_s=600,
        max_interval_s=600,
    )


def settled(handle: Handle) -> bool:
    """Tell whether it has ended, or follows its job."""
    found = handle.record()
    return found is not None and (found.ended or (found.job_id is not None and found.state == "waiting"))


def raise_unknown(handle: Handle) -> Any:
    raise RuntimeError(f"no record of {handle.id}")


if __name__ == "__main__":
    sys.exit(main())
