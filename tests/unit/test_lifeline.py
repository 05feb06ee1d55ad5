"""A process that ends is noticed by its connection, at once; nobody else's end is."""

from __future__ import annotations

import asyncio
import contextlib

from serving.fleet import lifeline
from serving.fleet.lifeline import Lifelines


class Listener:
    """A process that listens, as far as a connection can tell."""

    def __init__(self) -> None:
        self.connections: list[asyncio.StreamWriter] = []
        self.url = ""
        self._server: asyncio.Server | None = None

    async def start(self) -> Listener:
        self._server = await asyncio.start_server(lambda _, w: self.connections.append(w), "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def connected(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.connections) < count:
                await asyncio.sleep(0.001)

    def end(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self.connections:
            writer.transport.abort()


async def test_an_end_is_told_at_once_and_once_and_of_nobody_else() -> None:
    one, other = await Listener().start(), await Listener().start()
    cuts: asyncio.Queue[str] = asyncio.Queue()
    lines = Lifelines(cuts.put_nowait)
    for _ in range(3):  # whoever says again and again that it lives is held by one connection
        lines.hold("one", one.url)
        lines.hold("other", other.url)
    await one.connected(1)
    await other.connected(1)
    one.end()
    async with asyncio.timeout(10):
        assert await cuts.get() == "one"
    assert cuts.empty() and len(one.connections) == len(other.connections) == 1
    lines.keep(())
    other.end()


async def test_one_that_only_closes_the_connection_is_held_again_and_not_taken_for_gone() -> None:
    listener = await Listener().start()
    cuts: asyncio.Queue[str] = asyncio.Queue()
    lines = Lifelines(cuts.put_nowait)
    lines.hold("one", listener.url)
    for count in range(1, 4):
        await listener.connected(count)
        listener.connections[-1].transport.abort()
    await listener.connected(4)
    assert cuts.empty()
    listener.end()
    async with asyncio.timeout(10):
        assert await cuts.get() == "one"
    lines.keep(())


async def test_one_that_was_cut_is_held_again_when_it_says_that_it_lives() -> None:
    before, after = await Listener().start(), await Listener().start()
    cuts: asyncio.Queue[str] = asyncio.Queue()
    lines = Lifelines(cuts.put_nowait)
    lines.hold("one", before.url)
    await before.connected(1)
    before.end()
    async with asyncio.timeout(10):
        await cuts.get()
    lines.hold("one", after.url)
    await after.connected(1)
    lines.keep({"one"})
    assert not lines._held["one"][1].done()
    lines.keep(())
    after.end()


async def test_one_that_is_known_to_be_gone_and_one_that_was_never_there_say_nothing() -> None:
    listener = await Listener().start()
    cuts: list[str] = []
    lines = Lifelines(cuts.append)
    lines.hold("gone", listener.url)
    await listener.connected(1)
    task = lines._held["gone"][1]
    lines.drop("gone")
    listener.end()
    lines.hold("never", listener.url)
    tried = lines._held["never"][1]
    lines.hold("never", listener.url)
    assert lines._held["never"][1] is tried, "not tried at every word of it"
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert not cuts and lifeline.AGAIN_S > 1
    lines.keep(())
