"""Start Airflow DAG runs from any Python service, exactly once, whatever fails on the way.

::

    from producers import trigger_dag

    handle = trigger_dag.delay("daily_sales", conf={"day": "2026-11-20"}, key="sales-2026-11-20")
    run = handle.get(timeout=60)

`poll_external_job` starts a job on another service and follows it until it ends.

`fan_out` starts thousands of runs at once, with one callback for all of their outcomes.

`DAGRELAY_REDIS_URL`, or `configure(redis_url=...)`, names the Redis of Dagrelay's workers. This package
neither needs nor touches the host's own Celery app.
"""

from .client import RelayClient, client, configure
from .contract import Call, DagRun, Find, JobOutcome, Outcome, PollRequest, Submit, TriggerRequest
from .errors import (
    AirflowError,
    BrokerUnavailable,
    ConfigurationError,
    DagrelayError,
    DagRunFailed,
    DagRunGone,
    DagRunOverdue,
    ExternalJobError,
    ExternalJobFailed,
    ExternalJobGone,
    ExternalJobOverdue,
    ExternalJobSilent,
    ExternalJobUnreadable,
    FanOutBroken,
    InvalidRequest,
    RequestCancelled,
    RequestUnknown,
    ResultExpired,
    ResultNotReady,
    SubmitRejected,
    SubmitUnknown,
)
from .fan_out import FanOut, afan_out, fan_out
from .handle import Handle
from .stubs import poll_external_job, register_relay, trigger_dag

__all__ = [
    "AirflowError",
    "BrokerUnavailable",
    "Call",
    "ConfigurationError",
    "DagRun",
    "DagRunFailed",
    "DagRunGone",
    "DagRunOverdue",
    "DagrelayError",
    "ExternalJobError",
    "ExternalJobFailed",
    "ExternalJobGone",
    "ExternalJobOverdue",
    "ExternalJobSilent",
    "ExternalJobUnreadable",
    "FanOut",
    "FanOutBroken",
    "Find",
    "Handle",
    "InvalidRequest",
    "JobOutcome",
    "Outcome",
    "PollRequest",
    "RelayClient",
    "RequestCancelled",
    "RequestUnknown",
    "ResultExpired",
    "ResultNotReady",
    "Submit",
    "SubmitRejected",
    "SubmitUnknown",
    "TriggerRequest",
    "afan_out",
    "client",
    "configure",
    "fan_out",
    "poll_external_job",
    "register_relay",
    "trigger_dag",
]
