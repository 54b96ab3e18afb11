"""What a test needs and a machine may lack: a browser, a linter, a real Airflow.

At home a missing part is a skipped test with its reason. `REQUIRE_ALL_PARTS=1` (the CI) makes it a failed
one, so that nothing stays unproven unseen.
"""

from __future__ import annotations

import os

import pytest


def need(part: str, found: bool, how_to_get_it: str) -> None:
    """Go on if `part` was found; else skip the test, or fail it under REQUIRE_ALL_PARTS=1."""
    if found:
        return
    reason = f"{part} is missing: {how_to_get_it}"
    if os.environ.get("REQUIRE_ALL_PARTS") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
