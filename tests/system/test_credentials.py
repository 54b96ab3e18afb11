"""Credentials go stale, are wrong, are mended: what waits for them goes through afterwards, once."""

from __future__ import annotations

import json
import secrets
from itertools import pairwise

import requests

from tests.system.stack import only, until


@only("3")
def test_tokens_that_expire_or_lose_their_signature_are_renewed_unseen(stack, airflow):
    proxy = stack.proxy()
    worker = stack.start_worker(proxy.conn_uri(airflow.username, airflow.password))
    assert stack.trigger({"dag_id": "quiet", "key": "token-0"})["run"]["created"]
    logins = sum(call.logs_in for call in proxy.calls)
    assert logins == 1

    airflow.extra_env["AIRFLOW__API_AUTH__JWT_EXPIRATION_TIME"] = "2"
    airflow.extra_env["AIRFLOW__API_AUTH__JWT_LEEWAY"] = "0"
    try:
        airflow.restart_api(jwt_secret=secrets.token_hex(64))
    finally:
        airflow.extra_env.clear()  # the next start has them as they were

    # The running worker's token has a signature that nobody knows any more: 403, a login, and once more.
    said = stack.trigger(*({"dag_id": "quiet", "key": f"token-{n}"} for n in range(1, 9)), threads=4)
    assert all(one["run"]["created"] for one in said)
    refused = [call for call in proxy.made() if call.status == 403]
    assert refused
    until(lambda: "logging in again" in worker.text(), "told")
    stale = next(call.authorization for call in reversed(proxy.made()) if call.status == 200)

    until(lambda: answer_to(airflow, stale) == 401, "expired by Airflow's own word", every_s=0.5)
    logins = sum(call.logs_in for call in proxy.calls)
    assert stack.trigger({"dag_id": "quiet", "key": "token-9"})["run"]["created"]
    assert sum(call.logs_in for call in proxy.calls) == logins + 1

    assert {f"relay__token-{n}" for n in range(10)} <= airflow.run_ids("quiet")
    assert [call.status for call in proxy.made()].count(200) == 10
    assert "held" not in worker.text()


def test_refused_credentials_hold_the_connection_until_the_worker_has_better_ones(stack, airflow):
    proxy = stack.proxy()
    good, bad = (proxy.conn_uri(airflow.username, word) for word in (airflow.password, "canary-wrong-pw"))
    worker = stack.start_worker(bad, DAGRELAY_HOLD_PROBE_S="3")
    before = airflow.run_ids("quiet")
    ids = stack.hand_over(*({"dag_id": "quiet", "key": f"held-{n}"} for n in range(3)))
    until(lambda: all(stack.record(one).get("state") == "waiting" for one in ids), "all waiting")
    # What was in flight has come back: from here on there is nothing but probes.
    held = until(lambda: hold_of(stack), "held, with nothing in flight")
    asked = len(proxy.calls)
    assert held["held_reason"]
    until(lambda: any("held" in line and "ERROR" in line for line in worker.text().splitlines()), "told")
    status = stack.status(ids[0])
    assert status["state"] == "waiting"
    assert "credentials" in status["waits_for"]

    ids += stack.hand_over({"dag_id": "quiet", "key": "held-3"})
    until(lambda: stack.record(ids[-1]).get("state") == "waiting", "waiting as well")
    # Nobody asks that Airflow anything until it is time to find out, and then one does.
    until(lambda: len(proxy.calls) >= asked + 3, "probed again")
    probes = [call.at for call in proxy.calls[asked:]]
    assert all(later - one >= 3 for one, later in pairwise(probes)), probes
    assert not any(call.makes_run for call in proxy.calls[asked:])
    assert len({call.path for call in proxy.calls[asked:]}) == 1
    for text in (worker.text(), json.dumps(status), json.dumps(held)):
        assert "canary" not in text

    worker.stop()
    stack.start_worker(good, name="w2")
    said = stack.outcomes(ids, 90)
    assert all(one["run"]["created"] for one in said)
    assert airflow.run_ids("quiet") - before == {f"relay__held-{n}" for n in range(4)}
    stack.account(ids, "quiet")


def test_a_password_mended_in_airflow_ends_the_hold_by_itself(stack, airflow):
    new = "mended-" + secrets.token_hex(4)
    proxy = stack.proxy()
    stack.start_worker(proxy.conn_uri(airflow.username, new))
    ids = stack.hand_over(*({"dag_id": "quiet", "key": f"mended-{n}"} for n in range(3)))
    until(lambda: all(stack.record(one).get("state") == "waiting" for one in ids), "all waiting")

    airflow.take_password(new)
    try:
        said = stack.outcomes(ids, 60)
    finally:
        airflow.take_password(airflow.password)

    assert all(one["run"]["created"] for one in said)
    assert stack.redis.hget("dagrelay:airflow:default", "held") == ""


def hold_of(stack):
    """What is known of a held connection, once nobody has a slot of it any more; else nothing."""
    found = stack.redis.hgetall("dagrelay:airflow:default")
    held = found.get("held") == "credentials"
    return found if held and not stack.redis.exists("dagrelay:slots:default") else None


def answer_to(airflow, authorization):
    answer = requests.get(
        f"{airflow.url}/api/v2/dags?limit=1", headers={"Authorization": authorization}, timeout=30
    )
    return answer.status_code
