"""Ask for a DAG run over a Redis Stream from Python, without the package `dagrelay`: redis-py alone.

    python stream.py '{"dag_id": "daily_sales", "conf": {"day": "2026-11-20"}, "key": "2026-11-20"}'

Prints the entry's id. Settings: REDIS_URL, STREAM. Where `dagrelay` can be installed,
`producers.trigger_dag.delay(...)` is shorter, and checks the request before it leaves.
"""

import json
import os
import sys

import redis

client = redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"), decode_responses=True)
message = json.loads(sys.argv[1])
print(client.xadd(os.environ.get("STREAM", "dag-triggers"), {"data": json.dumps(message)}))
