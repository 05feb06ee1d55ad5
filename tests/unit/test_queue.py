"""The line of waiting requests: whatever happens in whatever order, slots are neither overrun nor lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.errors import NoReplica, QueueFull, WaitTooLong
from serving.fleet.endpoint import Endpoint, State
from serving.gateway import queue, routing
from serving.gateway.queue import VersionLine, bound_wait
from serving.gateway.routing import Upstream, pick

NONE: frozenset[str] = frozenset()


def endpoint(name: str = "a", slots: int = 2, state: State = State.READY, **more: Any) -> Endpoint:
    return Endpoint(id=name, model="m", version="v", url=f"http://{name}", state=state, slots=slots, **more)


def line(*endpoints: Endpoint) -> VersionLine:
    made = VersionLine("m@v")
    made.update(endpoints, only_add=False)
    return made


def take(
    to: VersionLine, *, avoid: frozenset[str] = NONE, front: bool = False, since: float = 0, **bounds: Any
) -> Coroutine[Any, Any, Upstream]:
    limits = {"others": 0, "max_queue": 100, "max_wait_s": 60.0} | bounds
    return to.take(avoid=avoid, front=front, since=since, **limits)


async def waiting(to: VersionLine, **how: Any) -> asyncio.Task[Upstream]:
    """A request that has joined the line and waits."""
    task = asyncio.create_task(take(to, **how))
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_free_slot_is_bound_at_once_and_the_least_loaded_first() -> None:
    to = line(endpoint("a", 2), endpoint("b", 4))
    assert [(await take(to)).endpoint.id for _ in range(6)] == ["a", "b", "b", "a", "b", "b"]


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


async def test_one_that_had_its_turn_is_not_refused_by_a_full_line() -> None:
    to = line(endpoint(slots=1))
    taken = await take(to)
    again = await waiting(to, max_queue=0, front=True)
    to.release(taken)
    assert (await again) is taken


async def test_too_long_a_wait_says_so_and_leaves_the_line() -> None:
    to = line(endpoint(slots=1))
    await take(to)
    with pytest.raises(WaitTooLong):
        await take(to, max_wait_s=0.01)
    assert len(to) == 0


async def test_a_wait_without_any_ready_replica_ends_as_no_replica() -> None:
    with pytest.raises(NoReplica):
        await take(line(endpoint(state=State.STARTING)), max_wait_s=0.01)


async def test_engines_that_never_started_are_not_waited_for() -> None:
    with pytest.raises(NoReplica):
        await take(line(endpoint(state=State.FAILED)))


async def test_an_engine_that_died_at_work_is_being_replaced_and_waited_for() -> None:
    to = line(endpoint("old", state=State.FAILED, ready_after_s=1.0))
    task = await waiting(to)
    to.update([endpoint("new")], only_add=False)
    assert (await task).endpoint.id == "new"


async def test_busy_costs_no_place() -> None:
    to = line(endpoint(slots=4))
    first, second = await take(to, since=1), await take(to, since=2)
    await take(to), await take(to)
    tasks = {3: await waiting(to, since=3)}
    to.busy(first)
    tasks[1] = await waiting(to, since=1, front=True)
    to.busy(second)
    tasks[2] = await waiting(to, since=2, front=True)
    for arrival in (1, 2, 3):
        to.release(first)
        assert await asyncio.wait_for(tasks.pop(arrival), 1) is first
        assert not any(t.done() for t in tasks.values())


async def test_a_full_door_is_asked_by_one_request_at_a_time() -> None:
    to = line(endpoint(slots=100))
    for upstream in [await take(to) for _ in range(50)]:
        to.busy(upstream)
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
    monkeypatch.setattr(queue, "BROKEN_PAUSE_S", 0.01)
    to = line(endpoint(slots=2))
    mine, _ = await take(to), await take(to)
    behind = await waiting(to)
    getattr(to, failure)(mine)
    assert (await asyncio.wait_for(behind, 5)) is mine


async def test_a_long_pause_does_not_hide_a_short_one() -> None:
    to = line(endpoint("broken", 1), endpoint("busy", 1))
    broken, busy = await take(to), await take(to)
    task = await waiting(to)
    to.broken(broken)
    to.busy(busy)
    assert (await asyncio.wait_for(task, queue.BROKEN_PAUSE_S / 2)) is busy


async def test_one_that_waits_for_better_does_not_keep_others_from_what_is_free() -> None:
    to = line(endpoint("a", 2), endpoint("b", 1))
    taken = {(await take(to)).endpoint.id for _ in range(2)}
    assert taken == {"a", "b"}
    picky = await waiting(to, avoid=frozenset({"a"}), front=True)
    assert (await asyncio.wait_for(take(to), 1)).endpoint.id == "a"
    to.release(to.upstreams["b"])
    assert (await picky).endpoint.id == "b"


async def test_what_failed_a_request_is_used_again_when_nothing_else_is_left() -> None:
    to = line(endpoint("a"), endpoint("b", 1))
    await take(to, avoid=frozenset({"a"}))
    picky = await waiting(to, avoid=frozenset({"a"}), front=True)
    to.update([endpoint("a"), endpoint("b", 1, State.DRAINING)], only_add=False)
    assert (await picky).endpoint.id == "a"


async def test_a_slot_bound_in_the_instant_of_a_cancel_is_given_back() -> None:
    to = line(endpoint(slots=1))
    taken = await take(to)
    leaves, stays = await waiting(to), await waiting(to)
    to.release(taken)  # bound to the first
    leaves.cancel()
    assert (await stays) is taken
    assert taken.sent == 1


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
    """Requests come, go, fail and hang up while the table changes under them."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = _Loop()
        self.clock = mock.patch.object(queue, "time", SimpleNamespace(monotonic=self.loop.time))
        self.clock.start()
        self.line = VersionLine("m@v")
        self.tasks: list[tuple[int, bool, asyncio.Task[Upstream]]] = []  # arrival, had a turn
        self.held: list[tuple[int, Upstream]] = []
        self.arrivals = 0

    def teardown(self) -> None:
        for _, _, task in self.tasks:
            task.cancel()
        self.step()
        self.collect()
        for _, upstream in self.held:
            self.step(self.line.release, upstream)
        assert all(u.sent == 0 for u in self.line.upstreams.values())
        assert len(self.line) == 0
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
        """Those that were bound hold their slot from now on."""
        for arrival, front, task in [t for t in self.tasks if t[2].done()]:
            self.tasks.remove((arrival, front, task))
            if not task.cancelled() and task.exception() is None:
                self.held.append((arrival, task.result()))

    def ask(self, arrival: int, avoid: frozenset[str], front: bool) -> None:
        request = take(self.line, avoid=avoid, front=front, since=float(arrival))
        self.tasks.append((arrival, front, self.loop.create_task(request)))

    @rule()
    def arrives(self) -> None:
        self.arrivals += 1
        self.ask(self.arrivals, NONE, False)
        self.step()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        _, upstream = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.step(self.line.release, upstream)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["busy", "broken", "release"]), again=st.booleans())
    def fails(self, data: st.DataObject, how: str, again: bool) -> None:
        """And is tried again, unless its client left in that moment."""
        arrival, upstream = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        avoid = NONE if how == "busy" else frozenset({upstream.endpoint.id})
        self.step(lambda: (getattr(self.line, how)(upstream), again and self.ask(arrival, avoid, True)))

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), also_frees=st.booleans())
    def hangs_up(self, data: st.DataObject, also_frees: bool) -> None:
        """In the same instant a slot may come free, and be bound to the one that leaves."""
        freed = self.held.pop()[1] if also_frees and self.held else None
        _, _, task = self.tasks[data.draw(st.integers(0, len(self.tasks) - 1))]
        self.step(lambda: (freed and self.line.release(freed), task.cancel()))

    @rule(
        table=st.dictionaries(
            st.sampled_from("abc"),
            st.tuples(st.integers(1, 3), st.sampled_from([State.READY, State.READY, State.DRAINING, State.STARTING])),
        ),
        only_add=st.booleans(),
    )
    def directory_speaks(self, table: dict[str, tuple[int, State]], only_add: bool) -> None:
        endpoints = [endpoint(i, slots, state) for i, (slots, state) in table.items()]
        self.step(self.line.update, endpoints, only_add=only_add)

    @rule(seconds=st.sampled_from([0.003, 0.007, 0.11, 1.1]))
    def time_passes(self, seconds: float) -> None:
        self.loop.now += seconds
        self.step()

    @rule()
    def pauses_end(self) -> None:
        """Nothing but time is needed for every free slot to be used, one careful try after the other."""
        self.loop.now += queue.BROKEN_PAUSE_S
        for _ in range(12):
            self.loop.now += routing.BUSY_PAUSE_S + 0.001
            self.step()
        assert not any(u.sent < u.endpoint.slots for w in self.line._waiters for u in self.wanted(w))

    def wanted(self, waiter: queue._Waiter) -> list[Upstream]:
        ready = [u for u in self.line.upstreams.values() if u.endpoint.state is State.READY]
        return [u for u in ready if u.endpoint.id not in waiter.avoid] or ready

    @invariant()
    def slots_are_counted(self) -> None:
        self.collect()
        for upstream in {*self.line.upstreams.values(), *(u for _, u in self.held)}:
            mine = sum(u is upstream for _, u in self.held)
            assert upstream.sent == mine >= 0
        assert len(self.line) == len(self.tasks)

    @invariant()
    def nobody_waits_beside_a_free_slot(self) -> None:
        moment_ago = self.loop.now - 0.001  # the timer looks a little after a pause has ended
        assert not any(u.room(moment_ago) for w in self.line._waiters for u in self.wanted(w))

    @invariant()
    def the_line_is_in_order_of_arrival(self) -> None:
        order = [w.since for w in self.line._waiters]
        assert order == sorted(order)


AnyOrder.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAnyOrder = AnyOrder.TestCase
