"""Anthropic's and OpenAI's newer route: the same rules, each in its own words. The engine is recorded: vLLM's bytes."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import msgspec
import openai
import pytest

from tests.gateway.harness import MESSAGES, Front, chat, endless, eventually, recorded


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


MESSAGE = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "tiny", "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn", "stop_sequence": None, "usage": {"input_tokens": 7, "output_tokens": 2},
}  # fmt: skip
OPENING = event("message_start", message={**MESSAGE, "content": [], "stop_reason": None})
BLOCK = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
TEXT = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "hi"})
CLOSING = (
    event("content_block_stop", index=0)
    + event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 2})
    + event("message_stop")
)
DEAD = event("error", error={"type": "internal_error", "message": "1 validation error for ..."})

RESPONSE: dict[str, Any] = {
    "id": "resp_1", "object": "response", "created_at": 0, "model": "tiny", "status": "completed", "output": [],
    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": {"input_tokens": 3, "output_tokens": 5},
}  # fmt: skip
CREATED = event("response.created", response={**RESPONSE, "status": "in_progress"}, sequence_number=0)
DELTA = event(
    "response.output_text.delta",
    delta="hi",
    sequence_number=1,
    item_id="m",
    output_index=0,
    content_index=0,
    logprobs=[],
)
COMPLETED = event("response.completed", response=RESPONSE, sequence_number=2)


# -- Anthropic


async def test_a_message_is_answered(front: Front) -> None:
    async with recorded(json.dumps(MESSAGE).encode(), content_type="application/json") as engine:
        front.serve(engine)
        message = await front.anthropic().messages.create(**chat())
        assert (message.content[0].text, message.usage.output_tokens) == ("hi", 2)
        line = await front.line(str(message._request_id))
        assert (line["prompt_tokens"], line["completion_tokens"]) == (7, 2)


async def test_a_streamed_message_is_the_engines_bytes(front: Front) -> None:
    whole = OPENING + BLOCK + TEXT + CLOSING
    async with recorded(OPENING + BLOCK, TEXT, CLOSING) as engine:
        front.serve(engine)
        assert (await front.ask(MESSAGES, chat(stream=True))).body == whole
        async with front.anthropic().messages.stream(**chat()) as stream:
            assert [text async for text in stream.text_stream] == ["hi"]
            assert (await stream.get_final_message()).usage.output_tokens == 2
        assert front.metric("steelyard_tokens_total", kind="completion") == 4


@pytest.mark.parametrize("end", [DEAD, b""])
async def test_a_message_that_breaks_off_ends_with_an_error_event(front: Front, end: bytes) -> None:
    async with recorded(OPENING + BLOCK + TEXT, 0.01, *([end] if end else [])) as engine:
        front.serve(engine)
        body = (await front.ask(MESSAGES, chat(stream=True), headers={"x-request-id": "broken"})).body
        assert body.startswith(OPENING + BLOCK + TEXT + b"event: error\ndata: ")
        told = json.loads(body.rpartition(b"data: ")[2])
        assert (told["type"], told["error"]["type"], told["request_id"]) == ("error", "api_error", "broken")
        assert body.count(b"event: error") == 1 and b"validation error" not in body
        with pytest.raises(anthropic.APIError):
            async with front.anthropic().messages.stream(**chat()) as stream:
                async for _ in stream:
                    pass


async def test_a_message_that_fails_at_its_start_is_begun_elsewhere(front: Front) -> None:
    async with recorded(DEAD) as bad, recorded(OPENING + BLOCK + TEXT + CLOSING) as good:
        front.serve(bad, good)
        assert (await front.ask(MESSAGES, chat(stream=True))).body.endswith(CLOSING)
        assert (len(bad.seen), len(good.seen)) == (1, 1)


async def test_errors_of_load_are_anthropics(front: Front) -> None:
    async with recorded(60.0, slots=1) as engine:
        front.serve(engine, limits={"max_queue": 0, "request_timeout_s": 0.3})
        async with front.hung_up(endless()):
            await engine.inside(1)
            with pytest.raises(anthropic.RateLimitError) as full:
                await front.anthropic().messages.create(**chat())
        assert full.value.response.headers["retry-after"] == "1"
        await engine.inside(0)
        answer = await front.ask(MESSAGES, chat())
        assert (answer.status, answer.error["type"]) == (504, "timeout_error")
    front.serve(limits={"max_wait_s": 0.01})
    answer = await front.ask(MESSAGES, chat())
    assert (answer.status, answer.error["type"]) == (503, "overloaded_error")


async def test_tokens_are_counted_without_a_slot(front: Front) -> None:
    async with recorded(b'{"input_tokens": 7}', content_type="application/json", slots=0) as engine:
        front.serve(type(engine.endpoint)(**{**_fields(engine.endpoint), "slots": 1}))
        counted = await front.anthropic().messages.count_tokens(
            model="tiny", messages=[{"role": "user", "content": "hi"}]
        )
        assert counted.input_tokens == 7


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


# -- OpenAI's responses


async def test_a_response_is_streamed_to_its_end(front: Front) -> None:
    async with recorded(CREATED, DELTA, COMPLETED) as engine:
        front.serve(engine)
        stream = await front.openai().responses.create(model="tiny", input="hi", stream=True)
        assert [e.type async for e in stream] == [
            "response.created",
            "response.output_text.delta",
            "response.completed",
        ]
        assert front.metric("steelyard_tokens_total", kind="completion") == 5
        await eventually("it is written down", lambda: front.log.path.stat().st_size > 0)
        assert json.loads(front.log.path.read_text())["finish"] == "completed"


async def test_a_response_that_breaks_off_is_an_error_for_its_reader(front: Front) -> None:
    async with recorded(CREATED, DELTA, cut=True) as engine:
        front.serve(engine)
        with pytest.raises(openai.APIError):
            async for _ in await front.openai().responses.create(model="tiny", input="hi", stream=True):
                pass
        body = (await front.ask("/v1/responses", {"model": "tiny", "input": "hi", "stream": True})).body
        told = json.loads(body.rpartition(b"data: ")[2])
        assert (told["type"], told["code"]) == ("error", "engine_error")
        front.engines.clear()


async def test_a_response_that_takes_too_long_is_told_in_its_own_words(front: Front) -> None:
    async with recorded(CREATED, 60.0) as engine:
        front.serve(engine, limits={"request_timeout_s": 0.2})
        body = (await front.ask("/v1/responses", {"model": "tiny", "input": "hi", "stream": True})).body
        assert json.loads(body.rpartition(b"data: ")[2])["code"] == "deadline_exceeded"
        await engine.inside(0)


# -- an engine that was told to end

# vLLM's answers to what reaches its core from then on: nothing but that they have no token tells them from whole ones.
NO_MESSAGE = {**MESSAGE, "content": [], "stop_reason": None, "usage": {"input_tokens": 7, "output_tokens": 0}}
NO_RESPONSE = {**RESPONSE, "usage": {"input_tokens": 3, "output_tokens": 0}}
STARTED = event("message_start", message=NO_MESSAGE)
NO_DELTA = event("message_delta", delta={"stop_reason": None, "stop_sequence": None}, usage=NO_MESSAGE["usage"])
STOPPED = {
    MESSAGES: (STARTED, NO_DELTA + event("message_stop")),
    "/v1/responses": (CREATED, event("response.completed", response=NO_RESPONSE, sequence_number=1)),
}
WHOLE = {MESSAGES: (MESSAGE, NO_MESSAGE), "/v1/responses": (RESPONSE, NO_RESPONSE)}


def prompt(path: str, **fields: Any) -> dict[str, Any]:
    return chat(**fields) if path == MESSAGES else {"model": "tiny", "input": "hi", **fields}


@pytest.mark.parametrize("path", STOPPED)
async def test_an_end_without_an_answer_is_an_error_where_the_stream_had_begun(front: Front, path: str) -> None:
    opening, end = STOPPED[path]
    async with recorded(opening, 0.01, end) as engine:
        front.serve(engine)
        body = (await front.ask(path, prompt(path, stream=True))).body
        assert body.startswith(opening + b"event: error\ndata: ") and body.count(b"event: ") == 2
        assert not front.gateway.fleet.fuse.armed


@pytest.mark.parametrize("path", STOPPED)
async def test_an_answer_without_a_token_is_made_elsewhere(front: Front, path: str) -> None:
    whole, nothing = (json.dumps(answer).encode() for answer in WHOLE[path])
    async with (
        recorded(nothing, content_type="application/json") as bad,
        recorded(whole, content_type="application/json") as good,
    ):
        front.serve(bad, good)
        for _ in range(2):
            assert (await front.ask(path, prompt(path))).body == whole
        assert len(bad.seen) >= 1 and not front.gateway.fleet.fuse.armed


async def test_a_stream_that_ends_at_once_without_a_token_is_made_elsewhere(front: Front) -> None:
    good_answer = CREATED + DELTA + COMPLETED
    async with recorded(b"".join(STOPPED["/v1/responses"])) as bad, recorded(good_answer) as good:
        front.serve(bad, good)
        assert (await front.ask("/v1/responses", prompt("/v1/responses", stream=True))).body == good_answer
        assert (len(bad.seen), len(good.seen)) == (1, 1)


async def test_words_about_no_tokens_end_no_answer(front: Front) -> None:
    told = {"output_tokens": 0}
    called = {**MESSAGE, "content": [{"type": "tool_use", "id": "t", "name": "end", "input": {"usage": told}}]}
    created = CREATED.replace(b'{"id"', b'{"metadata":{"output_tokens": 0},"id"')
    async with recorded(json.dumps(called).encode(), content_type="application/json") as engine:
        front.serve(engine)
        assert (await front.ask(MESSAGES, chat())).body == json.dumps(called).encode()
        front.engines.clear()
    async with recorded(created, DELTA, COMPLETED) as engine:
        front.serve(engine)
        body = (await front.ask("/v1/responses", prompt("/v1/responses", stream=True))).body
        assert body == created + DELTA + COMPLETED


# -- JSON that is not the engine's

ABORT = {"finish_reason": "abort"}  # what vLLM says of requests that it drops when it is stopped
CALLED = {**MESSAGE, "content": [{"type": "tool_use", "id": "t", "name": "end", "input": ABORT}]}


@pytest.mark.parametrize(
    ("path", "answer"),
    [("/v1/responses", {**RESPONSE, "metadata": ABORT}), (MESSAGES, CALLED)],
)
async def test_an_answer_that_holds_json_of_others_takes_no_engine_out_of_service(
    front: Front, path: str, answer: dict[str, Any]
) -> None:
    body = msgspec.json.encode(answer)
    async with recorded(body, content_type="application/json") as engine:
        front.serve(engine)
        asked = {"model": "tiny", "input": "hi", "metadata": ABORT} if path != MESSAGES else chat()
        assert (await front.ask(path, asked)).body == body
        assert front.metric("steelyard_upstream_attempts_total", outcome="ok") == 1


async def test_a_stream_that_holds_json_of_its_clients_is_passed_whole(front: Front) -> None:
    created = CREATED.replace(b'{"id"', b'{"metadata":' + msgspec.json.encode(ABORT) + b',"id"')
    async with recorded(created, DELTA, COMPLETED) as engine:
        front.serve(engine)
        asked = {"model": "tiny", "input": "hi", "metadata": ABORT, "stream": True}
        assert (await front.ask("/v1/responses", asked)).body == created + DELTA + COMPLETED
        assert front.metric("steelyard_upstream_attempts_total", outcome="ok") == 1


# -- embeddings


async def test_an_embedding_is_answered_and_counted(front: Front) -> None:
    answer = {
        "object": "list", "model": "tiny", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}],
        "usage": {"prompt_tokens": 3, "total_tokens": 3, "completion_tokens": 0},
    }  # fmt: skip
    async with recorded(json.dumps(answer).encode(), content_type="application/json") as engine:
        front.serve(engine)
        found = await front.openai().embeddings.create(model="tiny", input="hi", encoding_format="float")
        assert found.data[0].embedding == [0.5]
        assert front.metric("steelyard_tokens_total", kind="prompt") == 3
