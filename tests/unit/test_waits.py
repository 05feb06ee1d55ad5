"""What is refused, and whether the time that is told to come back is true: overload in jumping time."""

from __future__ import annotations

import asyncio
import bisect
from collections import Counter

import pytest

from serving.errors import QueueFull, WaitTooLong
from serving.fleet.endpoint import State
from serving.gateway.pace import Holds, Pace
from tests.unit import virtual
from tests.unit.virtual import World


@pytest.mark.slow
@pytest.mark.parametrize(("max_queue", "max_wait_s", "why"), [(512, 5.0, WaitTooLong), (200, 60.0, QueueFull)])
def test_under_ten_times_the_load_waits_are_bounded_and_retry_after_is_true(
    max_queue: int, max_wait_s: float, why: type[Exception]
) -> None:
    world = World(engines=2, max_queue=max_queue, max_wait_s=max_wait_s)
    per_s, seconds = 32, 25  # what it can serve

    async def run() -> None:
        with world.running():
            world.spawn(world.open_loop(lambda: 0, "a", per_s=10 * per_s))
            await asyncio.sleep(seconds)
            assert len(world.lines[0]) <= max_queue

    virtual.run(run)
    waits = sorted(world.waits)
    waited = sorted(w for _, w in waits)
    assert len(waits) > 0.9 * per_s * seconds
    assert waited[-1] <= max_wait_s + 0.01
    kinds = Counter(type(e) for _, e in world.refusals)
    assert set(kinds) <= {QueueFull, WaitTooLong}
    assert kinds.most_common(1)[0][0] is why
    # What those waited who came in the same moment and were let in.
    arrivals = [a for a, _ in waits]
    factors = []
    for at, error in world.refusals:
        near = waits[max(0, bisect.bisect(arrivals, at) - 5) :][:10]
        if at < 1000 + seconds - 8 and near and error.retry_after_s is not None:
            truth = max(1.0, sum(w for _, w in near) / len(near))
            said = int(dict(error.headers())[b"retry-after"])
            factors.append(max(truth / said, said / truth))
    factors.sort()
    assert factors[len(factors) // 2] < 1.5
    assert factors[int(len(factors) * 0.95)] < 2.0


def test_who_is_alone_may_wait_however_slow_it_was() -> None:
    """Else nobody would find out that it is faster now."""
    world = World(engines=1, slots=1, max_wait_s=5.0)
    slow = True
    world.service = lambda r: 4.9 if slow else 0.1

    async def run() -> None:
        nonlocal slow
        with world.running():
            for _ in range(3):
                world.spawn(world.client(0, "a"))
            await asyncio.sleep(300)
            slow = False
            before = world.done["a"]
            await asyncio.sleep(60)
            assert world.done["a"] - before > 50

    virtual.run(run)


def test_a_pace_counts_only_the_time_in_which_somebody_waits() -> None:
    pace = Pace()
    pace.mark(0, True)
    for i in range(40):
        pace.served(0.1 * (i + 1))
    pace.mark(4.0, False)
    assert pace.per_s(30) == pytest.approx(10, rel=0.05)
    pace.mark(30, True)
    assert pace.per_s(30) == pytest.approx(10, rel=0.05)
    assert (pace.per_s(60) or 0) < 2


def test_a_pace_follows_a_change_and_forgets_what_is_long_ago() -> None:
    pace = Pace()
    pace.mark(0, True)
    now = 0.0
    for gap in [0.1] * 100 + [0.01] * 1500:
        now += gap
        pace.served(now)
    assert pace.per_s(now) == pytest.approx(100, rel=0.1)
    pace.mark(now, False)
    pace.mark(now + 1000, True)
    assert pace.per_s(now + 1000) is None


def test_before_the_first_has_ended_their_age_tells() -> None:
    holds = Holds()
    assert holds.hold_s(0, 0, 10) is None
    assert holds.hold_s(4, 4 * 8.0, 10) == 4  # half of what they take is over, on average
    for _ in range(4):
        holds.ended(2.0)
    assert holds.hold_s(4, 4 * 8.0, 10) == 2


def test_that_the_first_to_end_are_short_misleads_nobody() -> None:
    holds = Holds()
    for _ in range(3):
        holds.ended(0.1)
    assert holds.hold_s(6, 6 * 9.9, 10) == pytest.approx(0.1 + 0.1 * 6 / 3)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("late_s", [0.2, 0.7])
@pytest.mark.parametrize(("first", "gap_s"), [(0, 0.0005), (1, 0.0), (1, 0.0005), (4, 0.0005), (16, 0.0)])
def test_the_gateway_that_has_few_slots_in_a_burst_refuses_nobody_for_that(
    first: int, gap_s: float, late_s: float, known: bool
) -> None:
    """The other one was there first, and has filled all but a few: what is inside of ours says nothing of how many will be.
    `known`: both have seen before how long requests take, and had nothing to do or to tell since."""
    world = World(gateways=2, engines=4, slots=84, max_queue=1024, max_wait_s=30)
    world.service = lambda r: 12.0 if r.random() < 0.3 else r.uniform(1.6, 4.8)

    async def come(gateway: int, number: int, at: float) -> None:
        await asyncio.sleep(at)
        for _ in range(number):
            world.spawn(world.client(gateway, "a"))
            await asyncio.sleep(gap_s)

    async def run() -> None:
        with world.running():
            for gateway in (0, 1) * 20 * known:
                world.spawn(world.request(gateway, "a"))
            await asyncio.sleep(20.26 * known)
            for burst in (come(0, first, 0.0), come(1, 342, 0.05), come(0, 342 - first, late_s)):
                world.spawn(burst)
            await asyncio.sleep(30)

    virtual.run(run)
    assert not world.refusals
    assert max(wait for _, wait in world.waits) < 20


@pytest.mark.parametrize("gateways", [1, 2, 8])
def test_who_enters_in_a_burst_at_all_gateways_is_served_in_time(gateways: int) -> None:
    """What the others told is from before it: each knows only how many gateways there are."""
    world = World(gateways=gateways, engines=4, slots=8, max_queue=4096, max_wait_s=20)
    world.service = lambda r: r.uniform(1, 3)

    async def run() -> None:
        with world.running():
            usual = world.spawn(world.open_loop(lambda: world.rng.randrange(gateways), "a", per_s=8))
            await asyncio.sleep(60)
            assert not world.refusals
            usual.cancel()
            for number in range(2400):
                await asyncio.sleep(world.rng.expovariate(8000))
                world.spawn(world.request(number % gateways, "a"))
            await asyncio.sleep(40)

    virtual.run(run)
    in_vain = [e for _, e in world.refusals if "no slot came free" in str(e)]
    assert len(world.refusals) > 2000  # some 300 can be served in 20 s
    assert len(in_vain) < 0.1 * len(world.refusals)


def test_a_burst_of_a_low_class_counts_on_no_slots_that_a_higher_one_keeps() -> None:
    """However many more are asked for at once. All of the higher class is at another gateway."""
    world = World(gateways=2, engines=4, slots=16, max_queue=2048, max_wait_s=30)
    world.service = lambda r: r.uniform(2, 6)

    async def run() -> None:
        with world.running():
            for _ in range(80):
                world.spawn(world.client(1, "i", rank=0))
            for _ in range(4):
                world.spawn(world.client(0, "usual", rank=2))
            await asyncio.sleep(20)
            for _ in range(3):
                for _ in range(200):
                    world.spawn(world.request(0, "burst", rank=2))
                await asyncio.sleep(35)

    virtual.run(run)
    in_vain = [e for _, e in world.refusals if "no slot came free" in str(e)]
    assert world.done["burst"] > 50  # a tenth of 16 slots/s is theirs
    assert len(in_vain) < 0.1 * len(world.refusals)


@pytest.mark.parametrize(("gateways", "draining"), [(1, 3), (2, 2)])
def test_what_is_inside_where_replicas_drain_makes_no_room(gateways: int, draining: int) -> None:
    world = World(gateways=gateways, engines=4, slots=64, max_queue=2048, max_wait_s=40)
    world.service = lambda r: r.uniform(10, 30)

    async def run() -> None:
        with world.running():
            for _ in range(240):
                world.spawn(world.client(gateways - 1, "usual"))
            for _ in range(10):
                world.spawn(world.client(0, "few"))
            await asyncio.sleep(60)
            for door in list(world.doors.values())[:draining]:
                door.state = State.DRAINING
            await asyncio.sleep(2)
            for _ in range(300):
                world.spawn(world.request(0, "burst"))
            await asyncio.sleep(45)

    virtual.run(run)
    in_vain = [e for _, e in world.refusals if "no slot came free" in str(e)]
    assert world.done["burst"] > 20
    assert len(in_vain) < 0.3 * len(world.refusals)
