"""Which endpoint takes a request: pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Protocol

from serving.fleet.endpoint import Endpoint, State
from serving.gateway.prefix import BLOCK_TOKENS, KEPT_BLOCKS, Remembered, stable_hash

BROKEN_PAUSE_S = 1.0  # after a refused connection; the directory usually says why within half a second
GONE_S = 5.0  # and so long it counts as gone; the directory has forgotten it by then, unless it lives
# The breaker: after so many failed attempts in a row one more is tried at each end of a pause, which doubles, until one succeeds.
TRIPS = 5
TRY_FIRST_S, TRY_LONGEST_S = 1.0, 16.0
BUSY_PAUSE_S = 0.004  # after a `busy`, how long until one more request is tried there
BUSY_PAUSE_MOST_S = 0.032  # after several in a row: each costs the engine's server a moment too
BUSY_FORGOTTEN_S = 1.0  # without another one: then the door's word is too old to hold back a burst
# What a wholly loaded engine costs against an idle one, in prompt tokens that could be computed meanwhile: a tenth of an engine's
# load is worth as much as some 3,000 tokens found in a cache.
LOAD_TOKENS = 32_768
_BLOCK_LOAD = BLOCK_TOKENS / LOAD_TOKENS
# What others wait to have computed is passed before the first token; what is computed again costs that, the time of all who come
# after, and room in another cache.
PENDING = 0.25
# Of what no cache is known to hold, this part may be where another gateway sent it, if all of them send it to one place.
ELSEWHERE = 0.25
SESSION_TOKENS = 1024  # what it is worth to stay where the session was, beside the blocks that are known
NOBODY: frozenset[str] = frozenset()


class Charged(Protocol):
    """Whether an engine died with a request inside."""

    @property
    def suspicion(self) -> int | None:
        """None: no."""


class Awaiting(Protocol):
    """An attempt that has no answer yet."""

    patient: bool  # nobody else would be tried
    stream: bool
    since: float  # monotonic seconds
    charge: Charged | None  # None: it is on trial

    def give_up(self, why: str, *, suspect: bool) -> None:
        """It is tried elsewhere."""

    def recall(self) -> None:
        """It must be on trial."""


class Upstream:
    """An endpoint as one gateway sees it: the directory's last word plus its own count of what it sent there."""

    __slots__ = (
        "awaiting",
        "broken_until",
        "careful_until",
        "endpoint",
        "failures",
        "fits",
        "full_until",
        "pending",
        "refusals",
        "remembered",
        "seed",
        "sent",
        "tokens",
        "tripped",
        "tripped_at",
        "try_at",
    )

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.sent = 0  # this gateway's requests there now
        self.tokens = 0  # of KV cache that they may take, as estimated
        self.pending = 0  # blocks of their prompts that are still to be computed
        self.seed = stable_hash(endpoint.id.encode())
        self.fits = 0  # of them, so many were inside when its door last said busy: other gateways hold the rest
        self.refusals = 0  # `busy` in a row
        self.full_until = -BUSY_FORGOTTEN_S  # monotonic seconds; from then on one more than `fits` is tried
        self.broken_until = -math.inf  # monotonic seconds; it refused a connection and the directory has not spoken yet
        self.remembered = Remembered(KEPT_BLOCKS)  # what of prompts its cache may hold
        self.keep(KEPT_BLOCKS)
        self.failures = 0  # attempts in a row that failed there, and not by their own fault
        self.tripped = False  # the breaker is open
        self.tripped_at = 0.0  # monotonic seconds
        self.try_at = 0.0  # monotonic seconds; then it is half open
        self.awaiting: set[Awaiting] = set()  # attempts that have no answer yet
        self.careful_until = 0.0  # later than all three: from then on only `sent` and `tokens` count

    def heard(self, endpoint: Endpoint) -> None:
        """The directory's next word of it."""
        if endpoint.url != self.endpoint.url:  # another engine
            self.broken_until = -math.inf
            self.close_breaker()
            self.remembered = Remembered(self.remembered.room)
        elif self.endpoint.state is State.SUSPECT and endpoint.state is State.READY:
            self.close_breaker()  # what failed there did so because of that
        self.endpoint = endpoint

    def keep(self, most: int) -> None:
        """Remember so many blocks, but no more than its cache has room for."""
        kv_tokens = self.endpoint.kv_tokens
        self.remembered.room = max(1, min(kv_tokens // BLOCK_TOKENS, most)) if kv_tokens else most

    def load(self) -> float:
        """Share of slots or of KV cache taken, whichever is more, by the larger of our own count and the reported one."""
        e, sent = self.endpoint, self.sent
        load = (sent if sent > e.in_flight else e.in_flight) / (e.slots or 1)
        if e.kv_tokens:
            kv = (self.tokens if self.tokens > e.tokens else e.tokens) / e.kv_tokens
            return kv if kv > load else load
        return load

    def room(self, now: float, tokens: int = 0) -> bool:
        """Whether one more of that size may be sent there. One that is larger than the whole cache goes alone."""
        e, sent = self.endpoint, self.sent
        if sent >= e.slots:
            return False
        if now < self.careful_until:
            if now < self.broken_until or (self.tripped and now < self.try_at):
                return False
            fits = self.fits if now < self.full_until else self.fits + 1
            if now < self.full_until + BUSY_FORGOTTEN_S and sent >= fits:
                return False
        return not sent or not e.kv_tokens or self.tokens + tokens <= e.kv_tokens

    def free_tokens(self) -> float:
        """How large one more may be where `room` has a slot for it."""
        e = self.endpoint
        return e.kv_tokens - self.tokens if self.sent and e.kv_tokens else math.inf

    def bind(self, now: float, tokens: int = 0) -> None:
        """One more is sent there. Beyond what fitted before, one at a time: a door that is full because of others would
        refuse a whole queue, again and again, on the time of the engine behind it."""
        self.sent += 1
        self.tokens += tokens
        if self.tripped:
            self.try_at = now + self._try_pause_s()
        if self.sent > self.fits:
            self.fits = self.sent
            if now < self.full_until + BUSY_FORGOTTEN_S:
                self._pause(now)

    def unbind(self, tokens: int = 0) -> None:
        """One that was sent is there no more."""
        self.sent -= 1
        self.tokens -= tokens

    def busy(self, now: float) -> None:
        """Its door refused one, which is unbound already."""
        self.fits = self.sent
        self._pause(now)
        self.refusals += 1

    def broken(self, now: float) -> None:
        """Nothing answers there."""
        self.broken_until = now + BROKEN_PAUSE_S
        self.careful_until = max(self.careful_until, self.broken_until)

    def lately_full(self, now: float) -> bool:
        """Whether its door said busy a moment ago."""
        return now < self.full_until + BUSY_FORGOTTEN_S

    def gone(self, now: float) -> bool:
        """Whether nothing has answered there of late."""
        return now < self.broken_until - BROKEN_PAUSE_S + GONE_S

    def failed(self, now: float, alone: bool, since: float) -> None:
        """An attempt that was sent there at `since` failed. `alone`: no other engine of the line has its breaker closed; then
        this one stays closed. It opens once for all that were inside together."""
        if self.tripped and since < self.tripped_at:
            return
        self.failures += 1
        if self.failures >= TRIPS and (self.tripped or not alone):
            if not self.tripped:
                self.tripped, self.tripped_at = True, now
            self.try_at = now + self._try_pause_s()
            self.careful_until = math.inf

    def close_breaker(self) -> None:
        """It answered, or there is no better one."""
        self.failures = 0
        if self.tripped:
            self.tripped = False
            self.careful_until = max(self.full_until + BUSY_FORGOTTEN_S, self.broken_until)

    def _try_pause_s(self) -> float:
        return min(TRY_FIRST_S * 2.0 ** min(self.failures - TRIPS, 16), TRY_LONGEST_S)

    def _pause(self, now: float) -> None:
        self.full_until = now + min(BUSY_PAUSE_S * 2.0 ** min(self.refusals, 8), BUSY_PAUSE_MOST_S)
        self.careful_until = max(self.careful_until, self.full_until + BUSY_FORGOTTEN_S)


def pick(
    upstreams: Iterable[Upstream],
    now: float,
    avoid: Collection[str] = NOBODY,
    tokens: int = 0,
    blocks: tuple[int, ...] = (),
    session: int | None = None,
    *,
    siblings: bool = False,
) -> Upstream | None:
    """The ready endpoint with room for a request of that size that costs it least, or None: its load and the prompts that it
    has to compute first, less what of this prompt (`blocks`) is in its cache. With nothing shared and nothing to compute
    that is the least loaded. `avoid` holds ids that already failed this request; they are used only when nothing else is there
    to wait for. `siblings`: other gateways send prompts there too, so what is not known here goes where they would send it.
    """
    best: Upstream | None = None
    best_cost = 0.0
    ready = State.READY
    alike: list[tuple[Upstream, float]] = []
    known = shared = 0  # of the blocks, anywhere; at one endpoint
    known_session = False
    for u in upstreams:
        e = u.endpoint
        if e.state is not ready or (avoid and e.id in avoid):
            continue
        if siblings and blocks:
            shared = u.remembered.shared(blocks)
            known = max(known, shared)
        if not u.room(now, tokens):
            continue
        cost = u.load()
        if blocks:
            if not siblings:
                shared = u.remembered.shared(blocks)
            cost += (u.pending * PENDING - shared) * _BLOCK_LOAD
        if session is not None and u.remembered.knows(session):
            known_session = True
            cost -= SESSION_TOKENS / LOAD_TOKENS
        if siblings:
            alike.append((u, cost))
        if best is None or cost < best_cost or (cost == best_cost and u.sent < best.sent):
            best, best_cost = u, cost
    if len(alike) > 1 and (blocks or session is not None):
        worth = (len(blocks) - known) * _BLOCK_LOAD * ELSEWHERE
        name = blocks[known] if known < len(blocks) else 0
        if session is not None and not known_session:
            worth += SESSION_TOKENS / LOAD_TOKENS
            name = session
        if worth:
            home, cost = max(alike, key=lambda one: hash((name, one[0].seed)))  # rendezvous hashing
            if cost - worth < best_cost:
                return home
    return best
