"""What one load phase saw, as arrays: written by the load process (npz), read by the benches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.stream import Answer

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Recording:
    """One row per request; times are monotonic seconds, `began` is the phase's zero. Bursts of request i are
    `times[offsets[i]:offsets[i + 1]]`, with the number of events that ended in each in `counts`."""

    began: float
    due: Floats
    start: Floats
    first: Floats
    end: Floats
    ok: NDArray[np.bool_]
    status: Ints  # 0: no answer came
    retry_after_s: Floats  # NaN: nothing was promised
    party: Ints
    tokens: Ints
    events: Ints
    times: Floats
    counts: Ints
    offsets: Ints

    @classmethod
    def of(cls, answers: Sequence[Answer], began: float) -> Recording:
        bursts = [len(a.times) for a in answers]
        return cls(
            began=began,
            due=np.array([a.due for a in answers]),
            start=np.array([a.start for a in answers]),
            first=np.array([a.first for a in answers]),
            end=np.array([a.end for a in answers]),
            ok=np.array([not a.error for a in answers], dtype=np.bool_),
            status=np.array([a.status for a in answers], dtype=np.int64),
            retry_after_s=np.array([a.retry_after_s for a in answers]),
            party=np.array([a.party for a in answers], dtype=np.int64),
            tokens=np.array([a.tokens for a in answers], dtype=np.int64),
            events=np.array([a.events for a in answers], dtype=np.int64),
            times=np.array([t for a in answers for t in a.times]),
            counts=np.array([n for a in answers for n in a.counts], dtype=np.int64),
            offsets=np.concatenate(([0], np.cumsum(bursts, dtype=np.int64))),
        )

    def save(self, path: Path) -> None:
        np.savez(path, allow_pickle=False, **{name: np.asarray(value) for name, value in vars(self).items()})

    @classmethod
    def load(cls, path: Path) -> Recording:
        with np.load(path) as data:
            arrays = {name: data[name] for name in data.files}
        return cls(began=float(arrays.pop("began")), **arrays)

    def ttft_ms(self, settle_s: float = 0.0) -> Floats:
        """Milliseconds from when a request was due to its first character, of whole answers due after `settle_s`.

        In a closed loop a request is due when it is sent; in an open loop at its scheduled arrival, so a late client
        does not hide waiting (coordinated omission).
        """
        chosen = self.ok & (self.due >= self.began + settle_s) & np.isfinite(self.first)
        waits: Floats = (self.first[chosen] - self.due[chosen]) * 1e3
        return waits

    def itl_ms(self, settle_s: float = 0.0) -> Floats:
        """Milliseconds between events, one value per event after the first content burst, of whole answers.

        The first event of a burst has the gap to the burst before; the others came with it and have 0. So a relay that
        merges two events shows one double gap and one zero, which raises the tail as a reader would feel it.
        """
        gaps: list[Floats] = []
        for i in np.flatnonzero(self.ok & (self.due >= self.began + settle_s)):
            lo, hi = self.offsets[i], self.offsets[i + 1]
            times, counts = self.times[lo:hi], self.counts[lo:hi]
            later = np.searchsorted(times, self.first[i]) + 1
            gaps.append(np.diff(times[later - 1 :]) * 1e3)
            gaps.append(np.zeros(int((counts[later:] - 1).sum())))
        return np.concatenate(gaps) if gaps else np.empty(0)

    def tokens_per_s(self, settle_s: float, until_s: float) -> float:
        """Tokens per second that arrived between `settle_s` and `until_s` of the phase. A request's tokens are spread
        evenly over its events, since an engine that falls behind puts several tokens into one event."""
        weight = np.repeat(self.tokens / np.maximum(self.events, 1), np.diff(self.offsets)) * self.counts
        inside = (self.times >= self.began + settle_s) & (self.times < self.began + until_s)
        return float(weight[inside].sum() / (until_s - settle_s))

    def answered_per_s(self, since_s: float, until_s: float) -> float:
        """Whole answers per second that ended between these seconds of the phase."""
        inside = self.ok & (self.end >= self.began + since_s) & (self.end < self.began + until_s)
        return float(inside.sum() / (until_s - since_s))

    @property
    def events_total(self) -> int:
        return int(self.events.sum())

    @property
    def peak_open(self) -> int:
        """The most requests that were open at once."""
        edges = np.concatenate([self.start, self.end])
        steps = np.concatenate([np.ones(len(self.start)), -np.ones(len(self.end))])
        order = np.lexsort((steps, edges))
        return int(np.cumsum(steps[order]).max(initial=0))
