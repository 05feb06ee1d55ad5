"""Routes that the gateway answers itself: health, the models of the catalog, metrics."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

import msgspec

from serving.errors import InvalidKey, UnknownModel, UnknownRoute
from serving.gateway.exchange import Exchange
from serving.gateway.keys import Key
from serving.gateway.scrape import Scraper
from serving.gateway.state import CatalogConfig, Fleet, model_cards
from serving.telemetry.metrics import GatewayMetrics

_EXPOSITION = b"text/plain; version=0.0.4; charset=utf-8"


class OwnRoutes:
    """Used from one event loop only. The caller has checked the key and its scope; `key` is None where none is needed."""

    def __init__(
        self, gateway_id: str, fleet: Fleet, metrics: GatewayMetrics, secret: str, draining: Callable[[], bool]
    ) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._secret = secret.encode()
        self._draining = draining
        self._scraper = Scraper(gateway_id, fleet, metrics, secret)
        self.sources = self._scraper.others
        self._answers: dict[str, Callable[[Exchange, Key | None], Awaitable[None]]] = {
            "/healthz": self._healthz,
            "/-/healthz": self._healthz,
            "/readyz": self._readyz,
            "/v1/models": self._models,
            "/metrics": self._exposition,
            "/metrics/targets": self._targets,
        }

    async def start(self) -> None:
        await self._scraper.start()

    async def stop(self) -> None:
        await self._scraper.stop()

    async def answer(self, route: str, x: Exchange, key: Key | None) -> None:
        """Answers `route`, one of `routes.OWN`."""
        await self._answers[route](x, key)

    async def sibling(self, x: Exchange) -> None:
        """The private listener: another gateway asks for this one's own metrics."""
        if not hmac.compare_digest(x.headers.get(b"x-steelyard-secret", b""), self._secret):
            raise InvalidKey("this listener answers gateways only")
        if x.path != "/metrics":
            raise UnknownRoute(f"{x.path} is not served here")
        await x.answer(200, self._metrics.text().encode(), _EXPOSITION)

    async def _healthz(self, x: Exchange, key: Key | None) -> None:
        await x.answer(200, b'{"status":"ok"}')

    async def _readyz(self, x: Exchange, key: Key | None) -> None:
        draining = self._draining()
        missing = [] if draining else self._fleet.missing()
        if draining or missing:
            # Without a key no names: only how many.
            told = {"status": "draining" if draining else "not ready", "missing": len(missing)}
            await x.answer(503, msgspec.json.encode(told), more=[(b"retry-after", b"1")])
        else:
            await x.answer(200, b'{"status":"ready"}')

    async def _models(self, x: Exchange, key: Key | None) -> None:
        assert key is not None
        catalog = self._fleet.catalog
        cards = model_cards(catalog, self._fleet.endpoints(), visible(catalog, key))
        wanted = x.path.removeprefix("/v1/models").strip("/")
        if not wanted:
            await x.answer(200, msgspec.json.encode({"object": "list", "data": cards}))
            return
        for card in cards:
            if card["id"] == wanted:
                await x.answer(200, msgspec.json.encode(card))
                return
        raise UnknownModel(f"there is no model {wanted[:100]!r}; there is: {', '.join(c['id'] for c in cards)}")

    async def _exposition(self, x: Exchange, key: Key | None) -> None:
        text = await self._scraper.one_or_all(x.query)
        await x.answer(200, text.encode(), _EXPOSITION)

    async def _targets(self, x: Exchange, key: Key | None) -> None:
        host = x.headers.get(b"host", b"").decode("latin-1")
        await x.answer(200, msgspec.json.encode(self._scraper.targets(host)))


def visible(catalog: CatalogConfig, key: Key) -> list[str]:
    """The names that the key may use, sorted."""
    return sorted(n for n, to in catalog.names.items() if key.allows(f"infer:{to.model}@{to.version}"))
