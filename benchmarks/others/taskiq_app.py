"""`taskiq worker benchmarks.others.taskiq_app:broker`; run with a number, it sends so many."""

from __future__ import annotations

import asyncio
import os
import sys

import aiohttp
from taskiq_redis import ListQueueBroker, RedisStreamBroker  # type: ignore[import-not-found]

Broker = ListQueueBroker if os.environ.get("TASKIQ_BROKER") == "taskiq_list" else RedisStreamBroker
broker = Broker(os.environ["URL"])
sessions: list[aiohttp.ClientSession] = []


@broker.task("post")  # type: ignore[untyped-decorator]
async def post(number: int) -> None:
    """Post over a kept-alive connection."""
    if not sessions:
        sessions.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64)))
    body: dict[str, object] = {"dag_run_id": f"r{number}", "conf": {}, "logical_date": None}
    async with sessions[0].post(os.environ["POST_URL"], json=body) as answer:
        answer.raise_for_status()
        await answer.read()


async def send(count: int) -> None:
    """Send so many."""
    await broker.startup()
    for number in range(count):
        await post.kiq(number)
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(send(int(sys.argv[1])))
