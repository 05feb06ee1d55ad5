"""A fleet in steps of time, to try scaling policies on traffic: the same queue, slots, starts and drains for each.

What it models: one first-come queue in front of all slots (late binding), a bound on its length and on the wait, a
service time per request that does not depend on load (give the ITL of a full batch), replicas that take `start_s` to
serve and cost from the first second, and replicas that leave when their last stream ends. Requests of one row of the
trace move together, so a day of a thousand replicas is minutes of nothing but array slices. Needs numpy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from serving.errors import OperatorError
from serving.fleet.scaling import Decision, Limits, Load, Memory, decide
from serving.fleet.trace import Ints, Trace

MOST_STEPS = 3_000_000  # a month in seconds: some minutes and a few hundred MiB
RATE_WINDOW_S = 10.0  # what finished and arrived per second are means of


class Service(NamedTuple):
    """How one replica serves, as measured on it."""

    slots: int = 64
    ttft_s: float = 0.05  # to the first token of an empty prompt
    prefill_per_s: float = 20_000.0  # prompt tokens per second on top of it
    itl_s: float = 0.025  # between tokens, with every slot taken
    start_s: float = 60.0  # from the decision to the first request served
    gpus: float = 1.0  # of one replica
    max_queue: int = 512
    max_wait_s: float = 60.0


class Goal(NamedTuple):
    """A request is served well if it waited, or had its first token, within this time. One of both is None."""

    wait_s: float | None = 2.0
    ttft_s: float | None = None

    def __str__(self) -> str:
        return f"wait <= {self.wait_s:g} s" if self.wait_s is not None else f"TTFT <= {self.ttft_s:g} s"


class Policy(Protocol):
    """Replicas wanted, asked once per step. `mean_ongoing(seconds)` is what a slower observer would see."""

    name: str

    def __call__(self, load: Load, fleet: Fleet, now: float) -> int: ...


class Result(NamedTuple):
    name: str
    gpu_hours: float
    wait_p95_s: float
    wait_p99_s: float
    attainment: float  # share of all requests, the rejected included, that met the goal
    rejected: int
    requests: int
    replicas: Ints  # that hold GPUs, per step
    held: Ints  # per step


class Work(NamedTuple):
    """A trace turned into steps; made once and shared by the runs."""

    step_s: float
    steps: int  # of the trace; GPU-hours count within
    first_row: Ints  # of each step, and one past the last
    arrived: Ints  # requests of each step
    times: Ints
    at: Ints  # arrival step of each row
    service: Ints  # steps of each row
    patience: Ints  # steps that each row may wait and still meet the goal; negative: never
    concurrency: Ints  # per step, were no request ever to wait


def prepare(trace: Trace, service: Service, goal: Goal, step_s: float) -> Work:
    """OperatorError if it would take too many steps, as when one time of a trace has another unit than the rest."""
    ttft = service.ttft_s + trace.prompt / service.prefill_per_s
    seconds = np.where(np.isnan(trace.service_s), ttft + trace.output * service.itl_s, trace.service_s)
    at = (trace.arrival_s / step_s).astype(np.int64)
    steps = max(math.ceil(trace.span_s / step_s), int(at[-1]) + 1)
    lasting = np.maximum(1, np.rint(seconds / step_s)).astype(np.int64)
    if steps + int(lasting.max()) > MOST_STEPS:
        raise OperatorError(
            f"{trace.name}: {trace.span_s / 3600:,.0f} hours, and up to {float(seconds.max()):,.0f} s for a request, are more "
            f"than {MOST_STEPS:,} steps of {step_s:g} s",
            "Check the unit of its times, cut it, or give a larger --step",
        )
    if goal.wait_s is not None:
        patience = np.full(len(at), math.floor(goal.wait_s / step_s + 1e-9), np.int64)
    else:
        assert goal.ttft_s is not None
        patience = np.floor((goal.ttft_s - ttft) / step_s + 1e-9).astype(np.int64)
    change = np.bincount(at, trace.times, minlength=steps + 1)[: steps + 1]
    ended = np.bincount(np.minimum(at + lasting, steps), trace.times, minlength=steps + 1)
    return Work(
        step_s=step_s,
        steps=steps,
        first_row=np.searchsorted(at, np.arange(steps + 1)).astype(np.int64),
        arrived=change[:steps].astype(np.int64),
        times=trace.times,
        at=at,
        service=lasting,
        patience=patience,
        concurrency=np.cumsum(change - ended)[:steps].astype(np.int64),
    )


class Fleet:
    """Replicas, queue and streams at one step of one run."""

    def __init__(self, work: Work, service: Service, replicas: int) -> None:
        self.work, self.service = work, service
        self.target = self.ready = replicas
        self.start_steps = max(1, math.ceil(service.start_s / work.step_s))
        self.starting: deque[int] = deque()  # steps at which they will be ready, one each
        self.draining: deque[tuple[int, int]] = deque()  # (when, how many) leave
        self.step = self.running = self.draining_streams = 0
        longest = int(work.service.max(initial=1))
        size = work.steps + longest + 4 * self.start_steps + 7200
        self.ends = np.zeros(size, np.int64)  # streams of ready replicas that end at each step
        self.drain_ends = np.zeros(size, np.int64)  # of replicas that drain
        self.longest = longest
        # The queue is what lies between two counts of admitted requests; `admitted` is their running sum by row.
        self.admitted = np.zeros(len(work.times) + 1, np.int64)
        self.rows = 0  # admitted so far; a row that was refused in whole counts with nothing
        self.first = 0  # row in which the queue begins
        self.began = 0  # requests that left the queue
        self.refused = 0
        self.kept = 0  # met the goal
        self.waits = np.zeros(math.ceil(service.max_wait_s / work.step_s) + 2, np.int64)
        window = max(1, round(RATE_WINDOW_S / work.step_s))
        self.lately: deque[tuple[int, int]] = deque(maxlen=window)  # (arrived, finished) per step
        self.lately_arrived = self.lately_finished = 0
        self.history = np.zeros(size, np.int64)  # ongoing per step

    @property
    def held(self) -> int:
        return int(self.admitted[self.rows]) - self.began

    def mean_ongoing(self, seconds: float) -> float:
        """Held + running, the mean of the last so many seconds."""
        steps = max(1, round(seconds / self.work.step_s))
        return float(self.history[max(0, self.step + 1 - steps) : self.step + 1].mean())

    def advance(self) -> Load:
        """One step of time: starts end, streams end, requests come, wait, are served or refused."""
        now, work = self.step, self.work
        while self.starting and self.starting[0] <= now:
            self.starting.popleft()
            self.ready += 1
        while self.draining and self.draining[0][0] <= now:
            self.draining.popleft()
        finished = int(self.ends[now])
        self.running -= finished
        arrived = int(work.arrived[now]) if now < work.steps else 0
        if arrived:
            self._admit(now, arrived)
        if self.held:
            self._expire(now)
            self._begin(now)
        self._count(arrived, finished + int(self.drain_ends[now]))
        held = self.held
        self.history[now] = held + self.running
        seconds = len(self.lately) * work.step_s
        return Load(
            replicas=self.target,
            ready=self.ready,
            held=held,
            running=self.running,
            slots=self.service.slots,
            finished_per_s=self.lately_finished / seconds,
            arrived_per_s=self.lately_arrived / seconds,
        )

    def _count(self, arrived: int, finished: int) -> None:
        if len(self.lately) == self.lately.maxlen:
            old = self.lately[0]
            self.lately_arrived -= old[0]
            self.lately_finished -= old[1]
        self.lately.append((arrived, finished))
        self.lately_arrived += arrived
        self.lately_finished += finished

    def _admit(self, now: int, arrived: int) -> None:
        first, last = self.work.first_row[now], self.work.first_row[now + 1]
        counts = self.work.times[first:last]
        # What finds a slot free never queues, so the bound is on what would be left over.
        free = max(0, self.ready * self.service.slots - self.running)
        room = self.service.max_queue + free - self.held
        base = self.admitted[self.rows]
        sums = np.cumsum(counts)
        if arrived > room:
            self.refused += arrived - max(0, room)
            sums = np.minimum(sums, max(0, room))
        self.admitted[self.rows + 1 : self.rows + 1 + len(counts)] = base + sums
        self.rows += len(counts)

    def _expire(self, now: int) -> None:
        """Those that waited longer than is allowed leave; the queue is in order of arrival, so they are its head."""
        oldest = now - len(self.waits) + 1
        if self.work.at[self.first] > oldest or oldest < 0:
            return
        gone = int(np.searchsorted(self.work.at[self.first : self.rows], oldest, side="right")) + self.first
        left = int(self.admitted[gone]) - self.began
        if left > 0:
            self.refused += left
            self.began += left
        self.first = gone

    def _begin(self, now: int) -> None:
        number = min(self.held, self.ready * self.service.slots - self.running)
        if number <= 0:
            return
        work, upto = self.work, self.began + number
        first = self.first + int(
            np.searchsorted(self.admitted[self.first + 1 : self.rows + 1], self.began, side="right")
        )
        last = first + int(np.searchsorted(self.admitted[first + 1 : self.rows + 1], upto, side="left")) + 1
        sums = self.admitted[first : last + 1]
        counts = np.minimum(sums[1:], upto) - np.maximum(sums[:-1], self.began)
        waited = now - work.at[first:last]
        np.add.at(self.ends, now + work.service[first:last], counts)
        np.add.at(self.waits, waited, counts)
        self.kept += int(counts[waited <= work.patience[first:last]].sum())
        self.running += number
        self.began, self.first = upto, last - 1

    def steer(self, wanted: int) -> None:
        """More: they start now. Fewer: those that start are called off first, newest first; then ready ones drain."""
        now, change = self.step, wanted - self.target
        self.target = wanted
        for _ in range(change):
            self.starting.append(now + self.start_steps)
        for _ in range(min(-change, len(self.starting))):
            self.starting.pop()
            change += 1
        if change < 0:
            self._drain(-change)

    def _drain(self, leaving: int) -> None:
        """They take their share of the streams along and leave one by one, as the last stream of each ends."""
        future = slice(self.step + 1, self.step + 1 + self.longest)
        ends = self.ends[future]
        sums = np.cumsum(ends)
        share = np.diff(sums * leaving // self.ready, prepend=0)
        self.ends[future] -= share
        self.drain_ends[future] += share
        streams = int(share.sum())
        self.running -= streams
        self.ready -= leaving
        # The last of n streams ends, in the mean, where n/(n+1) of all have ended.
        each = streams / leaving
        after = int(np.searchsorted(np.cumsum(share), streams * each / (each + 1))) + 1 if streams else 1
        at = self.step + after
        if self.draining and self.draining[-1][0] > at:
            self.draining = deque(sorted([*self.draining, (at, leaving)]))
        else:
            self.draining.append((at, leaving))

    def holding(self) -> int:
        """Replicas that hold GPUs."""
        return self.target + sum(number for _, number in self.draining)


def run(
    work: Work, service: Service, policy: Policy, *, replicas: int, tick: Callable[[float], None] | None = None
) -> Result:
    """One policy over the trace, starting with so many ready replicas. `tick(share)` is told how far it is."""
    fleet = Fleet(work, service, replicas)
    held, replicas_at = np.zeros(work.steps, np.int64), np.zeros(work.steps, np.int64)
    # After the trace the queue is served to its end, which costs no GPU-hours here: the trace would have gone on.
    last = len(fleet.history) - fleet.longest - 1
    while fleet.step < work.steps or (fleet.held and fleet.step < last):
        load = fleet.advance()
        if fleet.step < work.steps:
            held[fleet.step], replicas_at[fleet.step] = load.held, fleet.holding()
            if tick and fleet.step % 2048 == 0:
                tick(fleet.step / work.steps)
        wanted = policy(load, fleet, fleet.step * work.step_s)
        if wanted != fleet.target:
            fleet.steer(wanted)
        fleet.step += 1
    fleet.refused += fleet.held
    requests = int(work.times.sum())
    hours = float(replicas_at.sum()) * work.step_s * service.gpus / 3600
    return Result(
        name=policy.name,
        gpu_hours=hours,
        wait_p95_s=_quantile(fleet.waits, 0.95) * work.step_s,
        wait_p99_s=_quantile(fleet.waits, 0.99) * work.step_s,
        attainment=fleet.kept / requests,
        rejected=fleet.refused,
        requests=requests,
        replicas=replicas_at,
        held=held,
    )


def _quantile(histogram: Ints, share: float) -> int:
    """Of those that were served; a wait is the whole steps between arrival and start."""
    sums = np.cumsum(histogram)
    return int(np.searchsorted(sums, share * sums[-1])) if sums[-1] else 0


class Steelyard:
    """The policy of this product, as the fleet runs it."""

    name = "steelyard"

    def __init__(self, limits: Limits) -> None:
        self.limits, self.memory = limits, Memory()
        self.last: Decision | None = None

    def __call__(self, load: Load, fleet: Fleet, now: float) -> int:
        self.last = decide(load, self.limits, self.memory, now)
        self.memory = self.last.memory
        return self.last.replicas


def clairvoyant(work: Work, service: Service, minimum: int) -> float:
    """GPU-hours that no policy can go below if every request is to start within the wait goal: a lower bound.

    A request that comes at a and lasts d must run from a + goal to a + d, whenever it starts; so many replicas must be
    there at each moment. The k-th replica is held where k are needed, and through a gap if starting it anew would cost
    more. That sum is the least for these needs, and the sum of all service over the slots is another bound: the
    larger of both is told. Knows the future, starts each replica in time.
    """
    slack = np.maximum(work.patience, 0)
    begin, end = work.at + slack, work.at + work.service
    sure = (begin < end) & (begin < work.steps)
    change = np.bincount(begin[sure], work.times[sure], minlength=work.steps + 1)
    change -= np.bincount(np.minimum(end[sure], work.steps), work.times[sure], minlength=work.steps + 1)
    needed = np.ceil(np.cumsum(change)[: work.steps] / service.slots - 1e-9).astype(np.int64)
    # Streams still open at the end of the trace are served later.
    within = np.minimum(work.at + work.service, work.steps + slack) - work.at
    total = float((within.clip(0) * work.times).sum()) / service.slots
    least = max(_cover(np.maximum(needed, minimum), max(1, math.ceil(service.start_s / work.step_s))), total)
    return max(least, float(minimum * work.steps)) * work.step_s * service.gpus / 3600


def _cover(needed: Ints, start_steps: int) -> float:
    """Replica-steps that cover `needed` at the least cost, a start costing `start_steps`; the first ones are there."""
    cost = int(needed.sum())
    level = int(needed[0])
    # For each level, a gap is kept if it is shorter than a start. A stack holds the steps at which levels ended.
    ended: list[int] = [-(10**12)] * int(needed.max(initial=0))
    changes = np.flatnonzero(np.diff(needed)) + 1
    for at in changes.tolist():
        now = int(needed[at])
        for k in range(now, level):
            ended[k] = at
        for k in range(level, now):
            cost += min(at - ended[k], start_steps)
        level = now
    return float(cost)


def peak(work: Work, service: Service) -> int:
    """Replicas with which no request ever waits."""
    return max(1, math.ceil(int(work.concurrency.max(initial=0)) / service.slots))


def first(work: Work, target: float) -> int:
    """Replicas that the first five minutes want in the mean: what a run begins with."""
    steps = max(1, round(300 / work.step_s))
    lasting = int(np.median(work.service))
    return max(1, math.ceil(float(work.concurrency[min(lasting, len(work.concurrency) - 1) :][:steps].mean()) / target))
