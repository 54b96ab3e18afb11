"""AIRFLOW_CONN_<ID>: what Airflow itself would read, with every mistake told by name and without a secret."""

import dataclasses
import json

import pytest

from tasks.airflow.connections import AirflowConnection, other_variables, read_connections

SECRET = "s3cr3t-canary"


def one(value: object, **more: str) -> AirflowConnection:
    """The only connection in the environment; it must have no mistake."""
    text = value if isinstance(value, str) else json.dumps(value)
    connections, mistakes = read_connections({"AIRFLOW_CONN_DEFAULT": text, **more})
    assert mistakes == []
    return connections["default"]


def mistakes_of(value: object, name: str = "AIRFLOW_CONN_DEFAULT") -> str:
    """What is said of a wrong value; it must name the variable and hold no secret."""
    text = value if isinstance(value, str) else json.dumps(value)
    connections, mistakes = read_connections({name: text})
    assert connections == {}
    assert mistakes
    assert all(mistake.startswith(f"{name}: ") for mistake in mistakes)
    said = "; ".join(mistakes)
    assert SECRET not in said
    assert SECRET[:4] not in said
    return said


def test_a_uri_is_read_as_airflow_reads_it():
    found = one("http://us%40er:p%2Fa%3As%25s%23@airflow.example.org:8080/")

    assert found.base_url == "http://airflow.example.org:8080"
    assert (found.username, found.password) == ("us@er", "p/a:s%s#")
    assert (found.id, found.token, found.api_version, found.max_in_flight) == ("default", None, None, 8)
    assert (found.connect_timeout_s, found.read_timeout_s, found.verify, found.ca_file) == (
        3.05,
        10,
        True,
        None,
    )


@pytest.mark.parametrize(
    ("uri", "base_url"),
    [
        ("http://h", "http://h"),
        ("HTTP://Host:80", "http://host:80"),
        ("airflow://h:8080", "http://h:8080"),
        ("https://h", "https://h"),
        ("http://h:8443/https", "https://h:8443"),
        ("http://h/http", "http://h"),
        ("https://h/http", "https://h"),
        ("http://h/team-a/airflow/", "http://h/team-a/airflow"),
        ("https://h/airflow/https", "https://h/airflow/https"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("http://[fd00::1]", "http://[fd00::1]"),
        ("http://https%3A%2F%2Fh%3A8443", "https://h:8443"),
        ("http://https://u:p@h:8443/x", "https://h:8443/x"),
        ("http://host_with_underscore:1", "http://host_with_underscore:1"),
        ("  http://h  ", "http://h"),
    ],
)
def test_where_an_airflow_is(uri, base_url):
    assert one(uri).base_url == base_url


def test_json_is_read_as_airflow_reads_it():
    found = one(
        {
            "conn_type": "http",
            "host": "h",
            "port": "8443",
            "schema": "https",
            "login": "u@x",
            "password": "p%40",
            "description": "ours",
            "extra": {"max_in_flight": 3, "read_timeout_s": 2.5, "verify": False},
        }
    )

    assert found.base_url == "https://h:8443"
    assert (found.username, found.password) == ("u@x", "p%40")
    assert (found.max_in_flight, found.read_timeout_s, found.verify) == (3, 2.5, False)
    assert one({"conn_type": "https", "host": "h", "extra": '{"token": "t"}'}).token == "t"
    assert one({"conn_type": "http", "host": "https://h:1", "port": 2}).base_url == "https://h:1"
    assert one({"conn_type": "http", "host": "h", "port": None, "extra": ""}).base_url == "http://h"


def test_extras_of_a_uri():
    found = one(
        "https://h/?token=a.b-c&api_version=v2&max_in_flight=16&verify=false"
        "&connect_timeout_s=1&read_timeout_s=60&transport=rest"
    )

    assert (found.token, found.api_version, found.max_in_flight) == ("a.b-c", "v2", 16)
    assert (found.verify, found.connect_timeout_s, found.read_timeout_s) == (False, 1, 60)
    inner = one("https://h/?__extra__=%7B%22token%22%3A%20%22t%22%2C%20%22max_in_flight%22%3A%204%7D")
    assert (inner.token, inner.max_in_flight) == ("t", 4)


@pytest.mark.parametrize(
    ("given", "window"), [("", None), ("?window=2", 2), ("?window=max_active_runs", "max_active_runs")]
)
def test_a_window_for_all_dags_of_a_connection(given, window):
    assert one(f"http://h/{given}").window == window
    if given:
        assert one({"conn_type": "http", "host": "h", "extra": {"window": window}}).window == window


def test_files_hold_secrets(tmp_path):
    (tmp_path / "conn").write_text("http://u:p@h:1\n")
    (tmp_path / "token").write_text("abc.def\n")
    (tmp_path / "ca.pem").write_text("…")

    connections, mistakes = read_connections(
        {
            "AIRFLOW_CONN_EU_FILE": str(tmp_path / "conn"),
            "AIRFLOW_CONN_US": f"https://h/?token_file={tmp_path}/token&ca_file={tmp_path}/ca.pem",
            "AIRFLOW_CONN_MY_FILE": "http://h:2",  # a URI is no path: a connection of the id "my_file"
        }
    )

    assert mistakes == []
    assert sorted(connections) == ["eu", "my_file", "us"]
    assert (connections["eu"].base_url, connections["eu"].password) == ("http://h:1", "p")
    assert connections["us"].token == "abc.def"
    assert connections["us"].ca_file == f"{tmp_path}/ca.pem"


def test_what_is_not_set_is_no_mistake():
    assert read_connections({"AIRFLOW_CONN_DEFAULT": "", "AIRFLOW_CONN_X_FILE": " ", "OTHER": "x"}) == (
        {},
        [],
    )


def test_nobody_is_a_way_to_log_in():
    assert (one("http://h").username, one("http://h").password, one("http://h").token) == (None, None, None)
    assert (one("http://u@h").username, one("http://u@h").password) == ("u", "")


def test_connections_to_other_systems_are_left_alone_except_as_default():
    environ = {
        "AIRFLOW_CONN_WAREHOUSE": f"postgres://u:{SECRET}@h/db",
        "AIRFLOW_CONN_BUCKET": json.dumps({"conn_type": "aws", "password": SECRET}),
        "AIRFLOW_CONN_GCP": "google-cloud-platform://?x=y",
        "AIRFLOW_CONN_DEFAULT": "http://h",
    }

    connections, mistakes = read_connections(environ)

    assert (list(connections), mistakes) == (["default"], [])
    assert other_variables(environ) == ["AIRFLOW_CONN_BUCKET", "AIRFLOW_CONN_GCP", "AIRFLOW_CONN_WAREHOUSE"]
    assert "is of type postgres" in mistakes_of(f"postgres://u:{SECRET}@h/db")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (f"{SECRET}", "neither a URI"),
        (f"http://u:{SECRET}/x@h:8080", "percent-encode"),
        (f"http://u:12/{SECRET}@h:8080", "percent-encode"),
        (f"http://u:{SECRET}#x@h:8080", "percent-encode"),
        (f"http://u:12#{SECRET}@h:8080", "percent-encode"),
        (f"http://u:{SECRET}@x@h:8080", "percent-encode"),
        (f"http://u:{SECRET}?x@h:8080", "percent-encode"),
        (f"http://u:12?{SECRET}@h:8080", "a name that is no plain word"),
        (f"http://u:{SECRET}@[h:8080", "percent-encode"),
        (f"http://u:{SECRET}@h:99999", "percent-encode"),
        (f"http://u:{SECRET}@", "has no host"),
        (f"http://u:{SECRET}@h o", "host"),
        (f"http://:{SECRET}@h", "has a password and no user"),
        (f"http://u:{SECRET}@h/?token={SECRET}", "token as well as"),
        (f"http://h/?token={SECRET}%0A", "characters that a header may not have"),
        (f"http://u:{SECRET}%0A@h", "the password holds a control character"),
        (f"http://h/?token={SECRET}&token_file=/x", "token and token_file"),
        (f"http://h/?token_file=/none/{SECRET}", "token_file: the file cannot be read"),
        (f"http://h/?ca_file=/none/{SECRET}", "ca_file: the file cannot be read"),
        (f"http://h/?tokn={SECRET}", "no use for the extra 'tokn'"),
        (f"http://h/?__extra__={SECRET}", "extra is not JSON"),
        ("http://h/?__extra__=[1]", "extra is no JSON object"),
        ("http://h/?api_version=v3", "api_version is none of v1, v2"),
        ("http://h/?transport=carrier-pigeon", "transport is none of rest, cli"),
        ("http://h/?failover=carrier-pigeon", "failover is none of cli"),
        ("http://h/?cli_command=airflow", "no use for the extra 'cli_command'"),
        ("http://h/?failover=cli&cli_command=%22" + SECRET, "cli_command is no list of words"),
        ("http://h/?failover=cli&cli_command=[1]", "cli_command is no list of words"),
        ("http://h/?failover=cli&cli_timeout_s=0", "cli_timeout_s is no number from 1 to 600"),
        (f"http://u:{SECRET}@h/?transport=cli", "has a password, and transport=cli takes none"),
        (f"http://h/?transport=cli&token={SECRET}", "has a token, and transport=cli takes none"),
        ("http://h/?transport=cli&verify=false", "no use for the extra 'verify'"),
        ("http://h/?transport=cli&failover=cli", "no use for the extra 'failover'"),
        (
            {"conn_type": "airflow", "extra": {"transport": "cli", "cli_command": []}},
            "cli_command is no list of words",
        ),
        (
            {"conn_type": "airflow", "extra": {"transport": "cli", "cli_env": {"A B": SECRET}}},
            "cli_env is no JSON object of names and texts",
        ),
        ("http://h/?max_in_flight=0", "max_in_flight is no whole number from 1 to 1000"),
        ("http://h/?max_in_flight=1.5", "max_in_flight"),
        ("http://h/?max_in_flight=nan", "max_in_flight"),
        ("http://h/?max_in_flight=many", "max_in_flight"),
        ("http://h/?read_timeout_s=0", "read_timeout_s"),
        ("http://h/?read_timeout_s=inf", "read_timeout_s"),
        ("http://h/?connect_timeout_s=-1", "connect_timeout_s"),
        ("http://h/?window=0", "window is neither a whole number of 1 or more nor the word"),
        ("http://h/?window=1.5", "window is neither"),
        ("http://h/?window=all", "window is neither"),
        ({"conn_type": "http", "host": "h", "extra": {"window": True}}, "window is neither"),
        ("http://h/?verify=perhaps", "verify is neither true nor false"),
        ("http://h/api/v2", "without /api"),
        ("http://h/a b", "no plain path"),
        ("http://h/../x", "no plain path"),
        ("{" + SECRET, "is not JSON"),
        ({"host": "h"}, "has no conn_type"),
        ({"conn_type": "http"}, "has no host"),
        ({"conn_type": "http", "host": "h", "passwrd": SECRET}, "no use for 'passwrd'"),
        ({"conn_type": "http", "host": "h", f"{SECRET}!": 1}, "a name that is no plain word"),
        ({"conn_type": "http", "host": "h", "password": 5}, "password is no text"),
        ({"conn_type": "http", "host": "h", "port": "x"}, "port is no number"),
        ({"conn_type": "http", "host": "h", "port": True}, "port is no number"),
        ({"conn_type": "http", "host": "h", "port": 0.5}, "port is no number"),
        ({"conn_type": "http", "host": f"http://u:{SECRET}@h"}, "the host is a URL"),
        ({"conn_type": "http", "host": "ftp://h"}, "the host is a URL"),
        ({"conn_type": "http", "host": "h", "extra": {"max_in_flight": True}}, "max_in_flight"),
        ({"conn_type": "http", "host": "h", "extra": {"token": 5}}, "token is no text"),
        ({"conn_type": "http", "host": "h", "extra": [1]}, "extra is no JSON object"),
    ],
)
def test_a_mistake_is_told_by_name(value, told):
    assert told in mistakes_of(value)


def test_every_mistake_is_told_at_once(tmp_path):
    (tmp_path / "empty").write_text("\n")
    connections, mistakes = read_connections(
        {
            "AIRFLOW_CONN_A": "http://h/?max_in_flight=0&verify=x&nonsense=1",
            "AIRFLOW_CONN_B_FILE": "/none",
            "AIRFLOW_CONN_C_FILE": str(tmp_path / "empty"),
            "AIRFLOW_CONN_D": "http://h",
            "AIRFLOW_CONN_D_FILE": str(tmp_path / "empty"),
        }
    )

    assert list(connections) == ["d"]
    assert [mistake.split(":")[0] for mistake in mistakes] == [
        *["AIRFLOW_CONN_A"] * 3,
        "AIRFLOW_CONN_B_FILE",
        "AIRFLOW_CONN_C_FILE",
        "AIRFLOW_CONN_D_FILE",
    ]


def test_secrets_are_not_in_the_repr():
    for uri in (f"http://u:{SECRET}@h", f"http://h/?token={SECRET}"):
        assert SECRET not in repr(one(uri))
        assert SECRET not in str({"default": one(uri)})


def test_the_fingerprint_changes_with_what_decides_about_the_credentials():
    base = one("http://u:p@h")
    others = [
        one("http://u:q@h"),
        one("http://v:p@h"),
        one("http://u:p@i"),
        one("http://u:p@h/?api_version=v1"),
        one("http://h/?token=p"),
    ]

    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 6
    assert base.fingerprint() == one("http://u:p@h/?max_in_flight=2&read_timeout_s=3").fingerprint()
    assert len(base.fingerprint()) == 16
    # Written down, because the workers of two releases must agree on it.
    assert base.fingerprint() == dataclasses.replace(base).fingerprint() == "ec0ab68959958f22"


def test_the_address_of_a_run_for_people():
    found = one("https://h/prefix")
    run_id = "manual__2026-01-01T00:00:00+00:00"

    assert found.run_url("v2", "d", "r1") == "https://h/prefix/dags/d/runs/r1"
    assert found.run_url("v1", "d", "r1") == "https://h/prefix/dags/d/grid?dag_run_id=r1"
    quoted = "manual__2026-01-01T00%3A00%3A00%2B00%3A00"
    assert found.run_url("v2", "ü", run_id) == f"https://h/prefix/dags/%C3%BC/runs/{quoted}"
