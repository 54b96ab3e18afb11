"""Flower does not start open by accident, and says every mistake without its secret."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

FLOWERCONFIG = Path(__file__).resolve().parents[2] / "flowerconfig.py"
CANARY = "kanarienvogel-7f3a"


@pytest.fixture
def load(monkeypatch):
    """Load flowerconfig.py as Flower does, with these variables and no others of ours."""

    def load(**environ: str) -> dict[str, Any]:
        for name in list(os.environ):
            if name.startswith(("DAGRELAY_", "FLOWER_")):
                monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(f"DAGRELAY_FLOWER_{name}", value)
        return runpy.run_path(str(FLOWERCONFIG))

    return load


def test_without_a_password_flower_does_not_start(load):
    with pytest.raises(SystemExit, match=r"DAGRELAY_FLOWER_PASSWORD or .*_FILE is missing"):
        load()


def test_a_password_closes_flower_on_loopback(load):
    settings = load(PASSWORD="a,b:c d")
    assert settings["basic_auth"] == ["dagrelay:a,b:c d"]
    assert (settings["address"], settings["port"]) == ("127.0.0.1", 5555)


def test_user_address_and_port_are_taken_from_the_environment(load):
    settings = load(USER="ops", PASSWORD="x", ADDRESS="0.0.0.0", PORT="8080")  # noqa: S104
    assert settings["basic_auth"] == ["ops:x"]
    assert (settings["address"], settings["port"]) == ("0.0.0.0", 8080)  # noqa: S104


def test_the_password_may_come_from_a_file(load, tmp_path):
    (tmp_path / "password").write_text(f"{CANARY}\n")
    assert load(PASSWORD_FILE=str(tmp_path / "password"))["basic_auth"] == [f"dagrelay:{CANARY}"]


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_password_file_is_no_password(load, tmp_path, content):
    (tmp_path / "password").write_text(content)
    with pytest.raises(SystemExit, match="missing or empty"):
        load(PASSWORD_FILE=str(tmp_path / "password"))


def test_only_an_explicit_word_opens_flower(load):
    assert load(NO_AUTH="true")["basic_auth"] == []
    with pytest.raises(SystemExit, match="missing"):
        load(NO_AUTH="false")
    with pytest.raises(SystemExit, match="NO_AUTH: true or false"):
        load(NO_AUTH="maybe", PASSWORD="x")


def test_open_with_a_password_is_a_contradiction(load):
    with pytest.raises(SystemExit, match="both set"):
        load(NO_AUTH="true", PASSWORD=CANARY)


def test_every_mistake_is_named_at_once_and_no_secret(load, tmp_path):
    (tmp_path / "password").write_text(CANARY)
    with pytest.raises(SystemExit) as stopped:
        load(
            USER=f"{CANARY}:x",
            PASSWORD=f"{CANARY}é",
            PASSWORD_FILE=str(tmp_path / "password"),
            NO_AUTH="perhaps",
            PORT="70000",
        )
    said = str(stopped.value)
    assert len(re.findall(r"[^;]+", said)) == 5, said
    assert all(name in said for name in ("USER", "PASSWORD_FILE", "NO_AUTH", "PORT", "printable ASCII"))
    assert CANARY not in said


def test_a_password_file_that_cannot_be_read_is_named(load):
    with pytest.raises(SystemExit, match="PASSWORD_FILE") as stopped:
        load(PASSWORD_FILE="/nonexistent/password", PORT="x")
    assert "missing" not in str(stopped.value)  # it is there, and said wrongly
