"""An Airflow of prepared answers, which goes in where requests leave."""

import threading
from collections.abc import Callable

from tasks.http import HttpRequest, HttpResponse, NoAnswer
from tests.unit.tasks.airflow.recorded import answer, said

Reply = HttpResponse | NoAnswer | Callable[[HttpRequest], HttpResponse]


class Scripted:
    """Answers each path with its replies in turn, the last one for ever; notes what it was asked.

    A path may be given without its query. What is not prepared is answered as each Airflow would.
    """

    def __init__(self, api: str = "v2") -> None:
        self.asked: list[str] = []
        self.requests: list[HttpRequest] = []
        self._replies: dict[str, list[Reply]] = {}
        self._lock = threading.Lock()
        self.speaks(api)

    def speaks(self, api: str) -> None:
        """Be an Airflow 3 (v2) or 2 (v1) from now on."""
        self._replies = {}
        if api == "v2":
            self.on("GET /api/v2/version", answer("v2", "version"))
            self.on("GET /api/v1/version", answer("v2", "v1_version"))
            self.on("POST /api/v1/dags/recorded/dagRuns", answer("v2", "v1_removed"))
            self.on("POST /auth/token", said(201, {"access_token": "t1"}), said(201, {"access_token": "t2"}))
        else:
            self.on("GET /api/v2/version", answer("v1", "v2_version"))
            self.on("GET /api/v1/version", answer("v1", "version"))
            self.on("POST /api/v2/dags/recorded/dagRuns", answer("v1", "v2_create"))
            self.on("POST /auth/token", answer("v1", "v2_login"))

    def on(self, what: str, *replies: Reply) -> None:
        self._replies[what] = list(replies)

    def send(self, request: HttpRequest) -> HttpResponse:
        what = f"{request.method} {request.path.partition('?')[0]}"
        with self._lock:
            self.asked.append(what)
            self.requests.append(request)
            replies = self._replies[what]
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if isinstance(reply, NoAnswer):
            raise reply
        return reply if isinstance(reply, HttpResponse) else reply(request)

    def times(self, what: str) -> int:
        return self.asked.count(what)

    def tokens_seen(self, what: str) -> list[str | None]:
        """The Authorization of each request to this path."""
        return [
            request.headers.get("Authorization")
            for asked, request in zip(self.asked, self.requests, strict=True)
            if asked == what
        ]


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now
