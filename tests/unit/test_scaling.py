"""Replica decisions: proportional and at once on the way up, slow on the way down, never on bad data."""

from __future__ import annotations

import math
from datetime import datetime
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from serving.fleet.scaling import STALE_S, Decision, Floor, Limits, Load, Memory, decide

NOW = 1_800_000_000.0
LIMITS = Limits(min=0, max=1000, target_ongoing=48)


def watched(limits: Limits, load: Load, seconds: float, memory: Memory | None = None, at: float = NOW) -> Decision:
    """The last decision of so many seconds of one load, each decision carried out at once."""
    decision = decide(load, limits, memory or Memory(), at)
    for second in range(1, round(seconds) + 1):
        load = msgspec.structs.replace(load, replicas=decision.replicas, ready=decision.replicas)
        decision = decide(load, limits, decision.memory, at + second)
    return decision


loads = st.builds(
    lambda replicas, starting, held, running, waiting, kv, rates, busy: Load(
        replicas=replicas,
        ready=max(0, replicas - starting),
        held=held,
        running=running,
        waiting=min(waiting, running),
        slots=64,
        kv_usage=kv,
        finished_per_s=None if rates is None else rates[0],
        arrived_per_s=None if rates is None else rates[1],
        gpu_busy=busy,
    ),
    st.integers(0, 60),
    st.integers(0, 10),
    st.integers(0, 3000),
    st.integers(0, 3000),
    st.integers(0, 100),
    st.floats(0, 1),
    st.none() | st.tuples(st.floats(0, 200), st.floats(0, 200)),
    st.none() | st.floats(0, 1),
)
bounds = st.tuples(st.integers(0, 20), st.integers(1, 80)).map(lambda b: (min(b), max(b)))
limitses = st.builds(
    lambda b, target, window, idle: Limits(
        min=b[0], max=b[1], target_ongoing=target, scale_down_after_s=window, idle_to_zero_s=idle
    ),
    bounds,
    st.floats(1, 64),
    st.sampled_from([0.0, 10.0, 300.0]),
    st.none() | st.sampled_from([30.0, 600.0]),
)


@given(limitses, st.lists(loads, min_size=1, max_size=30))
def test_within_bounds_and_with_a_reason_whatever_comes(limits: Limits, course: list[Load]) -> None:
    memory = Memory()
    for second, load in enumerate(course):
        decision = decide(load, limits, memory, NOW + second)
        memory = decision.memory
        assert limits.min <= decision.replicas <= limits.max
        assert decision.reason and "\n" not in decision.reason


@given(limitses, st.lists(loads, min_size=1, max_size=40))
def test_no_decrease_until_the_whole_window_was_watched(limits: Limits, course: list[Load]) -> None:
    memory = Memory()
    for second, load in enumerate(course):
        decision = decide(load, limits, memory, NOW + second)
        memory = decision.memory
        last = load.replicas == 1 and limits.idle_to_zero_s is not None  # has a time of its own
        if second < limits.scale_down_after_s and not last:
            assert decision.replicas >= min(load.replicas, limits.max)
        if last and second < (limits.idle_to_zero_s or 0):
            assert decision.replicas >= 1


@given(limitses, st.lists(loads, min_size=2, max_size=30))
def test_never_below_what_is_in_flight(limits: Limits, course: list[Load]) -> None:
    memory = Memory()
    for second, load in enumerate(course):
        decision = decide(load, limits, memory, NOW + second)
        memory = decision.memory
        here = math.ceil(load.running / limits.target_ongoing)
        if decision.replicas < load.replicas <= limits.max:
            assert decision.replicas >= min(here, load.replicas)


@given(limitses, loads, loads, st.floats(STALE_S + 0.1, 1e6))
def test_holds_on_old_data(limits: Limits, before: Load, load: Load, age: float) -> None:
    memory = decide(before, limits, Memory(), NOW).memory
    decision = decide(msgspec.structs.replace(load, age_s=age), limits, memory, NOW + 1)
    assert decision.replicas == min(max(load.replicas, limits.min), limits.max)
    assert decision.memory == memory


@given(limitses, loads)
def test_a_gap_in_the_data_starts_the_window_anew(limits: Limits, load: Load) -> None:
    memory = watched(limits, load, 5).memory
    late = NOW + 86_400
    decision = decide(load, limits, memory, late)
    if limits.scale_down_after_s > 0:
        assert decision.replicas >= min(load.replicas, limits.max)


@given(limitses, loads)
@example(  # so few finish that the seconds of service are infinite
    Limits(min=0, max=2, target_ongoing=2),
    Load(replicas=0, ready=0, held=30, running=1, slots=64, finished_per_s=5e-324, arrived_per_s=1.0),
)
@settings(max_examples=50)
def test_steady_load_settles_and_stays(limits: Limits, load: Load) -> None:
    limits = msgspec.structs.replace(limits, scale_down_after_s=20.0, idle_to_zero_s=None)
    load = msgspec.structs.replace(load, kv_usage=0.0)  # with a full cache at any count there is nothing to settle at
    settled = watched(limits, load, 45)
    again = watched(
        limits,
        msgspec.structs.replace(load, replicas=settled.replicas, ready=settled.replicas),
        45,
        settled.memory,
        NOW + 46,
    )
    assert again.replicas == settled.replicas


@given(limitses, loads, st.integers(0, 500), st.integers(0, 500))
def test_more_load_never_means_fewer_replicas(limits: Limits, load: Load, held: int, running: int) -> None:
    """Where as much is known: the first that runs tells how long requests take, before which each is taken for long."""
    assume(load.running or not running)
    more = msgspec.structs.replace(load, held=load.held + held, running=load.running + running)
    assert watched(limits, more, 1).replicas >= watched(limits, load, 1).replicas


@given(st.integers(0, 2**32 - 1), st.integers(30, 20_000), st.sampled_from([8.0, 48.0, 200.0]))
@example(285, 540, 8.0)  # the first observation a tenth low, the window no longer than the mean's minute
@example(2548, 387, 8.0)
@example(3843011676, 437, 48.0)
@settings(max_examples=50, deadline=None)
def test_no_flapping_under_ten_percent_noise(seed: int, ongoing: int, target: float) -> None:
    limits = Limits(min=1, max=3000, target_ongoing=target, scale_down_after_s=60)
    noise = np.random.default_rng(seed).uniform(0.9, 1.1, 400)
    replicas, memory, course = math.ceil(ongoing / target), Memory(), []
    for second, factor in enumerate(noise):
        load = Load(replicas=replicas, ready=replicas, running=round(ongoing * factor), slots=int(target * 1.3))
        decision = decide(load, limits, memory, NOW + second)
        replicas, memory = decision.replicas, decision.memory
        course.append(replicas)
    settled = np.diff(course[60:])  # the first decision has one sample, which may be a tenth high; a window lets it go
    assert (settled <= 0).all(), "what was given up is never wanted back"


def test_a_step_is_answered_at_the_second_sample_in_proportion() -> None:
    quiet = Load(replicas=1, ready=1, running=1, slots=64)
    memory = watched(LIMITS, quiet, 20).memory
    step = Load(replicas=1, ready=1, held=40, running=64, slots=64)
    first = decide(step, LIMITS, memory, NOW + 20.5)
    second = decide(step, LIMITS, first.memory, NOW + 21)
    assert (first.replicas, second.replicas) == (1, 3)
    assert second.reason == "held 40 + running 64 over target 48 per replica needs 3: up from 1 to 3"


def test_one_noisy_sample_moves_nothing() -> None:
    quiet = Load(replicas=2, ready=2, running=60, slots=64)
    memory = watched(LIMITS, quiet, 20).memory
    noisy = decide(msgspec.structs.replace(quiet, held=4000), LIMITS, memory, NOW + 21)
    assert noisy.replicas == 2
    assert watched(LIMITS, quiet, 20, noisy.memory, NOW + 22).replicas == 2


def test_a_small_excess_that_stays_is_answered_too() -> None:
    load = Load(replicas=10, ready=10, running=490, slots=64)
    assert watched(LIMITS, load, 1).replicas == 11, "no memory: the first sample is the mean"
    memory = watched(LIMITS, msgspec.structs.replace(load, running=470), 60).memory
    assert decide(load, LIMITS, memory, NOW + 61).replicas == 10
    assert watched(LIMITS, load, 120, memory, NOW + 61).replicas == 11


def test_replicas_that_start_count_as_coming() -> None:
    """Two minutes of a start, an arrival rate that needs four: the queue grows all the while, the ask does not."""
    memory, asked = (
        watched(LIMITS, Load(replicas=1, ready=1, running=40, finished_per_s=4, arrived_per_s=4), 60).memory,
        1,
    )
    for second in range(120):
        load = Load(
            replicas=asked,
            ready=1,
            held=min(512, 10 * second),
            running=64,
            slots=64,
            finished_per_s=6.4,
            arrived_per_s=16.4,
        )
        decision = decide(load, LIMITS, memory, NOW + 61 + second)
        asked, memory = decision.replicas, decision.memory
    steady = math.ceil(16.4 * 10 / 48)
    assert steady <= asked <= 2 * steady + 1


def test_down_to_what_the_window_needed_with_room_to_spare() -> None:
    limits = msgspec.structs.replace(LIMITS, min=1)
    memory = watched(limits, Load(replicas=10, ready=10, running=400, slots=64), 30).memory
    low = Load(replicas=10, ready=10, running=90, slots=64)
    early = watched(limits, low, 290, memory, NOW + 31)
    assert early.replicas == 10 - 1  # 400 need nine; the window was full at the end
    late = watched(limits, low, 900, memory, NOW + 31)
    assert late.replicas == 2
    assert watched(limits, low, 100).replicas == 10, "nothing known of before"


def test_to_zero_only_when_idle_for_long_and_up_at_once() -> None:
    limits = Limits(min=0, max=4, target_ongoing=8, scale_down_after_s=60, idle_to_zero_s=600)
    busy = watched(limits, Load(replicas=2, ready=2, running=9, slots=8), 100).memory
    idle = Load(replicas=2, ready=2, slots=8)
    assert watched(limits, idle, 590, busy, NOW + 101).replicas == 1
    gone = watched(limits, idle, 610, busy, NOW + 101)
    assert gone.replicas == 0
    woken = decide(Load(replicas=0, ready=0, held=20), limits, gone.memory, NOW + 800)
    assert woken.replicas == 3
    assert "up from 0 to 3" in woken.reason


def test_at_zero_what_was_before_wakes_nobody() -> None:
    limits = Limits(min=0, max=1, target_ongoing=8, scale_down_after_s=300, idle_to_zero_s=5)
    busy = watched(limits, Load(replicas=1, ready=1, running=7, slots=8, finished_per_s=1, arrived_per_s=1), 400).memory
    gone = watched(limits, Load(replicas=1, ready=1, slots=8), 7, busy, NOW + 401)
    assert gone.replicas == 0
    assert watched(limits, Load(replicas=0, ready=0), 60, gone.memory, NOW + 409).replicas == 0


def noisy(sd: float, replicas: int, mean: float = 32.0, seconds: int = 900) -> int:
    """Replicas of eight slots for a load that varies around its mean, each request a served one of ten seconds."""
    limits = Limits(min=1, max=500, target_ongoing=7.2)
    memory, noise = Memory(), np.random.default_rng(7).normal(0, 1, seconds // 5)
    for second in range(seconds):
        running = max(0, round(mean + sd * float(noise[second // 5])))
        load = Load(
            replicas=replicas,
            ready=replicas,
            running=running,
            slots=8,
            finished_per_s=mean / 10,
            arrived_per_s=mean / 10,
        )
        decision = decide(load, limits, memory, NOW + second)
        replicas, memory = decision.replicas, decision.memory
    return replicas


def test_a_small_fleet_keeps_room_for_the_noise_of_its_load() -> None:
    """32 at once on eight slots each: five replicas by the target; what varies more needs more, a large fleet does not."""
    assert (noisy(5.7, 5), noisy(8.5, 5)) == (6, 7)
    assert noisy(40.0, 223, mean=1600.0, seconds=400) <= 1.02 * math.ceil(1600 / 7.2)


def test_a_load_that_has_fallen_is_waited_for_by_the_window_alone() -> None:
    limits = Limits(min=1, max=50, target_ongoing=48, scale_down_after_s=100)
    high = Load(replicas=10, ready=10, running=440, slots=64, finished_per_s=44, arrived_per_s=44)
    memory = watched(limits, high, 600).memory
    low = msgspec.structs.replace(high, running=90, finished_per_s=9, arrived_per_s=9)
    assert watched(limits, low, 99, memory, NOW + 601).replicas == 10
    assert watched(limits, low, 110, memory, NOW + 601).replicas <= 4


def test_busy_gpus_keep_the_last_replica() -> None:
    limits = Limits(min=0, max=4, target_ongoing=8, scale_down_after_s=10, idle_to_zero_s=20)
    idle = Load(replicas=1, ready=1, slots=8)
    assert watched(limits, msgspec.structs.replace(idle, gpu_busy=0.4), 100).replicas == 1
    assert watched(limits, msgspec.structs.replace(idle, gpu_busy=0.01), 100).replicas == 0


def test_a_full_kv_cache_with_waiting_requests_asks_for_one_more_and_keeps_replicas() -> None:
    full = Load(replicas=4, ready=4, running=20, waiting=6, slots=64, kv_usage=0.97)
    up = decide(full, LIMITS, Memory(), NOW)
    assert up.replicas == 5
    assert "KV cache 97% full" in up.reason
    nobody_waits = msgspec.structs.replace(full, waiting=0)
    assert watched(LIMITS, nobody_waits, 1000).replicas == 4, "the rest would not hold these contexts"
    starting = msgspec.structs.replace(full, replicas=5)
    assert decide(starting, LIMITS, up.memory, NOW + 1).replicas == 5, "one more is on its way"


def test_a_backlog_that_clears_by_itself_asks_for_nothing() -> None:
    limits = Limits(min=1, max=50, target_ongoing=60)
    short = Load(replicas=1, ready=1, held=40, running=55, slots=64, finished_per_s=110.0, arrived_per_s=100.0)
    assert watched(limits, short, 60).replicas == 1
    unknown = msgspec.structs.replace(short, finished_per_s=None)
    assert watched(limits, unknown, 60).replicas == 2


BERLIN = Floor(start="0 8 * * 1-5", end="0 18 * * 1-5", timezone="Europe/Berlin", replicas=4)


@pytest.mark.parametrize(
    "local, replicas",
    [
        ("2026-03-30 07:59", 1),
        ("2026-03-30 08:00", 4),  # the first working day of summer time
        ("2026-03-30 17:59", 4),
        ("2026-03-30 18:00", 1),
        ("2026-03-28 12:00", 1),  # Saturday
        ("2026-12-01 08:00", 4),
    ],
)
def test_a_scheduled_floor_holds_between_its_times_in_its_zone(local: str, replicas: int) -> None:
    now = datetime.fromisoformat(local).replace(tzinfo=ZoneInfo("Europe/Berlin")).timestamp()
    limits = Limits(min=1, max=9, target_ongoing=8, floors=(BERLIN,))
    assert decide(Load(replicas=1, ready=1), limits, Memory(), now).replicas == replicas
    assert decide(Load(replicas=1, ready=1, age_s=99), limits, Memory(), now).replicas == replicas
    if replicas == 4:
        assert "the schedule keeps 4" in decide(Load(replicas=1, ready=1), limits, Memory(), now).reason
        few = msgspec.structs.replace(limits, max=2)
        assert decide(Load(replicas=1, ready=1), few, Memory(), now).replicas == 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"start": "0 25 * * *"}, "start '0 25 \\* \\* \\*' is no cron time .*five fields"),
        ({"end": "0 0 * * * *"}, "end .* is no cron time"),
        ({"start": "0 0 30 2 *"}, "start '0 0 30 2 \\*' is no cron time"),
        ({"timezone": "Mars/Olympus"}, "timezone 'Mars/Olympus' is not known"),
        ({"timezone": "../etc/passwd"}, "is not known"),
        ({"replicas": -1}, "negative"),
    ],
)
def test_a_floor_that_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    fields = {"start": "0 8 * * *", "end": "0 18 * * *", "replicas": 1, **wrong}
    with pytest.raises(ValueError, match=message):
        Floor(**fields)  # type: ignore[arg-type]
