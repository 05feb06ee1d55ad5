"""Metrics of the whole stack through one guarded port: `/metrics` merges every process, `/metrics?source=ID` is one of them,
`/metrics/targets` is Prometheus HTTP service discovery for the latter. Prometheus needs one key with scope `metrics`.

A source that does not answer is an error when it is asked for alone, so that Prometheus's own `up` says so, and
`steelyard_target_up` 0 in the whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs

import aiohttp

from serving.errors import EngineBroken, UnknownRoute
from serving.fleet.endpoint import State, Target
from serving.gateway.state import Fleet
from serving.telemetry.metrics import GatewayMetrics, expose_up, merge

TIMEOUT_S = 5.0  # of one source
WHOLE_S = 2.0  # of the merged view: who has not answered by then is not in it
FRESH_S = 1.0  # a merged view this young is given again: a scrape costs an engine ~10 ms of its event loop
MAX_BYTES = 32 * 1024 * 1024  # of one source: more is a fault, and would fill this process


class Scraper:
    """Used from one event loop only."""

    def __init__(self, gateway_id: str, fleet: Fleet, metrics: GatewayMetrics, secret: str) -> None:
        self._id = gateway_id
        self._fleet = fleet
        self._metrics = metrics
        self._secret = secret
        self.others: dict[str, Callable[[], Awaitable[str]]] = {}  # sources that are asked by other means than HTTP
        self._http: aiohttp.ClientSession | None = None
        # Its own: the process's common threads may all hang, in look-ups of names or on a full disk.
        self._merger = ThreadPoolExecutor(1, thread_name_prefix="scrape")
        self._lock = asyncio.Lock()
        self._merged = ""
        self._merged_at = float("-inf")
        self._asked: dict[str, asyncio.Task[str | None]] = {}  # by target
        self._late: set[str] = set()  # who has not answered since it was late

    async def start(self) -> None:
        self._http = aiohttp.ClientSession(
            headers={"x-steelyard-secret": self._secret},
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            connector=aiohttp.TCPConnector(limit=0),  # those who say nothing keep nobody else waiting for a connection
        )

    async def stop(self) -> None:
        for late in self._asked.values():
            late.cancel()
        self._merger.shutdown(wait=False)
        if self._http is not None:
            await self._http.close()

    async def one_or_all(self, query: bytes) -> str:
        """The exposition of the source named in the query, or of all."""
        wanted = parse_qs(query.decode("latin-1")).get("source")
        if not wanted:
            return await self._all()
        target = next((t for t in self._targets() if t.id == wanted[0]), None)
        if target is None:
            raise UnknownRoute(f"no source {wanted[0][:100]!r} now; /metrics/targets lists them")
        text = await self._fetch(target)
        if text is None:  # an empty exposition would look like a source that is up
            raise EngineBroken(f"{wanted[0]} does not answer")
        return text

    def targets(self, host: str) -> list[dict[str, Any]]:
        """HTTP service discovery: every process, scraped through this port. `host` is what Prometheus called us by."""
        return [
            {"targets": [host], "labels": {"__metrics_path__": "/metrics", "__param_source": t.id, **t.joined}}
            for t in sorted(self._targets(), key=lambda t: t.id)
        ]

    def _targets(self) -> Iterator[Target]:
        yield Target(id=self._id, component="gateway", url="", node=self._fleet.node)
        for name in self.others:
            yield Target(id=name, component=name, url="")
        for g in self._fleet.gateways:
            if g.id != self._id:
                yield Target(id=g.id, component="gateway", url=g.url + "/metrics", node=g.node)
        for e in self._fleet.endpoints():
            if e.state in (State.READY, State.SUSPECT, State.DRAINING):
                labels = {"replica": e.id, "model": e.model, "version": e.version}
                yield Target(id=e.id, component="engine", url=e.url + "/metrics", node=e.node, labels=labels)
        yield from self._fleet.announced

    async def _all(self) -> str:
        async with self._lock:
            if time.monotonic() - self._merged_at > FRESH_S:
                targets = list(self._targets())
                texts = await self._ask([t for t in targets if t.id != self._id])
                texts[self._id] = self._metrics.text()  # the last: the others are as old as what they waited for
                told = [(t.joined, texts[t.id]) for t in targets if t.id in texts]
                up = expose_up((t.joined, t.id in texts) for t in targets)
                # In a thread: hundreds of engines are seconds of string work, and streams must not wait for it.
                merging = asyncio.get_running_loop().run_in_executor(self._merger, merge, [*told, ({}, up)])
                self._merged = await merging
                self._merged_at = time.monotonic()
            return self._merged

    async def _ask(self, targets: list[Target]) -> dict[str, str]:
        """What they tell within `WHOLE_S`. Who was late once is not waited for until it has answered: one process that stands
        still must not make every scrape late."""
        last = self._asked
        self._late = {i for i in self._late & last.keys() if not last[i].done() or last[i].result() is None}
        under_way = {i: task for i, task in last.items() if not task.done()}
        asked = {t.id: asyncio.create_task(self._fetch(t)) for t in targets if t.id not in under_way}
        self._asked = under_way | asked
        if waited := [task for i, task in asked.items() if i not in self._late]:
            await asyncio.wait(waited, timeout=WHOLE_S)
        self._late |= {i for i, task in asked.items() if not task.done()}
        return {i: text for i, task in asked.items() if task.done() and (text := task.result()) is not None}

    async def _fetch(self, target: Target) -> str | None:
        if target.id == self._id:
            return self._metrics.text()
        assert self._http is not None
        try:
            if target.id in self.others:
                return await asyncio.wait_for(self.others[target.id](), TIMEOUT_S)
            async with self._http.get(target.url) as answer:
                answer.raise_for_status()
                data = bytearray()
                async for piece in answer.content.iter_any():
                    data += piece
                    if len(data) > MAX_BYTES:
                        return None
                return data.decode(errors="replace")
        except Exception:  # gone since the table was made, or too slow: the others' scrape is worth more
            return None
