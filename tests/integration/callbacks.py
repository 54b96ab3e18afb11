"""A host's Celery app that has no result backend: its task keeps what a fan-out tells it.

`celery -A tests.integration.callbacks worker`, its Redis in CALLBACKS_URL.
"""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery
from redis import Redis

app: Celery[Any] = Celery("host", broker=os.environ.get("CALLBACKS_URL", "memory://"))
app.conf.broker_connection_retry_on_startup = True


@app.task(name="host.collect", bind=True)
def collect(self: Any, outcomes: Any, name: str) -> None:
    """Keep what it was called with."""
    told = json.dumps([self.request.id, outcomes])
    Redis.from_url(os.environ["CALLBACKS_URL"]).rpush(f"collected:{name}", told)
