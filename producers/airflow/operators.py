"""The operators of Dagrelay, in one place to import them from."""

from .dag_runs import RelayFanOutOperator, RelayTriggerDagRunOperator

__all__ = ["RelayFanOutOperator", "RelayTriggerDagRunOperator"]
