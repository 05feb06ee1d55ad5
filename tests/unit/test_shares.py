"""Which slots are whose, between gateways: pure rules, and minutes of eight gateways in jumping time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.fleet.endpoint import KeyDemand
from serving.gateway.shares import REST, TOP_KEYS, fill, part, share, told
from tests.unit import virtual
from tests.unit.virtual import World

Demands = dict[str, tuple[KeyDemand, ...]]


def wants(key: str = "a", held: int = 0, running: int = 0, rank: int = 1, weight: float = 1.0) -> KeyDemand:
    return KeyDemand(key, rank, weight, held, running)


def slots_of(total: int, demands: Demands, turn: int = 0) -> dict[str, int]:
    return {g: share(total, g, d, demands, turn).slots for g, d in demands.items()}


def test_what_is_asked_for_is_given_when_there_is_enough() -> None:
    assert slots_of(32, {"x": (wants(held=3, running=7),), "y": (wants("b", running=2),)}) == {"x": 10, "y": 2}


def test_keys_share_alike_wherever_their_requests_are() -> None:
    demands = {"x": (wants("a", 100),), "y": (wants("b", 10),), "z": (wants("b", 10),)}
    assert slots_of(20, demands) == {"x": 10, "y": 5, "z": 5}


def test_a_key_has_its_slots_where_its_requests_are() -> None:
    demands = {"x": (wants("a", 90), wants("b", 40)), "y": (wants("a", 10),)}
    mine = share(20, "x", demands["x"], demands, 0)
    assert (mine.slots, {k: round(v, 6) for k, v in mine.weights.items()}) == (19, {("a", 1): 9.0, ("b", 1): 10.0})


def test_classes_come_in_order_and_each_is_sure_of_a_tenth() -> None:
    demands = {"x": (wants("a", 100, rank=0),), "y": (wants("b", 100, rank=2),)}
    assert slots_of(40, demands) == {"x": 36, "y": 4}


@given(
    total=st.integers(0, 64),
    asked=st.lists(
        st.tuples(
            st.sampled_from("wxyz"), st.sampled_from("abc"), st.integers(0, 2), st.integers(0, 40), st.integers(0, 9)
        ),
        min_size=1,
    ),
    turn=st.integers(0, 10**6),
)
@settings(deadline=None)
def test_all_gateways_together_fill_all_slots_and_not_one_more(
    total: int, asked: list[tuple[str, str, int, int, int]], turn: int
) -> None:
    demands: Demands = {}
    seen = set()
    for g, key, rank, held, running in asked:
        if (g, key, rank) not in seen:
            seen.add((g, key, rank))
            demands[g] = (*demands.get(g, ()), wants(key, held, running, rank))
    needed = sum(d.held + d.running for told_ in demands.values() for d in told_)
    assert abs(sum(slots_of(total, demands, turn).values()) - min(total, needed)) <= (1 if needed != total else 0) + 0


def test_the_parts_of_what_is_served_are_as_the_slots() -> None:
    demands = {"x": (wants("a", 300, 3),), "y": (wants("a", 9, 336),), "z": (wants("b", 0, 12),)}
    parts = {g: part(336, g, d, demands) for g, d in demands.items()}
    assert sum(parts.values()) == pytest.approx(1)
    for g, slots in slots_of(336, demands).items():
        assert parts[g] == pytest.approx(slots / 336, abs=1 / 336)
    assert part(336, "x", (wants("a", 5, 3),), {}) == 1.0


def test_fractions_of_a_slot_go_round() -> None:
    demands = {g: (wants("a", 5),) for g in "xyz"}
    got: Counter[str] = Counter()
    for turn in range(300):
        got.update(slots_of(1, demands, turn))
    assert all(90 <= got[g] <= 110 for g in "xyz")


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(0, 30), st.integers(1, 5)), min_size=1),
    st.integers(0, 60),
)
def test_max_min(asked: dict[str, tuple[int, int]], room: int) -> None:
    wanted = {(k, 1): float(n) for k, (n, _) in asked.items()}
    weights = {(k, 1): float(w) for k, (_, w) in asked.items()}
    got = fill(room, wanted, weights)
    assert sum(got.values()) == pytest.approx(min(room, sum(wanted.values())))
    for k in wanted:
        assert got[k] <= wanted[k] + 1e-9
        if got[k] < wanted[k] - 1e-6:  # it could do with more: then nobody has more for its weight
            assert all(got[j] / weights[j] <= got[k] / weights[k] + 1e-6 for j in wanted)


def test_what_is_told_is_bounded_and_complete() -> None:
    many = [wants(f"k{i}", i, rank=i % 2) for i in range(100)]
    summed = told(many)
    assert len(summed) <= TOP_KEYS + 2
    assert sum(d.held for d in summed) == sum(d.held for d in many)
    assert {d.key for d in summed if d.held > 90 and d.key != REST} == {f"k{i}" for i in range(91, 100)}
    assert [d.weight for d in summed if d.key == REST] == [34.0, 34.0]


# -- in jumping time

WARM_S, RUN_S = 4, 16


async def throughput(world: World, gateway_of: Callable[[int], int], clients: int = 150) -> int:
    with world.running():
        for i in range(clients):
            world.spawn(world.client(gateway_of(i), f"k{i % 5}"))
        await asyncio.sleep(WARM_S)
        before = sum(world.done.values())
        await asyncio.sleep(RUN_S)
        assert all(d.most <= d.slots for d in world.doors.values())
        return sum(world.done.values()) - before


@pytest.mark.slow
def test_eight_gateways_do_as_much_as_one() -> None:
    """Most arrivals at one of them, and all of them in front of the same four engines."""
    done = {}

    async def both() -> None:
        done[1] = await throughput(World(gateways=1), lambda i: 0)
        done[8] = await throughput(World(gateways=8), lambda i: 0 if i % 10 else 1 + i // 10 % 7)

    virtual.run(both)
    assert done[8] >= 0.97 * done[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "gateway_of", [lambda k, i: i % 4, lambda k, i: int(k == "b"), lambda k, i: i % 4 if k == "a" else 0]
)
def test_keys_at_ten_to_one_are_served_alike_across_gateways(gateway_of: Callable[[str, int], int]) -> None:
    got: Counter[str] = Counter()

    async def run() -> None:
        world = World(gateways=4)
        with world.running():
            for key, clients in (("a", 300), ("b", 30)):
                for i in range(clients):
                    world.spawn(world.client(gateway_of(key, i), key))
            await asyncio.sleep(WARM_S)
            before = Counter(world.done)
            await asyncio.sleep(RUN_S)
            got.update(world.done - before)

    virtual.run(run)
    assert abs(got["a"] - got["b"]) <= 0.2 * (got["a"] + got["b"]) / 2


def test_a_gateway_takes_what_another_one_leaves() -> None:
    """The other's last word still asks for all."""

    async def run() -> None:
        world = World(gateways=2, engines=1, slots=16)
        silent = {"g1": (wants("x", held=500, running=16),)}
        with world.running():
            world.share = False
            for _ in range(40):
                world.spawn(world.client(0, "a"))
            for _ in range(40):
                world.lines[0].told(silent, 1)
                await asyncio.sleep(0.25)
            assert world.doors["e0"].inside >= 14

    virtual.run(run)


def test_without_news_of_the_others_nothing_is_left_idle() -> None:
    async def run() -> None:
        world = World(gateways=2, engines=1, slots=16)
        with world.running():
            world.share = False
            for _ in range(40):
                world.spawn(world.client(0, "a"))
            world.lines[0].told({"g1": (wants("x", held=500),)}, 1)
            await asyncio.sleep(5)
            assert world.doors["e0"].inside == 16

    virtual.run(run)
