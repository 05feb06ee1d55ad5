"""An answer through the gateway is the engine's answer, byte for byte, but for the usage that nobody asked for."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from tests.gateway.harness import CHAT, Engine, EngineRoom, Front, chat, events, eventually, recorded

ID = "req-of-the-test"
FINGERPRINT = b',"system_fingerprint":"steelyard-sim"'
COMPLETION = "/v1/completions"


def masked(answer: bytes) -> bytes:
    return re.sub(rb'"created":\d+', b'"created":0', answer)


def request(path: str, **fields: Any) -> dict[str, Any]:
    return chat(**fields) if path == CHAT else {"model": "tiny", "prompt": "hello", "max_tokens": 6, **fields}


async def both(front: Front, path: str, **fields: Any) -> tuple[bytes, bytes]:
    """The same request through the gateway and to the engine itself."""
    body = request(path, **fields)
    relayed = await front.ask(path, body, headers={"x-request-id": ID})
    assert relayed.status == 200, relayed
    return masked(relayed.body), masked(await front.engines[0].direct(path, body, ID))


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_a_whole_answer_is_unchanged(gateway: Front, path: str) -> None:
    relayed, direct = await both(gateway, path)
    assert relayed == direct


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("continuous", [False, True])
async def test_a_stream_with_usage_asked_for_is_unchanged(gateway: Front, path: str, continuous: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    relayed, direct = await both(gateway, path, stream=True, stream_options=options)
    assert relayed == direct


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    "options", [{}, {"stream_options": None}, {"stream_options": {}}, {"stream_options": {"include_usage": False}},
                {"stream_options": {"continuous_usage_stats": True}}],
)  # fmt: skip
async def test_usage_nobody_asked_for_is_withheld_and_nothing_else(
    gateway: Front, path: str, options: dict[str, Any]
) -> None:
    relayed, direct = await both(gateway, path, stream=True, **options)
    assert b'"usage"' not in relayed
    # The engine stamps its fingerprint on the last event of all, which is the one withheld.
    assert relayed == direct.replace(FINGERPRINT, b"")


async def test_a_long_stream_is_unchanged(front: Front, room: EngineRoom) -> None:
    front.serve(room.shared(sim_itl_ms=0))
    relayed, direct = await both(front, CHAT, stream=True, max_tokens=2000, stream_options={"include_usage": True})
    assert relayed == direct
    assert len(events(relayed)) == 2000 + 3


async def test_what_the_gateway_withholds_it_counts(front: Front, room: EngineRoom) -> None:
    front.serve(room.shared(sim_itl_ms=30))  # so slow that no two tokens come at once
    answer = await front.ask(body=chat(stream=True))
    line = await front.line(answer.headers["x-request-id"])
    assert (line["completion_tokens"], line["prompt_tokens"] > 0, line["stream"]) == (6, True, True)
    assert line["events"] == len(events(answer.body))
    assert line["finish"] in ("stop", "length")
    assert 0 < line["itl_p50_ms"] <= line["itl_max_ms"] <= line["e2e_ms"]
    assert front.metric("steelyard_tokens_total", model="tiny", kind="completion") == 6
    assert front.metric("steelyard_stream_events_total", model="tiny") > 0


async def test_whole_answers_are_counted_too(gateway: Front) -> None:
    answer = await gateway.ask(body=chat())
    line = await gateway.line(answer.headers["x-request-id"])
    assert (line["completion_tokens"], line["stream"], line["events"]) == (6, False, 0)
    assert (line["finish"], line["itl_max_ms"]) == (answer.json()["choices"][0]["finish_reason"], None)
    assert gateway.metric("steelyard_tokens_total", model="tiny", kind="completion") == 6


async def test_sdk_users_get_usage_exactly_when_they_ask(gateway: Front) -> None:
    for options, counts in (({}, []), ({"stream_options": {"include_usage": True}}, [6])):
        stream = await gateway.openai().chat.completions.create(**chat(), stream=True, **options)
        assert [c.usage.completion_tokens async for c in stream if c.usage] == counts


async def test_bad_stream_options_are_the_engines_to_refuse(gateway: Front) -> None:
    relayed = await gateway.ask(body=chat(stream=True, stream_options="all"), headers={"x-request-id": ID})
    direct = await gateway.engines[0].direct(CHAT, chat(stream=True, stream_options="all"), ID)
    refused = json.loads(direct)["error"] | {"request_id": ID}
    assert (relayed.status, relayed.json()) == (400, {"error": refused})


async def test_a_stream_is_not_held_back(front: Front, room: EngineRoom) -> None:
    """The first event is with the client while the engine still makes the second."""
    engine = room.shared(sim_itl_ms=60_000)
    front.serve(engine)
    async with front.hung_up(chat(stream=True)) as reader:
        assert b'"role":"assistant"' in await reader.readuntil(b'"role":"assistant"')
        await engine.inside(1)


async def test_headers_of_a_stream(gateway: Front) -> None:
    headers = (await gateway.ask(body=chat(stream=True))).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    assert "content-length" not in headers


async def test_what_an_engine_says_inside_its_text_is_text(front: Front) -> None:
    sly = b'data: {"choices":[{"delta":{"content":"data: [DONE]\\n\\ndata: {\\"error\\": \\"choices\\":[] event: error"}}]}\n\n'
    for half in range(0, len(sly), 7):
        async with recorded(sly[:half], sly[half:], b"data: [DONE]\n\n") as engine:
            front.serve(engine)
            assert (await front.ask(body=chat(stream=True))).body == sly + b"data: [DONE]\n\n"
            front.engines.clear()


async def test_a_client_on_http_1_0_gets_its_answer(gateway: Front) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    body = b'{"model":"tiny","prompt":"x"}'
    head = f"POST /tokenize HTTP/1.0\r\nx-api-key: {gateway.keys.all}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    assert (await reader.read()).endswith(b"}")
    writer.close()


async def test_many_streams_at_once_are_each_their_own(front: Front, room: EngineRoom) -> None:
    engine: Engine = room.shared(sim_itl_ms=0)
    front.serve(engine)
    bodies = [chat(f"question {i}", stream=True, max_tokens=30) for i in range(40)]
    relayed = await asyncio.gather(*(front.ask(body=b, headers={"x-request-id": ID}) for b in bodies))
    for body, answer in zip(bodies, relayed, strict=True):
        direct = await engine.direct(CHAT, body, ID)
        assert masked(answer.body) == masked(direct).replace(FINGERPRINT, b"")
    await eventually("all are written down", lambda: front.metric("steelyard_requests_total", status="200") == 40)
