"""The plug-in: the TCP door beside the component that `DAGRELAY_PLUGIN_COMPONENT` names; off by default.

Every process of an Airflow loads this module, each task's own among them, so it imports next to nothing. Only
the components that fork a process for each task, or for each DAG file that is read, import our operators as
they start: a fork has them then, where it would take 0.1 s of CPU each time.

Where any plug-in has a listener Airflow refuses every DAG that has a task with `end_from_trigger=True`,
whoever's it is. So a process that reads DAGs has none of ours: only a component has, until it has started.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from contextlib import suppress
from importlib import import_module
from multiprocessing import parent_process
from typing import Any, ClassVar, Final

from airflow.listeners import hookimpl
from airflow.plugins_manager import AirflowPlugin

from .door import COMPONENT, COMPONENTS, Door, component_of

log = logging.getLogger(__name__)


FORKING: Final = ("scheduler", "dag-processor")


class Preload:
    """Imports what forks of this process need. Raises nothing."""

    @hookimpl  # type: ignore[untyped-decorator]
    def on_starting(self, component: Any) -> None:
        """Import our operators, where this process forks those that run or read them."""
        leave(self)
        if component_of(sys.argv) not in FORKING:
            return
        try:
            import_module("producers.airflow.operators")
        except Exception as exc:  # noqa: BLE001 - whoever needs them hears of it
            log.warning("our operators cannot be imported (%s: %s)", type(exc).__name__, exc)


class DoorListener:
    """Starts the door, and has it end with this process. Raises nothing: Airflow would end of it."""

    @hookimpl  # type: ignore[untyped-decorator]
    def on_starting(self, component: Any) -> None:
        """Start the door, if this process is the component that is meant.

        Airflow does not say which component starts, so its command line does.
        """
        leave(self)
        named, mine = os.environ.get(COMPONENT, ""), component_of(sys.argv)
        if named not in COMPONENTS:
            log.error("no TCP door: %s=%r is none of %s", COMPONENT, named, ", ".join(COMPONENTS))
        elif named == mine:
            door = Door(mine)
            door.start()
            atexit.register(door.stop)  # which does nothing in forks


def leave(listener: Any) -> None:
    """Have a listener be none any more, in this process and in its forks."""
    with suppress(Exception):
        from airflow.listeners.listener import get_listener_manager

        DagrelayPlugin.listeners.remove(listener)
        get_listener_manager().pm.unregister(listener)


def of_this_process() -> list[Any]:
    """Return the listeners of this process: none but of a component, and none of what it has made of itself.

    What it spawns, as executors and parsers may be, has the same command line.
    """
    if component_of(sys.argv) not in COMPONENTS or parent_process() is not None:
        return []
    return [Preload(), *([DoorListener()] if os.environ.get(COMPONENT) else [])]


class DagrelayPlugin(AirflowPlugin):  # type: ignore[misc]
    """Registers no door where no component is named."""

    name = "dagrelay"
    listeners: ClassVar = of_this_process()
