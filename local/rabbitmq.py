"""RabbitMQ for tests and benchmarks: Debian's packages, fetched by apt without root into `.local/rabbitmq/`.

Debian 12 has 3.10, which its makers no longer support: good for the protocol, not for production.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
from functools import cache
from pathlib import Path
from types import TracebackType

from local import debs
from local.process import Process, clean_env, free_port

HOW_TO_GET_IT = "apt-get and dpkg fetch it into .local; it needs Debian or Ubuntu"
START_TIMEOUT_S = 90.0  # 3.5 s on a machine that does nothing else
PACKAGES = (
    "rabbitmq-server",
    "erlang-asn1",
    "erlang-base",
    "erlang-crypto",
    "erlang-eldap",
    "erlang-ftp",
    "erlang-inets",
    "erlang-mnesia",
    "erlang-os-mon",
    "erlang-parsetools",
    "erlang-public-key",
    "erlang-runtime-tools",
    "erlang-snmp",
    "erlang-ssl",
    "erlang-syntax-tools",
    "erlang-tftp",
    "erlang-tools",
    "erlang-xmerl",
    "libsctp1",
)
_ERLANG = "usr/lib/erlang"
_SERVERS = "usr/lib/rabbitmq/lib"


class RabbitMQ:
    """One broker on loopback, its data in a temporary folder; ended and started again as a test likes.

    `with RabbitMQ() as broker:`; `broker.url` has no path, `broker.port` stays the same. Raises PartFailed
    where it cannot be had or does not start. With `tls`, a certificate and its key, `tls_port` speaks TLS.
    """

    def __init__(self, tls: tuple[Path, Path] | None = None) -> None:
        self._tls = tls
        self.tls_port = free_port() if tls else 0
        self._folder = tempfile.TemporaryDirectory(prefix="dagrelay-rabbitmq-")
        self.folder = Path(self._folder.name)
        self.folder.chmod(0o755)
        self.port, self._distribution, self._epmd_port = free_port(), free_port(), free_port()
        self._process: Process | None = None
        self._epmd: Process | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}"

    @property
    def process(self) -> Process:
        if self._process is None:
            raise RuntimeError("RabbitMQ does not run")
        return self._process

    def start(self) -> RabbitMQ:
        """Start it; return when it answers."""
        root = ensure()
        erlang = root / _ERLANG
        env = clean_env(
            HOME=str(self.folder),
            PATH=f"{erlang}/bin:{os.environ.get('PATH', '/usr/bin:/bin')}",
            LD_LIBRARY_PATH=debs.environment(root)["LD_LIBRARY_PATH"],
            RABBITMQ_HOME=str(_home(root)),
            RABBITMQ_NODENAME=f"dagrelay{self.port}@localhost",
            RABBITMQ_MNESIA_BASE=str(self.folder / "mnesia"),
            RABBITMQ_LOG_BASE=str(self.folder),
            RABBITMQ_LOGS="-",
            RABBITMQ_ENABLED_PLUGINS_FILE=str(self.folder / "enabled_plugins"),
            RABBITMQ_CONF_ENV_FILE=str(self.folder / "env.conf"),
            RABBITMQ_CONFIG_FILE=str(self.folder / "rabbitmq.conf"),
            RABBITMQ_DIST_PORT=str(self._distribution),
            ERL_EPMD_PORT=str(self._epmd_port),
            ERL_EPMD_ADDRESS="127.0.0.1",
            ERL_CRASH_DUMP=os.devnull,
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=(
                "-kernel inet_dist_use_interface {127,0,0,1} -start_epmd false +S 1:1 +sbwt none"
            ),
        )
        (self.folder / "enabled_plugins").write_text("[].\n")
        (self.folder / "env.conf").write_text("")
        config = f"listeners.tcp.1 = 127.0.0.1:{self.port}\nlog.console.level = warning\n"
        if self._tls:
            config += (
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}\n"
                f"ssl_options.cacertfile = {self._tls[0]}\n"
                f"ssl_options.certfile = {self._tls[0]}\n"
                f"ssl_options.keyfile = {self._tls[1]}\n"
                "ssl_options.verify = verify_none\n"
            )
        (self.folder / "rabbitmq.conf").write_text(config)
        # Erlang would leave this one behind, in a session of its own.
        if self._epmd is None:
            self._epmd = Process(
                [next(erlang.glob("erts-*/bin/epmd")), "-port", str(self._epmd_port)],
                log=self.folder / "epmd.log",
                env=env,
                name="epmd",
            )
        self._process = Process(
            [_home(root) / "sbin" / "rabbitmq-server"],
            log=self.folder / "rabbitmq.log",
            env=env,
            cwd=self.folder,
            grace_s=30,
            name="rabbitmq",
        )
        try:
            self._process.wait_until(self._answers, timeout_s=START_TIMEOUT_S, what="speaking AMQP")
        except BaseException:
            self.close()
            raise
        return self

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return connection.recv(1) == b"\x01"
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL, as a machine's end would be; return when it is gone."""
        self.process.kill()
        self._process = None

    def stop(self) -> None:
        """End it in good order. Does nothing if it does not run."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def close(self) -> None:
        """End it, and all that belongs to it."""
        if self._process is not None:
            self._process.kill()
            self._process = None
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd = None
        self._folder.cleanup()

    def __enter__(self) -> RabbitMQ:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _home(root: Path) -> Path:
    return next((root / _SERVERS).glob("rabbitmq_server-*"))


@cache
def ensure() -> Path:
    """Return the folder with the packages, fetched at the first time. Raises PartFailed."""
    root = debs.unpacked("rabbitmq", PACKAGES, "usr/lib/erlang/bin/erl")
    # Where Erlang lies is written into some of its scripts.
    for script in (root / _ERLANG).rglob("*"):
        if script.is_file() and script.stat().st_size < 50_000:
            text = script.read_bytes()
            moved = re.sub(
                rb"(?m)^(\s*ROOTDIR=)\"?/usr/lib/erlang\"?$", rb"\1" + str(root / _ERLANG).encode(), text
            )
            if moved != text:
                script.write_bytes(moved)
    return root
