"""A task for the tests' workers: it raises the error that it is asked for."""

from __future__ import annotations

from typing import Any

from producers import errors
from tasks.app import app


@app.task(name="tests.raise_error")
def raise_error(kind: str, arguments: list[Any]) -> None:
    raise getattr(errors, kind)(*arguments)
