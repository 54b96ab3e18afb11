"""How the tests are shared out among the processes of pytest-xdist (`make test JOBS=4`)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from tests.preloaded import process
from tests.worker import Worker

Worker.made_by = process


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process takes a whole file, for what its tests share; of the system tests, all of one Airflow."""
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            if not file.startswith("tests/system/"):
                return file
            return "Airflow 2" if "[airflow2" in name else "Airflow 3"

    config.option.loadscopereorder = False  # the system tests come first: they take longest
    return Shares(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, dict[str, Any] | None, dict[str, Any] | None]:
    """Report to the other process in UTF-8, which has no lone surrogates: tests try those, too."""
    return _in_utf8((yield))


def _in_utf8(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_in_utf8(name): _in_utf8(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_in_utf8(one) for one in value)
    return value
