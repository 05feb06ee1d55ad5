"""vLLM's bytes: request bodies, answers, stream events and errors, as its 0.32 server writes them."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

DONE = b"data: [DONE]\n\n"
FINGERPRINT = "steelyard-sim"
_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


# -- requests: the fields that change the answer; all others are accepted and ignored, as vLLM accepts unknown ones


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Part(msgspec.Struct):
    type: str
    text: str = ""


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class Generation(msgspec.Struct, kw_only=True):
    """What chat and completion requests share. `max_tokens` None means the route's default."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None


class ChatRequest(Generation, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None


class CompletionRequest(Generation, kw_only=True):
    prompt: str | list[str | int] | None = None


class TokenizeRequest(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct):
    tokens: list[int]
    model: str | None = None


class SinsRequest(msgspec.Struct):
    """Not vLLM's: see `sins.py`."""

    names: list[str]
    after: int = 8


# -- errors


class Refusal(Exception):
    """An error answer: status, and vLLM's `error` object."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def bad_value(message: str, param: str, value: object) -> Refusal:
    """A value out of range, in the words of vLLM's VLLMValidationError."""
    return Refusal(400, f"{message} (parameter={param}, value={value})", param=param)


def invalid_body(kind: str, loc: str, message: str) -> Refusal:
    """A body that does not parse, shaped like vLLM's rendering of pydantic's errors (the words differ)."""
    found = {"type": kind, "loc": loc, "msg": message}
    return Refusal(400, f"1 validation error:\n  {found}", "Bad Request", loc)


def engine_dead() -> Refusal:
    return Refusal(500, _DEAD, "InternalServerError")


def dead_event() -> bytes:
    """How an open stream learns that the core died; DONE follows. `json.dumps`, blanks and all, as vLLM does here."""
    return b"data: " + json.dumps(engine_dead().body).encode() + b"\n\n"


_Body = TypeVar("_Body", bound=msgspec.Struct)


def parse(raw: bytes, model: type[_Body]) -> _Body:
    """The request in `raw`, or the Refusal vLLM would answer."""
    if not raw:
        raise invalid_body("missing", "body", "Field required")
    try:
        return msgspec.json.decode(raw, type=model, strict=False)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        missing = re.search(r"required field `(\w+)`", message)
        loc = "body" + path.rstrip("`") + (f".{missing[1]}" if missing else "")
        raise invalid_body("missing" if missing else "value_error", loc, message) from None
    except msgspec.DecodeError as error:
        at = re.search(r"byte (\d+)", str(error))
        raise invalid_body("json_invalid", f"body.{at[1] if at else len(raw)}", "JSON decode error") from None


def budget(prompt_tokens: int, wanted: int | None, default: int, max_model_len: int) -> int:
    """Tokens to generate: what was asked for, clamped to what the context leaves, or a Refusal."""
    if wanted is not None and wanted > max_model_len:
        message = f"max_tokens={wanted} cannot be greater than max_model_len={max_model_len}. "
        raise bad_value(message + "Please request fewer output tokens.", "max_tokens", wanted)
    if prompt_tokens > max_model_len:
        # vLLM's tokenizer stops one past the limit, so that is the number it reports.
        raise bad_value(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains at least "
            f"{max_model_len + 1} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt.",
            "input_tokens",
            max_model_len + 1,
        )
    granted = min(default if wanted is None else wanted, max_model_len - prompt_tokens)
    if granted < 1:
        raise bad_value(f"max_tokens must be at least 1, got {granted}.", "max_tokens", granted)
    return granted


# -- answers


@dataclass(frozen=True)
class Dialect:
    """Where the chat and the completion routes differ. `before`, `after` and `last` surround the text of a token;
    the `nulls` are fields vLLM writes and this server never fills."""

    id_prefix: str
    object: str
    chunk_object: str
    choice_nulls: tuple[str, ...]
    body_nulls: tuple[str, ...]
    opening: bytes
    before: bytes
    after: bytes
    last: bytes
    usage_details: bytes


CHAT = Dialect(
    id_prefix="chatcmpl-",
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    choice_nulls=("routed_experts",),
    body_nulls=("prompt_logprobs", "prompt_token_ids", "prompt_text"),
    opening=b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]',
    before=b'"delta":{"content":"',
    after=b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]',
    last=b'"},"logprobs":null,"finish_reason":"%s","stop_reason":null,"token_ids":null}]',
    usage_details=b',"completion_tokens_details":null',
)
COMPLETION = Dialect(
    id_prefix="cmpl-",
    object="text_completion",
    chunk_object="text_completion",
    choice_nulls=("prompt_logprobs", "prompt_token_ids", "routed_experts"),
    body_nulls=(),
    opening=b"",
    before=b'"text":"',
    after=b'","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]',
    last=b'","logprobs":null,"finish_reason":"%s","stop_reason":null,"prompt_token_ids":null,"token_ids":null}]',
    usage_details=b"",
)


@dataclass(frozen=True)
class Reply:
    """The identity of one answer, and its text in either form."""

    dialect: Dialect
    id: str
    model: str
    prompt_tokens: int
    cache: Callable[[], tuple[int, int]] | None  # how many were in the cache, and are new there; None: nobody is told
    created: int

    @classmethod
    def new(
        cls,
        dialect: Dialect,
        request_id: str | None,
        model: str,
        prompt_tokens: int,
        cache: Callable[[], tuple[int, int]] | None,
    ) -> Reply:
        """vLLM builds the answer's id from the X-Request-Id header, whether or not it echoes the header."""
        base = request_id if request_id is not None else uuid.uuid4().hex[:16]
        return cls(dialect, dialect.id_prefix + base, model, prompt_tokens, cache, int(time.time()))

    def full(self, texts: list[str], tokens: int, reason: str) -> dict[str, Any]:
        """The body of an answer that is not streamed: a choice for each text, `tokens` in all of them."""
        end = {"logprobs": None, "finish_reason": reason, "stop_reason": None, "token_ids": None}
        return {
            "id": self.id,
            "object": self.dialect.object,
            "created": self.created,
            "model": self.model,
            "choices": [
                {"index": i} | self._said(text) | end | dict.fromkeys(self.dialect.choice_nulls)
                for i, text in enumerate(texts)
            ],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "total_tokens": self.prompt_tokens + tokens,
                "completion_tokens": tokens,
                "prompt_tokens_details": None if self.cache is None else self._details(*self.cache()),
                "completion_tokens_details": None,
            },
        } | dict.fromkeys((*self.dialect.body_nulls, "kv_transfer_params", "ec_transfer_params", "metrics"))

    def _details(self, cached: int, kept: int) -> dict[str, int | None]:
        created = kept if self.dialect is CHAT else None  # completions do not tell
        return {"cached_tokens": cached, "created_cache_tokens": created, "multimodal_tokens": None}

    def details(self) -> bytes:
        """The same in a stream, where nulls are left out."""
        if self.cache is None:
            return b""
        told = {k: v for k, v in self._details(*self.cache()).items() if v is not None}
        return b',"prompt_tokens_details":' + msgspec.json.encode(told)

    def _said(self, text: str) -> dict[str, Any]:
        if self.dialect is COMPLETION:
            return {"text": text}
        nulls = ("refusal", "annotations", "audio", "function_call", "reasoning")
        return {"message": {"role": "assistant", "content": text} | dict.fromkeys(nulls)}


class Events:
    """The events of one stream. What does not change from token to token is encoded once."""

    def __init__(self, reply: Reply, options: StreamOptions | None, force_usage: bool) -> None:
        self.usage_wanted = force_usage or bool(options and options.include_usage)
        self._continuous = force_usage or bool(self.usage_wanted and options and options.continuous_usage_stats)
        self._prompt = reply.prompt_tokens
        self._details = reply.details
        self._dialect = reply.dialect
        head = {"id": reply.id, "object": reply.dialect.chunk_object, "created": reply.created, "model": reply.model}
        self._head = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._first = self._head + b'{"index":0,' + reply.dialect.before
        self._fingerprint = b',"system_fingerprint":' + msgspec.json.encode(FINGERPRINT)

    def opening(self, choice: int = 0) -> bytes:
        """What precedes the first token: chat announces the role, completions nothing."""
        if not self._dialect.opening:
            return b""
        usage = self._running_usage(0) if self._continuous else b""
        nulls = b',"prompt_token_ids":null,"prompt_text":null}\n\n'
        return self._head + b'{"index":%d,' % choice + self._dialect.opening + usage + nulls

    def token(self, text: bytes, count: int, choice: int = 0) -> bytes:
        """A token that another follows; `count` tokens of its choice have been generated with it."""
        usage = self._running_usage(count) if self._continuous else b""
        return self._before(choice) + text + self._dialect.after + usage + b"}\n\n"

    def last(self, text: bytes, count: int, reason: str, choice: int = 0) -> bytes:
        """The last token; it carries the finish reason. The fingerprint moves on to the usage event if there is one."""
        usage = self._running_usage(count) if self._continuous else b""
        seal = b"" if self.usage_wanted else self._fingerprint
        return self._before(choice) + text + self._dialect.last % reason.encode() + seal + usage + b"}\n\n"

    def usage(self, count: int) -> bytes:
        """The event between the last token and DONE, for those who asked."""
        return self._head + b"]" + self._usage(count) + self._details() + b"}" + self._fingerprint + b"}\n\n"

    def _before(self, choice: int) -> bytes:
        return self._first if choice == 0 else self._head + b'{"index":%d,' % choice + self._dialect.before

    def _running_usage(self, count: int) -> bytes:
        return self._usage(count) + self._dialect.usage_details + b"}"

    def _usage(self, count: int) -> bytes:
        counts = (self._prompt, self._prompt + count, count)
        return b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d' % counts
