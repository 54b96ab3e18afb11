"""Packages of npm for tests, in a folder of their own under `.local`; nothing where there is no npm.

A `package-lock.json` beside a `package.json` pins what npm brings, by hash and without addresses. To renew
one: `npm install --package-lock-only --omit-lockfile-registry-resolved --no-fund PACKAGE@VERSION`, there,
then take the "funding" fields out.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

from local.process import STATE

TIMEOUT_S = 120.0
HOW_TO_GET_IT = "install npm and node: then it is fetched into .local"


def installed(folder: Path) -> Path | None:
    """Return a folder with the files of `folder` and its `node_modules`; None if there is no way."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if not npm or not node:
        return None
    target = STATE / "npm" / folder.name
    target.mkdir(parents=True, exist_ok=True)
    with (target / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs of one tree fetch once
        for path in folder.iterdir():
            if path.is_file():
                shutil.copy(path, target)
        done, wanted = target / "done", (folder / "package-lock.json").read_text()
        if done.exists() and done.read_text() == wanted:
            return target
        argv = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            subprocess.run(argv, cwd=target, timeout=TIMEOUT_S, capture_output=True, check=True)
        except (subprocess.SubprocessError, OSError) as exc:
            print(f"nothing from npm for {folder.name}: {exc}")  # noqa: T201 - pytest shows it with the skip
            return None
        done.write_text(wanted)
    return target
