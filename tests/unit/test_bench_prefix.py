"""Prefix routing keeps its bars on traffic of the trace's kind, in jumping time."""

from __future__ import annotations

import random

import pytest

from bench.prefix import TRACE, Engine, conversations, mooncake, replay, uniform


@pytest.mark.slow
def test_four_replicas_find_nearly_what_one_big_one_would() -> None:
    turns = list(mooncake())[:800] if TRACE.exists() else list(conversations(800, 3.4, random.Random(1)))
    one, spread = replay(turns, Engine().times(4), 1), replay(turns, Engine(), 4)
    by_load = replay(turns, Engine(), 4, by_prefix=False)
    assert spread.share >= 0.9 * one.share > by_load.share
    assert spread.ttft_p95_s < by_load.ttft_p95_s


@pytest.mark.slow
def test_several_gateways_find_most_of_it_too() -> None:
    turns = list(conversations(500, 3.4, random.Random(2)))
    one, four = replay(turns, Engine(), 4), replay(turns, Engine(), 4, gateways=4)
    assert four.share >= 0.75 * one.share


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0, 4])
def test_prompts_alike_but_for_their_beginning_wait_no_longer_than_by_load(shared: int) -> None:
    turns = list(uniform(600, 24, random.Random(3), shared))
    by_prefix, by_load = (replay(turns, Engine(), 4, by_prefix=p) for p in (True, False))
    assert by_prefix.ttft_p95_s <= 1.05 * by_load.ttft_p95_s
