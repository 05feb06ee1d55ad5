"""The simulator's KV cache: what prompts share, what stays, and what goes first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.simulator.kv import KvCache


def test_a_prompt_finds_what_it_begins_with_but_never_its_last_token() -> None:
    kv = KvCache(1000, 10)
    first = kv.take((1, 2, 3), 30, 5)
    assert first is not None and first.cached == 0
    same, longer = kv.take((1, 2, 3), 30, 5), kv.take((1, 2, 3, 4), 45, 5)
    assert same is not None and same.cached == 20
    assert longer is not None and longer.cached == 30
    other = kv.take((9, 2, 3), 30, 5)
    assert other is not None and other.cached == 0


def test_what_two_share_takes_room_once() -> None:
    kv = KvCache(60, 10)
    first = kv.take((1, 2, 3), 35, 5)
    assert first is not None and kv.used == 40
    assert kv.take((7,), 15, 6) is None
    assert kv.take((1, 2, 3), 35, 5) is not None
    assert kv.used == 50


def test_room_is_made_by_the_least_recently_used_and_a_prompts_end_goes_first() -> None:
    kv = KvCache(60, 10)
    for blocks in ((1, 2, 3), (4, 5, 6), (1, 2, 3)):
        held = kv.take(blocks, 30, 0)
        assert held is not None
        kv.free(held)
    assert (kv.used, kv.idle) == (0, 60)
    held = kv.take((8, 9), 20, 0)  # 6 and 5 go
    assert held is not None
    kv.free(held)
    found = [kv.take(blocks, 31, 0) for blocks in ((1, 2, 3), (4, 5, 6))]
    assert found[0] is not None and found[0].cached == 30
    assert found[1] is None
    kv.free(found[0])
    again = kv.take((4, 5, 6), 30, 0)
    assert again is not None and again.cached == 0  # three were needed for the last token of the other


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 30), st.booleans()), max_size=60))
@settings(max_examples=40, deadline=None)
def test_whatever_comes_and_goes_room_is_not_overrun_and_comes_back(
    steps: list[tuple[int, int, int, bool]],
) -> None:
    kv, inside = KvCache(100, 10), []
    for family, count, own, leaves in steps:
        if leaves and inside:
            kv.free(inside.pop(0))
        held = kv.take(tuple(family * 100 + i for i in range(count)), count * 10 + own, 3)
        if held is not None:
            assert held.cached <= count * 10
            inside.append(held)
        assert 0 <= kv.used <= kv.used + kv.idle <= 100
    for held in inside:
        kv.free(held)
    assert kv.used == 0
