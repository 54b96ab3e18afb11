"""What npm brings for tests and examples is pinned by hash, and its locks name no address."""

from __future__ import annotations

import json
import subprocess

from tests.parts import need
from tests.worker import ROOT


def test_locks_of_npm_pin_everything_by_hash_and_name_no_address():
    listed = subprocess.run(
        ["git", "ls-files", "*package.json", "*package-lock.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    need("git's list of files", listed.returncode == 0, "run the tests in a clone, with git")
    files = listed.stdout.split()
    locks = [name for name in files if name.endswith("package-lock.json")]
    assert len(locks) >= 5
    assert {name.replace("package-lock", "package") for name in locks} == set(files) - set(locks)
    for name in locks:
        text = (ROOT / name).read_text()
        assert "://" not in text, name
        packages = json.loads(text)["packages"]
        assert len(packages) > 1
        assert not [one for one, package in packages.items() if one and "integrity" not in package], name
