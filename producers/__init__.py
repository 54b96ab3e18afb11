"""Start Airflow DAG runs from any Python service, exactly once, whatever fails on the way.

::

    from producers import trigger_dag

    handle = trigger_dag.delay("daily_sales", conf={"day": "2026-11-20"}, key="sales-2026-11-20")
    run = handle.get(timeout=60)

`poll_external_job` starts a job on another service and follows it until it ends.

`fan_out` starts thousands of runs at once, with one callback for all of their outcomes.

`DAGRELAY_REDIS_URL`, or `configure(redis_url=...)`, names the Redis of Dagrelay's workers. This package
neither needs nor touches the host's own Celery app.

Nothing is loaded before it is asked for: an Airflow imports this package in each of its processes, each
task's among them, only to read which operators there are.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import RelayClient, client, configure, resolve_conf
    from .contract import Call, DagRun, Find, JobOutcome, Outcome, PollRequest, Submit, TriggerRequest
    from .errors import (
        AirflowError,
        BrokerUnavailable,
        ConfGone,
        ConfigurationError,
        ConfKeyMissing,
        ConfUnreadable,
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
    "ConfGone",
    "ConfKeyMissing",
    "ConfUnreadable",
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
    "resolve_conf",
    "trigger_dag",
]

_NAMES_IN = {
    "client": ("RelayClient", "client", "configure", "resolve_conf"),
    "contract": (
        "Call",
        "DagRun",
        "Find",
        "JobOutcome",
        "Outcome",
        "PollRequest",
        "Submit",
        "TriggerRequest",
    ),
    "errors": (
        "AirflowError",
        "BrokerUnavailable",
        "ConfGone",
        "ConfKeyMissing",
        "ConfUnreadable",
        "ConfigurationError",
        "DagrelayError",
        "DagRunFailed",
        "DagRunGone",
        "DagRunOverdue",
        "ExternalJobError",
        "ExternalJobFailed",
        "ExternalJobGone",
        "ExternalJobOverdue",
        "ExternalJobSilent",
        "ExternalJobUnreadable",
        "FanOutBroken",
        "InvalidRequest",
        "RequestCancelled",
        "RequestUnknown",
        "ResultExpired",
        "ResultNotReady",
        "SubmitRejected",
        "SubmitUnknown",
    ),
    "fan_out": ("FanOut", "afan_out", "fan_out"),
    "handle": ("Handle",),
    "stubs": ("poll_external_job", "register_relay", "trigger_dag"),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}


class _Package(ModuleType):
    """This package, with names that come when they are asked for."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{self.__name__}.{_MODULE_OF[name]}"), name)
        setattr(self, name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        # The modules `client` and `fan_out` hold functions of these names, and whoever imports a module puts
        # it in the function's place.
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
