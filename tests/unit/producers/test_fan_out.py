"""A fan-out is checked at the call, whole, before anything is sent."""

from __future__ import annotations

import pytest
from celery import Celery

from producers import trigger_dag
from producers.client import RelayClient
from producers.contract import MAX_FAN_OUT, TriggerRequest
from producers.errors import InvalidRequest
from producers.fan_out import _checked, fan_out
from producers.settings import ProducerSettings
from producers.stores.fan_outs import CHUNK_BYTES, CHUNK_ITEMS, Item, in_chunks

NOBODY = RelayClient(ProducerSettings(redis_url="redis://127.0.0.1:1/0", client_name="tests@here"))
SALES = {"dag_id": "daily_sales"}
host = Celery("host")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dag_id": "no such id!"}, r"requests\[1\]: dag_id: is no DAG id"),
        ({**SALES, "conf": {"at": object()}}, r"requests\[1\]: conf\.at is of type object"),
        ({**SALES, "confg": {}}, r"requests\[1\]: confg: is no argument"),
        ({**SALES, "result_from": "t"}, r"requests\[1\]: result_from: needs wait=True"),
        ({}, r"requests\[1\]: dag_id: is missing"),
    ],
)
def test_a_wrong_request_is_named_by_its_index(wrong, words):
    with pytest.raises(InvalidRequest, match=words):
        fan_out([SALES, wrong], relay=NOBODY)


@pytest.mark.parametrize("wrong", [None, "daily_sales", 7, ["daily_sales"], {7: 1}])
def test_what_is_no_request_is_a_type_error_that_names_the_index(wrong):
    with pytest.raises(TypeError, match=r"requests\[1\]"):
        fan_out([SALES, wrong], relay=NOBODY)


@pytest.mark.parametrize("wrong", [None, "daily_sales", SALES, 7, TriggerRequest("daily_sales")])
def test_what_are_no_requests_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="requests are several"):
        fan_out(wrong, relay=NOBODY)


def test_too_many_are_refused_without_making_them_all():
    def endless():
        while True:
            yield TriggerRequest("daily_sales")

    with pytest.raises(InvalidRequest, match=f"at most {MAX_FAN_OUT}"):
        fan_out(endless(), relay=NOBODY)


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("host.report", "give one Celery signature"),
        ([host.signature("a")], "give one Celery signature"),
        ({"args": []}, "give one Celery signature"),
        (host.signature("a", args=(object(),)), "is no JSON"),
        (trigger_dag.s("daily_sales"), r"use trigger_dag\.si"),
    ],
)
def test_a_callback_that_could_never_be_called_is_refused(then, words):
    with pytest.raises(InvalidRequest, match=words):
        fan_out([SALES], then=then, relay=NOBODY)


@pytest.mark.parametrize("options", [{"on_error": "ignore"}, {"wait": False}, {"wait": 3}])
def test_an_option_that_is_none_is_refused(options):
    with pytest.raises(InvalidRequest, match=next(iter(options))):
        fan_out([SALES], relay=NOBODY, **options)


def test_wait_is_set_on_each_request():
    made = _checked([SALES, TriggerRequest("d"), TriggerRequest("d", wait=True, result_from="t")], wait=True)

    assert [request.wait for request in made] == [True] * 3
    assert made[1].to_message()["wait"] is True
    assert made[2].result_from == "t"


def test_chunks_are_small_in_number_and_in_size():
    small = [Item(str(n), b"x", "") for n in range(2 * CHUNK_ITEMS + 1)]
    large = [Item(str(n), b"x" * (CHUNK_BYTES // 3), "") for n in range(7)]
    huge = [Item(str(n), b"x" * (2 * CHUNK_BYTES), "") for n in range(2)]

    assert [len(chunk) for chunk in in_chunks(small)] == [CHUNK_ITEMS, CHUNK_ITEMS, 1]
    assert [len(chunk) for chunk in in_chunks(large)] == [3, 3, 1]
    assert [len(chunk) for chunk in in_chunks(huge)] == [1, 1]
    assert [item for chunk in in_chunks(small) for item in chunk] == small
    assert list(in_chunks([])) == []
