"""Which endpoint takes a request: the least loaded, unless a cache is worth more."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.fleet.endpoint import Endpoint, State
from serving.gateway import prefix
from serving.gateway.prefix import BLOCK_BYTES, MOST_BLOCKS, Remembered, blocks_of
from serving.gateway.routes import SERVED
from serving.gateway.routing import Upstream, pick

CHAT = SERVED["/v1/chat/completions"]


def upstream(name: str, slots: int = 10, sent: int = 0, tokens: int = 0, **more: Any) -> Upstream:
    made = Upstream(
        Endpoint(id=name, model="m", version="v", url=f"http://{name}", state=State.READY, slots=slots, **more)
    )
    for _ in range(sent):
        made.bind(0, tokens)
    return made


def said(*texts: str, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text} for text in texts], **fields}


fleets = st.lists(
    st.builds(
        upstream,
        st.text("abcdefgh", min_size=1),
        slots=st.integers(1, 9),
        sent=st.integers(0, 9),
        tokens=st.integers(0, 50),
        kv_tokens=st.sampled_from([None, 100, 500]),
        in_flight=st.integers(0, 9),
    ),
    max_size=6,
    unique_by=lambda u: u.endpoint.id,
)


@given(fleets, st.lists(st.integers(), max_size=5), st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_with_nothing_shared_it_is_the_least_loaded(fleet: list[Upstream], blocks: list[int], tokens: int) -> None:
    found = pick(fleet, 1, tokens=tokens, blocks=tuple(blocks), session=7)
    assert found is pick(fleet, 1, tokens=tokens)
    roomy = [u for u in fleet if u.room(1, tokens)]
    assert (found is None) == (not roomy)
    assert found is None or found.load() == min(u.load() for u in roomy)


@given(fleets, st.lists(st.integers(0, 20), min_size=1, max_size=8, unique=True), st.data())
@settings(max_examples=50, deadline=None)
def test_a_cache_moves_a_request_only_to_where_more_is_shared(
    fleet: list[Upstream], blocks: list[int], data: st.DataObject
) -> None:
    for u in fleet:
        u.remembered.add(tuple(blocks[: data.draw(st.integers(0, len(blocks)))]), None)
    found, plain = pick(fleet, 1, blocks=tuple(blocks)), pick(fleet, 1)
    if found is not None and plain is not None and found is not plain:
        assert found.remembered.shared(tuple(blocks)) > plain.remembered.shared(tuple(blocks))
        assert found.room(1)


def test_a_long_shared_prefix_is_worth_some_load_and_not_any() -> None:
    blocks = tuple(range(20))
    warm, cold = upstream("warm", sent=1), upstream("cold")
    warm.remembered.add(blocks, None)
    assert pick([cold, warm], 1, blocks=blocks) is warm
    for _ in range(7):
        warm.bind(0)
    assert pick([cold, warm], 1, blocks=blocks) is cold


def test_a_session_stays_where_it_was() -> None:
    there, other = upstream("there", slots=100, sent=2), upstream("other", slots=100)
    there.remembered.add((), 5)
    assert pick([other, there], 1, session=5) is there
    assert pick([other, there], 1, session=6) is other


def test_room_counts_slots_and_tokens_and_a_giant_goes_alone() -> None:
    u = upstream("a", slots=3, kv_tokens=100)
    assert u.room(0, 500)
    u.bind(0, 60)
    assert (u.room(0, 40), u.room(0, 41)) == (True, False)
    u.bind(0, 40)
    u.bind(0, 0)
    assert not u.room(0, 0)


def test_prompts_share_as_many_blocks_as_they_begin_alike() -> None:
    start = "x" * 5 * BLOCK_BYTES
    one, two = (blocks_of(CHAT, said(start, end * BLOCK_BYTES), None) for end in "ab")
    assert len(one) == 6
    assert sum(a == b for a, b in zip(one, two, strict=True)) == 5


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [(said("y" * 3000), None), (said("x" * 3000), "lora"), (said("x" * 3000, cache_salt="s"), None),
     (said("x" * 3000, tools=[{"type": "function"}]), None)],
)  # fmt: skip
def test_what_no_cache_could_share_shares_nothing(fields: dict[str, Any], adapter: str | None) -> None:
    assert not set(blocks_of(CHAT, said("x" * 3000), None)) & set(blocks_of(CHAT, fields, adapter))


def pictured(media: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + media}}]
    return {"model": "m", "messages": [{"role": "user", "content": content}]}


def test_media_are_known_by_a_digest_and_count_as_what_they_cost() -> None:
    noise = "".join(random.Random(1).choices("abcdefghijklmnop", k=20_000))
    one, same, other = (blocks_of(CHAT, pictured(m), None) for m in (noise, noise[:], noise[::-1]))
    assert one == same and 4 <= len(one) <= 5
    assert not set(one[1:]) & set(other[1:])


def test_of_a_prompt_no_more_is_read_than_is_known_by(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = 0

    def encode(item: Any) -> bytes:
        nonlocal encoded
        data = msgspec.json.encode(item)
        encoded += len(data)
        return data

    monkeypatch.setattr(prefix, "_encode", encode)
    most = MOST_BLOCKS * BLOCK_BYTES
    turns = [{"role": "user", "content": "x" * 5000}] * 2000
    for fields in (
        said("x" * 12 * most),
        {"model": "m", "messages": turns},
        {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 200_000}]},
        {"model": "m", "prompt": list(range(4_000_000))},
        {"model": "m", "prompt": [[7] * 4_000_000]},
    ):
        encoded = 0
        assert len(blocks_of(CHAT, fields, None)) == MOST_BLOCKS
        assert encoded < 2 * most
    assert blocks_of(CHAT, pictured("x" * 12 * most), None)


@pytest.mark.parametrize("fields", [said("short"), said(), {"model": "m"}, {"model": "m", "messages": 5}])
def test_small_and_odd_prompts_have_no_blocks(fields: dict[str, Any]) -> None:
    assert blocks_of(CHAT, fields, None) == ()


def test_what_is_remembered_is_bounded_and_the_latest() -> None:
    memory = Remembered(room=10)
    for i in range(100):
        memory.add(tuple(range(10 * i, 10 * i + 4)), None)
    assert len(memory) == 10
    assert (memory.shared((990, 991, 992, 993)), memory.shared((0, 1))) == (4, 0)
    memory.add(tuple(range(1000, 1020)), 5)
    assert (memory.shared(tuple(range(1000, 1020))), memory.knows(5)) == (9, True)
    assert len(blocks_of(CHAT, said("x" * (MOST_BLOCKS + 9) * BLOCK_BYTES), None)) == MOST_BLOCKS


def test_a_full_memory_forgets_the_oldest_many_at_once() -> None:
    memory = Remembered(room=640)
    sizes = []
    for i in range(2000):
        memory.add((i,), None)
        sizes.append(len(memory))
        assert memory.shared((i,)) == 1
        assert memory.shared((i - 629,)) == (i >= 629)
        assert not memory.shared((i - 640,))
    assert (min(sizes[640:]), max(sizes)) == (630, 640)


def test_another_engine_under_the_same_name_remembers_nothing() -> None:
    u = upstream("a")
    u.remembered.add((1, 2), None)
    u.broken(0)
    u.heard(upstream("b", kv_tokens=512).endpoint)
    u.keep(9)
    assert (len(u.remembered), u.remembered.room, u.room(0)) == (0, 2, True)


def test_a_prompt_goes_past_a_long_one_that_is_still_to_be_computed() -> None:
    early, late = upstream("early"), upstream("late", sent=1)
    early.pending = 400
    assert pick([early, late], 1, blocks=(1, 2)) is late
    early.remembered.add((1, 2, 3), None)
    early.pending = 12  # what it has is worth more than some waiting
    assert pick([early, late], 1, blocks=(1, 2, 3, 4)) is early


def test_gateways_send_what_none_of_them_knows_to_one_place() -> None:
    """So that the next turn of a conversation finds its beginning, whichever gateway it comes by."""
    prompts = [blocks_of(CHAT, said("system " * 500, f"{i} " * 3000), None) for i in range(40)]
    assert len({p[2] for p in prompts}) == 1 and len({p[-1] for p in prompts}) == 40
    chosen = []
    for _ in range(2):
        fleet = [upstream(name, slots=100) for name in "abcd"]
        for u in fleet:
            u.remembered.add(prompts[0][:3], None)  # the system prompt is everywhere
        found = [pick(fleet, 1, blocks=p, siblings=True) for p in prompts]
        chosen.append([u.endpoint.id for u in found if u])
    assert chosen[0] == chosen[1]
    assert min(chosen[0].count(name) for name in "abcd") >= 4
    busy = [upstream(name, slots=100, sent=70 * (name == chosen[0][0])) for name in "abcd"]
    elsewhere = pick(busy, 1, blocks=prompts[0], siblings=True)
    assert elsewhere is not None and elsewhere.endpoint.id != chosen[0][0]


def test_a_session_that_nobody_knows_goes_to_one_place_too() -> None:
    fleets_ = [[upstream(name, slots=100) for name in "abcd"] for _ in range(2)]
    first, second = ([pick(f, 1, session=s, siblings=True) for s in range(20)] for f in fleets_)
    assert [u and u.endpoint.id for u in first] == [u and u.endpoint.id for u in second]
    assert len({u.endpoint.id for u in first if u}) > 1


def test_hashes_are_the_same_in_every_process() -> None:
    assert prefix.stable_hash(b"one", prefix.stable_hash(b"two")) == -2179080529516995440
