"""Traces: what one request waited for. Off until a collector is set (`STEELYARD_OTLP_ENDPOINT`).

A request that is not sampled costs a random number. One that is keeps a handful of times in its `Trace`; its spans are made in
one place, `otlp.Spans`, when it has ended.

    POST /v1/chat/completions      the request; kind server
      auth                         its arrival, until its key was found good
      queue                        until a slot of a replica was its own; again after a `busy`
      retry wait                   for its turn among those that are tried again
      pick                         a replica was chosen, until the request left for it
      attempt                      at that replica; kind client. The engine's own spans hang here
        first byte                 until the engine's first events, or the whole of an answer that is no stream
        stream                     the rest

No prompt, answer or key is in a span: attributes are names of the catalog, numbers, the words that metrics use, the key's
public id, and the request's id, which its client may choose.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Mapping
from random import getrandbits
from typing import Protocol

from serving.errors import OperatorError
from serving.settings import Settings
from serving.telemetry.logs import RequestLine
from serving.telemetry.metrics import GatewayMetrics

log = logging.getLogger(__name__)

MOST_STEPS = 64  # of one request; a fleet that is full may say `busy` to it for as long as it waits
PARENT_HEADER, STATE_HEADER = b"traceparent", b"tracestate"

# W3C Trace Context: version, trace, parent, flags. Versions after 00 may have more behind it.
_PARENT = re.compile(
    rb"(?!ff|00-.{53})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
_STATE = re.compile(rb"[\x20-\x7e]{1,512}")
_SAMPLED = 1
_NO_FAULT = ("ok", "busy", "recalled", "client_gone")  # outcomes of attempts that are not the engine's doing


class Trace:
    """What a sampled request leaves until its end. Times are monotonic seconds."""

    __slots__ = (
        *("attempts", "class_", "left_out", "number", "parent", "root", "state", "steps"),
        *("_attempt", "_round", "_stream"),
    )

    def __init__(self, number: int, parent: int, state: bytes) -> None:
        self.number = number  # of the trace
        self.parent, self.state = parent, state  # the client's span, 0 without, and its `tracestate`
        self.root = _new_id()
        self.steps: list[Step] = []  # each after the one that it is part of
        self.attempts = 0
        self.class_: str | None = None
        self.left_out = 0  # attempts at full replicas, or recalled, that are too many to tell
        self._attempt: Step | None = None
        self._round = 0  # where the steps of this attempt begin, with what it waited for
        self._stream: Step | None = None

    @property
    def id(self) -> str:
        """As logs and other tools write it."""
        return f"{self.number:032x}"

    def step(self, name: str, began: float, ended: float) -> None:
        """Something that the request waited for."""
        self.steps.append(Step(name, self.root, began, ended))

    def sent(self, replica: str, node: str, bound_at: float, now: float) -> bytes:
        """It leaves for a replica, chosen at `bound_at`. Returns header lines by which the engine's spans join."""
        self.step("pick", bound_at, now)
        self.attempts += 1
        attempt = self._attempt = Step("attempt", self.root, now, now, leaves=True)
        attempt.about = {"steelyard.replica": replica, "server.address": node}
        if self.attempts > 1:
            attempt.about["http.request.resend_count"] = self.attempts - 1
        self.steps.append(attempt)
        parent = b"traceparent: 00-%032x-%016x-01\r\n" % (self.number, attempt.id)
        return parent + b"tracestate: %b\r\n" % self.state if self.state else parent

    def answered(self, now: float, *, streamed: bool) -> None:
        """The engine's answer has begun, or is there as a whole."""
        attempt = self._attempt
        if attempt is not None:
            self.steps.append(Step("first byte", attempt.id, attempt.began, now))
            if streamed:
                self._stream = Step("stream", attempt.id, now, now)
                self.steps.append(self._stream)

    def attempted(self, outcome: str, now: float) -> None:
        """The attempt ended, in the metrics' word for how."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        attempt.ended = now
        attempt.about["steelyard.outcome"] = outcome
        attempt.failed = outcome not in _NO_FAULT
        if self._stream is not None:
            self._stream.ended = now
        if outcome in ("busy", "recalled") and len(self.steps) > MOST_STEPS:
            del self.steps[self._round :]
            self.left_out += 1
        self._round = len(self.steps)

    def ended(self, reason: str, now: float) -> None:
        """The request has, and with it an attempt that told no outcome."""
        self.attempted(reason, now)


class Step:
    """A span of a request but for its trace. `leaves`: to another process, whose spans are part of it."""

    __slots__ = ("about", "began", "ended", "failed", "id", "leaves", "name", "parent")

    def __init__(self, name: str, parent: int, began: float, ended: float, *, leaves: bool = False) -> None:
        self.id = _new_id()
        self.name, self.parent, self.began, self.ended, self.leaves = name, parent, began, ended, leaves
        self.about: dict[str, str | int] = {}
        self.failed = False


class Sink(Protocol):
    """Where traces of requests that have ended go."""

    def offer(self, trace: Trace, line: RequestLine, method: str, began: float, ended: float) -> None:
        """Takes or drops it, at once. `line` says what came of the request; times are monotonic seconds."""

    def close(self) -> None:
        """Sends what waits, for a while at most. Blocks."""


class Tracing:
    """The traces of one gateway. Used from its event loop, but for `close`."""

    def __init__(self, ratio: float, sink: Sink) -> None:
        self._ratio = ratio
        self._sink = sink
        self.close = sink.close

    def begin(self, headers: Mapping[bytes, bytes], *, trusted: bool) -> Trace | None:
        """The trace of a request, or None for one that is not sampled. It is part of its client's trace, if that has one. Whether
        it is sampled is the client's to say only where it is `trusted`: who has a key could else flood the collector."""
        given = headers.get(PARENT_HEADER)
        found = _PARENT.fullmatch(given) if trusted and given is not None else None
        if found is not None:
            if not int(found[3], 16) & _SAMPLED:
                return None
        elif random.random() >= self._ratio:
            return None
        elif given is not None:
            found = _PARENT.fullmatch(given)
        if found is None:
            return Trace(getrandbits(128) or 1, 0, b"")
        state = headers.get(STATE_HEADER, b"")
        return Trace(int(found[1], 16), int(found[2], 16), state if _STATE.fullmatch(state) else b"")

    def end(self, trace: Trace, line: RequestLine, method: str, began: float, ended: float) -> None:
        """The request has ended, and `line` says how."""
        trace.ended(line.reason, ended)
        self._sink.offer(trace, line, method, began, ended)


def tracing(settings: Settings, gateway_id: str, node: str, metrics: GatewayMetrics) -> Tracing | None:
    """None, and OpenTelemetry is not imported, where no collector is set. Nor is anything traced without the headers that
    the collector asks for: `up` refuses them when they are wrong, and later they must not keep a gateway from its requests."""
    if settings.otlp_endpoint is None:
        return None
    try:
        headers = settings.otlp_headers()
    except OperatorError as e:
        log.error("no request is traced: %s", e)
        return None
    from serving.telemetry.otlp import Spans

    about = {
        "service.name": f"{settings.trace_service}-gateway",
        "service.instance.id": gateway_id,
        "host.name": node,
    }
    return Tracing(settings.trace_ratio, Spans(settings.otlp_endpoint, headers, about, metrics))


def _new_id() -> int:
    return getrandbits(64) or 1
