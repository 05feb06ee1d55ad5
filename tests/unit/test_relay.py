"""What is looked for in a stream, wherever the socket happened to cut it."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.simulator.__main__ import _KEEP_ALIVE_S
from serving.errors import EngineBroken
from serving.gateway.connection import IDLE_S
from serving.gateway.relay import MAX_EVENT_BYTES, StreamScan, error_event
from serving.gateway.routes import SERVED, Route

CHAT = SERVED["/v1/chat/completions"]
RESPONSES = SERVED["/v1/responses"]
MESSAGES = SERVED["/v1/messages"]


def said(text: str, **more: object) -> bytes:
    return b"data: " + msgspec.json.encode({"choices": [{"index": 0, "delta": {"content": text}, **more}]}) + b"\n\n"


DONE = b"data: [DONE]\n\n"
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"total_tokens":9,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)
DEAD = (
    b'data: {"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "code": 500}}\n\n'
)
ABORTED = b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"abort"}]}\n\n'
# Words that mean something outside of JSON strings only.
SLY = 'data: [DONE]\n\ndata: {"error": 1}\n\nevent: error\n"choices":[] "finish_reason":"abort" event: message_stop'
GOOD = said("so ") + said(SLY) + said("be it", finish_reason="stop")
MESSAGE = (
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":7,"output_tokens":0}}}\n\n'
    + b'event: content_block_delta\ndata: {"delta":{"type":"text_delta","text":"event: message_stop"}}\n\n'
    + b'event: message_delta\ndata: {"delta":{"stop_reason":"end_turn"},"usage":{"input_tokens":7,"output_tokens":2}}\n\n'
    + b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)

RESPONSE = (
    b'event: response.created\ndata: {"response":{"status":"in_progress","usage":null}}\n\n'
    + b'event: response.output_text.delta\ndata: {"delta":"event: response.failed"}\n\n'
    + b'event: response.incomplete\ndata: {"response":{"status":"incomplete","usage":{"input_tokens":3,"output_tokens":5}}}\n\n'
)


def fed(scan: StreamScan, *chunks: bytes) -> bytes:
    """What a client gets: nothing that came after a death."""
    out = b""
    for chunk in chunks:
        if chunk and not scan.died:
            out += scan.feed(chunk)
    return out


def cuts(stream: bytes) -> list[tuple[bytes, ...]]:
    """The stream in two parts at every byte, and byte by byte."""
    return [(stream[:i], stream[i:]) for i in range(len(stream))] + [tuple(bytes([b]) for b in stream)]


def test_a_withheld_usage_event_is_all_that_is_missing() -> None:
    for chunks in cuts(GOOD + USAGE + DONE):
        scan = StreamScan(CHAT, withhold_usage=True)
        assert fed(scan, *chunks) == GOOD + DONE
        assert (scan.usage.prompt, scan.usage.completion, scan.usage.cached) == (7, 2, 4)
        assert (scan.events, scan.complete, scan.died) == (4, True, False)


def token(text: str, **more: object) -> bytes:
    """An event as vLLM writes it: id first, then one choice."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None, **more}
    return b"data: " + msgspec.json.encode({"id": "chatcmpl-1", "model": "tiny", "choices": [choice]}) + b"\n\n"


# `"finish_reason":null` inside the text, so that the events that are told cheaply are the right ones.
END_SLY = '"finish_reason":null data: [DONE]\n\n"choices":[]'
WHOLE = (
    b'data: {"id":"chatcmpl-1","choices":[{"delta":{"content":"'
    + rb"\"finish_reason\":null"
    + b'"},"finish_reason":"abort"}]}\n\n'
)


@pytest.mark.parametrize("end", [USAGE + DONE, DEAD, ABORTED, WHOLE])
def test_single_tokens_are_told_cheaply_and_treated_alike(end: bytes) -> None:
    tokens = token("so") + token(END_SLY) + token("be it") + token("", finish_reason="stop")
    for chunks in [*cuts(tokens + end), tuple(e + b"\n\n" for e in (tokens + end).split(b"\n\n")[:-1])]:
        scan = StreamScan(CHAT, withhold_usage=True)
        ok = end == USAGE + DONE
        assert fed(scan, *chunks) == tokens + (DONE if ok else b"")
        assert (scan.events, scan.complete, scan.died) == (4 + ok, ok, not ok)
        assert scan.usage.completion == (2 if ok else None)


@pytest.mark.parametrize(
    ("route", "stream", "why"),
    [
        (CHAT, token("so") + token("", finish_reason="length", stop_reason=None) + USAGE + DONE, "length"),
        (CHAT, token("so") + token("", finish_reason="stop", stop_reason="secret") + USAGE + DONE, "stop"),
        (CHAT, token(END_SLY) + token('"finish_reason":"no"') + DONE, None),
        (MESSAGES, MESSAGE, "end_turn"),
        (RESPONSES, RESPONSE, "incomplete"),
    ],
)
def test_why_an_answer_ended_is_the_engines_word_and_never_the_clients(
    route: Route, stream: bytes, why: str | None
) -> None:
    for chunks in cuts(stream):
        scan = StreamScan(route, withhold_usage=True)
        fed(scan, *chunks)
        assert scan.finish == why


def test_whoever_asked_for_usage_gets_every_byte() -> None:
    for chunks in cuts(GOOD + USAGE + DONE):
        scan = StreamScan(CHAT, withhold_usage=False)
        assert fed(scan, *chunks) == GOOD + USAGE + DONE
        assert (scan.events, scan.usage.completion) == (5, 2)


@pytest.mark.parametrize("end", [DEAD, ABORTED, b"event: error\ndata: {}\n\n"])
def test_an_error_frame_and_what_follows_never_reach_the_client(end: bytes) -> None:
    for chunks in cuts(GOOD + end + DONE):
        scan = StreamScan(CHAT, withhold_usage=True)
        assert fed(scan, *chunks) == GOOD
        assert (scan.died, scan.complete, scan.error) == (True, False, end[:-2])


@pytest.mark.parametrize(
    ("route", "stream"),
    [
        (RESPONSES, RESPONSE.replace(b'{"status"', b'{"metadata":{"finish_reason":"abort"},"status"')),
        (MESSAGES, MESSAGE.replace(b'{"delta"', b'{"input":{"finish_reason":"abort"},"delta"')),
    ],
)
def test_json_of_the_clients_or_the_models_is_no_word_of_the_engines(route: Route, stream: bytes) -> None:
    assert b'{"finish_reason":"abort"}' in stream
    for chunks in cuts(stream):
        scan = StreamScan(route, withhold_usage=False)
        assert fed(scan, *chunks) == stream
        assert (scan.complete, scan.died) == (True, False)


def test_an_error_frame_may_be_the_first_event() -> None:
    for chunks in cuts(DEAD + DONE):
        scan = StreamScan(CHAT, withhold_usage=False)
        assert fed(scan, *chunks) == b""
        assert scan.error == DEAD[:-2]


def test_a_message_is_whole_only_with_its_last_event() -> None:
    for chunks in cuts(MESSAGE):
        scan = StreamScan(MESSAGES, withhold_usage=False)
        assert fed(scan, *chunks) == MESSAGE
        assert (scan.complete, scan.usage.prompt, scan.usage.completion, scan.events) == (True, 7, 2, 4)
    scan = StreamScan(MESSAGES, withhold_usage=False)
    fed(scan, MESSAGE[: MESSAGE.rindex(b"event: message_stop")])
    assert not scan.complete


@pytest.mark.parametrize("end", ["completed", "incomplete", "failed"])
def test_a_response_may_end_in_three_ways(end: str) -> None:
    last = f'event: response.{end}\ndata: {{"response":{{"usage":{{"input_tokens": 3, "output_tokens": 5}}}}}}\n\n'
    stream = b'event: response.created\ndata: {"type":"response.created"}\n\n' + last.encode()
    for chunks in cuts(stream):
        scan = StreamScan(RESPONSES, withhold_usage=False)
        assert fed(scan, *chunks) == stream
        assert (scan.complete, scan.usage.prompt, scan.usage.completion) == (True, 3, 5)


def test_a_stream_without_its_end_is_not_complete_whatever_it_talks_about() -> None:
    scan = StreamScan(CHAT, withhold_usage=True)
    assert fed(scan, GOOD, said("data: [DONE]")[:-1]) == GOOD
    assert not scan.complete


def test_an_event_without_end_is_bounded() -> None:
    scan = StreamScan(CHAT, withhold_usage=False)
    assert fed(scan, *[b"x" * (1 << 20)] * (MAX_EVENT_BYTES // (1 << 20) + 1)) == b""
    assert scan.died


@given(
    texts=st.lists(st.text(), max_size=5),
    withhold=st.booleans(),
    dies=st.booleans(),
    at=st.lists(st.integers(0, 2000), max_size=8),
)
def test_no_text_and_no_cut_changes_what_is_delivered(
    texts: list[str], withhold: bool, dies: bool, at: list[int]
) -> None:
    good = b"".join(map(said, texts))
    stream = good + (DEAD if dies else USAGE) + DONE
    marks = sorted({0, len(stream), *(i for i in at if i < len(stream))})
    scan = StreamScan(CHAT, withhold_usage=withhold)
    out = fed(scan, *(stream[a:b] for a, b in itertools.pairwise(marks)))
    assert out == good + (b"" if dies else DONE if withhold else USAGE + DONE)
    assert (scan.died, scan.complete) == (dies, not dies)
    assert scan.events == out.count(b"\n\n")


def test_the_last_event_of_a_broken_stream_is_in_the_dialect_of_its_route() -> None:
    error = EngineBroken("the engine died")
    openai = error_event("/v1/chat/completions", "openai", error, "req_1")
    assert openai.startswith(b'data: {"error":{') and openai.endswith(b"\n\n")
    anthropic = error_event("/v1/messages", "anthropic", error, "req_1")
    assert anthropic.startswith(b'event: error\ndata: {"type":"error","error":{"type":"api_error"')
    response = error_event("/v1/responses", "openai", error, "req_1")
    assert response.startswith(b'event: error\ndata: {"type":"error","code":"engine_error","message":"the engine died"')


def test_idle_connections_are_given_up_before_the_engine_closes_them() -> None:
    assert IDLE_S < _KEEP_ALIVE_S
