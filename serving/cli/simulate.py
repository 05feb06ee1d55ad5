"""`steelyard scale simulate`: the scaling policy on traffic, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from serving.cli.term import one_line_errors
from serving.errors import OperatorError
from serving.fleet.scaling import Limits

if TYPE_CHECKING:
    from serving.fleet.compare import Comparison

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

TARGET_SHARE = 0.9  # of the slots, where --target is not given


def simulate(
    trace: Annotated[
        Path | None, typer.Argument(help="CSV or JSONL: time of arrival, prompt and output tokens.")
    ] = None,
    synthetic: Annotated[str | None, typer.Option(help="Instead of a trace: diurnal, spike or bursty.")] = None,
    hours: Annotated[float | None, typer.Option(min=0.05, max=336, help="Length of synthetic traffic.")] = None,
    rate: Annotated[float, typer.Option(min=0.01, max=1e6, help="Requests per second at its peak.")] = 100.0,
    seed: Annotated[int, typer.Option(min=0, help="Of synthetic traffic.")] = 1,
    slots: Annotated[int, typer.Option(min=1, max=65536, help="Generations at once in one replica.")] = 64,
    ttft_ms: Annotated[float, typer.Option(min=0, help="First token of an empty prompt, without a queue.")] = 50.0,
    prefill: Annotated[float, typer.Option(min=1, help="Prompt tokens per second of one request.")] = 20_000.0,
    itl_ms: Annotated[float, typer.Option(min=0, help="Between tokens, with every slot taken.")] = 25.0,
    start: Annotated[float, typer.Option(min=0, max=86400, help="Seconds until a new replica serves.")] = 60.0,
    gpus: Annotated[float, typer.Option(min=0.001, max=1024, help="GPUs of one replica.")] = 1.0,
    target: Annotated[
        float | None, typer.Option(min=0.1, help="target_ongoing: requests per replica; by default 0.9 of the slots.")
    ] = None,
    minimum: Annotated[int, typer.Option("--min", min=0, help="Fewest replicas.")] = 1,
    maximum: Annotated[
        int | None, typer.Option("--max", min=1, help="Most replicas; by default twice what the peak needs.")
    ] = None,
    down_after: Annotated[float, typer.Option(min=0, max=86400, help="scale_down_after_s.")] = 300.0,
    idle_to_zero: Annotated[
        float | None,
        typer.Option(min=0, help="idle_to_zero_s, with --min 0; by default the last one goes as any other."),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests held at most.")] = 512,
    max_wait: Annotated[float, typer.Option(min=0, max=3600, help="Seconds a request is held at most.")] = 60.0,
    goal_wait: Annotated[float | None, typer.Option(min=0, help="Served well: waited at most so many seconds.")] = None,
    goal_ttft: Annotated[
        float | None, typer.Option(min=0, help="Or: had its first token within so many seconds.")
    ] = None,
    step: Annotated[float, typer.Option(min=0.05, max=5, help="Seconds of one step of the simulation.")] = 1.0,
    frontier: Annotated[
        bool,
        typer.Option("--frontier", help="Also: hours against requests in time, for each wait before a replica goes."),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the course of it as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Try the scaling policy on traffic: GPU-hours, waits and what is turned away, against other ways to do it."""
    with one_line_errors():
        if (trace is None) == (synthetic is None):
            raise OperatorError("give a trace file or --synthetic, and not both", "E.g. --synthetic diurnal")
        if goal_wait is not None and goal_ttft is not None:
            raise OperatorError("--goal-wait and --goal-ttft are two goals", "Give one")
        if maximum is not None and maximum < minimum:
            raise OperatorError(f"--max {maximum} is below --min {minimum}")
        if idle_to_zero is not None and minimum > 0:
            raise OperatorError("--idle-to-zero needs --min 0")
        try:
            from serving.fleet import compare
            from serving.fleet import trace as traffic
            from serving.fleet.simulate import Goal, Service
        except ModuleNotFoundError as e:
            raise OperatorError(
                f"the simulation needs {e.name}", "Install it: pip install 'steelyard[simulate]'"
            ) from None
        service = Service(
            slots=slots,
            ttft_s=ttft_ms / 1000,
            prefill_per_s=prefill,
            itl_s=itl_ms / 1000,
            start_s=start,
            gpus=gpus,
            max_queue=max_queue,
            max_wait_s=max_wait,
        )
        limits = Limits(
            min=minimum,
            max=maximum or 0,
            target_ongoing=target or TARGET_SHARE * slots,
            scale_down_after_s=down_after,
            idle_to_zero_s=idle_to_zero,
        )
        if goal_ttft is not None:
            goal = Goal(wait_s=None, ttft_s=goal_ttft)
        else:
            goal = Goal(wait_s=2.0 if goal_wait is None else goal_wait)
        if trace is not None:
            requests = traffic.read(trace)
        else:
            assert synthetic is not None
            length = hours or (24.0 if synthetic == "diurnal" else 6.0)
            requests = traffic.synthetic(synthetic, rate=rate, hours=length, seed=seed)
        with _progress() as tick:
            found = compare.compare(requests, service, limits, goal, step_s=step, frontier=frontier, tick=tick)
        if plot is not None:
            compare.plot(found, plot)
        if as_json:
            print(json.dumps(compare.as_json(found)))
        else:
            _print(found)


def _print(found: Comparison) -> None:
    view = Table(box=None, pad_edge=False)
    view.add_column("policy", no_wrap=True)
    for head in ("GPU-hours", "over", "p95 wait", "p99", "in time", "rejected", "most"):
        view.add_column(head, justify="right", no_wrap=True)
    for r in found.results:
        view.add_row(
            r.name, f"{r.gpu_hours:,.1f}", f"{r.gpu_hours / found.bound_gpu_hours:.2f}x", f"{r.wait_p95_s:g} s",
            f"{r.wait_p99_s:g} s", f"{r.attainment:.2%}", f"{r.rejected:,}", str(int(r.replicas.max(initial=0))),
        )  # fmt: skip
    view.add_row("clairvoyant", f"{found.bound_gpu_hours:,.1f}", "1.00x", "", "", "", "", "")
    console = Console(highlight=False)
    console.print(
        f"{found.trace.name}: {found.trace.requests:,} requests in {found.trace.span_s / 3600:.1f} h; in time means "
        f"{found.goal}; {found.service.slots} slots, target {found.limits.target_ongoing:g}, "
        f"start {found.service.start_s:g} s, {found.limits.min} to {found.limits.max} replicas",
        markup=False,
        soft_wrap=True,
    )
    console.print(view)
    console.print("over: against the clairvoyant bound; most: replicas that held GPUs at once", markup=False)
    if found.frontier:
        curve = Table(box=None, pad_edge=False)
        curve.add_column("down after", no_wrap=True)
        for r in found.frontier[0][1]:
            curve.add_column(r.name, justify="right", no_wrap=True)
        for down_s, results in found.frontier:
            told = (f"{r.gpu_hours / found.bound_gpu_hours:.2f}x {r.attainment:.2%}" for r in results)
            curve.add_row(f"{down_s:g} s", *told)
        console.print()
        console.print(curve)
    for note in found.notes:
        console.print(note, markup=False)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """On stderr and only for a person; gone when done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), *Progress.get_default_columns()[1:])
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda name, share: bar.update(task, description=name, completed=share)
