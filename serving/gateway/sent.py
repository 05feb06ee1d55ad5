"""What clients already have of their streams, kept for as long as they run: whoever joins a broken one elsewhere must know what
was said. Kept as it left, by reference: nothing is copied, parsed or joined before a stream breaks.
"""

from __future__ import annotations

import re

OF_ONE_BYTES = 1 << 20  # of one stream: some 4,000 events of one token
OF_ALL_BYTES = 64 << 20  # of all streams of one gateway
_PART_BYTES = 16 << 10  # what one takes of that at a time
_OVERHEAD_BYTES = 48  # of a piece, besides its bytes

# A piece is either bare events or one whole HTTP/1.1 chunk; no line of an event is hexadecimal digits alone.
_CHUNK = re.compile(rb"[0-9a-fA-F]+\r\n(.*)\r\n", re.DOTALL)


class Store:
    """The room for what the streams of one gateway have said. A stream that finds none, or has said too much, is kept no
    longer: it can break like any other, and not be joined elsewhere."""

    def __init__(self, room: int = OF_ALL_BYTES, of_one: int = OF_ONE_BYTES) -> None:
        self._parts = room // _PART_BYTES
        self._of_one = of_one // _PART_BYTES
        self.taken = 0  # parts

    def sent(self) -> Sent:
        return Sent(self)

    def take(self, has: int) -> bool:
        """One part more for a stream that has so many."""
        if has >= self._of_one or self.taken >= self._parts:
            return False
        self.taken += 1
        return True


class Sent:
    """What one client has of its stream: a context manager, at whose end the room is free again."""

    __slots__ = ("_left", "_parts", "_pieces", "_store")

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parts = self._left = 0
        self._pieces: list[bytes] | None = []

    def add(self, piece: bytes) -> None:
        pieces = self._pieces
        if pieces is None:
            return
        self._left -= len(piece) + _OVERHEAD_BYTES
        while self._left < 0:
            if not self._store.take(self._parts):
                self._drop()
                return
            self._parts += 1
            self._left += _PART_BYTES
        pieces.append(piece)

    @property
    def whole(self) -> bool:
        """Whether all of it is kept."""
        return self._pieces is not None

    def events(self) -> bytes | None:
        """All of it, without HTTP's framing, joined, in a millisecond for a mebibyte; None where not all of it is kept."""
        if self._pieces is None:
            return None
        return b"".join(m[1] if (m := _CHUNK.fullmatch(piece)) else piece for piece in self._pieces)

    def __enter__(self) -> Sent:
        return self

    def __exit__(self, *exc: object) -> None:
        self._drop()

    def _drop(self) -> None:
        self._pieces = None
        self._store.taken -= self._parts
        self._parts = self._left = 0
