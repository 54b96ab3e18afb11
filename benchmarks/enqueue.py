"""What accepting a request costs the caller, beside what one would write without the library.

`.delay()` beside stock `Celery.send_task` without a result backend, and `delay_many` beside a pipeline of
hand-made messages: the same confs, the same Redis, in turn. Ours checks every request and writes its record
as well; theirs only push. No worker runs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

from celery import Celery
from redis import Redis

from local.process import ROOT, clean_env
from local.valkey import Valkey
from producers import TriggerRequest, configure, trigger_dag
from producers.contract import TRIGGER_DAG

from ._report import Bound, interleaved, report, say

ROUNDS = 25  # short ones: what disturbs the machine for a moment disturbs few of them
SINGLE, BULK = 200, 2000
IMPORTS = 9
CONF = {"day": "2026-11-20", "region": "north", "rows": 1200, "paths": ["a/b", "c/d"], "full": True}
IMPORT = (  # CPU
    "import time; began = time.process_time(); from producers import trigger_dag;"
    "print(time.process_time() - began)"
)


def raw_message(number: int) -> str:
    """A Celery message of protocol 2, made by hand as one would who needs it fast."""
    task_id = str(uuid.uuid4())
    body = [
        [],
        {"v": 1, "dag_id": "daily_sales", "conf": CONF, "key": f"k{number}"},
        {"callbacks": None, "errbacks": None, "chain": None, "chord": None},
    ]
    return json.dumps(
        {
            "body": json.dumps(body),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {
                "lang": "py",
                "task": TRIGGER_DAG,
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "retries": 0,
                "eta": None,
                "expires": None,
                "timelimit": [None, None],
                "argsrepr": "()",
                "kwargsrepr": "{}",
                "origin": "raw@here",
            },
            "properties": {
                "correlation_id": task_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "raw"},
                "priority": 0,
                "delivery_tag": task_id,
            },
        }
    )


def main() -> int:
    """Measure and report."""
    with Valkey() as valkey:
        configure(redis_url=valkey.url)
        stock = Celery("stock", broker=valkey.url, set_as_current=False)
        redis = Redis.from_url(valkey.url)

        def delay() -> None:
            for number in range(SINGLE):
                trigger_dag.delay("daily_sales", conf=CONF, key=f"k{number}")

        def send_task() -> None:
            for number in range(SINGLE):
                kwargs = {"dag_id": "daily_sales", "conf": CONF, "key": f"k{number}"}
                stock.send_task(TRIGGER_DAG, kwargs=kwargs, queue="stock", ignore_result=True)

        def delay_many() -> None:
            trigger_dag.delay_many(
                TriggerRequest("daily_sales", conf=CONF, key=f"k{number}") for number in range(BULK)
            )

        def raw_pipeline() -> None:
            pipe = redis.pipeline(transaction=False)
            for number in range(BULK):
                pipe.lpush("raw", raw_message(number))
            pipe.execute()

        def per_second(send: Callable[[], None], number: int) -> Callable[[], float]:
            def measure() -> float:
                redis.flushdb()
                began = time.perf_counter()
                send()
                return number / (time.perf_counter() - began)

            return measure

        ways = {
            "delay": per_second(delay, SINGLE),
            "stock": per_second(send_task, SINGLE),
            "bulk": per_second(delay_many, BULK),
            "raw": per_second(raw_pipeline, BULK),
        }
        say(f"{ROUNDS} rounds: {SINGLE} single calls, {BULK} in bulk")
        interleaved(1, ways)
        found = interleaved(ROUNDS, ways)

    rate = {name: statistics.median(values) for name, values in found.items()}
    say(f"{IMPORTS} imports, each in a process of its own")
    imports = [import_cpu_s() for _ in range(IMPORTS)]
    figures = {
        # Of each round, so that what disturbs one round disturbs one ratio.
        "ratio_delay_vs_stock": round(statistics.median(map(ratio, found["delay"], found["stock"])), 2),
        "ratio_bulk_vs_raw": round(statistics.median(map(ratio, found["bulk"], found["raw"])), 2),
        "import_cpu_s": round(statistics.median(imports), 3),
        "delay_per_s": round(rate["delay"]),
        "stock_send_task_per_s": round(rate["stock"]),
        "bulk_per_s": round(rate["bulk"]),
        "raw_pipeline_per_s": round(rate["raw"]),
    }
    return report(
        "enqueue",
        figures,
        [
            Bound("ratio_delay_vs_stock", at_least=1.2),
            Bound("ratio_bulk_vs_raw", at_least=0.4),
            Bound("import_cpu_s", at_most=0.35),
        ],
    )


def ratio(ours: float, theirs: float) -> float:
    """How many times as many we do."""
    return ours / theirs


def import_cpu_s() -> float:
    """CPU seconds of `from producers import trigger_dag` in a fresh process, its bytecode being compiled."""
    ended = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=ROOT,
        env=clean_env(PYTHONPATH=str(ROOT)),
        capture_output=True,
        check=True,
    )
    return float(ended.stdout)


if __name__ == "__main__":
    sys.exit(main())
