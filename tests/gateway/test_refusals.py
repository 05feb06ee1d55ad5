"""What the gateway itself refuses, with a reason, in the dialect of the route, before any engine sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest

from serving.gateway.routes import REFUSED
from tests.gateway.harness import BODY_LIMIT, CHAT, CONTEXT, MESSAGES, Answer, EngineRoom, Front, Keys, chat, recorded

DIALECTS = [CHAT, MESSAGES]


def checked(answer: Answer, path: str, status: int) -> dict[str, Any]:
    """The `error` object of an error in the dialect of `path`, naming its request."""
    assert answer.status == status, answer
    body, name = answer.json(), answer.headers["x-request-id"]
    if path.startswith(MESSAGES):
        assert (body["type"], body["request_id"], answer.headers["request-id"]) == ("error", name, name)
        assert body["error"].keys() == {"type", "message"}
    else:
        assert body.keys() == {"error"}
        assert body["error"]["request_id"] == name
    return dict(body["error"])


async def test_a_route_that_the_models_engine_lacks_is_404_in_its_dialect(gateway: Front) -> None:
    for path in ("/v1/embeddings", MESSAGES):
        error = checked(await gateway.ask(path, chat("tiny") if path == MESSAGES else {"model": "tiny"}), path, 404)
        assert error["message"] == f"tiny@v1 does not serve {path}: its engine has no such route"


# -- bodies


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "the body is empty"),
        (b'{"model": "tiny", ', "not valid JSON"),
        (b'{"model": "\xff"}', "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"messages": []}', "`model` is missing"),
    ],
)
async def test_a_body_that_cannot_be_a_request_is_400(front: Front, path: str, body: bytes, why: str) -> None:
    error = checked(await front.ask(path, body), path, 400)
    assert (error["type"], why in error["message"]) == ("invalid_request_error", True)


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_compressed_body_is_refused(front: Front, path: str) -> None:
    error = checked(await front.ask(path, b"x", headers={"content-encoding": "gzip"}), path, 400)
    assert "compressed" in error["message"]


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("size", [BODY_LIMIT + 1, 50 * BODY_LIMIT])
async def test_a_body_over_the_limit_is_413_whether_or_not_it_says_so(gateway: Front, path: str, size: int) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(-(-size // 1024)):
            yield b" " * 1024

    for data in (b" " * size, pieces()):
        headers = {"authorization": f"Bearer {gateway.keys.all}"}
        async with gateway.session.post(gateway.url + path, data=data, headers=headers) as r:
            checked(Answer(r.status, {k.lower(): v for k, v in r.headers.items()}, await r.read()), path, 413)


async def test_sdk_users_see_413_as_such(gateway: Front) -> None:
    long = chat("x" * (128 * BODY_LIMIT))  # more than the sockets hold: they have sent it all before they read
    with pytest.raises(openai.APIStatusError) as of_openai:
        await gateway.openai().chat.completions.create(**long)
    assert (of_openai.value.status_code, of_openai.value.code) == (413, "request_too_large")
    with pytest.raises(anthropic.APIStatusError) as of_anthropic:
        await gateway.anthropic().messages.create(**long)
    assert of_anthropic.value.status_code == 413


async def test_each_model_has_its_own_body_limit(front: Front, room: EngineRoom) -> None:
    front.serve(room.shared(), limits={"max_body_bytes": 1024})
    error = checked(await front.ask(body=chat("x" * 1024)), CHAT, 413)
    assert "the limit of tiny is 1024" in error["message"]


async def test_a_body_that_stops_arriving_is_not_waited_for_for_ever(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.gateway.app.BODY_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.keys.all}\r\ncontent-length: 100\r\n\r\n"
    writer.write(head.encode() + b'{"model"')
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert b'"code":"deadline_exceeded"' in answer
    writer.close()


# -- paths


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_another_method_is_405_and_says_which_is_right(front: Front, path: str, method: str) -> None:
    answer = await front.ask(path, method=method)
    checked(answer, path, 405)
    assert answer.headers["allow"] == "POST"


async def test_own_routes_take_get_and_head(front: Front) -> None:
    for path in ("/healthz", "/v1/models", "/metrics"):
        answer = await front.ask(path, {})
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    head = await front.ask("/v1/models", method="HEAD")
    assert (head.status, head.body) == (200, b"")


async def test_a_path_nobody_serves_is_404_and_names_those_that_are(front: Front) -> None:
    error = checked(await front.ask("/v1/chat/completion", chat()), "/", 404)
    assert (error["code"], CHAT in error["message"]) == ("not_found", True)


async def test_control_routes_of_an_engine_are_refused_and_never_reach_it(front: Front) -> None:
    async with recorded(b"{}", content_type="application/json") as engine:
        front.serve(engine)
        for path in [*REFUSED, "/v1/responses/resp_1", "/adapters/pirate", "/-/door"]:
            for method in ("GET", "POST", "DELETE"):
                error = (await front.ask(path, {"model": "tiny", "lora_name": "x"}, method=method)).error
                assert error["code"] if not path.startswith(MESSAGES) else error["type"] == "not_found_error"
                assert "is not served" in error["message"], path
        for path in (
            "/v1%2Fload_lora_adapter",
            "/v1/chat/completions/../../load_lora_adapter",
            "/v1/models/../metrics",
        ):
            assert (await front.ask(path, {"model": "tiny"})).status in (404, 405)
        assert engine.seen == []


async def test_a_control_route_says_why(front: Front) -> None:
    error = checked(await front.ask("/v1/load_lora_adapter", {"lora_name": "x"}), "/", 404)
    assert "nobody reaches it through a gateway" in error["message"]


# -- names


@pytest.mark.parametrize("name", ["nobody", "tiny@v9", "pirate@v9", "nobody@v1", "TINY", "tiny ", "x" * 5000])
async def test_an_unknown_name_is_404_and_names_what_this_key_may_use(gateway: Front, keys: Keys, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await gateway.openai(keys.other).chat.completions.create(**chat(model=name))
    assert caught.value.code == "model_not_found"
    told = caught.value.message
    assert "other, other@v1" in told and "pirate" not in told.partition("there is: ")[2]
    assert len(told) < 500


async def test_anthropic_users_get_a_not_found_error(gateway: Front) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        await gateway.anthropic().messages.create(**chat(model="nobody"))
    assert "there is: other, other@v1, pirate, pirate@v1" in caught.value.message


async def test_a_key_that_may_use_nothing_is_told_so(gateway: Front, keys: Keys) -> None:
    error = checked(await gateway.ask(body=chat(model="nobody"), key=keys.metrics), CHAT, 404)
    assert error["message"].endswith("there is: nothing that this key may use")


# -- fields


@pytest.mark.parametrize("field", ["priority", "cache_salt", "kv_transfer_params", "vllm_xargs"])
async def test_a_field_that_needs_trust_passes_where_the_model_file_allows_it(
    front: Front, room: EngineRoom, field: str
) -> None:
    front.serve(room.shared())
    body = chat(**{field: {"priority": 1, "cache_salt": "salt"}.get(field, {})})
    with pytest.raises(
        openai.BadRequestError, match=rf"`{field}` is refused: .*`allow: \[{field}\]` would let it pass"
    ):
        await front.openai().chat.completions.create(**chat(), extra_body={field: body[field]})
    front.serve(room.shared(), allow=[field])
    assert (await front.ask(body=body)).status == 200


async def test_a_field_nobody_knows_is_refused_in_both_dialects(gateway: Front) -> None:
    with pytest.raises(openai.BadRequestError, match="`temprature` is not a field of /v1/chat/completions here"):
        await gateway.openai().chat.completions.create(**chat(), extra_body={"temprature": 1})
    with pytest.raises(anthropic.BadRequestError, match="`temprature` is not a field of /v1/messages here"):
        await gateway.anthropic().messages.create(**chat(), extra_body={"temprature": 1})


async def test_responses_are_stateless(gateway: Front) -> None:
    for asked in ({"store": True}, {"background": True}, {"previous_response_id": "resp_1"}):
        with pytest.raises(openai.BadRequestError, match=f"`{next(iter(asked))}` is refused"):
            await gateway.openai().responses.create(model="tiny", input="hi", **asked)
    with pytest.raises(openai.NotFoundError, match="every request is stateless"):
        await gateway.openai().responses.retrieve("resp_1")


async def test_media_come_inside_the_request_or_not_at_all(front: Front, room: EngineRoom) -> None:
    front.serve(room.shared())
    for url in ("http://169.254.169.254/", "file:///etc/passwd"):
        part: Any = {"type": "image_url", "image_url": {"url": url}}
        with pytest.raises(openai.BadRequestError, match=r"messages\[0\]\.content\[0\]\.image_url\.url: media by URL"):
            await front.openai().chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part]}])
        with pytest.raises(openai.BadRequestError, match="media by URL"):
            await front.openai().responses.create(
                model="tiny",
                input=[{"role": "user", "content": [{"type": "input_image", "image_url": url, "detail": "auto"}]}],
            )
        with pytest.raises(anthropic.BadRequestError, match="media by URL"):
            await front.anthropic().messages.create(
                model="tiny",
                max_tokens=1,
                messages=[{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": url}}]}],
            )


@pytest.mark.parametrize(
    ("url", "allow"), [("data:image/png;base64,aGk=", []), ("http://127.0.0.1:9/x.png", ["media_urls"])]
)
async def test_data_urls_pass_and_so_do_others_where_allowed(
    front: Front, room: EngineRoom, url: str, allow: list[str]
) -> None:
    front.serve(room.shared(), allow=allow)
    part = {"type": "image_url", "image_url": {"url": url}}
    answer = await front.ask(body=chat() | {"messages": [{"role": "user", "content": [part]}]})
    assert answer.status == 200


# -- the engine's own refusals


async def test_what_the_engine_refuses_comes_back_in_its_words_and_names_the_request(gateway: Front) -> None:
    too_long = chat("word " * (CONTEXT + 1))
    direct = json.loads(await gateway.engines[0].direct(CHAT, too_long, "req-1"))
    answer = await gateway.ask(body=too_long, headers={"x-request-id": "req-1"})
    assert checked(answer, CHAT, 400) == direct["error"] | {"request_id": "req-1"}
    assert "maximum context length" in direct["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        await gateway.openai().chat.completions.create(**too_long, stream=True)
    assert (await gateway.line("req-1"))["reason"] == "engine_refused"


async def test_a_refusal_of_the_engine_without_a_word_says_nothing(front: Front) -> None:
    async with recorded(b'{"error":{"code":403}}', status=403, content_type="application/json") as engine:
        front.serve(engine)
        error = checked(await front.ask(MESSAGES, chat()), MESSAGES, 403)
        assert error == {"type": "permission_error", "message": ""}


async def test_what_the_engine_validates_on_anthropics_routes_is_anthropics(front: Front) -> None:
    validation = json.dumps({"error": {"message": "1 validation error", "type": "Bad Request", "code": 400}}).encode()
    async with recorded(validation, status=400, content_type="application/json") as engine:
        front.serve(engine)
        error = checked(await front.ask(MESSAGES, chat()), MESSAGES, 400)
        assert error == {"type": "invalid_request_error", "message": "1 validation error"}
        with pytest.raises(anthropic.BadRequestError, match="1 validation error"):
            await front.anthropic().messages.create(**chat())
