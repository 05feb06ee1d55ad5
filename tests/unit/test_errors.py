"""What a client sees of each error, and that the tree in the docstring is the tree."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from serving import errors
from serving.errors import (
    Internal,
    NoReplica,
    OperatorError,
    QueueFull,
    RequestError,
    SteelyardError,
    WrongMethod,
    counted,
)


def classes(root: type) -> list[type]:
    return [root, *(c for child in root.__subclasses__() for c in classes(child))]


REQUEST_ERRORS = [c for c in classes(RequestError) if c is not RequestError]


def make(kind: type[RequestError]) -> RequestError:
    if kind is WrongMethod:
        return WrongMethod("no", "POST")
    return Internal() if kind is Internal else kind("no")


def test_the_docstring_draws_every_class_with_its_status_and_code() -> None:
    doc = errors.__doc__ or ""
    drawn = set(re.findall(r"[├└]── (\w+)", doc))
    assert drawn == {c.__name__ for c in classes(SteelyardError)} - {"SteelyardError"}
    for kind in REQUEST_ERRORS:
        assert re.search(rf"{kind.__name__} +{kind.status} +{kind.code}\b", doc), kind


def test_every_class_of_the_module_is_in_the_tree() -> None:
    mine = {c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__}
    assert mine == set(classes(SteelyardError))


@pytest.mark.parametrize("kind", REQUEST_ERRORS)
def test_both_dialects_name_the_request(kind: type[RequestError]) -> None:
    error = make(kind)
    openai, anthropic = error.body("openai", "req_1"), error.body("anthropic", "req_1")
    assert openai == {
        "error": {"message": error.message, "type": kind.type, "param": None, "code": kind.code, "request_id": "req_1"}
    }
    assert anthropic["request_id"] == "req_1"
    assert anthropic["error"] == {"type": kind.anthropic_type, "message": error.message}


@pytest.mark.parametrize(("seconds", "header"), [(0, b"1"), (0.2, b"1"), (1, b"1"), (1.1, b"2"), (30, b"30")])
def test_retry_after_is_in_whole_seconds_rounded_up(seconds: float, header: bytes) -> None:
    assert QueueFull("full", retry_after_s=seconds).headers() == [(b"retry-after", header)]
    assert NoReplica("none").headers() == []


def test_a_wrong_method_says_which_is_right() -> None:
    assert WrongMethod("no", "GET, HEAD").headers() == [(b"allow", b"GET, HEAD")]


def test_an_operator_error_is_one_line_and_survives_a_process_border() -> None:
    error = OperatorError("the port is taken", "set PORT")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "the port is taken. set PORT"  # noqa: S301


def test_what_went_wrong_inside_is_never_told() -> None:
    assert Internal().message == "internal error; the request id identifies it in the gateway's log"


def test_sentences_count_as_people_do() -> None:
    assert [counted(n, "start") for n in (0, 1, 3)] == ["0 starts", "1 start", "3 starts"]
    assert [counted(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]
