"""Waiting for a slot: in order, bounded in number and time, and bound to a replica at the last moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from tests.gateway import harness
from tests.gateway.harness import Answer, Engine, EngineRoom, Front, Keys, chat, endless, eventually


@pytest.fixture
def one_slot(front: Front, room: EngineRoom) -> Engine:
    engine = room.shared(slots=1, sim_itl_ms=20)
    front.serve(engine)
    return engine


async def queued(front: Front, count: int, **fields: object) -> list[asyncio.Task[Answer]]:
    """So many requests that have joined the line one after the other."""
    tasks = []
    already = front.waiting()
    for i in range(count):
        tasks.append(asyncio.create_task(front.ask(body=chat(f"number {i}", max_tokens=1, **fields))))
        await eventually(f"{i + 1} wait", lambda wanted=already + i + 1: front.waiting() == wanted)
    return tasks


async def test_a_full_queue_is_429_with_a_time_to_come_back(front: Front, one_slot: Engine) -> None:
    front.serve(one_slot, limits={"max_queue": 1})
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        (held,) = await queued(front, 1)
        with pytest.raises(openai.RateLimitError) as caught:
            await front.openai().chat.completions.create(**chat())
    assert caught.value.code == "queue_full"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60  # by the pace of what was served so far
    assert (await held).status == 200
    assert front.metric("steelyard_rejections_total", model="tiny", reason="queue_full") == 1


async def test_a_queue_of_none_never_waits(front: Front, one_slot: Engine) -> None:
    front.serve(one_slot, limits={"max_queue": 0})
    assert (await front.ask(body=chat())).status == 200
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        assert (await front.ask(body=chat())).status == 429


async def test_too_long_a_wait_is_429_with_a_time_to_come_back(front: Front, one_slot: Engine) -> None:
    front.serve(one_slot, limits={"max_wait_s": 0.05})
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        with pytest.raises(openai.RateLimitError) as caught:
            await front.openai().chat.completions.create(**chat())
    assert caught.value.code == "queue_timeout"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert front.metric("steelyard_rejections_total", model="tiny", reason="queue_timeout") == 1


async def test_the_time_limit_of_a_request_counts_while_it_waits(front: Front, one_slot: Engine) -> None:
    front.serve(one_slot, limits={"request_timeout_s": 0.2})
    async with front.hung_up(endless()) as reader:
        await reader.readuntil(b'"content":"')
        answer = await front.ask(body=chat())
    assert answer.status in (429, 504)


async def test_the_first_to_come_is_the_first_to_be_served(front: Front, one_slot: Engine) -> None:
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        tasks = await queued(front, 5)
        served: list[int] = []
        for i, task in enumerate(tasks):
            task.add_done_callback(lambda _, i=i: served.append(i))
    await asyncio.gather(*tasks)
    assert served == [0, 1, 2, 3, 4]


async def test_versions_of_a_model_share_its_queue(front: Front, one_slot: Engine) -> None:
    front.serve(one_slot, limits={"max_queue": 1})
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        (held,) = await queued(front, 1)
        assert (await front.ask(body=chat(model="tiny@v2"))).error["code"] == "queue_full"
    assert (await held).status == 200


async def test_other_models_do_not(front: Front, one_slot: Engine, room: EngineRoom) -> None:
    front.serve(one_slot, room.shared(model="other"), limits={"max_queue": 1})
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        (held,) = await queued(front, 1)
        assert (await front.ask(body=chat(model="other"))).status == 200
    assert (await held).status == 200


async def test_a_new_replica_takes_queued_work_at_once(front: Front, one_slot: Engine, room: EngineRoom) -> None:
    new = room.shared()
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        tasks = await queued(front, 3)
        front.table(one_slot, new)
        assert [a.status for a in await asyncio.gather(*tasks)] == [200] * 3
        await one_slot.inside(1)


async def test_the_first_replica_of_all_takes_what_waited_for_it(front: Front, room: EngineRoom) -> None:
    front.serve()
    tasks = await queued(front, 3)
    front.table(room.shared())
    assert [a.status for a in await asyncio.gather(*tasks)] == [200] * 3


async def test_a_table_that_may_be_incomplete_takes_no_replica_away(front: Front, room: EngineRoom) -> None:
    front.serve(room.shared())
    front.table(complete=False)
    assert (await front.ask(body=chat())).status == 200


async def test_no_replica_within_the_wait_is_503(front: Front) -> None:
    front.serve(limits={"max_wait_s": 0.05})
    answer = await front.ask(body=chat())
    assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "model_unavailable", "5")
    with pytest.raises(openai.InternalServerError):
        await front.openai().chat.completions.create(**chat())


async def test_a_gateway_that_drains_takes_nothing_new_and_ends_what_it_has(front: Front, one_slot: Engine) -> None:
    async with front.hung_up(endless()) as reader:
        await reader.readuntil(b'"content":"')
        front.gateway.draining = True
        answer = await front.ask(body=chat())
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "shutting_down", "1")
        assert (await front.ask("/readyz", method="GET")).status == 503
        await reader.readuntil(b'"content":"')


# -- several gateways, one engine


@pytest.fixture
async def second(keys: Keys, tmp_path: Path) -> AsyncIterator[Front]:
    async with harness.front(keys, tmp_path / "second") as front:
        yield front
        await front.rest()


async def test_gateways_that_know_nothing_of_each_other_share_an_engine(
    front: Front, second: Front, room: EngineRoom
) -> None:
    engine = room.start(slots=2, sim_itl_ms=5)
    for gateway in (front, second):
        gateway.serve(engine)
    asked = [asyncio.create_task(f.ask(body=chat(max_tokens=3))) for _ in range(15) for f in (front, second)]
    seen = []
    while not all(task.done() for task in asked):
        seen.append((await engine.door())["in_flight"])
    assert [task.result().status for task in asked] == [200] * 30
    assert max(seen) == 2
    assert sum(f.metric("steelyard_upstream_attempts_total", outcome="busy") for f in (front, second)) > 0
    assert sum(f.metric("steelyard_upstream_attempts_total", outcome="ok") for f in (front, second)) == 30
    assert [f.metric("steelyard_queue_wait_seconds_count") for f in (front, second)] == [15, 15]


@pytest.mark.slow
async def test_a_door_kept_full_by_others_is_not_stormed(front: Front, second: Front, room: EngineRoom) -> None:
    engine = room.start(slots=24, sim_itl_ms=1000)
    for gateway in (front, second):
        gateway.serve(engine)
    async with asyncio.TaskGroup() as group:
        occupants = [group.create_task(front.ask(body=endless())) for _ in range(24)]
        await engine.inside(24)
        waiters = [group.create_task(second.ask(body=chat())) for _ in range(24)]

        def busy() -> float:
            return second.metric("steelyard_upstream_attempts_total", outcome="busy")

        await eventually("each was refused", lambda: busy() >= 24)
        await eventually("that was heard", lambda: second.metric("steelyard_requests_running") == 0)
        at_once, until = [], busy() + 12
        while busy() < until:  # from now on one asks for all, and the next one a little later
            at_once.append(second.metric("steelyard_requests_running"))
            await asyncio.sleep(0)
        assert max(at_once) < 12
        for task in (*occupants, *waiters):
            task.cancel()
