"""May a request enter: the limits of keys and models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from serving.errors import BodyTooLarge, LimitReached, counted
from serving.gateway.keys import Key
from serving.gateway.state import ModelConfig


class _Bucket:
    """Tokens a minute: full at first, refilled evenly. May go below zero, when a request took more than was expected."""

    __slots__ = ("_at", "_level")

    def __init__(self, now: float, per_minute: float) -> None:
        self._at, self._level = now, per_minute

    def wait_s(self, tokens: float, per_minute: float, now: float) -> float:
        """How long until `tokens` may be taken; 0: now. More than a minute's worth may be taken when it is full."""
        self._level = min(per_minute, self._level + (now - self._at) * per_minute / 60)
        self._at = now
        return max(0.0, min(tokens, per_minute) - self._level) * 60 / per_minute

    def take(self, tokens: float) -> None:
        self._level -= tokens


class Admission:
    """Limits of one gateway. Concurrency counts what the other gateways last said too (a second ago at most); tokens a
    minute are divided by the gateways at which the key or model has requests."""

    def __init__(self, elsewhere: Callable[[str | None, str | None], tuple[int, int]]) -> None:
        """`elsewhere(key id or None, model or None)`: requests at the other gateways, and how many of those there are."""
        self._elsewhere = elsewhere
        self._inside: Counter[str] = Counter()
        self._buckets: dict[str, _Bucket] = {}

    def check_body(self, key: Key, model: ModelConfig, size: int) -> None:
        """Raises BodyTooLarge over the limit of the model or the key."""
        limit, whose = model.limits.max_body_bytes, model.name
        if key.max_body_bytes is not None and key.max_body_bytes < limit:
            limit, whose = key.max_body_bytes, "this key"
        if size > limit:
            raise BodyTooLarge(f"the body has {size} bytes; the limit of {whose} is {limit}")

    def enter(self, key: Key, model: ModelConfig, tokens: int, now: float) -> None:
        """Raises LimitReached with the time to come back; else the caller must `leave`."""
        if _unlimited(key, model):
            return
        limits = model.limits
        mine, models = f"key {key.id}", f"model {model.name}"
        for whose, limit, at in (
            (mine, key.max_concurrent, (key.id, None)),
            (models, limits.max_concurrent, (None, model.name)),
        ):
            if limit is not None and self._inside[whose] + self._elsewhere(*at)[0] >= limit:
                raise LimitReached(f"{whose} has {counted(limit, 'request')} already, its limit", retry_after_s=1)
        taken = []
        for whose, limit, at in (
            (mine, key.tokens_per_minute, (key.id, None)),
            (models, limits.tokens_per_minute, (None, model.name)),
        ):
            if limit is not None:
                part = limit / (1 + self._elsewhere(*at)[1])
                bucket = self._buckets.get(whose)
                if bucket is None:
                    bucket = self._buckets[whose] = _Bucket(now, part)
                wait_s = bucket.wait_s(tokens, part, now)
                if wait_s > 0:
                    raise LimitReached(f"{whose} has used up its {limit} tokens a minute", retry_after_s=wait_s)
                taken.append(bucket)
        for bucket in taken:
            bucket.take(tokens)
        if key.max_concurrent is not None:
            self._inside[mine] += 1
        if limits.max_concurrent is not None:
            self._inside[models] += 1

    def leave(self, key: Key, model: ModelConfig, tokens: int, used: int | None) -> None:
        """The request ended. `used`: what the engine counted; None when it did not say."""
        if _unlimited(key, model):
            return
        for whose, limited in (
            (f"key {key.id}", key.max_concurrent),
            (f"model {model.name}", model.limits.max_concurrent),
        ):
            if limited is not None:
                self._inside[whose] -= 1
                if self._inside[whose] <= 0:
                    del self._inside[whose]
        for whose, limited in (
            (f"key {key.id}", key.tokens_per_minute),
            (f"model {model.name}", model.limits.tokens_per_minute),
        ):
            bucket = self._buckets.get(whose)
            if limited is not None and bucket is not None and used is not None:
                bucket.take(used - tokens)


def _unlimited(key: Key, model: ModelConfig) -> bool:
    return (
        key.max_concurrent is None
        and key.tokens_per_minute is None
        and model.limits.max_concurrent is None
        and model.limits.tokens_per_minute is None
    )
