"""The answers of real Airflows, as tests/tools/record_airflow_answers.py wrote them down."""

import json
from pathlib import Path

from tasks.http import HttpResponse

ANSWERS = Path(__file__).parent / "answers"
CANARY = "canary-7f3b-do-not-show"  # in every wrong request that was recorded, wherever Airflow may echo it


def answer(api: str, case: str) -> HttpResponse:
    """What Airflow 2.11.2 (v1) or 3.3.2 (v2) answered in this case."""
    record = json.loads((ANSWERS / api / f"{case}.json").read_text("utf-8"))
    return HttpResponse(record["status"], record["headers"], record["body"].encode())


def cases(api: str) -> list[str]:
    return sorted(path.stem for path in (ANSWERS / api).glob("*.json"))


def said(status: int, body: object) -> HttpResponse:
    """An answer made by hand, as JSON."""
    return HttpResponse(status, {"content-type": "application/json"}, json.dumps(body).encode())


def page(status: int, title: str = "nginx") -> HttpResponse:
    """The page of somebody between us and Airflow."""
    return HttpResponse(
        status, {"content-type": "text/html"}, f"<html><title>{title}</title></html>".encode()
    )
