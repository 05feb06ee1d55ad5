"""In which order waiting requests are served: by class, fairly between API keys, then by deadline, then by age. Pure: no
clock, no I/O.

* Class: `interactive` before `default` before `batch`; but of every `CLASS_EVERY` requests served while a lower class waits,
  one is that class's, so that none waits for ever.
* Key: start-time fair queueing (Goyal, Vin, Cheng: "Start-time Fair Queueing", 1996). Each key of a class has a virtual start
  time; the smallest is served next and moves on by the request's cost over the key's weight. A key that was away starts at
  the present virtual time: it gains nothing by having been away, and owes nothing.
* Inside a key: the nearest deadline, then the oldest.

One that cannot be served anywhere for now is parked: it counts as one of its key and class, and nobody waits behind it.

Every operation is O(log n) amortised, whatever waits: what leaves early is dropped from the heaps when it comes up, or when
half of a heap is of that kind.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

CLASSES = ("interactive", "default", "batch")
RANK: Mapping[str, int] = {name: rank for rank, name in enumerate(CLASSES)}
CLASS_EVERY = 10
KEPT_SHARE = 10  # one `KEPT_SHARE`-th of a full queue is every class's own


class Waits(Protocol):
    """What must be known of one who waits. None of it changes while it does."""

    place: int  # among those of the same deadline and age; the order writes it

    @property
    def key(self) -> str: ...  # whose it is
    @property
    def rank(self) -> int: ...  # of its class, 0 first
    @property
    def weight(self) -> float: ...  # of its key
    @property
    def cost(self) -> float: ...  # what serving it takes, in any unit that is the same for all
    @property
    def deadline(self) -> float: ...
    @property
    def since(self) -> float: ...


W = TypeVar("W", bound=Waits)


class _Flow(Generic[W]):
    """One key's requests of one class."""

    __slots__ = ("heap", "key", "listed", "members", "offered", "start", "weight")

    def __init__(self, key: str) -> None:
        self.key = key
        self.weight = 1.0
        self.start = 0.0  # virtual time
        self.listed = False  # in the class's heap, possibly at an earlier time than `start`
        self.members: OrderedDict[W, bool] = OrderedDict()  # in order of arrival; False: parked
        self.offered = 0  # of them, not parked
        self.heap: list[tuple[float, float, int, W]] = []


class _Class(Generic[W]):
    __slots__ = ("clock", "count", "flows", "heap", "offered", "passed", "weight")

    def __init__(self) -> None:
        self.count = 0
        self.offered = 0  # of them, not parked
        self.weight = 0.0  # of the keys that wait
        self.clock = 0.0  # virtual time: the start of the last one served
        self.passed = 0  # higher ones served while this class waited, since its own last
        self.flows: dict[str, _Flow[W]] = {}
        self.heap: list[tuple[float, int, _Flow[W]]] = []  # one entry per listed flow

    def first(self) -> _Flow[W] | None:
        """The flow whose turn it is."""
        heap = self.heap
        while heap:
            start, number, flow = heap[0]
            if not flow.offered:
                flow.listed = False
                heapq.heappop(heap)
            elif start < flow.start:
                heapq.heapreplace(heap, (flow.start, number, flow))
            else:
                return flow
        return None


class Order(Generic[W]):
    """Those who wait, in the order in which they are to be served."""

    def __init__(self) -> None:
        self._classes: tuple[_Class[W], ...] = tuple(_Class() for _ in CLASSES)
        self._numbers = itertools.count()
        self._count = 0
        self.cost = 0.0  # of all who wait

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[W]:
        for c in self._classes:
            for flow in c.flows.values():
                yield from flow.members

    def count(self, rank: int) -> int:
        """How many of a class wait and are not parked."""
        return self._classes[rank].offered

    def by_key(self) -> dict[tuple[str, int], tuple[int, float]]:
        """How many wait, and the key's own weight, by key and rank of the class."""
        return {
            (f.key, rank): (len(f.members), next(iter(f.members)).weight)
            for rank, c in enumerate(self._classes)
            for f in c.flows.values()
            if f.members
        }

    def add(self, one: W, *, again: bool = False, parked: bool = False) -> None:
        """Joins. `again`: it was popped a moment ago and was not served, so its key keeps its turn. `parked`: it is popped
        only after an `offer`."""
        c = self._classes[one.rank]
        flow = c.flows.get(one.key)
        if flow is None:
            flow = c.flows[one.key] = _Flow(one.key)
            flow.weight = one.weight
        if not flow.members:
            if not again:
                flow.weight = one.weight
            c.weight += flow.weight
        if not again:
            one.place = next(self._numbers)
        flow.members[one] = False
        c.count += 1
        self._count += 1
        self.cost += one.cost
        if not parked:
            self._offer(c, flow, one, again)

    def eldest(self, ones: Iterable[W]) -> None:
        """They joined `again`, or late, and stand before the others of their keys, in this order: who had its turn, or waited
        before, does not give way to whoever came after it."""
        for one in reversed([*ones]):
            self._classes[one.rank].flows[one.key].members.move_to_end(one, last=False)

    def offer(self, one: W) -> None:
        """It was parked, and can be served from now on, in its place among those of its key."""
        c = self._classes[one.rank]
        self._offer(c, c.flows[one.key], one, again=False)

    def _offer(self, c: _Class[W], flow: _Flow[W], one: W, again: bool) -> None:
        if not again:
            if not flow.offered:
                flow.start = max(flow.start, c.clock)
            if not c.offered:  # a class that nobody waited in has nothing to claim
                c.passed = 0
        flow.members[one] = True
        flow.offered += 1
        c.offered += 1
        heapq.heappush(flow.heap, (one.deadline, one.since, one.place, one))
        if not flow.listed:
            flow.listed = True
            heapq.heappush(c.heap, (flow.start, next(self._numbers), flow))

    def remove(self, one: W) -> bool:
        """Leaves unserved; False when it does not wait here."""
        c = self._classes[one.rank]
        flow = c.flows.get(one.key)
        if flow is None or one not in flow.members:
            return False
        self._drop(c, flow, one)
        if len(flow.heap) > 2 * flow.offered + 8:
            flow.heap = [entry for entry in flow.heap if flow.members.get(entry[3])]
            heapq.heapify(flow.heap)
        return True

    def pop(self) -> W | None:
        """Takes out whoever is next. Follow it with `served`, or with `add(again=True)`."""
        for c in self._turns():
            flow = c.first()
            if flow is None:
                continue
            while True:
                one = heapq.heappop(flow.heap)[3]
                if flow.members.get(one):
                    self._drop(c, flow, one)
                    return one
        return None

    def served(self, one: W) -> None:
        """It was popped and got what it waited for: its key pays for it."""
        c = self._classes[one.rank]
        flow = c.flows[one.key]
        c.clock = max(c.clock, flow.start)
        flow.start += one.cost / flow.weight
        c.passed = 0
        for lower in self._classes[one.rank + 1 :]:
            if lower.offered:
                lower.passed += 1
        if not c.count:  # nobody waits: what keys owed each other is settled
            c.clock, c.flows, c.heap = 0.0, {}, []

    def weigh(self, weights: Mapping[tuple[str, int], float]) -> None:
        """Other weights for the keys that wait, by key and rank; each stays what it is where none is given."""
        for rank, c in enumerate(self._classes):
            for flow in c.flows.values():
                weight = weights.get((flow.key, rank))
                if weight is not None and weight > 0:
                    if flow.members:
                        c.weight += weight - flow.weight
                    flow.weight = weight

    def ahead_of(self, one: W) -> int:
        """About how many of its class are served before a new one, when all cost the same and every key has enough
        waiting; never more than wait."""
        c = self._classes[one.rank]
        flow = c.flows.get(one.key)
        own, weight = 0, c.weight + one.weight
        if flow is not None and flow.members:
            own, weight = len(flow.members), c.weight
        return min(c.count, int((own + 1) * weight / one.weight) - 1)

    def give_way(self, one: W, limit: int) -> W | None:
        """Who leaves a full queue for `one` to enter: the youngest of the key with the most waiting for its weight, if that
        is more than the newcomer's key would have; a lower class gives way first. None: the newcomer itself.

        Every class keeps a tenth of the `limit` places against higher ones, and may claim it from them.
        """
        kept = limit // KEPT_SHARE
        mine = self._classes[one.rank]
        for rank in range(len(CLASSES) - 1, one.rank, -1):
            lower = self._classes[rank]
            if lower.count > kept:
                return self._youngest(lower)
        if mine.count < kept:
            fullest = max(self._classes, key=lambda c: c.count)
            if fullest is not mine and fullest.count > kept:
                return self._youngest(fullest)
        flow = mine.flows.get(one.key)
        own = len(flow.members) + 1 if flow is not None else 1
        if own * mine.weight >= mine.count * one.weight:
            return None  # it has its share already: no key can have more than average everywhere
        longest = max(mine.flows.values(), key=lambda f: len(f.members) / f.weight, default=None)
        if longest is None or len(longest.members) / longest.weight <= own / one.weight:
            return None
        return next(reversed(longest.members))

    def _youngest(self, c: _Class[W]) -> W:
        longest = max(c.flows.values(), key=lambda f: len(f.members) / f.weight)
        return next(reversed(longest.members))

    def _turns(self) -> list[_Class[W]]:
        """Classes from the next one on: one that was passed too often, else the highest."""
        overdue = [c for c in self._classes if c.passed >= CLASS_EVERY - 1 and c.offered]
        return [*sorted(overdue, key=lambda c: -c.passed), *self._classes] if overdue else [*self._classes]

    def _drop(self, c: _Class[W], flow: _Flow[W], one: W) -> None:
        if flow.members.pop(one):
            flow.offered -= 1
            c.offered -= 1
            if not flow.offered:
                flow.heap.clear()
        c.count -= 1
        self._count -= 1
        self.cost = self.cost - one.cost if self._count else 0.0
        if not flow.members:
            c.weight -= flow.weight
            if not c.count:
                c.weight = 0.0
