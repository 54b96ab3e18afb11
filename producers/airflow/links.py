"""Links from a task in Airflow to what it has handed over."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote

from .compat import BaseOperatorLink

FLOWER_URL: Final = "dagrelay_flower_url"
"""The XCom under which Airflow 2 finds the link; Airflow 3 keeps links by itself."""


class FlowerLink(BaseOperatorLink):  # type: ignore[misc]
    """The request in Flower; "" where the connection has no `flower_url`."""

    name = "Flower"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return the address: in the process that runs the task, or from its XCom."""
        found = getattr(operator, "flower_link", None)
        if not found:
            with suppress(Exception):  # a page of Airflow's is not to fail for want of a link
                from airflow.models.xcom import XCom

                found = XCom.get_value(ti_key=ti_key, key=FLOWER_URL)
        return found or ""


def flower_link(flower_url: str | None, request_id: str) -> str:
    """Return where Flower shows a request, or ""."""
    return f"{flower_url}/task/{quote(request_id, safe='')}" if flower_url else ""
