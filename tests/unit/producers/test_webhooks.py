"""Webhooks that come in: who has the secret is heard, in time, and a delivery is one."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook as Official

from producers.errors import InvalidRequest
from producers.scopes import Scope
from producers.stores.signing import key_of, sign_github, sign_standard
from producers.webhooks import (
    DECOY,
    Delivery,
    OutOfTime,
    SignatureRefused,
    Webhook,
    delivery_of,
    read_webhooks,
    verify,
    wake_key,
)

# The one in the documentation of Standard Webhooks.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_" + base64.b64encode(b"another key, 24 bytes long").decode()
CANARY = "c4n4ry-s3cret-of-a-test"
NOW = 1_700_000_000.0
BODY = b'{"type": "order.paid", "data": {"id": 7}}'


def hook(**given: object) -> Webhook:
    fields = {"scheme": "standard", "secrets": [SECRET], "routes": True, **given}
    found, mistakes = read_webhooks({"DAGRELAY_WEBHOOK_SHOP": json.dumps(fields)})
    assert not mistakes
    return found["shop"]


def mistakes(value: object) -> list[str]:
    text = value if isinstance(value, str) else json.dumps(value)
    found, wrong = read_webhooks({"DAGRELAY_WEBHOOK_SHOP": text})
    assert not found
    assert wrong
    assert all(line.startswith("DAGRELAY_WEBHOOK_SHOP: ") for line in wrong)
    assert CANARY not in str(wrong)
    return wrong


def standard(body: bytes = BODY, *secrets: str, at: float = NOW, name: str = "msg_1") -> dict[str, str]:
    keys = [key_of("standard", secret) for secret in secrets or (SECRET,)]
    return dict(sign_standard(keys, name, at, body))


def stripe(body: bytes, *secrets: str, at: int = int(NOW)) -> dict[str, str]:
    """As Stripe's documentation has it, by other means than ours."""
    signed = f"{at}.".encode() + body
    macs = [hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest() for secret in secrets]
    return {"stripe-signature": f"t={at}," + ",".join(f"v1={one}" for one in macs) + ",v0=6ffbb59b2300aae6"}


# Standard Webhooks


def test_what_the_official_library_signs_is_taken():
    at = datetime.fromtimestamp(NOW, UTC)
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": str(int(NOW)),
        "webhook-signature": Official(SECRET).sign("msg_p5jXN8AQM9LWM0D4loKWxJek", at, BODY.decode()),
    }
    verify(hook(), headers, BODY, NOW)
    delivery = delivery_of(hook(), headers, BODY)
    assert (delivery.id, delivery.event) == ("msg_p5jXN8AQM9LWM0D4loKWxJek", "order.paid")


def test_the_official_library_takes_what_we_sign():
    headers = standard(at=time.time())
    assert Official(SECRET).verify(BODY, headers) == json.loads(BODY)
    # While a secret is being replaced, receivers may have either.
    headers = standard(BODY, OTHER, SECRET, at=time.time())
    for secret in (SECRET, OTHER):
        assert Official(secret).verify(BODY, headers) == json.loads(BODY)


@given(st.text(max_size=200), st.text("abcdefghij_-0123456789", min_size=1, max_size=50))
def test_both_agree_on_any_text(text, name):
    body = json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace")
    headers = standard(body, at=time.time(), name=name)
    Official(SECRET).verify(body, headers)
    verify(hook(), headers, body, time.time())


def test_a_secret_without_prefix_or_padding_is_the_same():
    bare = SECRET.removeprefix("whsec_")
    assert key_of("standard", bare) == key_of("standard", SECRET)
    padded = base64.b64encode(b"x" * 25).decode()
    assert key_of("standard", padded.rstrip("=")) == b"x" * 25


def test_while_a_secret_is_replaced_both_are_good():
    both = hook(secrets=[SECRET, OTHER])
    for secret in (SECRET, OTHER):
        verify(both, standard(BODY, secret), BODY, NOW)
    verify(hook(secrets=[OTHER]), standard(BODY, SECRET, OTHER), BODY, NOW)
    with pytest.raises(SignatureRefused):
        verify(hook(secrets=[OTHER]), standard(BODY, SECRET), BODY, NOW)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
@pytest.mark.parametrize(
    "value", [None, "", " ", "\xe9\xff", "v1,", "v1,AAAA", "x" * 10_000, "1e9", "-1", "v1"]
)
def test_what_is_changed_or_left_out_is_refused(name, value):
    headers = standard()
    if value is None:
        del headers[name]
    else:
        headers[name] = value
    with pytest.raises(SignatureRefused):
        verify(hook(), headers, BODY, NOW)


def test_a_changed_body_is_refused():
    with pytest.raises(SignatureRefused):
        verify(hook(), standard(), BODY + b" ", NOW)


@pytest.mark.parametrize("off_s", [-301, 301, -86_400 * 365, 86_400 * 365])
def test_what_is_out_of_time_is_told_only_to_who_can_sign(off_s):
    with pytest.raises(OutOfTime):
        verify(hook(), standard(at=NOW + off_s), BODY, NOW)
    forged = standard(at=NOW + off_s) | {"webhook-signature": "v1,AAAA"}
    with pytest.raises(SignatureRefused):
        verify(hook(), forged, BODY, NOW)


@pytest.mark.parametrize("off_s", [-300, -1, 0, 300])
def test_five_minutes_are_allowed(off_s):
    verify(hook(), standard(at=NOW + off_s), BODY, NOW)


def test_nobody_can_sign_for_a_name_that_there_is_not():
    with pytest.raises(SignatureRefused):
        verify(DECOY, standard(), BODY, NOW)


# GitHub

# https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries, "Testing the webhook".
GITHUB_SECRET = "It's a Secret to Everybody"
GITHUB_BODY = b"Hello, World!"
GITHUB_SIGNATURE = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"


def test_the_example_of_github_is_taken():
    code = hook(scheme="github", secrets=[GITHUB_SECRET])
    verify(code, {"x-hub-signature-256": GITHUB_SIGNATURE}, GITHUB_BODY, NOW)
    assert sign_github(GITHUB_SECRET.encode(), GITHUB_BODY) == {"x-hub-signature-256": GITHUB_SIGNATURE}
    for wrong in (GITHUB_SIGNATURE[7:], GITHUB_SIGNATURE[:-1], "sha1=" + GITHUB_SIGNATURE[7:], ""):
        with pytest.raises(SignatureRefused):
            verify(code, {"x-hub-signature-256": wrong}, GITHUB_BODY, NOW)


def test_github_signs_the_body_alone_so_a_replay_is_known_by_it():
    """Who has seen a delivery can send it again with another id."""
    code = hook(scheme="github", secrets=[GITHUB_SECRET])
    one, other = (
        delivery_of(code, {"x-github-delivery": name, "x-github-event": event}, BODY)
        for name, event in (("d-1", "push"), ("d-2", "issues"))
    )
    assert (one.event, one.as_event().attributes["deliveryid"]) == ("push", "d-1")
    assert one.id == other.id  # by which a rule makes the key of the run
    assert one.task_id == other.task_id
    assert one.task_id != delivery_of(code, {}, BODY + b" ").task_id


# Stripe


def test_the_form_of_stripe_is_taken():
    secret = "whsec_a_text_and_no_base64"
    pay = hook(scheme="stripe", secrets=[secret])
    body = b'{"id": "evt_1", "type": "invoice.paid"}'
    verify(pay, stripe(body, secret), body, NOW)
    verify(pay, stripe(body, "of before", secret), body, NOW)
    for wrong in (
        stripe(body, "other"),
        {"stripe-signature": "t=1,t=2,v1=00"},
        {"stripe-signature": "v1=0"},
        {},
    ):
        with pytest.raises(SignatureRefused):
            verify(pay, wrong, body, NOW)
    with pytest.raises(OutOfTime):
        verify(pay, stripe(body, secret, at=int(NOW) - 301), body, NOW)
    first, again = (delivery_of(pay, stripe(body, secret, at=at), body) for at in (int(NOW), int(NOW) + 60))
    assert (first.id, first.event) == ("evt_1", "invoice.paid")
    assert first.task_id == again.task_id


# One's own


@pytest.mark.parametrize("algorithm", ["sha256", "sha512", "sha384", "sha1"])
@pytest.mark.parametrize("encoding", ["hex", "base64"])
def test_a_scheme_of_ones_own(algorithm, encoding):
    own = hook(
        scheme="hmac",
        secrets=["s3cret-text"],
        header="X-Shop-Hmac",
        algorithm=algorithm,
        encoding=encoding,
        prefix="v=",
        event_header="X-Shop-Topic",
    )
    digest = hmac.new(b"s3cret-text", BODY, algorithm).digest()
    text = base64.b64encode(digest).decode() if encoding == "base64" else digest.hex().upper()
    verify(own, {"x-shop-hmac": f"v={text}"}, BODY, NOW)
    assert delivery_of(own, {"x-shop-topic": "orders/paid"}, BODY).event == "orders/paid"
    with pytest.raises(SignatureRefused):
        verify(own, {"x-shop-hmac": text}, BODY, NOW)


# What it says


def test_a_delivery_is_an_event_of_its_webhook():
    event = delivery_of(hook(), standard(), BODY).as_event()
    assert (event.id, event.type, event.source) == ("msg_1", "shop.order.paid", "/v1/webhooks/shop")
    assert event.data == json.loads(BODY)
    assert delivery_of(hook(), standard(), b'{"type": "\\n"}').as_event().type == "shop"
    assert delivery_of(hook(), standard(), b"[1]").as_event().type == "shop"


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a":1,"a":2}', b"NaN", b"[" * 100_000])
def test_what_is_no_json_is_said(body):
    with pytest.raises(InvalidRequest, match="body"):
        delivery_of(hook(), standard(body), body)


def test_the_wake_key_is_found_in_the_body():
    render = hook(routes=False, wake="join(':', ['render', data.name])")
    assert wake_key(render, {"data": {"name": "j7"}}) == "render:j7"
    assert wake_key(hook(routes=False, wake="data.id"), {"data": {"id": 7}}) == "7"
    for wrong in ({}, {"data": {"name": 7}}, [], None, {"data": {"name": "x" * 300}}):
        with pytest.raises(InvalidRequest, match="key"):
            wake_key(render, wrong)
    with pytest.raises(InvalidRequest, match="is for queues"):
        wake_key(hook(routes=False, wake="data.id"), {"data": {"id": "answer:render:1"}})


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=6), st.binary(max_size=200))
def test_no_delivery_does_harm(headers: Mapping[str, str], body: bytes):
    for one in HOOKS:
        with pytest.raises(SignatureRefused):
            verify(one, {**headers, "stripe-signature": "t=1," + str(headers)}, body, NOW)
        with suppress(InvalidRequest):
            assert isinstance(delivery_of(one, {"webhook-id": "m", **headers}, body), Delivery)


HOOKS = [
    hook(),
    hook(scheme="github", secrets=[GITHUB_SECRET]),
    hook(scheme="stripe", secrets=["a secret"]),
    hook(scheme="hmac", secrets=["a secret"], header="x-own"),
]


# Which there are


def test_secrets_come_from_a_file_too_one_a_line(tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text(f"{SECRET}\n\n{OTHER}\n")
    assert len(hook(secrets=None, secret_file=str(secrets)).keys) == 2
    whole = tmp_path / "whole"
    whole.write_text(json.dumps({"scheme": "github", "secret": CANARY, "message": True}))
    found, wrong = read_webhooks({"DAGRELAY_WEBHOOK_CODE_FILE": str(whole)})
    assert not wrong
    assert found["code"].keys == (CANARY.encode(),)


def test_a_scope_is_as_a_keys():
    assert hook().scope == Scope()
    found = hook(scope={"dags": ["Sales_*"], "connections": ["EU"], "services": ["*"]})
    assert found.scope == Scope(("Sales_*",), ("eu",), ("*",))


def test_no_secret_is_shown():
    one = hook(scheme="github", secrets=[CANARY])
    assert CANARY not in repr(one)
    assert str(CANARY.encode()) not in repr(one)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (CANARY, "is no JSON object"),
        ([], "is no JSON object"),
        ({"scheme": "jwt"}, "scheme is none of standard, github, stripe, hmac"),
        ({"scheme": "standard", "routes": True}, "give one of secret, secrets and secret_file"),
        ({"scheme": "standard", "secret": CANARY, "routes": True}, "is no base64"),
        ({"scheme": "standard", "secret": "whsec_AAAA", "routes": True}, "fewer than 24 bytes"),
        ({"scheme": "github", "secret": "short", "routes": True}, "number 1 is shorter than 8"),
        ({"scheme": "github", "secrets": [CANARY, 7], "routes": True}, "secrets holds no text"),
        ({"scheme": "github", "secret_file": "/nowhere/x", "routes": True}, "cannot be read: FileNotFound"),
        ({"scheme": "github", "secret": CANARY}, 'give one of "routes": true'),
        ({"scheme": "github", "secret": CANARY, "routes": True, "wake": "a"}, 'give one of "routes": true'),
        ({"scheme": "github", "secret": CANARY, "routes": "yes"}, "routes is neither true nor false"),
        ({"scheme": "github", "secret": CANARY, "wake": "a["}, "wake is no JMESPath expression"),
        ({"scheme": "github", "secret": CANARY, "wake": 7}, "wake is no JMESPath expression"),
        ({"scheme": "github", "secret": CANARY, "routes": True, "header": "x"}, "has no use for 'header'"),
        ({"scheme": "hmac", "secret": CANARY, "routes": True}, "header is no name of a header"),
        (
            {"scheme": "hmac", "secret": CANARY, "routes": True, "header": "x", "algorithm": "md5"},
            "algorithm is none of",
        ),
        ({"scheme": "github", "secret": CANARY, "routes": True, "scope": {"dag": []}}, "scope is no object"),
        (
            {"scheme": "github", "secret": CANARY, "routes": True, "scope": {"dags": "x"}},
            "scope.dags is no list",
        ),
    ],
)
def test_every_mistake_is_said_by_name_and_shows_no_secret(value, words):
    assert any(words in line for line in mistakes(value))


def test_set_twice_is_a_mistake():
    text = json.dumps({"scheme": "github", "secret": CANARY, "routes": True})
    found, wrong = read_webhooks(
        {"DAGRELAY_WEBHOOK_A": text, "DAGRELAY_WEBHOOK_a": text, "DAGRELAY_WEBHOOK_B": ""}
    )
    assert list(found) == ["a"]
    assert wrong == ["DAGRELAY_WEBHOOK_a: webhook 'a' is set twice"]
