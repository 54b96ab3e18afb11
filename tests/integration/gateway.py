"""A real gateway process for tests, and a plain client for it."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from local.process import Process, clean_env, free_port
from producers.keys import new_key
from tests.preloaded import process
from tests.worker import ROOT

DAGRELAY = ROOT / ".venv" / "bin" / "dagrelay"
JSON = "application/json"


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    def __repr__(self) -> str:
        return f"{self.status} {self.headers} {self.raw[:500]!r}"


class GatewayProcess:
    """`dagrelay gateway` in a process of its own; it keeps its port over restarts.

    `token` is that of a key which may do everything; `key(...)` makes others.
    """

    def __init__(self, redis_url: str, folder: Path, *options: str, **env: str) -> None:
        self.folder, self.log = folder, folder / "gateway.log"
        self.port = free_port()
        self.keys = folder / "keys.toml"
        self.token = self.key("all", connections=["*"], services=["*"], may_cancel=True)
        self._argv = [str(DAGRELAY), "gateway", "--port", str(self.port), "--keys", str(self.keys), *options]
        self._env = clean_env(DAGRELAY_REDIS_URL=redis_url, **env)
        self._process: Process | None = None

    def key(self, name: str, **given: Any) -> str:
        """Add a key; return its token."""
        return new_key(self.keys, name, **given)

    def start(self) -> GatewayProcess:
        self._process = process(self._argv, log=self.log, env=self._env, cwd=self.folder, name="gateway")
        try:
            self._process.wait_until(self._answers, timeout_s=60, what="answering")
        except BaseException:
            self._process.kill()
            raise
        return self

    def _answers(self) -> bool:
        try:
            return self.ask("GET", "/livez").status == 200
        except (OSError, http.client.HTTPException):
            return False

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    def text(self) -> str:
        """All that it has logged."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()

    def stop(self) -> int:
        return self.process.stop()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = "",
        timeout_s: float = 30,
        **headers: str,
    ) -> Answer:
        """Ask once, on a connection of its own. `token=None`: without a key. A dict is sent as JSON.

        Of a header's name the `_` are sent as `-`.
        """
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            sent["Authorization"] = f"Bearer {token or self.token}"
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", JSON)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            told = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, told, answer.read())
        finally:
            connection.close()

    def run(self, dag_id: str = "daily_sales", body: Any = None, **more: Any) -> Answer:
        """Ask for a run."""
        return self.ask("POST", f"/v1/dags/{dag_id}/runs", {} if body is None else body, **more)

    def connect(self) -> socket.socket:
        """Return a plain connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def __enter__(self) -> GatewayProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.alive:
            self._process.kill() if kind else self._process.stop()
