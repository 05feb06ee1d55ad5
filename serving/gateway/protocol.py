"""uvicorn's HTTP/1.1 for clients, and what it leaves open: a head without an end, an upgrade, a client that leaves behind what
it has pipelined."""

from __future__ import annotations

from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving.errors import BadRequest, HeadTooLarge, RequestError
from serving.gateway.exchange import request_id_of
from serving.gateway.routes import dialect_of

MAX_HEAD_BYTES = 64 * 1024  # of one request; nobody has shown a key before its end
MAX_PIPELINED = 8  # requests that are read while another one is answered


class ClientProtocol(HttpToolsProtocol):
    """One client's connection."""

    _head_bytes = -1  # of a head that has begun; -1 between heads
    _refused = False  # nothing more of it is read
    _running: RequestResponseCycle | None = None

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self._head_bytes >= 0 and not self._refused:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge(f"the head of a request may have {MAX_HEAD_BYTES} bytes"))

    def connection_lost(self, exc: Exception | None) -> None:
        running = self._running
        super().connection_lost(exc)  # tells the last request of the connection, and it may not be the one that runs
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()

    # -- the parser's side ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_bytes = -1
        if (
            self.parser.should_upgrade()
        ):  # the parser takes the body for another protocol's, and what follows for a request
            self._refuse(BadRequest("connections are not upgraded here: send the request without `Upgrade`"))
            return
        super().on_headers_complete()
        if 0 < len(self.pipeline) <= MAX_PIPELINED:
            self.flow.resume_reading()  # else it is not seen that the client leaves

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """It was refused."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _refuse(self, error: RequestError) -> None:
        """The last word on this connection; none where an earlier request is still being answered."""
        self._refused = True
        if self._running is not None and not self._running.response_complete:
            self.transport.abort()
            return
        path = self.url.partition(b"?")[0][:200].decode("latin-1")
        body = msgspec.json.encode(error.body(dialect_of(path), request_id_of(b"")))
        head = b"HTTP/1.1 %d \r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (error.status, len(body)) + body)
        self.transport.close()
