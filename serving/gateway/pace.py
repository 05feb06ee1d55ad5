"""How long a wait will be: what the speed at which slots came free tells. Pure."""

from __future__ import annotations

import math


class Pace:
    """How fast those who wait are served: requests per second of the time in which somebody waits, over the last
    `_COUNT` requests or `_SPAN_S` seconds, whichever is longer. Times are monotonic seconds."""

    _COUNT, _SPAN_S = 64, 5.0
    _ENOUGH = 16  # fewer tell nothing
    _FORGOTTEN_S = 60.0  # without anybody waiting: replicas and requests are others by now

    __slots__ = ("_at", "_n", "_since", "_span_s", "_waiting")

    def __init__(self) -> None:
        self._n = self._span_s = self._since = 0.0
        self._at = -math.inf
        self._waiting = False

    def mark(self, now: float, waiting: bool) -> None:
        """From `now` on somebody waits, or nobody does."""
        if self._waiting:
            self._since += now - self._at
        elif waiting and now - self._at > self._FORGOTTEN_S:
            self._n = self._span_s = self._since = 0.0
        elif not waiting:
            return
        self._at, self._waiting = now, waiting

    def served(self, now: float) -> None:
        """One that waited was served."""
        self.mark(now, self._waiting)
        kept = max(math.exp(-self._since / self._SPAN_S), 1 - 1 / self._COUNT)
        self._n = self._n * kept + 1
        self._span_s = self._span_s * kept + self._since
        self._since = 0.0

    def per_s(self, now: float) -> float | None:
        """None while too little is known."""
        span = self._span_s + self._since + (now - self._at if self._waiting else 0.0)
        return self._n / span if self._n >= self._ENOUGH and span > 0 else None


class Holds:
    """How long requests hold their slots: a mean over the last `_COUNT` of them, and before the first has ended, what the
    age of those inside tells. Times are monotonic seconds."""

    _COUNT = 128
    __slots__ = ("_mean", "_n")

    def __init__(self) -> None:
        self._n = 0
        self._mean = 0.0

    def ended(self, held_s: float) -> None:
        """One was served."""
        self._n += 1
        self._mean += (held_s - self._mean) / min(self._n, self._COUNT)

    def hold_s(self, inside: int, begun: float, now: float) -> float | None:
        """How long one holds its slot that is like those before it and those `inside`, whose begins add up to `begun`. None
        while nothing is inside."""
        if not inside:
            return None
        age = now - begun / inside
        if not self._n:
            return 2 * age  # somebody who looks at a random moment sees half of what a request takes
        if self._n < inside:
            # The first to end are the short ones: those inside count for the time that they have taken already (the
            # estimate of a mean from censored observations); bounded, for requests that all take the same.
            return min(self._mean + age * inside / self._n, 4 * max(self._mean, age))
        return self._mean
