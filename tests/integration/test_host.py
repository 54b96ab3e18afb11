"""Somebody else's service that uses the library: it stays what it was, and its canvases work.

The host is a process of its own, in a folder of its own, with a package `tasks`, a `celeryconfig` and a
Celery app of its own, and with its broker in CELERY_BROKER_URL, as Celery reads it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from local.process import Process, clean_env
from local.valkey import Valkey
from producers.contract import QUEUE_TRIGGERS, TriggerRequest
from tests.integration.test_trigger import until
from tests.worker import CELERY

ROOT = Path(__file__).resolve().parents[2]

HOSTS_TASKS = '''
"""The host's own tasks."""
import json

from celery import Celery, shared_task

app = Celery("host")
app.config_from_object("celeryconfig")


@app.task
def prepare(day):
    return {"day": day}


@app.task
def nothing():
    return None


@app.task(bind=True)
def collect(self, results, name):
    self.backend.client.rpush(f"collected:{name}", json.dumps([self.request.hostname, results]))
    return results


@shared_task
def everybodys():
    pass


from producers import register_relay  # noqa: E402

relay = register_relay(app)
'''

HOSTS_CONFIG = """
task_default_queue = "celery"
task_serializer = "json"
of_the_host = True
"""

STAYS_AS_IT_WAS = """
import json, logging, os, signal, sys, threading
import celery, celeryconfig, tasks
from celery import _state

def snapshot():
    tasks.app.finalize()
    return {
        "current app": celery.current_app._get_current_object() is tasks.app,
        "apps": sorted(repr(app.main) for app in _state._get_active_apps()),
        "tasks": sorted(tasks.app.tasks),
        "shared tasks": len(_state._on_app_finalizers),
        "broker": tasks.app.conf.broker_url,
        "backend": tasks.app.conf.result_backend,
        "queue": tasks.app.conf.task_default_queue,
        "task modules": [tasks.__file__, celeryconfig.__file__],
        "config": celeryconfig.of_the_host,
        "environment": dict(os.environ),
        "log handlers": [repr(handler) for handler in logging.getLogger().handlers],
        "log level": logging.getLogger().level,
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)],
        "threads": threading.active_count(),
        "excepthook": repr(sys.excepthook),
    }

before = snapshot()
import producers
from producers import trigger_dag
imported = snapshot()
handle = trigger_dag.delay("daily_sales", conf={"day": "2026-11-20"}, key="k1")
signature = trigger_dag.s("daily_sales", key="k2")
second = signature.delay()
third = signature.apply_async(countdown=0.1)
tasks.everybodys.name
run = handle.get(timeout=60).to_message()
others = [second.get(timeout=60).dag_run_id, third.get(timeout=60).dag_run_id]
used = snapshot()
if "own" in sys.argv:
    tasks.prepare.delay("2026-11-20")
    trigger_dag.delay("daily_sales", key="k2").get(timeout=60)
print(json.dumps({
    "changed by import": [name for name in before if before[name] != imported[name]],
    "changed by use": [name for name in before if before[name] != used[name]],
    "current": before["current app"],
    "where": [tasks.__file__, celeryconfig.__file__],
    "run": run,
    "others": others,
}))
"""


class Host:
    """A folder with a service in it, which finds our library as an installed one."""

    def __init__(self, folder: Path, ours: str, its_own: str) -> None:
        self.folder = folder / "host"
        self.stderr = ""
        site = folder / "site"
        (self.folder / "tasks").mkdir(parents=True)
        (self.folder / "tasks" / "__init__.py").write_text(HOSTS_TASKS)
        (self.folder / "celeryconfig.py").write_text(HOSTS_CONFIG)
        site.mkdir()
        (site / "producers").symlink_to(ROOT / "producers")
        self.env = clean_env(
            DAGRELAY_REDIS_URL=ours,
            CELERY_BROKER_URL=its_own,
            CELERY_RESULT_BACKEND=its_own,
            PYTHONPATH=f"{self.folder}:{site}",
            PYTHONDONTWRITEBYTECODE="1",
        )

    def run(self, script: str, *args: str) -> Any:
        """Run a script as the host's service; return the JSON that it prints."""
        ended = subprocess.run(
            [sys.executable, "-c", script, *args],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        self.stderr = ended.stderr
        return json.loads(ended.stdout)

    def worker(self, name: str) -> Process:
        """Start the host's own worker; return when it takes messages."""
        log = self.folder / f"{name}.log"
        options = ("-n", f"{name}@host", "-P", "threads", "-c", "4", "--without-mingle", "--without-gossip")
        started = Process(
            [CELERY, "-A", "tasks", "worker", "-l", "INFO", *options],
            log=log,
            env=self.env,
            cwd=self.folder,
            name=name,
            grace_s=20,
        )
        started.wait_until(lambda: " ready." in log.read_text(), timeout_s=40, what="ready")
        return started


@pytest.fixture(scope="module")
def its_own() -> Iterator[Valkey]:
    """The host's own Redis."""
    with Valkey() as server:
        yield server


@pytest.fixture
def make_host(tmp_path) -> Callable[[str, str], Host]:
    return lambda ours, its_own: Host(tmp_path, ours, its_own)


@pytest.fixture
def started() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def looked_into(valkey: Valkey) -> Redis:
    return Redis.from_url(valkey.url, decode_responses=True)


@pytest.mark.parametrize("own", [False, True], ids=["using us alone", "and its own tasks as well"])
def test_a_host_stays_what_it_was(valkey, worker, airflow, its_own, make_host, own):
    with looked_into(its_own) as theirs:
        theirs.flushall()
        before = theirs.info("stats")["total_connections_received"]
        host = make_host(valkey.url, its_own.url)

        told = host.run(STAYS_AS_IT_WAS, *(["own"] if own else []))

        assert host.stderr == ""
        assert told["current"] is True
        assert all(path.startswith(str(host.folder)) for path in told["where"])
        assert told["changed by import"] == []
        assert told["changed by use"] == []
        assert told["run"]["dag_run_id"] == "relay__k1"
        assert told["others"] == ["relay__k2", "relay__k2"]
        assert airflow.runs["daily_sales", "relay__k1"]["conf"] == {"day": "2026-11-20"}
        if own:
            assert [json.loads(text)["headers"]["task"] for text in theirs.lrange("celery", 0, -1)] == [
                "tasks.prepare"
            ]
            assert [key for key in theirs.scan_iter() if not key.startswith("_kombu.")] == ["celery"]
        else:
            assert theirs.dbsize() == 0
            assert theirs.info("stats")["total_connections_received"] == before
    with looked_into(valkey) as ours:
        assert ours.llen("celery") == 0


THROUGH_THE_RELAY = """
import json
from celery import chain
from producers import client, trigger_dag
from tasks import nothing, prepare, relay

first = chain(prepare.s("2026-11-20"), relay.s("daily_sales", key="by-relay")).apply_async()
second = chain(nothing.s(), relay.s("daily_sales", {"own": 1}, key="own-conf")).apply_async()
third = chain(prepare.s("2026-11-20"), relay.si("daily_sales", key="immutable")).apply_async()
bad = chain(prepare.s("2026-11-20"), relay.s("daily_sales", {"own": 1})).apply_async()
runs = [client().handle(one.get(timeout=60)).get(timeout=60).to_message() for one in (first, second, third)]
print(json.dumps([runs, repr(bad.get(timeout=30, propagate=False))]))
"""


def test_a_host_with_another_broker_chains_to_us_by_a_relay(
    valkey, worker, airflow, its_own, make_host, started
):
    host = make_host(valkey.url, its_own.url)
    started.callback(host.worker("relaying").stop)

    runs, bad = host.run(THROUGH_THE_RELAY)

    assert [run["dag_run_id"] for run in runs] == ["relay__by-relay", "relay__own-conf", "relay__immutable"]
    assert airflow.runs["daily_sales", "relay__by-relay"]["conf"] == {"day": "2026-11-20"}
    assert airflow.runs["daily_sales", "relay__own-conf"]["conf"] == {"own": 1}
    assert airflow.runs["daily_sales", "relay__immutable"]["conf"] == {}
    assert "InvalidRequest" in bad
    assert len(airflow.runs) == 3


RELAY_ONCE = """
import json
from tasks import relay
print(json.dumps(relay.delay("daily_sales", {"n": 1}).id))
"""


def test_a_relay_that_is_delivered_twice_makes_one_request(valkey, its_own, make_host, started):
    host = make_host(valkey.url, its_own.url)
    with looked_into(its_own) as theirs, looked_into(valkey) as ours:
        theirs.flushall()
        task_id = host.run(RELAY_ONCE)
        message = theirs.lrange("celery", 0, 0)[0]
        theirs.lpush("celery", message, message)
        relaying = host.worker("twice")
        started.callback(relaying.stop)
        log = host.folder / "twice.log"

        until(lambda: log.read_text().count(f"[{task_id}] succeeded") == 3)

        assert ours.llen(QUEUE_TRIGGERS) == 1
        assert len(ours.keys("dagrelay:record:*")) == 1


CANVASES = """
import json
from celery import chain, chord, group
from producers import trigger_dag
from tasks import collect, prepare

t = trigger_dag
asked = {
    "chain": chain(prepare.s("2026-11-20"), t.s("chained", key="c"), collect.s("chain")),
    "group": group(t.s("grouped", {"n": n}, key=f"g{n}") for n in range(3)),
    "chord": chord([t.s("chorded", {"n": 1}), t.s("chorded", {"n": 2})], collect.s("chord")),
    "one caller": chord([t.s("shared", key="same"), t.s("shared", key="a")], collect.s("one caller")),
    "another": chord([t.s("shared", key="same"), t.s("shared", key="b")], collect.s("another")),
    "twice": chord([t.s("twice", key="same")] * 2, collect.s("twice").set(queue="celery")),
    "upgraded": t.si("upgraded", key="1") | group(t.si("upgraded", key="2"), t.si("upgraded", key="3"))
        | collect.s("upgraded"),
}
sent = {name: canvas.apply_async() for name, canvas in asked.items()}
print(json.dumps({name: result.get(timeout=60) for name, result in sent.items()}))
"""


def test_a_host_whose_broker_is_our_redis_has_us_in_its_own_canvases(
    valkey, worker, airflow, make_host, started
):
    airflow.fault = lambda number, dag_id, run_id: "503" if number % 4 == 1 else "answer"  # retries too
    host = make_host(valkey.url, valkey.url)
    started.callback(host.worker("canvas").stop)

    told = host.run(CANVASES)

    def run_ids(name: str) -> list[str]:
        return [run["dag_run_id"] for run in told[name]]

    assert told["chain"]["dag_run_id"] == "relay__c"
    assert airflow.runs["chained", "relay__c"]["conf"] == {"day": "2026-11-20"}
    assert run_ids("group") == ["relay__g0", "relay__g1", "relay__g2"]
    assert [airflow.runs["chorded", run_id]["conf"] for run_id in run_ids("chord")] == [{"n": 1}, {"n": 2}]
    # Two callers with the same key: one run, and each has its own result and its own chord.
    assert run_ids("one caller") == ["relay__same", "relay__a"]
    assert run_ids("another") == ["relay__same", "relay__b"]
    # The same key twice in one chord: one run, two results.
    assert run_ids("twice") == ["relay__same", "relay__same"]
    assert run_ids("upgraded") == ["relay__2", "relay__3"]
    expected = {
        "chained": 1,
        "grouped": 3,
        "chorded": 2,
        "shared": 3,
        "twice": 1,
        "upgraded": 3,
    }
    made = [dag_id for dag_id, _ in airflow.runs]
    assert {dag_id: made.count(dag_id) for dag_id in expected} == expected
    with looked_into(valkey) as ours:
        for name in told.keys() - {"group"}:
            collected = [json.loads(text) for text in ours.lrange(f"collected:{name}", 0, -1)]
            assert len(collected) == 1, name  # the body runs once, in the host's worker
            assert collected[0] == ["canvas@host", told[name]]
        # What came past our door has its record all the same.
        records = [ours.hgetall(key) for key in ours.keys("dagrelay:record:*")]
        canvas = [record for record in records if record["dag_id"] in expected]
        assert len(canvas) == sum(expected.values()) + 2  # one run each, and the two that shared one
        assert {record["state"] for record in canvas} == {"done"}


def test_a_worker_on_a_machine_with_another_broker_in_its_environment_works_from_ours(
    relay, airflow, its_own, start_worker
):
    with looked_into(its_own) as theirs:
        theirs.flushall()
        worker = start_worker(CELERY_BROKER_URL=its_own.url, CELERY_RESULT_BACKEND=its_own.url)

        assert relay.enqueue(TriggerRequest("daily_sales", key="k")).get(timeout=60).created
        assert theirs.dbsize() == 0
        assert "CELERY_BROKER_URL is not followed" in worker.text()
