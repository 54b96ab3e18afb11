"""The package itself: names come when they are asked for, and importing it costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import producers

ROOT = Path(__file__).parents[3]


def said_by(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_that_costs_time():
    """An Airflow does so in each of its processes, each task's own among them."""
    code = (
        "import sys; before = set(sys.modules); import producers, producers.airflow.provider;"
        "print(*set(sys.modules) - before)"
    )
    loaded = {name.partition(".")[0] for name in said_by(code).split()}
    assert loaded - sys.stdlib_module_names == {"producers"}
    assert not loaded & {"asyncio", "ssl", "json", "socket"}


@pytest.mark.parametrize("name", producers.__all__)
def test_each_public_name_is_there_and_is_what_its_module_says(name):
    found = getattr(producers, name)
    assert not isinstance(found, type(sys))  # the function `client`, not the module
    assert found is getattr(sys.modules[f"producers.{producers._MODULE_OF[name]}"], name)


def test_the_names_that_editors_complete_are_those_that_are_there():
    assert set(producers.__all__) == set(producers._MODULE_OF)
    assert set(producers.__all__) <= set(dir(producers))


@pytest.mark.parametrize("name", ["client", "fan_out"])
def test_a_module_takes_no_functions_place_whichever_is_imported_first(name):
    first = f"import producers.{name}; from producers import {name}; print(callable({name}))"
    assert said_by(first) == "True"
    then = f"from producers import {name}; import producers.{name}; from producers import {name} as again;"
    assert said_by(f"{then} print(again is {name})") == "True"


def test_what_is_not_there_is_said_as_by_any_module():
    with pytest.raises(AttributeError, match="module 'producers' has no attribute 'nope'"):
        producers.nope  # noqa: B018
