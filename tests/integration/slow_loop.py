"""A worker of the tests whose event loop stands still once, as its heartbeat is due: see `asked`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery.signals import heartbeat_sent


@heartbeat_sent.connect
def asked(**_: Any) -> None:
    """Where there is a file `asked`, stand still before the heartbeat is published, until it is gone."""
    folder = Path(os.environ["SLOW_LOOP"])
    if (folder / "asked").exists():
        (folder / "begun").touch()
        while (folder / "asked").exists():
            time.sleep(0.02)
