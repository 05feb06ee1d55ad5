"""Paired statistics of one bench: a figure per round and side, the ratio of their medians, and when to stop.

Pure: numbers in, numbers out. One round measures `raw` and `stack` right after each other, so that what the machine
does meanwhile hits both; the pair is the unit that is resampled (percentile bootstrap, Efron 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 4000
MIN_ROUNDS = 5  # with fewer pairs a percentile bootstrap is far too narrow to stop on


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, all in the figure's own unit, from `rounds` paired rounds."""

    value: float
    lo: float
    hi: float
    rounds: int

    @property
    def relative_half_width(self) -> float:
        """Half the interval as a share of the value; 0.02 reads as "within 2 %"."""
        return (self.hi - self.lo) / 2 / abs(self.value) if self.value else float("inf")


def percentile(values: Sequence[float] | Floats, q: float) -> float:
    """The `q`-th percentile (0..100), linear between ranks. Raises ValueError when there is nothing to rank."""
    if len(values) == 0:
        raise ValueError(f"no values to take the {q}th percentile of")
    return float(np.percentile(np.asarray(values, dtype=np.float64), q))


def ratio(raw: Sequence[float], stack: Sequence[float], seed: int = 0) -> Estimate:
    """median(stack) / median(raw). Raises ValueError when the sides differ in length or raw holds a zero or less."""
    if min(raw, default=1.0) <= 0:
        raise ValueError("a ratio needs raw figures above zero")
    return _paired(raw, stack, lambda r, s: s / r, seed)


def added(raw: Sequence[float], stack: Sequence[float], seed: int = 0) -> Estimate:
    """median(stack) - median(raw), in the unit of both."""
    return _paired(raw, stack, lambda r, s: s - r, seed)


def single(values: Sequence[float], seed: int = 0) -> Estimate:
    """The median of one side's per-round figures."""
    return _paired(values, values, lambda _, s: s, seed)


def settled(estimates: Iterable[Estimate], tolerance: float = 0.02) -> bool:
    """Whether every interval is within +-`tolerance` of its value and rests on enough rounds."""
    return all(e.rounds >= MIN_ROUNDS and e.relative_half_width <= tolerance for e in estimates)


def _paired(
    raw: Sequence[float], stack: Sequence[float], combine: Callable[[Floats, Floats], Floats], seed: int
) -> Estimate:
    if len(raw) != len(stack) or not raw:
        raise ValueError(f"paired rounds needed, got {len(raw)} raw and {len(stack)} stack")
    r, s = np.asarray(raw, dtype=np.float64), np.asarray(stack, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(r), (RESAMPLES, len(r)))
    spread = combine(np.median(r[picks], axis=1), np.median(s[picks], axis=1))
    value = combine(np.median(r, keepdims=True), np.median(s, keepdims=True))
    lo, hi = np.percentile(spread, [2.5, 97.5])
    return Estimate(float(value[0]), float(lo), float(hi), len(r))
