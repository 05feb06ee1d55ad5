"""Which endpoint has the beginning of a prompt in its KV cache, as far as a gateway can tell: what it sent where. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import msgspec

from serving.gateway.routes import Route
from serving.gateway.sizes import MEDIA_TOKENS, is_media

BLOCK_BYTES = 1024  # of the prompt as JSON; small ones share too little to matter
BLOCK_TOKENS = 256  # what such a block is about
MOST_BLOCKS = 512  # of one prompt
KEPT_BLOCKS = 262_144  # of all endpoints of a version together: some 25 MiB
_MOST_BYTES = MOST_BLOCKS * BLOCK_BYTES
_MEDIA_SAMPLE = 1024  # characters
_MEDIA_BYTES = MEDIA_TOKENS // BLOCK_TOKENS * BLOCK_BYTES  # what an image or a clip counts for
_IDS_AT_ONCE = 8192
_DEEPEST = 32
_AT_ONCE = 64  # so large a part of a full memory is forgotten at once
_encode = msgspec.json.Encoder().encode


def blocks_of(route: Route, fields: Mapping[str, Any], adapter: str | None) -> tuple[int, ...]:
    """Hashes of the prompt's whole blocks, each of all before it too: equal where a cache could be shared, and the same in every
    gateway. Adapters and salts share nothing."""
    if not route.answer:
        return ()
    content = next((v for f in ("messages", "prompt", "input") if (v := fields.get(f)) is not None), None)
    data = bytearray()
    for part in (fields.get("system") or fields.get("instructions"), fields.get("tools"), *_parts(content)):
        text = part.get("content") if type(part) is dict and len(part) == 2 else None
        plain = type(text) is str and len(text) <= BLOCK_BYTES  # most messages: no look inside
        data += _encode(part if plain else _cut(part, [_MOST_BYTES - len(data)]))
        data += b","
        if len(data) >= _MOST_BYTES:
            break
    whole = min(len(data) // BLOCK_BYTES, MOST_BLOCKS)
    if not whole:
        return ()
    salt = fields.get("cache_salt")
    chain = stable_hash(_encode([adapter, salt if isinstance(salt, str) else None]))
    found = []
    with memoryview(data) as view:
        for start in range(0, whole * BLOCK_BYTES, BLOCK_BYTES):
            chain = stable_hash(view[start : start + BLOCK_BYTES], chain)
            found.append(chain)
    return tuple(found)


def stable_hash(data: bytes | memoryview, chain: int = 0) -> int:
    """Of all that came before and these bytes, the same in every process, as Python's own of text is not. Two pieces that come
    after the same and have the same checksum mislead the routing of one request: nobody gains by making some."""
    return hash((chain, zlib.crc32(data)))


def _parts(content: Any) -> Iterator[Any]:
    """A prompt piece by piece, so that nobody reads on where enough is known."""
    if not isinstance(content, list):
        yield content
    elif content and isinstance(content[0], int):
        for i in range(0, len(content), _IDS_AT_ONCE):
            yield content[i : i + _IDS_AT_ONCE]
    else:
        yield from content


def _cut(item: Any, left: list[int], depth: int = 0, name: str = "") -> Any:
    """No more of it than what becomes the first `left[0]` bytes or a little more, with digests in place of media."""
    if left[0] <= 0 or depth > _DEEPEST:
        return None
    left[0] -= 2
    if isinstance(item, str):
        if is_media(item, name):
            left[0] -= _MEDIA_BYTES
            return _digest(item)
        item = item[: left[0] + 2]
        left[0] -= len(item)
        return item
    if isinstance(item, dict):
        cut = {}
        for key, value in item.items():
            if left[0] <= 0:
                break
            left[0] -= len(key)
            cut[key] = _cut(value, left, depth + 1, key)
        return cut
    if isinstance(item, list):
        if item and isinstance(item[0], int):
            item = item[: left[0] // 2 + 1]
            left[0] -= 2 * len(item)
            return item
        pieces = []
        for value in item:
            if left[0] <= 0:
                break
            pieces.append(_cut(value, left, depth + 1))
        return pieces
    return item


def _digest(media: str) -> str:
    """Of its length and of samples all over it: media that differ do so in most of their bytes, compressed as they are."""
    step = max(1, len(media) // _MEDIA_SAMPLE)
    digest = len(media)
    for sample in (media[:_MEDIA_SAMPLE], media[-_MEDIA_SAMPLE:], media[::step]):
        digest = stable_hash(sample.encode("utf-8", "replace"), digest)
    return f"{digest & 0xFFFF_FFFF_FFFF_FFFF:016x}" * (_MEDIA_BYTES // 16)


class Remembered:
    """Blocks and sessions that were sent to one endpoint, nearly the latest `room` of them."""

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
        if len(seen) > self.room:
            # Many at once: to find the oldest, a dictionary walks over all that were deleted before it.
            for block in list(islice(seen, len(seen) - self.room + self.room // _AT_ONCE)):
                del seen[block]

    def shared(self, blocks: tuple[int, ...]) -> int:
        """How many of the first blocks are there."""
        for i, block in enumerate(blocks):
            if block not in self._seen:
                return i
        return len(blocks)

    def knows(self, session: int) -> bool:
        return session in self._seen
