"""Estimates of a request's tokens, and which prompts are certainly too long."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from serving.errors import BadRequest
from serving.gateway.routes import SERVED
from serving.gateway.sizes import MEDIA_TOKENS, Sizes, check_input, has_media

CHAT, TEXT = SERVED["/v1/chat/completions"], SERVED["/v1/completions"]


def estimate(sizes: Sizes, fields: dict[str, Any], path: str = CHAT.path, context: int | None = None) -> int:
    return sizes.estimate(SERVED[path], fields, len(msgspec.json.encode(fields)), context)


def said(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


def image(size: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * size}}


def test_before_any_answer_a_token_is_four_bytes() -> None:
    assert estimate(Sizes(), {"prompt": "x" * 4000, "max_tokens": 100}, TEXT.path) == pytest.approx(1100, abs=15)


def test_answers_teach_the_size_of_a_token() -> None:
    sizes = Sizes()
    for _ in range(500):
        sizes.learn(1000, prompt=1000, answer=10)
    assert estimate(sizes, {"prompt": "x" * 4000, "max_tokens": 100}, TEXT.path) == pytest.approx(4130, abs=50)


@pytest.mark.parametrize(
    ("path", "fields", "answer"),
    [
        ("/v1/chat/completions", {"max_tokens": 50}, 50),
        ("/v1/chat/completions", {"max_tokens": 50, "max_completion_tokens": 20}, 20),
        ("/v1/chat/completions", {"max_tokens": 20, "n": 3}, 60),
        ("/v1/chat/completions", {"max_tokens": "many", "n": "three"}, 2048),
        ("/v1/completions", {}, 16),
        ("/v1/responses", {"max_output_tokens": 30}, 30),
        ("/v1/messages", {"max_tokens": 30}, 30),
        ("/v1/embeddings", {"max_tokens": 30}, 0),
    ],
)
def test_the_answer_counts_as_far_as_it_is_bounded(path: str, fields: dict[str, Any], answer: int) -> None:
    sizes = Sizes()
    body = {"messages": "x" * 4000, **fields}
    size = len(msgspec.json.encode(body))
    assert sizes.estimate(SERVED[path], body, size, None) - sizes.prompt(SERVED[path], body, size) == answer


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens"])
def test_what_runs_no_model_takes_no_room(path: str) -> None:
    assert estimate(Sizes(), {"messages": "x" * 4000}, path) == 0


def test_who_asks_for_the_most_is_expected_to_get_what_answers_commonly_are() -> None:
    sizes = Sizes()
    asked = {"messages": "", "max_tokens": 32_000}
    assert estimate(sizes, asked) < 2100
    for _ in range(100):
        sizes.learn(100, prompt=25, answer=300)
    assert estimate(sizes, asked) < 500
    assert estimate(sizes, asked | {"ignore_eos": True}) > 32_000
    assert estimate(sizes, asked | {"min_tokens": 5000}) > 5000


def test_nothing_is_larger_than_the_context() -> None:
    assert estimate(Sizes(), {"prompt": "x" * 100_000, "max_tokens": 5}, TEXT.path, context=2048) == 2048


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"prompt": [[1] * 50, [2] * 100], "max_tokens": 10}, 170),
        ({"prompt": [1] * 50, "max_tokens": 10, "n": 3}, 80),
        ({"prompt": [[1] * 50] * 4, "max_tokens": 10, "n": 2}, 280),
        ({"prompt": [[1] * 900] * 3, "max_tokens": 200}, 3000),
        ({"prompt": [[1] * 50] * 4}, 4 * 66),
    ],
)
def test_every_prompt_of_a_batch_and_every_answer_takes_room(fields: dict[str, Any], tokens: int) -> None:
    assert estimate(Sizes(), fields, TEXT.path, context=1000) == tokens


def test_media_inside_the_body_is_not_text() -> None:
    fields = said(image(1_000_000), {"type": "text", "text": "what is it?"}) | {"max_tokens": 9}
    assert MEDIA_TOKENS < estimate(Sizes(), fields) < MEDIA_TOKENS + 100


def test_media_teach_nothing_of_the_size_of_a_token() -> None:
    sizes, text = Sizes(), {"prompt": "x" * 40_000, "max_tokens": 9}
    before = estimate(sizes, text, TEXT.path)
    for _ in range(9):
        sizes.learn(3_000_000, prompt=1500, answer=9)
        sizes.learn(20_000, prompt=1500, answer=9, media=has_media(CHAT, said(image(20_000)), 20_000))
    assert estimate(sizes, text, TEXT.path) == before
    for _ in range(500):  # Cyrillic as ASCII is at 6 bytes a letter
        sizes.learn(40_000, prompt=2200, answer=9, media=has_media(CHAT, said("x" * 40_000), 40_000))
    assert estimate(sizes, text, TEXT.path) < before / 3


@pytest.mark.parametrize(
    "fields",
    [{"prompt": [1] * 101}, {"prompt": [[1], [2] * 101]}, {"prompt": "x" * 1700}, {"prompt": "🙂" * 500}],
)
def test_a_prompt_that_is_certainly_too_long_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="the limit of this model is 100"):
        check_input(100, TEXT, fields, len(msgspec.json.encode(fields)))


@pytest.mark.parametrize("text", ["Государственная программа " * 60, "国家" * 250, "x" * 1599])
def test_what_json_escapes_is_not_longer_for_the_model(text: str) -> None:
    fields = {"messages": [{"role": "user", "content": text}]}
    check_input(200, CHAT, fields, len(json.dumps(fields)))
    fields = {"prompt": [text[:700]] * 10}
    check_input(100, TEXT, fields, len(json.dumps(fields)))


@pytest.mark.parametrize("fields", [{"prompt": [1] * 100}, {"prompt": "x" * 1500}, {"prompt": "x"}, {}])
def test_what_may_fit_is_left_to_the_engine(fields: dict[str, Any]) -> None:
    check_input(100, TEXT, fields, len(msgspec.json.encode(fields)))
    check_input(None, TEXT, {"prompt": [1] * 1000}, 2000)
