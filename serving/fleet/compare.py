"""One trace, every policy: what `steelyard scale simulate` prints, writes and draws. Needs numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from serving.errors import OperatorError
from serving.fleet import rivals, simulate
from serving.fleet.scaling import Limits
from serving.fleet.simulate import Goal, Policy, Result, Service
from serving.fleet.trace import Ints, Trace

DOWN_S = (60.0, 120.0, 200.0, 300.0, 450.0, 600.0)  # of the frontier: seconds before a replica goes
BOUND_RATIO = 1.35  # GPU-hours over the clairvoyant bound that our policy is to stay within


class Comparison(NamedTuple):
    trace: Trace
    service: Service
    limits: Limits
    goal: Goal
    step_s: float
    bound_gpu_hours: float
    results: tuple[Result, ...]  # ours first
    notes: tuple[str, ...]  # what was left out, and why
    frontier: tuple[tuple[float, tuple[Result, ...]], ...] = ()  # the same for each of `DOWN_S`, without the static one


def compare(
    trace: Trace,
    service: Service,
    limits: Limits,
    goal: Goal,
    *,
    step_s: float,
    frontier: bool = False,
    tick: Callable[[str, float], None] | None = None,
) -> Comparison:
    """Every policy on the same traffic, each beginning with what the first minutes want. `limits.max` of 0 stands for
    twice the peak. `frontier` asks for what hours buy, too. `tick(name, share)` is told how far it is."""
    work = simulate.prepare(trace, service, goal, step_s)
    most = simulate.peak(work, service)
    if not limits.max:
        limits = msgspec.structs.replace(limits, max=max(2 * most, limits.min))
    notes: list[str] = []
    policies: list[Policy] = [simulate.Steelyard(limits)]
    try:
        policies.append(rivals.RayServe(limits))
    except ImportError:
        notes.append("ray is not installed: its policy is left out")
    policies += [rivals.Hpa(limits), rivals.Static(min(most, limits.max))]
    begin = min(max(simulate.first(work, limits.target_ongoing), limits.min, 1), limits.max)

    def tried(policy: Policy) -> Result:
        replicas = policy.replicas if isinstance(policy, rivals.Static) else begin
        told = (lambda share: tick(policy.name, share)) if tick else None
        return simulate.run(work, service, policy, replicas=replicas, tick=told)

    results = tuple(tried(policy) for policy in policies)
    curve = []
    for down_s in DOWN_S if frontier else ():
        # Each waits as long as the others before it lets a replica go; whatever else it does stays its own.
        at: list[Policy] = [simulate.Steelyard(msgspec.structs.replace(limits, scale_down_after_s=down_s))]
        at += [rivals.RayServe(limits, down_s)] if not notes else []
        at += [rivals.Hpa(limits, down_s)]
        curve.append((down_s, tuple(tried(policy) for policy in at)))
    bound = simulate.clairvoyant(work, service, limits.min)
    return Comparison(trace, service, limits, goal, step_s, bound, results, tuple(notes), tuple(curve))


def as_json(found: Comparison) -> dict[str, Any]:
    ours, others = found.results[0], found.results[1:]
    ratio = ours.gpu_hours / found.bound_gpu_hours
    best = max((r.attainment for r in others if r.name != rivals.Static.name), default=0.0)
    return {
        "trace": {
            "name": found.trace.name,
            "requests": found.trace.requests,
            "span_s": found.trace.span_s,
        },
        "service": found.service._asdict(),
        "limits": {
            "min": found.limits.min,
            "max": found.limits.max,
            "target_ongoing": found.limits.target_ongoing,
            "scale_down_after_s": found.limits.scale_down_after_s,
        },
        "goal": str(found.goal),
        "step_s": found.step_s,
        "clairvoyant_gpu_hours": round(found.bound_gpu_hours, 3),
        "policies": [
            {
                "name": r.name,
                "gpu_hours": round(r.gpu_hours, 3),
                "gpu_hours_ratio": round(r.gpu_hours / found.bound_gpu_hours, 4),
                "wait_p95_s": r.wait_p95_s,
                "wait_p99_s": r.wait_p99_s,
                "attainment": round(r.attainment, 6),
                "rejected": r.rejected,
                "replicas_max": int(r.replicas.max(initial=0)),
            }
            for r in found.results
        ],
        "bars": [
            {"name": "gpu_hours_ratio", "value": round(ratio, 4), "unit": "x clairvoyant", "op": "<=",
             "limit": BOUND_RATIO, "ok": ratio <= BOUND_RATIO},
            {"name": "attainment", "value": round(ours.attainment, 6), "unit": "share", "op": ">=",
             "limit": round(best, 6), "ok": ours.attainment >= best},
        ],
        "frontier": [
            {"policy": r.name, "down_after_s": down_s, "gpu_hours_ratio": round(r.gpu_hours / found.bound_gpu_hours, 4),
             "attainment": round(r.attainment, 6)}
            for down_s, results in found.frontier for r in results
        ],
        "notes": list(found.notes),
    }  # fmt: skip


def plot(found: Comparison, path: Path) -> None:
    """Replicas and held requests over time, as PNG. OperatorError where matplotlib is missing or the file not writable."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise OperatorError("--plot needs matplotlib", "Install it: pip install 'steelyard[simulate]'") from None
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for result in found.results:
        hours, replicas = _thinned(result.replicas, found.step_s)
        label = f"{result.name}: {result.gpu_hours:.1f} GPU-hours, {result.attainment:.2%} in time"
        above.step(hours, replicas, where="post", label=label, linewidth=1.2)
        below.plot(*_thinned(result.held, found.step_s), linewidth=1.0)
    above.set_ylabel("replicas that hold GPUs")
    above.set_title(f"{found.trace.name}: clairvoyant bound {found.bound_gpu_hours:.1f} GPU-hours, goal {found.goal}")
    above.set_ylim(bottom=0)
    above.legend(loc="upper left", fontsize="small")
    below.set_ylabel("requests held")
    below.set_xlabel("hours")
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as e:
        raise OperatorError(f"{path}: cannot be written: {e.strerror or e}") from None


def _thinned(series: Ints, step_s: float) -> tuple[Any, Any]:
    """At most some 2,000 points, each the most of its stretch, so that no spike is lost."""
    stretch = max(1, len(series) // 2000)
    whole = len(series) // stretch * stretch
    most = series[:whole].reshape(-1, stretch).max(axis=1)
    return np.arange(len(most)) * stretch * step_s / 3600, most
