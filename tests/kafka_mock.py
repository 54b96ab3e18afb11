"""A Kafka for tests: the mock cluster that librdkafka brings along, in a process of its own.

Real clients speak Kafka's protocol with it over TCP: groups, offsets, headers. It makes topics by themselves,
of four partitions, and keeps them in memory. `with KafkaMock() as kafka:` has `kafka.hosts`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from local.process import ROOT, Process, clean_env


class KafkaMock:
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dagrelay-kafka-")
        self._log = Path(self._folder.name) / "kafka.log"
        self._process: Process | None = None
        self.hosts = ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def url(self, topic: str, options: str = "") -> str:
        return f"kafka://{self.hosts}/{topic}{options}"

    def __enter__(self) -> KafkaMock:
        self._process = Process(
            [sys.executable, "-m", "tests.kafka_mock"], log=self._log, env=clean_env(), cwd=ROOT, name="kafka"
        )
        self._process.wait_until(self._ready, timeout_s=30, what="listening")
        return self

    def _ready(self) -> bool:
        for line in self._log.read_text().splitlines():
            if line.startswith("hosts "):
                self.hosts = line.removeprefix("hosts ")
        return bool(self.hosts)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
        self._folder.cleanup()


def main() -> None:
    from confluent_kafka.admin import AdminClient

    cluster = AdminClient({"bootstrap.servers": "127.0.0.1:1", "test.mock.num.brokers": 1})
    brokers = cluster.list_topics(timeout=20).brokers.values()
    sys.stdout.write("hosts " + ",".join(f"{broker.host}:{broker.port}" for broker in brokers) + "\n")
    sys.stdout.flush()
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
