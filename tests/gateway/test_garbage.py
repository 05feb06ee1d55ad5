"""What a request leaves behind is freed at once. Rings of objects wait for the cycle collector, which a gateway lets run rarely
and which finds late what was in use when it last looked: they are memory that grows for hours."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import types
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import pytest

from tests.gateway.harness import EngineRoom, Front, chat, refusing

Ask = Callable[[Front], Awaitable[object]]
_ROOMS = ("serving.gateway", "serving.telemetry", "uvicorn", "httptools")


@contextlib.contextmanager
def rings() -> Iterator[Counter[str]]:
    """What of a gateway only the cycle collector frees, of all that is made in the block; filled in at its end."""
    found: Counter[str] = Counter()
    gc.disable()
    gc.freeze()  # what was there before is not looked at
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.update(filter(None, map(_of_gateway, gc.garbage)))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


def _of_gateway(item: object) -> str:
    """Its name, when it is an object or a call of the gateway's or of its server's."""
    if isinstance(item, types.FrameType):
        module, name = str(item.f_globals.get("__name__")), f"frame of {item.f_code.co_qualname}"
    else:
        module, name = type(item).__module__, type(item).__qualname__
    return f"{module}: {name}" if module.startswith(_ROOMS) else ""


async def whole(front: Front) -> None:
    assert (await front.ask(body=chat("whole", max_tokens=3))).status == 200


async def streamed(front: Front) -> None:
    assert (await front.ask(body=chat("streamed", stream=True, max_tokens=3))).status == 200


async def refused_by_the_engine(front: Front) -> None:
    assert (await front.ask(body=chat("refused", max_tokens=-1))).status == 400


async def without_a_key(front: Front) -> None:
    assert (await front.ask(body=chat("x"), key="no")).status == 401


async def unknown(front: Front) -> None:
    assert (await front.ask(body=chat("x", model="nobody"))).status == 404


async def malformed(front: Front) -> None:
    assert (await front.ask(body=b"{")).status == 400


async def too_large(front: Front) -> None:
    assert (await front.ask(body=b"x" * 2**20)).status == 413


async def late(front: Front) -> None:
    body = chat("late", max_tokens=500)
    assert (await front.ask(body=body, headers={"x-steelyard-timeout": "0.05"})).status == 504


async def late_in_its_stream(front: Front) -> None:
    body = chat("late", stream=True, max_tokens=500)
    assert b"error" in (await front.ask(body=body, headers={"x-steelyard-timeout": "0.05"})).body


async def left_in_its_stream(front: Front) -> None:
    async with front.hung_up(chat("left", stream=True, max_tokens=500)) as reader:
        await reader.readuntil(b"data: ")


async def left_before_its_answer(front: Front) -> None:
    async with front.hung_up(chat("left", max_tokens=500)):
        await front.engines[0].inside(1)


async def whose_engine_is_gone(front: Front) -> None:
    """One of two: each is asked first in turn."""
    front.table(*front.engines[:1], refusing(id=f"gone-{front._number}"))
    await whole(front)
    await whole(front)


async def models(front: Front) -> None:
    assert (await front.ask("/v1/models", method="GET")).status == 200


async def metrics(front: Front) -> None:
    assert (await front.ask("/metrics", method="GET", key=front.keys.metrics)).status == 200


@pytest.mark.parametrize(
    "ask",
    [
        *(whole, streamed, refused_by_the_engine, without_a_key, unknown, malformed, too_large, late),
        *(late_in_its_stream, left_in_its_stream, left_before_its_answer),
        *(whose_engine_is_gone, models, metrics),
    ],
    ids=lambda ask: ask.__name__,
)
async def test_no_ring_is_left_of_a_request(front: Front, room: EngineRoom, ask: Ask) -> None:
    front.serve(room.shared(slots=8, sim_itl_ms=5))
    await ask(front)  # what is made once
    await front.rest()
    with rings() as left:
        for _ in range(3):
            await ask(front)
        await front.rest()
        await asyncio.sleep(0)
    assert not left
