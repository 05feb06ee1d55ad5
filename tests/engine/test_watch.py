"""What the watch finds out about a running engine through its door; simulated ones, and real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
from aiohttp import test_utils, web

from serving.engine.door import SECRET_HEADER, STATUS_PATH
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
    for name in ("HEALTH_EVERY_S", "IDLE_EVERY_S"):
        monkeypatch.setattr(f"serving.engine.watch.{name}", 0.05)
    monkeypatch.setattr("serving.engine.watch.LOOK_S", 0.5)
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
    for _ in range(15):
        assert (await watching.look(FAST)).verdict == "ok"
        seen.add((watching.in_flight, watching._probe is not None))
        await asyncio.sleep(EVERY_S)
    assert (0, True) in seen and {n for n, _ in seen} == {0}
    watching.close()


async def test_one_that_is_too_busy_for_ever_with_nothing_inside_refuses(http: aiohttp.ClientSession) -> None:
    async def generate(_: web.Request) -> web.Response:
        return web.Response(status=503)

    async def door(_: web.Request) -> web.Response:
        return web.json_response({"in_flight": 0, "tokens": 0, "entered": 0})

    async def well(_: web.Request) -> web.Response:
        return web.Response(text="vllm:iteration_tokens_total_count 5\nvllm:num_requests_running 0\n")

    app = web.Application()
    app.add_routes([web.get(STATUS_PATH, door), web.get("/health", well), web.get("/metrics/", well)])
    app.router.add_post("/v1/completions", generate)
    async with test_utils.TestServer(app) as server:
        watching = Watch(http, str(server.make_url("")).rstrip("/"), "tiny", lambda: True)
        assert (await until(watching, "suspect")).cause == "refuses"
        assert (await until(watching, "failed")).cause == "refuses"


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


async def test_the_counters_of_a_busy_engine_are_read_in_every_look(
    http: aiohttp.ClientSession, room: EngineRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engine.watch.HEALTH_EVERY_S", 60.0)
    engine = room.start(sim_ttft_ms=2500)
    watching = watch(http, engine)
    await watching.look(FAST)
    asking = asked(http, engine, text="word " * 300)
    seen = 0
    while not asking.done():
        memory = (await watching.look(Limits())).memory
        if watching.in_flight:
            assert memory.read_at == memory.looked_at
            seen += 1
        await asyncio.sleep(EVERY_S)
    assert seen > 10
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


async def test_a_long_prefill_yields_nothing_and_is_work(http: aiohttp.ClientSession, room: EngineRoom) -> None:
    engine = room.start(sim_ttft_ms=2500)
    watching = watch(http, engine)
    asking = asked(http, engine, text="word " * 300)
    seen = 0
    while not asking.done():
        judged = await watching.look(Limits(stuck_s=1.2, slow_steps=0))
        assert judged.verdict == "ok", judged.why
        seen += watching.in_flight
        await asyncio.sleep(EVERY_S)
    assert seen > 10
    watching.close()


@pytest.mark.soak
@pytest.mark.timeout(3000)
async def test_saturation_with_long_prompts_and_hang_ups_is_no_reason_to_suspect(room: EngineRoom) -> None:
    """Twenty minutes (`SATURATED_S`): prompts of up to 32k tokens, more of them than fit, clients that leave at any moment."""
    engine = room.start(slots=32, sim_ttft_ms=8000, sim_itl_ms=20, sim_kv_tokens=200_000, max_model_len=40_000)
    end = time.monotonic() + float(os.environ.get("SATURATED_S", "1200"))

    async def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            words, tokens = chance.choice([10, 1000, 30_000]), chance.choice([1, 50, 400])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(chance.choice([0.1, 5, 600])):
                    async with http.post(engine.url + CHAT, json=chat("word " * words, max_tokens=tokens)) as r:
                        await r.read()

    async with aiohttp.ClientSession(headers={SECRET_HEADER.decode(): SECRET}) as http:
        watching = watch(http, engine)
        clients = [asyncio.create_task(client(i)) for i in range(48)]
        looks = 0
        while not all(c.done() for c in clients):
            judged = await watching.look(Limits())
            assert judged.verdict == "ok", judged.why
            looks += 1
            await asyncio.sleep(0.5)
        await asyncio.gather(*clients)
        watching.close()
    print(f"{looks} looks")
