"""What `local/` promises without starting anything."""

from __future__ import annotations

import re
import stat
import threading
from pathlib import Path

import pytest

from local import airflow, process, up

ROOT = Path(__file__).resolve().parents[3]


def test_up_names_everything_that_is_wrong_at_once():
    with pytest.raises(up.Mistake) as told:
        up.check_environment({"WORKERS": "many"})

    assert "AIRFLOW_CONN_DEFAULT" in str(told.value)
    assert "WORKERS" in str(told.value)


@pytest.mark.parametrize("name", ["AIRFLOW_CONN_DEFAULT", "AIRFLOW_CONN_DEFAULT_FILE"])
def test_up_takes_the_airflow_from_the_environment_or_a_file(name):
    assert up.check_environment({name: "x", "WORKERS": "3"}) == 3


def test_redis_url_counts_only_where_ours_is_not_set():
    both = {"REDIS_URL": "redis://host", "DAGRELAY_REDIS_URL": "redis://ours"}
    up.take_redis_url(both)
    assert both["DAGRELAY_REDIS_URL"] == "redis://ours"

    one = {"REDIS_URL": "redis://host"}
    up.take_redis_url(one)
    assert one["DAGRELAY_REDIS_URL"] == "redis://host"


def test_addresses_are_shown_without_their_password():
    assert up.without_password("rediss://user:secret@host:6380/1") == "rediss://host:6380/1"


@pytest.mark.parametrize(
    "given", ["DAGRELAY_FLOWER_PASSWORD", "DAGRELAY_FLOWER_PASSWORD_FILE", "DAGRELAY_FLOWER_NO_AUTH"]
)
def test_flower_gets_a_generated_password_only_if_none_was_given(given):
    assert up.needs_flower_password({})
    assert not up.needs_flower_password({given: "x"})


def test_a_secret_is_for_its_owner_alone(tmp_path):
    file = tmp_path / "below" / "secret"
    process.secret_file(file, "s3cret")

    assert file.read_text() == "s3cret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_children_inherit_nothing_that_changes_what_they_do(monkeypatch):
    for name in ("AIRFLOW__CORE__EXECUTOR", "CELERY_BROKER_URL", "PYTHONPATH", "DAGRELAY_REDIS_URL"):
        monkeypatch.setenv(name, "of the caller")

    assert "of the caller" not in process.clean_env(A="b").values()
    assert process.clean_env(A="b")["A"] == "b"


def test_airflow_2_says_which_python_it_needs(monkeypatch):
    monkeypatch.setitem(airflow.PYTHON_BELOW, "2", (3, 11))

    with pytest.raises(process.PartFailed, match=r"2\.11\.2 does not run on Python .* below 3\.11"):
        airflow.Environment("2")


def test_an_install_is_made_again_when_its_lock_has_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(airflow, "STATE", tmp_path)
    made = []
    monkeypatch.setattr(
        airflow.Environment, "_install", lambda self, _say: (made.append(1), self.folder.mkdir())
    )
    monkeypatch.setattr(airflow.Environment, "_make_database", lambda self, _say: None)
    environment = airflow.Environment("3")
    environment.lock = tmp_path / "lock"

    environment.lock.write_text("a==1")
    environment.ensure().close()
    environment.ensure().close()
    assert made == [1]

    environment.lock.write_text("a==2")
    environment.ensure().close()
    assert made == [1, 1]


def test_what_an_airflow_runs_on_is_not_replaced_under_it(monkeypatch, tmp_path):
    monkeypatch.setattr(airflow, "STATE", tmp_path)
    monkeypatch.setattr(airflow.Environment, "_install", lambda self, _say: self.folder.mkdir())
    monkeypatch.setattr(airflow.Environment, "_make_database", lambda self, _say: None)
    environment = airflow.Environment("3")
    environment.lock = tmp_path / "lock"
    environment.lock.write_text("a==1")
    in_use = environment.ensure()
    said = []

    environment.lock.write_text("a==2")
    other = threading.Thread(target=lambda: environment.ensure(said.append).close())
    other.start()
    other.join(0.3)
    assert other.is_alive()
    assert said == ["waiting for another process that installs or runs this Airflow"]

    in_use.close()
    other.join(5)
    assert not other.is_alive()


def test_an_install_that_was_cut_short_is_made_again(monkeypatch, tmp_path):
    monkeypatch.setattr(airflow, "STATE", tmp_path)
    environment = airflow.Environment("3")
    environment.folder.mkdir()
    (environment.folder / "half").touch()
    monkeypatch.setattr(airflow.Environment, "_install", lambda self, _say: self.folder.mkdir())
    monkeypatch.setattr(airflow.Environment, "_make_database", lambda self, _say: None)

    environment.ensure().close()

    assert [file.name for file in environment.folder.iterdir()] == ["stamp"]


def test_make_alone_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = {name for line in re.findall(r"^\.PHONY: (.*)$", text, re.M) for name in line.split()} - {"help"}
    described = set(re.findall(r"^([a-z-]+):.*## \S", text, re.M))

    assert phony == described
