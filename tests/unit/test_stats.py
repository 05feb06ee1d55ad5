"""What is read from an engine's Prometheus text."""

from __future__ import annotations

import pytest

from serving.engine.stats import VITALS_PATH, Pace, Vitals, kv_tokens, vitals


@pytest.mark.parametrize(
    ("labels", "tokens"),
    [
        (['block_size="16",num_gpu_blocks="100",engine="0"'], 1600),
        (['block_size="16",kv_cache_size_tokens="1500",num_gpu_blocks="100"'], 1500),
        (['kv_cache_size_tokens="None",block_size="128",num_gpu_blocks="3"'], 384),
        (['engine="0",kv_cache_size_tokens="1000"', 'engine="1",kv_cache_size_tokens="1000"'], 2000),
        (['block_size="16",num_gpu_blocks="None"'], None),
        ([], None),
    ],
)
def test_tokens_of_the_kv_cache(labels: list[str], tokens: int | None) -> None:
    lines = [f"vllm:cache_config_info{{{found}}} 1.0" for found in labels]
    text = "\n".join(["# TYPE vllm:cache_config_info gauge", *lines, "vllm:num_requests_running 3.0", ""])
    assert kv_tokens(text) == tokens


def test_vitals_are_summed_over_ranks_and_a_prefill_moves_them() -> None:
    text = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 7.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 9.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="discard_all"} 0.0
"""
    found = vitals(text)
    assert found is not None
    assert (found.running, found.waiting, found.kv_usage, found.asleep, found.mark[0]) == (5, 1, 0.125, False, 9.0)
    later = vitals(text.replace("0.25", "0.26"))
    assert later is not None and later.mark != found.mark
    slept = vitals(text.replace('"awake"} 1.0', '"awake"} 0.0'))
    assert slept is not None and slept.asleep
    assert vitals("process_cpu_seconds_total 1.0\n") is None
    assert "num_requests_running" in VITALS_PATH


def cores(*steps: float | None) -> Vitals:
    """What data-parallel cores say that have made so many steps; None for one that has no work, and had none."""
    lines = []
    for rank, made in enumerate(steps):
        lines.append(f'vllm:iteration_tokens_total_count{{engine="{rank}"}} {made or 0.0}')
        lines.append(f'vllm:num_requests_running{{engine="{rank}"}} {float(made is not None)}')
    found = vitals("\n".join([*lines, ""]))
    assert found is not None
    return found


def test_a_core_that_stands_still_is_not_hidden_by_one_that_works() -> None:
    pace = Pace()
    first = pace.mark(cores(5, 5))
    both = pace.mark(cores(6, 6))
    assert both != first
    assert {pace.mark(cores(7 + i, 6)) for i in range(50)} == {both}
    assert pace.mark(cores(57, 7)) != both, "it goes on"


def test_one_core_or_one_without_work_is_waited_for_by_nobody() -> None:
    pace = Pace()
    assert len({pace.mark(cores(float(i))) for i in range(20)}) == 20
    pace = Pace()
    assert len({pace.mark(cores(float(i), None)) for i in range(20)}) == 20
    pace = Pace()
    pace.mark(cores(1, 1))
    before = pace.mark(cores(2, 1))
    assert pace.mark(cores(3, None)) != before, "it has nothing to do any more"
