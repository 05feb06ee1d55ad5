"""What a gateway knows: the catalog's serving part (sent by Serve as `user_config`) and the fleet (by the directory)."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from serving.errors import NoReplica, UnknownModel, counted
from serving.fleet.endpoint import (
    START_TRIES,
    Deaths,
    Endpoint,
    GatewayInfo,
    KeyDemand,
    Snapshot,
    State,
    Target,
    VersionFacts,
    failed_there,
    retry_delay_s,
)
from serving.gateway.fuse import Fuse
from serving.gateway.queue import VersionLine
from serving.gateway.shares import told
from serving.gateway.waking import ready_in_s

log = logging.getLogger(__name__)

SHOWN_STATES = (State.STARTING, State.READY, State.SUSPECT, State.DRAINING, State.FAILED)
BUSY_START_S = 120.0  # a start that takes longer reads weights, or hangs
UNKNOWN_START_S = 10.0  # a guess, for Retry-After and for how long a wake is remembered, where nothing is known


class Limits(msgspec.Struct, frozen=True):
    """Bounds of one model; the defaults are the catalog's, written out by the manifest."""

    max_queue: int
    max_wait_s: float
    request_timeout_s: float
    max_body_bytes: int
    keep_alive_after_s: float | None = 15.0  # a held stream's 200 and first keep-alive; None: never
    max_input_tokens: int | None = None
    max_concurrent: int | None = None
    tokens_per_minute: int | None = None


class Name(msgspec.Struct, frozen=True):
    """What a client's `model` string stands for. `sent_as`: the name the engine knows it by, when it is another."""

    model: str
    version: str
    adapter: str | None = None
    sent_as: str | None = None


class Slo(msgspec.Struct, frozen=True):
    """The model's objective: the share of requests whose answer shall be right and begin in time."""

    ttft_s: float = 2.5
    objective: float = 0.99


class ModelConfig(msgspec.Struct, frozen=True):
    name: str
    versions: tuple[str, ...]
    limits: Limits
    slo: Slo = Slo()
    required: tuple[str, ...] = ()  # versions that must have a ready replica for this gateway to be ready
    allow: tuple[str, ...] = ()
    created: int = 0  # epoch seconds


class CatalogConfig(msgspec.Struct, frozen=True):
    """The gateways' part of the catalog, inert JSON: `names` maps every name a client can write."""

    models: tuple[ModelConfig, ...] = ()
    names: dict[str, Name] = {}
    drain_s: float = 30.0


TOLD_BEFORE_S = 15.0  # to a directory that is no more: by then the next one has heard everybody who lives


class Fleet:
    """Catalog and endpoints joined: a line of waiting requests per version. Used from one event loop only."""

    def __init__(self, gateway_id: str = "", node: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.gateway_id = gateway_id
        self.node = node
        self.catalog = CatalogConfig()
        self.models: dict[str, ModelConfig] = {}
        self.lines: dict[str, VersionLine] = {}
        self.gateways: tuple[GatewayInfo, ...] = ()
        self.announced: tuple[Target, ...] = ()  # processes with metrics that are neither gateway nor replica
        self.fuse = Fuse(clock)
        self.asleep: frozenset[str] = frozenset()  # versions without a ready replica
        self.on_hold: Callable[[], None] = lambda: None  # a version must be woken: whoever announces does it now
        self.arrived: Counter[str] = Counter()  # version id -> requests that asked for a slot, ever
        self.finished: Counter[str] = Counter()
        self._endpoints: dict[str, Endpoint] = {}
        # (key id, None) or (None, model) -> requests at other gateways, and how many of those have some
        self._elsewhere: Counter[tuple[str | None, str | None]] = Counter()
        self._gateways_with: Counter[tuple[str | None, str | None]] = Counter()
        self._facts: dict[str, VersionFacts] = {}
        self._epoch = ""
        self._told: dict[str, Deaths] = {}  # by gateway; of one that left, of engines that died alone
        # To an earlier directory, by those silent since, and until when it counts.
        self._told_before: dict[str, tuple[Deaths, float]] = {}
        self._wanted: dict[str, float] = {}  # version id -> monotonic seconds until which it shall be woken

    def set_catalog(self, config: dict[str, Any]) -> None:
        """Takes a new catalog; requests in progress finish under the old one."""
        self.catalog = msgspec.convert(config, CatalogConfig)
        self.models = {m.name: m for m in self.catalog.models}
        ids = {f"{m.name}@{v}" for m in self.catalog.models for v in m.versions}
        for gone in self.lines.keys() - ids:
            del self.lines[gone]
        for new in ids - self.lines.keys():
            self.lines[new] = VersionLine(new, self.gateway_id)
        self._wanted = {v: until for v, until in self._wanted.items() if v in ids}
        self._distribute(only_add=False)

    def set_snapshot(self, snapshot: Snapshot) -> None:
        """Takes the directory's table. One that may be incomplete adds and changes, and removes nothing."""
        fresh = {e.id: e for e in snapshot.endpoints}
        self._endpoints = fresh if snapshot.complete else self._endpoints | fresh
        self._facts = snapshot.versions if snapshot.complete else self._facts | snapshot.versions
        targets = {t.id: t for t in snapshot.targets}
        known = {} if snapshot.complete else {t.id: t for t in self.announced}
        self.announced = tuple((known | targets).values())
        self._distribute(only_add=not snapshot.complete)
        self._hear(snapshot)
        self._count_elsewhere()
        ids = {self.gateway_id, *(g.id for g in self.gateways)}
        for version, line in self.lines.items():
            line.gateways = len(ids)
            line.told({g.id: g.demand[version] for g in self.gateways if version in g.demand}, snapshot.number)

    def resolve(self, name: str) -> tuple[Name, ModelConfig]:
        """What `name` means; raises UnknownModel naming nothing (the caller knows what the key may see)."""
        found = self.catalog.names.get(name)
        if found is None:
            raise UnknownModel(name)
        return found, self.models[found.model]

    def line(self, name: Name) -> VersionLine:
        return self.lines[f"{name.model}@{name.version}"]

    def waiting(self, model: ModelConfig) -> int:
        """Requests that wait for all of the model's lines."""
        return sum(line.waiting for line in self._lines_of(model))

    def put_off(self, model: ModelConfig) -> int:
        """Requests of the model that wait until others have had their trials, and count in no queue meanwhile."""
        return sum(line.trials.put_off for line in self._lines_of(model))

    def held(self) -> dict[str, int]:
        """Version id -> requests that wait for it here; at least one while it shall be woken."""
        now, held = time.monotonic(), {v: len(line) for v, line in self.lines.items() if len(line)}
        self._wanted = {v: until for v, until in self._wanted.items() if until > now and v in self.asleep}
        return {v: 1 for v in self._wanted} | held

    def wake(self, line: VersionLine, patience_s: float) -> None:
        """A request for a version without a ready replica: wakes it. Raises NoReplica, with what is left of the start as
        Retry-After, when that is known to take longer than the request may wait, or when the engine does not start."""
        version_id = line.version_id
        facts = self._facts.get(version_id, VersionFacts())
        starting = [e for e in self._endpoints.values() if e.version_id == version_id]
        left_s = ready_in_s(starting, facts, time.time())
        self.on_hold()
        if any(e.state is State.SUSPECT for e in starting):
            return  # it may be well again any moment
        broken = _broken(facts, starting)
        if not broken and (left_s is None or left_s <= patience_s):
            return
        left_s = max(left_s or 0.0, UNKNOWN_START_S if broken else 0.0)
        self._wanted[version_id] = time.monotonic() + left_s + UNKNOWN_START_S
        raise (
            _does_not_start(version_id, left_s)
            if broken
            else NoReplica(
                f"{version_id} has no ready replica; one is being started and needs about {math.ceil(left_s)} s",
                retry_after_s=left_s,
            )
        )

    def demand(self) -> dict[str, tuple[KeyDemand, ...]]:
        """Who asks for how much of which version here, for the other gateways; bounded."""
        return {version: told(line.demand()) for version, line in self.lines.items() if line or line.running}

    def elsewhere(self, key: str | None, model: str | None) -> tuple[int, int]:
        """Requests of a key or of a model at the other gateways, as they last said, and how many gateways have some."""
        return self._elsewhere[key, model], self._gateways_with[key, model]

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

    def may_sleep(self) -> bool:
        """Whether any version may have no replica."""
        return any(len(m.required) < len(m.versions) for m in self.models.values())

    def starting_on(self, node: str, now: float) -> bool:
        """Whether an engine starts on that node, which takes its cores; `now` is epoch seconds by its clock. A replica that waits
        because the starts before it failed starts none yet, and one that takes long waits for something else: either may go on
        for ever."""
        return any(
            e.state is State.STARTING
            and e.node == node
            and e.waits_until <= now < max(e.started_at, e.waits_until) + BUSY_START_S
            for e in self._endpoints.values()
        )

    def replica_counts(self) -> dict[tuple[str, ...], float]:
        """Per model, version and state; 0 too for versions of the catalog, so that one without a replica is seen to be so."""
        counts: dict[tuple[str, ...], float] = {
            (m.name, v, str(s)): 0 for m in self.catalog.models for v in m.versions for s in SHOWN_STATES
        }
        for e in self._endpoints.values():
            line = self.lines.get(e.version_id)
            # Of a replica whose process was killed nobody tells; the directory waits for its lease to end.
            gone = line is not None and line.gone(e.id)
            key = e.model, e.version, str(State.FAILED if gone and e.state is State.READY else e.state)
            counts[key] = counts.get(key, 0) + 1
        return counts

    def required(self) -> dict[tuple[str, ...], float]:
        """Per model and version: 1 when it must have a ready replica, 0 when it may sleep."""
        return {(m.name, v): float(v in m.required) for m in self.catalog.models for v in m.versions}

    def _hear(self, snapshot: Snapshot) -> None:
        """Who the gateways are, and what they tell of engines that died. While a new directory's table may be incomplete, what
        each told before counts as well, until it speaks again: the table may lack it, or have kept an older word."""
        here, now = {g.id: g for g in snapshot.gateways}, self._clock()
        if snapshot.epoch != self._epoch:
            new = {g: (d, now + TOLD_BEFORE_S) for g, d in self._told.items()}
            self._epoch, self._told_before = snapshot.epoch, new | self._told_before
        before = {} if snapshot.complete else self._told_before
        self._told_before = {g: (d, until) for g, (d, until) in before.items() if g not in here and now < until}
        self._told = {**snapshot.left, **here}
        silent = (g for g, _ in self._told_before.values() if isinstance(g, GatewayInfo))
        self.gateways = (*snapshot.gateways, *silent)
        every = (*here.items(), *snapshot.left.items(), *((g, d) for g, (d, _) in self._told_before.items()))
        self.fuse.hear([d for g, d in every if g != self.gateway_id and d.deaths], snapshot.died)

    def _count_elsewhere(self) -> None:
        self._elsewhere.clear()
        self._gateways_with.clear()
        for g in self.gateways:
            if g.id == self.gateway_id:
                continue
            there: Counter[tuple[str | None, str | None]] = Counter()
            for version, demand in g.demand.items():
                model = version.partition("@")[0]
                for d in demand:
                    there[d.key, None] += d.held + d.running
                    there[None, model] += d.held + d.running
            self._elsewhere.update(there)
            self._gateways_with.update(at for at, n in there.items() if n)

    def _lines_of(self, model: ModelConfig) -> Iterator[VersionLine]:
        ids = (f"{model.name}@{v}" for v in model.versions)
        # `model` may be of an earlier catalog, and the version gone since.
        return (line for i in ids if (line := self.lines.get(i)) is not None)

    def _distribute(self, *, only_add: bool) -> None:
        by_version: dict[str, list[Endpoint]] = {v: [] for v in self.lines}
        for e in self._endpoints.values():
            if e.version_id in by_version and e.state is not State.STOPPED:
                by_version[e.version_id].append(e)
        for version, endpoints in by_version.items():
            self.lines[version].update(endpoints, only_add=only_add)
        self.asleep = frozenset(v for v, line in self.lines.items() if not line.ready_ids())
        for version in self.asleep & self._facts.keys():
            facts = self._facts[version]
            if any(e.state is State.SUSPECT for e in by_version[version]):
                continue  # it may be well again any moment
            if _broken(facts, by_version[version]) and len(self.lines[version]):
                failed = counted(facts.failures, "start")
                log.warning("%s: %s failed, nobody waits for it: %s", version, failed, facts.reason)
                left_s = max(UNKNOWN_START_S, facts.failed_at + retry_delay_s(facts) - time.time())
                self.lines[version].refuse_all(functools.partial(_does_not_start, version, left_s))


def _broken(facts: VersionFacts, endpoints: Iterable[Endpoint]) -> bool:
    """Its starts failed too often, and none of another engine, which may be the mended one, or on another node is under way."""
    return facts.failures >= START_TRIES and not any(
        e.state is State.STARTING and not failed_there(facts, e.spec, e.node) for e in endpoints
    )


def _does_not_start(version_id: str, retry_after_s: float) -> NoReplica:
    """Why is in the log and in `steelyard scale explain`: it may name paths and machines."""
    return NoReplica(f"{version_id} has no ready replica: its engine does not start", retry_after_s=retry_after_s)


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
