"""Many gateways' lines in front of model doors, in time that jumps from one event to the next: minutes in a second, the same
every time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bench.virtual import run
from serving.errors import RequestError
from serving.fleet.endpoint import Endpoint, KeyDemand, State
from serving.gateway import shares
from serving.gateway.queue import Ticket, VersionLine

__all__ = ["World", "run"]

NETWORK_S = 0.001  # one way, with what a door needs to say `busy`
ANNOUNCE_EVERY_S = 0.5
TABLE_EVERY_S = 0.25
REPORT_EVERY_S = 0.5
IDLE_TABLE_EVERY_S = 10.0  # where nothing changed


@dataclass
class Door:
    slots: int
    inside: int = 0
    most: int = 0
    refused: int = 0
    state: State = State.READY


@dataclass
class World:
    """Gateways and engines of one version; requests take `service()` seconds."""

    gateways: int = 1
    engines: int = 4
    slots: int = 8
    service: Callable[[random.Random], float] = lambda r: r.expovariate(1 / 0.5)
    max_queue: int = 512
    max_wait_s: float = 1000
    share: bool = True
    rng: random.Random = field(default_factory=lambda: random.Random(7))

    def __post_init__(self) -> None:
        self.lines = [VersionLine("m@v", f"g{i}") for i in range(self.gateways)]
        self.doors = {f"e{i}": Door(self.slots) for i in range(self.engines)}
        self.done: Counter[str] = Counter()  # by key
        self.waits: list[tuple[float, float]] = []  # (arrival, seconds waited) of those served
        self.refusals: list[tuple[float, RequestError]] = []  # (arrival, why)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The directory tells all of all, at its pace: where nothing changed, seldom."""
        self._tell([0] * self.engines)
        background = [self.spawn(self._directory())]
        try:
            yield
        finally:
            for task in [*background, *self._tasks]:
                task.cancel()

    def spawn(self, what: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def request(self, gateway: int, key: str, *, rank: int = 1, weight: float = 1.0) -> None:
        line, began = self.lines[gateway], self.now
        ticket = Ticket(since=began, key=key, rank=rank, weight=weight, tokens=100)
        again = False
        while True:
            try:
                upstream = await line.take(
                    ticket, others=0, max_queue=self.max_queue, max_wait_s=self.max_wait_s, again=again
                )
            except RequestError as e:
                self.refusals.append((began, e))
                return
            door, settle = self.doors[upstream.endpoint.id], line.release
            try:
                await asyncio.sleep(NETWORK_S)
                if door.inside >= door.slots:
                    door.refused += 1
                    await asyncio.sleep(NETWORK_S)
                    settle, again = line.busy, True
                    continue
                line.entered(ticket)
                self.waits.append((began, self.now - began))
                door.inside += 1
                door.most = max(door.most, door.inside)
                try:
                    await asyncio.sleep(self.service(self.rng))
                    self.done[key] += 1
                finally:
                    door.inside -= 1
                await asyncio.sleep(NETWORK_S)
                return
            finally:
                settle(ticket)

    async def client(self, gateway: int, key: str, **how: Any) -> None:
        """One that asks again as soon as it has its answer, and a moment after a refusal."""
        while True:
            refused = len(self.refusals)
            await self.request(gateway, key, **how)
            if len(self.refusals) > refused:
                await asyncio.sleep(self.rng.uniform(0.1, 0.5))

    async def open_loop(self, gateway: Callable[[], int], key: str, per_s: float, **how: Any) -> None:
        while True:
            await asyncio.sleep(self.rng.expovariate(per_s))
            self.spawn(self.request(gateway(), key, **how))

    async def _directory(self) -> None:
        told: list[tuple[KeyDemand, ...]] = [()] * self.gateways
        loads = [0] * self.engines
        table, at = (told.copy(), loads), -math.inf
        for number in range(10**9):
            every = round(ANNOUNCE_EVERY_S / TABLE_EVERY_S)
            heard = (told.copy(), loads)  # what is only load waits for the next table
            for g, line in enumerate(self.lines):
                if (number + g) % every == 0:
                    told[g] = shares.told(line.demand())
            if number % round(REPORT_EVERY_S / TABLE_EVERY_S) == 0:
                loads = [d.inside for d in self.doors.values()]
            if self.share and (heard != table or self.now - at >= IDLE_TABLE_EVERY_S):
                table, at = heard, self.now
                self._tell(table[1])
                for line in self.lines:
                    line.gateways = self.gateways
                    line.told({f"g{i}": d for i, d in enumerate(table[0]) if d}, number)
            await asyncio.sleep(TABLE_EVERY_S)

    def _tell(self, loads: Iterable[int]) -> None:
        endpoints = [
            Endpoint(id=i, model="m", version="v", url=f"http://{i}", state=d.state, slots=d.slots, in_flight=n)
            for (i, d), n in zip(self.doors.items(), loads, strict=True)
        ]
        for line in self.lines:
            line.update([msgspec.structs.replace(e) for e in endpoints], only_add=False)
