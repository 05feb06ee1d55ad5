"""The numbers are right: tokens to the last one, gauges back to zero, and no client can make series."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from collections import Counter
from typing import Any

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.fleet.endpoint import Target
from serving.gateway.scrape import FRESH_S
from serving.telemetry.metrics import unrested_gauges
from tests.gateway.harness import CHAT, HOST, SECRET, Engine, EngineRoom, Front, Keys, chat, eventually, listening
from tests.gateway.test_own_routes import scrape

MIXED, AT_ONCE = 1000, 32
USAGE = {"stream_options": {"include_usage": True}}
COUNT = re.compile(r'"(prompt|completion)_tokens":(\d+)')


def mixed(number: int) -> tuple[str, dict[str, Any]]:
    """A request of each kind in turn, each a little different."""
    text, tokens = f"word {number} " * (number % 7 + 1), number % 9 + 1
    kinds: list[tuple[str, dict[str, Any]]] = [
        (CHAT, chat(text, max_tokens=tokens)),
        (CHAT, chat(text, max_tokens=tokens, stream=True, **USAGE)),
        (CHAT, chat(text, max_tokens=tokens, stream=True, model="pirate", **USAGE)),
        (CHAT, chat(text, max_tokens=tokens, stream=True, n=2, model="tiny@v1", **USAGE)),
        ("/v1/completions", {"model": "tiny", "prompt": text, "max_tokens": tokens}),
        ("/v1/completions", {"model": "tiny@v1", "prompt": text, "max_tokens": tokens, "stream": True, **USAGE}),
        (CHAT, chat(text, max_tokens=-1)),  # refused
    ]
    return kinds[number % len(kinds)]


async def generated(engines: list[Engine]) -> float:
    """Tokens that the engines made, as they say."""
    found = 0.0
    for engine in engines:
        found += sum(float(n) for n in re.findall(rb"^vllm:generation_tokens_total\S* (\S+)", await text(engine), re.M))
    return found


async def text(engine: Engine) -> bytes:
    headers = {"x-steelyard-secret": SECRET}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(engine.url + "/metrics") as answer:
        return await answer.read()


@pytest.mark.slow
async def test_tokens_in_metrics_and_log_are_those_that_clients_were_told(front: Front, room: EngineRoom) -> None:
    honest = [room.start(), room.start()]
    front.serve(room.start(sins="returns_500"), *honest)
    told: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    turn = itertools.count()

    async def client() -> None:
        while (number := next(turn)) < MIXED:
            if number % 10 == 0:  # leaves in the middle
                async with front.hung_up(chat(stream=True, max_tokens=2000)) as reader:
                    for _ in range(number // 10 % 5 + 2):
                        await reader.readuntil(b'"content":"')
                continue
            path, body = mixed(number)
            answer = await front.ask(path, body)
            statuses[answer.status] += 1
            if answer.status == 200:
                told.update({kind: int(count) for kind, count in COUNT.findall(answer.body.decode())})

    async with asyncio.TaskGroup() as clients:
        for _ in range(AT_ONCE):
            clients.create_task(client())
    await front.rest()
    await eventually("all are written down", lambda: len(front.log.path.read_text().splitlines()) == MIXED)
    lines = [json.loads(line) for line in front.log.path.read_text().splitlines()]

    def logged(field: str) -> int:
        return sum(line[field] or 0 for line in lines)

    assert statuses.keys() == {200, 400} and front.metric("steelyard_retries_total", outcome="http_5xx") > 0
    counted = {k: front.metric("steelyard_tokens_total", kind=k, outcome="completed") for k in ("prompt", "completion")}
    assert counted == dict(told) == {k: logged(f"{k}_tokens") for k in told}
    assert front.metric("steelyard_tokens_total", adapter="pirate", outcome="completed") > 0
    left = [line for line in lines if line["client_gone"]]
    aborted = front.metric("steelyard_tokens_total", outcome="aborted")
    assert len(left) == MIXED // 10
    assert aborted == logged("aborted_tokens") == sum(line["aborted_tokens"] for line in left)
    # What they were given: no less than what they read, no more than what was made until the engine heard of it.
    assert sum(number // 10 % 5 + 2 for number in range(0, MIXED, 10)) <= aborted + len(
        left
    )  # the first holds no token
    assert aborted <= await generated(honest) - told["completion"]
    assert sum(statuses.values()) + len(left) == front.metric("steelyard_requests_total") == MIXED
    judged = {v: front.metric("steelyard_slo_requests_total", verdict=v) for v in ("good", "slow", "failed")}
    assert judged == {"good": statuses[200], "slow": 0, "failed": 0}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_an_answer_without_an_end_counts_the_tokens_that_it_had(
    front: Front, room: EngineRoom, path: str
) -> None:
    engine = room.start(sins="hangs", after=5)
    front.serve(engine)
    body = {"model": "tiny", "max_tokens": 50, "stream": True}
    body |= {"prompt": "hello"} if path != CHAT else {"messages": [{"role": "user", "content": "hello"}]}
    async with front.session.post(
        front.url + path, json=body, headers={"authorization": f"Bearer {front.keys.all}"}
    ) as r:
        for _ in range(5 + (path == CHAT)):
            assert b'"finish_reason":null' in await r.content.readuntil(b"\n\n")
    await front.rest()
    assert (
        front.metric("steelyard_tokens_total", kind="completion", outcome="aborted") == 5 == await generated([engine])
    )
    assert front.metric("steelyard_tokens_total", outcome="completed") == 0


@pytest.mark.slow
async def test_no_client_makes_series(front: Front, room: EngineRoom, keys: Keys) -> None:
    """Ten thousand requests with names, keys, paths and header values of their own, some with a good key."""
    front.serve(room.shared())
    await front.ask(body=chat())
    rng, sent = random.Random(1), []

    async def ask(key: str, model: str, path: str, headers: dict[bytes, bytes]) -> None:
        body = msgspec.json.encode(chat(model=model))
        got = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            return next(got)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "server": (HOST, 1)}
        all_headers = {b"authorization": f"Bearer {key}".encode(), **headers}
        await front.gateway({**scope, "headers": list(all_headers.items())}, receive, send)

    async def burst(count: int) -> int:
        for i in range(count):
            word = f"{rng.getrandbits(64):x}"
            key = (keys.all, keys.tiny, f"sk-steelyard-{word[:8]:0>8}-{word * 3}")[i % 3]
            path = CHAT if i % 2 else rng.choice(["/v1/embeddings", f"/v1/{word}", f"/{word}"])
            await ask(key, f"tiny@{word}" if i % 5 else word, path, {b"x-request-id": word.encode()})
        return len(front.gateway.metrics.text().splitlines())

    before = await burst(200)
    sent.clear()
    assert await burst(10_000) == before
    assert {m["status"] for m in sent if m["type"] == "http.response.start"} <= {401, 404}
    assert unrested_gauges(front.gateway.metrics.text()) == {}
    assert front.metric("steelyard_requests_total", model="unknown") >= 10_000


async def test_whoever_announces_a_target_is_scraped_and_what_is_stale_is_marked(front: Front) -> None:
    async def exporter(scope: Any, receive: Any, send: Any) -> None:
        ok = dict(scope["headers"]).get(b"x-steelyard-secret") == SECRET.encode() and scope["path"] == "/metrics"
        await send({"type": "http.response.start", "status": 200 if ok else 401, "headers": []})
        await send({"type": "http.response.body", "body": b'steelyard_gpu_up{gpu="GPU-1"} 1\n'})

    def target(name: str, url: str) -> Target:
        return Target(id=f"gpu#{name}", component="gpu", url=url, node=name)

    async with listening(exporter) as port:
        front.gateway.fleet.announced = (
            target("a", f"http://{HOST}:{port}/metrics"),
            target("b", "http://127.0.0.1:1/metrics"),
        )
        front.serve()
        front.gateway.fleet.announced = (
            target("a", f"http://{HOST}:{port}/metrics"),
            target("b", "http://127.0.0.1:1/metrics"),
        )
        page = await scrape(front)
        alone = await scrape(front, "?source=gpu%23a")
    assert 'steelyard_gpu_up{component="gpu",instance="gpu#a",node="a",gpu="GPU-1"} 1' in page
    assert 'steelyard_target_up{component="gpu",instance="gpu#a",node="a"} 1' in page
    assert 'steelyard_target_up{component="gpu",instance="gpu#b",node="b"} 0' in page
    assert alone == 'steelyard_gpu_up{gpu="GPU-1"} 1\n'
    targets = (await front.ask("/metrics/targets", method="GET", key=front.keys.metrics)).json()
    labels = next(t["labels"] for t in targets if t["labels"]["instance"] == "gpu#b")
    assert (labels["component"], labels["node"], labels["__param_source"]) == ("gpu", "b", "gpu#b")


async def test_a_version_without_a_replica_is_seen_to_be_so(front: Front) -> None:
    front.serve()
    found = {
        (s.name, *sorted(s.labels.values())): s.value
        for family in text_string_to_metric_families(front.gateway.metrics.text())
        for s in family.samples
    }
    assert found["steelyard_replicas", "READY", "tiny", "v1"] == 0
    assert found["steelyard_replicas_required", "tiny", "v1"] == 1
    assert found["steelyard_slo_requests_total", "failed", "tiny", "v1"] == 0


@pytest.mark.soak
async def test_sixty_four_replicas_are_merged_within_a_second(front: Front, room: EngineRoom) -> None:
    engine = room.shared()
    front.serve(*(msgspec.structs.replace(engine.endpoint, id=f"tiny@v1#{i}", node=f"10.0.0.{i}") for i in range(64)))
    took = []
    for _ in range(5):
        await asyncio.sleep(FRESH_S)
        began = time.monotonic()
        page = await scrape(front)
        took.append(time.monotonic() - began)
        assert page.count("vllm:num_requests_running{") == 64
        assert len(re.findall(r"^steelyard_target_up{.*} 1$", page, re.M)) == 65
    print(f"merged in {sorted(took)} s, {len(page)} bytes")
    assert sorted(took)[2] < 1
