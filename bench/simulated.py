"""Part 2 of `bench.overhead`: the stack over two simulated engines, idle, paced, and under thousands of streams."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench import procs, sides, workloads
from bench.load import Spec
from bench.paired import Bench, Phase, Row
from bench.plan import Plan, add
from bench.report import Report
from bench.sides import START_TIMEOUT_S, Side
from bench.workloads import Steady, Uniform

_SIM_STREAMS = {"max-num-seqs": 4096, "sim-ttft-ms": 50, "sim-itl-ms": 1000}
_SIM_PACED = {"max-num-seqs": 256, "sim-ttft-ms": 50, "sim-itl-ms": 25}


def over_simulators(bench: Bench, plan: Plan, result: Report) -> None:
    """Part 2: the stack with two simulated engines."""
    models = [simulated("streams", _SIM_STREAMS), simulated("paced", _SIM_PACED)]
    bench.say("starting the stack over two simulated engines")
    with (
        sides.traced(plan.traces, bench.work) as traced,
        sides.stack(models, "sim", bench.work / "two", **traced) as stack,
    ):
        bench.say(f"up after {sides.wait_ready(stack, START_TIMEOUT_S):.0f} s")
        if plan.wants("idle_pss_mib"):
            idle(stack, plan, result)
        procs.pin(bench.client.pid, set(os.sched_getaffinity(0)))
        if plan.wants("paced"):
            paced(bench, replace(stack, model="paced"), plan, result)
        if plan.wants("streams_2000_errors", "gateway_pss_mib"):
            many_streams(bench, stack, plan, result)


def idle(stack: Side, plan: Plan, result: Report) -> None:
    """What the stack holds and burns while nobody asks: PSS and CPU of every process that is not an engine."""
    time.sleep(1.0 if plan.quick else 5.0)
    processes = stack.processes()
    engines, gateways = procs.engine_pids(processes), procs.gateway_pids(processes)
    own = [p for p in processes if p.pid not in engines]
    pids, watched_s = [p.pid for p in own], 1.0 if plan.quick else 10.0
    own_s, gateway_s = procs.cpu_s(pids), procs.cpu_s(gateways)
    time.sleep(watched_s)
    result.note("idle_cores", (procs.cpu_s(pids) - own_s) / watched_s, "cores")
    result.note("idle_gateway_cores", (procs.cpu_s(gateways) - gateway_s) / watched_s, "cores")
    shares = {f"{procs.short_title(p)} {p.pid}": procs.pss_mib([p.pid]) for p in own}
    largest_first = dict(sorted(shares.items(), key=lambda item: -item[1]))
    result.samples.append({"phase": "idle", "side": "stack", "pss_mib": largest_first})
    add(result, "idle_pss_mib", sum(shares.values()), plan)


def paced(bench: Bench, stack: Side, plan: Plan, result: Report) -> None:
    """48 clients on an engine that takes 25 ms a token, as a mid-size model on a GPU does: the machine mostly waits,
    so this is the CPU an event costs without queues that merge events."""
    row = bench.sample(Phase("paced", Uniform, 48, 3.0 if plan.quick else 12.0), stack, seed=1)
    result.samples.append(row)
    for figure, unit in (("gateway_us_per_event", "us"), ("gateway_cores", "cores"), ("client_us_per_event", "us")):
        if figure in row:
            result.note(f"paced_{figure}", row[figure], unit)


def many_streams(bench: Bench, stack: Side, plan: Plan, result: Report) -> None:
    """Thousands of slow streams, open together. A stream that was not open at the peak counts as an error: it was not
    concurrent."""
    n, ramp_s, tokens = (200, 2.0, 6) if plan.quick else (2000, 15.0, 45)
    gateways = procs.gateway_pids(stack.processes())
    sizes: list[float] = []
    spec = Spec(
        base_url=stack.base_url,
        model=stack.model,
        headers=stack.headers,
        workload=workloads.dump(Steady(1, n, ramp_s, tokens)),
        out=str(bench.work / "recording.npz"),
        mode="open",
    )
    cpu = procs.cpu_s(gateways)
    summary, recording = bench.client.run(spec, lambda: sizes.append(procs.pss_mib(gateways)), every_s=2.0)
    cpu = procs.cpu_s(gateways) - cpu
    failed, peak = sum(summary.errors.values()), recording.peak_open
    bench.say(f"{n} streams: {peak} open at once, {failed} failed {summary.errors or ''}")
    add(result, "streams_2000_errors", float(failed + max(0, n - peak)), plan)
    add(result, "gateway_pss_mib", max(sizes, default=0.0) if gateways else None, plan)
    result.note("streams_peak_open", float(peak), "")
    result.note("streams_gateway_us_per_event", cpu / max(1, summary.events) * 1e6, "us")
    row: Row = {"phase": "streams", "side": "stack", "requests": summary.requests, "events": summary.events}
    result.samples.append(
        row | {"errors": summary.errors, "peak_open": peak, "pss_mib": sizes, "wall_s": summary.wall_s}
    )


def simulated(
    name: str,
    args: Mapping[str, Any],
    scaling: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    drain_s: float = 30.0,
) -> dict[str, Any]:
    """A model file over the simulator that takes next to nothing of Ray's logical CPUs."""
    version: dict[str, Any] = {
        "version": "v1",
        "engine": {"kind": "simulator", "args": dict(args)},
        "resources": {"cpus": 0.1},
        "drain_s": drain_s,
    }
    if scaling is not None:
        version["scaling"] = dict(scaling)
    return {"name": name, "versions": [version], "limits": {"max_queue": 4096, **(limits or {})}}
