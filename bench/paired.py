"""Rounds: every phase on one side, then at once on the other, in alternating order, until the figures hold still."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from bench import procs, workloads
from bench.client import Client
from bench.load import Spec
from bench.sides import Side
from bench.stats import Estimate, added, percentile, ratio, settled, single
from bench.workloads import Workload

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Phase:
    """One kind of load. `workload` makes the calls of a seed; figures leave out what was due in the first `settle_s`
    seconds, when all clients start at once."""

    name: str
    workload: Callable[[int], Workload]
    concurrency: int
    duration_s: float
    mode: Literal["closed", "open"] = "closed"
    settle_s: float = 0.5


@dataclass(frozen=True)
class Bench:
    """What rounds need: the client, a folder for recordings, and where progress lines go."""

    client: Client
    work: Path
    say: Say

    def sample(self, phase: Phase, side: Side, seed: int, beside: Side | None = None) -> Row:
        """Run one phase on one side; its figures. Times in ms, CPU in microseconds per SSE event delivered. `beside` is
        the other side, idle: what it burns is not counted as foreign."""
        processes = side.processes()
        gateways = procs.gateway_pids(processes)
        measured = [p.pid for p in [*processes, *(beside.processes() if beside else ())]] + [self.client.pid]
        spec = Spec(
            base_url=side.base_url,
            model=side.model,
            headers=side.headers,
            workload=workloads.dump(phase.workload(seed)),
            out=str(self.work / "recording.npz"),
            mode=phase.mode,
            concurrency=phase.concurrency,
            duration_s=phase.duration_s,
        )
        gateway_s, own_s, all_s = procs.cpu_s(gateways), procs.cpu_s(measured), _busy_s()
        summary, recording = self.client.run(spec)
        gateway_s, own_s, all_s = procs.cpu_s(gateways) - gateway_s, procs.cpu_s(measured) - own_s, _busy_s() - all_s
        ttft, itl = recording.ttft_ms(phase.settle_s), recording.itl_ms(phase.settle_s)
        events = max(1, summary.events)
        row: Row = {"phase": phase.name, "side": side.name, "seed": seed, "requests": summary.requests}
        row |= {"events": summary.events, "errors": summary.errors, "wall_s": summary.wall_s}
        if len(ttft) and len(itl):
            row |= {f"ttft_p{q}_ms": percentile(ttft, q) for q in (50, 95, 99)}
            row |= {f"itl_p{q}_ms": percentile(itl, q) for q in (50, 95, 99)}
        row["tokens_per_s"] = recording.tokens_per_s(phase.settle_s, min(phase.duration_s, summary.wall_s))
        row["events_per_token"] = events / max(1, int(recording.tokens.sum()))
        row["client_us_per_event"] = summary.cpu_s / events * 1e6
        row["foreign_cores"] = max(0.0, all_s - own_s) / summary.wall_s
        if gateways:
            row["gateway_us_per_event"] = gateway_s / events * 1e6
            row["gateway_us_per_token"] = row["gateway_us_per_event"] * row["events_per_token"]
            row["gateway_cores"] = gateway_s / summary.wall_s
        return row

    def rounds(
        self, phases: Sequence[Phase], raw: Side, stack: Side, *, most: int, until: float, ratios: Ratios
    ) -> list[Row]:
        """Rows of at least one and at most `most` rounds; stops when every ratio holds still, or when another round
        would pass `until` (monotonic seconds)."""
        rows: list[Row] = []
        for number in range(most):
            began = time.monotonic()
            for index, phase in enumerate(phases):
                order = (raw, stack) if (number + index) % 2 == 0 else (stack, raw)
                seed = 1000 * number + index
                rows += [self.sample(phase, a, seed, b) for a, b in (order, order[::-1])]
            took = time.monotonic() - began
            found = [e for e in ratios.of(rows).values() if e is not None]
            self.say(f"round {number + 1} in {took:.0f} s: {ratios.line(rows)}")
            if settled(found) or time.monotonic() + took > until:
                break
        return rows


@dataclass(frozen=True)
class Ratios:
    """Named comparisons: name -> (phase, figure). A name with `added` in it is a difference, else a ratio."""

    pairs: dict[str, tuple[str, str]]

    def of(self, rows: Sequence[Row]) -> dict[str, Estimate | None]:
        """stack against raw, per name; None where a round has no such figure (every request failed)."""
        return {name: self._one(rows, name, *pair) for name, pair in self.pairs.items()}

    def line(self, rows: Sequence[Row]) -> str:
        return ", ".join(f"{name} {e.value:.2f}" if e else f"{name} -" for name, e in self.of(rows).items())

    def _one(self, rows: Sequence[Row], name: str, phase: str, figure: str) -> Estimate | None:
        raw, stack = (series(rows, phase, side, figure) for side in ("raw", "stack"))
        if not raw or len(raw) != len(stack):
            return None
        return added(raw, stack) if "added" in name else ratio(raw, stack)


def series(rows: Sequence[Row], phase: str, side: str, figure: str) -> list[float]:
    """One figure over the rounds."""
    return [float(r[figure]) for r in rows if r["phase"] == phase and r["side"] == side and figure in r]


def median(rows: Sequence[Row], phase: str, side: str, figure: str) -> Estimate | None:
    """The median over the rounds with its interval; None when there is no such figure."""
    values = series(rows, phase, side, figure)
    return single(values) if values else None


def failures(rows: Sequence[Row], side: str) -> int:
    """Requests that did not end as a whole answer."""
    return sum(sum(r["errors"].values()) for r in rows if r["side"] == side)


def _busy_s() -> float:
    """CPU seconds the whole machine has spent on anything but idling."""
    t = psutil.cpu_times()
    return float(sum(t) - t.idle - getattr(t, "iowait", 0.0) - getattr(t, "guest", 0.0) - getattr(t, "guest_nice", 0.0))
