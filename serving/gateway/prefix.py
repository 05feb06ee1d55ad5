"""Which endpoint has the beginning of a prompt in its KV cache, as far as a gateway can tell: what it sent where. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from serving.gateway.routes import Route

BLOCK_BYTES = 1024  # of the prompt as JSON; small ones share too little to matter
BLOCK_TOKENS = 256  # what such a block is about
MOST_BLOCKS = 512  # of one prompt
KEPT_BLOCKS = 8192  # of one endpoint, where its cache is larger or not known
_encode = msgspec.json.Encoder().encode


def blocks_of(route: Route, fields: Mapping[str, Any], adapter: str | None) -> tuple[int, ...]:
    """Hashes of the prompt's whole blocks, each of all before it too: equal where a cache could be shared, by one process's
    count. Adapters and salts share nothing."""
    if not route.answer:
        return ()
    content = next((v for f in ("messages", "prompt", "input") if (v := fields.get(f)) is not None), None)
    data = _encode([fields.get("system") or fields.get("instructions"), fields.get("tools"), content])
    whole = min(len(data) // BLOCK_BYTES, MOST_BLOCKS)
    if not whole:
        return ()
    chain = hash((adapter, fields.get("cache_salt") if isinstance(fields.get("cache_salt"), str) else None))
    found = []
    for i in range(whole):
        chain = hash((chain, data[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]))
        found.append(chain)
    return tuple(found)


class Remembered:
    """Blocks and sessions that were sent to one endpoint, the latest `room` of them."""

    __slots__ = ("_seen", "room")

    def __init__(self, room: int) -> None:
        self.room = room
        self._seen: dict[int, None] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, blocks: tuple[int, ...], session: int | None) -> None:
        seen = self._seen
        # A prompt's last blocks first: when room is short, its beginning is what others share.
        for block in (*reversed(blocks), *(() if session is None else (session,))):
            seen.pop(block, None)
            seen[block] = None
        while len(seen) > self.room:
            del seen[next(iter(seen))]

    def shared(self, blocks: tuple[int, ...]) -> int:
        """How many of the first blocks are there."""
        for i, block in enumerate(blocks):
            if block not in self._seen:
                return i
        return len(blocks)

    def knows(self, session: int) -> bool:
        return session in self._seen
