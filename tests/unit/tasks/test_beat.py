"""The heart of a worker beats while its event loop turns, and where it stands still for a reason."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery.concurrency.solo import TaskPool as SoloPool
from celery.worker import state as worker_state

from producers.stores import beats
from tasks import beat
from tasks.beat import TURN_S, Heart


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return beats.folder()


@pytest.fixture
def heart() -> Heart:
    return Heart(SimpleNamespace(hostname="w1@here"))


@pytest.fixture
def pass_s(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass, for the heart."""
    at = [time.monotonic()]
    monkeypatch.setattr(beat, "time", SimpleNamespace(monotonic=lambda: at[0], sleep=time.sleep))

    def go(seconds: float) -> None:
        at[0] += seconds

    return go


def test_it_beats_while_the_loop_turns_and_stops_when_it_does_not(heart, pass_s):
    heart.turned()
    assert heart._alive()
    pass_s(TURN_S - 1)
    assert heart._alive()
    pass_s(2)
    assert not heart._alive()
    heart.turned()
    assert heart._alive()


@pytest.mark.parametrize("state", ["connecting", "leaving"])
def test_it_beats_while_the_loop_stands_still_for_a_reason(heart, pass_s, state):
    heart.turned()
    heart.state = state
    pass_s(3600)
    assert heart._alive()


def test_in_the_solo_pool_it_beats_while_a_task_runs_in_the_loop(heart, pass_s, monkeypatch):
    heart._pool = SoloPool()
    heart.turned()
    pass_s(60)
    assert not heart._alive()
    request: Any = SimpleNamespace()
    monkeypatch.setattr(worker_state, "active_requests", {id(request)})
    assert heart._alive()


def test_what_it_writes_is_read_by_a_probe(heart, folder):
    heart.turned()
    heart._beat()
    (found,) = beats.read_all()
    assert (found.node, found.pid, found.state) == ("w1@here", os.getpid(), "running")
    assert 0 <= found.age_s < 5
    assert found.process_there
    assert folder.stat().st_mode & 0o777 == 0o700
    heart._end()
    assert beats.read_all() == []


def test_a_folder_that_cannot_be_written_is_told_once_and_ends_nothing(heart, folder, caplog):
    folder.parent.joinpath("elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")  # as somebody would to have us write there
    heart._beat()
    heart._beat()
    assert [record for record in caplog.records if "no heartbeat is written" in record.getMessage()]
    assert len(caplog.records) == 1
    assert not list((folder.parent / "elsewhere").iterdir())


def test_what_is_no_heartbeat_is_passed_over(folder):
    assert beats.read_all() == []
    folder.mkdir()
    for name, text in (("a.beat", "{"), ("b.beat", "[1]"), ("c.beat", '{"node": 1}'), ("d.new", "{}")):
        (folder / name).write_text(text)
    assert beats.read_all() == []


def test_a_nodes_name_leads_nowhere_else(folder):
    path = beats.path_of("../../etc/x@y z", 7)
    assert path.parent == folder
    assert path.name == ".._.._etc_x@y_z.7.beat"
