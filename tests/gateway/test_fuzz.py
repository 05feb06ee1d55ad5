"""Whatever a client sends, it is told what is wrong in JSON, with the id of its request, and nothing breaks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.gateway.routes import OWN, REFUSED, SERVED
from tests.gateway.harness import Answer, EngineRoom, Front, json_of

settings.register_profile("http", deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)

FIELDS = sorted(
    {name for route in SERVED.values() for name in route.fields} | {"priority", "chat_template", "nonsense"}
)
NAMES = ["tiny", "tiny@v1", "pirate", "nobody", "", "tiny@v9", "\0", "é" * 50]
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=20) | st.sampled_from(NAMES),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "url", "image_url", "input"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6)
PATHS = st.sampled_from([*SERVED, *OWN, *REFUSED]) | st.text(max_size=30).map(lambda t: "/" + t)


@pytest.fixture
async def tiny(front: Front, room: EngineRoom) -> Front:
    front.serve(room.shared())
    return front


def honest(answer: Answer) -> None:
    """Never a 5xx of ours, always the id, always JSON, never a trace of Python."""
    assert answer.headers["x-request-id"]
    assert answer.status < 500, answer
    if answer.status >= 400:
        assert "error" in answer.json() or "detail" in answer.json()  # an engine's own refusals have their own form
        assert b"Traceback" not in answer.body and b".py" not in answer.body


@settings(settings.get_profile("http"))
@given(path=st.sampled_from([*SERVED]), body=BODIES)
async def test_any_json_on_any_route(tiny: Front, path: str, body: dict[str, Any]) -> None:
    honest(await tiny.ask(path, json_of(body)))


@settings(settings.get_profile("http"))
@given(path=st.sampled_from([*SERVED]), body=BODIES, name=st.sampled_from(NAMES))
async def test_any_fields_of_a_known_model(tiny: Front, path: str, body: dict[str, Any], name: str) -> None:
    messages = [{"role": "user", "content": body.pop("messages", "hi")}]
    honest(await tiny.ask(path, json_of({"max_tokens": 2, "messages": messages, **body, "model": name})))


@settings(settings.get_profile("http"))
@given(path=st.sampled_from([*SERVED]), body=st.binary(max_size=200))
async def test_any_bytes_on_any_route(tiny: Front, path: str, body: bytes) -> None:
    answer = await tiny.ask(path, body)
    honest(answer)
    assert answer.status in (400, 404)


@settings(settings.get_profile("http"))
@given(path=PATHS, method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]))
async def test_any_path_and_method(tiny: Front, path: str, method: str) -> None:
    answer = await tiny.ask("/" if "//" in path else path, b"", method=method)
    honest(answer) if answer.status != 503 else None  # /readyz of a fleet that is not


@settings(settings.get_profile("http"))
@given(
    headers=st.dictionaries(
        st.sampled_from(
            ["authorization", "x-api-key", "x-request-id", "content-encoding", "accept", "x-steelyard-secret"]
        ),
        st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60),
    )
)
async def test_any_headers(tiny: Front, headers: dict[str, str]) -> None:
    answer = await tiny.ask(body={"model": "nobody"}, key="", headers=headers)
    honest(answer)
    assert answer.status == 401
