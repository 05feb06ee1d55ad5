"""One streamed answer, read from a socket in whatever pieces it comes.

`Answer` counts SSE events and remembers when they came; `Connection` is one keep-alive HTTP/1.1 connection that carries
one answer at a time. Hot path: the client shares two cores with what it measures, so a received piece costs one
timestamp, one C parser call and one byte search, and no JSON is read per event.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import cast

import httptools

_LF = 10
_TAIL_BYTES = 1024  # holds the last content event, a usage event, an error frame and [DONE]
_CONTENT = re.compile(rb'"(?:content|text)":\s*"[^"]')
_FINISH = re.compile(rb'"finish_reason":\s*"(\w+)"')
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_CODE = re.compile(rb'"code":\s*"(\w+)"')
_ERROR = re.compile(rb'data: \{"error"[^\n]{0,300}')


class Answer:
    """What is known of one request. Times are seconds of the monotonic clock; NaN until they happened.

    `times[i]` is when a burst (one read of the socket) arrived and `counts[i]` how many events ended in it, `[DONE]`
    and the role event included. `first` is the burst with the first character of content. `error` is empty when the
    answer is whole: status 200, a finish reason, `[DONE]`, no error frame. `retry_after_s` is what a refusal promised.
    `party` is whose request it was, when a phase has several.
    """

    __slots__ = (
        "_half",
        "_head",
        "_tail",
        "counts",
        "due",
        "end",
        "error",
        "first",
        "max_tokens",
        "party",
        "retry_after_s",
        "start",
        "status",
        "times",
    )

    def __init__(self, max_tokens: int, due: float, party: int = 0) -> None:
        self.max_tokens = max_tokens
        self.due = due
        self.party = party
        self.start = self.first = self.end = self.retry_after_s = float("nan")
        self.status = 0
        self.error = ""
        self.times: list[float] = []
        self.counts: list[int] = []
        self._half = False
        self._head: bytes | None = b""
        self._tail = b""

    def feed(self, body: bytes, now: float) -> int:
        """Take a piece of the body; returns how many events ended in it (a blank line ends an event)."""
        skip = 1 if self._half and body[0] == _LF else 0
        events = skip + body.count(b"\n\n", skip)
        self._half = len(body) > skip and body[-1] == _LF and not body.endswith(b"\n\n", skip)
        self._tail = (self._tail + body)[-_TAIL_BYTES:]
        if self._head is not None:
            self._head += body
            if _CONTENT.search(self._head):
                self.first, self._head = now, None
        return events

    def finish(self, now: float) -> None:
        """The body is complete: decide whether it was a whole answer."""
        self.end = now
        if self.status == 429:  # commonly many, each with its own numbers
            code = _CODE.search(self._tail)
            self.error = f"status 429: {code[1].decode() if code else ''}"
        elif self.status != 200:
            self.error = f"status {self.status}: {self._tail[:200].decode(errors='replace')}"
        elif frame := _ERROR.search(self._tail):
            self.error = f"error frame: {frame[0].decode(errors='replace')}"
        elif b"data: [DONE]" not in self._tail or not _FINISH.search(self._tail):
            self.error = "incomplete: no finish reason or no [DONE]"

    @property
    def events(self) -> int:
        return sum(self.counts)

    @property
    def tokens(self) -> int:
        """Tokens generated: the usage event's count when there is one, `max_tokens` when the engine stopped there,
        else events."""
        if usage := _USAGE.search(self._tail):
            return int(usage[1])
        finish = _FINISH.search(self._tail)
        return self.max_tokens if finish and finish[1] == b"length" else self.events


class Connection(asyncio.Protocol):
    """One keep-alive connection. `on_done(answer)` is called once per `send`; afterwards `reusable` says what is next.

    httptools calls the `on_*` methods from `feed_data`.
    """

    def __init__(self) -> None:
        self.reusable = True
        self.untouched = True  # no byte of the current answer has come: a lost connection may be retried
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._on_done: Callable[[Answer], None] | None = None
        self._now = 0.0
        self._events = 0

    def send(self, request: bytes, answer: Answer, on_done: Callable[[Answer], None]) -> None:
        """Write one request. The connection must be idle and `reusable`."""
        assert self._answer is None and self._transport is not None
        self._answer, self._on_done, self.untouched = answer, on_done, True
        answer.start = time.monotonic()
        self._transport.write(request)

    def abort(self, reason: str) -> None:
        """Drop the connection; the answer under way ends with `reason` as its error."""
        self._fail(reason)
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("connection cut")

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        self._events = 0
        self.untouched = False
        answer = self._answer
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.abort(f"malformed HTTP: {error}")
        if self._events and answer is not None:
            answer.times.append(self._now)
            answer.counts.append(self._events)
        if answer is not None and answer.end == answer.end and self._on_done is not None:
            on_done, self._on_done = self._on_done, None
            on_done(answer)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is not None and name.lower() == b"retry-after" and value.isdigit():
            self._answer.retry_after_s = float(value)

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._events += self._answer.feed(body, self._now)

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()
            self._answer.finish(self._now)
            self._answer = None

    @property
    def local_port(self) -> int:
        """The client's side of the connection."""
        assert self._transport is not None
        return int(self._transport.get_extra_info("sockname")[1])

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _fail(self, reason: str) -> None:
        self.reusable = False
        answer, self._answer = self._answer, None
        if answer is not None and self._on_done is not None:
            answer.error, answer.end = reason, time.monotonic()
            on_done, self._on_done = self._on_done, None
            on_done(answer)
