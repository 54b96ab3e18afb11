"""The TCP door as a process, with a real Valkey: what a sender is answered, and what lies in Redis then."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from local.process import ROOT, Process, clean_env, free_port
from local.valkey import Valkey
from producers.client import RelayClient
from producers.contract import QUEUE_JOBS, QUEUE_TRIGGERS
from producers.errors import ConfigurationError
from producers.keys import Keys, new_key
from producers.scopes import Scope
from producers.settings import ProducerSettings
from producers.socket_listener import Limits, SocketDoor
from tests.integration.test_trigger import until
from tests.parts import need

pytestmark = pytest.mark.integration

TLS = Path(__file__).with_name("tls")
CANARY = "c4n4ry-s3cret"
FUZZED = int(os.environ.get("DAGRELAY_FUZZ", "2000"))


class Client:
    """A sender: lines out, lines in."""

    def __init__(self, door: SocketDoor | DoorProcess | int, *, tls: bool = False) -> None:
        port = door if isinstance(door, int) else door.port
        connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        if tls:
            context = ssl.create_default_context(cafile=str(TLS / "cert.pem"))
            connection = context.wrap_socket(connection, server_hostname="localhost")
        self.connection = connection
        self._file = connection.makefile("rb")

    def send(self, *lines: str | bytes | dict[str, Any]) -> None:
        given = [json.dumps(one) if isinstance(one, dict) else one for one in lines]
        raw = [one.encode() if isinstance(one, str) else one for one in given]
        self.connection.sendall(b"".join(one + b"\n" for one in raw))

    def answer(self) -> str:
        """The next line; "" at the end."""
        return self._file.readline().decode().removesuffix("\n")

    def ask(self, line: str | bytes | dict[str, Any]) -> str:
        self.send(line)
        return self.answer()

    def rest(self) -> list[str]:
        """All lines until the door closes, however it does."""
        found = []
        try:
            while line := self.answer():
                found.append(line)
        except ConnectionResetError:
            pass
        return found

    def close(self) -> None:
        self._file.close()
        self.connection.close()


class DoorProcess:
    """`dagrelay socket` in a process of its own."""

    def __init__(self, valkey: Valkey, folder: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.log = folder / f"door-{self.port}.log"
        at = () if "--path" in options else ("--port", str(self.port))
        if "--keys" not in options and "--path" not in options:
            at = (*at, "--insecure")
        seen = len(self.text())
        self.process = Process(
            [sys.executable, "-m", "producers.cli", "socket", *at, *options],
            log=self.log,
            env=clean_env(PYTHONPATH=str(ROOT), DAGRELAY_REDIS_URL=valkey.url),
            cwd=folder,
            name="door",
        )
        self.process.wait_until(lambda: "listening at=" in self.text()[seen:], timeout_s=30, what="listening")

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def start(valkey: Valkey, tmp_path: Path) -> Iterator[Callable[..., DoorProcess]]:
    doors: list[DoorProcess] = []

    def start(*options: str, port: int | None = None) -> DoorProcess:
        doors.append(DoorProcess(valkey, tmp_path, *options, port=port))
        return doors[-1]

    yield start
    for door in doors:
        if door.process.alive:
            door.process.stop()
    for door in doors:
        text = door.text()
        assert "Traceback" not in text, text
        assert "should not have happened" not in text, text
        assert CANARY not in text


@pytest.fixture
def here(relay: RelayClient) -> Iterator[Callable[..., SocketDoor]]:
    """Run the door in this process, as somebody's library."""
    with ExitStack() as stack:

        def start(**options: Any) -> SocketDoor:
            options = {"insecure": "keys" not in options and "path" not in options, "port": 0} | options
            return stack.enter_context(SocketDoor(relay, **options))

        yield start


def record(relay: RelayClient, answer: str) -> Any:
    assert answer.startswith("OK "), answer
    found = relay.record(answer.removeprefix("OK "))
    assert found is not None
    return found


# What is answered


def test_a_line_is_answered_with_the_id_of_what_lies_in_redis(start, relay):
    client = Client(start())

    found = record(relay, client.ask({"dag_id": "daily_sales", "conf": {"day": "ü"}, "key": "k1"}))

    assert (found.state, found.dag_id, found.dag_run_id) == ("accepted", "daily_sales", "relay__k1")
    assert found.by == "127.0.0.1@socket"
    assert relay.redis.llen(QUEUE_TRIGGERS) == 1
    record(relay, client.ask({"service": "render", "path": "/jobs/7"}))
    assert relay.redis.llen(QUEUE_JOBS) == 1
    event = {"specversion": "1.0", "id": "e1", "source": "/shop", "type": "dagrelay.trigger"}
    assert record(relay, client.ask(event | {"data": {"dag_id": "orders"}})).dag_id == "orders"


def test_lines_sent_at_once_are_answered_in_their_order(start, relay):
    client = Client(start())
    lines = [{"dag_id": "d", "id": f"n{number}"} if number % 3 else {"dag_id": 7} for number in range(2000)]
    sender = threading.Thread(target=client.send, args=lines)
    sender.start()

    answers = [client.answer() for _ in lines]

    sender.join()
    assert [one.split()[0] for one in answers] == ["OK" if number % 3 else "ERR" for number in range(2000)]
    again = Client(client.connection.getpeername()[1])
    for number in (1, 2, 1999):  # each has its own answer, and no other's
        assert again.ask(lines[number]) == answers[number]
    assert relay.redis.llen(QUEUE_TRIGGERS) == sum(bool(number % 3) for number in range(2000))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "ERR body: is no JSON at character 1"),
        ("{}", "ERR dag_id: give the DAG to run, or the service of a job"),
        ({"dag_id": "d", "cnof": 1}, "ERR 'cnof': no field of a trigger"),
        ({"dag_id": "d", "conf": {"a": 1}, "key": ""}, "ERR key: "),
        (b'{"dag_id": "\xff"}', "ERR body: is not UTF-8"),
        ('{"dag_id": "d", "conf": {"a": NaN}}', "ERR body: holds NaN"),
        ('{"a":' * 5000, "ERR body: is nested deeper"),
        ({"dag_id": "d", "reply_to": "somewhere"}, "ERR reply_to: this door publishes nowhere"),
        (f'{{"dag_id": "d", "conf": "{CANARY}"}}', "ERR conf: "),
        ({"specversion": "1.0", "id": "1", "source": "s", "type": "shop.order"}, "ERR type: "),
    ],
)
def test_a_wrong_line_is_told_what_is_wrong_and_ends_nothing(start, line, words):
    client = Client(start())

    answer = client.ask(line)

    assert answer.startswith(words)
    assert CANARY not in answer
    assert client.ask({"dag_id": "d"}).startswith("OK ")


def test_no_browser_can_be_made_to_post_to_it(start, relay):
    client = Client(start())
    client.send(b'POST / HTTP/1.1\r\nHost: localhost\r\n\r\n{"dag_id": "stolen"}')

    (answer,) = client.rest()

    assert answer.startswith("ERR line: is no JSON object")
    assert not relay.redis.llen(QUEUE_TRIGGERS)


def test_empty_lines_are_passed_over_and_the_last_line_needs_no_end(start, relay):
    client = Client(start())
    client.connection.sendall(b'\r\n\n  \n{"dag_id": "a"}\r\n\n{"dag_id": "b"}')
    client.connection.shutdown(socket.SHUT_WR)

    assert [record(relay, one).dag_id for one in client.rest()] == ["a", "b"]


def test_half_a_message_is_none(start, relay):
    client = Client(start())
    client.connection.sendall(b'{"dag_id": "a", "conf": {"amount": 10')
    client.connection.shutdown(socket.SHUT_WR)

    (answer,) = client.rest()

    assert answer.startswith("ERR body: is no JSON")
    assert not relay.redis.llen(QUEUE_TRIGGERS)


def test_a_shell_with_nothing_but_bash_can_ask(start, relay):
    need("bash", shutil.which("bash") is not None, "install bash")
    script = """
        exec 3<>/dev/tcp/127.0.0.1/$1
        echo '{"dag_id": "daily_sales", "id": "from-bash"}' >&3
        IFS= read -r answer <&3
        echo "$answer"
    """
    told = subprocess.run(
        ["bash", "-c", script, "-", str(start().port)], capture_output=True, text=True, timeout=30, check=True
    )
    assert record(relay, told.stdout.strip()).dag_id == "daily_sales"


def test_whatever_is_sent_is_answered_and_the_door_stands(here, relay):
    """`DAGRELAY_FUZZ=1000000` for a long run."""
    door = here()
    rng = random.Random(6)  # noqa: S311 - no secret
    valid = json.dumps({"dag_id": "d", "conf": {"a": [1, "ü", None]}, "key": "k"}).encode()
    client, since = Client(door), 0
    for number in range(FUZZED):
        line = bytearray(valid)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(1, len(line))
            line[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        raw = bytes(line).replace(b"\n", b" ")
        if number % 50 == 0:
            raw = rng.randbytes(rng.randrange(1, 200)).replace(b"\n", b" ")
        answer = client.ask(raw) if raw.strip() else "ERR"
        assert answer.split(" ")[0] in ("OK", "ERR"), (raw, answer)
        since += 1
        if not raw.lstrip().startswith((b"{", b"AUTH")):
            assert client.rest() == []
            client, since = Client(door), 0
    assert client.ask({"dag_id": "d"}).startswith("OK ")


# Who is let in


@pytest.fixture
def token(tmp_path: Path) -> str:
    return new_key(tmp_path / "keys.toml", "billing", dags=["sales_*"])


def test_with_keys_the_first_line_is_auth_and_the_key_says_what_may_be_asked(start, relay, tmp_path, token):
    client = Client(start("--keys", str(tmp_path / "keys.toml")))

    assert client.ask(f"AUTH {token}") == "OK billing"
    assert record(relay, client.ask({"dag_id": "sales_north"})).by == "billing@socket"
    assert client.ask({"dag_id": "payroll"}) == "ERR dag_id: 'payroll' is not among those that you may start"
    assert client.ask({"service": "render", "path": "/j"}).startswith("ERR service: ")
    assert client.ask({"dag_id": "sales_south", "connection": "eu"}).startswith("ERR connection: ")


@pytest.mark.parametrize(
    "first",
    [
        '{"dag_id": "sales_north"}',
        f"AUTH {CANARY}",
        "AUTH",
        "AUTH \xff",
        "garbage",
        "x" * 5000,
        "\n\n{}",
    ],
)
def test_who_is_not_known_learns_nothing(start, relay, tmp_path, token, first):
    client = Client(start("--keys", str(tmp_path / "keys.toml")))

    client.send(first, '{"dag_id": "sales_north"}')

    assert client.rest() == [
        "ERR not authenticated: the first line is AUTH <token>, with a token that this door knows"
    ]
    assert not relay.redis.llen(QUEUE_TRIGGERS)


def test_a_key_that_is_taken_away_is_refused_on_open_connections_too(here, tmp_path, token):
    file = tmp_path / "keys.toml"
    client = Client(here(keys=Keys.load(file)))
    client.send(f"AUTH {token}", {"dag_id": "sales_a"})
    assert client.answer() == "OK billing"
    assert client.answer().startswith("OK ")
    file.write_text("")

    def refused() -> bool:
        return client.ask({"dag_id": "sales_a"}).startswith("ERR not authenticated")

    until(refused)
    assert client.rest() == []


def test_a_key_asks_no_faster_than_its_rate(here, relay, tmp_path):
    token = new_key(tmp_path / "k", "slow", rate_per_s=0.5, burst=2)
    client = Client(here(keys=Keys.load(tmp_path / "k")))
    client.send(f"AUTH {token}", *[{"dag_id": "d"}] * 4)

    answers = [client.answer() for _ in range(5)]

    assert [one.split()[0] for one in answers] == ["OK", "OK", "OK", "RETRY", "RETRY"]
    assert answers[3].startswith("RETRY 2 more than the 0.5 requests a second")
    assert relay.redis.llen(QUEUE_TRIGGERS) == 2


def test_the_same_id_under_two_keys_is_two_requests(here, tmp_path):
    file = tmp_path / "k"
    tokens = [new_key(file, name) for name in ("a", "b")]
    door = here(keys=Keys.load(file))
    ids = []
    for token in tokens:
        client = Client(door)
        assert client.ask(f"AUTH {token}").startswith("OK ")
        ids.append(client.ask({"dag_id": "d", "id": "one"}))
    assert len(set(ids)) == 2


def test_a_sender_who_says_nothing_is_let_go_before_it_is_known(here, tmp_path, token):
    door = here(keys=Keys.load(tmp_path / "keys.toml"), limits=Limits(auth_s=0.5))
    began = time.monotonic()
    client = Client(door)
    client.connection.settimeout(0.1)
    answer = b""
    while not answer and time.monotonic() < began + 20:
        client.connection.sendall(b"\n")  # to have something said is not to be known
        with contextlib.suppress(TimeoutError):
            answer = client.connection.recv(200)

    assert answer.startswith(b"ERR not authenticated")
    until(lambda: door.connections == 0)
    client = Client(door)
    client.connection.sendall(b"AUTH ")  # a line begun is none
    assert client.rest()[0].startswith("ERR not authenticated")


def test_empty_lines_are_not_counted_as_held(here):
    door = here()
    client = Client(door)
    for _ in range(50):
        client.connection.sendall(b" \r\n" * 100)
        time.sleep(0.002)
    assert client.ask({"dag_id": 7}).startswith("ERR ")
    client.connection.sendall(b"\n" * 1000)
    until(lambda: door.held_bytes == 0)


# Over TLS, and on a Unix socket


def test_over_tls(start, relay, tmp_path):
    door = start("--certfile", str(TLS / "cert.pem"), "--keyfile", str(TLS / "key.pem"))
    client = Client(door, tls=True)
    record(relay, client.ask({"dag_id": "d"}))
    client.send(*[{"dag_id": "d", "conf": {"x": "y" * 1000}}] * 500)
    assert all(client.answer().startswith("OK ") for _ in range(500))
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as plain:
        plain.sendall(b'{"dag_id": "stolen"}\n')
        assert b"OK" not in plain.recv(100)
    assert client.ask("garbage").startswith("ERR line")
    assert client.rest() == []
    assert relay.redis.llen(QUEUE_TRIGGERS) == 501


def test_a_line_may_come_with_the_end_of_the_handshake(start):
    door = start("--certfile", str(TLS / "cert.pem"), "--keyfile", str(TLS / "key.pem"))
    context = ssl.create_default_context(cafile=str(TLS / "cert.pem"))
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(coming, going, server_hostname="localhost")
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as connection:

        def until_done(step: Callable[[], Any]) -> Any:
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    connection.sendall(going.read())
                    coming.write(connection.recv(65536))

        until_done(tls.do_handshake)
        tls.write(b'{"dag_id": "d"}\n')
        connection.sendall(going.read())  # the last of the handshake and the line, in one piece
        assert until_done(lambda: tls.read(100)).startswith(b"OK ")


def test_who_begins_no_tls_is_let_go(here):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    door = here(tls=context, limits=Limits(auth_s=0.5))
    silent = socket.create_connection(("127.0.0.1", door.port), timeout=10)
    until(lambda: door.connections == 1)  # counted before it has shown who it is

    assert silent.recv(100) == b""
    until(lambda: door.connections == 0)
    assert Client(door, tls=True).ask({"dag_id": "d"}).startswith("OK ")


def test_at_a_unix_socket_its_permissions_say_who_may_ask(start, relay, tmp_path):
    path = tmp_path / "door"
    door = start("--path", str(path), "--mode", "660")

    def ask() -> str:
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(str(path))
            one.sendall(b'{"dag_id": "d"}\n')
            return one.recv(100).decode().strip()

    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert record(relay, ask()).by == f"uid-{os.getuid()}@socket"
    told = subprocess.run(
        [sys.executable, "-m", "producers.cli", "socket", "--path", str(path)],
        env=clean_env(PYTHONPATH=str(ROOT), DAGRELAY_REDIS_URL="redis://127.0.0.1:1/0"),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert told.returncode == 78
    assert "somebody listens there already" in told.stderr
    ask()
    door.process.kill()
    assert path.exists()  # what a killed one leaves is replaced
    again = start("--path", str(path))
    ask()
    again.process.stop()
    assert not path.exists()


def test_a_file_is_not_replaced_by_a_socket(relay, tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConfigurationError, match="is no socket"):
        SocketDoor(relay, path=tmp_path / "precious").start()
    assert (tmp_path / "precious").read_text() == "x"


def test_a_taken_port_is_told(here, relay):
    door = here()
    with pytest.raises(ConfigurationError, match="cannot listen at 127"):
        SocketDoor(relay, port=door.port, insecure=True).start()


# Limits


def test_a_line_that_does_not_end_is_cut_off(here):
    door = here(limits=Limits(line_s=1.0))
    slow = Client(door)
    began = time.monotonic()
    slow.connection.settimeout(0.1)
    answer = b""
    for byte in b'{"dag_id": "d", "conf": {"a": "' + b"x" * 1000:
        slow.connection.sendall(bytes([byte]))  # always something new, and never a line
        try:
            answer = slow.connection.recv(200)
            break
        except TimeoutError:
            continue
    assert answer.startswith(b"ERR line: its end did not come within 1 s")
    assert 0.5 < time.monotonic() - began < 10
    until(lambda: door.connections == 0)


def test_a_line_over_the_limit_is_told_and_cut_off(here, relay):
    door = here(limits=Limits(line_bytes=1000))
    for line in (b"{" + b"x" * 5_000_000, b'{"dag_id": "d", "conf": {"a": "%b"}}\n' % (b"x" * 990)):
        client = Client(door)
        client.send({"dag_id": "before"})
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # cut off while it is sent
            client.connection.sendall(line)
        first, last, *none = client.rest()
        assert first.startswith("OK ")
        assert last.startswith("ERR line: is over the limit of 1000 bytes")
        assert not none
    until(lambda: door.held_bytes == 0)
    assert relay.redis.llen(QUEUE_TRIGGERS) == 2


def test_what_comes_after_an_endless_line_is_not_read_for_ever(here):
    door = here(limits=Limits(line_bytes=1000))
    client = Client(door)
    sent = 0
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while sent < 200_000_000:
            sent += client.connection.send(b"{" * 65536)
    assert sent < 50_000_000  # what is thrown away, and what the system's buffers hold


def test_an_idle_connection_is_let_go_after_its_time_and_not_before(here):
    door = here(limits=Limits(idle_s=1.5, line_s=0.2))
    client = Client(door)
    for _ in range(4):
        time.sleep(0.6)
        assert client.ask({"dag_id": "d"}).startswith("OK ")
    assert client.rest() == []


def test_who_does_not_read_the_answers_is_not_read_from_and_then_cut_off(here, relay):
    door = here(limits=Limits(unread_s=2.0))
    client = Client(door)
    client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connection.settimeout(30)
    line = b'{"dag_id": 1, "%b": 2}\n' % (b"n" * 30)  # a short line with a long answer
    sent = 0
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while sent < 100_000_000:
            client.connection.sendall(line * 2000)
            sent += len(line) * 2000
    assert sent < 50_000_000  # what buffers hold, and no more
    until(lambda: door.connections == 0)
    assert door.held_bytes == 0


def test_all_together_hold_no_more_than_they_may(here):
    door = here(limits=Limits(held_bytes=1_000_000))
    clients = [Client(door) for _ in range(20)]
    for client in clients:
        client.connection.sendall(b"{" + b"x" * 200_000)
    until(lambda: door.held_bytes > 600_000)
    until(lambda: door.connections < 10)  # the others were told to come again
    assert door.held_bytes <= 1_000_000
    for client in clients:
        client.close()
    until(lambda: door.held_bytes == 0)
    assert Client(door).ask({"dag_id": "d"}).startswith("OK ")


def test_connections_are_limited_in_all_and_per_address(here):
    door = here(limits=Limits(connections=5, per_address=3))
    clients = [Client(door) for _ in range(3)]
    until(lambda: door.connections == 3)
    assert Client(door).rest() == ["RETRY 5 too many connections from this address"]
    clients.pop().close()
    until(lambda: door.connections == 2)
    assert Client(door).ask({"dag_id": "d"}).startswith("OK ")

    door = here(limits=Limits(connections=2))
    clients = [Client(door) for _ in range(2)]
    until(lambda: door.connections == 2)
    assert Client(door).rest() == ["RETRY 5 too many connections"]
    assert all(client.ask({"dag_id": "d"}).startswith("OK ") for client in clients)


def test_a_thousand_connections_at_once(start, relay):
    door = start("--per-address", "2000")

    async def one(number: int) -> list[str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        answers = []
        for turn in range(3):
            writer.write(b'{"dag_id": "d", "id": "%d-%d"}\n' % (number, turn))
            answers.append((await reader.readline()).decode())
        writer.close()
        return answers

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*map(one, range(1000)))

    answers = [line for lines in asyncio.run(all_of_them()) for line in lines]

    assert all(line.startswith("OK ") for line in answers)
    assert len(set(answers)) == 3000 == relay.redis.llen(QUEUE_TRIGGERS)


# What goes away


def test_while_redis_is_away_each_line_is_answered_retry_and_then_ok(start, relay, valkey):
    door = start()
    client = Client(door)
    lines = [{"dag_id": "d", "id": f"n{number}"} for number in range(5)]
    assert client.ask(lines[0]).startswith("OK ")
    valkey.kill()

    client.send(*lines)
    assert [client.answer().split()[0] for _ in lines] == ["RETRY"] * 5
    assert client.ask({"dag_id": 7}).startswith("ERR ")
    assert client.ask(lines[1]) == "RETRY 1 the request was not taken: send it again, with the same id or key"

    valkey.start()
    until(lambda: client.ask(lines[1]).startswith("OK "))
    client.send(*lines)
    assert [client.answer().split()[0] for _ in lines] == ["OK"] * 5
    assert relay.redis.llen(QUEUE_TRIGGERS) == 5
    assert door.text().count("redis away") == 1
    assert valkey.url not in door.text()


def test_a_full_redis_is_answered_retry(start, relay):
    client = Client(start())
    relay.redis.config_set("maxmemory", "1")
    assert client.ask({"dag_id": "d", "id": "1"}).startswith("RETRY 1 ")
    relay.redis.config_set("maxmemory", "0")
    until(lambda: client.ask({"dag_id": "d", "id": "1"}).startswith("OK "))


def test_killed_and_started_again_the_same_ids_are_one_run_each(start, relay):
    """The sender sends again whatever it has no answer for; every OK lies in Redis, and nothing twice."""
    port = free_port()
    door = start(port=port)
    names = [f"order-{number}" for number in range(3000)]
    answered: dict[str, str] = {}
    kills = 0
    while len(answered) < len(names):
        open_ones = [name for name in names if name not in answered]
        try:
            client = Client(port)
            batch = open_ones[:500]
            client.send(*[{"dag_id": "d", "id": name} for name in batch])
            for number, name in enumerate(batch):
                if kills < 5 and number == 37 * (kills + 1):
                    door.process.kill()
                    kills += 1
                line = client.answer()
                if not line.startswith("OK "):
                    break
                answered[name] = line
            client.close()
        except OSError:  # killed in the midst
            pass
        if not door.process.alive:
            door = start(port=port)
    assert kills == 5
    assert len(set(answered.values())) == 3000
    assert relay.redis.llen(QUEUE_TRIGGERS) == 3000
    assert all(relay.record(line.removeprefix("OK ")) for line in list(answered.values())[::100])


def test_ended_in_good_order_it_answers_what_it_has(start, relay):
    door = start()
    idle, half, busy = Client(door), Client(door), Client(door)
    assert idle.ask({"dag_id": "d"}).startswith("OK ")
    half.connection.sendall(b'{"dag_id": "half')
    busy.send(*[{"dag_id": "d"}] * 300)
    first = busy.answer()

    door.process.ask_to_stop()

    answers = [first, *busy.rest()]
    assert half.rest() == ["RETRY 1 the door closes: send it again"]
    assert idle.rest() == []
    assert door.process.wait(10) == 0
    taken = [line for line in answers if line.startswith("OK ")]
    assert relay.redis.llen(QUEUE_TRIGGERS) == 1 + len(taken)


def test_as_a_library_it_starts_and_stops_in_a_thread(relay):
    door = SocketDoor(relay, port=0, insecure=True, scope=Scope(dags=("sales_*",)))
    before = threading.active_count()
    for _ in range(2):
        door.start()
        client = Client(door)
        assert client.ask({"dag_id": "sales_a"}).startswith("OK ")
        assert client.ask({"dag_id": "payroll"}).startswith("ERR dag_id: ")
        door.stop()
        door.stop()
        assert client.rest() == []
    assert threading.active_count() == before


def test_a_redis_that_does_not_exist_is_no_reason_not_to_start(tmp_path):
    relay = RelayClient(ProducerSettings(redis_url=f"redis://127.0.0.1:{free_port()}/0", client_name="x"))
    with SocketDoor(relay, port=0, insecure=True) as door:
        assert Client(door).ask({"dag_id": "d"}).startswith("RETRY ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--insecure", "--host", "0.0.0.0"), "--insecure: lets everybody in"),  # noqa: S104
        ((), "--keys: give the file"),
        (("--keys", "nowhere"), "nowhere cannot be read"),
        (("--insecure", "--certfile", "nowhere"), "--certfile, --keyfile: cannot be read"),
        (("--path", "x", "--mode", "999"), "--mode: give three digits"),
    ],
)
def test_what_is_wrong_at_the_start_is_told(valkey, tmp_path, options, words):
    told = subprocess.run(
        [sys.executable, "-m", "producers.cli", "socket", *options],
        env=clean_env(PYTHONPATH=str(ROOT), DAGRELAY_REDIS_URL=valkey.url),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert told.returncode == 78
    assert words in told.stderr
    assert "Traceback" not in told.stderr
