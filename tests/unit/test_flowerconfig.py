"""Flower does not start open by accident, and says every mistake without its secret."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest

FLOWERCONFIG = Path(__file__).resolve().parents[2] / "flowerconfig.py"
EX_CONFIG = 78
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


@pytest.fixture
def refused(load, capsys):
    """Load it with wrong settings; return what it says."""

    def refused(**environ: str) -> list[str]:
        with pytest.raises(SystemExit) as stopped:
            load(**environ)
        assert stopped.value.code == EX_CONFIG
        return capsys.readouterr().err.splitlines()

    return refused


def test_without_a_password_flower_does_not_start(refused):
    (said,) = refused()
    assert "DAGRELAY_FLOWER_PASSWORD or DAGRELAY_FLOWER_PASSWORD_FILE is missing" in said


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
def test_an_empty_password_file_is_no_password(refused, tmp_path, content):
    (tmp_path / "password").write_text(content)
    (said,) = refused(PASSWORD_FILE=str(tmp_path / "password"))
    assert "missing or empty" in said


def test_only_an_explicit_word_opens_flower(load, refused):
    assert load(NO_AUTH="true")["basic_auth"] == []
    assert "missing" in refused(NO_AUTH="false")[0]
    assert "NO_AUTH: true or false" in refused(NO_AUTH="maybe", PASSWORD="x")[0]


def test_open_with_a_password_is_a_contradiction(refused):
    (said,) = refused(NO_AUTH="true", PASSWORD=CANARY)
    assert "both set" in said


def test_every_mistake_is_named_at_once_and_no_secret(refused, tmp_path):
    (tmp_path / "password").write_text(CANARY)
    said = refused(
        USER=f"{CANARY}:x",
        PASSWORD=f"{CANARY}é",
        PASSWORD_FILE=str(tmp_path / "password"),
        NO_AUTH="perhaps",
        PORT="70000",
    )
    for number, name in enumerate(("USER", "NO_AUTH", "PASSWORD_FILE", "printable ASCII", "PORT")):
        assert name in said[number]
    assert len(said) == 5
    assert CANARY not in "".join(said)


def test_a_password_file_that_cannot_be_read_is_named(refused):
    said = refused(PASSWORD_FILE="/nonexistent/password", PORT="x")
    assert "PASSWORD_FILE cannot be read" in said[0]
    assert "PORT" in said[1]
    assert len(said) == 2  # it is not missing as well
