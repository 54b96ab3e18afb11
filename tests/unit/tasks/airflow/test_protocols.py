"""Both protocols, against what real Airflows answered (recorded) and what stands between (by hand)."""

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest

from producers.contract import TaskInstance, TriggerRequest
from producers.errors import AirflowUnavailable, DagBroken, DagNotFound, RequestRejected
from tasks.airflow import protocol_v1, protocol_v2
from tasks.airflow.answers import DagRunExists, DagView, Forbidden, NotThisApi, TokenRefused, retry_after_s
from tests.unit.tasks.airflow.recorded import CANARY, answer, cases, page, said

PROTOCOLS = {"v1": protocol_v1, "v2": protocol_v2}
both = pytest.mark.parametrize("api", ["v1", "v2"])
DATE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
REQUEST = TriggerRequest("recorded", {"a": CANARY, "n": 47_110_815, "deep": [{CANARY: [CANARY]}]})


def created(api, response, run_id="plain", request=REQUEST):
    return PROTOCOLS[api].read_created(response, request, run_id)


def body_of(request):
    return json.loads(request.body)


# What is sent


def test_airflow_3_wants_a_logical_date_even_if_there_is_none():
    sent = protocol_v2.create_run(TriggerRequest("daily_sales"), "r1", "a note")

    assert (sent.method, sent.path) == ("POST", "/api/v2/dags/daily_sales/dagRuns")
    assert body_of(sent) == {"dag_run_id": "r1", "logical_date": None, "note": "a note"}
    assert sent.headers["Content-Type"] == "application/json"


def test_airflow_2_takes_no_null():
    sent = protocol_v1.create_run(TriggerRequest("daily_sales"), "r1", "a note")

    assert (sent.method, sent.path) == ("POST", "/api/v1/dags/daily_sales/dagRuns")
    assert body_of(sent) == {"dag_run_id": "r1", "note": "a note"}


@both
def test_conf_and_logical_date_are_sent_as_they_are(api):
    local = DATE.astimezone(timezone(timedelta(hours=2)))
    request = TriggerRequest("d", {"Straße": "ü🚀", "n": [1, 2.5, None, True]}, logical_date=local)

    sent = PROTOCOLS[api].create_run(request, "r1", "")

    assert body_of(sent)["conf"] == {"Straße": "ü🚀", "n": [1, 2.5, None, True]}
    assert body_of(sent)["logical_date"] == "2026-01-02T03:04:05+00:00"
    assert "Straße".encode() in sent.body


@both
def test_an_empty_conf_is_sent_as_empty_and_no_conf_is_not_sent(api):
    assert body_of(PROTOCOLS[api].create_run(TriggerRequest("d", {}), "r1", ""))["conf"] == {}
    assert "conf" not in body_of(PROTOCOLS[api].create_run(TriggerRequest("d"), "r1", ""))


def test_run_after_is_for_airflow_3():
    request = TriggerRequest("d", run_after=DATE)

    assert body_of(protocol_v2.create_run(request, "r1", ""))["run_after"] == "2026-01-02T03:04:05+00:00"
    with pytest.raises(RequestRejected, match="run_after: Airflow 2 does not have it"):
        protocol_v1.create_run(request, "r1", "")


@pytest.mark.parametrize("run_id", ["a/b", "ü", "a b", "a" * 251, "scheduled__1", "a..b", "", "~"])
def test_what_airflow_2_answers_500_to_is_not_sent(run_id):
    with pytest.raises(RequestRejected):
        protocol_v1.create_run(TriggerRequest("d"), run_id, "")


def test_a_body_that_airflow_2_cannot_read_is_not_sent():
    def sent(size):
        return protocol_v1.create_run(TriggerRequest("d", {"a": "x" * size}), "r", "")

    overhead = len(sent(0).body)
    assert len(sent(protocol_v1.MAX_BODY_BYTES - overhead).body) == protocol_v1.MAX_BODY_BYTES
    with pytest.raises(RequestRejected, match="send a reference") as raised:
        sent(protocol_v1.MAX_BODY_BYTES - overhead + 1)
    assert raised.value.status == 413
    # Recorded: with this many bytes it works, with one more it does not.
    assert answer("v1", f"size_{protocol_v1.MAX_BODY_BYTES}").status == 200
    assert answer("v1", f"size_{protocol_v1.MAX_BODY_BYTES + 1}").status == 500


@both
@pytest.mark.parametrize("dag_id", [".", ".."])
def test_an_id_that_would_be_a_step_in_the_path_is_not_sent(api, dag_id):
    with pytest.raises(RequestRejected, match="cannot be part of a URL"):
        PROTOCOLS[api].get_run(dag_id, "r1")
    with pytest.raises(RequestRejected, match="cannot be part of a URL"):
        PROTOCOLS[api].get_run("d", dag_id)


@both
def test_ids_are_quoted(api):
    sent = PROTOCOLS[api].get_run("verkäufe.täglich", "manual__2026-01-01T00:00:00+00:00")

    assert sent.path.endswith(
        "/dags/verk%C3%A4ufe.t%C3%A4glich/dagRuns/manual__2026-01-01T00%3A00%3A00%2B00%3A00"
    )


@both
def test_a_clear_is_no_dry_run(api):
    sent = PROTOCOLS[api].clear_run("d", "r1")

    assert (sent.method, sent.path) == ("POST", f"/api/{api}/dags/d/dagRuns/r1/clear")
    assert body_of(sent) == {"dry_run": False}


def test_each_version_has_its_way_to_set_a_note():
    new, old = protocol_v2.set_note("d", "r1", "ü"), protocol_v1.set_note("d", "r1", "ü")

    assert (new.method, new.path) == ("PATCH", "/api/v2/dags/d/dagRuns/r1?update_mask=note")
    assert (old.method, old.path) == ("PATCH", "/api/v1/dags/d/dagRuns/r1/setNote")
    assert body_of(new) == body_of(old) == {"note": "ü"}


def test_each_version_has_its_name_for_the_logical_date_of_a_list():
    at = "2026-01-02T03%3A04%3A05%2B00%3A00"

    assert protocol_v2.find_by_logical_date("d", DATE).path == (
        f"/api/v2/dags/d/dagRuns?logical_date_gte={at}&logical_date_lte={at}&limit=1"
    )
    assert protocol_v1.find_by_logical_date("d", DATE).path == (
        f"/api/v1/dags/d/dagRuns?execution_date_gte={at}&execution_date_lte={at}&limit=1"
    )


# What comes back


@both
def test_a_run_is_read_with_all_that_is_known_of_it(api):
    view = created(api, answer(api, "created_with_all"), "full")

    assert (view.dag_id, view.run_id, view.state, view.api) == ("recorded", "full", "queued", api)
    assert view.conf == {"region": "EU", "n": [1, 2.5, None, "ü"]}
    assert view.logical_date == DATE
    assert view.note == "dagrelay task=0 asked by=recorder"
    assert view.start_date is view.end_date is None
    assert (view.run_after is not None) == (view.queued_at is not None) == (api == "v2")


def test_a_run_without_logical_date_has_none_in_airflow_3_and_its_own_in_airflow_2():
    assert created("v2", answer("v2", "created")).logical_date is None
    assert created("v1", answer("v1", "created")).logical_date is not None
    later = created("v2", answer("v2", "created_for_later"), "later")
    assert later.run_after == datetime(2031, 1, 1, tzinfo=UTC)


@both
def test_an_answer_about_another_run_is_no_answer(api):
    with pytest.raises(AirflowUnavailable, match="another run") as raised:
        created(api, answer(api, "created"), "mine")
    assert raised.value.unsure


@both
@pytest.mark.parametrize(
    "body", [b"", b"<html>Welcome</html>", b"[]", b"{}", b'{"dag_id": "recorded"', b"null"]
)
def test_200_with_something_else_is_somebody_else(api, body):
    response = type(page(200))(200, {}, body)

    with pytest.raises(AirflowUnavailable, match="somebody else answered 200") as raised:
        created(api, response)
    assert raised.value.unsure


@both
@pytest.mark.parametrize("case", ["run_id_taken", "logical_date_taken"])
def test_409_says_that_something_exists(api, case):
    with pytest.raises(DagRunExists):
        created(api, answer(api, case))


@both
def test_an_unknown_dag_is_named(api):
    for case in ("dag_unknown", "dag_gone"):
        with pytest.raises(DagNotFound) as raised:
            created(api, answer(api, case))
        assert raised.value.dag_id == "recorded"
        assert "not found" in raised.value.words


def test_a_broken_dag_is_told_from_a_wrong_request():
    # Not seen in 3.3.2, where the DAG is gone at once; its source has this text.
    words = "Dag with dag_id: 'recorded' has import errors and cannot be triggered"
    for api, response in (("v1", answer("v1", "dag_broken")), ("v2", said(400, {"detail": words}))):
        with pytest.raises(DagBroken, match="has import errors"):
            created(api, response)


@both
def test_a_param_is_refused_in_airflows_words_by_its_name_and_schema(api):
    def words(case):
        with pytest.raises(RequestRejected) as raised:
            created(api, answer(api, case))
        assert raised.value.status == 400
        return raised.value.words.removeprefix("Bad Request: ")

    assert words("param_missing").startswith("Invalid input for param count: No value passed")
    schema = "{'type': 'integer', 'maximum': 10}"
    wrong = f"Invalid input for param count: its value fails 'type' of the schema {schema}"
    assert words("param_of_wrong_type") == wrong
    assert words("param_that_quotes_jsonschema") == wrong
    assert "fails 'pattern' of the schema" in words("param_with_another_pattern")
    assert "'^[a-z]+$'" in words("param_with_another_pattern")
    assert "fails 'enum' of the schema {'enum': ['here', 'there']}" in words("param_not_in_its_list")


@both
@pytest.mark.parametrize(
    "case", ["run_id_reserved", "field_unknown", "conf_is_a_list", "not_json", "note_too_long"]
)
def test_a_wrong_request_is_refused_for_good(api, case):
    with pytest.raises(RequestRejected) as raised:
        created(api, answer(api, case))
    assert raised.value.status in (400, 422)
    assert raised.value.words


def test_the_four_shapes_of_airflow_3_are_read():
    assert protocol_v2.own_words(answer("v2", "dag_unknown")) == "Dag with dag_id: 'nope' not found"
    assert protocol_v2.own_words(answer("v2", "field_unknown")) == "canary: Extra inputs are not permitted"
    assert protocol_v2.own_words(said(404, {"detail": ["Task", "gone"]})) == "Task; gone"
    assert (protocol_v2.own_words(answer("v2", "run_id_taken")) or "").startswith(
        "Unique constraint violation (see the API server's log, ID "
    )


def test_airflow_2s_title_and_detail_are_read():
    assert protocol_v1.own_words(answer("v1", "dag_unknown")) == (
        "DAG not found: DAG with dag_id: 'nope' not found"
    )
    assert protocol_v1.own_words(answer("v1", "forbidden")) == "Forbidden"
    assert protocol_v1.own_words(answer("v1", "content_type_wrong"))


@pytest.mark.parametrize(
    "case", ["token_expired", "token_invalid", "token_is_none", "no_credentials", "basic_auth"]
)
def test_a_token_that_is_not_accepted_is_told_from_a_missing_permission(case):
    with pytest.raises(TokenRefused):
        created("v2", answer("v2", case))
    with pytest.raises(RequestRejected, match="Forbidden") as raised:
        created("v2", answer("v2", "forbidden"))
    assert raised.value.status == 403


@pytest.mark.parametrize("case", ["password_wrong", "forbidden", "no_credentials", "bearer"])
def test_airflow_2_says_403_to_everything(case):
    with pytest.raises(Forbidden):
        created("v1", answer("v1", case))


def test_whether_credentials_are_accepted_is_asked_of_the_list_of_dags():
    protocol_v1.read_accepted(answer("v1", "dags"))
    protocol_v1.read_accepted(answer("v1", "dags_of_viewer"))
    protocol_v2.read_accepted(answer("v2", "dags"))
    protocol_v2.read_accepted(answer("v2", "forbidden"))  # known, and not allowed this
    with pytest.raises(TokenRefused):
        protocol_v1.read_accepted(answer("v1", "dags_password_wrong"))
    with pytest.raises(TokenRefused):
        protocol_v2.read_accepted(answer("v2", "token_invalid"))


@pytest.mark.parametrize("case", ["run_id_illegal", "size_983041", "database_down"])
def test_500_of_airflow_2_is_unknown(case):
    with pytest.raises(AirflowUnavailable, match="500") as raised:
        created("v1", answer("v1", case))
    assert raised.value.unsure


def test_500_of_airflow_3_is_unknown():
    with pytest.raises(AirflowUnavailable, match="500: Database error") as raised:
        created("v2", answer("v2", "database_down_with_stacktrace"))
    assert raised.value.unsure


@both
@pytest.mark.parametrize(
    "status", [400, 401, 403, 404, 405, 408, 409, 413, 418, 422, 429, 500, 502, 503, 504]
)
def test_a_page_of_somebody_else_is_never_airflows_verdict(api, status):
    with pytest.raises((AirflowUnavailable, NotThisApi)) as raised:
        created(api, page(status))
    assert getattr(raised.value, "unsure", True)
    assert not getattr(raised.value, "sure", False)


@both
@pytest.mark.parametrize(
    "body",
    [
        {"detail": "Not Found"},  # FastAPI's own, where no route of Airflow's answered
        {"message": "no Route matched with those values"},  # an API gateway
        {"title": "Not Found", "status": 400},
        {"detail": None},
        {"detail": []},
        {"detail": {}},
        {"detail": [1]},
        {"detail": 7},
        [],
        "text",
        None,
    ],
)
def test_json_in_another_form_is_somebody_else_too(api, body):
    for status in (400, 401, 403, 404, 409, 413, 422):
        if isinstance(body, dict) and body.get("status") == status:
            continue
        with pytest.raises((AirflowUnavailable, NotThisApi)):
            created(api, said(status, body))
        with pytest.raises((AirflowUnavailable, NotThisApi)):
            PROTOCOLS[api].read_run(said(status, body), "recorded", "plain")


@both
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_is_unknown(api, status):
    response = type(page(200))(status, {"location": "https://user:pw@elsewhere/login"}, b"")

    with pytest.raises(AirflowUnavailable, match="redirect") as raised:
        created(api, response)
    assert raised.value.unsure
    assert "pw" not in str(raised.value)


@both
def test_retry_after_is_kept(api):
    for status in (429, 503):
        response = type(page(200))(status, {"retry-after": "17"}, b"slow down")
        with pytest.raises(AirflowUnavailable) as raised:
            created(api, response)
        assert raised.value.retry_after_s == 17
        assert raised.value.unsure


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        (" 30 ", 30.0),
        ("9" * 400, 86_400.0),
        *((odd, None) for odd in ("-1", "1.5", "", "٣", "²", "Wed, 21 Oct 2026 07:28:00 GMT")),
    ],
)
def test_retry_after_counts_in_seconds_only(value, seconds):
    assert retry_after_s({"retry-after": value}) == seconds
    assert retry_after_s({}) is None


@both
def test_a_run_is_found_or_not(api):
    read = PROTOCOLS[api].read_run

    assert read(answer(api, "run"), "recorded", "full").conf["region"] == "EU"
    for case in ("run_unknown", "run_of_unknown_dag", "note_of_unknown_run", "clear_of_unknown_run"):
        assert read(answer(api, case), "recorded", "full") is None
    assert read(answer(api, "note_set"), "recorded", "full").note == "dagrelay: another note"
    assert read(answer(api, "cleared"), "recorded", "full").state in ("queued", "running")


@both
def test_the_holder_of_a_logical_date_is_found_or_not(api):
    read = PROTOCOLS[api].read_found

    assert read(answer(api, "found_by_logical_date")) == "full"
    assert read(answer(api, "found_none")) is None
    assert read(answer(api, "found_in_unknown_dag")) is None
    with pytest.raises(AirflowUnavailable):
        read(said(200, {"runs": []}))


@both
def test_whether_a_dag_is_paused_and_how_many_runs_it_may_have_is_read(api):
    read = PROTOCOLS[api].read_dag

    assert read(answer(api, "dag_paused"), "recorded_params") == DagView("recorded_params", True, 16)
    assert read(answer(api, "unpaused"), "recorded_params").is_paused is False
    for case in ("dag_of_nobody", "unpause_of_unknown_dag"):
        with pytest.raises(DagNotFound, match="nope"):
            read(answer(api, case), "nope")
    with pytest.raises(AirflowUnavailable):
        read(answer(api, "dag_paused"), "recorded")  # another one
    assert json.loads(PROTOCOLS[api].unpause_dag("d").body) == {"is_paused": False}


@both
@pytest.mark.parametrize(
    ("told", "limit"), [({}, None), ({"max_active_runs": 0}, None), ({"max_active_runs": 3}, 3)]
)
def test_a_dag_without_a_limit_of_its_own_has_none(api, told, limit):
    dag = said(200, {"dag_id": "d", "is_paused": False, **told})

    assert PROTOCOLS[api].read_dag(dag, "d").max_active_runs == limit


@pytest.mark.parametrize(("api", "gone"), [("v1", {"is_active": False}), ("v2", {"is_stale": True})])
def test_a_dag_that_is_shown_and_takes_no_run_is_not_found(api, gone):
    with pytest.raises(DagNotFound, match="its file is gone"):
        PROTOCOLS[api].read_dag(said(200, {"dag_id": "d", "is_paused": True, **gone}), "d")


@both
def test_unfinished_runs_are_counted_without_their_confs(api):
    found = answer(api, "unfinished_counted")

    assert PROTOCOLS[api].read_count(found, "recorded_params") == 3
    assert b"conf" not in found.body
    assert "state=queued&state=running" in PROTOCOLS[api].count_unfinished("d").path
    for odd in (said(200, {"dag_runs": []}), said(200, {"total_entries": -1}), page(200)):
        with pytest.raises(AirflowUnavailable):
            PROTOCOLS[api].read_count(odd, "d")


def test_versions_are_read():
    assert protocol_v2.read_version(answer("v2", "version")) == "3.3.2"
    assert protocol_v1.read_version(answer("v1", "version")) == "2.11.2"
    assert protocol_v2.read_version(answer("v1", "v2_version")) is None  # asked of 2.11.2: a page, 404
    assert protocol_v1.read_version(answer("v2", "v1_version")) is None
    for response in (page(200), page(502), page(403), said(200, {"version": None}), page(302)):
        with pytest.raises(AirflowUnavailable):
            protocol_v2.read_version(response)


def test_an_api_that_is_gone_is_recognised():
    with pytest.raises(NotThisApi) as raised:
        protocol_v1.read_run(answer("v2", "v1_version"), "d", "r")
    assert raised.value.sure  # Airflow 3 says so itself, to a GET
    with pytest.raises(NotThisApi) as raised:
        created("v1", answer("v2", "v1_removed"))
    assert not raised.value.sure  # to a POST it says 405, in nobody's form
    with pytest.raises(NotThisApi) as raised:
        created("v2", answer("v1", "v2_create"))
    assert not raised.value.sure


@both
def test_the_scheduler_is_told_of(api):
    assert PROTOCOLS[api].read_scheduler(answer(api, "health")) == "healthy"
    assert PROTOCOLS[api].read_scheduler(page(200)) is None
    assert PROTOCOLS[api].read_scheduler(said(200, {"scheduler": {"status": None}})) is None


# What must not come back


def every_error(api, response, request=REQUEST):
    """The texts of whatever each reader makes of an answer."""
    protocol = PROTOCOLS[api]
    readers = (
        lambda: protocol.read_created(response, request, "plain"),
        lambda: protocol.read_run(response, "recorded", "plain"),
        lambda: protocol.read_found(response),
        lambda: protocol.read_accepted(response),
        lambda: protocol.read_dag(response, "recorded"),
        lambda: protocol.read_count(response, "recorded"),
        lambda: protocol.read_version(response),
    )
    for read in readers:
        try:
            read()
        except Exception as exc:  # noqa: BLE001 - that is the point
            yield f"{exc} {exc!r} {exc.args}"


@pytest.mark.parametrize(("api", "case"), [(api, case) for api in PROTOCOLS for case in cases(api)])
def test_no_error_shows_a_value_of_the_conf(api, case):
    for request in (REQUEST, TriggerRequest("recorded", {})):  # also without the second net
        for text in every_error(api, answer(api, case), request):
            assert CANARY not in text
            assert "47110815" not in text
            assert len(text) < 4 * 600


def test_the_canary_was_there_to_be_seen():
    echoed = {case for api in PROTOCOLS for case in cases(api) if CANARY.encode() in answer(api, case).body}

    assert {"param_of_wrong_type", "conf_is_a_list", "conf_with_nul_with_stacktrace"} <= echoed


@both
@pytest.mark.parametrize(
    "echo",
    [
        f"the conf {{'a': '{CANARY}'}} is odd",
        f"cannot use {CANARY}",
        f'odd: {{"a": "{CANARY}", "n": 47110815}}',
        f"Invalid input for param a: {CANARY}",
        f"Invalid input for param a: No value passed {CANARY}",
        f"Invalid input for param a: '{CANARY}' is odd\n\nFailed being even\n\nOn instance:\n '{CANARY}'",
        f"x\n\nOn instance['{CANARY}']:\n  '{CANARY}'",
        "y" * 490 + CANARY,
        CANARY * 200,
        f"{CANARY} " * 52 + CANARY[:20],
    ],
)
def test_an_unknown_text_that_echoes_the_conf_is_scrubbed(api, echo):
    for status in (400, 403, 404, 409, 422, 500):
        shapes = [
            echo,
            [echo],
            [{"msg": echo, "loc": ["body", "conf", CANARY], "input": CANARY, "ctx": CANARY}],
        ]
        bodies = [{"detail": shape} for shape in shapes]
        bodies.append({"title": echo, "status": status, "detail": echo, "instance": CANARY})
        for body in bodies:
            with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever it is
                created(api, said(status, body))
            assert CANARY[:10] not in str(raised.value)
            assert "47110815" not in str(raised.value)


def test_values_with_quotes_and_breaks_are_scrubbed_in_every_spelling():
    secret = 'it\'s\na "secret" ü'
    request = TriggerRequest("recorded", {"a": [secret]})
    for echo in (secret, repr(secret), json.dumps(secret), json.dumps(secret, ensure_ascii=False)):
        with pytest.raises(RequestRejected) as raised:
            created("v2", said(400, {"detail": f"odd: {echo}!"}), request=request)
        assert "secret" not in raised.value.words


@pytest.mark.parametrize("size", [100, 700, 5000])
def test_a_long_value_is_scrubbed_even_where_its_echo_is_cut(size):
    secret = "".join(f"{n}-secret " for n in range(size // 10))
    request = TriggerRequest("recorded", {"a": secret})
    for echo in (secret, secret[: size // 2] + "...", "y" * 450 + secret):
        with pytest.raises(RequestRejected) as raised:
            created("v2", said(400, {"detail": f"odd: {echo}"}), request=request)
        assert "secret" not in raised.value.words
        assert raised.value.words.startswith("odd: ")


# Runs that are waited for


def listed(api, case):
    return PROTOCOLS[api].read_runs(answer(api, case))


@both
def test_runs_are_listed_by_the_time_that_never_changes_and_beyond_a_hundred(api):
    sent = PROTOCOLS[api].list_runs(["a", "b"], DATE, DATE + timedelta(hours=1), unfinished=True)

    assert (sent.method, sent.path) == ("POST", f"/api/{api}/dags/~/dagRuns/list")
    name = "run_after" if api == "v2" else "execution_date"
    assert body_of(sent) == {
        "dag_ids": ["a", "b"],
        f"{name}_gte": "2026-01-02T03:04:05+00:00",
        f"{name}_lte": "2026-01-02T04:04:05+00:00",
        "order_by": "-id",
        "page_limit": 1000,
        "states": ["queued", "running"],
    }


@both
def test_a_list_tells_how_its_runs_stand_and_whether_there_are_more(api):
    # Asked for from and until the very instant that Airflow had told of the run.
    assert listed(api, "runs_listed").states == {("recorded_results", "ended"): "success"}
    assert listed(api, "runs_listed").whole
    assert listed(api, "runs_listed_unfinished").states == {}
    assert listed(api, "runs_listed_none").states == {}
    assert listed(api, "runs_listed_of_unknown_dag").states == {}
    first = listed(api, "runs_listed_first_of_many")
    assert list(first.states) == [("recorded_results", "ended")]  # the newest
    assert not first.whole


@both
def test_a_list_that_is_refused_or_is_none_is_told_as_any_other_answer(api):
    with pytest.raises(TokenRefused if api == "v2" else Forbidden):
        listed(api, "runs_listed_by_nobody")
    with pytest.raises(RequestRejected) as raised:
        listed(api, "runs_listed_wrongly")
    assert CANARY not in str(raised.value)
    for odd in (said(200, {}), said(200, []), said(200, {"dag_runs": None}), page(200), page(502)):
        with pytest.raises(AirflowUnavailable):
            PROTOCOLS[api].read_runs(odd)
    with_odd_runs = said(200, {"dag_runs": [None, {"dag_id": "d", "dag_run_id": "r", "state": None}]})
    assert PROTOCOLS[api].read_runs(with_odd_runs).states == {}


@both
def test_what_a_task_returned_is_read_as_json(api):
    read = PROTOCOLS[api].read_xcom
    some = {"answer": 42, "n": [1, 2.5, None, True], "ü": "'\"", "deep": {"a": {"b": []}}}

    assert read(answer(api, "xcom_of_some")).value == some
    assert read(answer(api, "xcom_of_text")).value == "[1, 2]"  # a text stays one
    for nothing in ("none", "many", "nobody", "unknown_run"):
        assert read(answer(api, f"xcom_of_{nothing}")) is None
    for odd in (page(404), page(200), said(200, {"key": "return_value"})):
        with pytest.raises((AirflowUnavailable, NotThisApi)):
            read(odd)


@both
def test_why_a_task_returned_nothing_is_told(api):
    read = PROTOCOLS[api].read_task

    assert read(answer(api, "task_none")) == "plain"
    assert read(answer(api, "task_many")) == "mapped"
    assert read(answer(api, "task_nobody")) == read(answer(api, "task_of_unknown_run")) == "none"
    with pytest.raises(NotThisApi):
        read(page(404))


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        (
            "{'answer': 42, 'ok': True, 'no': None, 't': (1, 2)}",
            {"answer": 42, "ok": True, "no": None, "t": [1, 2]},
        ),
        ('{"answer": true}', {"answer": True}),
        ("done", "done"),
        ("{1, 2}", "{1, 2}"),
        ("nan", "nan"),
        ("datetime.datetime(2026, 1, 1)", "datetime.datetime(2026, 1, 1)"),
        ("((" * 200, "((" * 200),
        (None, None),
    ],
)
def test_pythons_repr_of_an_old_airflow_2_is_json_where_it_can_be(told, meant):
    assert protocol_v1.read_xcom_text(said(200, {"value": told})).value == meant


@both
def test_a_run_is_failed_by_its_state(api):
    sent = PROTOCOLS[api].fail_run("d", "r1")

    assert (sent.method, sent.path.partition("?")[0]) == ("PATCH", f"/api/{api}/dags/d/dagRuns/r1")
    assert body_of(sent) == {"state": "failed"}
    assert PROTOCOLS[api].read_run(answer(api, "run_failed_by_hand"), "recorded", "full").state == "failed"
    assert PROTOCOLS[api].read_run(answer(api, "fail_of_unknown_run"), "recorded", "none") is None


# Tasks that wait for a job

WAITS = TaskInstance(dag_id="recorded_params", dag_run_id="counted-0", task_id="nothing")
MANY = TaskInstance(dag_id="recorded_results", dag_run_id="ended", task_id="many")
ONE_OF_MANY = TaskInstance(dag_id="recorded_results", dag_run_id="ended", task_id="many", map_index=1)


def test_airflow_3_is_always_told_the_index_or_it_would_set_all():
    path = "/api/v2/dags/recorded_params/dagRuns/counted-0/taskInstances/nothing/-1"
    sent = protocol_v2.set_task_state(WAITS, "success", "a note")

    assert protocol_v2.get_task_instance(WAITS).path == path
    assert (sent.method, sent.path) == ("PATCH", path)
    assert body_of(sent) == {"new_state": "success", "note": "a note"}
    assert protocol_v2.set_task_state(ONE_OF_MANY, "failed", "").path.endswith("/taskInstances/many/1")


def test_airflow_2_is_told_that_it_is_no_dry_run_and_knows_no_index_below_0():
    path = "/api/v1/dags/recorded_params/dagRuns/counted-0/taskInstances/nothing"
    sent = protocol_v1.set_task_state(WAITS, "success", "a note")

    assert protocol_v1.get_task_instance(WAITS).path == path
    assert (sent.method, sent.path) == ("PATCH", path)
    assert body_of(sent) == {"new_state": "success", "dry_run": False}
    assert protocol_v1.set_task_state(ONE_OF_MANY, "failed", "").path.endswith("/taskInstances/many/1")
    noted = protocol_v1.set_task_note(ONE_OF_MANY, "a note")
    assert noted.path.endswith("/taskInstances/many/1/setNote")
    assert body_of(noted) == {"note": "a note"}


@both
def test_a_scheduled_runs_id_is_quoted(api):
    task = TaskInstance(dag_id="d", dag_run_id="scheduled__2026-11-20T00:00:00+00:00", task_id="g.t")

    assert (
        "/dagRuns/scheduled__2026-11-20T00%3A00%3A00%2B00%3A00/"
        in PROTOCOLS[api].get_task_instance(task).path
    )


@both
def test_a_task_instance_is_read(api):
    waits = PROTOCOLS[api].read_task_instance(answer(api, "task_instance"), WAITS)
    one = PROTOCOLS[api].read_task_instance(answer(api, "task_instance_by_index"), ONE_OF_MANY)

    assert (waits.state, waits.try_number, waits.start_date, waits.note) == (None, 0, None, None)
    assert (one.state, one.try_number) == ("success", 1)
    assert one.start_date.tzinfo is not None


@both
@pytest.mark.parametrize(
    "case", ["task_instance_unknown", "task_instance_of_unknown_run", "task_instance_mapped"]
)
def test_a_task_instance_that_is_not_there_is_none(api, case):
    assert PROTOCOLS[api].read_task_instance(answer(api, case), WAITS) is None


@both
def test_an_answer_about_another_instance_is_not_believed(api):
    with pytest.raises(AirflowUnavailable):
        PROTOCOLS[api].read_task_instance(answer(api, "task_instance_by_index"), MANY)


@both
def test_whether_a_task_is_mapped_is_read(api):
    read = PROTOCOLS[api].read_is_mapped

    # With its group it is mapped as well, and before the group is expanded, when it stands there as one.
    for case in ("mapped", "mapped_by_its_group", "mapped_not_expanded", "mapped_of_unknown_run"):
        assert read(answer(api, case)) is True, case
    for case in ("mapped_of_plain", "mapped_of_unknown_task"):
        assert read(answer(api, case)) is False, case
    with pytest.raises((AirflowUnavailable, NotThisApi)):
        read(page(404))


@both
@pytest.mark.parametrize("case", ["task_set", "task_set_again"])
def test_a_task_that_is_in_its_state_is_set(api, case):
    PROTOCOLS[api].read_task_set(answer(api, case))


@both
@pytest.mark.parametrize("case", ["task_set_unknown", "task_set_mapped"])
def test_a_task_that_cannot_be_set_is_refused_for_good(api, case):
    with pytest.raises(RequestRejected):
        PROTOCOLS[api].read_task_set(answer(api, case))


@both
def test_who_may_not_set_a_task_is_told(api):
    with pytest.raises(RequestRejected if api == "v2" else Forbidden):
        PROTOCOLS[api].read_task_set(answer(api, "task_set_forbidden"))


@both
@pytest.mark.parametrize("status", [200, 404, 502])
def test_a_proxys_page_sets_no_task(api, status):
    with pytest.raises((AirflowUnavailable, NotThisApi)):
        PROTOCOLS[api].read_task_set(page(status))
    with pytest.raises((AirflowUnavailable, NotThisApi)):
        PROTOCOLS[api].read_task_instance(page(status), WAITS)
