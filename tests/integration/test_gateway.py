"""The HTTP door: what is answered, what is in Redis then, and what never gets out."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis

from local.process import ROOT, free_port
from local.valkey import Valkey
from producers.contract import QUEUE_JOBS, QUEUE_TRIGGERS
from tests.integration.gateway import GatewayProcess

pytestmark = pytest.mark.integration

NDJSON = "application/x-ndjson"


@pytest.fixture(scope="module")
def store() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(store, tmp_path_factory) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "rules.toml").write_text(
        '[[rules]]\ntype = "com.example.order.*"\ndag_id = "orders"\nconf = "{order: data.id}"\n'
        '[[rules]]\ntype = "com.example.plain"\ndag_id = "plain"\nconf = "data"\n'
    )
    env = {"DAGRELAY_GATEWAY_BODY_TIMEOUT_S": "2", "DAGRELAY_GATEWAY_HEARTBEAT_S": "0.3"}
    options = ("--rules", str(folder / "rules.toml"))
    with GatewayProcess(store.url, folder, *options, **env) as process:
        yield process


@pytest.fixture
def redis(store) -> Iterator[Redis]:
    with Redis.from_url(store.url, decode_responses=True) as client:
        client.flushdb()
        yield client


def until(found: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.05)


def messages(redis: Redis, queue: str = QUEUE_TRIGGERS) -> list[dict]:
    found = [json.loads(json.loads(text)["body"])[1] for text in redis.lrange(queue, 0, -1)]
    return found[::-1]


# What is taken


def test_a_run_is_accepted_when_it_lies_in_redis(gateway, redis):
    answer = gateway.run(body={"conf": {"day": 1}, "key": "k1"})

    assert answer.status == 202
    assert answer.body["dag_run_id"] == "relay__k1"
    assert answer.headers["location"] == answer.body["status_url"] == f"/v1/tasks/{answer.body['id']}"
    (message,) = messages(redis)
    assert (message["dag_id"], message["conf"], message["asked"]["by"]) == (
        "daily_sales",
        {"day": 1},
        "all@gateway",
    )


def test_without_a_body_a_run_has_no_conf(gateway, redis):
    assert gateway.ask("POST", "/v1/dags/a/runs").status == 202
    assert "conf" not in messages(redis)[0]


def test_a_job_is_accepted(gateway, redis):
    answer = gateway.ask("POST", "/v1/jobs", {"service": "render", "path": "/jobs/1"})
    assert (answer.status, answer.body["dag_run_id"]) == (202, None)
    assert messages(redis, QUEUE_JOBS)[0]["service"] == "render"


def test_a_trace_goes_on_and_an_odd_one_is_left_out(gateway, redis):
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    assert gateway.run(traceparent=trace).status == 202
    assert gateway.run(traceparent="what is this").status == 202
    second, first = (json.loads(text) for text in redis.lrange(QUEUE_TRIGGERS, 0, -1))
    assert first["headers"]["traceparent"] == trace
    assert "traceparent" not in second["headers"]


# Repeats


@pytest.mark.parametrize("key", ['"8e03978e-40d5"', "8e03978e-40d5"])
def test_the_same_idempotency_key_is_one_request_with_the_same_answer(gateway, redis, key):
    first = gateway.run(body={"conf": {"a": 1, "b": 2}}, Idempotency_Key=key)
    second = gateway.run(body={"conf": {"b": 2, "a": 1}}, Idempotency_Key='"8e03978e-40d5"')
    assert (first.status, second.status) == (202, 202)
    assert first.body == second.body
    assert first.headers["location"] == second.headers["location"]
    assert redis.llen(QUEUE_TRIGGERS) == 1
    asked = redis.hget(f"dagrelay:record:{first.body['id']}", "fingerprint")
    assert asked.startswith("sha256:")  # by the key for confs where there is one: see `kept`


def test_an_idempotency_key_names_no_second_request(gateway, redis):
    gateway.run(body={"conf": {"a": 1}}, Idempotency_Key='"x"')
    fan_out = {"Content_Type": NDJSON, "Idempotency_Key": '"x"'}
    for again in (
        gateway.run(body={"conf": {"a": 2}}, Idempotency_Key='"x"'),
        gateway.run("other", {"conf": {"a": 1}}, Idempotency_Key='"x"'),
        gateway.ask("POST", "/v1/jobs", {"service": "s", "path": "/1"}, Idempotency_Key='"x"'),
        gateway.ask("POST", "/v1/fan-out", b'{"dag_id":"a"}\n', **fan_out),
    ):
        assert again.status == 422, again
        assert "Idempotency-Key" in again.body["detail"]
    assert redis.llen(QUEUE_TRIGGERS) == 1


def test_two_senders_may_use_the_same_idempotency_key(gateway, redis):
    other = gateway.key("twin")
    first = gateway.run(Idempotency_Key='"same"')
    until(lambda: gateway.ask("GET", "/v1/tasks/x", token=other).status == 404)
    second = gateway.run(Idempotency_Key='"same"', token=other)
    assert first.body["id"] != second.body["id"]


@pytest.mark.parametrize("key", ["", '""', '"a', "a b", '"ä"', "a,b", '"' + "x" * 201 + '"'])
def test_a_malformed_idempotency_key_is_a_bad_request(gateway, redis, key):
    answer = gateway.run(Idempotency_Key=key.encode().decode("latin-1"))
    assert answer.status == 400
    assert "double quotes" in answer.body["detail"]
    assert redis.llen(QUEUE_TRIGGERS) == 0


# Refusals


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"{", "no JSON"),
        (b"[]", "no object"),
        (b"\xff", "UTF-8"),
        (b'{"conf": 1}', "conf"),
        (b'{"conf": {"a": NaN}}', "NaN"),
        (b'{"dag_id": "other"}', "dag_id"),
        (b'{"service": "x"}', "/v1/jobs"),
        (b'{"colour": 1}', "colour"),
        (b'{"reply_to": "q"}', "reply_to"),
        (b'{"id": 1}', "id"),
        (b'{"conf": {"a": 1}, "conf": {"a": 2}}', "twice"),
        (b'{"conf": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}", "nested"),
    ],
)
def test_a_refusal_says_which_field_and_why(gateway, redis, body, part):
    answer = gateway.ask("POST", "/v1/dags/a/runs", body, Content_Type="application/json")
    assert answer.status == 422, answer
    assert answer.headers["content-type"] == "application/problem+json"
    assert part in answer.body["detail"]
    assert answer.body["title"]
    assert redis.llen(QUEUE_TRIGGERS) == 0


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/nothing", {}, 404),
        ("GET", "/v1/tasks/none", {}, 404),
        ("DELETE", "/v1/tasks/none", {}, 404),
        ("GET", "/v1/tasks/none/events", {}, 404),
        ("PUT", "/v1/jobs", {}, 405),
        ("POST", "/v1/jobs", {"Content_Type": "text/plain"}, 415),
        ("POST", "/v1/fan-out", {"Content_Type": "application/json"}, 415),
        ("POST", "/v1/events", {"Content_Type": "application/json"}, 415),
        ("POST", "/v1/fan-out?colour=1", {"Content_Type": NDJSON}, 422),
        ("POST", "/v1/dags/a%20b/runs", {"Content_Type": "application/json"}, 422),
    ],
)
def test_whatever_is_refused_is_a_problem(gateway, redis, method, path, headers, status):
    answer = gateway.ask(method, path, b"{}", **headers)
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.body["status"] == status
    if status == 405:
        assert answer.headers["allow"] == "POST"


def test_who_has_no_key_learns_nothing(gateway, redis):
    made = gateway.run().body["id"]
    tokens = [None, "x", "ä".encode().decode("latin-1"), gateway.token[:-1], gateway.token + "x"]
    paths = ["/v1/dags/daily_sales/runs", "/v1/dags/none/runs", f"/v1/tasks/{made}", "/nothing", "/v1/jobs"]
    answers = [gateway.ask("POST", path, b"{}", token=token) for token in tokens for path in paths]
    assert {answer.status for answer in answers} == {401}
    assert len({answer.raw for answer in answers}) == 1
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}
    assert redis.llen(QUEUE_TRIGGERS) == 1


def test_a_key_starts_and_sees_what_its_scope_covers(gateway, redis):
    token = gateway.key("sales", dags=["sales_*"])
    until(lambda: gateway.ask("GET", "/v1/tasks/x", token=token).status == 404)
    own = gateway.run("sales_a", token=token)
    foreign = gateway.run("hr_a")
    elsewhere = gateway.run("sales_b", {"connection": "eu"})
    job = gateway.ask("POST", "/v1/jobs", {"service": "render", "path": "/1"})
    assert own.status == 202
    for answer in (
        gateway.run("hr_a", token=token),
        gateway.run("sales_a", {"connection": "eu"}, token=token),
        gateway.ask("POST", "/v1/jobs", {"service": "render", "path": "/1"}, token=token),
        gateway.ask("POST", "/v1/fan-out", b'{"dag_id":"hr_a"}', Content_Type=NDJSON, token=token),
        gateway.ask("DELETE", own.headers["location"], token=token),
    ):
        assert answer.status == 403, answer
    assert gateway.ask("GET", own.headers["location"], token=token).status == 200
    hidden = [gateway.ask("GET", one.headers["location"], token=token) for one in (foreign, elsewhere, job)]
    unknown = gateway.ask("GET", "/v1/tasks/none", token=token)
    assert {answer.status for answer in hidden} == {404}
    assert {answer.raw for answer in hidden} == {unknown.raw}
    assert gateway.ask("GET", foreign.headers["location"] + "/events", token=token).status == 404


def test_a_key_without_reading_may_not_read(gateway, redis):
    token = gateway.key("blind", may_read=False)
    until(lambda: gateway.run("a", token=token).status == 202)
    for path in ("/v1/tasks/none", "/v1/tasks/none/events"):
        assert gateway.ask("GET", path, token=token).status == 403


def test_a_key_has_its_rate(gateway, redis):
    token = gateway.key("slow", rate_per_s=0.5, burst=3)
    until(lambda: gateway.ask("GET", "/v1/tasks/x", token=token).status == 404)
    answers = [gateway.run("a", token=token) for _ in range(6)]
    assert [answer.status for answer in answers[:2]] == [202, 202]
    last = answers[-1]
    assert last.status == 429
    assert last.headers["content-type"] == "application/problem+json"
    assert 1 <= int(last.headers["retry-after"]) <= 2
    assert last.headers["ratelimit-policy"] == '"key";q=3;w=6'
    assert last.headers["ratelimit"].startswith('"key";r=0;t=')
    assert "ratelimit" not in gateway.run("a").headers
    assert redis.llen(QUEUE_TRIGGERS) == 1 + sum(answer.status == 202 for answer in answers)


# Bodies


def test_a_large_body_is_refused_by_what_it_says_and_by_what_it_is(gateway, redis):
    with gateway.connect() as line:
        line.sendall(_head(gateway, "Content-Length: 99999999"))
        assert b" 413 " in line.recv(4000).partition(b"\r\n")[0]
    with gateway.connect() as line:
        line.sendall(_head(gateway, "Transfer-Encoding: chunked"))
        chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        with contextlib.suppress(OSError):  # reset, or a pipe that is broken
            for _ in range(200):
                line.sendall(chunk)
            pytest.fail("all of it was taken")
    assert "status=413" in _logged(gateway, "status=413")
    assert gateway.ask("GET", "/livez").status == 200


def test_whoever_is_still_sending_hears_why_not(gateway, redis):
    """A connection that is closed under a sender takes the answer away with it."""
    large = b"x" * (3 * 1024 * 1024)
    for way in (f"Content-Length: {len(large)}", "Transfer-Encoding: chunked"):
        for _ in range(5):
            with gateway.connect() as line:
                line.sendall(_head(gateway, way))
                if "chunked" in way:
                    for at in range(0, len(large), 65536):
                        line.sendall(b"10000\r\n" + large[at : at + 65536] + b"\r\n")
                    line.sendall(b"0\r\n\r\n")
                else:
                    line.sendall(large)
                answer = b""
                while more := line.recv(4000):
                    answer += more
            assert answer.startswith(b"HTTP/1.1 413 "), answer
            assert b"over the limit" in answer

    with gateway.connect() as line:  # as Ruby and others ask, each time; and nobody's key
        line.sendall(b"POST /v1/dags/a/runs HTTP/1.1\r\nHost: a\r\nConnection: close\r\n")
        line.sendall(b"Authorization: Bearer nobody\r\nContent-Length: %d\r\n\r\n" % len(large) + large)
        answer = b""
        while more := line.recv(4000):
            answer += more
    assert answer.startswith(b"HTTP/1.1 401 "), answer


def test_who_is_refused_and_goes_on_sending_slowly_takes_nobodys_place(store, redis, tmp_path):
    env = {"DAGRELAY_GATEWAY_MAX_IN_FLIGHT": "5", "DAGRELAY_GATEWAY_MAX_STREAMS": "5"}
    with GatewayProcess(store.url, tmp_path, **env) as gateway, contextlib.ExitStack() as stack:
        for _ in range(30):
            line = stack.enter_context(gateway.connect())
            line.sendall(b"POST /v1/dags/a/runs HTTP/1.1\r\nHost: a\r\nConnection: close\r\n")
            line.sendall(b"Authorization: Bearer nobody\r\nContent-Length: 1000\r\n\r\n{")
        assert line.recv(4000).startswith(b"HTTP/1.1 401 ")
        assert gateway.run().status == 202


def test_a_slow_body_is_cut_off(gateway, redis):
    with gateway.connect() as line:
        line.sendall(_head(gateway, "Content-Length: 1000") + b"{")
        began = time.monotonic()
        answer = b""
        while more := line.recv(4000):
            answer += more
        assert b" 408 " in answer.partition(b"\r\n")[0]
        assert 1 < time.monotonic() - began < 15


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /livez HTTP/1.1\r\nA: b\r\n"])
def test_a_slow_head_is_cut_off(gateway, redis, sent):
    with gateway.connect() as line:
        line.sendall(sent)
        assert line.recv(4000).startswith(b"HTTP/1.1 408 ")
        assert line.recv(4000) == b""


def test_a_slow_head_is_cut_off_on_a_connection_that_was_used(gateway, redis):
    with gateway.connect() as line:
        line.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += line.recv(4000)
        line.sendall(b"GET /livez HTTP/1.1\r\n")
        assert line.recv(4000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("pieces", [1, 2, 40])
def test_a_body_is_read_whatever_other_protocol_its_head_asks_for(gateway, redis, pieces):
    body = b'{"conf":{"a":1}}'
    h2c = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n"
    one = _head(gateway, h2c + f"Content-Length: {len(body)}") + body
    chunked = _head(gateway, h2c + "Transfer-Encoding: chunked") + b"10\r\n" + body + b"\r\n0\r\n\r\n"
    with gateway.connect() as line:
        for _ in range(3):
            for sent in (one, chunked, one + chunked):
                size = -(-len(sent) // pieces)
                if pieces == 2:
                    size = sent.index(b"\r\n\r\n") + 4
                for at in range(0, len(sent), size):
                    line.sendall(sent[at : at + size])
                    time.sleep(0.005)
        until(lambda: redis.llen(QUEUE_TRIGGERS) == 12)
        line.sendall(
            b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n"
        )
        answers = b""
        while more := line.recv(40_000):
            answers += more
    assert answers.count(b"HTTP/1.1 202 ") == 12
    assert b"HTTP/1.1 200 " in answers
    assert [one["conf"] for one in messages(redis)] == [{"a": 1}] * 12
    with gateway.connect() as line:
        line.sendall(b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n")
        assert line.recv(4000).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("sent", "more"),
    [
        (b"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n\r\n", b"x"),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\nx"),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n"),
    ],
)
def test_who_goes_on_sending_after_the_answer_is_cut_off(gateway, redis, sent, more):
    with gateway.connect() as line:
        line.sendall(sent)
        answer = b""
        while not answer.endswith(b"}"):
            answer += line.recv(4000)
        began = time.monotonic()
        line.sendall(more)
        assert line.recv(4000) == b""
        assert time.monotonic() - began < 15


def test_a_head_without_end_and_what_is_no_http_are_cut_off(gateway, redis):
    with gateway.connect() as line, contextlib.suppress(OSError):  # reset, or a pipe that is broken
        line.sendall(b"GET /livez HTTP/1.1\r\n")
        for _ in range(2000):
            line.sendall(b"A: " + b"b" * 10_000 + b"\r\n")
        pytest.fail("all of it was taken")
    with gateway.connect() as line:
        line.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        answer = line.recv(4000)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"application/problem+json" in answer
    with gateway.connect() as line:  # a body that is none
        line.sendall(_head(gateway, "Transfer-Encoding: chunked"))
        line.sendall(b"zz\r\n")
        assert line.recv(4000).startswith(b"HTTP/1.1 400 ")
    assert gateway.ask("GET", "/livez").status == 200


def test_who_goes_away_harms_nobody(gateway, redis):
    for _ in range(30):
        with gateway.connect() as line:
            line.sendall(_head(gateway, "Content-Length: 1000") + b"{")
        with gateway.connect() as line:
            line.sendall(_head(gateway, "Content-Length: 2") + b"{}")
    until(lambda: redis.llen(QUEUE_TRIGGERS) == 30)
    assert "a request failed" not in gateway.text()


def _head(gateway: GatewayProcess, length: str) -> bytes:
    lines = [
        "POST /v1/dags/a/runs HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {gateway.token}",
        "Content-Type: application/json",
        length,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def _logged(gateway: GatewayProcess, part: str) -> str:
    until(lambda: part in gateway.text())
    return gateway.text()


# Fan-outs


def test_thousands_of_lines_are_one_fan_out(gateway, redis):
    body = b"\n".join(b'{"dag_id":"daily_sales","conf":{"n":%d}}' % number for number in range(5000))
    headers = {"Content_Type": NDJSON, "Idempotency_Key": '"many"'}
    first = gateway.ask("POST", "/v1/fan-out?on_error=stop", body, **headers)
    again = gateway.ask("POST", "/v1/fan-out?on_error=stop", body, **headers)
    other = gateway.ask("POST", "/v1/fan-out", body, **headers)

    assert (first.status, again.status, other.status) == (202, 202, 422), other
    assert first.body == again.body
    task = gateway.ask("GET", first.headers["location"]).body
    assert (task["progress"], task["by"], task["dag_id"]) == ("0 of 5000", "all@gateway", "daily_sales")
    assert redis.llen(QUEUE_TRIGGERS) == 1  # what launches it, once


def test_a_run_that_takes_the_key_of_a_fan_out_before_it_is_written_is_the_one_accepted(gateway, redis):
    body = b"\n".join(b'{"dag_id":"a","conf":{"n":%d}}' % number for number in range(20_000))
    with ThreadPoolExecutor(1) as other:
        made = other.submit(
            lambda: gateway.ask("POST", "/v1/fan-out", body, Content_Type=NDJSON, Idempotency_Key="k")
        )
        until(lambda: any(key.endswith(":asked") for key in redis.scan_iter("dagrelay:fan-out:*")))
        run = gateway.run(Idempotency_Key="k")
        answer = made.result()
    assert sorted([run.status, answer.status]) == [202, 422]
    assert redis.llen(QUEUE_TRIGGERS) == 1


def test_a_fan_out_says_which_lines_are_wrong_and_takes_none(gateway, redis):
    body = b'{"dag_id":"a"}\n\n{"dag_id":"b"\n{"conf":{}}\n{"dag_id":"c","countdown":3}\n'
    answer = gateway.ask("POST", "/v1/fan-out", body, Content_Type=NDJSON)
    assert answer.status == 422
    assert [wrong["line"] for wrong in answer.body["errors"]] == [3, 4, 5]
    assert "countdown" in answer.body["errors"][2]["detail"]
    assert redis.keys("dagrelay:*") == []


# CloudEvents


def test_events_of_the_official_sdk_start_runs(gateway, redis):
    from cloudevents.v1.conversion import to_binary, to_structured
    from cloudevents.v1.http import CloudEvent

    def event(number: int) -> CloudEvent:
        about = {"type": "com.example.order.paid", "source": "/shops/ä 1", "id": f"e{number}"}
        return CloudEvent(about, {"id": number})

    for number, convert in ((1, to_structured), (2, to_binary), (2, to_structured)):
        headers, body = convert(event(number))
        headers = {name.replace("-", "_"): value for name, value in headers.items()}
        answer = gateway.ask("POST", "/v1/events", body, **headers)
        assert answer.status == 202, answer
    assert [message["conf"] for message in messages(redis)] == [{"order": 1}, {"order": 2}]


def test_a_batch_is_taken_whole_or_not_at_all(gateway, redis):
    def event(number: int, **more: object) -> dict:
        kind = {"specversion": "1.0", "type": "com.example.order.x", "source": "/s", "id": str(number)}
        return {**kind, "data": {"id": number}, **more}

    batch = {"Content_Type": "application/cloudevents-batch+json"}
    good = gateway.ask("POST", "/v1/events", [event(1), event(2), event(1)], **batch)
    assert good.status == 202, good
    assert good.body[0] == good.body[2]
    assert redis.llen(QUEUE_TRIGGERS) == 2
    bad = gateway.ask("POST", "/v1/events", [event(3), event(4, type="none"), 5], **batch)
    assert bad.status == 422
    assert [wrong["index"] for wrong in bad.body["errors"]] == [1, 2]
    assert redis.llen(QUEUE_TRIGGERS) == 2
    assert gateway.ask("POST", "/v1/events", b"{}", **batch).status == 422

    gone = {"dagrelay_conf": f"sha256:{'0' * 64}", "bytes": 5}
    events = [event(5), event(6, type="com.example.plain", data=gone)]
    bad = gateway.ask("POST", "/v1/events", events, **batch)
    assert (bad.status, [wrong["index"] for wrong in bad.body["errors"]]) == (422, [1])
    assert "no longer kept" in bad.body["detail"]
    assert redis.llen(QUEUE_TRIGGERS) == 2


# How a request fares


def test_what_is_on_record_is_told_without_the_conf(gateway, redis):
    made = gateway.run(body={"conf": {"password": "s3cret"}, "key": "k"})
    task = gateway.ask("GET", made.headers["location"])
    assert task.status == 200
    assert task.body["state"] == "accepted"
    assert task.body["history"][0]["what"] == "accepted, asked by all@gateway"
    assert "s3cret" not in task.raw.decode()


def test_a_request_is_cancelled_by_who_may(gateway, redis):
    made = gateway.run()
    answer = gateway.ask("DELETE", made.headers["location"])
    assert (answer.status, answer.body["id"]) == (202, made.body["id"])
    record = redis.hgetall(f"dagrelay:record:{made.body['id']}")
    assert record["cancel_by"] == "all@gateway"
    redis.hset(f"dagrelay:record:{made.body['id']}", "state", "done")
    assert gateway.ask("DELETE", made.headers["location"]).status == 409


def read_events(line, most: int, timeout_s: float = 20) -> list[dict]:
    """Return the events that come, as dicts; {} is a comment."""
    line.settimeout(timeout_s)
    found: list[dict] = []
    buffer = b""
    while len(found) < most:
        more = line.recv(4000)
        if not more:
            break
        buffer += more
        while b"\n\n" in buffer:
            block, _, buffer = buffer.partition(b"\n\n")
            fields = [
                text.split(": ", 1) for text in block.decode().replace("\r", "").split("\n") if ": " in text
            ]
            found.append({name: value for name, value in fields if name in ("id", "event", "data")})
    return found


def follow(gateway: GatewayProcess, path: str, last: str = ""):
    line = gateway.connect()
    seen = f"Last-Event-ID: {last}\r\n" if last else ""
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {gateway.token}\r\n{seen}\r\n"
    line.sendall(head.encode())
    return line


def test_events_tell_each_change_until_the_end(gateway, redis):
    made = gateway.run()
    record = f"dagrelay:record:{made.body['id']}"
    with follow(gateway, made.body["events_url"]) as line:
        first = next(event for event in read_events(line, 1) if event)
        assert json.loads(first["data"])["state"] == "accepted"
        assert {} in read_events(line, 2)  # comments, while nothing happens
        redis.hset(record, mapping={"state": "waiting", "reason": "Airflow does not answer"})
        changed = next(event for event in read_events(line, 6) if event)
        assert (changed["event"], json.loads(changed["data"])["state"]) == ("state", "waiting")
        redis.hset(record, mapping={"state": "done", "ended_at": "1"})
        end = [event for event in read_events(line, 8) if event][-1]
        assert (end["event"], json.loads(end["data"])["state"]) == ("end", "done")
    with follow(gateway, made.body["events_url"], changed["id"]) as line:
        assert read_events(line, 1)[0]["event"] == "end"
    again = gateway.ask("GET", made.body["events_url"], Last_Event_ID=end["id"])
    assert again.status == 204


def test_events_end_with_their_key(gateway, redis):
    token = gateway.key("gone")
    until(lambda: gateway.ask("GET", "/v1/tasks/none", token=token).status == 404)
    made = gateway.run(token=token)
    head = f"GET {made.body['events_url']} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n"
    with gateway.connect() as line:
        line.sendall(head.encode())
        assert read_events(line, 2)
        text = gateway.keys.read_text()
        gateway.keys.write_text(text[: text.index("\n[keys.gone]")])
        began = time.monotonic()
        while line.recv(4000):
            assert time.monotonic() - began < 10


def test_what_was_seen_is_not_told_again(gateway, redis):
    made = gateway.run()
    with follow(gateway, made.body["events_url"]) as line:
        (first,) = read_events(line, 1)
    with follow(gateway, made.body["events_url"], first["id"]) as line:
        assert not any(read_events(line, 3))


# Health, and what is logged


def test_health_and_description_ask_for_no_key(gateway, redis):
    for path in ("/livez", "/readyz", "/openapi.json", "/docs"):
        assert gateway.ask("GET", path, token=None).status == 200
    page = gateway.ask("GET", "/docs", token=None).raw.decode()
    assert "POST /v1/dags/{dag_id}/runs" in page
    assert "<script" not in page
    described = gateway.ask("GET", "/openapi.json", token=None).body
    assert described["openapi"].startswith("3.1")


def test_the_log_has_a_line_for_each_request_and_no_secret(gateway, redis):
    made = gateway.run(body={"conf": {"password": "s3cret"}})
    gateway.ask("GET", "/v1/none/s3cret?token=s3cret", token="s3cret")
    text = _logged(gateway, f"task={made.body['id']}")
    assert f"method=POST route=/v1/dags/{{dag_id}}/runs status=202 key=all task={made.body['id']} ms=" in text
    until(lambda: "route=- status=401 key=-" in gateway.text())
    text = gateway.text()
    assert "s3cret" not in text
    assert gateway.token not in text
    assert "Traceback" not in text


def test_the_health_check_of_the_container_asks_the_gateway(gateway):
    """The command of docker-compose.yml, with the port of this one and with one where nobody is."""
    compose = (ROOT / "docker-compose.yml").read_text()
    (code,) = re.findall(r"^ +- (import urllib\.request.*:8080/.*)$", compose, re.M)

    def status(port: int) -> int:
        argv = [sys.executable, "-c", code.replace("8080", str(port))]
        return subprocess.run(argv, capture_output=True, timeout=60, check=False).returncode

    assert status(gateway.port) == 0
    assert status(free_port()) != 0
