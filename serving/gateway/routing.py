"""Which endpoint takes a request: pure."""

from __future__ import annotations

from collections.abc import Iterable

from serving.fleet.endpoint import Endpoint, State


class Upstream:
    """An endpoint as one gateway sees it: the directory's last word plus its own count of what it sent there."""

    __slots__ = ("broken_until", "endpoint", "full_until", "sent")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.sent = 0  # this gateway's requests there now
        self.full_until = 0.0  # monotonic seconds; its door said busy
        self.broken_until = 0.0  # monotonic seconds; it refused a connection and the directory has not spoken yet

    def load(self) -> float:
        """Share of slots taken, by the larger of our own count and the reported one."""
        return max(self.sent, self.endpoint.in_flight) / max(1, self.endpoint.slots)


def pick(upstreams: Iterable[Upstream], now: float, avoid: frozenset[str] = frozenset()) -> Upstream | None:
    """The least loaded ready endpoint with a free slot, or None. `avoid` holds ids that already failed this request;
    they are used only when nothing else is there to wait for."""
    best: Upstream | None = None
    best_load = 0.0
    for u in upstreams:
        e = u.endpoint
        if e.state is not State.READY or u.sent >= e.slots or u.full_until > now or u.broken_until > now or e.id in avoid:
            continue
        load = u.load()
        if best is None or load < best_load or (load == best_load and u.sent < best.sent):
            best, best_load = u, load
    return best
