"""A fan-out of 10,000 triggers, from the call to its callback, beside stock Celery's chord of the same POSTs.

Both post to an Airflow that takes 20 ms (`benchmarks.stub`), over one Redis, with one worker process; the
callback tells the instant at which it began (ours runs in a stock Celery worker beside it, a host's). Ours
checks, records and answers for each request, and hands the callback all outcomes. Stock has 10,000 tasks of
one POST over a kept-alive connection, on 64 threads, with early acknowledgement: its best case, without
retries, and without a word on whether a run was made.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import redis
from celery import Celery, chord

from local.valkey import Valkey
from producers import fan_out
from producers.client import RelayClient
from producers.settings import ProducerSettings
from tests.plain_worker import PlainWorker
from tests.worker import Worker

from ._report import Bound, report, say
from .stub import Stub

ROUNDS = 3
COUNT = 10_000
IN_FLIGHT = 200
CONF = {"day": "2026-11-20", "region": "north", "rows": 1200, "full": True}


def _called_at(client: redis.Redis) -> float:
    found: Any = client.blpop(["begun"], timeout=180)
    if found is None:
        raise RuntimeError("no callback within three minutes")
    return float(found[1])


def ours(folder: Path) -> tuple[float, float]:
    """Return the seconds from the call to the callback, and those of the call alone."""
    with Valkey() as valkey, Stub() as stub:
        client = redis.Redis.from_url(valkey.url, socket_timeout=200)
        relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="bench"))
        callback = Celery("host").signature("begun", immutable=True, queue="celery")
        requests = [{"dag_id": "daily_sales", "conf": CONF | {"n": n}} for n in range(COUNT)]
        connections = {"default": stub.conn_uri(max_in_flight=IN_FLIGHT)}
        with (
            PlainWorker("stock", valkey.url, folder, options=("-P", "threads", "-c", "2")),
            Worker(valkey.url, folder, connections=connections),
        ):
            fan_out(requests[:200], relay=relay).get(timeout=30)  # the worker has logged in
            began = time.time()
            fan = fan_out(requests, then=callback, relay=relay)
            call_s = time.time() - began
            took_s = _called_at(client) - began
            outcomes = fan.get(timeout=30)
        posts, *_ = stub.posts()
        if posts != COUNT + 200 or {one.state for one in outcomes} != {"done"} or len(outcomes) != COUNT:
            raise RuntimeError(f"{posts} POSTs came, {len(outcomes)} outcomes")
        return took_s, call_s


def stock(folder: Path) -> float:
    """Return the seconds from the call of a chord to its body."""
    with Valkey() as valkey, Stub() as stub:
        client = redis.Redis.from_url(valkey.url, socket_timeout=200)
        app: Celery[Any] = Celery("plain", broker=valkey.url, backend=valkey.url)
        conf = {"task_acks_late": False, "result_backend": valkey.url, "task_ignore_result": False}
        with PlainWorker(
            "stock",
            valkey.url,
            folder,
            options=("-P", "threads", "-c", "64"),
            conf=conf,
            PLAIN_POST_URL=stub.runs_url,
        ):
            app.signature("post", args=(0,)).apply_async(ignore_result=True)
            stub.wait_for(1)
            header = [app.signature("post", args=(number,)) for number in range(COUNT)]
            began = time.time()
            chord(header, app.signature("begun", immutable=True), app=app).apply_async()
            # A result that is collected later would look for a Redis that is gone.
            vars(app.backend)["remove_pending_result"] = lambda *_: None
            took_s = _called_at(client) - began
        posts, *_ = stub.posts()
        if posts != COUNT + 1:
            raise RuntimeError(f"{posts} POSTs came")
        return took_s


def main() -> int:
    """Measure and report."""
    mine: list[float] = []
    calls: list[float] = []
    theirs: list[float] = []
    for number in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            took_s, call_s = ours(Path(folder))
            mine.append(took_s)
            calls.append(call_s)
            theirs.append(stock(Path(folder)))
        say(f"round {number + 1} of {ROUNDS}: ours {mine[-1]:.2f} s, stock {theirs[-1]:.2f} s")
    ratios = [other / own for own, other in zip(mine, theirs, strict=True)]
    figures = {
        "requests": COUNT,
        "ours_s": round(statistics.median(mine), 2),
        "call_s": round(statistics.median(calls), 2),
        "stock_s": round(statistics.median(theirs), 2),
        "ratio_stock": round(statistics.median(ratios), 1),
        "ours_per_s": round(COUNT / statistics.median(mine)),
    }
    bounds = [
        Bound("ours_s", at_most=3),
        Bound("call_s", at_most=0.5),
        Bound("ratio_stock", at_least=6),
    ]
    return report("fanout", figures, bounds)


if __name__ == "__main__":
    sys.exit(main())
