"""Run by Airflow's Python, with our wheel beside it: says as JSON what Airflow makes of our provider.

`metadata`: what it lists. `parse`: what a DAG file with our operators loads that Airflow had not loaded.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
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


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"metadata": metadata, "parse": parse}[sys.argv[1]]()) + "\n")
