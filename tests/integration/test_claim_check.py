"""Stored confs by themselves, on Valkey and on Redis 7: who holds them, until when, and who lets go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from local.process import ROOT, clean_env
from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import DagRun, PollRequest, TriggerRequest, reference_in
from producers.door import Door, Taken
from producers.errors import ConfGone, NotReplayable
from producers.fan_out import fan_out
from producers.queues.message import Incoming, read
from producers.settings import ProducerSettings
from producers.stores.claim_check import _COMPLETE, PIECE_BYTES, PROVISIONAL_S, ClaimChecks, ConfKeys
from producers.stores.fan_outs import FanOuts, Item
from producers.stores.letters import Keeping
from producers.stores.records import CONF_KEEP_S, KEEP_S, record_key, store
from tests.integration.redis_transport.conftest import either

__all__ = ["either"]

LARGE = {"rows": ["x" * 100] * 500}
ANOTHER = {"rows": ["y" * 100] * 500}
GONE = {"dagrelay_conf": f"sha256:{'0' * 64}", "bytes": 5}
RUN = json.dumps(DagRun("d", "r", "queued").to_message())
CRASH = Path(__file__).with_name("crash")


@pytest.fixture
def relay(either: Valkey) -> Iterator[RelayClient]:
    client = RelayClient(ProducerSettings(redis_url=either.url, client_name="tests@here", timeout_s=5))
    client.redis.flushdb()
    yield client
    client.redis.close()


def reference_of(relay: RelayClient, conf: dict[str, Any] = LARGE) -> str:
    return relay.confs.packed(conf, "reference").reference


def ttl(relay: RelayClient, conf: dict[str, Any] = LARGE) -> int:
    """Seconds that a stored conf has to live: -1 for ever, -2 where there is none."""
    return int(relay.redis.ttl(f"dagrelay:conf:{reference_of(relay, conf)}"))


def holders(relay: RelayClient, conf: dict[str, Any] = LARGE) -> set[str]:
    found = relay.redis.smembers(f"dagrelay:conf:{reference_of(relay, conf)}:held")
    return {one.decode() for one in found}


def end(relay: RelayClient, task_id: str, state: Any = "done", **options: Any) -> None:
    """End a request as a worker does."""
    found = {"reason": "", **({"error": "GaveUp", "error_args": "[]"} if state == "failed" else {})}
    options.setdefault("result", "{}")
    store(relay.redis, task_id, result_ttl_s=60, state=state, found=found, **options)


def message(relay: RelayClient, queue: str = "triggers") -> dict[str, Any]:
    """What a worker would take next."""
    raw = relay.redis.lindex(queue, -1)
    return json.loads(json.loads(raw)["body"])[1]


def test_a_large_conf_travels_as_a_reference_and_is_held_from_its_acceptance_to_its_end(relay):
    handle = relay.enqueue(TriggerRequest("d", LARGE))

    told = message(relay)["conf"]
    assert told == {
        "dagrelay_conf": reference_of(relay),
        "bytes": len(json.dumps(LARGE)) - len(LARGE["rows"]),
    }
    assert relay.resolve_conf(told) == LARGE
    assert (ttl(relay), holders(relay)) == (-1, {handle.id})
    assert relay.record(handle.id).conf_ref == reference_of(relay)

    end(relay, handle.id)
    assert holders(relay) == set()
    assert CONF_KEEP_S - 60 <= ttl(relay) <= CONF_KEEP_S


def test_equal_confs_are_one_and_live_until_the_last_request_has_ended(relay):
    first = relay.enqueue(TriggerRequest("d", LARGE))
    (second, third) = relay.enqueue_many([TriggerRequest("d", {**LARGE}), TriggerRequest("e", LARGE)])
    assert holders(relay) == {first.id, second.id, third.id}

    end(relay, first.id, "failed", letter={"request": "{}"}, keeping=Keeping())
    end(relay, third.id, "cancelled")
    assert (ttl(relay), holders(relay)) == (-1, {second.id})
    end(relay, second.id, conf_keep_s=5000)
    assert 4000 < ttl(relay) <= 5000


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
def test_every_end_lets_go_once_and_a_copy_that_ends_later_changes_nothing(relay, state):
    handle = relay.enqueue(TriggerRequest("d", LARGE))
    end(relay, handle.id, "waiting")
    assert ttl(relay) == -1
    end(relay, handle.id, state, conf_keep_s=1000)
    end(relay, handle.id, state, conf_keep_s=9000)
    assert 900 < ttl(relay) <= 1000


def test_what_ends_a_second_time_with_its_outcome_known_has_nothing_to_let_go(relay):
    handle = relay.enqueue(TriggerRequest("d", LARGE))
    store(
        relay.redis,
        handle.id,
        result="{}",
        result_ttl_s=60,
        state="failed",
        found={"error": "OutcomeUnknown"},
        conf_keep_s=1000,
    )
    other = relay.enqueue(TriggerRequest("d", LARGE))
    end(relay, handle.id, correct=True)
    assert (ttl(relay), holders(relay)) == (-1, {other.id})


def test_a_conf_that_came_again_while_it_was_to_expire_is_kept_again(relay):
    end(relay, relay.enqueue(TriggerRequest("d", LARGE)).id, conf_keep_s=100)
    handle = relay.enqueue(TriggerRequest("d", LARGE))
    assert (ttl(relay), holders(relay)) == (-1, {handle.id})


def test_what_a_callers_own_requests_raise_is_told_as_it_is(relay):
    def requests() -> Iterator[TriggerRequest]:
        yield TriggerRequest("d", LARGE)
        raise FileNotFoundError("the caller's file")

    with pytest.raises(FileNotFoundError):
        relay.enqueue_many(requests())
    assert not relay.redis.keys("dagrelay:record:*")


def test_the_same_call_twice_is_one_request_and_holds_once(relay):
    for _ in range(2):
        relay.enqueue(TriggerRequest("d", LARGE), task_id="t1")
    assert holders(relay) == {"t1"}
    end(relay, "t1")
    relay.enqueue(TriggerRequest("d", LARGE), task_id="t1")  # it has ended: nothing holds for it any more
    assert holders(relay) == set()
    assert ttl(relay) > 0


def test_a_run_that_hands_on_its_conf_has_it_held_and_not_stored_again(relay):
    parent = relay.enqueue(TriggerRequest("d", LARGE))
    child = relay.enqueue(TriggerRequest("e", message(relay)["conf"]))
    assert holders(relay) == {parent.id, child.id}
    assert len(relay.redis.keys("dagrelay:conf:*")) == 2


def test_a_reference_to_what_is_gone_is_refused_by_each_way_in_and_nothing_is_accepted(relay):
    wrong, good = TriggerRequest("d", GONE, key="wrong"), TriggerRequest("d", {"a": 1}, key="good")
    with pytest.raises(ConfGone, match="is no longer kept"):
        relay.enqueue(wrong)
    with pytest.raises(ConfGone):
        fan_out([wrong, good], relay=relay)
    then = {"dag_id": "d", "conf": GONE}
    with pytest.raises(ConfGone):
        relay.enqueue(PollRequest(service="s", path="/j", then=then))
    assert not relay.redis.keys("triggers")
    assert not relay.redis.keys("dagrelay:record:*")

    with pytest.raises(ConfGone):
        relay.enqueue_many([good, wrong, good])
    door = Door(relay, "orders")
    orders = [
        read(Incoming(json.dumps({"dag_id": "d", "conf": conf}).encode()), door="orders")
        for conf in (GONE, {"a": 1})
    ]
    refused, taken = door.accept([door.prepare(order) for order in orders])
    assert isinstance(refused, ConfGone)
    assert isinstance(taken, Taken)
    assert relay.redis.llen("triggers") == 3


def test_a_large_conf_is_uploaded_in_pieces_and_comes_back_whole(relay):
    conf = {"noise": os.urandom(PIECE_BYTES).hex(), "more": os.urandom(PIECE_BYTES).hex()}
    handle = relay.enqueue(TriggerRequest("d", conf))
    assert relay.resolve_conf(message(relay)["conf"]) == conf
    assert holders(relay, conf) == {handle.id}
    assert ttl(relay, conf) == -1
    assert not relay.redis.keys("*:new:*")


def test_a_producer_that_dies_between_upload_and_acceptance_leaves_what_expires(relay, either):
    code = (
        "from producers import RelayClient, TriggerRequest\n"
        "RelayClient().enqueue(TriggerRequest('d', {'rows': ['x' * 100] * 500}))"
    )
    # ACCEPT is the only command that names a record.
    crash = {"PYTHONPATH": str(CRASH), "CRASH_NAMING": "dagrelay:record:", "CRASH_AFTER": "1"}
    env = clean_env(DAGRELAY_REDIS_URL=either.url, **crash, CRASH_BEFORE="1")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=False, capture_output=True)
    assert done.returncode == -9
    assert 0 < ttl(relay) <= PROVISIONAL_S
    assert not relay.redis.keys("dagrelay:record:*")
    handle = relay.enqueue(TriggerRequest("d", LARGE))
    assert (ttl(relay), holders(relay)) == (-1, {handle.id})


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_producer_that_dies_while_it_uploads_in_pieces_leaves_what_expires(relay, either, pieces):
    code = (
        "import os\nfrom producers import RelayClient, TriggerRequest\n"
        f"RelayClient().enqueue(TriggerRequest('d', {{'noise': os.urandom({2 * PIECE_BYTES}).hex()}}))"
    )
    crash = {"PYTHONPATH": str(CRASH), "CRASH_NAMING": ":new:", "CRASH_AFTER": str(pieces)}
    env = clean_env(DAGRELAY_REDIS_URL=either.url, **crash)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=False, capture_output=True)
    assert done.returncode == -9
    (left,) = relay.redis.keys("*")
    assert b":new:" in left
    assert 0 < relay.redis.ttl(left) <= PROVISIONAL_S


def test_the_conf_of_a_trigger_that_is_to_follow_a_job_is_held_by_the_job(relay):
    request = PollRequest(service="s", path="/j", then={"dag_id": "d", "conf": LARGE})
    handle = relay.enqueue(request)
    assert reference_in(message(relay, "jobs")["then"]["conf"]) == reference_of(relay)
    assert (ttl(relay), holders(relay)) == (-1, {handle.id})
    end(relay, handle.id, "cancelled")
    assert ttl(relay) > 0


# Fan-outs


def test_a_fan_out_holds_for_all_of_its_requests_until_it_has_ended(relay):
    fan = fan_out([TriggerRequest("d", LARGE), TriggerRequest("d", ANOTHER), {"dag_id": "e"}], relay=relay)
    for conf in (LARGE, ANOTHER):
        assert (ttl(relay, conf), holders(relay, conf)) == (-1, {fan.id})
    assert relay.redis.ttl(f"dagrelay:fan-out:{fan.id}:confs") == -1

    store_ = FanOuts(relay.redis)
    ids = [handle.id for handle in fan.handles]
    store_.begin(fan.id, 0)
    store_.end_items([(ids[0], RUN)], result_ttl_s=60, date_done="")
    assert (ttl(relay), holders(relay)) == (-1, {fan.id})
    store_.leave(fan.id, 0, "triggers", [(ids[1], b"{}")])  # it may outlive the fan-out, where that breaks
    assert holders(relay, ANOTHER) == {fan.id, ids[1]}

    end(relay, fan.id, "failed")
    assert ttl(relay) > 0
    assert (ttl(relay, ANOTHER), holders(relay, ANOTHER)) == (-1, {ids[1]})
    assert not relay.redis.exists(f"dagrelay:fan-out:{fan.id}:confs")
    end(relay, ids[1])
    assert ttl(relay, ANOTHER) > 0


def test_a_fan_out_that_was_never_accepted_lets_its_confs_expire(relay):
    class Ended(Exception):
        pass

    def broken_off() -> Iterator[Item]:
        item = relay.item(TriggerRequest("d", LARGE))
        yield Item(item.task_id, item.message, "\0".join(item[4:10]) + item.more, item.conf)
        raise Ended

    with pytest.raises(Ended):
        FanOuts(relay.redis).accept(
            "f1",
            broken_off(),
            launcher=("triggers", b""),
            watch=("looks", b""),
            on_error="continue",
            then=None,
            dag_id="d",
            by="t",
        )
    assert 0 < ttl(relay) <= KEEP_S
    assert not holders(relay)


# The desk


def letter_of(relay: RelayClient, **fields: Any) -> str:
    """A dead letter of a trigger with a large conf; return its id."""
    handle = relay.enqueue(TriggerRequest("d", **{"conf": LARGE, **fields}))
    kwargs = message(relay)
    relay.redis.delete("triggers")
    request = json.dumps({"task": "tasks.trigger_dag", "args": [], "kwargs": kwargs})
    end(relay, handle.id, "failed", letter={"request": request}, keeping=Keeping())
    return handle.id


def test_a_replay_holds_the_conf_of_its_letter_anew(relay):
    letter = letter_of(relay)
    assert ttl(relay) > 0
    handle = relay.dead.replay(letter)
    assert (ttl(relay), holders(relay)) == (-1, {handle.id})
    end(relay, handle.id)
    assert ttl(relay) > 0


def test_a_letter_whose_conf_is_gone_is_not_replayed_and_stays(relay):
    letter = letter_of(relay)
    relay.redis.delete(f"dagrelay:conf:{reference_of(relay)}")
    with pytest.raises(NotReplayable, match="is no longer kept"):
        relay.dead.replay(letter)
    assert relay.dead.get(letter).replayed_as is None
    assert not relay.redis.llen("triggers")
    handle = relay.dead.replay(letter, changed={"dag_id": "d", "conf": ANOTHER})
    assert holders(relay, ANOTHER) == {handle.id}


def test_a_discarded_letter_leaves_its_conf_to_expire(relay):
    letter = letter_of(relay)
    assert relay.dead.discard([letter]) == 1
    assert 0 < ttl(relay) <= CONF_KEEP_S


# What came past our door


def test_a_request_past_our_door_holds_what_it_refers_to_when_it_is_taken_up(relay):
    parent = relay.enqueue(TriggerRequest("d", LARGE))
    confs = ClaimChecks(relay.redis, ConfKeys())
    confs.hold(reference_of(relay), "foreign")
    end(relay, parent.id)
    assert (ttl(relay), holders(relay)) == (-1, {"foreign"})
    assert relay.record("foreign").state == "accepted"
    end(relay, "foreign")
    assert ttl(relay) > 0
    confs.hold(reference_of(relay), "foreign")  # a copy of the message: it has ended
    assert holders(relay) == set()
    with pytest.raises(ConfGone):
        confs.hold(GONE["dagrelay_conf"], "later")
    assert not relay.redis.exists(record_key("later"))


def test_an_upload_whose_answers_were_lost_is_repeated_and_stores_the_same(relay):
    conf = {"noise": os.urandom(2 * PIECE_BYTES).hex()}
    packed = relay.confs.packed(conf, "reference")
    blob = packed.blob()
    key, new = f"dagrelay:conf:{packed.reference}", f"dagrelay:conf:{packed.reference}:new:x"

    for start in [*range(0, len(blob), PIECE_BYTES), PIECE_BYTES, 0]:
        relay.redis.setrange(new, start, blob[start : start + PIECE_BYTES])
    for _ in range(2):
        assert _COMPLETE.run(relay.redis, (key, new), (len(blob), PROVISIONAL_S)) == 1

    assert relay.redis.get(key) == blob
    assert relay.resolve_conf(packed.conf) == conf
