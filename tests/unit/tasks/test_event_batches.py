"""Events of many tasks leave together, soon, and none is left behind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tasks.event_batches import EVERY_S, EventBatches


class Hub:
    """An event loop that notes what it is to do."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_soon(self, call: Callable[..., Any], *args: Any) -> None:
        call(*args)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.timers.append((delay_s, call))


class Dispatcher:
    """Celery's, as far as it is used."""

    buffer_limit = 24
    on_send_buffered: Callable[[], None]

    def __init__(self) -> None:
        self.flushes = 0

    def flush(self) -> None:
        self.flushes += 1


def started() -> tuple[EventBatches, Hub, Dispatcher]:
    hub, dispatcher = Hub(), Dispatcher()
    consumer = SimpleNamespace(hub=hub, event_dispatcher=dispatcher)
    step = EventBatches(consumer)
    step.start(consumer)
    return step, hub, dispatcher


def test_many_events_are_one_publish_a_moment_later():
    _, hub, dispatcher = started()
    for _ in range(100):
        dispatcher.on_send_buffered()
    assert dispatcher.flushes == 0
    ((delay_s, flush),) = hub.timers
    flush()
    assert delay_s == EVERY_S
    assert dispatcher.flushes == 1


def test_what_comes_after_a_batch_begins_the_next():
    _, hub, dispatcher = started()
    dispatcher.on_send_buffered()
    hub.timers[0][1]()
    dispatcher.on_send_buffered()
    assert len(hub.timers) == 2


def test_what_has_gathered_leaves_when_the_worker_stops():
    step, _, dispatcher = started()
    dispatcher.on_send_buffered()
    step.stop(None)
    assert dispatcher.flushes == 1


def test_a_pool_without_an_event_loop_is_left_alone():
    dispatcher = Dispatcher()
    consumer = SimpleNamespace(hub=None, event_dispatcher=dispatcher)
    EventBatches(consumer).start(consumer)
    assert dispatcher.buffer_limit == 24
