"""Run by Airflow's Python, with our wheel beside it: says as JSON what Airflow makes of our provider.

`metadata`: what it lists. `parse`: what a DAG file with our operators loads that Airflow had not loaded.
`connection`: what is made of an Airflow connection, beside what the environment says.
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib import import_module
from os import environ
from typing import Any


def metadata() -> dict[str, Any]:
    from airflow.providers_manager import ProvidersManager

    manager = ProvidersManager()
    info = manager.providers["dagrelay"].data
    hook = manager.hooks["dagrelay"]
    ours = {
        name: widget
        for name, widget in manager.connection_form_widgets.items()
        if name.startswith("extra__dagrelay__")
    }
    modules = [
        module
        for kind in ("operators", "sensors", "hooks", "triggers")
        for entry in info[kind]
        for module in entry["python-modules"]
    ]
    for module in modules:
        import_module(module)
    return {
        "modules": modules,
        "hook": [hook.hook_class_name, hook.connection_id_attribute_name, hook.hook_name],
        "fields": sorted(ours),
        "hidden": sorted(name for name, widget in ours.items() if widget.is_sensitive),
        "behaviour": manager.field_behaviours["dagrelay"],
        "links": [name for name in manager.extra_links_class_names if name.startswith("producers.")],
    }


def parse() -> list[str]:
    import_module("airflow.models.dagbag")
    before = set(sys.modules)
    for name in ("operators", "sensors", "conf", "task_instances"):
        import_module(f"producers.airflow.{name}")
    return sorted(set(sys.modules) - before)


def connection() -> dict[str, Any]:
    from producers.airflow.hook import DagrelayHook

    environ["DAGRELAY_CONF_KEY"] = KEY
    extra = {"flower_url": "https://flower/", "airflow_name": "north", "conf_limit_bytes": 7}
    own = {"conn_type": "dagrelay", "host": "redis", "login": "af", "password": "p/4", "extra": extra}
    environ["AIRFLOW_CONN_NORTH"] = json.dumps(own)
    extra = {"redis_url": "rediss://af:s3cret%2Fpass@redis:7/2", "conf_key": OTHER_KEY}
    environ["AIRFLOW_CONN_SOUTH"] = json.dumps({"conn_type": "dagrelay", "extra": extra})
    environ["AIRFLOW_CONN_WRONG"] = json.dumps({"conn_type": "http", "extra": {"flower": "x"}})
    north, south = (DagrelayHook(name).target for name in ("north", "south"))
    wrong = []
    for name in ("wrong", "nowhere"):
        try:
            DagrelayHook(name).target  # noqa: B018 - it is what raises
        except Exception as exc:  # noqa: BLE001
            wrong.append(f"{type(exc).__name__}: {exc}")
    return {
        "north": [
            north.settings.redis_url,
            north.flower_url,
            north.airflow_name,
            north.settings.conf_limit_bytes,
        ],
        "keys": [north.settings.conf_key == KEY, south.settings.conf_key == OTHER_KEY],
        "south": south.settings.redis_url,
        "wrong": wrong,
        "asked": asyncio.run(asked_by(1000)),
        "masked": redact(f"{OTHER_KEY} s3cret/pass"),
    }


async def asked_by(triggers: int) -> int:
    """Return how often Airflow is asked for the connection of so many triggers."""
    from producers.airflow.hook import DagrelayHook

    asked = 0

    class Counting(DagrelayHook):
        async def _ask(self) -> Any:
            nonlocal asked
            asked += 1
            return await super()._ask()

    found = await asyncio.gather(*(Counting("north").atarget() for _ in range(triggers)))
    assert {one.airflow_name for one in found} == {"north"}
    return asked


def redact(text: str) -> str:
    try:
        from airflow.sdk._shared.secrets_masker import redact as hide
    except ImportError:  # Airflow 2
        from airflow.utils.log.secrets_masker import redact as hide
    return str(hide(text))


KEY = "a2V5LWtleS1rZXkta2V5LWtleS1rZXkta2V5LWtleTE="
OTHER_KEY = "a2V5LWtleS1rZXkta2V5LWtleS1rZXkta2V5LWtleTI="

if __name__ == "__main__":
    said = {"metadata": metadata, "parse": parse, "connection": connection}[sys.argv[1]]()
    sys.stdout.write(json.dumps(said) + "\n")
