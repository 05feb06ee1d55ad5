"""Limits of keys and models: how many at once, how many tokens a minute, how large."""

from __future__ import annotations

from typing import Any

import pytest

from serving.errors import BodyTooLarge, LimitReached
from serving.gateway.admission import Admission
from serving.gateway.keys import Key
from serving.gateway.state import Limits, ModelConfig


def key(name: str = "a", **options: Any) -> Key:
    return Key(id=name, name=name, sha256="", scopes=frozenset(), created_at=0, **options)


def model(**limits: Any) -> ModelConfig:
    bounds = {"max_queue": 9, "max_wait_s": 9, "request_timeout_s": 9, "max_body_bytes": 1000} | limits
    return ModelConfig("m", ("v",), Limits(**bounds))


def alone(_key: str | None, _model: str | None) -> tuple[int, int]:
    return 0, 0


@pytest.mark.parametrize(("who", "where"), [(key(max_concurrent=2), model()), (key(), model(max_concurrent=2))])
def test_one_more_than_may_be_inside_at_once_is_refused(who: Key, where: ModelConfig) -> None:
    door = Admission(alone)
    door.enter(who, where, 5, 0)
    door.enter(who, where, 5, 0)
    with pytest.raises(LimitReached) as caught:
        door.enter(who, where, 5, 0)
    assert caught.value.headers() == [(b"retry-after", b"1")]
    door.leave(who, where, 5, None)
    door.enter(who, where, 5, 0)


def test_what_a_key_has_at_other_gateways_counts() -> None:
    door = Admission(lambda of, _: (3, 1) if of == "a" else (0, 0))
    door.enter(key(max_concurrent=4), model(), 5, 0)
    with pytest.raises(LimitReached):
        door.enter(key(max_concurrent=4), model(), 5, 0)
    door.enter(key("b", max_concurrent=4), model(), 5, 0)


@pytest.mark.parametrize(
    ("who", "where"), [(key(tokens_per_minute=600), model()), (key(), model(tokens_per_minute=600))]
)
def test_tokens_of_a_minute_come_back_evenly(who: Key, where: ModelConfig) -> None:
    door = Admission(alone)
    door.enter(who, where, 600, 0)
    with pytest.raises(LimitReached) as caught:
        door.enter(who, where, 100, 1)
    assert caught.value.headers() == [(b"retry-after", b"9")]
    door.enter(who, where, 100, 10)


def test_what_was_not_used_is_given_back_and_what_was_more_is_owed() -> None:
    who, where, door = key(tokens_per_minute=600), model(), Admission(alone)
    door.enter(who, where, 600, 0)
    door.leave(who, where, 600, used=100)
    door.enter(who, where, 500, 0)
    door.leave(who, where, 500, used=1100)
    with pytest.raises(LimitReached) as caught:
        door.enter(who, where, 60, 0)
    assert caught.value.retry_after_s == pytest.approx(66)


def test_one_that_is_larger_than_a_minute_passes_when_nothing_was_used() -> None:
    who, door = key(tokens_per_minute=600), Admission(alone)
    door.enter(who, model(), 10_000, 0)
    with pytest.raises(LimitReached) as caught:
        door.enter(who, model(), 1, 60)
    assert (caught.value.retry_after_s or 0) > 60


def test_gateways_with_requests_of_a_key_divide_its_tokens() -> None:
    door = Admission(lambda of, _: (7, 2))
    door.enter(key(tokens_per_minute=600), model(), 200, 0)
    with pytest.raises(LimitReached):
        door.enter(key(tokens_per_minute=600), model(), 20, 1)


def test_a_refusal_takes_nothing() -> None:
    who, where, door = key(tokens_per_minute=600), model(tokens_per_minute=100), Admission(alone)
    door.enter(key("b"), where, 100, 0)
    with pytest.raises(LimitReached, match="model m"):
        door.enter(who, where, 50, 0)
    door.enter(who, model(), 600, 0)


@pytest.mark.parametrize(("who", "size"), [(key(), 1001), (key(max_body_bytes=100), 101)])
def test_a_body_is_bounded_by_model_and_key(who: Key, size: int) -> None:
    Admission(alone).check_body(who, model(), size - 1)
    with pytest.raises(BodyTooLarge, match=str(size - 1)):
        Admission(alone).check_body(who, model(), size)
