"""`dagrelay listen` on Redis Streams: nothing lost, nothing twice, whatever ends in the midst."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from local.process import ROOT, Process, clean_env
from local.valkey import Valkey
from producers.client import RelayClient
from producers.queues import replies
from producers.queues.listener import Listener
from producers.queues.sources import publisher_for, source_for
from producers.scopes import Scope
from producers.settings import read_settings
from producers.stores.heard import answer_key, heard
from producers.stores.notices import replies_key
from tests.fake_service import FakeService
from tests.integration.test_trigger import until

pytestmark = pytest.mark.integration

STREAM, GROUP, DEAD = "dag-triggers", "dagrelay", "dag-triggers.dead"
CANARY = "c4n4ry-s3cret"


@pytest.fixture
def broker() -> Iterator[Valkey]:
    """The Redis of the stream, which is not Dagrelay's."""
    with Valkey() as server:
        yield server


@pytest.fixture
def stream(broker) -> Iterator[Redis]:
    with Redis.from_url(broker.url, decode_responses=True) as client:
        yield client


@pytest.fixture
def requests(valkey) -> Iterator[Redis]:
    """Dagrelay's Redis."""
    with Redis.from_url(valkey.url, decode_responses=True) as client:
        yield client


@pytest.fixture
def listen(broker, relay) -> Iterator[Callable[..., Listener]]:
    """Start a listener in this process; it is stopped at the end."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(listening(broker.url, relay, **options))


@contextmanager
def listening(
    url: str, relay: RelayClient, *, claim_after_s: float = 0.5, **options: Any
) -> Iterator[Listener]:
    url = f"{url}?stream={STREAM}&claim_after_s={claim_after_s:g}"
    stop = threading.Event()
    publisher = None if options.get("answers") else publisher_for(url)
    found = Listener(source_for(url), relay, publisher=publisher, **options)
    thread = threading.Thread(target=found.run, args=(stop,))
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def start(broker, valkey, tmp_path) -> Iterator[Callable[..., Process]]:
    """Start `dagrelay listen` as a process."""
    running: list[Process] = []

    def begin(*options: str, url: str = "", argv: tuple[str, ...] = (), **env: str) -> Process:
        url = url or f"{broker.url}?stream={STREAM}&claim_after_s=0.5"
        process = Process(
            [*(argv or (str(ROOT / ".venv/bin/dagrelay"), "listen")), *options],
            log=tmp_path / "listen.log",
            env=clean_env(**{"DAGRELAY_REDIS_URL": valkey.url, "DAGRELAY_LISTEN_URL": url, **env}),
            cwd=ROOT,
        )
        running.append(process)
        return process

    yield begin
    for one in running:
        one.kill()


def log_of(tmp_path: Path) -> str:
    log = tmp_path / "listen.log"
    return log.read_text() if log.exists() else ""


def send(stream: Redis, **fields: Any) -> None:
    around = {name: fields.pop(name) for name in ("id", "reply_to", "correlation_id") if name in fields}
    stream.xadd(STREAM, {"data": json.dumps({"dag_id": "sales", **fields}), **around})


def send_many(stream: Redis, numbers: range) -> None:
    with stream.pipeline(transaction=False) as pipe:
        for number in numbers:
            pipe.xadd(STREAM, {"data": json.dumps({"dag_id": "sales", "conf": {"n": number}})})
        pipe.execute()


def accepted(requests: Redis) -> list[int]:
    """The numbers of the triggers that workers would see."""
    messages = requests.lrange("triggers", 0, -1)
    return sorted(json.loads(json.loads(message)["body"])[1]["conf"]["n"] for message in messages)


def pending(stream: Redis) -> int:
    if not stream.exists(STREAM) or not (groups := stream.xinfo_groups(STREAM)):
        return -1
    return int(groups[0]["pending"]) + int(groups[0]["lag"] or 0)


def answers(stream: Redis, to: str = "replies.test") -> list[dict[str, Any]]:
    return [json.loads(fields["data"]) for _, fields in stream.xrange(to)]


def untold(stream: Redis, relay: RelayClient) -> int:
    """How many answers wait for a listener."""
    port = stream.get_connection_kwargs()["port"]
    return int(relay.redis.xlen(replies_key(f"redis:127.0.0.1:{port}/0:{STREAM}")))


def test_listeners_that_are_killed_lose_no_message_and_repeat_none(stream, requests, start):
    total = 6000
    send_many(stream, range(total))
    one, other = start(), start()
    for kills in range(1, 5):
        until(lambda least=kills * 1000: requests.llen("triggers") >= least)
        one.kill()
        one, other = other, start()
    until(lambda: requests.llen("triggers") >= total and pending(stream) == 0, 60)

    assert accepted(requests) == list(range(total))
    assert len(requests.keys("dagrelay:record:*")) == total
    assert stream.exists(DEAD) == 0


def test_while_redis_is_away_nothing_is_acknowledged_and_afterwards_all_is_accepted_once(
    stream, requests, valkey, start, tmp_path
):
    process = start()
    send_many(stream, range(300))
    until(lambda: requests.llen("triggers") == 300 and pending(stream) == 0)
    valkey.stop()
    send_many(stream, range(300, 900))
    until(lambda: "waits source=" in log_of(tmp_path))
    assert pending(stream) == 600
    valkey.start()
    until(lambda: requests.llen("triggers") >= 900 and pending(stream) == 0)

    assert accepted(requests) == list(range(900))
    assert process.stop() == 0
    assert stream.exists(DEAD) == 0
    assert (
        max(
            row["times_delivered"]
            for row in stream.xpending_range(STREAM, GROUP, "-", "+", 9) or [{"times_delivered": 0}]
        )
        == 0
    )


def test_a_broker_that_restarts_is_read_on(broker, stream, requests, listen):
    listener = listen()
    send_many(stream, range(10))
    until(lambda: listener.counts.accepted == 10 and pending(stream) == 0)
    broker.restart()
    until(lambda: _answers_ping(stream))
    send_many(stream, range(10, 20))
    until(lambda: listener.counts.accepted == 20 and pending(stream) == 0)
    stream.delete(STREAM)  # with its group
    send_many(stream, range(20, 30))
    until(lambda: listener.counts.accepted == 30)

    assert accepted(requests) == list(range(30))


def _answers_ping(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except OSError:
        return False
    except Exception as exc:  # noqa: BLE001 - redis-py's own, of many kinds
        return bool("never" in str(exc))


EVENT = {"specversion": "1.0", "id": "1", "source": "/shop", "type": "com.example.order"}
POISON: dict[str, dict[str, Any]] = {
    "no data": {"other": "field"},
    "empty": {"data": ""},
    "no JSON": {"data": "trigger sales please"},
    "bytes": {"data": b"\xff\xfe\x00"},
    "a list": {"data": "[]"},
    "a number": {"data": "1"},
    "null": {"data": "null"},
    "cut off": {"data": '{"dag_id": "sales", "conf": {"a": '},
    "deep": {"data": '{"dag_id":"sales","conf":' + '{"a":' * 5000 + "1" + "}" * 5001},
    "NaN": {"data": '{"dag_id": "sales", "conf": {"a": NaN}}'},
    "a huge number": {"data": '{"dag_id": "sales", "conf": {"a": ' + "9" * 5000 + "}}"},
    "a key twice": {"data": '{"dag_id": "sales", "dag_id": "other"}'},
    "no DAG": {"data": '{"conf": {}}'},
    "a DAG and a service": {"data": '{"dag_id": "sales", "service": "render"}'},
    "an unknown field": {"data": '{"dag_id": "sales", "dagid": 1}'},
    "a wrong type": {"data": '{"dag_id": 7}'},
    "a conf that is no object": {"data": '{"dag_id": "sales", "conf": "' + CANARY + '"}'},
    "an odd DAG id": {"data": '{"dag_id": "../sales"}'},
    "too large": {"data": b'{"dag_id": "sales", "conf": {"a": "' + b"x" * 3_000_000 + b'"}}'},
    "an event without rules": {"data": json.dumps(EVENT)},
    "half an event": {"data": "{}", "ce-specversion": "1.0", "ce-id": "1"},
    "a batch": {"data": "[]", "content_type": "application/cloudevents-batch+json"},
    "not allowed": {"data": '{"dag_id": "payroll"}'},
    "a place that is not for answers": {"data": '{"dag_id": "sales", "reply_to": "triggers"}'},
    "many fields": {"data": "{", **{f"h{n}": "x" for n in range(5000)}},
    "a NUL": {"data": '{"dag_id": "sales", "key": "a\\u0000b"}'},
    "a lone surrogate": {"data": '{"dag_id": "sales", "key": "a\\ud800b"}'},
}


def test_what_cannot_be_read_is_put_aside_whole_with_its_reason(stream, requests, start, tmp_path):
    process = start("--dags", "sales*")
    for fields in POISON.values():
        send_many(stream, range(1))
        stream.xadd(STREAM, fields)
    until(lambda: stream.xlen(DEAD) == len(POISON) and pending(stream) == 0, 60)

    assert requests.llen("triggers") == len(POISON)
    with Redis.from_url(f"redis://127.0.0.1:{stream.get_connection_kwargs()['port']}") as raw:
        dead = [fields for _, fields in raw.xrange(DEAD)]
    for fields, (what, given) in zip(dead, POISON.items(), strict=True):
        reason = fields.pop(b"dead_reason").decode()
        assert fields.pop(b"dead_from"), what
        assert fields.pop(b"dead_deliveries") == b"1"
        assert fields == {_bytes(name): _bytes(value) for name, value in given.items()}, what
        assert reason.partition(": ")[0], what
        assert CANARY not in reason
    assert CANARY not in log_of(tmp_path)
    assert log_of(tmp_path).count("refused source=") == len(POISON)
    assert process.stop() == 0


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


KILLED_BY_A_MESSAGE = """
import os, sys
from producers.queues import listener
read = listener.read
def deadly(message, **about):
    if b"deadly" in message.body:
        os._exit(9)
    return read(message, **about)
listener.read = deadly
from producers.cli import main
main(["listen"])
"""


def test_a_message_that_ends_the_listener_is_put_aside_and_those_beside_it_are_accepted(
    stream, requests, start
):
    send_many(stream, range(150))
    stream.xadd(STREAM, {"data": '{"dag_id": "deadly"}'})
    send_many(stream, range(150, 300))
    deaths = 0
    process = start(argv=(sys.executable, "-c", KILLED_BY_A_MESSAGE))
    while stream.xlen(DEAD) == 0:
        until(lambda alive=process: not alive.alive or stream.xlen(DEAD))
        if not process.alive:
            deaths += 1
            process = start(argv=(sys.executable, "-c", KILLED_BY_A_MESSAGE))
    until(lambda: requests.llen("triggers") >= 300 and pending(stream) == 0)

    assert deaths == 5
    assert accepted(requests) == list(range(300))
    (_, fields), *more = stream.xrange(DEAD)
    assert not more
    assert "deadly" in fields["data"]
    assert "begun 5 times and never finished" in fields["dead_reason"]


def test_a_bug_of_ours_refuses_the_message_and_says_where(stream, requests, listen, caplog):
    class Boom:
        def order(self, event: Any) -> Any:
            raise KeyError(CANARY)

    listener = listen(routes=Boom())
    stream.xadd(STREAM, {"data": json.dumps(EVENT)})
    send_many(stream, range(1))
    until(lambda: listener.counts.refused and listener.counts.accepted)

    (_, fields), *_ = stream.xrange(DEAD)
    assert fields["dead_reason"] == "body: could not be read (KeyError)"
    assert "KeyError in order" in caplog.text
    assert CANARY not in caplog.text


def test_a_dead_stream_that_cannot_be_written_keeps_the_message_and_holds_up_no_other(
    stream, requests, listen
):
    stream.set(DEAD, "of another type")
    stream.xadd(STREAM, {"data": "poison"})
    send_many(stream, range(5))
    listen()
    until(lambda: requests.llen("triggers") == 5 and pending(stream) == 1)
    stream.delete(DEAD)
    until(lambda: stream.xlen(DEAD) == 1 and pending(stream) == 0)


def test_a_sender_hears_that_its_request_was_accepted_goes_on_and_has_ended(
    stream, relay, airflow, worker, listen
):
    listen(scope=Scope(dags=("sales", "nowhere")))
    airflow.missing = {"nowhere"}
    send(stream, key="w", wait=True, reply_to="replies.test", correlation_id="c-1")
    until(lambda: ("sales", "relay__w") in airflow.runs)
    airflow.runs["sales", "relay__w"]["state"] = "running"
    until(lambda: any(one["what"] == "progress" for one in answers(stream)))
    airflow.runs["sales", "relay__w"]["state"] = "success"
    until(lambda: answers(stream)[-1]["what"] == "ended")

    told = answers(stream)
    assert {one["correlation_id"] for one in told} == {"c-1"}
    assert len({one["id"] for one in told}) == 1
    assert told[0]["what"] == told[0]["state"] == "accepted"
    assert told[0]["dag_run_id"] == "relay__w"
    assert {one["state"] for one in told if one["what"] == "progress"} == {"waiting"}
    assert told[-1]["state"] == "done"
    assert told[-1]["run"]["state"] == "success"
    assert stream.xrange("replies.test")[0][1]["correlation_id"] == "c-1"
    until(lambda: untold(stream, relay) == 0)

    send(stream, dag_id="nowhere", reply_to="replies.bad", correlation_id="c-2")
    until(lambda: [one["what"] for one in answers(stream, "replies.bad")][-1:] == ["ended"])
    assert answers(stream, "replies.bad")[-1]["state"] == "failed"
    assert answers(stream, "replies.bad")[-1]["error"] == "DagNotFound"

    send(stream, dag_id="payroll", reply_to="replies.no", correlation_id="c-3")
    until(lambda: answers(stream, "replies.no"))
    (refused,) = answers(stream, "replies.no")
    assert (refused["what"], refused["error"], refused["id"]) == ("refused", "NotAllowed", None)
    assert "payroll" in refused["reason"]


def test_a_job_that_is_asked_for_over_a_queue_tells_its_states_and_its_result(
    stream, valkey, start_worker, listen
):
    with FakeService() as service:
        start_worker(DAGRELAY_SERVICE_TRAIN=service.variable)
        listen(scope=Scope(services=("train",)))
        job = {
            "service": "train",
            "path": "/jobs/{job_id}",
            "result": "out",
            "interval_s": 0.2,
            "submit": {"path": "/jobs", "body": {"ref": "{reference}"}},
        }
        stream.xadd(STREAM, {"data": json.dumps(job), "reply_to": "replies.test", "correlation_id": "j-1"})
        until(lambda: any(one.get("seen") == "running" for one in answers(stream)))
        service.end("job-1", "succeeded", out={"rows": 3})
        until(lambda: answers(stream)[-1]["what"] == "ended")

    told = answers(stream)
    assert told[0]["what"] == "accepted"
    assert (told[0]["service"], told[-1]["job_id"]) == ("train", "job-1")
    assert (told[-1]["state"], told[-1]["job_state"], told[-1]["result"]) == (
        "done",
        "succeeded",
        {"rows": 3},
    )


def test_events_start_what_the_rules_say(stream, requests, start, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rules]]\ntype = "com.example.*"\ndag_id = "sales"\nconf = "{n: data.n}"\n')
    process = start("--rules", str(rules))
    stream.xadd(STREAM, {"data": json.dumps({**EVENT, "data": {"n": 1}})})
    binary = {f"ce-{name}": value for name, value in EVENT.items()}
    stream.xadd(STREAM, {"data": '{"n": 2}', "content_type": "application/json", **binary, "ce-id": "2"})
    stream.xadd(STREAM, {"data": json.dumps({**EVENT, "data": {"n": 1}})})  # the same event again
    stream.xadd(STREAM, {"data": json.dumps({**EVENT, "type": "other"})})
    until(lambda: pending(stream) == 0 and stream.xlen(DEAD) == 1)

    assert accepted(requests) == [1, 2]
    assert process.stop() == 0


def test_what_a_listener_died_with_before_it_told_is_told_by_another(
    stream, broker, relay, listen, monkeypatch
):
    key = replies_key(source_for(f"{broker.url}?stream={STREAM}").name)
    relay.redis.xadd(key, {"id": "t1", "what": "ended", "to": "replies.test", "correlation_id": "c-1"})
    relay.redis.xadd(key, {"id": "t2", "what": "ended", "to": "triggers", "correlation_id": "c-2"})
    relay.redis.hset("dagrelay:record:t1", mapping={"state": "failed", "error": "GaveUp", "reason": "late"})
    relay.redis.hset("dagrelay:record:t2", mapping={"state": "failed", "run": "no JSON"})
    relay.redis.xgroup_create(key, replies.GROUP, id="0")
    relay.redis.xreadgroup(replies.GROUP, "died", {key: ">"})
    monkeypatch.setattr(replies, "CLAIM_AFTER_S", 0.1)
    listen()
    until(lambda: relay.redis.xlen(key) == 0)

    (told,) = answers(stream)
    assert (told["id"], told["error"], told["reason"]) == ("t1", "GaveUp", "late")


def test_while_redis_is_full_messages_are_not_delivered_again_and_again(
    stream, requests, relay, valkey, listen
):
    listener = listen()
    send_many(stream, range(1))
    until(lambda: listener.counts.accepted == 1)
    requests.config_set("maxmemory", "1mb")
    send_many(stream, range(1, 9))
    until(lambda: pending(stream) == 8)
    until(lambda: listener._wait_s >= 1.5)  # it has tried some times
    requests.config_set("maxmemory", "0")
    until(lambda: pending(stream) == 0)

    assert accepted(requests) == list(range(9))
    assert stream.exists(DEAD) == 0


def test_a_broker_that_is_away_at_the_start_is_waited_for(start, tmp_path):
    process = start(url=f"redis://127.0.0.1:1/0?stream={STREAM}")
    until(lambda: "waits source=redis:127.0.0.1:1/0:dag-triggers" in log_of(tmp_path))
    assert process.stop() == 0


def test_the_same_message_again_is_one_request_and_hears_how_that_ended(
    stream, relay, airflow, worker, listen
):
    listener = listen()
    send(stream, id="order-7", reply_to="replies.test", correlation_id="c-1")
    until(lambda: [one["what"] for one in answers(stream)] == ["accepted", "ended"])
    send(stream, id="order-7", reply_to="replies.test", correlation_id="c-2")
    until(lambda: len(answers(stream)) == 3)

    again = answers(stream)[-1]
    assert (again["what"], again["state"], again["correlation_id"]) == ("ended", "done", "c-2")
    assert again["run"]["dag_id"] == "sales"
    assert (listener.counts.accepted, listener.counts.repeated) == (1, 1)
    assert len([run for run in airflow.runs if run[1] == again["dag_run_id"]]) == 1


def test_an_answer_waits_for_a_broker_that_is_away(broker, stream, relay, airflow, worker, listen):
    listener = listen()
    send(stream, key="later", wait=True, reply_to="replies.test", correlation_id="c-1")
    until(lambda: ("sales", "relay__later") in airflow.runs and listener.counts.accepted)
    broker.stop()
    airflow.runs["sales", "relay__later"]["state"] = "success"
    until(lambda: relay.records.get(_only(relay, "relay__later")).ended)
    broker.start()
    until(lambda: _answers_ping(stream) and answers(stream)[-1]["what"] == "ended", 60)
    assert answers(stream)[-1]["state"] == "done"


def _only(relay: RelayClient, run_id: str) -> str:
    for key in relay.redis.scan_iter("dagrelay:record:*"):
        if relay.redis.hget(key, "dag_run_id") == run_id.encode():
            return key.decode().removeprefix("dagrelay:record:")
    raise AssertionError(run_id)


@pytest.mark.parametrize(
    "to",
    ["triggers", "jobs", "looks\x06\x163", "dagrelay:parked", "celery", "_kombu.binding.x", STREAM, DEAD],
)
def test_no_sender_writes_into_what_is_ours_even_where_answers_may_go_anywhere(
    to, stream, requests, listen, caplog
):
    listener = listen(reply_to=("*",))
    send(stream, reply_to=to, conf={"n": 1})
    until(lambda: listener.counts.accepted or listener.counts.refused)
    until(lambda: pending(stream) == 0)
    if to != STREAM:
        assert stream.exists(to) == (to == DEAD and listener.counts.refused)
    assert listener.counts.accepted == 1
    assert "answer undeliverable" in caplog.text


def test_while_redis_refuses_what_is_given_back_again_and_again_is_remembered_once(broker, valkey, stream):
    with Redis.from_url(valkey.url) as admin:
        admin.execute_command("ACL", "SETUSER", "half", "on", ">p", "~*", "&*", "+@all", "-hmget")
    relay = RelayClient(read_settings(redis_url=valkey.url.replace("://", "://half:p@"), client_name="t"))
    send_many(stream, range(5))
    with listening(broker.url, relay) as listener:
        until(lambda: listener._wait_s > 1)  # after several tries
        assert len(listener._finished) == 5


def test_a_refusal_is_told_wherever_its_message_says_where_to(stream, listen):
    wrong = {"dag_id": "sales", "config": {}}
    wish = {"reply_to": "replies.test", "correlation_id": "c"}
    event = {"specversion": "1.0", "type": "dagrelay.trigger", "source": "/s", "id": "1"}
    for body, around in (
        (wrong | wish, {}),
        (wrong, wish),
        (wrong | {"correlation_id": "c"}, {"reply_to": "replies.test"}),
        (wrong | wish, {"reply_to": "replies.other", "correlation_id": "other"}),
        (event | {"data": wrong | wish}, {}),
        (event | {"data": wrong}, wish),
        (event | {"data": [wish]}, wish),
    ):
        stream.xadd(STREAM, {"data": json.dumps(body), **around})
    listener = listen()
    until(lambda: listener.counts.refused == 7)
    assert [(told["what"], told["correlation_id"]) for told in answers(stream)] == [("refused", "c")] * 7


def test_a_place_that_can_take_no_more_answers_holds_up_nobody(stream, listen, caplog):
    stream.xadd("replies.over", {"a": "b"}, id=f"{2**64 - 1}-{2**64 - 1}")
    listener = listen()
    send(stream, reply_to="replies.over")
    send(stream, id="x" * 1000)
    until(lambda: listener.counts.accepted == 2 and pending(stream) == 0)
    assert "answer undeliverable" in caplog.text


def test_answers_of_a_service_wake_who_waits_for_them(stream, relay, listen):
    relay.waits.register("t1", [answer_key("render", "c-1"), answer_key("render", "c-2")], 60)
    listener = listen(answers="render")
    stream.xadd(STREAM, {"data": '{"state": "half"}', "correlation_id": "c-1"})
    stream.xadd(STREAM, {"data": '{"correlation_id": "c-2", "state": "done"}'})
    stream.xadd(STREAM, {"data": '{"state": "done"}', "correlation_id": "c-nobody"})
    stream.xadd(STREAM, {"data": '{"state": "done"}'})
    stream.xadd(STREAM, {"data": "no JSON", "correlation_id": "c-1"})
    until(lambda: pending(stream) == 0 and stream.xlen(DEAD) == 2)

    said = [{"state": "half"}, {"correlation_id": "c-2", "state": "done"}]
    assert relay.waits.observations("t1") == [heard(one) for one in said]
    assert (listener.counts.woken, listener.counts.late, listener.counts.refused) == (2, 1, 2)
    reasons = [fields["dead_reason"] for _, fields in stream.xrange(DEAD)]
    assert reasons[0].startswith("correlation_id: ")
    assert reasons[1].startswith("body: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_listener_that_is_asked_to_stop_finishes_what_it_has(number, stream, requests, start):
    process = start()
    send_many(stream, range(2000))
    until(lambda: requests.llen("triggers") > 100)
    process.send(number)

    assert process.wait(20) == 0
    (group,) = stream.xinfo_groups(STREAM)
    assert group["pending"] == 0
    assert group["entries-read"] == requests.llen("triggers")
    assert stream.xinfo_consumers(STREAM, GROUP) == []


def test_a_password_is_seen_neither_in_the_list_of_processes_nor_in_a_log(
    broker, stream, requests, start, tmp_path
):
    secret = tmp_path / "url"
    secret.write_text(f"redis://:{CANARY}@127.0.0.1:{broker.port}/0?stream={STREAM}\n")
    stream.config_set("requirepass", CANARY)
    stream.auth(CANARY)
    process = start(url=" ", DAGRELAY_LISTEN_URL="", DAGRELAY_LISTEN_URL_FILE=str(secret))
    send_many(stream, range(3))
    until(lambda: requests.llen("triggers") == 3)
    assert CANARY not in Path(f"/proc/{process.pid}/cmdline").read_text()
    stream.config_set("requirepass", "another")
    broker_clients = [one["id"] for one in stream.client_list() if one["name"] == "dagrelay-listener"]
    for one in broker_clients:
        stream.client_kill_filter(_id=one)
    until(lambda: "waits source=" in log_of(tmp_path))
    assert process.stop() == 0
    assert CANARY not in log_of(tmp_path)
    assert not any(CANARY in value for key in requests.scan_iter("*") for value in _whole(requests, key))


def _whole(redis: Redis, key: str) -> list[str]:
    kind = redis.type(key)
    if kind == "list":
        return [key, *redis.lrange(key, 0, -1)]
    if kind == "hash":
        return [key, *redis.hgetall(key).values()]
    return [key]


def test_a_wrong_source_is_told_before_anything_is_begun(start, tmp_path):
    rules = tmp_path / "rules.toml"
    process = start(
        "--rules",
        str(rules),
        url="redis://:geheim@127.0.0.1:1/0?strem=x&claim_after_s=soon",
        DAGRELAY_REDIS_URL="",
    )
    assert process.wait(20) == 78
    text = log_of(tmp_path)
    assert "DAGRELAY_REDIS_URL is not set" in text
    assert "rules.toml" in text
    assert "unknown options ['strem']" in text
    assert "names no stream" in text
    assert "claim_after_s is a number" in text
    assert "geheim" not in text


def test_dead_consumers_go_once_they_hold_nothing(stream, requests, listen):
    stream.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    send_many(stream, range(3))
    stream.xreadgroup(GROUP, "died", {STREAM: ">"})
    stream.xgroup_createconsumer(STREAM, GROUP, "died-too")
    listen(claim_after_s=0.2)
    until(lambda: requests.llen("triggers") == 3)
    until(lambda: len(stream.xinfo_consumers(STREAM, GROUP)) == 1)

    assert accepted(requests) == [0, 1, 2]
    assert pending(stream) == 0


def test_accepted_entries_are_deleted_where_that_is_wished(broker, stream, relay, requests):
    source = source_for(f"{broker.url}?stream={STREAM}&delete=yes")
    send_many(stream, range(3))
    got = source.receive(2, 0.1)
    source.done(got)
    source.refuse(source.receive(2, 0.1)[0], "for a test")
    assert stream.xlen(STREAM) == 0
    assert stream.xlen(DEAD) == 1
    source.close()


def test_what_is_given_back_counts_as_not_delivered(broker, stream):
    source = source_for(f"{broker.url}?stream={STREAM}&claim_after_s=60")
    send_many(stream, range(3))
    for _ in range(3):
        got = source.receive(5, 0.1)
        assert [one.deliveries for one in got] == [1, 1, 1]
        source.give_back(got)
    other = source_for(f"{broker.url}?stream={STREAM}&claim_after_s=60")
    assert [one.deliveries for one in other.receive(5, 0.1)] == [1, 1, 1]
    source.close()
    other.close()


def test_only_one_of_two_listeners_tells_an_end(stream, airflow, worker, broker, relay):
    # What one has taken the other takes for left behind after so long, and answers it as well.
    with (
        listening(broker.url, relay, claim_after_s=60),
        listening(broker.url, relay, claim_after_s=60),
    ):
        for number in range(50):
            send(stream, reply_to="replies.test", correlation_id=f"c-{number}")
        until(lambda: sum(one["what"] == "ended" for one in answers(stream)) >= 50, 60)
        until(lambda: untold(stream, relay) == 0)
    ended = [one["correlation_id"] for one in answers(stream) if one["what"] == "ended"]
    assert sorted(ended) == sorted(f"c-{number}" for number in range(50))


def test_answers_are_bounded_and_requests_to_a_service_are_not(broker, monkeypatch):
    """A service that is behind would else lose the jobs that were asked of it first."""
    monkeypatch.setattr("producers.queues.redis_stream.MOST_ANSWERS", 100)
    client = Redis.from_url(broker.url)
    for keep_all, stream in ((False, "replies"), (True, "render-jobs")):
        source = publisher_for(broker.url, keep_all=keep_all)
        for _ in range(400):
            source.publish(stream, b"{}", correlation_id=None, headers={})
        source.close()
    assert client.xlen("replies") < 300
    assert client.xlen("render-jobs") == 400
