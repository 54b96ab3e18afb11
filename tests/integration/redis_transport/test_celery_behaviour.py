"""Celery's own ways on this transport: queues, priorities, remote control, limits, pools, chords, Flower."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group

from local.process import Process, clean_env, free_port
from tests.parts import need

from . import behaviour
from .behaviour import BUSY_S, CELERY, LEASE_S, OURS, ROOT, Place, World, children, ended, side_by_side, until

server = behaviour.server
running = behaviour.running

TLS = Path(__file__).resolve().parents[1] / "tls"
THREE = ("one", "two", "three")


def control(world: World, command: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Send a command to the only worker and return its answer by its name."""
    answers = getattr(world.app.control, command)(*args, reply=True, timeout=10, limit=1, **kwargs)
    return {name.partition("@")[0]: answer for each in answers for name, answer in each.items()}


def inspect(world: World) -> Any:
    return world.app.control.inspect(timeout=10, limit=1)


@side_by_side
def test_full_queues_are_served_in_turn(place: Place) -> None:
    world = place.world()
    for queue in THREE:
        for number in range(40):
            world.send("note", f"{queue}-{number}", queue=queue)
    world.worker(c=2, options=("-Q", ",".join(THREE)))

    until(lambda: len(world.notes("ended")) == 120)

    first = Counter(mark.partition("-")[0] for mark in world.marks("began")[:60])
    assert all(first[queue] >= 15 for queue in THREE), first  # 20 each, or a few less
    for queue in THREE:  # and each of them in its own order, as far as two threads can tell
        numbers = [int(mark.partition("-")[2]) for mark in world.marks("began") if mark.startswith(queue)]
        assert all(abs(number - place_) <= 2 for place_, number in enumerate(numbers)), numbers


@side_by_side
def test_queues_in_order_of_priority_are_served_in_that_order(place: Place) -> None:
    world = place.world(
        broker_transport_options={"queue_order_strategy": "priority", "visibility_timeout": 3}
    )
    for queue in reversed(THREE):
        for number in range(20):
            world.send("note", f"{queue}-{number}", queue=queue)
    world.worker(c=1, options=("-Q", ",".join(THREE)))

    until(lambda: len(world.notes("ended")) == 60)

    assert [mark.partition("-")[0] for mark in world.marks("began")] == [
        queue for queue in THREE for _ in range(20)
    ]


@side_by_side
def test_priority_0_is_served_first(place: Place) -> None:
    """As kombu does it on Redis: the opposite of RabbitMQ; between the steps 0, 3, 6 and 9 it rounds down."""
    world = place.world()
    ours = world.producer(OURS)
    for priority in (9, 6, 3, 0, 4):
        for app in (world.app, ours):
            world.send("note", priority, app=app, priority=priority)
    world.worker(c=1)

    until(lambda: len(world.notes("ended")) == 10)

    steps = [mark // 3 for mark in world.marks("began")]
    assert steps == sorted(steps), world.marks("began")
    by_ours = world.send("note", "parked", app=ours, priority=7, countdown=600)
    by_stock = world.send("note", "parked", priority=7, countdown=600)
    until(lambda: world.lot.size() == 2)
    for result in (by_ours, by_stock):  # it comes back to where it lay
        assert world.lot.get(result.id).queue_key == world.keys.queue("work", 6)


@side_by_side
def test_a_consumer_is_cancelled_and_added_at_run_time_and_nothing_is_lost(place: Place) -> None:
    world = place.world()
    worker = world.worker(c=2, options=("-Q", "one,two"))
    for number in range(150):
        world.send("note", f"a{number}", 0.1, queue="one")
    until(lambda: len(world.notes("began")) > 5)

    assert "ok" in control(world, "cancel_consumer", "one")["w1"]
    time.sleep(0.5)
    until(lambda: not any(world.held().values()))
    count = len(world.notes("began"))
    assert count < 150
    world.send("note", "other", queue="two")
    until(lambda: world.notes("ended", "other"))
    for number in range(5):
        world.send("note", f"b{number}", queue="one")
    time.sleep(0.5)
    assert len(world.notes("began")) == count + 1
    assert world.length("one") == 155 - count
    assert [queue["name"] for queue in inspect(world).active_queues()["w1@test"]] == ["two"]

    assert "ok" in control(world, "add_consumer", "one")["w1"]
    assert "ok" in control(world, "add_consumer", "three")["w1"]
    world.send("note", "third", queue="three")
    until(lambda: len(world.notes("ended")) == 157, 60)
    assert len(set(world.marks("began"))) == len(world.marks("began")) == 157
    assert worker.process.alive
    for number in range(3):  # of an idle worker whose move is blocked on it
        control(world, "cancel_consumer", "one")
        world.send("note", f"c{number}", queue="one")
        time.sleep(0.1)
        assert world.length("one") == 1
        control(world, "add_consumer", "one")
        until(lambda number=number: world.notes("ended", f"c{number}"), BUSY_S)


@side_by_side
def test_autoscale_grows_and_shrinks_and_loses_nothing(place: Place) -> None:
    world = place.world()
    worker = world.worker(
        pool="processes", c=1, options=("--autoscale=4,1",), env={"AUTOSCALE_KEEPALIVE": "2"}
    )
    for number in range(16):
        world.send("note", number, 0.7)

    until(lambda: len({entry["pid"] for entry in world.notes("began")}) == 4, what="four processes")
    until(lambda: len(world.notes("ended")) == 16)
    until(lambda: len(children(worker.pid)) == 1, what="one process again")
    world.send("note", "after")
    until(lambda: world.notes("ended", "after"))

    assert len(world.notes("began")) == 17


@side_by_side
def test_a_rate_limit_holds_and_what_it_holds_back_is_not_lost(place: Place) -> None:
    world = place.world()
    worker = world.worker(c=4, worker_prefetch_multiplier=2)
    for number in range(14):
        world.send("limited", number)
    until(lambda: len(world.notes("began")) >= 6)
    at = [entry["at"] for entry in world.notes("began")]
    assert at[-1] - at[0] >= (len(at) - 2) / 4
    worker.stop()  # with some of them in its token bucket
    assert world.length() + len(world.notes("began")) == 14
    world.worker("w2", c=4)

    assert control(world, "rate_limit", f"{behaviour.behaviour_app.__name__}.limited", "0")

    until(lambda: len(world.notes("began")) == 14)
    assert sorted(world.marks("began")) == list(range(14))
    until(lambda: not any(world.held().values()))


@side_by_side
def test_inspect_tells_what_a_worker_does(place: Place) -> None:
    world = place.world()
    world.worker(c=1, worker_prefetch_multiplier=3)
    for mark in "abcd":
        world.send("note", mark, 3.0 if mark == "a" else 0.0)
    delayed = world.send("note", "e", countdown=600)
    until(lambda: world.notes("began", "a"))
    until(lambda: (world.length() == 2 and world.lot.size() == 0) or world.length() == 1)
    look = inspect(world)

    assert look.ping() == {"w1@test": {"ok": "pong"}}
    assert [request["args"] for request in look.active()["w1@test"]] == [["a", 3.0]]
    assert {request["args"][0] for request in look.reserved()["w1@test"]} == {"b", "c"}
    assert look.scheduled() == {"w1@test": []}
    stats = look.stats()["w1@test"]
    assert stats["prefetch_count"] == 3
    assert stats["broker"]["transport"] == "redis"
    assert stats["pool"]["max-concurrency"] == 1
    assert [queue["name"] for queue in look.active_queues()["w1@test"]] == ["work"]
    assert f"{behaviour.behaviour_app.__name__}.note" in look.registered()["w1@test"]
    until(lambda: {"a", "b", "c", "d"} <= set(world.marks("ended")))
    until(lambda: world.lot.get(delayed.id), what="the delayed one in the lot")


@side_by_side
def test_a_running_and_a_waiting_task_are_revoked_and_terminated_as_celery_does(place: Place) -> None:
    world = place.world()
    world.worker(pool="processes", c=1)
    runs = world.send("note", "runs", 60.0)
    waits = world.send("note", "waits")
    until(lambda: world.notes("began", "runs"))

    control(world, "revoke", waits.id)
    control(world, "revoke", runs.id, terminate=True, signal="KILL")

    until(lambda: runs.state == "REVOKED")
    until(lambda: waits.state == "REVOKED")
    world.send("note", "after")
    until(lambda: world.notes("ended", "after"))
    time.sleep(1)
    assert world.marks("began") == ["runs", "after"]
    until(lambda: not any(world.held().values()))


@pytest.mark.parametrize("pool", ["threads", "processes", "solo"])
@side_by_side
def test_chains_groups_and_chords_end_in_every_pool(place: Place, pool: str) -> None:
    world = place.world()
    world.worker(pool=pool, c=2)
    note, total = (lambda *args: world.signature("note", *args)), world.signature("total", "sum")

    in_a_row = chain(note(1), note(), note(), app=world.app).apply_async()
    several = group([note(number) for number in range(20)], app=world.app).apply_async()
    whole = chord([note(number) for number in range(20)], app=world.app)(total)
    broken = chord([note(1), world.signature("broken", "x")], app=world.app)(
        world.signature("total", "never").on_error(world.signature("told"))
    )

    assert ended(in_a_row) == 1
    until(several.ready)
    assert sorted(result.result for result in several) == list(range(20))
    assert ended(whole) == 190
    until(lambda: world.notes("told", broken.id))
    assert world.marks("total") == ["sum"]
    until(lambda: not any(world.held().values()))


@side_by_side
def test_under_a_global_keyprefix_every_key_has_it_and_all_of_it_works(place: Place) -> None:
    options = {"global_keyprefix": "tenant:", "visibility_timeout": 3}
    world = place.world(broker_transport_options=options, result_backend_transport_options=options)
    first = world.worker("w1", worker_prefetch_multiplier=2)
    again = world.send("again", "again", 2, 0.3)
    parked = world.send("note", "parked", countdown=600)
    revoked = world.send("note", "revoked", countdown=600)
    whole = chord([world.signature("note", number) for number in range(5)], app=world.app)(
        world.signature("total")
    )
    assert ended(whole) == 10
    assert ended(again) == "again"
    until(lambda: world.lot.size() == 2)
    assert set(inspect(world).ping()) == {"w1@test"}
    control(world, "revoke", revoked.id)
    until(lambda: revoked.state == "REVOKED")
    for mark in "abcd":
        world.send("note", mark, 30.0 if mark in "ab" else 0.0)
    until(lambda: world.notes("began", "b"))
    until(lambda: sum(world.held().values()) == 4)
    first.kill()

    world.worker("w2", c=4)
    assert world.lot.wake([parked.id]) == 1
    until(lambda: {"parked", "c", "d"} <= set(world.marks("ended")))
    until(
        lambda: [entry["mark"] for entry in world.notes("began") if entry["worker"] == "w2"].count("a") == 1
    )

    keys = set(world.redis.scan_iter(count=1000))
    assert keys
    assert [key for key in keys if not key.startswith("tenant:")] == []


@side_by_side
def test_in_the_stock_fetch_parking_stays(place: Place) -> None:
    options = {
        "fetch": "stock",
        "visibility_timeout": 4,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "unacked_key": "own:unacked",
        "unacked_index_key": "own:unacked_index",
        "unacked_mutex_key": "own:unacked_mutex",
    }
    world = place.world(broker_transport_options=options)
    first = world.worker("w1", c=2)
    due = time.time() + 1.5
    delayed = [world.send("note", f"delayed-{number}", countdown=1.5) for number in range(10)]
    far = world.send("note", "far", countdown=3600)
    revoked = world.send("note", "revoked", countdown=3600)
    expires = world.send("note", "expires", countdown=3600, expires=2)
    until(lambda: world.lot.size() >= 12)
    assert inspect(world).scheduled() == {"w1@test": []}
    assert delayed[0].id
    until(lambda: len(world.notes("ended")) == 10)
    assert all(-0.05 < entry["at"] - due < BUSY_S for entry in world.notes("began"))
    again = world.send("again", "again", 2, 0.3)
    assert ended(again) == "again"
    control(world, "revoke", revoked.id)
    until(lambda: revoked.state == expires.state == "REVOKED")
    until(lambda: world.lot.size() == 1)
    assert world.lot.wake([far.id]) == 1
    until(lambda: world.notes("ended", "far"))
    world.send("note", "held", 30.0)
    until(lambda: world.notes("began", "held"))
    until(lambda: world.redis.hlen("own:unacked") == 1)
    first.kill()

    world.worker("w2", c=2)
    until(lambda: len(world.notes("began", "held")) == 2, 4 + 2 + BUSY_S)
    assert world.notes("began", "held")[1]["redelivered"]
    assert not any(world.held().values())


@pytest.mark.parametrize("fetch", ["moved", "stock"])
@side_by_side
def test_a_pool_without_an_event_loop_is_refused_with_the_reason(place: Place, fetch: str) -> None:
    world = place.world(broker_transport_options={"fetch": fetch})
    pool = f"{behaviour.behaviour_app.__name__}:GreenPool"
    worker = world.worker(
        pool="custom", env={"CELERY_CUSTOM_WORKER_POOL": pool, "PYTHONPATH": str(ROOT)}, wait=False
    )
    assert worker.wait(30) != 0
    assert "gevent and eventlet" in worker.text()
    assert "-P threads" in worker.text()
    assert "ready." not in worker.text()


@side_by_side
def test_gevent_itself_is_refused_with_the_reason(place: Place) -> None:
    need("gevent", importlib.util.find_spec("gevent") is not None, "`make` installs it from the lock")
    world = place.world()
    worker = world.worker(pool="gevent", env={"DAGRELAY_REDIS_URL": "redis://127.0.0.1:1"}, wait=False)
    assert worker.wait(30) != 0
    assert "gevent and eventlet" in worker.text()


@contextlib.contextmanager
def tls_in_front_of(port: int) -> Iterator[int]:
    """A port that speaks TLS and passes everything on: the embedded Valkey is built without it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, ahead = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, ahead), copy(behind, writer))

    loop = asyncio.new_event_loop()
    listener = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)


@side_by_side
def test_over_tls_all_of_it_works_and_nothing_waits_for_a_timer(place: Place) -> None:
    valkey, plain = place.own_world()
    with tls_in_front_of(valkey.port) as port:
        url = f"rediss://127.0.0.1:{port}/0?ssl_cert_reqs=required&ssl_ca_certs={TLS / 'cert.pem'}"
        worker = plain.worker(env={"BEHAVIOUR_BROKER": url})
        took = []
        for number in range(5):  # one after the other: each wakes the idle worker by its blocking move
            time.sleep(0.2)
            sent_at = time.time()
            plain.send("note", f"idle-{number}")
            until(lambda number=number: plain.notes("began", f"idle-{number}"))
            took.append(plain.notes("began", f"idle-{number}")[0]["at"] - sent_at)
        assert sorted(took)[2] < 0.5, took
        for number in range(100):
            plain.send("note", number)
        due = time.time() + 1
        plain.send("note", "delayed", countdown=1)
        assert ended(plain.send("again", "again", 1, 0.2)) == "again"
        until(lambda: len(plain.notes("ended")) == 5 + 100 + 1 + 1)
        assert plain.notes("began", "delayed")[0]["at"] - due < BUSY_S
        assert inspect(plain).ping() == {"w1@test": {"ok": "pong"}}
        plain.redis.client_kill_filter(_type="normal", skipme=True)
        plain.send("note", "after")
        until(lambda: plain.notes("ended", "after"))
        assert worker.stop() == 0
        assert not any(plain.held().values())


@side_by_side
def test_early_acknowledgements_are_written_when_a_task_begins(place: Place) -> None:
    """acks_late=False: at most once, as Celery has it; what was not begun is kept all the same."""
    world = place.world(task_acks_late=False)
    first = world.worker("first", c=1, worker_prefetch_multiplier=3)
    for mark in "abc":
        world.send("note", mark, 60.0 if mark == "a" else 0.0)
    until(lambda: world.notes("began", "a"))
    # Not the first two before the third has come.
    until(lambda: (world.length(), sum(world.held().values())) == (0, 2), BUSY_S)

    first.kill()
    world.worker("second", c=1)

    until(lambda: {"b", "c"} <= set(world.marks("ended")), behaviour.BACK_S + 2 * LEASE_S + BUSY_S)
    assert sorted(world.marks("began")) == ["a", "b", "c"]


@side_by_side
def test_a_worker_told_to_end_by_remote_control_gives_back_what_it_has_not_begun(place: Place) -> None:
    world = place.world()
    worker = world.worker(c=1, worker_prefetch_multiplier=3)
    for mark in "abcd":
        world.send("note", mark, 4.0)
    until(lambda: world.notes("began", "a"))

    world.app.control.shutdown()

    until(lambda: world.length() == 3, BUSY_S)
    assert worker.wait() == 0
    assert world.marks("ended") == ["a"]
    assert not any(world.held().values())


def test_a_sentinel_url_is_refused_with_what_is_needed():
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tasks", "worker"],
        env=clean_env(DAGRELAY_REDIS_URL="sentinel://:secret-word@host:26379/0"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78
    assert "DAGRELAY_REDIS_URL" in done.stderr
    assert "Sentinel" in done.stderr
    assert "secret-word" not in done.stdout + done.stderr


@side_by_side
def test_flower_shows_the_queues_and_the_tasks(place: Place) -> None:
    """A stock Flower, which knows nothing of this transport."""
    world = place.world()
    world.worker("w1", c=3, options=("-Q", "work,idle"))
    port = free_port()
    log = world.folder / "flower.log"
    argv = [CELERY, "-A", behaviour.behaviour_app.__name__, "flower", f"--port={port}"]
    env = clean_env(
        FLOWER_UNAUTHENTICATED_API="true",
        BEHAVIOUR_BROKER=world.url,
        BEHAVIOUR_TRANSPORT="stock",
        PYTHONPATH=str(ROOT),
    )

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def lengths() -> dict[str, int]:
        try:
            found = json.loads(get("/api/queues/length"))["active_queues"]
        except OSError:
            return {}
        return {queue["name"]: queue["messages"] for queue in found}

    flower = Process([*argv, "--address=127.0.0.1"], log=log, env=env, cwd=world.folder, name="flower")
    try:
        until(lambda: "work" in lengths(), 40, "Flower")
        get("/api/workers?refresh=1")  # it asks the workers what queues there are
        until(lambda: {"work", "idle"} <= lengths().keys(), 20, "the worker's queues in Flower")
        delayed = world.send("note", "delayed", queue="idle", countdown=5.0)
        until(lambda: world.lot.get(delayed.id))  # a worker without a free slot leaves it in its queue
        for mark in ("a", "b", "c"):
            world.send("note", mark, 5.0)
        until(lambda: len(world.notes("began")) == 3)
        for number in range(5):
            world.send("note", number)
        until(lambda: lengths() == {"work": 5, "idle": 0}, BUSY_S, str(lengths()))
        page = get("/broker")
        assert "work" in page
        assert "idle" in page
        until(lambda: world.notes("ended", "delayed"))
        until(lambda: json.loads(get(f"/api/task/info/{delayed.id}"))["state"] == "SUCCESS", 60)
    except BaseException as exc:
        exc.add_note(log.read_text())
        raise
    finally:
        flower.kill()
