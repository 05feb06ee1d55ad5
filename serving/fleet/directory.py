"""The directory: a named, restartable Ray actor that knows who is alive, where, and how loaded.

Never on the data path: gateways long-poll it and keep the last table while it is away; replicas announce themselves
whole twice a second, so a restarted directory is complete within `SETTLE_S`.

It sits on the head, as Serve's controller does: all control is away together and comes back together. There it also hands the
head's keys file (hashes, never a key) to the gateways of the other nodes, and keeps the number of gateways.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry

from serving import tasks
from serving.fleet import history, keeper
from serving.fleet.endpoint import (
    CRASH_WINDOW_S,
    CRASHES_KEPT,
    DEATHS_REMEMBERED_S,
    Deaths,
    Endpoint,
    Failure,
    GatewayInfo,
    GpuReport,
    Snapshot,
    State,
    Target,
    VersionFacts,
    failed_there,
    quarantined_until,
    quarantines,
    retry_delay_s,
    with_node,
)
from serving.fleet.history import Change, History, Kept
from serving.fleet.lifeline import Lifelines
from serving.settings import load_settings
from serving.telemetry import logs
from serving.telemetry.metrics import DirectoryMetrics, set_all

log = logging.getLogger(__name__)

T = TypeVar("T")

NAME = "directory"
NAMESPACE = "steelyard"
REPORT_EVERY_S = 0.5
LEASE_S = 5.0  # an entry not renewed for this long is gone: its process or node died without a word
# So long, when nobody listens there any more: who lives, as a gateway does that drains, renews it twice as often.
DOUBTED_S = 1.0
FAILED_KEPT_S = 60.0  # how long a FAILED entry stays to tell why
# A restarted directory's table may lack some for this long: a report that waits for it gives up after `CALL_S`, and Ray
# needs a moment to reconnect. Until then gateways forget nobody.
SETTLE_S = 15.0
CALL_S = 5.0
REPORT_CALL_S = 2.0  # of one report: a lease outlasts one that hangs, and the next one is told in time
JANITOR_EVERY_S = 0.5
STOOD_STILL_S = 1.0  # this process did not run for longer than that: nobody's silence in it says anything
FACTS_KEPT = 1024  # versions that are remembered
LEFT_KEPT = 4096  # requests inside engines that died, as gateways told that have left
KEPT_FILE = "directory.json"
KEEP_EVERY_S = 2.0  # what changed of what outlives the directory is written
LOAD_NEWS_EVERY_S = 0.25  # load alone wakes pollers at most this often; a state change wakes them at once


class Table:
    """The directory's state without Ray: entries with leases, and a change number. Times are monotonic seconds.

    The number changes by `publish` alone, so that pollers hear of loads at a pace of the directory's choosing, however
    many replicas there are.
    """

    def __init__(
        self,
        now: float,
        wall: Callable[[], float] = time.time,
        ready_after_s: Mapping[str, float] | None = None,
        deaths: Mapping[str, Deaths] | None = None,
        died: Mapping[str, float] | None = None,
    ) -> None:
        self._wall = wall
        self.epoch = uuid.uuid4().hex
        self.number = 0
        self.unpublished = False  # something changed since the last `publish`
        self.keys = ""
        self._born = now
        self._went_on_at: float | None = None  # the last time that anything happened; None until the janitor begins
        self._paused_at = -math.inf  # when the last pause was over
        self._endpoints: dict[str, tuple[Endpoint, float]] = {}
        self._gateways: dict[str, tuple[GatewayInfo, float]] = {}
        self._targets: dict[str, tuple[Target, float]] = {}
        self._gpu_busy: dict[str, tuple[dict[str, float], float]] = {}  # by the exporter's target
        self._facts = {v: VersionFacts(ready_after_s=s) for v, s in (ready_after_s or {}).items()}
        # What gateways told, by their id, last changed last. Of one that left it stays: its own word would take it back.
        self._deaths = dict(deaths or {})
        engines = {e for told in self._deaths.values() for inside in told.deaths.values() for e in inside}
        self._died = dict.fromkeys(engines, wall()) | dict(died or {})  # engine -> epoch seconds of its death
        self._forget_deaths()

    def begin(self, now: float) -> None:
        """The first call has come: nobody's silence until now says anything."""
        self._born = self._went_on_at = now

    def ready_after_s(self) -> dict[str, float]:
        """How long the last start of each version took."""
        return {v: f.ready_after_s for v, f in self._facts.items() if f.ready_after_s is not None}

    def announce(self, endpoint: Endpoint, now: float) -> bool:
        """Upserts; True when anything but load changed, so that pollers must hear of it at once."""
        self._go_on(now)
        known = self._endpoints.get(endpoint.id)
        self._remember(endpoint, None if known is None else known[0])
        if endpoint.state is State.STOPPED:
            self._endpoints.pop(endpoint.id, None)
        else:
            lease = FAILED_KEPT_S if endpoint.state is State.FAILED else LEASE_S
            self._endpoints[endpoint.id] = (endpoint, now + lease)
        self.unpublished |= known is None or known[0] != endpoint
        return known is None or known[0].state is not endpoint.state or known[0].url != endpoint.url

    def announce_gateway(self, gateway: GatewayInfo, now: float) -> bool:
        """Upserts; True when it is new, begins to hold requests for a version that must be woken, or has seen an engine die."""
        self._go_on(now)
        known = self._gateways.get(gateway.id)
        new = known is None or _crimes(known[0]) != _crimes(gateway)
        if new:
            self._note_deaths(gateway)
        gateway = msgspec.structs.replace(gateway, died={})  # in `_died` from the first time on
        self._gateways[gateway.id] = (gateway, now + LEASE_S)
        self.unpublished |= known is None or known[0] != gateway
        if known is None or new:
            return True
        begun = gateway.held.keys() - known[0].held.keys()
        return bool(begun) and bool(
            begun - {e.version_id for e, _ in self._endpoints.values() if e.state is State.READY}
        )

    def announce_target(self, target: Target, now: float) -> bool:
        """Upserts; True when it is new or another."""
        self._go_on(now)
        known = self._targets.get(target.id)
        self._targets[target.id] = (target, now + LEASE_S)
        new = known is None or known[0] != target
        self.unpublished |= new
        return new

    def report_gpus(self, report: GpuReport, now: float) -> bool:
        """Upserts the exporter's target and what it saw; True when the target is new or another."""
        self._go_on(now)
        known = self._gpu_busy.get(report.target.id)
        self._gpu_busy[report.target.id] = (report.busy, now + LEASE_S)
        self.unpublished |= known is None or known[0] != report.busy
        return self.announce_target(report.target, now)

    def facts(self, version_id: str) -> VersionFacts:
        return self._facts.get(version_id, VersionFacts())

    def holders(self, node: str, now: float) -> Snapshot:
        """The part of the table that is replicas with GPUs of `node`. Not those that failed: another may have them already."""
        self._go_on(now)
        failed = State.FAILED
        found = tuple(e for e, _ in self._endpoints.values() if e.node == node and e.gpus and e.state is not failed)
        return Snapshot(epoch=self.epoch, number=self.number, complete=now - self._born >= SETTLE_S, endpoints=found)

    def endpoint(self, endpoint_id: str) -> Endpoint | None:
        known = self._endpoints.get(endpoint_id)
        return None if known is None else known[0]

    def start_delay_s(self, version_id: str, spec: str, node: str = "") -> float:
        """How long a replica waits before it starts the engine of digest `spec`: earlier starts of it failed, or it failed on
        that node, again and again, while it served."""
        facts, now = self.facts(version_id), self._wall()
        # Who failed on other nodes alone says nothing of this one: there it is tried.
        delay_s = facts.failed_at + retry_delay_s(facts) - now if failed_there(facts, spec, node) else 0.0
        alone = not any(e.version_id == version_id and e.state is State.READY for e, _ in self._endpoints.values())
        return max(0.0, delay_s, quarantined_until(facts, spec, node, now, alone=alone) - now)

    def quarantined(self) -> dict[tuple[str, str], float]:
        """(version id, node) -> seconds that are left."""
        now = self._wall()
        return {(v, n): until - now for v, f in self._facts.items() for n, (until, _) in quarantines(f, now).items()}

    def forget_failures(self) -> None:
        """An operator changed something: the next starts wait for nothing, and what only gateways that left had told of deaths,
        which none of them can take back, is held against no request."""
        for version_id, facts in self._facts.items():
            self._facts[version_id] = VersionFacts(ready_after_s=facts.ready_after_s)
        self._deaths = {g: told for g, told in self._deaths.items() if g in self._gateways}
        self.unpublished = True

    def _remember(self, endpoint: Endpoint, before: Endpoint | None) -> None:
        """What outlives the replica: how long its start took, or that it failed. Told by its change of state, once."""
        if before is not None and (before.state is endpoint.state or before.state is State.DRAINING):
            return  # it was to go anyway
        version_id, facts, now = endpoint.version_id, self.facts(endpoint.version_id), self._wall()
        crashes = tuple(c for c in facts.crashes if now - c.at < CRASH_WINDOW_S)[-CRASHES_KEPT + 1 :]
        if endpoint.state is State.READY:
            if (before is None and facts.ready_after_s is not None) or (before and before.state is State.SUSPECT):
                return  # it tells a restarted directory of a start long ago, or was ready all the time
            facts = VersionFacts(ready_after_s=endpoint.ready_after_s, crashes=crashes)
        elif endpoint.state is State.FAILED and endpoint.ready_after_s is not None:
            failure = Failure(now, endpoint.node, endpoint.spec, endpoint.fault, endpoint.reason)
            facts = msgspec.structs.replace(facts, crashes=(*crashes, failure))
        elif endpoint.state is State.FAILED:
            facts = VersionFacts(
                ready_after_s=facts.ready_after_s,
                failures=facts.failures + 1 if facts.spec == endpoint.spec else 1,
                failed_on=with_node(facts.failed_on if facts.spec == endpoint.spec else (), endpoint.node),
                failed_at=now,
                reason=endpoint.reason,
                spec=endpoint.spec,
                crashes=crashes,
            )
        else:
            return
        self._facts.pop(version_id, None)
        self._facts[version_id] = facts
        if len(self._facts) > FACTS_KEPT:
            del self._facts[next(iter(self._facts))]

    def _note_deaths(self, gateway: GatewayInfo) -> None:
        self._deaths.pop(gateway.id, None)
        if gateway.deaths:
            self._deaths[gateway.id] = Deaths(*_crimes(gateway))
            now = self._wall()
            for engine in (e for engines in gateway.deaths.values() for e in engines):
                self._died.setdefault(engine, now - gateway.died.get(engine, 0.0))

    def deaths(self) -> tuple[dict[str, Deaths], dict[str, float]]:
        """What the gateways told, those that left included, and when the engines died (epoch seconds)."""
        return dict(self._deaths), dict(self._died)

    def _notice_the_clock(self) -> None:
        """Where it was set back: what failed has not failed in the future, or a pause would last as much longer."""
        now = self._wall()
        for version_id, f in self._facts.items():
            if f.failed_at > now or any(c.at > now for c in f.crashes):
                crashes = tuple(msgspec.structs.replace(c, at=min(c.at, now)) for c in f.crashes)
                self._facts[version_id] = msgspec.structs.replace(f, failed_at=min(f.failed_at, now), crashes=crashes)
                self.unpublished = True

    def _forget_deaths(self) -> None:
        """Of gateways that left: what is too old, and what is too much. Those that live forget for themselves, and tell."""
        if not self._died:
            return
        now, room = self._wall(), LEFT_KEPT
        if max(self._died.values()) > now:  # the clock was set back: else they would be remembered for as long
            self._died = {e: min(at, now) for e, at in self._died.items()}
        since = now - DEATHS_REMEMBERED_S
        late = frozenset(e for e, at in self._died.items() if at <= since)
        for gateway_id in [g for g in reversed(self._deaths) if g not in self._gateways]:
            left = _without(self._deaths[gateway_id], late) if late else self._deaths[gateway_id]
            room -= len(left.deaths)
            self._deaths[gateway_id] = left
            if not left.deaths or room < 0:
                del self._deaths[gateway_id]
        if late:
            told = {e for d in self._deaths.values() for engines in d.deaths.values() for e in engines}
            self._died = {e: at for e, at in self._died.items() if e not in late or e in told}

    def doubt(self, name: str, now: float) -> float:
        """Its listener ended. Shortens its lease, to so many seconds; 0 for what is not in the table, or has failed."""
        self._go_on(now)
        if name in self._endpoints and self._endpoints[name][0].state is not State.FAILED:
            endpoint, until = self._endpoints[name]
            self._endpoints[name] = endpoint, min(until, now + DOUBTED_S)
        elif name in self._gateways:
            gateway, until = self._gateways[name]
            self._gateways[name] = gateway, min(until, now + DOUBTED_S)
        else:
            return 0.0
        return DOUBTED_S

    def listeners(self) -> dict[str, str]:
        """What is there, by id, and where it listens."""
        up = {i: e.url for i, (e, _) in self._endpoints.items() if e.url and e.state is not State.FAILED}
        return up | {i: g.url for i, (g, _) in self._gateways.items() if g.url}

    def withdraw_gateway(self, gateway_id: str) -> bool:
        known = self._gateways.pop(gateway_id, None) is not None
        self.unpublished |= known
        return known

    def set_keys(self, digest: str) -> bool:
        """The keys file is another one; True when it is."""
        new = digest != self.keys
        self.keys = digest
        self.unpublished |= new
        return new

    def expire(self, now: float) -> bool:
        """Drops entries whose lease ran out; True when there were any. Each `JANITOR_EVERY_S`, and when a doubt is over."""
        self._went_on_at = now if self._went_on_at is None else self._went_on_at
        self._go_on(now)
        self._forget_deaths()
        self._notice_the_clock()
        gone = [(table, i) for table in self._leased() for i, (_, until) in table.items() if until < now]
        for table, i in gone:
            del table[i]
        self.unpublished |= bool(gone)
        return bool(gone)

    def _go_on(self, now: float) -> None:
        """Before whatever reads or grants leases. Nothing for longer than the janitor's pace means a process, or a machine, that
        was paused or starved: reports wait in this process's sockets, behind this, so all leases last so much longer."""
        if self._went_on_at is None:
            return
        gap_s, self._went_on_at = now - self._went_on_at, now
        if gap_s - JANITOR_EVERY_S > STOOD_STILL_S:
            log.warning("the directory stood still for %.1f s", gap_s)
            # Not all of one pause after another: for those who are starved time would stand still, and no lease would end.
            late_s = gap_s if now - gap_s - self._paused_at > LEASE_S else gap_s - JANITOR_EVERY_S
            self._paused_at = now
            self._born += late_s  # who had not told of himself yet could not meanwhile
            for table in self._leased():
                table.update({i: (entry, until + late_s) for i, (entry, until) in table.items()})

    def _leased(self) -> tuple[dict[str, tuple[Any, float]], ...]:
        return self._endpoints, self._gateways, self._targets, self._gpu_busy

    def publish(self) -> None:
        """Makes what changed a new number."""
        self.number += self.unpublished
        self.unpublished = False

    def snapshot(self, now: float) -> Snapshot:
        self._go_on(now)
        return Snapshot(
            epoch=self.epoch,
            number=self.number,
            complete=now - self._born >= SETTLE_S,
            endpoints=tuple(e for e, _ in self._endpoints.values()),
            gateways=tuple(g for g, _ in self._gateways.values()),
            targets=tuple(t for t, _ in self._targets.values()),
            gpu_busy={replica: share for busy, _ in self._gpu_busy.values() for replica, share in busy.items()},
            versions=dict(self._facts),
            keys=self.keys,
            left={g: d for g, d in self._deaths.items() if g not in self._gateways},
            died={e: max(0.0, self._wall() - at) for e, at in self._died.items()},
        )


def _crimes(told: Deaths) -> tuple[Any, ...]:
    return told.deaths, told.trials, told.suspects


def _without(told: Deaths, late: frozenset[str]) -> Deaths:
    """Without the requests of which all engines died too long ago."""
    if late.isdisjoint(e for engines in told.deaths.values() for e in engines):
        return told
    deaths = {p: engines for p, engines in told.deaths.items() if not late.issuperset(engines)}
    trials = {e: (p, s) for e, (p, s) in told.trials.items() if p in deaths}
    return Deaths(deaths, trials, tuple(p for p in told.suspects if p in deaths))


def pack(value: Any) -> bytes:
    """What goes between processes. Not Ray's pickle: while a cluster is upgraded node by node, they are of two releases, and
    what one does not know of the other's nouns must be skipped, or be its default."""
    return msgspec.msgpack.encode(value)


def unpack(data: bytes, kind: type[T]) -> T:
    return msgspec.msgpack.decode(data, type=kind)


class Directory:
    """The actor around `Table`. Async: thousands of pollers wait on one condition. Nouns come and go as `pack` makes them."""

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self._load_news: asyncio.TimerHandle | None = None
        self._janitor: asyncio.Task[None] | None = None
        self._keepers: list[asyncio.Task[None]] = []
        settings = load_settings()
        self._log = logs.setup("directory", settings.log_dir)
        self._kept_file = settings.state_dir / KEPT_FILE
        self._kept = history.read(self._kept_file)  # as it is on disk
        kept = self._kept
        self._table = Table(time.monotonic(), ready_after_s=kept.ready_after_s, deaths=kept.deaths, died=kept.died)
        self._history = History(self._kept.changes)
        self._metrics = DirectoryMetrics(CollectorRegistry())
        self._metrics.before_text = self._observe
        self._lifelines = Lifelines(self._cut)
        self._on_head = settings.node_role == "head"
        self._keys_file = KeysFile(settings.keys_file) if self._on_head else None

    async def announce(self, entry: bytes) -> None:
        endpoint = unpack(entry, Endpoint)
        self._ensure_janitor()
        before = self._table.endpoint(endpoint.id)
        if before is None:
            self._metrics.seen(endpoint.model, endpoint.version)
        if endpoint.state is State.READY and before is not None and before.state is State.STARTING:
            self._metrics.started(endpoint.model, endpoint.version, endpoint.phases)
        if self._table.announce(endpoint, time.monotonic()):
            if endpoint.state in (State.SUSPECT, State.FAILED):
                self._troubled(endpoint)
            self._wake()
        else:
            self._load_changed()
        if endpoint.url and endpoint.state in (State.READY, State.SUSPECT, State.DRAINING):
            self._lifelines.hold(endpoint.id, endpoint.url)

    def _cut(self, name: str) -> None:
        """Its process has ended, or its listener: gone from the table soon, unless it says that it lives."""
        within_s = self._table.doubt(name, time.monotonic())
        if within_s:
            log.info("nobody listens for %s any more", name)
            asyncio.get_running_loop().call_later(within_s + 0.01, self._expire)

    def _expire(self) -> None:
        if self._table.expire(time.monotonic()):
            self._wake()

    def _troubled(self, endpoint: Endpoint) -> None:
        log.warning("%s is %s: %s", endpoint.id, endpoint.state, endpoint.reason)
        self._metrics.troubled(endpoint.model, endpoint.version, str(endpoint.state), endpoint.fault)
        left_s = self._table.quarantined().get((endpoint.version_id, endpoint.node))
        if left_s is not None and endpoint.state is State.FAILED:
            log.error("%s is quarantined on %s for %.0f s", endpoint.version_id, endpoint.node, left_s)

    async def announce_gateway(self, entry: bytes) -> None:
        self._ensure_janitor()
        gateway = unpack(entry, GatewayInfo)
        if self._table.announce_gateway(gateway, time.monotonic()):
            self._wake()
        else:
            self._load_changed()
        self._lifelines.hold(gateway.id, gateway.url)

    async def announce_target(self, entry: bytes) -> None:
        """A process with metrics that is neither gateway nor replica; renewed within `LEASE_S`."""
        self._ensure_janitor()
        if self._table.announce_target(unpack(entry, Target), time.monotonic()):
            self._wake()

    async def report_gpus(self, entry: bytes) -> bytes:
        """A node's GPU exporter; renewed within `LEASE_S`. Returns the replicas of that node, which it joins to their GPUs."""
        self._ensure_janitor()
        report = unpack(entry, GpuReport)
        if self._table.report_gpus(report, time.monotonic()):
            self._wake()
        else:
            self._load_changed()
        return pack(self._table.holders(report.target.node, time.monotonic()))

    def _load_changed(self) -> None:
        if self._table.unpublished and self._load_news is None:
            self._load_news = asyncio.get_running_loop().call_later(LOAD_NEWS_EVERY_S, self._wake)

    async def withdraw_gateway(self, gateway_id: str) -> None:
        if self._table.withdraw_gateway(gateway_id):
            self._wake()

    async def wait(self, epoch: str, number: int, timeout_s: float) -> bytes:
        """Long poll: returns a Snapshot when the table is newer than (epoch, number), or after `timeout_s`."""
        self._ensure_janitor()
        if (self._table.epoch, self._table.number) == (epoch, number):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), timeout_s)
        return pack(self._table.snapshot(time.monotonic()))

    async def snapshot(self) -> bytes:
        self._ensure_janitor()
        return pack(self._table.snapshot(time.monotonic()))

    async def keys(self) -> bytes:
        """The head's keys file, for the gateways of other nodes."""
        return self._keys_file.content if self._keys_file is not None else b""

    async def start_delay(self, version_id: str, spec: str, node: str = "") -> float:
        """Asked by a replica before it starts its engine: seconds to wait."""
        return self._table.start_delay_s(version_id, spec, node)

    async def forget_failures(self) -> None:
        """Asked by `steelyard up`: what failed may be mended, so replicas that wait try again now."""
        self._table.forget_failures()
        self._wake()

    async def scaled(self, changes: bytes) -> None:
        """The policy changed counts: one line in the log each, counted, and kept for `steelyard scale explain`."""
        for change in unpack(changes, list[Change]):
            self._history.add(change)
            model, _, version = change.version_id.partition("@")
            self._metrics.scale_decisions.labels(model, version, change.direction, change.cause).inc()
            log.info(
                "scale %s %s: %d -> %d: %s", change.version_id, change.cause, change.before, change.after, change.reason
            )

    async def history(self, version_id: str) -> bytes:
        """The last changes of one version, oldest first."""
        return pack(self._history.of(version_id))

    async def metrics(self) -> str:
        """Its own exposition; a gateway that is scraped puts it among the others'."""
        return self._metrics.text()

    async def _keep_for_ever(self) -> None:
        """Writes what the next directory should know."""
        while True:
            await asyncio.sleep(KEEP_EVERY_S)
            deaths, died = self._table.deaths()
            kept = Kept(
                ready_after_s=self._table.ready_after_s(), changes=self._history.all(), deaths=deaths, died=died
            )
            if kept == self._kept:
                continue
            try:
                await asyncio.to_thread(history.write, self._kept_file, kept)
            except OSError as e:
                log.warning("cannot write %s: %s", self._kept_file, e.strerror)
            self._kept = kept  # tried again when there is more to tell

    def _observe(self) -> None:
        health: dict[tuple[str, ...], float] = {
            (e.model, e.version, e.id, e.node): float(e.state not in (State.SUSPECT, State.FAILED))
            for e in self._table.snapshot(time.monotonic()).endpoints
            if e.state is not State.STARTING
        }
        set_all(self._metrics.health, health)
        left_s = self._table.quarantined()
        set_all(self._metrics.quarantined, {(*v.split("@", 1), node): s for (v, node), s in left_s.items()})

    def _wake(self) -> None:
        if self._load_news is not None:
            self._load_news.cancel()
            self._load_news = None
        self._table.publish()
        self._news.set()
        self._news = asyncio.Event()

    def _ensure_janitor(self) -> None:
        if self._janitor is None:
            self._table.begin(time.monotonic())
            self._janitor = tasks.for_ever("tidying the table", self._tidy_for_ever)
            self._keepers = [
                tasks.for_ever("keeping GPU exporters", keeper.keep_gpu_exporters),
                tasks.for_ever("writing what outlives the directory", self._keep_for_ever),
            ]
            if self._on_head:
                self._keepers.append(tasks.for_ever("keeping gateways", keeper.keep_gateways))

    async def _tidy_for_ever(self) -> None:
        while True:
            try:
                news = self._table.expire(time.monotonic())
                self._lifelines.keep(self._table.listeners())
                if self._keys_file is not None and await asyncio.to_thread(self._keys_file.changed):
                    news |= self._table.set_keys(self._keys_file.digest)
                if news:
                    self._wake()
            except Exception:  # leases and revocations must go on whatever one round met
                log.exception("a round of the directory's tidying failed")
            await asyncio.sleep(JANITOR_EVERY_S)


class KeysFile:
    """The head's keys file as bytes; who reads them knows what they mean. A file that is away keeps the last content: keys
    are taken back by a revocation inside the file, not by its absence."""

    def __init__(self, path: Path) -> None:
        self.content = b""
        self.digest = ""
        self._path = path
        self._seen: tuple[int, int, int] | None = None

    def changed(self) -> bool:
        """Reads the file again if it was replaced; True when its content is another."""
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen == self._seen:
                return False
            self.content = self._path.read_bytes()
        except OSError:
            return False
        self._seen = seen
        before, self.digest = self.digest, hashlib.sha256(self.content).hexdigest()
        return self.digest != before


def handle() -> Any:
    """The directory's actor handle, created on first use. Detached, so that it outlives whoever came first. Blocks, for as
    long as the control store is away: an event loop takes a `Client`."""
    import ray
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME

    return (
        ray.remote(Directory)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            resources={HEAD_NODE_RESOURCE_NAME: 0.001},
            max_concurrency=10_000,
        )
        .remote()
    )


class Client:
    """The directory for an event loop that must never stop: looked up in a thread, and the handle is kept, since one of an
    actor that restarts stays good."""

    def __init__(self) -> None:
        self._lookup: asyncio.Task[Any] | None = None

    async def call(self, method: str, *args: Any, timeout_s: float = CALL_S) -> Any:
        """Raises TimeoutError or any Ray error while the directory is away."""
        import ray

        if self._lookup is None or (self._lookup.done() and self._lookup.exception() is not None):
            self._lookup = asyncio.create_task(asyncio.to_thread(handle))
        try:
            async with asyncio.timeout(timeout_s):
                # Shielded: a thread that waits for the control store cannot be cancelled, so one is enough.
                actor = await asyncio.shield(self._lookup)
                return await getattr(actor, method).remote(*args)
        except ray.exceptions.ActorDiedError:  # gone for good, not restarting: another is made
            self._lookup = None
            raise


async def follow(on_snapshot: Callable[[Snapshot], Awaitable[None] | None], client: Client | None = None) -> None:
    """Long-polls for ever and calls back with each snapshot; a directory that is away is waited for, quietly."""
    client = client or Client()
    epoch, number, away = "", -1, False
    while True:
        try:
            snapshot = unpack(await client.call("wait", epoch, number, 10.0, timeout_s=20.0), Snapshot)
            epoch, number = snapshot.epoch, snapshot.number
            result = on_snapshot(snapshot)
            if result is not None:
                await result
            if away:
                log.info("the directory is back")
            away = False
        except asyncio.CancelledError:
            raise
        except Exception as e:  # any Ray error: the last table stays good
            if not away:
                log.warning("the directory is away, keeping the last table: %s", type(e).__name__)
            away = True
            await asyncio.sleep(0.5)
