"""What operators in Airflow keep in Redis, and how their triggers wait on it, with a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from local.valkey import Valkey
from producers.airflow.waiter import Changes, Waiter, waiter_for
from producers.client import RelayClient, new_task_id
from producers.contract import TriggerRequest
from producers.settings import ProducerSettings
from producers.stores import serving
from producers.stores.records import record_key
from producers.stores.standing import Standing, look

pytestmark = pytest.mark.integration

REQUEST = TriggerRequest(dag_id="daily_sales")


def stand(relay: RelayClient, request_id: str, **fields: str) -> None:
    """Set fields of a record, as a worker does."""
    relay.redis.hset(record_key(request_id), mapping=fields)


def take(relay: RelayClient, generation: str = "1") -> serving.Served:
    return serving.take(relay.redis, "task-1", new_task_id(), generation)


# Which request serves a task instance


def test_a_try_that_was_cut_short_before_it_handed_over_leaves_its_id_to_the_next(relay):
    first = take(relay)
    again = take(relay)
    assert (first.how, again.how) == ("first", "first")
    assert again.request_id == first.request_id


def test_a_request_that_goes_on_or_ended_well_is_found_by_the_next_try(relay):
    first = take(relay)
    relay.enqueue(REQUEST, task_id=first.request_id)
    for state in ("accepted", "waiting", "done"):
        stand(relay, first.request_id, state=state)
        found = take(relay)
        assert (found.request_id, found.how, found.left) == (first.request_id, "attached", None)


@pytest.mark.parametrize("over", [{"state": "failed"}, {"state": "cancelled"}, {"cancel_by": "somebody"}])
def test_after_a_request_that_failed_or_is_cancelled_a_try_has_another(relay, over):
    first = take(relay)
    relay.enqueue(REQUEST, task_id=first.request_id)
    stand(relay, first.request_id, **over)
    found = take(relay)
    assert found.request_id != first.request_id
    assert (found.how, found.left, found.before, found.cleared) == ("again", None, first.request_id, False)


def test_a_generation_that_follows_leaves_the_request_of_the_one_before(relay):
    first = take(relay)
    relay.enqueue(REQUEST, task_id=first.request_id)
    found = take(relay, "2")
    assert (found.how, found.left, found.cleared) == ("again", first.request_id, True)
    assert take(relay, "2").request_id == found.request_id
    assert serving.serves(relay.redis, "task-1") == found.request_id


def test_what_is_left_is_told_until_it_is_replaced_whatever_becomes_of_the_try_that_heard_of_it(relay):
    first = take(relay)
    relay.enqueue(REQUEST, task_id=first.request_id)
    for generation in ("2", "2", "3"):  # each cut short before it cancelled anything
        found = take(relay, generation)
        assert (found.left, found.before, found.cleared) == (first.request_id, first.request_id, True)
    serving.forget(relay.redis, "task-1", found.request_id)  # as a try that is ended before it hands over
    found = take(relay, "3")
    assert (found.left, found.before, found.cleared) == (first.request_id, first.request_id, True)
    relay.enqueue(REQUEST, task_id=found.request_id)
    assert take(relay, "3").left is None


def test_what_ended_well_and_was_not_good_enough_is_not_found_again(relay):
    first = take(relay)
    relay.enqueue(REQUEST, task_id=first.request_id)
    stand(relay, first.request_id, state="done")
    serving.forget(relay.redis, "task-1", first.request_id)
    assert take(relay).request_id != first.request_id
    assert serving.serves(relay.redis, "task-2") is None


def test_a_try_that_was_ended_before_it_handed_over_leaves_no_id_that_is_cancelled_already(relay):
    first = take(relay)
    assert relay.handle(first.request_id).cancel() == "unknown"
    serving.forget(relay.redis, "task-1", first.request_id)
    found = take(relay)
    assert found.request_id != first.request_id
    assert found.left is None
    assert take(relay).request_id == found.request_id


# How triggers wait


def waits(relay: RelayClient, work: Callable[[Waiter], Awaitable[Any]]) -> Any:
    """Do something with a waiter, in an event loop of its own."""

    async def run() -> Any:
        return await asyncio.wait_for(work(waiter_for(relay.settings)), 60)

    return asyncio.run(run())


async def end_of(changes: Changes) -> tuple[Standing, float]:
    async for standing in changes:
        if standing.ended:
            changes.close()
            return standing, time.monotonic()
    raise AssertionError


def test_thousands_wait_on_one_connection_and_hear_of_their_ends_at_once(relay):
    ids = [handle.id for handle in relay.enqueue_many([REQUEST] * 2000)]

    async def work(waiter: Waiter) -> None:
        ends = [asyncio.create_task(end_of(waiter.changes(one))) for one in ids]
        twice = asyncio.create_task(end_of(waiter.changes(ids[7])))  # two sensors of one request
        await asyncio.sleep(1)
        clients = await asyncio.to_thread(relay.redis.client_list)
        assert [one["name"] for one in clients].count("dagrelay-triggerer") == 1

        late = []
        for number in range(0, 2000, 100):
            await asyncio.to_thread(stand, relay, ids[number], state="done", seen="success")
            ended_at = time.monotonic()
            standing, heard_at = await ends[number]
            assert (standing.state, standing.seen) == ("done", "success")
            late.append(heard_at - ended_at)
        assert sorted(late)[len(late) // 2] < 1.0
        await asyncio.to_thread(stand, relay, ids[7], state="failed")
        assert (await ends[7])[0].state == (await twice)[0].state == "failed"
        assert not waiter.stops
        for one in ends:
            one.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
        assert not waiter._known
        assert not waiter._followers

    waits(relay, work)


def test_what_happens_while_redis_is_away_is_heard_of_when_it_is_back(tmp_path):
    with Valkey() as valkey:
        settings = ProducerSettings(redis_url=valkey.url, client_name="tests@here")
        relay = RelayClient(settings)
        ids = [relay.enqueue(REQUEST).id for _ in range(3)]

        async def work(waiter: Waiter) -> None:
            ends = [asyncio.create_task(end_of(waiter.changes(one))) for one in ids]
            await asyncio.sleep(0.5)
            await asyncio.to_thread(valkey.restart)
            for one in ids:
                await asyncio.to_thread(stand, relay, one, state="done")
            assert [standing.state for standing, _ in await asyncio.gather(*ends)] == ["done"] * 3

        waits(relay, work)
        relay.redis.close()


def test_a_request_that_ended_between_two_who_wait_is_heard_of(relay):
    ended = relay.enqueue(REQUEST).id
    stand(relay, ended, state="cancelled")

    async def work(waiter: Waiter) -> None:
        for _ in range(2):  # the second finds a waiter that has nobody left
            assert (await end_of(waiter.changes(ended)))[0].state == "cancelled"
        nobody = waiter.changes("no-such-request")
        assert (await anext(nobody)).state == ""
        nobody.close()

    waits(relay, work)


def test_a_look_that_goes_wrong_ends_nobodys_wait(relay):
    good, bad = relay.enqueue(REQUEST).id, new_task_id()
    relay.redis.set(record_key(bad), "no hash")

    async def work(waiter: Waiter) -> None:
        ends = [asyncio.create_task(end_of(waiter.changes(one))) for one in (good, bad)]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(relay.redis.delete, record_key(bad))
        for one in (good, bad):
            await asyncio.to_thread(stand, relay, one, state="done")
        await asyncio.gather(*ends)

    waits(relay, work)


def test_a_waiter_says_when_its_event_loop_ends(relay):
    told: list[bool] = []
    kept: list[asyncio.Task[None]] = []
    request_id = relay.enqueue(REQUEST).id

    async def follow(waiter: Waiter) -> None:
        try:
            await end_of(waiter.changes(request_id))
        finally:
            told.append(waiter.stops)

    async def work(waiter: Waiter) -> None:
        one = asyncio.create_task(follow(waiter))
        await asyncio.sleep(0.3)
        one.cancel()  # one trigger alone
        await asyncio.gather(one, return_exceptions=True)
        kept.append(asyncio.create_task(follow(waiter)))
        await asyncio.sleep(0.3)

    waits(relay, work)
    assert told == [False, True]


def test_one_look_tells_what_has_changed(relay):
    request_id = relay.enqueue(REQUEST).id
    first = look(relay.redis, request_id)
    assert first is not None
    assert first.state == "accepted"
    assert look(relay.redis, request_id, first) is None
    stand(relay, request_id, progress="3 of 9")
    changed = look(relay.redis, request_id, first)
    assert changed is not None
    assert changed.progress == "3 of 9"
