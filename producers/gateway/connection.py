"""One connection: a head that comes too slowly, or is too long, is cut off; uvicorn would wait for ever.

So is what comes once the answer is given: the rest of a body that nobody reads. A body that is read is the
application's business (see `front`).

A wish for another protocol is not heard. httptools takes no body after the head that holds one, and Java's
own client has it (`Upgrade: h2c`) in every request over plain HTTP: a run would be started without its conf.
So such a head is read a second time, without the wish.
"""

from __future__ import annotations

import asyncio
from typing import Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .base import Problem

MOST_HEAD_BYTES: Final = 64 * 1024
HEAD_WITHIN_S: Final = "head_within_s"
"""In the application's state: seconds for a head to be there whole, the first one from the connection on."""


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits on what comes before the application sees anything."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head, self._head_bytes = True, 0
        self._wished = False
        self._timer: asyncio.TimerHandle | None = None
        self._wait()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self._read(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(431, f"the head is over the limit of {MOST_HEAD_BYTES} bytes")
            elif self._timer is None:
                self._wait()
        elif self._timer is None and self.cycle is not None and self.cycle.response_complete:
            self._wait()  # whatever comes ends uvicorn's own time for the next request, and no other begins

    def _read(self, data: bytes) -> None:
        left = memoryview(data)
        while True:
            try:
                self.parser.feed_data(left)
            except httptools.HttpParserUpgrade as exc:
                left = left[exc.args[0] :]
                self._wished = False
                head = self._head_without_wish()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
                self.parser.feed_data(head)
            else:
                return

    def _head_without_wish(self) -> bytes:
        """Return the head that was just read. Raises HttpParserError for one that is nothing but a wish."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserError
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % pair for pair in self.headers if pair[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._wished = self.parser.should_upgrade()
        if self._wished:
            return
        self._in_head = False
        self._wait_no_more()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._wished:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP")

    def _wait(self) -> None:
        within_s = float(self.app_state.get(HEAD_WITHIN_S, 30.0))
        self._timer = asyncio.get_running_loop().call_later(within_s, self._too_slow)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def _answering(self) -> bool:
        """Whether an answer is on its way, or that to an earlier request is still to come."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and (self._in_head or cycle.response_started)

    def _too_slow(self) -> None:
        if self._answering:
            self._wait()
        elif not self._in_head:
            self.transport.close()
        else:
            self._refuse(408, "the head was not there whole in time")

    def _refuse(self, status: int, detail: str) -> None:
        """Answer, unless another answer would be taken for this one or the other way round; and close."""
        self._wait_no_more()
        if self._answering:
            self.transport.close()
            return
        answer = Problem(status, detail).response()
        head = f"HTTP/1.1 {status} \r\nConnection: close\r\n".encode()
        head += b"".join(b"%s: %s\r\n" % pair for pair in answer.raw_headers)
        self.transport.write(head + b"\r\n" + bytes(answer.body))
        self.transport.close()
