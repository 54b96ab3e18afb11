"""`tasks` reads its settings when it is imported; nothing here connects to Redis."""

import os

with_redis = "DAGRELAY_REDIS_URL" in os.environ
os.environ.setdefault("DAGRELAY_REDIS_URL", "redis://127.0.0.1:1/0")
import tasks.airflow.client  # noqa: E402, F401

if not with_redis:
    del os.environ["DAGRELAY_REDIS_URL"]
