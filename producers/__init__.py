"""Start Airflow DAG runs from any Python service, exactly once, whatever fails on the way.

::

    from producers import trigger_dag

    handle = trigger_dag.delay("daily_sales", conf={"day": "2026-11-20"}, key="sales-2026-11-20")
    run = handle.get(timeout=60)

`DAGRELAY_REDIS_URL`, or `configure(redis_url=...)`, names the Redis of Dagrelay's workers. This package
neither needs nor touches the host's own Celery app.
"""

from .client import RelayClient, client, configure
from .contract import DagRun, TriggerRequest
from .errors import (
    AirflowError,
    BrokerUnavailable,
    ConfigurationError,
    DagrelayError,
    InvalidRequest,
    NotSupportedYet,
    RequestCancelled,
    RequestUnknown,
    ResultExpired,
    ResultNotReady,
)
from .handle import Handle
from .stubs import poll_external_job, register_relay, trigger_dag

__all__ = [
    "AirflowError",
    "BrokerUnavailable",
    "ConfigurationError",
    "DagRun",
    "DagrelayError",
    "Handle",
    "InvalidRequest",
    "NotSupportedYet",
    "RelayClient",
    "RequestCancelled",
    "RequestUnknown",
    "ResultExpired",
    "ResultNotReady",
    "TriggerRequest",
    "client",
    "configure",
    "poll_external_job",
    "register_relay",
    "trigger_dag",
]
