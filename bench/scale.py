"""Queue, admission and scaling under load: `python -m bench.scale` (`make bench-scale`), about nine minutes.

The stack as it is deployed, over simulated engines whose pace is the limit, so that two cores suffice. Its parts, each
runnable alone with `--only` and one of its bars:

    1. a step from 1 to 64 streams, and the load falling again      breach_to_decision_s, step_failed, scale_down_failed
    2. one request to a model without a replica                     from_zero_extra_s
    3. ten times the load for a minute                              overload_*, retry_after_error_factor
    4. two keys that ask for 10 : 1, at one gateway and at eight    fairness_gap
    5. eight gateways, nine of ten requests at one of them          gateways8_throughput_ratio, engine_waiting_p99_share
    6. a minute without the directory                               directory_down_*
    7. prefixes over four replicas, in virtual time: no stack       prefix_*

docs/benchmarks.md says what each figure is.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import contention, elastic, prefix, procs, report, sides
from bench.client import ROOT, Client
from bench.fleet import Fleet
from bench.paired import Bench
from bench.plan import Asked, Bars, add
from bench.report import Report
from bench.sides import START_TIMEOUT_S

OUT = ROOT / ".steelyard" / "bench" / "scale.json"

BARS: Bars = {
    "breach_to_decision_s": ("s", "<=", 2.0, ""),
    "step_failed": ("", "==", 0.0, ""),
    "scale_down_failed": ("", "==", 0.0, ""),
    "from_zero_extra_s": ("s", "<=", 1.0, ""),
    "overload_other_status": ("", "==", 0.0, ""),
    "overload_wait_p95_share": ("", "<=", 1.0, ""),
    "overload_gateway_mib_growth": ("MiB", "<=", 8.0, ""),
    "retry_after_error_factor": ("x", "<=", 2.0, ""),
    "fairness_gap": ("", "<=", 0.2, ""),
    "gateways8_throughput_ratio": ("x", ">=", 0.97, 1.0),
    "engine_waiting_p99_share": ("", "<=", 0.05, 0.0),
    "directory_down_ratio": ("x", ">=", 0.9, 1.0),
    "directory_down_failed": ("", "==", 0.0, ""),
    "prefix_cached_share_ratio": ("x", ">=", 0.9, 1.0),
    "prefix_uniform_ttft_p95_ratio": ("x", "<=", 1.05, ""),
}

Run = Callable[..., None]


@dataclass(frozen=True)
class Part:
    """Some bars, what measures them, and on which stacks: `one` has one gateway, `eight` has eight."""

    bars: tuple[str, ...]
    run: Run
    stacks: tuple[str, ...]
    models: tuple[dict[str, Any], ...]


_NAMES = tuple(BARS)
PARTS = (
    Part(_NAMES[:3], elastic.step_and_back, ("one",), (elastic.STEPPING,)),
    Part(_NAMES[3:4], elastic.from_zero, ("one",), (elastic.SLEEPING,)),
    Part(_NAMES[4:8], contention.overload, ("one",), (contention.BUSY,)),
    Part(_NAMES[8:9], contention.fairness, ("one", "eight"), (contention.BUSY,)),
    Part(_NAMES[9:11], contention.gateways, ("one", "eight"), (contention.BUSY,)),
    Part(_NAMES[11:13], contention.directory, ("eight",), (contention.BUSY,)),
    Part(_NAMES[13:], prefix.part, (), ()),
)
_GATEWAYS = {"one": 1, "eight": 8}


def main(argv: list[str] | None = None) -> int:
    """Run what the options ask for; the exit code is 1 when a bar is missed."""
    procs.exit_on_sigterm()
    options = _options(argv)
    say = report.teller(sys.stderr if options.json else sys.stdout)
    asked = Asked(quick=options.quick, only=frozenset(options.only))
    parts = [part for part in PARTS if asked.wants(*part.bars)]
    result, began = Report(machine=report.machine()), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sy-") as folder, Client() as client:
        bench = Bench(client, Path(folder), say)
        with contextlib.suppress(procs.StartFailed), stacks(bench, parts) as up:
            for part in parts:
                measure(part, [up[name] for name in part.stacks], bench, asked, result)
    judged = {bar.name for bar in result.bars} | {figure.name for figure in result.figures}
    for part in parts:
        for name in part.bars:
            if name not in judged:
                add(result, name, None, asked, BARS)  # what could not be measured is missed
    say(f"{time.monotonic() - began:.0f} s in all, written to {options.out}")
    return report.finish(result, options.out, as_json=options.json)


@contextlib.contextmanager
def stacks(bench: Bench, parts: Sequence[Part]) -> Iterator[dict[str, Fleet]]:
    """The stacks that the parts need, up at the same time: each idles while the other is measured."""
    wanted = {name: [p for p in parts if name in p.stacks] for name in _GATEWAYS}
    with contextlib.ExitStack() as up:
        found: dict[str, Fleet] = {}
        for name, users in wanted.items():
            if users:
                models = {model["name"]: model for part in users for model in part.models}
                gateways = str(_GATEWAYS[name])
                stack = sides.stack(list(models.values()), "sim", bench.work / name, STEELYARD_GATEWAYS=gateways)
                found[name] = Fleet(up.enter_context(stack))
                bench.say(f"starting the stack `{name}`: {gateways} gateway(s), {', '.join(models)}")
        for name, fleet in found.items():
            try:
                sides.wait_ready(fleet.side, START_TIMEOUT_S)
            except procs.StartFailed as error:
                bench.say(f"{name}: {error}")
                raise
            bench.say(f"`{name}` is up")
        yield found


def measure(part: Part, fleets: list[Fleet], bench: Bench, asked: Asked, result: Report) -> None:
    """One part; what goes wrong in it misses its own bars and no others."""
    run = partial(part.run, bench, *fleets, asked, BARS, result)
    try:
        run()
    except Exception as error:  # also a fault of the bench's own: minutes of other parts are not to be lost by it
        bench.say(f"{', '.join(part.bars)}: {type(error).__name__}: {error}")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="short phases; only counts are judged")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=sorted(BARS),
        metavar="NAME",
        help="the part with this bar; repeatable",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON goes")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
