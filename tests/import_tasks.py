"""Import this before `tasks` in a test without a worker: `tasks` reads its settings when it is imported.

Nothing connects to Redis by being imported, and the environment is left as it was.
"""

import os

_GIVEN = os.environ.get("DAGRELAY_REDIS_URL")
os.environ.setdefault("DAGRELAY_REDIS_URL", "redis://127.0.0.1:1/0")
import tasks  # noqa: E402, F401

if _GIVEN is None:
    del os.environ["DAGRELAY_REDIS_URL"]
