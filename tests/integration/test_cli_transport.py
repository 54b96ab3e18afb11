"""A worker and an Airflow that it reaches by a command: one that hangs, dies, floods; one that stands in."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tests.import_tasks  # noqa: F401
from producers.contract import TriggerRequest
from producers.errors import GaveUp, OutcomeUnknown, RequestRejected
from producers.fan_out import fan_out
from producers.stores.lines import Lines
from tasks.airflow.command import MAX_OUTPUT_BYTES, NotRun, run
from tasks.airflow.connections import Command
from tests.integration.test_trigger import until

pytestmark = pytest.mark.integration

FAKE = Path(__file__).parent.parent / "fake_cli.py"
SECRET = "s3cr3t-canary"


class FakeCli:
    """The folder of a fake command, and what happened there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.argv = [sys.executable, "-S", str(FAKE), str(folder)]

    def fault(self, what: str) -> None:
        (self.folder / "new").write_text(what)
        (self.folder / "new").rename(self.folder / "fault")

    def mend(self) -> None:
        (self.folder / "fault").unlink(missing_ok=True)

    def conn(self, **extra: Any) -> str:
        """A connection by this command alone."""
        given = {"transport": "cli", "cli_command": self.argv, **extra}
        return json.dumps({"conn_type": "airflow", "extra": given})

    @property
    def runs(self) -> list[dict[str, str]]:
        file = self.folder / "runs.json"
        return json.loads(file.read_text()) if file.exists() else []

    def ended(self, state: str) -> None:
        """Have all runs end so."""
        runs = [one | {"state": state} for one in self.runs]
        (self.folder / "new").write_text(json.dumps(runs))
        (self.folder / "new").rename(self.folder / "runs.json")

    @property
    def calls(self) -> list[dict[str, Any]]:
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def asked(self, *words: str) -> int:
        """How many calls began with these words."""
        return sum(call["argv"][: len(words)] == list(words) for call in self.calls)


@pytest.fixture
def cli(tmp_path) -> FakeCli:
    return FakeCli(tmp_path / "cli")


def gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for has, too)."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def group(pid: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == pid and fields[0] != "Z":
                found.append(int(folder.name))
    return found


# The runner


def call(cli: FakeCli, *words: str, timeout_s: float = 20.0) -> Any:
    return run(Command(tuple(cli.argv), timeout_s=timeout_s), words)


def test_what_hangs_is_ended_at_its_time_with_all_it_began(cli):
    cli.fault("hang")
    with pytest.raises(NotRun) as caught:
        call(cli, "db", "check", timeout_s=1.0)

    assert (caught.value.reached, caught.value.timed_out) == (True, True)
    until(lambda: not group(cli.calls[0]["pid"]))


def test_what_floods_is_ended(cli):
    cli.fault("flood")
    with pytest.raises(NotRun, match=f"{MAX_OUTPUT_BYTES:,}") as caught:
        call(cli, "db", "check")
    assert caught.value.reached
    until(lambda: not group(cli.calls[0]["pid"]))


def test_a_child_that_stays_behind_holds_up_nobody(cli):
    cli.fault("left-behind")
    began = time.monotonic()
    assert call(cli, "db", "check").code == 0
    assert time.monotonic() - began < 15
    until(lambda: not group(cli.calls[0]["pid"]))


def test_what_is_not_there_was_not_run(tmp_path):
    for argv in (("/none/airflow",), ("no-such-command",), (str(tmp_path),)):
        with pytest.raises(NotRun, match="is not there") as caught:
            run(Command(argv), ["version"])
        assert not caught.value.reached


def test_arguments_reach_a_command_behind_a_shell_as_they_are(cli):
    command = Command((*cli.argv, "--shell"), remote_shell=True)
    odd = '--conf={"a": "$(id) `id` \'x\' \\" ; é"}'
    assert run(command, ["dags", "trigger", "d", "--run-id=r", odd]).code == 0
    assert cli.calls[0]["argv"] == ["dags", "trigger", "d", "--run-id=r", odd]


# A worker


@pytest.mark.parametrize("version", ["3.3.2", "2.11.2"])
def test_a_request_becomes_a_run_and_a_repeat_finds_it(relay, cli, start_worker, version):
    (cli.folder / "version").write_text(version)
    worker = start_worker(connections={"default": cli.conn()}, AWS_SECRET_ACCESS_KEY=SECRET)
    first = relay.enqueue(TriggerRequest("daily_sales", {"n": 1, "s": SECRET}, key="k")).get(timeout=60)
    again = relay.enqueue(TriggerRequest("daily_sales", {"n": 1, "s": SECRET}, key="k")).get(timeout=60)
    with pytest.raises(Exception, match="another conf") as conflict:
        relay.enqueue(TriggerRequest("daily_sales", {"n": 2, "s": SECRET}, key="k")).get(timeout=60)

    assert (first.created, again.created) == (True, False)
    assert first.dag_run_id == again.dag_run_id == "relay__k"
    assert (first.url, first.state) == (None, "queued")
    assert [one["run_id"] for one in cli.runs] == ["relay__k"]
    assert SECRET not in str(conflict.value)
    assert SECRET not in worker.text()
    environment = {name for one in cli.calls for name in one["env"]}
    assert not [name for name in environment if name.startswith(("DAGRELAY", "AIRFLOW_CONN", "AWS"))]
    assert cli.asked("version") == 1


@pytest.mark.parametrize("fault", ["after-hang", "after-die", "after-garbage", "after-database"])
def test_a_run_whose_answer_was_lost_is_made_once_and_counts_as_ours(relay, cli, start_worker, fault):
    cli.fault(fault)
    start_worker(connections={"default": cli.conn(cli_timeout_s=2, timed_out_slot_s=0)})
    handle = relay.enqueue(TriggerRequest("daily_sales", {"n": 1}, key="k"))
    until(lambda: cli.runs, timeout_s=60)
    until(lambda: relay.records.get(handle.id).unsure, timeout_s=60)
    cli.mend()
    found = handle.get(timeout=90)

    assert (found.created, found.dag_run_id) == (True, "relay__k")
    assert len(cli.runs) == 1


def test_what_was_not_begun_is_given_up_with_its_reason_and_an_unknown_one_as_unknown(
    relay, cli, start_worker
):
    absent = json.dumps({"conn_type": "airflow", "extra": {"transport": "cli", "cli_command": ["no-such"]}})
    start_worker(connections={"default": cli.conn(), "absent": absent})
    one = TriggerRequest("daily_sales", connection="absent", give_up_after_s=2)
    with pytest.raises(GaveUp, match="not there"):
        relay.enqueue(one).get(timeout=60)
    cli.fault("database")
    with pytest.raises(OutcomeUnknown) as unknown:
        relay.enqueue(TriggerRequest("daily_sales", give_up_after_s=2)).get(timeout=60)
    assert SECRET not in str(unknown.value)


def test_refusals_are_permanent_and_quote_no_value(relay, cli, start_worker):
    worker = start_worker(connections={"default": cli.conn()}, DAGRELAY_MISSING_GRACE_S="1")
    with pytest.raises(RequestRejected, match="param secret") as caught:
        relay.enqueue(TriggerRequest("daily_sales", {"secret": SECRET})).get(timeout=60)
    with pytest.raises(RequestRejected, match="no way for result_from"):
        relay.enqueue(TriggerRequest("daily_sales", wait=True, result_from="t")).get(timeout=60)
    with pytest.raises(Exception, match="no DAG 'missing'"):
        relay.enqueue(TriggerRequest("missing")).get(timeout=60)
    assert SECRET not in str(caught.value)
    assert SECRET not in worker.text()
    assert cli.runs == []


def test_a_conf_that_no_command_line_holds_goes_as_a_reference(relay, cli, start_worker):
    start_worker(connections={"default": cli.conn()})
    assert relay.enqueue(TriggerRequest("daily_sales", {"big": "x" * 140_000})).get(timeout=60).created
    assert len(cli.runs[0]["conf"]) < 2000


def test_a_run_is_waited_for_by_a_list_for_each_dag(relay, cli, start_worker):
    start_worker(connections={"default": cli.conn()})
    handles = [relay.enqueue(TriggerRequest("daily_sales", {"n": n}, wait=True)) for n in range(4)]
    until(lambda: len(cli.runs) == 4, timeout_s=60)
    # Those that wait by the time of the first look are asked for one by one, where they are but two.
    until(lambda: cli.asked("dags", "list-runs"), timeout_s=90)
    cli.ended("success")

    assert {handle.get(timeout=90).state for handle in handles} == {"success"}


def test_no_more_commands_run_at_once_than_the_connection_says(relay, cli, start_worker):
    start_worker(connections={"default": cli.conn()})
    handles = [relay.enqueue(TriggerRequest("daily_sales", {"n": n}, key=f"k{n}")) for n in range(12)]
    most = 0
    while len(cli.runs) < 12:
        most = max(most, Lines(relay.redis).state("default").in_flight)
        time.sleep(0.02)
    assert all(handle.get(timeout=60).created for handle in handles)
    assert most <= 2
    assert len(cli.runs) == 12


# Standing in


def test_what_the_api_is_not_reached_for_goes_by_the_cli_and_comes_back(relay, airflow, cli, start_worker):
    uri = json.dumps(
        {
            "conn_type": "http",
            "host": airflow.url,
            "login": airflow.username,
            "password": airflow.password,
            "extra": {"failover": "cli", "cli_command": cli.argv, "connect_timeout_s": 1},
        }
    )
    airflow.stop()
    start_worker(connections={"default": uri})
    during = relay.enqueue(TriggerRequest("daily_sales", {"n": 1}, key="during")).get(timeout=60)
    many = relay.enqueue_many([TriggerRequest("daily_sales", {"n": n}, key=f"k{n}") for n in range(15)])
    runs = [handle.get(timeout=120) for handle in many]
    state = Lines(relay.redis).state("default")

    assert during.created
    assert (during.connection, during.url.startswith(airflow.url)) == ("default", True)
    assert all(run.created for run in runs)
    assert sorted(one["run_id"] for one in cli.runs) == sorted(
        ["relay__during", *(f"relay__k{n}" for n in range(15))]
    )
    assert state.breaker == "open"

    later = relay.enqueue(TriggerRequest("daily_sales", run_after="2030-01-01T00:00:00Z", key="later"))
    time.sleep(1)
    calls = cli.asked("dags", "trigger")
    airflow.start()
    assert later.get(timeout=60).created  # which the CLI has no way for
    assert ("daily_sales", "relay__later") in airflow.runs
    until(lambda: Lines(relay.redis).state("default").breaker != "open", timeout_s=60)
    assert relay.enqueue(TriggerRequest("daily_sales", key="after")).get(timeout=60).created
    assert ("daily_sales", "relay__after") in airflow.runs
    assert cli.asked("dags", "trigger") == calls


def test_what_airflow_refuses_does_not_go_by_the_cli(relay, airflow, cli, start_worker):
    uri = json.loads(cli.conn())
    uri["extra"] |= {"transport": "rest", "failover": "cli"}
    uri |= {"host": airflow.url, "login": airflow.username, "password": airflow.password}
    start_worker(connections={"default": json.dumps(uri)}, DAGRELAY_MISSING_GRACE_S="1")
    airflow.missing.add("nothing")
    airflow.fault = lambda number, *_: "503" if number < 3 else "answer"
    with pytest.raises(Exception, match="no DAG"):
        relay.enqueue(TriggerRequest("nothing")).get(timeout=60)
    assert relay.enqueue(TriggerRequest("daily_sales", key="k")).get(timeout=60).created
    assert cli.calls == []


def test_a_worker_killed_in_the_middle_of_a_call_leaves_one_run_and_no_process(relay, cli, start_worker):
    cli.fault("after-hang")
    worker = start_worker(connections={"default": cli.conn(cli_timeout_s=3, timed_out_slot_s=0)})
    handle = relay.enqueue(TriggerRequest("daily_sales", {"n": 1}, key="k"))
    until(lambda: cli.runs, timeout_s=60)
    os.kill(worker.pid, signal.SIGKILL)
    cli.mend()
    start_worker(name="w2", connections={"default": cli.conn()})

    assert handle.get(timeout=90).created
    assert len(cli.runs) == 1
    hung = next(one["pid"] for one in cli.calls if one["argv"][:2] == ["dags", "trigger"])
    until(lambda: gone(hung), timeout_s=60)


def test_a_fan_out_goes_by_the_cli_as_well_while_the_api_is_away(relay, airflow, cli, start_worker):
    uri = {"conn_type": "http", "host": airflow.url, "login": airflow.username, "password": airflow.password}
    extra = {"failover": "cli", "cli_command": cli.argv, "connect_timeout_s": 1}
    airflow.stop()
    start_worker(connections={"default": json.dumps(uri | {"extra": extra})})
    before = relay.enqueue_many([TriggerRequest("quiet", key=f"k{n}") for n in range(10)])
    until(lambda: Lines(relay.redis).state("default").breaker == "open", timeout_s=60)
    fan = fan_out([TriggerRequest("daily_sales", {"n": n}, key=f"f{n}") for n in range(20)], relay=relay)

    assert {one.state for one in fan.get(timeout=60)} == {"done"}
    assert {handle.get(timeout=60).created for handle in before} == {True}
    assert {one["run_id"] for one in cli.runs} >= {f"relay__f{n}" for n in range(20)}
