"""Tasks for the tests' workers: they raise the error that they are asked for."""

from __future__ import annotations

from typing import Any

from producers import errors
from tasks.app import app


@app.task(name="tests.raise_error")
def raise_error(kind: str, arguments: list[Any]) -> None:
    raise getattr(errors, kind)(*arguments)


@app.task(name="tests.raise_value", recorded=False)
def raise_value(words: str) -> None:
    """Raise what nobody foresaw, with a value in its words."""
    raise ValueError(words)
