"""What an engine's Prometheus text says: pure."""

from __future__ import annotations

import re

_INFO = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.M)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def kv_tokens(text: str) -> int | None:
    """Tokens that the engine's KV cache holds, all its data-parallel ranks together; None when it does not say."""
    total = 0
    for found in _INFO.findall(text):
        labels = dict(_LABEL.findall(found))
        size, blocks, block = (labels.get(n, "") for n in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size"))
        if size.isdigit():  # exact where layers keep different amounts
            total += int(size)
        elif blocks.isdigit() and block.isdigit():
            total += int(blocks) * int(block)
    return total or None
