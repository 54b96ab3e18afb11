"""`dramatiq benchmarks.others.dramatiq_app`; called as a program with a number, it sends so many."""

from __future__ import annotations

import os
import sys

import dramatiq  # type: ignore[import-not-found]
import requests
from dramatiq.brokers.redis import RedisBroker  # type: ignore[import-not-found]
from requests.adapters import HTTPAdapter

broker = RedisBroker(url=os.environ["URL"])
dramatiq.set_broker(broker)
session = requests.Session()
session.mount("http://", HTTPAdapter(pool_maxsize=64))
session.trust_env = False


@dramatiq.actor(actor_name="post")  # type: ignore[untyped-decorator]
def post(number: int) -> None:
    """Post over a kept-alive connection."""
    body: dict[str, object] = {"dag_run_id": f"r{number}", "conf": {}, "logical_date": None}
    session.post(os.environ["POST_URL"], json=body, timeout=30).raise_for_status()


if __name__ == "__main__":
    for number in range(int(sys.argv[1])):
        post.send(number)
