"""The simulated KV cache: room for those that run, and prompts that begin alike share it, as vLLM's prefix cache does it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Held:
    """One request's part of the cache."""

    blocks: Sequence[int]
    own: int  # tokens that are in no whole block of its prompt
    cached: int  # tokens of the prompt that were there already


class KvCache:
    """`tokens` of room. A prompt's whole blocks stay when their request has ended, until the room is needed: the least
    recently used go first, and of one prompt its end before its beginning.

    Blocks are named by their content and all that comes before it. Two things are unlike vLLM: room that is no whole block of
    a prompt is counted in tokens, so that a test can count on who fits, and answers are forgotten with their request.

    No request has more than all of it, though the choices of one may need that together: vLLM, which schedules each by itself
    and has room for any, lets some of them wait.
    """

    def __init__(self, tokens: int, block_tokens: int) -> None:
        self.tokens = tokens
        self.block_tokens = block_tokens
        self.used = 0  # tokens of those that run; what two of them share counts once
        self._holders: dict[int, int] = {}  # block -> requests that have it
        # Blocks that nobody has, the oldest first; in a dictionary it is slow to find.
        self._idle = OrderedDict[int, None]()

    @property
    def idle(self) -> int:
        """Tokens that are kept for whoever asks for them again."""
        return len(self._idle) * self.block_tokens

    def take(self, blocks: Sequence[int], prompt_tokens: int, answer_tokens: int) -> Held | None:
        """Room for one request, until `free`; None while there is too little."""
        size, holders, idle = self.block_tokens, self._holders, self._idle
        answer_tokens = min(answer_tokens, self.tokens - prompt_tokens)
        shared = sum(block in holders for block in blocks)
        own = prompt_tokens + answer_tokens - len(blocks) * size
        if self.used + (len(blocks) - shared) * size + own > self.tokens:
            return None
        cached = 0
        # The last token of a prompt is always computed: what comes after it is not in the cache.
        for block in blocks[: (prompt_tokens - 1) // size]:
            if block not in holders and block not in idle:
                break
            cached += size
        for block in blocks:
            idle.pop(block, None)
            holders[block] = holders.get(block, 0) + 1
        self.used += (len(blocks) - shared) * size + own
        self._make_room()
        return Held(blocks, own, cached)

    def grow(self, held: Held, tokens: int) -> bool:
        """Room for so much more of one answer; False while there is too little."""
        tokens = min(tokens, self.tokens - held.own - len(held.blocks) * self.block_tokens)
        if self.used + tokens > self.tokens:
            return False
        held.own += tokens
        self.used += tokens
        self._make_room()
        return True

    def free(self, held: Held) -> None:
        """The request ended."""
        self.used -= held.own
        for block in reversed(held.blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                self._idle[block] = None
                self.used -= self.block_tokens

    def _make_room(self) -> None:
        while self.used + self.idle > self.tokens:
            self._idle.popitem(last=False)
