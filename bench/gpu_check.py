"""The same comparison where it counts, on a GPU: `python -m bench.gpu_check` (`make gpu-check`), under nine minutes.

A Llama of 8B shape with random weights is made on the spot, served by raw vLLM and by the stack on the same GPU (40 %
of its memory each), and measured in alternation at 1, 32 and 256 clients. Each start is timed by milestones on the way;
the second one finds the compile cache of the first.

When one call may not take that long: `--part cold` times both starts and stops there; a second call with
`--load-format dummy`, which spares writing and reading 16 GB, gets to the ratios sooner.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench import procs, report, sides, workloads
from bench.client import ROOT, Client
from bench.coldstart import ColdStart
from bench.load import Spec
from bench.paired import Bench, Phase, Ratios, Row, failures, median
from bench.random_llama import Shape, make
from bench.report import Op, Report
from bench.sides import START_TIMEOUT_S, EngineUnderTest, Side
from bench.workloads import Uniform

OUT = ROOT / ".steelyard" / "bench" / "gpu.json"

_TOKENS = 128
_PHASES = (
    Phase("c1", lambda seed: Uniform(seed, chars=200, max_tokens=32), 1, 5.0),
    Phase("c32", lambda seed: Uniform(seed, chars=200, max_tokens=_TOKENS), 32, 7.0, settle_s=1.0),
    Phase("c256", lambda seed: Uniform(seed, n=6000, chars=200, max_tokens=_TOKENS), 256, 9.0, settle_s=2.0),
)
_RATIOS = Ratios(
    {"ttft_added_p50_ms_c1": ("c1", "ttft_p50_ms"), "itl_p99_ratio_c1": ("c1", "itl_p99_ms")}
    | {f"{f}_p{q}_ratio_{c}": (c, f"{f}_p{q}_ms") for c in ("c32", "c256") for f, q in (("ttft", 95), ("itl", 99))}
    | {f"tokens_ratio_{c}": (c, "tokens_per_s") for c in ("c32", "c256")}
)
# The bars of the one table, at the loads of a GPU: unit, op, limit, goal.
_BARS: dict[str, tuple[str, Op, float, float]] = {
    "ttft_added_p50_ms_c1": ("ms", "<=", 2.0, 1.0),
    "ttft_p95_ratio_c32": ("x", "<=", 1.75, 1.25),
    "ttft_p95_ratio_c256": ("x", "<=", 1.75, 1.25),
    "itl_p99_ratio_c32": ("x", "<=", 1.5, 1.10),
    "itl_p99_ratio_c256": ("x", "<=", 1.5, 1.10),
    "tokens_ratio_c32": ("x", ">=", 0.92, 1.0),
    "tokens_ratio_c256": ("x", ">=", 0.92, 1.0),
}
_ENGINE_ARGS = {"max-model-len": 4096, "max-num-seqs": 512, "gpu-memory-utilization": 0.4}


def main(argv: list[str] | None = None) -> int:
    """Make the model, start both sides, measure; the exit code is 1 when a bar is missed or there is no GPU."""
    procs.exit_on_sigterm()
    options = _options(argv)
    began = time.monotonic()
    say = report.teller(sys.stderr if options.json else sys.stdout)
    if not report.gpus():
        say("no GPU: NVML sees none, so there is nothing to check")
        return 1
    result = Report(machine=report.machine())
    with tempfile.TemporaryDirectory(prefix="sy-") as folder, Client() as client:
        bench = Bench(client, Path(folder), say)
        made = time.monotonic()
        weights = make(Path(folder) / "weights", Shape(), weights=options.load_format != "dummy")
        say(f"the model is made in {time.monotonic() - made:.0f} s")
        args = _ENGINE_ARGS | {"load-format": options.load_format}
        engine = EngineUnderTest(weights, args, {}, {"gpus": 0.4, "cpus": 1})
        try:
            check(bench, engine, options.part, began + options.budget_s, result)
        except procs.StartFailed as error:
            say(str(error))
            return 1
    return report.finish(result, options.out, as_json=options.json)


def check(bench: Bench, engine: EngineUnderTest, part: str, until: float, result: Report) -> None:
    """Start raw, then the stack beside it (both profile the GPU's free memory, so never at once), then the rounds."""
    with contextlib.ExitStack() as up:
        raw = up.enter_context(sides.raw(engine, bench.work))
        start(bench, raw, result)
        stack = up.enter_context(sides.stack([engine.model_file()], "gpu", bench.work / "stack"))
        start(bench, stack, result)
        if part == "cold":
            return
        for side in (raw, stack):
            for phase in _PHASES:
                bench.sample(replace(phase, duration_s=3.0), side, seed=-1)
        rows = bench.rounds(_PHASES, raw, stack, most=50, until=until - 20.0, ratios=_RATIOS)  # 20 s to stop both
    result.samples += rows
    conclude(result, rows)


def start(bench: Bench, side: Side, result: Report) -> None:
    """Wait for a side that is starting and for its first token; every milestone becomes a figure."""
    state_dir = side.state_dir
    cold = ColdStart(lambda: state_dir.rglob("*.log") if state_dir is not None else [side.service.log])
    sides.wait_ready(side, START_TIMEOUT_S, cold.look)
    cold.mark("ready_s")
    spec = Spec(
        base_url=side.base_url,
        model=side.model,
        headers=side.headers,
        workload=workloads.dump(Uniform(seed=0, n=1, max_tokens=4)),
        out=str(bench.work / "recording.npz"),
        requests=1,
    )
    summary, recording = bench.client.run(spec)
    if summary.errors:
        raise procs.StartFailed(f"{side.name} is ready and does not answer: {summary.errors}\n{side.service.log_end()}")
    cold.seen_s["first_token_s"] = round(float(recording.first[0]) - cold.began, 2)
    for name, seconds in cold.seen_s.items():
        result.note(f"{side.name}_start_{name}", seconds, "s")
    bench.say(f"{side.name} start: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in cold.seen_s.items()))


def conclude(result: Report, rows: list[Row]) -> None:
    """Bars and figures of the rounds."""
    for name, value in _RATIOS.of(rows).items():
        if name in _BARS:
            unit, op, limit, goal = _BARS[name]
            result.judge(name, value, unit, op, limit, goal)
        elif value is not None:
            result.note(name, value, "x")
    result.judge("request_errors", float(failures(rows, "stack")), "", "==", 0.0)
    figures = (("ttft_p50_ms", "ms"), ("itl_p50_ms", "ms"), ("tokens_per_s", "1/s"), ("gateway_us_per_event", "us"))
    for phase in _PHASES:
        for figure, unit in figures:
            for side in ("raw", "stack"):
                if (value := median(rows, phase.name, side, figure)) is not None:
                    result.note(f"{side}_{figure}_{phase.name}", value, unit)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check")
    parser.add_argument("--part", choices=("all", "cold"), default="all", help="cold: the starts only")
    parser.add_argument(
        "--load-format", choices=("auto", "dummy"), default="auto", help="dummy: no weights are written"
    )
    parser.add_argument("--budget-s", type=float, default=500.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON goes")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
