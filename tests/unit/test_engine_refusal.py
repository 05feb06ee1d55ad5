"""An engine's own refusal names the request as the gateway's own errors do, in the dialect of the route."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.gateway.refusal import SMALL_BYTES, named

ENGINES = {
    "message": "max_tokens must be at least 1, got 0.",
    "type": "BadRequestError",
    "param": "max_tokens",
    "code": 400,
}


def told(body: Any, *, dialect: Any = "openai", status: int = 400) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return json.loads(named(data, status, dialect, "req-1"))


def test_an_openai_error_gets_the_requests_id_and_keeps_the_rest() -> None:
    assert told({"error": ENGINES}) == {"error": ENGINES | {"request_id": "req-1"}}
    assert told({"error": ENGINES, "object": "error"}) == {
        "error": ENGINES | {"request_id": "req-1"},
        "object": "error",
    }


def test_bytes_that_are_the_engines_stay_as_they_are() -> None:
    """Numbers, escapes and blanks of a validation error that quotes its input are not written anew."""
    given = b'{"error":{"message":"h\\u00e9", "param": 1.10e5 ,"code":400}}'
    assert (
        named(given, 400, "openai", "a")
        == b'{"error":{"message":"h\\u00e9","param":1.10e5,"code":400,"request_id":"a"}}'
    )


def test_an_anthropic_error_gets_the_id_beside_it_and_a_type_that_its_sdk_knows() -> None:
    engines = {"type": "error", "error": {"type": "BadRequestError", "message": "no"}}
    known = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}, "request_id": "req-1"}
    assert told(engines, dialect="anthropic") == known
    assert told(known | {"request_id": "the engine's"}, dialect="anthropic") == known


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (422, "invalid_request_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (501, "api_error"),
    ],
)
def test_what_vllms_validation_says_on_anthropics_routes_becomes_anthropics(status: int, kind: str) -> None:
    assert told({"error": ENGINES}, dialect="anthropic", status=status) == {
        "type": "error",
        "error": {"type": kind, "message": ENGINES["message"]},
        "request_id": "req-1",
    }


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"no JSON",
            b"[1]",
            b'{"detail":"Not Found"}',
            b'{"error":"words"}',
            b'{"error":null}',
            b'{"error":{"a":}}',
        ),
        b'{"error":{"message":"' + b"x" * SMALL_BYTES + b'"}}',
    ],
)
@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_what_is_no_error_object_or_a_large_one_stays_as_it_is(body: bytes, dialect: Any) -> None:
    assert named(body, 400, dialect, "req-1") == body
