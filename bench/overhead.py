"""What the stack costs over the bare engine: `python -m bench.overhead` (`make bench-overhead`), about eleven minutes.

    1. raw vLLM and the stack, up together on the same weights, measured in alternation:
       uniform load at 1, 8 and 32 clients, then production-like load           -> latency, tokens/s, gateway CPU
    2. the stack over two simulated engines: idle; paced; thousands of streams  -> memory, errors, CPU per event

The bars are those of the one table in docs/benchmarks.md (`bench/plan.py`); figures without a bar are shown below them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench import peers, procs, report, sides
from bench.client import ROOT, Client
from bench.paired import Bench, Phase, Ratios, Row, failures, median
from bench.plan import BARS, ENGINE_BARS, SIMULATED, TRACES, Plan, add
from bench.report import Report
from bench.sides import START_TIMEOUT_S, EngineUnderTest, Side
from bench.simulated import over_simulators
from bench.stats import Estimate, percentile
from bench.workloads import Production, Uniform

OUT = ROOT / ".steelyard" / "bench" / "overhead.json"

_RATIOS = Ratios(
    {
        "ttft_added_p50_ms_c1": ("c1", "ttft_p50_ms"),
        "ttft_p95_ratio_c32": ("c32", "ttft_p95_ms"),
        "ttft_p99_ratio_c32": ("c32", "ttft_p99_ms"),
        "itl_p99_ratio_c8": ("c8", "itl_p99_ms"),
        "itl_p99_ratio_c32": ("c32", "itl_p99_ms"),
        "tokens_ratio_c32": ("c32", "tokens_per_s"),
        "ttft_p95_ratio_production": ("production", "ttft_p95_ms"),
        "itl_p99_ratio_production": ("production", "itl_p99_ms"),
    }
)

# One OpenMP thread on the backends' core: two would fight for it. Both sides get the same.
_ENGINE_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_ENGINE_ARGS = {"max-model-len": 2048, "max-num-seqs": 64, "enforce-eager": True}

_FOREIGN_CORES = 0.1  # more than this in processes of others, and the figures deserve a warning


def phases(plan: Plan, rate_per_s: float) -> list[Phase]:
    """What a round consists of. At one client only the first token is judged, so answers are short and there are more
    firsts; the production mix arrives at `rate_per_s`."""
    scale = 0.3 if plan.quick else 1.0
    every = [
        Phase("c1", lambda seed: Uniform(seed, max_tokens=16), 1, 5 * scale),
        Phase("c8", Uniform, 8, 4 * scale),
        Phase("c32", Uniform, 32, 8 * scale),
        Phase("production", lambda seed: Production(seed, 8 * scale, rate_per_s), 32, 8 * scale, "open"),
    ]
    needed = {_RATIOS.pairs[n][0] for n in plan.only if n in _RATIOS.pairs} | (plan.only & {"production"})
    if "gateway_us_per_event_c32" in plan.only:
        needed.add("c32")
    return [phase for phase in every if phase.name in needed] or every


def main(argv: list[str] | None = None) -> int:
    """Run what the options ask for; the exit code is 1 when a bar is missed."""
    procs.exit_on_sigterm()
    options = _options(argv)
    say = report.teller(sys.stderr if options.json else sys.stdout)
    plan = Plan(
        quick=options.quick,
        rounds=options.rounds or (2 if options.quick else 50),
        budget_s=options.budget_s,
        only=frozenset(options.only),
        weights=options.weights,
        traces=options.traces,
        began=time.monotonic(),
    )
    result = Report(machine=report.machine() | {"traced_share": plan.traces})
    with tempfile.TemporaryDirectory(prefix="sy-") as folder, Client() as client:
        bench = Bench(client, Path(folder), say)
        for part, names in ((against_raw, ENGINE_BARS), (over_simulators, SIMULATED)):
            try:
                if plan.wants(*names):
                    part(bench, plan, result)
            except procs.StartFailed as error:
                say(str(error))
    judged = {bar.name for bar in result.bars} | {figure.name for figure in result.figures}
    for name in BARS:
        if name not in judged and plan.wants(name):
            add(result, name, None, plan)  # what could not be measured is missed
    say(f"{time.monotonic() - plan.began:.0f} s in all, written to {options.out}")
    return report.finish(result, options.out, as_json=options.json)


def against_raw(bench: Bench, plan: Plan, result: Report) -> None:
    """Part 1: both sides up, pinned alike, warmed, and measured in alternation."""
    engine = EngineUnderTest(plan.weights or tiny_weights(bench.say), _ENGINE_ARGS, _engine_env())
    bench.say("starting the raw engine and the stack")
    with contextlib.ExitStack() as up:
        raw = up.enter_context(sides.raw(engine, bench.work))
        traced = up.enter_context(sides.traced(plan.traces, bench.work))
        stack = up.enter_context(sides.stack([engine.model_file()], "cpu", bench.work / "one", **traced))
        for side in (raw, stack):
            bench.say(f"{side.name} is up after {sides.wait_ready(side, START_TIMEOUT_S):.0f} s")
        result.machine["pinned"] = pin(bench, raw, stack)
        rate = calibrate(bench, raw, 2.0 if plan.quick else 5.0)
        chosen = phases(plan, 0.65 * rate)
        for side in (raw, stack):
            for phase in chosen:
                bench.sample(replace(phase, duration_s=1.5), side, seed=-1)
        rows = bench.rounds(chosen, raw, stack, most=plan.rounds, until=plan.until, ratios=_RATIOS)
        if os.environ.get("PEERS") == "1":
            rows += peers.measure(bench, [p for p in chosen if p.name in ("c1", "c32")], raw)
    result.samples += rows
    conclude(result, rows, plan)


def calibrate(bench: Bench, raw: Side, duration_s: float) -> float:
    """Requests per second of the production mix that the raw engine carries with 32 clients."""
    phase = Phase("calibration", lambda seed: Production(seed, 100.0, 10.0), 32, duration_s)
    bench.sample(phase, raw, seed=-2)
    row = bench.sample(phase, raw, seed=-3)
    rate = float(row["requests"] / row["wall_s"])
    bench.say(f"the raw engine carries {rate:.0f} production-like requests/s at 32 clients")
    return rate


def conclude(result: Report, rows: list[Row], plan: Plan) -> None:
    """Bars and figures of part 1."""
    found: dict[str, Estimate | float | None] = dict(_RATIOS.of(rows))
    found["gateway_us_per_event_c32"] = median(rows, "c32", "stack", "gateway_us_per_event")
    found["request_errors"] = float(failures(rows, "stack"))
    for name, value in found.items():
        if name in BARS and plan.wants(name):
            add(result, name, value, plan)
        elif name not in BARS and value is not None:
            result.note(name, value, "x")
    for phase, figure, unit in (
        ("c1", "ttft_p50_ms", "ms"),
        ("c32", "ttft_p95_ms", "ms"),
        ("c32", "itl_p99_ms", "ms"),
        ("c32", "tokens_per_s", "1/s"),
        ("c32", "events_per_token", ""),  # under 1: the engine's server fell behind and merged tokens
        ("c32", "gateway_us_per_token", "us"),
        ("c32", "client_us_per_event", "us"),
        ("production", "gateway_us_per_event", "us"),
    ):
        for side in ("raw", "stack", peers.ROUTER):
            if (value := median(rows, phase, side, figure)) is not None:
                result.note(f"{side}_{figure}_{phase}", value, unit)
    result.note("raw_request_errors", float(failures(rows, "raw")), "")
    foreign = percentile([row["foreign_cores"] for row in rows], 50)
    result.note("foreign_cores", foreign, "cores")
    if foreign > _FOREIGN_CORES:
        result.machine["warning"] = f"other processes used {foreign:.2f} cores meanwhile: the figures are not clean"


def pin(bench: Bench, raw: Side, stack: Side) -> str:
    """Pin both engines and the client, alike. What only the stack has, gateways and Ray's processes, stays with the
    scheduler, as it does in production: on the core that the API server and the client fill already, a gateway would be
    measured for where it was put."""
    processes = stack.processes()
    chosen = procs.engine_pids(processes)
    done = procs.pin_engines([*raw.processes(), *(p for p in processes if p.pid in chosen)])
    if done != "none":
        procs.pin(bench.client.pid, {min(os.sched_getaffinity(0))})
    bench.say(f"pinned: {done}")
    return done


def tiny_weights(say: Callable[[str], None]) -> Path:
    """The tiny model's folder, built at the first use and cached."""
    from serving.catalog.weights import resolve
    from serving.settings import load_settings

    return resolve("build:tiny/v1", base=ROOT / "models", cache=load_settings().cache_dir, on_progress=say)


def _engine_env() -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    return _ENGINE_ENV | ({"VLLM_CPU_OMP_THREADS_BIND": str(cores[-1])} if 2 <= len(cores) <= 4 else {})


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    names = sorted({*BARS, "production", "paced"})
    parser.add_argument("--quick", action="store_true", help="short rounds; only counts are judged")
    parser.add_argument(
        "--only", action="append", default=[], choices=names, metavar="NAME", help="this figure; repeatable"
    )
    parser.add_argument("--rounds", type=int, help="at most this many rounds")
    parser.add_argument(
        "--budget-s", type=float, default=600.0, help="seconds for everything after which no round starts"
    )
    parser.add_argument("--weights", type=Path, help="a model folder instead of the tiny model")
    parser.add_argument(
        "--traces", type=float, default=TRACES, help="share of the stack's requests that are traced; 0 is off"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON goes")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
