"""A Chromium for the tests: the machine's, else one from npm that needs no root, else none.

`package-lock.json` beside this pins what npm brings, by hash and without addresses. To renew it:
`npm install --package-lock-only --omit-lockfile-registry-resolved --no-fund @sparticuz/chromium@VERSION`,
then take the "funding" fields out.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from local.process import STATE

HERE = Path(__file__).parent
FETCHED = STATE / "browser"
FETCH_TIMEOUT_S = 240.0  # 74 MB
HOW_TO_GET_IT = "set CHROMIUM_PATH, or install chromium, or npm and node: then one is fetched into .local"

# The environment variable makes the package unpack the libraries (NSS) that a bare machine lacks, too.
UNPACK = """
process.env.AWS_EXECUTION_ENV = "AWS_Lambda_nodejs22.x";
const { default: chromium } = await import("@sparticuz/chromium");
await chromium.executablePath();
"""


@dataclass(frozen=True)
class Chromium:
    """Where it is, and what it needs in its environment."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)


def find() -> Chromium | None:
    """Return a Chromium, fetching one if the machine has none and npm is there; None if there is no way.

    A wrong CHROMIUM_PATH raises FileNotFoundError: who names one means it.
    """
    if named := os.environ.get("CHROMIUM_PATH"):
        if not os.access(named, os.X_OK):
            raise FileNotFoundError(f"CHROMIUM_PATH: {named} is no program")
        return Chromium(Path(named))
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return Chromium(Path(found))
    return fetched()


def fetched() -> Chromium | None:
    """Return the one from npm. None without npm and node, or where they fail (no network)."""
    browser = Chromium(
        FETCHED / "unpacked/chromium", {"LD_LIBRARY_PATH": str(FETCHED / "unpacked/al2023/lib")}
    )
    npm, node = shutil.which("npm"), shutil.which("node")
    FETCHED.mkdir(parents=True, exist_ok=True)
    with (FETCHED / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs of one tree fetch once
        done = FETCHED / "done"
        wanted = (HERE / "package-lock.json").read_text()
        if done.exists() and done.read_text() == wanted:
            return browser
        if not npm or not node:
            return None
        shutil.rmtree(FETCHED / "unpacked", ignore_errors=True)
        (FETCHED / "unpacked").mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, FETCHED)
        for argv in (
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            [node, "--input-type=module", "-e", UNPACK],
        ):
            env = {**os.environ, "TMPDIR": str(FETCHED / "unpacked")}
            try:
                subprocess.run(
                    argv, cwd=FETCHED, env=env, timeout=FETCH_TIMEOUT_S, capture_output=True, check=True
                )
            except (subprocess.SubprocessError, OSError) as exc:
                print(f"no browser from npm: {exc}")  # noqa: T201 - pytest shows it with the skip or failure
                return None
        shutil.rmtree(FETCHED / "node_modules")  # 75 MB that nobody needs any more
        done.write_text(wanted)
    return browser
