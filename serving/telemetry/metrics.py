"""Every metric of ours, declared once.

A gateway makes one `GatewayMetrics` with its own registry and takes a `ModelMetrics` per model, version and adapter from
it: label children are bound there, so that a request looks nothing up by label. Nothing here runs per token except
`StreamMeter.chunk`. What the directory alone sees is in `DirectoryMetrics`.

`model`, `version` and `adapter` are always names of the catalog (or `unknown`): a name taken from a request body would let
clients create series. An adapter is a label of counters, not of histograms: there may be hundreds.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate

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
KEYS_SHOWN = 50  # keys whose expiry is exported: the soonest
DISTRIBUTION = "steelyard"

TTFT_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 120.0, 300.0, 600.0),
)
ITL_S = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0),
)
E2E_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(20.0, 30.0, 60.0, 120.0, 240.0, 600.0, 1200.0),
)
QUEUE_WAIT_S = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)

_IN_FLIGHT = ("steelyard_requests_held", "steelyard_requests_waiting", "steelyard_requests_running")


class _Gaps:
    """Bucket counts and sum of one version's inter-token gaps."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(ITL_S) + 1)
        self.total_s = 0.0


class _ItlHistogram(Collector):
    """The ITL histogram. The client library's own takes one observation at a time, with a lock each; this one takes
    a request's finished counts. Written by the gateway's event loop only; a scrape reads it from there or a thread."""

    name = "steelyard_itl_seconds"

    def __init__(self) -> None:
        self._versions: dict[tuple[str, str], _Gaps] = {}

    def of(self, model: str, version: str) -> _Gaps:
        return self._versions.setdefault((model, version), _Gaps())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(
            self.name, "Gap between two chunks of one stream handed to the client.", labels=["model", "version"]
        )
        bounds = [*(repr(bound) for bound in ITL_S), "+Inf"]
        for labels, gaps in list(self._versions.items()):
            running, buckets = 0, []
            for bound, count in zip(bounds, list(gaps.counts), strict=True):
                running += count
                buckets.append((bound, float(running)))
            family.add_metric(labels, buckets=buckets, sum_value=gaps.total_s)
        yield family

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self.name, "", labels=["model", "version"])


def quantile(q: float, bounds: Sequence[float], cumulative: Sequence[float]) -> float:
    """The `q` quantile of a histogram, as Prometheus's `histogram_quantile` reads it: evenly spread within a bucket, and
    the last finite bound for what lies beyond it. `cumulative[i]` observations were at most `bounds[i]`, the last of which
    is infinity; NaN without any."""
    total = cumulative[-1] if cumulative else 0
    if total <= 0:
        return float("nan")
    at = bisect_left(cumulative, q * total)
    if bounds[at] == float("inf"):
        return bounds[at - 1] if at else float("nan")
    low, below = (bounds[at - 1], cumulative[at - 1]) if at else (0.0, 0)
    return low + (bounds[at] - low) * (q * total - below) / (cumulative[at] - below)


class StreamMeter:
    """Times of one stream, kept per request and added to the shared metrics once, by `flush`.

    `started` and `now` are of one monotonic clock, in seconds.
    """

    __slots__ = ("_counts", "_events", "_flushed", "_gaps", "_last", "_longest", "_metrics", "_started", "first_at")

    def __init__(self, metrics: ModelMetrics, gaps: _Gaps, events: Counter, started: float) -> None:
        self._metrics, self._gaps, self._events = metrics, gaps, events
        self._started = self._last = started
        self._counts = [0] * (len(ITL_S) + 1)
        self._longest = 0.0
        self._flushed = False
        self.first_at: float | None = None

    def chunk(self, now: float) -> None:
        """One chunk was handed to the client."""
        if self.first_at is None:
            self.first_at = self._last = now
            return
        gap = now - self._last
        self._counts[bisect_left(ITL_S, gap)] += 1
        if gap > self._longest:
            self._longest = gap
        self._last = now

    @property
    def chunks(self) -> int:
        """Chunks so far."""
        return 0 if self.first_at is None else 1 + sum(self._counts)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the start to the first chunk; None before it."""
        return None if self.first_at is None else self.first_at - self._started

    @property
    def itl_s(self) -> tuple[float, float] | None:
        """Median and longest gap between two chunks, seconds; None before the second chunk. The median is read from the
        histogram's buckets, so it is as exact as they are narrow; the longest is exact."""
        if not any(self._counts):
            return None
        median = quantile(0.5, [*ITL_S, float("inf")], list(accumulate(self._counts)))
        return min(median, self._longest), self._longest

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
    """Bound label children of one name that clients can ask for. Make it with `GatewayMetrics.of`."""

    def __init__(self, model: str, version: str, adapter: str, m: GatewayMetrics) -> None:
        self.model, self.version, self.adapter = model, version, adapter
        self.ttft = m.ttft.labels(model, version)
        self.e2e = m.e2e.labels(model, version)
        self.held = m.held.labels(model, version)
        self.running = m.running.labels(model, version)
        self._gaps = m.itl.of(model, version)
        self._events = m.stream_events.labels(model, version)

        # The library's `labels()` takes a lock and builds strings; these are called once per request.
        @cache
        def request(route: str, status: int, reason: str) -> Counter:
            return m.requests.labels(model, version, adapter, route, str(status), reason)

        @cache
        def rejection(reason: str, class_: str) -> Counter:
            return m.rejections.labels(model, version, reason, class_)

        @cache
        def queue_wait(class_: str) -> Histogram:
            return m.queue_wait.labels(model, version, class_)

        @cache
        def waiting(class_: str) -> Gauge:
            return m.waiting.labels(model, version, class_)

        @cache
        def attempt(outcome: str) -> Counter:
            return m.attempts.labels(model, version, outcome)

        @cache
        def retry(outcome: str) -> Counter:
            return m.retries.labels(model, version, outcome)

        @cache
        def token(kind: str, outcome: str) -> Counter:
            return m.tokens.labels(model, version, adapter, kind, outcome)

        @cache
        def slo(verdict: str) -> Counter:
            return m.slo.labels(model, version, verdict)

        self._request, self._rejection, self._attempt = request, rejection, attempt
        # By class of the request: one of three, and no key's name, which would be a series for each.
        self.queue_wait, self.waiting = queue_wait, waiting
        waiting("default"), queue_wait("default")  # 0, not unknown, before anybody waits
        self._retry, self._token, self._slo = retry, token, slo
        if model != UNKNOWN_MODEL:
            for verdict in VERDICTS:  # an error rate is 0, not unknown, before the first error
                slo(verdict)

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

    def retried(self, outcome: str) -> None:
        """A failed attempt, by its outcome, is followed by another one."""
        self._retry(outcome).inc()

    def used(self, prompt: int | None, completion: int | None, cached: int | None) -> None:
        """Tokens of an answer that came to its end, as its engine counted them."""
        for kind, count in (("prompt", prompt), ("completion", completion), ("cached", cached)):
            if count:
                self._token(kind, "completed").inc(count)

    def aborted(self, completion: int) -> None:
        """Tokens that a client got of an answer without an end, counted by its events: the engine told no sum."""
        if completion:
            self._token("completion", "aborted").inc(completion)

    def judged(self, verdict: str) -> None:
        """Against the model's objective: `verdict` is of `slo_verdict`."""
        self._slo(verdict).inc()

    def stream(self, started: float) -> StreamMeter:
        """The meter of one new stream."""
        return StreamMeter(self, self._gaps, self._events, started)


# Reasons that are the client's own doing, or a limit somebody set for it: they say nothing of the service.
_NOT_OURS = frozenset({"client_gone", "limit_reached", "engine_refused"})


VERDICTS = ("good", "slow", "failed")


def slo_verdict(status: int, reason: str, ttft_s: float | None, slo_ttft_s: float) -> str | None:
    """`good`, `slow` or `failed`; None for what does not count. A good answer has the right status, its first token
    within the objective and no error in mid-stream; one that is not streamed has no first token to be late."""
    if reason in _NOT_OURS or (400 <= status < 500 and status != 429):
        return None
    if reason != "ok" or status >= 400:
        return "failed"
    return "slow" if ttft_s is not None and ttft_s > slo_ttft_s else "good"


class GatewayMetrics:
    """All metrics of one gateway process, in the registry given."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # The `_created` twins double the series and nobody asks for them; the library has only a global switch.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        by_version = ["model", "version"]
        self.requests = Counter(
            "steelyard_requests_total",
            "Requests that ended, by how.",
            [*by_version, "adapter", "route", "status", "reason"],
            registry=registry,
        )
        self.slo = Counter(
            "steelyard_slo_requests_total",
            "Requests that count for the model's objective: good, slow (first token after it) or failed.",
            [*by_version, "verdict"],
            registry=registry,
        )
        self.rejections = Counter(
            "steelyard_rejections_total",
            "Requests refused before an engine.",
            [*by_version, "reason", "class"],
            registry=registry,
        )
        self.attempts = Counter(
            "steelyard_upstream_attempts_total",
            "Tries at engines, by outcome; more than one per request after failures.",
            [*by_version, "outcome"],
            registry=registry,
        )
        self.retries = Counter(
            "steelyard_retries_total",
            "Further attempts after one that failed, by its outcome.",
            [*by_version, "outcome"],
            registry=registry,
        )
        self.tokens = Counter(
            "steelyard_tokens_total",
            "Tokens as the engines count them; cached ones are part of the prompt's. Of an aborted answer, as its events tell.",
            [*by_version, "adapter", "kind", "outcome"],
            registry=registry,
        )
        self.stream_events = Counter(
            "steelyard_stream_events_total", "Stream chunks handed to clients.", by_version, registry=registry
        )
        self.ttft = Histogram(
            "steelyard_ttft_seconds",
            "Arrival of the request to the first chunk handed to the client.",
            by_version,
            buckets=TTFT_S,
            registry=registry,
        )
        self.e2e = Histogram(
            "steelyard_e2e_seconds",
            "Arrival of the request to the end of its answer.",
            by_version,
            buckets=E2E_S,
            registry=registry,
        )
        self.queue_wait = Histogram(
            "steelyard_queue_wait_seconds",
            "Time in the gateway's queue before a slot, by class of the request.",
            [*by_version, "class"],
            buckets=QUEUE_WAIT_S,
            registry=registry,
        )
        held, waiting, running = _IN_FLIGHT
        self.held = Gauge(held, "Requests inside the gateway, waiting or running.", by_version, registry=registry)
        self.waiting = Gauge(
            waiting, "Requests waiting for a slot, by class.", [*by_version, "class"], registry=registry
        )
        self.running = Gauge(running, "Requests at an engine.", by_version, registry=registry)
        self.replicas = Gauge(
            "steelyard_replicas",
            "Replicas in this gateway's table, by state.",
            ["model", "version", "state"],
            registry=registry,
        )
        self.replicas_required = Gauge(
            "steelyard_replicas_required",
            "1 for a version that must have a ready replica, 0 for one that may sleep.",
            by_version,
            registry=registry,
        )
        self.objective = Gauge(
            "steelyard_slo_objective_ratio",
            "Share of the model's requests that shall be good.",
            ["model"],
            registry=registry,
        )
        self.key_expiry = Gauge(
            "steelyard_key_expiry_timestamp_seconds",
            f"When a key expires, Unix time: of the {KEYS_SHOWN} soonest, those that expired within the last day among them.",
            ["key"],
            registry=registry,
        )
        self.trace_spans = Counter(
            "steelyard_trace_spans_total",
            "Spans by what became of them: exported, failed (the collector did not take them), dropped (too many waited for it).",
            ["outcome"],
            registry=registry,
        )
        self.itl = _ItlHistogram()
        registry.register(self.itl)
        process_metrics(registry)
        self.before_text: Callable[[], None] = lambda: None  # brings gauges of what is elsewhere up to date
        self._names: dict[tuple[str, str, str], ModelMetrics] = {}

    def of(self, model: str, version: str = "", adapter: str = "") -> ModelMetrics:
        """Bound metrics; the same object each time. Names of the catalog, or UNKNOWN_MODEL."""
        found = self._names.get((model, version, adapter))
        if found is None:
            found = self._names[model, version, adapter] = ModelMetrics(model, version, adapter, self)
        return found

    def text(self) -> str:
        """The exposition of this process."""
        self.before_text()
        return generate_latest(self.registry).decode()


def set_all(gauge: Gauge, values: Mapping[tuple[str, ...], float]) -> None:
    """Makes `values` the gauge's only ones, by label values: what is not named any more is no longer exported."""
    for sample in next(iter(gauge.collect())).samples:
        labels = tuple(sample.labels.values())
        if labels not in values:
            gauge.remove(*labels)
    for labels, value in values.items():
        gauge.labels(*labels).set(value)


def process_metrics(registry: CollectorRegistry) -> None:
    """CPU, memory, files of this process, and what it was built from."""
    ProcessCollector(namespace="steelyard", registry=registry)
    info = Gauge(
        "steelyard_build_info", "1, with the versions of what runs.", ["version", "python", "ray"], registry=registry
    )
    info.labels(_version_of(DISTRIBUTION), platform.python_version(), _version_of("ray")).set(1)


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


START_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1200.0)


CAUSES = ("start", "process", "silent", "health", "stuck", "refuses")  # of a replica's fault, in a word


class DirectoryMetrics:
    """What only the directory sees: every change of a replica count, every start, what replicas say of their health."""

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
            [*version, "phase"],
            buckets=START_S,
            registry=registry,
        )
        self.health = Gauge(
            "steelyard_replica_health",
            "1 for a ready replica whose health checks pass, 0 for one that failed one.",
            [*version, "replica", "node"],
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
        process_metrics(registry)
        self.before_text: Callable[[], None] = lambda: None

    def troubled(self, model: str, version: str, state: str, cause: str) -> None:
        self.faults.labels(model, version, state, cause or "unknown").inc()

    def seen(self, model: str, version: str) -> None:
        """A version has a replica: its series begin at zero, so that a rate sees their first increase."""
        self.cold_starts.labels(model, version)
        for cause in CAUSES:
            self.faults.labels(model, version, "FAILED", cause)

    def started(self, model: str, version: str, phases: Mapping[str, float]) -> None:
        self.cold_starts.labels(model, version).inc()
        for phase, seconds in phases.items():
            self.cold_start.labels(model, version, phase).observe(seconds)

    def text(self) -> str:
        self.before_text()
        return generate_latest(self._registry).decode()


def expose_up(found: Iterable[tuple[Mapping[str, str], bool]]) -> str:
    """One sample per process of a merged view: whether it answered."""
    lines = [
        "# HELP steelyard_target_up 1 for a process whose metrics are in this view, 0 for one that did not answer in time.",
        "# TYPE steelyard_target_up gauge",
    ]
    for labels, up in found:
        told = ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())
        lines.append(f"steelyard_target_up{{{told}}} {int(up)}")
    return "\n".join(lines) + "\n"


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
