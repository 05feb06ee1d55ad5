"""Keep-alive HTTP/1.1 connections to engines: what a general client library costs per request and per event is more than
everything else the gateway does, so this one does only what the relay needs. httptools parses, uvloop carries; body
bytes go to the receiver inside the socket's own callback, without a task in between.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import defaultdict
from typing import Protocol, cast

import httptools

CONNECT_TIMEOUT_S = 2.0
IDLE_S = 4.0  # vLLM closes connections idle for 5 s: one used at that moment would look like an engine that died
_ONE_WRITE_BYTES = 64 * 1024

# Sizes of chunks as uvicorn writes them, by a look-up: what is not among them goes through the parser, and size 0 must.
_SIZES = {b"%x" % n: n for n in range(1, 4096)}
_LONGEST_SIZE = 3 + len(b"\r\n")

# A node that loses its power or its link says nothing. Silence on a stream is asked about after 5 s, and given up after 15 s
# without an answer, as are bytes that nobody takes. TCP_USER_TIMEOUT decides both: where it is set, Linux does not count
# unanswered probes (tcp_keepalive_timer).
_VANISHED = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 5,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 2,
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 15_000,  # milliseconds
}

Address = tuple[str, int]


class Receiver(Protocol):
    """Takes one answer: `answered` once, `received` or `chunk` for every read that brought some of the body, `ended`
    exactly once."""

    def answered(self, status: int, headers: dict[bytes, bytes]) -> None:
        """The final status line and headers are here; names in lower case."""

    def awaited(self) -> None:
        """`100 Continue`: whoever answers has begun to read the request."""

    def received(self, data: bytes) -> None:
        """A piece of the body, without its framing."""

    def chunk(self, data: bytes, start: int, end: int) -> None:
        """A read that is one whole chunk of the body: `data[start:end]`, with its framing around it, as HTTP/1.1 would
        have it from us too."""

    def ended(self, error: str | None) -> None:
        """The answer is whole (None), or the connection broke under it."""


class Connection(asyncio.Protocol):
    """One connection, one request at a time. httptools calls the `on_*` methods from `feed_data`."""

    def __init__(self, pool: Pool, address: Address) -> None:
        self.idle_since = 0.0  # monotonic seconds
        self._pool = pool
        self.address = address
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._parser: httptools.HttpResponseParser
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._complete = self._keep_alive = self._paused = False
        self._between_chunks = False  # the parser is, as far as its last callback tells

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, head: bytes, body: bytes, receiver: Receiver) -> None:
        """Writes one request. The connection must be open and without a receiver."""
        assert self._receiver is None and self._transport is not None
        self._receiver = receiver
        if len(body) < _ONE_WRITE_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    def abort(self) -> None:
        """Drops the connection and what was under way on it, without a word to its receiver: the engine frees the slot."""
        self._receiver = None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """No more is read until `resume`: whoever the bytes are for is slow."""
        if self.open:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self.open:
            assert self._transport is not None
            self._paused = False
            self._transport.resume_reading()

    # -- asyncio's side ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # It holds this object's methods: a ring, which only the cycle collector would find. So it is here no longer than the
        # connection.
        self._parser = httptools.HttpResponseParser(self)
        sock = transport.get_extra_info("socket")
        for option, value in _VANISHED.items():
            sock.setsockopt(*option, value)

    def data_received(self, data: bytes) -> None:
        if self._receiver is None:
            self.abort()  # nobody asked: what comes here unasked must not become the next answer
            return
        if self._between_chunks:
            # A chunk alone, as nearly every event of a stream comes. The parser ends where it began, so it need not know.
            size = data.find(b"\r\n", 1, _LONGEST_SIZE)
            if size > 0 and data.endswith(b"\r\n") and _SIZES.get(data[:size]) == len(data) - size - 4:
                self._receiver.chunk(data, size + 2, len(data) - 2)
                return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as e:
            self._break(f"malformed HTTP: {e}")
            return
        if self._between_chunks and not data.endswith(b"\r\n"):
            self._between_chunks = False  # half of the next one's size came with it
        parts = self._parts
        if parts:
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            if self._receiver is not None:
                self._receiver.received(body)
        if self._complete:
            self._complete = False
            receiver, self._receiver = self._receiver, None
            if receiver is not None:
                if self._keep_alive and not self._paused:  # a paused one would never hear the next answer
                    self._pool.put(self)
                else:
                    self.abort()
                receiver.ended(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        self._break(f"the connection was cut: {exc}" if exc else "the connection was closed")
        del self._parser

    # -- httptools' side -----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:  # a second answer to one request, in the same read: neither is trusted further
            self._keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        headers, self._headers = self._headers, {}
        status = self._parser.get_status_code()
        if self._receiver is None or self._complete:
            return
        if status >= 200:
            self._receiver.answered(status, headers)
        elif status == 100:
            self._receiver.awaited()

    def on_body(self, body: bytes) -> None:
        if not self._complete:
            self._parts.append(body)

    def on_chunk_header(self) -> None:
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        self._between_chunks = True

    def on_message_complete(self) -> None:
        self._between_chunks = False
        if self._complete or self._parser.get_status_code() < 200:
            return
        self._complete = True
        self._keep_alive = self._parser.should_keep_alive()  # the parser forgets it with the message

    def _break(self, why: str) -> None:
        receiver = self._receiver
        self.abort()
        if receiver is not None:
            receiver.ended(why)


class Pool:
    """Idle connections by address, the one used last is used next. Used from one event loop only."""

    def __init__(self) -> None:
        self._idle: defaultdict[Address, list[Connection]] = defaultdict(list)
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    def take(self, address: Address) -> Connection | None:
        """An idle connection, if there is one that the engine still keeps for sure."""
        idle = self._idle.get(address)
        oldest = time.monotonic() - IDLE_S
        while idle:
            connection = idle.pop()
            if connection.open and connection.idle_since > oldest:
                return connection
            connection.abort()
        return None

    async def connect(self, address: Address) -> Connection:
        """A new connection. Raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await loop.create_connection(lambda: Connection(self, address), *address)
        return connection

    def put(self, connection: Connection) -> None:
        """Its answer is whole: the next request may have it."""
        if self._closed or not connection.open:
            connection.abort()
            return
        connection.idle_since = time.monotonic()
        self._idle[connection.address].append(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(IDLE_S, self._sweep)

    def forget(self, connection: Connection) -> None:
        """The other side closed it."""
        idle = self._idle.get(connection.address)
        if idle and connection in idle:
            idle.remove(connection)

    def close(self) -> None:
        """Drops every idle connection; those in use are dropped when they come back."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for idle in self._idle.values():
            for connection in idle:
                connection.abort()
        self._idle.clear()

    def _sweep(self) -> None:
        self._sweeper = None
        oldest = time.monotonic() - IDLE_S
        for address, idle in list(self._idle.items()):
            for connection in [c for c in idle if c.idle_since <= oldest]:
                idle.remove(connection)
                connection.abort()
            if not idle:
                del self._idle[address]
        if self._idle:
            self._sweeper = asyncio.get_running_loop().call_later(IDLE_S / 4, self._sweep)
