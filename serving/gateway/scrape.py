"""Metrics of the whole stack through one guarded port: `/metrics` merges every process, `/metrics?source=ID` is one of them,
`/metrics/targets` is Prometheus HTTP service discovery for the latter. Prometheus needs one key with scope `metrics`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import aiohttp

from serving.errors import EngineBroken, UnknownRoute
from serving.fleet.endpoint import State
from serving.gateway.state import Fleet
from serving.telemetry.metrics import GatewayMetrics, merge

TIMEOUT_S = 5.0  # of one source
FRESH_S = 1.0  # a merged view this young is given again: a scrape costs an engine ~10 ms of its event loop


class Scraper:
    """Used from one event loop only."""

    def __init__(self, gateway_id: str, fleet: Fleet, metrics: GatewayMetrics, secret: str) -> None:
        self._id = gateway_id
        self._fleet = fleet
        self._metrics = metrics
        self._secret = secret
        self.others: dict[str, Callable[[], Awaitable[str]]] = {}  # sources that are asked by other means than HTTP
        self._http: aiohttp.ClientSession | None = None
        self._lock = asyncio.Lock()
        self._merged = ""
        self._merged_at = float("-inf")

    async def start(self) -> None:
        self._http = aiohttp.ClientSession(
            headers={"x-steelyard-secret": self._secret}, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)
        )

    async def stop(self) -> None:
        if self._http is not None:
            await self._http.close()

    async def one_or_all(self, query: bytes) -> str:
        """The exposition of the source named in the query, or of all."""
        wanted = parse_qs(query.decode("latin-1")).get("source")
        if not wanted:
            return await self._all()
        sources = self._sources()
        if wanted[0] not in sources:
            raise UnknownRoute(f"no source {wanted[0][:100]!r} now; /metrics/targets lists them")
        text = await self._fetch(wanted[0], sources[wanted[0]][1])
        if text is None:  # an empty exposition would look like a source that is up
            raise EngineBroken(f"{wanted[0]} does not answer")
        return text

    def targets(self, host: str) -> list[dict[str, Any]]:
        """HTTP service discovery: every process, scraped through this port. `host` is what Prometheus called us by."""
        return [
            {"targets": [host], "labels": {"__metrics_path__": "/metrics", "__param_source": i, **labels}}
            for i, (labels, _) in sorted(self._sources().items())
        ]

    def _sources(self) -> dict[str, tuple[dict[str, str], str]]:
        """id -> (labels, URL of its exposition); the own URL is empty."""
        found: dict[str, tuple[dict[str, str], str]] = {self._id: ({"gateway": self._id}, "")}
        found |= {name: ({"source": name}, "") for name in self.others}
        for g in self._fleet.gateways:
            if g.id != self._id:
                found[g.id] = ({"gateway": g.id}, g.url + "/metrics")
        for e in self._fleet.endpoints():
            if e.state in (State.READY, State.DRAINING):
                labels = {"replica": e.id, "model": e.model, "version": e.version}
                found[e.id] = (labels, e.url + "/metrics")
        return found

    async def _all(self) -> str:
        async with self._lock:
            if time.monotonic() - self._merged_at > FRESH_S:
                sources = self._sources()
                texts = await asyncio.gather(*(self._fetch(i, url) for i, (_, url) in sources.items()))
                pairs = [(labels, text) for (labels, _), text in zip(sources.values(), texts, strict=True) if text]
                self._merged = merge(pairs)
                self._merged_at = time.monotonic()
            return self._merged

    async def _fetch(self, source: str, url: str) -> str | None:
        if source == self._id:
            self._metrics.set_replicas(self._fleet.replica_counts())
            return self._metrics.text()
        assert self._http is not None
        try:
            if source in self.others:
                return await asyncio.wait_for(self.others[source](), TIMEOUT_S)
            async with self._http.get(url) as answer:
                answer.raise_for_status()
                return await answer.text()
        except Exception:  # gone since the table was made, or too slow: the others' scrape is worth more
            return None
