"""The plug-in: the TCP door beside the component that `DAGRELAY_PLUGIN_COMPONENT` names; off by default.

Every process of an Airflow loads this module, each task's own among them, so it imports next to nothing. Only
the components that fork a process for each task, or for each DAG file that is read, import our operators as
they start: a fork has them then, where it would take 0.1 s of CPU each time.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
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
        if component_of(sys.argv) not in FORKING:
            return
        try:
            import_module("producers.airflow.operators")
        except Exception as exc:  # noqa: BLE001 - whoever needs them hears of it
            log.warning("our operators cannot be imported (%s: %s)", type(exc).__name__, exc)


class DoorListener:
    """What Airflow tells of its components' beginnings and ends. Raises nothing: Airflow would end of it."""

    def __init__(self) -> None:
        self.door: Door | None = None

    @hookimpl  # type: ignore[untyped-decorator]
    def on_starting(self, component: Any) -> None:
        """Start the door, once, if this process is the component that is meant.

        Airflow does not say which component starts, so its command line does. Forks of this process (workers
        of the executor, and in Airflow 2 their tasks) have the same one, and the door already.
        """
        named, mine = os.environ.get(COMPONENT, ""), component_of(sys.argv)
        if self.door is not None or mine not in COMPONENTS:
            return
        if named not in COMPONENTS:
            log.error("no TCP door: %s=%r is none of %s", COMPONENT, named, ", ".join(COMPONENTS))
        elif named == mine:
            self.door = Door(mine)
            self.door.start()

    @hookimpl  # type: ignore[untyped-decorator]
    def before_stopping(self, component: Any) -> None:
        """End the door; does nothing in forks of its host."""
        if self.door is not None:
            self.door.stop()


class DagrelayPlugin(AirflowPlugin):  # type: ignore[misc]
    """Registers no door where no component is named."""

    name = "dagrelay"
    listeners: ClassVar = [Preload(), *([DoorListener()] if os.environ.get(COMPONENT) else [])]
