"""Is this engine well? `judge` is pure: one look at the engine, what was remembered of earlier ones, and the time.

An engine whose processes live and whose /health says 200 may still make no token: vLLM answers it, and /metrics, from another
process than the one that computes. So what proves it well is work: a counter that only its core can move, or, when it has
nothing to do, one token generated for us.

    suspect   gets no new work; comes back by itself with the next proof
    failed    is ended and replaced
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

Verdict = Literal["ok", "suspect", "failed"]
# process: it ended. silent: nothing answers there. health: it says itself that it is not well. stuck: it has work and makes no
# step. refuses: it has none, and fails a generation of one token.
Cause = Literal["", "process", "silent", "health", "stuck", "refuses"]
Probe = Literal["none", "pending", "ok", "refused"]

# Steps by their length, each bucket twice as long as the one before. A step is as long as steps were on average between two
# looks, so that a hitch shorter than that is one step among dozens. A longer one counts for what it may have been: all the time
# since the last step that was seen.
_FIRST_STEP_S, _BUCKETS = 0.001, 18
_HALF_LIFE_S = 600.0
_TELLING = 0.999
STOOD_STILL_S = 10.0  # between two looks
UNREAD_S = 2.0  # since its counters were read: until then nothing new of them is no news


class Limits(msgspec.Struct, frozen=True):
    """Seconds. From the last step to a suspect are `stuck_s` and the half second between two looks, as that may come right after
    one: less than five."""

    stuck_s: float = 4.0
    slow_steps: float = 10.0  # or so many of its own slow (p99.9) steps, where that is longer
    replace_s: float = 20.0  # a suspect for so long has failed; never before three times the limit above
    sick_s: float = 3.0  # so long may it refuse, or call itself unhealthy, before it has failed
    probe_every_s: float = 10.0  # while it has nothing to do
    probe_again_s: float = 1.0  # while there is doubt


class Look(msgspec.Struct, frozen=True):
    """What was seen of the engine. `mark` is None where its counters were not read this time."""

    alive: bool = True  # its processes
    answers: bool = True  # its door did, in time
    waited_s: float = 0.0  # for that
    healthy: bool = True  # by its own word
    in_flight: int = 0  # behind its door
    entered: int = 0  # ever
    inside: int = 0  # in its own scheduler, running or waiting, as it said last
    mark: tuple[float, ...] | None = None  # counters and gauges that its core alone moves, the first counts steps
    probe: Probe = "none"
    asleep: bool = False  # put to sleep on purpose: never woken to be looked at


class Memory(msgspec.Struct, frozen=True):
    """Between two looks. Times are those of `now`, whatever clock that is."""

    proved_at: float  # when it was last seen to work
    looked_at: float | None = None  # the last time
    busy_since: float | None = None
    silent_since: float | None = None
    sick_since: float | None = None
    probed_at: float = -math.inf  # when the last probe was asked for
    mark: tuple[float, ...] = ()
    read_at: float | None = None  # when that was
    entered: int = 0
    doubted: bool = False  # requests came and went, and no step was seen
    steps: tuple[float, ...] = ()  # by length, their weight halved every `_HALF_LIFE_S`
    steps_at: float = 0.0


class Judgement(msgspec.Struct, frozen=True):
    verdict: Verdict
    memory: Memory
    cause: Cause = ""
    why: str = ""  # one line
    probe: bool = False  # generate a token, now, and say how that goes in the next looks
    turns_s: float = math.inf  # from now until the same sight is judged worse


def judge(look: Look, limits: Limits, memory: Memory, now: float) -> Judgement:
    """The verdict on one look, and what to remember for the next."""
    m = _remember(look, limits, _awake(memory, now), now)
    limit_s = limit_of(limits, m)
    replace_s = max(limits.replace_s, 3 * limit_s)
    if not look.alive:
        return Judgement("failed", m, "process", "its process ended")
    if not look.answers:
        return _aged(m, "silent", now - _since(m.silent_since, now), limit_s, replace_s, "nothing answers there")
    if look.asleep:
        return Judgement("ok", m)
    if m.sick_since is not None:
        cause: Cause = "refuses" if look.healthy else "health"
        why = "it does not generate a token" if look.healthy else "/health says that it is not well"
        due = _due(look, limits, m, now)
        judged = _aged(_asked(m, now) if due else m, cause, now - m.sick_since, 0.0, limits.sick_s, why)
        return msgspec.structs.replace(judged, probe=due)
    seen_until = _seen_until(m, limit_s, now)
    waited_s = seen_until - max(m.proved_at, m.busy_since) if m.busy_since is not None else 0.0
    if look.probe == "pending":
        # A core that stands still also says what it last said of its load: only the probe tells that from a slow client.
        asked_s = seen_until - max(m.probed_at, m.proved_at)
        waited_s = max(asked_s, waited_s if asked_s >= limit_s / 2 else 0.0)
    elif look.in_flight and not look.inside:
        waited_s = 0.0
    if waited_s >= limit_s:
        what = "step"
        if _unread_s(m, now) >= 2 * limit_s:
            # It may have made some since it was last heard of: only how long nobody could tell has it replaced.
            what, waited_s = "word of its steps", min(waited_s, _unread_s(m, now))
        why = f"no {what} for {waited_s:.1f} s with {max(look.in_flight, 1)} inside"
        return _aged(m, "stuck", waited_s, limit_s, replace_s, why)
    # What was not read lately says no more the next moment.
    turns_s = limit_s - waited_s if waited_s > 0 and seen_until == now else math.inf
    if _due(look, limits, m, now):
        return Judgement("ok", _asked(m, now), probe=True, turns_s=turns_s)
    return Judgement("ok", m, turns_s=turns_s)


def _awake(m: Memory, now: float) -> Memory:
    """Looks come twice a second and take a few at most. One that comes much later says that this machine was paused, the engine
    with it: what nobody could see then is held against nobody."""
    late_s = 0.0 if m.looked_at is None else now - m.looked_at
    if late_s <= STOOD_STILL_S:
        return msgspec.structs.replace(m, looked_at=now)
    return msgspec.structs.replace(
        m,
        looked_at=now,
        proved_at=m.proved_at + late_s,
        probed_at=m.probed_at + late_s,
        read_at=None if m.read_at is None else m.read_at + late_s,
        steps_at=m.steps_at + late_s,
        busy_since=None if m.busy_since is None else m.busy_since + late_s,
        silent_since=None if m.silent_since is None else m.silent_since + late_s,
        sick_since=None if m.sick_since is None else m.sick_since + late_s,
    )


def _seen_until(m: Memory, limit_s: float, now: float) -> float:
    """Until when it was seen to make no step. Where a machine has too little time for everybody its counters may not be had for
    seconds, while it computes; that they are late for twice the limit is no better than standing still."""
    unread_s = _unread_s(m, now)
    return now if unread_s >= 2 * limit_s else now - max(0.0, unread_s - UNREAD_S)


def _unread_s(m: Memory, now: float) -> float:
    return 0.0 if m.read_at is None else now - m.read_at


def limit_of(limits: Limits, memory: Memory) -> float:
    """How long the engine may have work and make no step, seconds."""
    return max(limits.stuck_s, limits.slow_steps * slow_step_s(memory))


def slow_step_s(memory: Memory) -> float:
    """Upper bound of its p99.9 step, of those seen; 0 while none were."""
    total = sum(memory.steps)
    if total < 1:
        return 0.0
    below = 0.0
    for i, weight in enumerate(memory.steps):
        below += weight
        if below >= _TELLING * total:
            return float(_FIRST_STEP_S * 2**i)
    return float(_FIRST_STEP_S * 2 ** (_BUCKETS - 1))


def _aged(m: Memory, cause: Cause, age_s: float, suspect_s: float, failed_s: float, why: str) -> Judgement:
    if age_s >= failed_s:
        return Judgement("failed", m, cause, why)
    if age_s >= suspect_s:
        return Judgement("suspect", m, cause, why, turns_s=failed_s - age_s)
    return Judgement("ok", m, "", why, turns_s=min(suspect_s, failed_s) - age_s)


def _due(look: Look, limits: Limits, m: Memory, now: float) -> bool:
    """Whether one token shall be generated: it has nothing to do, or says so, and has proved nothing for a while."""
    if look.probe == "pending" or (look.in_flight and look.inside):
        return False
    doubt = look.in_flight > 0 or m.doubted or m.sick_since is not None
    return now - max(m.proved_at, m.probed_at) >= (limits.probe_again_s if doubt else limits.probe_every_s)


def _asked(m: Memory, now: float) -> Memory:
    return msgspec.structs.replace(m, probed_at=now)


def _remember(look: Look, limits: Limits, m: Memory, now: float) -> Memory:
    moved = look.mark is not None and bool(m.mark) and look.mark != m.mark
    proved = moved or look.probe == "ok" or look.asleep
    steps, steps_at = m.steps, m.steps_at
    if moved and m.busy_since is not None:
        assert look.mark is not None
        gap_s = now - max(m.proved_at, m.busy_since)
        steps, steps_at = _with_steps(m, limits, gap_s, max(1.0, look.mark[0] - m.mark[0]), now), now
    bad = look.probe == "refused" or not look.healthy
    busy = look.in_flight > 0 or (not look.answers and m.busy_since is not None)
    return msgspec.structs.replace(
        m,
        proved_at=now if proved else m.proved_at,
        busy_since=_since(m.busy_since, now) if busy else None,
        silent_since=None if look.answers else _since(m.silent_since, now - look.waited_s),
        sick_since=_since(m.sick_since, now) if bad or (m.sick_since is not None and not proved) else None,
        mark=m.mark if look.mark is None else look.mark,
        read_at=m.read_at if look.mark is None else now,
        entered=look.entered,
        doubted=not proved and (m.doubted or look.entered != m.entered),
        steps=steps,
        steps_at=steps_at,
    )


def _since(known: float | None, now: float) -> float:
    return now if known is None else known


def _with_steps(m: Memory, limits: Limits, gap_s: float, count: float, now: float) -> tuple[float, ...]:
    """With `count` steps in the `gap_s` since the one before. Where none had been made when the counters were read last, one of
    them took nearly all of it. A single long one says little of what is usual, and counts as twice as long as a slow one has been
    at most: an engine that stood still once is found soon the next time, and one that is slow is known for it after a few."""
    limit_s, last_s = limit_of(limits, m), gap_s if m.read_at is None else min(gap_s, now - m.read_at)
    kept = 0.5 ** ((now - m.steps_at) / _HALF_LIFE_S) if m.steps else 0.0
    steps = [w * kept for w in m.steps] or [0.0] * _BUCKETS
    long = 1.0 if gap_s > last_s else 0.0
    most_s = 2 * limit_s / limits.slow_steps if limits.slow_steps else math.inf
    for length_s, weight in ((gap_s, long), (last_s / count, count - long)):
        at = math.ceil(math.log2(max(min(length_s, most_s), _FIRST_STEP_S) / _FIRST_STEP_S))
        steps[min(_BUCKETS - 1, at)] += weight
    return tuple(steps)
