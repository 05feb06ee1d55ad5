"""Request bytes to an engine, answer bytes back. A stream is never parsed per token: whole events are passed on as they
come and only searched for three patterns (the engine's error frame, the usage event, the route's end).

A dead vLLM ends its streams politely, with an error event and `data: [DONE]`: a relay that only copies would pass a broken
answer as a finished one.
"""

from __future__ import annotations

import re

import aiohttp
import msgspec

from serving.errors import Dialect, RequestError
from serving.gateway.routes import Route
from serving.gateway.routing import Upstream

CONNECT_TIMEOUT_S = 2.0
IDLE_S = 4.0  # vLLM closes connections idle for 5 s: one used at that moment would look like an engine that died
BUSY_HEADER = "x-steelyard-busy"
MAX_ANSWER_BYTES = 256 * 1024 * 1024  # of one unstreamed answer
MAX_EVENT_BYTES = 8 * 1024 * 1024  # of one SSE event

# Inside a JSON string quotes and line feeds are escaped, so none of these can come from generated text.
_ABORTED = b'"finish_reason":"abort"'  # what vLLM says of requests it drops when it is stopped, under a status 200
_ERROR_FRAMES = (b'data: {"error"', b"event: error\n", _ABORTED)
_USAGE_EVENT = b'"choices":[]'
_COUNTS = re.compile(rb'"(prompt_tokens|input_tokens|completion_tokens|output_tokens|cached_tokens)":\s*(\d+)')


class Broken(Exception):
    """An attempt failed before the first byte went to the client, so that another replica may try."""

    def __init__(self, outcome: str, detail: str, *, killed: bool, gone: bool = False) -> None:
        super().__init__(detail)
        self.outcome = outcome  # word for the metrics
        self.killed = killed  # the engine had the request and died under it: it counts for the fuse
        self.gone = gone  # nobody is there for the next request either; never for what a client can bring about

    @property
    def answered(self) -> bool:
        """The engine is well enough to say no, and would say it again."""
        return not (self.killed or self.gone)


class Busy(Exception):
    """The door had no free slot."""


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

    __slots__ = ("_ends", "_tail", "_usage_by_option", "_withhold", "complete", "died", "error", "events", "usage")

    def __init__(self, route: Route, *, withhold_usage: bool) -> None:
        self._tail = b""
        # At the start of a line only: elsewhere the same words may be generated text.
        self._ends = tuple((end, b"\n" + end) for end in route.ends)
        self._usage_by_option = route.usage_by_option
        self._withhold = withhold_usage
        self.usage = Usage()
        self.events = 0  # delivered
        self.complete = False  # the route's end was seen
        self.died = False  # the engine's error frame was seen: nothing from it on was returned
        self.error = b""  # that frame

    def feed(self, data: bytes) -> bytes:
        """The whole events in what came so far that the client may have; the rest is kept for the next call."""
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
        for frame in _ERROR_FRAMES:
            at = data.find(frame)
            if at >= 0:
                self.died = True
                before = data.rfind(b"\n\n", 0, at)
                begin = before + 2 if before >= 0 else 0
                data, self.error = data[:begin], data[begin : data.index(b"\n\n", at)]
                break
        if self._usage_by_option:
            if _USAGE_EVENT in data:
                data = self._usage_event(data)
        elif b'_tokens":' in data:
            self.usage.read(data)
        if not self.complete:
            for first, later in self._ends:
                if data.startswith(first) or later in data:
                    self.complete = True
        self.events += data.count(b"\n\n")
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


class Reply:
    """An engine's answer whose first bytes are here: `body` whole, or `first` and more to come from `response`."""

    __slots__ = ("body", "content_type", "first", "response", "scan", "status")

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        *,
        status: int | None = None,
        content_type: bytes | None = None,
        body: bytes | None = None,
        first: bytes = b"",
        scan: StreamScan | None = None,
    ) -> None:
        self.response = response
        self.status = status or response.status
        self.content_type = content_type or response.headers.get("content-type", "application/json").encode()
        self.body = body
        self.first = first
        self.scan = scan


class Engines:
    """Keep-alive connections to all engines of the fleet, one pool per gateway."""

    def __init__(self, secret: str) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S, ttl_dns_cache=300),
            headers={"x-steelyard-secret": secret, "content-type": "application/json"},
            skip_auto_headers=("accept-encoding", "user-agent"),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=256 * 1024,
        )

    async def open(
        self, upstream: Upstream, route: Route, body: bytes, request_id: str, *, withhold_usage: bool
    ) -> Reply:
        """Sends the request and returns when the first bytes of a good answer are here.

        Raises Busy, or Broken for whatever another replica might do better. The engine's own refusals (4xx) are
        answers: they come back as a Reply.
        """
        try:
            response = await self._session.post(
                upstream.endpoint.url + route.path,
                data=body,
                headers={"x-request-id": request_id},
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as e:
            raise Broken("connect_error", f"{upstream.endpoint.id}: {e}", killed=False, gone=True) from None
        except aiohttp.ClientError as e:
            raise Broken("died", f"{upstream.endpoint.id}: {type(e).__name__}: {e}", killed=True, gone=True) from None
        try:
            return await self._first_bytes(upstream, route, response, withhold_usage)
        except BaseException:
            response.close()
            raise

    async def _first_bytes(
        self, upstream: Upstream, route: Route, response: aiohttp.ClientResponse, withhold_usage: bool
    ) -> Reply:
        who = upstream.endpoint.id
        try:
            if response.status == 503 and BUSY_HEADER in response.headers:
                await response.read()
                raise Busy
            if not _is_answer(response.status):
                outcome = "http_5xx" if response.status >= 500 else "refused"
                text = (await response.content.read(2000)).decode(errors="replace")
                raise Broken(outcome, f"{who}: {response.status} {text}", killed=False)
            if response.content_type != "text/event-stream":
                body = await _whole(response.content)
                if _ABORTED in body:
                    raise Broken("died", f"{who}: the engine was stopped under the request", killed=False, gone=True)
                return Reply(response, body=body)
            scan = StreamScan(route, withhold_usage=withhold_usage)
            first = b""
            while not first and not scan.died:
                data = await response.content.readany()
                if not data:
                    break
                first = scan.feed(data)
        except aiohttp.ClientError as e:
            raise Broken("died", f"{who}: {type(e).__name__}: {e}", killed=True) from None
        if scan.died:
            return _failed_at_once(who, response, scan, first)
        if not first:
            raise Broken("died", f"{who}: the stream ended before its first event", killed=True)
        return Reply(response, first=first, scan=scan)

    async def get(self, url: str, timeout_s: float = 5.0) -> str:
        """A text of an engine or a sibling gateway (metrics)."""
        async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=timeout_s)) as r:
            r.raise_for_status()
            return await r.text()

    async def close(self) -> None:
        await self._session.close()


class _Error(msgspec.Struct):
    code: int | None = None


class _ErrorFrame(msgspec.Struct):
    error: _Error


_decode_error = msgspec.json.Decoder(_ErrorFrame).decode


def _failed_at_once(who: str, response: aiohttp.ClientResponse, scan: StreamScan, first: bytes) -> Reply:
    """A stream whose first bytes hold its error, so that nothing has left yet: the client's fault is the answer, with
    the status that vLLM had no way to send any more; anything else may go better elsewhere."""
    data = scan.error.partition(b"data: ")[2]
    try:
        code = _decode_error(data).error.code
    except msgspec.MsgspecError:
        code = None
    if code is not None and 400 <= code < 500 and not first:
        return Reply(response, status=code, content_type=b"application/json", body=data)
    aborted = _ABORTED in scan.error
    detail = f"{who}: {scan.error[:300].decode(errors='replace')}"
    raise Broken("died", detail, killed=not aborted, gone=aborted or code is not None)


def _is_answer(status: int) -> bool:
    """Whether the client may see it: not a failure of the engine's, nor its door's refusal of us, nor a way elsewhere."""
    return 200 <= status < 300 or (400 <= status < 500 and status != 401) or status == 501


async def _whole(content: aiohttp.StreamReader) -> bytes:
    parts, size = [], 0
    while data := await content.readany():
        parts.append(data)
        size += len(data)
        if size > MAX_ANSWER_BYTES:
            raise Broken("too_long", f"an answer over {MAX_ANSWER_BYTES} bytes", killed=True)
    return b"".join(parts)


def error_event(path: str, dialect: Dialect, error: RequestError, request_id: str) -> bytes:
    """The one SSE event that ends a broken stream, in the dialect of the route."""
    body = error.body(dialect, request_id)
    if dialect == "anthropic":
        return b"event: error\ndata: " + msgspec.json.encode(body) + b"\n\n"
    if path == "/v1/responses":
        told = {"type": "error", "code": error.code, "message": error.message, "param": None, "sequence_number": 0}
        return b"event: error\ndata: " + msgspec.json.encode({**told, **body}) + b"\n\n"
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
