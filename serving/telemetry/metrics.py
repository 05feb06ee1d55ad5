"""Every metric of ours, declared once.

A gateway makes one `GatewayMetrics` with its own registry and takes a `ModelMetrics` per model from it: label children
are bound there, so that a request looks nothing up by label. Nothing here runs per token except `StreamMeter.chunk`.

`model` is always a name of the catalog (or `unknown`): a name taken from a request body would let clients create series.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

UNKNOWN_MODEL = "unknown"

TTFT_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 120.0),
)
ITL_S = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5),
)
E2E_S = (*(0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0), *(120.0, 240.0, 600.0, 1200.0))
QUEUE_WAIT_S = (*(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5), *(1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0))

_IN_FLIGHT = ("steelyard_requests_held", "steelyard_requests_waiting", "steelyard_requests_running")


class _Gaps:
    """Bucket counts and sum of one model's inter-token gaps."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(ITL_S) + 1)
        self.total_s = 0.0


class _ItlHistogram(Collector):
    """The ITL histogram. The client library's own takes one observation at a time, with a lock each; this one takes
    a request's finished counts. Written by the gateway's event loop only; a scrape reads it from there or a thread."""

    name = "steelyard_itl_seconds"

    def __init__(self) -> None:
        self._models: dict[str, _Gaps] = {}

    def of(self, model: str) -> _Gaps:
        return self._models.setdefault(model, _Gaps())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(
            self.name, "Gap between two chunks of one stream handed to the client.", labels=["model"]
        )
        bounds = [*(repr(bound) for bound in ITL_S), "+Inf"]
        for model, gaps in list(self._models.items()):
            running, buckets = 0, []
            for bound, count in zip(bounds, list(gaps.counts), strict=True):
                running += count
                buckets.append((bound, float(running)))
            family.add_metric([model], buckets=buckets, sum_value=gaps.total_s)
        yield family

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self.name, "", labels=["model"])


class StreamMeter:
    """Times of one stream, kept per request and added to the shared metrics once, by `flush`.

    `started` and `now` are of one monotonic clock, in seconds.
    """

    __slots__ = ("_counts", "_events", "_flushed", "_gaps", "_last", "_metrics", "_started", "first_at")

    def __init__(self, metrics: ModelMetrics, gaps: _Gaps, events: Counter, started: float) -> None:
        self._metrics, self._gaps, self._events = metrics, gaps, events
        self._started = self._last = started
        self._counts = [0] * (len(ITL_S) + 1)
        self._flushed = False
        self.first_at: float | None = None

    def chunk(self, now: float) -> None:
        """One chunk was handed to the client."""
        if self.first_at is None:
            self.first_at = self._last = now
            return
        self._counts[bisect_left(ITL_S, now - self._last)] += 1
        self._last = now

    @property
    def chunks(self) -> int:
        """Chunks so far."""
        return 0 if self.first_at is None else 1 + sum(self._counts)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the start to the first chunk; None before it."""
        return None if self.first_at is None else self.first_at - self._started

    def flush(self) -> None:
        """The stream ended, however it did: add it to the metrics. A second call adds nothing."""
        if self.first_at is None or self._flushed:
            return
        self._flushed = True
        self._metrics.ttft.observe(self.first_at - self._started)
        self._events.inc(self.chunks)
        counts = self._gaps.counts
        for bucket, count in enumerate(self._counts):
            counts[bucket] += count
        self._gaps.total_s += self._last - self.first_at


class ModelMetrics:
    """One model's bound label children. Make it with `GatewayMetrics.of`."""

    def __init__(self, model: str, m: GatewayMetrics) -> None:
        self.model = model
        self.ttft = m.ttft.labels(model)
        self.e2e = m.e2e.labels(model)
        self.held = m.held.labels(model)
        self.running = m.running.labels(model)
        self.prompt_tokens = m.tokens.labels(model, "prompt")
        self.completion_tokens = m.tokens.labels(model, "completion")
        self.cached_tokens = m.tokens.labels(model, "cached")
        self._gaps = m.itl.of(model)
        self._events = m.stream_events.labels(model)

        # The library's `labels()` takes a lock and builds strings; these are called once per request.
        @cache
        def request(route: str, status: int, reason: str) -> Counter:
            return m.requests.labels(model, route, str(status), reason)

        @cache
        def rejection(reason: str, class_: str) -> Counter:
            return m.rejections.labels(model, reason, class_)

        @cache
        def queue_wait(class_: str) -> Histogram:
            return m.queue_wait.labels(model, class_)

        @cache
        def waiting(class_: str) -> Gauge:
            return m.waiting.labels(model, class_)

        @cache
        def attempt(outcome: str) -> Counter:
            return m.attempts.labels(model, outcome)

        self._request, self._rejection, self._attempt = request, rejection, attempt
        # By class of the request: one of three, and no key's name, which would be a series for each.
        self.queue_wait, self.waiting = queue_wait, waiting

    def request_done(self, route: str, status: int, reason: str, e2e_s: float) -> None:
        """The one terminal event of a request. `route` is the route's pattern, `reason` one of a few fixed words."""
        self._request(route, status, reason).inc()
        self.e2e.observe(e2e_s)

    def rejected(self, reason: str, class_: str) -> None:
        """Refused before any engine saw it: queue_full, queue_timeout, too_long, ..."""
        self._rejection(reason, class_).inc()

    def attempted(self, outcome: str) -> None:
        """One try at an engine ended: ok, busy, connect_error, http_5xx, refused, died, timeout, client_gone."""
        self._attempt(outcome).inc()

    def stream(self, started: float) -> StreamMeter:
        """The meter of one new stream."""
        return StreamMeter(self, self._gaps, self._events, started)


class GatewayMetrics:
    """All metrics of one gateway process, in the registry given."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # The `_created` twins double the series and nobody asks for them; the library has only a global switch.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        by_model = ["model"]
        self.requests = Counter(
            "steelyard_requests_total",
            "Requests that ended, by how.",
            ["model", "route", "status", "reason"],
            registry=registry,
        )
        self.rejections = Counter(
            "steelyard_rejections_total",
            "Requests refused before an engine.",
            ["model", "reason", "class"],
            registry=registry,
        )
        self.attempts = Counter(
            "steelyard_upstream_attempts_total",
            "Tries at engines, by outcome; more than one per request after failures.",
            ["model", "outcome"],
            registry=registry,
        )
        self.tokens = Counter(
            "steelyard_tokens_total",
            "Tokens as the engines count them; cached ones are part of the prompt's.",
            ["model", "kind"],
            registry=registry,
        )
        self.stream_events = Counter(
            "steelyard_stream_events_total", "Stream chunks handed to clients.", by_model, registry=registry
        )
        self.ttft = Histogram(
            "steelyard_ttft_seconds",
            "Arrival of the request to the first chunk handed to the client.",
            by_model,
            buckets=TTFT_S,
            registry=registry,
        )
        self.e2e = Histogram(
            "steelyard_e2e_seconds",
            "Arrival of the request to the end of its answer.",
            by_model,
            buckets=E2E_S,
            registry=registry,
        )
        self.queue_wait = Histogram(
            "steelyard_queue_wait_seconds",
            "Time in the gateway's queue before a slot, by class of the request.",
            ["model", "class"],
            buckets=QUEUE_WAIT_S,
            registry=registry,
        )
        held, waiting, running = _IN_FLIGHT
        self.held = Gauge(held, "Requests inside the gateway, waiting or running.", by_model, registry=registry)
        self.waiting = Gauge(waiting, "Requests waiting for a slot, by class.", ["model", "class"], registry=registry)
        self.running = Gauge(running, "Requests at an engine.", by_model, registry=registry)
        self.replicas = Gauge(
            "steelyard_replicas",
            "Replicas in this gateway's table, by state.",
            ["model", "version", "state"],
            registry=registry,
        )
        self.itl = _ItlHistogram()
        registry.register(self.itl)
        ProcessCollector(namespace="steelyard", registry=registry)
        self._models: dict[str, ModelMetrics] = {}
        self._replica_labels: set[tuple[str, str, str]] = set()

    def of(self, model: str) -> ModelMetrics:
        """The model's bound metrics; the same object each time. `model` is of the catalog, or UNKNOWN_MODEL."""
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = ModelMetrics(model, self)
        return found

    def set_replicas(self, counts: Mapping[tuple[str, str, str], int]) -> None:
        """The table changed: replicas per (model, version, state). What is not named any more is no longer exported."""
        for labels in self._replica_labels - set(counts):
            self.replicas.remove(*labels)
        for labels, count in counts.items():
            self.replicas.labels(*labels).set(count)
        self._replica_labels = set(counts)

    def text(self) -> str:
        """The exposition of this process."""
        return generate_latest(self.registry).decode()


START_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1200.0)


class DirectoryMetrics:
    """What only the directory sees: every change of a replica count, and every start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry
        version = ["model", "version"]
        self.scale_decisions = Counter(
            "steelyard_scale_decisions_total",
            "Changes of a replica count, by direction and kind of reason: load, from_zero, to_zero, bounds.",
            [*version, "direction", "reason"],
            registry=registry,
        )
        self.cold_starts = Counter(
            "steelyard_cold_starts_total", "Replicas that became ready.", version, registry=registry
        )
        self.cold_start = Histogram(
            "steelyard_cold_start_seconds",
            "Phases of a replica's start: spawn of the engine's process, until healthy, until its first token.",
            ["model", "phase"],
            buckets=START_S,
            registry=registry,
        )

        self.faults = Counter(
            "steelyard_replica_faults_total",
            "Replicas that became SUSPECT (no new work until it is well again) or FAILED (replaced), by cause.",
            [*version, "state", "cause"],
            registry=registry,
        )
        self.quarantined = Gauge(
            "steelyard_quarantined_seconds",
            "What is left of a version's quarantine on a node where it failed again and again.",
            [*version, "node"],
            registry=registry,
        )

    def troubled(self, model: str, version: str, state: str, cause: str) -> None:
        self.faults.labels(model, version, state, cause or "unknown").inc()

    def set_quarantined(self, left_s: Mapping[tuple[str, str], float]) -> None:
        """(version id, node) -> seconds. What is over is no longer exported."""
        self.quarantined.clear()
        for (version_id, node), seconds in left_s.items():
            model, _, version = version_id.partition("@")
            self.quarantined.labels(model, version, node).set(seconds)

    def started(self, model: str, version: str, phases: Mapping[str, float]) -> None:
        self.cold_starts.labels(model, version).inc()
        for phase, seconds in phases.items():
            self.cold_start.labels(model, phase).observe(seconds)

    def text(self) -> str:
        return generate_latest(self._registry).decode()


def unrested_gauges(text: str) -> dict[str, float]:
    """In-flight gauges of an exposition that are not zero, as `name{model}`. Empty once every request has ended."""
    return {
        f"{sample.name}{{{sample.labels.get('model', '')}}}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in _IN_FLIGHT and sample.value != 0
    }


_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\.)*"'
_SAMPLE = re.compile(rf"({_NAME})[ \t]*(?:\{{[ \t]*((?:{_LABEL}[ \t]*,?[ \t]*)*)\}})?[ \t]*(\S+(?:[ \t]+-?\d+)?)[ \t]*")
_META = re.compile(rf"# (?=HELP |TYPE {_NAME} [a-z])(HELP|TYPE) ({_NAME})(?: (.*))?")
_PART = re.compile(r"_(bucket|sum|count|total|info)$")


def merge(texts: Iterable[tuple[dict[str, str], str]]) -> str:
    """One Prometheus text exposition out of many, each source's labels added to its samples.

    The labels must tell the sources apart. A label that a sample already has is kept as `exported_<label>`, as
    Prometheus does. HELP and TYPE are the first source's. `_created` series are dropped; so are lines that are no
    sample and a last line without its end, since a source that died in mid-answer must not cost the others' scrape.
    """
    meta: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for labels, text in texts:
        added = ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())
        taken = re.compile(rf"(?<![a-zA-Z0-9_])({'|'.join(map(re.escape, labels))})(?==\")") if labels else None
        typed: set[str] = set()
        # What follows the last line feed is torn: a value cut from 12 to 1 would look whole.
        for line in text.split("\n")[:-1]:
            if line.startswith("#"):
                found = _META.fullmatch(line.rstrip("\r"))
                if found and not found[2].endswith("_created"):
                    meta.setdefault(found[2], {}).setdefault(found[1], found[3] or "")
                    typed.add(found[2])
                continue
            sample = _SAMPLE.fullmatch(line.rstrip("\r"))
            if not sample or sample[1].endswith("_created") or not _number(sample[3].split()[0]):
                continue
            name, own, value = sample[1], (sample[2] or "").rstrip(" \t,"), sample[3]
            if own and taken and taken.search(own):
                own = ",".join(
                    f"exported_{label}" if label.partition("=")[0] in labels else label
                    for label in re.findall(_LABEL, own)
                )
            joined = ",".join(part for part in (added, own) if part)
            family = name if name in typed else _PART.sub("", name)
            family = family if family in typed else name
            samples.setdefault(family, []).append(f"{name}{{{joined}}} {value}" if joined else f"{name} {value}")
    lines: list[str] = []
    for family, found_samples in samples.items():
        lines += [f"# {kind} {family} {value}" for kind, value in sorted(meta.get(family, {}).items())]
        lines += found_samples
    return "\n".join(lines) + "\n" if lines else ""


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
