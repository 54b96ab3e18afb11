"""Debian's Redis 7.0, to test against beside Valkey: fetched by apt without root, into `.local/redis7/`.

Nothing is installed. apt keeps its lists in a folder of ours, the packages are unpacked there, and the
libraries that a small Debian lacks lie beside the program.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from local.process import STATE, PartFailed
from local.valkey import Valkey

FOLDER = STATE / "redis7"
PACKAGES = ("redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libatomic1")
FETCH_TIMEOUT_S = 60


class Redis7(Valkey):
    """One Redis 7.0 server; all else as `Valkey`. Raises PartFailed where it cannot be had."""

    def command(self) -> tuple[list[str], dict[str, str] | None]:
        program = ensure()
        return [str(program)], _environment()


@cache
def ensure() -> Path:
    """Return the program, fetching it at the first time. Raises PartFailed where that cannot be done."""
    program = FOLDER / "root" / "usr" / "bin" / "redis-server"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run at the same time
        if not program.exists():
            _fetch()
    version = _run([str(program), "--version"], env=_environment())
    if "v=7.0" not in version:
        raise PartFailed(f"redis7: this Debian's Redis is another one: {version.strip()}")
    return program


def _fetch() -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise PartFailed(f"redis7: there is no {tool}")
    work = FOLDER / "work"
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("state/lists/partial", "cache/archives/partial", "root"):
        (work / folder).mkdir(parents=True)
    options = [
        f"Dir::State={work}/state",
        f"Dir::Cache={work}/cache",
        "Dir::State::status=/var/lib/dpkg/status",
        "Debug::NoLocking=1",
        "APT::Sandbox::User=",
    ]
    apt = ["apt-get", *(part for option in options for part in ("-o", option))]
    _run([*apt, "update", "-qq"], cwd=work)
    _run([*apt, "download", *PACKAGES], cwd=work)
    for package in work.glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(work / "root")], cwd=work)
    shutil.rmtree(FOLDER / "root", ignore_errors=True)
    (work / "root").rename(FOLDER / "root")  # whole or not at all
    shutil.rmtree(work)


def _environment() -> dict[str, str]:
    libraries = sorted({str(path.parent) for path in (FOLDER / "root").glob("usr/lib/**/*.so*")})
    return os.environ | {"LD_LIBRARY_PATH": ":".join(libraries)}


def _run(argv: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=env, capture_output=True, text=True, check=True, timeout=FETCH_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as exc:
        said = getattr(exc, "stderr", None) or str(exc)
        raise PartFailed(f"redis7: {Path(argv[0]).name} failed: {said.strip()[-300:]}") from None
    return done.stdout
