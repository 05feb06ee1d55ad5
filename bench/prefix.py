"""Prefix routing against what one big replica's cache would find, and against routing by load alone.

The gateway's own queue, routing and block hashes in front of the simulator's engines and KV caches, in virtual time: an hour of
traffic in seconds, and the same result every time. A part of `make bench-scale`; `python -m bench.prefix` is it alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry

from bench import virtual
from bench.paired import Bench
from bench.plan import Asked, Bars, add
from bench.report import Report, table
from serving.engine.simulator.core import Core
from serving.engine.simulator.kv import KvCache
from serving.engine.simulator.metrics import Metrics
from serving.engine.simulator.sins import Sins
from serving.fleet.endpoint import Endpoint, State
from serving.gateway.prefix import blocks_of
from serving.gateway.queue import Ticket, VersionLine
from serving.gateway.routes import SERVED

TRACE = Path(__file__).resolve().parents[2] / "shared/traces/mooncake_conversation_trace.jsonl"
BLOCK_TOKENS = 512  # of the trace
BYTES_A_TOKEN = 4
REPLICAS = 4
ROUTE = SERVED["/v1/chat/completions"]
_NETWORK_S = 0.001
_REPORT_EVERY_S = 0.5


@dataclass(frozen=True)
class Turn:
    """One request of a trace. `blocks` name the prompt's pieces of `BLOCK_TOKENS`, each with all that comes before it."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...]

    def text(self) -> str:
        """A prompt of that size that begins like others where their blocks are the same."""
        size = BLOCK_TOKENS * BYTES_A_TOKEN
        pieces = (f"{block:011x} " * (size // 12 + 1) for block in self.blocks)
        return "".join(piece[:size] for piece in pieces)[: self.prompt_tokens * BYTES_A_TOKEN]


@dataclass(frozen=True)
class Engine:
    """What a replica can do: an 8B model on a large GPU, its cache offloaded to the host's memory."""

    slots: int = 64
    kv_tokens: int = 2_000_000
    prefill_s: float = 1 / 20_000  # a token
    ttft_s: float = 0.03
    itl_s: float = 0.02

    def times(self, n: int) -> Engine:
        """As many of them in one: so much room, and so fast with prompts."""
        return Engine(self.slots * n, self.kv_tokens * n, self.prefill_s / n, self.ttft_s, self.itl_s)


@dataclass
class Outcome:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)  # requests, by replica

    @property
    def share(self) -> float:
        """Of all tokens of prompts, those that were found in a cache."""
        return self.cached_tokens / self.prompt_tokens

    @property
    def ttft_p95_s(self) -> float:
        return statistics.quantiles(self.ttft_s, n=20)[-1]


def replay(
    turns: Sequence[Turn], engine: Engine, replicas: int, *, by_prefix: bool = True, gateways: int = 1
) -> Outcome:
    """The turns through `gateways`, taken in turns, to so many replicas."""
    outcome = Outcome(sent=[0] * replicas)

    async def serve() -> None:
        cores = [_core(engine, f"e{i}") for i in range(replicas)]
        lines = [VersionLine("m@v", f"g{i}") for i in range(gateways)]
        _tell(lines, cores)
        telling = asyncio.create_task(_keep_telling(lines, cores))
        began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as tasks:
            for i, turn in enumerate(turns):
                await asyncio.sleep(began + turn.at_s - asyncio.get_running_loop().time())
                tasks.create_task(_request(lines[i % gateways], cores, turn, by_prefix, outcome))
        telling.cancel()

    virtual.run(serve)
    return outcome


def _core(engine: Engine, name: str) -> Core:
    kv = KvCache(engine.kv_tokens, BLOCK_TOKENS)
    return Core(
        slots=engine.slots,
        kv=kv,
        ttft_s=engine.ttft_s,
        itl_s=engine.itl_s,
        sins=Sins(frozenset(), 0),
        metrics=Metrics(CollectorRegistry(), name, engine.kv_tokens, kv),
        prefill_s=engine.prefill_s,
    )


async def _keep_telling(lines: list[VersionLine], cores: list[Core]) -> None:
    """Replicas report their load to the directory, and it to the gateways."""
    while True:
        await asyncio.sleep(_REPORT_EVERY_S)
        _tell(lines, cores)


def _tell(lines: list[VersionLine], cores: list[Core]) -> None:
    endpoints = [
        Endpoint(
            id=str(i),
            model="m",
            version="v",
            url=f"http://e{i}",
            state=State.READY,
            slots=core.slots,
            kv_tokens=core.kv.tokens,
            in_flight=len(core.running) + len(core.waiting),
            tokens=core.kv.used,
        )
        for i, core in enumerate(cores)
    ]
    for line in lines:
        line.gateways = len(lines)
        line.update(endpoints, only_add=False)


async def _request(line: VersionLine, cores: list[Core], turn: Turn, by_prefix: bool, outcome: Outcome) -> None:
    loop = asyncio.get_running_loop()
    arrived = loop.time()
    fields = {"model": "m", "messages": [{"role": "user", "content": turn.text()}], "max_tokens": turn.answer_tokens}
    body_bytes = turn.prompt_tokens * BYTES_A_TOKEN + 80
    ticket = Ticket(since=arrived, key="k", tokens=line.size_of(ROUTE, fields, body_bytes))
    if by_prefix and len(line.upstreams) > 1:
        ticket.blocks = blocks_of(ROUTE, fields, None)
    upstream = await line.take(ticket, others=0, max_queue=10**6, max_wait_s=10**6)
    try:
        await asyncio.sleep(_NETWORK_S)
        whole = turn.blocks[: turn.prompt_tokens // BLOCK_TOKENS]
        replica = int(upstream.endpoint.id)
        with cores[replica].sequence(turn.prompt_tokens, turn.answer_tokens, whole) as sequence:
            await sequence.next()
            line.entered(ticket)
            outcome.ttft_s.append(loop.time() - arrived)
            outcome.prompt_tokens += turn.prompt_tokens
            outcome.cached_tokens += sequence.cached
            outcome.sent[replica] += 1
            await asyncio.sleep((turn.answer_tokens - 1) * cores[replica].itl_s)
            while await sequence.next():
                pass
        line.sizes.learn(body_bytes, turn.prompt_tokens, turn.answer_tokens)
    finally:
        line.release(ticket)


# -- traffic


def mooncake(path: Path = TRACE) -> Iterator[Turn]:
    """An hour of conversations (Qin et al., "Mooncake", FAST 2025)."""
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            yield Turn(
                row["timestamp"] / 1000, row["input_length"], max(1, row["output_length"]), tuple(row["hash_ids"])
            )


def conversations(count: int, per_s: float, rng: random.Random) -> Iterator[Turn]:
    """Traffic of the same kind, for where the trace is not: one system prompt for all, conversations whose every turn holds
    the ones before, minutes apart, some about the same long document."""
    fresh = iter(range(1, 10**9))
    documents = [[next(fresh) for _ in range(rng.randint(4, 40))] for _ in range(50)]
    system, now = [0], 0.0
    turns: list[Turn] = []
    while len(turns) < count:
        now += rng.expovariate(per_s / 3)  # three turns each in the mean
        shared = rng.choice(documents) if rng.random() < 0.15 else []
        history, at = [*system, *shared], now
        while True:
            history = [*history, *(next(fresh) for _ in range(max(1, round(rng.lognormvariate(2.3, 1.0)))))]
            history = history[:240]
            tokens = (len(history) - 1) * BLOCK_TOKENS + rng.randint(1, BLOCK_TOKENS)
            turns.append(Turn(at, tokens, min(2000, 1 + round(rng.lognormvariate(5.5, 0.8))), tuple(history)))
            if rng.random() < 1 / 3:
                break
            at += rng.expovariate(1 / 60)
    yield from sorted(turns, key=lambda turn: turn.at_s)[:count]


def uniform(count: int, per_s: float, rng: random.Random, shared: int = 0) -> Iterator[Turn]:
    """Prompts of 1 to 8 blocks that have nothing in common but their first `shared` ones, evenly mixed."""
    now, fresh = 0.0, iter(range(1000, 10**9))
    for _ in range(count):
        now += rng.expovariate(per_s)
        own = rng.randint(1, 8)
        tokens = (shared + own) * BLOCK_TOKENS - rng.randint(0, BLOCK_TOKENS - 1)
        yield Turn(now, tokens, rng.randint(50, 400), (*range(shared), *(next(fresh) for _ in range(own))))


# -- figures


def measure(say: Callable[[str], None] = lambda _: None, most: int | None = None) -> Report:
    """Every figure, judged. `most` requests of the trace."""
    report, engine = Report(), Engine()
    if TRACE.exists():
        turns = list(mooncake())
    else:
        say(f"{TRACE.name} is not here: traffic made up after it")
        turns = list(conversations(12_000, 3.4, random.Random(1)))
    turns = turns[:most]
    big = replay(turns, engine.times(REPLICAS), 1)
    spread = replay(turns, engine, REPLICAS)
    plain = replay(turns, engine, REPLICAS, by_prefix=False)
    say(f"cached share: one big replica {big.share:.3f}, by prefix {spread.share:.3f}, by load {plain.share:.3f}")
    report.judge("prefix_cached_share_ratio", spread.share / big.share, "x", ">=", 0.9)
    report.note("prefix_cached_share", spread.share, "")
    report.note("prefix_cached_share_by_load", plain.share, "")
    report.note("prefix_ttft_p95", spread.ttft_p95_s, "s")
    report.note("prefix_ttft_p95_by_load", plain.ttft_p95_s, "s")
    worst = 0.0
    for shared in (0, 1, 4):
        even = list(uniform(6000, 24, random.Random(2), shared))
        here, there = (replay(even, engine, REPLICAS, by_prefix=p) for p in (True, False))
        worst = max(worst, here.ttft_p95_s / there.ttft_p95_s)
        say(f"uniform, {shared} blocks shared: TTFT p95 {here.ttft_p95_s:.3f} s, by load {there.ttft_p95_s:.3f} s")
    report.judge("prefix_uniform_ttft_p95_ratio", worst, "x", "<=", 1.05)
    return report


def part(bench: Bench, asked: Asked, bars: Bars, result: Report) -> None:
    """As a part of `bench.scale`."""
    found = measure(bench.say, 6_000 if asked.quick else None)
    for bar in found.bars:
        add(result, bar.name, bar.value, asked, bars)
    result.figures += found.figures


def main() -> int:
    report = measure(lambda line: print(line, file=sys.stderr, flush=True))
    from rich.console import Console

    Console().print(table(report))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
