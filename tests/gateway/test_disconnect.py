"""Who hangs up, at whatever moment, frees what was held for them: place in the line, slot and engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.gateway.harness import CHAT, Engine, EngineRoom, Front, chat, endless, eventually, recorded


@pytest.fixture
def slow(front: Front, room: EngineRoom) -> Engine:
    """One slot, and a token now and then."""
    engine = room.shared(slots=1, sim_itl_ms=50)
    front.serve(engine)
    return engine


async def test_in_the_middle_of_a_stream(front: Front, slow: Engine) -> None:
    async with front.hung_up(endless()) as reader:
        await reader.readuntil(b'"content":"')
        await slow.inside(1)
    await slow.inside(0)


async def test_before_the_first_token(front: Front, room: EngineRoom) -> None:
    engine = room.shared(sim_ttft_ms=60_000)
    front.serve(engine)
    for stream in (True, False):
        async with front.hung_up(chat(stream=stream)):
            await engine.inside(1)
        await engine.inside(0)


async def test_while_a_whole_answer_is_made(front: Front, slow: Engine) -> None:
    async with front.hung_up(endless() | {"stream": False}):
        await slow.inside(1)
    await slow.inside(0)


async def test_while_waiting_in_the_line_it_costs_the_engine_nothing(front: Front, slow: Engine) -> None:
    before = (await slow.door())["refused"]
    async with front.hung_up(endless()):
        await slow.inside(1)
        async with front.hung_up(endless()):
            await eventually("one waits", lambda: front.waiting() == 1)
        await eventually("none waits", lambda: front.waiting() == 0)
    await slow.inside(0)
    assert (await slow.door())["refused"] == before
    assert front.metric("steelyard_upstream_attempts_total") == 1


async def test_those_behind_move_up(front: Front, slow: Engine) -> None:
    async with front.hung_up(endless()):
        await slow.inside(1)
        async with front.hung_up(endless()):
            await eventually("one waits", lambda: front.waiting() == 1)
            behind = front.ask(body=chat(max_tokens=1))
    assert (await behind).status == 200


async def test_while_the_body_is_still_being_sent(front: Front) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", front.port)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.keys.all}\r\ncontent-length: 100\r\n\r\n"
    writer.write(head.encode() + b"{")
    await eventually("it is inside", lambda: front.gateway.requests == 1)
    writer.transport.abort()
    await eventually("it is not", lambda: front.gateway.requests == 0)


async def test_a_hang_up_is_told_apart_from_an_error(front: Front, slow: Engine) -> None:
    async with front.hung_up(endless(), request_id="left") as reader:
        await reader.readuntil(b'"content":"')
    line = await front.line("left")
    assert (line["client_gone"], line["reason"], line["status"], line["level"]) == (True, "client_gone", 200, "info")
    assert front.metric("steelyard_upstream_attempts_total", outcome="client_gone") == 1


async def test_a_hang_up_before_anything_was_sent_is_499(front: Front, room: EngineRoom) -> None:
    engine = room.shared(sim_ttft_ms=60_000)
    front.serve(engine)
    async with front.hung_up(endless(), request_id="left"):
        await engine.inside(1)
    assert (await front.line("left"))["status"] == 499


async def test_sdk_users_who_close_a_stream(front: Front, slow: Engine) -> None:
    stream = await front.openai().chat.completions.create(**endless())
    await anext(stream)
    await slow.inside(1)
    await stream.close()
    await slow.inside(0)


@pytest.fixture
async def unread(front: Front) -> AsyncIterator[Front]:
    """A client that asked for more than all buffers hold, and reads nothing of it."""
    flood = b'data: {"choices":[{"delta":{"content":"' + b"x" * 65_536 + b'"}}]}\n\n'
    async with recorded(*[flood] * 2000) as engine:
        front.serve(engine, limits={"request_timeout_s": 0.3})
        yield front


async def test_a_client_that_reads_nothing_is_not_served_for_ever(
    unread: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.gateway.app.LAST_WORD_S", 0.1)
    async with unread.hung_up(chat(stream=True), request_id="unread", limit=1024):
        await eventually("it is inside", lambda: unread.gateway.requests == 1)
        assert (await unread.line("unread"))["reason"] == "deadline_exceeded"
        await eventually("it is let go", lambda: unread.gateway.requests == 0)
    unread.engines.clear()
