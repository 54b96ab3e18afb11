"""The desk for failures: what fails for good lies there, and is sent again, once."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain
from click.testing import CliRunner, Result
from redis import Redis

from local.process import free_port
from local.valkey import Valkey
from producers.cli import main
from producers.client import RelayClient
from producers.contract import DagRun, PollRequest, TriggerRequest, reference_for
from producers.errors import (
    AlreadyReplayed,
    DeadLetterUnknown,
    InvalidRequest,
    NotReplayable,
    Quarantined,
    RequestCancelled,
    RequestRejected,
    ResultNotReady,
)
from producers.fan_out import fan_out
from producers.handle import Handle
from producers.settings import ProducerSettings
from producers.stores.dead import Letter
from producers.stores.fan_outs import watch_id
from producers.stores.letters import DEAD, DROPPED, dead_key
from producers.stores.records import STORE_DEAD, Record, record_key, store
from tests.fake_airflow import FakeAirflow
from tests.fake_service import FakeService
from tests.integration.test_trigger import until
from tests.worker import Worker

CRASH = Path(__file__).with_name("crash")
CANARY = "c4n4ry-s3cret"
OK, FAILED, USAGE, WRONG_REQUEST, NOTHING, TRY_AGAIN = 0, 1, 2, 65, 66, 75
REFUSED = (400, {"detail": "Invalid input for param day: No value passed"})
QUICK = {
    "DAGRELAY_MISSING_GRACE_S": "0.2",
    "DAGRELAY_RETRY_CAP_S": "0.3",
    "DAGRELAY_LOOK_UP_EVERY_S": "1",
    "DAGRELAY_FAN_OUT_WATCH_S": "0.2",
    "DAGRELAY_VISIBILITY_TIMEOUT_S": "3",
}
JOB: dict[str, Any] = {
    "service": "train",
    "path": "/jobs/{job_id}",
    "submit": {"path": "/jobs", "body": {"ref": "{reference}", "words": CANARY}},
    "interval_s": 0.2,
    "max_interval_s": 0.5,
}

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def parts(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Valkey, FakeAirflow, FakeService]]:
    folder = tmp_path_factory.mktemp("desk")
    with Valkey() as valkey, FakeAirflow() as airflow, FakeService() as service:
        connections = {"default": f"{airflow.conn_uri}/?read_timeout_s=1"}
        connections["away"] = f"http://u:p@127.0.0.1:{free_port()}"
        env = {"DAGRELAY_SERVICE_TRAIN": service.variable, "DAGRELAY_FIND_FOR_S": "0.5", **QUICK}
        with Worker(valkey.url, folder, connections=connections, **env):
            yield valkey, airflow, service


@pytest.fixture
def worked(parts) -> FakeAirflow:
    """This module's worker, with an Airflow and a service as good as new, and an empty desk."""
    valkey, airflow, service = parts
    airflow.forget()
    service.forget()
    with Redis.from_url(valkey.url) as client:
        for name in client.scan_iter(match=f"{DEAD}*"):
            client.delete(name)
    return airflow


@pytest.fixture
def valkey(request: pytest.FixtureRequest) -> Iterator[Valkey]:
    if "worked" in request.fixturenames:
        yield request.getfixturevalue("parts")[0]
        return
    with Valkey() as server:
        yield server


@pytest.fixture
def airflow(request: pytest.FixtureRequest) -> Iterator[FakeAirflow]:
    if "worked" in request.fixturenames:
        yield request.getfixturevalue("worked")
        return
    with FakeAirflow() as server:
        yield server


@pytest.fixture
def service(parts, worked) -> FakeService:
    return parts[2]


@pytest.fixture
def dagrelay(valkey: Valkey) -> Command:
    """Run the command in this process."""

    def run(*args: str, stdin: str = "", **env: str) -> Result:
        given = {"DAGRELAY_REDIS_URL": valkey.url, "DAGRELAY_CLIENT_NAME": "op@desk", **env}
        told = CliRunner().invoke(main, args, input=stdin, env=given)
        assert told.exception is None or isinstance(told.exception, SystemExit), told.exception
        if "--with-conf" not in args:
            assert CANARY not in told.output
        return told

    return run


def rejected(
    relay: RelayClient, airflow: FakeAirflow, key: str | None = None, **given: Any
) -> Handle[DagRun]:
    """A request that has failed for good, because Airflow refused it."""
    airflow.rejecting["strict"] = REFUSED
    request = TriggerRequest("strict", {"day": CANARY}, key=key, **given)
    handle = relay.enqueue(request)
    with pytest.raises(RequestRejected):
        handle.get(timeout=60)
    airflow.rejecting.clear()
    return handle


def letter_of(relay: RelayClient, handle: Handle[Any]) -> Letter:
    found = relay.dead.get(handle.id)
    assert found is not None
    return found


def new_id(told: Result) -> str:
    assert told.exit_code == OK, told.output
    found = re.search(r"replayed as (\S+)$", told.stdout, re.M)
    assert found, told.output
    return found[1]


# What fails lies on the desk


def test_what_went_well_leaves_no_letter(relay, worked, valkey):
    relay.enqueue(TriggerRequest("daily_sales")).get(timeout=60)

    assert not list(relay.redis.scan_iter(match=f"{DEAD}*"))


def missing(airflow: FakeAirflow) -> None:
    airflow.missing.add("dag")


def broken(airflow: FakeAirflow) -> None:
    airflow.broken.add("dag")


def refusing(airflow: FakeAirflow) -> None:
    airflow.rejecting["dag"] = REFUSED


def taken(airflow: FakeAirflow) -> None:
    airflow.make("dag", "relay__k", conf={"another": 1})


def there(airflow: FakeAirflow) -> None:
    airflow.make("dag", "relay__k", conf={"day": CANARY})


def away(airflow: FakeAirflow) -> None:
    """Nothing listens where the connection `away` leads."""


def busy(airflow: FakeAirflow) -> None:
    airflow.fault = lambda number, dag_id, run_id: "503"


def failing(airflow: FakeAirflow) -> None:
    airflow.make("dag", "relay__k", conf={"day": CANARY}, state="failed")


@pytest.mark.parametrize(
    ("spoil", "given", "error", "words"),
    [
        (missing, {}, "DagNotFound", "Dag with dag_id: 'dag' not found"),
        (broken, {}, "DagBroken", "has import errors"),
        (refusing, {}, "RequestRejected", "No value passed"),
        (taken, {}, "RunConflict", "another conf"),
        (there, {"if_exists": "fail"}, "RunExists", "exists already"),
        (away, {"connection": "away", "give_up_after_s": 0.5}, "GaveUp", "refused"),
        (busy, {"give_up_after_s": 0.5}, "OutcomeUnknown", "is unknown"),
        (failing, {"wait": True}, "DagRunFailed", "failed"),
        (missing, {"connection": "nowhere"}, "ConnectionNotConfigured", "AIRFLOW_CONN_NOWHERE"),
    ],
)
def test_each_failure_of_a_trigger_lies_there_in_its_words(spoil, given, error, words, relay, worked, valkey):
    spoil(worked)
    handle = relay.enqueue(TriggerRequest("dag", {"day": CANARY}, key="k", **given))
    until(handle.ready)

    (letter,) = relay.dead.list()
    assert (letter.id, letter.error, letter.key, letter.dag_id) == (handle.id, error, "k", "dag")
    assert words in letter.reason
    assert letter.reason == handle.record().reason
    assert (letter.dag_run_id, letter.connection) == ("relay__k", given.get("connection", "default"))
    whole = letter_of(relay, handle)
    assert whole.request["kwargs"]["conf"] == {"day": CANARY}
    assert relay.redis.ttl(dead_key(handle.id)) > 13 * 86_400


def hung(service: FakeService) -> None:
    service.first_state = "running"


def refused(service: FakeService) -> None:
    service.fault = lambda number, body: "422"


def dropped(service: FakeService) -> None:
    service.fault = lambda number, body: "drop"


def failed(service: FakeService) -> None:
    service.first_state = "failed"


@pytest.mark.parametrize(
    ("spoil", "given", "error", "words"),
    [
        (refused, {}, "SubmitRejected", "no such train"),
        (dropped, {"submit_once": True}, "SubmitUnknown", "our reference"),
        (failed, {}, "ExternalJobFailed", "ended as 'failed'"),
        (hung, {"timeout_s": 0.5}, "ExternalJobOverdue", "had not ended"),
    ],
)
def test_each_failure_of_a_job_lies_there_in_its_words(spoil, given, error, words, relay, service, valkey):
    spoil(service)
    handle = relay.enqueue(PollRequest(**{**JOB, **given}))
    until(handle.ready)

    (letter,) = relay.dead.list(service="Train")
    assert (letter.id, letter.error, letter.service) == (handle.id, error, "train")
    assert words in letter.reason
    assert letter.reference == reference_for(handle.id)
    assert letter_of(relay, handle).request["kwargs"]["submit"] == JOB["submit"]


def test_a_job_that_is_gone_lies_there(relay, service, valkey):
    handle = relay.enqueue(PollRequest(**JOB))
    until(lambda: handle.record().seen == "running")
    del service.jobs["job-1"]
    until(handle.ready)

    (letter,) = relay.dead.list()
    assert (letter.error, letter.job_id) == ("ExternalJobGone", "job-1")


def test_what_expired_before_it_was_begun_lies_there_too_and_a_cancel_does_not(relay, start_worker):
    expired = relay.enqueue(TriggerRequest("daily_sales", key="e"), expires=0.05)
    cancelled = relay.enqueue(TriggerRequest("daily_sales", key="c"), expires=3600)
    cancelled.cancel()
    until(lambda: relay.redis.time()[0] > expired.record().accepted_at + 1)
    start_worker()
    for handle in (expired, cancelled):
        with pytest.raises(RequestCancelled):
            handle.get(timeout=60)

    (letter,) = relay.dead.list()
    assert (letter.id, letter.error) == (expired.id, "Expired")
    assert relay.dead.replay(letter.id).get(timeout=60).dag_run_id == "relay__e"


def test_a_letter_has_the_history_of_its_attempts_and_where_it_failed(relay, worked, valkey):
    worked.fault = lambda number, dag_id, run_id: "503" if number < 3 else "answer"
    handle = relay.enqueue(TriggerRequest("strict", {"day": CANARY}))
    worked.rejecting["strict"] = REFUSED
    with pytest.raises(RequestRejected):
        handle.get(timeout=60)

    letter = letter_of(relay, handle)
    assert [what.partition(":")[0] for _, what in letter.history] == ["attempt 1 failed", "attempt 2 failed"]
    assert letter.attempts == 3
    assert letter.accepted_at < letter.history[0][0] < letter.at
    assert "tasks/trigger.py" in letter.traceback
    assert letter.traceback.endswith(f"producers.errors.RequestRejected: {letter.reason}")


def test_a_part_of_a_fan_out_lies_there_with_its_request_and_names_it(relay, worked, valkey):
    worked.rejecting["strict"] = REFUSED
    fan = fan_out([{"dag_id": "daily_sales"}, {"dag_id": "strict", "conf": {"day": CANARY}}], relay=relay)
    outcomes = fan.get(timeout=60)

    assert [one.state for one in outcomes] == ["done", "failed"]
    (letter,) = relay.dead.list(fan_out=fan.id)
    assert (letter.id, letter.error) == (fan.handles[1].id, "RequestRejected")
    worked.rejecting.clear()
    run = relay.dead.replay(letter.id).get(timeout=60)
    assert run.dag_run_id == f"relay__{letter.id}"
    assert worked.runs["strict", run.dag_run_id]["conf"] == {"day": CANARY}


def test_a_broken_fan_out_lies_there_and_each_of_its_requests_can_be_sent_again(
    relay, start_worker, airflow, dagrelay
):
    fan = fan_out([{"dag_id": "daily_sales", "conf": {"n": n}} for n in range(3)], relay=relay)
    relay.redis.delete("triggers")  # somebody purged the queue
    relay.redis.zadd("dagrelay:due", {watch_id(fan.id): 0}, xx=True)
    start_worker(**QUICK)
    until(lambda: fan.ready() and all(handle.ready() for handle in fan.handles))

    letters = {letter.id: letter for letter in relay.dead.list(fan_out=fan.id, error="FanOutBroken")}
    assert letters.keys() == {fan.id, *(handle.id for handle in fan.handles)}
    with pytest.raises(NotReplayable, match="letters of their own"):
        relay.dead.replay(fan.id)
    told = dagrelay("dead", "replay", "--fan-out", fan.id, "--yes")
    assert told.exit_code == OK
    assert "it is a whole fan-out" in told.stderr
    for line in told.stdout.splitlines():
        relay.handle(line.split()[-1]).get(timeout=60)
    assert sorted(run["conf"]["n"] for run in airflow.runs.values()) == [0, 1, 2]


def test_what_lost_its_message_is_told_and_cannot_be_sent_again(relay, dagrelay):
    store(relay.redis, "t", result="{}", result_ttl_s=60, state="failed", letter={}, found=RECORD)

    with pytest.raises(NotReplayable, match="its message was lost from Redis"):
        relay.dead.replay("t")
    told = dagrelay("dead", "replay", "t", "--yes")
    assert told.exit_code == FAILED
    assert "left: its message was lost" in told.stderr


# To see them


def test_the_desk_is_listed_shown_and_counted_without_a_value_of_a_conf(relay, worked, dagrelay):
    handle = rejected(relay, worked, key="k1")

    listed = dagrelay("dead", "list")
    assert listed.exit_code == OK
    assert handle.id in listed.stdout
    assert "RequestRejected" in listed.stdout
    assert "Invalid input for param day" in listed.stdout
    assert "1 shown, 1 on the desk, 0 replayed" in listed.stderr
    (as_json,) = [json.loads(line) for line in dagrelay("dead", "list", "-o", "json").stdout.splitlines()]
    assert (as_json["id"], as_json["dag_id"], as_json["key"]) == (handle.id, "strict", "k1")
    assert dagrelay("dead", "list", "--count").stdout.split() == ["1", "RequestRejected"]

    shown = dagrelay("dead", "show", handle.id)
    assert "conf=<day; 23 bytes>" in shown.stdout
    assert "traceback" in shown.stdout
    assert f"dagrelay dead replay {handle.id}" in shown.stdout
    assert CANARY in dagrelay("dead", "show", handle.id, "--with-conf").stdout
    whole = json.loads(dagrelay("dead", "show", handle.id, "--with-conf", "-o", "json").stdout)
    assert whole["request"]["kwargs"]["conf"] == {"day": CANARY}
    assert "request" not in json.loads(dagrelay("dead", "show", handle.id, "-o", "json").stdout)

    status = dagrelay("status", handle.id)
    assert f"dagrelay dead replay {handle.id}" in status.stdout
    assert json.loads(dagrelay("status", handle.id, "-o", "json").stdout)["dead_letter"]["at"] > 0


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (("--dag", "strict"), "one other"),
        (("--dag", "nothing"), ""),
        (("--error", "RequestRejected"), "one other"),
        (("--error", "DagNotFound"), ""),
        (("--connection", "Default"), "one other"),
        (("--connection", "eu"), ""),
        (("--service", "train"), ""),
        (("--key-prefix", "on"), "one"),
        (("--reason", "no VALUE"), "one other"),
        (("--reason", "nothing like it"), ""),
        (("--since", "1h"), "one other"),
        (("--since", "2100-01-01T00:00:00Z"), ""),
        (("--until", "1h"), ""),
        (("--until", "2100-01-01T00:00:00+01:00", "--key-prefix", "oth"), "other"),
        (("--fan-out", "none"), ""),
    ],
)
def test_filters_say_which_and_those_that_match_nothing_say_so(filters, found, relay, worked, dagrelay):
    for key in ("one", "other"):
        rejected(relay, worked, key=key)

    told = dagrelay("dead", "list", *filters, "-o", "json")
    keys = {json.loads(line)["key"] for line in told.stdout.splitlines()}
    assert keys == set(found.split())
    assert told.exit_code == (OK if found else NOTHING)
    replayed = dagrelay("dead", "replay", *filters, "--dry-run", "--no-look")
    discarded = dagrelay("dead", "discard", *filters, "--dry-run")
    assert {replayed.exit_code, discarded.exit_code} == {OK if found else NOTHING}
    if not found:
        assert "no dead letter matches" in told.stderr
        assert "no dead letter matches" in replayed.stderr
        assert "no dead letter matches" in discarded.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("replay",), USAGE, "give ids, or filters, or --all"),
        (("replay", "an-id", "--all"), USAGE, "give ids, or filters, or --all"),
        (("discard", "--dag", "d", "--all"), USAGE, "give ids, or filters, or --all"),
        (("replay", "--all", "--yes"), NOTHING, "there is no dead letter"),
        (("replay", "an-id", "--yes"), NOTHING, "there is no dead letter an-id"),
        (("discard", "an-id", "--yes"), NOTHING, "there is no dead letter an-id"),
        (("show", "an-id"), NOTHING, "there is no dead letter an-id"),
        (("edit", "an-id", "--unset", "note"), NOTHING, "there is no dead letter an-id"),
        (("edit", "an-id"), USAGE, "--set, --unset or --editor"),
        (("list", "--since", "yesterday"), WRONG_REQUEST, "--since: give 90s, 20m, 2h or 3d"),
        (("list", "--until", "2026-01-01"), WRONG_REQUEST, "--until: give"),
    ],
)
def test_what_is_not_there_or_not_understood_is_told(args, code, words, dagrelay):
    told = dagrelay("dead", *args)

    assert told.exit_code == code
    assert words in told.stderr


def test_an_empty_desk_is_no_error(dagrelay):
    told = dagrelay("dead", "list")

    assert (told.exit_code, told.stdout) == (OK, "")
    assert "0 shown, 0 on the desk" in told.stderr


# To send them again


def test_a_replay_makes_the_one_run_of_the_old_key(relay, worked, dagrelay):
    old = rejected(relay, worked, key="k", note="for the audit")

    told = dagrelay("dead", "replay", old.id, "--yes")

    new = relay.handle(new_id(told))
    assert "run relay__k is started" in told.stderr
    run = new.get(timeout=60)
    assert (run.dag_run_id, run.created) == ("relay__k", True)
    assert new.id != old.id
    record = new.record()
    assert (record.replay_of, record.by, record.key) == (old.id, "op@desk", "k")
    assert record.accepted_at > old.record().ended_at
    assert list(worked.runs) == [("strict", "relay__k")]
    assert worked.runs["strict", "relay__k"]["conf"] == {"day": CANARY}
    assert "for the audit" in worked.runs["strict", "relay__k"]["note"]
    letter = letter_of(relay, old)
    assert (letter.replayed_as, letter.replayed_by) == (new.id, "op@desk")
    assert not list(relay.dead.list())
    assert [one.id for one in relay.dead.list(replayed=True)] == [old.id]
    assert "0 shown, 0 on the desk, 1 replayed" in dagrelay("dead", "list").stderr
    assert new.id in dagrelay("dead", "list", "--replayed").stdout
    assert f"dagrelay status {new.id}" in dagrelay("status", old.id).stdout
    assert f"replayed as {new.id} by op@desk" in dagrelay("status", old.id).stdout


def test_a_request_without_a_key_keeps_its_run_id_through_all_replays(relay, worked, valkey):
    first = rejected(relay, worked)
    worked.rejecting["strict"] = REFUSED
    second = relay.dead.replay(first.id)
    with pytest.raises(RequestRejected):
        second.get(timeout=60)
    worked.rejecting.clear()

    letter = letter_of(relay, second)
    assert (letter.replay_of, letter.dag_run_id) == (first.id, f"relay__{first.id}")
    assert relay.dead.replay(second.id).get(timeout=60).dag_run_id == f"relay__{first.id}"
    assert list(worked.runs) == [("strict", f"relay__{first.id}")]


def test_what_was_replayed_is_not_replayed_again_and_says_so(relay, worked, dagrelay):
    old = rejected(relay, worked, key="k")
    new = relay.dead.replay(old.id)

    with pytest.raises(AlreadyReplayed) as caught:
        relay.dead.replay(old.id)
    assert caught.value.replayed_as == new.id
    for command in (("replay", old.id, "--yes"), ("edit", old.id, "--unset", "key", "--yes")):
        told = dagrelay("dead", *command)
        assert told.exit_code == FAILED
        assert f"replayed already, as {new.id}" in told.stderr
        assert told.stdout == ""
    assert worked.posts["strict", "relay__k"] <= 2  # the one refused, and the replay


def test_two_operators_at_once_replay_each_letter_once(relay, worked, valkey):
    ids = [rejected(relay, worked, key=f"k{n}").id for n in range(5)]
    desks = [
        RelayClient(ProducerSettings(redis_url=valkey.url, client_name=f"op{n}@desk")).dead for n in range(4)
    ]
    with ThreadPoolExecutor(len(desks)) as pool:
        told = [one for some in pool.map(lambda desk: desk.replay_many(ids), desks) for one in some]

    sent = [one for one in told if one.error is None]
    assert sorted(one.letter_id for one in sent) == sorted(ids)
    assert all(isinstance(one.error, AlreadyReplayed) for one in told if one not in sent)
    made = {one.letter_id: one.task_id for one in sent}
    assert all(one.error.replayed_as == made[one.letter_id] for one in told if one.error is not None)
    for one in sent:
        assert relay.handle(one.task_id).get(timeout=60).created
    assert len(worked.runs) == 5


def test_a_replay_whose_answer_was_lost_is_repeated_as_itself(relay, worked, valkey):
    old = rejected(relay, worked, key="k")
    made = relay.dead._made(old.id, None, None)

    first, again = (relay.dead.store.replay([(old.id, made)], "op")[0] for _ in range(2))

    assert first == again == ("sent", made.task_id)
    assert relay.handle(made.task_id).get(timeout=60).created


def test_in_bulk_what_would_happen_is_said_first(relay, worked, dagrelay):
    ids = {rejected(relay, worked, key=f"k{n}").id for n in range(3)}
    left = rejected(relay, worked, key="z")

    dry = dagrelay("dead", "replay", "--key-prefix", "k", "--dry-run")
    assert dry.exit_code == OK
    assert "3 to be sent" in dry.stdout
    assert {line.split()[0] for line in dry.stdout.splitlines()[:-1]} == ids
    refused = dagrelay("dead", "replay", "--key-prefix", "k", stdin="n\n")
    assert refused.exit_code == FAILED
    assert "Send 3 requests?" in refused.stderr
    assert len(list(relay.dead.list())) == 4

    told = dagrelay("dead", "replay", "--key-prefix", "k", "-o", "json", stdin="y\n")
    assert told.exit_code == OK
    sent = [json.loads(line) for line in told.stdout.splitlines()]
    assert {one["id"] for one in sent} == ids
    for one in sent:
        relay.handle(one["replayed_as"]).get(timeout=60)
    assert [letter.id for letter in relay.dead.list()] == [left.id]


def test_a_job_is_submitted_anew_by_another_key(relay, service, dagrelay):
    service.fault = lambda number, body: "422" if number == 1 else "answer"
    old = relay.enqueue(PollRequest(**JOB))
    until(old.ready)

    told = dagrelay("dead", "replay", "--service", "train", "--yes")

    new = relay.handle(new_id(told))
    assert "anew at train, by a new key" in told.stderr
    until(lambda: service.jobs)
    service.end("job-1")
    assert new.get(timeout=60).job_id == "job-1"
    assert [key for key, _ in service.posts] == [reference_for(old.id), reference_for(new.id)]


def test_the_rest_of_a_chain_and_the_callbacks_go_on_after_a_replay(relay, worked, valkey):
    stock = Celery("else", broker=valkey.url, set_as_current=False)

    def trigger(dag_id: str, **given: Any) -> Any:
        return stock.signature("tasks.trigger_dag", kwargs={"dag_id": dag_id, **given}, queue="triggers")

    worked.rejecting["first"] = REFUSED
    called = trigger("called", key="called").set(immutable=True)
    sent = chain(
        trigger("first", key="1").set(link=called), trigger("second", key="2"), trigger("third")
    ).apply_async()
    first = relay.handle(sent.parent.parent.id)
    with pytest.raises(RequestRejected):
        first.get(timeout=60)
    until(relay.handle(sent.id).ready)

    (letter,) = relay.dead.list()  # and none of what was to follow: it goes with the first
    assert letter.id == first.id
    worked.rejecting.clear()
    relay.dead.replay(first.id).get(timeout=60)

    until(lambda: len(worked.runs) == 4)
    dags = {dag_id: run["conf"] for (dag_id, _), run in worked.runs.items()}
    assert dags.keys() == {"first", "called", "second", "third"}
    assert dags["second"]["dag_run_id"] == "relay__1"
    assert dags["third"]["dag_run_id"] == "relay__2"
    thirds = [one for one in everything(relay) if one.dag_id == "third" and one.dag_run_id is not None]
    assert len(thirds) == 2  # the one that failed with the first, and its successor
    until(lambda: sorted(relay.handle(one.task_id).state for one in thirds) == ["done", "failed"])


def everything(relay: RelayClient) -> list[Record]:
    names = [
        name.decode().removeprefix(record_key("")) for name in relay.redis.scan_iter("dagrelay:record:*")
    ]
    return [found for name in names if (found := relay.record(name)) is not None]


# A run that exists


@pytest.mark.parametrize("choice", ["reuse", "clear"])
def test_where_the_run_exists_that_is_said_before_anything_is_sent(choice, relay, worked, dagrelay):
    old = rejected(relay, worked, key="k")
    worked.make(
        "strict", "relay__k", conf={"day": CANARY}, state="failed", start_date="2026-11-20T00:00:00+00:00"
    )

    without = dagrelay("dead", "replay", old.id, "--yes")
    assert without.exit_code == USAGE
    assert "run relay__k exists (failed)" in without.stderr
    assert "--if-exists reuse or clear" in without.stderr
    assert letter_of(relay, old).replayed_as is None

    if choice == "clear":
        told = dagrelay("dead", "replay", old.id, "--yes", "--if-exists", "clear")
        assert "exists (failed) and is cleared" in told.stderr
    else:
        told = dagrelay("dead", "replay", old.id, stdin="reuse\ny\n")
        assert "1 of the runs are there already: reuse or clear them?" in told.stderr
    run = relay.handle(new_id(told)).get(timeout=60)
    assert (run.created, run.cleared) == (False, choice == "clear")
    assert worked.cleared["strict", "relay__k"] == (choice == "clear")


def test_a_choice_is_for_the_runs_that_were_there_alone(relay, worked, dagrelay):
    there = rejected(relay, worked, key="there")
    away = rejected(relay, worked, key="away")
    worked.make("strict", "relay__there", conf={"day": CANARY}, state="success")

    told = dagrelay("dead", "replay", there.id, away.id, "--yes", "--if-exists", "clear", "-o", "json")

    sent = {one["id"]: one["replayed_as"] for one in map(json.loads, told.stdout.splitlines())}
    runs = {name: relay.handle(task_id).get(timeout=60) for name, task_id in sent.items()}
    assert runs[there.id].cleared
    assert runs[away.id].created
    asked = {name: relay.redis.hget(record_key(task_id), "replay_of") for name, task_id in sent.items()}
    assert asked == {name: name.encode() for name in sent}


def test_what_cannot_be_found_out_is_told_and_goes_on(relay, worked, dagrelay):
    old = rejected(relay, worked, key="k", connection="default")
    worked.silent = True

    dry = dagrelay("dead", "replay", old.id, "--dry-run")

    assert dry.exit_code == OK
    assert "whether it exists is not known: Airflow unavailable" in dry.stdout
    assert "of 1 it is not known" in dry.stdout


def test_without_a_worker_nobody_looks_and_that_is_told(relay, dagrelay):
    store(relay.redis, "t", result="{}", result_ttl_s=60, state="failed", letter=LETTER, found=RECORD)

    told = dagrelay("dead", "replay", "t", "--yes", "--look-timeout", "0.2")
    assert told.exit_code == TRY_AGAIN
    assert "is one running?" in told.stderr
    assert "--no-look" in told.stderr
    assert relay.dead.get("t").replayed_as is None
    with pytest.raises(ResultNotReady):
        relay.dead.look({"t": ("default", "d", "r")}, timeout_s=0.1)

    told = dagrelay("dead", "replay", "t", "--yes", "--no-look")
    assert relay.record(new_id(told)).dag_run_id == "relay__t"


RECORD = {
    "task": "tasks.trigger_dag",
    "dag_id": "d",
    "dag_run_id": "relay__t",
    "error": "GaveUp",
    "reason": "r",
}
LETTER = {
    "request": json.dumps({"task": "tasks.trigger_dag", "args": [], "kwargs": {"v": 1, "dag_id": "d"}}),
}


def test_many_runs_are_looked_at_in_pages_and_the_preview_names_some(relay, worked, dagrelay):
    for n in range(120):
        about = {**RECORD, "dag_run_id": f"relay__{n}"}
        store(relay.redis, f"t{n}", result="{}", result_ttl_s=60, state="failed", letter=LETTER, found=about)
        if n % 3 == 0:
            worked.make("d", f"relay__{n}", state="success" if n % 2 else "failed")

    dry = dagrelay("dead", "replay", "--all", "--dry-run")

    assert dry.exit_code == OK
    assert "… and 100 more" in dry.stdout
    assert "120 to be sent; 40 of their runs exist (20 failed, 20 success)" in dry.stdout
    assert "t119  d: run relay__119 is started" in dry.stdout
    assert "t117  d: run relay__117 exists (success)" in dry.stdout
    assert not [*relay.redis.scan_iter("dagrelay:look:*")]


# To mend them


def test_a_request_is_mended_and_sent_again(relay, worked, dagrelay):
    old = rejected(relay, worked, note="wrong")

    told = dagrelay(
        *("dead", "edit", old.id, "--yes"),
        *("--set", 'conf.day="2026-01-01"', "--set", "conf.deep.er=1", "--set", "note=right", "--unset"),
        *("conf.none", "--unset", "note"),
    )
    assert told.exit_code == WRONG_REQUEST
    assert "conf.none: is not there" in told.stderr

    told = dagrelay(
        *("dead", "edit", old.id, "--yes", "--set", 'conf.day="2026-01-01"', "--set", "conf.deep.er=1"),
        *("--set", "give_up_after_s=60", "--unset", "note"),
    )
    run = relay.handle(new_id(told)).get(timeout=60)
    assert "changed: conf, give_up_after_s, note" in told.stderr
    assert run.dag_run_id == f"relay__{old.id}"  # it is still the same
    made = worked.runs["strict", run.dag_run_id]
    assert made["conf"] == {"day": "2026-01-01", "deep": {"er": 1}}
    assert "wrong" not in made["note"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--set", "conf=5"), "conf: is of type int"),
        (("--set", "dag_id=no good"), "dag_id: is no DAG id"),
        (("--set", "colour=red"), "colour: is no argument of this request"),
        (("--set", "give_up_after_s=soon"), "give_up_after_s: "),
        (("--set", "conf.day.hour=1"), "conf.day: is no object"),
        (("--set", "note"), "--set: is no FIELD=VALUE"),
        (("--unset", "note"), "note: is not there"),
        (("--unset", "dag_id"), "dag_id: "),
    ],
)
def test_a_wrong_change_is_told_by_the_name_of_its_field_and_nothing_is_lost(
    changes, words, relay, worked, dagrelay
):
    old = rejected(relay, worked, key="k")
    before = relay.redis.hgetall(dead_key(old.id))

    told = dagrelay("dead", "edit", old.id, "--yes", *changes)

    assert told.exit_code == WRONG_REQUEST
    assert words in told.stderr
    assert relay.redis.hgetall(dead_key(old.id)) == before
    assert [letter.id for letter in relay.dead.list()] == [old.id]


def test_a_request_that_was_invalid_is_mended(relay, worked, dagrelay, valkey):
    stock = Celery("else", broker=valkey.url, set_as_current=False)
    sent = stock.send_task(
        "tasks.trigger_dag", (), {"dag_id": "daily_sales", "cnof": {"a": 1}}, queue="triggers"
    )
    until(relay.handle(sent.id).ready)
    assert letter_of(relay, relay.handle(sent.id)).error == "InvalidRequest"
    with pytest.raises(InvalidRequest, match="cnof"):
        relay.dead.replay(sent.id)

    told = dagrelay("dead", "edit", sent.id, "--yes", "--unset", "cnof", "--set", 'conf={"a": 1}')

    run = relay.handle(new_id(told)).get(timeout=60)
    assert run.dag_run_id == f"relay__{sent.id}"


@pytest.mark.parametrize(
    ("changes", "run_id"),
    [
        (("--set", "key=other"), "relay__other"),
        (("--set", "dag_run_id=mine"), "mine"),
        (("--unset", "dag_run_id"), None),
    ],
)
def test_another_run_is_made_where_that_is_asked_for(changes, run_id, relay, worked, dagrelay):
    old = rejected(relay, worked)

    new = new_id(dagrelay("dead", "edit", old.id, "--yes", *changes))

    assert relay.handle(new).get(timeout=60).dag_run_id == (run_id or f"relay__{new}")


EDITOR = """
import sys
from pathlib import Path
folder, path = Path(__file__).parent, Path(sys.argv[1])
number = len(list(folder.glob("asked*")))
(folder / f"asked{number}").write_text(path.read_text())
path.write_text((folder / f"answer{number}").read_text())
"""


def test_the_editor_gets_the_request_until_it_is_one(relay, worked, dagrelay, tmp_path):
    old = rejected(relay, worked)
    (tmp_path / "edit.py").write_text(EDITOR)
    editor = f"{shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'edit.py'))}"
    fields = {"dag_id": "strict", "conf": {"day": CANARY}, "dag_run_id": f"relay__{old.id}"}
    wrong, right = {**fields, "give_up_after_s": -1}, {**fields, "conf": {"day": "mended"}}
    answers = ["{", "{", json.dumps(wrong), json.dumps(right)]
    for number, answer in enumerate(answers):
        (tmp_path / f"answer{number}").write_text(answer)

    def edit(stdin: str) -> Result:
        return dagrelay(
            "dead", "edit", old.id, "--editor", "--yes", stdin=stdin, VISUAL=editor, EDITOR=editor
        )

    given_up = edit("n\n")
    assert given_up.exit_code == WRONG_REQUEST
    assert "is no JSON at line 1" in given_up.stderr
    assert letter_of(relay, old).replayed_as is None

    told = edit("y\ny\n")
    assert "give_up_after_s: " in told.stderr
    relay.handle(new_id(told)).get(timeout=60)
    asked = [(tmp_path / f"asked{number}").read_text().strip() for number in range(4)]
    assert [json.loads(asked[0]), asked[2], json.loads(asked[3])] == [fields, "{", wrong]
    assert worked.runs["strict", f"relay__{old.id}"]["conf"] == {"day": "mended"}


def test_where_the_editor_saves_nothing_nothing_is_sent(relay, worked, dagrelay):
    old = rejected(relay, worked)

    told = dagrelay("dead", "edit", old.id, "--editor", "--yes", VISUAL="true", EDITOR="true")

    assert told.exit_code == FAILED
    assert "nothing was saved" in told.stderr
    assert letter_of(relay, old).replayed_as is None


# To be rid of them


def test_what_is_discarded_is_gone_and_its_history_says_by_whom(relay, worked, dagrelay):
    ids = {rejected(relay, worked, key=f"k{n}").id for n in range(2)}
    kept = rejected(relay, worked, key="kept")

    assert dagrelay("dead", "discard", "--key-prefix", "k", "--dry-run").exit_code == OK
    assert dagrelay("dead", "discard", "--all", stdin="n\n").exit_code == FAILED
    assert len(list(relay.dead.list())) == 3
    told = dagrelay("dead", "discard", *ids, "--yes")

    assert told.stdout == "2 dead letters discarded\n"
    assert [letter.id for letter in relay.dead.list()] == [kept.id]
    for gone in ids:
        with pytest.raises(DeadLetterUnknown):
            relay.dead.replay(gone)
        assert "dead letter discarded by op@desk" in dagrelay("status", gone).stdout
    assert relay.dead.discard([*ids]) == 0


# How many


def test_what_a_worker_drops_is_logged(relay, airflow, start_worker):
    airflow.rejecting["strict"] = REFUSED
    worker = start_worker(DAGRELAY_DEAD_MAX="1")
    handles = relay.enqueue_many(TriggerRequest("strict", key=f"k{n}") for n in range(3))
    until(lambda: all(handle.ready() for handle in handles))

    assert relay.dead.store.size() == 1
    assert relay.redis.get(DROPPED) == b"2"
    until(lambda: worker.text().count("dead letters dropped count=1") == 2)


# What leaves it by itself


def test_an_unknown_outcome_that_turns_out_well_leaves_the_desk(relay, worked, valkey):
    worked.fault = lambda number, dag_id, run_id: "reset"
    worked.silent = True
    handle = relay.enqueue(TriggerRequest("dag", {"day": 1}, key="k", give_up_after_s=0.3))
    until(handle.ready)
    assert letter_of(relay, handle).error == "OutcomeUnknown"

    worked.make("dag", "relay__k", conf={"day": 1}, note=f"dagrelay task={handle.id} at=x")
    worked.silent = False

    until(lambda: handle.state == "done")
    assert relay.dead.get(handle.id) is None
    assert relay.dead.store.size() == 0
    assert handle.get(timeout=5).created


# What no worker could read


def test_a_message_that_ended_each_worker_lies_there_and_is_sent_again(relay, airflow, start_worker):
    handle = relay.enqueue(TriggerRequest("daily_sales", {"day": CANARY}, key="k"))
    raw = relay.redis.lindex("triggers", 0)
    poison(relay, raw)
    worker = start_worker()

    with pytest.raises(Quarantined, match="11 workers could not end it"):
        handle.get(timeout=60)
    until(lambda: not relay.redis.exists("dagrelay:returned"))
    letter = letter_of(relay, handle)
    assert (letter.error, letter.raw, handle.state) == ("Quarantined", None, "failed")
    assert letter.request["kwargs"]["conf"] == {"day": CANARY}
    assert not relay.redis.exists("dagrelay:quarantine")
    assert CANARY not in worker.text()
    assert relay.dead.replay(handle.id).get(timeout=60).dag_run_id == "relay__k"


def poison(relay: RelayClient, raw: bytes) -> None:
    """Have a message look as if it had come back from eleven workers that died with it."""
    import hashlib

    relay.redis.hset("dagrelay:returned", hashlib.sha1(raw, usedforsecurity=False).hexdigest(), 11)


def test_a_part_of_a_fan_out_that_no_worker_could_end_is_told_to_it(relay, airflow, start_worker):
    airflow.fault = lambda number, dag_id, run_id: "503" if dag_id == "bad" else "answer"
    first = start_worker(**QUICK)
    fan = fan_out([{"dag_id": "good"}, {"dag_id": "bad"}], relay=relay)
    bad = fan.handles[1]
    until(lambda: (bad.record().attempts or 0) > 1)
    first.stop()
    raw = until(lambda: relay.redis.lindex("triggers", 0) or woken(relay, bad))
    poison(relay, raw)
    start_worker(name="w2", **QUICK)

    assert [one.state for one in fan.get(timeout=60)] == ["done", "failed"]
    assert letter_of(relay, bad).error == "Quarantined"


def woken(relay: RelayClient, handle: Handle[Any]) -> None:
    relay.waits.wake([handle.id])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\xff\xfe junk", "no JSON"),
        (b'{"headers": {"id": "an-id", "task": "tasks.trigger_dag"}, "body": "e30="}', "content-type"),
        (b'{"headers": {"id": "b\\u0000d"}, "body": 5}', "content-type"),
    ],
)
def test_what_cannot_be_read_lies_there_as_it_was_and_goes_back_as_it_was(
    raw, words, relay, worked, dagrelay
):
    relay.redis.lpush("triggers", raw)
    (letter,) = until(lambda: list(relay.dead.list()))
    assert letter.error == "Quarantined"
    assert words in letter.reason
    assert letter.id == "an-id" if b"an-id" in raw else letter.id.startswith("unread-")
    assert relay.dead.get(letter.id).raw == raw
    assert not relay.redis.exists("dagrelay:quarantine")
    assert relay.record(letter.id) is None
    assert letter.id in dagrelay("status", letter.id).stderr
    assert dagrelay("dead", "show", letter.id, "--with-conf").exit_code == OK

    dry = dagrelay("dead", "replay", letter.id, "--dry-run")
    assert "goes back to its queue as it was" in dry.stdout
    assert dagrelay("dead", "replay", letter.id, "--yes").exit_code == OK
    again = until(lambda: [one for one in relay.dead.list() if one.at > letter.at])[0]
    assert relay.dead.get(again.id).raw == raw


def test_an_open_request_whose_message_cannot_be_read_ends_with_it(relay, worked, dagrelay):
    relay.redis.hset(record_key("mine"), mapping={"state": "accepted", "task": "tasks.trigger_dag"})
    raw = b'{"headers": {"id": "mine", "task": "tasks.trigger_dag"}, "body": 5}'
    relay.redis.lpush("triggers", raw)

    with pytest.raises(Quarantined):
        relay.handle("mine").get(timeout=60)
    letter = relay.dead.get("mine")
    assert (letter.raw, letter.queue_key, letter.unrecorded) == (raw, "triggers", False)
    told = dagrelay("dead", "replay", "mine", "--yes")
    assert told.exit_code == FAILED
    assert "no worker could read its message" in told.stderr


def test_a_copy_that_cannot_be_read_changes_nothing(relay, worked, valkey):
    done = relay.enqueue(TriggerRequest("daily_sales", key="k"))
    done.get(timeout=60)
    waiting = relay.enqueue(TriggerRequest("daily_sales", key="w"), countdown=3600)
    until(lambda: relay.waits.get(waiting.id))
    relay.redis.hset(record_key(waiting.id), "retried", "2")

    for handle in (done, waiting):
        message = {"headers": {"id": handle.id, "task": "tasks.trigger_dag", "retries": 1}, "body": 5}
        relay.redis.lpush("triggers", json.dumps(message))
    relay.enqueue(TriggerRequest("daily_sales", key="after")).get(timeout=60)

    assert not list(relay.dead.list())
    assert (done.state, waiting.state) == ("done", "accepted")
    assert not relay.redis.exists("dagrelay:quarantine")


# A worker that is killed


@pytest.mark.parametrize("moment", ["before the end is written", "after it"])
def test_a_worker_killed_around_the_end_leaves_it_open_or_on_the_desk(
    moment, relay, airflow, start_worker, valkey, tmp_path
):
    relay.redis.script_load(STORE_DEAD.lua)
    airflow.rejecting["strict"] = REFUSED
    handle = relay.enqueue(TriggerRequest("strict", key="k"))
    env = {"PYTHONPATH": str(CRASH), "CRASH_NAMING": STORE_DEAD.sha, "CRASH_AFTER": "1"}
    env |= {"CRASH_BEFORE": "1"} if moment.startswith("before") else {}
    victim = start_worker(name="victim", **QUICK, **env)
    until(lambda: not victim.process.alive)

    letter = relay.dead.get(handle.id)
    assert (handle.state, letter is None) == (
        ("accepted", True) if moment.startswith("before") else ("failed", False)
    )
    start_worker(name="w2", **QUICK)
    until(lambda: handle.ready() and not relay.redis.keys("dagrelay:held:*"))
    assert [one.id for one in relay.dead.list()] == [handle.id]
    assert letter is None or relay.dead.get(handle.id) == letter


def test_a_worker_killed_as_it_puts_a_message_aside_loses_nothing(relay, airflow, start_worker):
    handle = relay.enqueue(TriggerRequest("daily_sales", key="k"))
    poison(relay, relay.redis.lindex("triggers", 0))
    relay.redis.script_load(STORE_DEAD.lua)
    env = {"PYTHONPATH": str(CRASH), "CRASH_NAMING": STORE_DEAD.sha, "CRASH_AFTER": "1", "CRASH_BEFORE": "1"}
    try:
        victim = start_worker(name="victim", **QUICK, **env)
        until(lambda: not victim.process.alive)
    except Exception:  # noqa: BLE001, S110 - it was dead before it said that it is ready
        pass
    assert handle.state == "accepted"

    start_worker(name="w2", **QUICK)
    until(handle.ready)
    assert letter_of(relay, handle).error == "Quarantined"
