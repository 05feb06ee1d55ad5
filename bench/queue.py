"""What the queue itself costs: `python -m bench.queue` prints CPU microseconds per request, without network or engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from rich.console import Console

from bench.report import Report, table
from serving.fleet.endpoint import Endpoint, State
from serving.gateway.queue import Ticket, VersionLine

_BATCHES = 30


def line(endpoints: int, slots: int = 64, kv_tokens: int | None = None) -> VersionLine:
    made = VersionLine("m@v")
    made.update(
        [
            Endpoint(
                id=str(i),
                model="m",
                version="v",
                url=f"http://{i}",
                state=State.READY,
                slots=slots,
                kv_tokens=kv_tokens,
            )
            for i in range(endpoints)
        ],
        only_add=False,
    )
    return made


async def least(what: Callable[[], Awaitable[None]], count: int) -> float:
    """CPU microseconds of one of `count` in the best batch: the others were disturbed."""
    best = float("inf")
    for _ in range(_BATCHES):
        began = time.process_time()
        await what()
        best = min(best, time.process_time() - began)
    return best / count * 1e6


async def take_and_release(endpoints: int, blocks: int = 0, *, siblings: bool = False, count: int = 500) -> float:
    """A request that finds a free slot, from its arrival to its end."""
    to, prompt = line(endpoints), tuple(range(blocks))
    to.gateways = 1 + siblings

    async def batch() -> None:
        for _ in range(count):
            one = Ticket(since=0.0, key="k", tokens=100, blocks=prompt)
            await to.take(one, others=0, max_queue=10, max_wait_s=10)
            to.entered(one)
            to.release(one)

    return await least(batch, count)


async def pump(endpoints: int = 64, waiting: int = 500) -> float:
    """A slot comes free where KV cache is short everywhere and many wait."""
    to = line(endpoints, kv_tokens=1000)

    async def take(tokens: int, key: str) -> None:
        ticket = Ticket(since=0.0, key=key, tokens=tokens)
        await to.take(ticket, others=0, max_queue=10 * waiting, max_wait_s=100)

    for _ in range(endpoints):
        await take(950, "k")
    tasks = [asyncio.create_task(take(500, f"k{i % 7}")) for i in range(waiting)]
    await asyncio.sleep(0)

    async def once() -> None:
        to.pump()

    try:
        return await least(once, 1)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure() -> Report:
    report = Report()
    for endpoints, blocks, siblings in ((1, 0, False), (4, 0, False), (4, 48, False), (4, 48, True), (64, 48, True)):
        name = f"queue_take_release_{endpoints}" + (f"_blocks_{blocks}" if blocks else "") + "_siblings" * siblings
        report.note(name, await take_and_release(endpoints, blocks, siblings=siblings), "us")
    report.note("queue_pump_64_short", await pump(), "us")
    return report


if __name__ == "__main__":
    Console().print(table(asyncio.run(measure())))
