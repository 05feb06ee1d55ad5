"""The gateway's connections to engines: kept and used again while that is safe, and never longer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from serving.fleet.endpoint import Endpoint, State
from serving.gateway.protocol import MAX_HEAD_BYTES
from tests.gateway.harness import CHAT, EngineRoom, Front, chat, eventually

pytestmark = pytest.mark.usefixtures("short_pauses")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Wire:
    """An engine played byte by byte: `play` gets every connection; `opened` counts them."""

    def __init__(self, play: Handler) -> None:
        self.opened = 0
        self.server: asyncio.Server
        self._play = play
        self.writers: list[asyncio.StreamWriter] = []

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._play(reader, writer)
        writer.close()


@contextlib.asynccontextmanager
async def wire(front: Front, play: Handler) -> AsyncIterator[Wire]:
    made = Wire(play)
    server = made.server = await asyncio.start_server(made.connected, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    front.serve(Endpoint(id="wire", model="tiny", version="v1", url=url, state=State.READY, slots=8))
    async with server:
        yield made
        for writer in made.writers:
            writer.close()


async def request(reader: asyncio.StreamReader) -> bytes:
    """The body of the next request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(h[15:]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:"))
    return await reader.readexactly(length)


def whole(text: str, extra: str = "") -> bytes:
    body = json.dumps({"said": text})
    return f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{extra}content-length: {len(body)}\r\n\r\n{body}".encode()


def raw(front: Front, body: object, *more: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {CHAT} HTTP/1.1", "host: x", f"authorization: Bearer {front.keys.all}", *more]
    return "\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data


async def read_on(reader: asyncio.StreamReader, size: int) -> None:
    """At least so many bytes."""
    async with asyncio.timeout(100):
        while size > 0:
            data = await reader.read(2**20)
            assert data, f"it ended {size} bytes too early"
            size -= len(data)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def said(front: Front) -> str:
    answer = await front.ask(body=chat())
    assert answer.status == 200, answer
    return str(json.loads(answer.body)["said"])


async def test_one_connection_carries_one_request_after_the_other(front: Front) -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(whole("first"))
        await request(reader)
        writer.write(
            STREAM + chunk(b'data: {"choices":[{"delta":{}}]}\n\n') + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        )
        await request(reader)
        writer.write(whole("third"))

    async with wire(front, play) as engine:
        assert await said(front) == "first"
        assert (await front.ask(body=chat(stream=True))).body.endswith(b"[DONE]\n\n")
        assert await said(front) == "third"
        assert engine.opened == 1


async def test_a_connection_that_the_engine_will_close_is_not_used_again(front: Front) -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(whole("bye", "connection: close\r\n"))
        await reader.read()  # held open, so that only the header tells

    async with wire(front, play) as engine:
        assert [await said(front), await said(front)] == ["bye", "bye"]
        assert engine.opened == 2


async def test_a_connection_closed_while_idle_is_not_used_again(front: Front) -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(whole("bye"))

    async with wire(front, play) as engine:
        pool = front.gateway._engines._pool  # type: ignore[union-attr]
        assert await said(front) == "bye"
        await eventually("the gateway saw it close", lambda: not any(pool._idle.values()))
        assert await said(front) == "bye"
        assert engine.opened == 2


async def test_a_kept_connection_closed_under_a_request_is_no_death(front: Front) -> None:
    """The engine may have closed it for any reason; it still takes connections, so this request did not kill it."""

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(whole("first on it"))
        await request(reader)  # and closed without a byte

    async with wire(front, play) as engine:
        for count in range(1, 6):
            assert await said(front) == "first on it"
            assert engine.opened == count
    assert front.metric("steelyard_upstream_attempts_total", outcome="ok") == 5
    assert front.metric("steelyard_upstream_attempts_total") == 5


async def test_one_closed_by_an_engine_that_is_gone_is_a_death(front: Front, room: EngineRoom) -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(whole("alive"))
        await request(reader)
        server.close()

    async with wire(front, play) as engine:
        server = engine.server
        assert await said(front) == "alive"
        asked = asyncio.create_task(front.ask(body=chat()))
        await eventually("it died", lambda: front.metric("steelyard_upstream_attempts_total", outcome="died") == 1)
        front.table(room.shared())
        assert (await asked).status == 200
    assert front.metric("steelyard_upstream_attempts_total", outcome="died") == 1


async def test_a_new_connection_closed_under_a_request_is_a_death(front: Front) -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)

    async with wire(front, play) as engine:
        assert (await front.ask(body=chat())).status == 502
        assert engine.opened == 3  # the same engine each time: the fuse counts engines, not cuts
    assert front.metric("steelyard_upstream_attempts_total", outcome="died") == 3


async def test_what_an_engine_says_unasked_is_never_an_answer(front: Front) -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(whole("asked"))
        await writer.drain()
        await told.wait()
        writer.write(whole("unasked"))
        await reader.read()

    told = asyncio.Event()
    async with wire(front, play) as engine:
        pool = front.gateway._engines._pool  # type: ignore[union-attr]
        assert await said(front) == "asked"
        told.set()
        await eventually("the gateway dropped it", lambda: not any(pool._idle.values()))
        assert await said(front) == "asked"
        assert engine.opened == 2


async def test_interim_responses_are_not_the_answer(front: Front) -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + whole("the answer"))
        await request(reader)
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
        writer.write(whole("another"))

    async with wire(front, play):
        assert [await said(front), await said(front)] == ["the answer", "another"]


async def test_what_is_not_http_is_an_engine_that_failed(front: Front) -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
        await reader.read()

    async with wire(front, play):
        answer = await front.ask(body=chat())
        assert (answer.status, answer.error["code"]) == (502, "engine_error")


async def test_an_answer_shorter_than_it_said_is_an_engine_that_died(front: Front) -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(whole("cut short")[:-5])

    async with wire(front, play):
        assert (await front.ask(body=chat())).status == 502


async def test_an_answer_cut_anywhere_by_the_socket_is_the_same(front: Front) -> None:
    answer = (
        STREAM
        + chunk(b'data: {"choices":[{"delta":{"content":"hello"}}]}\n\n')
        + chunk(b"data: [DONE]\n\n")
        + b"0\r\n\r\n"
    )

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for at in range(1, len(answer), 9):
            await request(reader)
            for piece in (answer[:at], answer[at:]):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)

    async with wire(front, play) as engine:
        for _ in range(1, len(answer), 9):
            got = await front.ask(body=chat(stream=True))
            assert got.body == b'data: {"choices":[{"delta":{"content":"hello"}}]}\n\ndata: [DONE]\n\n'
        assert engine.opened == 1


async def test_a_slow_client_holds_its_engine_back_and_gets_everything(front: Front) -> None:
    """Between a client that reads nothing and an engine that writes, the gateway keeps little and loses nothing."""
    event = b'data: {"choices":[{"delta":{"content":"' + b"x" * 65_000 + b'"}}]}\n\n'
    total, written = 2_000, 0

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await request(reader)
        writer.write(STREAM)
        for _ in range(total):
            writer.write(chunk(event))
            await writer.drain()
            written += 1
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    async with wire(front, play):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=1024)
        writer.write(raw(front, chat(stream=True)))
        await eventually("the engine is held back", _still(lambda: written))
        assert 0 < written < total / 2
        await read_on(reader, total * len(event))
        await eventually("the engine wrote it all", lambda: written == total)
        writer.transport.abort()


async def test_a_stream_whose_client_has_not_read_the_answer_before_it_holds_its_engine_back(front: Front) -> None:
    """Its own head cannot leave yet, so nothing of it has."""
    event = b'data: {"choices":[{"delta":{"content":"' + b"x" * 65_000 + b'"}}]}\n\n'
    large, total, written = "y" * 8_000_000, 2_000, 0

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        if not json.loads(await request(reader)).get("stream"):
            writer.write(whole(large))
            await writer.drain()
            await request(reader)
        writer.write(STREAM)
        for _ in range(total):
            writer.write(chunk(event))
            await writer.drain()
            written += 1
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    async with wire(front, play):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=1024)
        writer.write(raw(front, chat()) + raw(front, chat(stream=True)))
        await eventually("the engine is held back", _still(lambda: written))
        assert 0 < written < total / 2
        await read_on(reader, len(large) + total * len(event))
        await eventually("the engine wrote it all", lambda: written == total)
        writer.transport.abort()


async def test_a_client_that_pipelines_and_leaves_is_missed(front: Front, room: EngineRoom) -> None:
    engine = room.start(sim_itl_ms=50, slots=1)
    front.serve(engine)
    for body in (chat(max_tokens=1000), chat(max_tokens=1000, stream=True)):
        _, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(raw(front, body))
        await engine.inside(1)
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)  # so that the gateway has read it; else this is a client like any other
        writer.transport.abort()
        await engine.inside(0)
    await eventually("nothing is inside", lambda: front.gateway.requests == 0)


async def test_the_head_of_a_request_has_a_limit_that_needs_no_key(front: Front) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n".encode() + b"x: " + b"y" * MAX_HEAD_BYTES)
    async with asyncio.timeout(10):
        told = await reader.read()
    assert told.startswith(b"HTTP/1.1 431 ") and b"request_head_too_large" in told and b"connection: close" in told
    writer.close()


async def test_an_upgrade_is_refused_and_what_follows_it_is_no_request(front: Front, room: EngineRoom) -> None:
    front.serve(room.shared())
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    head = raw(front, chat(), "connection: Upgrade", "upgrade: h2c").partition(b"\r\n\r\n")[0]
    writer.write(head + b"\r\n\r\n")
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    async with asyncio.timeout(10):
        told = await reader.read()
    assert told.startswith(b"HTTP/1.1 400 ") and b"not upgraded" in told and told.count(b"HTTP/1.1") == 1
    writer.close()


async def test_a_connection_that_waits_for_a_slow_client_carries_nobody_else(front: Front) -> None:
    """The end of a stream may come with its last bytes, while its client is behind and reading is paused."""
    event = b'data: {"choices":[{"delta":{"content":"' + b"x" * 60_000 + b'"}}]}\n\n'

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        if streamed:
            writer.write(whole("another"))
            return
        streamed.append(True)
        writer.write(STREAM)
        for _ in range(200):
            writer.write(chunk(event))
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await reader.read()

    streamed: list[bool] = []
    async with wire(front, play) as engine:
        async with front.hung_up(chat(stream=True), request_id="stuck", limit=1024) as reader:
            await reader.readuntil(b"\r\n\r\n")
            assert await said(front) == "another"
            assert engine.opened == 2
        await eventually("it is let go", lambda: front.gateway.requests == 0)
        assert await said(front) == "another"


def _still(count: Callable[[], int], looks: int = 25) -> Callable[[], bool]:
    """True once the count is above zero and was the same so many times in a row."""
    seen: list[int] = []

    def look() -> bool:
        seen.append(count())
        return len(seen) > looks and seen[-1] > 0 and len(set(seen[-looks:])) == 1

    return look
