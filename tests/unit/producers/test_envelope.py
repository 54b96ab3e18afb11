"""What we push is what Celery would have sent: compared with the Celery that is installed.

Our message is written by hand, so a release of Celery or kombu that changes the protocol must fail here.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery, chain
from celery.worker.request import Request
from hypothesis import given
from hypothesis import strategies as st
from kombu import Connection, Queue
from kombu.transport import redis as kombu_redis
from kombu.transport.virtual import Message

from producers.client import PRIORITY_SEPARATOR, PRIORITY_STEPS, RelayClient, new_task_id
from producers.contract import QUEUE_TRIGGERS, TRIGGER_DAG, TriggerRequest
from producers.errors import InvalidRequest
from producers.settings import ProducerSettings

CANARY = "c4n4ry-s3cret"
SALES = TriggerRequest("daily_sales", {"day": "2026-11-20", "secret": CANARY, "ü": "\x07\u2028😀"}, key="k/1")

# Headers that newer releases of Celery add, and which a worker takes as absent.
THEIRS = {"replaced_task_nesting", "stamped_headers", "stamps"}


@pytest.fixture(scope="module")
def app() -> Celery[Any]:
    """A stock Celery app, with a task of our name."""
    app = Celery("stock", broker="memory://", set_as_current=False)

    @app.task(name=TRIGGER_DAG, shared=False)
    def trigger_dag(*args: Any, **kwargs: Any) -> None: ...

    return app


def through_kombu(app: Celery[Any], message: bytes) -> Message:
    """Push a message as it lies in Redis into kombu's own machinery, and take it out as a worker does."""
    with Connection("memory://") as connection:
        channel = connection.default_channel
        queue = Queue("triggers", channel=channel)
        queue.declare()
        # As kombu's Redis transport reads a list: loads(), then the Message class of the channel.
        channel._put("triggers", kombu_redis.loads(message))
        taken = queue.get(no_ack=True, accept=["json"])
        queue.delete()
    assert taken is not None
    return taken


def test_kombu_and_celery_read_our_message_as_they_read_their_own(app, nobody):
    item = nobody.item(SALES, task_id="t1")

    taken = through_kombu(app, item.message)
    request = Request(taken, app=app, task=app.tasks[TRIGGER_DAG])

    assert (request.id, request.name, request.root_id) == ("t1", TRIGGER_DAG, "t1")
    assert list(request.args) == []
    assert TriggerRequest.from_message(request.kwargs) == SALES
    assert request.kwargs["asked"]["by"] == "billing@host-7"
    assert request.correlation_id == "t1"
    assert request.delivery_info["routing_key"] == QUEUE_TRIGGERS
    assert request.delivery_info["priority"] == 0
    assert taken.content_type == "application/json"
    assert taken.delivery_tag == "t1"
    assert CANARY not in request.kwargsrepr


@pytest.mark.parametrize("options", [{}, {"ignore_result": True}, {"expires": 600, "countdown": 5}])
def test_our_headers_properties_and_body_are_those_that_celery_makes_for_the_same_call(app, nobody, options):
    ours = through_kombu(app, nobody.item(SALES, task_id="t1", **options).message)
    sent = json.loads(ours.body)

    theirs = app.amqp.as_task_v2(
        "t1",
        TRIGGER_DAG,
        args=(),
        kwargs=sent[1],
        root_id="t1",
        origin="billing@host-7",
        argsrepr="()",
        kwargsrepr=SALES.shown("t1"),
        **options,
    )

    expected, found = dict(theirs.headers), dict(ours.headers)
    for name in ("eta", "expires"):
        assert (found[name] is None) == (expected[name] is None)
        if expected[name]:
            apart = datetime.fromisoformat(found.pop(name)) - datetime.fromisoformat(expected.pop(name))
            assert abs(apart) < timedelta(seconds=30)
    assert not found.keys() - expected.keys()
    assert expected.keys() - found.keys() <= THEIRS
    assert {name: found[name] for name in expected.keys() & found.keys()} == {
        name: expected[name] for name in expected.keys() & found.keys()
    }
    for name in expected.keys() - found.keys():
        assert not expected[name]  # absent is the same as what they send
    assert {name: ours.properties[name] for name in theirs.properties} == theirs.properties
    assert sent == json.loads(json.dumps(theirs.body))


def test_the_envelope_is_the_one_that_kombu_writes_to_redis(app, nobody):
    """Beside the encoding of the body: kombu's own base64 is for bytes, and ours are text."""
    with Connection("memory://") as connection:
        channel = connection.default_channel
        theirs = channel.prepare_message(
            "{}", priority=0, content_type="application/json", content_encoding="utf-8", headers={}
        )
        channel._inplace_augment_message(theirs, "", "triggers")
    ours = json.loads(nobody.item(SALES, task_id="t1").message)

    assert ours.keys() == theirs.keys()
    assert theirs["properties"].keys() - {"body_encoding"} <= ours["properties"].keys()
    assert ours["properties"]["delivery_info"] == theirs["properties"]["delivery_info"]


def test_priorities_are_the_lists_of_kombus_redis_transport(nobody):
    assert list(PRIORITY_STEPS) == kombu_redis.PRIORITY_STEPS
    assert kombu_redis.Channel.sep == PRIORITY_SEPARATOR
    queues = {priority: nobody.item(SALES, priority=priority).queue for priority in range(10)}

    assert queues[0] == queues[2] == "triggers"
    assert queues[3] == queues[5] == "triggers\x06\x163"
    assert queues[9] == "triggers\x06\x169"


@given(
    task_id=st.text(min_size=1, max_size=200).filter(str.isprintable),
    name=st.text(max_size=30).filter(str.isprintable),
    conf=st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3),
)
def test_no_text_breaks_the_envelope(task_id, name, conf):
    nobody = RelayClient(ProducerSettings(redis_url="redis://127.0.0.1:1/0", client_name=name))
    try:
        request = TriggerRequest("d", conf)
    except InvalidRequest:
        return
    message = json.loads(nobody.item(request, task_id=task_id).message)

    assert message["headers"]["id"] == message["properties"]["delivery_tag"] == task_id
    assert message["headers"]["origin"] == name
    assert json.loads(message["body"])[1].get("conf", {}) == conf


def test_a_task_id_is_a_random_uuid():
    made = [uuid.UUID(new_task_id()) for _ in range(1000)]

    assert {(one.version, one.variant) for one in made} == {(4, uuid.RFC_4122)}
    assert len(set(made)) == 1000


# Options


def headers(nobody: RelayClient, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(nobody.item(SALES, **options).message)["headers"]
    return found


def test_a_wait_is_an_eta_and_the_workers_park_it(nobody):
    now = datetime.now(UTC)
    for options in ({"countdown": 3600}, {"eta": now + timedelta(hours=1)}):
        due = datetime.fromisoformat(headers(nobody, **options)["eta"])

        assert abs((due - now).total_seconds() - 3600) < 30


def test_a_hook_that_is_named_twice_is_told_once(nobody):
    item = nobody.item(TriggerRequest(dag_id="a", on_end=["billing", "Billing", "audit"]))
    assert item.more.count('"hook\\":\\"') == 2


def test_an_eta_that_is_past_is_at_once(nobody):
    assert headers(nobody, eta=datetime(2000, 1, 1, tzinfo=UTC))["eta"] is None


def test_give_up_counts_from_when_the_request_is_due(nobody):
    message = json.loads(json.loads(nobody.item(SALES, countdown=100).message)["body"])[1]

    assert message["asked"]["due"] == pytest.approx(message["asked"]["at"] + 100)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"countdown": -1}, "countdown: "),
        ({"countdown": float("nan")}, "countdown: "),
        ({"countdown": float("inf")}, "countdown: "),
        ({"countdown": CANARY}, "countdown: "),
        ({"countdown": True}, "countdown: "),
        ({"eta": datetime(2030, 1, 1)}, "eta: give a datetime with its time zone"),
        ({"eta": CANARY}, "eta: "),
        ({"eta": datetime.max.replace(tzinfo=timezone(timedelta(hours=-12)))}, "eta: is more than"),
        ({"eta": datetime(9000, 1, 1, tzinfo=UTC)}, "eta: is more than a hundred years away"),
        ({"eta": datetime(2030, 1, 1, tzinfo=UTC), "countdown": 1}, "countdown and eta: give one"),
        ({"expires": 0}, "expires: "),
        ({"expires": datetime(2030, 1, 1)}, "expires: "),
        ({"expires": CANARY}, "expires: "),
        ({"priority": 10}, "priority: "),
        ({"priority": -1}, "priority: "),
        ({"priority": "1"}, "priority: "),
        ({"priority": True}, "priority: "),
        ({"priority": {"password": CANARY}}, "priority: "),
        ({"task_id": ""}, "task_id: "),
        ({"task_id": "a\nb"}, "task_id: "),
        ({"task_id": CANARY * 20}, "task_id: "),
        ({"task_id": 5}, "task_id: "),
        ({"link": CANARY}, "link: "),
        ({"link": [{"task": "a"}, {"token": CANARY}]}, "link: "),
        ({"link_error": [{}]}, "link_error: "),
    ],
)
def test_a_wrong_option_is_told_by_its_name_and_without_its_value(nobody, options, words):
    with pytest.raises(InvalidRequest) as caught:
        nobody.item(SALES, **options)

    assert words in str(caught.value)
    assert CANARY not in str(caught.value)


def test_callbacks_travel_as_celery_reads_them(app, nobody):
    callback = app.signature("host.done", args=("x",), options={"queue": "host"})

    embed = json.loads(json.loads(nobody.item(SALES, link=callback, link_error=[callback]).message)["body"])[
        2
    ]

    for name in ("callbacks", "errbacks"):
        assert app.signature(embed[name][0]) == json.loads(json.dumps(callback))


def test_a_callback_goes_to_the_queue_of_its_own_app(nobody):
    host = Celery("host", set_as_current=False)
    host.conf.update(task_default_queue="mine", task_routes={"host.report": {"queue": "reports"}})
    done = host.signature("host.done")
    several = chain(host.signature("host.report"), done, app=host)
    given = [
        done,
        host.signature("host.report"),
        done.clone().set(queue="other"),
        {"task": "no.app"},
        several,
    ]

    embed = json.loads(json.loads(nobody.item(SALES, link=given).message)["body"])[2]["callbacks"]

    assert [one.get("options", {}).get("queue") for one in embed] == ["mine", "reports", "other", None, None]
    assert [one["options"]["queue"] for one in embed[4]["kwargs"]["tasks"]] == ["reports", "mine"]
    assert "queue" not in done.options  # the caller's own is as it was

    several.set(queue="all")
    (one,) = json.loads(json.loads(nobody.item(SALES, link=several).message)["body"])[2]["callbacks"]
    assert one["options"]["queue"] == "all"
    assert ["queue" in part["options"] for part in one["kwargs"]["tasks"]] == [False, False]


def test_what_is_no_request_is_a_type_error(nobody):
    with pytest.raises(TypeError, match="TriggerRequest"):
        nobody.enqueue_many([{"dag_id": "d", "conf": {"password": CANARY}}])
