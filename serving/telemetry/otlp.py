"""Traces as OpenTelemetry spans, and their way to a collector: in batches, from a thread, in which the spans are made too.

A collector that is slow or gone costs spans, which are counted, never a request: too many that wait are dropped, a trace as a
whole. What OpenTelemetry says about it is logged once a minute.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from serving.telemetry.logs import RequestLine
from serving.telemetry.metrics import DISTRIBUTION, GatewayMetrics
from serving.telemetry.tracing import Trace

log = logging.getLogger(__name__)

QUEUE_SPANS = 4096  # that wait for the collector; some 1.5 KB each
BATCH_TRACES = 8  # that wake the exporter's thread; 56 spans, of streams at their first attempt
BATCH_SPANS = 64  # encoded at once, in some 2 ms: more would hold the interpreter, and with it every stream
EVERY_S = 5.0  # a post costs as much as 50 spans do; vLLM's spans come as late, so a whole trace comes no later
EXPORT_TIMEOUT_S = 5.0  # of one batch, its repetitions included
FLUSH_S = 3.0  # for what is left at the end
COMPLAINT_EVERY_S = 60.0

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
}
_UNSET, _ERROR = Status(), Status(StatusCode.ERROR)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_ANY = SpanContext(1, 1, False, _SAMPLED)  # the processor asks only whether it is sampled
_SCOPE = InstrumentationScope(DISTRIBUTION)


class Spans:
    """The spans of one gateway (a `tracing.Sink`). `offer` is for one thread."""

    def __init__(
        self, endpoint: str, headers: Mapping[str, str], about: Mapping[str, str], metrics: GatewayMetrics
    ) -> None:
        self._resource = _Resource.of({"service.version": importlib.metadata.version(DISTRIBUTION), **about})
        self._complaints = _Complaints(endpoint)
        self._exporter = _Unfolding(
            OTLPSpanExporter(endpoint=endpoint, headers=dict(headers), timeout=EXPORT_TIMEOUT_S), metrics
        )
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=QUEUE_SPANS,
            schedule_delay_millis=EVERY_S * 1e3,
            max_export_batch_size=min(BATCH_TRACES, QUEUE_SPANS),
        )
        self._taken = 0
        self._dropped = metrics.trace_spans.labels("dropped")

    def offer(self, trace: Trace, line: RequestLine, method: str, began: float, ended: float) -> None:
        whole = _Ended(self._resource, trace, line, method, began, ended)
        if self._taken - self._exporter.done + whole.count > QUEUE_SPANS:  # the processor would bound requests
            self._dropped.inc(whole.count)
            return
        self._taken += whole.count
        self._processor.on_end(whole)

    def close(self) -> None:
        # The processor's own bound is half a minute.
        flush = threading.Thread(target=self._processor.shutdown, name="last-traces", daemon=True)
        flush.start()
        flush.join(FLUSH_S)
        self._complaints.close()


class _Ended(ReadableSpan):
    """A request that has ended. To the processor it is one span; those that it stands for are made in the exporter's thread: on
    the gateway's loop they would be a tenth of what a request costs there."""

    def __init__(
        self, resource: Resource, trace: Trace, line: RequestLine, method: str, began: float, ended: float
    ) -> None:
        super().__init__("", _ANY, resource=resource)
        self.count = len(trace.steps) + 1
        self._told = (trace, line, method, began, ended)

    def spans(self) -> Iterator[ReadableSpan]:
        trace, line, method, began, ended = self._told

        def at(moment: float) -> int:
            return int((line.ts + moment - began) * 1e9)

        contexts = {trace.root: SpanContext(trace.number, trace.root, False, _SAMPLED)}
        for step in trace.steps:
            own = contexts[step.id] = SpanContext(trace.number, step.id, False, _SAMPLED)
            # A tracer would make the same spans for 200 us a request instead of 30.
            yield ReadableSpan(
                step.name,
                own,
                contexts[step.parent],
                self._resource,
                step.about,
                kind=SpanKind.CLIENT if step.leaves else SpanKind.INTERNAL,
                status=_ERROR if step.failed else _UNSET,
                start_time=at(step.began),
                end_time=at(step.ended),
                instrumentation_scope=_SCOPE,
            )
        yield ReadableSpan(  # last, so that whoever sees it has them all
            f"{method} {line.route}",
            contexts[trace.root],
            SpanContext(trace.number, trace.parent, True, _SAMPLED) if trace.parent else None,
            self._resource,
            _told(trace, line, method),
            kind=SpanKind.SERVER,
            status=_ERROR if line.level == "error" else _UNSET,
            start_time=at(began),
            end_time=at(ended),
            instrumentation_scope=_SCOPE,
        )


def _told(trace: Trace, line: RequestLine, method: str) -> dict[str, str | int | float | bool | Sequence[str]]:
    """What is known of a request, by OpenTelemetry's names where it has some."""
    told = {
        "http.request.method": method,
        "http.route": line.route,
        "http.response.status_code": line.status,
        "error.type": line.reason if line.status >= 400 or line.level == "error" else None,
        "gen_ai.operation.name": _OPERATIONS.get(line.route or ""),
        "gen_ai.request.model": line.model,
        "gen_ai.request.stream": line.stream,
        "gen_ai.response.finish_reasons": (line.finish,) if line.finish else None,
        "gen_ai.response.time_to_first_chunk": None if line.ttft_ms is None else line.ttft_ms / 1e3,
        "gen_ai.usage.input_tokens": line.prompt_tokens,
        "gen_ai.usage.output_tokens": line.completion_tokens,
        "steelyard.version": line.version,
        "steelyard.adapter": line.adapter,
        "steelyard.class": trace.class_,
        "steelyard.reason": line.reason or "ok",
        "steelyard.request_id": line.request_id,
        "steelyard.key_id": line.key_id,
        "steelyard.aborted_tokens": line.aborted_tokens,
        "steelyard.busy_left_out": trace.left_out or None,
    }
    return {name: value for name, value in told.items() if value is not None}


class _Resource(Resource):
    """One whose hash is computed once: the encoder asks for it with every span, and OpenTelemetry's is made of JSON each time."""

    @classmethod
    def of(cls, about: Mapping[str, str]) -> _Resource:
        """With what OpenTelemetry adds, of its SDK and of the environment."""
        found = Resource.create(dict(about))
        return cls(found.attributes, found.schema_url)

    @functools.cached_property
    def _digest(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._digest


class _Unfolding(SpanExporter):
    """Makes the spans of requests that have ended, and counts what the collector took of them, and what it did not."""

    def __init__(self, exporter: SpanExporter, metrics: GatewayMetrics) -> None:
        self._exporter = exporter
        self._exported = metrics.trace_spans.labels("exported")
        self._failed = metrics.trace_spans.labels("failed")
        self.done = 0  # spans, however it went

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        ended = [e for e in spans if isinstance(e, _Ended)]
        count, taken = sum(e.count for e in ended), 0
        try:
            made = [span for e in ended for span in e.spans()]
            for first in range(0, len(made), BATCH_SPANS):
                batch = made[first : first + BATCH_SPANS]
                if self._exporter.export(batch) is SpanExportResult.SUCCESS:
                    taken += len(batch)
        finally:
            self.done += count
            self._exported.inc(taken)
            self._failed.inc(count - taken)
        return SpanExportResult.SUCCESS if taken == count else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _Complaints(logging.Handler):
    """What OpenTelemetry's own loggers say, which is much while a collector is away: a line a minute."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(logging.WARNING)
        self._endpoint = endpoint
        self._logger = logging.getLogger("opentelemetry")
        self._logger.propagate = False
        self._logger.addHandler(self)
        self._next = float("-inf")
        self._more = 0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now < self._next:
            self._more += 1
            return
        more = f" ({self._more} more since the last line)" if self._more else ""
        self._next, self._more = now + COMPLAINT_EVERY_S, 0
        log.warning("traces for %s: %s%s", self._endpoint, record.getMessage(), more)

    def close(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True
        super().close()
