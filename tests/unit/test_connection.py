"""Bytes of an engine's answer reach the receiver whole and in order, however the network cuts them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable
from unittest import mock

from hypothesis import example, given
from hypothesis import strategies as st

from serving.gateway.connection import Connection, Pool
from serving.gateway.relay import Reply
from serving.gateway.routes import SERVED

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Taken:
    """A receiver that keeps what it gets; `alone` counts the chunks that passed by the parser."""

    def __init__(self) -> None:
        self.body = b""
        self.alone = 0
        self.continued = 0
        self.ends: list[str | None] = []

    def answered(self, status: int, headers: dict[bytes, bytes]) -> None:
        assert (status, self.body) == (200, b"")

    def awaited(self) -> None:
        assert not self.body
        self.continued += 1

    def received(self, data: bytes) -> None:
        self.body += data

    def chunk(self, data: bytes, start: int, end: int) -> None:
        assert data == framed(data[start:end])
        self.body += data[start:end]
        self.alone += 1

    def ended(self, error: str | None) -> None:
        self.ends.append(error)


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def connected(pool: Pool) -> tuple[Connection, mock.Mock]:
    connection = Connection(pool, ("127.0.0.1", 1))
    transport = mock.create_autospec(asyncio.Transport)
    transport.is_closing.return_value = False
    connection.connection_made(transport)
    return connection, transport


def fed(reads: list[bytes]) -> Taken:
    """What a receiver got of an answer that came in these reads, on a connection that is kept afterwards."""
    pool, taken = mock.create_autospec(Pool), Taken()
    connection, _ = connected(pool)
    connection.send(b"", b"", taken)
    for data in reads:
        connection.data_received(data)
    if taken.ends == [None]:
        pool.put.assert_called_once_with(connection)
    return taken


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = [0, *sorted({a % len(data) for a in at} - {0}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


# Pieces that look like framing, and one that is longer than any size looked up.
pieces = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=40), st.sampled_from([b"\r\n", b"0\r\n\r\n", b"3\r\nabc\r\n", b"x" * 5000])
    ),
    max_size=6,
)


@given(pieces, st.lists(st.integers(0, 6000), max_size=12))
@example([b"abc", b"def"], [len(HEAD) + 8 + 1])  # a read ends between two digits, or before a size's line end
@example([b"a" * 20, b"def"], [len(HEAD) + 26, len(HEAD) + 27])
def test_any_cutting_gives_the_same_body_and_one_end(parts: list[bytes], at: list[int]) -> None:
    stream = HEAD + b"".join(map(framed, parts)) + b"0\r\n\r\n"
    taken = fed(cut(stream, at))
    assert (taken.body, taken.ends) == (b"".join(parts), [None])


def test_a_chunk_alone_in_a_read_passes_by_the_parser() -> None:
    parts = [b"one", b"two" * 100, b"three"]
    taken = fed([HEAD, *map(framed, parts), b"0\r\n\r\n"])
    assert (taken.body, taken.ends, taken.alone) == (
        b"".join(parts),
        [None],
        2,
    )  # the first tells that there are chunks


def test_an_answer_of_known_length_is_never_taken_for_chunks() -> None:
    body = b"3\r\nabc\r\n"
    taken = fed([b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (2 * len(body)), body, body])
    assert (taken.body, taken.ends, taken.alone) == (body * 2, [None], 0)


def test_that_the_request_is_being_read_is_told_before_its_answer() -> None:
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
    for at in (9, 25, 60):
        taken = fed(cut(answer, [at]))
        assert (taken.body, taken.ends, taken.continued) == (b"abc", [None], 1)


async def test_who_is_slow_pauses_no_connection_that_may_be_anothers_by_now() -> None:
    """The whole answer came in one read, so the connection was back in the pool before the first byte went to the client."""
    stream = b"data: {}\n\ndata: [DONE]\n\n"
    read = asyncio.get_running_loop().create_future()

    class Slow:
        def push(self, data: bytes) -> Awaitable[None]:
            return read

        end = push

        def chunk(self, data: bytes) -> bool:
            return False

    connection, transport = connected(mock.create_autospec(Pool))
    reply = Reply(connection, SERVED["/v1/chat/completions"], False)
    connection.send(b"", b"", reply)
    connection.data_received(HEAD + framed(stream) + b"0\r\n\r\n")
    await reply.begun()
    asyncio.get_running_loop().call_soon(read.set_result, None)
    await reply.relay(Slow())
    assert reply.finished
    transport.pause_reading.assert_not_called()
    transport.resume_reading.assert_not_called()
