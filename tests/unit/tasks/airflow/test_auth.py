"""Tokens: one login for all threads, renewed in time, never lost for a server that is away for a moment."""

import base64
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from producers.errors import AirflowUnavailable, CredentialsRefused
from tasks.airflow.auth import LIFE_IF_UNTOLD_S, LoginTokens, authorisation, life_of_token_s
from tasks.airflow.connections import AirflowConnection
from tasks.airflow.single_flight import SingleFlight
from tasks.http import HttpResponse, NoAnswer
from tests.unit.tasks.airflow.recorded import answer, page, said
from tests.unit.tasks.airflow.scripted import Clock, Scripted

LOGIN = "POST /auth/token"
CONNECTION = AirflowConnection("default", "http://h", username="u", password="s3cr3t-canary")


def token(life_s: float, issued_at: float = 1_700_000_000, name: str = "t") -> str:
    """A token as Airflow makes it, whose clock need not be ours."""
    claims = json.dumps({"sub": name, "iat": issued_at, "exp": issued_at + life_s}).encode()
    return f"head.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.signature"


def logged_in(life_s: float, name: str) -> HttpResponse:
    return said(201, {"access_token": token(life_s, name=name)})


@pytest.fixture
def server() -> Scripted:
    return Scripted("v2")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(server: Scripted, clock: Clock) -> LoginTokens:
    return LoginTokens(CONNECTION, server.send, clock)


def test_a_real_login_is_read(server, clock):
    server.on(LOGIN, answer("v2", "login"))

    headers = LoginTokens(CONNECTION, server.send, clock).headers()

    assert headers["Authorization"].startswith("Bearer eyJ")
    assert json.loads(server.requests[0].body) == {"username": "u", "password": "s3cr3t-canary"}
    assert life_of_token_s(headers["Authorization"].removeprefix("Bearer "), clock.now) == 86_400


def test_a_token_is_used_until_four_fifths_of_its_life_are_over(server, clock, tokens):
    server.on(LOGIN, logged_in(1000, "a"), logged_in(1000, "b"))

    first = tokens.headers()
    clock.now += 799
    assert tokens.headers() == first
    clock.now += 1
    assert tokens.headers() != first
    assert server.times(LOGIN) == 2


@pytest.mark.parametrize(
    "text",
    ["", "a", "a.b.c", "a..", "a.e30.c", "a.bnVsbA.c", "a.W10.c", f"a.{'W' * 9000}.c", token(-5), "ä.ö.ü"],
)
def test_a_token_that_does_not_tell_its_life_is_used_for_an_hour(text):
    assert life_of_token_s(text, 0.0) == LIFE_IF_UNTOLD_S


def test_the_servers_clock_may_be_wrong(clock):
    assert life_of_token_s(token(600, issued_at=1), clock.now) == 600


def test_many_threads_log_in_once(server, clock, tokens):
    def slowly(_):
        time.sleep(0.1)
        return logged_in(1000, "a")

    server.on(LOGIN, slowly)
    with ThreadPoolExecutor(16) as pool:
        headers = list(pool.map(lambda _: dict(tokens.headers()), range(64)))

    assert server.times(LOGIN) == 1
    assert all(one == headers[0] for one in headers)


def test_many_threads_fail_together(server, clock, tokens):
    def slowly(_):
        time.sleep(0.1)
        raise NoAnswer("h: no complete answer within 10 s", True)

    server.on(LOGIN, slowly)

    def ask(_):
        with pytest.raises(AirflowUnavailable, match="no answer to the login") as raised:
            tokens.headers()
        return raised.value

    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(ask, range(8)))

    assert server.times(LOGIN) == 1  # not eight timeouts, one after the other
    assert len({id(error) for error in errors}) == 8  # a traceback belongs to one thread
    assert not any(error.unsure for error in errors)


def test_a_refused_token_is_replaced_once_for_all_threads(server, tokens):
    server.on(LOGIN, logged_in(1000, "a"), logged_in(1000, "b"))
    stale = tokens.headers()

    for _ in range(5):  # five threads had sent the same token
        assert tokens.refused(stale)
        fresh = tokens.headers()

    assert server.times(LOGIN) == 2
    assert fresh != stale
    assert tokens.headers() == fresh


def test_while_one_thread_renews_the_others_use_the_old_token(server, clock, tokens):
    server.on(LOGIN, logged_in(1000, "a"))
    old = tokens.headers()
    clock.now += 900
    go, started = threading.Event(), threading.Event()

    def slowly(_):
        started.set()
        go.wait(10)
        return logged_in(1000, "b")

    server.on(LOGIN, slowly)
    with ThreadPoolExecutor(1) as pool:
        renewed = pool.submit(tokens.headers)
        assert started.wait(10)
        assert tokens.headers() == old
        go.set()
        assert renewed.result(10) != old
    assert tokens.headers() != old


@pytest.mark.parametrize(
    "trouble", [page(502), NoAnswer("h: connection refused", False), said(401, {"detail": "x"})]
)
def test_a_token_that_still_lives_outlasts_a_failed_renewal(server, clock, tokens, trouble):
    server.on(LOGIN, logged_in(1000, "a"))
    old = tokens.headers()
    server.on(LOGIN, trouble)

    clock.now += 800
    assert tokens.headers() == old
    clock.now += 59
    assert tokens.headers() == old
    assert server.times(LOGIN) == 2  # and it is not tried again at once
    clock.now += 1
    assert tokens.headers() == old
    assert server.times(LOGIN) == 3
    clock.now += 200  # now it has expired
    with pytest.raises((AirflowUnavailable, CredentialsRefused)):
        tokens.headers()


def test_a_wrong_password_is_refused_in_airflows_words(server, tokens):
    server.on(LOGIN, answer("v2", "login_refused"))

    with pytest.raises(CredentialsRefused, match="'default': Invalid credentials"):
        tokens.headers()


def test_the_password_is_never_shown(server, tokens, caplog):
    caplog.set_level("DEBUG")
    secret = CONNECTION.password
    for response in (
        said(422, {"detail": [{"msg": f"odd {secret}", "loc": ["body", "password"], "input": secret}]}),
        said(422, {"detail": f"1 validation error for LoginBody input_value={secret}"}),
        answer("v2", "login_malformed"),
        said(200, {"token": secret}),
        page(403, f"go away {secret[:0]}"),
    ):
        server.on(LOGIN, response)
        with pytest.raises((CredentialsRefused, AirflowUnavailable)) as raised:
            tokens.headers()
        assert secret not in f"{raised.value} {raised.value.args}"
        assert "canary" not in str(raised.value)
    server.on(LOGIN, logged_in(10, "a"))
    tokens.headers()
    assert secret not in caplog.text
    assert "Bearer" not in caplog.text
    assert token(10, name="a") not in caplog.text


@pytest.mark.parametrize(
    "trouble",
    [
        NoAnswer("h: connection refused", False),
        NoAnswer("h: no complete answer within 10 s", True),
        page(500),
        page(502),
        page(200, "Sign in"),
        page(302),
        page(404),
        page(401),
        said(429, {"detail": "slow down"}),
        said(201, {"access_token": None}),
        said(201, {"access_token": "a\nb"}),
        said(201, []),
    ],
)
def test_a_login_that_is_not_answered_by_airflow_is_not_the_credentials_fault(server, tokens, trouble):
    server.on(LOGIN, trouble)

    with pytest.raises(AirflowUnavailable, match="login") as raised:
        tokens.headers()
    assert raised.value.unsure is False  # the request itself was never sent


def test_retry_after_of_a_login_is_kept(server, tokens):
    server.on(LOGIN, HttpResponse(503, {"retry-after": "9"}, b""))

    with pytest.raises(AirflowUnavailable) as raised:
        tokens.headers()
    assert raised.value.retry_after_s == 9


@pytest.mark.parametrize("status", [404, 405])
def test_an_airflow_without_logins_asks_for_a_static_token(server, tokens, status):
    server.on(LOGIN, said(status, {"detail": "Not Found" if status == 404 else "Method Not Allowed"}))

    with pytest.raises(CredentialsRefused, match="static token"):
        tokens.headers()


def test_a_connection_without_user_takes_the_token_for_everybody(server, clock):
    nobody = AirflowConnection("default", "http://h")
    server.on("GET /auth/token", said(201, {"access_token": "t"}))
    assert LoginTokens(nobody, server.send, clock).headers() == {"Authorization": "Bearer t"}

    server.on("GET /auth/token", answer("v2", "login_for_nobody"))
    tokens = LoginTokens(nobody, server.send, clock)
    assert tokens.headers() == {}
    assert tokens.refused(tokens.headers()) is False


def test_which_way_is_taken(server, clock):
    def headers(api, **more):
        return authorisation(AirflowConnection("x", "http://h", **more), api, server.send, clock).headers()

    assert headers("v1", username="jösé", password="p:w") == {"Authorization": "Basic asO2c8OpOnA6dw=="}
    assert headers("v1", token="t") == headers("v2", token="t") == {"Authorization": "Bearer t"}
    assert headers("v1") == {}
    assert headers("v2", username="u", password="p") == {"Authorization": "Bearer t1"}


def test_a_static_token_cannot_be_renewed(server, clock):
    fixed = authorisation(AirflowConnection("x", "http://h", token="t"), "v2", server.send, clock)

    assert fixed.refused(fixed.headers()) is False


# Single flight


def test_the_next_one_starts_anew_after_success_and_failure():
    flight: SingleFlight[int] = SingleFlight()
    assert flight.do(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        flight.do(lambda: 1 // 0)
    assert flight.do(lambda: 2) == 2
    assert not flight.busy


def test_who_waits_for_one_that_is_interrupted_is_told_that_nothing_was_sent():
    flight: SingleFlight[int] = SingleFlight()
    started, go = threading.Event(), threading.Event()

    def interrupted() -> int:
        started.set()
        go.wait(10)
        raise SystemExit

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(flight.do, interrupted)
        started.wait(10)
        second = pool.submit(flight.do, lambda: 5)
        time.sleep(0.05)
        go.set()
        with pytest.raises(SystemExit):
            first.result(10)
        with pytest.raises(AirflowUnavailable) as raised:
            second.result(10)
    assert raised.value.unsure is False


def test_a_child_does_not_wait_for_its_parents_thread():
    flight: SingleFlight[int] = SingleFlight()
    started, go = threading.Event(), threading.Event()

    def slowly() -> int:
        started.set()
        go.wait(10)
        return 1

    with ThreadPoolExecutor(1) as pool:
        pool.submit(flight.do, slowly)
        started.wait(10)
        pid = os.fork()
        if pid == 0:
            os._exit(flight.do(lambda: 7))
        go.set()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
