"""Says what conf reached its task: whole while it is small, and always its size and digest.

With {"fail": true} in its conf it fails.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

try:
    from airflow.sdk import dag, get_current_context, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
    from airflow.operators.python import get_current_context


@dag(dag_id="echo", schedule=None, catchup=False)
def echo() -> None:
    @task
    def say() -> dict[str, Any]:
        conf = get_current_context()["dag_run"].conf or {}
        if conf.get("fail"):
            raise ValueError("as the conf says")
        text = json.dumps(conf, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
        digest = hashlib.sha256(text).hexdigest()
        return {"conf": conf if len(text) < 2000 else None, "bytes": len(text), "sha256": digest}

    say()


echo()
