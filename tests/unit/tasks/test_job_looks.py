"""Looks at a service's jobs: each is done once, and none takes more of the worker than it may."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from producers.stores.waits import Claimed, Seen
from tasks.http_many import in_loop
from tasks.job_looks import MAX_ANSWER_BYTES, JobFollower
from tasks.looks import parts_of
from tasks.services import Service


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        more = "x" * MAX_ANSWER_BYTES if "large" in self.path else ""
        body = json.dumps({"state": "done", "more": more}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def following(address: str) -> Iterator[Callable[..., JobFollower]]:
    made: list[JobFollower] = []

    def make(**more: int) -> JobFollower:
        made.append(JobFollower(Service("train", address, **more)))
        return made[-1]

    yield make
    for one in made:
        one._sender.close()


def claimed(job_id: str) -> Claimed:
    kwargs = {"service": "train", "path": "/jobs/{job_id}", "job_id": job_id}
    message = json.dumps({"body": json.dumps([[], kwargs, {}])}).encode()
    return Claimed(job_id, 0.0, 1, message, (job_id, None, "0", None, None, None))


class Batches:
    """Collects what looks have seen, over several batches."""

    def __init__(self, follower: JobFollower) -> None:
        self.seen: list[Seen] = []
        self._follower, self._changed = follower, threading.Condition()

    def done(self, seen: Sequence[Seen]) -> None:
        with self._changed:
            self.seen += seen
            self._changed.notify_all()

    def start(self, *job_ids: str) -> None:
        self._follower.start([claimed(job_id) for job_id in job_ids], 1.0, lambda seen: self.done(seen))

    def wait_for(self, count: int) -> list[Seen]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.seen) >= count, 10)
            return list(self.seen)


def test_an_answer_that_is_far_larger_than_any_result_is_not_read(following):
    batches = Batches(following())

    batches.start("large", "small")
    by_job = {one.task_id: one for one in batches.wait_for(2)}

    assert by_job["small"].verb == "wake"
    assert by_job["large"].verb == "error"
    assert "larger than 4 MB" in by_job["large"].second


def test_what_begins_as_the_last_line_ends_is_looked_at(following):
    follower = following(max_in_flight=1)

    async def one_after_the_other() -> list[int]:
        # As the loop may run them: the next batch begins in the very turn in which the line before has ended.
        lines = []
        for job_id in ("a", "b", "c"):
            await follower._begin([claimed(job_id)], 1.0, batches.done)
            (line,) = follower._lines
            while not line.done():
                await asyncio.sleep(0)
            lines.append(len(follower._lines))
        return lines

    batches = Batches(follower)
    assert in_loop(one_after_the_other()).result(10) == [0, 0, 0]
    assert {one.task_id for one in batches.wait_for(3)} == {"a", "b", "c"}


def test_there_is_room_again_when_all_is_done_whoever_began_it(following):
    follower = following(max_in_flight=8)
    batches = Batches(follower)
    threads = [threading.Thread(target=batches.start, args=[f"{n}-{m}" for m in range(20)]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(batches.wait_for(160)) == 160
    assert follower._open == 0
    assert follower.room() >= 8


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([], []),
        ([10] * 1200, [500, 500, 200]),
        ([900_000] * 3, [1, 1, 1]),
        ([400_000] * 5, [2, 2, 1]),
        ([10, 3_000_000, 10, 10], [1, 1, 2]),
    ],
)
def test_what_is_written_at_once_is_bounded_in_number_and_in_size(lengths, parts):
    seen = [Seen(str(index), 1, "wake", 0.0, "x" * length) for index, length in enumerate(lengths)]

    found = list(parts_of(seen))

    assert [len(part) for part in found] == parts
    assert [one for part in found for one in part] == seen
