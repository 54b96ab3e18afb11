"""The producer library against a real Redis: silent, full, read-only, restarted; many callers at once."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from local.process import clean_env, free_port
from producers import (
    BrokerUnavailable,
    InvalidRequest,
    RequestCancelled,
    RequestUnknown,
    ResultExpired,
    ResultNotReady,
    TriggerRequest,
    configure,
    trigger_dag,
)
from producers.client import RelayClient
from producers.contract import MAX_CONF_BYTES, QUEUE_TRIGGERS, DagRun
from producers.settings import ProducerSettings
from producers.stores.records import KEEP_S, RESULT_PREFIX, record_key, store
from tests.integration.test_trigger import until
from tests.standing import standing_still
from tests.unit.producers.test_contract import BAD
from tests.unit.producers.test_errors import EXAMPLES, names

ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 1.5  # the promise of `.delay()`, so a bound here too
CANARY = "c4n4ry-s3cret"
SALES = TriggerRequest("daily_sales", {"day": "2026-11-20", "token": CANARY}, key="k1")
RUN = DagRun("daily_sales", "relay__k1", "queued")


def relay_for(url: str) -> RelayClient:
    return RelayClient(ProducerSettings(redis_url=url, client_name="tests@here"))


@pytest.fixture
def server(valkey) -> Iterator[Redis]:
    """A client for the server itself, to look into it and to break it."""
    with Redis.from_url(valkey.url) as client:
        yield client


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make `trigger_dag` of this process use a Redis, until the end of the test."""
    monkeypatch.setattr(import_module("producers.client"), "_client", None)
    return lambda url: configure(redis_url=url, client_name="tests@here")


def queued(server: Redis) -> int:
    found = server.llen(QUEUE_TRIGGERS)
    assert isinstance(found, int)
    return found


# Redis does not answer


@contextmanager
def refusing() -> Iterator[str]:
    """Nobody listens."""
    yield f"redis://:{CANARY}@127.0.0.1:{free_port()}/0"


@contextmanager
def black_hole() -> Iterator[str]:
    """It accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"redis://:{CANARY}@127.0.0.1:{server.getsockname()[1]}/0"


@contextmanager
def dropped() -> Iterator[str]:
    """Its packets are dropped, as by a firewall: the backlog is full, so no handshake ends."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        time.sleep(0.05)
        yield f"redis://:{CANARY}@127.0.0.1:{server.getsockname()[1]}/0"


@contextmanager
def hanging_up() -> Iterator[str]:
    """It accepts, and closes the connection at once."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def serve() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield f"redis://:{CANARY}@127.0.0.1:{server.getsockname()[1]}/0"
        server.shutdown(socket.SHUT_RDWR)


CALLS: dict[str, Callable[[], Any]] = {
    "delay": lambda: trigger_dag.delay("d", {"token": CANARY}),
    "apply_async": lambda: trigger_dag.apply_async(("d",), countdown=5),
    "delay_many": lambda: trigger_dag.delay_many([TriggerRequest("d", {"token": CANARY})] * 500),
    "adelay": lambda: asyncio.run(trigger_dag.adelay("d")),
    "s().delay": lambda: trigger_dag.s("d").delay(),
    "get": lambda: import_module("producers").client().handle("some-id").get(timeout=60),
    "aget": lambda: asyncio.run(import_module("producers").client().handle("some-id").aget()),
    "record": lambda: import_module("producers").client().record("some-id"),
    "ready": lambda: import_module("producers").client().handle("some-id").ready(),
}


@pytest.mark.parametrize(
    ("silent", "call"),
    [
        pytest.param(silent, call, id=f"{silent.__name__}-{name}")
        for silent in (refusing, black_hole, dropped, hanging_up)
        for name, call in CALLS.items()
        if silent is not dropped or name in ("delay", "get")  # the same wait once more
    ],
)
def test_a_redis_that_does_not_answer_is_told_soon(use, silent, call):
    with silent() as url:
        use(url)
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable) as caught:
            call()
        took_s = time.monotonic() - began

    assert took_s < BOUND_S
    assert "send again with the same key" in str(caught.value)
    assert CANARY not in f"{caught.value!s} {caught.value!r} {caught.value.__cause__}"


def test_a_redis_that_falls_silent_with_connections_open_is_told_soon(relay, valkey):
    relay.enqueue(SALES)
    with standing_still(valkey.pid):
        for call in (lambda: relay.enqueue(SALES), lambda: relay.enqueue_many([SALES] * 300)):
            began = time.monotonic()
            with pytest.raises(BrokerUnavailable):
                call()
            assert time.monotonic() - began < BOUND_S
    assert relay.enqueue(SALES).state == "accepted"


def test_a_redis_that_goes_while_somebody_waits_for_a_result_is_told(relay, valkey):
    handle = relay.enqueue(SALES)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(handle.get, 60)
        until(lambda: relay.redis.pubsub_numsub(RESULT_PREFIX + handle.id)[0][1])
        valkey.kill()
        with pytest.raises(BrokerUnavailable):
            waiting.result(timeout=10)


# Redis answers, and refuses


def full(server: Redis) -> None:
    server.config_set("maxmemory", "1mb")


def read_only(server: Redis) -> None:
    server.execute_command("REPLICAOF", "127.0.0.1", "1")


def wrong_password(server: Redis) -> None:
    server.execute_command("ACL", "SETUSER", "relay", "on", ">another", "~*", "+@all")


def no_permission(server: Redis) -> None:
    server.execute_command("ACL", "SETUSER", "relay", "on", f">{CANARY}", "~nothing", "+@all")


def no_password(server: Redis) -> None:
    server.config_set("requirepass", "another")


REFUSALS = [
    (full, "OutOfMemoryError|OOM"),
    (read_only, "read.?only"),
    (wrong_password, "AuthenticationError"),
    (no_permission, "NoPermissionError|No permissions"),
    (no_password, "AuthenticationError"),
]


@pytest.mark.parametrize(("break_it", "reason"), REFUSALS, ids=[way.__name__ for way, _ in REFUSALS])
def test_a_redis_that_refuses_is_told_with_its_reason_and_without_a_secret(valkey, server, break_it, reason):
    break_it(server)
    login = "" if break_it is no_password else f"relay:{CANARY}@"
    if break_it in (full, read_only):
        server.execute_command("ACL", "SETUSER", "relay", "on", f">{CANARY}", "~*", "&*", "+@all")
    relay = relay_for(valkey.url.replace("redis://", f"redis://{login}"))

    for call in (lambda: relay.enqueue(SALES), lambda: relay.enqueue_many([SALES] * 300)):
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable) as caught:
            call()
        assert time.monotonic() - began < BOUND_S
        assert re.search(reason, str(caught.value), re.IGNORECASE)
        assert CANARY not in f"{caught.value!s} {caught.value!r} {caught.value.__cause__}"
        assert len(str(caught.value)) < 600


def test_a_full_redis_takes_nothing_and_later_everything(relay, server):
    full(server)
    for _ in range(3):
        with pytest.raises(BrokerUnavailable):
            relay.enqueue(SALES)
    assert server.dbsize() == 0

    server.config_set("maxmemory", "0")
    relay.enqueue(SALES)

    assert queued(server) == 1


def test_where_the_message_cannot_be_queued_no_record_says_that_it_was_accepted(relay, server):
    server.set(QUEUE_TRIGGERS, "not a queue")

    for call in (lambda: relay.enqueue(SALES, task_id="mine"), lambda: relay.enqueue_many([SALES] * 3)):
        with pytest.raises(BrokerUnavailable, match="WRONGTYPE"):
            call()

    assert server.dbsize() == 1
    server.delete(QUEUE_TRIGGERS)
    relay.enqueue(SALES, task_id="mine")
    assert queued(server) == 1


# Connections come and go


def test_a_server_restarted_between_two_calls_is_not_noticed(relay, valkey, server):
    relay.enqueue(SALES)
    valkey.restart()
    relay.enqueue(SALES)
    valkey.restart()
    relay.enqueue_many([SALES] * 300)

    assert queued(server) == 302


def test_connections_closed_by_the_server_are_not_noticed(relay, server):
    for _ in range(5):
        relay.enqueue(SALES)
        server.client_kill_filter(_type="normal", skipme=True)
        relay.enqueue_many([SALES] * 3)
        server.client_kill_filter(_type="normal", skipme=True)

    assert queued(server) == 20


@contextmanager
def losing_one_answer(port: int, after: bytes) -> Iterator[int]:
    """A proxy that passes everything on, and hangs up once, instead of the answer to `after`."""
    lost = threading.Event()

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as redis:
            while asked := client.recv(65536):
                redis.sendall(asked)
                if after in asked and not lost.is_set():
                    redis.recv(65536)  # Redis has done it
                    lost.set()
                    return
                time.sleep(0.02)
                client.sendall(redis.recv(65536))

    def accept(listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    assert lost.is_set()


def test_an_answer_that_was_lost_is_asked_for_again_and_the_request_is_there_once(valkey, server):
    relay_for(valkey.url).enqueue(TriggerRequest("earlier"))  # Redis knows the script
    with losing_one_answer(valkey.port, after=b"EVALSHA") as port:
        handle = relay_for(f"redis://127.0.0.1:{port}/0").enqueue(SALES)

        assert handle.dag_run_id == "relay__k1"
    assert handle.id in str(server.lindex(QUEUE_TRIGGERS, 0))
    assert queued(server) == 2


# Who is accepted


def test_the_same_task_id_is_accepted_once_and_keeps_its_first_run(relay, server):
    first = relay.enqueue(SALES, task_id="mine")
    second = relay.enqueue(TriggerRequest("another_dag", key="other"), task_id="mine")

    assert first == second
    assert queued(server) == 1
    assert second.dag_run_id == first.dag_run_id == "relay__k1"
    assert relay.record("mine").dag_id == "daily_sales"


def test_the_same_key_twice_is_two_requests_for_one_run(relay, server):
    first, second = relay.enqueue(SALES), relay.enqueue(SALES)

    assert first.id != second.id
    assert first.dag_run_id == second.dag_run_id
    assert queued(server) == 2


def test_of_a_record_nothing_is_lost_and_nothing_is_secret(relay, server):
    before = time.time()
    handle = relay.enqueue(SALES, countdown=60)
    record = handle.record()

    assert record is not None
    assert (record.state, record.dag_id, record.dag_run_id) == ("accepted", "daily_sales", "relay__k1")
    assert (record.key, record.connection, record.by) == ("k1", "default", "tests@here")
    assert before - 1 < record.accepted_at < time.time() + 1
    assert record.due_at == pytest.approx(record.accepted_at + 60, abs=0.01)
    assert CANARY not in json.dumps(record.to_json())
    assert (handle.state, handle.ready(), handle.successful()) == ("accepted", False, False)


def test_a_record_is_kept_for_14_days_after_the_end_and_until_then_without_one(relay, server):
    handle = relay.enqueue(SALES)
    assert server.ttl(record_key(handle.id)) == -1

    end(relay, handle.id)

    assert KEEP_S - 60 < server.ttl(record_key(handle.id)) <= KEEP_S
    assert 0 < server.ttl(RESULT_PREFIX + handle.id) <= 100


def test_a_priority_goes_to_the_list_that_workers_read_for_it(relay, server):
    relay.enqueue(SALES, priority=4)

    assert server.llen("triggers\x06\x163") == 1


def test_bad_input_reaches_redis_in_no_form(use, valkey, server):
    use(valkey.url)
    calls: list[Callable[[], Any]] = [
        lambda fields=fields: trigger_dag.delay(**{"dag_id": "d", **fields}) for _, fields, _ in BAD if fields
    ]
    calls += [
        lambda options=options: trigger_dag.apply_async(("d",), **options)
        for options in (
            {"countdown": -1},
            {"eta": "now"},
            {"expires": 0},
            {"priority": 11},
            {"task_id": ""},
            {"link": "x"},
            {"queue": "x"},
        )
    ]
    calls.append(lambda: trigger_dag.delay_many([SALES, SALES, "daily_sales"]))
    calls.append(lambda: trigger_dag.delay_many(TriggerRequest(dag) for dag in ("good", "no good")))
    for call in calls:
        with pytest.raises((InvalidRequest, TypeError)):
            call()

    assert server.dbsize() == 0


# Many at once


def test_five_thousand_requests_in_one_call_are_all_there(relay, server):
    requests = [TriggerRequest("daily_sales", {"n": n}, key=f"k{n}") for n in range(5000)]

    handles = relay.enqueue_many(iter(requests))

    assert [handle.dag_run_id for handle in handles] == [f"relay__k{n}" for n in range(5000)]
    assert queued(server) == 5000
    pipe = server.pipeline(transaction=False)
    for handle in handles:
        pipe.hmget(record_key(handle.id), "state", "dag_run_id", "by")
    expected = [[b"accepted", f"relay__k{n}".encode(), b"tests@here"] for n in range(5000)]
    assert pipe.execute() == expected
    messages = server.lrange(QUEUE_TRIGGERS, 0, -1)
    assert [json.loads(message)["headers"]["id"] for message in reversed(messages)] == [
        handle.id for handle in handles
    ]


def test_large_confs_in_bulk_are_cut_into_chunks_that_redis_bears(relay, server):
    conf = {"blob": "x" * (MAX_CONF_BYTES - 100)}
    requests = [TriggerRequest("d", conf, conf_by="value") for _ in range(30)]

    relay.enqueue_many(requests)

    assert queued(server) == 30


def test_no_request_at_all_is_no_call(relay, server):
    assert relay.enqueue_many([]) == []
    assert server.dbsize() == 0


def test_more_threads_than_connections_lose_nothing(relay, server):
    """20 connections for 60 threads. On a busy machine one may wait for too long: then it is told so."""

    def send(n: int) -> str | None:
        try:
            return relay.enqueue(TriggerRequest("d", key=str(n))).id
        except BrokerUnavailable:
            return None

    with ThreadPoolExecutor(60) as pool:
        accepted = [task_id for task_id in pool.map(send, range(1200)) if task_id]

    assert len(set(accepted)) == len(accepted) > 600
    assert queued(server) == len(accepted)


def test_threads_that_wait_for_results_hold_nobody_else_up(relay, server):
    handles = relay.enqueue_many([SALES] * 60)
    with ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(handle.get, 30) for handle in handles]
        until(lambda: sum(number for _, number in subscribers(server, handles)) == 60)

        for _ in range(50):
            relay.enqueue(SALES)
        for handle in handles:
            end(relay, handle.id)

        assert [future.result(timeout=20) for future in waiting] == [RUN] * 60


def subscribers(server: Redis, handles: list[Any]) -> list[tuple[bytes, int]]:
    found: list[tuple[bytes, int]] = server.pubsub_numsub(*(RESULT_PREFIX + handle.id for handle in handles))
    return found


FORKING = """
import os, sys, threading
from producers import configure, trigger_dag

configure(redis_url=sys.argv[1])
trigger_dag.delay("warm")  # a connection is open before the fork

def send(times):
    for _ in range(times):
        trigger_dag.delay("d", {"pid": os.getpid()})

def in_threads(number, times):
    threads = [threading.Thread(target=send, args=(times,)) for _ in range(number)]
    for thread in threads:
        thread.start()
    return threads

busy = in_threads(4, 200)  # other threads are in the midst of a call when the fork comes
children = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        try:
            for thread in in_threads(5, 40):
                thread.join()
            trigger_dag.delay_many([trigger_dag.request("d")] * 10)
        except BaseException:
            os._exit(1)
        os._exit(0)
    children.append(pid)
for thread in busy:
    thread.join()
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
trigger_dag.delay("after")
sys.exit(any(codes))
"""


def test_children_of_a_fork_and_their_threads_send_what_they_send_once(valkey, server):
    forking = subprocess.run(
        [sys.executable, "-c", FORKING, valkey.url],
        env=clean_env(PYTHONPATH=str(ROOT)),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (forking.returncode, forking.stderr) == (0, "")
    expected = 1 + 4 * 200 + 4 * (5 * 40 + 10) + 1
    assert queued(server) == expected
    ids = {json.loads(message)["headers"]["id"] for message in server.lrange(QUEUE_TRIGGERS, 0, -1)}
    assert len(ids) == expected


# The way back


def end(relay: RelayClient, task_id: str, run: DagRun = RUN, **changes: Any) -> None:
    """End a request as a worker does: result and record in one step, published."""
    result = json.dumps({"status": "SUCCESS", "result": run.to_message(), "task_id": task_id})
    given: dict[str, Any] = {"state": "done", "found": {"run": json.dumps(run.to_message())}, **changes}
    store(relay.redis, task_id, result=result, result_ttl_s=100, **given)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """`.get()` looks for a missed result only after a minute: what wakes it before is the publication."""
    monkeypatch.setattr("producers.handle.CHECK_EVERY_S", 60.0)


def test_a_result_that_was_there_before_is_returned_at_once(relay, patient):
    handle = relay.enqueue(SALES)
    end(relay, handle.id)

    assert handle.get(timeout=0) == RUN
    assert (handle.state, handle.ready(), handle.successful()) == ("done", True, True)


def test_a_published_result_wakes_who_waits_for_it(relay, patient):
    handle = relay.enqueue(SALES)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(handle.get), pool.submit(asyncio.run, handle.aget(timeout=60))]
        until(lambda: subscribers(relay.redis, [handle])[0][1] == 2)
        end(relay, handle.id)

        assert [future.result(timeout=10) for future in waiting] == [RUN, RUN]


def test_a_result_whose_publication_was_missed_is_found_all_the_same(relay):
    handle = relay.enqueue(SALES)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(handle.get, 30)
        until(lambda: subscribers(relay.redis, [handle])[0][1])
        relay.redis.set(
            RESULT_PREFIX + handle.id, json.dumps({"status": "SUCCESS", "result": RUN.to_message()})
        )

        assert waiting.result(timeout=10) == RUN


def test_a_result_that_ends_between_the_look_and_the_subscription_is_not_missed(relay, patient, monkeypatch):
    handle = relay.enqueue(SALES)
    listen = relay.listening.pubsub

    def end_first(**options: Any) -> Any:
        end(relay, handle.id)
        return listen(**options)

    monkeypatch.setattr(relay.listening, "pubsub", end_first)

    assert handle.get(timeout=60) == RUN


def test_a_request_that_goes_on_is_not_ready_and_can_be_asked_for_again(relay):
    handle = relay.enqueue(SALES)
    began = time.monotonic()

    with pytest.raises(ResultNotReady, match="state: accepted"):
        handle.get(timeout=0.3)

    assert 0.3 <= time.monotonic() - began < 5
    with pytest.raises(TimeoutError):
        asyncio.run(handle.aget(timeout=0))
    end(relay, handle.id)
    assert handle.get(timeout=1) == RUN


def test_a_retry_is_no_end(relay):
    handle = relay.enqueue(SALES)
    retry = json.dumps(
        {"status": "RETRY", "result": {"exc_type": "AirflowUnavailable", "exc_message": ["x"]}}
    )
    store(relay.redis, handle.id, result=retry, result_ttl_s=100, state="waiting", found={"reason": "x"})

    with pytest.raises(ResultNotReady, match="state: waiting"):
        handle.get(timeout=0.1)


def test_an_expired_result_is_told_and_not_waited_for(relay):
    handle = relay.enqueue(SALES)
    end(relay, handle.id, state="failed", found={"reason": "no such DAG"})
    relay.redis.delete(RESULT_PREFIX + handle.id)

    with pytest.raises(ResultExpired, match=r"ended as failed \(no such DAG\)"):
        handle.get()


def test_an_id_that_nobody_ever_accepted_is_told(relay, monkeypatch):
    monkeypatch.setattr("producers.handle.NOT_ON_RECORD_S", 0.2)

    with pytest.raises(RequestUnknown, match="nobodys-id"):
        relay.handle("nobodys-id").get()

    assert relay.handle("nobodys-id").state == "unknown"
    assert relay.handle("nobodys-id").dag_run_id is None
    assert relay.record("nobodys-id") is None


def test_waiting_leaves_nothing_behind(relay, server):
    handles = relay.enqueue_many([SALES] * 30)
    for handle in handles:
        with pytest.raises(ResultNotReady):
            handle.get(timeout=0)
    with pytest.raises(ResultNotReady):
        handles[0].get(timeout=0.1)

    until(lambda: not server.pubsub_channels())
    assert len(server.client_list(_type="pubsub")) <= 1


# With a real worker


def test_every_error_of_a_worker_comes_back_as_itself(relay, valkey, start_worker):
    start_worker(options=("-I", "tests.integration.raising"))
    sender = Celery("sender", broker=valkey.url, set_as_current=False)
    sender.conf.broker_url = valkey.url
    for number, error in enumerate(EXAMPLES):
        sender.send_task(
            "tests.raise_error",
            args=(type(error).__name__, error.args),
            queue=QUEUE_TRIGGERS,
            task_id=f"error-{number}",
        )

    for number, error in enumerate(EXAMPLES):
        with pytest.raises(type(error)) as caught:
            relay.handle(f"error-{number}").get(timeout=60)
        assert (type(caught.value), caught.value.args) == (type(error), error.args), names(error)
        assert str(caught.value) == str(error)


def test_asyncio_all_the_way(use, valkey, airflow, worker):
    use(valkey.url)

    async def ask() -> list[DagRun]:
        handles = await asyncio.gather(*(trigger_dag.adelay("d", key=f"k{n}") for n in range(20)))
        return await asyncio.gather(*(handle.aget(timeout=60) for handle in handles))

    assert [run.dag_run_id for run in asyncio.run(ask())] == [f"relay__k{n}" for n in range(20)]
    assert len(airflow.runs) == 20


def test_who_ignores_the_result_still_has_an_end_on_record(relay, airflow, worker):
    handle = relay.enqueue(SALES, ignore_result=True)

    until(lambda: handle.ready())
    assert handle.state == "done"
    assert len(airflow.runs) == 1


def test_a_request_that_expired_before_it_began_is_cancelled_and_says_so(relay, airflow, start_worker):
    handle = relay.enqueue(SALES, expires=0.05)
    time.sleep(0.1)
    start_worker()

    with pytest.raises(RequestCancelled, match="expired"):
        handle.get(timeout=60)
    assert handle.state == "cancelled"
    assert not airflow.runs


def test_a_higher_priority_goes_first(relay, airflow, start_worker):
    later = [relay.enqueue(TriggerRequest("later", key=str(n)), priority=9) for n in range(20)]
    first = [relay.enqueue(TriggerRequest("first", key=str(n)), priority=0) for n in range(20)]
    start_worker(DAGRELAY_WORKER_CONCURRENCY="1")

    for handle in first + later:
        handle.get(timeout=60)

    assert [dag_id for dag_id, _ in airflow.runs] == ["first"] * 20 + ["later"] * 20


def test_the_callbacks_of_apply_async_are_sent(relay, airflow, worker, server):
    host = Celery("host", set_as_current=False)
    done = host.signature("host.done", queue="host")
    failed = host.signature("host.failed", queue="host", immutable=True)
    airflow.rejecting["bad"] = (400, {"detail": "no"})

    good = relay.enqueue(SALES, link=done, link_error=failed)
    bad = relay.enqueue(TriggerRequest("bad"), link=done, link_error=failed)
    good.get(timeout=60)
    until(bad.ready)

    until(lambda: server.llen("host") == 2)
    sent = [json.loads(message)["headers"]["task"] for message in server.lrange("host", 0, -1)]
    assert sorted(sent) == ["host.done", "host.failed"]
