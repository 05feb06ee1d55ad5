"""Parts of `bench.scale` in which the number of replicas changes: a step up, the way down, and from zero."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench.fleet import Fleet, Metrics
from bench.load import Summary
from bench.paired import Bench
from bench.plan import Asked, Bars, add
from bench.report import Report
from bench.simulated import simulated
from bench.workloads import Steady, Uniform, Workload, together

ITL_MS = 50
TARGET, STEP = 24, 64
STARTS_IN_S = 2.0
STEPPING = simulated(
    "stepping",
    {"max-num-seqs": 32, "sim-ttft-ms": 50, "sim-itl-ms": ITL_MS, "sim-start-s": STARTS_IN_S},
    {"min": 1, "max": 4, "target_ongoing": TARGET, "scale_down_after_s": 2},
    drain_s=60.0,
)
SLEEPING = simulated(
    "sleeping",
    {"max-num-seqs": 8, "sim-ttft-ms": 20, "sim-itl-ms": 20, "sim-start-s": STARTS_IN_S},
    {"min": 0, "max": 1, "target_ongoing": 4, "scale_down_after_s": 1, "idle_to_zero_s": 2},
)
_PHASES = ("spawn", "health", "first_token")
_COLD_START = "steelyard_cold_start_seconds_sum"


@dataclass
class Course:
    """What was seen of a model's replicas while load ran: ready ones, and streams in each engine."""

    model: str
    ready: list[int] = field(default_factory=list)
    streams: list[dict[str, float]] = field(default_factory=list)

    def look(self, fleet: Fleet) -> None:
        metrics = fleet.metrics()
        self.ready.append(metrics.replicas(self.model, "READY"))
        self.streams.append(metrics.engines("num_requests_running", self.model))

    def on_victims(self, at: int) -> int:
        """Streams seen on replicas that were to go, once `at` were left: those beyond what the `at` busiest engines
        carry, so one too few rather than one too many."""
        seen = [sorted(s.values(), reverse=True)[at:] for s, n in zip(self.streams, self.ready, strict=True) if n == at]
        return int(max((sum(s) for s in seen), default=0.0))


def step_and_back(bench: Bench, fleet: Fleet, asked: Asked, bars: Bars, result: Report) -> None:
    """From one stream to 64 at once; then the load falls, and two of three replicas go while they stream."""
    rounds = 1 if asked.quick else 2
    needed = math.ceil(STEP / TARGET)
    began: list[float] = []
    failed = down_failed = 0
    victims: list[int] = []
    for number in range(rounds):
        fleet.until(lambda m: m.replicas("stepping") == 1, "one replica of `stepping`", 90)
        quiet, _ = fleet.ask(bench, "stepping", Uniform(number, max_tokens=24), concurrency=1, duration_s=4.0)
        loud, recording = fleet.ask(
            bench, "stepping", Uniform(number, max_tokens=40), concurrency=STEP, duration_s=15.0
        )
        began.append(wall(recording.began))
        failed += _failures(quiet) + _failures(loud)
        up = Course("stepping")
        up.look(fleet)
        course = Course("stepping")
        back, tail = fleet.ask(
            bench,
            "stepping",
            _falling(number),
            tick=partial(course.look, fleet),
            every_s=0.5,
            mode="open",
            concurrency=16,
            duration_s=0.0,
        )
        down_failed += _failures(back)
        victims.append(course.on_victims(1) if up.ready[-1] >= needed else 0)
        bench.say(
            f"step {number + 1}: {up.ready[-1]} replicas at its end, {_failures(loud)} failed; "
            f"back to {min(course.ready, default=0)} with {victims[-1]} streams on those that went, {_failures(back)} failed"
        )
        result.samples.append(
            {"part": "step", "round": number, "requests": loud.requests, "errors": loud.errors | back.errors}
            | {"ready": course.ready, "streams": course.streams, "peak_open": recording.peak_open}
            | {"tail": len(tail.ok)}
        )
    changes = fleet.changes("stepping")
    result.samples.append({"part": "step", "changes": changes})
    decided = [decision_s(changes, at, needed) for at in began]
    first = [decision_s(changes, at, 2) for at in began]
    whole = None if None in decided else max(s for s in decided if s is not None)
    add(result, "breach_to_decision_s", whole, asked, bars)
    add(result, "step_failed", float(failed), asked, bars)
    # Without a stream on a replica that went, nothing was shown.
    add(result, "scale_down_failed", float(down_failed) if all(victims) else None, asked, bars)
    if None not in first:
        result.note("breach_to_first_decision_s", max(s for s in first if s is not None), "s")
    result.note("scale_down_streams_on_victims", float(min(victims)), "")


def decision_s(changes: Sequence[dict[str, Any]], began: float, count: int) -> float | None:
    """Seconds from `began` (epoch) to the first decision for `count` replicas or more; None: there was none."""
    later = [c["at"] for c in changes if c["at"] >= began and c["after"] >= count and c["after"] > c["before"]]
    return later[0] - began if later else None


def wall(monotonic_s: float) -> float:
    """Epoch seconds of a moment of the clock that all processes of this machine share."""
    return time.time() - time.monotonic() + monotonic_s


def from_zero(bench: Bench, fleet: Fleet, asked: Asked, bars: Bars, result: Report) -> None:
    """One request to a model without a replica, again and again."""
    rows: list[dict[str, float]] = []
    asked_at: list[float] = []
    failed = 0
    for number in range(2 if asked.quick else 5):
        fleet.until(lambda m: m.replicas("sleeping") == 0, "no replica of `sleeping`", 60)
        before = _cold_start(fleet.metrics())
        summary, recording = fleet.ask(bench, "sleeping", Uniform(number, max_tokens=4), concurrency=1, requests=1)
        asked_at.append(wall(float(recording.start[0])))
        failed += _failures(summary)
        phases = {name: after - before[name] for name, after in _cold_start(fleet.metrics()).items()}
        rows.append({"answer": float(recording.first[0] - recording.start[0]), **phases})
    changes = fleet.changes("sleeping")
    for row, at in zip(rows, asked_at, strict=True):
        row["engine"] = sum(row[name] for name in _PHASES)
        row["extra"] = row["answer"] - row["engine"]
        decided = decision_s(changes, at, 1)
        if decided is not None:
            row["decision"] = decided
            row["placement"] = row["extra"] - decided
    result.samples.append({"part": "from_zero", "rounds": rows})
    started = all(row["engine"] >= STARTS_IN_S for row in rows)  # else one had not been away
    extra = statistics.median(row["extra"] for row in rows) if started and not failed else None
    each = ", ".join(f"{row['extra']:.2f}" for row in rows)
    bench.say(f"from zero: {each} s beyond the engine's start, {failed} failed")
    add(result, "from_zero_extra_s", extra, asked, bars)
    result.note("from_zero_extra_worst_s", max(row["extra"] for row in rows), "s")
    for name in ("answer", "decision", "placement", *_PHASES):
        values = [row[name] for row in rows if name in row]
        if values:
            result.note(f"from_zero_{name}_s", statistics.median(values), "s")


def _falling(seed: int) -> Workload:
    """Twelve streams of 16 s, and short requests beside them all the while."""
    return together(Steady(seed, 12, 3.0, 16_000 // ITL_MS), Steady(seed + 1, 60, 14.0, 8))


def _cold_start(metrics: Metrics) -> dict[str, float]:
    return {name: metrics.total(_COLD_START, model="sleeping", phase=name) for name in _PHASES}


def _failures(summary: Summary) -> int:
    return sum(summary.errors.values())
