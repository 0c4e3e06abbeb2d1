"""HTTP as uvicorn speaks it, with the bounds that it leaves open: heads without end, and peers that fall silent."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024  # of the request line and all headers
HEAD_SECONDS = 20.0  # for a head to arrive, from connecting or, later, from its first byte
READ_SECONDS = 60.0  # a client that takes nothing of its answer for so long has gone

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


class HttpProtocol(HttpToolsProtocol):
    """One connection. 431 for a head above `MAX_HEAD_BYTES`; a connection that exceeds a deadline is closed.

    Between requests a connection may idle as long as uvicorn's `timeout_keep_alive` says.
    """

    _since_event = 0  # bytes since the parser last reported more than a header: it buffers these
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._since_event += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._since_event > MAX_HEAD_BYTES:
            self._refuse()
        elif self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._since_event = 0
        self._head_arrived()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse()
            raise ValueError("the head is too large")  # ends the parsing
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._since_event = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._since_event = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if not self.transport.is_closing():  # it is when `_refuse` has answered
            super().send_400_response(msg)

    def _refuse(self) -> None:
        self.transport.write(_TOO_LARGE)
        self.transport.close()

    # -- deadlines ----------------------------------------------------------------------------------

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
        super().resume_writing()

    def _expect_reading(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._read_timer = self.loop.call_later(READ_SECONDS, self._check_reading, unsent)

    def _check_reading(self, unsent: int) -> None:
        """While writing is paused the buffer only shrinks, unless nobody reads."""
        if self.transport.get_write_buffer_size() < unsent:
            self._expect_reading()
        else:
            self.transport.abort()  # the application is told that the client has gone
