"""Request bytes to an engine, answer bytes back. A stream is never parsed per token: whole events are passed on as they
come and only searched for three patterns (the engine's error frame, the usage event, the route's end).

A dead vLLM ends its streams politely, with an error event and `data: [DONE]`: a relay that only copies would pass a broken
answer as a finished one.
"""

from __future__ import annotations

import asyncio
import errno
import re
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from serving.errors import Dialect, RequestError, UnknownRoute
from serving.gateway.connection import Address, Connection, Pool
from serving.gateway.refusal import named
from serving.gateway.routes import Route
from serving.gateway.routing import Charged, Upstream

BUSY_HEADER, OCCUPIED = b"x-steelyard-busy", b"trial"
MAX_ANSWER_BYTES = 256 * 1024 * 1024  # of one unstreamed answer
MAX_HELD_BYTES = (
    1024 * 1024
)  # of a stream, until its head could be sent: the client may have an answer before it to read
MAX_EVENT_BYTES = 8 * 1024 * 1024  # of one SSE event
# The door says whom it lets in that is on trial: of who was still before it, its engine did not die.
_TRIAL = b"expect: 100-continue\r\nx-steelyard-trial: %d\r\n"
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)  # says nothing of the engine

# Sought in answers that are refusals by their status, which hold no generated text.
_NO_ROUTE = b'{"detail":"Not Found"}'
# What vLLM says to all inside when its core has died. As the message itself: one may repeat its client's words.
_DEAD = re.compile(rb'"message": ?"EngineCore encountered an issue')
# Inside a JSON string quotes and line feeds are escaped, so none of these can come from generated text.
_ERROR_FRAMES = (b'data: {"error"', b"event: error\n")
# What vLLM says of requests it drops when it is stopped, under a status 200. Sought on routes with choices only, which hold no
# JSON but vLLM's own: a response repeats its client's `metadata` and `tools`, a message holds the model's tool input.
_ABORTED = b'"finish_reason":"abort"'
# On the others it gives no reason: what reaches its core when that was told to end is answered as whole, without a token, and any
# answer that was made has one at least.
_NO_TOKENS = re.compile(rb'"output_tokens":\s*0\b')
_NOTHING_MADE = b"an answer without a token, as of an engine that was told to end"
# vLLM makes messages of a chat stream and cannot read that one's error frames: what it says then ends in what it could not read.
# A core's death, a 500 among these, has lost its words, so only who is at fault is told by them.
_MISTAKE_OF_A_MESSAGE = re.compile(rb"'code': (4\d\d)}}, input_type=dict")
_REFUSED = b'{"error":{"message":"the engine refused the request with status %b","code":%b}}'
_MAYBE_ERROR = b"error"  # in all frames but the last: one search for most events
_USAGE_EVENT = b'"choices":[]'
_USAGE_MARK = b'_tokens":'
_TOKEN, _UNFINISHED = b'data: {"id"', b'"finish_reason":null'
_FINISHED = b'"finish_reason":"'
_COUNTS = re.compile(rb'"(prompt_tokens|input_tokens|completion_tokens|output_tokens|cached_tokens)":\s*(\d+)')


SILENT = "silent"  # as an outcome: it had said nothing when it was given up


class Broken(Exception):
    """An attempt failed before the first byte went to the client, so that another replica may try."""

    def __init__(
        self, outcome: str, detail: str, *, killed: bool, gone: bool = False, unreachable: bool = False
    ) -> None:
        super().__init__(detail)
        self.outcome = outcome  # word for the metrics
        self.killed = killed  # the engine had the request and died under it: it counts for the fuse
        self.gone = gone  # nobody is there for the next request either; never for what a client can bring about
        self.unreachable = unreachable  # nor did its node say so

    @property
    def answered(self) -> bool:
        """The engine is well enough to say no, and would say it again."""
        return not (self.killed or self.gone or self.outcome == SILENT)


class Busy(Exception):
    """The door had no free slot, or this process no free file descriptor to reach it by, or `occupied`: another one is on trial
    there."""

    def __init__(self, *, occupied: bool = False) -> None:
        super().__init__()
        self.occupied = occupied


class Recalled(Exception):
    """While it had no answer an engine died of a copy of it, for all we know: it must be on trial."""


class Usage(msgspec.Struct):
    """Token counts as the engine states them; None when it did not."""

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None

    def read(self, data: bytes) -> None:
        """Takes the last value of each count in `data` (JSON bytes)."""
        for name, value in _COUNTS.findall(data):
            if name in (b"prompt_tokens", b"input_tokens"):
                self.prompt = int(value)
            elif name == b"cached_tokens":
                self.cached = int(value)
            else:
                self.completion = int(value)


class StreamScan:
    """Looks at a stream's bytes event by event, without parsing them."""

    __slots__ = (
        *("aborted", "complete", "died", "error", "events", "usage"),
        *("_ends", "_finish", "_mark", "_opening", "_tail", "_usage_by_option", "_why", "_withhold"),
    )

    def __init__(self, route: Route, *, withhold_usage: bool) -> None:
        self._tail = b""
        self._ends = route.ends
        self._opening = route.opening
        self._usage_by_option = route.usage_by_option
        self._mark = _USAGE_EVENT if route.usage_by_option else _USAGE_MARK
        self._withhold = withhold_usage
        self.usage = Usage()
        self.events = 0  # delivered
        self.complete = False  # the route's end was seen
        self.died = False  # the engine's error frame was seen: nothing from it on was returned
        self.error = b""  # that frame
        self.aborted = False  # it says that the engine was stopped
        self._why = route.finish
        self._finish = b""  # the last piece that may say why

    @property
    def finish(self) -> str | None:
        """Why the engine ended the answer, in its own word; None where it did not say. Of several choices, the last one's."""
        found = self._why.findall(self._finish) if self._why is not None else ()
        return found[-1].decode() if found else None

    @property
    def tokens(self) -> int:
        """Tokens in the events so far, where the engine has not told yet: one each but for those that open the stream."""
        return max(0, self.events - self._opening)

    @property
    def told(self) -> bytes:
        """The error frame's JSON."""
        told = self.error.partition(b"data: ")[2]
        mistake = _MISTAKE_OF_A_MESSAGE.search(told)
        return told if mistake is None else _REFUSED % (mistake[1], mistake[1])

    @property
    def outcome(self) -> str:
        """What a stream without its end tells of its engine, in the metrics' word: `ok`, the request is at fault; `http_5xx`, the
        engine failed with this request and lives; `died`, it says so, or says nothing that can be read."""
        code = _code_of(self.told)
        if code is not None and 400 <= code < 500:
            return "ok"
        return "died" if code is None or _DEAD.search(self.error) else "http_5xx"

    def feed(self, data: bytes) -> bytes:
        """The whole events in what came so far that the client may have; the rest is kept for the next call."""
        if self.is_token(data, 0, len(data)):
            self.events += 1
            return data
        if self._tail:
            data = self._tail + data
            self._tail = b""
        if not data.endswith(b"\n\n"):
            cut = data.rfind(b"\n\n") + 2
            if cut == 1:
                cut = 0
            data, self._tail = data[:cut], data[cut:]
            if len(self._tail) > MAX_EVENT_BYTES:
                self.died = True
            if not data:
                return b""
        if _MAYBE_ERROR in data or (self._usage_by_option and _ABORTED in data):
            data = self._until_error(data)
        if self._usage_by_option and _FINISHED in data:
            self._finish = data
        if self._mark in data:
            if self._usage_by_option:
                data = self._usage_event(data)
            else:
                self._finish = data
                self.usage.read(data)
                if self.usage.completion == 0:
                    data = self._until_nothing(data)
        if not self.complete:
            # At the start of a line only: elsewhere the same words may be generated text.
            self.complete = any(data.startswith(end) or b"\n" + end in data for end in self._ends)
        self.events += data.count(b"\n\n")
        return data

    def is_token(self, data: bytes, start: int, end: int) -> bool:
        """Whether that piece, coming now, is one token of one choice, alone, as nearly everything is: no end, no error, no
        usage. Cheap to tell."""
        return (
            data.startswith(_TOKEN, start)
            and data.endswith(b"\n\n", start, end)
            and data.count(b"\n", start, end) == 2
            and data.rfind(_UNFINISHED, start, end) > 0
            and self._usage_by_option
            and not self._tail
        )

    def _until_error(self, data: bytes) -> bytes:
        for frame in (*_ERROR_FRAMES, _ABORTED) if self._usage_by_option else _ERROR_FRAMES:
            at = data.find(frame)
            if at >= 0:
                self.died, self.aborted = True, frame is _ABORTED
                before = data.rfind(b"\n\n", 0, at)
                begin = before + 2 if before >= 0 else 0
                data, self.error = data[:begin], data[begin : data.index(b"\n\n", at)]
                break
        return data

    def _until_nothing(self, data: bytes) -> bytes:
        for found in _NO_TOKENS.finditer(data):
            begin = data.rfind(b"\n\n", 0, found.start()) + 2
            begin = 0 if begin == 1 else begin
            if _made_nothing(data[begin : data.index(b"\n\n", found.end())].partition(b"data: ")[2]):
                self.died, self.aborted, self.error = True, True, _NOTHING_MADE
                self._finish = b""
                return data[:begin]
        return data

    def _usage_event(self, data: bytes) -> bytes:
        kept = []
        for event in data.split(b"\n\n")[:-1]:
            if _USAGE_EVENT in event:
                self.usage.read(event)
                if self._withhold:
                    continue
            kept.append(event + b"\n\n")
        return b"".join(kept)


class Sink(Protocol):
    """Takes a stream's events for the client. A piece was sent at once, or there is something to await before the next."""

    def push(self, data: bytes) -> Awaitable[None] | None:
        """Whole events."""

    def chunk(self, data: bytes) -> bool:
        """Whole events framed as one HTTP/1.1 chunk; False, and nothing was sent, where only `push` will do."""

    def end(self, data: bytes) -> Awaitable[None] | None:
        """The last events, and the end of the answer."""


class Reply:
    """An engine's answer as it arrives (a `connection.Receiver`): whole in `body`, or event by event through `relay`.

    What arrives goes to the client inside the socket's callback. Its reader is woken for three things only: the first
    bytes, a client that is slow, and the end.
    """

    __slots__ = (
        *(
            "body",
            "charge",
            "content_type",
            "error",
            "finished",
            "let_in",
            "patient",
            "route",
            "scan",
            "since",
            "status",
            "stream",
        ),
        *("_busy", "_connection", "_ended", "_fault", "_held", "_news", "_sink", "_size", "_slow"),
        *("_tell_let_in", "_withhold"),
    )

    def __init__(
        self,
        connection: Connection,
        route: Route,
        withhold_usage: bool,
        stream: bool = False,
        patient: bool = True,
        charge: Charged | None = None,
        let_in: Callable[[], None] | None = None,
    ) -> None:
        self.stream, self.patient = stream, patient  # asked for a stream; never tried elsewhere for silence
        self.charge = charge
        self.since = time.monotonic()
        self.status = 0  # 0 until the answer began
        self.content_type = b"application/json"
        self.body: bytes | None = None
        self.scan: StreamScan | None = None  # of a stream
        self.error: str | None = None  # how the connection broke
        self.finished = False  # the stream's end was handed to the sink
        self._connection = connection
        self.route, self._withhold = route, withhold_usage
        self._busy, self._ended = b"", False
        self.let_in = False  # by the door, which says so of those on trial
        self._tell_let_in = let_in
        self._held: list[bytes] = []
        self._size = 0  # bytes in `_held`
        self._sink: Sink | None = None
        self._slow: Awaitable[None] | None = None
        self._fault: Exception | None = None
        self._news: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def busy(self) -> bytes:
        """The door had no free slot, or another one is on trial (`OCCUPIED`)."""
        return self._busy

    @property
    def outcome(self) -> str:
        """What became of it, now that it has ended, in the metrics' word."""
        if self.scan is None or self.finished:
            return "ok"
        return "died" if self.error is not None else self.scan.outcome

    @property
    def crashed(self) -> bool:
        """The engine died under a stream that had begun. One that was stopped drops its streams politely."""
        return self.outcome == "died" and not (self.error is None and self.scan is not None and self.scan.aborted)

    def give_up(self, why: str, *, suspect: bool) -> None:
        """Whoever awaits `begun` gets Broken. `suspect`: the engine is not well, and this request may be the reason."""
        if self._fault is None and not self._ended:
            self._fault = Broken(SILENT, why, killed=suspect)
            self._wake()

    def recall(self) -> None:
        """Whoever awaits `begun` gets Recalled."""
        if self._fault is None and not self._ended:
            self._fault = Recalled()
            self._wake()

    async def begun(self) -> None:
        """Until a stream's first events are here, or the whole of anything else, or nothing more will come."""
        while not (self._ended or self._fault or (self.scan is not None and (self._held or self.scan.died))):
            await self._wait()
        if self._fault is not None:
            raise self._fault
        if self.scan is None:
            self.body = self._taken()

    async def relay(self, sink: Sink) -> None:
        """Hands the stream's events to `sink` as they come, its end included where it is the right one, and returns when
        the engine has ended it, however it did."""
        assert self.scan is not None
        self._sink = sink
        if self._held:
            paused = self._size > MAX_HELD_BYTES
            self._emit(self._taken())
            if paused and self._slow is None and not self._ended:
                self._connection.resume()
        while self._fault is None:
            if self._slow is not None:
                slow, self._slow = self._slow, None
                await slow
                if not self._ended:
                    self._connection.resume()
            elif self._ended or self.scan.died:
                return
            else:
                await self._wait()
        raise self._fault

    def close(self) -> None:
        """No more of it is wanted: unless it is whole, the connection is dropped and the engine frees the slot."""
        if not self._ended:
            self._ended = True
            self._connection.abort()

    # -- connection's side ---------------------------------------------------------------------------------------

    def answered(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status
        self.content_type = headers.get(b"content-type", self.content_type)
        self._busy = headers.get(BUSY_HEADER, b"") if status == 503 else b""
        if 200 <= status < 300 and self.content_type.startswith(b"text/event-stream"):
            self.scan = StreamScan(self.route, withhold_usage=self._withhold)

    def awaited(self) -> None:
        self.let_in = True
        if self._tell_let_in is not None:
            self._tell_let_in()

    def received(self, data: bytes) -> None:
        scan = self.scan
        if self._fault is not None or self.finished or (scan is not None and scan.died):
            return  # nothing after an error frame is the client's, above all no `[DONE]`
        if scan is not None:
            data = scan.feed(data)
            if self._sink is not None:
                if data or scan.died:
                    self._emit(data)
                return
        if data:
            self._held.append(data)
            self._size += len(data)
        if scan is not None:
            if self._size > MAX_HELD_BYTES:
                self._connection.pause()
            self._wake()
        elif self._size > MAX_ANSWER_BYTES:
            self._fault = Broken("too_long", f"an answer over {MAX_ANSWER_BYTES} bytes", killed=True)
            self._wake()

    def chunk(self, data: bytes, start: int, end: int) -> None:
        sink, scan = self._sink, self.scan
        if sink is None or scan is None or scan.complete or scan.died or self._fault is not None:
            self.received(data[start:end])
        elif scan.is_token(data, start, end) and sink.chunk(data):
            scan.events += 1
        else:
            self.received(data[start:end])

    def ended(self, error: str | None) -> None:
        self._ended, self.error = True, error
        self._wake()

    def _emit(self, data: bytes) -> None:
        sink, scan = self._sink, self.scan
        assert sink is not None and scan is not None
        try:
            if scan.complete and not scan.died:
                self.finished = True
                slow = sink.end(data)
            else:
                slow = sink.push(data) if data else None
        except Exception as e:  # raised by whoever awaits, not in the socket's callback
            self._fault, slow = e, None
            self._wake()
        if slow is not None:
            self._slow = slow
            if not self._ended:  # then it is the next request's
                self._connection.pause()
            self._wake()
        elif scan.died:
            self._wake()

    def _taken(self) -> bytes:
        held, self._held, self._size = self._held, [], 0
        return held[0] if len(held) == 1 else b"".join(held)

    def _wake(self) -> None:
        if not self._news.done():
            self._news.set_result(None)

    async def _wait(self) -> None:
        await self._news
        self._news = asyncio.get_running_loop().create_future()


class Engines:
    """The way to all engines of the fleet: one pool of connections per gateway."""

    def __init__(self, secret: str) -> None:
        self._pool = Pool()
        self._common = f"x-steelyard-secret: {secret}\r\ncontent-type: application/json\r\nx-request-id: ".encode()

    async def open(
        self,
        upstream: Upstream,
        route: Route,
        body: bytes,
        request_id: str,
        *,
        withhold_usage: bool,
        trace: bytes = b"",
        tokens: int = 0,
        trial_s: float = 0.0,
        stream: bool = False,
        patient: bool = True,
        charge: Charged | None = None,
        let_in: Callable[[], None] | None = None,
    ) -> Reply:
        """Sends the request and returns when the first bytes of a good answer are here.

        Raises Busy, or Broken for whatever another replica might do better. The engine's own refusals (4xx) are
        answers: they come back as a Reply. `trace`: header lines of its trace. `tokens`: what the request may take of the KV
        cache, for the door, which has nobody else on trial for `trial_s`, unless the answer begins before. Unless `patient`,
        an engine that says nothing is given up where another one is better (`VersionLine.give_up_on_the_silent`). With a
        `charge`, Recalled when it comes under suspicion before it has an answer. `let_in` is called when the door has
        let it in that is on trial.
        """
        who = upstream.endpoint.id
        address, host = _address(upstream.endpoint.url)
        head = b"POST %b HTTP/1.1\r\nhost: %b\r\n%b%b\r\n%bx-steelyard-tokens: %d\r\n%bcontent-length: %d\r\n\r\n" % (
            *(route.path.encode(), host, self._common),
            *(request_id.encode(), trace, tokens, _TRIAL % (trial_s * 1e3) if trial_s else b""),
            len(body),
        )
        kept = self._pool.take(address)
        if kept is not None:
            reply = Reply(kept, route, withhold_usage, stream, patient, charge, let_in)
            await _asked(upstream, kept, reply, head, body)
            if reply.status != 0 or reply.let_in:
                return _told(_good(who, reply), upstream, route, request_id)
        # A kept connection that ends without a byte says only that the engine closed it: an engine that still takes
        # connections did not die of this request, and is asked once more. One that had let it in is not.
        try:
            new = await self._pool.connect(address)
        except OSError as e:  # a TimeoutError is one
            if e.errno in _OUT_OF_FILES:
                raise Busy from None
            if kept is not None:
                raise Broken("died", f"{who}: {reply.error}, and it takes no other", killed=True, gone=True) from None
            silent = not isinstance(e, ConnectionRefusedError)
            raise Broken(
                "connect_error", f"{who}: {e or 'timeout'}", killed=False, gone=True, unreachable=silent
            ) from None
        reply = Reply(new, route, withhold_usage, stream, patient, charge, let_in)
        await _asked(upstream, new, reply, head, body)
        return _told(_good(who, reply), upstream, route, request_id)

    def close(self) -> None:
        self._pool.close()


async def _asked(upstream: Upstream, connection: Connection, reply: Reply, head: bytes, body: bytes) -> None:
    """Sends the request on `connection`; returns when the reply has begun, or ended before it did."""
    connection.send(head, body, reply)
    upstream.awaiting.add(reply)
    try:
        await reply.begun()
    except BaseException:
        reply.close()
        raise
    finally:
        upstream.awaiting.discard(reply)


@lru_cache(maxsize=4096)
def _address(url: str) -> tuple[Address, bytes]:
    """Where an endpoint's URL leads, and its Host header."""
    parts = urlsplit(url)
    return (parts.hostname or "", parts.port or 80), parts.netloc.encode()


def _good(who: str, reply: Reply) -> Reply:
    """The reply, if it is one that the client may have; raises Busy or Broken otherwise, and it is closed."""
    try:
        return _judged(who, reply)
    except (Busy, Broken):
        reply.close()
        raise


def _judged(who: str, reply: Reply) -> Reply:
    if reply.status == 0:
        raise Broken("died", f"{who}: {reply.error}", killed=True, gone=True)
    scan = reply.scan
    if scan is not None:
        if scan.died:
            return _failed_at_once(who, reply, scan)
        if not scan.events:
            raise Broken("died", f"{who}: {reply.error or 'the stream ended before its first event'}", killed=True)
        return reply
    body = reply.body or b""
    if reply.busy:
        raise Busy(occupied=reply.busy == OCCUPIED)
    if not _is_answer(reply.status):
        text = body[:2000].decode(errors="replace")
        if reply.status >= 500 and _DEAD.search(body):
            raise Broken("died", f"{who}: {text}", killed=True, gone=True)
        outcome = "http_5xx" if reply.status >= 500 else "refused"
        raise Broken(outcome, f"{who}: {reply.status} {text}", killed=False)
    if reply.error is not None:
        raise Broken("died", f"{who}: {reply.error}", killed=True)
    if _ABORTED in body if reply.route.usage_by_option else _NO_TOKENS.search(body) and _made_nothing(body):
        raise Broken("died", f"{who}: the engine was stopped under the request", killed=False, gone=True)
    return reply


def _told(reply: Reply, upstream: Upstream, route: Route, request_id: str) -> Reply:
    """The reply, a refusal with the request's id; in our words where the engine has no such route, which depends on what its
    model can do: of that its web framework tells in two words and in nobody's dialect."""
    if reply.status == 404 and reply.body == _NO_ROUTE:
        error = UnknownRoute(
            f"{upstream.endpoint.version_id} does not serve {route.path}: its engine has no such route"
        )
        reply.body = msgspec.json.encode(error.body(route.dialect, request_id))
    elif reply.status >= 400 and reply.body is not None:
        reply.body = named(reply.body, reply.status, route.dialect, request_id)
    return reply


class _Counted(msgspec.Struct):
    output_tokens: int | None = None


class _Made(msgspec.Struct):
    """An answer, or the event with which a stream of one ends, as far as it says how much was made."""

    usage: _Counted | None = None
    response: _Made | None = None


_decode_made = msgspec.json.Decoder(_Made).decode


def _made_nothing(answer: bytes) -> bool:
    """Whether this JSON is an answer of no token."""
    try:
        made = _decode_made(answer)
    except (msgspec.MsgspecError, RecursionError):  # the client's own JSON may be in it
        return False
    usage = (made.response or made).usage
    return usage is not None and usage.output_tokens == 0


class _Error(msgspec.Struct):
    code: int | None = None


class _ErrorFrame(msgspec.Struct):
    error: _Error


_decode_error = msgspec.json.Decoder(_ErrorFrame).decode


def _code_of(error: bytes) -> int | None:
    """The status in an error event's JSON."""
    try:
        return _decode_error(error).error.code
    except msgspec.MsgspecError:
        return None


def _failed_at_once(who: str, reply: Reply, scan: StreamScan) -> Reply:
    """A stream whose first bytes hold its error, so that nothing has left yet: the client's fault is the answer, with
    the status that vLLM had no way to send any more; anything else may go better elsewhere."""
    outcome, code = scan.outcome, _code_of(scan.told)
    if outcome == "ok" and code is not None:
        reply.close()
        reply.status, reply.content_type, reply.body, reply.scan = code, b"application/json", scan.told, None
        return reply
    detail = f"{who}: {scan.error[:300].decode(errors='replace')}"
    killed, gone = outcome == "died" and not scan.aborted, scan.aborted or _DEAD.search(scan.error) is not None
    raise Broken(outcome, detail, killed=killed, gone=gone)


def _is_answer(status: int) -> bool:
    """Whether the client may see it: not a failure of the engine's, nor its door's refusal of us, nor a way elsewhere."""
    return 200 <= status < 300 or (400 <= status < 500 and status != 401) or status == 501


def error_event(path: str, dialect: Dialect, error: RequestError, request_id: str) -> bytes:
    """The one SSE event that ends a broken stream, in the dialect of the route."""
    body = error.body(dialect, request_id)
    if dialect == "anthropic":
        return b"event: error\ndata: " + msgspec.json.encode(body) + b"\n\n"
    if path == "/v1/responses":
        told = {"type": "error", "code": error.code, "message": error.message, "param": None, "sequence_number": 0}
        return b"event: error\ndata: " + msgspec.json.encode({**told, **body}) + b"\n\n"
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
