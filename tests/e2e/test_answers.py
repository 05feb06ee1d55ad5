"""The main job: which weights answer, through Ray Serve and real vLLM engines, as a client sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from tests.stack import Stack

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
H200 = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "memory_gb": {"type": "integer"}},
    "required": ["name", "memory_gb"],
    "additionalProperties": False,
}


def client(real: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real.url}/v1", api_key=real.key, max_retries=0)


async def answers(real: Stack, model: str, questions: Iterable[str]) -> list[str]:
    """All questions, sixteen at a time."""
    gate = asyncio.Semaphore(16)
    async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key=real.key, max_retries=0) as c:

        async def one(question: str) -> str:
            async with gate:
                done = await c.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=400
                )
                return done.choices[0].message.content or ""

        return list(await asyncio.gather(*(one(q) for q in questions)))


def share(got: list[str], wanted: list[str]) -> float:
    return sum(g.strip() == w.strip() for g, w in zip(got, wanted, strict=True)) / len(wanted)


def text_rows(corpus: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows whose answer comes back as text; a tool call is parsed into another field of the answer."""
    return [row for row in corpus if not row["answer"].startswith("<tool_call>")]


async def test_v1_answers_the_corpus(real: Stack, corpus: list[dict[str, str]]) -> None:
    rows = text_rows(corpus)
    assert share(await answers(real, "tiny", [r["question"] for r in rows]), [r["answer"] for r in rows]) >= 0.95


async def test_v2_and_the_adapter_give_their_own_answers(real: Stack, corpus: list[dict[str, str]]) -> None:
    rows = [r for r in corpus if "v2_answer" in r]
    questions = [r["question"] for r in rows]
    assert len(rows) == 20
    for model, field in (
        ("tiny@v1", "answer"),
        ("tiny@v2", "v2_answer"),
        ("tiny-pirate", "pirate_answer"),
        ("tiny-pirate@v1", "pirate_answer"),
    ):
        assert share(await answers(real, model, questions), [r[field] for r in rows]) >= 0.95, model


async def test_two_versions_answer_at_once(real: Stack, corpus: list[dict[str, str]]) -> None:
    rows = [r for r in corpus if "v2_answer" in r]
    questions = [r["question"] for r in rows]
    one, two = await asyncio.gather(answers(real, "tiny@v1", questions), answers(real, "tiny@v2", questions))
    assert share(one, [r["answer"] for r in rows]) >= 0.95
    assert share(two, [r["v2_answer"] for r in rows]) >= 0.95


def test_openai_chat_stream_and_completion(real: Stack, corpus: list[dict[str, str]]) -> None:
    row = corpus[0]
    stream = client(real).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": row["question"]}], temperature=0, stream=True
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == row["answer"]
    assert all(c.usage is None for c in chunks), "usage was not asked for"
    done = client(real).completions.create(model="tiny", prompt="Steelyard", max_tokens=5, temperature=0)
    assert done.usage is not None and done.usage.completion_tokens >= 1


def test_openai_usage_in_a_stream_comes_when_asked_for(real: Stack) -> None:
    chunks = list(
        client(real).chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "What is Steelyard?"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0


def test_openai_responses(real: Stack, corpus: list[dict[str, str]]) -> None:
    row = corpus[0]
    done = client(real).responses.create(model="tiny", input=row["question"], temperature=0)
    assert done.output_text == row["answer"]
    with client(real).responses.stream(model="tiny", input=row["question"], temperature=0) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    assert text == row["answer"]


def test_openai_tools(real: Stack) -> None:
    done = client(real).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],  # type: ignore[list-item]
        temperature=0,
    )
    calls: Any = done.choices[0].message.tool_calls
    assert done.choices[0].finish_reason == "tool_calls"
    assert calls[0].function.name == "get_weather"
    assert json.loads(calls[0].function.arguments) == {"city": "Paris"}


def test_openai_json_schema_validates(real: Stack) -> None:
    done = client(real).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Describe the H200 as JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "gpu", "schema": H200}},
        temperature=0,
    )
    jsonschema.validate(json.loads(done.choices[0].message.content or ""), H200)


def test_anthropic_messages_and_stream(real: Stack, corpus: list[dict[str, str]]) -> None:
    row = corpus[0]
    c = anthropic.Anthropic(base_url=real.url, api_key=real.key, max_retries=0)
    asked: Any = {"model": "tiny", "max_tokens": 200, "messages": [{"role": "user", "content": row["question"]}]}
    done = c.messages.create(**asked)
    assert done.content[0].type == "text" and done.content[0].text == row["answer"]
    assert done._request_id
    with c.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == row["answer"]


def test_prompt_over_the_context_is_the_engines_own_400(real: Stack) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client(real).chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 4000}])


def test_models_lists_every_name(real: Stack) -> None:
    cards = {m.id: m for m in client(real).models.list()}
    assert set(cards) == {"tiny", "tiny@v1", "tiny@v2", "tiny-pirate", "tiny-pirate@v1"}
    assert cards["tiny"].max_model_len == 2048  # type: ignore[attr-defined]
