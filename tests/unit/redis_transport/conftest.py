"""The workers' code reads its settings when it is imported."""

import os

os.environ.setdefault("DAGRELAY_REDIS_URL", "redis://127.0.0.1:1/0")
