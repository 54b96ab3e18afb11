"""Redis comes back from a backup, or a replica takes its place: what was accepted is done, and once."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from local.valkey import Valkey
from producers import PollRequest
from producers.client import RelayClient
from producers.contract import TriggerRequest
from producers.settings import ProducerSettings
from tests.fake_airflow import FakeAirflow
from tests.fake_service import FakeService
from tests.integration.test_trigger import until
from tests.worker import Worker


def producer(url: str) -> RelayClient:
    return RelayClient(ProducerSettings(redis_url=url, client_name="tests@here"))


def save(client: Redis, data: Path, copy: Path) -> None:
    """Take a backup of a Redis that runs, as `docs/running.md` has it."""
    client.bgsave()
    until(lambda: not persistence(client)["rdb_bgsave_in_progress"])
    assert persistence(client)["rdb_last_bgsave_status"] == "ok"
    shutil.copy(data / "dump.rdb", copy)


def restore(data: Path, copy: Path, port: int) -> Valkey:
    """Bring a backup back, as `docs/running.md` has it; without its third step nothing would be there."""
    shutil.rmtree(data)
    data.mkdir()
    shutil.copy(copy, data / "dump.rdb")
    with Valkey(data, port=port, config={"appendonly": "no"}) as server, Redis.from_url(server.url) as client:
        client.config_set("appendonly", "yes")
        until(lambda: not persistence(client)["aof_rewrite_in_progress"] and aof_there(client))
    return Valkey(data, port=port)


def persistence(client: Redis) -> Any:
    return client.info("persistence")


def aof_there(client: Redis) -> bool:
    found = persistence(client)
    return bool(
        found["aof_enabled"] and found["aof_last_bgrewrite_status"] == "ok" and found["aof_base_size"]
    )


def test_from_an_older_state_nothing_is_done_twice_and_nothing_is_lost(airflow, tmp_path):
    """What was accepted before the backup and done after it is done again, and finds that it was done."""
    data, copy = tmp_path / "data", tmp_path / "backup.rdb"
    with FakeService() as service:
        env = {"DAGRELAY_SERVICE_TRAIN": service.variable}
        submit: Any = {"path": "/jobs", "body": {}}
        job = PollRequest(
            service="train", path="/jobs/{job_id}", submit=submit, interval_s=0.2, max_interval_s=1
        )
        with Valkey(data) as valkey, Redis.from_url(valkey.url) as client:
            relay = producer(valkey.url)
            ids = [
                relay.enqueue(TriggerRequest("sales", key="k")).id,
                relay.enqueue(TriggerRequest("sales")).id,
                relay.enqueue(TriggerRequest("sales"), countdown=1).id,
                relay.enqueue(job).id,
            ]
            save(client, data, copy)
            late = relay.enqueue(TriggerRequest("sales", key="after the backup")).id
            connections = {"default": airflow.conn_uri}
            with Worker(valkey.url, tmp_path, connections=connections, **env):
                made = [relay.handle(one).get(timeout=60) for one in (*ids[:3], late)]
                until(lambda: service.jobs)
            relay.redis.close()
            port = valkey.port
        assert len(airflow.runs) == 4
        with restore(data, copy, port) as valkey:
            relay = producer(valkey.url)
            assert relay.record(late) is None  # it came after the backup
            with Worker(valkey.url, tmp_path, name="w2", connections=connections, **env):
                again = [relay.handle(one).get(timeout=60) for one in ids[:3]]
                until(lambda: len(service.posts) > 1)
                service.end("job-1")
                assert relay.handle(ids[3]).get(timeout=60).job_id == "job-1"
            relay.redis.close()

    assert [(one.dag_run_id, one.created) for one in again] == [(one.dag_run_id, True) for one in made[:3]]
    assert len(airflow.runs) == 4
    assert all(airflow.posts["sales", one.dag_run_id] == 2 for one in again)  # asked for again, and found
    assert list(service.jobs) == ["job-1"]
    keys = {key for key, _ in service.posts}
    assert (len(service.posts), len(keys)) == (2, 1)


class Address:
    """One address for whichever Redis is the primary now, as a managed Redis or a TCP proxy has it."""

    def __init__(self, port: int) -> None:
        self.target = port
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
                self._open += [client, server]
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while some := source.recv(65_536):
                sink.sendall(some)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for one in (self._listener, *self._open):
            one.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Valkey, Valkey]]:
    """A primary and its replica."""
    with Valkey(tmp_path / "first") as first, Valkey(tmp_path / "second") as second:
        with Redis.from_url(second.url, decode_responses=True) as client:
            client.replicaof("127.0.0.1", first.port)
            until(lambda: client.info("replication")["master_link_status"] == "up")
        yield first, second


def test_a_replica_that_takes_over_goes_on_with_all_that_it_had(pair, tmp_path):
    first, second = pair
    address = Address(first.port)
    relay = producer(address.url)
    with FakeAirflow() as airflow:
        airflow.delay_s = 0.05
        connections = {"default": f"{airflow.conn_uri}/?max_in_flight=2"}
        with Worker(address.url, tmp_path, connections=connections):
            handles = relay.enqueue_many([TriggerRequest("sales", key=f"k{n}") for n in range(60)])
            until(lambda: len(airflow.runs) > 5)
            with Redis.from_url(first.url) as client:
                assert client.wait(1, 5000) == 1
            first.kill()
            with Redis.from_url(second.url) as client:
                client.replicaof("NO", "ONE")
            address.target = second.port

            found = [found_in(relay, handle.id) for handle in handles]
            assert found == [f"relay__k{n}" for n in range(60)]
            after = relay.enqueue(TriggerRequest("sales", key="after"))
            assert after.get(timeout=60).created
    assert len(airflow.runs) == 61
    relay.redis.close()
    address.close()


def found_in(relay: RelayClient, task_id: str) -> str:
    """Return the run that a request ended in; as a caller who asks again while Redis is away."""
    found: list[str] = []

    def ended() -> bool:
        with suppress(RedisError, OSError):
            found.append(relay.handle(task_id).get(timeout=60).dag_run_id)
        return bool(found)

    until(ended)
    return found[0]
