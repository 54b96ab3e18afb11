"""Hooks come from the environment; every mistake is named, no secret is shown; what is told is thin."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest

from producers.errors import ConfigurationError
from producers.stores.records import Record
from tasks.hooks import Hook, hook_sender, read_hooks
from tasks.results import _whom_to_tell
from tasks.settings import WorkerSettings, read_settings
from tasks.webhooks import MAX_PLACE_WAIT_S, MAX_RUN_BYTES, NoPlace, Places, WebhookTask, delivery, told_of

CANARY = "c4n4ry-s3cret-of-a-test"
SECRET = "whsec_" + base64.b64encode(b"a key of 24 bytes or more").decode()
URL = "https://billing.example:8443/hooks/ends?token=" + CANARY


def hook(**given: object) -> Hook:
    found, mistakes = read_hooks(
        {"DAGRELAY_HOOK_BILLING": json.dumps({"url": URL, "secret": SECRET, **given})}
    )
    assert not mistakes
    return found["billing"]


def mistakes(value: object) -> list[str]:
    text = value if isinstance(value, str) else json.dumps(value)
    found, wrong = read_hooks({"DAGRELAY_HOOK_BILLING": text})
    assert not found
    assert wrong
    assert all(line.startswith("DAGRELAY_HOOK_BILLING: ") for line in wrong)
    assert CANARY not in str(wrong)
    return wrong


def test_json_says_all_of_it(tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text(f"{SECRET}\n{SECRET}\n")
    found = hook(secret=None, secret_file=str(secrets), headers={"X-Api-Key": CANARY}, read_timeout_s=5)
    assert (found.id, found.server) == ("billing", "https://billing.example:8443")
    assert found.path == f"/hooks/ends?token={CANARY}"
    assert (len(found.keys), found.scheme, found.format, found.read_timeout_s) == (2, "standard", "json", 5)
    assert CANARY not in repr(found)
    assert CANARY not in repr(hook(scheme="github", secret=CANARY))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (URL, "is no JSON"),
        ({"secret": SECRET}, "has no url"),
        ({"url": "ftp://x", "secret": SECRET}, "has no url"),
        ({"url": "https://u:p@host/x", "secret": SECRET}, "the url has a user"),
        ({"url": "https://host/a b", "secret": SECRET}, "the url's path is none"),
        ({"url": URL}, 'give one of secret, secrets and secret_file, or scheme "none"'),
        ({"url": URL, "secret": SECRET, "secrets": [SECRET]}, "give one of secret, secrets"),
        ({"url": URL, "secret": CANARY}, "secret: number 1 is no base64"),
        ({"url": URL, "secret": SECRET, "scheme": "none"}, "nothing is signed"),
        ({"url": URL, "secrets": [CANARY, CANARY], "scheme": "github"}, "signs with one"),
        ({"url": URL, "secrets": [7]}, "secrets holds no text"),
        ({"url": URL, "secret_file": "/nowhere"}, "secret_file cannot be read"),
        ({"url": URL, "secret": SECRET, "headers": {"Webhook-Id": "x"}}, "headers has Webhook-Id"),
        (
            {"url": URL, "secret": SECRET, "headers": {"Host": "x"}},
            "headers has one that no request may carry",
        ),
        ({"url": URL, "secret": SECRET, "format": "xml"}, "format is none of json, cloudevents"),
        ({"url": URL, "secret": SECRET, "retries": 3}, "has no use for 'retries'"),
    ],
)
def test_every_mistake_is_said_by_name_and_shows_no_secret(value, words):
    assert any(words in line for line in mistakes(value))


def test_the_worker_names_them_all_at_the_start():
    env = {
        "DAGRELAY_REDIS_URL": "redis://127.0.0.1:1/0",
        "DAGRELAY_HOOK_A": "{}",
        "DAGRELAY_DELIVERY_PAUSES_S": "5,x",
    }
    with pytest.raises(ConfigurationError) as raised:
        read_settings(env)
    assert "DAGRELAY_HOOK_A: has no url" in str(raised.value)
    assert "DAGRELAY_DELIVERY_PAUSES_S is '5,x'" in str(raised.value)
    env = {**env, "DAGRELAY_HOOK_A": json.dumps({"url": URL, "scheme": "none"})}
    found = read_settings({**env, "DAGRELAY_DELIVERY_PAUSES_S": "5, 30"})
    assert found.delivery_pauses_s == (5.0, 30.0)
    assert list(found.hooks) == ["a"]


def test_the_pauses_are_about_a_day():
    assert 23 < sum(WorkerSettings.delivery_pauses_s) / 3600 < 26


def test_a_sender_goes_to_the_server_alone():
    assert hook_sender(hook()).base_url == "https://billing.example:8443"


ENDED = Record(
    "t1", state="done", task="tasks.trigger_dag", dag_id="d", dag_run_id="r", ended_at=1e9, attempts=1
)


def test_what_is_told_is_thin():
    run = {"dag_run_id": "r", "state": "success", "url": "http://x", "result": {"secret": CANARY}}
    told = told_of(replace(ENDED, run=run))
    assert told["run"] == {"dag_run_id": "r", "state": "success", "url": "http://x"}
    assert told["ended_at"] == "2001-09-09T01:46:40.000+00:00"
    assert "run" not in told_of(replace(ENDED, run={"url": "x" * MAX_RUN_BYTES}))
    long = replace(
        ENDED, state="failed", error="GaveUp", reason="x" * 50_000, key="k" * 250, job_id="j" * 50_000
    )
    assert len(json.dumps(told_of(long))) < 20_000


def test_the_words_of_errors_that_are_not_ours_are_not_told():
    """They may quote a value of the conf."""
    told = told_of(replace(ENDED, state="failed", error="KeyError", reason=CANARY))
    assert (told["error"], "reason" in told) == ("KeyError", False)
    assert "reason" not in told_of(replace(ENDED, state="failed", error="TaskFailed", reason=CANARY))
    assert told_of(replace(ENDED, state="failed", error="GaveUp", reason="why"))["reason"] == "why"


def test_the_id_of_a_delivery_is_the_same_on_each_attempt_and_another_for_each_hook_and_correction():
    def id_of(receiver: Hook, found: Record, at: float) -> str:
        return delivery(receiver, found, at=at).headers["webhook-id"]

    first = id_of(hook(), ENDED, 1.0)
    assert id_of(hook(), ENDED, 2.0) == first
    others = {
        id_of(replace(hook(), id="other"), ENDED, 1.0),
        id_of(hook(), replace(ENDED, corrected_at=2e9), 1.0),
        id_of(hook(), replace(ENDED, task_id="t2"), 1.0),
    }
    assert len({first, *others}) == 4


def test_those_that_find_no_place_come_again_one_after_the_other():
    places = Places(2)
    waits = []
    with places.one(), places.one():
        for _ in range(5):
            with pytest.raises(NoPlace) as raised, places.one():
                pass
            waits.append(raised.value.wait_s)
    # A place took 0.1 s, and there are two: one every 0.05 s, which is what each attempt here took.
    assert all(0 < wait_s < 1 for wait_s in waits)
    with places.one():
        pass  # and it is free again


def test_thousands_that_wait_for_a_frozen_receiver_do_not_all_come_at_once():
    places = Places(1)
    places._took_s = 15.0
    waits = [places._wait_s() for _ in range(1000)]
    assert waits[0] == pytest.approx(15, abs=1)
    assert waits[:10] == sorted(waits[:10])
    assert max(waits) <= MAX_PLACE_WAIT_S
    assert len({round(wait_s) for wait_s in waits[100:]}) > 50


def test_nothing_but_names_is_shown_of_a_message():
    shown = WebhookTask().shown((), {"task_id": "t", "hook": "h", "tried": [[1, CANARY]]}, "t.end.h")
    assert shown == "task_id='t', hook='h'"


@pytest.mark.parametrize("hooks", [None, "billing", [], [7], ["a b"], ["x\n"], {"a": 1}])
def test_only_names_of_hooks_are_told(hooks):
    class Request:
        task, kwargs = "tasks.trigger_dag", {"on_end": hooks}

    assert _whom_to_tell("t", Request()) == {}
