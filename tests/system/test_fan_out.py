"""Fan-outs with a real Airflow: one outcome for each request, in order, and one callback with all of them."""

from __future__ import annotations

import json
from base64 import b64decode
from typing import Any

from tests.system.stack import Stack, until

BAD = (7, 77, 177)


def fan_out(stack: Stack, dag_id: str, confs: list[Any], *argv: str) -> tuple[int, list[dict[str, Any]]]:
    """Run `dagrelay fan-out` with a callback; return its exit code and the outcomes that it printed."""
    file = stack.folder / f"{dag_id}.jsonl"
    file.write_text("".join(json.dumps(conf) + "\n" for conf in confs))
    stack.redis.delete("of-the-host")
    done = stack.dagrelay(
        *(
            "fan-out",
            dag_id,
            "--conf-file",
            str(file),
            "--then",
            "host.report",
            "--then-queue",
            "of-the-host",
        ),
        *argv,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def called_back(stack: Stack) -> list[dict[str, Any]]:
    """What the one message for the callback holds."""
    (raw,) = until(lambda: stack.redis.lrange("of-the-host", 0, -1), "the callback")
    message = json.loads(raw)
    assert message["headers"]["task"] == "host.report"
    outcomes: list[dict[str, Any]] = json.loads(b64decode(message["body"]))[0][0]
    return outcomes


def test_two_hundred_with_three_bad_ones_among_them(shared, airflow):
    confs = [{"day": "2026-11-20", "n": n} if n not in BAD else {"day": "never", "n": n} for n in range(200)]

    code, outcomes = fan_out(shared, "strict", confs, "--until-created", "--key-prefix", "fan")

    assert code == 1
    assert [place for place, one in enumerate(outcomes) if one["state"] != "done"] == list(BAD)
    assert {outcomes[place]["error"] for place in BAD} == {"RequestRejected"}
    assert "day" in outcomes[7]["reason"]
    assert [one["dag_run_id"] for one in outcomes] == [f"relay__fan-{n + 1}" for n in range(200)]
    assert called_back(shared) == outcomes
    made = {f"relay__fan-{n + 1}" for n in range(200) if n not in BAD}
    assert {run_id for run_id in airflow.run_ids("strict") if "relay__fan-" in run_id} == made
    for one in (outcomes[0], outcomes[7]):
        assert shared.record(one["id"])["state"] == one["state"]

    # The same command again: the same runs.
    _, again = fan_out(shared, "strict", confs, "--until-created", "--key-prefix", "fan")
    assert {one["run"]["created"] for one in again if one["run"]} == {False}
    assert {run_id for run_id in airflow.run_ids("strict") if "relay__fan-" in run_id} == made


def test_with_wait_the_outcomes_are_the_ends_of_the_runs(shared, airflow):
    confs = [{"n": 0}, {"fail": True}, {"n": 2}]

    code, outcomes = fan_out(shared, "echo", confs, "--wait")

    assert code == 1
    assert [one["state"] for one in outcomes] == ["done", "failed", "done"]
    assert outcomes[0]["run"]["state"] == "success"
    assert outcomes[1]["error"] == "DagRunFailed"
    assert called_back(shared) == outcomes
