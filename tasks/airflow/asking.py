"""Who asks in this thread: told what came of each request, so that the connection's limit follows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from producers.stores.lines import Verdict
from tasks.http import HttpRequest, HttpResponse, NoAnswer


class Asker(Protocol):
    """Somebody who holds a slot."""

    def saw(self, verdict: Verdict, took_s: float) -> None: ...


class _Asking(threading.local):
    asker: Asker | None = None


asking = _Asking()


def watched(send: Callable[[HttpRequest], HttpResponse]) -> Callable[[HttpRequest], HttpResponse]:
    """Return `send` so that whoever asks in the calling thread sees what came of each request."""

    def seen(request: HttpRequest) -> HttpResponse:
        asker = asking.asker
        if asker is None:
            return send(request)
        began = time.monotonic()
        try:
            answer = send(request)
        except NoAnswer as exc:
            asker.saw(verdict_of(exc), time.monotonic() - began)
            raise
        asker.saw(verdict_of(answer), time.monotonic() - began)
        return answer

    return seen


def verdict_of(answer: HttpResponse | NoAnswer) -> Verdict:
    """Return what an answer, or that there is none, says of how its server fares."""
    if isinstance(answer, NoAnswer):
        return "timeout" if answer.timed_out and answer.reached else "broken"
    return "strained" if answer.status >= 500 or answer.status == 429 else "ok"
