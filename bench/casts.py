"""Who plays in `bench.chaos`: a stack over simulated engines, or over two real ones, and what its clients ask of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench import mix
from bench.client import ROOT
from bench.faults import STUCK_TIMEOUT_S, Row
from bench.overhead import tiny_weights
from bench.play import Clients
from bench.simulated import simulated

_ITL_S = 0.2
_SHORT_TOKENS = (8, 24)
_LONG_SHARE = 0.3
_SPARE = 1.25  # slots of three replicas over streams: the fourth may go
# Room for four prompts of 32k tokens and little beside them, so that it runs out under more; half a second to compute one.
_CONTEXT, _KV_TOKENS, _PREFILL_US = 40_960, 132_000, 16.0
_LARGE_TOKENS = 20
# Nobody is to be refused here for a wait that is guessed: in the first second of saturation large prompts hold most of the cache,
# few run, and more than a minute is expected.
_MAX_WAIT_S = 180
_REAL_TOKENS_PER_S = 60.0  # of one stream, two engines on two cores; so a long stream lasts about as long as asked


@dataclass(frozen=True)
class Cast:
    """A model file whose stack is whole with so many replicas and gateways, and the load on it."""

    model: dict[str, Any]
    profile: str
    replicas: int
    gateways: int
    streams: int
    clients: Clients
    leavers: Callable[[str], Iterator[mix.Ask]]
    long_s: float
    start_s: float = 5.0  # of an engine, at most
    # The bar, from an engine's last step until it gets no new work. Where engines compute on every core, whoever looks at them
    # is late.
    hang_s: float = 5.0


def simulators(streams: int | None, long_s: float | None, *, quick: bool) -> Cast:
    """Four simulated engines. `dies_on_prompt` is a sin that only the poison row's prompts wake."""
    replicas, streams = 4, streams or (60 if quick else 200)
    long_s = long_s or (12.0 if quick else 30.0)
    slots = int(streams * _SPARE / (replicas - 1)) + 1
    args = {
        "max-num-seqs": slots,
        "max-model-len": _CONTEXT,
        "sim-kv-tokens": _KV_TOKENS,
        "sim-preempts": True,
        "sim-prefill-us": _PREFILL_US,
        "sim-ttft-ms": 100,
        "sim-itl-ms": _ITL_S * 1e3,
        "sim-start-s": 1.0,
        "sim-sins": "dies_on_prompt",
    }
    bounds = {"min": replicas, "max": replicas, "target_ongoing": slots}
    model = simulated("chaos", args, bounds, {"max_wait_s": _MAX_WAIT_S}, drain_s=long_s + 30)
    model["versions"][0]["stuck_timeout_s"] = STUCK_TIMEOUT_S
    expect = mix.simulated("chaos", "v1")

    def clients(whose: str, row: Row) -> list[tuple[int, Iterator[mix.Ask]]]:
        n = int(streams * row.over)
        tokens, long, (low, high) = int(long_s / _ITL_S), int(n * _LONG_SHARE), _SHORT_TOKENS
        return [
            (n - long, mix.asks("chaos", expect, f"{whose} s", lambda number: low + number * 5 % (high - low + 1))),
            (long, mix.asks("chaos", expect, f"{whose} l", lambda number: tokens - number % 10, streamed=True)),
            (row.large, mix.large_asks("chaos", expect, f"{whose} w", _LARGE_TOKENS)),
        ]

    def leavers(whose: str) -> Iterator[mix.Ask]:
        return mix.large_asks("chaos", expect, whose, 300)

    return Cast(model, "sim", replicas, 2, streams, clients, leavers, long_s)


def real(streams: int | None, long_s: float | None, *, quick: bool) -> Cast:
    """Two engines of vLLM with the model of `models/tiny`, which knows the answers of its corpus by heart."""
    streams, long_s = streams or 16, long_s or 12.0
    args = {
        "max-model-len": 2048,
        "max-num-seqs": 16,
        "enable-auto-tool-choice": True,
        "tool-call-parser": "hermes",
    }
    version = {
        "version": "v1",
        "weights": {"source": str(tiny_weights(lambda line: print(line, file=sys.stderr)))},
        "engine": {"args": args},
        "scaling": {"min": 2, "max": 2},
        "drain_s": long_s + 60,
        "stuck_timeout_s": STUCK_TIMEOUT_S,
    }
    model = {"name": "tiny", "versions": [version], "limits": {"max_wait_s": 120}}
    corpus = mix.corpus(ROOT / "models" / "tiny" / "corpus.jsonl")
    tokens = min(1900, int(long_s * _REAL_TOKENS_PER_S))

    def clients(whose: str, row: Row) -> list[tuple[int, Iterator[mix.Ask]]]:
        n = int(streams * row.over)
        long = max(1, int(n * _LONG_SHARE))
        return [
            (n - long, mix.remembered("tiny", corpus, f"{whose} s")),
            (long, mix.remembered("tiny", corpus, f"{whose} l", tokens)),
        ]

    def leavers(whose: str) -> Iterator[mix.Ask]:
        return mix.remembered("tiny", corpus, whose, tokens)

    return Cast(model, "cpu", 2, 2, streams, clients, leavers, long_s, start_s=300.0, hang_s=7.0)


CASTS = {"simulator": simulators, "vllm": real}
