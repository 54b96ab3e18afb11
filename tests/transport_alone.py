"""Makes `tasks.redis_transport` importable by itself.

It lies in the package `tasks`, whose `__init__` makes the worker's app: that reads settings and takes over
the logging. After `make_importable()` the package is only a name and a path, as if the transport were
published by itself. Not for a process that needs our app.
"""

from __future__ import annotations

import sys
from types import ModuleType

from local.process import ROOT


def make_importable() -> None:
    """Have `import tasks.redis_transport` import that and nothing else of `tasks`."""
    if "tasks" not in sys.modules:
        package = ModuleType("tasks")
        package.__path__ = [str(ROOT / "tasks")]
        sys.modules["tasks"] = package
