"""Programs that make what tests read. Not tests themselves."""

import os

# `tasks` reads its settings when it is imported; nothing here connects to Redis.
os.environ.setdefault("DAGRELAY_REDIS_URL", "redis://127.0.0.1:1/0")
