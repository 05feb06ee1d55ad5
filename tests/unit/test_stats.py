"""What is read from an engine's Prometheus text."""

from __future__ import annotations

import pytest

from serving.engine.stats import kv_tokens


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
