"""Late binding: a request waits here and is bound to an endpoint only where a slot is free.

A new replica takes queued work at once, and a `busy` attempt goes back to the front: it costs a millisecond, not its place.
Who goes first among those that wait is `order.Order`'s to say; how much of the fleet is this gateway's, `shares.share`'s.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from serving.errors import NoReplica, QueueFull, RequestError, WaitTooLong, counted
from serving.fleet.endpoint import Endpoint, KeyDemand, State
from serving.gateway import shares
from serving.gateway.order import CLASSES, Order
from serving.gateway.pace import Holds, Pace
from serving.gateway.prefix import KEPT_BLOCKS
from serving.gateway.retry import YOUNG_S, Patience, Trials, budget
from serving.gateway.routes import Route
from serving.gateway.routing import NOBODY, Upstream, pick
from serving.gateway.sizes import Sizes

# Beyond its share, while others hold requests, a gateway tries one more this often: their last word may be old, and a slot
# that nobody fills must not stay empty.
OVERDRAFT_S = 0.05
OVERDRAFT_LEAST_S = 0.004  # when such tries are let in, one after the other: then nobody else fills the slots
EXPLAINED = 0.8  # of what is inside is known whose it is: else it came since the others were heard
GROWN = 1.25  # times what it told itself: so much has come since that the others may have more than they told, too
OTHERS_FORGOTTEN_S = 3.0  # without news of the other gateways, everybody takes what there is
# That are looked past for one who can take what is free: the work for an event must grow neither with the line nor, by its
# square, with the fleet.
MOST_ASIDE = 16
RETRY_UNKNOWN_S = 1.0  # when nothing is known of how fast slots come free
LONGEST_RETRY_S = 3600.0
RECALLED_AT_ONCE = 8  # attempts that are asked whether they are suspects, before anything else has its turn
# A request enters when it will be served within this part of its longest wait, as far as can be told. The rest is for being
# wrong: to wait for all of it and then be refused is the worst answer of all.
HOPEFUL = 0.8


class Ticket:
    """One request's claim to a slot, from its arrival to its end, over all its attempts. Times are monotonic seconds."""

    __slots__ = (
        *("adapter", "at", "avoid", "blocks", "cost", "deadline", "key", "place", "rank", "session", "since"),
        *("bound_at", "suspicion", "tokens", "upstream", "weight", "_again_as", "_future", "_over", "_pending"),
    )

    def __init__(
        self,
        *,
        since: float,
        deadline: float = math.inf,
        key: str = "",
        rank: int = 1,
        weight: float = 1.0,
        tokens: int = 0,
        adapter: str | None = None,
        blocks: tuple[int, ...] = (),
        session: int | None = None,
    ) -> None:
        self.key, self.rank, self.weight = key, rank, weight  # rank: of its class
        self.at = (key, rank)
        self.tokens = tokens  # of KV cache it may take
        self.cost = float(tokens or 1)
        self.adapter = adapter  # only where it is loaded
        self.blocks, self.session = blocks, session  # what of it an endpoint's cache may hold
        self.deadline, self.since = deadline, since
        self.avoid: frozenset[str] = NOBODY  # endpoints that failed it
        # Once an engine died with it inside, or a copy: for all of these the same number.
        self.suspicion: int | None = None
        self.upstream: Upstream | None = None  # where it is bound
        self._future: asyncio.Future[Upstream] | None = None  # while it waits
        self.place = -1  # among those that wait, for `Order`
        self._again_as = -1  # among those that wait again
        self.bound_at = 0.0
        self._over = False  # bound beyond its gateway's share
        self._pending = 0  # blocks of its prompt that its endpoint has to compute before the first token

    @property
    def class_(self) -> str:
        return CLASSES[self.rank]


class _Inside(NamedTuple):
    """Requests at engines, their slots, and in how many of these those who wait would fit; in tokens, the KV cache that this
    gateway's may take, and all, and how much there is."""

    requests: float
    slots: int
    most: float
    own_tokens: int
    tokens: int
    kv_tokens: int


class VersionLine:
    """One version's endpoints and the requests that wait for a slot there. Used from one event loop only."""

    def __init__(self, version_id: str, gateway_id: str = "") -> None:
        self.version_id = version_id
        self.upstreams: dict[str, Upstream] = {}
        self.sizes = Sizes()
        self.running = 0  # bound now
        self.gateways = 1  # that send to the same endpoints, with this one
        self.retries = budget(lambda: self.running)
        self.trials = Trials()
        self._patience = Patience()
        self._gone: list[Upstream] = []  # out of the table, while requests are there
        self._gateway_id = gateway_id
        self._order: Order[Ticket] = Order()
        self._returned: list[tuple[float, int, Ticket]] = []  # had their turn already: before all others, by arrival
        self._returned_count, self._returned_cost = 0, 0.0
        # By adapter, those whose adapter no ready replica has yet, and whether each had its turn: nobody waits behind them.
        self._parked: dict[str, dict[Ticket, bool]] = {}
        self._parked_count = 0
        self._numbers = itertools.count()
        self._by_key: dict[tuple[str, int], list[float]] = {}  # bound now: their number, and the key's weight
        self._paces = tuple(Pace() for _ in CLASSES)
        self._holds = Holds()
        self._begun = 0.0  # sum of the times at which those that are bound were
        self._blocked = False  # somebody waits for more room than is free, and keeps it from others
        self._others: dict[str, tuple[KeyDemand, ...]] = {}
        self._others_running = 0
        self._others_until = -math.inf
        self._turn = 0
        self._share: shares.Share | None = None  # None: take what there is
        self._share_at = -math.inf
        self._told: tuple[KeyDemand, ...] = ()  # by this gateway, as of then
        self._part: float | None = None  # of all inside, this gateway's; None: not reckoned since the others were heard
        self._part_asked = 0  # here, as of when it was
        self._overdraft_at = 0.0
        self._overdraft_s = OVERDRAFT_S
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0  # monotonic seconds

    def __len__(self) -> int:
        return len(self._order) + self._returned_count

    @property
    def siblings(self) -> bool:
        """Whether other gateways send prompts to the same endpoints."""
        return self.gateways > 1

    @property
    def waiting(self) -> int:
        """Those in line, and those under suspicion that wait for their trial before they join it."""
        return len(self) + self.trials.waiting

    def gone(self, endpoint_id: str) -> bool:
        """Whether nothing answers there, whatever the directory still says."""
        upstream = self.upstreams.get(endpoint_id)
        return upstream is not None and upstream.gone(time.monotonic())

    def ready_ids(self) -> frozenset[str]:
        return frozenset(i for i, u in self.upstreams.items() if u.endpoint.state is State.READY)

    def size_of(self, route: Route, fields: Mapping[str, Any], body_bytes: int) -> int:
        """Tokens of KV cache that a request may take, as estimated."""
        context = None
        for u in self.upstreams.values():
            if u.endpoint.max_model_len:
                context = u.endpoint.max_model_len
                break
        return self.sizes.estimate(route, fields, body_bytes, context)

    def demand(self, newcomer: Ticket | None = None) -> list[KeyDemand]:
        """Who asks for how much here now, with one who is not in the line yet."""
        held = self._order.by_key()
        if newcomer is not None:
            count, weight = held.get(newcomer.at, (0, newcomer.weight))
            held[newcomer.at] = (count + 1, weight)
        returned = [t for _, place, t in self._returned if t._again_as == place]
        returned += [t for parked in self._parked.values() for t, again in parked.items() if again]
        for t in returned:
            known = held.get(t.at, (0, t.weight))
            held[t.at] = (known[0] + 1, known[1])
        return [
            KeyDemand(
                at[0],
                at[1],
                held[at][1] if at in held else self._by_key[at][1],
                held[at][0] if at in held else 0,
                int(self._by_key[at][0]) if at in self._by_key else 0,
            )
            for at in held.keys() | self._by_key.keys()
        ]

    def update(self, endpoints: Iterable[Endpoint], *, only_add: bool) -> None:
        """The directory spoke. `only_add`: its table may still be incomplete, so nothing is removed."""
        seen = set()
        for e in endpoints:
            seen.add(e.id)
            known = self.upstreams.get(e.id)
            if known is None:
                self.upstreams[e.id] = known = self._came(e)
            known.heard(e)
        if not only_add:
            for gone in self.upstreams.keys() - seen:
                upstream = self.upstreams.pop(gone)
                if upstream.sent:
                    self._gone.append(upstream)
        most = KEPT_BLOCKS // max(1, len(self.upstreams))
        for u in self.upstreams.values():
            u.keep(most)
        if not self._closed():
            for u in self.upstreams.values():
                u.close_breaker()
        for adapter in [a for a in self._parked if self._somewhere(a)]:
            self._unpark(adapter)
        self.pump()

    def _came(self, e: Endpoint) -> Upstream:
        """New, or out of the table for a moment: what failed there meanwhile did so because of that."""
        back = next((u for u in self._gone if u.endpoint.id == e.id), None)
        if back is None:
            return Upstream(e)
        self._gone.remove(back)
        back.broken_until = -math.inf
        back.close_breaker()
        return back

    def told(self, demand: Mapping[str, tuple[KeyDemand, ...]], turn: int) -> None:
        """What gateways hold and run, by gateway, this one as well. `turn`: the number of the table that says so."""
        now = time.monotonic()
        self._others, self._turn, self._part = dict(demand), turn, None
        self._told = self._others.pop(self._gateway_id, ())
        others = [d for told in self._others.values() for d in told]
        self._others_running = sum(d.running for d in others)
        contended = any(d.held for d in others)
        self._others_until = now + OTHERS_FORGOTTEN_S if contended else -math.inf
        if contended:
            self._share_at = -math.inf
        elif self._share is not None:
            self._unshare()
        if self:
            self.pump()

    def admit_suspect(self, ticket: Ticket, *, others: int, max_queue: int, put_off: bool = False) -> bool:
        """A newcomer under suspicion is about to be on trial, or, `put_off`, to wait for the trials of others: whether it must
        wait, and is admitted. Raises QueueFull (429) where that is one too many; `others` as for `take`. Those who are put off
        are bounded on their own: they keep no other request from an engine."""
        if not put_off and not self.trials.taken(self.home(ticket)):
            return False
        waiting = others + (self.trials.put_off if put_off else self.waiting)
        if waiting >= max_queue:
            raise self._full(ticket, waiting, max_queue)
        return True

    async def take(
        self,
        ticket: Ticket,
        *,
        others: int,
        max_queue: int,
        max_wait_s: float,
        again: bool = False,
        admitted: bool = False,
    ) -> Upstream:
        """Binds to an endpoint with a free slot, waiting for one if need be; the caller must `release` the ticket, or tell
        `busy` or `broken`.

        `others` is how many wait in the model's other lines: they share `max_queue`. `again`: it had its turn, and goes
        before all others. `admitted`: it has waited before, as `admit_suspect` let it; it enters a full queue in its place, and
        is the last of its key to give way. Raises QueueFull (429), WaitTooLong (429) or NoReplica (503), each with a
        Retry-After.
        """
        now = time.monotonic()
        if (again or len(self) == self._parked_count) and (now >= self._others_until or self._may_bind(now, ticket)):
            found = self._pick(ticket, now)
            if found is not None:
                self._bind(ticket, found, now)
                return found
        if not again:
            self._admit(ticket, others, max_queue, max_wait_s, admitted, now)
        future = ticket._future = asyncio.get_running_loop().create_future()
        self._join(ticket, again, now)
        if admitted and not again:
            self._order.eldest([ticket])
        self.pump()  # those ahead may all be waiting for something better than what is free
        try:
            async with asyncio.timeout(max_wait_s):
                bound: Upstream = await future
                return bound
        except TimeoutError:
            self._leave(ticket)
            if not self.ready_ids():
                raise NoReplica(f"{self.version_id} has no ready replica", retry_after_s=5) from None
            if ticket.adapter is not None and not self._somewhere(ticket.adapter):
                raise NoReplica(
                    f"{self.version_id}: no ready replica has loaded the adapter {ticket.adapter!r}", retry_after_s=5
                ) from None
            raise WaitTooLong(
                f"{self.version_id}: no slot came free within {max_wait_s:g} s",
                retry_after_s=self._retry_after_s(ticket, time.monotonic()),
            ) from None
        except asyncio.CancelledError:  # its client is gone, or its time is up
            self._leave(ticket)
            raise
        finally:
            ticket._future = None

    def refuse_all(self, why: Callable[[], RequestError]) -> None:
        """No replica will come: everybody who waits is told now."""
        now = time.monotonic()
        for adapter in list(self._parked):
            self._unpark(adapter)
        while (ticket := self._next()[0]) is not None:
            if ticket._future is not None and not ticket._future.done():
                ticket._future.set_exception(why())
        for pace in self._paces:
            pace.mark(now, False)

    def entered(self, ticket: Ticket) -> None:
        """Its door let it in, and its answer has begun."""
        upstream = ticket.upstream
        if upstream is not None:
            upstream.refusals = 0
            upstream.broken_until = -math.inf
            upstream.pending -= ticket._pending
            ticket._pending = 0
            if upstream.failures:
                upstream.close_breaker()
        if ticket._over:
            ticket._over = False
            self._overdraft_s = max(OVERDRAFT_LEAST_S, self._overdraft_s / 2)
            self._overdraft_at = min(self._overdraft_at, time.monotonic() + self._overdraft_s)

    def release(self, ticket: Ticket) -> None:
        """The slot is free again; whoever is next gets it."""
        now = time.monotonic()
        self._unbind(ticket)
        self._holds.ended(now - ticket.bound_at)
        if self:
            self.pump(now)

    def busy(self, ticket: Ticket) -> None:
        """Its door said busy: other gateways fill it too."""
        now = time.monotonic()
        self._unbind(ticket).busy(now)
        if ticket._over:
            ticket._over = False
            self._overdraft_s = OVERDRAFT_S
            self._overdraft_at = now + OVERDRAFT_S
        if self:
            self._arm(now)

    def unsent(self, ticket: Ticket) -> None:
        """Another one is on trial there: whoever is not may have the slot."""
        self._unbind(ticket)
        ticket._over = False
        if self:
            self.pump()

    def broken(self, ticket: Ticket) -> None:
        """Nothing answers there."""
        assert ticket.upstream is not None
        ticket.upstream.broken(time.monotonic())
        self.failed(ticket)

    def failed(self, ticket: Ticket) -> None:
        """What came from there was no answer."""
        now = time.monotonic()
        upstream = self._unbind(ticket)
        upstream.failed(now, not self._closed() - {upstream.endpoint.id}, ticket.bound_at)
        if self:
            self.pump(now)

    def answered_first(self, ticket: Ticket) -> None:
        """The first event of a stream is here."""
        now = time.monotonic()
        self._patience.took(now - ticket.bound_at, now)

    def give_up_on_the_silent(self, now: float) -> int:
        """Attempts without an answer at engines that are suspect or gone, or for longer than any of late, are tried elsewhere
        where there is a place: as many as may be tried at once, and how many that were. The others lose nothing where they
        are, and have their answer if the engine is well again."""
        count, tried, bound_s = 0, 0, self._patience.bound_s()
        turns, trials = self.retries.free(), self.trials.free(len(self.ready_ids()))
        self._gone = [u for u in self._gone if u.sent]
        for u in (*self.upstreams.values(), *self._gone):
            if not u.awaiting or count >= turns:
                continue
            e = u.endpoint
            suspect = e.state in (State.SUSPECT, State.FAILED)
            lost = suspect or self.upstreams.get(e.id) is not u
            due = [a for a in u.awaiting if not a.patient and (lost or (a.stream and now - a.since > bound_s))]
            if not due:
                continue
            others = (
                o for o in self.upstreams.values() if o is not u and o.endpoint.state is State.READY and o.room(now)
            )
            most = min(turns - count, trials - tried) if suspect else turns - count
            places = min(sum(o.endpoint.slots - o.sent for o in others), most)
            for attempt in sorted(due, key=lambda a: a.since)[: max(0, places)]:
                # Of one that only says nothing to the directory any more nobody knows that it died: that accuses no request.
                why = f"it is {e.state}" if suspect else "it left the table"
                why = why if lost else f"nothing came for {now - attempt.since:.0f} s"
                attempt.give_up(f"{e.id}: {why}", suspect=suspect)
                count += 1
                tried += suspect
        return count

    async def recall_suspects(self, now: float) -> None:
        """Attempts without an answer whose copies were in an engine that died: they must be on trial. Those that their engine
        has survived for a while stay. To know one takes its fingerprint, 0.3 ms of a long prompt: few are asked at once."""
        asked = 0
        for u in (*self.upstreams.values(), *self._gone):
            for attempt in tuple(u.awaiting):
                if attempt.charge is None or attempt.patient or now - attempt.since > YOUNG_S:
                    continue
                if attempt not in u.awaiting:  # it was answered meanwhile
                    continue
                if attempt.charge.suspicion is not None:
                    attempt.recall()
                asked += 1
                if asked % RECALLED_AT_ONCE == 0:
                    await asyncio.sleep(0)

    def pump(self, now: float | None = None) -> None:
        """Binds as many of those who wait as there are free slots, in order.

        One that needs more KV cache than is free anywhere waits for the endpoint with the most of it, which takes nobody
        else meanwhile: so it gets its turn however small the others are, and they go on elsewhere.
        """
        now = time.monotonic() if now is None else now
        aside: list[tuple[Ticket, bool]] = []
        kept: set[str] = set()
        free: dict[str, float] = {}  # endpoints with a slot that are not kept, and their KV cache that is free
        if self:
            ready = (u for u in self.upstreams.values() if u.endpoint.state is State.READY and u.room(now))
            free = {u.endpoint.id: u.free_tokens() for u in ready}
        most, returned = MOST_ASIDE, True
        while free and self and self._may_bind(now):
            if len(aside) >= most:
                if not returned or not any(again for _, again in aside):
                    break
                returned, most = False, most + MOST_ASIDE  # they stand before all others, who may take what they cannot
            ticket, again = self._next(returned=returned)
            if ticket is None:
                break
            assert ticket._future is not None
            if ticket._future.done():  # it is leaving in this instant
                self._paces[ticket.rank].mark(now, self._order.count(ticket.rank) > 0)
                continue
            if ticket.adapter is not None and not self._somewhere(ticket.adapter):
                self._join(ticket, again, now, back=True)
                if not again:
                    self._order.eldest([ticket])
                continue
            anywhere = not ticket.avoid and ticket.adapter is None and ticket.suspicion is None
            best = max(free, key=free.__getitem__) if anywhere else None
            if best is None or ticket.tokens <= free[best]:
                found = self._pick(ticket, now, kept)
                if found is not None:
                    self._serve(ticket, found, again, now)
                    if found.room(now):
                        free[found.endpoint.id] = found.free_tokens()
                    else:
                        free.pop(found.endpoint.id, None)
                    continue
            aside.append((ticket, again))
            if ticket.suspicion is not None:
                continue  # its place is at one engine, whatever room there is elsewhere
            if best is None:
                without = ticket.avoid | self._lacking(ticket.adapter)
                best = max((i for i in free if i not in without), key=free.__getitem__, default=None)
            if best is not None:  # slots are free, and only its size is in the way
                kept.add(best)
                del free[best]
        for ticket, again in aside:
            self._join(ticket, again, now, back=True)
        self._order.eldest(ticket for ticket, again in aside if not again)
        self._blocked = bool(kept)
        if self:
            self._arm(now)

    # -- one ticket ----------------------------------------------------------------------------------------------

    def _pick(self, ticket: Ticket, now: float, kept: Iterable[str] = ()) -> Upstream | None:
        if ticket.adapter is not None:
            kept = {*kept, *self._lacking(ticket.adapter)}
        if ticket.suspicion is not None:
            home = self._home(ticket, now)
            return home if home is not None and home.endpoint.id not in kept and home.room(now, ticket.tokens) else None
        if not ticket.avoid:
            return self._best(ticket, now, frozenset(kept) if kept else NOBODY)
        found = self._best(ticket, now, ticket.avoid.union(kept))
        if found is None and not self.ready_ids() - ticket.avoid - self._lacking(ticket.adapter):
            found = self._best(ticket, now, frozenset(kept))
        return found

    def _best(self, ticket: Ticket, now: float, avoid: frozenset[str]) -> Upstream | None:
        upstreams, siblings = self.upstreams.values(), self.gateways > 1
        if self.trials.homes:
            # Apart, as far as there is room: a newcomer that ends an engine must not look like whoever is on trial there.
            apart = avoid.union(self.trials.homes)
            found = pick(upstreams, now, apart, ticket.tokens, ticket.blocks, ticket.session, siblings=siblings)
            if found is not None:
                return found
        return pick(upstreams, now, avoid, ticket.tokens, ticket.blocks, ticket.session, siblings=siblings)

    def home(self, ticket: Ticket) -> str:
        """The engine at which one under suspicion is tried; empty while there is none."""
        home = self._home(ticket, time.monotonic())
        return "" if home is None else home.endpoint.id

    def _home(self, ticket: Ticket, now: float) -> Upstream | None:
        """The same one for all copies of a request at all gateways (rendezvous hashing), as far as they see the same engines
        and the same room: so no copy is tried beside another, wherever it came in."""
        lacking = self._lacking(ticket.adapter)
        ready = [u for i, u in self.upstreams.items() if u.endpoint.state is State.READY and i not in lacking]
        ready = [u for u in ready if u.endpoint.id not in ticket.avoid] or ready
        ready = [u for u in ready if u.room(now, ticket.tokens)] or ready
        return max(ready, key=lambda u: hash((ticket.suspicion, u.seed)), default=None)

    def _lacking(self, adapter: str | None) -> set[str]:
        """Endpoints without it, as there are while adapters change."""
        if adapter is None:
            return set()
        known = (u.endpoint for u in self.upstreams.values())
        return {e.id for e in known if e.adapters is not None and adapter not in e.adapters}

    def _somewhere(self, adapter: str) -> bool:
        """Whether a ready endpoint has it."""
        ready = (u.endpoint for u in self.upstreams.values() if u.endpoint.state is State.READY)
        return any(e.adapters is None or adapter in e.adapters for e in ready)

    def on_node_of(self, upstream: Upstream) -> set[str]:
        """Endpoints that are lost with it if its node is; it alone where nobody knows nodes."""
        node = upstream.endpoint.node
        beside = {i for i, u in self.upstreams.items() if node and u.endpoint.node == node}
        return beside | {upstream.endpoint.id}

    def _closed(self) -> set[str]:
        """Ready endpoints whose breaker is closed."""
        return {i for i, u in self.upstreams.items() if u.endpoint.state is State.READY and not u.tripped}

    def _any_room(self, now: float) -> bool:
        return any(u.room(now) and u.endpoint.state is State.READY for u in self.upstreams.values())

    def _bind(self, ticket: Ticket, upstream: Upstream, now: float) -> None:
        upstream.bind(now, ticket.tokens)
        ticket.upstream, ticket.bound_at = upstream, now
        if ticket.blocks or ticket.session is not None:
            ticket._pending = len(ticket.blocks) - upstream.remembered.shared(ticket.blocks)
            upstream.pending += ticket._pending
            upstream.remembered.add(ticket.blocks, ticket.session)
        self.running += 1
        if self._share is not None and self.running > self._share.slots:
            ticket._over = True
            self._overdraft_at = now + self._overdraft_s
        self._begun += now
        mine = self._by_key.get(ticket.at)
        if mine is None:
            self._by_key[ticket.at] = [1, ticket.weight]
        else:
            mine[0] += 1

    def _unbind(self, ticket: Ticket) -> Upstream:
        upstream = ticket.upstream
        assert upstream is not None
        ticket.upstream = None
        upstream.unbind(ticket.tokens)
        upstream.pending -= ticket._pending
        ticket._pending = 0
        self.running -= 1
        self._begun = self._begun - ticket.bound_at if self.running else 0.0
        mine = self._by_key[ticket.at]
        if mine[0] == 1:
            del self._by_key[ticket.at]
        else:
            mine[0] -= 1
        return upstream

    def _serve(self, ticket: Ticket, upstream: Upstream, again: bool, now: float) -> None:
        """It waited and is bound."""
        self._bind(ticket, upstream, now)
        if not again:
            self._order.served(ticket)
            # Once for each: whoever is told `busy` now is the first to be served after that.
            self._paces[ticket.rank].served(now)
            self._paces[ticket.rank].mark(now, self._order.count(ticket.rank) > 0)
        if ticket._future is not None:
            ticket._future.set_result(upstream)

    # -- who waits -----------------------------------------------------------------------------------------------

    def _admit(
        self, ticket: Ticket, others: int, max_queue: int, max_wait_s: float, admitted: bool, now: float
    ) -> None:
        """Raises what is refused at once: a full queue, unless somebody must give way, and a wait without hope."""
        loser, error = None, None
        if not admitted and len(self) + others >= max_queue:
            loser = self._order.give_way(ticket, max_queue) if max_queue else None
            error = self._full(loser or ticket, len(self) + others, max_queue)
            if loser is None:
                raise error
        ahead, pace = self._outlook(ticket, now)
        # Who has nobody before it may always wait: were the pace misjudged, nobody else could find out.
        if pace is not None and ahead and (ahead + 1) / pace > HOPEFUL * max_wait_s:
            before = counted(ahead, "request is", "requests are")
            raise WaitTooLong(
                f"{self.version_id}: {before} before this one: it would not be served within {max_wait_s:g} s",
                retry_after_s=_retry_after_s(ahead, pace),
            )
        if loser is not None and error is not None:  # last: nobody gives way to one who does not enter
            self._fail(loser, error)

    def _full(self, ticket: Ticket, waiting: int, max_queue: int) -> QueueFull:
        return QueueFull(
            f"{self.version_id}: {counted(waiting, 'request already waits', 'requests already wait')} (max_queue {max_queue})",
            retry_after_s=self._retry_after_s(ticket, time.monotonic()),
        )

    def _outlook(self, ticket: Ticket, now: float) -> tuple[int, float | None]:
        """How many would be served before a new one like it, and how many are a second; None while that is unknown."""
        ahead = self._order.ahead_of(ticket) + self._returned_count
        higher = sum(self._order.count(rank) for rank in range(ticket.rank))
        measured, by_holds = self._paces[ticket.rank].per_s(now), self._by_holds(ticket, now)
        if measured is not None and (higher or by_holds is None):
            return ahead, measured
        if measured is None:
            ahead += higher
        # Two measures that err in different ways: the one in the middle of a batch that ends together, the other after a
        # change of what requests take.
        known = [p for p in (measured, by_holds) if p is not None]
        return ahead, sum(known) / len(known) if known else None

    def _by_holds(self, ticket: Ticket, now: float) -> float | None:
        """How many leave a second, by how long they hold their slots: of those inside, or, where this gateway has less inside
        than its part of the fleet since another one was faster, of as many as that part is. Where KV cache is scarce those inside
        may be few and large, as in the first second of a burst: each makes room for as many of those who wait as are of its
        size."""
        hold_s = self._holds.hold_s(self.running, self._begun, now)
        if not hold_s:
            return None
        size = (self._order.cost + self._returned_cost) / len(self) if self else 0.0  # of those who wait, in the mean
        lacking = self._lacking(ticket.adapter)
        inside = self._inside(lacking, size, now)
        count = self._ours(inside.requests, everywhere=not lacking) if self.gateways > 1 else 0.0
        if size and inside.tokens * 2 > inside.kv_tokens:
            count = max(count, inside.own_tokens / size)
        # What is inside elsewhere, as where replicas drain, makes no room here.
        count = max(min(self.running, inside.slots), min(count, inside.most))
        return count / hold_s if count else None

    def _inside(self, lacking: Collection[str], size: float, now: float) -> _Inside:
        """Of all gateways, in the ready endpoints that are not `lacking`: by the directory's word; and where a door was full a
        moment ago, what nobody has told yet is taken for requests of `size` tokens each. Large requests of others count as if
        more of them came: whether they do, nobody tells."""
        slots = own_tokens = tokens = kv = 0
        count = most = 0.0
        for i, u in self.upstreams.items():
            e = u.endpoint
            if e.state is not State.READY or i in lacking or u.gone(now):
                continue
            slots += e.slots
            here = u.sent if u.sent > e.in_flight else e.in_flight
            fit = left = float(e.slots)
            if e.kv_tokens:
                known = u.tokens if u.tokens > e.tokens else e.tokens
                own_tokens += u.tokens
                tokens += known
                kv += e.kv_tokens
                if size:
                    left = (e.kv_tokens - known) / size
                    if e.kv_tokens < fit * size:
                        fit = e.kv_tokens / size
            if u.lately_full(now) and left > 0:
                count += max(here, min(e.slots, here + left))
            else:
                count += here
            most += fit
        return _Inside(count, slots, most, own_tokens, tokens, kv)

    def _ours(self, inside: float, *, everywhere: bool) -> float:
        """How many of all `inside` will be this gateway's once each fills its share: by what it told itself when the others told
        theirs. Where more has come here since, it may have come to all in the same moment: then by what it asks for now, and no
        more than where all have as much. That alone where what was told does not explain how much is inside. `everywhere`: that
        is at all ready endpoints, as the others count."""
        alike, slots, me = 1 / self.gateways, self._slots(), self._gateway_id
        if everywhere:
            known = self.running + self._others_running
            if known < EXPLAINED * inside:
                return alike * inside
            inside = max(inside, min(known, slots))
        asked = self.running + len(self)
        if self._part is None:
            self._part = shares.part(slots, me, self._told, self._others)
            self._part_asked = sum(d.held + d.running for d in self._told)
        if asked > GROWN * self._part_asked:
            now_mine = shares.told(self.demand())  # cut to size as the others' is
            self._part = max(self._part, min(alike, shares.part(slots, me, now_mine, self._others)))
            self._part_asked = asked
        return self._part * inside

    def _retry_after_s(self, ticket: Ticket, now: float) -> float:
        """When what is before a new one like it will have been served."""
        return _retry_after_s(*self._outlook(ticket, now))

    def _join(self, ticket: Ticket, again: bool, now: float, *, back: bool = False) -> None:
        parked = ticket.adapter is not None and not self._somewhere(ticket.adapter)
        if parked:
            assert ticket.adapter is not None
            self._parked.setdefault(ticket.adapter, {})[ticket] = again
            self._parked_count += 1
        if again:
            ticket._again_as = next(self._numbers)
            self._returned_count += 1
            self._returned_cost += ticket.cost
            if not parked:
                heapq.heappush(self._returned, (ticket.since, ticket._again_as, ticket))
        else:
            self._order.add(ticket, again=back, parked=parked)
            self._paces[ticket.rank].mark(now, self._order.count(ticket.rank) > 0)

    def _unpark(self, adapter: str) -> None:
        """They stand in their places again: by deadline and age among those of their key."""
        now, parked = time.monotonic(), self._parked.pop(adapter)
        self._parked_count -= len(parked)
        for ticket, again in parked.items():
            if again:
                heapq.heappush(self._returned, (ticket.since, ticket._again_as, ticket))
            else:
                self._order.offer(ticket)
                self._paces[ticket.rank].mark(now, True)

    def _forget_parked(self, ticket: Ticket) -> None:
        parked = self._parked.get(ticket.adapter or "", {})
        if ticket in parked and ticket.adapter is not None:
            del parked[ticket]
            self._parked_count -= 1
            if not parked:
                del self._parked[ticket.adapter]

    def _next(self, *, returned: bool = True) -> tuple[Ticket | None, bool]:
        """Whoever is next, taken out, and whether it had its turn before; of others only, unless `returned`."""
        while returned and self._returned:
            _, place, ticket = heapq.heappop(self._returned)
            if ticket._again_as == place:
                self._no_more_returned(ticket)
                return ticket, True
        return self._order.pop(), False

    def _no_more_returned(self, ticket: Ticket) -> None:
        ticket._again_as = -1
        self._returned_count -= 1
        self._returned_cost = self._returned_cost - ticket.cost if self._returned_count else 0.0

    def _leave(self, ticket: Ticket) -> None:
        """It waits no more; a slot that was bound in the same instant is given back."""
        now = time.monotonic()
        if ticket.upstream is not None:
            self._unbind(ticket)
            if self:
                self.pump(now)
            return
        self._forget_parked(ticket)
        if ticket._again_as >= 0:
            self._no_more_returned(ticket)
        elif self._order.remove(ticket):
            self._paces[ticket.rank].mark(now, self._order.count(ticket.rank) > 0)
        elif ticket._future is not None and ticket._future.done() and not ticket._future.cancelled():
            ticket._future.exception()  # refused in the same instant: nobody will ask
        if self._blocked:
            self.pump(now)

    def _fail(self, ticket: Ticket, error: RequestError) -> None:
        """Somebody who waits is refused after all."""
        self._forget_parked(ticket)
        self._order.remove(ticket)
        self._paces[ticket.rank].mark(time.monotonic(), self._order.count(ticket.rank) > 0)
        if ticket._future is not None and not ticket._future.done():
            ticket._future.set_exception(error)

    # -- shares --------------------------------------------------------------------------------------------------

    def _may_bind(self, now: float, newcomer: Ticket | None = None) -> bool:
        """Whether one more is this gateway's to send."""
        if now >= self._others_until:
            if self._share is not None:
                self._unshare()
            return True
        if now - self._share_at >= OVERDRAFT_S:
            self._reshare(now, newcomer)
        assert self._share is not None
        return self.running < self._share.slots or now >= self._overdraft_at

    def _reshare(self, now: float, newcomer: Ticket | None) -> None:
        share = shares.share(self._slots(), self._gateway_id, self.demand(newcomer), self._others, self._turn)
        self._share, self._share_at = share, now
        held = self._order.by_key()
        granted = sum(share.weights.get(at, 0.0) for at in held)
        if granted > 0:
            scale = sum(weight for _, weight in held.values()) / granted
            self._order.weigh({at: w * scale for at, w in share.weights.items()})

    def _slots(self) -> int:
        return sum(u.endpoint.slots for u in self.upstreams.values() if u.endpoint.state is State.READY)

    def _unshare(self) -> None:
        self._share = None
        self._overdraft_at = 0.0
        self._order.weigh({at: weight for at, (_, weight) in self._order.by_key().items()})

    # -- time ----------------------------------------------------------------------------------------------------

    def _arm(self, now: float) -> None:
        """While somebody waits, look again when the earliest pause ends."""
        at = math.inf
        for u in self.upstreams.values():
            if now < u.full_until < at:
                at = u.full_until
            if now < u.broken_until < at:
                at = u.broken_until
            if u.tripped and now < u.try_at < at:
                at = u.try_at
        # Where one more is let in already, it is room that is missing, and whatever frees some looks again.
        over = self._share is not None and self.running >= self._share.slots and now < self._overdraft_at
        if over and self._any_room(now):
            at = min(at, max(self._overdraft_at, now + OVERDRAFT_LEAST_S))
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
        if self:
            self.pump()


def _retry_after_s(ahead: int, pace: float | None) -> float:
    return RETRY_UNKNOWN_S if pace is None else min((ahead + 1) / pace, LONGEST_RETRY_S)


def bound_wait(limit_s: float, deadline: float, clock: Callable[[], float] = time.monotonic) -> float:
    """How long a request may wait: its model's limit, or what is left to its deadline, in seconds."""
    return max(0.0, min(limit_s, deadline - clock()))
