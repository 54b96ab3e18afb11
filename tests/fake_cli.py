"""An `airflow` command that keeps its runs in a file: what 2.11.2 and 3.3.2 print, and commands' faults.

    python fake_cli.py FOLDER dags trigger … as CliClient says it

`FOLDER/fault` holds what goes wrong, for each call until it is removed: see `_misbehave`. Every call is noted
in `FOLDER/calls` as a line of JSON, with the names in its environment. Imports nothing of ours: it is started
as a command is, a hundred times in a test.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

NOISE = "2026-11-20T19:44:04.217669Z [warning  ] Could not import graphviz.\nRun `pip install graphviz`\n"
TRACEBACK = (
    'Traceback (most recent call last):\n  File "airflow/api/common/trigger_dag.py", line 119, in '
    "_trigger_dag\n    raise {name}(…)\n"
)


def main() -> int:
    folder, given = Path(sys.argv[1]), sys.argv[2:]
    if given[0] == "--shell":  # as sshd: what comes is put together, and taken apart by a shell
        given = shlex.split(" ".join(given[1:]))
    with (folder / "calls").open("a") as calls:
        calls.write(json.dumps({"argv": given, "env": sorted(os.environ), "pid": os.getpid()}) + "\n")
    fault = (folder / "fault").read_text() if (folder / "fault").exists() else ""
    version = (folder / "version").read_text() if (folder / "version").exists() else "3.3.2"
    words = [one for one in given if not one.startswith("--")]
    options = dict(one[2:].split("=", 1) for one in given if one.startswith("--") and "=" in one)
    if words == ["version"]:
        _say(version)
        return 0
    sys.stdout.write(NOISE)
    sys.stdout.flush()
    if fault and not fault.startswith("after-"):
        _misbehave(fault, folder)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = _do(folder, version[0], words, options)
    if fault.startswith("after-"):
        _misbehave(fault.removeprefix("after-"), folder)
    return code


def _misbehave(fault: str, folder: Path) -> None:
    """Do wrong; with "after-" in front only after the run was made, and before it is said."""
    if fault == "hang":  # and leave a child that hangs too, deaf to TERM
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "600"])
        time.sleep(600)
    elif fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "garbage":
        sys.stdout.write("[{]\n\x00\xff [null] {}\n")
        sys.exit(0)
    elif fault == "flood":
        while True:
            sys.stdout.write("x" * 65_536)
    elif fault == "database":
        raise RuntimeError("sqlalchemy.exc.OperationalError: no; password=s3cr3t-canary")
    elif fault == "left-behind":  # a child that keeps the pipe open
        subprocess.Popen(["sleep", "600"])
    elif fault == "denied":
        sys.exit("af@host: Permission denied (publickey).")


def _do(folder: Path, version: str, words: list[str], options: dict[str, str]) -> int:
    file = folder / "runs.json"
    runs: list[dict[str, str]] = json.loads(file.read_text()) if file.exists() else []
    date = "execution_date" if version == "2" else "logical_date"
    dag_id = options.get("dag-id") or (words[2] if len(words) > 2 else "")
    if dag_id == "missing" and words[0] == "dags" and words[1] != "trigger":
        sys.exit(f"DAG: {dag_id} does not exist in 'dag' table")
    match words[:2]:
        case ["db", "check"]:
            return 0
        case ["jobs", "check"]:
            _say("Found one alive job.")
            return 0
        case ["dags", "trigger"]:
            return _trigger(file, runs, version, dag_id, options)
        case ["dags", "state"]:
            which = "date" if version == "2" else "run_id"
            found = next((one for one in runs if (one["dag_id"], one[which]) == (dag_id, words[3])), None)
            conf = f", {found['conf']}" if found and found["conf"] not in ("", "{}") else ""
            _say(f"{found['state']}{conf}" if found else None)
        case ["tasks", "states-for-dag-run"]:
            found = next((one for one in runs if (one["dag_id"], one["run_id"]) == (dag_id, words[3])), None)
            if found is None:
                return _raise("airflow.exceptions.DagRunNotFound", f"DagRun for {dag_id} not found")
            _say(json.dumps([{"dag_id": dag_id, date: found["date"], "task_id": "t", "state": None}]))
        case ["dags", "list-runs"]:
            listed = [
                {"dag_id": dag_id, "run_id": one["run_id"], "state": one["state"], date: one["date"]}
                for one in runs
                if one["dag_id"] == dag_id
                and options.get("state") in (None, one["state"])
                and (not options.get("end-date") or one["date"] == options["end-date"])
            ]
            _say(json.dumps(listed))
        case ["dags", "details"]:
            _say(json.dumps([{"dag_id": dag_id, "is_paused": "False", "max_active_runs": "16"}]))
        case ["dags", "unpause"]:
            _say("No paused DAGs were found")
        case _:
            sys.stderr.write("airflow command error: invalid choice, see help above.\n")
            return 2
    return 0


def _trigger(
    file: Path, runs: list[dict[str, str]], version: str, dag_id: str, options: dict[str, str]
) -> int:
    run_id, conf = options["run-id"], options.get("conf", "")
    if dag_id == "missing":
        return _raise("airflow.exceptions.DagNotFound", f"Dag id {dag_id} not found in DagModel")
    if "secret" in json.loads(conf or "{}"):
        value = json.loads(conf)["secret"]
        text = f"Invalid input for param secret: {value!r} is too short\n\nOn instance:\n    {value!r}\n"
        return _raise("airflow.exceptions.ParamValidationError", text)
    asked = options.get("exec-date" if version == "2" else "logical-date", "")
    if any(one["dag_id"] == dag_id and one["run_id"] == run_id for one in runs):
        text = f"A Dag Run already exists for DAG {dag_id} with run id {run_id}"
        return _raise("airflow.exceptions.DagRunAlreadyExists", text)
    if asked and any(one["dag_id"] == dag_id and one["date"] == asked for one in runs):
        text = 'duplicate key value violates unique constraint "dag_run_dag_id_logical_date_key"'
        return _raise(
            "sqlalchemy.exc.IntegrityError", f"(psycopg2.errors.UniqueViolation) {text}\n\n[SQL: …]"
        )
    if version == "2" and not asked:
        asked = f"2026-11-20T19:44:{len(runs) % 60:02d}.{os.getpid() % 1000000:06d}+00:00"
    run = {"dag_id": dag_id, "run_id": run_id, "state": "queued", "conf": conf, "date": asked}
    file.with_suffix(".new").write_text(json.dumps([*runs, run]))
    file.with_suffix(".new").rename(file)
    fault = file.with_name("fault")
    if not (fault.exists() and fault.read_text().startswith("after-")):
        row = {"dag_id": dag_id, "dag_run_id": run_id, "logical_date": asked or None, "state": "queued"}
        _say(json.dumps([{"conf": {"n": "1"}, **row, "run_type": "manual"}]))
    return 0


def _say(what: object) -> None:
    sys.stdout.write(f"{what}\n")


def _raise(name: str, text: str) -> int:
    sys.stderr.write(f"{TRACEBACK.format(name=name)}{name}: {text}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
