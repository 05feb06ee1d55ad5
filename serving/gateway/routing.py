"""Which endpoint takes a request: pure."""

from __future__ import annotations

from collections.abc import Iterable

from serving.fleet.endpoint import Endpoint, State

BUSY_PAUSE_S = 0.004  # after a `busy`, how long until one more request is tried there
BUSY_FORGOTTEN_S = 1.0  # without another one: then the door's word is too old to hold back a burst


class Upstream:
    """An endpoint as one gateway sees it: the directory's last word plus its own count of what it sent there."""

    __slots__ = ("broken_until", "endpoint", "fits", "full_until", "sent")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.sent = 0  # this gateway's requests there now
        self.fits = 0  # of them, so many were inside when its door last said busy: other gateways hold the rest
        self.full_until = -BUSY_FORGOTTEN_S  # monotonic seconds; from then on one more than `fits` is tried
        self.broken_until = 0.0  # monotonic seconds; it refused a connection and the directory has not spoken yet

    def load(self) -> float:
        """Share of slots taken, by the larger of our own count and the reported one."""
        return max(self.sent, self.endpoint.in_flight) / max(1, self.endpoint.slots)

    def room(self, now: float) -> bool:
        """Whether one more may be sent there."""
        limit = self.endpoint.slots
        if now < self.full_until + BUSY_FORGOTTEN_S:
            limit = min(limit, self.fits if now < self.full_until else self.fits + 1)
        return self.sent < limit and now >= self.broken_until

    def bind(self, now: float) -> None:
        """One more is sent there. Beyond what fitted before, one at a time: a door that is full because of others would
        refuse a whole queue, again and again, on the time of the engine behind it."""
        self.sent += 1
        if self.sent > self.fits:
            self.fits = self.sent
            if now < self.full_until + BUSY_FORGOTTEN_S:
                self.full_until = now + BUSY_PAUSE_S

    def busy(self, now: float) -> None:
        """Its door refused one that was sent."""
        self.sent -= 1
        self.fits = self.sent
        self.full_until = now + BUSY_PAUSE_S


def pick(upstreams: Iterable[Upstream], now: float, avoid: frozenset[str] = frozenset()) -> Upstream | None:
    """The least loaded ready endpoint with a free slot, or None. `avoid` holds ids that already failed this request;
    they are used only when nothing else is there to wait for."""
    best: Upstream | None = None
    best_load = 0.0
    for u in upstreams:
        e = u.endpoint
        if e.state is not State.READY or e.id in avoid or not u.room(now):
            continue
        load = u.load()
        if best is None or load < best_load or (load == best_load and u.sent < best.sent):
            best, best_load = u, load
    return best
