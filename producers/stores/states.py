"""The states of a request, and where Celery keeps its result: what a triggerer needs of `records`."""

from __future__ import annotations

from typing import Final, Literal

State = Literal["accepted", "waiting", "done", "failed", "cancelled"]
ENDED: Final = ("done", "failed", "cancelled")

RESULT_PREFIX: Final = "celery-task-meta-"
"""Celery's key for a result, and the channel on which it is published."""
