"""The load generator reads one answer the same way however the socket cuts it."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.recording import Recording
from bench.stream import Answer, Connection


def event(delta: str, finish: str = "null") -> bytes:
    choice = f'{{"index":0,"delta":{delta},"finish_reason":{finish}}}'
    return f'data: {{"id":"c1","object":"chat.completion.chunk","choices":[{choice}]}}\n\n'.encode()


EVENTS = [
    event('{"role":"assistant","content":""}'),
    event('{"content":"gr\\u00fc\\n\\n"}'),
    event('{"content":" two"}'),
    event('{"content":"."}', '"length"'),
    b"data: [DONE]\n\n",
]
DEAD = b'data: {"error":{"message":"EngineCore died","code":500}}\n\n'


def response(events: list[bytes], status: str = "200 OK") -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(e), e) for e in events)
    return f"HTTP/1.1 {status}\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".encode() + (
        chunks + b"0\r\n\r\n"
    )


class Wire:
    """The transport's side of a connection: remembers what was written, closes nothing."""

    def __init__(self) -> None:
        self.written = b""
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True


def connected() -> tuple[Connection, Wire]:
    connection, wire = Connection(), Wire()
    connection.connection_made(cast(asyncio.BaseTransport, wire))
    return connection, wire


def read(pieces: list[bytes], *, lost: bool = False) -> tuple[Answer, Connection]:
    connection, _ = connected()
    done: list[Answer] = []
    answer = Answer(max_tokens=3, due=0.0)
    connection.send(b"POST", answer, done.append)
    for piece in pieces:
        connection.data_received(piece)
    if lost:
        connection.connection_lost(None)
    assert done == [answer], "an answer ends exactly once"
    return answer, connection


WHOLE = response(EVENTS)


def test_a_cut_at_any_byte_changes_nothing() -> None:
    for cut in range(1, len(WHOLE)):
        answer, connection = read([WHOLE[:cut], WHOLE[cut:]])
        assert (answer.status, answer.error, answer.events, answer.tokens) == (200, "", len(EVENTS), 3), cut
        assert answer.start <= answer.first <= answer.end, cut
        assert connection.reusable, cut


@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=40))
def test_many_cuts_change_nothing(cuts: list[int]) -> None:
    edges = [0, *sorted(set(cuts)), len(WHOLE)]
    answer, _ = read([WHOLE[a:b] for a, b in itertools.pairwise(edges)])
    assert (answer.error, answer.events, sum(answer.counts)) == ("", len(EVENTS), len(EVENTS))
    assert answer.times == sorted(answer.times)


def test_single_bytes_change_nothing() -> None:
    answer, _ = read([bytes([b]) for b in WHOLE])
    assert (answer.error, answer.events, len(answer.times)) == ("", len(EVENTS), len(EVENTS))


def test_an_http_chunk_may_end_anywhere_in_an_event() -> None:
    body = b"".join(EVENTS)
    for cut in range(1, len(body)):
        answer, _ = read([response([body[:cut], body[cut:]])])
        assert (answer.error, answer.events) == ("", len(EVENTS)), cut


def test_the_first_token_is_the_first_content_not_the_role() -> None:
    head, rest = response(EVENTS[:1])[: -len(b"0\r\n\r\n")], WHOLE[len(response(EVENTS[:1])) - len(b"0\r\n\r\n") :]
    answer, _ = read([head, rest])
    assert answer.first == answer.times[1] > answer.times[0]


def test_events_of_one_read_share_a_burst() -> None:
    answer, _ = read([WHOLE])
    assert answer.counts == [len(EVENTS)]


def test_usage_tells_the_tokens_when_it_was_asked_for() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":41}}\n\n'
    answer, _ = read([response([*EVENTS[:-1], usage, EVENTS[-1]])])
    assert (answer.error, answer.tokens) == ("", 41)


def test_an_answer_that_stopped_by_itself_counts_its_events() -> None:
    answer, _ = read([response([*EVENTS[:-2], event("{}", '"stop"'), EVENTS[-1]])])
    assert (answer.error, answer.tokens) == ("", len(EVENTS))


def test_a_dead_engine_is_an_error_though_done_follows() -> None:
    answer, _ = read([response([*EVENTS[:3], DEAD, EVENTS[-1]])])
    assert answer.error.startswith("error frame") and "EngineCore died" in answer.error


@pytest.mark.parametrize("missing", [-1, -2])
def test_an_answer_without_done_or_finish_reason_is_incomplete(missing: int) -> None:
    events = list(EVENTS)
    del events[missing]
    assert read([response(events)])[0].error.startswith("incomplete")


def test_an_unexpected_status_is_an_error_with_its_body() -> None:
    body = b'{"error":{"code":"internal"}}'
    answer, connection = read([b"HTTP/1.1 500 Oh\r\ncontent-length: %d\r\n\r\n" % len(body) + body])
    assert answer.error == 'status 500: {"error":{"code":"internal"}}'
    assert connection.reusable


@pytest.mark.parametrize(
    ("header", "promised"), [(b"Retry-After: 7", 7.0), (b"retry-after: soon", None), (b"x: y", None)]
)
def test_a_refusal_is_its_code_and_what_it_promised(header: bytes, promised: float | None) -> None:
    body = b'{"error":{"message":"212 requests wait","code":"queue_full"}}'
    head = b"HTTP/1.1 429 Too Many Requests\r\n%s\r\ncontent-length: %d\r\n\r\n" % (header, len(body))
    answer, _ = read([head + body])
    assert answer.error == "status 429: queue_full"
    assert answer.retry_after_s == promised or (promised is None and np.isnan(answer.retry_after_s))


def test_a_cut_stream_is_an_error() -> None:
    answer, connection = read([WHOLE[:-40]], lost=True)
    assert answer.error == "connection cut"
    assert not connection.reusable and not connection.untouched


def test_a_connection_lost_before_any_byte_may_be_retried() -> None:
    _, connection = read([], lost=True)
    assert connection.untouched


def test_nonsense_is_an_error_and_closes() -> None:
    connection, wire = connected()
    done: list[Answer] = []
    connection.send(b"POST", Answer(1, 0.0), done.append)
    connection.data_received(b"SSH-2.0-OpenSSH\r\n\r\n")
    assert done[0].error.startswith("malformed HTTP") and wire.aborted


def test_a_connection_carries_one_answer_after_another() -> None:
    connection, wire = connected()
    done: list[Answer] = []
    for _ in range(3):
        connection.send(b"POST", Answer(3, 0.0), done.append)
        connection.data_received(WHOLE)
    assert [a.error for a in done] == ["", "", ""]
    assert wire.written == b"POST" * 3


def answered(times: list[float], counts: list[int], *, first: float, **more: Any) -> Answer:
    answer = Answer(max_tokens=more.get("max_tokens", sum(counts)), due=more.get("due", 0.0))
    answer.start, answer.first, answer.end = answer.due, first, times[-1]
    answer.times, answer.counts, answer.status = times, counts, 200
    answer.feed(event("{}", '"length"') + b"data: [DONE]\n\n", first)
    answer.error = more.get("error", "")
    return answer


def test_itl_starts_at_the_first_content_and_merged_events_are_zero() -> None:
    recording = Recording.of([answered([1.0, 1.010, 1.030], [2, 1, 3], first=1.0)], began=0.0)
    assert sorted(recording.itl_ms()) == pytest.approx([0.0, 0.0, 10.0, 20.0])
    assert recording.ttft_ms() == pytest.approx([1000.0])


def test_failed_and_unsettled_requests_count_neither_way() -> None:
    answers = [
        answered([1.0], [1], first=1.0, due=0.2),
        answered([2.0], [1], first=2.0, due=1.5),
        answered([2.0], [1], first=2.0, due=1.5, error="connection cut"),
    ]
    assert Recording.of(answers, began=0.0).ttft_ms(settle_s=1.0) == pytest.approx([500.0])


def test_tokens_are_counted_where_their_events_fall() -> None:
    recording = Recording.of([answered([1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1], first=1.0, max_tokens=8)], began=0.0)
    assert recording.tokens_per_s(1.5, 3.5) == pytest.approx(2.0)


def test_peak_open_counts_overlap() -> None:
    answers = [answered([b], [1], first=b, due=a) for a, b in ((0.0, 2.0), (1.0, 3.0), (2.0, 4.0))]
    assert Recording.of(answers, began=0.0).peak_open == 2


def test_a_recording_survives_its_file(tmp_path: Any) -> None:
    before = Recording.of([answered([1.0, 2.0], [1, 2], first=1.0)], began=0.5)
    before.save(tmp_path / "r.npz")
    after = Recording.load(tmp_path / "r.npz")
    for name, value in vars(before).items():
        np.testing.assert_array_equal(value, getattr(after, name))
