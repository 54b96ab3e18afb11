"""Flower's settings, loaded by `celery -A tasks flower --conf=flowerconfig.py`.

Flower shows dag ids, run ids and keys, and can revoke tasks and stop workers: nobody gets in without a login,
and Flower does not start without a password, unless somebody says that this is meant.

    DAGRELAY_FLOWER_USER            default "dagrelay"
    DAGRELAY_FLOWER_PASSWORD        or
    DAGRELAY_FLOWER_PASSWORD_FILE   a file that holds it (a container's secret)
    DAGRELAY_FLOWER_NO_AUTH         "true": no login. For a demo on loopback
    DAGRELAY_FLOWER_ADDRESS         default 127.0.0.1
    DAGRELAY_FLOWER_PORT            default 5555

They come by the environment or a file and never by the command line, which every user of the machine can
read. Behind the login is everything but /healthcheck, which says "OK" and nothing else and stays open for
probes, and the style sheets below /static. TLS: put a proxy in front, or give --certfile and --keyfile.

Every name here that is one of Flower's options sets it; an option on the command line wins over this file.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from celery.events.state import Task
from flower.views.monitor import Metrics
from tornado.web import authenticated

from producers.settings import read_value

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "")


def read_settings(environ: dict[str, str]) -> dict[str, object]:
    """Return Flower's options from the environment. Prints every mistake by name, and ends."""
    mistakes: list[str] = []

    user = environ.get("DAGRELAY_FLOWER_USER") or "dagrelay"
    if ":" in user or not user.isascii():
        mistakes.append("DAGRELAY_FLOWER_USER: ASCII without ':', which ends the user name in a login")

    no_auth = environ.get("DAGRELAY_FLOWER_NO_AUTH", "").strip().lower()
    if no_auth not in YES + NO:
        mistakes.append("DAGRELAY_FLOWER_NO_AUTH: true or false")

    unreadable: list[str] = []
    password = read_value(environ, "DAGRELAY_FLOWER_PASSWORD", unreadable) or ""
    mistakes += unreadable
    if password and no_auth in YES:
        mistakes.append("DAGRELAY_FLOWER_NO_AUTH=true and a password are both set: give one")
    elif not password and no_auth in NO and not unreadable:
        mistakes.append(
            "DAGRELAY_FLOWER_PASSWORD or DAGRELAY_FLOWER_PASSWORD_FILE is missing or empty "
            "(DAGRELAY_FLOWER_NO_AUTH=true if Flower is meant to be open)"
        )
    if not (password.isascii() and password.isprintable()):
        # Flower 2.2 compares with hmac.compare_digest, which takes ASCII only: every login would be a 500.
        mistakes.append("the password of Flower: printable ASCII on one line")

    port_text = environ.get("DAGRELAY_FLOWER_PORT") or "5555"
    if not (port_text.isascii() and port_text.isdecimal() and int(port_text) <= 65535):
        mistakes.append("DAGRELAY_FLOWER_PORT: a number from 0 (any free one) to 65535")

    if mistakes:
        for mistake in mistakes:
            print(f"dagrelay: {mistake}", file=sys.stderr)  # noqa: T201 - there is no log yet
        raise SystemExit(78)  # EX_CONFIG, as the worker
    return {
        "port": int(port_text),
        "address": environ.get("DAGRELAY_FLOWER_ADDRESS") or "127.0.0.1",
        # A list, because Flower splits a string at its commas.
        "basic_auth": [f"{user}:{password}"] if password else [],
    }


globals().update(read_settings(dict(os.environ)))

# 8 KB each are 160 MB; Flower's default of 100 000 would be 800 MB.
max_tasks = 20_000
# kwargs hold what `TriggerRequest.shown` lets be seen: dag id, run id and key; of a conf names and size only.
tasks_columns = "name,uuid,state,args,kwargs,received,started,runtime,worker"
# Kept in memory only: Flower's database is a pickle, and the records in Redis have the history.
persistent = False

# Flower 2.2 serves /metrics to everybody: of all its pages only this one lacks the check that others have.
# `tests/integration/test_flower.py` asks every page without a login, so that no new one slips through.
if not hasattr(Metrics.get, "__wrapped__"):
    Metrics.get = authenticated(Metrics.get)


class WaitingState(str):
    """The state of a task that waits, as a page shows it.

    Flower offers "Revoke" for RETRY and RECEIVED, and for no state that it does not know: this one says that
    it is RETRY when it is compared.
    """

    def __eq__(self, other: object) -> bool:
        return other == "RETRY" or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def format_task(task: Any) -> Any:
    """Called by Flower with a copy of what a page is to show."""
    if task.state.startswith("WAITING"):
        task.state = WaitingState(task.state)
        task.progress_at_last_change = task.progress or None
    task.progress = None
    return task


# What a waiting task says of the outside job (`tasks.waiting.show_waiting`), and the row of its page. It says
# so when the job's state changes, and not when its progress does: `dagrelay status` has the newest.
_shown: Any = Task
for _name in ("progress", "progress_at_last_change"):
    if _name not in _shown._fields:
        setattr(_shown, _name, None)
        _shown._fields = (*_shown._fields, _name)
