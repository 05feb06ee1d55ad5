"""What an engine's Prometheus text says: pure."""

from __future__ import annotations

import re
from typing import NamedTuple

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


class Vitals(NamedTuple):
    """What an engine says of its load, and whether it gets on. `mark` moves with every step of its core, and with nothing else:
    a prefill in chunks counts as no iteration and yields no token, but takes more of the KV cache each time. `ranks`: the same of
    each of its data-parallel cores that runs something."""

    running: int
    waiting: int
    kv_usage: float  # 0..1
    asleep: bool
    mark: tuple[float, ...]  # iterations first
    ranks: dict[str, tuple[float, ...]]


_ITERATIONS, _AWAKE = "vllm:iteration_tokens_total_count", "vllm:engine_sleep_state"
_RUNNING, _WAITING, _KV = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
_MOVING = (
    *(_ITERATIONS, "vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:prefix_cache_queries_total"),
    *("vllm:num_preemptions_total", _RUNNING, _WAITING, _KV),
)
# Of all the engine's series only these: the whole text costs 10 ms of its event loop, this a fraction of one. The slash leads
# past vLLM's first handler of /metrics, which knows no names, to prometheus_client's own.
VITALS_PATH = "/metrics/?" + "&".join(f"name[]={name}" for name in (*_MOVING, _AWAKE))
_SAMPLE = re.compile(rf"^({'|'.join(map(re.escape, (*_MOVING, _AWAKE)))})(?:\{{(.*)\}})? (\S+)$", re.M)


def vitals(text: str) -> Vitals | None:
    """None for an engine without vLLM's counters."""
    cores: dict[str, dict[str, float]] = {}
    awake: list[float] = []
    for name, labels, value in _SAMPLE.findall(text):
        if name == _AWAKE:
            if 'sleep_state="awake"' in labels:
                awake.append(float(value))
        else:
            core = cores.setdefault(dict(_LABEL.findall(labels)).get("engine", ""), dict.fromkeys(_MOVING, 0.0))
            core[name] += float(value)
    if not cores:
        return None
    whole = {name: sum(core[name] for core in cores.values()) for name in _MOVING}
    return Vitals(
        int(whole[_RUNNING]),
        int(whole[_WAITING]),
        whole[_KV] / len(cores),
        bool(awake) and not any(awake),
        tuple(whole.values()),
        {rank: tuple(core.values()) for rank, core in cores.items() if core[_RUNNING]},
    )


class Pace:
    """The mark of all cores together: it moves when each that runs something has moved since it moved last, and its first
    value counts the steps of the slowest. One that stands still is not hidden by the others, and one that is slow is known
    for it."""

    def __init__(self) -> None:
        self._seen: Vitals | None = None
        self._steps = 0.0

    def mark(self, now: Vitals) -> tuple[float, ...]:
        before = self._seen
        if before is None:
            self._seen = now
        elif not any(before.ranks.get(rank) == mark for rank, mark in now.ranks.items()):
            both = now.ranks.keys() & before.ranks.keys()
            made = [now.ranks[rank][0] - before.ranks[rank][0] for rank in both]
            self._steps += max(0.0, min(made, default=now.mark[0] - before.mark[0]))
            self._seen = now
        assert self._seen is not None
        return self._steps, *self._seen.mark[1:]
