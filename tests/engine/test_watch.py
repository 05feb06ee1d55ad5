"""What the watch finds out about a running engine through its door; simulated ones, and real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from serving.engine.door import SECRET_HEADER
from serving.engine.health import Judgement, Limits
from serving.engine.watch import Watch
from tests.gateway.harness import CHAT, SECRET, Engine, EngineRoom, chat

EVERY_S = 0.05
FAST = Limits(stuck_s=0.6, replace_s=1.2, sick_s=0.3, probe_every_s=0.3, probe_again_s=0.1)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRoom]:
    room = EngineRoom(tmp_path_factory.mktemp("engines"))
    yield room
    room.close()


@pytest.fixture
async def http(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[aiohttp.ClientSession]:
    for name in ("DEEPER_EVERY_S", "IDLE_EVERY_S"):
        monkeypatch.setattr(f"serving.engine.watch.{name}", 0.05)
    monkeypatch.setattr("serving.engine.watch.LOOK_S", 0.3)
    async with aiohttp.ClientSession(headers={SECRET_HEADER.decode(): SECRET}) as session:
        yield session


def watch(http: aiohttp.ClientSession, engine: Engine) -> Watch:
    assert engine.process is not None
    process = engine.process
    return Watch(http, engine.url, "tiny", lambda: process.alive)


async def until(
    watching: Watch, verdict: str, limits: Limits = FAST, looks: int = 400, every_s: float = EVERY_S
) -> Judgement:
    for _ in range(looks):
        judged = await watching.look(limits)
        if judged.verdict == verdict:
            return judged
        await asyncio.sleep(every_s)
    raise AssertionError(f"never {verdict}")


def asked(http: aiohttp.ClientSession, engine: Engine, **fields: object) -> asyncio.Task[aiohttp.ClientResponse]:
    async def ask() -> aiohttp.ClientResponse:
        async with http.post(engine.url + CHAT, json=chat(**fields)) as r:
            await r.read()
            return r

    return asyncio.create_task(ask())


async def test_an_idle_engine_is_probed_past_its_slots_and_the_probe_is_nobodys_load(
    http: aiohttp.ClientSession, room: EngineRoom
) -> None:
    engine = room.start(slots=1, sim_ttft_ms=400)
    watching = watch(http, engine)
    seen = set()
    for _ in range(30):
        assert (await watching.look(FAST)).verdict == "ok"
        seen.add((watching.in_flight, watching._probe is not None))
        await asyncio.sleep(EVERY_S)
    assert (0, True) in seen and {n for n, _ in seen} == {0}
    watching.close()


async def test_one_that_hangs_is_found_out_while_it_calls_itself_healthy(
    http: aiohttp.ClientSession, room: EngineRoom
) -> None:
    engine = room.start(sins="hangs", after=2)
    watching = watch(http, engine)
    assert (await watching.look(FAST)).verdict == "ok"
    hung = asked(http, engine)
    assert (await until(watching, "suspect")).cause == "stuck"
    assert (await until(watching, "failed")).cause == "stuck"
    hung.cancel()
    await asyncio.gather(hung, return_exceptions=True)
    idle = watch(http, engine)
    assert (await until(idle, "suspect")).cause == "stuck"  # by the probe alone
    idle.close()
    watching.close()


async def test_one_whose_core_is_dead_fails_the_probe(http: aiohttp.ClientSession, room: EngineRoom) -> None:
    engine = room.start(sins="lies_about_health", after=2)
    watching = watch(http, engine)
    await asked(http, engine)
    assert (await until(watching, "failed")).cause == "refuses"
    watching.close()


async def test_a_stopped_process_is_silent_and_well_when_it_goes_on(
    http: aiohttp.ClientSession, room: EngineRoom
) -> None:
    engine = room.start()
    assert engine.process is not None
    watching = watch(http, engine)
    assert (await watching.look(FAST)).verdict == "ok"
    os.kill(engine.process.pid, signal.SIGSTOP)
    assert (await until(watching, "suspect", Limits(stuck_s=0.6))).cause == "silent"
    os.kill(engine.process.pid, signal.SIGCONT)
    await until(watching, "ok")
    engine.process.stop()
    assert (await until(watching, "failed")).cause == "process"
    watching.close()


async def test_a_full_engine_that_works_is_never_suspect(http: aiohttp.ClientSession, room: EngineRoom) -> None:
    engine = room.start(slots=4, sim_itl_ms=5)
    watching = watch(http, engine)
    load = [asked(http, engine, max_tokens=300) for _ in range(4)]
    while not all(task.done() for task in load):
        assert (await watching.look(Limits(stuck_s=1.0))).verdict == "ok"
        await asyncio.sleep(EVERY_S)
    assert watching._memory.steps
    watching.close()
