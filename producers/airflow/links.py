"""Links from a task in Airflow to what it has handed over."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote

from .compat import AIRFLOW_3, BaseOperatorLink

FLOWER_URL: Final = "dagrelay_flower_url"
"""The XCom under which Airflow 2 finds the link; Airflow 3 keeps links by itself."""


TRIGGERED_URL: Final = "trigger_run_url"
"""The same for the run that a task has started."""


class FlowerLink(BaseOperatorLink):  # type: ignore[misc]
    """The request in Flower; "" where the connection has no `flower_url`."""

    name = "Flower"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return the address: in the process that runs the task, or from its XCom."""
        return getattr(operator, "flower_link", None) or _kept(ti_key, FLOWER_URL)


class TriggeredDagLink(BaseOperatorLink):  # type: ignore[misc]
    """The run that a task has started, in whichever Airflow; "" until it is there."""

    name = "Triggered DAG"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return the address: in the process that runs the task, or from its XCom."""
        return getattr(operator, "triggered_url", None) or _kept(ti_key, TRIGGERED_URL)


def _kept(ti_key: Any, name: str) -> str:
    """Return a link of an XCom: Airflow 2 asks for it where it shows it."""
    if AIRFLOW_3:
        return ""
    with suppress(Exception):  # a page of Airflow's is not to fail for want of a link
        from airflow.models.xcom import XCom

        return XCom.get_value(ti_key=ti_key, key=name) or ""
    return ""


def flower_link(flower_url: str | None, request_id: str) -> str:
    """Return where Flower shows a request, or ""."""
    return f"{flower_url}/task/{quote(request_id, safe='')}" if flower_url else ""
