"""Chance that differs from run to run of the tests, and is one in all processes of a run.

Under pytest-xdist each process collects the tests for itself, and all must find the same ones.
"""

from __future__ import annotations

import os
import random
import uuid

_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex


def drawn(what: str) -> random.Random:
    """What draws `what` of this run."""
    return random.Random(f"{_RUN} {what}")  # noqa: S311 - no secret
