"""What the documents name is there, and what a user must know is named in them."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from producers.gateway.settings import PREFIX, GatewaySettings

ROOT = Path(__file__).resolve().parents[2]
README, RUNNING, METRICS, DOORS, MESSAGES, CONFS, TASKS, AIRFLOW = (
    ROOT / name
    for name in (
        "README.md",
        "docs/running.md",
        "docs/metrics.md",
        "docs/doors.md",
        "docs/messages.md",
        "docs/claim-check.md",
        "docs/task-state.md",
        "docs/airflow.md",
    )
)
PAGES = (README, RUNNING, METRICS, DOORS, MESSAGES, CONFS, TASKS, AIRFLOW)
_PREFIXES = {"DAGRELAY_FLOWER", "DAGRELAY_GATEWAY", "DAGRELAY_PLUGIN"}
_NOT_SETTINGS = {f"{PREFIX}PRODUCER", f"{PREFIX}ENVIRON"}
VARIABLE = re.compile(r"DAGRELAY_[A-Z_]*[A-Z]")


def test_every_setting_is_documented_and_no_other():
    sources = [*ROOT.glob("producers/**/*.py"), *ROOT.glob("tasks/**/*.py"), ROOT / "flowerconfig.py"]
    read = {name for path in sources for name in VARIABLE.findall(path.read_text())} - _PREFIXES
    told = {name.removesuffix("_FILE") for path in PAGES for name in VARIABLE.findall(path.read_text())}
    read |= {f"{PREFIX}{one.name.upper()}" for one in fields(GatewaySettings)} - _NOT_SETTINGS
    whole = {name.removesuffix("_FILE") for name in read}
    assert len(whole) > 10
    assert not whole - told, "not documented"
    assert not told - whole - _PREFIXES, "documented, and read by nobody"


def test_make_targets_in_the_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    told = {
        name
        for path in PAGES
        for quoted in re.findall(r"`(make [^`]+)`|^(make [^\n#]+)", path.read_text(), re.M)
        for name in re.findall(r"^make ([a-z-]+)", "".join(quoted))
    }
    assert {"demo", "test", "up"} <= told
    assert not told - targets


def test_files_that_the_documents_name_exist():
    """Those under "planned" in docs/design.md are exempt: that is what the word is for."""
    ours = r"`((?:producers|tasks|docs|local|tests|deploy)/[\w./-]+\.\w+)`"
    for path in PAGES:
        for name in re.findall(ours, path.read_text()):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_the_readme_asks_for_each_run_by_a_key_of_its_own_and_for_results_that_there_are():
    """Whoever tries its examples one after the other has a conflict otherwise, or a refusal."""
    readme = (ROOT / "README.md").read_text()
    keys = re.findall(r"""key"?[=:] ?"([^"{]+)\"""", readme)
    assert len(keys) >= 3
    assert len(set(keys)) == len(keys)
    dag = (ROOT / "examples" / "dags" / "daily_sales.py").read_text()
    (result_from,) = re.findall(r'"daily_sales", .*result_from="([^"]+)"', readme)
    assert f"def {result_from}(" in dag or f'task_id="{result_from}"' in dag
