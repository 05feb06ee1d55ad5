"""Late binding: a request waits here, in order of arrival, and is bound to an endpoint only where a slot is free.

A new replica takes queued work at once, and a `busy` attempt goes back to the front of its line: it costs a
millisecond, not its place.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable

from serving.errors import NoReplica, QueueFull, RequestError, WaitTooLong
from serving.fleet.endpoint import Endpoint, State
from serving.gateway.routing import Upstream, pick

BROKEN_PAUSE_S = 1.0  # after a refused connection; the directory usually says why within half a second


class _Waiter:
    __slots__ = ("avoid", "future", "since")

    def __init__(self, future: asyncio.Future[Upstream], avoid: frozenset[str], since: float) -> None:
        self.future = future
        self.avoid = avoid
        self.since = since


class VersionLine:
    """One version's endpoints and the requests that wait for a slot there. Used from one event loop only."""

    def __init__(self, version_id: str) -> None:
        self.version_id = version_id
        self.upstreams: dict[str, Upstream] = {}
        self._waiters: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0  # monotonic seconds

    def __len__(self) -> int:
        return len(self._waiters)

    def ready_ids(self) -> frozenset[str]:
        return frozenset(i for i, u in self.upstreams.items() if u.endpoint.state is State.READY)

    def update(self, endpoints: Iterable[Endpoint], *, only_add: bool) -> None:
        """The directory spoke. `only_add`: its table may still be incomplete, so nothing is removed."""
        seen = set()
        for e in endpoints:
            seen.add(e.id)
            known = self.upstreams.get(e.id)
            if known is None:
                self.upstreams[e.id] = Upstream(e)
            else:
                if known.endpoint.url != e.url:
                    known.broken_until = 0.0
                known.endpoint = e
        if not only_add:
            for gone in self.upstreams.keys() - seen:
                del self.upstreams[gone]
        self.pump()

    async def take(
        self, *, others: int, max_queue: int, max_wait_s: float, avoid: frozenset[str], since: float, front: bool
    ) -> Upstream:
        """Binds to an endpoint with a free slot, waiting for one if need be; the caller must `release` it.

        `others` is how many wait in the model's other lines: they share `max_queue`. `front`: it had its turn and goes
        before all that arrived after it, at `since` (monotonic seconds). Raises QueueFull (429), WaitTooLong (429) or
        NoReplica (503), each with a Retry-After.
        """
        if front or not self._waiters:
            now = time.monotonic()
            found = self._pick(avoid, now)
            if found is not None:
                found.bind(now)
                return found
        self._refuse_hopeless()
        if not front and len(self) + others >= max_queue:
            raise QueueFull(
                f"{self.version_id}: {len(self) + others} requests already wait (max_queue {max_queue})",
                retry_after_s=1,
            )
        waiter = _Waiter(asyncio.get_running_loop().create_future(), avoid, since)
        if front:
            earlier = itertools.takewhile(lambda w: w.since <= since, self._waiters)
            self._waiters.insert(sum(1 for _ in earlier), waiter)
        else:
            self._waiters.append(waiter)
        self.pump()  # those ahead may all be waiting for something better than what is free
        try:
            async with asyncio.timeout(max_wait_s):
                return await self._bound(waiter)
        except TimeoutError:
            if not self.ready_ids():
                raise NoReplica(f"{self.version_id} has no ready replica", retry_after_s=5) from None
            raise WaitTooLong(
                f"{self.version_id}: no slot came free within {max_wait_s:g} s", retry_after_s=max(1.0, max_wait_s / 2)
            ) from None

    async def _bound(self, waiter: _Waiter) -> Upstream:
        try:
            return await waiter.future
        except asyncio.CancelledError:
            # Client gone, or too late: leave the line, and give back a slot that was bound in the same instant.
            if waiter.future.done() and not waiter.future.cancelled():
                self.release(waiter.future.result())
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            raise

    def refuse_all(self, why: Callable[[], RequestError]) -> None:
        """No replica will come: everybody who waits is told now."""
        for waiter in self._waiters:
            if not waiter.future.done():
                waiter.future.set_exception(why())
        self._waiters.clear()

    def release(self, upstream: Upstream) -> None:
        """The slot is free again; whoever waits first gets it."""
        upstream.sent -= 1
        if self._waiters:
            self.pump()

    def busy(self, upstream: Upstream) -> None:
        """Its door said busy: other gateways fill it too."""
        now = time.monotonic()
        upstream.busy(now)
        if self._waiters:
            self._arm(now)

    def broken(self, upstream: Upstream) -> None:
        """Nothing answers there."""
        upstream.sent -= 1
        upstream.broken_until = time.monotonic() + BROKEN_PAUSE_S
        if self._waiters:
            self.pump()

    def pump(self) -> None:
        """Binds as many waiters as there are free slots, in order."""
        now = time.monotonic()
        passed: list[_Waiter] = []  # wait for another endpoint than those that are free; others may take these
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.future.done():
                found = self._pick(waiter.avoid, now)
                if found is None and not waiter.avoid:
                    break  # nothing is free for those behind it either
                if found is None:
                    passed.append(waiter)
                else:
                    found.bind(now)
                    waiter.future.set_result(found)
            self._waiters.popleft()
        self._waiters.extendleft(reversed(passed))
        if self._waiters:
            self._arm(now)

    def _pick(self, avoid: frozenset[str], now: float) -> Upstream | None:
        found = pick(self.upstreams.values(), now, avoid)
        if found is None and avoid and not self.ready_ids() - avoid:
            found = pick(self.upstreams.values(), now)
        return found

    def _arm(self, now: float) -> None:
        """While somebody waits, look again when the earliest pause ends."""
        pauses = [t for u in self.upstreams.values() for t in (u.full_until, u.broken_until) if t > now]
        at = min(pauses, default=math.inf)
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
            self._timer = None
        if at < math.inf:
            self._timer_at = at
            self._timer = asyncio.get_running_loop().call_later(at - now + 0.0005, self._again)

    def _again(self) -> None:
        self._timer = None
        if self._waiters:
            self.pump()

    def _refuse_hopeless(self) -> None:
        """Every replica we know of failed at its start: say so now instead of holding the client. One that died while it
        served is being replaced, and worth waiting for."""
        known = [u.endpoint for u in self.upstreams.values()]
        if known and all(e.state is State.FAILED and e.ready_after_s is None for e in known):
            raise NoReplica(f"{self.version_id} has no ready replica: its engine does not start", retry_after_s=10)


def bound_wait(limit_s: float, deadline: float, clock: Callable[[], float] = time.monotonic) -> float:
    """How long a request may wait: its model's limit, or what is left to its deadline, in seconds."""
    return max(0.0, min(limit_s, deadline - clock()))
