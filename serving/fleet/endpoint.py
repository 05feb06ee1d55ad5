"""The noun of the fleet: an endpoint is one replica's URL, state and load, as the directory tells the gateways."""

from __future__ import annotations

from enum import StrEnum

import msgspec

GATEWAY_APP = "gateway"  # the gateways' Serve application; every other one is `<model>@<version>`
GATEWAY_DEPLOYMENT = "gateway"


class State(StrEnum):
    """A replica's life: STARTING -> READY -> DRAINING -> STOPPED, FAILED from any but STOPPED. SUSPECT is a READY one that
    does not prove to be well: it gets no new work, and is READY again, or FAILED, within a minute."""

    STARTING = "STARTING"
    READY = "READY"
    SUSPECT = "SUSPECT"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"

    @classmethod
    def _missing_(cls, value: object) -> State:
        """A newer release's state: whatever it is, it is not READY. One unknown word must not cost the whole table."""
        return cls.SUSPECT


_NEXT: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.READY, State.DRAINING, State.FAILED}),
    State.READY: frozenset({State.SUSPECT, State.DRAINING, State.FAILED}),
    State.SUSPECT: frozenset({State.READY, State.DRAINING, State.FAILED}),
    State.DRAINING: frozenset({State.STOPPED, State.FAILED}),
    State.STOPPED: frozenset(),
    State.FAILED: frozenset({State.STOPPED}),
}


def advance(now: State, to: State) -> State:
    """`to`, when a replica in state `now` may become that; raises RuntimeError otherwise."""
    if to not in _NEXT[now]:
        raise RuntimeError(f"a replica cannot go from {now} to {to}")
    return to


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica announces, whole, every time: a restarted directory is complete after one round."""

    id: str
    model: str
    version: str
    url: str
    state: State
    slots: int
    kv_tokens: int | None = None  # that the engine's KV cache holds; None where it does not say
    in_flight: int = 0  # generations inside the door, whoever sent them
    tokens: int = 0  # that they may take at most, as their gateways estimated
    waiting: int = 0  # of those, waiting in the engine's own queue
    kv_usage: float = 0.0  # share of KV cache blocks in use, 0..1
    stuck_after_s: float = 0.0  # without a step, while it has work, it is SUSPECT; 0 while it is not looked at
    max_model_len: int | None = None  # tokens
    adapters: tuple[str, ...] | None = None  # that it has loaded; None: it does not say
    reason: str = ""  # why SUSPECT or FAILED, one line
    fault: str = ""  # the same in a word: process, silent, health, stuck, refuses, start
    node: str = ""
    gpus: tuple[str, ...] = ()  # of that node which Ray gave it: indices, or UUIDs where the node was given such
    started_at: float = 0.0  # epoch seconds
    ready_after_s: float | None = None  # spawn to first token
    phases: dict[str, float] = {}  # seconds of a start: spawn (of the process), health, first_token
    waits_until: float = 0.0  # epoch seconds; STARTING, but no earlier, because the starts before it failed
    spec: str = ""  # digest of what identifies the engine: failures of another one say nothing about this one

    @property
    def version_id(self) -> str:
        return f"{self.model}@{self.version}"


class KeyDemand(msgspec.Struct, frozen=True, array_like=True):
    """One API key's requests of one class at one gateway, for one version."""

    key: str  # id
    rank: int  # of the class, 0 first
    weight: float
    held: int
    running: int


DEATHS_REMEMBERED_S = 600.0  # of engines, with the requests that were inside


class Deaths(msgspec.Struct, frozen=True):
    """What a gateway tells of the engines that died under its requests; bounded."""

    deaths: dict[
        str, tuple[str, ...]
    ] = {}  # fingerprint of a request -> engines that died with it inside, in this order
    trials: dict[str, tuple[str, float]] = {}  # engine that died -> who was on trial there, for how many seconds
    suspects: tuple[str, ...] = ()  # those of them that had no answer yet


class GatewayInfo(Deaths, frozen=True, kw_only=True):
    """A gateway's own entry: where its private listener answers metrics scrapes (cluster secret needed)."""

    id: str
    url: str
    node: str = ""
    held: dict[str, int] = {}  # version id -> requests that wait for it here, or were told to come back when it is up
    arrived: dict[str, int] = {}  # version id -> requests that asked for a slot since this gateway started
    finished: dict[str, int] = {}  # of them, answered by an engine to the end
    demand: dict[str, tuple[KeyDemand, ...]] = {}  # version id -> who asks for how much, bounded
    died: dict[
        str, float
    ] = {}  # engine that died -> how many seconds before this was told; the table's own is `Snapshot.died`


class Failure(msgspec.Struct, frozen=True):
    """A replica that failed after it had served."""

    at: float  # epoch seconds
    node: str
    spec: str  # digest of its engine
    fault: str  # in a word
    reason: str  # one line; for operators, not for clients


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A process whose Prometheus text gateways hand on, at `/metrics` and each alone by `/metrics/targets`. Gateways and
    engines have one by their own entry; whatever else has metrics (a node's GPU exporter) announces this one, whole and as
    often as a replica its endpoint. It answers whoever has the cluster secret, and nobody else."""

    id: str  # unique in the cluster, e.g. gpu#10.0.0.7; becomes the label `instance`
    component: str  # gateway, engine, directory, gpu
    url: str  # of the exposition itself; empty where the gateway has another way
    node: str = ""
    labels: dict[str, str] = {}  # beside `component`, `instance` and `node`: put on every series of it

    @property
    def joined(self) -> dict[str, str]:
        """What tells its series from those of others."""
        node = {"node": self.node} if self.node else {}
        return {"component": self.component, "instance": self.id, **node, **self.labels}


class GpuReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a node's GPU exporter tells the directory."""

    target: Target
    busy: dict[str, float] = {}  # replica id -> share of time that its GPUs worked, 0..1


class VersionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the directory remembers of a version, also when it has no replica."""

    ready_after_s: float | None = None  # of the last start: spawn to first token
    failures: int = 0  # starts that failed since the last one that did not
    failed_on: tuple[str, ...] = ()  # nodes of them, bounded
    failed_at: float = 0.0  # epoch seconds of the last of them
    reason: str = ""  # of the last of them, one line; for operators, not for clients
    spec: str = ""  # digest of the engine that failed
    crashes: tuple[Failure, ...] = ()  # of the last `CRASH_WINDOW_S`, the oldest first, bounded


NODES_KEPT = 64  # on which starts of a version failed
START_TRIES = 3  # starts that may fail before the next one waits
RETRY_FIRST_S, RETRY_LONGEST_S = 10.0, 300.0
CRASH_WINDOW_S = 600.0
CRASHES_KEPT = 32
# While no other replica serves, a version's next start is the only way to an answer, whatever it will be.
ALONE_LONGEST_S = 5.0


def retry_delay_s(facts: VersionFacts) -> float:
    """Pause between the last failed start and the next, seconds: doubles with each from the third on."""
    return _doubling_s(facts.failures)


def with_node(nodes: tuple[str, ...], node: str) -> tuple[str, ...]:
    """Nodes on which starts failed, and one more."""
    return nodes if node in nodes or len(nodes) >= NODES_KEPT else (*nodes, node)


def failed_there(facts: VersionFacts, spec: str, node: str) -> bool:
    """Whether starts of that engine failed on that node, or on so many that it is not the node."""
    return facts.spec == spec and (node in facts.failed_on or len(facts.failed_on) >= NODES_KEPT)


def quarantined_until(facts: VersionFacts, spec: str, node: str, now: float, *, alone: bool = False) -> float:
    """Epoch seconds until which the engine of that digest stays away from that node, where it failed while it served as often
    as three times in ten minutes; 0 when it may start. `alone`: no replica of the version is ready."""
    there = [c for c in facts.crashes if c.spec == spec and c.node == node and now - c.at < CRASH_WINDOW_S]
    until = there[-1].at + _doubling_s(len(there)) if there else 0.0
    if alone and there:
        until = min(until, facts.crashes[-1].at + ALONE_LONGEST_S)
    return until if until > now else 0.0


def quarantines(
    facts: VersionFacts, now: float, *, alone: bool = False
) -> dict[str, tuple[float, tuple[Failure, ...]]]:
    """Node -> until when some engine of the version is quarantined there (epoch seconds), and its failures."""
    found = {}
    for spec, node in {(c.spec, c.node) for c in facts.crashes}:
        until = quarantined_until(facts, spec, node, now, alone=alone)
        if until:
            found[node] = until, tuple(c for c in facts.crashes if (c.spec, c.node) == (spec, node))
    return found


def _doubling_s(failures: int) -> float:
    if failures < START_TRIES:
        return 0.0
    return float(min(RETRY_FIRST_S * 2 ** min(failures - START_TRIES, 16), RETRY_LONGEST_S))


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The directory's table at one moment. `epoch` changes when the directory was restarted; until `complete` a
    snapshot may lack replicas that have not re-announced yet, so a reader adds from it and removes nothing."""

    epoch: str
    number: int
    complete: bool
    endpoints: tuple[Endpoint, ...] = ()
    gateways: tuple[GatewayInfo, ...] = ()
    targets: tuple[Target, ...] = ()
    gpu_busy: dict[str, float] = {}  # replica id -> share of time that its GPUs worked; only of those that are watched
    versions: dict[str, VersionFacts] = {}
    keys: str = ""  # digest of the head's keys file; empty where every node has its own
    left: dict[str, Deaths] = {}  # what gateways told that are no longer there, by their id
    died: dict[str, float] = {}  # engine that died, as any of them tells -> seconds since
