"""The command `dagrelay`: trigger a DAG, see what waits and how a request stands, find out what is wrong.

Its exit codes are in `exits`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import click

from . import cli_dead, cli_gateway, cli_health, cli_lines, cli_listen, cli_shell, cli_socket, cli_waiting
from .cli_jobs import job, json_given
from .cli_watch import outcome_of, watch
from .client import RelayClient
from .contract import QUEUE_TRIGGERS, TriggerRequest
from .errors import BrokerUnavailable
from .exits import EX_FAILED, told
from .fan_out_cli import fan_out_command
from .settings import read_settings


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dagrelay")
def main() -> None:
    """Start Airflow DAG runs through Dagrelay's workers, and see how they fare.

    DAGRELAY_REDIS_URL names the Redis of the workers.
    """


for _command in (cli_waiting.parked, cli_waiting.wake, cli_waiting.cancel, cli_waiting.status):
    main.add_command(_command)
main.add_command(fan_out_command)
for _command in (cli_lines.airflows, cli_lines.hold, cli_lines.release):
    main.add_command(_command)
main.add_command(cli_health.health)
main.add_command(cli_dead.dead)
main.add_command(cli_gateway.gateway)
main.add_command(cli_gateway.keys)
main.add_command(cli_listen.listen)
main.add_command(cli_socket.socket)
for _command in (watch, job, cli_shell.completion, cli_shell.schema):
    main.add_command(_command)


@main.command()
@click.argument("dag_id")
@click.option("--conf", help="The run's conf: a JSON object, @FILE, or - for standard input.")
@click.option("--key", help="Makes repeated requests one run: use it wherever a command may run twice.")
@click.option("--run-id", "dag_run_id", help="The run id, instead of one made from the key or the task id.")
@click.option("--logical-date", help="The run's logical date, ISO 8601 with its time zone.")
@click.option("--run-after", help="Airflow 3 holds the run back until then; ISO 8601 with its time zone.")
@click.option("--note", help="Shown with the run in Airflow.")
@click.option("--connection", help="Which Airflow, as the workers name it.  [default: default]")
@click.option("--if-exists", type=click.Choice(["reuse", "fail", "clear", "skip"]), help="[default: reuse]")
@click.option(
    "--if-paused", type=click.Choice(["trigger", "hold", "fail", "unpause"]), help="[default: trigger]"
)
@click.option("--window", help="Hand it over while fewer runs are unfinished: a number, or max_active_runs.")
@click.option("--give-up-after", "give_up_after_s", type=float, help="Seconds to go on trying.")
@click.option("--priority", type=int, help="0 to 9, higher first among what waits.  [default: 5]")
@click.option("--countdown", type=float, help="Seconds to wait before the first attempt.")
@click.option("--until-created", is_flag=True, help="Wait until the run exists, and print it as JSON.")
@click.option("--wait", is_flag=True, help="Wait until the run has ended, and print it as JSON.")
@click.option("--timeout", type=float, help="Seconds for which this command waits; the request goes on.")
@click.option(
    "--wait-timeout",
    "wait_timeout_s",
    type=float,
    help="With --wait: seconds for which the workers wait for the run's end.  [default: 24 h]",
)
@click.option("--result-from", help="With --wait: the task of the run whose XCom is its result.")
@click.option("--on-end", multiple=True, help="A hook, as the workers name it, that is told of the end.")
@click.option("--stop-run", is_flag=True, help="With --wait: when the waiting ends first, fail the run.")
@told
def trigger(
    conf: str | None,
    countdown: float | None,
    until_created: bool,
    wait: bool,
    stop_run: bool,
    on_end: tuple[str, ...],
    timeout: float | None,
    **given: Any,
) -> None:
    """Start one run of DAG_ID; print the task id of the accepted request.

    With --wait it ends as the run does: 0 for a success, 1 for a failure. Ended early (by Ctrl-C, by
    --timeout) it leaves the request as it is: see `dagrelay status`.
    """
    if until_created and wait:
        raise click.UsageError("give --until-created or --wait")
    fields = {name: value for name, value in given.items() if value is not None}
    if conf is not None:
        fields["conf"] = json_given("--conf", conf)
    if fields.get("window", "").isdecimal():
        fields["window"] = int(fields["window"])
    request = TriggerRequest(**fields, wait=wait, stop_run=stop_run, on_end=list(on_end))
    handle = RelayClient().enqueue(request, countdown=countdown)
    click.echo(handle.id)
    if until_created or wait:
        click.echo(json.dumps(outcome_of(handle, timeout).to_message(), indent=2))


@main.command()
@told
def doctor() -> None:
    """Show the settings that are in force, secrets masked, and try everything they name."""
    settings = read_settings()
    ok = True
    shown = f"DAGRELAY_REDIS_URL={masked(settings.redis_url)} DAGRELAY_CLIENT_NAME={settings.client_name}"
    _say("settings", True, shown)
    client = RelayClient(settings)
    _say("confs", True, str(client.confs))
    info = _ask_redis(client)
    if info is None:
        ok = False
    else:
        ok &= _check_promises(info)
        ok &= _check_workers(settings.redis_url)
    worker_part = Path("tasks/doctor.py")
    # A host may have a package `tasks` of its own: ours is known by its first line.
    if worker_part.exists() and worker_part.read_text(errors="replace").startswith(_WORKERS_DOCTOR):
        # A process of its own: this package never imports the workers' code.
        ok &= subprocess.run([sys.executable, "-m", "tasks.doctor"], check=False).returncode == 0
    else:
        click.echo("     airflow      not tried here: run `dagrelay doctor` where the workers' code lies")
    sys.exit(0 if ok else EX_FAILED)


_WORKERS_DOCTOR = '"""The worker\'s half of `dagrelay doctor`'


def _ask_redis(client: RelayClient) -> dict[str, Any] | None:
    """Return what Redis says of itself, or None when it does not answer."""
    from .client import told_as_unavailable

    try:
        with told_as_unavailable():
            info: dict[str, Any] = client.redis.info()
    except BrokerUnavailable as exc:
        _say("redis", False, exc.reason)
        return None
    server = info.get("server_name", "redis")
    version = info.get("valkey_version") or info.get("redis_version")
    _say("redis", True, f"{server} {version}, {info.get('used_memory_human')} used")
    return info


def _check_promises(info: dict[str, Any]) -> bool:
    """Say what the configuration of Redis promises."""
    durable = bool(info.get("aof_enabled"))
    _say(
        "appendonly",
        durable,
        "yes: at most the last second is lost when the whole machine dies"
        if durable
        else "no: what was accepted is lost when Redis restarts; set appendonly yes",
    )
    policy = str(info.get("maxmemory_policy", "unknown"))
    _say(
        "maxmemory",
        policy == "noeviction",
        policy if policy == "noeviction" else f"{policy}: Redis may drop requests; set noeviction",
    )
    return durable and policy == "noeviction"


def _check_workers(redis_url: str) -> bool:
    """Ask which workers answer. Needs Celery, which is imported here only."""
    from celery import Celery

    if redis_url.startswith("rediss://") and "ssl_cert_reqs" not in redis_url:
        redis_url += ("&" if "?" in redis_url else "?") + "ssl_cert_reqs=required"  # kombu's default: none
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
        os.environ.pop(name, None)  # Celery would follow them, whatever it is told; this is our own process
    app = Celery("dagrelay-doctor", broker=redis_url, set_as_current=False)
    app.conf.broker_transport_options = {"socket_timeout": 2, "socket_connect_timeout": 2}
    try:
        answers = app.control.inspect(timeout=1.0).active_queues() or {}
    except Exception as exc:  # noqa: BLE001 - kombu raises what the connection raised, of many kinds
        _say("workers", False, f"could not be asked ({type(exc).__name__})")
        return False
    # Workers of other apps on the same Redis answer too.
    names = sorted(
        name for name, queues in answers.items() if any(queue["name"] == QUEUE_TRIGGERS for queue in queues)
    )
    _say("workers", bool(names), ", ".join(names) or "none answers: start one with `make worker`")
    return bool(names)


def _say(what: str, ok: bool, text: str) -> None:
    click.echo(f"{'ok  ' if ok else 'BAD '} {what:12} {text}")


def masked(url: str) -> str:
    """Return a URL with its password replaced by stars, wherever it stands."""
    parts = urlsplit(url)
    parts = parts._replace(query=re.sub(r"(?<![^&])([^&=]*password[^&=]*)=[^&]*", r"\1=***", parts.query))
    if parts.password is not None:
        host = parts.netloc.rpartition("@")[2]
        parts = parts._replace(netloc=f"{parts.username or ''}:***@{host}")
    return urlunsplit(parts)


if __name__ == "__main__":
    main()
