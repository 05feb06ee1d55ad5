"""The simulator's core where answers outgrow the KV cache: who gives way, and that nobody loses a token by it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from bench.virtual import run
from serving.engine.simulator.core import ClientGone, Core, Sequence
from serving.engine.simulator.kv import KvCache
from serving.engine.simulator.metrics import Metrics
from serving.engine.simulator.sins import Sins

ITL_S, TTFT_S, PREFILL_S = 0.1, 0.5, 0.01


class Engine:
    """A core with room for `tokens`, and a clock that jumps."""

    def __init__(self, tokens: int, slots: int = 8, *, preempts: bool = True) -> None:
        self._registry, self.kv = CollectorRegistry(), KvCache(tokens, 16)
        metrics = Metrics(self._registry, "m", tokens, self.kv)
        self.core = Core(
            slots=slots,
            kv=self.kv,
            ttft_s=TTFT_S,
            itl_s=ITL_S,
            sins=Sins(),
            metrics=metrics,
            prefill_s=PREFILL_S,
            preempts=preempts,
        )

    def value(self, name: str) -> float:
        found = self._registry.get_sample_value(name, {"model_name": "m", "engine": "0"})
        assert found is not None
        return found

    async def answer(self, prompt: int, size: int, choices: int = 1) -> list[tuple[int, float]]:
        """Its tokens by index, and when each came."""
        got: list[tuple[int, float]] = []
        with self.core.sequence(prompt, size, choices=choices) as sequence:
            while due := await sequence.next():
                got += [(i, asyncio.get_running_loop().time()) for i in due]
                assert self.kv.used <= self.kv.tokens
        return got


def test_who_came_last_gives_way_and_goes_on_where_it_was() -> None:
    async def scene() -> None:
        engine = Engine(100)
        first = asyncio.create_task(engine.answer(30, 40))
        await asyncio.sleep(0)
        second = asyncio.create_task(engine.answer(30, 40))
        await asyncio.sleep(0)
        assert len(engine.core.running) == 2, "prompts alone decide who is admitted"
        undisturbed, paused = await first, await second
        assert [i for i, _ in undisturbed] == [i for i, _ in paused] == list(range(40))
        gaps = [later - earlier for (_, earlier), (_, later) in pairwise(undisturbed)]
        assert max(gaps) == pytest.approx(ITL_S, abs=0.01)
        gap, at = max((later - earlier, i) for (i, earlier), (_, later) in pairwise(paused))
        # It waits for the first one's end, and then all of it, prompt and words, is computed again.
        again_s = (30 + at + 1) * PREFILL_S + TTFT_S
        assert gap == pytest.approx(undisturbed[-1][1] - paused[at][1] + again_s, abs=0.02)
        assert engine.value("vllm:num_preemptions_total") == 1
        assert engine.value("vllm:generation_tokens_total") == 80
        assert engine.kv.used == 0

    run(scene)


def test_a_client_that_leaves_while_its_request_is_preempted_is_forgotten() -> None:
    async def scene() -> None:
        engine = Engine(100)
        first = asyncio.create_task(engine.answer(30, 40))
        await asyncio.sleep(0)
        second = asyncio.create_task(engine.answer(30, 40))
        while not engine.core.waiting:
            await asyncio.sleep(0.05)
        second.cancel()
        assert len(await first) == 40
        assert not engine.core.running and not engine.core.waiting and engine.kv.used == 0

    run(scene)


@pytest.mark.parametrize("preempts", [True, False])
def test_choices_that_together_outgrow_the_whole_cache_are_answered_as_are_those_behind_them(preempts: bool) -> None:
    """vLLM schedules each by itself, and each has room."""

    async def scene() -> None:
        engine = Engine(100, preempts=preempts)
        many = asyncio.create_task(engine.answer(30, 40, choices=5))
        await asyncio.sleep(0)
        behind = asyncio.create_task(engine.answer(30, 40))
        async with asyncio.timeout(3600):
            assert len(await many) == len(await behind) == 40
        assert engine.value("vllm:generation_tokens_total") == 6 * 40
        assert not engine.core.running and not engine.core.waiting and engine.kv.used == 0

    run(scene)


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 20), st.integers(1, 3)),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=25, deadline=None)
def test_whatever_comes_every_answer_is_whole_and_the_room_is_given_back(
    asked: list[tuple[int, int, int, int]],
) -> None:
    async def scene() -> None:
        engine = Engine(100)

        async def client(prompt: int, size: int, after: int, choices: int) -> None:
            await asyncio.sleep(after / 10)
            assert [i for i, _ in await engine.answer(prompt, size, choices)] == list(range(size))

        async with asyncio.timeout(3600), asyncio.TaskGroup() as group:
            for one in asked:
                group.create_task(client(*one))
        assert not engine.core.running and not engine.core.waiting and engine.kv.used == 0
        assert engine.value("vllm:generation_tokens_total") == sum(size * n for _, size, _, n in asked)

    run(scene)


def test_a_generation_whose_client_left_is_freed_without_the_collector() -> None:
    async def scene() -> None:
        core = Engine(100).core

        async def answer(begun: asyncio.Future[weakref.ref[Sequence]]) -> None:
            with contextlib.suppress(ClientGone), core.sequence(30, 40) as sequence:
                begun.set_result(weakref.ref(sequence))
                while await sequence.next():
                    pass

        begun: asyncio.Future[weakref.ref[Sequence]] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(answer(begun))
        found = await begun
        await asyncio.sleep(TTFT_S)
        if (sequence := found()) is not None:
            sequence.fail(ClientGone())
        del sequence
        await task
        assert found() is None

    gc.disable()
    try:
        run(scene)
    finally:
        gc.enable()
