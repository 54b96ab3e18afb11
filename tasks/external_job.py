"""The task poll_external_job: its name is taken, its work comes with a later release."""

from __future__ import annotations

from typing import Any

from producers.contract import POLL_EXTERNAL_JOB
from producers.errors import NotSupportedYet

from .app import app


@app.task(name=POLL_EXTERNAL_JOB, bind=True)
def poll_external_job(self: Any, *_args: Any, **_message: Any) -> None:
    """Refuse the request with a reason that its caller can read."""
    raise NotSupportedYet("poll_external_job is declared, and not built yet in this release")
