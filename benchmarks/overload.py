"""A real Airflow 3.3.2 under more triggers than it can take: what it makes of them, and what becomes of it.

One API process with Airflow's default database pool (5 and 10 more), its scheduler running, its API started
anew before each way. Without arguments, 2,000 triggers each, side by side:

- `naive`: the plain Celery task (`benchmarks.others.naive_app`), 2 workers of 64 threads;
- `session`: the same with a shared `requests.Session`, for 3 minutes at the most;
- `direct`: asyncio over kept-alive connections, with as many requests in flight as were found to be best;
- `relay`: Dagrelay, 2 worker processes of 64 threads, nothing else set.

What was made is what Airflow lists afterwards, by the number in each conf: `lost` were accepted, have no run,
and nobody still tries; `duplicates` are runs beyond one for a number; `open` were still tried at the end.
`per_s` counts from the call that handed all of them over to the last run's `queued_at`. 5xx are those in
Airflow's own log. `direct` and `relay` are done in turn, 1,000 triggers at a time (the speed of such a
machine changes by half within a minute), three times over by a new API server, and `naive` after each of
these; ratios are medians. `session` is measured once.

Each of these is a benchmark of its own, `make bench NAME=overload ARGS=--drop`, with a file of its own in
`results/`; `--all` is all of them, one after the other.

- `--drop`: `naive` and `relay` through a proxy that loses every tenth answer after the run was made;
- `--outage`: the API is killed for two minutes in the midst of 5,000 triggers that come at 100 a second;
- `--kill`: `kill -9` of a worker that holds all slots, and another goes on;
- `--cost`: what the slots cost a worker, and a trigger on an idle system (`DAGRELAY_SLOTS=off` beside it).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import redis

from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import TriggerRequest
from producers.settings import ProducerSettings
from tests.fake_airflow import FakeAirflow
from tests.plain_worker import cpu_s
from tests.worker import Worker

from ._direct import trigger_all
from ._drops import Drops
from ._report import Bound, interleaved, quantile, report, say
from ._target import Target
from ._ways import (
    CAP_S,
    THREADS,
    Found,
    Opened,
    Requests,
    account,
    direct,
    in_turn,
    measure,
    relay,
    relay_workers,
    stock,
    worker,
)
from .stub import Stub

TRIGGERS, ROUNDS, EACH = 2_000, 3, 1_000
SESSION_CAP_S = NAIVE_CAP_S = 180.0
TRIED, TRIES = (4, 6, 8, 12), 200

ARRIVING, ARRIVING_PER_S = 5_000, 100
KILLED_AFTER_S, OUTAGE_S = 15.0, 120.0

KILL_TRIGGERS, KILL_AFTER_S, WINDOW_S = 3_500, 12.0, 3.0

COST_TRIGGERS, COST_WARM_UP, COST_ROUNDS = 4_000, 500, 3
IDLE_CALLS, IDLE_WARM_UP, IDLE_PAUSE_S = 300, 30, 0.01


# Side by side


def side_by_side(folder: Path) -> int:
    """All four, 2,000 triggers each."""
    ids = [f"{name}_{number}" for name in ("naive", "direct", "relay") for number in range(ROUNDS)]
    with Target(folder, ["tried", "session", *ids]) as target:
        in_flight, tried = best_in_flight(target)
        numbers = range(TRIGGERS)
        ways: dict[str, Opened] = {"direct": direct(in_flight), "relay": relay()}
        naive = stock("trigger", NAIVE_CAP_S)
        found: dict[str, list[Found]] = {"naive": [], **{name: [] for name in ways}}
        for number in range(ROUNDS):
            dag_ids = {name: f"{name}_{number}" for name in ways}
            for name, one in in_turn(ways, target, dag_ids, numbers, EACH, folder).items():
                found[name].append(one)
            # By itself: with its 128 in flight it may leave an API that answers nobody.
            found["naive"].append(measure(naive, target, f"naive_{number}", numbers, folder, "naive"))
        session = measure(
            stock("trigger_session", SESSION_CAP_S), target, "session", numbers, folder, "session"
        )
    relays = found["relay"]
    ours = statistics.median(one.per_s for one in relays)

    def ratio(name: str) -> float:
        return statistics.median(
            mine.per_s / max(other.per_s, 0.1) for mine, other in zip(relays, found[name], strict=True)
        )

    figures = {
        "triggers": TRIGGERS,
        "ratio_vs_best_direct": round(ratio("direct"), 3),
        "ratio_vs_naive": round(ratio("naive"), 2),
        "ratio_vs_session": round(ours / max(session.per_s, 0.1), 1),
        "lost": sum(one.lost + one.open for one in relays),
        "duplicates": sum(one.duplicates for one in relays),
        "answers_5xx": sum(one.answers_5xx for one in relays),
        "per_s": ours,
        **{name: [asdict(one) for one in of_way] for name, of_way in found.items()},
        "session": asdict(session),
        "direct_in_flight": in_flight,
        "direct_tried_per_s": tried,
    }
    bounds = [
        Bound("ratio_vs_best_direct", at_least=0.95),
        Bound("ratio_vs_naive", at_least=1.3),
        Bound("ratio_vs_session", at_least=10),
        Bound("lost", at_most=0),
        Bound("duplicates", at_most=0),
        Bound("answers_5xx", at_most=0),
    ]
    return report("overload", figures, bounds)


def best_in_flight(target: Target) -> tuple[int, dict[str, float]]:
    """Try a few hundred triggers with each number of requests in flight, twice in turn; return the best."""
    url, token, first = f"{target.airflow.url}/api/v2/dags/tried/dagRuns", target.token(), 0
    rates: dict[int, list[float]] = {in_flight: [] for in_flight in TRIED}
    for _ in range(2):
        for in_flight, found in rates.items():
            began = time.monotonic()
            trigger_all(url, token, range(first, first + TRIES), in_flight, 60)
            found.append(TRIES / (time.monotonic() - began))
            first += TRIES
    means = {in_flight: statistics.mean(found) for in_flight, found in rates.items()}
    best = max(means, key=lambda in_flight: means[in_flight])
    say(f"direct, by requests in flight: {means}; best {best}")
    return best, {str(in_flight): round(rate, 1) for in_flight, rate in means.items()}


# Lost answers


def drop(folder: Path) -> int:
    """The plain task and ours, with every tenth answer lost after the run was made."""
    with Target(folder, ["naive", "relay"]) as target:
        numbers = range(TRIGGERS)
        found, dropped = {}, {}
        ways: dict[str, Callable[[Drops], Opened]] = {
            "naive": lambda proxy: stock("trigger", CAP_S, proxy),
            "relay": relay,
        }
        for name, way in ways.items():
            with Drops(target.airflow.url) as proxy:
                found[name] = measure(way(proxy), target, name, numbers, folder, name)
                made, dropped[name] = proxy.counts()
                say(f"{name}: {made} runs were made through the proxy, {dropped[name]} answers were lost")
    figures = {
        "triggers": TRIGGERS,
        "lost": found["relay"].lost + found["relay"].open,
        "duplicates": found["relay"].duplicates,
        "answers_5xx": found["relay"].answers_5xx,
        "answers_dropped": dropped["relay"],
        "naive_duplicates": found["naive"].duplicates,
        "naive_answers_dropped": dropped["naive"],
        "naive": asdict(found["naive"]),
        "relay": asdict(found["relay"]),
    }
    bounds = [
        Bound("lost", at_most=0),
        Bound("duplicates", at_most=0),
        Bound("answers_5xx", at_most=0),
        # Else it proved nothing.
        Bound("answers_dropped", at_least=TRIGGERS / 10),
        Bound("naive_duplicates", at_least=1),
    ]
    return report("overload_drop", figures, bounds)


# An outage


def outage(folder: Path) -> int:
    """Two minutes without Airflow, in the midst of 5,000 triggers."""
    with Target(folder, ["tried", "direct", "relay"]) as target:
        in_flight, _ = best_in_flight(target)
        best = measure(direct(in_flight), target, "direct", range(TRIGGERS), folder, "direct")
        target.restart()
        with Valkey() as valkey, relay_workers(valkey.url, target.airflow.conn_uri, folder) as workers:
            requests = Requests(valkey.url, "relay")
            arriving = threading.Thread(target=arrive, args=(requests,), daemon=True)
            arriving.start()
            wait_saying(requests, KILLED_AFTER_S, "arriving")
            say("Airflow's API is killed")
            target.airflow.kill_api()
            killed_at, cpu = time.time(), total_cpu_s(workers)
            arriving.join(ARRIVING / ARRIVING_PER_S + 60)
            if arriving.is_alive():
                raise RuntimeError("the triggers did not arrive at their rate")
            arrived_at, cpu_arrived = time.time(), total_cpu_s(workers)
            wait_saying(requests, killed_at + OUTAGE_S - time.time(), "Airflow is away")
            back_at, cpu_back = time.time(), total_cpu_s(workers)
            target.airflow.start_api()
            healthy_at = time.time()
            say(f"Airflow's API is back after {healthy_at - killed_at:.1f} s")
            log_size = target.log_size()
            trying = requests.wait(CAP_S, "relay")
            answers_5xx = target.answers_5xx(log_size)
            why = requests.why()
        made = target.runs("relay")
    found = account(made, range(ARRIVING), trying, why)
    drained = [at for at in made.times() if at > killed_at + OUTAGE_S / 2]
    waited = sum(1 for at in made.at.values() if at >= healthy_at)
    rate = middle_rate(drained)
    figures = {
        "triggers": ARRIVING,
        "made": found.made,
        "lost": found.lost + found.open,
        "duplicates": found.duplicates,
        "ratio_drain": round(rate / best.per_s, 3),
        "outage_cpu_percent": percent(cpu, cpu_back, back_at - killed_at),
        "outage_cpu_percent_arriving": percent(cpu, cpu_arrived, arrived_at - killed_at),
        "outage_cpu_percent_waiting": percent(cpu_arrived, cpu_back, back_at - arrived_at),
        "outage_s": round(healthy_at - killed_at, 1),
        "waited": waited,
        "first_after_s": round(drained[0] - healthy_at, 2) if drained else None,
        "drained_after_s": round(drained[-1] - healthy_at, 1) if drained else None,
        "drain_per_s": round(rate, 1),
        "direct_per_s": best.per_s,
        "answers_5xx_in_drain": answers_5xx,
        "why": found.why,
    }
    bounds = [
        Bound("made", at_least=ARRIVING),
        Bound("lost", at_most=0),
        Bound("duplicates", at_most=0),
        Bound("ratio_drain", at_least=0.9),
        Bound("outage_cpu_percent", at_most=5),
    ]
    return report("overload_outage", figures, bounds)


def arrive(requests: Requests) -> None:
    """Hand over the triggers, each at its time."""
    began = time.monotonic()
    for number in range(ARRIVING):
        time.sleep(max(0.0, began + number / ARRIVING_PER_S - time.monotonic()))
        requests.hand_over_one(number)


def wait_saying(requests: Requests, for_s: float, what: str) -> None:
    """Wait, and say every ten seconds how many have not ended."""
    deadline = time.monotonic() + for_s
    while (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(10.0, left_s))
        say(f"{what}: {requests.look()} have not ended")


def total_cpu_s(workers: Sequence[Worker]) -> float:
    return sum(cpu_s(one.pid) for one in workers)


def percent(before_s: float, after_s: float, of_s: float) -> float:
    """CPU seconds between two readings as a share of one core's time."""
    return round((after_s - before_s) / of_s * 100, 2)


def middle_rate(times: Sequence[float]) -> float:
    """Return the runs per second without the first and the last tenth: the rate that was reached."""
    tenth = len(times) // 10
    middle = times[tenth : len(times) - tenth]
    return (len(middle) - 1) / (middle[-1] - middle[0]) if len(middle) > 1 else 0.0


# A worker killed with all slots


def kill(folder: Path) -> int:
    """`kill -9` of the worker that holds all slots; how soon another is at full speed.

    The other one is ready and frozen until then, so that the first has every slot for itself.
    """
    with Target(folder, ["relay"]) as target, Valkey() as valkey:
        uri, numbers = target.airflow.conn_uri, range(KILL_TRIGGERS)
        with (
            worker(valkey.url, uri, folder, "first") as first,
            worker(valkey.url, uri, folder, "second") as second,
        ):
            requests = Requests(valkey.url, "relay")
            os.kill(second.pid, signal.SIGSTOP)
            try:
                requests.hand_over(numbers)
                wait_saying(requests, KILL_AFTER_S, "the first worker alone")
                held = until_all_slots(requests.redis)
                first.kill()
                killed_at = time.time()
            finally:
                os.kill(second.pid, signal.SIGCONT)
            say(f"killed with {held} slots")
            trying = requests.wait(CAP_S, "the second worker")
            why = requests.why()
        made = target.runs("relay")
    found = account(made, numbers, trying, why)
    times = made.times()
    before = sum(1 for at in times if killed_at - KILL_AFTER_S + 3 <= at < killed_at) / (KILL_AFTER_S - 3)
    figures = {
        "triggers": KILL_TRIGGERS,
        "full_speed_after_s": full_speed_after_s(times, killed_at, before),
        "lost": found.lost + found.open,
        "duplicates": found.duplicates,
        "slots_held_at_kill": held,
        "before_per_s": round(before, 1),
        "first_after_s": round(min((at for at in times if at > killed_at), default=0) - killed_at, 2),
        "per_s_after": [
            sum(1 for at in times if killed_at + second <= at < killed_at + second + 1)
            for second in range(20)
        ],
        "left_at_kill": sum(1 for at in times if at > killed_at),
        "all_made_after_s": round(times[-1] - killed_at, 1),
        "why": found.why,
    }
    bounds = [
        Bound("full_speed_after_s", at_most=15),
        Bound("lost", at_most=0),
        Bound("duplicates", at_most=0),
    ]
    return report("overload_kill", figures, bounds)


def until_all_slots(client: redis.Redis) -> int:
    """Wait until all slots are taken, for 5 s at the most; return how many are."""
    most, deadline = 0, time.monotonic() + 5
    while time.monotonic() < deadline:
        held = int(client.zcard("dagrelay:slots:default"))
        most = max(most, held)
        if held >= 8:
            return held
        time.sleep(0.001)
    return most


def full_speed_after_s(times: Sequence[float], since: float, per_s: float) -> float:
    """Return after how many seconds three seconds begin, with a run, that have nine tenths of that rate; 999
    for never."""
    for begin in times:
        if begin > since and sum(begin <= at < begin + WINDOW_S for at in times) >= 0.9 * per_s * WINDOW_S:
            return round(begin - since, 2)
    return 999.0


# What slots cost


def cost(folder: Path) -> int:
    """The CPU of a worker for each trigger, and how long one takes on an idle system, with and without slots.

    `free`: as many slots as threads. `scarce`: 8 slots for 64 threads, so that most triggers wait in line.
    """
    cases = {"free": THREADS, "scarce": 8}
    cpu_ms: dict[tuple[str, str], list[float]] = {(case, how): [] for case in cases for how in ("on", "off")}
    per_s: dict[tuple[str, str], list[float]] = {one: [] for one in cpu_ms}
    for number in range(COST_ROUNDS):
        for (case, how), into in cpu_ms.items():
            rate, cpu = backlog(folder, cases[case], how)
            into.append(cpu)
            per_s[case, how].append(rate)
            say(f"round {number + 1} of {COST_ROUNDS}: {case}, slots {how}: {rate:.0f}/s, {cpu:.3f} CPU-ms")
    idle_ms = idle(folder)
    figures: dict[str, Any] = {
        f"{case}_slots_cpu_ms": round(
            statistics.median(
                on - off for on, off in zip(cpu_ms[case, "on"], cpu_ms[case, "off"], strict=True)
            ),
            3,
        )
        for case in cases
    }
    figures["idle_slots_p50_ms"] = round(quantile(idle_ms["on"], 0.5) - quantile(idle_ms["off"], 0.5), 2)
    for how in ("on", "off"):
        figures |= {f"{case}_{how}_cpu_ms": round(statistics.median(cpu_ms[case, how]), 3) for case in cases}
        figures |= {f"{case}_{how}_per_s": round(statistics.median(per_s[case, how])) for case in cases}
        figures |= {
            f"idle_{how}_p50_ms": round(quantile(idle_ms[how], 0.5), 2),
            f"idle_{how}_p99_ms": round(quantile(idle_ms[how], 0.99), 2),
        }
    bounds = [
        Bound("free_slots_cpu_ms", at_most=1.5),
        Bound("scarce_slots_cpu_ms", at_most=1.5),
        Bound("idle_slots_p50_ms", at_most=2),
    ]
    return report("overload_cost", figures, bounds)


def backlog(folder: Path, max_in_flight: int, slots: str) -> tuple[float, float]:
    """Have one worker do a backlog at an Airflow that takes 20 ms; return triggers per second and CPU-ms."""
    with Valkey() as valkey, Stub() as stub:
        requests = Requests(valkey.url, "daily_sales")
        requests.hand_over(range(COST_TRIGGERS + COST_WARM_UP))
        uri = stub.conn_uri(max_in_flight=max_in_flight)
        with worker(valkey.url, uri, folder, "cost", slots) as one:
            first = stub.wait_for(COST_WARM_UP)
            cpu = cpu_s(one.pid)
            stub.wait_for(COST_TRIGGERS + COST_WARM_UP)
            cpu = cpu_s(one.pid) - cpu
            count, began, ended = stub.posts(COST_WARM_UP)
            if trying := requests.wait(30, "cost"):
                raise RuntimeError(f"{len(trying)} requests have not ended")
        if count != COST_TRIGGERS + COST_WARM_UP:
            raise RuntimeError(f"{count} POSTs came for {COST_TRIGGERS + COST_WARM_UP} triggers")
    return COST_TRIGGERS / (ended - began), cpu / (count - first) * 1000


def idle(folder: Path) -> dict[str, list[float]]:
    """Return the milliseconds from `.delay()` until the POST has come, of many on an idle system, in turn."""
    with contextlib.ExitStack() as parts:
        airflow = parts.enter_context(FakeAirflow())
        ways: dict[str, Callable[[], float]] = {}
        for slots in ("on", "off"):
            valkey = parts.enter_context(Valkey())
            parts.enter_context(worker(valkey.url, airflow.conn_uri, folder, f"idle-{slots}", slots))
            relay = RelayClient(ProducerSettings(redis_url=valkey.url, client_name="benchmark"))

            def until_it_arrives(relay: RelayClient = relay) -> float:
                before, began = len(airflow.post_times), time.time()
                handle = relay.enqueue(TriggerRequest("daily_sales", conf={"n": 1}))
                while len(airflow.post_times) == before:
                    time.sleep(0.0002)
                    if time.time() - began > 30:
                        raise TimeoutError("a trigger has not come after 30 s")
                handle.get(timeout=30)
                time.sleep(IDLE_PAUSE_S)
                return (airflow.post_times[before] - began) * 1000

            ways[slots] = until_it_arrives
        say(f"idle: {IDLE_CALLS} calls of each, after {IDLE_WARM_UP} to warm up")
        interleaved(IDLE_WARM_UP, ways)
        return interleaved(IDLE_CALLS, ways)


PARTS: dict[str, Callable[[Path], int]] = {
    "side_by_side": side_by_side,
    "drop": drop,
    "outage": outage,
    "kill": kill,
    "cost": cost,
}


def main() -> int:
    """Measure and report what was asked for."""
    parser = argparse.ArgumentParser(description="A real Airflow under more triggers than it can take.")
    for name in list(PARTS)[1:]:
        parser.add_argument(f"--{name}", dest="parts", action="append_const", const=name)
    parser.add_argument("--all", dest="parts", action="store_const", const=list(PARTS))
    worst = 0
    for name in parser.parse_args().parts or ["side_by_side"]:
        with tempfile.TemporaryDirectory() as folder:
            worst = max(worst, PARTS[name](Path(folder)))
    return worst


if __name__ == "__main__":
    sys.exit(main())
