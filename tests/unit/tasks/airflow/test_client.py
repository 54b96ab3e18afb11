"""What an answer means: the table in docs/design.md, section 4, as far as the client decides it."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from producers.contract import TaskInstance, TriggerRequest
from producers.errors import (
    AirflowUnavailable,
    CredentialsRefused,
    DagBroken,
    DagNotFound,
    RequestRejected,
)
from tasks.airflow.client import AirflowClient, DagRunExists, as_dag_run
from tasks.airflow.connections import AirflowConnection
from tasks.http import HttpResponse, NoAnswer
from tests.unit.tasks.airflow.recorded import CANARY, answer, page, said
from tests.unit.tasks.airflow.scripted import Clock, Scripted

CONNECTION = AirflowConnection("default", "http://h", username="u", password="pw-canary")
REQUEST = TriggerRequest("recorded", {"a": CANARY})
DATE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

RUNS = {api: f"POST /api/{api}/dags/recorded/dagRuns" for api in ("v1", "v2")}
DAGS = {api: f"GET /api/{api}/dags" for api in ("v1", "v2")}
LOGIN = "POST /auth/token"
VERSION = {api: f"GET /api/{api}/version" for api in ("v1", "v2")}
both = pytest.mark.parametrize("api", ["v1", "v2"])


def client_of(server: Scripted, connection: AirflowConnection = CONNECTION) -> AirflowClient:
    return AirflowClient(connection, server.send, Clock())


def create(server: Scripted, connection: AirflowConnection = CONNECTION):
    return client_of(server, connection).create_dag_run(REQUEST, "plain", "a note")


# The version


@both
def test_the_version_is_found_by_asking_and_kept(api):
    server = Scripted(api)
    server.on(RUNS[api], answer(api, "created"))
    client = client_of(server)

    for _ in range(3):
        assert client.create_dag_run(REQUEST, "plain", "").run_id == "plain"

    assert server.times(VERSION["v2"]) == 1
    assert server.times(VERSION["v1"]) == (1 if api == "v1" else 0)
    assert server.times(RUNS[api]) == 3
    assert server.times(LOGIN) == (1 if api == "v2" else 0)
    assert client.version() == ("2.11.2" if api == "v1" else "3.3.2")


@both
def test_a_version_that_is_given_is_not_asked_for(api):
    server = Scripted(api)
    server.on(RUNS[api], answer(api, "created"))

    create(server, replace(CONNECTION, api_version=api))

    assert not server.times(VERSION["v1"]) + server.times(VERSION["v2"])


@pytest.mark.parametrize(
    "trouble",
    [NoAnswer("h: connection refused", False), NoAnswer("h: timeout", True), page(502), page(302), page(200)],
)
def test_a_version_that_cannot_be_asked_for_means_that_nothing_was_sent(trouble):
    server = Scripted("v2")
    server.on(VERSION["v2"], trouble)

    with pytest.raises(AirflowUnavailable) as raised:
        create(server)
    assert raised.value.unsure is False
    assert server.times(RUNS["v2"]) == server.times(RUNS["v1"]) == 0


def test_an_address_without_airflow_is_told():
    server = Scripted("v2")
    server.on(VERSION["v2"], page(404))
    server.on(VERSION["v1"], page(404))

    with pytest.raises(AirflowUnavailable, match="is the address of the connection right") as raised:
        create(server)
    assert raised.value.unsure is False


def test_an_upgrade_from_2_to_3_is_noticed():
    server = Scripted("v1")
    server.on(RUNS["v1"], answer("v1", "created"))
    client = client_of(server)
    client.create_dag_run(REQUEST, "plain", "")

    server.speaks("v2")
    server.on(RUNS["v2"], answer("v2", "created"))
    view = client.create_dag_run(REQUEST, "plain", "")

    assert view.api == "v2"
    assert server.tokens_seen(RUNS["v2"]) == ["Bearer t1"]
    assert client.version() == "3.3.2"


def test_a_way_back_from_3_to_2_is_noticed():
    server = Scripted("v2")
    server.on(RUNS["v2"], answer("v2", "created"))
    client = client_of(server)
    client.create_dag_run(REQUEST, "plain", "")

    server.speaks("v1")
    server.on(RUNS["v1"], answer("v1", "created"))
    view = client.create_dag_run(REQUEST, "plain", "")

    assert view.api == "v1"
    assert (server.tokens_seen(RUNS["v1"])[0] or "").startswith("Basic ")


def test_a_way_back_is_noticed_at_the_login_too():
    server = Scripted("v1")
    server.on(RUNS["v1"], answer("v1", "created"))
    server.on(VERSION["v2"], answer("v2", "version"), answer("v1", "v2_version"))
    client = client_of(server)

    with pytest.raises(AirflowUnavailable) as raised:
        client.create_dag_run(REQUEST, "plain", "")
    assert raised.value.unsure is False
    assert client.create_dag_run(REQUEST, "plain", "").api == "v1"


def test_a_404_of_a_proxy_while_the_api_is_there_is_unknown():
    server = Scripted("v2")
    server.on(RUNS["v2"], page(404))
    client = client_of(server)

    for _ in range(2):
        with pytest.raises(AirflowUnavailable, match="somebody else answered 404") as raised:
            client.create_dag_run(REQUEST, "plain", "")
        assert raised.value.unsure
    assert server.times(LOGIN) == 1  # the token is kept


def test_a_404_that_stays_unexplained_is_unknown():
    server = Scripted("v2")
    server.on(RUNS["v2"], page(404))
    server.on(VERSION["v2"], answer("v2", "version"), NoAnswer("h: connection refused", False))

    with pytest.raises(AirflowUnavailable) as raised:
        create(server)
    assert raised.value.unsure


def test_a_given_version_that_is_not_there_is_told():
    server = Scripted("v2")
    server.on("GET /api/v1/dags/recorded/dagRuns/plain", answer("v2", "v1_version"))
    client = client_of(server, replace(CONNECTION, api_version="v1"))

    with pytest.raises(AirflowUnavailable, match="api_version=v1, and this Airflow does not have it"):
        client.get_dag_run("recorded", "plain")
    with pytest.raises(AirflowUnavailable, match="api_version=v1"):
        client.version()


def test_many_threads_ask_for_the_version_once():
    server = Scripted("v2")
    server.on(RUNS["v2"], answer("v2", "created"))

    def slowly(_):
        time.sleep(0.1)
        return answer("v2", "version")

    server.on(VERSION["v2"], slowly)
    client = client_of(server)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: client.create_dag_run(REQUEST, "plain", ""), range(32)))

    assert server.times(VERSION["v2"]) == 1
    assert server.times(LOGIN) == 1
    assert server.times(RUNS["v2"]) == 32


# The table


@both
def test_created(api):
    server = Scripted(api)
    server.on(RUNS[api], answer(api, "created"))

    view = create(server)

    assert (view.dag_id, view.run_id, view.state, view.conf) == ("recorded", "plain", "queued", {})
    assert server.times(RUNS[api]) == 1
    assert json.loads(server.requests[-1].body)["note"] == "a note"


@both
@pytest.mark.parametrize("case", ["run_id_taken", "logical_date_taken"])
def test_taken(api, case):
    server = Scripted(api)
    server.on(RUNS[api], answer(api, case))

    with pytest.raises(DagRunExists):
        create(server)


@both
@pytest.mark.parametrize(
    ("trouble", "unsure"),
    [
        (NoAnswer("h: connection refused", False), False),
        (NoAnswer("h: no complete answer within 10 s", True), True),
        (page(500), True),
        (page(502), True),
        (page(504), True),
        (HttpResponse(429, {"retry-after": "7"}, b""), True),
        (said(503, {"detail": "starting"}), True),
        (page(302), True),
        (page(200), True),
        (page(400), True),
        (page(403), True),
        (page(413), True),
    ],
)
def test_no_usable_answer(api, trouble, unsure):
    server = Scripted(api)
    server.on(RUNS[api], trouble)

    with pytest.raises(AirflowUnavailable) as raised:
        create(server)
    assert raised.value.unsure is unsure
    assert raised.value.retry_after_s == (7 if "429" in raised.value.reason else None)
    assert server.times(RUNS[api]) == 1  # whether to send again is not decided here


@pytest.mark.parametrize("case", ["token_expired", "token_invalid"])
def test_a_stale_token_is_renewed_and_the_request_sent_again(case):
    server = Scripted("v2")
    server.on(RUNS["v2"], answer("v2", case), answer("v2", "created"))

    assert create(server).run_id == "plain"
    assert server.tokens_seen(RUNS["v2"]) == ["Bearer t1", "Bearer t2"]


@pytest.mark.parametrize("case", ["token_expired", "token_invalid", "no_credentials"])
def test_a_fresh_token_that_is_refused_is_the_connections_fault(case):
    server = Scripted("v2")
    server.on(RUNS["v2"], answer("v2", case))

    with pytest.raises(CredentialsRefused) as raised:
        create(server)
    assert raised.value.connection == "default"
    assert server.times(RUNS["v2"]) == 2


def test_a_login_that_fails_after_a_stale_token_means_that_nothing_was_done():
    server = Scripted("v2")
    server.on(RUNS["v2"], answer("v2", "token_expired"))
    server.on(LOGIN, said(201, {"access_token": "t1"}), NoAnswer("h: timeout", True))

    with pytest.raises(AirflowUnavailable) as raised:
        create(server)
    assert raised.value.unsure is False


def test_a_static_token_that_is_refused_is_the_connections_fault():
    server = Scripted("v2")
    server.on(RUNS["v2"], answer("v2", "token_expired"))

    with pytest.raises(CredentialsRefused, match="Token Expired"):
        create(server, AirflowConnection("default", "http://h", token="static"))
    assert server.times(RUNS["v2"]) == 1
    assert server.times(LOGIN) == 0


def test_a_wrong_password_is_the_connections_fault():
    server = Scripted("v2")
    server.on(LOGIN, answer("v2", "login_refused"))

    with pytest.raises(CredentialsRefused, match="Invalid credentials"):
        create(server)
    assert server.times(RUNS["v2"]) == 0


def test_a_missing_permission_is_the_requests_fault():
    server = Scripted("v2")
    server.on(RUNS["v2"], answer("v2", "forbidden"))

    with pytest.raises(RequestRejected, match="Forbidden") as raised:
        create(server)
    assert raised.value.status == 403


@pytest.mark.parametrize(
    ("dags", "error"),
    [
        (answer("v1", "dags_of_viewer"), RequestRejected),
        (answer("v1", "dags_password_wrong"), CredentialsRefused),
        (page(502), AirflowUnavailable),
        (page(404), AirflowUnavailable),
        (NoAnswer("h: timeout", True), AirflowUnavailable),
    ],
)
def test_403_of_airflow_2_is_explained_by_another_question(dags, error):
    server = Scripted("v1")
    server.on(RUNS["v1"], answer("v1", "forbidden"))
    server.on(DAGS["v1"], dags)

    with pytest.raises(error) as raised:
        create(server)
    assert server.tokens_seen(RUNS["v1"]) == server.tokens_seen(DAGS["v1"])
    assert getattr(raised.value, "unsure", False) is False  # 403: it was not done


@both
def test_a_dag_that_is_not_there(api):
    server = Scripted(api)
    server.on(RUNS[api], answer(api, "dag_unknown"))

    with pytest.raises(DagNotFound):
        create(server)


@both
def test_a_dag_with_import_errors(api):
    words = "Dag with dag_id: 'recorded' has import errors and cannot be triggered"
    server = Scripted(api)
    server.on(RUNS[api], answer("v1", "dag_broken") if api == "v1" else said(400, {"detail": words}))

    with pytest.raises(DagBroken, match="has import errors"):
        create(server)


@both
@pytest.mark.parametrize(
    "case", ["param_of_wrong_type", "note_too_long", "run_id_reserved", "conf_is_a_list"]
)
def test_a_request_that_airflow_refuses(api, case):
    server = Scripted(api)
    server.on(RUNS[api], answer(api, case))

    with pytest.raises(RequestRejected) as raised:
        create(server)
    assert not isinstance(raised.value, DagNotFound | DagBroken)
    assert CANARY not in str(raised.value)


def test_what_airflow_2_cannot_do_is_not_sent():
    server = Scripted("v1")
    request = TriggerRequest("recorded", run_after=DATE)

    with pytest.raises(RequestRejected, match="run_after"):
        client_of(server).create_dag_run(request, "plain", "")
    assert server.times(RUNS["v1"]) == 0


# The rest


@both
def test_a_run_is_got_or_not(api):
    server = Scripted(api)
    path = f"GET /api/{api}/dags/recorded/dagRuns/full"
    server.on(path, answer(api, "run"), answer(api, "run_unknown"), answer(api, "run_of_unknown_dag"))
    client = client_of(server)

    assert client.get_dag_run("recorded", "full").logical_date == DATE
    assert client.get_dag_run("recorded", "full") is None
    assert client.get_dag_run("recorded", "full") is None
    server.on(path, page(404))
    with pytest.raises(AirflowUnavailable):  # nobody knows: no "there is none"
        client.get_dag_run("recorded", "full")


def test_a_get_renews_its_token_too():
    server = Scripted("v2")
    path = "GET /api/v2/dags/recorded/dagRuns/full"
    server.on(path, answer("v2", "token_invalid"), answer("v2", "run"))

    assert client_of(server).get_dag_run("recorded", "full").run_id == "full"
    assert server.tokens_seen(path) == ["Bearer t1", "Bearer t2"]


@both
def test_the_holder_of_a_logical_date(api):
    server = Scripted(api)
    path = f"GET /api/{api}/dags/recorded/dagRuns"
    server.on(path, answer(api, "found_by_logical_date"), answer(api, "found_none"))
    client = client_of(server)

    assert client.find_run_by_logical_date("recorded", DATE) == "full"
    assert client.find_run_by_logical_date("recorded", DATE) is None


@both
def test_clear_and_note(api):
    server = Scripted(api)
    run = f"/api/{api}/dags/recorded/dagRuns/full"
    note = f"PATCH {run}" + ("/setNote" if api == "v1" else "")
    server.on(f"POST {run}/clear", answer(api, "cleared"), answer(api, "clear_of_unknown_run"))
    server.on(note, answer(api, "note_set"), answer(api, "note_of_unknown_run"))
    client = client_of(server)

    client.clear_dag_run("recorded", "full")
    client.set_note("recorded", "full", "dagrelay: another note")
    with pytest.raises(RequestRejected, match="does not exist any more"):
        client.clear_dag_run("recorded", "full")
    with pytest.raises(RequestRejected, match="does not exist any more"):
        client.set_note("recorded", "full", "x")


@both
def test_a_dag_is_asked_for_counted_and_unpaused(api):
    server = Scripted(api)
    dag = f"/api/{api}/dags/recorded_params"
    server.on(f"GET {dag}", answer(api, "dag_paused"))
    server.on(f"GET {dag}/dagRuns", answer(api, "unfinished_counted"))
    server.on(f"PATCH {dag}", answer(api, "unpaused"))
    client = client_of(server)

    assert client.get_dag("recorded_params").is_paused
    assert client.count_unfinished_runs("recorded_params") == 3
    client.unpause_dag("recorded_params")
    assert server.times(f"PATCH {dag}") == 1


@both
def test_a_role_that_may_not_unpause_is_told_so(api):
    server = Scripted(api)
    server.on(f"PATCH /api/{api}/dags/recorded", answer(api, "unpause_forbidden"))
    server.on(DAGS[api], answer(api, "dags_of_viewer" if api == "v1" else "dags"))

    with pytest.raises(RequestRejected, match="Forbidden") as raised:
        client_of(server).unpause_dag("recorded")
    assert raised.value.status == 403


@both
def test_the_check_of_doctor(api):
    server = Scripted(api)
    health = "GET /api/v2/monitor/health" if api == "v2" else "GET /api/v1/health"
    server.on(health, answer(api, "health"))
    server.on(DAGS[api], answer(api, "dags"))

    found = client_of(server).check()

    assert (found.api, found.scheduler, found.credentials_accepted, found.problem) == (
        api,
        "healthy",
        True,
        "",
    )
    assert found.version == ("3.3.2" if api == "v2" else "2.11.2")
    server.on(
        DAGS[api], answer("v1", "dags_password_wrong") if api == "v1" else answer("v2", "token_invalid")
    )
    found = client_of(server).check()
    assert not found.credentials_accepted
    assert found.problem
    server.on(health, NoAnswer("h: timeout", True))
    with pytest.raises(AirflowUnavailable):
        client_of(server).check()


@both
def test_a_run_becomes_the_outcome_of_a_trigger(api):
    server = Scripted(api)
    server.on(f"GET /api/{api}/dags/recorded/dagRuns/full", answer(api, "run"))
    view = client_of(server).get_dag_run("recorded", "full")

    run = as_dag_run(view, CONNECTION, created=False, cleared=True)

    assert (run.dag_id, run.dag_run_id, run.created, run.cleared) == ("recorded", "full", False, True)
    assert run.logical_date == "2026-01-02T03:04:05+00:00"
    assert run.connection == "default"
    assert run.url == CONNECTION.run_url(api, "recorded", "full")
    assert json.loads(json.dumps(run.to_message()))["state"] == view.state


def test_no_log_line_shows_a_secret(caplog):
    caplog.set_level(logging.DEBUG)
    for api in ("v1", "v2"):
        for case in ("created", "param_of_wrong_type", "run_id_taken", "dag_unknown", "no_credentials"):
            server = Scripted(api)
            server.on(RUNS[api], answer(api, case))
            server.on(DAGS[api], answer(api, case))
            with nullcontext() if case == "created" else pytest.raises(Exception):  # noqa: PT011
                create(server)

    assert "connection=default" in caplog.text
    for secret in (CANARY, "pw-canary", "Bearer", "Basic", "t1"):
        assert secret not in caplog.text


# What a task returned

XCOM = {
    api: f"GET /api/{api}/dags/d/dagRuns/r/taskInstances/t/xcomEntries/return_value" for api in ("v1", "v2")
}
TASK = {api: f"GET /api/{api}/dags/d/dagRuns/r/taskInstances/t" for api in ("v1", "v2")}


@both
def test_a_task_that_returned_nothing_is_told_from_one_that_is_not_there_and_one_that_is_mapped(api):
    server = Scripted(api)
    client = client_of(server)
    server.on(XCOM[api], answer(api, "xcom_of_some"), answer(api, "xcom_of_none"))

    assert client.get_xcom("d", "r", "t")["answer"] == 42
    server.on(TASK[api], answer(api, "task_none"))
    assert client.get_xcom("d", "r", "t") is None
    server.on(TASK[api], answer(api, "task_many"))
    with pytest.raises(RequestRejected, match="task 't' is mapped"):
        client.get_xcom("d", "r", "t")
    server.on(TASK[api], answer(api, "task_nobody"))
    with pytest.raises(RequestRejected, match="no task 't'"):
        client.get_xcom("d", "r", "t")


def test_an_airflow_before_2_10_is_asked_for_the_repr():
    server = Scripted("v1")
    refused = said(
        400, {"status": 400, "title": "Bad Request", "detail": "Extra query parameter(s) stringify"}
    )
    server.on(XCOM["v1"], refused, said(200, {"key": "return_value", "value": "{'answer': 42}"}))

    assert client_of(server).get_xcom("d", "r", "t") == {"answer": 42}
    assert [request.path.rpartition("?")[2] for request in server.requests[-2:]] == [
        "stringify=false",
        "/api/v1/dags/d/dagRuns/r/taskInstances/t/xcomEntries/return_value",
    ]


WAITS = TaskInstance(dag_id="recorded_params", dag_run_id="counted-0", task_id="nothing")


def test_airflow_3_is_told_the_state_and_the_note_of_a_task_in_one_step():
    server = Scripted("v2")
    path = "/api/v2/dags/recorded_params/dagRuns/counted-0/taskInstances/nothing/-1"
    server.on(f"GET {path}", answer("v2", "task_instance"))
    server.on(f"PATCH {path}", answer("v2", "task_set"), answer("v2", "task_set_again"))
    client = client_of(server)

    assert client.get_task_instance(WAITS).try_number == 0
    client.set_task_state(WAITS, "failed", "why")
    client.set_task_state(WAITS, "failed", "why")  # 409: it is so already

    assert server.times(f"PATCH {path}") == 2


def test_airflow_2_is_told_the_note_of_a_task_before_its_state():
    server = Scripted("v1")
    path = "/api/v1/dags/recorded_params/dagRuns/counted-0/taskInstances/nothing"
    server.on(f"PATCH {path}/setNote", answer("v1", "task_note_set"))
    server.on(f"PATCH {path}", answer("v1", "task_set"))

    client_of(server).set_task_state(WAITS, "failed", "why")

    assert server.asked[-2:] == [f"PATCH {path}/setNote", f"PATCH {path}"]
    assert json.loads(server.requests[-1].body) == {"new_state": "failed", "dry_run": False}


@both
def test_whether_a_task_is_mapped_is_asked_of_its_run(api):
    server = Scripted(api)
    path = f"/api/{api}/dags/recorded_results/dagRuns/ended/taskInstances/many/listMapped"
    server.on(f"GET {path}", answer(api, "mapped"))

    assert client_of(server).is_mapped("recorded_results", "ended", "many")
