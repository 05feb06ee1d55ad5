"""How large a request is, in tokens, as far as a gateway can tell without the engine's tokenizer. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.errors import BadRequest
from serving.gateway.routes import Route

BYTES_A_TOKEN = 4.0  # of the JSON body, before the first answers tell: English text, common vocabularies
MOST_BYTES_A_TOKEN = 16  # no vocabulary does better over a whole prompt of text or code
# JSON escapes may treble what is counted here; beyond that, most of a body was media.
MOST_BODY_BYTES_A_TOKEN = 48
MEDIA_TOKENS = 1024  # of an image or a clip that comes inside the body
_MEDIA_BODY_BYTES = 16 * 1024  # a smaller body is not searched for media


class Sizes:
    """Estimates of how many tokens of KV cache a version's requests take, learnt from the counts in its answers."""

    _COUNT = 64
    _ENOUGH = 32
    _FIRST_ANSWER = 2048  # the most that an answer is expected to be before answers were seen
    _LEAST_ANSWER = 256

    __slots__ = ("_answers", "_bytes", "_deviation", "_mean", "_tokens")

    def __init__(self) -> None:
        self._tokens, self._bytes = 64.0, 64.0 * BYTES_A_TOKEN
        self._answers = 0
        self._mean = self._deviation = 0.0

    def estimate(self, route: Route, fields: Mapping[str, Any], body_bytes: int, context: int | None) -> int:
        """Tokens of prompts and answers together, each at most the engine's context."""
        if route.answer is None:
            return 0  # counts tokens and runs no model
        sequences = _sequences(route, fields)
        tokens = self.prompt(route, fields, body_bytes) + self._answer(route, fields) * sequences
        return min(tokens, context * sequences) if context else tokens

    def prompt(self, route: Route, fields: Mapping[str, Any], body_bytes: int) -> int:
        if type(fields.get("prompt")) is list and (ids := _token_ids(fields)):
            return sum(ids)
        media = 0
        if body_bytes > _MEDIA_BODY_BYTES:
            media, media_bytes = _media(fields, route)
            body_bytes -= media_bytes
        return int(body_bytes * self._tokens / self._bytes) + media * MEDIA_TOKENS + 1

    def _answer(self, route: Route, fields: Mapping[str, Any]) -> int:
        """Of one sequence: what was asked for, but no more than this version's answers commonly are: many clients ask for the
        most that there is and get a sentence."""
        if not route.answer:
            return 0
        asked = route.answer_default
        for name in route.answer:
            value = fields.get(name)
            if type(value) is int and value > 0:
                asked = value
                break
        common = self._FIRST_ANSWER
        if self._answers >= self._ENOUGH:
            common = max(self._LEAST_ANSWER, int(self._mean + 3 * self._deviation))
        if asked is None or asked > common:
            tokens = common
            if asked is not None:
                least = fields.get("min_tokens")
                if fields.get("ignore_eos") is True:
                    tokens = asked
                elif type(least) is int and least > common:
                    tokens = min(least, asked)
        else:
            tokens = asked
        return tokens

    def learn(self, body_bytes: int, prompt: int | None, answer: int | None, *, media: bool = False) -> None:
        """What an answered request turned out to be. `media`: some came inside its body (`has_media`), whose bytes tell
        nothing of text; where that is not known, a body too large to be text is left out."""
        large = body_bytes > _MEDIA_BODY_BYTES and prompt and body_bytes > prompt * MOST_BODY_BYTES_A_TOKEN
        if prompt and not media and not large:
            kept = 1 - 1 / self._COUNT
            self._tokens = self._tokens * kept + prompt
            self._bytes = self._bytes * kept + body_bytes
        if answer:
            self._answers += 1
            weight = 1 / min(self._answers, self._COUNT)
            off = answer - self._mean
            self._mean += off * weight
            self._deviation += (abs(off) - self._deviation) * weight


def has_media(route: Route, fields: Mapping[str, Any], body_bytes: int) -> bool:
    """Whether media come inside the body, as far as estimates tell them from text."""
    return body_bytes > _MEDIA_BODY_BYTES and _media(fields, route)[0] > 0


def check_input(limit: int | None, route: Route, fields: Mapping[str, Any], body_bytes: int) -> None:
    """Raises BadRequest when the prompt is certainly over `limit` tokens: a list of ids is counted, and text is over when
    no vocabulary could fit it. What only the engine's tokenizer can tell is the engine's to refuse."""
    if limit is None or body_bytes <= limit or route.answer is None:
        return
    ids = _token_ids(fields)
    tokens = max(ids, default=0)  # each is a prompt of its own
    if not ids and body_bytes > limit * MOST_BYTES_A_TOKEN:
        tokens = _text_bytes(fields, route) // MOST_BYTES_A_TOKEN
    if tokens > limit:
        raise BadRequest(f"the prompt has at least {tokens} tokens; the limit of this model is {limit}")


def _token_ids(fields: Mapping[str, Any]) -> list[int]:
    """How many tokens each prompt of ids has; empty when there is none."""
    prompt = fields.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        return []
    if isinstance(prompt[0], int):
        return [len(prompt)]
    return [len(p) for p in prompt if isinstance(p, list)]


def _sequences(route: Route, fields: Mapping[str, Any]) -> int:
    """How many answers are generated: `n` for each prompt of a batch."""
    if not route.answer:
        return 1
    n, prompt = fields.get("n"), fields.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str) else 1
    return prompts * (min(n, 128) if type(n) is int and n > 1 else 1)


def _text_bytes(fields: Mapping[str, Any], route: Route) -> int:
    """The least text in a prompt, as UTF-8: what JSON escapes is not longer for the tokenizer, and of a batch, or of documents
    that are scored one by one, the longest counts."""
    size = 0
    for name in {"prompt", "instructions", *route.content}:
        value = fields.get(name)
        parts = value if isinstance(value, list) else [value]
        sizes = [_utf8_bytes(part) for part in parts]
        one = name in ("messages", "input", "system") and any(isinstance(part, dict) for part in parts)
        size += sum(sizes) if one else max(sizes, default=0)
    return size


def _utf8_bytes(item: Any) -> int:
    size = 0
    todo = [(item, "")]
    while todo:
        item, name = todo.pop()
        if isinstance(item, str):
            if not is_media(item, name):
                size += len(item) if item.isascii() else len(item.encode("utf-8", "replace"))
        elif isinstance(item, list):
            todo += [(v, "") for v in item]
        elif isinstance(item, dict):
            todo += [(v, k) for k, v in item.items()]
    return size


def is_media(text: str, name: str) -> bool:
    """Whether a string at `name` is an image or a clip, and no text."""
    return text.startswith("data:") or (name == "data" and len(text) > 256)


def _media(fields: Mapping[str, Any], route: Route) -> tuple[int, int]:
    """Media parts inside the body, and their bytes: how many tokens they become has nothing to do with their length."""
    count = size = 0
    todo: list[Any] = [fields.get(name) for name in route.content]
    while todo:
        item = todo.pop()
        if isinstance(item, list):
            todo += [v for v in item if isinstance(v, dict | list)]
        elif isinstance(item, dict):
            for name, v in item.items():
                if isinstance(v, str):
                    if is_media(v, name):
                        count, size = count + 1, size + len(v)
                elif isinstance(v, dict | list):
                    todo.append(v)
    return count, size
