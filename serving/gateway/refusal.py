"""An engine's own refusal, made to name the request as the gateway's own errors do, in the dialect of the route."""

from __future__ import annotations

import msgspec

from serving.errors import Dialect

SMALL_BYTES = 64 * 1024  # a refusal that quotes more of its request is passed as it is

# vLLM gives its own classes' names, and on Anthropic's routes OpenAI's form where it validates.
_ANTHROPIC = {403: "permission_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}

_Parts = dict[str, msgspec.Raw]
_parts = msgspec.json.Decoder(_Parts).decode
_encode = msgspec.json.encode


def named(body: bytes, status: int, dialect: Dialect, request_id: str) -> bytes:
    """`body` with the request's id; unchanged where it holds no error object. Values are the engine's bytes."""
    if len(body) > SMALL_BYTES:
        return body
    try:
        whole = _parts(body)
        error = _parts(whole["error"])
    except (KeyError, msgspec.MsgspecError):
        return body
    name = msgspec.Raw(_encode(request_id))
    if dialect == "openai":
        return _encode(whole | {"error": msgspec.Raw(_encode(error | {"request_id": name}))})
    kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
    shown = {"type": kind, "message": error.get("message", msgspec.Raw(b'""'))}
    return _encode({"type": "error", "error": shown, "request_id": name})
