"""Which engine answers: model, model@version, adapter, adapter@version; and what a key is shown of it."""

from __future__ import annotations

import pytest

from tests.gateway.harness import CHAT, Engine, EngineRoom, Front, Keys, chat, endless


@pytest.fixture
def engines(front: Front, room: EngineRoom) -> list[Engine]:
    """tiny@v1, tiny@v2 and other@v1, told apart by what they answer."""
    engines = [room.shared(), room.shared(version="v2"), room.shared(model="other")]
    front.serve(*engines)
    return engines


async def said(front: Front, model: str) -> tuple[str, str]:
    """The name that signs the answer, and the version that gave it."""
    answer = await front.ask(body=chat(model=model))
    line = await front.line(answer.headers["x-request-id"])
    return answer.json()["model"], f"{line['model']}@{line['version']}"


@pytest.mark.parametrize(
    ("asked", "signed", "version"),
    [
        ("tiny", "tiny", "tiny@v1"),
        ("tiny@v1", "tiny", "tiny@v1"),
        ("tiny@v2", "tiny", "tiny@v2"),
        ("other", "other", "other@v1"),
        ("pirate", "pirate", "tiny@v1"),
        ("pirate@v1", "pirate", "tiny@v1"),
        ("pirate@v2", "pirate", "tiny@v2"),
    ],
)
async def test_a_name_reaches_its_version_and_adapter(
    front: Front, engines: list[Engine], asked: str, signed: str, version: str
) -> None:
    assert await said(front, asked) == (signed, version)


async def test_versions_and_adapters_answer_differently(front: Front, engines: list[Engine]) -> None:
    names = ["tiny", "tiny@v2", "pirate", "pirate@v2", "other"]
    texts = {(await front.ask(body=chat(model=n))).json()["choices"][0]["message"]["content"] for n in names}
    assert len(texts) == len(names)


async def test_an_adapter_of_a_version_streams_too(front: Front, engines: list[Engine]) -> None:
    stream = await front.openai().chat.completions.create(**chat(model="pirate@v2"), stream=True)
    assert {chunk.model async for chunk in stream} == {"pirate"}


async def test_a_new_release_answers_from_the_next_request_on(front: Front, engines: list[Engine]) -> None:
    assert await said(front, "tiny") == ("tiny", "tiny@v1")
    front.serve(*engines, release={"stable": "v2"})
    assert await said(front, "tiny") == ("tiny", "tiny@v2")


async def test_requests_in_progress_end_under_the_catalog_they_began_with(front: Front, room: EngineRoom) -> None:
    slow = room.shared(sim_itl_ms=20)
    front.serve(slow)
    stream = await front.openai().chat.completions.create(**chat(max_tokens=20), stream=True)
    first = await anext(stream)
    front.serve(versions=[{"version": "v3", "engine": {"kind": "simulator"}}], release={"stable": "v3"})
    rest = [chunk async for chunk in stream]
    assert (first.choices[0].delta.role, rest[-1].choices[0].finish_reason) == ("assistant", "length")


async def test_models_are_listed_with_what_a_client_must_know(front: Front, engines: list[Engine]) -> None:
    cards = {m.id: m for m in (await front.openai().models.list()).data}
    assert list(cards) == ["other", "other@v1", "pirate", "pirate@v1", "pirate@v2", "tiny", "tiny@v1", "tiny@v2"]
    pirate = cards["pirate@v2"].model_dump()
    assert (pirate["root"], pirate["parent"], pirate["max_model_len"]) == ("tiny@v2", "tiny@v2", 2048)
    assert cards["tiny"].model_dump()["root"] == "tiny@v1"


async def test_a_key_is_shown_only_what_it_may_use(front: Front, engines: list[Engine], keys: Keys) -> None:
    shown = await front.openai(keys.other).models.list()
    assert [m.id for m in shown.data] == ["other", "other@v1"]
    assert (await front.openai(keys.metrics).models.list()).data == []


async def test_one_model_is_retrieved_by_any_of_its_names(front: Front, engines: list[Engine], keys: Keys) -> None:
    assert (await front.openai().models.retrieve("tiny@v2")).id == "tiny@v2"
    for name, key in (("nobody", keys.all), ("tiny", keys.other)):
        answer = await front.ask(f"/v1/models/{name}", method="GET", key=key)
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")


async def test_two_replicas_share_the_load(front: Front, room: EngineRoom) -> None:
    one, two = (room.start(slots=4, sim_itl_ms=20) for _ in range(2))
    front.serve(one, two)
    async with front.hung_up(endless()), front.hung_up(endless()), front.hung_up(endless()), front.hung_up(endless()):
        await one.inside(2)
        await two.inside(2)


async def test_tokenize_and_detokenize_are_served(front: Front, engines: list[Engine]) -> None:
    ids = (await front.ask("/tokenize", {"model": "tiny@v2", "prompt": "hello"})).json()["tokens"]
    assert (await front.ask("/detokenize", {"model": "tiny@v2", "tokens": ids})).json() == {"prompt": "hello"}


async def test_replicas_that_drain_get_nothing_new(front: Front, room: EngineRoom) -> None:
    one, two = room.shared(), room.shared(sim_itl_ms=20)
    draining = type(one.endpoint)(
        **{f: getattr(one.endpoint, f) for f in one.endpoint.__struct_fields__} | {"state": "DRAINING"}
    )
    front.serve(draining, two)
    answer = await front.ask(CHAT, chat())
    assert (await front.line(answer.headers["x-request-id"]))["replica"] == two.endpoint.id
