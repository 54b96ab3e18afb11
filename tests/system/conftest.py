"""A real Airflow for all tests of a version, one version after the other; the rest is each test's own.

Where several processes share the tests out, one has those of Airflow 3 and of both, another those of 2: see
`tests/conftest.py`. An Airflow ends with the last test of this folder, for what other tests its process has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from local.airflow import PYTHON_BELOW, RELEASE, Airflow, Version
from local.process import tail
from tests.parts import need
from tests.system.stack import AirflowUnderTest, Stack

ORDER = {"3": 0, "2": 1, "both": 2}
Airflow.hash_rounds = 1_000  # else four fifths of what Airflow 2's API computes
LAST = "test_tokens_that_expire"  # of its version: it leaves an API whose tokens live for 2 s


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and have only one Airflow run at a time: all of 3, all of 2, both."""
    ours = [item for item in items if "system" in item.path.parts]
    for item in ours:
        item.add_marker(pytest.mark.system)
    # A file with an Airflow of its own comes first: the one for all would run idle beside it.
    ours.sort(
        key=lambda item: (
            ORDER[_version(item)],
            not hasattr(item.module, "airflow"),  # type: ignore[attr-defined]
            item.name.startswith(LAST),
        )
    )
    places = iter(ours)
    items[:] = [next(places) if "system" in item.path.parts else item for item in items]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show of a failed test what its workers last said."""
    report = yield
    used = getattr(item, "funcargs", {})
    if report.failed:
        for stack in (used[name] for name in ("stack", "shared") if name in used):
            for log in sorted(stack.folder.glob("*.log")):
                report.sections.append((f"end of {log.name}", tail(log, 40)))
    return report


def _version(item: pytest.Item) -> str:
    call = getattr(item, "callspec", None)
    return str(call.params.get("airflow", "both")) if call else "both"


@pytest.fixture(scope="session")
def homes() -> dict[str, AirflowUnderTest]:
    """The Airflows that were made so far, by version; they may be stopped."""
    return {}


@pytest.fixture(scope="session")
def make_airflow(
    homes: dict[str, AirflowUnderTest], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Version], AirflowUnderTest]:
    """Make an Airflow that was not started yet; skip (or fail) where it cannot be had."""

    def make(version: Version) -> AirflowUnderTest:
        found = sys.version_info[:2] < PYTHON_BELOW[version]
        below = ".".join(map(str, PYTHON_BELOW[version]))
        need(f"Airflow {RELEASE[version]}", found, f"it needs a Python below {below}")
        folder = tmp_path_factory.mktemp(f"airflow{version}")
        homes[version] = AirflowUnderTest(version, folder, parallelism=2)
        return homes[version]

    return make


@pytest.fixture(scope="package", params=["3", "2"], ids=["airflow3", "airflow2"])
def airflow(
    request: pytest.FixtureRequest, make_airflow: Callable[[Version], AirflowUnderTest]
) -> Iterator[AirflowUnderTest]:
    """The running Airflow of this version, with all DAGs of these tests read."""
    with make_airflow(request.param) as made:
        made.wait_until_read()
        yield made


@pytest.fixture(scope="package")
def shared(airflow: AirflowUnderTest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A Valkey and a worker for all tests that disturb nothing."""
    stack = Stack(airflow, tmp_path_factory.mktemp("shared"))
    try:
        stack.start_worker()
        yield stack
    finally:
        stack.close()


@pytest.fixture
def stack(airflow: AirflowUnderTest, tmp_path: Path) -> Iterator[Stack]:
    """A Valkey of the test's own; it starts the workers that it needs."""
    made = Stack(airflow, tmp_path)
    try:
        yield made
    finally:
        made.close()
