"""Paired statistics: what is estimated, and when rounds may stop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import MIN_ROUNDS, Estimate, added, percentile, ratio, settled, single

figures = st.floats(min_value=0.01, max_value=1e6)
rounds = st.lists(st.tuples(figures, figures), min_size=1, max_size=20)


@given(rounds)
def test_the_interval_holds_the_value(pairs: list[tuple[float, float]]) -> None:
    raw, stack = [p[0] for p in pairs], [p[1] for p in pairs]
    for found in (ratio(raw, stack), added(raw, stack), single(stack)):
        slack = 1e-9 * max(1.0, abs(found.value))
        assert found.lo <= found.hi
        assert len(pairs) > 2 or found.lo - slack <= found.value <= found.hi + slack


@given(rounds, st.floats(min_value=0.1, max_value=10))
def test_a_constant_slowdown_is_found_exactly(pairs: list[tuple[float, float]], factor: float) -> None:
    raw = [p[0] for p in pairs]
    found = ratio(raw, [factor * r for r in raw])
    assert found.value == pytest.approx(factor)


@given(rounds)
def test_a_side_against_itself_is_one_and_nothing_added(pairs: list[tuple[float, float]]) -> None:
    raw = [p[0] for p in pairs]
    assert ratio(raw, raw) == Estimate(1.0, 1.0, 1.0, len(raw))
    assert added(raw, raw) == Estimate(0.0, 0.0, 0.0, len(raw))


def test_the_value_is_the_ratio_of_medians_whatever_one_bad_round_says() -> None:
    assert ratio([10, 10, 10, 10, 500], [12, 12, 12, 12, 12]).value == pytest.approx(1.2)


def test_the_same_rounds_give_the_same_interval() -> None:
    raw, stack = [10.0, 11.0, 9.0, 10.5], [12.0, 11.5, 13.0, 12.2]
    assert ratio(raw, stack) == ratio(raw, stack)


@pytest.mark.parametrize(("raw", "stack"), [([], []), ([1.0], []), ([1.0, 2.0], [1.0])])
def test_unpaired_rounds_are_refused(raw: list[float], stack: list[float]) -> None:
    with pytest.raises(ValueError, match="paired"):
        ratio(raw, stack)


def test_a_ratio_to_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="above zero"):
        ratio([0.0, 1.0], [1.0, 1.0])


def test_rounds_stop_only_when_every_interval_is_narrow() -> None:
    narrow, wide = Estimate(1.0, 0.985, 1.015, 9), Estimate(1.0, 0.9, 1.1, 9)
    assert settled([narrow, narrow])
    assert not settled([narrow, wide])


def test_few_rounds_never_settle_however_narrow() -> None:
    assert not settled([Estimate(1.0, 1.0, 1.0, MIN_ROUNDS - 1)])


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="99"):
        percentile([], 99)


@given(st.lists(figures, min_size=1))
def test_percentiles_are_ordered_and_within_the_values(values: list[float]) -> None:
    p50, p99 = percentile(values, 50), percentile(values, 99)
    assert min(values) <= p50 <= p99 <= max(values) or p50 == pytest.approx(p99)
