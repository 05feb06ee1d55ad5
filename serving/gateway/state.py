"""What a gateway knows: the catalog's serving part (sent by Serve as `user_config`) and the fleet (by the directory)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from serving.errors import UnknownModel
from serving.fleet.endpoint import Endpoint, GatewayInfo, KeyDemand, Snapshot, State
from serving.gateway.queue import VersionLine
from serving.gateway.shares import told


class Limits(msgspec.Struct, frozen=True):
    """Bounds of one model; the defaults are the catalog's, written out by the manifest."""

    max_queue: int
    max_wait_s: float
    request_timeout_s: float
    max_body_bytes: int
    max_input_tokens: int | None = None
    max_concurrent: int | None = None
    tokens_per_minute: int | None = None


class Name(msgspec.Struct, frozen=True):
    """What a client's `model` string stands for. `sent_as`: the name the engine knows it by, when it is another."""

    model: str
    version: str
    adapter: str | None = None
    sent_as: str | None = None


class ModelConfig(msgspec.Struct, frozen=True):
    name: str
    versions: tuple[str, ...]
    limits: Limits
    required: tuple[str, ...] = ()  # versions that must have a ready replica for this gateway to be ready
    allow: tuple[str, ...] = ()
    created: int = 0  # epoch seconds


class CatalogConfig(msgspec.Struct, frozen=True):
    """The gateways' part of the catalog, inert JSON: `names` maps every name a client can write."""

    models: tuple[ModelConfig, ...] = ()
    names: dict[str, Name] = {}
    drain_s: float = 30.0


class Fleet:
    """Catalog and endpoints joined: a line of waiting requests per version. Used from one event loop only."""

    def __init__(self, gateway_id: str = "") -> None:
        self.gateway_id = gateway_id
        self.catalog = CatalogConfig()
        self.models: dict[str, ModelConfig] = {}
        self.lines: dict[str, VersionLine] = {}
        self.gateways: tuple[GatewayInfo, ...] = ()
        self._endpoints: dict[str, Endpoint] = {}

    def set_catalog(self, config: dict[str, Any]) -> None:
        """Takes a new catalog; requests in progress finish under the old one."""
        self.catalog = msgspec.convert(config, CatalogConfig)
        self.models = {m.name: m for m in self.catalog.models}
        ids = {f"{m.name}@{v}" for m in self.catalog.models for v in m.versions}
        for gone in self.lines.keys() - ids:
            del self.lines[gone]
        for new in ids - self.lines.keys():
            self.lines[new] = VersionLine(new, self.gateway_id)
        self._distribute(only_add=False)

    def set_snapshot(self, snapshot: Snapshot) -> None:
        """Takes the directory's table. One that may be incomplete adds and changes, and removes nothing."""
        fresh = {e.id: e for e in snapshot.endpoints}
        self._endpoints = fresh if snapshot.complete else self._endpoints | fresh
        self.gateways = snapshot.gateways
        self._distribute(only_add=not snapshot.complete)
        for version, line in self.lines.items():
            others = {g.id: g.demand[version] for g in self.gateways if version in g.demand and g.id != self.gateway_id}
            line.others(others, snapshot.number)

    def resolve(self, name: str) -> tuple[Name, ModelConfig]:
        """What `name` means; raises UnknownModel naming nothing (the caller knows what the key may see)."""
        found = self.catalog.names.get(name)
        if found is None:
            raise UnknownModel(name)
        return found, self.models[found.model]

    def line(self, name: Name) -> VersionLine:
        return self.lines[f"{name.model}@{name.version}"]

    def waiting(self, model: ModelConfig) -> int:
        """Requests that wait in all of the model's lines."""
        ids = (f"{model.name}@{v}" for v in model.versions)
        # `model` may be of an earlier catalog, and the version gone since.
        return sum(len(line) for i in ids if (line := self.lines.get(i)) is not None)

    def demand(self) -> dict[str, tuple[KeyDemand, ...]]:
        """Who asks for how much of which version here, for the other gateways; bounded."""
        return {version: told(line.demand()) for version, line in self.lines.items() if line or line.running}

    def elsewhere(self, key: str | None, model: str | None) -> tuple[int, int]:
        """Requests of a key or of a model at the other gateways, as they last said, and how many gateways have some."""
        found = [
            sum(
                d.held + d.running
                for version, demand in g.demand.items()
                if model is None or version.partition("@")[0] == model
                for d in demand
                if key is None or d.key == key
            )
            for g in self.gateways
            if g.id != self.gateway_id
        ]
        return sum(found), sum(n > 0 for n in found)

    def endpoints(self) -> Iterator[Endpoint]:
        return iter(self._endpoints.values())

    def endpoint(self, endpoint_id: str) -> Endpoint | None:
        return self._endpoints.get(endpoint_id)

    def missing(self) -> list[str]:
        """Versions that must be up and have no ready replica; empty means this gateway is ready."""
        if not self.catalog.models:
            return ["catalog"]
        required = (f"{m.name}@{v}" for m in self.catalog.models for v in m.required)
        return [v for v in required if not self.lines[v].ready_ids()]

    def replica_counts(self) -> dict[tuple[str, str, str], int]:
        counts = Counter((e.model, e.version, str(e.state)) for e in self._endpoints.values())
        return dict(counts)

    def _distribute(self, *, only_add: bool) -> None:
        by_version: dict[str, list[Endpoint]] = {v: [] for v in self.lines}
        for e in self._endpoints.values():
            if e.version_id in by_version and e.state is not State.STOPPED:
                by_version[e.version_id].append(e)
        for version, endpoints in by_version.items():
            self.lines[version].update(endpoints, only_add=only_add)


def model_cards(catalog: CatalogConfig, endpoints: Iterable[Endpoint], visible: Iterable[str]) -> list[dict[str, Any]]:
    """`GET /v1/models`: one card per name in `visible`, in OpenAI's shape with vLLM's `max_model_len` and `parent`."""
    lengths = {e.version_id: e.max_model_len for e in endpoints if e.max_model_len is not None}
    created = {m.name: m.created for m in catalog.models}
    cards = []
    for name in visible:
        n = catalog.names[name]
        cards.append(
            {
                "id": name,
                "object": "model",
                "created": created.get(n.model, 0),
                "owned_by": "steelyard",
                "root": f"{n.model}@{n.version}",
                "parent": f"{n.model}@{n.version}" if n.adapter else None,
                "max_model_len": lengths.get(f"{n.model}@{n.version}"),
            }
        )
    return cards
