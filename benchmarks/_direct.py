"""The best that a direct client of Airflow can do: asyncio and kept-alive connections, in one process.

It knows what it must know: how many requests in flight are best, and nobody else triggers beside it. It is
gone with its process, and so is what it had not sent.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import aiohttp

TIMEOUT_S = 30.0


def trigger_all(url: str, token: str, numbers: Iterable[int], in_flight: int, cap_s: float) -> Counter[str]:
    """POST to `url` for each number, so many at a time; return how often each thing came of it.

    "200" and other statuses, and the names of exceptions. What `cap_s` leaves no time for is "not begun".
    """
    return asyncio.run(_all(url, token, iter(numbers), in_flight, time.monotonic() + cap_s))


async def _all(url: str, token: str, numbers: Iterator[int], in_flight: int, deadline: float) -> Counter[str]:
    found: Counter[str] = Counter()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=in_flight),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        headers={"Authorization": f"Bearer {token}"},
    ) as session:

        async def one_after_the_other() -> None:
            for number in numbers:
                if time.monotonic() > deadline:
                    found["not begun"] += 1
                else:
                    found[await _trigger(session, url, number)] += 1

        await asyncio.gather(*(one_after_the_other() for _ in range(in_flight)))
    return found


async def _trigger(session: aiohttp.ClientSession, url: str, number: int) -> str:
    body = {"dag_run_id": f"direct-{number}", "conf": {"n": number}, "logical_date": None}
    try:
        async with session.post(url, json=body) as answer:
            await answer.read()
            return str(answer.status)
    except (aiohttp.ClientError, TimeoutError) as exc:
        return type(exc).__name__
