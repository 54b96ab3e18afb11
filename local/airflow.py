"""A real Airflow 3.3.2 or 2.11.2 on an embedded PostgreSQL, in an environment of its own.

    with Airflow("3", home=tmp_path / "airflow", dags=dags) as airflow:
        airflow.wait_for_dag("daily_sales")
        os.environ["AIRFLOW_CONN_DEFAULT"] = airflow.conn_uri

The environment (`.local/airflow3-py3.11/`) is installed from the lock beside this file the first time, with a
migrated empty database that every new home copies: 1 s instead of the 6 s of a migration.
Only loopback is listened on. Figures: 2 cores, Python 3.11.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import requests

from local.postgres import Postgres, copy_data
from local.process import (
    ROOT,
    STATE,
    PartFailed,
    Process,
    Progress,
    clean_env,
    free_port,
    port_free,
    quiet,
    run_to_end,
    secret_file,
)
from local.provider import Provider, ensure_provider

Version = Literal["2", "3"]
RELEASE: dict[Version, str] = {"2": "2.11.2", "3": "3.3.2"}
PYTHON_BELOW: dict[Version, tuple[int, int]] = {"2": (3, 13), "3": (3, 14)}
COMPONENTS: dict[Version, tuple[str, ...]] = {
    "2": ("api", "scheduler"),
    "3": ("api", "scheduler", "dag-processor"),
}
"""What runs unless the caller says otherwise. "triggerer" may be added: only deferrable operators need it."""

# How often a DAG file is read that has not changed; one that has is read at once. Every 10 s took Airflow 2 a
# fifth of a core.
READ_AGAIN_S = "60"
INSTALL_TIMEOUT_S = 600.0
MIGRATE_TIMEOUT_S = 180.0
START_TIMEOUT_S = 120.0  # 7 s on a quiet machine, 16 s on a busy one
API_STOP_S = 8.0  # the API server of 3.x does not end while somebody reads …/wait
STOP_S = 5.0  # a scheduler waits for its running tasks; in a test nobody else does


class Environment:
    """The installed packages of one Airflow and its migrated empty database, for the running Python."""

    def __init__(self, version: Version) -> None:
        self.version = version
        self.release = RELEASE[version]
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        self.folder = STATE / f"airflow{version}-py{python}"
        self.lock = Path(__file__).with_name(f"airflow{version}.lock")
        self.log = STATE / f"{self.folder.name}.log"
        if sys.version_info[:2] >= PYTHON_BELOW[version]:
            below = ".".join(map(str, PYTHON_BELOW[version]))
            raise PartFailed(
                f"Airflow {self.release} does not run on Python {python}, only below {below}: "
                "make the virtual environment with an older one (make clean, then make … PYTHON=python3.12)"
            )

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    @property
    def database(self) -> Path:
        return self.folder / "pgdata-utf8"

    @property
    def _stamp(self) -> str:
        """What the installed environment was made of; the path, because scripts in it hold it.

        The recipe's number goes up whenever `_install`, `_make_database` or `initdb` do something else.
        """
        made_of = [self.lock.read_bytes(), str(self.folder).encode(), sys.version.encode(), b"recipe 2"]
        return hashlib.sha256(b"\0".join(made_of)).hexdigest()

    def ensure(self, progress: Progress = quiet) -> IO[str]:
        """Install unless it is there. Two processes may ask at once: the second waits for the first.

        An install that was cut short, or was made from another lock, is removed and made again. Returns an
        open file; until it is closed nobody else removes what is installed. Raises PartFailed with the
        installer's words.
        """
        STATE.mkdir(parents=True, exist_ok=True)
        lock = (STATE / f"{self.folder.name}.lock").open("a")
        try:
            while True:
                take_lock(lock, fcntl.LOCK_SH, progress)
                if self._is_made():
                    return lock
                take_lock(lock, fcntl.LOCK_EX, progress)
                if not self._is_made():  # somebody else may have, between the two locks
                    self._make(progress)
        except BaseException:
            lock.close()
            raise

    def _make(self, progress: Progress) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        began = time.monotonic()
        progress(f"installing Airflow {self.release} (once; about 130 packages, 200 MB)")
        self._install(progress)
        progress(f"preparing the database of Airflow {self.release} (once)")
        self._make_database(progress)
        (self.folder / "stamp").write_text(self._stamp)
        progress(f"Airflow {self.release} is installed ({time.monotonic() - began:.0f} s)")

    def _is_made(self) -> bool:
        stamp = self.folder / "stamp"
        return stamp.exists() and stamp.read_text() == self._stamp

    def _install(self, progress: Progress) -> None:
        uv = [sys.executable, "-m", "uv", "--no-progress"]
        env = self.installer_env()
        venv = str(self.python.parent.parent)
        for command in (
            [*uv, "venv", "--no-python-downloads", "--python", sys.executable, venv],
            [*uv, "pip", "sync", "--require-hashes", "--python", str(self.python), str(self.lock)],
        ):
            process = Process(command, log=self.log, env=env, cwd=STATE, name="uv")
            what = f"install Airflow {self.release}"
            run_to_end(process, timeout_s=INSTALL_TIMEOUT_S, what=what, progress=progress)

    def installer_env(self) -> dict[str, str]:
        """The environment of uv: the caller's, except what would point it at another environment."""
        env = {k: v for k, v in os.environ.items() if k not in {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"}}
        # As pip, git and curl: behind a company's proxy uv's own certificates do not do.
        env.setdefault("UV_SYSTEM_CERTS", "true")
        return env

    def _make_database(self, progress: Progress) -> None:
        home, data = self.folder / "making", self.folder / "pgdata.new"
        for cut_short in (home, data):
            shutil.rmtree(cut_short, ignore_errors=True)
        home.mkdir()
        postgres = Postgres(data, log=self.log)
        postgres.start()
        try:
            env = base_env(self, home) | database_env(postgres, self.version)
            commands = [["db", "migrate"]]
            if self.version == "2":  # its password is replaced in every home
                person = ["--username", "admin", "--firstname", "a", "--lastname", "b", "--email", "a@b.c"]
                commands.append(
                    ["users", "create", "--role", "Admin", *person, "--password", secrets.token_hex()]
                )
            for command in commands:
                process = Process(
                    [self.python, "-m", "airflow", *command], log=self.log, env=env, name="airflow"
                )
                what = f"run `airflow {' '.join(command[:2])}`"
                run_to_end(process, timeout_s=MIGRATE_TIMEOUT_S, what=what, progress=progress)
        finally:
            postgres.stop()
        postgres.data.rename(self.database)
        shutil.rmtree(home)


class Airflow:
    """One running Airflow: its API, its scheduler and what else it needs, over the folder `home`.

    A home that was used before is used again, with its runs, its password and its secrets. `dags` is the
    DAGs folder; changes in it are seen within about 2 s. `port=None` takes a free one, kept while this object
    lives.

    `pool_size`: the API's database pool. None means 80 on Airflow 3, because with its default of 5 (+10) the
    API server stops answering altogether as soon as more than 15 authenticated requests are in flight
    (apache/airflow#66493), and the default on Airflow 2; "default" leaves it to Airflow, to test just that.
    `parallelism`: how many tasks at a time; each is a process of 130 MB. `extra_env` is added last.
    `provider`: with our wheel, built from the tree, installed beside it (`local/provider.py`).
    """

    username = "admin"
    hash_rounds = 260_000
    """Of the password of Airflow 2, which each call hashes again: Werkzeug's own number takes 58 ms."""

    def __init__(
        self,
        version: Version = "3",
        *,
        home: Path,
        dags: Path,
        port: int | None = None,
        pool_size: int | Literal["default"] | None = None,
        parallelism: int = 4,
        components: Sequence[str] | None = None,
        extra_env: Mapping[str, str] | None = None,
        provider: bool = False,
    ) -> None:
        if version not in RELEASE:
            raise ValueError(f"version must be one of {sorted(RELEASE)}, not {version!r}")
        self.version: Version = version
        self.environment = Environment(version)
        self.home = home.resolve()
        self.dags = dags.resolve()
        self.port = port or free_port()
        self.pool_size = 80 if pool_size is None and version == "3" else pool_size
        self.parallelism = parallelism
        self.components = tuple(components if components is not None else COMPONENTS[version])
        self.extra_env = dict(extra_env or {})
        self.with_provider = provider
        self.postgres = Postgres(self.home / "pgdata", log=self.home / "logs" / "postgres.log")
        self.processes: dict[str, Process] = {}
        self._secrets: dict[str, str] = {}
        self._installed: IO[str] | None = None
        self._provider: Provider | None = None
        self._lock: IO[str] | None = None
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy in the environment is not meant for 127.0.0.1
        self._token: str | None = None
        self._token_lock = threading.Lock()

    # What a caller needs to know

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`, for the browser and for the API."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def password(self) -> str:
        """Generated with the home; known after `start`."""
        if not self._secrets:
            raise RuntimeError("Airflow has no password before start()")
        return self._secrets["password"]

    @property
    def conn_uri(self) -> str:
        """The value for AIRFLOW_CONN_<ID>."""
        return f"http://{self.username}:{self.password}@127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether every component that was started still runs."""
        return bool(self.processes) and all(part.alive for part in self.processes.values())

    def failure(self, what: str) -> PartFailed:
        """The error that says which components ended, with the ends of their logs."""
        ended = [part for part in self.processes.values() if not part.alive]
        return PartFailed("\n".join(str(part.failure(f"{what} ({part.poll()})")) for part in ended))

    def log_of(self, component: str) -> Path:
        return self.home / "logs" / f"{component}.log"

    # Starting and stopping

    def start(self, progress: Progress = quiet, *, wait: bool = True) -> Airflow:
        """Install if needed, start everything, return when the API answers (or before, without `wait`).

        About 7 s when installed, on a machine with nothing else to do. Raises PartFailed with the end of the
        log of whatever failed, or if another process uses this home; nothing is left running then.
        """
        if self.processes:
            if wait:
                self.wait_healthy()
            return self
        self._installed = self.environment.ensure(progress)
        began = time.monotonic()
        try:
            if self.with_provider:
                self._provider = ensure_provider(self.environment, progress)
            self._take_home()
            if not self.postgres.data.exists():
                copy_data(self.environment.database, self.postgres.data)
            self._load_secrets()
            self.postgres.start()
            if self.version == "2":
                set_password(self.postgres, self.username, self.password, self.hash_rounds)
            progress(
                f"starting Airflow {self.environment.release} ({', '.join(self.components)}) on {self.url}"
            )
            for component in self.components:
                self.start_component(component)
            if wait:
                self.wait_healthy()
                progress(f"Airflow's API is healthy ({time.monotonic() - began:.1f} s)")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End everything: first Airflow's processes, all at once, then PostgreSQL. Nothing is left."""
        for process in self.processes.values():
            process.ask_to_stop()
        for name in list(self.processes):
            self.stop_component(name)
        self.postgres.stop()
        for held in (self._lock, self._provider, self._installed):
            if held is not None:
                held.close()
        self._lock = self._provider = self._installed = None

    def start_component(self, name: str) -> Process:
        """Start "api", "scheduler", "dag-processor" (3 only) or "triggerer"; does not wait for it."""
        process = self.processes.get(name)
        if process is not None and process.alive:
            return process
        if name == "api" and not port_free(self.port):
            raise PartFailed(
                f"somebody else listens on 127.0.0.1:{self.port}: choose another port for Airflow"
            )
        for stale in self.home.glob("airflow-webserver*.pid"):  # after kill -9; 2.x would refuse to start
            stale.unlink()
        process = Process(
            [self.environment.python, "-m", "airflow", *self._command(name)],
            log=self.log_of(name),
            env=self.env(),
            cwd=self.home,
            grace_s=API_STOP_S if name == "api" else STOP_S,
            name=f"airflow {name}",
        )
        self.processes[name] = process
        return process

    def stop_component(self, name: str) -> None:
        """End one component and all it started: TERM, then KILL after 5 to 8 s."""
        if process := self.processes.pop(name, None):
            process.stop()

    def kill_component(self, name: str) -> None:
        """SIGKILL one component and all it started."""
        if process := self.processes.pop(name, None):
            process.kill()

    def start_api(self) -> None:
        """Start the API on the same port and wait until it answers."""
        self.start_component("api")
        self.wait_healthy()

    def stop_api(self) -> None:
        """End the API in good order; afterwards connections are refused."""
        self.stop_component("api")

    def kill_api(self) -> None:
        """SIGKILL the API in the middle of whatever it does."""
        self.kill_component("api")

    def restart_api(self, *, jwt_secret: str | None = None) -> None:
        """Stop and start the API; with `jwt_secret` (3 only) no token given out before is valid any more.

        The scheduler signs the tokens of its tasks with the same secret, so it is restarted too.
        """
        names = ["api"]
        if jwt_secret is not None:
            if self.version == "2":
                raise ValueError("Airflow 2 has no JWT secret")
            self._secrets["jwt_secret"] = jwt_secret
            self._save_secrets()
            names += [name for name in self.processes if name != "api"]
        for name in names:
            self.stop_component(name)
        for name in names:
            self.start_component(name)
        self.wait_healthy()

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the API answers. Raises PartFailed if a component ends or the time is over."""
        path = "/api/v2/monitor/health" if self.version == "3" else "/health"

        def answers() -> bool:
            for process in self.processes.values():
                if not process.alive:
                    raise process.failure(f"ended with {process.poll()}")
            try:
                return self._session.get(self.url + path, timeout=2).status_code == 200
            except requests.RequestException:
                return False

        self.processes["api"].wait_until(answers, timeout_s=timeout_s, what="answering", every_s=0.1)

    # Asking it

    def api(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = 30.0, params: Any = None
    ) -> tuple[int, Any]:
        """Call Airflow's REST API as admin; `path` begins after `/api/v1` or `/api/v2`: "/dags".

        Returns the status and the decoded JSON (None if it is none). Raises requests.RequestException.
        """
        root = self.url + ("/api/v2" if self.version == "3" else "/api/v1")
        for last in (False, True):
            token = self._bearer(renew=last) if self.version == "3" else None
            answer = self._session.request(
                method,
                root + path,
                json=body,
                params=params,
                timeout=timeout_s,
                headers={"Authorization": f"Bearer {token}"} if token else None,
                auth=None if token else (self.username, self.password),
            )
            if not token or answer.status_code not in (401, 403):
                break
        try:
            return answer.status_code, answer.json()
        except ValueError:
            return answer.status_code, None

    def wait_for_dag(self, dag_id: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait until Airflow has read this DAG, unpause it if need be, return what the API says of it.

        Raises PartFailed after `timeout_s`, with Airflow's import errors if there are any.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            status, dag = self.api("GET", f"/dags/{dag_id}")
            if status == 200 and not dag.get("is_stale", False) and dag.get("is_active", True):
                break
            if time.monotonic() > deadline:
                _, errors = self.api("GET", "/importErrors")
                raise PartFailed(
                    f"Airflow has no DAG {dag_id!r} after {timeout_s:g} s; import errors: {errors}"
                )
            time.sleep(0.2)
        if dag["is_paused"]:
            _, dag = self.api("PATCH", f"/dags/{dag_id}", {"is_paused": False})
        return dict(dag)

    def wait_for_run(self, dag_id: str, run_id: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """Wait until a run has ended in success or failed, and return it. Raises TimeoutError."""
        began = time.monotonic()
        while True:
            status, run = self.api("GET", f"/dags/{dag_id}/dagRuns/{run_id}")
            if status == 200 and run["state"] in ("success", "failed"):
                return dict(run)
            waited_s = time.monotonic() - began
            if waited_s > timeout_s:
                raise TimeoutError(f"{dag_id} {run_id} has not ended after {timeout_s:g} s: {status} {run}")
            time.sleep(min(1.0, max(0.2, waited_s / 10)))  # each question takes Airflow 10 to 20 ms of CPU

    def _bearer(self, *, renew: bool) -> str:
        with self._token_lock:
            if self._token is None or renew:
                answer = self._session.post(
                    self.url + "/auth/token",
                    json={"username": self.username, "password": self.password},
                    timeout=30,
                )
                answer.raise_for_status()
                self._token = str(answer.json()["access_token"])
            return self._token

    # How it is set up

    def env(self) -> dict[str, str]:
        """The whole environment of its processes. Nothing named AIRFLOW… is taken over from ours.

        Our wheel is on it while this Airflow runs (after `start`).
        """
        given = self._secrets
        env = base_env(self.environment, self.home) | database_env(self.postgres, self.version)
        env |= {
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.dags),
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": str(self.parallelism),
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__FERNET_KEY": given["fernet_key"],
            "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(self.home / "logs" / "tasks"),
        }
        if isinstance(self.pool_size, int):
            env["AIRFLOW__DATABASE__SQL_ALCHEMY_POOL_SIZE"] = str(self.pool_size)
        if self.version == "3":
            env |= {
                "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{self.username}:admin",
                "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(self.home / "passwords.json"),
                "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
                "AIRFLOW__API_AUTH__JWT_SECRET": given["jwt_secret"],
                "AIRFLOW__API__SECRET_KEY": given["secret_key"],
                "AIRFLOW__API__HOST": "127.0.0.1",
                "AIRFLOW__API__PORT": str(self.port),
                "AIRFLOW__API__BASE_URL": self.url,
                "AIRFLOW__API__WORKERS": "1",
                "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "1",
                "AIRFLOW__DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": "1",
                "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": READ_AGAIN_S,
                "AIRFLOW__DAG_PROCESSOR__STALE_DAG_THRESHOLD": "3",
            }
        else:
            env |= {
                "AIRFLOW__API__AUTH_BACKENDS": (
                    "airflow.providers.fab.auth_manager.api.auth.backend.basic_auth,"
                    "airflow.providers.fab.auth_manager.api.auth.backend.session"
                ),
                "AIRFLOW__WEBSERVER__WEB_SERVER_HOST": "127.0.0.1",
                "AIRFLOW__WEBSERVER__WEB_SERVER_PORT": str(self.port),
                "AIRFLOW__WEBSERVER__BASE_URL": self.url,
                "AIRFLOW__WEBSERVER__SECRET_KEY": given["secret_key"],
                "AIRFLOW__WEBSERVER__WORKERS": "1",
                "AIRFLOW__SCHEDULER__DAG_DIR_LIST_INTERVAL": "1",
                "AIRFLOW__SCHEDULER__MIN_FILE_PROCESS_INTERVAL": READ_AGAIN_S,
                "AIRFLOW__SCHEDULER__PARSING_CLEANUP_INTERVAL": "2",
                "AIRFLOW__SCHEDULER__STALE_DAG_THRESHOLD": "3",
                "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "0",
                "AIRFLOW__CORE__MIN_SERIALIZED_DAG_FETCH_INTERVAL": "0",
                "PYTHONWARNINGS": "ignore",
            }
        if self._provider is not None:
            env["PYTHONPATH"] = self._provider.pythonpath
        return env | self.extra_env

    def _command(self, name: str) -> list[str]:
        if name == "api":
            return ["api-server"] if self.version == "3" else ["webserver"]
        if name in ("scheduler", "triggerer"):
            return [name, "--skip-serve-logs"]  # else they listen on 0.0.0.0
        if name == "dag-processor" and self.version == "3":
            return [name]
        raise ValueError(f"Airflow {self.version} has no component {name!r}")

    def _take_home(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        lock = (self.home / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise PartFailed(f"another process runs an Airflow in {self.home}") from None
        self._lock = lock
        made_for = self.home / "version"
        if made_for.exists() and made_for.read_text() != self.environment.release:
            lock.close()
            self._lock = None
            raise PartFailed(
                f"{self.home} belongs to Airflow {made_for.read_text()}, not {self.environment.release}"
            )
        made_for.write_text(self.environment.release)

    def _load_secrets(self) -> None:
        file = self.home / "secrets.json"
        if file.exists():
            self._secrets = json.loads(file.read_text())
        else:
            self._secrets = {
                "password": secrets.token_urlsafe(12),
                "jwt_secret": secrets.token_hex(64),
                "secret_key": secrets.token_hex(32),
                "fernet_key": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            }
        self._save_secrets()

    def _save_secrets(self) -> None:
        secret_file(self.home / "secrets.json", json.dumps(self._secrets))
        secret_file(self.home / "passwords.json", json.dumps({self.username: self.password}))

    def __enter__(self) -> Airflow:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def base_env(environment: Environment, home: Path) -> dict[str, str]:
    """What every command of this Airflow needs."""
    path = f"{environment.python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return clean_env(
        PATH=path,
        HOME=str(home),
        AIRFLOW_HOME=str(home),
        AIRFLOW__CORE__LOAD_EXAMPLES="False",
        AIRFLOW__USAGE_DATA_COLLECTION__ENABLED="False",
        NO_PROXY="127.0.0.1,localhost",
        PYTHONUNBUFFERED="1",
    )


def database_env(postgres: Postgres, version: Version) -> dict[str, str]:
    env = {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": postgres.uri("psycopg2")}
    if version == "3":
        env["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC"] = postgres.uri("asyncpg")
    return env


def set_password(postgres: Postgres, username: str, password: str, rounds: int) -> None:
    """Give a user of Airflow 2 this password, as its FAB stores it; its own command takes 4 s."""
    salt = secrets.token_hex(8)
    digest = hashlib.pbkdf2_hmac("sha256", password.encode(), salt.encode(), rounds).hex()
    postgres.sql(
        f"UPDATE ab_user SET password = 'pbkdf2:sha256:{rounds}${salt}${digest}' "  # noqa: S608 - all ours
        f"WHERE username = '{username}'"
    )


def take_lock(file: IO[str], kind: int, progress: Progress) -> None:
    """Lock a file, shared or exclusive; says so if it must wait for somebody else."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        progress("waiting for another process that installs or runs this Airflow")
        fcntl.flock(file, kind)


HANDED_ON = ("AIRFLOW_CONN_", "DAGRELAY_")
"""What DAGs that use our operators find Dagrelay by."""


def main() -> None:
    """`python -m local.airflow --version 3`: one Airflow in the foreground, for development."""
    parser = argparse.ArgumentParser(description="A real Airflow on this machine, in the foreground.")
    parser.add_argument("--version", choices=sorted(RELEASE), default="3")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--dags", type=Path, default=ROOT / "examples" / "dags")
    parser.add_argument("--home", type=Path, default=None, help="default: .local/data/airflow<VERSION>")
    parser.add_argument("--provider", action="store_true", help="with our wheel, built from the tree")
    parser.add_argument("--triggerer", action="store_true", help="also run what deferrable operators need")
    options = parser.parse_args()
    version: Version = options.version
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    components = COMPONENTS[version] + (("triggerer",) if options.triggerer else ())
    airflow = None
    try:
        airflow = Airflow(
            version,
            home=options.home or STATE / "data" / f"airflow{version}",
            dags=options.dags,
            port=options.port,
            components=components,
            provider=options.provider,
            extra_env={name: os.environ[name] for name in os.environ if name.startswith(HANDED_ON)},
        )
        airflow.start(lambda line: print(line, flush=True))
        print(f"Airflow    {airflow.url}   {airflow.username} / {airflow.password}")
        print(f"for us     export AIRFLOW_CONN_DEFAULT={airflow.conn_uri}")
        print(f"logs       {airflow.home / 'logs'}")
        print("Ctrl-C ends it.", flush=True)
        while airflow.alive:
            time.sleep(0.5)
        raise SystemExit(str(airflow.failure("ended by itself")))
    except KeyboardInterrupt:
        print("\nstopping", flush=True)
    except PartFailed as exc:
        raise SystemExit(str(exc)) from None
    finally:
        if airflow is not None:
            airflow.stop()


if __name__ == "__main__":
    main()
