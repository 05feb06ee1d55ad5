"""The simulator's tokens: reversible, stateless, the same on every machine.

A token is up to six bytes of a word together with the blank before it, so that a common word counts one, and its id is
those bytes read as a number, so that `/detokenize` needs no vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b

_PIECE = re.compile(rb"\s?[^\s]{1,6}|\s")
_MAX_ID = 1 << 57  # a marker byte and seven bytes of text

# None is longer than a token, so that an answer has as many tokens read back as were made.
_WORDS = b"""
able about above across again all along also amber among anchor apple april arch atlas autumn
bake barn basin beacon bell birch bridge bronze cabin canal candle carbon cedar chalk circle clay
clear cliff cloud coast copper coral cotton crane crisp dawn delta desert dial dome draft dusk
eagle earth east echo elm ember engine even fable falcon fern field finch flame flint forest
""".split()


def encode(text: str) -> list[int]:
    """Token ids of `text`; `decode` gives back the same text."""
    return [int.from_bytes(b"\1" + found) for found in pieces(text)]


def decode(ids: Iterable[int]) -> str:
    """Text of `ids`."""
    return text(piece(i) for i in ids)


def piece(token: int) -> bytes:
    """The bytes of one id. Like vLLM, an id that stands for nothing gives no text."""
    raw = token.to_bytes(8).lstrip(b"\0") if 1 < token < 2 * _MAX_ID else b""
    return raw[1:] if raw[:1] == b"\1" else b""


def text(pieces: Iterable[bytes]) -> str:
    """What the tokens of those bytes say together."""
    return b"".join(pieces).decode(errors="replace")


def strings(text: str) -> list[str]:
    """The tokens of `text` as text, for `return_token_strs`."""
    return [found.decode(errors="replace") for found in pieces(text)]


def blocks(pieces: Sequence[bytes], size: int, of: Hashable) -> list[int]:
    """Names of the whole blocks of `size` tokens, each of all before it too and of what must be the same beside the text; of
    one process."""
    chain, found = hash(of), []
    for end in range(size, len(pieces) + 1, size):
        chain = hash((chain, *pieces[end - size : end]))
        found.append(chain)
    return found


def pieces(text: str) -> list[bytes]:
    """The tokens of `text`, each as its bytes."""
    # JSON may carry half a surrogate pair, which UTF-8 cannot.
    return _PIECE.findall(text.encode(errors="replace"))


def render_chat(messages: Sequence[tuple[str, str]]) -> str:
    """The prompt a chat template would make of (role, text) pairs: three tokens a message and one for the answer."""
    return "".join(f"<|{role[:2]}|> {text} <end>\n" for role, text in messages) + "<|as|>"


class Answer:
    """The made-up answer to one prompt: token `i` depends on who answers, what was asked, which of its `n` choices it is
    and `i`, on nothing else."""

    __slots__ = ("_seed",)

    def __init__(self, identity: str, prompt: str, choice: int = 0) -> None:
        whose = f"{identity}\0{choice}" if choice else identity
        asked = blake2b(f"{whose}\0{prompt}".encode(errors="replace"), digest_size=8)
        self._seed = int.from_bytes(asked.digest())

    def token(self, i: int) -> bytes:
        """Token `i` as ASCII letters, with its leading blank but for the first; needs no escaping in JSON."""
        # Fibonacci hashing: the top bits of a product with 2^64/phi are well spread.
        spread = ((self._seed ^ i) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        word = _WORDS[(spread >> 40) % len(_WORDS)]
        return b" " + word if i else word

    def text(self, tokens: int) -> str:
        return b"".join(self.token(i) for i in range(tokens)).decode()
