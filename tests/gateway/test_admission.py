"""Who may enter, in which class and for how long, and what a request may take, over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
import pytest

from serving.engine.door import STATUS_PATH
from serving.gateway.keys import create_key
from tests.gateway.harness import SECRET, Answer, Engine, EngineRoom, Front, chat, endless, eventually

Made = Callable[..., str]


@pytest.fixture
def key(front: Front) -> Made:
    """Makes a key with options, known to the gateway."""

    def made(**options: Any) -> str:
        _, token = create_key(front.keys.path, name="test", scopes=["infer:*"], now=time.time(), **options)
        assert front.gateway.keys.reload_if_changed() is None
        return token

    return made


@pytest.fixture
def one_slot(front: Front, room: EngineRoom) -> Engine:
    engine = room.shared(slots=1, sim_itl_ms=20)
    front.serve(engine)
    return engine


async def waits(front: Front, **how: Any) -> asyncio.Task[Answer]:
    already = front.waiting()
    task = asyncio.create_task(front.ask(body=chat(max_tokens=1), **how))
    await eventually("it waits", lambda: front.waiting() == already + 1)
    return task


async def served_in_order(tasks: dict[str, asyncio.Task[Answer]]) -> list[str]:
    served: list[str] = []
    for name, task in tasks.items():
        task.add_done_callback(lambda _, name=name: served.append(name))
    assert {(await task).status for task in tasks.values()} == {200}
    return served


async def test_a_higher_class_is_served_first(front: Front, one_slot: Engine, key: Made) -> None:
    high, plain = key(class_="interactive"), key()
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        tasks = {
            "batch": await waits(front, key=plain, headers={"x-steelyard-class": "batch"}),
            "default": await waits(front, key=plain),
            "lowered": await waits(front, key=high, headers={"x-steelyard-class": "batch"}),
            "interactive": await waits(front, key=high),
        }
    assert (await served_in_order(tasks))[:2] == ["interactive", "default"]


async def test_keys_take_turns(front: Front, one_slot: Engine, key: Made) -> None:
    heavy, light = key(), key()
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        tasks = {f"heavy {i}": await waits(front, key=heavy) for i in range(4)}
        tasks["light"] = await waits(front, key=light)
    assert "light" in (await served_in_order(tasks))[:2]


async def test_a_key_in_a_full_queue_makes_room_for_another(front: Front, one_slot: Engine, key: Made) -> None:
    front.serve(one_slot, limits={"max_queue": 3})
    heavy, light = key(), key()
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        held = [await waits(front, key=heavy) for _ in range(3)]
        other = asyncio.create_task(front.ask(body=chat(max_tokens=1), key=light))
        assert (await held[-1]).error["code"] == "queue_full"
        assert (await front.ask(body=chat(), key=heavy)).error["code"] == "queue_full"
    assert [(await task).status for task in (*held[:2], other)] == [200, 200, 200]


@pytest.mark.parametrize(("asked", "status"), [("interactive", 403), ("default", 200), ("batch", 200), ("urgent", 400)])
async def test_a_header_can_only_lower_the_class(gateway: Front, asked: str, status: int) -> None:
    answer = await gateway.ask(body=chat(), headers={"x-steelyard-class": asked})
    assert answer.status == status
    if status != 200:
        assert "x-steelyard-class" in answer.error["message"]


async def test_a_client_may_have_less_time(front: Front, one_slot: Engine) -> None:
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        began = time.monotonic()
        answer = await front.ask(body=chat(), headers={"x-steelyard-timeout": "0.1"})
        assert (answer.status, time.monotonic() - began < 20) in {(429, True), (504, True)}


@pytest.mark.parametrize("asked", ["soon", "-1", "0", "nan", "inf"])
async def test_a_time_that_is_none_is_refused(gateway: Front, asked: str) -> None:
    answer = await gateway.ask(body=chat(), headers={"x-steelyard-timeout": asked})
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")


async def test_a_key_has_so_many_requests_at_once(front: Front, one_slot: Engine, key: Made) -> None:
    token = key(max_concurrent=1)
    async with front.hung_up(endless()):
        await one_slot.inside(1)
        held = await waits(front, key=token)
        answer = await front.ask(body=chat(), key=token)
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (429, "limit_reached", "1")
        other = await waits(front)
    assert [(await held).status, (await other).status] == [200, 200]
    assert (await front.ask(body=chat(), key=token)).status == 200
    assert front.metric("steelyard_rejections_total", reason="limit_reached") == 1


async def test_a_key_has_so_many_tokens_a_minute(gateway: Front, key: Made) -> None:
    token = key(tokens_per_minute=100)
    statuses = [(await gateway.ask(body=chat(max_tokens=60), key=token)).status for _ in range(3)]
    assert (statuses[0], statuses[-1]) == (200, 429)


async def test_a_refused_request_costs_its_key_nothing(gateway: Front, key: Made) -> None:
    token = key(tokens_per_minute=100)
    for _ in range(5):
        assert (
            await gateway.ask(body=chat(max_tokens=60, stream_options={"include_usage": True}), key=token)
        ).status == 400
    assert (await gateway.ask(body=chat(max_tokens=60), key=token)).status == 200


async def test_a_key_has_a_limit_of_its_bodies(gateway: Front, key: Made) -> None:
    assert (await gateway.ask(body=chat("x" * 2000), key=key(max_body_bytes=1024))).status == 413


async def test_a_prompt_that_is_certainly_too_long_never_reaches_an_engine(front: Front, room: EngineRoom) -> None:
    engine = room.shared()
    front.serve(engine, limits={"max_input_tokens": 10})
    answer = await front.ask("/v1/completions", {"model": "tiny", "prompt": list(range(11))})
    assert (answer.status, "limit of this model is 10" in answer.error["message"]) == (400, True)
    assert front.metric("steelyard_upstream_attempts_total") == 0
    assert (await front.ask("/v1/completions", {"model": "tiny", "prompt": "short"})).status == 200


@pytest.mark.slow
async def test_no_more_tokens_are_sent_than_the_kv_cache_holds(front: Front, room: EngineRoom) -> None:
    """Many slots, and room for two requests of this size: the engine's own queue stays empty."""
    engine = room.start(slots=50, sim_itl_ms=1, sim_kv_tokens=2048)
    async with aiohttp.ClientSession(headers={"x-steelyard-secret": SECRET}) as session:
        async with session.post(f"{engine.url}{STATUS_PATH}?tokens=2048") as told:
            assert (await told.json())["budget"] == 2048
        engine.endpoint = msgspec.structs.replace(engine.endpoint, kv_tokens=2048)
        front.serve(engine)
        asked = [asyncio.create_task(front.ask(body=chat(max_tokens=700, ignore_eos=True))) for _ in range(4)]
        most, waiting = 0, []
        while not all(task.done() for task in asked):
            most = max(most, (await engine.door())["in_flight"])
            async with session.get(f"{engine.url}/metrics") as metrics:
                text = await metrics.text()
            waiting.append(
                max(float(v.split()[-1]) for v in text.splitlines() if v.startswith("vllm:num_requests_waiting{"))
            )
        assert {task.result().status for task in asked} == {200}
        assert (most, max(waiting)) == (2, 0)


async def test_a_door_that_is_full_of_tokens_costs_no_place(front: Front, room: EngineRoom) -> None:
    """The gateway does not know how much there is, as when other gateways fill it."""
    engine = room.start(slots=50, sim_itl_ms=1)
    headers = {"x-steelyard-secret": SECRET}
    async with aiohttp.ClientSession(headers=headers) as session, session.post(f"{engine.url}{STATUS_PATH}?tokens=150"):
        front.serve(engine)
        asked = [asyncio.create_task(front.ask(body=chat(max_tokens=60, ignore_eos=True))) for _ in range(10)]
        assert {(await task).status for task in asked} == {200}
    assert front.metric("steelyard_upstream_attempts_total", outcome="busy") > 0


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (chat(), {"x-session-id": "one"}),
        (chat(prompt_cache_key="one"), {}),
        (chat("a long beginning that many share " * 200), {}),
    ],
)
async def test_a_conversation_stays_where_it_is_known(
    front: Front, room: EngineRoom, body: dict[str, Any], headers: dict[str, str]
) -> None:
    first, second = room.shared(slots=50, sim_itl_ms=3), room.shared(slots=50, sim_itl_ms=3.5)
    front.serve(first, second)

    async def replica(number: int, of: dict[str, Any], **how: Any) -> str:
        request_id = f"req-{number}-{front.port}"
        assert (await front.ask(body=of, headers={"x-request-id": request_id, **how})).status == 200
        return str((await front.line(request_id))["replica"])

    async with front.hung_up(endless()):
        await first.inside(1)
        assert await replica(1, body, **headers) == second.endpoint.id
    await first.inside(0)
    await eventually("its slot is free", lambda: front.gateway.requests == 0)
    assert await replica(2, body, **headers) == second.endpoint.id
    assert await replica(3, chat("something else")) == first.endpoint.id
