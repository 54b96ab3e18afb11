"""Programs from Debian's packages without root: fetched by apt and unpacked into a folder of ours.

Nothing is installed. apt keeps its lists in that folder, and the libraries that a small Debian lacks lie
beside the program (`environment`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from local.process import STATE, PartFailed

FETCH_TIMEOUT_S = 60


def unpacked(name: str, packages: Sequence[str], program: str) -> Path:
    """Return the folder `.local/<name>/root` in which these packages lie, fetched at the first time.

    `program` is a file that is there when they are, such as "usr/bin/promtool". Raises PartFailed where they
    cannot be had.
    """
    folder = STATE / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run at the same time
        if not (folder / "root" / program).exists():
            _fetch(name, folder, packages)
    return folder / "root"


def _fetch(name: str, folder: Path, packages: Sequence[str]) -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise PartFailed(f"{name}: there is no {tool}")
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    for part in ("state/lists/partial", "cache/archives/partial", "root"):
        (work / part).mkdir(parents=True)
    options = [
        f"Dir::State={work}/state",
        f"Dir::Cache={work}/cache",
        "Dir::State::status=/var/lib/dpkg/status",
        "Debug::NoLocking=1",
        "APT::Sandbox::User=",
    ]
    apt = ["apt-get", *(part for option in options for part in ("-o", option))]
    run(name, [*apt, "update", "-qq"], cwd=work)
    run(name, [*apt, "download", *packages], cwd=work)
    for package in work.glob("*.deb"):
        run(name, ["dpkg", "-x", str(package), str(work / "root")], cwd=work)
    shutil.rmtree(folder / "root", ignore_errors=True)
    (work / "root").rename(folder / "root")  # whole or not at all
    shutil.rmtree(work)


def environment(root: Path) -> dict[str, str]:
    """Return an environment in which a program of that folder finds its libraries."""
    libraries = sorted({str(path.parent) for path in root.glob("usr/lib/**/*.so*")})
    return os.environ | {"LD_LIBRARY_PATH": ":".join(libraries)}


def run(name: str, argv: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it says. Raises PartFailed with the end of what it says."""
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=env, capture_output=True, text=True, check=True, timeout=FETCH_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as exc:
        said = getattr(exc, "stderr", None) or str(exc)
        raise PartFailed(f"{name}: {Path(argv[0]).name} failed: {said.strip()[-300:]}") from None
    return done.stdout
