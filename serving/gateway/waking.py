"""A version without a ready replica: when will there be one, as far as is known? Pure."""

from __future__ import annotations

from collections.abc import Iterable

from serving.fleet.endpoint import Endpoint, State, VersionFacts

# From a held request to the start of the engine: the policy's and Serve's loops, a process and its imports.
PLACE_S = 3.0


def ready_in_s(endpoints: Iterable[Endpoint], facts: VersionFacts, now: float) -> float | None:
    """Seconds until a first replica is ready if its start takes as long as the last one did; None: nobody knows.
    `now` is epoch seconds. Clocks of nodes may differ: the answer stays between zero and a whole start."""
    last = facts.ready_after_s
    starting = [e for e in endpoints if e.state is State.STARTING]
    if not starting:
        return None if last is None else PLACE_S + last
    paused = min(e.waits_until for e in starting) - now
    if paused > 0:
        return paused + (last or 0.0)
    if last is None:
        return None
    begun = max(now - max(e.started_at, e.waits_until) for e in starting)
    return min(max(last + PLACE_S - begun, 1.0), last + PLACE_S)
