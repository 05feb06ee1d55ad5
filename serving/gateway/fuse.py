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
    is remembered, which is nearly always, nothing is computed. Engines are told apart by their endpoint's id: one that cuts
    every answer and lives on is sick, and no request's fault; two gateways that lose theirs at once have seen one death."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._own: dict[str, tuple[frozenset[str], float]] = {}  # engines, and until when; the oldest first
        self._others: dict[str, frozenset[str]] = {}
        self._acquitted: set[str] = set()  # here, of what the others tell
        self.on_news: Callable[[], None] = lambda: None

    @property
    def armed(self) -> bool:
        return bool(self._own or self._others)

    def blown(self, print_: str) -> bool:
        """Whether this request is refused."""
        return len(self._dead(print_)) >= DEATHS

    def died(self, print_: str, engine: str) -> int:
        """That engine died with this request inside; how many have by now."""
        known = self._known(print_)
        self._own.pop(print_, None)
        known = known if engine in known or len(known) >= DEATHS else known | {engine}
        self._own[print_] = known, self._clock() + REMEMBERED_S
        while len(self._own) > MOST:
            del self._own[next(iter(self._own))]
        self.on_news()
        return len(self._dead(print_))

    def survived(self, print_: str) -> None:
        """It was answered to its end: whatever ended engines, it is not this."""
        self._own.pop(print_, None)
        if print_ in self._others:
            self._acquitted.add(print_)

    def told(self) -> dict[str, tuple[str, ...]]:
        """Of its own, for the other gateways."""
        now = self._clock()
        for print_ in [p for p, (_, until) in self._own.items() if until <= now]:
            del self._own[print_]
        return {p: tuple(sorted(self._own[p][0])) for p in list(self._own)[-TOLD:]}

    def hear(self, told: Iterable[Mapping[str, Iterable[str]]]) -> None:
        """What all the others tell now."""
        others: dict[str, frozenset[str]] = {}
        for deaths in told:
            for print_, engines in deaths.items():
                others[print_] = others.get(print_, frozenset()).union(engines)
        self._others = others
        self._acquitted &= others.keys()

    def _known(self, print_: str) -> frozenset[str]:
        engines, until = self._own.get(print_, (frozenset[str](), 0.0))
        return engines if self._clock() < until else frozenset()

    def _dead(self, print_: str) -> frozenset[str]:
        known = self._known(print_)
        return known if print_ in self._acquitted else known | self._others.get(print_, frozenset())


class Charge:
    """One request before the fuse. Its fingerprint is made when it is first needed."""

    __slots__ = ("_fuse", "_of", "_print")

    def __init__(self, fuse: Fuse, version_id: str, path: str, adapter: str | None, fields: Mapping[str, Any]) -> None:
        self._fuse = fuse
        self._of = version_id, path, adapter, fields
        self._print = ""

    @property
    def blown(self) -> bool:
        return self._fuse.armed and self._fuse.blown(self.print)

    @property
    def print(self) -> str:
        self._print = self._print or fingerprint(*self._of)
        return self._print

    def died(self, engine: str) -> int:
        return self._fuse.died(self.print, engine)

    def survived(self) -> None:
        if self._print or self._fuse.armed:  # it may have come before anybody was remembered
            self._fuse.survived(self.print)
