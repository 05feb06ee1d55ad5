"""What `steelyard top` shows, as data: pure, from two expositions of `/metrics` and what the directory says."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from serving.errors import counted
from serving.fleet.endpoint import Snapshot, State, quarantines
from serving.fleet.history import Change
from serving.telemetry.metrics import quantile

_TTFT = "steelyard_ttft_seconds_bucket"
_RUNNING, _WAITING, _KV = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
_GENERATED = "vllm:generation_tokens_total"
_GPU = {
    "busy": "steelyard_gpu_sm_active_ratio",
    "kernel": "steelyard_gpu_kernel_active_ratio",
    "used": "steelyard_gpu_memory_used_bytes",
    "total": "steelyard_gpu_memory_total_bytes",
    "watts": "steelyard_gpu_power_watts",
    "up": "steelyard_gpu_up",
}
# Of thousands of series only these are parsed.
_SHOWN = (
    *(_TTFT, _RUNNING, _WAITING, _KV, _GENERATED, *_GPU.values()),
    *(
        "steelyard_requests_held",
        "steelyard_requests_waiting",
        "steelyard_requests_running",
        "steelyard_requests_total",
    ),
    *("steelyard_replicas{", "steelyard_replicas_required", "steelyard_retries_total", "steelyard_target_up"),
)
SHOWN_EVENTS = 6

Labels = tuple[tuple[str, str], ...]


class Exposition(NamedTuple):
    """One scrape: `at` in seconds of any one clock, sample name -> labels -> value."""

    at: float
    samples: Mapping[str, Mapping[Labels, float]]

    def of(self, name: str) -> Mapping[Labels, float]:
        return self.samples.get(name, {})


def read(text: str, at: float) -> Exposition:
    """What a frame needs of an exposition."""
    lines = "\n".join(line for line in text.split("\n") if line.startswith(_SHOWN))
    samples: dict[str, dict[Labels, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(lines + "\n"):
        for sample in family.samples:
            samples[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
    return Exposition(at, samples)


class ReplicaRow(msgspec.Struct, frozen=True):
    id: str
    state: str
    running: int
    slots: int | None  # None: the directory was not asked
    waiting: int  # inside the engine
    kv_usage: float | None  # 0..1
    tokens_per_s: float | None
    node: str = ""
    reason: str = ""


class VersionRow(msgspec.Struct, frozen=True):
    """One version: what its gateways hold for it, and its replicas. Rates are None in a first frame."""

    id: str
    required: bool  # must have a ready replica
    states: dict[str, int]  # replicas by state, none of them 0
    running: int
    slots: int | None
    waiting: int  # in the gateways' queues
    held: int  # waiting or running
    kv_usage: float | None  # of its fullest replica
    tokens_per_s: float | None
    requests_per_s: float | None
    failed_per_s: float | None  # answered with a status of 500 or more
    ttft_p95_s: float | None  # of streams that began within the window; None without any
    replicas: list[ReplicaRow]


class GpuRow(msgspec.Struct, frozen=True):
    node: str
    index: str
    name: str
    holder: str  # replica ids; empty for none
    busy: float | None  # SM activity, 0..1; where there is none, `a kernel ran`
    exact: bool  # it is SM activity
    memory: float | None  # 0..1
    watts: float | None
    up: bool


class Event(msgspec.Struct, frozen=True):
    """A decision or a fault. `at` is epoch seconds, 0 for what is so now."""

    at: float
    what: str
    text: str


class Frame(msgspec.Struct, frozen=True):
    """One look. `directory` says whether slots, decisions and faults are known."""

    interval_s: float | None
    window_s: float | None  # of TTFT
    gateways: int
    directory: bool
    versions: list[VersionRow]
    gpus: list[GpuRow]
    decisions: list[Event]
    faults: list[Event]


def frame(
    now: Exposition,
    before: Exposition | None = None,
    window: Exposition | None = None,
    *,
    table: Snapshot | None = None,
    changes: Iterable[Change] = (),
    clock: float = 0.0,
) -> Frame:
    """The frame of `now`: rates against `before`, TTFT of what came since `window` (an older one, for enough requests).
    `table` and `changes` are the directory's; `clock` is epoch seconds."""
    window = window or before
    rows = _replicas(now, before, table)
    gateways = {dict(labels)["instance"] for labels in now.of("steelyard_requests_held") if "instance" in dict(labels)}
    recent = sorted(changes, key=lambda c: c.at)[-SHOWN_EVENTS:]
    return Frame(
        interval_s=now.at - before.at if before else None,
        window_s=now.at - window.at if window else None,
        gateways=len(gateways),
        directory=table is not None,
        versions=[_version(v, now, before, window, rows.get(v, [])) for v in _version_ids(now, rows)],
        gpus=_gpus(now),
        decisions=[Event(c.at, c.version_id, f"{c.before} -> {c.after}  {c.cause}: {c.reason}") for c in recent],
        faults=[*_past_faults(table)[-SHOWN_EVENTS:], *_faults_now(now, table, clock)],
    )


# -- versions and replicas -----------------------------------------------------------------------------------------


def _version_ids(now: Exposition, rows: Mapping[str, Sequence[ReplicaRow]]) -> list[str]:
    named = {_id(dict(labels)) for labels in now.of("steelyard_replicas")}
    return sorted((named | set(rows)) - {""})


def _id(labels: Mapping[str, str]) -> str:
    model, version = labels.get("model"), labels.get("version")
    return f"{model}@{version}" if model and version else ""


def _version(
    version_id: str,
    now: Exposition,
    before: Exposition | None,
    window: Exposition | None,
    rows: list[ReplicaRow],
) -> VersionRow:
    def total(name: str) -> float:
        return sum(_mine(now, name, version_id).values())

    def per_s(name: str, *, failed: bool = False) -> float | None:
        if before is None:
            return None
        grown = _growth(_mine(now, name, version_id), _mine(before, name, version_id))
        kept = (v for labels, v in grown.items() if not failed or dict(labels).get("status", "") >= "500")
        return sum(kept) / max(now.at - before.at, 1e-3)

    states = _states(now, version_id, rows)
    slots = [r.slots for r in rows if r.slots is not None and r.state == State.READY]
    kv = [r.kv_usage for r in rows if r.kv_usage is not None]
    tokens = [r.tokens_per_s for r in rows if r.tokens_per_s is not None]
    return VersionRow(
        id=version_id,
        required=total("steelyard_replicas_required") > 0,
        states=states,
        running=round(total("steelyard_requests_running")),
        slots=sum(slots) if slots else None,
        waiting=round(total("steelyard_requests_waiting")),
        held=round(total("steelyard_requests_held")),
        kv_usage=max(kv) if kv else None,
        tokens_per_s=sum(tokens) if tokens else None,
        requests_per_s=per_s("steelyard_requests_total"),
        failed_per_s=per_s("steelyard_requests_total", failed=True),
        ttft_p95_s=_ttft_p95(now, window, version_id),
        replicas=rows,
    )


def _states(now: Exposition, version_id: str, rows: Sequence[ReplicaRow]) -> dict[str, int]:
    """By the directory where it was asked; else as the gateway sees them that sees most, for each has the whole table."""
    found: dict[str, int] = defaultdict(int)
    if any(r.slots is not None for r in rows):
        for r in rows:
            found[r.state] += 1
    else:
        for labels, value in _mine(now, "steelyard_replicas", version_id).items():
            state = dict(labels).get("state", "")
            found[state] = max(found[state], round(value))
    return {state: count for state, count in sorted(found.items()) if count}


def _mine(of: Exposition, name: str, version_id: str) -> dict[Labels, float]:
    return {labels: value for labels, value in of.of(name).items() if _id(dict(labels)) == version_id}


def _growth(now: Mapping[Labels, float], before: Mapping[Labels, float]) -> dict[Labels, float]:
    """Of counters. One that fell began anew; of one that was not there, nobody knows since when it counts."""
    grown = {}
    for labels, value in now.items():
        old = before.get(labels)
        if old is not None:
            grown[labels] = value - old if value >= old else value
    return grown


def _ttft_p95(now: Exposition, window: Exposition | None, version_id: str) -> float | None:
    if window is None:
        return None
    grown = _growth(_mine(now, _TTFT, version_id), _mine(window, _TTFT, version_id))
    counts: dict[float, float] = defaultdict(float)
    for labels, value in grown.items():
        counts[float(dict(labels)["le"])] += value
    bounds = sorted(counts)
    found = quantile(0.95, bounds, [counts[b] for b in bounds]) if bounds and bounds[-1] == math.inf else math.nan
    return None if math.isnan(found) else found


def _replicas(now: Exposition, before: Exposition | None, table: Snapshot | None) -> dict[str, list[ReplicaRow]]:
    """By version: those of the directory, with the load that their engines tell now; without it, the engines alone."""
    told: dict[str, dict[str, float]] = defaultdict(dict)
    versions: dict[str, tuple[str, str]] = {}
    for name in (_RUNNING, _WAITING, _KV, _GENERATED):
        for labels, value in now.of(name).items():
            of = dict(labels)
            if replica := of.get("replica"):
                versions[replica] = _id(of), of.get("node", "")
                told[replica][name] = max(told[replica].get(name, 0.0), value) if name == _KV else (
                    told[replica].get(name, 0.0) + value
                )  # fmt: skip
    speed: dict[str, float] = defaultdict(float)
    if before is not None:
        for labels, value in _growth(now.of(_GENERATED), before.of(_GENERATED)).items():
            speed[dict(labels).get("replica", "")] += value / max(now.at - before.at, 1e-3)
    rows: dict[str, list[ReplicaRow]] = defaultdict(list)

    def row(id_: str, state: str, slots: int | None, node: str, reason: str = "") -> ReplicaRow:
        of = told.get(id_, {})
        return ReplicaRow(
            id=id_,
            state=state,
            running=round(of.get(_RUNNING, 0)),
            slots=slots,
            waiting=round(of.get(_WAITING, 0)),
            kv_usage=of.get(_KV),
            tokens_per_s=speed.get(id_),
            node=node,
            reason=reason,
        )

    if table is not None:
        for e in sorted(table.endpoints, key=lambda e: e.id):
            rows[e.version_id].append(row(e.id, str(e.state), e.slots, e.node, e.reason))
    else:
        for id_, (version_id, node) in sorted(versions.items()):
            rows[version_id].append(row(id_, "", None, node))
    return rows


# -- GPUs, decisions, faults ---------------------------------------------------------------------------------------


def _gpus(now: Exposition) -> list[GpuRow]:
    found: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    named: dict[tuple[str, str, str], dict[str, str]] = {}
    for figure, name in _GPU.items():
        for labels, value in now.of(name).items():
            of = dict(labels)
            gpu = of.get("node", ""), of.get("index", ""), of.get("mig", "")
            found[gpu][figure] = value
            named[gpu] = of if of.get("replica") or gpu not in named else named[gpu]
    rows = []
    for (node, index, mig), figures in sorted(
        found.items(), key=lambda item: (item[0][0], item[0][1].zfill(4), item[0][2])
    ):
        of = named[node, index, mig]
        total = figures.get("total")
        rows.append(
            GpuRow(
                node=node,
                index=f"{index}.{mig}" if mig else index,
                name=of.get("name", ""),
                holder=of.get("replica", ""),
                busy=figures.get("busy", figures.get("kernel")),
                exact="busy" in figures,
                memory=figures["used"] / total if total and "used" in figures else None,
                watts=figures.get("watts"),
                up=figures.get("up", 1) > 0,
            )
        )
    return rows


def _past_faults(table: Snapshot | None) -> list[Event]:
    if table is None:
        return []
    found = []
    for version_id, facts in table.versions.items():
        found += [
            Event(c.at, version_id, f"a replica failed on {c.node or 'its node'}: {c.reason}") for c in facts.crashes
        ]
        if facts.failures:
            found.append(
                Event(facts.failed_at, version_id, f"{counted(facts.failures, 'start')} failed: {facts.reason}")
            )
    return sorted(found, key=lambda e: e.at)


def _faults_now(now: Exposition, table: Snapshot | None, clock: float) -> list[Event]:
    found = [
        Event(0, dict(labels).get("instance", ""), "gives no metrics")
        for labels, up in sorted(now.of("steelyard_target_up").items())
        if not up
    ]
    for e in table.endpoints if table is not None else ():
        if e.state in (State.SUSPECT, State.FAILED):
            found.append(Event(0, e.id, f"is {e.state}: {e.reason}"))
    for version_id, facts in sorted(table.versions.items()) if table is not None else ():
        for node, (until, crashes) in quarantines(facts, clock).items():
            found.append(
                Event(0, version_id, f"is quarantined on {node} for {until - clock:.0f} s: {len(crashes)} failures")
            )
    return found
