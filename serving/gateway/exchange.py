"""One HTTP exchange: what came in, what may still go out, and what is written down about it at its end."""

from __future__ import annotations

import functools
import re
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, MutableMapping
from random import getrandbits
from typing import Any, TypeVar

import msgspec
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from serving.errors import BadRequest, BodyTooLarge, Dialect, RequestError
from serving.gateway.routes import dialect_of
from serving.telemetry.logs import RequestLine
from serving.telemetry.tracing import Trace

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Coroutine[Any, Any, None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
JSON = b"application/json"


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class Exchange:
    """Wraps one ASGI call. Exactly one of `answer`, `fail` or `start`...`end` speaks to the client."""

    __slots__ = (
        *("dialect", "headers", "line", "method", "path", "receive", "request_id", "send"),
        *("ended", "started", "t0", "trace", "_scope"),
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self.receive, self.send = receive, send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.dialect: Dialect = dialect_of(self.path)
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = request_id_of(self.headers.get(b"x-request-id", b""))
        self.t0 = time.monotonic()
        self.started = False  # the response's status line left
        self.ended = False  # the response's last byte left
        self.trace: Trace | None = None  # of one that is sampled
        self.line = RequestLine(ts=time.time(), request_id=self.request_id, route=self.path)

    @property
    def token(self) -> str | None:
        """The API key of either dialect's header, or None."""
        bearer = self.headers.get(b"authorization", b"")
        if bearer[:7].lower() == b"bearer ":
            return bearer[7:].strip().decode("latin-1")
        given = self.headers.get(b"x-api-key")
        return given.decode("latin-1") if given else None

    @property
    def query(self) -> bytes:
        return bytes(self._scope.get("query_string", b""))

    @property
    def came_by(self) -> tuple[str, int]:
        """Address and port of the listening socket this came in by."""
        server = self._scope.get("server") or ("", 0)
        return server[0], server[1]

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises BodyTooLarge over `limit` bytes, at once where content-length tells."""
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise BodyTooLarge(f"the body has {int(declared)} bytes; the limit is {limit}")
        if self.headers.get(b"content-encoding", b"identity") != b"identity":
            raise BadRequest("compressed bodies are not accepted: send the JSON as it is")
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        data: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(data) > limit:
                raise BodyTooLarge(f"the body has more than {limit} bytes, the limit")
            return data
        parts, size = [data], len(data)
        while message.get("more_body", False):
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise BodyTooLarge(f"the body has more than {limit} bytes, the limit")
        return b"".join(parts)

    async def start(self, status: int, content_type: bytes, more: list[tuple[bytes, bytes]] | None = None) -> None:
        rid = self.request_id.encode()
        headers = [(b"content-type", content_type), (b"x-request-id", rid)]
        if self.dialect == "anthropic":
            headers.append((b"request-id", rid))
        if more:
            headers += more
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        self.started = True
        self.line.status = status

    def push(self, data: bytes) -> Awaitable[None] | None:
        """A piece of the body, sent at once where the client keeps up; else what to await before the next piece."""
        return _first_step(self.send({"type": "http.response.body", "body": data, "more_body": True}))

    def push_end(self, data: bytes) -> Awaitable[None] | None:
        """The last piece of the body, as `push`."""
        self.ended = True
        return _first_step(self.send({"type": "http.response.body", "body": data, "more_body": False}))

    def chunks(self) -> Callable[[bytes], bool] | None:
        """After `start`: what writes one whole HTTP/1.1 chunk, framing and all, straight to the client's connection. It
        returns False, and has done nothing, when the client is slow or gone, where `push` knows what to do. None: this
        response is not chunked, or the server is none that we know from inside.

        An event that comes from the engine as a chunk need not be unwrapped and wrapped again, and passes by a dictionary, a
        coroutine and the server's checks.
        """
        cycle = getattr(self.send, "__self__", None)
        if not isinstance(cycle, RequestResponseCycle) or not cycle.chunked_encoding or self.method == "HEAD":
            return None
        flow, write = cycle.flow, cycle.transport.write

        def chunk(data: bytes) -> bool:
            if flow.write_paused or cycle.disconnected:
                return False
            write(data)
            return True

        return chunk

    async def end(self, data: bytes = b"") -> None:
        self.ended = True
        await self.send({"type": "http.response.body", "body": data, "more_body": False})

    async def answer(
        self, status: int, data: bytes, content_type: bytes = JSON, more: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        """A whole response at once."""
        length = (b"content-length", str(len(data)).encode())
        await self.start(status, content_type, [length, *(more or [])])
        await self.end(b"" if self.method == "HEAD" else data)

    async def fail(self, error: RequestError, *, close: bool = False) -> None:
        """The error, in the dialect of the route, before anything else was sent. `close`: the rest of the body may never
        come, so the connection cannot carry another request."""
        more = error.headers() + ([(b"connection", b"close")] if close else [])
        self.line.reason = error.code
        await self.answer(error.status, msgspec.json.encode(error.body(self.dialect, self.request_id)), JSON, more)


def _first_step(sending: Coroutine[Any, Any, None]) -> Awaitable[None] | None:
    """The server's `send` suspends only for a client that is slow, so its first step runs here, in whatever callback the
    bytes came by; no task needs to wake for them."""
    try:
        waits_for = sending.send(None)
    except StopIteration:
        return None
    return rest(sending, waits_for)


@types.coroutine
def rest(begun: Coroutine[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """Await what is left of a coroutine whose first step, taken by `begun.send(None)`, ended in waiting for something.
    Most are done in that step, and then need no task, timer or callback."""
    while True:
        try:
            given = yield waits_for
        except BaseException as e:
            step = functools.partial(begun.throw, e)
        else:
            step = functools.partial(begun.send, given)
        try:
            waits_for = step()
        except StopIteration as end:
            result: T = end.value
            return result


def request_id_of(given: bytes) -> str:
    """The client's id when it is a plain token of at most 128 characters, else a new one of 128 random bits."""
    return given.decode() if _REQUEST_ID.fullmatch(given) else f"req_{getrandbits(128):032x}"
