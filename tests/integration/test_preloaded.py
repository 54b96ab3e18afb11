"""The workers of these tests are forked, and are to be told from those of `exec` by their speed alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from local.process import ROOT, Process, clean_env
from tests.preloaded import Preloaded, can_run, process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they are started by exec")

SAYS = """
import json, os, signal, sys, threading
said = {
    "argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd(), "path": sys.path[0], "main": __name__,
    "session": os.getsid(0) == os.getpid(), "threads": threading.active_count(),
    "open": sorted(int(one) for one in os.listdir("/proc/self/fd"))[:-1],
    "signals": [str(signal.getsignal(one)) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)],
    "ours": sorted(name for name in sys.modules if name.partition(".")[0] in ("tasks", "producers")),
}
print(json.dumps(said))
sys.exit(3)
"""


def written(folder: Path, text: str) -> Path:
    script = folder / "script"
    script.write_text(text)
    return script


def test_a_fork_finds_what_an_exec_finds(tmp_path):
    found = []
    for number, kind in enumerate((Process, Preloaded)):
        log = tmp_path / f"{number}.log"
        argv = [written(tmp_path, f"#!{sys.executable}\n{SAYS}"), "-x", "ä"]
        argv[0].chmod(0o755)
        made = kind(argv, log=log, env=clean_env(A="1"), cwd=tmp_path)
        assert made.wait(60) == 3
        said = json.loads(log.read_text())
        said["env"].pop("LC_CTYPE", None)  # an interpreter in the C locale sets it as it starts
        found.append(said)
    executed, forked = found
    assert forked == executed
    assert not forked["ours"]


def test_it_is_stopped_killed_and_crashes_as_another(tmp_path):
    waits = written(tmp_path, "import signal, time\ntime.sleep(60)")
    one = Preloaded([waits], log=tmp_path / "log", env=clean_env())
    assert one.alive
    assert one.stop() == -signal.SIGTERM
    one = Preloaded([waits], log=tmp_path / "log", env=clean_env())
    assert one.kill() == -signal.SIGKILL
    crashes = Preloaded([written(tmp_path, "raise ValueError('no')")], log=tmp_path / "log", env=clean_env())
    assert crashes.wait(60) == 1
    assert "ValueError: no" in (tmp_path / "log").read_text()


def test_it_ends_with_the_process_that_asked_for_it(tmp_path):
    waits = written(tmp_path, "import time\ntime.sleep(60)")
    asks = (
        "import os, signal\nfrom pathlib import Path\nfrom tests.preloaded import Preloaded\n"
        f"one = Preloaded([{str(waits)!r}], log=Path({str(tmp_path / 'log')!r}), env={{}})\n"
        "print(one.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", asks], cwd=ROOT, capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.05)


def test_what_an_interpreter_reads_at_its_start_needs_an_exec(tmp_path):
    assert can_run(["celery", "worker"], {"DAGRELAY_X": "1"})
    assert not can_run(["celery", "worker"], {"PYTHONPATH": "x"})
    assert not can_run(["celery", "worker", "-P", "gevent"], {})
    made = process(
        [sys.executable, "-c", "import os; print(os.environ['PYTHONHASHSEED'])"],
        log=tmp_path / "log",
        env={"PYTHONHASHSEED": "7"},
    )
    assert made.wait(60) == 0
    assert os.linesep.join(["7", ""]) == (tmp_path / "log").read_text()
