"""The operators of Dagrelay, in one place to import them from."""

from .dag_runs import RelayFanOutOperator, RelayTriggerDagRunOperator
from .external_job import ExternalJobOperator

__all__ = ["ExternalJobOperator", "RelayFanOutOperator", "RelayTriggerDagRunOperator"]
