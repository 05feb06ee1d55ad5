"""An engine's answer on its way to the client, and what is counted of it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Awaitable

import msgspec

from serving.errors import BadRequest, EngineBroken, RequestError
from serving.gateway.exchange import Exchange
from serving.gateway.hold import NO_CACHE
from serving.gateway.relay import Reply, error_event
from serving.gateway.routes import Route
from serving.gateway.sent import Sent, Store
from serving.telemetry.metrics import ModelMetrics, StreamMeter

log = logging.getLogger(__name__)


async def deliver(x: Exchange, route: Route, reply: Reply, metrics: ModelMetrics, store: Store) -> None:
    meter = metrics.stream(x.t0)
    scan = reply.scan
    try:
        if scan is None:
            assert reply.body is not None
            if x.started:  # keep-alives left already
                await _refused(x, route, reply.status, reply.body)
                return
            await x.answer(reply.status, reply.body, reply.content_type)
            x.line.reason = "ok" if reply.status < 400 else "engine_refused"
            _count_unstreamed(x, reply, metrics)
            return
        with store.sent() as sent:
            await _stream(x, route, reply, meter, sent)
    finally:
        reply.close()
        meter.flush()
        if scan is not None:
            x.line.events = scan.events
            _count_streamed(x, reply, metrics)
        if meter.ttft_s is not None:
            x.line.ttft_ms = round(meter.ttft_s * 1e3, 3)
        if (itl_s := meter.itl_s) is not None:
            x.line.itl_p50_ms, x.line.itl_max_ms = round(itl_s[0] * 1e3, 3), round(itl_s[1] * 1e3, 3)


async def _stream(x: Exchange, route: Route, reply: Reply, meter: StreamMeter, sent: Sent) -> None:
    """Bytes as they come. After the first one left, trouble is one error event and the end."""
    scan = reply.scan
    assert scan is not None
    if not x.started:
        await x.start(reply.status, reply.content_type, NO_CACHE)
    await reply.relay(_Client(x, meter, sent))
    if reply.finished:
        x.line.reason = "ok"
        return
    scan.died = True
    if reply.outcome == "ok":
        await _refused(x, route, 400, scan.told)
        return
    how = reply.error or scan.error[:300].decode(errors="replace") or "it ended without its end"
    # `sent.events()`: with that it could be joined elsewhere.
    kept = "kept" if sent.whole else "not kept"
    log.warning("stream broken after %d events (%s): %s", scan.events, kept, how, extra={"request_id": x.request_id})
    what = "died" if reply.outcome == "died" else "failed with this request"
    error = EngineBroken(f"the engine {what} while it generated; what came before is incomplete")
    x.line.reason = error.code
    await x.end(error_event(route.path, x.dialect, error, x.request_id))


class _Client:
    """The client as a stream's sink (`relay.Sink`), with the times of its pieces, and the pieces."""

    __slots__ = ("_chunk", "_count", "_keep", "_x")

    def __init__(self, x: Exchange, meter: StreamMeter, sent: Sent) -> None:
        self._x = x
        self._chunk = x.chunks()
        self._count = meter.chunk
        self._keep = sent.add

    def push(self, data: bytes) -> Awaitable[None] | None:
        slow = self._x.push(data)
        self._keep(data)
        self._count(time.monotonic())
        return slow

    def chunk(self, data: bytes) -> bool:
        if self._chunk is None or not self._chunk(data):
            return False
        self._keep(data)
        self._count(time.monotonic())
        return True

    def end(self, data: bytes) -> Awaitable[None] | None:
        slow = self._x.push_end(data)
        if data:
            self._count(time.monotonic())
        return slow


def used(x: Exchange) -> int | None:
    """Tokens that an ended request has used: none when it was refused, None when the engine did not say."""
    line = x.line
    if not line.attempts or not x.started or line.status >= 400:
        return 0
    if line.prompt_tokens is None and line.completion_tokens is None:
        return None
    return (line.prompt_tokens or 0) + (line.completion_tokens or 0)


class _EngineMessage(msgspec.Struct):
    message: str = ""


class _EngineError(msgspec.Struct):
    error: _EngineMessage


async def _refused(x: Exchange, route: Route, status: int, body: bytes) -> None:
    """The end of an answer by an engine's refusal, for a client that got a stream's 200 already."""
    message = ""
    with contextlib.suppress(msgspec.MsgspecError):
        message = msgspec.json.decode(body, type=_EngineError).error.message
    error: RequestError = EngineBroken(f"the engine answered with status {status}")
    if status < 500:
        error = BadRequest(message or f"the engine refused the request with status {status}")
    x.line.reason = "engine_refused"
    await x.end(error_event(route.path, x.dialect, error, x.request_id))


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _UnstreamedUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Unstreamed(msgspec.Struct):
    usage: _UnstreamedUsage | None = None
    choices: tuple[_Choice, ...] = ()
    stop_reason: str | None = None  # of a message
    status: str | None = None  # of a response


_decode_answer = msgspec.json.Decoder(_Unstreamed).decode


def _count_unstreamed(x: Exchange, reply: Reply, metrics: ModelMetrics) -> None:
    if reply.status != 200 or reply.body is None:
        return
    with contextlib.suppress(msgspec.MsgspecError):
        answer = _decode_answer(reply.body)
        why = answer.choices[-1].finish_reason if answer.choices else answer.stop_reason or answer.status
        x.line.finish = why
        usage = answer.usage
        if usage is not None:
            prompt = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
            completion = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
            x.line.prompt_tokens, x.line.completion_tokens = prompt, completion
            details = usage.prompt_tokens_details or usage.input_tokens_details
            metrics.used(prompt, completion, details.cached_tokens if details is not None else None)


def _count_streamed(x: Exchange, reply: Reply, metrics: ModelMetrics) -> None:
    """What its engine counted, of a stream that came to its end; of any other, what its events tell."""
    scan = reply.scan
    assert scan is not None
    if reply.finished and not scan.died:
        x.line.prompt_tokens, x.line.completion_tokens = scan.usage.prompt, scan.usage.completion
        x.line.finish = scan.finish
        metrics.used(scan.usage.prompt, scan.usage.completion, scan.usage.cached)
    else:
        x.line.aborted_tokens = scan.tokens
        metrics.aborted(scan.tokens)
