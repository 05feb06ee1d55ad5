"""What `bench.overhead` is asked to measure, and the bars it judges by (docs/benchmarks.md shows the same table)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.report import Op, Report
from bench.stats import Estimate

Bars = Mapping[str, tuple[str, Op, float, float | str]]  # name: unit, op, limit, goal

BARS: Bars = {
    "ttft_added_p50_ms_c1": ("ms", "<=", 2.0, 1.0),
    "ttft_p95_ratio_c32": ("x", "<=", 1.75, 1.25),
    "ttft_p99_ratio_c32": ("x", "<=", 1.75, 1.25),
    "itl_p99_ratio_c8": ("x", "<=", 1.5, 1.10),
    "itl_p99_ratio_c32": ("x", "<=", 1.5, 1.10),
    "tokens_ratio_c32": ("x", ">=", 0.92, 1.0),
    "gateway_us_per_event_c32": ("us", "<=", 40.0, 20.0),
    "request_errors": ("", "==", 0.0, ""),
    "streams_2000_errors": ("", "==", 0.0, "5,000 streams"),
    "gateway_pss_mib": ("MiB", "<", 1024.0, ""),
    "idle_pss_mib": ("MiB", "<", 1536.0, 1024.0),
}

# Which part of the run finds which figure; `production` and `paced` have no bar.
ENGINE_BARS = (*list(BARS)[:8], "production")
SIMULATED = (*list(BARS)[8:], "paced")

TRACES = 0.1  # share of the stack's requests that are traced, as it is where a collector is named
_SIM_RESERVE_S = 130.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which figures, all without `only`; `quick` keeps every step and shortens it, and judges counts only."""

    quick: bool
    only: frozenset[str]

    def wants(self, *names: str) -> bool:
        return not self.only or bool(self.only & set(names))


@dataclass(frozen=True, kw_only=True)
class Plan(Asked):
    """How long and how much of `bench.overhead`."""

    rounds: int
    budget_s: float
    weights: Path | None
    began: float
    traces: float = TRACES

    @property
    def until(self) -> float:
        """When the last round must have ended, monotonic seconds."""
        return self.began + self.budget_s - (_SIM_RESERVE_S if self.wants(*SIMULATED) else 0.0)


def add(result: Report, name: str, value: Estimate | float | None, asked: Asked, bars: Bars = BARS) -> None:
    """As a bar, or in a quick run, whose rounds are too short to judge times by, as a figure. Counts that must be exact
    (`==`) stay bars."""
    unit, op, limit, goal = bars[name]
    if asked.quick and op != "==" and value is not None:
        result.note(name, value, unit)
    else:
        result.judge(name, value, unit, op, limit, goal)
