"""Parts of `bench.scale` in which there is more load than slots: overload, fairness, many gateways, no directory."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import psutil

from bench import procs
from bench.fleet import Fleet, Metrics, skewed
from bench.load import Party
from bench.paired import Bench
from bench.plan import Asked, Bars, add
from bench.recording import Floats, Recording
from bench.report import Report
from bench.simulated import simulated
from bench.stats import percentile, ratio
from bench.workloads import Steady, Uniform

REPLICAS, SLOTS = 4, 16
TTFT_MS, ITL_MS, TOKENS = 100, 50, 24
MAX_WAIT_S = 10.0
# Requests a second that the engines can serve: the engines' pace is the limit, with most of two cores idle.
CAPACITY = REPLICAS * SLOTS / ((TTFT_MS + (TOKENS - 1) * ITL_MS) / 1e3)
BUSY = simulated(
    "busy",
    {"max-num-seqs": SLOTS, "sim-ttft-ms": TTFT_MS, "sim-itl-ms": ITL_MS},
    {"min": REPLICAS, "max": REPLICAS},
    {"max_queue": 1024, "max_wait_s": MAX_WAIT_S},
)
SHARE_AT_ONE = 0.9
_SETTLE_S = 5.0
_IDLE_CORES = 0.2  # with less, the machine may be the limit, and not what is measured


def overload(bench: Bench, fleet: Fleet, asked: Asked, bars: Bars, result: Report) -> None:
    """Ten times what the engines can serve, at one gateway."""
    seconds = 12.0 if asked.quick else 60.0
    gateways = fleet.gateways()
    sizes: list[tuple[float, float]] = []
    load = Steady(1, int(10 * CAPACITY * seconds), seconds, TOKENS)
    summary, recording = fleet.ask(
        bench,
        "busy",
        load,
        tick=lambda: sizes.append((time.monotonic(), procs.pss_mib(gateways))),
        every_s=1.0,
        mode="open",
        concurrency=700,
    )
    counts = {int(s): int(n) for s, n in zip(*np.unique(recording.status, return_counts=True), strict=True)}
    broken = int(((recording.status == 200) & ~recording.ok).sum())
    waits = waits_s(recording)
    factors = retry_factors(recording, waits)
    grown = growth_mib([(at - recording.began, mib) for at, mib in sizes if at < recording.began + seconds])
    bench.say(f"overload: {counts}, {broken} broken; {len(factors)} promises compared")
    other = sum(n for status, n in counts.items() if status not in (200, 429)) + broken
    add(result, "overload_other_status", float(other), asked, bars)
    share = percentile(waits[np.isfinite(waits)], 95) / MAX_WAIT_S if np.isfinite(waits).any() else None
    add(result, "overload_wait_p95_share", share, asked, bars)
    add(result, "overload_gateway_mib_growth", grown, asked, bars)
    add(result, "retry_after_error_factor", float(np.median(factors)) if len(factors) else None, asked, bars)
    result.note("overload_offered_per_s", len(load.calls()) / seconds, "1/s")
    result.note("overload_served_per_s", recording.answered_per_s(_SETTLE_S, seconds), "1/s")
    result.note("overload_engines_carry_per_s", CAPACITY, "1/s")
    if len(factors):
        result.note("retry_after_error_factor_p95", percentile(factors, 95), "x")
    told = recording.status == 429
    if told.any():
        after = recording.end[told] - recording.due[told]
        result.note("overload_refused_after_p99_ms", percentile(after * 1e3, 99), "ms")
        result.note("overload_refused_after_a_wait", float((after > 1.0).sum()), "")
    result.samples.append({"part": "overload", "status": counts, "pss_mib": sizes, "errors": summary.errors})


def waits_s(recording: Recording) -> Floats:
    """How long each served request waited for its slot: until its first token, less what the engine takes for that. NaN
    for the others."""
    waits: Floats = np.where(recording.status == 200, recording.first - recording.due - TTFT_MS / 1e3, np.nan)
    return waits.clip(min=0.0)


def retry_factors(recording: Recording, waits: Floats) -> Floats:
    """Of each refusal that promised a time: by which factor it is off. What it is compared with is the time in which
    the same place in the line truly got a slot: the wait of the served request that came nearest to the refused one."""
    served = np.flatnonzero(np.isfinite(waits))
    promised = np.flatnonzero((recording.status == 429) & np.isfinite(recording.retry_after_s))
    if not len(served) or not len(promised):
        return np.empty(0)
    served = served[np.argsort(recording.due[served])]
    due = recording.due[served]
    right = np.searchsorted(due, recording.due[promised]).clip(1, max(1, len(due) - 1))
    left = right - 1
    right = right.clip(max=len(due) - 1)
    nearer = np.abs(due[left] - recording.due[promised]) <= np.abs(due[right] - recording.due[promised])
    true = np.maximum(waits[served[np.where(nearer, left, right)]], 1e-3)
    told = recording.retry_after_s[promised]
    factors: Floats = np.maximum(told / true, true / told)
    return factors


def growth_mib(sizes: Sequence[tuple[float, float]]) -> float | None:
    """By how much a process grew between the second fifth and the last fifth of the time, medians. The first fifth is for
    what fills once: the queue, pools, the allocator's arenas."""
    if len(sizes) < 5:
        return None
    end = sizes[-1][0]
    early = [mib for at, mib in sizes if 0.2 * end <= at < 0.4 * end]
    late = [mib for at, mib in sizes if at >= 0.8 * end]
    return statistics.median(late) - statistics.median(early) if early and late else None


def fairness(bench: Bench, one: Fleet, eight: Fleet, asked: Asked, bars: Bars, result: Report) -> None:
    """Two keys, one asking for ten times as much, both for more than half of what there is."""
    seconds = 8.0 if asked.quick else 15.0
    for fleet in (one, eight):
        # Until every gateway knows what requests like these take: the first ones are guessed to be larger, and charged for it.
        n = 80 * len(fleet.gateways())
        fleet.ask(
            bench, "busy", Steady(0, n, n / CAPACITY, TOKENS), mode="open", concurrency=16 * len(fleet.gateways())
        )
    greedy, modest = one.keys("greedy", "modest")
    gaps = {"one": _gap(bench, one, (Party(10, greedy), Party(1, modest)), seconds, result)}
    greedy, modest = eight.keys("greedy", "modest")
    first, second, *_ = eight.gateways()
    gaps["apart"] = _gap(bench, eight, (Party(10, greedy, (first,)), Party(1, modest, (second,))), seconds, result)
    gaps["spread"] = _gap(bench, eight, (Party(10, greedy), Party(1, modest)), seconds, result)
    add(result, "fairness_gap", max(gaps.values()), asked, bars)
    for name, gap in gaps.items():
        result.note(f"fairness_gap_{name}", gap, "")
    bench.say("fairness: " + ", ".join(f"{name} {gap:.3f}" for name, gap in gaps.items()))


def _gap(bench: Bench, fleet: Fleet, parties: tuple[Party, ...], seconds: float, result: Report) -> float:
    load = Steady(1, int(8.25 * CAPACITY * seconds), seconds, TOKENS)
    _, recording = fleet.ask(bench, "busy", load, mode="open", concurrency=700, parties=parties)
    counts = served_by_party(recording, len(parties), _SETTLE_S, seconds)
    result.samples.append({"part": "fairness", "served": counts})
    return 1 - min(counts) / max(counts) if max(counts) else 1.0


def served_by_party(recording: Recording, parties: int, since_s: float, until_s: float) -> list[int]:
    """Requests of each party that got a slot between these seconds of the phase."""
    inside = (
        recording.ok & (recording.first >= recording.began + since_s) & (recording.first < recording.began + until_s)
    )
    return [int((inside & (recording.party == party)).sum()) for party in range(parties)]


def crowded(seed: int) -> Uniform:
    """Answers of different lengths: engines whose requests all end together would show in the pace."""
    return Uniform(seed, max_tokens=TOKENS, spread=TOKENS // 2)


def gateways(bench: Bench, one: Fleet, eight: Fleet, asked: Asked, bars: Bars, result: Report) -> None:
    """The same four replicas' worth of engines behind one gateway and behind eight, nine of ten requests at one of them."""
    seconds = 5.0 if asked.quick else 10.0
    settle = 2.0
    crowd = skewed(eight.gateways(), SHARE_AT_ONE, eight.side.headers)
    pace: dict[str, list[float]] = {"one": [], "eight": []}
    waiting: dict[str, list[float]] = {"one": [], "eight": []}
    idle: list[float] = []
    failed = 0
    for number in range(1 if asked.quick else 3):
        sides: list[tuple[str, Fleet, tuple[Party, ...]]] = [("one", one, ()), ("eight", eight, crowd)]
        for name, fleet, parties in sides if number % 2 == 0 else sides[::-1]:
            with idle_cores(idle):
                summary, recording = fleet.ask(
                    bench,
                    "busy",
                    crowded(number),
                    tick=partial(_look, fleet, waiting[name]),
                    every_s=1.0,
                    concurrency=2 * REPLICAS * SLOTS,
                    duration_s=seconds,
                    parties=parties,
                )
            pace[name].append(recording.tokens_per_s(settle, seconds))
            failed += sum(summary.errors.values())
        bench.say(f"gateways {number + 1}: one {pace['one'][-1]:.1f}, eight {pace['eight'][-1]:.1f} tokens/s")
    add(result, "gateways8_throughput_ratio", ratio(pace["one"], pace["eight"]), asked, bars)
    share = percentile(waiting["eight"], 99) if waiting["eight"] else None
    add(result, "engine_waiting_p99_share", share, asked, bars)
    result.note("gateways8_failed", float(failed), "")
    result.note("gateways8_tokens_per_s", statistics.median(pace["eight"]), "1/s")
    result.note("gateways1_tokens_per_s", statistics.median(pace["one"]), "1/s")
    result.note("engines_carry_tokens_per_s", CAPACITY * TOKENS, "1/s")
    result.note("gateways8_idle_cores", min(idle), "cores")
    if min(idle) < _IDLE_CORES:
        result.machine["warning"] = f"only {min(idle):.2f} cores were idle: the machine may be what was measured"
    result.samples.append({"part": "gateways", "tokens_per_s": pace, "waiting_share": waiting, "idle_cores": idle})


def _look(fleet: Fleet, shares: list[float]) -> None:
    shares.extend(waiting_shares(fleet.metrics()))


def waiting_shares(metrics: Metrics) -> list[float]:
    """Of each engine with work: its own waiting queue over what it runs."""
    waiting = metrics.engines("num_requests_waiting", "busy")
    running = metrics.engines("num_requests_running", "busy")
    return [waiting.get(replica, 0.0) / n for replica, n in running.items() if n]


@contextlib.contextmanager
def idle_cores(found: list[float]) -> Iterator[None]:
    """Adds the cores that nobody used inside the block, on average."""
    before, began = psutil.cpu_times(), time.monotonic()
    yield
    after = psutil.cpu_times()
    found.append((after.idle + after.iowait - before.idle - before.iowait) / (time.monotonic() - began))


def directory(bench: Bench, eight: Fleet, asked: Asked, bars: Bars, result: Report) -> None:
    """The directory stands still for a minute, goes on, and is killed, under load that fills every slot."""
    before, away, again, killed = (8.0, 10.0, 5.0, 8.0) if asked.quick else (12.0, 60.0, 8.0, 12.0)
    pid = eight.directory()
    script = Script(
        (before, lambda: os.kill(pid, signal.SIGSTOP)),
        (before + away, lambda: os.kill(pid, signal.SIGCONT)),
        (before + away + again, lambda: os.kill(pid, signal.SIGKILL)),
    )
    try:
        summary, recording = eight.ask(
            bench,
            "busy",
            crowded(1),
            tick=script,
            every_s=0.2,
            concurrency=2 * REPLICAS * SLOTS,
            duration_s=before + away + again + killed,
            parties=skewed(eight.gateways(), SHARE_AT_ONE, eight.side.headers),
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    stop, go_on, kill = (at - recording.began for at in script.done)
    pace = {
        "before": recording.tokens_per_s(2.0, stop),
        "stopped": recording.tokens_per_s(stop + 1.0, go_on),
        "resumed": recording.tokens_per_s(go_on + 1.0, kill),
        "killed": recording.tokens_per_s(kill + 1.0, before + away + again + killed),
    }
    failed = sum(summary.errors.values())
    bench.say("directory: " + ", ".join(f"{k} {v:.1f}" for k, v in pace.items()) + f" tokens/s, {failed} failed")
    worst = min(pace["stopped"], pace["resumed"], pace["killed"])
    add(result, "directory_down_ratio", worst / pace["before"] if pace["before"] else None, asked, bars)
    add(result, "directory_down_failed", float(failed), asked, bars)
    for name, value in pace.items():
        result.note(f"directory_{name}_tokens_per_s", value, "1/s")
    result.samples.append({"part": "directory", "tokens_per_s": pace, "errors": summary.errors})


class Script:
    """Steps at their times, seconds after the first call; a tick for the client. `done`: when each was taken."""

    def __init__(self, *steps: tuple[float, Callable[[], None]]) -> None:
        self.done: list[float] = []
        self._steps = list(steps)
        self._began: float | None = None

    def __call__(self) -> None:
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        while self._steps and now - self._began >= self._steps[0][0]:
            self._steps.pop(0)[1]()
            self.done.append(now)
