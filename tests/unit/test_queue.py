"""The line of waiting requests: whatever happens in whatever order, slots are neither overrun nor lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.errors import NoReplica, QueueFull, WaitTooLong
from serving.fleet.endpoint import Endpoint, KeyDemand, State
from serving.gateway import queue, routing, shares
from serving.gateway.queue import Ticket, VersionLine, bound_wait
from serving.gateway.routing import Upstream, pick

NONE: frozenset[str] = frozenset()


def endpoint(name: str = "a", slots: int = 2, state: State = State.READY, **more: Any) -> Endpoint:
    return Endpoint(id=name, model="m", version="v", url=f"http://{name}", state=state, slots=slots, **more)


def line(*endpoints: Endpoint) -> VersionLine:
    made = VersionLine("m@v")
    made.update(endpoints, only_add=False)
    return made


def ticket(*, since: float = 0, avoid: frozenset[str] = NONE, **more: Any) -> Ticket:
    made = Ticket(since=since, **more)
    made.avoid = avoid
    return made


def take(
    to: VersionLine,
    *,
    max_queue: int = 100,
    max_wait_s: float = 60.0,
    others: int = 0,
    again: bool = False,
    admitted: bool = False,
    **of: Any,
) -> Coroutine[Any, Any, Ticket]:
    """A request that asks for a slot; the ticket it then holds."""
    asks = of.pop("ticket", None) or ticket(**of)

    async def bound() -> Ticket:
        await to.take(asks, others=others, max_queue=max_queue, max_wait_s=max_wait_s, again=again, admitted=admitted)
        return asks

    return bound()


def at(one: Ticket) -> str:
    """Where it is bound."""
    assert one.upstream is not None
    return one.upstream.endpoint.id


async def waiting(to: VersionLine, **how: Any) -> asyncio.Task[Ticket]:
    """A request that has joined the line and waits."""
    task = asyncio.create_task(take(to, **how))
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def taught(monkeypatch: pytest.MonkeyPatch) -> VersionLine:
    """A line that has seen a hundred small requests, of 12 s each; its time stands still."""
    now = [0.0]
    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=lambda: now[0]))
    to = line(endpoint(slots=64, kv_tokens=100_000))
    for _ in range(100):
        taken = await take(to, tokens=300)
        now[0] += 12
        to.release(taken)
    return to


async def test_a_free_slot_is_bound_at_once_and_the_least_loaded_first() -> None:
    to = line(endpoint("a", 2), endpoint("b", 4))
    assert [at(await take(to)) for _ in range(6)] == ["a", "b", "b", "a", "b", "b"]


async def test_where_somebody_is_on_trial_others_go_only_when_there_is_no_room_elsewhere() -> None:
    to = line(endpoint("a", 4), endpoint("b", 2))
    await to.trials.take(lambda: "a")
    assert [at(await take(to)) for _ in range(3)] == ["b", "b", "a"]
    to.trials.give("a")
    assert at(await take(to)) == "a"


async def test_first_come_first_served() -> None:
    to = line(endpoint(slots=1))
    taken = await take(to)
    tasks = [await waiting(to) for _ in range(3)]
    order = []
    for task in tasks:
        to.release(taken)
        await settled()
        order.append([t.done() for t in tasks])
        taken = await task
    assert order == [[True, False, False], [True, True, False], [True, True, True]]


async def test_who_was_admitted_before_enters_a_full_queue_in_its_place_and_nobody_gives_way() -> None:
    to = line(endpoint(slots=1))
    taken = await take(to)
    held = [await waiting(to, key="x", max_queue=2) for _ in range(2)]
    with pytest.raises(QueueFull):
        await take(to, key="x", max_queue=2)
    held.insert(1, await waiting(to, key="y", max_queue=2, admitted=True))
    for i, task in enumerate(held):
        to.release(taken)
        await settled()
        assert [t.done() for t in held] == [j <= i for j in range(3)]
        taken = await task


async def test_who_was_admitted_before_does_not_give_way_first() -> None:
    to = line(endpoint(slots=1))
    await take(to)
    held = [await waiting(to, key="x", max_queue=2) for _ in range(2)]
    admitted = await waiting(to, key="x", max_queue=2, admitted=True)
    other = await waiting(to, key="y", max_queue=3)
    await settled()
    assert [t.done() for t in (*held, admitted, other)] == [False, True, False, False]
    with pytest.raises(QueueFull):
        await held[1]
    for task in (held[0], admitted, other):
        task.cancel()
    await asyncio.gather(held[0], admitted, other, return_exceptions=True)


async def test_a_new_replica_takes_queued_work_at_once() -> None:
    to = line()
    tasks = [await waiting(to) for _ in range(3)]
    to.update([endpoint(slots=2)], only_add=True)
    await settled()
    assert [t.done() for t in tasks] == [True, True, False]
    tasks[2].cancel()


async def test_a_full_line_refuses_with_a_retry_hint() -> None:
    to = line(endpoint(slots=1))
    await take(to)
    held = await waiting(to, max_queue=1)
    with pytest.raises(QueueFull) as caught:
        await take(to, max_queue=1)
    assert caught.value.headers() == [(b"retry-after", b"1")]
    held.cancel()


async def test_the_other_versions_of_a_model_share_its_queue() -> None:
    to = line(endpoint(slots=1))
    await take(to)
    with pytest.raises(QueueFull):
        await take(to, others=3, max_queue=3)


async def test_nobody_gives_way_to_one_that_is_refused_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=iter(range(0, 100_000, 10)).__next__))
    to = line(endpoint(slots=1))
    for _ in range(3):
        to.release(await take(to))  # each took 10 s
    await take(to)
    held = [await waiting(to, key="a", max_wait_s=1e6) for _ in range(30)]
    low = [await waiting(to, key="b", rank=2, max_wait_s=1e6) for _ in range(10)]
    with pytest.raises(WaitTooLong):
        await take(to, key="a", max_queue=40, max_wait_s=10)
    await settled()
    assert not any(t.done() for t in held + low)
    for task in held + low:
        task.cancel()


async def test_a_few_large_ones_inside_do_not_make_a_queue_of_small_ones_hopeless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to = await taught(monkeypatch)
    for _ in range(3):
        await take(to, tokens=32_000)
    held = [asyncio.create_task(take(to, tokens=300, max_queue=1000, max_wait_s=1e6)) for _ in range(300)]
    await settled()
    assert to.running == 16
    last = await waiting(to, tokens=300, max_queue=1000, max_wait_s=180)
    with pytest.raises(WaitTooLong):
        await take(to, tokens=300, max_queue=1000, max_wait_s=5)
    for task in [*held, last]:
        task.cancel()


async def test_a_door_that_is_full_of_large_ones_of_others_makes_no_room_for_many_small_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to = await taught(monkeypatch)
    await take(to, tokens=300)
    to.update([endpoint(slots=64, kv_tokens=100_000, tokens=99_900, in_flight=4)], only_add=False)
    to.gateways = 2
    to.told({"you": (KeyDemand("B", 1, 1.0, 0, 3),)}, 1)
    to.busy(await take(to, tokens=300))
    held = [await waiting(to, tokens=300, max_queue=1000, max_wait_s=1e6) for _ in range(30)]
    late = asyncio.create_task(take(to, tokens=300, max_queue=1000, max_wait_s=60))
    await settled()
    assert isinstance(late.exception(), WaitTooLong)  # four leave in 12 s, and three of them are followed by their like
    for task in held:
        task.cancel()


@pytest.mark.parametrize(
    ("b", "gateways", "adapter", "leave"),
    [
        ({}, 1, None, 10),
        ({"state": State.DRAINING}, 1, None, 2),
        ({"state": State.SUSPECT, "in_flight": 8}, 2, None, 2),
        ({"adapters": ()}, 1, "x", 2),
        ({"adapters": ()}, 2, "x", 2),
        ({"slots": 40, "in_flight": 40}, 2, None, 21),  # nobody told whose they are
        ({"slots": 40, "in_flight": 40, "kv_tokens": 800}, 2, None, 10),  # no more like those who wait fit
    ],
)
async def test_what_leaves_is_what_makes_room_for_a_newcomer(
    b: dict[str, Any], gateways: int, adapter: str | None, leave: float
) -> None:
    to = line(endpoint("a"), endpoint("b", slots=8))
    for _ in range(20):
        to._holds.ended(1.0)
    for _ in range(10):
        await take(to, tokens=100)
    to.gateways = gateways
    to.update([endpoint("a", in_flight=2), endpoint(**{"name": "b", "slots": 8, **b})], only_add=False)
    waits = [await waiting(to, tokens=100) for _ in range(0 if b.get("slots") and not b.get("kv_tokens") else 2)]
    one = ticket(tokens=100, adapter=adapter)
    assert to._outlook(one, asyncio.get_running_loop().time())[1] == pytest.approx(leave)
    for task in waits:
        task.cancel()


async def test_who_cannot_be_reached_makes_no_room() -> None:
    to = line(endpoint("a"), endpoint("b", slots=8))
    for _ in range(20):
        to._holds.ended(1.0)
    asked = [await take(to) for _ in range(10)]
    to.gateways = 2
    to.update([endpoint("a", in_flight=2), endpoint("b", slots=8, in_flight=8)], only_add=False)
    to.told({"you": (KeyDemand("", 1, 1.0, 0, 0),)}, 1)
    for one in asked:
        if at(one) == "b":
            to.broken(one)
    assert to._outlook(ticket(), time.monotonic())[1] == pytest.approx(2)


async def test_a_burst_is_taken_for_one_at_all_gateways_and_for_no_less_than_was_told() -> None:
    """And reckoned anew only once it has grown."""
    to = VersionLine("m@v", "me")
    to.update([endpoint(slots=100, in_flight=100)], only_add=False)
    to.gateways = 4
    for _ in range(60):
        await take(to)
    with mock.patch.object(shares, "part", wraps=shares.part) as part:
        for mine, yours, expected in ((60, 100, 37.5), (10, 100, 25), (30, 60, 100 / 3)):
            told = {"me": (KeyDemand("", 1, 1.0, mine, 0),), "you": (KeyDemand("", 1, 1.0, 0, yours),)}
            to.told(told, 1)
            part.reset_mock()
            for _ in range(9):
                assert to._ours(100, everywhere=yours == 100) == pytest.approx(expected)
            assert part.call_count <= 2


async def test_one_that_had_its_turn_is_not_refused_by_a_full_line() -> None:
    to = line(endpoint(slots=1))
    taken = await take(to)
    again = await waiting(to, max_queue=0, again=True)
    to.release(taken)
    assert at(await again) == "a"


async def test_too_long_a_wait_says_so_and_leaves_the_line() -> None:
    to = line(endpoint(slots=1))
    await take(to)
    with pytest.raises(WaitTooLong):
        await take(to, max_wait_s=0.01)
    assert len(to) == 0


async def test_a_wait_without_any_ready_replica_ends_as_no_replica() -> None:
    with pytest.raises(NoReplica):
        await take(line(endpoint(state=State.STARTING)), max_wait_s=0.01)


@pytest.mark.parametrize("ready_after_s", [None, 1.0])
async def test_an_engine_that_failed_is_being_replaced_and_waited_for(ready_after_s: float | None) -> None:
    """At its start or at work. When to give up is the fleet's to say: it counts the starts."""
    to = line(endpoint("old", state=State.FAILED, ready_after_s=ready_after_s))
    task = await waiting(to)
    to.update([endpoint("new")], only_add=False)
    assert at(await task) == "new"


async def test_busy_costs_no_place() -> None:
    to = line(endpoint(slots=4))
    first, second = await take(to, since=1), await take(to, since=2)
    others = [await take(to), await take(to)]
    tasks = {3: await waiting(to, since=3)}
    to.busy(first)
    tasks[1] = await waiting(to, ticket=first, again=True)
    to.busy(second)
    tasks[2] = await waiting(to, ticket=second, again=True)
    for arrival in (1, 2, 3):
        to.release(others.pop(0))
        others.append(await asyncio.wait_for(tasks.pop(arrival), 1))
        assert not any(t.done() for t in tasks.values())


async def test_a_full_door_is_asked_by_one_request_at_a_time() -> None:
    to = line(endpoint(slots=100))
    for one in [await take(to) for _ in range(50)]:
        to.busy(one)
    tasks = [await waiting(to) for _ in range(50)]
    for _ in range(3):
        while not any(t.done() for t in tasks):
            await asyncio.sleep(0.001)
        (asked,) = (t for t in tasks if t.done())
        tasks.remove(asked)
        to.busy(asked.result())
    for task in tasks:
        task.cancel()


async def test_a_busy_of_long_ago_does_not_hold_back_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "BUSY_FORGOTTEN_S", 0.05)
    to = line(endpoint(slots=10))
    to.busy(await take(to))
    await asyncio.sleep(routing.BUSY_PAUSE_S + routing.BUSY_FORGOTTEN_S)
    assert all([await take(to) for _ in range(10)])


@pytest.mark.parametrize("failure", ["busy", "broken"])
async def test_a_failure_whose_client_left_still_wakes_those_behind_it(
    monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    monkeypatch.setattr(routing, "BROKEN_PAUSE_S", 0.01)
    to = line(endpoint(slots=2))
    mine, _ = await take(to), await take(to)
    behind = await waiting(to)
    getattr(to, failure)(mine)
    assert at(await asyncio.wait_for(behind, 5)) == "a"


async def test_a_long_pause_does_not_hide_a_short_one() -> None:
    to = line(endpoint("broken", 1), endpoint("busy", 1))
    broken, busy = await take(to), await take(to)
    full = at(busy)
    task = await waiting(to)
    to.broken(broken)
    to.busy(busy)
    assert at(await asyncio.wait_for(task, routing.BROKEN_PAUSE_S / 2)) == full


async def test_one_that_waits_for_better_does_not_keep_others_from_what_is_free() -> None:
    to = line(endpoint("a", 2), endpoint("b", 1))
    taken = {at(one): one for one in [await take(to), await take(to)]}
    assert set(taken) == {"a", "b"}
    picky = await waiting(to, avoid=frozenset({"a"}), again=True)
    assert at(await asyncio.wait_for(take(to), 1)) == "a"
    to.release(taken["b"])
    assert at(await picky) == "b"


async def test_what_failed_a_request_is_used_again_when_nothing_else_is_left() -> None:
    to = line(endpoint("a"), endpoint("b", 1))
    await take(to, avoid=frozenset({"a"}))
    picky = await waiting(to, avoid=frozenset({"a"}), again=True)
    to.update([endpoint("a"), endpoint("b", 1, State.DRAINING)], only_add=False)
    assert at(await picky) == "a"


async def test_an_adapter_is_asked_for_only_where_it_is_loaded() -> None:
    to = line(endpoint("old", 9, adapters=()), endpoint("new", 1, adapters=("pirate",)))
    assert at(await take(to, adapter="pirate")) == "new"
    held = await waiting(to, adapter="pirate")
    assert at(await asyncio.wait_for(take(to), 1)) == "old", "others are not kept waiting"
    to.update([endpoint("old", 9, adapters=("pirate",)), endpoint("new", 1, adapters=("pirate",))], only_add=False)
    assert at(await held) == "old"


@pytest.mark.parametrize("again", [False, True])
async def test_an_adapter_that_is_nowhere_yet_keeps_nobody_else_waiting(again: bool) -> None:
    to = line(endpoint("a", 1, adapters=()))
    taken = await take(to)
    early = [await waiting(to, key="x", since=1 + i, adapter="new", again=again) for i in range(90)]
    base = await waiting(to, key="y", since=200)
    to.release(taken)
    taken = await asyncio.wait_for(base, 1)
    assert (len(to), sum(d.held for d in to.demand())) == (90, 90)
    late = await waiting(to, key="x", since=300)
    early.pop().cancel()
    await settled()
    to.update([endpoint("a", 1, adapters=("new",))], only_add=False)
    for one in early:  # each in its place: they came before `late`
        to.release(taken)
        taken = await asyncio.wait_for(one, 1)
    to.release(taken)
    to.release(await asyncio.wait_for(late, 1))
    assert (len(to), to.demand()) == (0, [])


async def test_one_whose_adapter_is_nowhere_counts_in_the_queue_and_is_told_when_its_time_is_up() -> None:
    to = line(endpoint("a", 9, adapters=()))
    with pytest.raises(NoReplica, match="adapter 'new'"):
        await take(to, adapter="new", max_wait_s=0.01)
    held = await waiting(to, adapter="new")
    with pytest.raises(QueueFull):
        await take(to, adapter="new", max_queue=1)
    to.refuse_all(lambda: NoReplica("none will come"))
    with pytest.raises(NoReplica):
        await held
    assert len(to) == 0


async def test_who_had_its_turn_does_not_give_way_to_those_that_came_after_it() -> None:
    to = line(endpoint("a", 10, kv_tokens=100))
    inside = await take(to, key="x", tokens=60)
    large = await waiting(to, key="x", since=1, tokens=80)
    small = [await waiting(to, key="x", since=2 + i, tokens=80) for i in range(3)]
    to.pump()  # all are looked at, and put aside
    other = asyncio.create_task(take(to, key="y", since=9, tokens=80, max_queue=4))
    with pytest.raises(QueueFull):
        await small[-1]
    to.release(inside)
    assert (await large).since == 1
    for task in (*small, other):
        task.cancel()
    await asyncio.gather(*small, other, return_exceptions=True)


async def test_what_an_endpoint_has_to_compute_counts_until_its_answer_begins() -> None:
    to = line(endpoint("a", 9), endpoint("b", 9))
    long = await take(to, blocks=tuple(range(100)))
    there = to.upstreams[at(long)]
    assert there.pending == 100
    again = await take(to, blocks=tuple(range(100)))
    assert at(again) == at(long) and there.pending == 100
    to.entered(long)
    to.entered(long)
    assert there.pending == 0
    cut = await take(to, blocks=tuple(range(200, 230)))
    assert sum(u.pending for u in to.upstreams.values()) == 30
    for one in (long, again, cut):
        to.release(one)
    assert [u.pending for u in to.upstreams.values()] == [0, 0]


async def test_an_adapter_that_is_unloaded_is_waited_for_aside() -> None:
    to = line(endpoint("a", 1, adapters=("x",)))
    taken = await take(to)
    held = [await waiting(to, adapter="x") for _ in range(queue.MOST_ASIDE)]
    base = await waiting(to)
    to.update([endpoint("a", 1, adapters=())], only_add=False)
    to.release(taken)
    assert at(await asyncio.wait_for(base, 1)) == "a"
    for task in held:
        task.cancel()


async def test_a_large_one_gets_its_turn_among_small_ones() -> None:
    to = line(endpoint("a", 10, kv_tokens=100), endpoint("b", 10, kv_tokens=100))
    small = [await take(to, tokens=40) for _ in range(4)]
    large = await waiting(to, tokens=90)
    on = {name: [one for one in small if at(one) == name] for name in "ab"}
    behind = [await waiting(to, tokens=40) for _ in range(2)]
    to.release(on["a"][0])
    to.release(on["b"][0])
    await settled()
    assert [t.done() for t in (large, *behind)] == [False, True, False], "one endpoint goes on, one is kept"
    kept = "a" if at(await behind[0]) == "b" else "b"
    to.release(on[kept][1])
    assert at(await asyncio.wait_for(large, 1)) == kept
    behind[1].cancel()


async def test_the_work_for_a_release_grows_with_the_fleet_and_not_by_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """KV cache is what is short. Counted in looks at an endpoint, not in time."""
    looks, room = 0, Upstream.room

    def counted(u: Upstream, now: float, tokens: int = 0) -> bool:
        nonlocal looks
        looks += 1
        return room(u, now, tokens)

    async def work(endpoints: int) -> int:
        nonlocal looks
        to = line(*(endpoint(str(i), 64, kv_tokens=1000) for i in range(endpoints)))
        small = [await take(to, tokens=100) for _ in range(9 * endpoints)]
        large = [await waiting(to, tokens=350) for _ in range(80)]
        looks = 0
        to.release(small[0])
        for task in large:
            task.cancel()
        return looks

    monkeypatch.setattr(Upstream, "room", counted)
    assert await work(64) < 3 * 64


async def test_a_large_one_of_a_low_class_gets_its_turn_however_many_small_ones_come() -> None:
    to = line(endpoint("a", 10, kv_tokens=100))
    running = [await take(to, tokens=10) for _ in range(10)]
    large = await waiting(to, rank=2, tokens=70)
    small = [await waiting(to, tokens=10) for _ in range(60)]
    for _ in range(40):
        to.release(running.pop(0))
        await settled()
        if large.done():
            break
        running += [t.result() for t in small if t.done()]
        small = [t for t in small if not t.done()]
    assert large.done()
    for task in small:
        task.cancel()


async def test_ten_times_as_many_from_one_key_do_not_keep_out_another() -> None:
    to = line(endpoint(slots=1))
    taken = await take(to)
    heavy = [await waiting(to, key="heavy") for _ in range(50)]
    light = await waiting(to, key="light")
    for _ in range(2):
        to.release(taken)
        await settled()
        taken = next(t for t in (light, *heavy) if t.done()).result()
        heavy = [t for t in heavy if not t.done()]
    assert light.done()
    for task in heavy:
        task.cancel()


async def test_a_line_that_never_waits_binds_what_is_its_part_while_others_hold() -> None:
    to = line(endpoint(slots=4))
    to.told({"other": (KeyDemand("b", 1, 1.0, 9, 2),)}, 1)
    assert at(await take(to, key="a", max_queue=0)) == "a"


@pytest.mark.parametrize("kv_tokens", [None, 100])
async def test_nothing_is_polled_while_every_slot_or_all_kv_cache_is_taken(kv_tokens: int | None) -> None:
    """Also not beyond its share: whatever frees room looks again."""
    to = line(endpoint(slots=4 if kv_tokens is None else 6, kv_tokens=kv_tokens))
    taken = [await take(to, key="k", tokens=25) for _ in range(4)]
    held = [await waiting(to, key="k", tokens=25) for _ in range(9)]
    to.told({"other": (KeyDemand("z", 1, 1.0, 20, 0),)}, 1)
    with mock.patch.object(to, "pump", wraps=to.pump) as pump:
        await asyncio.sleep(0.1)
        assert pump.call_count <= 4
    to.release(taken[0])
    assert at(await asyncio.wait_for(asyncio.shield(held[0]), 1)) == "a"
    for task in held:
        task.cancel()


async def test_a_slot_bound_in_the_instant_of_a_cancel_is_given_back() -> None:
    to = line(endpoint(slots=1))
    taken = await take(to)
    leaves, stays = await waiting(to), await waiting(to)
    to.release(taken)  # bound to the first
    leaves.cancel()
    assert at(await stays) == "a"
    assert to.upstreams["a"].sent == 1


async def test_a_table_that_may_be_incomplete_removes_nobody() -> None:
    to = line(endpoint("a"), endpoint("b"))
    to.update([endpoint("a", state=State.DRAINING)], only_add=True)
    assert (to.ready_ids(), len(to.upstreams)) == ({"b"}, 2)
    to.update([endpoint("a", state=State.DRAINING)], only_add=False)
    assert len(to.upstreams) == 1


def test_only_ready_endpoints_with_room_are_picked() -> None:
    states = [Upstream(endpoint(state.value, state=state)) for state in State]
    found = pick(states, now=0)
    assert found is not None
    assert found.endpoint.state is State.READY
    assert pick(states, 0, avoid=frozenset({"READY"})) is None


def test_the_reported_load_of_others_counts() -> None:
    found = pick([Upstream(endpoint("a", 4, in_flight=3)), Upstream(endpoint("b", 4, in_flight=1))], 0)
    assert found is not None
    assert found.endpoint.id == "b"


@pytest.mark.parametrize(("left", "expected"), [(10, 5), (3, 3), (-1, 0)])
def test_nobody_waits_past_the_deadline(left: float, expected: float) -> None:
    assert bound_wait(5, 100 + left, clock=lambda: 100) == expected


# -- any order of anything


class _Loop(asyncio.SelectorEventLoop):
    """Its time passes only when it is told to, so that a run can be repeated."""

    now = 1000.0

    def time(self) -> float:
        return self.now


class AnyOrder(RuleBasedStateMachine):
    """Requests of several keys, classes and sizes come, go, fail and hang up while the table changes under them."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = _Loop()
        self.clock = mock.patch.object(queue, "time", SimpleNamespace(monotonic=self.loop.time))
        self.clock.start()
        self.line = VersionLine("m@v", "me")
        self.tasks: dict[Ticket, asyncio.Task[Ticket]] = {}  # that wait
        self.again: set[Ticket] = set()  # of them, had a turn
        self.held: list[Ticket] = []
        self.ended: dict[Ticket, str] = {}
        self.arrivals = 0

    def teardown(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        self.step()
        self.collect()
        for one in self.held:
            self.step(self.line.release, one)
        assert all((u.sent, u.tokens) == (0, 0) for u in self.line.upstreams.values())
        assert (len(self.line), self.line.running, self.line.demand()) == (0, 0, [])
        assert len(self.ended) + len(self.held) <= self.arrivals
        self.clock.stop()
        self.loop.close()

    def step(self, do: Callable[..., object] | None = None, *args: Any, **more: Any) -> None:
        """Calls on the loop, as everything about a line is, and lets what follows happen."""

        async def run() -> None:
            if do is not None:
                do(*args, **more)
            await settled()

        self.loop.run_until_complete(run())

    def collect(self) -> None:
        """Those that were bound hold their slot from now on; the others ended, once."""
        for one, task in [(o, t) for o, t in self.tasks.items() if t.done()]:
            del self.tasks[one]
            self.again.discard(one)
            assert one not in self.ended
            if task.cancelled():
                self.ended[one] = "left"
            elif (error := task.exception()) is not None:
                assert isinstance(error, QueueFull | WaitTooLong | NoReplica), error
                assert one.upstream is None, "refused and served"
                self.ended[one] = "refused"
            else:
                self.held.append(one)

    def ask(self, one: Ticket, *, again: bool) -> None:
        if again:
            self.again.add(one)
        self.tasks[one] = self.loop.create_task(take(self.line, ticket=one, again=again, max_queue=8))

    @rule(
        key=st.sampled_from("AB"),
        rank=st.integers(0, 2),
        tokens=st.sampled_from([0, 1, 5, 30]),
        weight=st.integers(1, 3),
        adapter=st.sampled_from([None, None, "x"]),
    )
    def arrives(self, adapter: str | None, **of: Any) -> None:
        self.arrivals += 1
        self.ask(ticket(since=float(self.arrivals), adapter=adapter, **of), again=False)
        self.step()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        one = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.ended[one] = "served"
        self.step(self.line.release, one)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["busy", "broken", "release"]), again=st.booleans())
    def fails(self, data: st.DataObject, how: str, again: bool) -> None:
        """And is tried again, unless its client left in that moment."""
        one = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if how != "busy":
            one.avoid |= {at(one)}
        if not again:
            self.ended[one] = "left"
        self.step(lambda: (getattr(self.line, how)(one), again and self.ask(one, again=True)))

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), also_frees=st.booleans())
    def hangs_up(self, data: st.DataObject, also_frees: bool) -> None:
        """In the same instant a slot may come free, and be bound to the one that leaves."""
        freed = self.held.pop() if also_frees and self.held else None
        if freed is not None:
            self.ended[freed] = "served"
        task = list(self.tasks.values())[data.draw(st.integers(0, len(self.tasks) - 1))]
        self.step(lambda: (freed and self.line.release(freed), task.cancel()))

    @rule(
        table=st.dictionaries(
            st.sampled_from("abc"),
            st.tuples(
                st.integers(1, 3),
                st.sampled_from([State.READY, State.READY, State.DRAINING, State.STARTING]),
                st.sampled_from([None, 6, 20]),
                st.sampled_from([None, (), ("x",)]),
            ),
        ),
        only_add=st.booleans(),
    )
    def directory_speaks(
        self, table: dict[str, tuple[int, State, int | None, tuple[str, ...] | None]], only_add: bool
    ) -> None:
        endpoints = [endpoint(i, n, state, kv_tokens=kv, adapters=has) for i, (n, state, kv, has) in table.items()]
        self.step(self.line.update, endpoints, only_add=only_add)

    @rule(held=st.integers(0, 5), running=st.integers(0, 5), turn=st.integers(0, 9), gateways=st.integers(1, 3))
    def other_gateways_speak(self, held: int, running: int, turn: int, gateways: int) -> None:
        self.line.gateways = gateways
        told = {"you": (KeyDemand("B", 1, 1.0, held, running),), "me": tuple(self.line.demand())}
        self.step(self.line.told, told, turn)

    @rule(seconds=st.sampled_from([0.003, 0.007, 0.11, 1.1]))
    def time_passes(self, seconds: float) -> None:
        self.loop.now += seconds
        self.step()

    @rule()
    def pauses_end(self) -> None:
        """Nothing but time is needed for every free slot to be used, one careful try after the other."""
        self.loop.now += max(routing.BROKEN_PAUSE_S, queue.OTHERS_FORGOTTEN_S)
        for _ in range(12):
            self.loop.now += routing.BUSY_PAUSE_MOST_S + 0.001
            self.step()
        self.collect()
        moment_ago = self.loop.now - 0.001  # the timer looks a little after a pause has ended
        for one in self.tasks:
            if not any(self.roomy(o, moment_ago) for o in self.tasks if o is not one):
                assert not self.fitting(one, moment_ago)

    def wanted(self, one: Ticket) -> list[Upstream]:
        has = [(u, u.endpoint.adapters) for u in self.line.upstreams.values() if u.endpoint.state is State.READY]
        able = [u for u, adapters in has if one.adapter is None or adapters is None or one.adapter in adapters]
        return [u for u in able if u.endpoint.id not in one.avoid] or able

    def fitting(self, one: Ticket, now: float) -> list[Upstream]:
        return [u for u in self.wanted(one) if u.room(now, one.tokens)]

    def roomy(self, one: Ticket, now: float) -> bool:
        """It waits for KV cache alone, and may keep an endpoint for itself."""
        return not self.fitting(one, now) and any(u.room(now) for u in self.wanted(one))

    @invariant()
    def slots_and_tokens_are_counted(self) -> None:
        self.collect()
        for upstream in {*self.line.upstreams.values(), *(o.upstream for o in self.held)}:
            assert upstream is not None
            mine = [o for o in self.held if o.upstream is upstream]
            assert (upstream.sent, upstream.tokens) == (len(mine), sum(o.tokens for o in mine))
        assert len(self.line) == len(self.tasks) == sum(d.held for d in self.line.demand())
        assert self.line._order.cost + self.line._returned_cost == sum(o.cost for o in self.tasks)
        assert self.line.running == len(self.held) == sum(d.running for d in self.line.demand())

    @invariant()
    def a_slot_is_not_overrun(self) -> None:
        for u in self.line.upstreams.values():
            kv = u.endpoint.kv_tokens
            others = [o for o in self.held if o.upstream is u]
            if kv and len(others) > 1 and u.tokens > kv:  # the table made it smaller under those inside
                assert u.room(self.loop.now, 1) is False

    @invariant()
    def nobody_waits_beside_a_free_slot(self) -> None:
        """Unless somebody waits for more room, or the slot is another gateway's."""
        self.collect()
        moment_ago = self.loop.now - 0.001
        if self.line._share is None and not any(self.roomy(o, moment_ago) for o in self.tasks):
            assert not any(self.fitting(o, moment_ago) for o in self.tasks)


AnyOrder.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAnyOrder = AnyOrder.TestCase
