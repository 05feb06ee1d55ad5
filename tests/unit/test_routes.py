"""The allow-list: what is let in, and why the rest is not."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.catalog.spec import ALLOWED_FIELDS
from serving.errors import BadRequest, UnknownRoute, WrongMethod
from serving.gateway import routes
from serving.gateway.routes import OWN, REFUSED, SERVED, check, match, parse, splice

CHAT = SERVED["/v1/chat/completions"]
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def refusal(fields: dict[str, Any], path: str = CHAT.path, allow: tuple[str, ...] = ()) -> str:
    with pytest.raises(BadRequest) as caught:
        check(SERVED[path], {"model": "tiny", **fields}, allow)
    return caught.value.message


def passes(fields: dict[str, Any], path: str = CHAT.path, allow: tuple[str, ...] = ()) -> None:
    check(SERVED[path], {"model": "tiny", **fields}, allow)


def says(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


# -- paths


def test_no_path_is_in_two_tables() -> None:
    assert not SERVED.keys() & OWN.keys() | SERVED.keys() & REFUSED.keys() | OWN.keys() & REFUSED.keys()


@pytest.mark.parametrize("path", SERVED)
def test_what_is_served_takes_post_only(path: str) -> None:
    assert match("POST", path) is SERVED[path]
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
        with pytest.raises(WrongMethod) as caught:
            match(method, path)
        assert caught.value.headers() == [(b"allow", b"POST")]


@pytest.mark.parametrize("path", [*OWN, "/v1/models/tiny@v1"])
def test_what_the_gateway_answers_itself_takes_get_only(path: str) -> None:
    assert match("GET", path) == match("HEAD", path) == ("/v1/models" if path.startswith("/v1") else path)
    with pytest.raises(WrongMethod):
        match("POST", path)


@pytest.mark.parametrize("path", [*REFUSED, "/v1/responses/resp_1", "/v1/responses/resp_1/cancel"])
def test_what_is_refused_says_why(path: str) -> None:
    for method in ("GET", "POST"):
        with pytest.raises(UnknownRoute, match="is not served: "):
            match(method, path)


@pytest.mark.parametrize(
    "path", ["/", "", "/v1", "/v1/chat/completions/", "//v1/models", "/v1/../metrics", "/V1/models"]
)
def test_nothing_else_is_guessed(path: str) -> None:
    with pytest.raises(UnknownRoute, match="served are "):
        match("POST", path)


@given(st.text(), st.sampled_from(["GET", "POST"]))
def test_no_path_goes_through_by_accident(path: str, method: str) -> None:
    with pytest.raises(UnknownRoute) as caught:
        match(method, "/x" + path)
    assert len(caught.value.message) < 1000


# -- bodies


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "the body is empty"),
        (b"{", "not valid JSON"),
        (b'{"model": "a"} x', "not valid JSON"),
        (b'{"model": "\xff"}', "not valid JSON"),
        (b'{"model": "\\ud800"}', "not valid JSON"),
        ('{"model": "a"}'.encode("utf-16"), "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "not a JSON object"),
        (b'"model"', "not a JSON object"),
        (b"{}", "`model` is missing"),
        (b'{"model": 1}', "`model` is int, not a string"),
        (b'{"model": null}', "`model` is missing"),
        (b'{"model": ""}', "`model` is missing"),
    ],
)
def test_a_body_that_cannot_be_a_request(body: bytes, why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        parse(body)


@given(st.binary())
def test_any_bytes_are_a_request_or_a_refusal(body: bytes) -> None:
    with contextlib.suppress(BadRequest):
        assert isinstance(parse(body), dict)


def test_of_two_equal_keys_the_last_counts_here_as_in_the_engine() -> None:
    assert parse(b'{"model": "a", "model": "b"}')["model"] == "b"


@given(
    st.dictionaries(st.text(), st.none() | st.integers(-(2**53), 2**53) | st.text(), min_size=1),
    st.text(max_size=3, alphabet=" \n\t\r"),
)
def test_a_spliced_body_means_the_same_with_one_field_changed(fields: dict[str, Any], space: str) -> None:
    body = msgspec.json.encode(fields) + space.encode()
    assert msgspec.json.decode(splice(body, b'"model":"x"')) == fields | {"model": "x"}


# -- fields


@pytest.mark.parametrize("path", SERVED)
def test_an_unknown_field_is_refused_not_ignored(path: str) -> None:
    assert refusal({"temprature": 1}, path) == f"`temprature` is not a field of {path} here"


def test_a_refusal_does_not_repeat_a_name_of_any_length() -> None:
    assert len(refusal({"x" * 100_000: 1})) < 200


@pytest.mark.parametrize("name", routes._REFUSED)
def test_a_refused_field_says_why_and_passes_when_it_asks_for_nothing(name: str) -> None:
    if name in CHAT.fields:
        pytest.skip("served on this route")
    assert f"`{name}` is refused: {routes._REFUSED[name][0]}" in refusal({name: "x"})
    passes({name: None})


def test_every_switch_of_a_model_file_opens_something_and_only_that() -> None:
    switches = {switch for _, switch in routes._REFUSED.values() if switch} | {"media_urls"}
    assert switches == set(ALLOWED_FIELDS)
    for name, (_, switch) in routes._REFUSED.items():
        if switch:
            passes({name: 1}, allow=(switch,))
            assert f"`allow: [{switch}]`" in refusal({name: 1}, allow=tuple(switches - {switch}))


def test_what_needs_memory_between_requests_is_refused() -> None:
    for fields in ({"store": True}, {"background": True}, {"previous_response_id": "resp_1"}):
        assert "is refused" in refusal(fields, "/v1/responses")
    passes({"store": False, "background": False, "previous_response_id": None}, "/v1/responses")
    assert "nothing is stored here" in refusal({"store": True})


def test_every_accepted_field_is_a_name() -> None:
    assert all(name.isidentifier() for route in SERVED.values() for name in route.fields)


# -- media

REMOTE = [
    "http://10.0.0.1/x.png",
    "https://x/y",
    "file:///etc/passwd",
    "/etc/passwd",
    "ftp://x",
    "//x",
    "x.png",
    "DATA:x",
]


@pytest.mark.parametrize("url", REMOTE)
@pytest.mark.parametrize(
    "part",
    [
        lambda url: {"type": "image_url", "image_url": {"url": url}},
        lambda url: {"type": "image_url", "image_url": url},
        lambda url: {"type": "input_image", "image_url": url},
        lambda url: {"type": "video_url", "video_url": {"url": url}},
        lambda url: {"type": "audio_url", "audio_url": {"url": url}},
        lambda url: {"type": "input_file", "file_url": url},
        lambda url: {"image_url": url},
        lambda url: {"type": "image", "source": {"type": "url", "url": url}},
        lambda url: {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": url}}]},
        lambda url: {"type": ["tool_use"], "input": {"image_url": url}},
    ],
)
def test_media_must_come_inside_the_request(part: Any, url: str) -> None:
    assert "media by URL or path is refused" in refusal(says({"type": "text", "text": "look"}, part(url)))
    passes(says(part(url)), allow=("media_urls",))
    passes(says(part(PIXEL)))


def test_a_refusal_of_media_says_where() -> None:
    fields = says("hello", {"type": "image_url", "image_url": {"url": "http://x"}})
    assert refusal(fields).startswith("messages[0].content[1].image_url.url: ")


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/responses", "input"),
        ("/v1/messages", "system"),
        ("/v1/embeddings", "input"),
        ("/v1/embeddings", "messages"),
        ("/tokenize", "messages"),
        ("/pooling", "messages"),
        ("/classify", "messages"),
        *((path, field) for path in ("/score", "/v1/score") for field in ("data_1", "queries", "items", "text_2")),
        *((path, field) for path in ("/rerank", "/v1/rerank", "/v2/rerank") for field in ("query", "documents")),
    ],
)
def test_media_are_looked_for_wherever_a_route_takes_them(path: str, field: str) -> None:
    content = {"content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}
    for value in (content, [content]):
        assert "media by URL" in refusal({field: value}, path)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "look at http://example.com/x.png"},
        {"role": "user", "content": [{"type": "text", "text": "http://example.com"}]},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "get", "arguments": {"url": "http://example.com"}}}],
        },
        {"role": "assistant", "content": [{"type": "tool_use", "name": "get", "input": {"url": "http://example.com"}}]},
        {"role": "assistant", "content": "x", "annotations": [{"type": "url_citation", "url": "http://example.com"}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}]},
        {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": "/9j/4AAQ"}}]},
    ],
)
def test_urls_that_nobody_fetches_pass(message: dict[str, Any]) -> None:
    passes({"messages": [message]})


@pytest.mark.parametrize(
    "part",
    [{"type": "prompt_embeds", "data": "x"}, {"type": "image_embeds", "image_embeds": "x"}, {"audio_embeds": "x"}],
)
def test_tensors_are_refused_in_parts_as_in_fields(part: dict[str, Any]) -> None:
    assert "deserialises tensors" in refusal(says(part), allow=ALLOWED_FIELDS)


def test_deep_and_long_names_cost_no_more_than_their_size() -> None:
    part: Any = {"url": "http://x"}
    for _ in range(900):
        part = {"n" * 1000: part}
    assert refusal(says(part)).endswith("send a data: URL")
