"""How many replicas a version should have: pure. No clock, no I/O, no Ray; times are seconds.

`serve_policy` feeds it from the directory's table, `steelyard scale simulate` from a trace. One decision, in order:

1. An observation that is old decides nothing. Bounds and scheduled floors hold all the same.
2. `_demand`: requests that want a slot, from held + running, less what will clear by itself.
3. `_need`: replicas for it. A load beyond what chance explains counts in full at once, a smaller excess by its mean.
   `_room`: never fewer than what the usual noise of this load needs to be served without a wait that anybody notices.
4. Up at once, as many as needed. Down when the whole window agrees (`_fewer`), to zero when idle long enough (`_last`).
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import msgspec
from cronsim import CronSim

from serving.catalog import clock

STALE_S = 5.0  # an older observation decides nothing: the count stays
MEAN_S = 60.0  # time constant, at most, of the means that small excesses are judged by
SPREAD_S = 300.0  # likewise, of what the noise of the load is learned over
WAIT_S = 2.0  # a wait that nobody notices
ROOM = 3.6  # standard deviations of the load that are to be served with no longer one
OUTLIER = 3.0  # standard deviations beyond which an observation is no noise: another level has begun
CHANCE = 2.0  # standard deviations of independent arrivals (Poisson: the root of their number) that are no breach
NOISE = 0.10  # nor is so large a share, where numbers are so large that chance explains less
TOLERANCE = 0.05  # replicas go only if what is left would carry so much more than the load
KV_FULL = 0.90  # share of KV blocks in use beyond which vLLM soon preempts
GPU_IDLE = 0.05  # share of time; more means that somebody works


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """At least `replicas` between two cron times (five fields, local to `timezone`). Bad ones raise ValueError."""

    start: str
    end: str
    replicas: int
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        clock.zone(self.timezone)
        for name, expression in (("start", self.start), ("end", self.end)):
            try:
                clock.check_cron(expression)
            except ValueError as e:
                raise ValueError(f"{name} {expression!r} is {e}") from None
        if self.replicas < 0:
            raise ValueError(f"replicas {self.replicas} is negative")


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One version at one moment, summed over its replicas and all gateways. Rates are means of the last 10 s or so."""

    replicas: int  # asked for now: what the fleet is steering to, those that start included
    ready: int  # of them, so many serve
    held: int = 0  # requests waiting in gateways
    running: int = 0  # generations inside doors that take new work
    waiting: int = 0  # of those, waiting in the engines' own queues
    slots: int = 1  # generations that one replica's door lets in
    kv_usage: float = 0.0  # share of KV cache blocks in use, 0..1, of the fullest replica
    kv_mean: float | None = None  # the same over all replicas that serve; None: not known, the fullest stands for all
    finished_per_s: float | None = None  # requests finished per second, all replicas together; None: not known
    arrived_per_s: float | None = None  # requests that asked for a place, the refused included; None: not known
    gpu_busy: float | None = None  # share of time the GPUs worked, 0..1; tells idle from busy, nothing else
    age_s: float = 0.0  # of the oldest part of this observation


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator set for one version (`scaling:` of the model file)."""

    min: int
    max: int
    target_ongoing: float  # requests per replica that are as many as it should have
    scale_down_after_s: float = 300.0
    idle_to_zero_s: float | None = None  # None: the last replica goes as any other does
    wait_goal_s: float = 30.0  # a backlog that finishes in this time by itself wants no replicas of its own
    floors: tuple[Floor, ...] = ()


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a decision must know of earlier ones; the caller hands it back unread. Lost memory delays scaling down."""

    seen_at: float | None = None  # the last observation that was fresh
    since: float | None = None  # fresh observations without a gap from here to `seen_at`
    demand: float = 0.0  # of the last observation
    mean: float = 0.0  # of demand, exponentially weighted
    service_s: float | None = None  # seconds of service of one request, likewise; None: nothing finished yet
    level: float = 0.0  # of demand, in a mean of minutes
    spread: float = 0.0  # variance of demand around `mean`, in the same mean
    running: float = 0.0  # likewise
    finished_per_s: float = 0.0  # likewise
    needs: tuple[tuple[float, int], ...] = ()  # maxima of the down window: newer ones are smaller
    busy_at: float | None = None  # when anything was last held or running


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """`replicas` is within bounds; `reason` is one sentence for an operator."""

    replicas: int
    reason: str
    memory: Memory


def decide(load: Load, limits: Limits, memory: Memory, now: float) -> Decision:
    """Replicas for the load. `now` is Unix time, because floors are scheduled by it."""
    if not load.age_s <= STALE_S:  # not a number is old, too
        return _bounded(
            load, limits, memory, now, load.replicas, f"holds: the load was last seen {load.age_s:.0f} s ago"
        )
    memory, demand = _observed(load, limits, memory, now)
    need, why = _need(load, limits, memory, demand)
    memory, least = _window(load, limits, memory, demand, need, now)
    if need > load.replicas:
        return _bounded(load, limits, memory, now, need, why)
    if load.replicas == 1 and limits.idle_to_zero_s is not None:
        kept, more = _last(limits, memory, now)
    else:
        kept, more = _fewer(load, limits, memory, least, now)
    return _bounded(load, limits, memory, now, kept, why + more)


def _observed(load: Load, limits: Limits, memory: Memory, now: float) -> tuple[Memory, float]:
    """Memory with this observation in it, and the demand to judge by: the smaller of the last two, so that one noisy
    sample moves nothing. Without a recent one (start, gap, a clock set back) this one counts, and the window starts."""
    gap = None if memory.seen_at is None else now - memory.seen_at
    if gap is None or not 0 <= gap <= 2 * STALE_S:
        service_s = _service_s(load, None, 0.0)
        demand = _demand(load, limits, service_s)
        memory = Memory(seen_at=now, since=now, demand=demand, mean=demand, service_s=service_s, busy_at=now)
        return _learned(memory, load, demand, 1.0), demand
    service_s = _service_s(load, memory.service_s, gap)
    demand = _demand(load, limits, service_s)
    judged = min(demand, memory.demand) if load.replicas else demand
    watched = now - (now if memory.since is None else memory.since)
    # An operator who lets replicas go sooner than a minute does not want to hear of that minute.
    over_s = max(1.0, min(MEAN_S, limits.scale_down_after_s))
    mean = memory.mean + _share(gap, watched, over_s) * (judged - memory.mean)
    mean = min(mean, judged + OUTLIER * _noise(memory))  # what has fallen further is waited for by the window alone
    if demand == 0 and mean < 0.5:
        mean = 0.0  # less than a request: an exponential mean never gets there by itself
    learned = _learned(memory, load, demand, _share(gap, watched, max(1.0, min(SPREAD_S, limits.scale_down_after_s))))
    memory = msgspec.structs.replace(
        learned,
        seen_at=now,
        demand=demand,
        mean=mean,
        service_s=service_s,
        busy_at=now if _busy(load) else memory.busy_at,
    )
    return memory, judged


def _learned(memory: Memory, load: Load, demand: float, weight: float) -> Memory:
    """Memory with what `_room` judges by. Every observation counts here, high or low, or the noise would look smaller."""
    apart = demand - memory.mean
    most = OUTLIER**2 * max(1.0, memory.level)
    return msgspec.structs.replace(
        memory,
        level=memory.level + weight * (demand - memory.level),
        spread=(1 - weight) * (memory.spread + weight * min(apart * apart, most)),
        running=memory.running + weight * (load.running - memory.running),
        finished_per_s=memory.finished_per_s + weight * ((load.finished_per_s or 0.0) - memory.finished_per_s),
    )


def _share(gap: float, watched: float, over_s: float) -> float:
    """What the newest observation counts for in a mean over `over_s` seconds: its weight over the weights of all since the first.
    Began the mean at the first instead, that one would outweigh all others for most of a minute: a low one lets
    replicas go that ordinary noise wants back."""
    weight = -math.expm1(-gap / over_s)
    return weight / -math.expm1(-(gap + watched) / over_s) if weight else 0.0


def _service_s(load: Load, known: float | None, gap: float) -> float | None:
    """Seconds of service of one request by Little's law: running over finished per second, in the mean. Where replicas
    have just come, many run before any has finished, so one observation counts for twice or half of the mean at most."""
    if not load.running or not load.finished_per_s:
        return known
    seen = load.running / load.finished_per_s
    if not math.isfinite(seen):
        return known  # a rate next to nothing says what no rate says, and infinity less itself is not a number
    if known is None:
        return seen
    return known + (1 - math.exp(-gap / MEAN_S)) * (min(max(seen, known / 2), known * 2) - known)


def _demand(load: Load, limits: Limits, service_s: float | None) -> float:
    """Requests that want a slot at once: all that run and all that are held, less what needs no slot of its own.

    While replicas start, the queue grows although enough are on their way. Arrivals per second times seconds of service
    is what would run if none were held; the backlog is to be cleared in `wait_goal_s`, in which one slot serves several
    requests if they are short. Where both are known, no more than this is asked for.
    """
    ongoing = float(load.held + load.running)
    if not load.held or load.arrived_per_s is None or service_s is None:
        return ongoing
    backlog = load.held * min(1.0, service_s / limits.wait_goal_s)
    return min(ongoing, max(load.running, load.arrived_per_s * service_s + backlog))


def _need(load: Load, limits: Limits, memory: Memory, demand: float) -> tuple[int, str]:
    target = limits.target_ongoing
    held = f"held {load.held} + running {load.running}"
    level = _breach(load, limits)
    need = math.ceil(memory.mean / target) if load.replicas else 0  # at zero only who waits counts, not what was
    why = f"{held}, in the mean {memory.mean:.0f}, over target {target:g} per replica needs {need}"
    if load.replicas and (room := _room(load, memory)) > need:
        need = room
        usual = f"usually {memory.level:.0f} give or take {_noise(memory):.0f}"
        why = f"{held}, {usual}, needs {need} to wait for no more than {WAIT_S:g} s"
    if demand > level or load.replicas == 0:
        need = max(need, math.ceil(demand / target))
        why = f"{held} over target {target:g} per replica needs {need}"
        if demand < load.held + load.running:
            why = f"{held}, of which {demand:.0f} want a slot at once, over target {target:g} per replica needs {need}"
    if load.kv_usage >= KV_FULL and load.held + load.waiting > 0 and _kv_need(load) > need:
        need = _kv_need(load)
        why = f"KV cache {load.kv_usage:.0%} full with requests waiting needs {need}"
    return need, why


def _room(load: Load, memory: Memory) -> int:
    """Replicas with which hardly any request waits longer than `WAIT_S` for the noise of this load: square-root staffing,
    with the variance as measured instead of that of independent arrivals. Requests that are held take turns: in
    `WAIT_S` so many finish as run, times that over the seconds of service. Means nothing in a large fleet, whose noise is
    small to what the target leaves free; in one of five replicas the target leaves too little."""
    if not load.held + load.running or not memory.finished_per_s or not memory.running:
        return 0
    served = load.slots * (1 + WAIT_S * memory.finished_per_s / memory.running)
    usual = min(memory.level, memory.mean + _noise(memory))  # a load that has fallen is not what it was
    return math.ceil((usual + ROOM * _noise(memory)) / served)


def _noise(memory: Memory) -> float:
    """One standard deviation; not less than that of independent arrivals."""
    return math.sqrt(max(memory.spread, memory.level))


def _breach(load: Load, limits: Limits) -> float:
    """Requests beyond which the load is too much now: more than chance explains, or than what finishes in
    `WAIT_S` takes from the queue when every slot is taken. A moment without a free slot is no breach."""
    fair = load.replicas * limits.target_ongoing
    full = load.replicas * load.slots + WAIT_S * (load.finished_per_s or 0.0)
    return max(fair, min(fair + max(CHANCE * math.sqrt(fair), NOISE * fair), full))


def _unbreached(load: Load, limits: Limits, demand: float) -> int:
    """The fewest replicas at which this demand would be no breach: `_breach` solved for the count."""
    by_chance = (math.sqrt(demand + (CHANCE / 2) ** 2) - CHANCE / 2) ** 2
    fair = math.ceil(min(by_chance, demand / (1 + NOISE)) / limits.target_ongoing)
    full = math.ceil(max(0.0, demand - WAIT_S * (load.finished_per_s or 0.0)) / load.slots)
    return max(fair, min(full, math.ceil(demand / limits.target_ongoing)))


def _kv_need(load: Load) -> int:
    """Replicas that bring the KV cache below full. Judged by the ready ones: those that start have not taken any yet."""
    mean = load.kv_usage if load.kv_mean is None else load.kv_mean
    return math.ceil(load.ready * mean / KV_FULL)


def _window(load: Load, limits: Limits, memory: Memory, demand: float, need: int, now: float) -> tuple[Memory, int]:
    """The least count that is safe to go down to: what the window needed at most, and never less than what is here."""
    roomy = math.ceil(memory.mean * (1 + TOLERANCE) / limits.target_ongoing)
    kept = max(
        roomy, need, _unbreached(load, limits, demand), _kv_need(load) if load.running else 0, 1 if _busy(load) else 0
    )
    since = now - limits.scale_down_after_s
    needs = (*((t, n) for t, n in memory.needs if t >= since and n > kept), (now, kept))
    here = math.ceil(memory.demand / limits.target_ongoing)
    return msgspec.structs.replace(memory, needs=needs), max(needs[0][1], here)


def _fewer(load: Load, limits: Limits, memory: Memory, least: int, now: float) -> tuple[int, str]:
    if least >= load.replicas:
        return load.replicas, ""
    watched = now - (now if memory.since is None else memory.since)
    if watched < limits.scale_down_after_s:
        return load.replicas, f"; watched for {watched:.0f} of {limits.scale_down_after_s:g} s"
    if least == 0 and limits.idle_to_zero_s is not None:
        return 1, ""  # the last one has a time of its own
    return least, f"; the last {limits.scale_down_after_s:g} s, with {TOLERANCE:.0%} to spare, needed {least}"


def _last(limits: Limits, memory: Memory, now: float) -> tuple[int, str]:
    """The last replica goes by its own time alone, which may be shorter than the window, or longer."""
    assert limits.idle_to_zero_s is not None
    idle = now - (now if memory.busy_at is None else memory.busy_at)
    if idle <= 0:
        return 1, ""
    if idle < limits.idle_to_zero_s:
        return 1, f"; idle for {idle:.0f} of {limits.idle_to_zero_s:g} s"
    return 0, f"; idle for {idle:.0f} s"


def _busy(load: Load) -> bool:
    return load.held > 0 or load.running > 0 or (load.gpu_busy or 0.0) > GPU_IDLE


def _bounded(load: Load, limits: Limits, memory: Memory, now: float, wanted: int, why: str) -> Decision:
    floor = max((f.replicas for f in limits.floors if holds(f, int(now // 60))), default=0)
    replicas = min(max(wanted, limits.min, floor), limits.max)
    if replicas > wanted:
        why += f"; the schedule keeps {replicas}" if floor >= replicas > limits.min else f"; min is {limits.min}"
    elif replicas < wanted:
        why += f"; max is {limits.max}"
    if replicas == load.replicas:
        starting = load.replicas - load.ready
        why += f": stays at {replicas}" + (f", of which {starting} start" if starting > 0 else "")
    else:
        why += f": {'up' if replicas > load.replicas else 'down'} from {load.replicas} to {replicas}"
    return Decision(replicas=replicas, reason=why, memory=memory)


@lru_cache(maxsize=256)
def holds(floor: Floor, minute: int) -> bool:
    """Whether the last start is younger than the last end, at that minute of Unix time. Cron's own rules at the change of
    summer time."""
    at = (datetime.fromtimestamp(minute * 60, UTC) + timedelta(seconds=1)).astimezone(ZoneInfo(floor.timezone))
    try:
        started = next(CronSim(floor.start, at, reverse=True))
    except StopIteration:
        return False
    try:
        return started > next(CronSim(floor.end, at, reverse=True))
    except StopIteration:
        return True
