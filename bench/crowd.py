"""Clients that keep a number of streams open while something is broken under them.

They live on a thread of their own with an event loop, so that what breaks things can block. A request whose connection
breaks before a byte of its answer came is sent once more on a new one, as OpenAI's clients do by themselves.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import uvloop

from bench.mix import Ask, Witness, encode
from bench.stream import Connection

_ids = itertools.count(1)
_PAUSE_S = 0.5  # before the same is sent again, as OpenAI's clients wait: a killed process takes a while to be gone


class Crowd:
    """A context manager: inside it, each of the given iterators has that many clients, who ask again as soon as they are
    answered. `stop` lets what is open end."""

    def __init__(
        self, base_url: str, headers: Mapping[str, str], clients: list[tuple[int, Iterator[Ask]]], timeout_s: float
    ) -> None:
        url = urlsplit(base_url)
        self._host, self._port = url.hostname or "127.0.0.1", url.port or 80
        self._headers, self._clients, self._timeout_s = dict(headers), clients, timeout_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()), name="crowd", daemon=True)
        self._open: dict[str, Witness] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.ended: list[Witness] = []

    @property
    def size(self) -> int:
        return sum(n for n, _ in self._clients)

    def open(self) -> list[Witness]:
        """What is under way now."""
        return list(self._open.values())

    def begun(self) -> int:
        """How many of those have had a byte of their answer."""
        return sum(bool(w.body) for w in self.open())

    def send(self, ask: Ask, within_s: float) -> Witness:
        """One request more, to its end."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(self._one(ask), self._loop).result(within_s)

    def stop(self) -> list[Witness]:
        """Nothing new is asked; every answer that was, when all have ended."""
        self._ending.set()
        self._thread.join()
        return self.ended

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._ending.set()
        if kind is None:  # else nobody wants the answers, and the thread ends with the process
            self._thread.join()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        workers = [self._work(asks) for n, asks in self._clients for _ in range(n)]
        await asyncio.gather(*workers)

    async def _work(self, asks: Iterator[Ask]) -> None:
        idle: Connection | None = None
        while not self._ending.is_set():
            witness, idle = await self._ask(next(asks), idle)
            if witness.error or witness.status >= 400:
                await asyncio.sleep(_PAUSE_S)
        if idle is not None:
            idle.close()

    async def _one(self, ask: Ask) -> Witness:
        witness, idle = await self._ask(ask, None)
        if idle is not None:
            idle.close()
        return witness

    async def _ask(self, ask: Ask, idle: Connection | None) -> tuple[Witness, Connection | None]:
        """Send it and see it to its end; the connection when it can be used again."""
        witness = Witness(ask, f"chaos-{next(_ids)}", time.monotonic())
        request = encode(ask, witness.request_id, f"{self._host}:{self._port}", self._headers)
        self._open[witness.request_id] = witness
        connection: Connection | None = None
        for again in (False, True):
            witness.again, witness.error, witness.end = again, "", float("nan")
            connection = idle if idle is not None and idle.reusable and not again else await self._connect(witness)
            if connection is None:
                continue
            witness.port = connection.local_port
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            connection.send(request, witness, lambda _, done=done: done.set_result(None))  # type: ignore[misc]
            bound = asyncio.get_running_loop().call_later(self._timeout_s, connection.abort, "client timeout")
            await done
            bound.cancel()
            if again or not (connection.untouched and witness.error):
                break
            await asyncio.sleep(_PAUSE_S)
        del self._open[witness.request_id]
        witness.settle()
        self.ended.append(witness)
        return witness, connection if connection is not None and connection.reusable else None

    async def _connect(self, witness: Witness) -> Connection | None:
        try:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(Connection, self._host, self._port)
        except OSError as error:
            witness.error, witness.end = f"connect: {error.strerror or error}", time.monotonic()
            await asyncio.sleep(_PAUSE_S)
            return None
        return connection
