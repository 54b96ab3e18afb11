"""on_end: whoever is to hear of an end hears of it, signed, once more and more until it is heard."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner
from redis import Redis
from standardwebhooks import Webhook as Official

from local.valkey import Valkey
from producers.cli import main
from producers.client import RelayClient
from producers.contract import PollRequest, TriggerRequest
from producers.fan_out import fan_out
from producers.stores.letters import dead_key
from producers.stores.records import record_key, store
from tests.fake_airflow import FakeAirflow
from tests.integration.test_trigger import until
from tests.webhook_receiver import Got, WebhookReceiver
from tests.worker import Worker

pytestmark = pytest.mark.integration

SECRET = "whsec_" + base64.b64encode(b"the first key of the receiver").decode()
NEWER = "whsec_" + base64.b64encode(b"another key of the receiver").decode()
TEXT = "a-secret-of-the-github-kind"
HEADER = "a-secret-in-a-header"
CONF = "c4n4ry-of-the-conf"

PAUSES = "0.2,0.2,0.2,0.2"


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    with WebhookReceiver() as server:
        yield server


@pytest.fixture
def start(
    start_worker: Callable[..., Worker], airflow: FakeAirflow, receiver: WebhookReceiver
) -> Callable[..., Worker]:
    """Start a worker that knows the receiver as several hooks."""

    def hook(**given: Any) -> str:
        url = f"{receiver.url}/hooks/s3cret-path?token=s3cret-query"
        return json.dumps({"url": url, "secret": SECRET, "read_timeout_s": 1, **given})

    env = {
        "DAGRELAY_HOOK_BILLING": hook(headers={"X-Api-Key": HEADER}),
        "DAGRELAY_HOOK_BOTH": hook(secret=None, secrets=[NEWER, SECRET]),
        "DAGRELAY_HOOK_CODE": hook(secret=TEXT, scheme="github"),
        "DAGRELAY_HOOK_EVENTS": hook(format="cloudevents"),
        "DAGRELAY_HOOK_OPEN": hook(secret=None, scheme="none"),
        "DAGRELAY_DELIVERY_PAUSES_S": PAUSES,
        "DAGRELAY_LOOK_UP_EVERY_S": "1",
        "DAGRELAY_RETRY_CAP_S": "0.2",
    }

    def started(**more: Any) -> Worker:
        uri = f"{airflow.conn_uri}/?read_timeout_s=1&timed_out_slot_s=1"
        return start_worker(**{"connections": {"default": uri}, **env, **more})

    return started


def told(receiver: WebhookReceiver, task_id: str, times: int = 1) -> list[Got]:
    until(lambda: len(receiver.of(task_id)) >= times)
    return receiver.of(task_id)


def test_an_end_is_told_to_each_hook_in_its_own_way(relay, start, receiver, airflow):
    worker = start()
    hooks = ["billing", "both", "code", "events", "open"]
    handle = relay.enqueue(TriggerRequest("daily_sales", {"password": CONF}, key="k1", on_end=hooks))
    got = told(receiver, handle.id, 5)
    by_kind = {("webhook-id" in one.headers, one.headers["content-type"]): one for one in got}
    assert len({one.id for one in got if "webhook-id" in one.headers}) == 3

    plain = [one for one in got if one.headers["content-type"] == "application/json"]
    assert len(plain) == 4
    for one in plain:
        assert one.event["type"] == "dagrelay.request.ended"
        assert datetime.fromisoformat(one.event["timestamp"]).tzinfo is not None
        data = one.event["data"]
        assert (data["state"], data["dag_id"], data["dag_run_id"]) == ("done", "daily_sales", "relay__k1")
        assert data["run"]["created"] is True
        assert one.path == "/hooks/s3cret-path?token=s3cret-query"
    assert all(len(one.body) < 20_000 for one in got)
    assert CONF not in str([one.body for one in got])

    billing = next(one for one in got if one.headers.get("x-api-key") == HEADER)
    Official(SECRET).verify(billing.body, billing.headers)
    both = next(one for one in got if one.headers.get("webhook-signature", "").count("v1,") == 2)
    for secret in (SECRET, NEWER):  # a receiver has one of them
        Official(secret).verify(both.body, both.headers)
    code = next(one for one in got if "x-hub-signature-256" in one.headers)
    expected = hmac.new(TEXT.encode(), code.body, hashlib.sha256).hexdigest()
    assert code.headers["x-hub-signature-256"] == f"sha256={expected}"
    event = by_kind[True, "application/cloudevents+json"]
    Official(SECRET).verify(event.body, event.headers)
    assert (event.event["specversion"], event.event["id"]) == ("1.0", event.id)
    assert (event.event["type"], event.event["subject"]) == ("dagrelay.request.ended", handle.id)

    # Nothing secret is in Redis or in a log.
    until(lambda: worker.text().count("webhook delivered") == 5)
    everything = worker.text() + redis_text(relay.redis)
    for secret in (SECRET, NEWER, TEXT, HEADER, "s3cret-path", "s3cret-query"):
        assert secret.removeprefix("whsec_") not in everything
    assert CONF not in worker.text()


def redis_text(redis: Redis) -> str:
    """Return all that lies in Redis, as text."""
    return "".join(str(redis.dump(name)) for name in redis.scan_iter("*"))


def test_a_failure_is_told_with_its_reason(relay, start, receiver):
    start()
    handle = relay.enqueue(TriggerRequest("daily_sales", connection="nowhere", on_end=["billing"]))
    (got,) = told(receiver, handle.id)
    data = got.event["data"]
    assert (data["state"], data["error"]) == ("failed", "ConnectionNotConfigured")
    assert "AIRFLOW_CONN_NOWHERE" in data["reason"]


def test_a_cancelled_one_is_told_of(relay, start, receiver):
    start()
    handle = relay.enqueue(TriggerRequest("daily_sales", on_end=["billing"]), countdown=600)
    until(lambda: relay.waits.cancel_many([handle.id], "me"))
    (got,) = told(receiver, handle.id)
    assert got.event["data"]["state"] == "cancelled"


def test_a_job_is_told_of(relay, start, receiver):
    start()
    handle = relay.enqueue(PollRequest(service="nowhere", path="/jobs/1", on_end=["billing"]))
    (got,) = told(receiver, handle.id)
    assert got.event["data"]["error"] == "ServiceNotConfigured"


def test_one_that_fails_is_told_again_with_the_same_id_and_a_new_signature(relay, start, receiver):
    start(DAGRELAY_DELIVERY_PAUSES_S="1.1,0.2,0.2")
    receiver.answer = lambda number, got: (204, {}) if number > 3 else (503, {})
    handle = relay.enqueue(TriggerRequest("daily_sales", on_end=["billing"]))
    got = told(receiver, handle.id, 4)
    assert len({one.id for one in got}) == 1
    assert len({one.body for one in got}) == 1
    assert len({one.headers["webhook-timestamp"] for one in got}) >= 2
    for one in got:
        Official(SECRET).verify(one.body, one.headers)
    time.sleep(0.5)
    assert len(receiver.of(handle.id)) == 4
    assert not list(relay.dead.list())


def test_retry_after_is_honoured(relay, start, receiver):
    start()
    receiver.answer = lambda number, got: (204, {}) if number > 1 else (429, {"retry-after": "2"})
    handle = relay.enqueue(TriggerRequest("daily_sales", on_end=["billing"]))
    first, second = told(receiver, handle.id, 2)
    assert second.at - first.at >= 1.9


@pytest.mark.parametrize("what", ["slow", "redirect", "refused"])
def test_what_is_no_yes_is_tried_again(what, relay, start, receiver):
    start()
    elsewhere = f"{receiver.url}/elsewhere"

    def answer(number: int, got: Got) -> tuple[int, dict[str, str]]:
        if number > 1:
            return 200, {}
        if what == "slow":
            time.sleep(2)
            return 200, {}
        return (307, {"location": elsewhere}) if what == "redirect" else (404, {})

    receiver.answer = answer
    handle = relay.enqueue(TriggerRequest("daily_sales", on_end=["billing"]))
    got = told(receiver, handle.id, 2)
    assert {one.path for one in got} == {"/hooks/s3cret-path?token=s3cret-query"}
    assert len({one.id for one in got}) == 1


def test_at_the_end_it_is_a_dead_letter_whose_replay_tells_it_again(relay, start, receiver):
    worker = start(DAGRELAY_DELIVERY_PAUSES_S="0.1,0.1")
    receiver.answer = lambda number, got: (500, {})
    handle = relay.enqueue(TriggerRequest("daily_sales", {"a": CONF}, on_end=["billing"]))
    (letter,) = until(lambda: list(relay.dead.list()))
    assert letter.id == f"{handle.id}.end.billing"
    assert (letter.error, letter.dag_id, letter.attempts) == ("WebhookNotDelivered", "daily_sales", 3)
    assert letter.told == "hook 'billing' could not be told, tried 3 times: it answered 500"
    whole = relay.dead.get(letter.id)
    assert [words for _, words in whole.history] == [
        f"attempt {n} failed: it answered 500" for n in (1, 2, 3)
    ]
    assert CONF not in str(whole)
    assert len(told(receiver, handle.id, 3)) == 3
    assert relay.record(handle.id).state == "done"  # the request is not concerned
    ttl_s = [relay.redis.ttl(key) for key in (record_key(handle.id), dead_key(letter.id))]
    assert ttl_s[0] > ttl_s[1]  # a replay reads in the record what is to be told
    until(lambda: "webhook given up" in worker.text())

    receiver.answer = lambda number, got: (204, {})
    relay.dead.replay(letter.id)
    got = told(receiver, handle.id, 4)
    assert len({one.id for one in got}) == 1
    assert not list(relay.dead.list())


def test_gone_is_believed_at_once(relay, start, receiver):
    start()
    receiver.answer = lambda number, got: (410, {})
    handle = relay.enqueue(TriggerRequest("daily_sales", on_end=["billing"]))
    (letter,) = until(lambda: list(relay.dead.list()))
    assert "wants no more" in letter.told
    assert len(receiver.of(handle.id)) == 1


def test_a_hook_that_is_not_known_is_a_dead_letter_that_says_what_to_set(relay, start, receiver):
    worker = start()
    handle = relay.enqueue(TriggerRequest("daily_sales", on_end=["nobody", "billing"]))
    told(receiver, handle.id)
    (letter,) = until(lambda: list(relay.dead.list()))
    assert "set DAGRELAY_HOOK_NOBODY there" in letter.told
    worker.stop()
    start(name="w2", DAGRELAY_HOOK_NOBODY=json.dumps({"url": receiver.url, "scheme": "none"}))
    relay.dead.replay(letter.id)
    assert any("webhook-id" not in one.headers for one in told(receiver, handle.id, 2))


def test_the_death_of_its_worker_delays_it_and_no_more(relay, start, receiver):
    worker = start(
        DAGRELAY_VISIBILITY_TIMEOUT_S="3",
        DAGRELAY_HOOK_BILLING=json.dumps({"url": receiver.url, "secret": SECRET, "read_timeout_s": 20}),
    )

    def answer(number: int, got: Got) -> tuple[int, dict[str, str]]:
        if number == 1:
            time.sleep(5)
        return 204, {}

    receiver.answer = answer
    handle = relay.enqueue(TriggerRequest("daily_sales", on_end=["billing"]))
    told(receiver, handle.id)
    worker.kill()
    start(name="w2", DAGRELAY_VISIBILITY_TIMEOUT_S="3")
    got = told(receiver, handle.id, 2)
    assert len({one.id for one in got}) == 1


def test_a_frozen_receiver_leaves_threads_for_others(relay, start, receiver):
    start(DAGRELAY_WORKER_CONCURRENCY="8")

    def answer(number: int, got: Got) -> tuple[int, dict[str, str]]:
        time.sleep(0.9)
        return 204, {}

    receiver.answer = answer
    handles = [relay.enqueue(TriggerRequest("daily_sales", on_end=["billing"])) for _ in range(12)]
    until(lambda: len(receiver.got) >= 2)
    relay.enqueue(TriggerRequest("weekly")).get(timeout=60)
    assert len(receiver.got) < len(handles)
    for handle in handles:
        until(lambda handle=handle: receiver.of(handle.id), timeout_s=60)


def test_who_comes_past_our_door_is_told_too(valkey: Valkey, start, receiver):
    """In a host's own canvas the message is the host's: no script of ours has begun a record."""
    start()
    host = Celery("host", broker=valkey.url, backend=valkey.url, set_as_current=False)
    sent = host.send_task(
        "tasks.trigger_dag", kwargs={"dag_id": "daily_sales", "on_end": ["Billing"]}, queue="triggers"
    )
    (got,) = told(receiver, sent.id)
    assert got.event["data"]["state"] == "done"
    failed = host.send_task(
        "tasks.trigger_dag",
        kwargs={"dag_id": "d", "connection": "x", "on_end": ["billing"]},
        queue="triggers",
    )
    (got,) = told(receiver, failed.id)
    assert got.event["data"]["error"] == "ConnectionNotConfigured"
    invalid = host.send_task(
        "tasks.trigger_dag", kwargs={"dag_id": 7, "on_end": ["billing", 8, "\n"]}, queue="triggers"
    )
    (got,) = told(receiver, invalid.id)
    assert got.event["data"]["error"] == "InvalidRequest"


def test_a_backlog_is_told_of_whole(valkey: Valkey, relay: RelayClient, start, receiver):
    """Long lines are drained without Celery; what came past our door among them too."""
    host = Celery("host", broker=valkey.url, backend=valkey.url, set_as_current=False)
    ids = [
        handle.id
        for handle in relay.enqueue_many(TriggerRequest("daily_sales", on_end=["billing"]) for _ in range(60))
    ]
    ids += [
        host.send_task(
            "tasks.trigger_dag", kwargs={"dag_id": "d", "on_end": ["billing"]}, queue="triggers"
        ).id
        for _ in range(20)
    ]
    start()
    until(lambda: len({one.event["data"]["id"] for one in list(receiver.got)}) == 80, timeout_s=60)
    assert {one.event["data"]["id"] for one in receiver.got} == set(ids)


def test_each_part_of_a_fan_out_is_told_of(relay, start, receiver):
    start()
    made = fan_out(
        [TriggerRequest("daily_sales", key=f"k{n}", on_end=["billing"] if n % 2 else []) for n in range(20)],
        relay=relay,
    )
    made.get(timeout=60)
    until(lambda: len({one.event["data"]["id"] for one in list(receiver.got)}) == 10)
    assert {one.event["data"]["key"] for one in receiver.got} == {f"k{n}" for n in range(1, 20, 2)}


def test_a_correction_is_told_as_one(relay, start, receiver):
    """An unknown outcome is told, and later that its run was there after all."""
    start()
    handle = relay.enqueue(TriggerRequest("daily_sales", on_end=["billing"]), countdown=600)
    end = {"error": "OutcomeUnknown", "error_args": '["d","r","lost"]', "reason": "unknown"}
    store(relay.redis, handle.id, result="{}", result_ttl_s=60, state="failed", found=end)
    (first,) = told(receiver, handle.id)
    assert (first.event["type"], first.event["data"]["error"]) == ("dagrelay.request.ended", "OutcomeUnknown")
    run = {"run": '{"dag_run_id": "r", "state": "success"}', "reason": ""}
    store(relay.redis, handle.id, result="{}", result_ttl_s=60, state="done", found=run, correct=True)
    _, second = told(receiver, handle.id, 2)
    assert second.event["type"] == "dagrelay.request.corrected"
    assert (second.event["data"]["state"], second.event["data"]["run"]["state"]) == ("done", "success")
    assert "error" not in second.event["data"]
    assert second.id != first.id


def test_the_command_shows_the_letter_and_sends_it_again(relay, start, receiver):
    start(DAGRELAY_DELIVERY_PAUSES_S="0.1")
    receiver.answer = lambda number, got: (500, {})
    handle = relay.enqueue(TriggerRequest("daily_sales", on_end=["billing"]))
    until(lambda: list(relay.dead.list()))
    env = {"DAGRELAY_REDIS_URL": relay.settings.redis_url}
    shown = CliRunner().invoke(main, ["dead", "show", f"{handle.id}.end.billing"], env=env)
    assert shown.exit_code == 0
    assert "could not be told, tried 2 times" in shown.output
    assert "to tell a hook how a request ended" in shown.output
    receiver.answer = lambda number, got: (204, {})
    sent = CliRunner().invoke(main, ["dead", "replay", f"{handle.id}.end.billing", "--yes"], env=env)
    assert sent.exit_code == 0, sent.output
    told(receiver, handle.id, 3)
