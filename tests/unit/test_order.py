"""Who is served next: classes, fairness between keys, deadlines; and that it stays cheap with many."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.gateway.order import CLASS_EVERY, Order

_ages = itertools.count()


@dataclass(eq=False)
class One:
    key: str = "a"
    rank: int = 1
    weight: float = 1
    cost: float = 1
    deadline: float = float("inf")
    since: float = 0
    place: int = -1

    def __post_init__(self) -> None:
        self.since = self.since or next(_ages)


def serve(order: Order[One]) -> One:
    one = order.pop()
    assert one is not None
    order.served(one)
    return one


def served(order: Order[One], count: int | None = None) -> list[One]:
    return [serve(order) for _ in range(len(order) if count is None else count)]


def filled(*ones: One) -> Order[One]:
    order: Order[One] = Order()
    for one in ones:
        order.add(one)
    return order


def test_inside_a_key_the_nearest_deadline_and_then_the_oldest_is_first() -> None:
    late, old, young, soon = One(deadline=9), One(deadline=5), One(deadline=5), One(deadline=1)
    assert served(filled(late, old, young, soon)) == [soon, old, young, late]


def test_a_higher_class_goes_first() -> None:
    batch, default, interactive = One(rank=2), One(rank=1), One(rank=0)
    assert served(filled(batch, default, interactive)) == [interactive, default, batch]


def test_no_class_starves_a_lower_one() -> None:
    order = filled(
        *(One(rank=0) for _ in range(100)), *(One(rank=1) for _ in range(100)), *(One(rank=2) for _ in range(9))
    )
    ranks = [one.rank for one in served(order, 90)]
    for rank in (1, 2):
        turns = [i for i, r in enumerate(ranks) if r == rank]
        assert all(b - a <= CLASS_EVERY + 1 for a, b in itertools.pairwise([-1, *turns]))
    assert ranks.count(0) >= 70


def test_a_lower_class_that_nobody_passed_has_nothing_to_claim() -> None:
    order = filled(*(One(rank=0) for _ in range(20)))
    served(order, 15)
    order.add(One(rank=2))
    assert [one.rank for one in served(order)] == [0] * 5 + [2]


def test_an_overdue_class_keeps_its_claim_while_it_is_only_put_aside() -> None:
    large = One(rank=2)
    order = filled(large, *(One(rank=0) for _ in range(40)))
    served(order, CLASS_EVERY - 1)
    for _ in range(5):
        popped = order.pop()
        assert popped is large, "nothing that it could take was free the last time"
        serve(order)
        order.add(large, again=True)


def test_a_parked_one_is_passed_by_and_comes_back_to_its_place() -> None:
    old, young, other = One(), One(), One("b")
    order: Order[One] = Order()
    order.add(old, parked=True)
    order.add(young)
    order.add(other)
    assert (len(order), order.count(1), order.by_key()["a", 1]) == (3, 2, (2, 1))
    order.offer(old)
    assert served(order) == [old, other, young]
    order.add(old, parked=True)
    assert (order.pop(), order.remove(old), len(order)) == (None, True, 0)


def test_a_class_whose_last_one_left_has_nothing_to_claim() -> None:
    large = One(rank=2)
    order = filled(large, *(One(rank=0) for _ in range(40)))
    served(order, CLASS_EVERY - 1)
    order.remove(large)
    order.add(One(rank=2))
    assert serve(order).rank == 0


def test_a_key_with_much_does_not_keep_one_with_little_waiting() -> None:
    order = filled(*(One("heavy") for _ in range(1000)))
    served(order, 100)
    order.add(One("light"))
    assert "light" in {one.key for one in served(order, 2)}


def test_a_key_gains_nothing_by_having_been_away() -> None:
    order = filled(*(One("a") for _ in range(200)))
    served(order, 100)
    for _ in range(100):
        order.add(One("b"))
    first = Counter(one.key for one in served(order, 50))
    assert abs(first["a"] - first["b"]) <= 1


def test_a_key_is_served_by_its_weight() -> None:
    order = filled(*(One(k, weight=w) for k, w in (("a", 1), ("b", 3)) for _ in range(100)))
    assert Counter(one.key for one in served(order, 80)) == {"a": 20, "b": 60}


def test_fair_is_meant_in_cost_and_not_in_number() -> None:
    order = filled(*(One("large", cost=10) for _ in range(50)), *(One("small", cost=1) for _ in range(500)))
    cost: Counter[str] = Counter()
    for one in served(order, 220):
        cost[one.key] += int(one.cost)
    assert abs(cost["large"] - cost["small"]) <= 10


def test_one_that_was_popped_and_not_served_costs_its_key_nothing() -> None:
    order = filled(One("a"), One("b"), One("a"), One("b"))
    first = order.pop()
    assert first is not None
    order.add(first, again=True)
    assert served(order)[0] is first


def test_nor_its_place_among_those_of_the_same_age() -> None:
    ones = [One(since=5) for _ in range(4)]
    order = filled(*ones)
    first, second = order.pop(), order.pop()
    assert first is not None and second is not None
    order.add(second, again=True)
    order.add(first, again=True)
    assert served(order) == ones


def test_who_leaves_is_not_served_and_leaves_no_trace() -> None:
    ones = [One(str(i % 3)) for i in range(300)]
    order = filled(*ones)
    for one in ones[:290]:
        assert order.remove(one)
        assert not order.remove(one)
    assert set(served(order)) == set(ones[290:])
    assert (len(order), order.by_key()) == (0, {})


@pytest.mark.parametrize(
    ("waiting", "comes", "goes"),
    [
        ({("heavy", 1): 20}, One("light"), "heavy"),
        ({("heavy", 1): 20}, One("heavy"), None),
        ({("heavy", 1): 10, ("light", 1): 10}, One("light"), None),
        ({("heavy", 1): 15, ("light", 1): 5}, One("heavy", weight=10), "light"),
        ({("batch", 2): 20}, One("x", rank=0), "batch"),
        ({("high", 0): 18, ("batch", 2): 2}, One("x", rank=0), "high"),
        ({("high", 0): 20}, One("x", rank=2), "high"),
        ({("high", 0): 18, ("batch", 2): 2}, One("batch", rank=2), None),
        ({("high", 0): 18, ("batch", 2): 2}, One("other", rank=2), "batch"),
    ],
)
def test_who_gives_way_in_a_full_queue(waiting: dict[tuple[str, int], int], comes: One, goes: str | None) -> None:
    order = filled(
        *(
            One(key, rank, weight=comes.weight if key == comes.key else 1)
            for (key, rank), n in waiting.items()
            for _ in range(n)
        )
    )
    loser = order.give_way(comes, 20)
    assert (loser.key if loser else None) == goes
    if loser:
        assert loser.since == max(one.since for one in order if one.key == goes)


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 2), st.sampled_from([1, 2, 5]), st.integers(0, 3)),
        max_size=80,
    ),
    st.data(),
)
@settings(deadline=None, max_examples=40)
def test_everyone_is_served_or_leaves_once(asked: list[tuple[str, int, int, int]], data: st.DataObject) -> None:
    order: Order[One] = Order()
    inside: set[One] = set()
    weight = {k: w for k, _, w, _ in asked}
    for key, rank, _, what in asked:
        one = One(key, rank, weight=weight[key], cost=what + 1)
        order.add(one)
        inside.add(one)
        if what == 3:
            gone = data.draw(st.sampled_from(sorted(inside, key=lambda o: o.since)))
            assert order.remove(gone)
            inside.remove(gone)
        elif what == 2:
            inside.remove(serve(order))
        assert len(order) == len(inside) == sum(order.count(r) for r in range(3))
    assert set(served(order)) == inside


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), min_size=60, max_size=200), st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_keys_that_wait_all_the_time_are_served_alike(asked: list[tuple[str, int]], weight: int) -> None:
    """The bound of start-time fair queueing: two keys differ by at most one largest request each."""
    weights = {"a": weight, "b": 1, "c": 2}
    order = filled(*(One(k, cost=c, weight=weights[k]) for k, c in asked))
    left = Counter(k for k, _ in asked)
    most = {k: max((c for key, c in asked if key == k), default=0) for k in weights}
    got: dict[str, float] = defaultdict(float)
    present = set(left)
    while all(left[k] for k in present):
        one = serve(order)
        left[one.key] -= 1
        got[one.key] += one.cost / weights[one.key]
        for x, y in itertools.combinations(present, 2):
            assert abs(got[x] - got[y]) <= most[x] / weights[x] + most[y] / weights[y] + 1e-9


def test_the_work_for_one_does_not_grow_with_those_that_wait() -> None:
    """Counted in comparisons, not in time."""
    compared = 0

    class Deadline(float):
        def __lt__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return float.__lt__(self, float(other))  # type: ignore[arg-type]

    def work(n: int) -> float:
        nonlocal compared
        order = filled(*(One(str(i % 50), deadline=Deadline(i * 7919 % n)) for i in range(n)))
        ones = list(order)
        compared = 0
        for one in ones[:: max(1, n // 100)][:100]:
            order.remove(one)
            order.add(One("x", deadline=Deadline(5)))
            serve(order)
        return compared / 100

    assert work(10_000) < 4 * work(200) + 40
