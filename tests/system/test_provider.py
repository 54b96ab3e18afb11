"""Our wheel in both real Airflows: what they list of it, and the door beside a running scheduler."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
from redis import Redis

from local.airflow import Airflow
from local.process import Process, free_port
from local.valkey import Valkey
from tests.system.stack import DAGS, below, until

SAYS = Path(__file__).with_name("callers") / "in_airflow.py"
CANARY = "c4n4ry-s3cret"
EXTRAS = ["airflow_name", "conf_key", "conf_limit_bytes", "flower_url", "redis_url", "ssl"]
HEAVY = {"aiohttp", "boto3", "celery", "fastapi", "httpx", "kombu", "requests", "starlette", "uvicorn"}


PRELOADED = """
import sys

found = "producers.airflow.operators" in sys.modules
try:
    from airflow.sdk import dag, task
except ImportError:
    from airflow.decorators import dag, task

@dag(dag_id="preloaded", schedule=None, catchup=False)
def preloaded():
    @task
    def say():
        if not found:
            raise ValueError("this process has to import our operators itself")

    say()

preloaded()
"""

OTHERS = """
import datetime

try:
    from airflow.providers.standard.sensors.date_time import DateTimeSensorAsync
    from airflow.sdk import DAG
except ImportError:
    from airflow import DAG
    from airflow.sensors.date_time import DateTimeSensorAsync

with DAG("others", schedule=None, start_date=datetime.datetime(2026, 1, 1)):
    DateTimeSensorAsync(task_id="wait", target_time="{{ ts }}", end_from_trigger=True)
"""


class Rig:
    """One Airflow with our wheel, whose scheduler has the door beside it; and a Valkey."""

    def __init__(self, airflow: Airflow, valkey: Valkey, port: int) -> None:
        self.airflow, self.valkey, self.port = airflow, valkey, port
        self.redis: Redis = Redis.from_url(valkey.url, decode_responses=True)

    def python(self, *argv: str | Path) -> str:
        """Run Airflow's Python as its components run; return what it said."""
        done = subprocess.run(
            [self.airflow.environment.python, *argv],
            env=self.airflow.env(),
            cwd=self.airflow.home,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def says(self, what: str) -> Any:
        return json.loads(self.python(SAYS, what).splitlines()[-1])

    def get(self, path: str) -> Any:
        status, found = self.airflow.api("GET", path)
        assert status == 200, (path, status, found)
        return found

    def said(self, component: str = "scheduler") -> str:
        return self.airflow.log_of(component).read_text(errors="replace")

    def connect(self) -> socket.socket:
        """A connection to the door, as soon as there is one."""

        def tried() -> socket.socket | None:
            try:
                return socket.create_connection(("127.0.0.1", self.port), timeout=20)
            except OSError:
                return None

        return until(tried, "listening")

    def doors(self) -> list[int]:
        """The processes of doors, below any component."""
        pids = [pid for part in self.airflow.processes.values() for pid in below(part.pid)]
        return [pid for pid in pids if b"producers.airflow.door" in _read(pid)]

    def run(self, run_id: str, dag_id: str = "echo") -> str:
        """Start a DAG and wait for its end."""
        body: dict[str, Any] = {"dag_run_id": run_id}
        if self.airflow.version == "3":
            body["logical_date"] = None
        status, found = self.airflow.api("POST", f"/dags/{dag_id}/dagRuns", body)
        assert status == 200, (status, found)
        return str(self.airflow.wait_for_run(dag_id, run_id)["state"])


def _read(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended in the meantime
        return b""


def listeners(port: int) -> set[int]:
    """Which processes have the listening socket of this port open."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"}
    found = set()
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            links = [str(file.readlink()) for file in folder.iterdir()]
        except OSError:
            continue
        if any(link == f"socket:[{inode}]" for inode in inodes for link in links):
            found.add(int(folder.parent.name))
    return found


@pytest.fixture(scope="module", params=["3", "2"], ids=["airflow3", "airflow2"])
def airflow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp(f"provider{request.param}")
    (folder / "dags").mkdir()
    shutil.copy(DAGS / "echo.py", folder / "dags")
    (folder / "dags" / "preloaded.py").write_text(PRELOADED)
    (folder / "dags" / "others.py").write_text(OTHERS)
    port = free_port()
    with ExitStack() as parts:
        valkey = parts.enter_context(Valkey())
        made = Airflow(
            request.param,
            home=folder / "home",
            dags=folder / "dags",
            parallelism=2,
            provider=True,
            extra_env={
                "DAGRELAY_PLUGIN_COMPONENT": "scheduler",
                "DAGRELAY_PLUGIN_PORT": str(port),
                "DAGRELAY_PLUGIN_INSECURE": "true",
                "DAGRELAY_REDIS_URL": valkey.url,
                "AIRFLOW_CONN_CANARY": f"http://x:{CANARY}@host",
            },
        )
        parts.enter_context(made)
        made.wait_for_dag("echo")
        made.wait_for_dag("preloaded")
        yield Rig(made, valkey, port)


# The metadata


def test_airflow_lists_dagrelay_among_its_providers(airflow):
    assert "dagrelay" in airflow.python("-m", "airflow", "providers", "list")
    (listed,) = [one for one in airflow.get("/providers")["providers"] if one["package_name"] == "dagrelay"]
    assert "exactly once" in listed["description"]


def test_all_that_the_metadata_names_is_there(airflow):
    said = airflow.says("metadata")

    assert said["hook"] == ["producers.airflow.hook.DagrelayHook", "relay_conn_id", "Dagrelay"]
    assert [name.removeprefix("extra__dagrelay__") for name in said["fields"]] == EXTRAS
    assert said["hidden"] == ["extra__dagrelay__conf_key", "extra__dagrelay__redis_url"]
    assert said["behaviour"]["relabeling"] == {"schema": "Redis database"}
    assert "producers.airflow.links.FlowerLink" in said["links"]
    assert "producers.airflow.operators" in said["modules"]  # each was imported


def test_a_connection_says_where_redis_is_and_the_environment_what_it_leaves_out(airflow):
    said = airflow.says("connection")

    assert said["north"] == ["redis://af:p%2F4@redis:6379/0", "https://flower", "north", 7]
    assert said["keys"] == [True, True]  # that of the environment, and the connection's own
    assert said["south"] == "rediss://af:s3cret%2Fpass@redis:7/2"
    wrong, nowhere = said["wrong"]
    assert "'flower' is no extra of it" in wrong
    assert "is of type 'http', not dagrelay" in wrong
    assert "relay_conn_id: Airflow has no connection 'nowhere'" in nowhere
    assert said["asked"] == 1
    assert said["masked"] == "*** ***"


def test_the_form_of_a_connection_shows_its_fields(airflow):
    if airflow.airflow.version == "2":
        page = form_of_airflow_2(airflow.airflow)
        assert all(f'name="extra__dagrelay__{name}"' in page for name in EXTRAS)
        assert re.search(r'type="password"[^>]*name="extra__dagrelay__redis_url"', page) or re.search(
            r'name="extra__dagrelay__redis_url"[^>]*type="password"', page
        )
        return
    token = airflow.airflow._bearer(renew=True)
    url = f"{airflow.airflow.url}/ui/connections/hook_meta"
    found = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=60).json()

    (form,) = [one for one in found if one["connection_type"] == "dagrelay"]
    assert form["hook_name"] == "Dagrelay"
    assert sorted(form["extra_fields"]) == EXTRAS
    assert form["extra_fields"]["redis_url"]["schema"]["format"] == "password"
    assert form["standard_fields"]["url_schema"]["title"] == "Redis database"


def form_of_airflow_2(airflow: Airflow) -> str:
    """The page for a new connection, as a person sees it."""
    with requests.Session() as session:
        page = session.get(f"{airflow.url}/login/", timeout=60).text
        (token,) = re.findall(r'name="csrf_token"[^>]*value="([^"]+)"', page)
        who = {"username": airflow.username, "password": airflow.password, "csrf_token": token}
        session.post(f"{airflow.url}/login/", data=who, timeout=60).raise_for_status()
        answer = session.get(f"{airflow.url}/connection/add", timeout=60)
        answer.raise_for_status()
        return answer.text


def test_a_dag_of_others_that_ends_tasks_from_their_triggers_is_read_with_and_without_a_door(airflow):
    """Airflow refuses it where any plug-in has a listener."""
    airflow.airflow.wait_for_dag("others")
    listed = airflow.python("-m", "airflow", "dags", "list-import-errors")
    assert "end_from_trigger" not in listed


def test_a_task_finds_our_operators_imported(airflow):
    assert airflow.run("preloaded", "preloaded") == "success"


def test_the_plugin_is_listed_and_nothing_of_it_failed(airflow):
    (listed,) = [one for one in airflow.get("/plugins")["plugins"] if one["name"] == "dagrelay"]
    assert not listed["listeners"]  # in the API server, where none is needed
    if airflow.airflow.version == "3":
        assert not airflow.get("/plugins/importErrors")["import_errors"]


def test_a_dag_file_with_our_operators_loads_nothing_heavy(airflow):
    loaded = {name.partition(".")[0] for name in airflow.says("parse")}

    assert "producers" in loaded
    assert not loaded & HEAVY


# The plug-in


def test_the_door_beside_the_scheduler_takes_requests(airflow):
    with airflow.connect() as sender:
        sender.sendall(b'{"dag_id": "echo", "key": "by-the-door"}\n{"dag": 1}\n')
        with sender.makefile("r") as answers:
            took, refused = answers.readline().split(), answers.readline()

    assert took[0] == "OK"
    assert refused.startswith("ERR ")
    assert airflow.redis.hget(f"dagrelay:record:{took[1]}", "state")


def test_there_is_one_door_and_no_fork_holds_its_port(airflow):
    """Workers of the executor, parsers and tasks are forks of the scheduler or of one another."""
    assert airflow.run("beside-the-door") == "success"
    (door,) = airflow.doors()

    assert listeners(airflow.port) == {door}
    assert int(Path(f"/proc/{door}/stat").read_text().rpartition(")")[2].split()[1]) == (
        airflow.airflow.processes["scheduler"].pid
    )
    others = [airflow.airflow.log_of(name) for name in airflow.airflow.processes if name != "scheduler"]
    tasks = list((airflow.airflow.home / "logs" / "tasks").rglob("*.log"))
    assert tasks
    assert not [file for file in [*others, *tasks] if "TCP door" in file.read_text(errors="replace")]


def test_the_door_knows_nothing_of_airflows_own_secrets(airflow):
    (door,) = airflow.doors()
    environ = Path(f"/proc/{door}/environ").read_bytes()

    assert b"DAGRELAY_REDIS_URL=" in environ
    assert CANARY.encode() not in environ
    assert b"AIRFLOW_" not in environ


def test_a_second_scheduler_finds_the_port_taken_and_works_on(airflow):
    rig = airflow.airflow
    log = rig.home / "logs" / "second.log"
    second = Process(
        [rig.environment.python, "-m", "airflow", "scheduler", "--skip-serve-logs"],
        log=log,
        env=rig.env(),
        cwd=rig.home,
        name="second scheduler",
    )
    try:
        said = f"cannot listen at 127.0.0.1:{airflow.port}"
        until(lambda: said in log.read_text(errors="replace"), "told that the port is taken")
        until(lambda: "the TCP door has ended" in log.read_text(errors="replace"), "told that it ended")
        assert second.alive
        assert airflow.run("with-a-second") == "success"
        with airflow.connect() as sender:  # that of the first
            sender.sendall(b'{"dag_id": "echo"}\n')
            assert sender.recv(100).startswith(b"OK ")
    finally:
        second.kill()


def test_a_flood_leaves_the_scheduler_to_its_work(airflow):
    flood = (
        "import socket, sys, time\n"
        "many = [socket.create_connection(('127.0.0.1', int(sys.argv[1])), 20) for _ in range(400)]\n"
        "end = time.monotonic() + 120\n"
        "print('on', flush=True)\n"
        "while time.monotonic() < end:\n"
        "    for one in many:\n"
        "        try: one.sendall(b'{\"dag_id\": 1}\\n' * 20 + b'{')\n"
        "        except OSError: pass\n"
        "        try: one.setblocking(False); one.recv(65536)\n"
        "        except OSError: pass\n"
        "    time.sleep(0.02)\n"
    )
    airflow.connect().close()
    sender = subprocess.Popen(
        [sys.executable, "-c", flood, str(airflow.port)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert sender.stdout
        assert sender.stdout.readline() == "on\n"
        assert airflow.run("in-the-flood") == "success"
    finally:
        sender.kill()
        sender.wait()
        sender.stdout.close()
    with airflow.connect() as one:
        one.settimeout(150)  # it gives way to its host, and 400 floods have left it something to read
        one.sendall(b'{"dag_id": "echo"}\n')
        assert one.recv(100).startswith(b"OK ")


def test_term_of_the_scheduler_ends_the_door_in_good_order(airflow):
    scheduler = airflow.airflow.processes["scheduler"]
    with airflow.connect() as sender:
        sender.sendall(b'{"dag_id": "echo", "key": "at-the-end"}\n')
        assert sender.recv(100).startswith(b"OK ")
        assert scheduler.stop(grace_s=60) == 0
        assert sender.recv(100) == b""

    assert not listeners(airflow.port)
    said = airflow.said()
    assert "ended unanswered=0" in said
    assert said.index("Exited execute loop") < said.index("ended unanswered=0")
    assert "the TCP door has ended" not in said  # only by itself


def test_bad_settings_are_a_line_in_the_log_and_the_scheduler_works(airflow):
    airflow.airflow.extra_env["DAGRELAY_PLUGIN_PROT"] = "7700"
    airflow.airflow.start_component("scheduler")

    until(lambda: "DAGRELAY_PLUGIN_PROT: is no setting" in airflow.said(), "told what is wrong")
    until(lambda: "the TCP door has ended" in airflow.said(), "told that it ended")
    assert airflow.run("without-a-door") == "success"
    assert not listeners(airflow.port)
    airflow.airflow.stop_component("scheduler")


def test_the_triggerer_has_it_where_that_is_named(airflow):
    del airflow.airflow.extra_env["DAGRELAY_PLUGIN_PROT"]
    airflow.airflow.extra_env["DAGRELAY_PLUGIN_COMPONENT"] = "triggerer"
    airflow.airflow.start_component("scheduler")
    airflow.airflow.start_component("triggerer")

    with airflow.connect() as sender:
        sender.sendall(b'{"dag_id": "echo"}\n')
        assert sender.recv(100).startswith(b"OK ")
    (door,) = airflow.doors()
    assert door in below(airflow.airflow.processes["triggerer"].pid)


def test_a_component_that_is_none_is_told_where_it_might_have_been(airflow):
    airflow.airflow.stop_component("triggerer")
    airflow.airflow.extra_env["DAGRELAY_PLUGIN_COMPONENT"] = "webserver"
    airflow.airflow.start_component("triggerer")

    until(lambda: "'webserver' is none of scheduler, triggerer" in airflow.said("triggerer"), "told")
    assert airflow.airflow.alive
