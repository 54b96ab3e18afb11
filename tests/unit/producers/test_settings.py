"""Missing or wrong configuration: every mistake at once, by the variable's name, without its secret."""

from __future__ import annotations

import pytest

from producers.cli import masked
from producers.client import RelayClient, connect
from producers.errors import ConfigurationError
from producers.settings import ProducerSettings, default_client_name, read_settings

SECRET = "c4n4ry-s3cret"
URL = f"redis://relay:{SECRET}@redis.example:6380/3"


def test_the_url_and_the_name_come_from_the_environment():
    settings = read_settings({"DAGRELAY_REDIS_URL": URL, "DAGRELAY_CLIENT_NAME": "billing"})

    assert (settings.redis_url, settings.client_name) == (URL, "billing")


def test_what_is_given_in_code_goes_before_the_environment():
    settings = read_settings(
        {"DAGRELAY_REDIS_URL": URL, "DAGRELAY_CLIENT_NAME": "a"}, redis_url="redis://h/1", client_name="b"
    )

    assert (settings.redis_url, settings.client_name) == ("redis://h/1", "b")


def test_the_hosts_own_celery_variables_are_not_read():
    with pytest.raises(ConfigurationError):
        read_settings({"CELERY_BROKER_URL": URL, "REDIS_URL": URL, "CELERY_RESULT_BACKEND": URL})


def test_a_secret_may_come_from_a_file(tmp_path):
    (tmp_path / "url").write_text(URL + "\n")

    assert read_settings({"DAGRELAY_REDIS_URL_FILE": str(tmp_path / "url")}).redis_url == URL


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, ["DAGRELAY_REDIS_URL is not set"]),
        ({"DAGRELAY_REDIS_URL": ""}, ["DAGRELAY_REDIS_URL is not set"]),
        ({"DAGRELAY_REDIS_URL": f"{SECRET}"}, ["DAGRELAY_REDIS_URL is no Redis URL"]),
        ({"DAGRELAY_REDIS_URL": f"http://:{SECRET}@h"}, ["DAGRELAY_REDIS_URL is no Redis URL"]),
        ({"DAGRELAY_REDIS_URL": "redis://"}, ["DAGRELAY_REDIS_URL is no Redis URL"]),
        ({"DAGRELAY_REDIS_URL": f"sentinel://:{SECRET}@h"}, ["DAGRELAY_REDIS_URL names Sentinel"]),
        # A password with characters that end the host part: what follows would be said by a naive error.
        ({"DAGRELAY_REDIS_URL": f"redis://:x/{SECRET}@h:1/0"}, ["DAGRELAY_REDIS_URL is no", "%XX"]),
        ({"DAGRELAY_REDIS_URL": f"redis://:x#{SECRET}@h:1/0"}, ["DAGRELAY_REDIS_URL is no", "%XX"]),
        ({"DAGRELAY_REDIS_URL": f"redis://:1/{SECRET}@h:1/0"}, ["DAGRELAY_REDIS_URL is no", "%XX"]),
        ({"DAGRELAY_REDIS_URL": f"redis://h:{SECRET}/0"}, ["DAGRELAY_REDIS_URL is no"]),
        ({"DAGRELAY_REDIS_URL": "redis://h:99999/0"}, ["DAGRELAY_REDIS_URL is no"]),
        ({"DAGRELAY_REDIS_URL": "redis://h/1x"}, ["DAGRELAY_REDIS_URL is no"]),  # redis-py takes database 0
        ({"DAGRELAY_REDIS_URL": "redis:///0"}, ["DAGRELAY_REDIS_URL is no"]),  # redis-py takes localhost
        ({"DAGRELAY_REDIS_URL": "redis://h/0?socket_timeout=soon"}, ["DAGRELAY_REDIS_URL is no"]),
        ({"DAGRELAY_REDIS_URL_FILE": "/nowhere"}, ["DAGRELAY_REDIS_URL_FILE cannot be read"]),
        (
            {"DAGRELAY_REDIS_URL": URL, "DAGRELAY_REDIS_URL_FILE": "/nowhere"},
            ["DAGRELAY_REDIS_URL and DAGRELAY_REDIS_URL_FILE are both set"],
        ),
        (
            {"DAGRELAY_REDIS_URL": SECRET, "DAGRELAY_CLIENT_NAME": "a\nb"},
            ["DAGRELAY_REDIS_URL is no", "DAGRELAY_CLIENT_NAME holds"],
        ),
    ],
)
def test_every_mistake_is_told_by_its_name_and_without_the_secret(environ, names):
    with pytest.raises(ConfigurationError) as caught:
        read_settings(environ)

    said = f"{caught.value!s} {caught.value!r} {caught.value.__cause__} {caught.value.mistakes}"
    for name in names:
        assert name in str(caught.value)
    assert len(caught.value.mistakes) == (2 if "DAGRELAY_CLIENT_NAME" in environ else 1)
    assert SECRET not in said


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h:6379",
        "redis://h:6379/",
        "redis://h:6379/15",
        "rediss://u:p%2Fw@h:6380/0?ssl_cert_reqs=required",
        "redis://[::1]:6379/0",
        "unix:///run/redis.sock?db=2",
        "unix://u:pw@/run/redis.sock",
    ],
)
def test_every_form_of_address_that_redis_has_is_taken_and_makes_a_connection(url):
    settings = read_settings({"DAGRELAY_REDIS_URL": url})
    pool = connect(settings).connection_pool

    assert pool.make_connection()  # its arguments fit; it connects later


def test_no_secret_is_shown_by_a_client_or_its_settings():
    client = RelayClient(ProducerSettings(redis_url=URL, client_name="x"))

    for shown in (repr(client.settings), str(client.settings), repr(client), repr(client.handle("a"))):
        assert SECRET not in shown


def test_a_configuration_that_is_missing_is_told_at_the_first_call(monkeypatch):
    monkeypatch.delenv("DAGRELAY_REDIS_URL", raising=False)
    monkeypatch.delenv("DAGRELAY_REDIS_URL_FILE", raising=False)
    with pytest.raises(ConfigurationError, match="DAGRELAY_REDIS_URL is not set"):
        RelayClient()


def test_the_default_name_is_always_one_that_is_allowed(monkeypatch):
    for program in ("/usr/bin/billing.py", "", "-c", "odd\nname\udcff.py"):
        monkeypatch.setattr("sys.argv", [program])
        assert default_client_name().isprintable()
        assert read_settings({"DAGRELAY_REDIS_URL": URL}).client_name


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "redis://relay:***@redis.example:6380/3"),
        (f"redis://:{SECRET}@h/0", "redis://:***@h/0"),
        (f"unix://:{SECRET}@/run/r.sock", "unix://:***@/run/r.sock"),
        (f"redis://h/0?password={SECRET}&db=1", "redis://h/0?password=***&db=1"),
        (f"rediss://h/0?db=1&ssl_password={SECRET}", "rediss://h/0?db=1&ssl_password=***"),
        ("redis://h:6379/0", "redis://h:6379/0"),
    ],
)
def test_an_address_is_shown_without_its_password(url, shown):
    assert masked(url) == shown
