"""The real conf of a run, in a DAG: also where it went by reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..contract import is_sealed, reference_in


def relay_conf(
    context: Mapping[str, Any] | None = None, *, relay_conn_id: str = "dagrelay_default"
) -> dict[str, Any]:
    """Return the conf of the run that a task belongs to, as the caller gave it; {} where there was none.

    ::

        @task
        def load():
            conf = relay_conf()

    A small conf is in the run, and returned as it is. A large one is in the run as a reference, and is
    fetched from Dagrelay's Redis, by the Airflow connection `relay_conn_id` or, where there is none, by what
    the environment says. `context` is that of the running task, unless it is given. To hand a conf on to
    another DAG as it came, `context["dag_run"].conf` will do, which never fetches it.

    Raises ConfGone where the conf has expired, ConfKeyMissing where it was sealed by a key that is not set
    here, and BrokerUnavailable, after which the task may be tried again.
    """
    if context is None:
        context = _running()
    conf = context["dag_run"].conf
    if reference_in(conf) is None and not is_sealed(conf):
        return dict(conf or {})
    from .hook import DagrelayHook  # here: most confs are small, and need no connection

    return DagrelayHook(relay_conn_id).client().resolve_conf(conf)


def _running() -> Mapping[str, Any]:
    """Return the context of the running task. Raises what Airflow raises where none runs."""
    from .compat import AIRFLOW_3

    if AIRFLOW_3:
        from airflow.sdk import get_current_context
    else:
        from airflow.operators.python import get_current_context
    found: Mapping[str, Any] = get_current_context()
    return found
