"""Prompts with the same beginning go to the engine that has it, and usage tells what was found there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from serving.catalog.weights import resolve
from serving.engine.command import EngineSpec, build
from serving.engine.process import EngineProcess
from serving.settings import load_settings
from tests.gateway.harness import (
    CHAT,
    CONTEXT,
    HOST,
    SECRET,
    Engine,
    EngineRoom,
    Front,
    chat,
    events,
    eventually,
    refusing,
)
from tests.stack import ROOT, free_port

CACHES = {"enable-prompt-tokens-details": True}
WORDS = [
    "able",
    "about",
    "above",
    "across",
    "again",
    "along",
    "amber",
    "among",
    "anchor",
    "apple",
    "april",
    "arch",
    "atlas",
    "autumn",
    "bake",
    "barn",
]


def document(seed: int, size: int) -> str:
    """A long beginning of so many characters that no other one shares."""
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=size // 6))[:size]


async def cached(front: Front, text: str, **fields: Any) -> tuple[int, str]:
    """How much of a prompt was in a cache, and whose."""
    request_id = f"cached-{random.getrandbits(48):x}"
    body = chat(text, **{"max_tokens": 4, **fields})
    answer = await front.ask(CHAT, body, headers={"x-request-id": request_id})
    assert answer.status == 200, answer.body
    usage = (events(answer.body)[-2] if fields.get("stream") else answer.json())["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"]), str((await front.line(request_id))["replica"])


async def sticks(front: Front, engines: list[Engine], size: int = 5000) -> None:
    """Two documents, two engines: each is read once, wherever that is, and found there from then on."""
    front.serve(*engines)
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    one, two = document(1, size), document(2, size)
    long = {"max_tokens": 300, "ignore_eos": True}  # the second comes while the first one's engine is at work
    first, second = await asyncio.gather(cached(front, one, **long), cached(front, two, **long))
    assert first[1] != second[1], "at the same time they go to two engines"
    before = front.metric("steelyard_tokens_total", kind="cached")
    told = 0
    for question in ("what", "who", "when"):
        for document_, (_, where), fields in ((one, first, {}), (two, second, stream)):
            found, at = await cached(front, f"{document_} {question}", **fields)
            assert at == where
            assert found > 500
            told += found
    assert front.metric("steelyard_tokens_total", kind="cached") == before + told


@pytest.mark.slow
async def test_a_document_is_asked_about_where_it_was_read(front: Front, room: EngineRoom) -> None:
    await sticks(front, [room.start(enable_prompt_tokens_details=True) for _ in range(2)])


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(400)
async def test_on_vllm_too(front: Front, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    async with vllm(tmp_path, "a") as one, vllm(tmp_path, "b") as two:
        await asyncio.gather(up(one), up(two))
        await sticks(front, [one, two], size=3000)  # a token for two characters: the tiny model knows few words


@contextlib.asynccontextmanager
async def vllm(folder: Path, name: str) -> AsyncIterator[Engine]:
    """A real engine behind its door, starting."""
    spec = EngineSpec(
        model="tiny",
        version="v1",
        kind="vllm",
        weights=str(resolve("build:tiny/v1", base=ROOT / "models", cache=load_settings().cache_dir)),
        served_names=["tiny", "tiny@v1"],
        args={"max-num-seqs": 8, "max-model-len": CONTEXT, "enforce-eager": True, **CACHES},
        env={"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    port = free_port()
    command = build(
        spec, host=HOST, port=port, secret=SECRET, mark=f"test:{name}", parent_pid=os.getpid(), environ=os.environ
    )
    process = EngineProcess(command, folder / f"{name}.log")
    await asyncio.to_thread(process.start)
    endpoint = msgspec.structs.replace(refusing(id=name), url=f"http://{HOST}:{port}", max_model_len=CONTEXT)
    try:
        yield Engine(endpoint, process)
    finally:
        await asyncio.to_thread(process.stop, grace_s=2)


async def up(engine: Engine) -> None:
    async def healthy() -> bool:
        assert engine.process is not None and engine.process.alive, "the engine ended"
        with contextlib.suppress(aiohttp.ClientError):
            headers = {"x-steelyard-secret": SECRET}
            async with aiohttp.ClientSession(headers=headers) as session, session.get(engine.url + "/health") as answer:
                return answer.status == 200
        return False

    await eventually("vLLM answers /health", healthy, within_s=300)
