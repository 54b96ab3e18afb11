"""The places of kombu and Celery that the transport reaches into are as they were when it was written.

A failure here is no bug yet: a release has changed the named place. Read what has changed beside what the
transport makes of it (the reason stands with each), mend the transport where it needs it, run
`tests/integration/redis_transport`, and write the new fingerprint down: `python -m
tests.unit.redis_transport.test_kombu` prints them all.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import kombu.transport
import pytest
from celery import Celery
from celery.exceptions import WorkerTerminate
from celery.worker import state as worker_state
from celery.worker.control import Panel
from celery.worker.request import Request
from kombu import Connection
from kombu.asynchronous import Hub
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from redis.exceptions import ResponseError

os.environ.setdefault("DAGRELAY_REDIS_URL", "redis://127.0.0.1:1/0")  # what `tasks` asks for when imported

from tasks.redis_transport import channel as ours
from tasks.redis_transport import register

# Place → why it matters, and its fingerprint.
PLACES: dict[str, tuple[str, str]] = {
    "kombu.transport.redis:MultiChannelPoller.on_poll_start": (
        "it serves active_queues, of which ours has none",
        "aadeb3def326",
    ),
    "kombu.transport.redis:MultiChannelPoller.on_poll_init": (
        "it restores by the bookkeeping of a channel, which ours does not",
        "004403348d9d",
    ),
    "kombu.transport.redis:MultiChannelPoller.maybe_restore_messages": (
        "it restores for channels with active_queues, of which ours has none",
        "ff6338a18840",
    ),
    "kombu.transport.redis:MultiChannelPoller.maybe_check_brpop_health": (
        "it looks at the BRPOP that ours never sends",
        "59ee806dcc6b",
    ),
    "kombu.transport.redis:MultiChannelPoller.get": (
        "ours refuses it where queues are to be served without an event loop",
        "b7e93da0fcd6",
    ),
    "kombu.transport.redis:Channel.__init__": (
        "ours sets what it needs before it, and its QoS after it",
        "d9d1b203f0f8",
    ),
    "kombu.transport.redis:Channel.active_queues": (
        "ours is empty, and the feeder serves kombu's own",
        "223e7619100a",
    ),
    "kombu.transport.redis:Channel._update_queue_cycle": (
        "the feeder learns of queues there",
        "5299d6fc7a0f",
    ),
    "kombu.transport.redis:Channel._create_client": (
        "ours keeps the client that it returns",
        "70307ac7d854",
    ),
    "kombu.transport.redis:Channel._put": (
        "ours publishes by it what is not to wait",
        "114ed746a115",
    ),
    "kombu.transport.redis:Channel._queue_bind": (
        "ours does without its write where Redis is full",
        "ac617d64f4a3",
    ),
    "kombu.transport.redis:Channel.get_table": (
        "ours looks for a binding by it",
        "4c546fdafe87",
    ),
    "kombu.transport.redis:Channel._size": (
        "ours asks the same without a transaction",
        "6eed9817c42e",
    ),
    "kombu.transport.redis:Channel.priority": (
        "ours names a queue's list by it",
        "8d3ced6cbe41",
    ),
    "kombu.transport.redis:Channel._q_for_pri": (
        "keys.Keys.queue says the same",
        "ec416801b050",
    ),
    "kombu.transport.redis:Channel._connparams": (
        "ours makes connections of its own from it",
        "455a1276f64e",
    ),
    "kombu.transport.redis:Channel.basic_consume": (
        "it fills _active_queues and _consumers",
        "e8fb3d887fbe",
    ),
    "kombu.transport.redis:Channel.basic_cancel": (
        "it empties them",
        "4055a749dbb2",
    ),
    "kombu.transport.redis:Channel._basic_cancel": (
        "it empties them, and forgets the queue cycle",
        "4902c631cbd2",
    ),
    "kombu.transport.redis:Channel.close": (
        "ours closes its feeder before it",
        "c447267f9e72",
    ),
    "kombu.transport.redis:QoS.append": (
        "the stock fetch keeps messages by it",
        "ae20f14cfeba",
    ),
    "kombu.transport.redis:QoS.reject": (
        "the stock fetch rejects by it",
        "cb5b5763298f",
    ),
    "kombu.transport.redis:QoS.ack": (
        "the stock fetch acknowledges by it",
        "a33d955576c4",
    ),
    "kombu.transport.redis:Transport.register_with_event_loop": (
        "ours adds its timers, and our poller is called in each turn of the loop",
        "d05bc29f2dd5",
    ),
    "kombu.transport.virtual.base:QoS.__init__": (
        "ours has _on_collect of it, and no more",
        "69699773d919",
    ),
    "kombu.transport.virtual.base:QoS.ack": (
        "the stock fetch forgets a message by it",
        "2e0fc4afe118",
    ),
    "kombu.transport.virtual.base:QoS.restore_unacked_once": (
        "it is called at a channel's end; ours restores nothing",
        "52f309a0989e",
    ),
    "kombu.transport.virtual.base:QoS.restore_visible": (
        "kombu's poller calls it; ours restores nothing",
        "7d8575fcaa9f",
    ),
    "kombu.transport.virtual.base:Message.__init__": (
        "ours is one, decoded already",
        "aeab5e68124d",
    ),
    "kombu.transport.virtual.base:Channel.basic_consume": (
        "its callback makes our Message and tells our QoS of it",
        "bc103d8a21f8",
    ),
    "kombu.transport.virtual.base:Channel.basic_reject": (
        "it calls QoS.reject",
        "0d93c8ca33bd",
    ),
    "kombu.transport.virtual.base:Channel.close": (
        "it restores by our QoS",
        "47586eb428aa",
    ),
    "kombu.transport.virtual.base:Channel.decode_body": (
        "messages.read decodes as it does",
        "2d67cccbe260",
    ),
    "kombu.transport.virtual.base:Channel._get_message_priority": (
        "ours names a queue's list by it",
        "b8339240d597",
    ),
    "kombu.transport.virtual.base:Transport._deliver": (
        "ours delivers by it",
        "00c324d0f111",
    ),
    "kombu.message:Message.payload": (
        "it reads _decoded_cache",
        "068205859d40",
    ),
    "kombu.message:Message.decode": (
        "it reads _decoded_cache",
        "db6fae6204d8",
    ),
    "kombu.serialization:SerializerRegistry.loads": (
        "messages.read decodes as it does",
        "7a93ae9c377d",
    ),
    "kombu.utils.json:loads": (
        "messages.read decodes as it does",
        "26db0e4f8eb5",
    ),
    "kombu.utils.json:object_hook": (
        "messages.read decodes as it does",
        "749f96442529",
    ),
    "kombu.transport:get_transport_cls": (
        "register changes what it reads",
        "acb9ef06a581",
    ),
    "kombu.asynchronous.hub:Hub.create_loop": (
        "when it waits, sleeps, and calls us: see Waker",
        "0df09a215271",
    ),
    "kombu.asynchronous.hub:Hub.fire_timers": (
        "how long it lets the loop wait",
        "5d8391af2070",
    ),
    "kombu.asynchronous.hub:Hub.add_reader": (
        "our moves and our pipe are read by it",
        "151750695393",
    ),
    "kombu.asynchronous.hub:Hub.remove": (
        "our moves and our pipe are given up by it",
        "dff5e5bea2b3",
    ),
    "kombu.asynchronous.hub:Hub.reset": (
        "what it leaves of our readers",
        "1b1eb3e96e23",
    ),
    "kombu.asynchronous.hub:Hub.call_soon": (
        "acknowledgements of threads come by it",
        "39089983c9dc",
    ),
    "celery.worker.loops:asynloop": (
        "the loop of prefork, threads and solo; which timers it cancels",
        "c0d3abf10ee6",
    ),
    "celery.worker.consumer.consumer:Consumer.create_task_handler": (
        "what it does with a message that we deliver",
        "7582ae1e7600",
    ),
    "celery.worker.strategy:default": (
        "what it reads of a message",
        "96ac76e2f7c6",
    ),
    "celery.worker.strategy:hybrid_to_proto2": (
        "what it reads of a message of protocol 1",
        "3c44dcd75582",
    ),
    "celery.worker.strategy:proto1_to_proto2": (
        "what it reads of a message of protocol 1",
        "1c779cd2d45f",
    ),
    "celery.worker.request:Request.__init__": (
        "what it reads of a message",
        "9d7b0048fada",
    ),
    "celery.worker.control:revoke": (
        "ours does the same and then looks for parked tasks",
        "2d321bb041ed",
    ),
    "celery.worker.state:maybe_shutdown": (
        "it ends the worker with the code that we set",
        "89c8562ba0bd",
    ),
    "celery.app.trace:fast_trace_task": (
        "what the pool does with a body",
        "74f70ce15835",
    ),
    "celery.concurrency.thread:TaskPool.on_apply": (
        "ours looks after what becomes of its futures",
        "ef6e8d184b1d",
    ),
    "celery.worker.worker:WorkController.wait_for_soft_shutdown": (
        "ours gives back first what was not begun",
        "8cdacbb5feac",
    ),
}


def fingerprint(place: str) -> str:
    """Return a hash of the source of a function, without blank lines, comments and indentation."""
    module, _, name = place.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    if isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(getattr(found, "__func__", found))
    lines = (line.strip() for line in inspect.getsource(found).splitlines())
    kept = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(kept.encode()).hexdigest()[:12]


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_the_transport_reaches_into_is_unchanged(place):
    why, expected = PLACES[place]
    assert fingerprint(place) == expected, f"{place} has changed; it matters because: {why}"


def parameters(function: Callable[..., Any]) -> list[str]:
    return [str(parameter) for parameter in inspect.signature(function).parameters.values()]


# -- what the fingerprints are about, as behaviour


class FakeChannel:
    active_fanout_queues = ()

    def __init__(self, active_queues: list[str]) -> None:
        self.active_queues = active_queues
        self.qos = SimpleNamespace(can_consume=lambda: True)


def test_kombus_poller_sends_brpop_for_active_queues_alone():
    asked: list[Any] = []
    poller = kombu_redis.MultiChannelPoller()
    poller._register_BRPOP = asked.append
    without, with_one = FakeChannel([]), FakeChannel(["q"])
    poller._channels = [without, with_one]
    poller.on_poll_start()
    assert asked == [with_one]


def test_kombus_poller_restores_nothing_for_a_channel_without_active_queues():
    channel = FakeChannel([])
    channel.qos.restore_visible = lambda **_: pytest.fail("restored")
    poller = kombu_redis.MultiChannelPoller()
    poller._channels = [channel]
    poller.maybe_restore_messages()


def test_our_bookkeeping_has_what_kombu_calls_on_it():
    called = {"can_consume", "can_consume_max_estimate", "append", "get", "ack", "reject", "restore_visible"}
    called |= {"restore_unacked", "restore_unacked_once"}
    for kind in (virtual.QoS, kombu_redis.QoS, ours.QoS):
        assert called <= set(dir(kind))
    for name in ("append", "ack", "reject", "restore_unacked_once"):
        theirs = inspect.signature(getattr(virtual.QoS, name)).parameters
        assert list(theirs) == list(inspect.signature(getattr(ours.QoS, name)).parameters)
    qos = virtual.QoS(SimpleNamespace(do_restore=True))
    qos._on_collect.cancel()  # restores what is unacknowledged when the process ends: not for us


def test_a_channel_is_made_and_asked_as_ours_is():
    assert parameters(kombu_redis.Channel._create_client) == ["self", "asynchronous=False"]
    assert parameters(kombu_redis.Channel._put) == ["self", "queue", "message", "**kwargs"]
    assert parameters(virtual.Channel._get_message_priority) == ["self", "message", "reverse=False"]
    assert parameters(kombu_redis.Channel._update_queue_cycle) == ["self"]
    assert parameters(kombu_redis.MultiChannelPoller.get) == ["self", "callback", "timeout=None"]
    assert parameters(virtual.Transport._deliver) == ["self", "message", "queue"]
    assert parameters(kombu_redis.Transport.register_with_event_loop) == ["self", "connection", "loop"]
    assert isinstance(inspect.getattr_static(kombu_redis.Channel, "active_queues"), property)
    assert kombu_redis.Channel.visibility_timeout == 3600
    assert kombu_redis.Channel.global_keyprefix == ""
    assert kombu_redis.Channel.queue_order_strategy == "round_robin"
    assert {"visibility_timeout", "global_keyprefix", "queue_order_strategy", "priority_steps"} <= set(
        kombu_redis.Channel.from_transport_options
    )


def test_priorities_are_lists_as_our_keys_say():
    with Connection("redis://127.0.0.1:1/0", transport=ours.Transport) as connection:
        channel = ours.Channel.__new__(ours.Channel)
        channel.connection = connection.transport
        for priority in (0, 3, 6, 9):
            assert channel._q_for_pri("q", priority) == ours.Keys().queue("q", priority)


def test_a_message_whose_body_was_decoded_is_not_decoded_again():
    channel = SimpleNamespace(decode_body=lambda body, encoding: body)
    payload = {"body": "no JSON", "properties": {"delivery_tag": 1}, "content-type": "application/json"}
    message = ours.Message(payload | {"decoded": [[], {}, None]}, channel=channel)
    assert message.payload == message.decode() == [[], {}, None]
    assert virtual.Message(payload, channel=channel)._decoded_cache is None


def test_kombu_takes_what_a_message_can_bring_about_for_a_lost_connection():
    """If it does no longer, `CONNECTION_ERRORS` may go."""
    assert KeyError in kombu_redis.Transport.connection_errors
    assert ResponseError not in kombu_redis.Transport.connection_errors
    assert KeyError not in ours.CONNECTION_ERRORS
    assert ResponseError in ours.Transport.connection_errors


def test_registering_gives_the_scheme_to_us(monkeypatch):
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(kombu.transport.TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu.transport, "_transport_cache", {"redis": kombu_redis.Transport})
    assert kombu.transport.get_transport_cls("redis") is kombu_redis.Transport
    register()
    for scheme in ("redis", "rediss"):
        assert kombu.transport.get_transport_cls(scheme) is ours.Transport


# -- kombu's event loop


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.close()


def test_the_loop_takes_readers_and_timers(hub):
    assert parameters(Hub.add_reader)[:2] == ["self", "fds"]
    assert parameters(Hub.call_later)[:3] == ["self", "delay", "callback"]
    assert parameters(Hub.call_repeatedly)[:3] == ["self", "delay", "callback"]
    assert parameters(Hub.call_soon)[:2] == ["self", "callback"]
    assert parameters(Hub.remove) == ["self", "fd"]
    called: list[str] = []
    hub.call_later(0.001, called.append, "timer")
    time.sleep(0.01)
    hub.on_tick.add(lambda: called.append("tick"))
    next(hub.create_loop())
    assert called.index("timer") < called.index("tick"), "then a timer set in a tick would be on time"


def test_a_wait_is_measured_before_the_tick_and_our_pipe_ends_it(hub):
    waker = ours.Waker(hub)
    hub.call_later(0.5, lambda: None)
    loop = hub.create_loop()
    next_turn = Counted(loop)
    assert next_turn() > 0.3  # nothing to read: it waits for the timer
    hub.call_later(0.5, lambda: None)
    hub.on_tick.add(waker.wake)
    assert next_turn() < 0.3
    waker.close()
    waker.close()


def test_without_anything_to_read_the_loop_sleeps(hub):
    """Why the pipe is always there: a worker without remote control would claim ten times a second."""
    hub.call_later(5, lambda: None)
    assert 0.05 < Counted(hub.create_loop())() < 2


class Counted:
    """Takes one turn of a loop and tells how long it took."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def __call__(self) -> float:
        begin = time.monotonic()
        next(self._loop)
        return time.monotonic() - begin


# -- Celery's worker


def test_revoke_is_found_where_we_wrap_it():
    assert callable(Panel.data["revoke"])
    original = getattr(Panel.data["revoke"], "original", Panel.data["revoke"])
    assert parameters(original)[:2] == ["state", "task_id"]


def test_the_workers_state_is_what_we_read_and_set(monkeypatch):
    assert isinstance(worker_state.active_requests, weakref.WeakSet)
    worker_state.revoked.add("a task")
    assert "a task" in worker_state.revoked
    worker_state.revoked.discard("a task")
    assert worker_state.should_stop is None
    assert worker_state.should_terminate is None
    monkeypatch.setattr(worker_state, "should_terminate", 70)
    with pytest.raises(WorkerTerminate) as caught:
        worker_state.maybe_shutdown()
    assert caught.value.code == 70


def test_a_request_has_what_we_read():
    assert {"time_start", "acknowledged"} <= set(dir(Request))
    for name in ("id", "name", "message", "request_dict"):
        assert name in dir(Request) or name in Request.__slots__


def test_the_blueprints_have_the_steps_that_ours_require():
    from celery.worker import WorkController
    from celery.worker.consumer import Consumer

    app = Celery("steps", broker="memory://", set_as_current=False)
    steps = {*WorkController.Blueprint.default_steps, *Consumer.Blueprint.default_steps}
    assert {
        "celery.worker.components:Pool",
        "celery.worker.consumer.events:Events",
        "celery.worker.consumer.tasks:Tasks",
    } <= steps
    app.steps["worker"].add(WorkController)
    app.steps["consumer"].add(Consumer)
    assert callable(WorkController.wait_for_soft_shutdown)


if __name__ == "__main__":
    for place, (why, _) in PLACES.items():
        print(f'    "{place}": ("{why}", "{fingerprint(place)}"),')  # noqa: T201
