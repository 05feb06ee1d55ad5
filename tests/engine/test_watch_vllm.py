"""The watch on the real engine: a core that stands still is found out though its server answers, and load is no reason to
suspect anybody."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from serving.engine.door import SECRET_HEADER
from serving.engine.health import Limits
from serving.engine.process import EngineProcess
from serving.engine.watch import Watch, generates
from tests.engine.test_watch import until
from tests.replica.test_process import SECRET, built, tiny
from tests.stack import free_port

pytestmark = [pytest.mark.engine, pytest.mark.soak, pytest.mark.timeout(900)]

SATURATED_S = float(os.environ.get("SATURATED_S", "300"))
EVERY_S = 0.5


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers={SECRET_HEADER.decode(): SECRET}, connector=connector) as session:
        yield session


@pytest.fixture
async def engine(tmp_path: Path, http: aiohttp.ClientSession) -> AsyncIterator[tuple[EngineProcess, str]]:
    port = free_port()
    process = EngineProcess(built(tiny(), port, f"test:{port}"), tmp_path / "engine.log")
    await asyncio.to_thread(process.start)
    url = f"http://127.0.0.1:{port}"
    try:
        while await generates(http, url, "tiny") != "ok":
            assert process.alive, process.telling_lines()
            await asyncio.sleep(0.2)
        yield process, url
    finally:
        await asyncio.to_thread(process.stop)


def core_of(process: EngineProcess) -> list[psutil.Process]:
    """All of the engine but its server."""
    return [p for p in psutil.Process(process.pid).children(recursive=True) if "VLLM::" in " ".join(p.cmdline())]


async def load(http: aiohttp.ClientSession, url: str, tokens: int, words: int = 50) -> None:
    prompt = " ".join(random.choice(["what", "is", "steelyard", "and", "why"]) for _ in range(words))
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    async with http.post(url + "/v1/completions", json=body) as r:
        async for _ in r.content:
            pass


async def test_a_core_that_stands_still_is_suspect_while_its_server_says_that_it_is_well(
    http: aiohttp.ClientSession, engine: tuple[EngineProcess, str]
) -> None:
    process, url = engine
    watching = Watch(http, url, "tiny", lambda: process.alive)
    busy = True

    async def client() -> None:
        while busy:
            await load(http, url, 400)

    streams = [asyncio.create_task(client()) for _ in range(4)]
    for _ in range(4):
        assert (await watching.look(Limits())).verdict == "ok"
        await asyncio.sleep(EVERY_S)
    stopped = core_of(process)
    assert stopped
    for p in stopped:
        p.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    judged = await until(watching, "suspect", Limits(), every_s=EVERY_S)
    print(f"suspect {time.monotonic() - began:.1f} s after the stop: {judged.why}")
    assert judged.cause == "stuck"
    async with http.get(url + "/health") as r:
        assert r.status == 200
    for p in stopped:
        p.send_signal(signal.SIGCONT)
    await until(watching, "ok", Limits())
    busy = False
    await asyncio.gather(*streams)

    for p in stopped:  # idle this time
        p.send_signal(signal.SIGSTOP)
    assert (await until(watching, "suspect", Limits(probe_every_s=1.0))).cause == "stuck"
    for p in stopped:
        p.send_signal(signal.SIGCONT)
    await until(watching, "ok", Limits(probe_every_s=1.0))
    watching.close()


async def test_a_saturated_engine_is_never_suspect(
    http: aiohttp.ClientSession, engine: tuple[EngineProcess, str]
) -> None:
    """Prompts of the whole context, more requests than slots, clients that hang up in the middle."""
    process, url = engine
    watching = Watch(http, url, "tiny", lambda: process.alive)
    end = time.monotonic() + SATURATED_S

    async def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            asked = asyncio.create_task(load(http, url, chance.choice([1, 50, 150]), chance.choice([5, 100, 200])))
            done, _ = await asyncio.wait([asked], timeout=chance.choice([0.05, 60]))
            if not done:
                asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    clients = [asyncio.create_task(client(i)) for i in range(12)]
    looks = 0
    while not all(c.done() for c in clients):
        judged = await watching.look(Limits())
        assert judged.verdict == "ok", judged.why
        looks += 1
        await asyncio.sleep(EVERY_S)
    await asyncio.gather(*clients)
    print(f"{looks} looks, {watching._memory.mark[0]:.0f} steps")
    watching.close()
