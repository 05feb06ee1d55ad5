"""One HTTP exchange over bare ASGI. A framework would cost more per streamed token than the rest of the simulator."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from serving.engine.simulator.core import ClientGone

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

# vLLM's CORS layer adds it to everything.
_VARY = (b"vary", b"Origin")


class Exchange:
    """A request and its answer. With `name_requests` every answer names its request, as `--enable-request-id-headers`
    makes vLLM do: the caller's X-Request-Id, or a new one."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, name_requests: bool) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: str = scope.get("query_string", b"").decode("latin-1")
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers = [_VARY]
        if name_requests:
            name = self.header(b"x-request-id") or uuid.uuid4().hex
            self._headers.append((b"x-request-id", name.encode("latin-1")))

    def header(self, name: bytes) -> str | None:
        """The first value of a header, by its lower-case name."""
        for key, value in self._scope["headers"]:
            if key == name:
                return bytes(value).decode("latin-1")
        return None

    async def body(self) -> bytes:
        """The whole request body."""
        parts: list[bytes] = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)

    async def hung_up(self) -> None:
        """Returns when the client has closed the connection. Only after `body`."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def json(self, status: int, value: object, *headers: tuple[bytes, bytes]) -> None:
        await self.answer(status, msgspec.json.encode(value), b"application/json", *headers)

    async def answer(self, status: int, body: bytes, content_type: bytes, *headers: tuple[bytes, bytes]) -> None:
        sized = [*headers, (b"content-length", b"%d" % len(body))]
        if content_type:
            sized.append((b"content-type", content_type))
        await self._start(status, sized)
        await self.write(body, more=False)

    async def start_stream(self) -> None:
        """Send 200 and the headers of an event stream: before any token, as vLLM does."""
        await self._start(200, [(b"content-type", b"text/event-stream; charset=utf-8")])

    async def write(self, data: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers + self._headers})
