"""Every error a person can see, drawn once.

    SteelyardError
    ├── OperatorError               the CLI prints one line `message` and `fix`, exit code 1 (never reaches HTTP)
    │   ├── CatalogError            a model file is wrong: names file, line, key and value
    │   ├── WeightsError            weights missing, half-written, changed or unsafe
    │   ├── EngineError             an engine did not start or died; carries the telling lines of its log
    │   ├── PortTaken               something else listens there
    │   └── ClusterError            Ray or Serve is not there, or refuses
    └── RequestError                rendered to the client in the dialect of the route
        ├── BadRequest         400  invalid_request         malformed, a field missing, or one that is refused
        ├── InvalidKey         401  invalid_api_key         no, unknown, expired or revoked key
        ├── ScopeMissing       403  scope_missing           good key, wrong scope
        ├── UnknownModel       404  model_not_found         names what exists
        ├── UnknownRoute       404  not_found
        ├── WrongMethod        405  method_not_allowed      with Allow
        ├── BodyTooLarge       413  request_too_large
        ├── HeadTooLarge       431  request_head_too_large
        ├── RequestCrashedEngine 422 request_crashed_engine  engines died with this request inside
        ├── QueueFull          429  queue_full              with Retry-After
        ├── WaitTooLong        429  queue_timeout           with Retry-After
        ├── LimitReached       429  limit_reached           a limit of the key or the model; with Retry-After
        ├── EngineBroken       502  engine_error            died or misbehaved, and no other replica could take it
        ├── NoReplica          503  model_unavailable       nothing serves this model now; with Retry-After
        ├── DeadlinePassed     504  deadline_exceeded
        └── Internal           500  internal_error          anything else: one fixed sentence, the cause goes to the log

A `RequestError` knows status, type, code and retry hint; `body(dialect, request_id)` renders it. Unknown exceptions
are never rendered: the gateway answers `Internal` and logs the cause with the request id.
"""

from __future__ import annotations

from typing import Literal

Dialect = Literal["openai", "anthropic"]


def counted(count: int, one: str, many: str = "") -> str:
    """For sentences: `1 start failed`, `3 starts failed`. `many` where it is not `one` and an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


class SteelyardError(Exception):
    """Root of the tree."""


class OperatorError(SteelyardError):
    """Raise for what the person at the terminal can mend. `str()` is one line: what is wrong, then the fix."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(f"{message}. {fix}" if fix else message)
        self.message = message
        self.fix = fix

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.message, self.fix)


class CatalogError(OperatorError):
    """A model file cannot be used; raised before anything starts."""


class WeightsError(OperatorError):
    """Weights or an adapter are missing, half-written, changed or in an unsafe format."""


class EngineError(OperatorError):
    """An engine did not become ready, or died."""


class PortTaken(OperatorError):
    """The port the gateway wants is in use by something else."""


class ClusterError(OperatorError):
    """Ray or Ray Serve is missing, unreachable or refused the config."""


class RequestError(SteelyardError):
    """Base of what a client can see. Subclasses fix status, type and code; the instance adds the sentence."""

    status = 500
    type = "api_error"
    code = "internal_error"
    anthropic_type = "api_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Extra response headers: `retry-after` in whole seconds, rounded up, when a retry makes sense."""
        if self.retry_after_s is None:
            return []
        return [(b"retry-after", str(max(1, int(-(-self.retry_after_s // 1)))).encode())]

    def body(self, dialect: Dialect, request_id: str) -> dict[str, object]:
        """The JSON object a client of `dialect` parses: OpenAI's `error`, or Anthropic's typed envelope."""
        if dialect == "anthropic":
            return {
                "type": "error",
                "error": {"type": self.anthropic_type, "message": self.message},
                "request_id": request_id,
            }
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                "request_id": request_id,
            }
        }


class BadRequest(RequestError):
    """Malformed JSON, a missing field, or a field that this deployment refuses."""

    status, type, code, anthropic_type = 400, "invalid_request_error", "invalid_request", "invalid_request_error"


class InvalidKey(RequestError):
    """No key, or one that is unknown, expired or revoked. The sentence never says which of the last three."""

    status, type, code, anthropic_type = 401, "authentication_error", "invalid_api_key", "authentication_error"

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"www-authenticate", b"Bearer")]  # RFC 9110, 15.5.2: a 401 has one


class ScopeMissing(RequestError):
    """The key is good and does not cover this."""

    status, type, code, anthropic_type = 403, "permission_error", "scope_missing", "permission_error"


class UnknownModel(RequestError):
    """No model, version or adapter of that name; the sentence names what exists (and the key may see)."""

    status, type, code, anthropic_type = 404, "invalid_request_error", "model_not_found", "not_found_error"


class UnknownRoute(RequestError):
    """A path that is not served, or is refused with a reason."""

    status, type, code, anthropic_type = 404, "invalid_request_error", "not_found", "not_found_error"


class WrongMethod(RequestError):
    """A served path, another method."""

    status, type, code, anthropic_type = 405, "invalid_request_error", "method_not_allowed", "invalid_request_error"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"allow", self.allow.encode())]


class BodyTooLarge(RequestError):
    """The body is over the limit; said before it is read when content-length tells."""

    status, type, code, anthropic_type = 413, "invalid_request_error", "request_too_large", "request_too_large"


class HeadTooLarge(RequestError):
    """Request line and headers are over the limit; said before the key is known."""

    status, type, code, anthropic_type = 431, "invalid_request_error", "request_head_too_large", "invalid_request_error"


class RequestCrashedEngine(RequestError):
    """Two engines died or stood still while they had this request; the same one is refused for a while."""

    status, type, code = 422, "invalid_request_error", "request_crashed_engine"
    anthropic_type = "invalid_request_error"


class QueueFull(RequestError):
    """The model's queue is full."""

    status, type, code, anthropic_type = 429, "rate_limit_error", "queue_full", "rate_limit_error"


class WaitTooLong(RequestError):
    """No slot came free within the longest allowed wait, or none will."""

    status, type, code, anthropic_type = 429, "rate_limit_error", "queue_timeout", "rate_limit_error"


class LimitReached(RequestError):
    """The key or the model has as many requests, or has used as many tokens, as it may."""

    status, type, code, anthropic_type = 429, "rate_limit_error", "limit_reached", "rate_limit_error"


class EngineBroken(RequestError):
    """Engines failed this request and no further attempt is allowed."""

    status, type, code, anthropic_type = 502, "api_error", "engine_error", "api_error"


class NoReplica(RequestError):
    """Nothing serves this model at the moment."""

    status, type, code, anthropic_type = 503, "service_unavailable_error", "model_unavailable", "overloaded_error"


class DeadlinePassed(RequestError):
    """The request ran into its own or the model's time limit."""

    status, type, code, anthropic_type = 504, "timeout_error", "deadline_exceeded", "timeout_error"


class Internal(RequestError):
    """Anything else. One fixed sentence; the cause is in the log under the request id."""

    def __init__(self) -> None:
        super().__init__("internal error; the request id identifies it in the gateway's log")
