"""KEDA's own types as a validator, from npm: to check deploy/keda without a cluster.

`package-lock.json` beside this pins what npm brings, by hash and without addresses. To renew it:
`npm install --package-lock-only --omit-lockfile-registry-resolved --no-fund @kubernetes-models/keda@VERSION`,
then take the "funding" fields out.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from local.process import STATE

HERE = Path(__file__).parent
FETCHED = STATE / "keda"
FETCH_TIMEOUT_S = 120.0  # 26 MB unpacked
HOW_TO_GET_IT = "install npm and node: then KEDA's schema is fetched into .local"

VALIDATE = """
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject";
try {
  new ScaledObject(JSON.parse(process.argv[2])).validate();
} catch (error) {
  console.log(error.message);
}
"""


def fetched() -> bool:
    """Tell whether the validator is here, fetching it where npm and node are; False where they fail."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if not npm or not node:
        return False
    FETCHED.mkdir(parents=True, exist_ok=True)
    with (FETCHED / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs of one tree fetch once
        done = FETCHED / "done"
        wanted = (HERE / "package-lock.json").read_text()
        if done.exists() and done.read_text() == wanted:
            return True
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, FETCHED)
        argv = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            subprocess.run(argv, cwd=FETCHED, timeout=FETCH_TIMEOUT_S, capture_output=True, check=True)
        except (subprocess.SubprocessError, OSError) as exc:
            print(f"no schema of KEDA from npm: {exc}")  # noqa: T201 - pytest shows it with the skip or failure
            return False
        done.write_text(wanted)
    return True


def problem(manifest: dict[str, Any]) -> str:
    """Return what is wrong with a ScaledObject, or ""."""
    script = FETCHED / "validate.mjs"
    script.write_text(VALIDATE)
    argv = ["node", str(script), json.dumps(manifest)]
    done = subprocess.run(argv, cwd=FETCHED, capture_output=True, text=True, timeout=60, check=True)
    unknown = sorted(_names(manifest["spec"]) - _known())
    return done.stdout.strip() or (f"unknown: {', '.join(unknown)}" if unknown else "")


def _names(part: Any) -> set[str]:
    """Return the names of all fields below, but for a trigger's own settings."""
    if isinstance(part, list):
        return {name for one in part for name in _names(one)}
    if not isinstance(part, dict):
        return set()
    below = {name for key, value in part.items() if key != "metadata" for name in _names(value)}
    return below | set(part)


def _known() -> set[str]:
    """Return the fields that there are: the schema itself takes any."""
    modules = FETCHED / "node_modules"
    files = [
        *(modules / "@kubernetes-models/keda/keda.sh").rglob("*.d.ts"),
        *(modules / "kubernetes-models/autoscaling/v2").glob("HPAScaling*.d.ts"),
        modules / "kubernetes-models/autoscaling/v2/HorizontalPodAutoscalerBehavior.d.ts",
    ]
    return {name for path in files for name in re.findall(r'"(\w+)"\??:', path.read_text())}
