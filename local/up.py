"""The stack for your own Airflow, in the background: `make up`, `make down`.

An embedded Valkey (unless DAGRELAY_REDIS_URL or REDIS_URL names a Redis), WORKERS workers (default 1) and
Flower. Whether it is up is told by a lock that the background process holds, never by a process id alone: a
machine that was switched off leaves no lock, and an id may be somebody else's by then.

    .local/up/            env (the address of Redis, for `make trigger`), flower-password, logs
    .local/data/valkey    what was accepted: kept over `make down` and over a restart of the machine
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from local.process import ROOT, STATE, PartFailed, Process, free_port, port_free, secret_file
from local.supervisor import (
    WORKER_GRACE_S,
    Stopped,
    Supervisor,
    celery,
    end_on_signals,
    start_flower,
    start_worker,
    stop_on_signals,
    wait_for_flower,
    wait_for_worker,
)
from local.valkey import Valkey

UP = STATE / "up"
LOCK, ENV, LOG, READY = UP / "lock", UP / "env", UP / "up.log", UP / "ready.json"
FLOWER_PASSWORD = UP / "flower-password"
DATA = STATE / "data" / "valkey"
VALKEY_PORT = STATE / "data" / "valkey-port"
START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = WORKER_GRACE_S + 30.0


class Mistake(SystemExit):
    """What the user has to change, in one or two lines; ends the command with status 1."""


def main() -> None:
    parser = argparse.ArgumentParser(description="The stack for your own Airflow, in the background.")
    parser.add_argument("command", choices=("up", "down", "flower", "serve"))
    command = parser.parse_args().command
    {"up": up, "down": down, "flower": flower, "serve": serve}[command]()


def up() -> None:
    """Start the stack in the background, return when it is ready, print where it is."""
    if is_up():
        print("already up")
        show(read_ready())
        return
    check_environment(os.environ)
    make_up_folder()
    ensure_flower_password(os.environ)
    READY.unlink(missing_ok=True)
    LOG.unlink(missing_ok=True)
    with LOG.open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "local.up", "serve"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(server)
    except BaseException:
        server.terminate()  # Ctrl-C while it starts: nothing half-started is left
        server.wait()
        raise
    show(read_ready())


def wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    """Print what the background process says until it is ready. Raises Mistake if it ends."""
    shown = 0
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        ended, ready = server.poll() is not None, READY.exists()
        said = LOG.read_text(errors="replace")
        print(said[shown:], end="", flush=True)
        shown = len(said)
        if ended:
            raise Mistake(f"it did not start (see {os.path.relpath(LOG)})")
        if ready:
            return
        if time.monotonic() > deadline:
            raise Mistake(f"not ready after {START_TIMEOUT_S:g} s (see {os.path.relpath(LOG)})")
        time.sleep(0.1)


def down() -> None:
    """Stop the stack in order and wait for it; say so if there is none."""
    if not is_up():
        print("not up")
        return
    pid = int(LOCK.read_text() or "0")
    if not pid:
        raise Mistake("it is just starting: again in a moment")
    print("stopping; a running task may finish first", flush=True)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while is_up():
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)  # the guards end what it started
            time.sleep(1)
            raise Mistake(f"it did not stop within {STOP_TIMEOUT_S:g} s and was killed")
        time.sleep(0.1)
    print("down; what was accepted is kept in " + os.path.relpath(DATA))


def flower() -> None:
    """Become a Flower in the foreground, with the password that `make up` would give it."""
    make_up_folder()
    ensure_flower_password(os.environ)
    environment = dict(os.environ) | flower_settings(os.environ)
    take_redis_url(environment)
    os.chdir(ROOT)
    os.execve(sys.executable, celery("flower", "--conf=flowerconfig.py"), environment)  # noqa: S606


def serve() -> None:
    """Be the background process: hold the lock, start everything, watch it, stop it."""
    held = take_lock()
    if held is None:
        raise Mistake("already up")
    stop_on_signals()
    supervisor = Supervisor(say)
    code = 0
    try:
        start_all(supervisor)
        supervisor.watch(restart=True)
    except Stopped:
        pass
    except PartFailed as exc:
        say(str(exc))
        code = 1
    finally:
        end_on_signals()
        READY.unlink(missing_ok=True)
        ENV.unlink(missing_ok=True)
        supervisor.stop()
        held.close()
    sys.exit(code)


def start_all(supervisor: Supervisor) -> None:
    """Start Valkey, the workers and Flower, wait for each, and write down where they are."""
    environment = dict(os.environ)
    workers = check_environment(environment)
    take_redis_url(environment)
    redis_url = environment.get("DAGRELAY_REDIS_URL", "")
    if not redis_url:
        valkey = Valkey(DATA, port=remembered_port())
        supervisor.start("Valkey", valkey.start)
        redis_url = valkey.url
        say(f"Valkey answers on {redis_url}")
    environment["DAGRELAY_REDIS_URL"] = redis_url
    environment |= flower_settings(environment)
    flower_url = f"http://{environment['DAGRELAY_FLOWER_ADDRESS']}:{environment['DAGRELAY_FLOWER_PORT']}"

    for number in range(1, workers + 1):
        node = f"worker{number}"
        supervisor.start(node, partial(start_worker, environment, log=UP / f"{node}.log", node=node))
    supervisor.start("Flower", partial(start_flower, environment, log=UP / "flower.log"))
    for name, part in supervisor.parts():
        if isinstance(part, Process) and name == "Flower":
            wait_for_flower(part, flower_url)
            say(f"Flower answers on {flower_url}")
        elif isinstance(part, Process):
            wait_for_worker(part, redis_url)
            say(f"{name} answers")

    quoted = shlex.quote(redis_url)
    secret_file(ENV, f'[ -n "$DAGRELAY_REDIS_URL" ] || export DAGRELAY_REDIS_URL={quoted}\n')
    user = environment.get("DAGRELAY_FLOWER_USER") or "dagrelay"
    ready = {
        "redis": without_password(redis_url),
        "flower": flower_url,
        "user": user,
        "generated": environment.get("DAGRELAY_FLOWER_PASSWORD_FILE") == str(FLOWER_PASSWORD),
        "workers": workers,
    }
    secret_file(READY, json.dumps(ready))


def show(ready: Mapping[str, Any]) -> None:
    """Print the addresses."""
    if not ready:
        print(f"it is still starting (see {os.path.relpath(LOG)})")
        return
    print(f"  Redis    {ready['redis']}")
    where = f", password in {os.path.relpath(FLOWER_PASSWORD)}" if ready.get("generated") else ""
    print(f"  Flower   {ready['flower']}   user {ready['user']}{where}")
    print(f"  workers  {ready['workers']}")
    print(f"  logs     {os.path.relpath(UP)}")
    print(
        "make trigger DAG=… sends to it, make airflows says whether your Airflow answers; make down stops it."
    )
    sys.stdout.flush()


def check_environment(environ: Mapping[str, str]) -> int:
    """Return the number of workers. Raises Mistake with everything that is wrong, by name."""
    mistakes = []
    if not environ.get("AIRFLOW_CONN_DEFAULT") and not environ.get("AIRFLOW_CONN_DEFAULT_FILE"):
        mistakes.append(
            "AIRFLOW_CONN_DEFAULT is not set: say where your Airflow is, "
            "e.g. export AIRFLOW_CONN_DEFAULT=http://user:password@host:8080 (to only look: make demo)"
        )
    workers = environ.get("WORKERS") or "1"
    if not (workers.isascii() and workers.isdecimal() and 1 <= int(workers) <= 64):
        mistakes.append("WORKERS: a number from 1 to 64")
    if mistakes:
        raise Mistake("\n".join(mistakes))
    return int(workers)


def take_redis_url(environment: dict[str, str]) -> None:
    """Let REDIS_URL, which many hosts set, count where DAGRELAY_REDIS_URL is not set."""
    file = environment.get("DAGRELAY_REDIS_URL_FILE")
    if file and not environment.get("DAGRELAY_REDIS_URL"):
        environment["DAGRELAY_REDIS_URL"] = Path(file).read_text().strip()
        del environment["DAGRELAY_REDIS_URL_FILE"]
    if not environment.get("DAGRELAY_REDIS_URL") and environment.get("REDIS_URL"):
        environment["DAGRELAY_REDIS_URL"] = environment["REDIS_URL"]


def flower_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Flower's address, port and password, for those that are not given."""
    settings = {
        "DAGRELAY_FLOWER_ADDRESS": environ.get("DAGRELAY_FLOWER_ADDRESS") or "127.0.0.1",
        "DAGRELAY_FLOWER_PORT": environ.get("DAGRELAY_FLOWER_PORT")
        or str(5555 if port_free(5555) else free_port()),
    }
    if needs_flower_password(environ):
        settings["DAGRELAY_FLOWER_PASSWORD_FILE"] = str(FLOWER_PASSWORD)
    return settings


def needs_flower_password(environ: Mapping[str, str]) -> bool:
    given = ("DAGRELAY_FLOWER_PASSWORD", "DAGRELAY_FLOWER_PASSWORD_FILE", "DAGRELAY_FLOWER_NO_AUTH")
    return not any(environ.get(name) for name in given)


def ensure_flower_password(environ: Mapping[str, str]) -> None:
    """Generate a password for Flower if none was given or generated before, and say it this once.

    By the command in the foreground: what the background process says lies in a log.
    """
    if needs_flower_password(environ) and not FLOWER_PASSWORD.exists():
        password = secrets.token_urlsafe(18)
        secret_file(FLOWER_PASSWORD, password)
        print(f"Flower's password was generated: {password}")
        print(f"It stays in {os.path.relpath(FLOWER_PASSWORD)} and is not said again.", flush=True)


def remembered_port() -> int:
    """The port that Valkey had last time; at first 6379 if it is free. Raises PartFailed if it is taken."""
    with contextlib.suppress(OSError, ValueError):
        port = int(VALKEY_PORT.read_text())
        if not port_free(port):
            raise PartFailed(
                f"somebody else listens on 127.0.0.1:{port}, where this stack's Valkey was and where your "
                f"services look for it. Stop that, or remove {os.path.relpath(VALKEY_PORT)} to take another "
                "port, or set DAGRELAY_REDIS_URL"
            )
        return port
    port = 6379 if port_free(6379) else free_port()
    VALKEY_PORT.parent.mkdir(parents=True, exist_ok=True)
    VALKEY_PORT.write_text(str(port))
    return port


def without_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def make_up_folder() -> None:
    """Make the folder of the logs, which name runs and keys, for its owner alone."""
    UP.mkdir(parents=True, exist_ok=True)
    UP.chmod(0o700)


def take_lock() -> IO[str] | None:
    """Hold the lock with our process id in it; None if somebody else holds it."""
    make_up_folder()
    lock = LOCK.open("a+")
    for attempt in range(10, 0, -1):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if attempt == 1:
                lock.close()
                return None
            time.sleep(0.05)  # perhaps only somebody's `is_up`
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def is_up() -> bool:
    """Whether a background process holds the lock."""
    if not LOCK.exists():
        return False
    with LOCK.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_ready() -> dict[str, Any]:
    """Where the running stack is; empty while it starts."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(READY.read_text()))
    return {}


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
