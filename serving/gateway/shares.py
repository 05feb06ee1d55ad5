"""How many of a version's slots each gateway should fill while several hold requests: pure.

Left alone, whichever gateway's request ends refills the slot, so that the first to come keeps all of them. So gateways tell
each other through the directory what they hold and run, and each computes the same max-min fair division by class and key.
Shares are advice among honest gateways; the doors are what keeps the slots exact.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import msgspec

from serving.fleet.endpoint import KeyDemand
from serving.gateway.order import CLASS_EVERY, CLASSES

TOP_KEYS = 32  # told per version; the others together go under `REST`
REST = "*"  # no key's id


class Share(msgspec.Struct, frozen=True):
    """What one gateway should do: fill `slots`, and among its keys by `weights`."""

    slots: int
    weights: dict[tuple[str, int], float]


def told(demand: Iterable[KeyDemand], top: int = TOP_KEYS) -> tuple[KeyDemand, ...]:
    """What a gateway announces of its demand: bounded, the keys with the least of it together as one a class."""
    ranked = sorted(demand, key=lambda d: (-(d.held + d.running), d.key))
    rest: dict[int, KeyDemand] = {}
    for d in ranked[top:]:
        known = rest.get(d.rank, KeyDemand(REST, d.rank, 0.0, 0, 0))
        rest[d.rank] = KeyDemand(REST, d.rank, known.weight + d.weight, known.held + d.held, known.running + d.running)
    return (*ranked[:top], *rest.values())


def share(
    slots: int, me: str, mine: Iterable[KeyDemand], others: Mapping[str, Iterable[KeyDemand]], turn: int
) -> Share:
    """This gateway's share of `slots`. `turn` is the number of the directory's table, the same for all gateways: by it
    they take turns with the fractions of slots."""
    wants = {**_lists(others), me: list(mine)}
    granted = _granted(slots, wants)
    gateways = sorted(wants)
    # Systematic rounding: whole slots that add up to the total, each gateway's right on average over the turns.
    offset = (turn * 0.6180339887498949) % 1.0
    below = offset
    got = 0
    for g in gateways:
        above = below + sum(granted[g].values())
        if g == me:
            got = math.floor(above + 1e-9) - math.floor(below + 1e-9)
        below = above
    return Share(got, {k: v for k, v in granted[me].items() if v > 0})


def part(slots: int, me: str, mine: Iterable[KeyDemand], others: Mapping[str, Iterable[KeyDemand]]) -> float:
    """This gateway's part of what is served, 0..1, once each fills its share of `slots`."""
    granted = {g: sum(of.values()) for g, of in _granted(slots, {**_lists(others), me: list(mine)}).items()}
    total = sum(granted.values())
    return granted[me] / total if total > 0 else 1.0


def _lists(demand: Mapping[str, Iterable[KeyDemand]]) -> dict[str, list[KeyDemand]]:
    return {g: list(d) for g, d in demand.items()}


def _granted(slots: int, wants: Mapping[str, list[KeyDemand]]) -> dict[str, dict[tuple[str, int], float]]:
    """Slots by gateway, key and class: classes in order, each lower one that waits sure of a part; keys of a class max-min
    fair by weight; a key's slots where its requests are."""
    totals: dict[tuple[str, int], float] = defaultdict(float)
    weights: dict[tuple[str, int], float] = {}
    for demands in wants.values():
        for d in demands:
            at = (d.key, d.rank)
            totals[at] += d.held + d.running
            weights[at] = max(weights.get(at, 0.0), d.weight)
    by_class = [{at: n for at, n in totals.items() if at[1] == rank and n > 0} for rank in range(len(CLASSES))]
    left = float(slots)
    sure = [min(sum(c.values()), slots / CLASS_EVERY) for c in by_class]
    filled: dict[tuple[str, int], float] = {}
    for rank, wanted in enumerate(by_class):
        room = max(0.0, left - sum(sure[rank + 1 :]))
        got = fill(room, wanted, weights)
        filled |= got
        left -= sum(got.values())
    return {
        g: {
            (d.key, d.rank): filled[d.key, d.rank] * (d.held + d.running) / totals[d.key, d.rank]
            for d in demands
            if totals[d.key, d.rank] > 0
        }
        for g, demands in wants.items()
    }


def fill(
    room: float, wanted: Mapping[tuple[str, int], float], weights: Mapping[tuple[str, int], float]
) -> dict[tuple[str, int], float]:
    """Weighted max-min: nobody gets more than wanted, and nobody can get more without taking it from one who has less for
    its weight. O(n log n)."""
    got: dict[tuple[str, int], float] = {}
    weight = sum(weights[k] for k in wanted)
    for k in sorted(wanted, key=lambda k: wanted[k] / weights[k]):
        got[k] = min(wanted[k], room * weights[k] / weight)
        room -= got[k]
        weight -= weights[k]
    return got
