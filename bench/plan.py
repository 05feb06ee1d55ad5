"""What `bench.overhead` is asked to measure, and the bars it judges by (docs/performance.md shows the same table)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.report import Op, Report
from bench.stats import Estimate

# name: unit, op, limit, goal
BARS: dict[str, tuple[str, Op, float, float | str]] = {
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

_COUNTS = frozenset({"request_errors", "streams_2000_errors"})  # judged in a quick run too
_SIM_RESERVE_S = 130.0


@dataclass(frozen=True)
class Plan:
    """How long and how much; `quick` keeps every step and shortens it, and judges counts only."""

    quick: bool
    rounds: int
    budget_s: float
    only: frozenset[str]
    weights: Path | None
    began: float

    def wants(self, *names: str) -> bool:
        return not self.only or bool(self.only & set(names))

    @property
    def until(self) -> float:
        """When the last round must have ended, monotonic seconds."""
        return self.began + self.budget_s - (_SIM_RESERVE_S if self.wants(*SIMULATED) else 0.0)


def add(result: Report, name: str, value: Estimate | float | None, plan: Plan) -> None:
    """As a bar, or in a quick run, whose rounds are too short to judge times by, as a figure (counts stay bars)."""
    unit, op, limit, goal = BARS[name]
    if plan.quick and name not in _COUNTS and value is not None:
        result.note(name, value, unit)
    else:
        result.judge(name, value, unit, op, limit, goal)
