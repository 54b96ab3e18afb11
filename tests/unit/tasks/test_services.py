"""Services come from the environment; every mistake is named, no secret is shown, no URL leads elsewhere."""

from __future__ import annotations

import base64
import json

import pytest

from producers.errors import ConfigurationError, ServiceNotConfigured
from tasks.services import Service, read_services, service_sender
from tasks.settings import read_settings

CANARY = "c4n4ry-s3cret"


def service(value: object, name: str = "TRAIN") -> Service:
    text = value if isinstance(value, str) else json.dumps(value)
    found, mistakes = read_services({f"DAGRELAY_SERVICE_{name}": text})
    assert not mistakes
    return found[name.lower()]


def mistakes(value: object) -> list[str]:
    text = value if isinstance(value, str) else json.dumps(value)
    found, wrong = read_services({"DAGRELAY_SERVICE_TRAIN": text})
    assert not found
    assert wrong
    assert all(line.startswith("DAGRELAY_SERVICE_TRAIN: ") for line in wrong)
    return wrong


# Reading


def test_a_uri_says_all_that_most_services_need():
    found = service("https://user:p%40ss@host:8443/base/?max_in_flight=16&min_interval_s=0.5&verify=false")

    assert (found.id, found.base_url) == ("train", "https://host:8443/base")
    assert (found.username, found.password) == ("user", "p@ss")
    assert (found.max_in_flight, found.min_interval_s, found.verify) == (16, 0.5, False)


def test_json_says_all_of_it(tmp_path):
    ca = tmp_path / "ca.pem"
    ca.write_text("-")
    found = service(
        {
            "url": "https://host/api",
            "token": CANARY,
            "headers": {"X-Api-Key": "k3y-of-ours"},
            "query": {"key": "q u"},
            "idempotency_header": "X-Request-Id",
            "max_in_flight": 8,
            "min_interval_s": 2,
            "connect_timeout_s": 1,
            "read_timeout_s": 5.5,
            "ca_file": str(ca),
        }
    )

    assert found.headers() == {"X-Api-Key": "k3y-of-ours", "Authorization": f"Bearer {CANARY}"}
    assert found.query_text == "key=q+u"
    assert found.idempotency_header == "X-Request-Id"
    assert (found.connect_timeout_s, found.read_timeout_s) == (1, 5.5)
    assert found.trusts == str(ca)


def test_a_user_and_password_are_sent_as_basic_authentication():
    found = service({"url": "http://host", "username": "u", "password": "p"})

    assert found.headers() == {"Authorization": "Basic " + base64.b64encode(b"u:p").decode()}


def test_secrets_may_come_from_files(tmp_path):
    (tmp_path / "token").write_text(f"{CANARY}\n")
    (tmp_path / "whole").write_text(json.dumps({"url": "http://b", "token_file": str(tmp_path / "token")}))

    found, wrong = read_services({"DAGRELAY_SERVICE_B_FILE": str(tmp_path / "whole")})

    assert not wrong
    assert found["b"].token == CANARY


def test_what_is_not_set_has_defaults_that_do_no_harm():
    found = service("http://host")

    assert found.headers() == {}
    assert (found.max_in_flight, found.min_interval_s, found.idempotency_header) == (64, 1, "Idempotency-Key")
    assert found.verify
    assert found.read_timeout_s == 10


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("host:8080", "neither a URI"),
        ("ftp://host", "neither a URI"),
        ("http://", "no host"),
        ("http://host/a/../b", "no plain path"),
        (f"http://u:{CANARY}@host:port/", "cannot be read as a URI"),
        (f"http://u:a@{CANARY}@host/", "cannot be read as a URI"),
        (f"http://u:{CANARY}@host/?token={CANARY}", "a token as well as a user"),
        (f"http://host/?{CANARY}=1", "has no use for a name that is no plain word"),
        ("http://host/?colour=red", "has no use for 'colour'"),
        ("http://host/?max_in_flight=0", "max_in_flight is no whole number from 1"),
        ("http://host/?min_interval_s=never", "min_interval_s is no number"),
        ("http://host/?headers=x", "has no use for 'headers'"),
        ({"host": "h"}, "has no url"),
        ({"url": f"http://u:{CANARY}@host"}, "the url has a user or a query"),
        ({"url": f"http://host/?token={CANARY}"}, "the url has a user or a query"),
        ({"url": "http://host", "headers": {"X": 1}}, "headers is no object of texts"),
        ({"url": "http://host", "headers": {"X-Key": f"{CANARY}\n"}}, "headers has one that no request may"),
        ({"url": "http://host", "headers": {"Host": "evil"}}, "headers has one that no request may"),
        ({"url": "http://host", "query": [CANARY]}, "query is no object of texts"),
        (
            {"url": "http://host", "token": CANARY, "headers": {"authorization": CANARY}},
            "headers has Authorization beside a token",
        ),
        ({"url": "http://host", "password": CANARY}, "a password and no user"),
        ({"url": "http://host", "token_file": "/does/not/exist"}, "token_file: the file cannot be read"),
        ({"url": "http://host", "token": "two words"}, "the token holds characters"),
        ({"url": "http://host", "idempotency_header": "Content-Length"}, "idempotency_header is no name"),
        ("{broken", "begins with { and is not JSON"),
    ],
)
def test_a_mistake_is_named_without_its_secret(value, words):
    found = mistakes(value)

    assert any(words in line for line in found), found
    assert CANARY not in str(found)


def test_all_mistakes_of_all_kinds_are_told_together():
    with pytest.raises(ConfigurationError) as caught:
        read_settings(
            {
                "DAGRELAY_SERVICE_A": "http://host/?max_in_flight=0&min_interval_s=0",
                "DAGRELAY_SERVICE_B": "nothing",
                "DAGRELAY_SERVICE_b": "http://host",
                "AIRFLOW_CONN_X": "http://",
            }
        )

    text = str(caught.value)
    for part in ("DAGRELAY_REDIS_URL", "AIRFLOW_CONN_X", "max_in_flight", "min_interval_s", "SERVICE_B"):
        assert part in text


def test_a_service_is_one_of_the_settings_and_its_secrets_are_not_shown():
    found = read_settings(
        {
            "DAGRELAY_REDIS_URL": "redis://h",
            "DAGRELAY_SERVICE_TRAIN": json.dumps(
                {"url": "http://host", "token": CANARY, "headers": {"X-Key": CANARY}, "query": {"k": CANARY}}
            ),
        }
    )

    assert found.services["train"].base_url == "http://host"
    assert CANARY not in repr(found)


# No way out of it


INSIDE = Service("train", "https://host:8443/base")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("https://host:8443/base/jobs/1", "/jobs/1"),
        ("https://HOST:8443/base/jobs?x=1", "/jobs?x=1"),
        ("https://host:8443/base", "/"),
        ("https://host:8443/base/a%2Fb/v1.2/.../..a/b..;c", "/a%2Fb/v1.2/.../..a/b..;c"),
        ("https://host:8443/base/jobs?up=/../x", "/jobs?up=/../x"),
    ],
)
def test_a_url_within_the_service_is_a_path_of_it(url, path):
    assert INSIDE.check_url(url) == path


def test_a_port_that_is_the_schemes_own_needs_no_mention():
    assert Service("s", "https://host").check_url("https://host:443/a") == "/a"
    assert Service("s", "http://host:80").check_url("http://host/a") == "/a"


@pytest.mark.parametrize(
    "url",
    [
        "http://host:8443/base/jobs",
        "https://host/base/jobs",
        "https://evil:8443/base/jobs",
        "https://host:8443/jobs",
        "https://host:8443/based/jobs",
        "https://host:8443/base/../jobs",
        "https://host:8443/base/%2e%2E/jobs",
        "https://host:8443/base/.",
        "https://host:8443/base/jobs%2F..%2f..",
        "https://host:8443/base/jobs/..;a=1/jobs",
        "https://host:8443/base/jobs/..%3Ba/jobs",
        "https://host:8443/base/jobs/%252e%252e/jobs",
        "https://host:8443/base/jobs%5C..%5Cjobs",
        "https://user@host:8443/base/jobs",
        "https://host:8443@evil/base/jobs",
        "https://host:8443/base/jobs#x",
        "https://host:port/base",
    ],
)
def test_a_url_elsewhere_is_refused_by_name(url):
    with pytest.raises(ServiceNotConfigured, match="'train'"):
        INSIDE.check_url(url)


# Secrets


def test_no_credential_of_ours_and_nothing_that_looks_like_one_is_left_in_a_text():
    known = Service(
        "s", "http://h", token=CANARY, extra_headers={"X-Key": "abcd/1234"}, query={"k": "qu ery"}
    )
    basic = Service("s", "http://h", username="user", password="pass-word")
    jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"

    assert (
        known.masked(f"it was {CANARY}, abcd/1234, abcd%2F1234 and qu ery") == "it was ***, ***, *** and ***"
    )
    assert basic._basic not in basic.masked(f"Authorization: Basic {basic._basic}")
    assert known.masked(f"see {jwt}!") == "see ***!"
    assert known.masked("Bearer abcdef123456") == "Bearer ***"
    assert known.masked('{"api_key": "xyz1", "n": 1}') == '{"api_key": "***", "n": 1}'
    assert known.masked("password=hunter2&x=1") == "password=***&x=1"
    assert known.masked('{"state": "running"}') == '{"state": "running"}'


def test_single_calls_share_one_sender():
    assert service_sender(INSIDE) is service_sender(INSIDE)
    assert service_sender(INSIDE).base_url == INSIDE.base_url


# Queues


def test_a_service_may_be_a_queue(tmp_path):
    given = {"url": f"redis://user:{CANARY}@host:6379/0", "queue": "render", "reply_to": "done"}

    found = service(given)

    assert found.queue is not None
    assert (found.queue.name, found.queue.reply_to) == ("render", "done")
    assert CANARY not in repr(found)
    assert found.masked(f"no {CANARY} here") == "no *** here"
    for url in ("amqp://h/", "sqs://?region=eu-west-1", "kafka://h:9092"):  # they need not name it twice
        assert service({"url": url, "queue": "render"}).queue.name == "render"
    file = tmp_path / "url"
    file.write_text(f"{given['url']}\n")
    assert service({"url_file": str(file), "queue": "render"}).queue.url == given["url"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"queue": "q"}, "has no url: give url or url_file"),
        ({"url": "redis://h/0", "url_file": "/x", "queue": "q"}, "has no url: give url or url_file"),
        ({"url": "redis://h/0", "queue": ""}, "queue is empty"),
        ({"url": "redis://h/0", "queue": "q", "token": CANARY}, "has no use for 'token'"),
        ({"url": f"https://u:{CANARY}@h/", "queue": "q"}, "none of the forms"),
        ({"url": f"redis://u:{CANARY}@h:port/0", "queue": "q"}, ""),
    ],
)
def test_a_mistake_in_a_queue_is_named_without_its_secret(value, words):
    found = " ".join(mistakes(value))

    assert words in found
    assert CANARY not in found


def test_a_callback_url_needs_a_secret_and_is_a_plain_one():
    base = {"DAGRELAY_REDIS_URL": "redis://h/0", "DAGRELAY_CALLBACK_SECRET": "s" * 40}
    found = read_settings({**base, "DAGRELAY_CALLBACK_URL": "https://relay.example/base/"})
    assert (found.callback_url, bool(found.callback_secrets)) == ("https://relay.example/base", True)
    assert "sss" not in repr(found)
    for url in ("relay", "ftp://h", "https://u:p@h", "https://h?a=1", "https://h/#x", "https://[h"):
        with pytest.raises(ConfigurationError, match="DAGRELAY_CALLBACK_URL is no plain"):
            read_settings({**base, "DAGRELAY_CALLBACK_URL": url})
    with pytest.raises(ConfigurationError, match="set without DAGRELAY_CALLBACK_SECRET"):
        read_settings({"DAGRELAY_REDIS_URL": "redis://h/0", "DAGRELAY_CALLBACK_URL": "https://h"})
