"""What all doors share: orders accepted together, each once, and who is told of an end."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import nullcontext

import pytest

from producers.client import RelayClient
from producers.contract import TriggerRequest
from producers.door import Batches, Door
from producers.errors import BrokerUnavailable, NotAllowed
from producers.queues.message import Incoming, order_of, read
from producers.scopes import Scope
from producers.settings import ProducerSettings
from producers.stores.notices import replies_key
from producers.stores.records import store

pytestmark = pytest.mark.integration


def test_the_same_id_twice_in_one_batch_is_one_request(relay: RelayClient) -> None:
    door = Door(relay, "test")
    orders = [order_of({"dag_id": "sales", "id": name}, door="test") for name in ("a", "a", "b")]
    taken = door.accept([door.prepare(order) for order in orders])
    assert [one.new for one in taken] == [True, False, True]
    assert taken[0].task_id == taken[1].task_id != taken[2].task_id
    assert relay.redis.llen("triggers") == 2
    assert [one.new for one in door.accept([door.prepare(order) for order in orders])] == [False] * 3


def test_many_coroutines_are_accepted_together(relay: RelayClient) -> None:
    door = Door(relay, "test")

    async def all_of_them() -> list[str]:
        batches = Batches(door)
        items = [door.prepare(order_of({"dag_id": "sales"}, door="test")) for _ in range(1200)]
        return [one.task_id for one in await asyncio.gather(*map(batches.accept, items))]

    assert len(set(asyncio.run(all_of_them()))) == 1200
    assert relay.redis.llen("triggers") == 1200


def test_who_asked_for_answers_is_told_of_the_end(relay: RelayClient) -> None:
    door = Door(relay, "orders")
    message = Incoming(
        b'{"dag_id": "sales", "on_end": ["billing"]}', reply_to="answers", correlation_id="c\0 1"
    )
    with pytest.raises(Exception, match="NUL"):
        read(message, door="orders")
    message = Incoming(b'{"dag_id": "sales", "on_end": ["billing"]}', reply_to="answers", correlation_id="c1")
    (taken,) = door.accept([door.prepare(read(message, door="orders"))])
    assert not relay.redis.exists(replies_key("orders"))
    for _ in range(2):  # the end of another copy is told to nobody
        store(relay.redis, taken.task_id, result="{}", result_ttl_s=60, state="done", found={})
    ((_, told),) = relay.redis.xrange(replies_key("orders"))
    assert told == {
        b"id": taken.task_id.encode(),
        b"what": b"ended",
        b"to": b"answers",
        b"correlation_id": b"c1",
    }
    (sent,) = relay.redis.lrange("jobs", 0, -1)
    assert json.loads(sent)["headers"]["id"] == f"{taken.task_id}.end.billing"


def test_a_door_lets_in_what_its_scope_has(relay: RelayClient) -> None:
    door = Door(relay, "test", Scope(dags=("sales_*",), connections=("default",)))
    door.prepare(order_of({"dag_id": "sales_north"}, door="test"))
    for refused in (
        {"dag_id": "payroll"},
        {"dag_id": "sales_north", "on_end": ["billing"]},
        {"dag_id": "sales_north", "connection": "other"},
        {"service": "render", "path": "/jobs/1"},
    ):
        with pytest.raises(NotAllowed):
            door.prepare(order_of(refused, door="test"))
    hooked = Scope(dags=("sales",), services=("*",), hooks=("bill*",))
    for allowed, on_end in ((True, ["Billing"]), (False, ["other"])):
        for fields in (
            {"dag_id": "sales", "on_end": on_end},
            {"service": "render", "path": "/j", "on_end": on_end},
            {"service": "render", "path": "/j", "then": {"dag_id": "sales", "on_end": on_end}},
        ):
            with (
                nullcontext() if allowed else pytest.raises(NotAllowed, match="on_end: 'other' is not among")
            ):
                hooked.check(order_of(fields, door="test").request)
    with pytest.raises(NotAllowed, match=r"then\.dag_id"):
        Scope(dags=(), services=("*",)).check(
            order_of({"service": "render", "path": "/j", "then": {"dag_id": "x"}}, door="test").request
        )


def test_nothing_is_yes_while_redis_is_away(unused_port: int) -> None:
    away = RelayClient(ProducerSettings(redis_url=f"redis://127.0.0.1:{unused_port}/0", client_name="x"))
    door = Door(away, "test")

    async def one() -> None:
        await Batches(door).accept(away.item(TriggerRequest("sales")))

    with pytest.raises(BrokerUnavailable):
        asyncio.run(one())


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
