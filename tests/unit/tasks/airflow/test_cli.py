"""What is said to Airflow's command, and how what it prints is read: recorded from 2.11.2 and 3.3.2."""

import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Barrier
from time import sleep

import pytest

from producers.contract import TriggerRequest
from producers.errors import AirflowUnavailable, CredentialsRefused, DagNotFound, RequestRejected
from tasks.airflow import cli
from tasks.airflow.answers import DagRunExists, DagView
from tasks.airflow.cli import CliClient, failure, read_created, read_dag, read_state, refusal
from tasks.airflow.client import AirflowClient
from tasks.airflow.command import MAX_ARGUMENT_BYTES, NotRun, Ran, TooLong, argv_of, environment
from tasks.airflow.connections import AirflowConnection, Command, read_connections

SECRET = "s3cr3t-canary"
SALES = TriggerRequest("daily_sales", {"day": 1, "token": SECRET}, key="k1")
DATED = TriggerRequest("daily_sales", logical_date=datetime(2026, 1, 1, 0, 0, 0, 123456, tzinfo=UTC))

LOGS_3 = """\
2026-11-20T19:44:04.217669Z [warning  ] Could not import graphviz. Rendering graph to the graphical format …
Run `pip install graphviz` to attempt to install it. [py.warnings] category=UserWarning lineno=57
[2026-11-20T19:44:09.669+0000] {plugins.py:37} INFO - setup plugin alembic.autogenerate.schemas
"""
CREATED_3 = (
    '[{"conf": {"a": ["1", null]}, "dag_id": "daily_sales", "dag_run_id": "relay__k1", "data_interval_end"'
    ': "2026-11-20 19:47:16.304634+00:00", "logical_date": "2026-01-01 00:00:00.123456+00:00", "run_type": '
    '"manual", "start_date": null, "state": "queued", "triggering_user_name": "root"}]\n'
)
AT_TRIGGER = """\
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/venv/airflow/api/common/trigger_dag.py", line 119, in _trigger_dag
    raise DagRunAlreadyExists(dag_run)
          ^^^^^^^^^^^^^^^^^^^
"""
AT_CONNECT = """\
Traceback (most recent call last):
  File "/venv/sqlalchemy/engine/default.py", line 869, in connect
    return self.loaded_dbapi.connect(*cargs, **cparams)
psycopg2.OperationalError: connection to server at "127.0.0.1", port 1 failed

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/venv/airflow/__main__.py", line 65, in <module>
    main()
"""


def failed(err: str, code: int = 1) -> Ran:
    return Ran(code, LOGS_3, err)


def test_a_trigger_is_the_same_words_with_the_run_id_in_both_versions():
    asked = cli.create_run(SALES, "relay__k1", "v2")

    assert asked[:4] == ["dags", "trigger", "daily_sales", "--run-id=relay__k1"]
    assert json.loads(asked[4].removeprefix("--conf=")) == SALES.conf
    assert asked[5:] == ["--no-replace-microseconds", "--output=json"]
    assert cli.create_run(SALES, "relay__k1", "v1") == asked
    assert "--logical-date=2026-01-01T00:00:00.123456+00:00" in cli.create_run(DATED, "r", "v2")
    assert "--exec-date=2026-01-01T00:00:00.123456+00:00" in cli.create_run(DATED, "r", "v1")


def test_no_id_is_ever_taken_for_an_option():
    with pytest.raises(RequestRejected, match="begins with '-'"):
        cli.create_run(TriggerRequest("--help"), "r", "v2")
    with pytest.raises(RequestRejected, match="begins with '-'"):
        client(Command3()).create_dag_run(SALES, "-x", "")
    with pytest.raises(AirflowUnavailable, match="the API is away, and not by"):  # which takes such ids
        client(Command3(), stands_in=True).create_dag_run(SALES, "-x", "")
    listed = Ran(0, json.dumps([{"dag_id": "d", "run_id": "-x", "state": "success"}]), "")
    assert client(Command3(dags_list_runs=listed)).run_states("d", {"-x": None}) == {"-x": "success"}


def test_the_run_is_found_after_the_log_lines():
    run = read_created(Ran(0, LOGS_3 + CREATED_3, ""), SALES, "relay__k1", "v2")

    assert (run.dag_id, run.run_id, run.state, run.api) == ("daily_sales", "relay__k1", "queued", "v2")
    assert run.conf == SALES.conf  # not that of the answer, whose values are all text
    assert run.logical_date == DATED.logical_date


@pytest.mark.parametrize("out", ["", LOGS_3, "[{]", "[1]", "null", '[{"dag_id": "x", "dag_run_id": "y"}]'])
def test_an_end_without_a_run_is_unknown(out):
    with pytest.raises(AirflowUnavailable) as caught:
        read_created(Ran(0, out, ""), SALES, "relay__k1", "v2")
    assert caught.value.unsure


@pytest.mark.parametrize(
    "last",
    [
        "airflow.exceptions.DagRunAlreadyExists: A Dag Run already exists for DAG quiet with run id r1",
        "airflow.exceptions.DagRunAlreadyExists: A DAG Run already exists for DAG q at 2026 with run id r1",
        "sqlalchemy.exc.MultipleResultsFound: Multiple rows were found when one or none was required",
        "sqlalchemy.exc.IntegrityError: (psycopg2.errors.UniqueViolation) duplicate key value violates "
        f'unique constraint "dag_run_dag_id_run_id_key"\nDETAIL:  …\n\n[SQL: …]\n[parameters: {SECRET}]',
    ],
)
def test_a_run_in_the_way_is_told_in_one_of_four_forms(last):
    with pytest.raises(DagRunExists) as caught:
        read_created(failed(f"{AT_TRIGGER}{last}\n"), SALES, "relay__k1", "v2")
    assert SECRET not in str(caught.value)


def test_what_airflow_refuses_is_permanent_and_quotes_no_value():
    last = (
        f"airflow.sdk.exceptions.ParamValidationError: Invalid input for param token: '{SECRET}' is too long"
        "\n\nFailed validating 'maxLength' in schema:\n    {'type': 'string', 'maxLength': 3}\n\n"
        f"On instance:\n    '{SECRET}'\n"
    )
    with pytest.raises(RequestRejected) as caught:
        read_created(failed(AT_TRIGGER + last), SALES, "r", "v2")
    assert "param token: its value fails 'maxLength'" in str(caught.value)
    assert SECRET not in str(caught.value)

    reserved = "ValueError: A manual DAG run cannot use ID 'scheduled__x' since it is reserved\n"
    assert isinstance(refusal(failed(AT_TRIGGER + reserved)), RequestRejected)


def test_a_dag_that_is_not_there():
    missing = failed(
        f"{AT_TRIGGER}airflow.exceptions.DagNotFound: Dag id daily_sales not found in DagModel\n"
    )
    with pytest.raises(DagNotFound):
        read_created(missing, SALES, "r", "v2")
    with pytest.raises(DagNotFound):
        read_dag(failed("DAG: d does not exist in 'dag' table\n"), "d")
    assert read_state(failed("DAG: d does not exist in 'dag' table\n")) is None


@pytest.mark.parametrize(
    ("ran", "unsure", "words"),
    [
        (failed(f"{AT_CONNECT}sqlalchemy.exc.OperationalError: {SECRET}\n"), True, "with OperationalError"),
        (failed(f"{AT_CONNECT}ValueError: could not parse '{SECRET}'\n"), True, "with ValueError"),
        (failed("sh: airflow: not found\n", 127), False, "is not there"),
        (failed("ssh: connect to host h port 22: Connection refused\n", 255), True, "ended with 255: ssh:"),
        (failed("", -9), True, "ended by signal 9"),
        (failed(f"sh: syntax error near {SECRET}\n", 2), True, "near ***"),
    ],
)
def test_any_other_end_is_unknown_and_says_what_is_safe_to_say(ran, unsure, words):
    exc = refusal(ran, "daily_sales", SALES.conf)

    assert isinstance(exc, AirflowUnavailable)
    assert exc.unsure is unsure
    assert words in str(exc)
    assert SECRET not in str(exc)


def test_who_may_not_come_in_has_refused_credentials():
    assert isinstance(refusal(failed("af@h: Permission denied (publickey).\n", 255)), CredentialsRefused)


@pytest.mark.parametrize(
    ("out", "found"),
    [
        ('queued, {"a": [1, "x\\u00e9", null]}\n', ("queued", {"a": [1, "xé", None]})),
        ("success\n", ("success", None)),
        ("None\n", None),
    ],
)
def test_a_state_is_read_with_the_conf_as_it_is(out, found):
    assert read_state(Ran(0, LOGS_3 + out, "")) == found


def test_a_dag_is_read_from_texts():
    row = {"dag_id": "d", "is_paused": "True", "is_stale": "False", "max_active_runs": "16"}
    assert read_dag(Ran(0, json.dumps([row]), ""), "d") == DagView("d", True, 16)
    with pytest.raises(DagNotFound, match="file is gone"):
        read_dag(Ran(0, json.dumps([row | {"is_stale": "True"}]), ""), "d")


def test_a_traceback_on_standard_output_is_read_too():
    assert failure(Ran(1, f"{LOGS_3}{AT_TRIGGER}a.b.DagNotFound: no\n", ""))[0] == "DagNotFound"


# The client


class Command3:
    """Answers by the first words; what was asked is in `asked`."""

    def __init__(self, version: str = "3.3.2", **answers: Ran) -> None:
        self.answers = {"version": Ran(0, f"{version}\n", ""), **answers}
        self.asked: list[str] = []

    def __call__(self, arguments, kind):
        name = "_".join(arguments[:2]).replace("-", "_") if arguments != ["version"] else "version"
        self.asked.append(" ".join(arguments))
        return self.answers[name]


def client(run, **more) -> CliClient:
    return CliClient(AirflowConnection("eu", "", transport="cli", command=Command(), **more), run)


def test_a_run_is_asked_for_by_its_date_in_airflow_2_and_by_its_id_in_airflow_3():
    state = Ran(0, 'success, {"n": 1}\n', "")
    for version, key, which in (
        ("2.11.2", "execution_date", "2026-01-01T00:00:00+00:00"),
        ("3.3.2", "logical_date", "relay__k1"),
    ):
        told = Ran(0, json.dumps([{"dag_id": "d", key: "2026-01-01T00:00:00+00:00", "task_id": "t"}]), "")
        run = Command3(version, tasks_states_for_dag_run=told, dags_state=state)
        found = client(run).get_dag_run("d", "relay__k1")

        assert found is not None
        assert (found.state, found.conf, found.note) == ("success", {"n": 1}, None)
        assert found.logical_date == datetime(2026, 1, 1, tzinfo=UTC)
        assert run.asked[-1] == f"dags state d {which}"


def test_a_run_id_like_a_date_is_looked_for_in_the_list_alone():
    """Airflow 3 shows the run of that date, where there is none of that id."""
    listed = [
        {"dag_id": "d", "run_id": "other", "state": "failed", "logical_date": "2026-01-01T00:00:00+00:00"}
    ]
    run = Command3(dags_list_runs=Ran(0, json.dumps(listed), ""))

    assert client(run).get_dag_run("d", "2026-01-01") is None
    assert client(run).run_states("d", {"2026-01-01": None}) == {"2026-01-01": None}


def test_runs_of_a_dag_whose_list_is_too_long_are_asked_for_one_by_one():
    """In Airflow 3 the list has all the runs that the DAG ever had."""
    asked: list[str] = []

    def run(arguments, kind):
        asked.append(" ".join(arguments[:2]))
        if arguments[:2] == ["dags", "list-runs"]:
            raise NotRun("it printed more than 16,000,000 bytes", True)
        return Ran(0, "success\n", "")

    airflow = client(run, api_version="v2")
    waited = dict.fromkeys(["relay__1", "relay__2", "relay__3"])
    with pytest.raises(AirflowUnavailable, match="printed more"):
        airflow.run_states("d", waited)

    assert airflow.run_states("d", waited) == dict.fromkeys(waited, "success")
    assert asked == ["dags list-runs", *["dags state"] * 3]


def test_what_the_cli_cannot_do_is_refused_by_name_and_waits_where_it_stands_in():
    asked = TriggerRequest("d", run_after=datetime(2027, 1, 1, tzinfo=UTC))
    with pytest.raises(RequestRejected, match="not by Airflow's CLI: it has no way for run_after"):
        client(Command3()).create_dag_run(asked, "r", "")
    with pytest.raises(AirflowUnavailable, match="the API is away, and not by"):
        client(Command3(), stands_in=True).create_dag_run(asked, "r", "")
    with pytest.raises(RequestRejected, match="what a task returned"):
        client(Command3()).get_xcom("d", "r", "t")


def test_another_version_under_a_running_worker_is_asked_for_again():
    usage = Ran(2, "", "airflow dags list-runs command error: unrecognized arguments: x, see help above.\n")
    run = Command3("2.11.2", dags_list_runs=usage)
    airflow = client(run)
    for _ in range(2):
        with pytest.raises(AirflowUnavailable, match="does not know our arguments") as caught:
            airflow.count_unfinished_runs("d")
        assert not caught.value.unsure
    assert run.asked.count("version") == 2


def test_threads_that_need_the_version_at_once_ask_for_it_once():
    asked, begun = [], Barrier(4)

    def run(arguments, kind):
        asked.append(arguments)
        sleep(0.2)
        return Ran(0, "3.3.2\n", "")

    airflow = client(run)

    def ask(_):
        begun.wait(10)
        return airflow.version()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == ["3.3.2"] * 4
    assert asked == [["version"]]


def test_it_can_be_asked_whatever_the_api_can():
    public = {name for name, _ in inspect.getmembers(AirflowClient, inspect.isfunction) if name[0] != "_"}
    assert public - {"list_dag_runs"} <= set(dir(CliClient))


# The command


def test_a_conf_that_no_command_line_holds_is_told_in_bytes():
    with pytest.raises(TooLong) as caught:
        argv_of(Command(), ["--conf=" + "x" * MAX_ARGUMENT_BYTES])
    assert caught.value.size_bytes == MAX_ARGUMENT_BYTES + 7

    def too_long(arguments, kind):
        raise TooLong(200_000)

    with pytest.raises(RequestRejected, match=r"200,000 bytes, and a command line holds 131,071") as refused:
        client(too_long, api_version="v2").create_dag_run(SALES, "r", "")
    assert refused.value.status == 413


def test_arguments_are_quoted_once_more_where_a_shell_is_at_the_other_end():
    argv = argv_of(Command(("ssh", "af@h", "airflow"), remote_shell=True), ["a", "$(id) 'x'; y"])
    assert argv == ["ssh", "af@h", "airflow", "a", "'$(id) '\"'\"'x'\"'\"'; y'"]


def test_the_workers_own_secrets_are_not_in_the_environment_of_the_command():
    worker = {
        "PATH": "/bin",
        "AIRFLOW_HOME": "/af",
        "AIRFLOW__CORE__FERNET_KEY": "x",
        "KUBECONFIG": "/k",
        "DAGRELAY_REDIS_URL": SECRET,
        "AIRFLOW_CONN_DEFAULT": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    found = environment(Command(env={"AIRFLOW_HOME": "/other"}), worker)

    assert found.keys() == {"PATH", "AIRFLOW_HOME", "AIRFLOW__CORE__FERNET_KEY", "KUBECONFIG"}
    assert found["AIRFLOW_HOME"] == "/other"


# The connection


def test_a_connection_by_the_cli_needs_nothing_else():
    extra = {"transport": "cli", "cli_command": ["kubectl", "exec", "deploy/s", "--", "airflow"]}
    text = json.dumps({"conn_type": "airflow", "extra": {**extra, "cli_env": {"TOKEN": SECRET}}})
    found = read_connections({"AIRFLOW_CONN_EU": text})[0]["eu"]

    assert found.command is not None
    assert found.command.argv[0] == "kubectl"
    assert (found.ceiling, found.read_timeout_s, found.address) == (2, 60, "the command kubectl")
    assert found.run_url("v2", "d", "r") is None
    assert SECRET not in repr(found)
    plain = read_connections({"AIRFLOW_CONN_EU": '{"conn_type": "airflow", "extra": {"transport": "cli"}}'})
    assert plain[0]["eu"].command == Command(("airflow",))


def test_a_failover_is_a_connection_of_its_own_to_the_same_airflow():
    uri = "http://u:p@h:8080/?failover=cli&cli_command=ssh+af@h+'my+airflow'&cli_timeout_s=9&max_in_flight=16"
    found = read_connections({"AIRFLOW_CONN_EU": uri})[0]["eu"]
    instead = found.failover

    assert instead is not None
    assert (found.transport, found.ceiling, found.command) == ("rest", 16, None)
    assert (instead.id, instead.ceiling, instead.read_timeout_s) == ("eu.cli", 2, 9)
    assert instead.command == Command(("ssh", "af@h", "my airflow"), remote_shell=True, timeout_s=9)
    assert instead.run_url("v2", "d", "r") == found.run_url("v2", "d", "r") == "http://h:8080/dags/d/runs/r"
    assert instead.password is None
