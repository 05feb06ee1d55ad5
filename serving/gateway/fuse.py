"""Requests that end engines: pure. Whoever was inside when one died may be the reason. He gets one more engine, and who was
inside two is refused for a while, wherever and however often he comes back."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

DEATHS = 2  # of engines, that one request may cost
REMEMBERED_S = 600.0  # since the last of them
MOST = 4096  # requests that are remembered
TOLD = 256  # of them, to the other gateways

# What may differ between two tries of one request without making it another for the engine.
_NOISE = frozenset(
    (
        "model",
        "user",
        "seed",
        "stream",
        "stream_options",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "request_id",
    )
)


def fingerprint(version_id: str, path: str, adapter: str | None, fields: Mapping[str, Any]) -> str:
    told = {k: v for k, v in fields.items() if k not in _NOISE}
    data = msgspec.json.encode((version_id, path, adapter, told), order="sorted")
    return hashlib.blake2b(data, digest_size=12).hexdigest()


class Fuse:
    """The deaths of engines by the fingerprints of those inside, as this gateway saw them and as the others tell. While nobody
    is remembered, which is nearly always, nothing is computed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._own: dict[str, tuple[int, float]] = {}  # deaths, and until when they are remembered; the oldest first
        self._others: dict[str, int] = {}
        self._acquitted: set[str] = set()  # here, of what the others tell
        self.on_news: Callable[[], None] = lambda: None

    @property
    def armed(self) -> bool:
        return bool(self._own or self._others)

    def blown(self, print_: str) -> bool:
        """Whether this request is refused."""
        return self.deaths(print_) >= DEATHS

    def deaths(self, print_: str) -> int:
        own, until = self._own.get(print_, (0, 0.0))
        if own and self._clock() >= until:
            del self._own[print_]
            own = 0
        return own + (0 if print_ in self._acquitted else self._others.get(print_, 0))

    def died(self, print_: str) -> int:
        """An engine died with this request inside; how many have by now."""
        own = self._own.pop(print_, (0, 0.0))[0] if self.deaths(print_) else 0
        self._own[print_] = own + 1, self._clock() + REMEMBERED_S
        while len(self._own) > MOST:
            del self._own[next(iter(self._own))]
        self.on_news()
        return self.deaths(print_)

    def survived(self, print_: str) -> None:
        """It was answered to its end: whatever ended engines, it is not this."""
        self._own.pop(print_, None)
        if print_ in self._others:
            self._acquitted.add(print_)

    def told(self) -> dict[str, int]:
        """Of its own, for the other gateways."""
        now = self._clock()
        for print_ in [p for p, (_, until) in self._own.items() if until <= now]:
            del self._own[print_]
        return {p: self._own[p][0] for p in list(self._own)[-TOLD:]}

    def hear(self, told: Iterable[Mapping[str, int]]) -> None:
        """What all the others tell now."""
        others: dict[str, int] = {}
        for deaths in told:
            for print_, count in deaths.items():
                others[print_] = others.get(print_, 0) + count
        self._others = others
        self._acquitted &= others.keys()


class Charge:
    """One request before the fuse. Its fingerprint is made when it is first needed."""

    __slots__ = ("_fuse", "_of", "_print")

    def __init__(self, fuse: Fuse, version_id: str, path: str, adapter: str | None, fields: Mapping[str, Any]) -> None:
        self._fuse = fuse
        self._of = version_id, path, adapter, fields
        self._print = fingerprint(*self._of) if fuse.armed else ""

    @property
    def blown(self) -> bool:
        return bool(self._print) and self._fuse.blown(self._print)

    @property
    def print(self) -> str:
        self._print = self._print or fingerprint(*self._of)
        return self._print

    def died(self) -> int:
        return self._fuse.died(self.print)

    def survived(self) -> None:
        if self._print:
            self._fuse.survived(self._print)
