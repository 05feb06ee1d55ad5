"""The server on the gateway's sockets: what a planned stop owes to those who are connected, and who is not waited for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serving.fleet.lifeline import Lifelines
from serving.gateway import listener
from serving.gateway.listener import Server

ASK = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n"
BODY = b"hi"


class Hall:
    """A server that answers when it is told to."""

    def __init__(self, said: bytes = b"ok") -> None:
        self.said = said
        self.answer = asyncio.Event()
        self.answer.set()
        self.socket = listener.listener("127.0.0.1", 0, shared=True)
        self.private = listener.listener("127.0.0.1", 0, shared=False)
        self.server = Server(self._app, private=self.private.getsockname())

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await self.answer.wait()
        length = str(len(self.said)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": self.said})

    def knock(self) -> socket.socket:
        """A connection that the kernel has taken, and the server has not."""
        client = socket.create_connection(self.socket.getsockname(), timeout=10)
        client.setblocking(False)
        return client

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.socket.getsockname())


@pytest.fixture
async def hall(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hall]:
    monkeypatch.setattr(listener, "LAST_CALL_S", 0.2)
    hall = Hall()
    async with opened(hall):
        yield hall


@contextlib.asynccontextmanager
async def opened(hall: Hall) -> AsyncIterator[None]:
    task = asyncio.create_task(hall.server.serve([hall.socket, hall.private]))
    while not hall.server.started:
        await asyncio.sleep(0)
    yield
    hall.server.should_exit = True
    await asyncio.wait_for(task, 10)


async def answer(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.readuntil(b"ok"), 10)


async def test_a_planned_stop_answers_whom_the_kernel_had_let_in(hall: Hall) -> None:
    clients = [hall.knock() for _ in range(20)]  # nothing is awaited until the stop: nobody has accepted them
    for client in clients[:10]:
        client.send(ASK + BODY)

    async def answered(client: socket.socket, speaks: bool) -> bytes:
        reader, writer = await asyncio.open_connection(sock=client)
        if speaks:
            writer.write(ASK + BODY)
        said = await answer(reader)
        writer.close()
        return said

    asked = [asyncio.create_task(answered(client, n >= 10)) for n, client in enumerate(clients)]
    await hall.server.leave()
    assert all(b"connection: close" in said for said in await asyncio.gather(*asked))
    with pytest.raises(OSError):
        hall.knock()


async def test_what_runs_at_a_planned_stop_ends_in_its_time_and_is_the_last_on_its_connection(hall: Hall) -> None:
    hall.answer.clear()
    reader, writer = await hall.connect()
    writer.write(ASK + BODY)
    idle, _ = await hall.connect()
    while not hall.server.server_state.tasks:
        await asyncio.sleep(0)
    await hall.server.leave()
    assert await asyncio.wait_for(idle.read(), 10) == b""
    assert hall.server.busy
    hall.answer.set()
    assert b"connection: close" in await answer(reader)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


@pytest.mark.parametrize("asks", ["in the last call", "as it ends"])
async def test_a_kept_connection_whose_next_request_has_come_is_not_reset(
    hall: Hall, monkeypatch: pytest.MonkeyPatch, asks: str
) -> None:
    monkeypatch.setattr(listener, "LAST_CALL_S", 0.0 if asks == "as it ends" else 3600.0)
    kept = hall.knock()
    reader, writer = await asyncio.open_connection(sock=kept)
    writer.write(ASK + BODY)
    assert b"connection: close" not in await answer(reader)
    leaving: Any = hall.server.leave()
    if asks == "in the last call":
        leaving = asyncio.create_task(leaving)
        while hall.server.servers[0].is_serving():
            await asyncio.sleep(0)
    writer.write(ASK + BODY)
    await leaving  # "as it ends": the server's loop has not run since the client wrote
    assert b"connection: close" in await answer(reader)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_a_planned_stop_waits_for_no_lifeline(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "LAST_CALL_S", 3600.0)
    reader, writer = await asyncio.open_connection(*hall.private.getsockname())
    while not hall.server.server_state.connections:
        await asyncio.sleep(0)
    await asyncio.wait_for(hall.server.leave(), 10)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    assert not hall.server.busy
    writer.close()


async def test_what_a_slow_reader_has_not_taken_yet_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "LAST_CALL_S", 0.0)
    hall = Hall(b"." * 16_000_000 + b"ok")
    async with opened(hall):
        reader, writer = await hall.connect()
        writer.write(ASK + BODY)
        await asyncio.wait_for(reader.readexactly(1), 10)
        while hall.server.server_state.tasks:  # the app has said all; most of it is in this process
            await asyncio.sleep(0)
        await hall.server.leave()
        assert hall.server.busy
        assert (await asyncio.wait_for(reader.read(), 10)).endswith(b".ok")
        async with asyncio.timeout(10):
            while hall.server.busy:
                await asyncio.sleep(0.001)
        writer.close()


async def test_who_does_not_read_the_end_of_an_answer_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEAD_TIMEOUT_S", 0.02)
    monkeypatch.setattr(listener, "UNREAD_S", 0.1)
    hall = Hall(b"." * 16_000_000)
    async with opened(hall):
        _, writer = await hall.connect()
        writer.write(ASK + BODY)
        async with asyncio.timeout(10):
            while not hall.server.server_state.total_requests:
                await asyncio.sleep(0.001)
            while hall.server.server_state.connections:
                await asyncio.sleep(0.001)
        writer.close()


async def test_a_request_that_does_not_come_to_its_point_is_not_waited_for(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "HEAD_TIMEOUT_S", 0.02)
    quick = Hall()
    task = asyncio.create_task(quick.server.serve([quick.socket]))
    quick.answer.clear()
    while not quick.server.started:
        await asyncio.sleep(0)
    (mute, _), (half, half_out), (used, used_out), (asking, asking_out) = [await quick.connect() for _ in range(4)]
    half_out.write(ASK[:20])
    asking_out.write(ASK + BODY)
    for reader in (mute, half):
        assert await asyncio.wait_for(reader.read(), 10) == b""
    quick.answer.set()
    await answer(asking)
    # Between two requests it is uvicorn's to wait; the second one that begins is not waited for longer than the first.
    asking_out.write(ASK[:20])
    assert await asyncio.wait_for(asking.read(), 10) == b""
    assert await asyncio.wait_for(used.read(), 10) == b""
    used_out.close()
    quick.server.should_exit = True
    await task


async def test_a_lifeline_is_closed_like_all_that_is_mute_and_its_gateway_is_not_taken_for_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "HEAD_TIMEOUT_S", 0.02)
    hall = Hall()
    task = asyncio.create_task(hall.server.serve([hall.private]))
    cuts: asyncio.Queue[str] = asyncio.Queue()
    lines = Lifelines(cuts.put_nowait)
    lines.hold("one", "http://{}:{}".format(*hall.private.getsockname()))
    seen = set[Any]()
    async with asyncio.timeout(10):
        while len(seen) < 3:
            seen |= hall.server.server_state.connections
            await asyncio.sleep(0.001)
        assert cuts.empty()
        await hall.server.leave()
        assert await cuts.get() == "one"
    lines.keep(())
    await task
