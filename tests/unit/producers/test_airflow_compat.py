"""Which Airflow our operators take for which, by packages that have what each version has where it has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OPERATORS = ["BaseOperator", "BaseOperatorLink", "BaseSensorOperator"]
ERRORS = ["Exception", "FailException", "NotFoundException", "SensorTimeout", "SkipException"]
EXCEPTIONS = [f"Airflow{name}" for name in ERRORS]
ALL = {
    "configuration": ["conf"],
    "exceptions": EXCEPTIONS,
    "utils.timezone": ["parse"],
    "listeners.listener": ["get_listener_manager"],
    "utils.log.secrets_masker": ["mask_secret"],
}
HAS = {
    "2.11": {
        **ALL,
        "hooks.base": ["BaseHook"],
        "models.baseoperator": ["BaseOperator"],
        "models.baseoperatorlink": ["BaseOperatorLink"],
        "sensors.base": ["BaseSensorOperator"],
    },
    "3.0": {**ALL, "hooks.base": ["BaseHook"], "sdk": OPERATORS, "sdk.exceptions": []},
    "3.1": {
        **ALL,
        "sdk": [*OPERATORS, "BaseHook"],
        "sdk.exceptions": ["AirflowException"],
        "sdk.timezone": ["parse"],
        "sdk.log": ["mask_secret"],
    },
    "3.2": {
        "sdk": [*OPERATORS, "BaseHook"],
        "sdk.configuration": ["conf"],
        "sdk.exceptions": EXCEPTIONS,
        "sdk.timezone": ["parse"],
        "sdk.listener": ["get_listener_manager"],
        "sdk.log": ["mask_secret"],
    },
}
SAYS = """
import json
from producers.airflow import compat
print(json.dumps([compat.AIRFLOW_3, compat.BaseOperator, compat.AirflowFailException]))
"""


@pytest.mark.parametrize("version", HAS)
def test_every_airflow_3_is_one_wherever_it_has_what_we_use(version, tmp_path):
    for module, names in HAS[version].items():
        folder = tmp_path / "airflow" / module.replace(".", "/")
        folder.mkdir(parents=True)
        said = "".join(f"{name} = {f'{module}.{name}'!r}\n" for name in names)
        (folder / "__init__.py").write_text(said)
    done = subprocess.run(
        [sys.executable, "-c", SAYS],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    is_3, operator, error = json.loads(done.stdout)
    assert is_3 is version.startswith("3")
    assert operator == ("sdk.BaseOperator" if is_3 else "models.baseoperator.BaseOperator")
    assert error.endswith("exceptions.AirflowFailException")
