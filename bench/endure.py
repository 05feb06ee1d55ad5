"""An hour of ordinary traffic: `python -m bench.endure` (part of `make soak`), and what has grown by then.

The stack as it is deployed: two gateways, two replicas over simulated engines; clients of the mix of `bench.chaos`, and others
that leave in the middle of their answers. After a warm-up each process is looked at every ten seconds: its own memory (anonymous
pages: what it shares is not its leak) and its open files. Memory that grows is told in MiB per hour, by the median of the
slopes between all looks (Theil-Sen), which a cache that fills once does not impress. In less than half an hour the noise of an
allocator is larger than the limit: then it is only shown.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench import faults, mix, procs, report, sides
from bench.client import ROOT
from bench.crowd import Crowd
from bench.fleet import Fleet
from bench.report import Report
from bench.simulated import simulated
from serving.telemetry.metrics import unrested_gauges

OUT = ROOT / ".steelyard" / "bench" / "endure.json"
LOOK_EVERY_S = 10.0
WARM_UP = 0.2  # of the whole time
LEAST_JUDGED_S = 1800.0
MEMORY_MIB_PER_H, FILES = 1.0, 8.0  # the limits; files: idle connections come and go
LOOKS_OF_ONE = 0.9  # of all looks, for a process to be judged
_NAME = "endure"
_REPLICAS, _GATEWAYS = 2, 2
_STREAMS = 40
_LEAVES_EVERY_S = 0.5


@dataclass
class Grown:
    """One process over time. Seconds since the first look, MiB, descriptors."""

    title: str
    at: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)

    @property
    def memory_per_h(self) -> float:
        return slope(self.at, self.memory) * 3600

    @property
    def files_more(self) -> float:
        """Median of the last quarter over that of the first."""
        quarter = max(1, len(self.files) // 4)
        return float(np.median(self.files[-quarter:]) - np.median(self.files[:quarter]))


def slope(at: list[float], values: list[float]) -> float:
    """Theil-Sen: the median of the slopes between all pairs; 0 for less than two values."""
    x, y = np.asarray(at), np.asarray(values)
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first]))) if len(first) else 0.0


def main(argv: list[str] | None = None) -> int:
    """Run for as long as the options say; the exit code is 1 when a bar is missed."""
    procs.exit_on_sigterm()
    options = _options(argv)
    say = report.teller(sys.stderr if options.json else sys.stdout)
    result = Report(machine=report.machine())
    try:
        endure(options.minutes * 60, say, result)
    except procs.StartFailed as error:
        say(str(error))
        result.judge("started", 0.0, "", "==", 1.0)
    return report.finish(result, options.out, as_json=options.json)


def endure(total_s: float, say: Callable[[str], None], result: Report) -> None:
    args = {"max-num-seqs": _STREAMS, "sim-ttft-ms": 50, "sim-itl-ms": 50, "sim-start-s": 1.0}
    bounds = {"min": _REPLICAS, "max": _REPLICAS, "target_ongoing": _STREAMS}
    model = simulated(_NAME, args, bounds)
    with (
        tempfile.TemporaryDirectory(prefix="sy-") as folder,
        sides.stack([model], "sim", Path(folder), STEELYARD_GATEWAYS=str(_GATEWAYS)) as side,
    ):
        sides.wait_ready(side, sides.START_TIMEOUT_S)
        fleet = Fleet(side)
        fleet.until(lambda m: m.replicas(_NAME, "READY") == _REPLICAS, "every replica is ready", 120)
        say(f"{_STREAMS} streams for {total_s / 60:g} minutes")
        before = set(_alive(side))
        expect = mix.simulated(_NAME, "v1")
        asks = mix.asks(_NAME, expect, "", lambda number: 8 + number * 5 % 40)
        with Crowd(side.base_url, side.headers, [(_STREAMS, asks)], 120.0) as crowd:
            looks = watch(side, total_s, say)
            answers = crowd.stop()
        time.sleep(5.0)  # those who left: their slots, gauges and log lines, told once a second
        verdicts = Counter(w.verdict() for w in answers)
        say(f"{len(answers)} answers: {dict(verdicts)}")
        inside = unrested_gauges(fleet.metrics().text)
        ended = before - set(_alive(side))
    judge(result, looks, judged=total_s >= LEAST_JUDGED_S)
    result.judge("not_answered", float(len(answers) - verdicts["ok"]), "", "==", 0.0)
    result.judge("left_inside", float(sum(inside.values())), "", "==", 0.0)
    result.judge("processes_ended", float(len(ended)), "", "==", 0.0)
    result.note("answers", float(len(answers)), "")


def watch(side: sides.Side, total_s: float, say: Callable[[str], None]) -> dict[int, Grown]:
    """Every process of the stack, from the end of the warm-up on; clients leave all the while."""
    began, found, leaving = time.monotonic(), dict[int, Grown](), _leavers(side)
    looked = began + total_s * WARM_UP
    while (now := time.monotonic()) < began + total_s:
        next(leaving)
        time.sleep(_LEAVES_EVERY_S)  # the pace of the load
        if now < looked:
            continue
        looked = now + LOOK_EVERY_S
        for pid, title in _alive(side).items():
            with contextlib.suppress(OSError, psutil.Error):
                memory, files = _memory_mib(pid), float(psutil.Process(pid).num_fds())
                grown = found.setdefault(pid, Grown(title))
                grown.at.append(now - began)
                grown.memory.append(memory)
                grown.files.append(files)
    say(f"looked at {len(found)} processes, {max((len(g.at) for g in found.values()), default=0)} times")
    return found


def judge(result: Report, looks: Mapping[int, Grown], *, judged: bool) -> None:
    """Of processes that were there nearly all the time. A look may miss one, on a busy machine."""
    most = max((len(g.at) for g in looks.values()), default=0)
    stayed = [g for g in looks.values() if len(g.at) >= most * LOOKS_OF_ONE]
    worst = max(stayed, key=lambda g: g.memory_per_h, default=None)
    if judged:
        result.judge("memory_mib_per_h", worst.memory_per_h if worst else None, "MiB/h", "<", MEMORY_MIB_PER_H)
    for grown in sorted(stayed, key=lambda g: -g.memory_per_h):
        result.note(f"{grown.title}: memory", grown.memory_per_h, f"MiB/h (has {grown.memory[-1]:.0f} MiB)")
    result.judge("files_more", max((g.files_more for g in stayed), default=None), "", "<=", FILES)
    rows: list[dict[str, Any]] = [vars(g) for g in stayed]
    result.samples.extend(rows)


def _leavers(side: sides.Side) -> Iterator[None]:
    """Each step one client more asks for a long answer, and the one of two steps ago leaves."""
    expect, opened, number = mix.simulated(_NAME, "v1"), [], 0
    while True:
        number += 1
        ask = mix.ask(_NAME, expect, "chat", f"leaves {number}", 500)
        opened.append(faults.connected(side, mix.encode(ask, f"leaves-{number}", "x", side.headers)))
        if len(opened) > 2:
            opened.pop(0).close()
        yield


def _alive(side: sides.Side) -> dict[int, str]:
    """Processes of the stack by pid; a short-lived command is none of it."""
    found = {}
    for process in side.processes():
        title = procs.short_title(process)
        if title and "multiprocessing" not in title:
            found[process.pid] = f"{title} {process.pid}"
    return found


def _memory_mib(pid: int) -> float:
    """Anonymous pages of a process, in memory and swapped out."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap")) / 1024


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.endure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="default 60; memory is judged from 30 on")
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON goes")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
