"""Keep-alives of a held stream: they hide no cancellation, and the waits of several attempts count together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, cast

import pytest

from serving.gateway.exchange import Exchange
from serving.gateway.hold import KeepAlive


class Client:
    """What a keep-alive needs of an exchange; counts its frames."""

    dialect = "openai"

    def __init__(self) -> None:
        self.started = False
        self.frames = 0

    async def start(self, *_: Any) -> None:
        self.started = True

    def push(self, data: bytes) -> Awaitable[None] | None:
        self.frames += 1
        return None


def keep_alive(client: Client, after_s: float | None) -> KeepAlive:
    return KeepAlive(cast(Exchange, client), after_s)


async def test_a_cancellation_in_the_turn_in_which_the_wait_ends_is_not_swallowed() -> None:
    client, bound = Client(), asyncio.Event()

    async def held() -> None:
        async with keep_alive(client, 0.0):
            await bound.wait()
        pytest.fail("ran on after its cancellation")

    task = asyncio.create_task(held())
    while not client.frames:
        await asyncio.sleep(0)
    bound.set()
    await asyncio.sleep(0)  # it has its slot, and waits for the keep-alive to end
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_short_waits_add_up_to_the_first_frame() -> None:
    client = Client()
    alive = keep_alive(client, 0.05)
    for _ in range(100):
        async with alive:
            await asyncio.sleep(0.005)
        if client.frames:
            break
    assert client.frames == 1
    for _ in range(10):  # and the next one is not due with the next attempt
        async with alive:
            await asyncio.sleep(0)
    assert client.frames == 1


async def test_who_opted_out_hears_nothing() -> None:
    client = Client()
    async with keep_alive(client, None):
        await asyncio.sleep(0)
    assert (client.frames, client.started) == (0, False)
