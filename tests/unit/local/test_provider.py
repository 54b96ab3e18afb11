"""Our wheel beside Airflow: its locks hold what it needs; a tree is built once and stays while in use."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from local import provider
from local.airflow import Environment
from local.process import ROOT


def pinned(*locks: Path) -> dict[str, str]:
    found = [re.findall(r"^([\w.-]+)==([^\s;\\]+)", lock.read_text(), re.MULTILINE) for lock in locks]
    return {canonicalize_name(name): version for some in found for name, version in some}


@pytest.mark.parametrize("version", ["2", "3"])
def test_airflows_lock_and_ours_hold_what_the_wheel_needs(version):
    have = pinned(ROOT / "local" / f"airflow{version}.lock", provider.lock_file(version))
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wrong = [
        one
        for one in map(Requirement, needed)
        if not one.specifier.contains(have.get(canonicalize_name(one.name), "0"))
    ]
    assert not wrong, "make lock"


@pytest.mark.parametrize("version", ["2", "3"])
def test_nothing_of_airflows_own_is_replaced(version):
    theirs = pinned(ROOT / "local" / f"airflow{version}.lock")
    assert not theirs.keys() & pinned(provider.lock_file(version)).keys()


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The names of the layers that were installed, in a folder of their own; nothing is really installed."""
    monkeypatch.setattr(provider, "LAYERS", tmp_path)
    names: list[str] = []

    def layer(environment, target, *what):
        names.append(target.name.removesuffix(".new"))
        target.mkdir()

    monkeypatch.setattr(provider, "_install", layer)
    monkeypatch.setattr(provider, "build_wheel", lambda tree, target: target)
    monkeypatch.setattr(provider, "tree_digest", lambda tree: tree_now[0])
    tree_now[0] = "a"
    return names


tree_now = ["a"]


def test_a_tree_is_built_once(made):
    for version in ("3", "3", "2"):
        provider.ensure_provider(Environment(version)).close()

    assert len(made) == 3
    assert made.count("wheel-a") == 1  # the same for both; what it needs is each one's own


def test_the_wheel_of_another_tree_goes_when_nobody_uses_it(made, tmp_path):
    old = provider.ensure_provider(Environment("3"))
    tree_now[0] = "b"
    provider.ensure_provider(Environment("3")).close()
    assert all(folder.is_dir() for folder in old.folders)

    old.close()
    tree_now[0] = "c"
    provider.ensure_provider(Environment("3")).close()
    assert {path.name for path in tmp_path.glob("wheel-?")} == {"wheel-c"}
    assert {path.name for path in tmp_path.glob("wheel-*.used")} == {"wheel-c.used"}


def test_an_install_that_was_cut_short_is_made_again(made, monkeypatch, tmp_path):
    cut = monkeypatch.context
    with cut() as patch:
        patch.setattr(provider, "_install", lambda environment, target, *what: (target.mkdir(), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            provider.ensure_provider(Environment("3"))

    provider.ensure_provider(Environment("3")).close()
    assert len(made) == 2
    assert not list(tmp_path.glob(".new-*"))
